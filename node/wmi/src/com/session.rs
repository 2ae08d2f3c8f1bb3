//! One namespace as one thread sees it. Nothing here leaves the thread.
//!
//! `unsafe` because every COM call is: the pointers are those that COM gave, and are counted by the `windows` crate.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use windows::Win32::System::Com::{CLSCTX_INPROC_SERVER, CoCreateInstance};
use windows::Win32::System::Variant::VARIANT;
use windows::Win32::System::Wmi::{
    IEnumWbemClassObject, IWbemCallResult, IWbemClassObject, IWbemLocator, IWbemObjectTextSrc,
    IWbemServices, WBEM_FLAG_CONNECT_USE_MAX_WAIT, WBEM_FLAG_FORWARD_ONLY,
    WBEM_FLAG_NONSYSTEM_ONLY, WBEM_FLAG_RETURN_IMMEDIATELY, WBEM_FLAG_RETURN_WBEM_COMPLETE,
    WBEM_FLAG_UPDATE_ONLY, WBEM_GENERIC_FLAG_TYPE, WMI_OBJ_TEXT_WMI_DTD_2_0, WbemLocator,
    WbemObjectTextSrc,
};
use windows::core::{BSTR, HSTRING, IUnknown, Interface};

use super::cim::{Base, CimType, to_value, to_variant};
use super::failure::{Failure, as_com, failed};
use super::path::{Place, class_of};
use super::proxy::{protect, protect_if_proxy};
use super::variant::{self, Objects};
use crate::{Object, Value, embedded};

/// `WBEM_S_TIMEDOUT`: nothing yet.
const TIMED_OUT: i32 = 0x0004_0004;
/// `WBEM_S_FALSE`: no more objects.
const NO_MORE: i32 = 1;
/// How long one look at an unfinished call lasts.
const SLICE_MS: i32 = 200;
/// Objects fetched at once.
const BATCH: usize = 32;
/// How deep objects lie within objects.
const MAX_DEPTH: u32 = 6;

/// When to stop waiting.
pub(super) struct Patience<'a> {
    pub(super) until: Instant,
    pub(super) cancelled: &'a dyn Fn() -> bool,
}

impl Patience<'_> {
    fn check(&self) -> Result<(), Failure> {
        if (self.cancelled)() {
            return Err(Failure::Cancelled);
        }
        if Instant::now() >= self.until {
            return Err(Failure::Late);
        }
        Ok(())
    }
}

/// A connection to one namespace.
pub(super) struct Session {
    services: IWbemServices,
    place: Place,
}

impl Session {
    /// Connects to a namespace of this machine.
    pub(super) fn open(namespace: &str) -> Result<Self, Failure> {
        let nothing = BSTR::new();
        // SAFETY: the thread has entered COM (apartment); all arguments live until the calls return.
        let services = unsafe {
            let locator: IWbemLocator = CoCreateInstance(&WbemLocator, None, CLSCTX_INPROC_SERVER)?;
            let services = locator.ConnectServer(
                &BSTR::from(namespace),
                &nothing,
                &nothing,
                &nothing,
                WBEM_FLAG_CONNECT_USE_MAX_WAIT.0,
                &nothing,
                None,
            )?;
            services
        };
        protect(&services)?;
        let place = Place { server: ".".into(), namespace: namespace.to_owned() };
        Ok(Self { services, place })
    }

    /// Runs a query; objects are fetched as they come.
    pub(super) fn query(&self, wql: &str, patience: &Patience<'_>) -> Result<Vec<Object>, Failure> {
        // SAFETY: the services are connected, the strings live until the call returns.
        let found = unsafe {
            self.services.ExecQuery(
                &BSTR::from("WQL"),
                &BSTR::from(wql),
                WBEM_FLAG_FORWARD_ONLY | WBEM_FLAG_RETURN_IMMEDIATELY,
                None,
            )?
        };
        protect_if_proxy(&found);
        let mut out = Vec::new();
        while let Some(objects) = self.next(&found, BATCH, patience)? {
            for object in objects {
                out.push(self.read(&object, 0)?);
            }
        }
        Ok(out)
    }

