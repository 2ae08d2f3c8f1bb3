//! CIM values as COM carries them (facts 11.2), and as ours.
//!
//! COM has fewer types than CIM: `uint16` and `uint32` travel as 32-bit signed integers, 64-bit integers as decimal
//! text, references and dates as text. The property's CIM type says what was meant.

use crate::com::path::{Place, absolute, relative};
use crate::{Object, Value, embedded};

/// A CIM type without its array flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// `sint8`
    Sint8,
    /// `sint16`
    Sint16,
    /// `sint32`
    Sint32,
    /// `sint64`
    Sint64,
    /// `uint8`
    Uint8,
    /// `uint16`
    Uint16,
    /// `uint32`
    Uint32,
    /// `uint64`
    Uint64,
    /// `real32`, `real64`
    Real,
    /// `boolean`
    Boolean,
    /// `string`
    Text,
    /// `datetime`
    DateTime,
    /// `ref`
    Reference,
    /// `char16`
    Char16,
    /// `object`
    Object,
    /// A number that this release does not know.
    Unknown,
}

/// The type of a property or parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CimType {
    /// Of one element.
    pub base: Base,
    /// Whether it is an array.
    pub array: bool,
}

/// `CIM_FLAG_ARRAY`.
const ARRAY: i32 = 0x2000;

impl CimType {
    /// From the number that COM names it by (`CIMTYPE_ENUMERATION`).
    #[must_use]
    pub fn from_number(number: i32) -> Self {
        let base = match number & !ARRAY {
            2 => Base::Sint16,
            3 => Base::Sint32,
            4 | 5 => Base::Real,
            8 => Base::Text,
            11 => Base::Boolean,
            13 => Base::Object,
            16 => Base::Sint8,
            17 => Base::Uint8,
            18 => Base::Uint16,
            19 => Base::Uint32,
            20 => Base::Sint64,
            21 => Base::Uint64,
            101 => Base::DateTime,
            102 => Base::Reference,
            103 => Base::Char16,
            _ => Base::Unknown,
        };
        Self { base, array: number & ARRAY != 0 }
    }
}

/// What a VARIANT holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Variant {
    /// VT_EMPTY, VT_NULL
    Null,
    /// VT_BOOL
    Bool(bool),
    /// VT_UI1
    U8(u8),
    /// VT_I2
    I16(i16),
    /// VT_I4
    I32(i32),
    /// Any other signed integer; never written.
    Signed(i64),
    /// Any other unsigned integer; never written.
    Unsigned(u64),
    /// VT_R4, VT_R8
    Real(f64),
    /// VT_BSTR
    Text(String),
    /// VT_UNKNOWN: an object.
    Object(Box<Object>),
    /// VT_ARRAY of elements of one kind.
    Array(Element, Vec<Variant>),
}

/// The kind of an array's elements: an empty array has one, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// VT_BOOL
    Bool,
    /// VT_UI1
    U8,
    /// VT_I2
    I16,
    /// VT_I4
    I32,
    /// VT_R8
    Real,
    /// VT_BSTR
    Text,
    /// VT_UNKNOWN
    Object,
}

impl Base {
    /// Its name in the text of an embedded instance.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::Sint8 => "sint8",
            Self::Sint16 => "sint16",
            Self::Sint32 => "sint32",
            Self::Sint64 => "sint64",
            Self::Uint8 => "uint8",
            Self::Uint16 => "uint16",
            Self::Uint32 => "uint32",
            Self::Uint64 => "uint64",
            Self::Boolean => "boolean",
            Self::Text => "string",
            Self::DateTime => "datetime",
            Self::Char16 => "char16",
            // Of two widths, and what is no scalar: whoever writes it has to know more.
            Self::Real | Self::Reference | Self::Object | Self::Unknown => return None,
        })
    }

    /// How elements of this type travel.
    #[must_use]
    pub fn element(self) -> Element {
        match self {
            Self::Boolean => Element::Bool,
            Self::Uint8 => Element::U8,
            Self::Sint8 | Self::Sint16 | Self::Char16 => Element::I16,
            Self::Uint16 | Self::Uint32 | Self::Sint32 => Element::I32,
            Self::Real => Element::Real,
            Self::Object => Element::Object,
            Self::Text
            | Self::DateTime
            | Self::Reference
            | Self::Sint64
            | Self::Uint64
            | Self::Unknown => Element::Text,
        }
    }
}

