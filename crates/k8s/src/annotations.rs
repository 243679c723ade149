//! Cilium's annotations on Services and EndpointSlices.
//!
//! In: the annotations of one object. Out: what they mean. Rules: Cilium's `pkg/annotation`. A name wins over its alias, whatever
//! its value; `true` counts in any case and everything else is false; `shared` and `affinity` mean nothing unless the service is
//! global, and `shared` is true by default then.

mod traffic;

use std::collections::BTreeMap;

use isthmus_model::{Affinity, Algorithm, Preference};

pub use self::traffic::{ALGORITHM, MIN_HEALTHY, SLOW_START, SPILL_OVER, TIERS};
use crate::{Warning, shorten};

/// Name and alias of the annotation that makes a service global.
pub const GLOBAL: [&str; 2] = ["service.cilium.io/global", "io.cilium/global-service"];
/// Name and alias of the annotation that withholds a global service's backends from other clusters.
pub const SHARED: [&str; 2] = ["service.cilium.io/shared", "io.cilium/shared-service"];
/// Name and alias of the annotation that says which clusters' backends are preferred.
pub const AFFINITY: [&str; 2] = ["service.cilium.io/affinity", "io.cilium/service-affinity"];
/// Name of the annotation that weighs all endpoints of an EndpointSlice.
pub const WEIGHT: &str = "service.cilium.io/weight";

/// Annotations as Kubernetes has them.
pub type Annotations = BTreeMap<String, String>;

/// What a Service's annotations say.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ServiceAnnotations {
    /// Uses other clusters' backends.
    pub global: bool,
    /// Lets other clusters use its backends. False unless global.
    pub shared: bool,
    /// Preference. `None` unless global.
    pub affinity: Affinity,
    /// Tiers of clusters and what belongs to them.
    pub preference: Preference,
    /// How a backend is chosen.
    pub algorithm: Algorithm,
}

/// Reads a Service's annotations.
pub fn service(annotations: Option<&Annotations>, warnings: &mut Vec<Warning>) -> ServiceAnnotations {
    let find = |names| annotations.and_then(|annotations| find(annotations, names));
    let global = find(GLOBAL).is_some_and(|found| flag(found, warnings));
    let preference = traffic::preference(annotations, global, warnings);
    let algorithm = traffic::algorithm(annotations, warnings);
    if !global {
        return ServiceAnnotations {
            preference,
            algorithm,
            ..Default::default()
        };
    }
    ServiceAnnotations {
        preference,
        algorithm,
        global,
        shared: find(SHARED).is_none_or(|found| flag(found, warnings)),
        affinity: find(AFFINITY)
            .map(|found| affinity(found, warnings))
            .unwrap_or_default(),
    }
}

/// Reads an EndpointSlice's weight: 1 unless annotated, 0 takes its endpoints out of rotation.
pub fn weight(annotations: Option<&Annotations>, warnings: &mut Vec<Warning>) -> u16 {
    let Some(text) = annotations.and_then(|annotations| annotations.get(WEIGHT)) else {
        return 1;
    };
    text.parse().unwrap_or_else(|_| {
        warnings.push(Warning::Annotation {
            name: WEIGHT,
            value: shorten(text),
            takes: "a number from 0 to 65535",
            used: "1",
        });
        1
    })
}

/// The annotation under its name or else its alias, with the one of both that is there.
fn find<'a>(annotations: &'a Annotations, names: [&'static str; 2]) -> Option<(&'static str, &'a str)> {
    names
        .into_iter()
        .find_map(|name| Some((name, annotations.get(name)?.as_str())))
}

