//! The isthmus command.