/// A value that does not fit its CIM type.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{found} is no {expected:?}")]
pub struct Mismatch {
    /// What was found.
    pub found: String,
    /// What its type says.
    pub expected: Base,
}

/// What a VARIANT of this type means. References of the connection's own namespace become relative.
///
/// # Errors
/// [`Mismatch`].
pub fn to_value(variant: Variant, cim: CimType, place: &Place) -> Result<Value, Mismatch> {
    let wrong =
        |found: &dyn std::fmt::Debug| Mismatch { found: format!("{found:?}"), expected: cim.base };
    let number = |n: i64| -> Value {
        #[expect(clippy::cast_sign_loss, reason = "COM carries unsigned numbers in signed types")]
        match cim.base {
            Base::Uint8 => Value::UInt(n as u64 & 0xff),
            Base::Uint16 => Value::UInt(n as u64 & 0xffff),
            Base::Uint32 => Value::UInt(n as u64 & 0xffff_ffff),
            Base::Uint64 => Value::UInt(n as u64),
            Base::Boolean => Value::Bool(n != 0),
            Base::Char16 => Value::Str(
                u32::try_from(n & 0xffff)
                    .ok()
                    .and_then(char::from_u32)
                    .unwrap_or(char::REPLACEMENT_CHARACTER)
                    .to_string(),
            ),
            Base::Text | Base::DateTime | Base::Reference => Value::Str(n.to_string()),
            _ => Value::Int(n),
        }
    };
    Ok(match variant {
        Variant::Null => Value::Null,
        Variant::Array(_, items) => Value::Array(
            items
                .into_iter()
                .map(|item| to_value(item, CimType { array: false, ..cim }, place))
                .collect::<Result<_, _>>()?,
        ),
        // A scalar where an array was announced: one element.
        scalar if cim.array => {
            Value::Array(vec![to_value(scalar, CimType { array: false, ..cim }, place)?])
        }
        Variant::Bool(b) => match cim.base {
            Base::Boolean | Base::Unknown => Value::Bool(b),
            _ => number(i64::from(b)),
        },
        Variant::U8(n) => match cim.base {
            Base::Unknown => Value::UInt(u64::from(n)),
            _ => number(i64::from(n)),
        },
        Variant::I16(n) => number(i64::from(n)),
        Variant::I32(n) => number(i64::from(n)),
        Variant::Signed(n) => number(n),
        Variant::Unsigned(n) => match (cim.base, i64::try_from(n)) {
            (Base::Unknown, _) => Value::UInt(n),
            (_, Ok(small)) => number(small),
            (Base::Uint64, Err(_)) => Value::UInt(n),
            (_, Err(_)) => return Err(wrong(&n)),
        },
        Variant::Real(n) => Value::Str(n.to_string()),
        Variant::Text(text) => match cim.base {
            Base::Uint8 | Base::Uint16 | Base::Uint32 | Base::Uint64 => {
                Value::UInt(text.trim().parse().map_err(|_| wrong(&text))?)
            }
            Base::Sint8 | Base::Sint16 | Base::Sint32 | Base::Sint64 => {
                Value::Int(text.trim().parse().map_err(|_| wrong(&text))?)
            }
            Base::Reference => Value::Ref(relative(&text, place).to_owned()),
            _ => Value::Str(text),
        },
        Variant::Object(object) => Value::Object(object),
    })
}