fn flag((name, value): (&'static str, &str), warnings: &mut Vec<Warning>) -> bool {
    let on = value.eq_ignore_ascii_case("true");
    if !on && !value.eq_ignore_ascii_case("false") {
        warnings.push(Warning::Annotation {
            name,
            value: shorten(value),
            takes: "true or false",
            used: "false",
        });
    }
    on
}

fn affinity((name, value): (&'static str, &str), warnings: &mut Vec<Warning>) -> Affinity {
    let known = [Affinity::None, Affinity::Local, Affinity::Remote]
        .into_iter()
        .find(|affinity| value.eq_ignore_ascii_case(affinity.as_str()));
    match known {
        Some(affinity) => affinity,
        None if value.is_empty() => Affinity::None,
        None => {
            warnings.push(Warning::Annotation {
                name,
                value: shorten(value),
                takes: "none, local or remote",
                used: "none",
            });
            Affinity::None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pairs: &[(&str, &str)], want: (bool, bool, Affinity), warnings_want: usize) {
        let annotations = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        let mut warnings = vec![];
        let got = service(Some(&annotations), &mut warnings);
        assert_eq!((got.global, got.shared, got.affinity), want, "{pairs:?}");
        assert_eq!(warnings.len(), warnings_want, "{pairs:?}: {warnings:?}");
    }

    #[test]
    fn global_is_true_in_any_case_and_shared_follows() {
        use Affinity::None;
        check(&[], (false, false, None), 0);
        check(&[("service.cilium.io/global", "true")], (true, true, None), 0);
        check(&[("service.cilium.io/global", "TrUe")], (true, true, None), 0);
        check(&[("io.cilium/global-service", "true")], (true, true, None), 0);
        check(&[("service.cilium.io/global", "false")], (false, false, None), 0);
        check(&[("service.cilium.io/global", "yes")], (false, false, None), 1);
        check(&[("service.cilium.io/global", " true")], (false, false, None), 1);
        check(&[("service.cilium.io/global", "")], (false, false, None), 1);
    }

    #[test]
    fn names_win_over_aliases_even_when_malformed() {
        use Affinity::None;
        let alias = ("io.cilium/global-service", "true");
        check(
            &[("service.cilium.io/global", "false"), alias],
            (false, false, None),
            0,
        );
        check(
            &[("service.cilium.io/global", "nope"), alias],
            (false, false, None),
            1,
        );
        let global = ("service.cilium.io/global", "true");
        check(
            &[
                global,
                ("service.cilium.io/shared", "true"),
                ("io.cilium/shared-service", "false"),
            ],
            (true, true, None),
            0,
        );
    }

    #[test]
    fn shared_and_affinity_need_global() {
        use Affinity::{Local, None, Remote};
        let global = ("service.cilium.io/global", "true");
        check(&[("service.cilium.io/shared", "true")], (false, false, None), 0);
        check(
            &[("service.cilium.io/affinity", "local")],
            (false, false, None),
            0,
        );
        check(&[("service.cilium.io/affinity", "junk")], (false, false, None), 0);
        check(
            &[global, ("io.cilium/shared-service", "false")],
            (true, false, None),
            0,
        );
        check(
            &[global, ("service.cilium.io/shared", "0")],
            (true, false, None),
            1,
        );
        check(
            &[global, ("service.cilium.io/affinity", "LOCAL")],
            (true, true, Local),
            0,
        );
        check(
            &[global, ("io.cilium/service-affinity", "remote")],
            (true, true, Remote),
            0,
        );
        check(
            &[global, ("service.cilium.io/affinity", "")],
            (true, true, None),
            0,
        );
        check(
            &[global, ("service.cilium.io/affinity", "none")],
            (true, true, None),
            0,
        );
        check(
            &[global, ("service.cilium.io/affinity", "near")],
            (true, true, None),
            1,
        );
    }

    #[test]
    fn weights_are_numbers_of_16_bits() {
        for (text, want, warnings_want) in [
            ("0", 0, 0),
            ("65535", 65_535, 0),
            ("65536", 1, 1),
            ("-1", 1, 1),
            ("much", 1, 1),
        ] {
            let annotations = [(WEIGHT.to_owned(), text.to_owned())].into();
            let mut warnings = vec![];
            assert_eq!(weight(Some(&annotations), &mut warnings), want, "{text}");
            assert_eq!(warnings.len(), warnings_want, "{text}");
        }
        assert_eq!(weight(None, &mut vec![]), 1);
    }
}