    /// Starts an event query.
    pub(super) fn listen(&self, wql: &str) -> Result<IEnumWbemClassObject, Failure> {
        // SAFETY: as in `query`.
        let events = unsafe {
            self.services.ExecNotificationQuery(
                &BSTR::from("WQL"),
                &BSTR::from(wql),
                WBEM_FLAG_FORWARD_ONLY | WBEM_FLAG_RETURN_IMMEDIATELY,
                None,
            )?
        };
        protect_if_proxy(&events);
        Ok(events)
    }

    /// The next event; `None` after a slice of time without one.
    pub(super) fn next_event(
        &self,
        events: &IEnumWbemClassObject,
    ) -> Result<Option<Object>, Failure> {
        let mut one = [None];
        match Self::fetch(events, &mut one)? {
            Fetched::Nothing => Ok(None),
            // An event query has no end of its own.
            Fetched::End => Err(failed(windows::Win32::Foundation::RPC_E_DISCONNECTED.0)),
            Fetched::Some => one[0].take().map(|object| self.read(&object, 0)).transpose(),
        }
    }

    fn next(
        &self,
        found: &IEnumWbemClassObject,
        count: usize,
        patience: &Patience<'_>,
    ) -> Result<Option<Vec<IWbemClassObject>>, Failure> {
        let mut batch: Vec<Option<IWbemClassObject>> = vec![None; count];
        loop {
            patience.check()?;
            let fetched = Self::fetch(found, &mut batch)?;
            let objects: Vec<_> = batch.iter_mut().filter_map(Option::take).collect();
            match fetched {
                Fetched::End if objects.is_empty() => return Ok(None),
                Fetched::Nothing if objects.is_empty() => {}
                _ => return Ok(Some(objects)),
            }
        }
    }

    fn fetch(
        found: &IEnumWbemClassObject,
        into: &mut [Option<IWbemClassObject>],
    ) -> Result<Fetched, Failure> {
        let mut count = 0;
        // SAFETY: the slice is as long as it says; what comes back is counted for us.
        let status = unsafe { found.Next(SLICE_MS, into, &raw mut count) };
        match status.0 {
            code if code < 0 => Err(failed(code)),
            NO_MORE => Ok(Fetched::End),
            TIMED_OUT => Ok(Fetched::Nothing),
            _ => Ok(Fetched::Some),
        }
    }

    /// Reads one instance.
    pub(super) fn get(&self, path: &str) -> Result<Object, Failure> {
        let object = self.object(path)?;
        self.read(&object, 0)
    }

    fn object(&self, path: &str) -> Result<IWbemClassObject, Failure> {
        let mut object = None;
        // SAFETY: as in `query`.
        unsafe {
            self.services.GetObject(
                &BSTR::from(path),
                WBEM_FLAG_RETURN_WBEM_COMPLETE,
                None,
                Some(&raw mut object),
                None,
            )?;
        }
        object.ok_or_else(|| failed(windows::Win32::Foundation::E_POINTER.0))
    }

    /// Calls a method.
    pub(super) fn exec_method(
        &self,
        path: &str,
        method: &str,
        args: Vec<(String, Value)>,
        patience: &Patience<'_>,
    ) -> Result<Object, Failure> {
        let class = self.object(class_of(path))?;
        let input = self.input(&class, method, args)?;
        let mut output: Option<IWbemClassObject> = None;
        let mut call: Option<IWbemCallResult> = None;
        // SAFETY: as in `query`; both results are empty before, as COM demands.
        unsafe {
            self.services.ExecMethod(
                &BSTR::from(path),
                &BSTR::from(method),
                WBEM_FLAG_RETURN_IMMEDIATELY,
                None,
                input.as_ref(),
                Some(&raw mut output),
                Some(&raw mut call),
            )?;
        }
        // A provider in this very process may have finished already.
        let output = match (output, call) {
            (Some(output), _) => Some(output),
            (None, Some(call)) => finished(&call, patience)?,
            (None, None) => None,
        };
        match output {
            Some(output) => self.read(&output, 0),
            None => Ok(Object::new("__PARAMETERS", "")),
        }
    }

