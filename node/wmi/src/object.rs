//! Instances and their values, as a WMI provider hands them out.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::datetime;

/// A property or parameter value. Integer widths of CIM (`uint8` to `sint64`) are folded into two variants: WMI itself
/// hands 64-bit numbers out as text and the rest as 32-bit variants, so no width survives the wire anyway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub enum Value {
    /// No value.
    #[default]
    Null,
    /// `boolean`
    Bool(bool),
    /// Signed integers.
    Int(i64),
    /// Unsigned integers.
    UInt(u64),
    /// `string`, `datetime`, and embedded instances in text form.
    Str(String),
    /// A reference: the object path of another instance.
    Ref(String),
    /// An embedded object (`TargetInstance` of an event).
    Object(Box<Object>),
    /// An array.
    Array(Vec<Value>),
}

impl From<&str> for Value {
    fn from(s: &str) -> Self {
        Self::Str(s.to_owned())
    }
}
impl From<String> for Value {
    fn from(s: String) -> Self {
        Self::Str(s)
    }
}
impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Self::Bool(b)
    }
}
impl From<u64> for Value {
    fn from(n: u64) -> Self {
        Self::UInt(n)
    }
}
impl From<u32> for Value {
    fn from(n: u32) -> Self {
        Self::UInt(u64::from(n))
    }
}
impl From<u16> for Value {
    fn from(n: u16) -> Self {
        Self::UInt(u64::from(n))
    }
}
impl<T: Into<Value>> From<Vec<T>> for Value {
    fn from(v: Vec<T>) -> Self {
        Self::Array(v.into_iter().map(Into::into).collect())
    }
}

/// An instance: its class, its object path, and its properties by name.
///
/// Property names compare without regard to case, as in WMI.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct Object {
    /// Class name, e.g. `Msvm_ComputerSystem`.
    pub class: String,
    /// Relative object path (`Class.Key="value"`), empty for embedded and out-parameter objects.
    pub path: String,
    properties: BTreeMap<String, (String, Value)>,
}

impl Object {
    /// An instance without properties.
    #[must_use]
    pub fn new(class: impl Into<String>, path: impl Into<String>) -> Self {
        Self { class: class.into(), path: path.into(), properties: BTreeMap::new() }
    }

    /// Sets a property, for building instances in one expression.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.set(name, value);
        self
    }

    /// Sets a property.
    pub fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.properties.insert(name.to_ascii_lowercase(), (name.to_owned(), value.into()));
    }

    /// A property's value; [`Value::Null`] when it is absent, as WMI does for properties not selected.
    #[must_use]
    pub fn get(&self, name: &str) -> &Value {
        const NULL: &Value = &Value::Null;
        self.properties.get(&name.to_ascii_lowercase()).map_or(NULL, |(_, v)| v)
    }

    /// Names (as first spelt) and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.properties.values().map(|(n, v)| (n.as_str(), v))
    }

    /// A text property.
    #[must_use]
    pub fn str(&self, name: &str) -> Option<&str> {
        match self.get(name) {
            Value::Str(s) | Value::Ref(s) => Some(s),
            _ => None,
        }
    }

    /// An unsigned number, also when it arrived as decimal text (64-bit values do).
    #[must_use]
    pub fn u64(&self, name: &str) -> Option<u64> {
        self.get(name).as_u64()
    }

    /// A moment (`datetime`), Unix milliseconds; `None` also for an interval.
    #[must_use]
    pub fn unix_ms(&self, name: &str) -> Option<u64> {
        datetime::unix_ms(self.str(name)?)
    }

    /// A truth value.
    #[must_use]
    pub fn bool(&self, name: &str) -> Option<bool> {
        match self.get(name) {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// An array's elements; empty when the property is absent or null.
    #[must_use]
    pub fn array(&self, name: &str) -> &[Value] {
        match self.get(name) {
            Value::Array(v) => v,
            _ => &[],
        }
    }

    /// An embedded object.
    #[must_use]
    pub fn object(&self, name: &str) -> Option<&Object> {
        match self.get(name) {
            Value::Object(o) => Some(o),
            _ => None,
        }
    }
}

impl Value {
    /// The value as an unsigned number, also from decimal text.
    #[must_use]
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::UInt(n) => Some(*n),
            Self::Int(n) => u64::try_from(*n).ok(),
            Self::Str(s) => s.parse().ok(),
            _ => None,
        }
    }

    /// The value as text or reference.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(s) | Self::Ref(s) => Some(s),
            _ => None,
        }
    }
}
