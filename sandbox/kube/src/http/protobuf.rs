//! Request bodies in Kubernetes' protobuf form, which kubectl's `create` commands and its eviction calls send.
//!
//! In: bytes with the `k8s` envelope. Out: the same object as JSON. Only the messages of [`messages`] are known; a field
//! outside of them that carries something is refused by name, never dropped. Hostile bytes are refused: lengths are
//! checked against what is there, and nesting is bounded.

use serde_json::{Map, Value, json};

use crate::error::ApiError;
use messages::{Shape, Times};

mod messages;

/// What the bytes of a body in this form start with.
const MAGIC: &[u8] = b"k8s\0";

/// Messages nest at most this deep.
const DEPTH_MAX: usize = 24;

/// Reads a body.
pub fn decode(body: &[u8]) -> Result<Value, ApiError> {
    let refuse = |why: String| ApiError::bad_request(format!("the body is not valid protobuf: {why}"));
    let body = body
        .strip_prefix(MAGIC)
        .ok_or_else(|| refuse("it does not start with \"k8s\\0\"".into()))?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &body[..0]);
    for field in Fields(body) {
        match field.map_err(refuse)? {
            (1, Wire::Bytes(type_meta)) => {
                for field in Fields(type_meta) {
                    match field.map_err(refuse)? {
                        (1, Wire::Bytes(text)) => api_version = string(text).map_err(refuse)?,
                        (2, Wire::Bytes(text)) => kind = string(text).map_err(refuse)?,
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let Some(fields) = messages::find(&kind) else {
        let takes = "application/json, application/yaml";
        return Err(ApiError::unsupported_media(
            &format!("application/vnd.kubernetes.protobuf of {kind}"),
            takes,
        ));
    };
    let mut object = message(raw, fields, DEPTH_MAX).map_err(|why| refuse(format!("{kind}: {why}")))?;
    object.insert("apiVersion".into(), json!(api_version));
    object.insert("kind".into(), json!(kind));
    Ok(Value::Object(object))
}

/// A value as it is on the wire.
#[derive(Clone, Copy, Debug)]
enum Wire<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    /// Fixed-width numbers, which none of the known fields use.
    Fixed,
}

/// The fields of a message, in order.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or("it ends inside a number")?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number has more than ten bytes".into())
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], String> {
        let found = usize::try_from(len)
            .ok()
            .and_then(|len| self.0.split_at_checked(len));
        let (taken, rest) =
            found.ok_or_else(|| format!("{len} bytes are announced, {} are left", self.0.len()))?;
        self.0 = rest;
        Ok(taken)
    }

    fn field(&mut self) -> Result<(u64, Wire<'a>), String> {
        let tag = self.varint()?;
        let wire = match tag & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => self.take(8).map(|_| Wire::Fixed)?,
            2 => {
                let len = self.varint()?;
                Wire::Bytes(self.take(len)?)
            }
            5 => self.take(4).map(|_| Wire::Fixed)?,
            other => return Err(format!("unknown wire type {other}")),
        };
        Ok((tag >> 3, wire))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Wire<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

fn string(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| "text is not UTF-8".into())
}

fn message(bytes: &[u8], fields: &str, depth: usize) -> Result<Map<String, Value>, String> {
    if depth == 0 {
        return Err(format!("messages nest deeper than {DEPTH_MAX}"));
    }
    let mut object = Map::new();
    for field in Fields(bytes) {
        let (number, wire) = field?;
        let Some(field) = messages::field(fields, number) else {
            // A message that is always written but has nothing in it says nothing.
            if matches!(wire, Wire::Bytes([]) | Wire::Varint(0)) {
                continue;
            }
            return Err(format!(
                "field {number} of ({fields}) is not known here; send JSON instead"
            ));
        };
        match field.times {
            Times::Inline => {
                let Wire::Bytes(bytes) = wire else {
                    return Err(format!("{}: not a message", field.name));
                };
                if let Shape::Message(fields) = field.shape {
                    object.extend(message(bytes, fields, depth - 1)?);
                }
            }
            Times::Many => {
                let item =
                    value(wire, &field.shape, depth).map_err(|why| format!("{}: {why}", field.name))?;
                let list = object.entry(field.name).or_insert_with(|| json!([]));
                if let Some(list) = list.as_array_mut() {
                    list.push(item);
                }
            }
            Times::Map => {
                let (key, item) =
                    entry(wire, &field.shape, depth).map_err(|why| format!("{}: {why}", field.name))?;
                let map = object.entry(field.name).or_insert_with(|| json!({}));
                map[key] = item;
            }
            Times::Once | Times::OnceIfSet => {
                let item =
                    value(wire, &field.shape, depth).map_err(|why| format!("{}: {why}", field.name))?;
                // The encoder writes what is unset as zero; only fields that tell the two apart keep it.
                if field.times == Times::OnceIfSet || !is_zero(&item) {
                    object.insert(field.name.to_owned(), item);
                }
            }
        }
    }
    Ok(object)
}

fn is_zero(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

fn value(wire: Wire<'_>, shape: &Shape, depth: usize) -> Result<Value, String> {
    match (shape, wire) {
        (Shape::Text, Wire::Bytes(bytes)) => Ok(json!(string(bytes)?)),
        (Shape::Bytes, Wire::Bytes(bytes)) => {
            serde_json::to_value(k8s_openapi::ByteString(bytes.to_vec())).map_err(|e| e.to_string())
        }
        // Negative numbers are written in two's complement of 64 bits.
        (Shape::Integer, Wire::Varint(number)) => Ok(json!(number.cast_signed())),
        (Shape::Flag, Wire::Varint(number)) => Ok(json!(number != 0)),
        (Shape::IntOrString, Wire::Bytes(bytes)) => int_or_string(bytes),
        (Shape::Quantity, Wire::Bytes(bytes)) => match Fields(bytes).next().transpose()? {
            Some((1, Wire::Bytes(text))) => Ok(json!(string(text)?)),
            _ => Ok(Value::Null),
        },
        // Times of a request are the server's to set.
        (Shape::Ignored, _) => Ok(Value::Null),
        (Shape::Message(fields), Wire::Bytes(bytes)) => message(bytes, fields, depth - 1).map(Value::Object),
        (shape, wire) => Err(format!("{wire:?} where {shape:?} belongs")),
    }
}

fn int_or_string(bytes: &[u8]) -> Result<Value, String> {
    let (mut is_text, mut number, mut text) = (false, 0, String::new());
    for field in Fields(bytes) {
        match field? {
            (1, Wire::Varint(kind)) => is_text = kind == 1,
            (2, Wire::Varint(value)) => number = value.cast_signed(),
            (3, Wire::Bytes(value)) => text = string(value)?,
            _ => {}
        }
    }
    Ok(if is_text { json!(text) } else { json!(number) })
}

fn entry(wire: Wire<'_>, shape: &Shape, depth: usize) -> Result<(String, Value), String> {
    let Wire::Bytes(bytes) = wire else {
        return Err("not a map entry".into());
    };
    let empty = match shape {
        Shape::Text | Shape::Bytes => json!(""),
        _ => Value::Null,
    };
    let (mut key, mut item) = (String::new(), empty);
    for field in Fields(bytes) {
        match field? {
            (1, Wire::Bytes(text)) => key = string(text)?,
            (2, wire) => item = value(wire, shape, depth)?,
            _ => {}
        }
    }
    Ok((key, item))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(bytes.len()).unwrap()], bytes].concat()
    }

    fn envelope(kind: &str, raw: &[u8]) -> Vec<u8> {
        let type_meta = [field(1, b"v1"), field(2, kind.as_bytes())].concat();
        [MAGIC, &field(1, &type_meta), &field(2, raw)].concat()
    }

    #[test]
    fn a_config_map_is_read() {
        let metadata = [field(1, b"name"), field(3, b""), field(8, b"")].concat();
        let data = [field(1, b"key"), field(2, b"value")].concat();
        let body = envelope("ConfigMap", &[field(1, &metadata), field(2, &data)].concat());
        let want = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "name"}, "data": {"key": "value"}});
        assert_eq!(decode(&body).unwrap(), want);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        assert_eq!(decode(&envelope("Unknown", b"")).unwrap_err().code, 415);
        assert_eq!(
            decode(&envelope("ConfigMap", &field(9, b"x"))).unwrap_err().code,
            400
        );
        assert!(decode(&envelope("ConfigMap", &field(9, b""))).is_ok());
        assert_eq!(decode(b"{}").unwrap_err().code, 400);
    }

    #[test]
    fn the_table_names_only_messages_that_it_has() {
        messages::check();
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0usize..4) {
            let kind = ["Deployment", "Service", "Eviction", "Ingress"][kind];
            let _ = message(&bytes, messages::find(kind).unwrap(), DEPTH_MAX);
            let _ = decode(&[MAGIC, &bytes].concat());
        }
    }
}
