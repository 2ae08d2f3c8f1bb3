//! Why a call over COM gave nothing, and what the provider itself said about it.
//!
//! `unsafe` because every COM call is: the error object is one that COM gave, and is counted by the `windows` crate.
#![allow(unsafe_code)]

use windows::Win32::System::Com::GetErrorInfo;
use windows::Win32::System::Variant::VARIANT;
use windows::Win32::System::Wmi::IWbemClassObject;
use windows::core::{HSTRING, IUnknown, Interface};

use super::cim::Variant;
use super::variant::{self, Objects};
use crate::Object;

/// Why a call gave nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// COM's status, and its words.
    Com {
        /// HRESULT.
        code: u32,
        /// Often empty.
        message: String,
    },
    /// It was not finished in time; whether it will be is unknown.
    Late,
    /// The caller has gone.
    Cancelled,
    /// The arguments are not what the method takes.
    Arguments(String),
}

impl From<windows::core::Error> for Failure {
    fn from(error: windows::core::Error) -> Self {
        let message = told_by_provider().unwrap_or_else(|| error.message());
        Self::Com { code: error.code().0.cast_unsigned(), message }
    }
}

/// The failure that a negative status is.
pub(super) fn failed(code: i32) -> Failure {
    windows::core::Error::from_hresult(windows::core::HRESULT(code)).into()
}

/// What the provider itself said about a failure (`__ExtendedStatus`): its words and its own status.
fn told_by_provider() -> Option<String> {
    // SAFETY: plain calls; COM writes into the results.
    unsafe {
        let told: IWbemClassObject = GetErrorInfo(0).ok()?.cast().ok()?;
        let text = |name: &str| {
            let mut value = VARIANT::default();
            told.Get(&HSTRING::from(name), 0, &raw mut value, None, None).ok()?;
            match variant::read(&value, &Unread).ok()? {
                Variant::Text(text) => Some(text.trim().to_owned()),
                Variant::I32(n) if n != 0 => Some(format!("0x{n:08X}")),
                _ => None,
            }
            .filter(|text| !text.is_empty())
        };
        let parts: Vec<String> =
            ["Description", "StatusCode"].into_iter().filter_map(text).collect();
        (!parts.is_empty()).then(|| parts.join(" "))
    }
}

/// Objects within an error are not looked at.
struct Unread;

impl Objects for Unread {
    fn read(&self, _: &IUnknown) -> windows::core::Result<Object> {
        Ok(Object::default())
    }
    fn make(&self, _: &Object) -> windows::core::Result<IUnknown> {
        Err(windows::Win32::Foundation::E_NOTIMPL.into())
    }
}

/// As what the interfaces of COM give back.
pub(super) fn as_com(failure: Failure) -> windows::core::Error {
    match failure {
        Failure::Com { code, message } => {
            windows::core::Error::new(windows::core::HRESULT(code.cast_signed()), message)
        }
        other => windows::core::Error::new(
            windows::Win32::Foundation::E_UNEXPECTED,
            match other {
                Failure::Arguments(text) => text,
                _ => "cancelled".into(),
            },
        ),
    }
}
