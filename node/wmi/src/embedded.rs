//! Embedded instances in the text form of WMI (DTD 2.0), as `SnapshotSettings` and the like want them.
//!
//! Only what Hyper-V's methods need: one `INSTANCE` with scalar and array properties, written from and read into an
//! [`Object`]. Reading is total: any text gives an object or an error.

use crate::{Object, Value};

/// Longest text that is read.
const MAX_TEXT: usize = 4 << 20;

/// Why a text is no embedded instance.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no embedded WMI instance: {reason} at byte {at}")]
pub struct EmbeddedError {
    /// What was expected.
    reason: &'static str,
    /// Where.
    at: usize,
}

/// Writes an object as `<INSTANCE>` text. References and embedded objects are written as text values; null properties
/// are left out, which tells WMI to keep its default. Widths of numbers are guessed: for who knows the class there is
/// [`to_text_as`].
#[must_use]
pub fn to_text(object: &Object) -> String {
    to_text_as(object, |_| None)
}

/// As [`to_text`]; `cim` tells a property's CIM type ("uint16") where it is known. Providers of Hyper-V take exactly this
/// much, with right types, from other programs (libvirt's `hyperv` driver writes no more); WMI's own text of an instance
/// (`IWbemObjectTextSrc`, which Microsoft's samples use) says more.
#[must_use]
pub fn to_text_as(object: &Object, cim: impl Fn(&str) -> Option<&'static str>) -> String {
    let mut out = format!("<INSTANCE CLASSNAME=\"{}\">\n", escaped(&object.class));
    for (name, value) in object.iter() {
        match value {
            Value::Null => {}
            Value::Array(items) => {
                let guess = || items.first().map_or("string", |v| cim_type(name, v));
                let cim = cim(name).unwrap_or_else(guess);
                out += &format!(
                    "  <PROPERTY.ARRAY NAME=\"{}\" TYPE=\"{cim}\"><VALUE.ARRAY>",
                    escaped(name)
                );
                for item in items {
                    out += &format!("<VALUE>{}</VALUE>", escaped(&scalar(item)));
                }
                out += "</VALUE.ARRAY></PROPERTY.ARRAY>\n";
            }
            value => {
                out += &format!(
                    "  <PROPERTY NAME=\"{}\" TYPE=\"{}\"><VALUE>{}</VALUE></PROPERTY>\n",
                    escaped(name),
                    cim(name).unwrap_or_else(|| cim_type(name, value)),
                    escaped(&scalar(value))
                );
            }
        }
    }
    out += "</INSTANCE>\n";
    out
}

/// Reads `<INSTANCE>` text.
///
/// # Errors
/// [`EmbeddedError`] for anything that is no such instance.
pub fn from_text(text: &str) -> Result<Object, EmbeddedError> {
    if text.len() > MAX_TEXT {
        return Err(EmbeddedError { reason: "text too long", at: MAX_TEXT });
    }
    let mut reader = Reader { text, at: 0 };
    let root =
        reader.next_tag()?.ok_or_else(|| reader.error("an INSTANCE element was expected"))?;
    if root.name != "INSTANCE" {
        return Err(reader.error("an INSTANCE element was expected"));
    }
    let mut object = Object::new(root.attribute("CLASSNAME").unwrap_or_default(), "");
    let mut property: Option<(String, String, Option<Vec<Value>>, Value)> = None;
    if root.empty {
        return Ok(object);
    }
    loop {
        let Some(tag) = reader.next_tag()? else {
            return Err(reader.error("INSTANCE is not closed"));
        };
        match (tag.name, tag.closing) {
            ("INSTANCE", true) => break,
            ("PROPERTY" | "PROPERTY.ARRAY", false) => {
                let name =
                    tag.attribute("NAME").ok_or_else(|| reader.error("a property has no name"))?;
                let cim = tag.attribute("TYPE").unwrap_or_else(|| "string".into());
                let array = (tag.name == "PROPERTY.ARRAY").then(Vec::new);
                if tag.empty {
                    object.set(&name, array.map_or(Value::Null, Value::Array));
                } else {
                    property = Some((name, cim, array, Value::Null));
                }
            }
            ("PROPERTY" | "PROPERTY.ARRAY", true) => {
                if let Some((name, _, array, value)) = property.take() {
                    object.set(&name, array.map_or(value, Value::Array));
                }
            }
            // What they hold has values of its own, which are not the property's.
            (
                "QUALIFIER" | "METHOD" | "VALUE.OBJECT" | "PROPERTY.OBJECT" | "PROPERTY.REFERENCE",
                false,
            ) if !tag.empty => reader.skip(tag.name)?,
            ("VALUE.NULL", false) => {
                if let Some((_, _, Some(items), _)) = property.as_mut() {
                    items.push(Value::Null);
                }
            }
            ("VALUE", false) => {
                let raw = if tag.empty { String::new() } else { reader.text_until_tag()? };
                if let Some((_, cim, array, value)) = property.as_mut() {
                    let read = typed(cim, raw)
                        .ok_or_else(|| reader.error("a value is not of its type"))?;
                    match array {
                        Some(items) => items.push(read),
                        None => *value = read,
                    }
                }
            }
            // Wrappers carry nothing we need.
            _ => {}
        }
    }
    Ok(object)
}