    /// Writes properties of an instance. What is not named keeps its value, within embedded objects, too.
    pub(super) fn put(
        &self,
        path: &str,
        properties: &[(String, Value)],
        patience: &Patience<'_>,
    ) -> Result<(), Failure> {
        let object = self.object(path)?;
        let place = self.place_of(&object);
        for (name, value) in properties {
            self.set(&object, name, value, &place, 0)?;
        }
        let mut call: Option<IWbemCallResult> = None;
        // SAFETY: as in `query`; the result is empty before, as COM demands.
        unsafe {
            self.services.PutInstance(
                &object,
                WBEM_GENERIC_FLAG_TYPE(WBEM_FLAG_UPDATE_ONLY.0 | WBEM_FLAG_RETURN_IMMEDIATELY.0),
                None,
                Some(&raw mut call),
            )?;
        }
        // A provider in this very process may have finished already.
        match call {
            Some(call) => finished(&call, patience).map(drop),
            None => Ok(()),
        }
    }

    /// Sets one property of an object in memory.
    fn set(
        &self,
        object: &IWbemClassObject,
        name: &str,
        value: &Value,
        place: &Place,
        depth: u32,
    ) -> Result<(), Failure> {
        if depth > MAX_DEPTH {
            return Err(Failure::Arguments("objects within objects without end".into()));
        }
        let wide = HSTRING::from(name);
        let (mut old, mut number) = (VARIANT::default(), 0);
        // SAFETY: COM writes into both results.
        unsafe { object.Get(&wide, 0, &raw mut old, Some(&raw mut number), None) }
            .map_err(|_| Failure::Arguments(format!("there is no property {name:?}")))?;
        let new = match (value, variant::held_object(&old)) {
            // Changed in place: a new object would lose what is not named.
            (Value::Object(changes), Some(held)) => {
                let inner: IWbemClassObject = held.cast()?;
                for (name, value) in changes.iter() {
                    self.set(&inner, name, value, place, depth + 1)?;
                }
                old
            }
            _ => {
                let value = to_variant(value.clone(), CimType::from_number(number), place)
                    .map_err(|e| Failure::Arguments(format!("property {name:?}: {e}")))?;
                variant::write(&value, self)?
            }
        };
        // SAFETY: the VARIANT is ours; COM copies it.
        unsafe { object.Put(&wide, 0, &raw const new, 0)? };
        Ok(())
    }

    fn input(
        &self,
        class: &IWbemClassObject,
        method: &str,
        args: Vec<(String, Value)>,
    ) -> Result<Option<IWbemClassObject>, Failure> {
        let place = self.place_of(class);
        let mut signature: Option<IWbemClassObject> = None;
        // SAFETY: COM writes the one result that is asked for; the other may be null.
        unsafe {
            class.GetMethod(&HSTRING::from(method), 0, &raw mut signature, std::ptr::null_mut())?;
        }
        let Some(signature) = signature else {
            return match args.first() {
                None => Ok(None),
                Some((name, _)) => {
                    Err(Failure::Arguments(format!("{method} takes no argument {name:?}")))
                }
            };
        };
        // SAFETY: a plain call.
        let input = unsafe { signature.SpawnInstance(0)? };
        for (name, value) in args {
            let wide = HSTRING::from(name.as_str());
            let mut number = 0;
            let mut unset = VARIANT::default();
            // SAFETY: COM writes into both results.
            unsafe { signature.Get(&wide, 0, &raw mut unset, Some(&raw mut number), None) }
                .map_err(|_| Failure::Arguments(format!("{method} takes no argument {name:?}")))?;
            let cim = CimType::from_number(number);
            let value = self.with_texts(value, cim)?;
            let value = to_variant(value, cim, &place)
                .map_err(|e| Failure::Arguments(format!("argument {name:?} of {method}: {e}")))?;
            let value = variant::write(&value, self)?;
            // SAFETY: the VARIANT is ours; COM copies it.
            unsafe { input.Put(&wide, 0, &raw const value, 0)? };
        }
        Ok(Some(input))
    }

    /// Objects for a text parameter become texts of embedded instances.
    fn with_texts(&self, value: Value, cim: CimType) -> Result<Value, Failure> {
        if cim.base != Base::Text {
            return Ok(value);
        }
        Ok(match value {
            Value::Object(object) => Value::Str(self.text_of(&object)?),
            Value::Array(items) => {
                let each = |item| self.with_texts(item, CimType { array: false, ..cim });
                Value::Array(items.into_iter().map(each).collect::<Result<_, _>>()?)
            }
            other => other,
        })
    }

