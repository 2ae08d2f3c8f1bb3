//! VARIANT and SAFEARRAY: the only file that looks into them.
//!
//! `unsafe` because a VARIANT is a tagged union in C: which member is valid is told by its tag, and this file is where
//! the tag is read.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::mem::ManuallyDrop;

use windows::Win32::Foundation::E_OUTOFMEMORY;
use windows::Win32::System::Com::SAFEARRAY;
use windows::Win32::System::Ole::{
    SafeArrayCreateVector, SafeArrayDestroy, SafeArrayGetDim, SafeArrayGetElement,
    SafeArrayGetLBound, SafeArrayGetUBound, SafeArrayGetVartype, SafeArrayPutElement,
};
use windows::Win32::System::Variant::{
    VARENUM, VARIANT, VT_ARRAY, VT_BOOL, VT_BSTR, VT_EMPTY, VT_I1, VT_I2, VT_I4, VT_I8, VT_INT,
    VT_NULL, VT_R4, VT_R8, VT_TYPEMASK, VT_UI1, VT_UI2, VT_UI4, VT_UI8, VT_UINT, VT_UNKNOWN,
};
use windows::core::{BSTR, Error, IUnknown, Result};

use super::cim::{Element, Variant};
use crate::Object;

/// The object that a VARIANT holds, if it holds one: the very object, not a reading of it.
pub(super) fn held_object(variant: &VARIANT) -> Option<IUnknown> {
    // SAFETY: the tag is always valid; the pointer is read under its own tag, and counted anew by the clone.
    unsafe {
        let inner = &variant.Anonymous.Anonymous;
        if inner.vt == VT_UNKNOWN { inner.Anonymous.punkVal.as_ref().cloned() } else { None }
    }
}

/// More elements than any array of ours has.
const MAX_ELEMENTS: i64 = 1 << 20;

/// How objects inside of a VARIANT are read and made: the session knows.
pub(super) trait Objects {
    /// Reads an object.
    fn read(&self, unknown: &IUnknown) -> Result<Object>;
    /// Makes one.
    fn make(&self, object: &Object) -> Result<IUnknown>;
}

/// What a VARIANT holds; kinds that WMI does not use are an error.
pub(super) fn read(variant: &VARIANT, objects: &dyn Objects) -> Result<Variant> {
    // SAFETY: the tag is always valid; each member is read under its own tag.
    unsafe {
        let inner = &variant.Anonymous.Anonymous;
        let value = &inner.Anonymous;
        if inner.vt.0 & VT_ARRAY.0 != 0 {
            return read_array(value.parray, objects);
        }
        Ok(match inner.vt {
            VT_EMPTY | VT_NULL => Variant::Null,
            VT_BOOL => Variant::Bool(value.boolVal.0 != 0),
            VT_UI1 => Variant::U8(value.bVal),
            VT_I1 => Variant::Signed(i64::from(value.bVal.cast_signed())),
            VT_I2 => Variant::I16(value.iVal),
            VT_UI2 => Variant::Unsigned(u64::from(value.uiVal)),
            VT_I4 | VT_INT => Variant::I32(value.lVal),
            VT_UI4 | VT_UINT => Variant::Unsigned(u64::from(value.ulVal)),
            VT_I8 => Variant::Signed(value.llVal),
            VT_UI8 => Variant::Unsigned(value.ullVal),
            VT_R4 => Variant::Real(f64::from(value.fltVal)),
            VT_R8 => Variant::Real(value.dblVal),
            VT_BSTR => Variant::Text(value.bstrVal.to_string()),
            VT_UNKNOWN => match value.punkVal.as_ref() {
                Some(unknown) => Variant::Object(Box::new(objects.read(unknown)?)),
                None => Variant::Null,
            },
            _ => return Err(unusable()),
        })
    }
}

fn unusable() -> Error {
    windows::Win32::Foundation::DISP_E_BADVARTYPE.into()
}

/// # Safety
/// `array` is null or a valid SAFEARRAY.
unsafe fn read_array(array: *const SAFEARRAY, objects: &dyn Objects) -> Result<Variant> {
    if array.is_null() {
        return Ok(Variant::Null);
    }
    // SAFETY: as promised by the caller; bounds and type are those that the array itself tells.
    unsafe {
        if SafeArrayGetDim(array) != 1 {
            return Err(unusable());
        }
        let kind = VARENUM(SafeArrayGetVartype(array)?.0 & VT_TYPEMASK.0);
        let (low, high) = (SafeArrayGetLBound(array, 1)?, SafeArrayGetUBound(array, 1)?);
        if i64::from(high) - i64::from(low) >= MAX_ELEMENTS {
            return Err(E_OUTOFMEMORY.into());
        }
        let mut items = Vec::new();
        let mut element = Element::Text;
        for index in low..=high {
            let (of, item) = match kind {
                VT_BOOL => (Element::Bool, Variant::Bool(get::<i16>(array, index)? != 0)),
                VT_UI1 => (Element::U8, Variant::U8(get(array, index)?)),
                VT_I1 => (Element::I16, Variant::Signed(i64::from(get::<i8>(array, index)?))),
                VT_I2 => (Element::I16, Variant::I16(get(array, index)?)),
                VT_UI2 => (Element::I32, Variant::Unsigned(u64::from(get::<u16>(array, index)?))),
                VT_I4 | VT_INT => (Element::I32, Variant::I32(get(array, index)?)),
                VT_UI4 | VT_UINT => {
                    (Element::I32, Variant::Unsigned(u64::from(get::<u32>(array, index)?)))
                }
                VT_I8 => (Element::Text, Variant::Signed(get(array, index)?)),
                VT_UI8 => (Element::Text, Variant::Unsigned(get(array, index)?)),
                VT_R4 => (Element::Real, Variant::Real(f64::from(get::<f32>(array, index)?))),
                VT_R8 => (Element::Real, Variant::Real(get(array, index)?)),
                VT_BSTR => {
                    let mut text = BSTR::new();
                    SafeArrayGetElement(array, &raw const index, (&raw mut text).cast())?;
                    (Element::Text, Variant::Text(text.to_string()))
                }
                VT_UNKNOWN => {
                    let mut unknown: Option<IUnknown> = None;
                    SafeArrayGetElement(array, &raw const index, (&raw mut unknown).cast())?;
                    let item = match unknown {
                        Some(unknown) => Variant::Object(Box::new(objects.read(&unknown)?)),
                        None => Variant::Null,
                    };
                    (Element::Object, item)
                }
                _ => return Err(unusable()),
            };
            element = of;
            items.push(item);
        }
        Ok(Variant::Array(element, items))
    }
}

