//! What a COM status means for the caller (facts 1.1 and 11.2): wait and ask again, connect anew, or give up.

use std::time::Duration;

use crate::WmiError;

/// A status with its name, and what follows from it.
struct Known {
    code: u32,
    name: &'static str,
    meaning: Meaning,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Meaning {
    NotFound,
    NoNamespace,
    Denied,
    /// The provider is not there now: ask again.
    Away,
    /// The connection is of no use any more: connect anew.
    Broken,
    Refused,
}

const KNOWN: &[Known] = &[
    known(0x8004_1001, "WBEM_E_FAILED", Meaning::Refused),
    known(0x8004_1002, "WBEM_E_NOT_FOUND", Meaning::NotFound),
    known(0x8004_1003, "WBEM_E_ACCESS_DENIED", Meaning::Denied),
    known(0x8004_1004, "WBEM_E_PROVIDER_FAILURE", Meaning::Refused),
    known(0x8004_1005, "WBEM_E_TYPE_MISMATCH", Meaning::Refused),
    known(0x8004_1006, "WBEM_E_OUT_OF_MEMORY", Meaning::Away),
    known(0x8004_1008, "WBEM_E_INVALID_PARAMETER", Meaning::Refused),
    known(0x8004_100C, "WBEM_E_NOT_SUPPORTED", Meaning::Refused),
    known(0x8004_100E, "WBEM_E_INVALID_NAMESPACE", Meaning::NoNamespace),
    known(0x8004_1010, "WBEM_E_INVALID_CLASS", Meaning::NotFound),
    known(0x8004_1011, "WBEM_E_PROVIDER_NOT_FOUND", Meaning::Away),
    known(0x8004_1013, "WBEM_E_PROVIDER_LOAD_FAILURE", Meaning::Away),
    known(0x8004_1014, "WBEM_E_INITIALIZATION_FAILURE", Meaning::Away),
    known(0x8004_1015, "WBEM_E_TRANSPORT_FAILURE", Meaning::Broken),
    known(0x8004_1017, "WBEM_E_INVALID_QUERY", Meaning::Refused),
    known(0x8004_1032, "WBEM_E_CALL_CANCELLED", Meaning::Away),
    known(0x8004_1033, "WBEM_E_SHUTTING_DOWN", Meaning::Broken),
    known(0x8004_103A, "WBEM_E_INVALID_OBJECT_PATH", Meaning::Refused),
    known(0x8004_1045, "WBEM_E_SERVER_TOO_BUSY", Meaning::Away),
    known(0x8004_1055, "WBEM_E_METHOD_DISABLED", Meaning::Refused),
    known(0x8004_1069, "WBEM_E_TIMED_OUT", Meaning::Away),
    known(0x8004_106C, "WBEM_E_QUOTA_VIOLATION", Meaning::Away),
    known(0x8007_0005, "E_ACCESSDENIED", Meaning::Denied),
    known(0x8007_0046, "ERROR_SHARING_PAUSED", Meaning::Away),
    known(0x8007_06BA, "RPC_S_SERVER_UNAVAILABLE", Meaning::Broken),
    known(0x8007_06BB, "RPC_S_SERVER_TOO_BUSY", Meaning::Away),
    known(0x8007_06BE, "RPC_S_CALL_FAILED", Meaning::Broken),
    known(0x8007_06BF, "RPC_S_CALL_FAILED_DNE", Meaning::Broken),
    known(0x8007_06D9, "EPT_S_NOT_REGISTERED", Meaning::Broken),
    known(0x8001_0007, "RPC_E_SERVER_DIED", Meaning::Broken),
    known(0x8001_0012, "RPC_E_SERVER_DIED_DNE", Meaning::Broken),
    known(0x8001_0105, "RPC_E_SERVERFAULT", Meaning::Broken),
    known(0x8001_0108, "RPC_E_DISCONNECTED", Meaning::Broken),
    known(0x8000_4021, "CO_E_OBJNOTREG", Meaning::Broken),
];

const fn known(code: u32, name: &'static str, meaning: Meaning) -> Known {
    Known { code, name, meaning }
}

fn find(code: u32) -> Option<&'static Known> {
    KNOWN.iter().find(|k| k.code == code)
}

/// What was being done when a status came.
#[derive(Debug, Clone)]
pub struct Doing {
    /// Namespace.
    pub namespace: String,
    /// Query, object path or method.
    pub what: String,
    /// How long it had taken.
    pub waited: Duration,
}

/// Whether the connection has to be made anew before anything else is asked.
#[must_use]
pub fn breaks_connection(code: u32) -> bool {
    find(code).is_some_and(|k| k.meaning == Meaning::Broken)
}

/// The caller's error for a failed status; `message` is what Windows says about it, which may be nothing.
#[must_use]
pub fn error(code: u32, message: &str, doing: Doing) -> WmiError {
    let known = find(code);
    let mut reason = match known {
        Some(known) => format!("{} (0x{code:08X})", known.name),
        None => format!("status 0x{code:08X}"),
    };
    let message = message.trim();
    if !message.is_empty() {
        reason = format!("{reason}: {message}");
    }
    match known.map_or(Meaning::Refused, |k| k.meaning) {
        Meaning::NotFound => WmiError::NotFound { namespace: doing.namespace, path: doing.what },
        Meaning::NoNamespace => WmiError::NoNamespace { namespace: doing.namespace },
        Meaning::Denied => WmiError::AccessDenied { what: doing.what },
        Meaning::Away | Meaning::Broken => unreachable(reason, doing),
        Meaning::Refused => WmiError::Invalid { what: doing.what, reason },
    }
}

/// No answer: `reason` says why.
#[must_use]
pub fn unreachable(reason: String, doing: Doing) -> WmiError {
    WmiError::Unreachable { endpoint: doing.namespace, waited: doing.waited, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doing() -> Doing {
        Doing {
            namespace: r"root\virtualization\v2".into(),
            what: "SELECT * FROM X".into(),
            waited: Duration::from_secs(1),
        }
    }

    #[test]
    fn each_status_of_the_facts_becomes_its_error() {
        let kind = |code| error(code, "", doing());
        assert!(matches!(kind(0x8004_1002), WmiError::NotFound { .. }));
        assert!(matches!(kind(0x8004_100E), WmiError::NoNamespace { .. }));
        assert!(matches!(kind(0x8004_1003), WmiError::AccessDenied { .. }));
        for transient in [
            0x8004_1015,
            0x8004_1032,
            0x8004_1033,
            0x8004_1069,
            0x8004_106C,
            0x8007_06BA,
            0x8007_06D9,
            0x8007_0046,
        ] {
            assert!(kind(transient).is_transient(), "0x{transient:08X}");
        }
        assert!(!kind(0x8004_1004).is_transient());
        let odd = error(0x8009_0001, "Odd.\r\n", doing()).to_string();
        assert!(odd.contains("0x80090001: Odd."), "{odd}");
    }

    #[test]
    fn only_what_ended_the_connection_asks_for_a_new_one() {
        assert!(breaks_connection(0x8007_06BA) && breaks_connection(0x8001_0108));
        assert!(!breaks_connection(0x8004_1002) && !breaks_connection(0x8004_1069));
        assert!(!breaks_connection(1));
    }
}
