//! The `com` transport against a real COM and a real, if small, WMI: Windows' own, or that of Wine.
//!
//! No Hyper-V is needed: what is asked for is what every Windows has.
#![cfg(windows)]

use std::time::Duration;

use outrider_wmi::com::ComWmi;
use outrider_wmi::{NS_VIRTUALIZATION, Value, Wmi, WmiError};
use tokio::sync::Mutex;

const CIMV2: &str = r"root\cimv2";
/// HKEY_LOCAL_MACHINE
const MACHINE: u32 = 0x8000_0002;

/// One test at a time. Wine's provider keeps one table a class for the whole process and fills it anew at each query, which frees the
/// rows that another thread is still reading: two tests that ask for processes at once now and then see garbage. Windows' own
/// providers have no such fault, and what runs at once within one test asks for different classes.
static TURN: Mutex<()> = Mutex::const_new(());

fn wmi() -> ComWmi {
    ComWmi::start_with(Duration::from_secs(30)).expect("threads")
}

#[tokio::test]
async fn a_query_gives_objects_with_typed_properties() {
    let _turn = TURN.lock().await;
    let found = wmi()
        .query(CIMV2, "SELECT * FROM Win32_OperatingSystem")
        .await
        .expect("every Windows has one");
    assert_eq!(found.len(), 1);
    let system = &found[0];
    assert_eq!(system.class, "Win32_OperatingSystem");
    assert!(system.str("Caption").is_some_and(|c| c.contains("Windows")), "{system:?}");
    // uint64 travels as text and is a number again.
    assert!(matches!(system.get("TotalVirtualMemorySize"), Value::UInt(n) if *n > 0), "{system:?}");
    assert!(matches!(system.get("OSLanguage"), Value::UInt(_)), "uint32 travels as sint32");
    assert!(matches!(system.get("Primary"), Value::Bool(true)), "{system:?}");
}

#[tokio::test]
async fn several_calls_run_at_once_and_each_gets_its_own_answer() {
    let _turn = TURN.lock().await;
    let wmi = wmi();
    let ask = |wql: &'static str| wmi.query(CIMV2, wql);
    let (bios, system, processes) = tokio::join!(
        ask("SELECT * FROM Win32_BIOS"),
        ask("SELECT Name FROM Win32_ComputerSystem"),
        ask("SELECT ProcessId, Name FROM Win32_Process"),
    );
    assert_eq!(bios.expect("a BIOS")[0].class, "Win32_BIOS");
    assert_eq!(system.expect("a computer").len(), 1);
    let own = u64::from(std::process::id());
    let processes = processes.expect("processes");
    assert!(processes.iter().any(|p| p.u64("ProcessId") == Some(own)), "ours is among them");
}

#[tokio::test]
async fn an_object_is_read_by_its_path() {
    let _turn = TURN.lock().await;
    let wmi = wmi();
    let own = std::process::id();
    let path = format!("Win32_Process.Handle=\"{own}\"");
    let process = wmi.get(CIMV2, &path).await.expect("this process");
    assert_eq!(process.u64("ProcessId"), Some(u64::from(own)), "{process:?}");
    let missing = wmi.get(CIMV2, "Win32_Process.Handle=\"4294967280\"").await;
    assert!(matches!(missing, Err(WmiError::NotFound { .. })), "{missing:?}");
}

#[tokio::test]
async fn a_method_takes_arguments_and_gives_results_arrays_included() {
    let _turn = TURN.lock().await;
    let wmi = wmi();
    let args = |key: &str| {
        vec![
            ("hDefKey".to_owned(), Value::from(MACHINE)),
            ("sSubKeyName".to_owned(), Value::from(key)),
        ]
    };
    let out = wmi
        .exec_method(CIMV2, "StdRegProv", "EnumKey", args(r"SOFTWARE\Microsoft\Windows NT"))
        .await
        .expect("the registry answers");
    assert_eq!(out.u64("ReturnValue"), Some(0), "{out:?}");
    let names: Vec<&str> = out.array("sNames").iter().filter_map(Value::as_str).collect();
    assert!(names.contains(&"CurrentVersion"), "{out:?}");
    // A method's own refusal is an answer, not an error.
    let out = wmi
        .exec_method(CIMV2, "StdRegProv", "EnumKey", args(r"SOFTWARE\no such key"))
        .await
        .expect("an answer");
    assert_eq!(out.u64("ReturnValue"), Some(2), "ERROR_FILE_NOT_FOUND: {out:?}");
}

#[tokio::test]
async fn what_does_not_exist_is_told_apart() {
    let _turn = TURN.lock().await;
    let wmi = wmi();
    let none = wmi.query(NS_VIRTUALIZATION, "SELECT * FROM Msvm_ComputerSystem").await;
    // A test machine with Hyper-V answers.
    if let Err(error) = none {
        let named =
            matches!(&error, WmiError::NoNamespace { namespace } if namespace == NS_VIRTUALIZATION);
        assert!(named, "{error:?}");
        assert!(error.to_string().contains("install the Hyper-V role"), "{error}");
        assert!(!error.is_transient());
    }
    let args = vec![("NoSuchArgument".to_owned(), Value::from("x"))];
    let odd = wmi.exec_method(CIMV2, "StdRegProv", "EnumKey", args).await;
    assert!(matches!(odd, Err(WmiError::Invalid { .. })), "{odd:?}");
    let method = wmi.exec_method(CIMV2, "StdRegProv", "NoSuchMethod", vec![]).await;
    assert!(method.is_err(), "{method:?}");
}

/// Wine has no provider that can be written to: what is seen here is that the properties are judged by the instance itself, and that
/// the provider's refusal comes back as one, with its path.
#[tokio::test]
async fn properties_are_written_to_an_instance_that_has_them_and_a_refusal_is_told() {
    let _turn = TURN.lock().await;
    let wmi = wmi();
    let own = format!("Win32_Process.Handle=\"{}\"", std::process::id());
    let properties = |name: &str, value: Value| vec![(name.to_owned(), value)];
    let odd = wmi.put(CIMV2, &own, properties("NoSuchProperty", Value::from("x"))).await;
    let named =
        matches!(&odd, Err(WmiError::Invalid { reason, .. }) if reason.contains("NoSuchProperty"));
    assert!(named, "{odd:?}");
    let wrong = wmi.put(CIMV2, &own, properties("ProcessId", Value::from("no number"))).await;
    let named =
        matches!(&wrong, Err(WmiError::Invalid { reason, .. }) if reason.contains("ProcessId"));
    assert!(named, "{wrong:?}");
    let missing = "Win32_Process.Handle=\"4294967280\"";
    let missing = wmi.put(CIMV2, missing, properties("Priority", Value::from(8_u32))).await;
    assert!(matches!(missing, Err(WmiError::NotFound { .. })), "{missing:?}");
    let refused = wmi.put(CIMV2, &own, properties("Priority", Value::from(8_u32))).await;
    assert!(refused.is_err(), "processes are not written to: {refused:?}");
    assert!(!matches!(refused, Err(WmiError::Unreachable { .. })), "{refused:?}");
    let process = wmi.get(CIMV2, &own).await.expect("the connection is as good as before");
    assert_eq!(process.u64("ProcessId"), Some(u64::from(std::process::id())));
}
