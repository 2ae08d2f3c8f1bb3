//! The event log of Windows (`ReportEventW`). The source's texts come from EventCreate.exe, which every Windows has and
//! whose messages are their one string as it is: no message library of ours has to be installed.
#![allow(unsafe_code)] // calls of advapi32; each has its reason

use windows_sys::Win32::System::EventLog::{
    DeregisterEventSource, EVENTLOG_ERROR_TYPE, EVENTLOG_INFORMATION_TYPE, EVENTLOG_WARNING_TYPE,
    RegisterEventSourceW, ReportEventW,
};

use super::host_events::Kind;

/// Name of the source in the Application log.
pub const SOURCE: &str = "Outrider";
/// Longest string of an event, in UTF-16 units (`ReportEventW`: 31,839).
const LONGEST: usize = 31_000;

/// Writes one event; when the log refuses it, nothing else is done about it.
pub fn report(kind: Kind, id: u32, text: &str) {
    let source: Vec<u16> = SOURCE.encode_utf16().chain([0]).collect();
    let mut text: Vec<u16> = text.encode_utf16().filter(|unit| *unit != 0).take(LONGEST).collect();
    text.push(0);
    let kind = match kind {
        Kind::Information => EVENTLOG_INFORMATION_TYPE,
        Kind::Warning => EVENTLOG_WARNING_TYPE,
        Kind::Error => EVENTLOG_ERROR_TYPE,
    };
    let strings = [text.as_ptr()];
    // SAFETY: both strings end with a zero and live until after the calls; one string is announced and given; no user and
    // no data are.
    unsafe {
        let log = RegisterEventSourceW(std::ptr::null(), source.as_ptr());
        if log.is_null() {
            return;
        }
        ReportEventW(
            log,
            kind,
            0,
            id,
            std::ptr::null_mut(),
            1,
            0,
            strings.as_ptr(),
            std::ptr::null(),
        );
        DeregisterEventSource(log);
    }
}