/// # Safety
/// The elements of `array` are plain data of the size of `T`, for which all zero bits are valid.
unsafe fn get<T: Default>(array: *const SAFEARRAY, index: i32) -> Result<T> {
    let mut out = T::default();
    // SAFETY: as promised by the caller; the index is within the array's bounds or refused.
    unsafe { SafeArrayGetElement(array, &raw const index, (&raw mut out).cast())? };
    Ok(out)
}

/// A VARIANT that owns what it holds.
pub(super) fn write(variant: &Variant, objects: &dyn Objects) -> Result<VARIANT> {
    Ok(match variant {
        Variant::Null | Variant::Signed(_) | Variant::Unsigned(_) => tagged(VT_NULL),
        Variant::Bool(b) => VARIANT::from(*b),
        Variant::U8(n) => VARIANT::from(*n),
        Variant::I16(n) => VARIANT::from(*n),
        Variant::I32(n) => VARIANT::from(*n),
        Variant::Real(n) => VARIANT::from(*n),
        Variant::Text(text) => VARIANT::from(BSTR::from(text.as_str())),
        Variant::Object(object) => VARIANT::from(objects.make(object)?),
        Variant::Array(element, items) => write_array(*element, items, objects)?,
    })
}

fn tagged(vt: VARENUM) -> VARIANT {
    let mut variant = VARIANT::default();
    // SAFETY: an all-zero VARIANT is VT_EMPTY; null needs only another tag.
    unsafe {
        (*variant.Anonymous.Anonymous).vt = vt;
    }
    variant
}

/// A SAFEARRAY that is destroyed unless it was handed over.
struct Building(*mut SAFEARRAY);

impl Drop for Building {
    fn drop(&mut self) {
        // SAFETY: made by SafeArrayCreateVector and handed to nobody.
        let _ = unsafe { SafeArrayDestroy(self.0) };
    }
}

fn write_array(element: Element, items: &[Variant], objects: &dyn Objects) -> Result<VARIANT> {
    let vt = match element {
        Element::Bool => VT_BOOL,
        Element::U8 => VT_UI1,
        Element::I16 => VT_I2,
        Element::I32 => VT_I4,
        Element::Real => VT_R8,
        Element::Text => VT_BSTR,
        Element::Object => VT_UNKNOWN,
    };
    let count = u32::try_from(items.len()).map_err(|_| Error::from(E_OUTOFMEMORY))?;
    // SAFETY: a plain call; null is checked for.
    let array = unsafe { SafeArrayCreateVector(vt, 0, count) };
    if array.is_null() {
        return Err(E_OUTOFMEMORY.into());
    }
    let array = Building(array);
    for (index, item) in (0_i32..).zip(items) {
        // COM copies what it is given: strings are duplicated, objects counted.
        match (element, item) {
            (Element::Bool, Variant::Bool(b)) => put(&array, index, &if *b { -1_i16 } else { 0 })?,
            (Element::U8, Variant::U8(n)) => put(&array, index, n)?,
            (Element::I16, Variant::I16(n)) => put(&array, index, n)?,
            (Element::I32, Variant::I32(n)) => put(&array, index, n)?,
            (Element::Real, Variant::Real(n)) => put(&array, index, n)?,
            (Element::Text, Variant::Text(text)) => {
                let text = BSTR::from(text.as_str());
                // A BSTR is its pointer; the array wants that, not where it lies.
                let pointer: *const u16 = text.as_ptr();
                put_pointer(&array, index, pointer.cast())?;
            }
            (Element::Object, Variant::Object(object)) => {
                let unknown = objects.make(object)?;
                put_pointer(&array, index, windows::core::Interface::as_raw(&unknown))?;
            }
            _ => return Err(unusable()),
        }
    }
    let mut variant = tagged(VARENUM(VT_ARRAY.0 | vt.0));
    // SAFETY: the tag says array; the VARIANT owns it from here on.
    unsafe {
        (*variant.Anonymous.Anonymous).Anonymous.parray = ManuallyDrop::new(array).0;
    }
    Ok(variant)
}

fn put<T>(array: &Building, index: i32, value: &T) -> Result<()> {
    put_pointer(array, index, std::ptr::from_ref(value).cast())
}

fn put_pointer(array: &Building, index: i32, value: *const c_void) -> Result<()> {
    // SAFETY: the array is of the element's type, the index is checked by COM.
    unsafe { SafeArrayPutElement(array.0, &raw const index, value) }
}