    /// The text of an embedded instance, in the way of Microsoft's samples: WMI's own text of the instance that the object
    /// was read from, or of a new one of its class, with the values that differ put into it. So everything that we do not
    /// look at is as it was, of its own type.
    pub(super) fn text_of(&self, object: &Object) -> Result<String, Failure> {
        let (instance, before) = if object.path.is_empty() {
            let class = self.object(&object.class)?;
            // SAFETY: a plain call.
            (unsafe { class.SpawnInstance(0)? }, Object::default())
        } else {
            let instance = self.object(&object.path)?;
            let before = self.read(&instance, 0)?;
            (instance, before)
        };
        let place = self.place_of(&instance);
        for (name, value) in object.iter().filter(|(name, value)| before.get(name) != *value) {
            self.set(&instance, name, value, &place, 0)?;
        }
        match own_text(&instance) {
            Ok(text) => Ok(text),
            Err(e) => {
                tracing::debug!(error = %e, "WMI gives no text of an instance; it is written here");
                let whole = self.read(&instance, 0)?;
                Ok(embedded::to_text_as(&whole, |name| type_name(&instance, name)))
            }
        }
    }

    /// Where an object says that it is at home: WMI's own spelling of this machine's name.
    fn place_of(&self, object: &IWbemClassObject) -> Place {
        match self.system_text(object, "__SERVER") {
            Some(server) if !server.is_empty() => Place { server, ..self.place.clone() },
            _ => self.place.clone(),
        }
    }

    fn system_text(&self, object: &IWbemClassObject, name: &str) -> Option<String> {
        let mut value = VARIANT::default();
        // SAFETY: COM writes into the result.
        unsafe { object.Get(&HSTRING::from(name), 0, &raw mut value, None, None).ok()? };
        match variant::read(&value, self).ok()? {
            super::cim::Variant::Text(text) => Some(text),
            _ => None,
        }
    }

    fn read(&self, from: &IWbemClassObject, depth: u32) -> Result<Object, Failure> {
        if depth > MAX_DEPTH {
            return Err(Failure::Arguments("objects within objects without end".into()));
        }
        let class = self.system_text(from, "__CLASS").unwrap_or_default();
        let path = self.system_text(from, "__RELPATH").unwrap_or_default();
        let place = self.place_of(from);
        let inner = Within { session: self, depth: depth + 1 };
        let mut object = Object::new(class, path);
        // SAFETY: enumeration within one thread; COM writes into all four results. A name of a former turn is freed
        // before the next one is written.
        unsafe { from.BeginEnumeration(WBEM_FLAG_NONSYSTEM_ONLY.0)? };
        loop {
            let (mut name, mut value, mut number) = (BSTR::new(), VARIANT::default(), 0);
            // SAFETY: as above.
            unsafe {
                from.Next(0, &raw mut name, &raw mut value, &raw mut number, std::ptr::null_mut())?;
            }
            // The status for "no more" is no failure; only the missing name tells.
            if name.is_empty() {
                break;
            }
            let name = name.to_string();
            let read = variant::read(&value, &inner)?;
            let value = to_value(read, CimType::from_number(number), &place)
                .map_err(|e| Failure::Arguments(format!("property {name:?}: {e}")))?;
            object.set(&name, value);
        }
        // SAFETY: ends what was begun above.
        unsafe { from.EndEnumeration()? };
        Ok(object)
    }

    fn make(&self, object: &Object) -> Result<IUnknown, Failure> {
        let class = self.object(&object.class)?;
        let place = self.place_of(&class);
        // SAFETY: a plain call.
        let instance = unsafe { class.SpawnInstance(0)? };
        for (name, value) in object.iter().filter(|(_, v)| **v != Value::Null) {
            let wide = HSTRING::from(name);
            let (mut unset, mut number) = (VARIANT::default(), 0);
            // SAFETY: as in `input`.
            unsafe { class.Get(&wide, 0, &raw mut unset, Some(&raw mut number), None)? };
            let value = to_variant(value.clone(), CimType::from_number(number), &place)
                .map_err(|e| Failure::Arguments(format!("property {name:?}: {e}")))?;
            let value = variant::write(&value, self)?;
            // SAFETY: as in `input`.
            unsafe { instance.Put(&wide, 0, &raw const value, 0)? };
        }
        Ok(instance.cast()?)
    }
}

