//! How wild a schedule is, which mistake is made on purpose, and what was done and looked at.

use std::fmt;

/// What goes wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mood {
    /// Everything.
    Wild,
    /// Processes begin anew and connections break, and no history is lost.
    Calm,
    /// As calm, with more history than one message of etcd holds.
    Long,
}

/// A mistake that is made on purpose.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    None,
    /// History is taken for known two revisions further back than it is.
    FloorTooLow,
    /// History is taken for complete with the first part of it.
    CompleteAtFirstSight,
    /// etcd's answer for all watches of a stream is taken for one about the watch.
    ProgressForAllIsBelieved,
    /// The newest event of each message of history is lost.
    LastPastIsDropped,
    /// The oldest is told twice.
    FirstPastIsTwice,
    /// A watch that waits for history is told how far it is.
    ProgressWhileHeld,
    /// Followers resume one revision late.
    ResumesOneLate,
    /// Cilium's client resumes one early.
    ResumesOneEarly,
}

impl Fault {
    pub const ALL: [(Self, Mood); 8] = [
        (Self::FloorTooLow, Mood::Wild),
        (Self::CompleteAtFirstSight, Mood::Long),
        (Self::ProgressForAllIsBelieved, Mood::Wild),
        (Self::LastPastIsDropped, Mood::Calm),
        (Self::FirstPastIsTwice, Mood::Calm),
        (Self::ProgressWhileHeld, Mood::Wild),
        (Self::ResumesOneLate, Mood::Calm),
        (Self::ResumesOneEarly, Mood::Calm),
    ];
}

/// What was done and looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    pub schedules: usize,
    pub steps: usize,
    /// Claims whose content was compared.
    pub views: usize,
    /// Events that were compared one by one.
    pub exact: usize,
    /// Looks at a watch or call that had to wait for history.
    pub held: usize,
    /// Watches that began before their server's first list.
    pub resumed_below_list: usize,
    pub restarts: usize,
    pub lists: usize,
}

impl Figures {
    pub fn add(&mut self, more: &Self) {
        self.schedules += 1;
        self.steps += more.steps;
        self.views += more.views;
        self.exact += more.exact;
        self.held += more.held;
        self.resumed_below_list += more.resumed_below_list;
        self.restarts += more.restarts;
        self.lists += more.lists;
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} schedules, {} steps, {} contents and {} events compared, {} restarts, {} resumes from before a server's list, {} looks at who waits, {} lists of readers",
            self.schedules,
            self.steps,
            self.views,
            self.exact,
            self.restarts,
            self.resumed_below_list,
            self.held,
            self.lists
        )
    }
}