fn scalar(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::Bool(b) => if *b { "TRUE" } else { "FALSE" }.to_owned(),
        Value::Int(n) => n.to_string(),
        Value::UInt(n) => n.to_string(),
        Value::Str(s) | Value::Ref(s) => s.clone(),
        Value::Object(o) => to_text(o),
        Value::Array(items) => items.iter().map(scalar).collect::<Vec<_>>().join(","),
    }
}

/// The CIM type of a property. The provider checks it for the few settings we write, so those are named.
fn cim_type(name: &str, value: &Value) -> &'static str {
    match value {
        Value::Bool(_) => "boolean",
        Value::Int(_) => "sint32",
        Value::UInt(n) => match name {
            "ConsistencyLevel" | "GuestBackupType" | "CopySnapshotConfiguration" => "uint8",
            "EnabledState" | "RequestedState" | "ResourceType" | "UserSnapshotType" => "uint16",
            _ if *n > u64::from(u32::MAX) => "uint64",
            _ => "uint32",
        },
        _ => "string",
    }
}

fn typed(cim: &str, raw: String) -> Option<Value> {
    Some(match cim {
        "boolean" => Value::Bool(match raw.to_ascii_lowercase().as_str() {
            "true" => true,
            "false" => false,
            _ => return None,
        }),
        "uint8" | "uint16" | "uint32" | "uint64" | "sint8" | "sint16" | "sint32" | "sint64"
            if raw.trim().is_empty() =>
        {
            Value::Null
        }
        "uint8" | "uint16" | "uint32" | "uint64" => Value::UInt(raw.trim().parse().ok()?),
        "sint8" | "sint16" | "sint32" | "sint64" => Value::Int(raw.trim().parse().ok()?),
        _ => Value::Str(raw),
    })
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&apos;",
            '\r' | '\n' | '\t' => out += &format!("&#{};", u32::from(c)),
            c => out.push(c),
        }
    }
    out
}

struct Tag<'a> {
    name: &'a str,
    attributes: &'a str,
    closing: bool,
    empty: bool,
}