/// WMI's own text of an instance.
fn own_text(instance: &IWbemClassObject) -> windows::core::Result<String> {
    // SAFETY: the thread has entered COM; the instance lives until the call returns.
    unsafe {
        let source: IWbemObjectTextSrc =
            CoCreateInstance(&WbemObjectTextSrc, None, CLSCTX_INPROC_SERVER)?;
        Ok(source
            .GetText(0, instance, WMI_OBJ_TEXT_WMI_DTD_2_0.0.cast_unsigned(), None)?
            .to_string())
    }
}

fn type_name(instance: &IWbemClassObject, name: &str) -> Option<&'static str> {
    let (mut value, mut number) = (VARIANT::default(), 0);
    // SAFETY: COM writes into both results.
    unsafe { instance.Get(&HSTRING::from(name), 0, &raw mut value, Some(&raw mut number), None) }
        .ok()?;
    CimType::from_number(number).base.name()
}

enum Fetched {
    Some,
    Nothing,
    End,
}

/// Waits for a call that runs. Its status is asked for through the raw interface: the safe-looking one cannot tell
/// "nothing yet", which is a success, from "finished".
fn finished(
    call: &IWbemCallResult,
    patience: &Patience<'_>,
) -> Result<Option<IWbemClassObject>, Failure> {
    protect_if_proxy(call);
    let mut status = 0_i32;
    loop {
        patience.check()?;
        // SAFETY: the pointer is a counted one of the right interface; COM writes one number.
        let asked = unsafe {
            (Interface::vtable(call).GetCallStatus)(
                Interface::as_raw(call),
                SLICE_MS,
                &raw mut status,
            )
        };
        match asked.0 {
            TIMED_OUT => {}
            code if code < 0 => return Err(failed(code)),
            _ => break,
        }
    }
    if status < 0 {
        return Err(failed(status));
    }
    // SAFETY: a plain call. A method without out parameters has no result object, which is no failure.
    Ok(unsafe { call.GetResultObject(0) }.ok())
}

/// Objects within an object being read.
struct Within<'a> {
    session: &'a Session,
    depth: u32,
}

impl Objects for Within<'_> {
    fn read(&self, unknown: &IUnknown) -> windows::core::Result<Object> {
        self.session.read(&unknown.cast()?, self.depth).map_err(as_com)
    }
    fn make(&self, object: &Object) -> windows::core::Result<IUnknown> {
        self.session.make(object).map_err(as_com)
    }
}

impl Objects for Session {
    fn read(&self, unknown: &IUnknown) -> windows::core::Result<Object> {
        Session::read(self, &unknown.cast()?, 1).map_err(as_com)
    }
    fn make(&self, object: &Object) -> windows::core::Result<IUnknown> {
        Session::make(self, object).map_err(as_com)
    }
}

/// Longest time that connecting may take by itself (`WBEM_FLAG_CONNECT_USE_MAX_WAIT`).
pub(super) const CONNECT: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::super::apartment::Com;
    use super::*;

    /// Windows has a text of its own for this; where it has none (Wine), ours has the types of the class.
    #[test]
    fn the_text_of_an_instance_is_whole_and_has_what_was_changed() {
        let _com = Com::enter().expect("COM");
        let session = Session::open(r"root\cimv2").expect("every Windows has it");
        let never = || false;
        let patience =
            Patience { until: Instant::now() + Duration::from_secs(30), cancelled: &never };
        let wql = "SELECT * FROM Win32_Processor";
        let mut processor = session.query(wql, &patience).expect("one").remove(0);
        let caption = processor.str("Manufacturer").expect("a name").to_owned();
        processor.set("Manufacturer", "a < b & \"c\"");
        let text = session.text_of(&processor).expect("a text");
        let read = embedded::from_text(&text).expect("an instance");
        assert_eq!(read.class, "Win32_Processor");
        assert_eq!(read.str("Manufacturer"), Some("a < b & \"c\""), "{text}");
        assert_ne!(read.str("Manufacturer"), Some(caption.as_str()));
        assert_eq!(
            read.str("DeviceID"),
            processor.str("DeviceID"),
            "what was not changed is there, too"
        );
        assert!(text.contains("TYPE=\"uint16\""), "widths are those of the class: {text}");
        let before = session.get(&processor.path).expect("still there");
        assert_eq!(before.str("Manufacturer"), Some(caption.as_str()), "only the text was changed");
        let odd = processor.with("NoSuchProperty", "x");
        assert!(matches!(session.text_of(&odd), Err(Failure::Arguments(_))));
    }
}
