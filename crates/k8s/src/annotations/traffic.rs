//! Annotations that say how a service's traffic is spread: tiers of clusters, minimum, spill-over, slow start, algorithm.
//!
//! In: a Service's annotations. Out: [`Preference`] and [`Algorithm`]; what cannot be read is replaced by its default and named.
//! Tiers and what belongs to them mean nothing unless the service is global.

use isthmus_model::{Algorithm, MinHealthy, Preference, Tiers};

use super::{Annotations, flag};
use crate::{Warning, shorten};

/// Ordered tiers of clusters: `local, us-east|us-west, *`.
pub const TIERS: &str = "service.isthmus.io/tiers";
/// How much of a tier must be healthy before it carries all: `2` or `50%`.
pub const MIN_HEALTHY: &str = "service.isthmus.io/min-healthy";
/// Whether a tier below its minimum keeps the share that its capacity is fit for.
pub const SPILL_OVER: &str = "service.isthmus.io/spill-over";
/// How long a backend that became ready takes to its full share: `30s`.
pub const SLOW_START: &str = "service.isthmus.io/slow-start";
/// Cilium's annotation for how a backend is chosen.
pub const ALGORITHM: &str = "service.cilium.io/lb-algorithm";

/// Longest slow start: an hour.
const SLOW_START_SECONDS_MAX: u16 = 3600;

/// Reads the annotations that need a global service, and slow start.
pub(super) fn preference(
    annotations: Option<&Annotations>,
    global: bool,
    warnings: &mut Vec<Warning>,
) -> Preference {
    let Some(annotations) = annotations else {
        return Preference::default();
    };
    let mut preference = Preference::default();
    let mut warn = |name: &'static str, value: &str, takes: &'static str, used: &'static str| {
        warnings.push(Warning::Annotation {
            name,
            value: shorten(value),
            takes,
            used,
        });
    };
    if let Some(text) = annotations.get(SLOW_START) {
        match seconds(text) {
            Some(seconds) => preference.slow_start_seconds = seconds,
            None => warn(SLOW_START, text, "a time from 0s to 1h, as 30s or 2m", "0s"),
        }
    }
    if !global {
        return preference;
    }
    if let Some(text) = annotations.get(TIERS) {
        match text.parse::<Tiers>() {
            Ok(tiers) => preference.tiers = tiers,
            Err(_) => warn(
                TIERS,
                text,
                "at most 8 tiers as in local, us-east|us-west, *",
                "the affinity",
            ),
        }
    }
    if let Some(text) = annotations.get(MIN_HEALTHY) {
        match text.trim().parse::<MinHealthy>() {
            Ok(min) => preference.min_healthy = min,
            Err(_) => warn(MIN_HEALTHY, text, "a number of backends or a percentage", "1"),
        }
    }
    if let Some(text) = annotations.get(SPILL_OVER) {
        preference.spill_over = flag((SPILL_OVER, text), warnings);
    }
    preference
}

/// Reads Cilium's annotation for the algorithm.
pub(super) fn algorithm(annotations: Option<&Annotations>, warnings: &mut Vec<Warning>) -> Algorithm {
    let Some(text) = annotations.and_then(|annotations| annotations.get(ALGORITHM)) else {
        return Algorithm::Unspecified;
    };
    match text.to_ascii_lowercase().as_str() {
        "random" => Algorithm::Random,
        "maglev" => Algorithm::Maglev,
        _ => {
            warnings.push(Warning::Annotation {
                name: ALGORITHM,
                value: shorten(text),
                takes: "random or maglev",
                used: "what the agents are configured with",
            });
            Algorithm::Unspecified
        }
    }
}

fn seconds(text: &str) -> Option<u16> {
    let text = text.trim();
    let (number, factor) = match (text.strip_suffix('s'), text.strip_suffix('m')) {
        (Some(number), _) => (number, 1),
        (_, Some(number)) => (number, 60),
        _ if text == "1h" => ("1", 3600),
        _ => return None,
    };
    let seconds = number.parse::<u16>().ok()?.checked_mul(factor)?;
    (seconds <= SLOW_START_SECONDS_MAX).then_some(seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)], global: bool) -> (Preference, usize) {
        let annotations = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        let mut warnings = vec![];
        let preference = preference(Some(&annotations), global, &mut warnings);
        (preference, warnings.len())
    }

    #[test]
    fn a_whole_preference_is_read() {
        let (got, warnings) = read(
            &[
                (TIERS, "local, us-east|us-west, *"),
                (MIN_HEALTHY, "50%"),
                (SPILL_OVER, "false"),
                (SLOW_START, "2m"),
            ],
            true,
        );
        assert_eq!(warnings, 0);
        assert_eq!(got.tiers.to_string(), "local,us-east|us-west,*");
        assert_eq!(got.min_healthy, MinHealthy::Percent(50));
        assert!(!got.spill_over);
        assert_eq!(got.slow_start_seconds, 120);
    }

    #[test]
    fn clusters_are_not_ordered_unless_the_service_is_global() {
        let (got, warnings) = read(
            &[(TIERS, "junk!"), (MIN_HEALTHY, "2"), (SLOW_START, "30s")],
            false,
        );
        assert_eq!(warnings, 0);
        assert_eq!(
            (got.min_healthy, got.slow_start_seconds),
            (MinHealthy::Count(1), 30)
        );
    }

    #[test]
    fn what_cannot_be_read_is_named_and_replaced() {
        let (got, warnings) = read(
            &[
                (TIERS, "a,,b"),
                (MIN_HEALTHY, "0"),
                (SPILL_OVER, "perhaps"),
                (SLOW_START, "2h"),
            ],
            true,
        );
        assert_eq!(warnings, 4);
        assert!(got.tiers.is_empty());
        assert_eq!(got.slow_start_seconds, 0);
    }

    #[test]
    fn algorithms_are_those_of_cilium() {
        for (text, want, warned) in [
            ("maglev", Algorithm::Maglev, 0),
            ("Random", Algorithm::Random, 0),
            ("rr", Algorithm::Unspecified, 1),
        ] {
            let mut warnings = vec![];
            let annotations = [(ALGORITHM.to_owned(), text.to_owned())].into();
            assert_eq!(algorithm(Some(&annotations), &mut warnings), want);
            assert_eq!(warnings.len(), warned);
        }
    }
}
