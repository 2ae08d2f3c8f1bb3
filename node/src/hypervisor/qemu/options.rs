//! A value of QEMU's command line, `key=value,...` or JSON, as a list of keys with dots in them. Pure.

use serde_json::{Map, Value};

/// The keys of an option, in their order.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Options {
    json: bool,
    /// Dotted key and value; a null in `key=value,...` is a key without a value.
    pub(super) pairs: Vec<(String, Value)>,
}

impl Options {
    pub(super) fn parse(text: &str) -> Self {
        let mut pairs = Vec::new();
        if let Ok(object @ Value::Object(_)) = serde_json::from_str(text) {
            flatten("", object, &mut pairs);
            return Self { json: true, pairs };
        }
        for part in parts(text) {
            match part.split_once('=') {
                Some((key, value)) => pairs.push((key.to_owned(), value.into())),
                None => pairs.push((part, Value::Null)),
            }
        }
        Self { json: false, pairs }
    }

    /// As it stands on a command line.
    pub(super) fn text(&self) -> String {
        if self.json {
            let mut object = Map::new();
            for (key, value) in &self.pairs {
                put(&mut object, key, value.clone());
            }
            return Value::Object(object).to_string();
        }
        let one = |(key, value): &(String, Value)| match value {
            Value::Null => escaped(key),
            Value::String(text) => format!("{key}={}", escaped(text)),
            other => format!("{key}={other}"),
        };
        self.pairs.iter().map(one).collect::<Vec<_>>().join(",")
    }

    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|(k, _)| k == key).and_then(|(_, v)| v.as_str())
    }

    /// Whether a key of this last name is switched on.
    pub(super) fn is_on(&self, name: &str) -> bool {
        self.pairs.iter().any(|(key, value)| {
            last(key) == name
                && match value {
                    Value::Null => !self.json,
                    Value::Bool(on) => *on,
                    other => matches!(other.as_str(), Some("on" | "true" | "yes")),
                }
        })
    }
}

/// The last part of a dotted key.
pub(super) fn last(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// A value within `key=value,...`: commas are doubled.
pub(super) fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

/// Splits at commas; a doubled one is a comma.
fn parts(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts
}

fn flatten(prefix: &str, value: Value, pairs: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(object) if !object.is_empty() || prefix.is_empty() => {
            for (key, value) in object {
                let key = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
                flatten(&key, value, pairs);
            }
        }
        value => pairs.push((prefix.to_owned(), value)),
    }
}

fn put(object: &mut Map<String, Value>, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            object.insert(key.to_owned(), value);
        }
        Some((head, rest)) => {
            let inner = object.entry(head).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(inner) = inner {
                put(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_read_back_as_they_were() {
        for text in [
            "driver=qcow2,node-name=d0,file.filename=/a,,b.qcow2",
            "virtio-blk-pci,id=disk0,drive=d0",
            "file=/a,readonly",
            r#"{"driver":"qcow2","file":{"driver":"file","filename":"/a,b"},"n":1,"o":{}}"#,
        ] {
            assert_eq!(Options::parse(text).text(), text);
        }
        let options = Options::parse("file.filename=/a,,b,read-only=on,c");
        assert_eq!(options.get("file.filename"), Some("/a,b"));
        assert!(options.is_on("read-only") && options.is_on("c") && !options.is_on("filename"));
        assert!(!Options::parse(r#"{"read-only":false,"auto-read-only":true}"#).is_on("read-only"));
    }
}