impl Tag<'_> {
    fn attribute(&self, wanted: &str) -> Option<String> {
        let mut rest = self.attributes;
        loop {
            rest = rest.trim_start();
            let (name, after) = rest.split_once('=')?;
            let after = after.trim_start();
            let quote = after.chars().next().filter(|c| matches!(c, '"' | '\''))?;
            let (value, tail) = after[1..].split_once(quote)?;
            if name.trim() == wanted {
                return unescaped(value);
            }
            rest = tail;
        }
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn error(&self, reason: &'static str) -> EmbeddedError {
        EmbeddedError { reason, at: self.at }
    }

    /// The next element tag; comments, declarations and CDATA outside values are skipped.
    fn next_tag(&mut self) -> Result<Option<Tag<'a>>, EmbeddedError> {
        loop {
            let rest = &self.text[self.at..];
            let Some(open) = rest.find('<') else { return Ok(None) };
            let rest = &rest[open..];
            if rest.starts_with("<!--") {
                let end = rest.find("-->").ok_or_else(|| self.error("a comment has no end"))?;
                self.at += open + end + 3;
                continue;
            }
            let end = tag_end(rest).ok_or_else(|| self.error("a tag has no end"))?;
            self.at += open + end + 1;
            let inner = &rest[1..end];
            if inner.starts_with(['?', '!']) {
                continue;
            }
            let (inner, closing) = inner.strip_prefix('/').map_or((inner, false), |i| (i, true));
            let (inner, empty) = inner.strip_suffix('/').map_or((inner, false), |i| (i, true));
            let inner = inner.trim();
            let (name, attributes) = inner.split_once(char::is_whitespace).unwrap_or((inner, ""));
            return Ok(Some(Tag { name, attributes, closing, empty }));
        }
    }

    /// Passes over all that is in an element, its end tag included.
    fn skip(&mut self, name: &str) -> Result<(), EmbeddedError> {
        let mut open = 1_u32;
        while open > 0 {
            let tag = self.next_tag()?.ok_or_else(|| self.error("an element is not closed"))?;
            match (tag.name == name, tag.closing) {
                (true, true) => open -= 1,
                (true, false) if !tag.empty => open += 1,
                _ => {}
            }
        }
        Ok(())
    }

    fn text_until_tag(&mut self) -> Result<String, EmbeddedError> {
        let mut out = String::new();
        loop {
            let rest = &self.text[self.at..];
            let end = rest.find('<').ok_or_else(|| self.error("a value has no end"))?;
            out += &unescaped(&rest[..end]).ok_or_else(|| self.error("an unknown entity"))?;
            self.at += end;
            let Some(data) = rest[end..].strip_prefix("<![CDATA[") else { return Ok(out) };
            let close = data.find("]]>").ok_or_else(|| self.error("CDATA has no end"))?;
            out += &data[..close];
            self.at += "<![CDATA[".len() + close + 3;
        }
    }
}

/// Index of the `>` that ends a tag, quotes respected.
fn tag_end(text: &str) -> Option<usize> {
    let mut quote = None;
    for (i, c) in text.char_indices() {
        match (quote, c) {
            (None, '>') => return Some(i),
            (None, '"' | '\'') => quote = Some(c),
            (Some(q), c) if c == q => quote = None,
            _ => {}
        }
    }
    None
}

