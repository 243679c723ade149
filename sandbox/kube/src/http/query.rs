//! Query parameters.

use crate::error::ApiError;

/// The parameters of a request, in order.
#[derive(Clone, Debug, Default)]
pub struct Query(Vec<(String, String)>);

impl Query {
    pub fn parse(text: &str) -> Result<Query, ApiError> {
        let pairs = text.split('&').filter(|part| !part.is_empty()).map(|part| {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            Ok((decode(key)?, decode(&value.replace('+', " "))?))
        });
        pairs.collect::<Result<_, ApiError>>().map(Query)
    }

    /// A parameter that is not empty.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(k, v)| k == key && !v.is_empty())
            .map(|(_, v)| v.as_str())
    }

    /// A parameter that says yes: `true` or `1`.
    pub fn flag(&self, key: &str) -> bool {
        matches!(self.text(key), Some("true" | "1" | "True"))
    }

    /// A parameter that is a number.
    pub fn number<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>, ApiError> {
        let Some(text) = self.text(key) else {
            return Ok(None);
        };
        let number = text
            .parse()
            .map_err(|_| ApiError::bad_request(format!("{key}: invalid value {text:?}")))?;
        Ok(Some(number))
    }
}

/// Undoes percent-encoding.
pub fn decode(text: &str) -> Result<String, ApiError> {
    let refuse = || ApiError::bad_request(format!("invalid escape in {text:?}"));
    if !text.contains('%') {
        return Ok(text.to_owned());
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first != b'%' {
            bytes.push(*first);
            rest = tail;
            continue;
        }
        let hex = |c: &u8| char::from(*c).to_digit(16);
        let [high, low, tail @ ..] = tail else {
            return Err(refuse());
        };
        let (Some(high), Some(low)) = (hex(high), hex(low)) else {
            return Err(refuse());
        };
        bytes.push((high * 16 + low) as u8);
        rest = tail;
    }
    String::from_utf8(bytes).map_err(|_| refuse())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters() {
        let query = Query::parse("labelSelector=a%3Db%2Cc+in&watch=true&limit=5&x").unwrap();
        assert_eq!(query.text("labelSelector"), Some("a=b,c in"));
        assert!(query.flag("watch"));
        assert_eq!(query.number::<usize>("limit").unwrap(), Some(5));
        assert!(Query::parse("limit=x").unwrap().number::<usize>("limit").is_err());
        for bad in ["a=%", "a=%2", "a=%zz"] {
            assert!(Query::parse(bad).is_err(), "{bad}");
        }
    }
}
