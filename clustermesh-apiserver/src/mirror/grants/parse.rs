//! The text of `isthmus-accept` in a remote cluster's file: a YAML map beside the fields of etcd's client, which ignores it.
//!
//! What looks like a restriction and is none is an error: an unknown or empty field, a misspelt `isthmus-…` key.

use std::{net::IpAddr, ops::RangeInclusive};

use ipnet::IpNet;
use isthmus_wire::keys::Kind;
use serde_yaml_ng::{Mapping, Value};

use super::{Grants, Pattern};
use crate::mirror::remote::kind_name;

/// Where the map stands in the file.
const KEY: &str = "isthmus-accept";
/// Most elements of a list.
const ELEMENTS_MAX: usize = 10_000;
/// Most entries of a kind that a file can allow.
const ENTRIES_MAX: u64 = 10_000_000;

const FIELDS: &str = "identities, pod-cidrs, node-cidrs, namespaces, services, max-entries and max-bytes";

/// What is wrong with `isthmus-accept`.
#[derive(Debug, thiserror::Error)]
pub enum GrantsError {
    /// The file is no YAML.
    #[error("the file is not valid YAML")]
    Yaml(#[source] serde_yaml_ng::Error),
    /// A key that is meant for us and is none.
    #[error("{0} is no key that this program knows; it knows {KEY}")]
    Key(String),
    /// A field that is none.
    #[error("{KEY} has the field {0}; it takes {FIELDS}")]
    Field(String),
    /// A field with a wrong value.
    #[error("{field} under {KEY} has {got}; it takes {takes}")]
    Value {
        /// Which field.
        field: String,
        /// What it has.
        got: String,
        /// What it takes.
        takes: &'static str,
    },
}

impl Grants {
    /// Reads the grants in the text of a remote cluster's file. None are there: nothing is restricted.
    pub fn parse(text: &str) -> Result<Self, GrantsError> {
        let file: Value = serde_yaml_ng::from_str(text).map_err(GrantsError::Yaml)?;
        let Some(file) = file.as_mapping() else {
            return Ok(Self::default());
        };
        let mut grants = Self::default();
        for (key, value) in file {
            match key.as_str() {
                Some(KEY) => grants = parse_map(value)?,
                Some(key) if key.starts_with("isthmus") => return Err(GrantsError::Key(shown(key))),
                _ => {}
            }
        }
        Ok(grants)
    }
}

fn parse_map(value: &Value) -> Result<Grants, GrantsError> {
    let Some(map) = value.as_mapping() else {
        return Err(GrantsError::Value {
            field: "the map".to_owned(),
            got: text_of(value),
            takes: FIELDS,
        });
    };
    let mut grants = Grants::default();
    for (key, value) in map {
        let key = text_of(key);
        match key.as_str() {
            "identities" => grants.identities = Some(list(&key, value, IDENTITIES, identities)?),
            "pod-cidrs" => grants.pod_cidrs = Some(list(&key, value, CIDRS, cidr)?),
            "node-cidrs" => grants.node_cidrs = Some(list(&key, value, CIDRS, cidr)?),
            "namespaces" => grants.namespaces = Some(list(&key, value, NAMESPACES, pattern)?),
            "services" => {
                let service = |text: &str| {
                    let (namespace, name) = text.split_once('/')?;
                    Some((pattern(namespace)?, pattern(name)?))
                };
                grants.services = Some(list(&key, value, SERVICES, service)?);
            }
            "max-entries" => {
                let map = value
                    .as_mapping()
                    .ok_or_else(|| wrong(&key, &text_of(value), MAX_ENTRIES))?;
                max_entries(&mut grants, map)?;
            }
            "max-bytes" => {
                let text = text_of(value);
                grants.bytes_max = Some(bytes(&text).ok_or_else(|| wrong(&key, &text, BYTES))?);
            }
            _ => return Err(GrantsError::Field(shown(&key))),
        }
    }
    Ok(grants)
}

const IDENTITIES: &str = "a list of numbers and ranges of numbers such as 131072-196607";
const CIDRS: &str = "a list of addresses and CIDRs such as 10.2.0.0/16";
const NAMESPACES: &str = "a list of namespaces, in which * stands for any characters";
const SERVICES: &str = "a list of <namespace>/<name>, in which * stands for any characters but /";
const MAX_ENTRIES: &str =
    "a map from nodes, ip, identities, services, frames or slices to a number up to 10000000";
const BYTES: &str = "a number of bytes, or one with Ki, Mi or Gi";

fn list<T>(
    field: &str,
    value: &Value,
    takes: &'static str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Vec<T>, GrantsError> {
    let Some(elements) = value.as_sequence() else {
        return Err(wrong(field, &text_of(value), takes));
    };
    if elements.len() > ELEMENTS_MAX {
        return Err(wrong(field, &format!("{} elements", elements.len()), takes));
    }
    let element = |value: &Value| {
        let text = text_of(value);
        parse(&text).ok_or_else(|| wrong(field, &text, takes))
    };
    elements.iter().map(element).collect()
}

fn identities(text: &str) -> Option<RangeInclusive<u32>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (first <= last).then_some(first..=last)
}

fn cidr(text: &str) -> Option<IpNet> {
    let single = |ip: IpAddr| IpNet::from(ip.to_canonical());
    let net: IpNet = text.parse().ok().or_else(|| text.parse().ok().map(single))?;
    // Bits behind the prefix are most likely a wrong length.
    (net.trunc() == net).then_some(net)
}

fn pattern(text: &str) -> Option<Pattern> {
    let ok = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '-' | '.' | '*');
    let named = !text.is_empty() && text.len() <= 253 && text.chars().all(ok);
    named.then(|| Pattern(text.to_owned()))
}

fn max_entries(grants: &mut Grants, map: &Mapping) -> Result<(), GrantsError> {
    for (key, value) in map {
        let key = text_of(key);
        let kind = Kind::ALL.into_iter().find(|kind| kind_name(*kind) == key);
        let max = value.as_u64().filter(|max| *max <= ENTRIES_MAX);
        let (Some(kind), Some(max)) = (kind, max) else {
            return Err(wrong(
                "max-entries",
                &format!("{key}: {}", text_of(value)),
                MAX_ENTRIES,
            ));
        };
        // Checked above: it fits.
        grants
            .entries_max
            .insert(kind, usize::try_from(max).unwrap_or(usize::MAX));
    }
    Ok(())
}

fn bytes(text: &str) -> Option<u64> {
    let units = [("Ki", 1 << 10), ("Mi", 1 << 20), ("Gi", 1 << 30)];
    let (number, unit) = units
        .into_iter()
        .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, unit)))
        .unwrap_or((text, 1));
    number.trim().parse::<u64>().ok()?.checked_mul(unit)
}

fn wrong(field: &str, got: &str, takes: &'static str) -> GrantsError {
    GrantsError::Value {
        field: shown(field),
        got: shown(got),
        takes,
    }
}

fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Bool(value) => value.to_string(),
        Value::Null => "nothing".to_owned(),
        Value::Sequence(_) => "a list".to_owned(),
        Value::Mapping(_) => "a map".to_owned(),
        Value::Tagged(_) => "a tagged value".to_owned(),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}