/// How an argument of this type travels. A relative reference becomes an absolute one; an object for a text parameter
/// becomes the text of an embedded instance; a reference in a text is whole.
///
/// # Errors
/// [`Mismatch`].
pub fn to_variant(value: Value, cim: CimType, place: &Place) -> Result<Variant, Mismatch> {
    let one = CimType { array: false, ..cim };
    if cim.array {
        let items = match value {
            Value::Null => return Ok(Variant::Null),
            Value::Array(items) => items,
            scalar => vec![scalar],
        };
        let items: Result<Vec<_>, _> =
            items.into_iter().map(|item| to_variant(item, one, place)).collect();
        return Ok(Variant::Array(cim.base.element(), items?));
    }
    let wrong = |found: &Value| Mismatch { found: format!("{found:?}"), expected: cim.base };
    Ok(match (cim.base, &value) {
        (_, Value::Null) => Variant::Null,
        (Base::Boolean, Value::Bool(b)) => Variant::Bool(*b),
        (Base::Uint8, v) => Variant::U8(unsigned(v).ok_or_else(|| wrong(v))?),
        (Base::Uint16, v) => Variant::I32(i32::from(unsigned::<u16>(v).ok_or_else(|| wrong(v))?)),
        (Base::Uint32, v) => {
            Variant::I32(unsigned::<u32>(v).ok_or_else(|| wrong(v))?.cast_signed())
        }
        (Base::Uint64, v) => Variant::Text(v.as_u64().ok_or_else(|| wrong(v))?.to_string()),
        (Base::Sint8, v) => Variant::I16(i16::from(signed::<i8>(v).ok_or_else(|| wrong(v))?)),
        (Base::Sint16, v) => Variant::I16(signed(v).ok_or_else(|| wrong(v))?),
        // Bit masks and handles are declared now with, now without a sign; COM carries both alike.
        (Base::Sint32, v) => {
            let bits = || unsigned::<u32>(v).map(u32::cast_signed);
            Variant::I32(signed(v).or_else(bits).ok_or_else(|| wrong(v))?)
        }
        (Base::Sint64, v) => Variant::Text(signed::<i64>(v).ok_or_else(|| wrong(v))?.to_string()),
        (Base::Real, v @ Value::Str(text)) => {
            Variant::Real(text.trim().parse().map_err(|_| wrong(v))?)
        }
        (Base::Reference, Value::Ref(path) | Value::Str(path)) => {
            Variant::Text(absolute(path, place))
        }
        (Base::Object, Value::Object(object)) => Variant::Object(object.clone()),
        // Settings name other objects in texts (the switch in an adapter's HostResource), by their whole path.
        (Base::Text, Value::Ref(path)) => Variant::Text(absolute(path, place)),
        (Base::Text | Base::DateTime | Base::Unknown, Value::Str(text) | Value::Ref(text)) => {
            Variant::Text(text.clone())
        }
        (Base::Text | Base::Unknown, Value::Object(object)) => {
            Variant::Text(embedded::to_text(object))
        }
        (Base::Text, Value::UInt(n)) => Variant::Text(n.to_string()),
        (Base::Text, Value::Int(n)) => Variant::Text(n.to_string()),
        (_, v) => return Err(wrong(v)),
    })
}

fn unsigned<T: TryFrom<u64>>(value: &Value) -> Option<T> {
    T::try_from(value.as_u64()?).ok()
}