fn unescaped(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(amp) = rest.find('&') {
        out += &rest[..amp];
        let (entity, tail) = rest[amp + 1..].split_once(';')?;
        match entity {
            "amp" => out.push('&'),
            "lt" => out.push('<'),
            "gt" => out.push('>'),
            "quot" => out.push('"'),
            "apos" => out.push('\''),
            _ => {
                let number = entity.strip_prefix('#')?;
                let code = match number.strip_prefix(['x', 'X']) {
                    Some(hex) => u32::from_str_radix(hex, 16).ok()?,
                    None => number.parse().ok()?,
                };
                out.push(char::from_u32(code)?);
            }
        }
        rest = tail;
    }
    out += rest;
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_reads_back_as_it_was_written() {
        let object = Object::new("Msvm_StorageAllocationSettingData", "")
            .with("InstanceID", r"Microsoft:A\B\0\1\D")
            .with("HostResource", vec!["C:\\ClusterStorage\\V1\\größe <&'\".vhdx"])
            .with("ConsistencyLevel", 1_u16)
            .with("Big", u64::MAX)
            .with("IgnoreNonSnapshottableDisks", true);
        assert_eq!(from_text(&to_text(&object)), Ok(object));
    }

    #[test]
    fn the_text_of_the_documentation_is_understood() {
        let text = r#"<?xml version="1.0"?><INSTANCE CLASSNAME="Msvm_VirtualSystemSnapshotSettingData">
            <QUALIFIER NAME="x" TYPE="string"><VALUE>y</VALUE></QUALIFIER>
            <PROPERTY NAME="ConsistencyLevel" TYPE="uint8"><VALUE>1</VALUE></PROPERTY>
            <PROPERTY NAME="Nothing" TYPE="string"></PROPERTY>
            <PROPERTY.ARRAY NAME="Notes" TYPE="string"><VALUE.ARRAY><VALUE>a</VALUE><VALUE>&#xE9;</VALUE></VALUE.ARRAY></PROPERTY.ARRAY>
            </INSTANCE>"#;
        let object = from_text(text).expect("an instance");
        assert_eq!(object.u64("ConsistencyLevel"), Some(1));
        assert_eq!(object.get("Nothing"), &Value::Null);
        assert_eq!(object.array("Notes"), &[Value::from("a"), Value::from("é")]);
    }

    /// WMI's own text of an instance: system properties, origins, qualifiers with values, objects within.
    #[test]
    fn the_text_that_wmi_itself_writes_is_understood() {
        let text = r#"<INSTANCE CLASSNAME="Msvm_VirtualHardDiskSettingData">
            <QUALIFIER NAME="dynamic" TYPE="boolean" TOSUBCLASS="false"><VALUE>TRUE</VALUE></QUALIFIER>
            <PROPERTY NAME="__CLASS" CLASSORIGIN="___SYSTEM" TYPE="string"><VALUE>Msvm_VirtualHardDiskSettingData</VALUE></PROPERTY>
            <PROPERTY NAME="Type" CLASSORIGIN="Msvm_VirtualHardDiskSettingData" TYPE="uint16">
              <QUALIFIER NAME="CIMTYPE" TYPE="string" TOINSTANCE="true"><VALUE>uint16</VALUE></QUALIFIER>
              <QUALIFIER NAME="ValueMap" TYPE="string"><VALUE.ARRAY><VALUE>2</VALUE><VALUE>3</VALUE></VALUE.ARRAY></QUALIFIER>
              <VALUE>4</VALUE>
            </PROPERTY>
            <PROPERTY.OBJECT NAME="Inner" REFERENCECLASS="X"><VALUE.OBJECT><INSTANCE CLASSNAME="X">
              <PROPERTY NAME="Type" TYPE="uint16"><VALUE>9</VALUE></PROPERTY></INSTANCE></VALUE.OBJECT></PROPERTY.OBJECT>
            <PROPERTY.REFERENCE NAME="Where" REFERENCECLASS="Y"><VALUE.REFERENCE>Y.A="1"</VALUE.REFERENCE></PROPERTY.REFERENCE>
            <PROPERTY NAME="ParentTimestamp" TYPE="uint32"><VALUE></VALUE></PROPERTY>
            <PROPERTY.ARRAY NAME="Notes" TYPE="string"><VALUE.ARRAY><VALUE>a</VALUE><VALUE.NULL/></VALUE.ARRAY></PROPERTY.ARRAY>
            <PROPERTY NAME="ParentPath" TYPE="string"><VALUE>C:\a &amp; b.vhdx</VALUE></PROPERTY>
            </INSTANCE>"#;
        let object = from_text(text).expect("an instance");
        assert_eq!(object.u64("Type"), Some(4));
        assert_eq!(object.str("ParentPath"), Some(r"C:\a & b.vhdx"));
        assert_eq!(object.get("ParentTimestamp"), &Value::Null);
        assert_eq!(object.array("Notes"), &[Value::from("a"), Value::Null]);
    }

    #[test]
    fn types_are_those_of_the_class_where_they_are_known() {
        let object = Object::new("C", "").with("A", 3_u16).with("B", vec![1_u32]).with("C", 5_u32);
        let text = to_text_as(&object, |name| match name {
            "A" => Some("uint16"),
            "B" => Some("uint8"),
            _ => None,
        });
        for part in
            [r#"NAME="A" TYPE="uint16""#, r#"NAME="B" TYPE="uint8""#, r#"NAME="C" TYPE="uint32""#]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn garbage_is_an_error_and_no_panic() {
        for text in [
            "",
            "<",
            "<INSTANCE",
            "<INSTANCE CLASSNAME=>",
            "<X/>",
            "<INSTANCE><PROPERTY NAME=\"a\" TYPE=\"uint8\"><VALUE>x</VALUE>",
            "<INSTANCE><PROPERTY NAME=\"a\"><VALUE>&bad;</VALUE>",
            "<INSTANCE><QUALIFIER NAME=\"a\"><VALUE>b</VALUE>",
        ] {
            assert!(from_text(text).is_err(), "{text:?}");
        }
    }
}