fn signed<T: TryFrom<i64>>(value: &Value) -> Option<T> {
    let wide = match value {
        Value::Int(n) => *n,
        Value::UInt(n) => i64::try_from(*n).ok()?,
        Value::Str(text) => text.trim().parse().ok()?,
        _ => return None,
    };
    T::try_from(wide).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place { server: "HOST1".into(), namespace: r"root\virtualization\v2".into() }
    }

    fn cim(number: i32) -> CimType {
        CimType::from_number(number)
    }

    #[test]
    fn numbers_come_back_as_what_their_type_says_they_are() {
        let read = |v, n| to_value(v, cim(n), &place()).expect("of its type");
        assert_eq!(read(Variant::I32(4096), 19), Value::UInt(4096), "uint32 as VT_I4");
        assert_eq!(read(Variant::I32(-1), 19), Value::UInt(0xffff_ffff), "its upper half, too");
        assert_eq!(read(Variant::I32(32768), 18), Value::UInt(32768), "uint16 as VT_I4");
        assert_eq!(read(Variant::Text("18446744073709551615".into()), 21), Value::UInt(u64::MAX));
        assert_eq!(read(Variant::Text("-5".into()), 20), Value::Int(-5));
        assert_eq!(read(Variant::I16(-3), 2), Value::Int(-3));
        assert_eq!(read(Variant::I16(0x41), 103), Value::Str("A".into()));
        assert_eq!(read(Variant::Bool(true), 11), Value::Bool(true));
        assert_eq!(read(Variant::Null, 0x2000 | 8), Value::Null);
        let numbers = Variant::Array(Element::I32, vec![Variant::I32(2), Variant::I32(11)]);
        assert_eq!(read(numbers, 0x2000 | 18), Value::Array(vec![Value::UInt(2), Value::UInt(11)]));
        assert!(to_value(Variant::Text("many".into()), cim(21), &place()).is_err());
    }

    #[test]
    fn references_of_the_own_namespace_are_relative_here_and_absolute_there() {
        let full = r#"\\HOST1\root\virtualization\v2:Msvm_ComputerSystem.Name="A:B""#;
        let value = to_value(Variant::Text(full.into()), cim(102), &place()).expect("a path");
        assert_eq!(value, Value::Ref(r#"Msvm_ComputerSystem.Name="A:B""#.into()));
        let back = to_variant(value, cim(102), &place()).expect("a path");
        assert_eq!(back, Variant::Text(full.into()));
        let switch = Value::Array(vec![Value::Ref(r#"Msvm_ComputerSystem.Name="A:B""#.into())]);
        let texts = to_variant(switch, cim(0x2000 | 8), &place()).expect("a path in a text");
        assert_eq!(texts, Variant::Array(Element::Text, vec![Variant::Text(full.into())]));
        let foreign = r#"\\HOST1\root\MSCluster:MSCluster_Node.Name="n""#;
        let value = to_value(Variant::Text(foreign.into()), cim(102), &place()).expect("a path");
        assert_eq!(value, Value::Ref(foreign.into()));
    }

    #[test]
    fn arguments_travel_as_com_wants_them_and_what_does_not_fit_is_refused() {
        let write = |v: Value, n| to_variant(v, cim(n), &place());
        assert_eq!(write(Value::UInt(32768), 18), Ok(Variant::I32(32768)));
        assert_eq!(write(Value::UInt(0xffff_ffff), 19), Ok(Variant::I32(-1)));
        assert_eq!(write(Value::UInt(1 << 40), 21), Ok(Variant::Text((1_u64 << 40).to_string())));
        assert_eq!(write(Value::UInt(7), 17), Ok(Variant::U8(7)));
        assert_eq!(write(Value::UInt(0x8000_0002), 3), Ok(Variant::I32(-0x7fff_fffe)));
        assert!(write(Value::UInt(1 << 32), 3).is_err());
        assert!(write(Value::UInt(70_000), 18).is_err());
        assert!(write(Value::Str("x".into()), 11).is_err());
        let settings = Object::new("Msvm_X", "").with("ConsistencyLevel", 1_u32);
        let Ok(Variant::Text(text)) = write(Value::Object(Box::new(settings.clone())), 8) else {
            panic!("embedded instances travel as text")
        };
        assert_eq!(embedded::from_text(&text).expect("an instance"), settings);
        assert_eq!(
            write(Value::Array(vec![]), 0x2000 | 8),
            Ok(Variant::Array(Element::Text, vec![])),
            "an empty array is no null"
        );
        assert_eq!(
            write(Value::Str("one".into()), 0x2000 | 8),
            Ok(Variant::Array(Element::Text, vec![Variant::Text("one".into())]))
        );
    }
}
