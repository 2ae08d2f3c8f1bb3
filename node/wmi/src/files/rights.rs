//! Rights of virtual machine accounts on files.
//!
//! Every VM runs as an account of its own whose security id follows from its GUID: `S-1-5-83-1-` and the GUID's 16 bytes,
//! as Windows keeps them in memory, as four little-endian numbers. The id is used instead of the name, which exists only
//! while the VM does. Never seen on a real host by us; `icacls FOLDER` shows the entry as "NT VIRTUAL MACHINE\GUID".

use std::io;
use std::path::Path;

use uuid::Uuid;

/// The security id of a VM's account.
#[cfg_attr(not(windows), allow(dead_code, reason = "tested everywhere, used on Windows"))]
fn account(vm: Uuid) -> String {
    let bytes = vm.to_bytes_le();
    let (words, _) = bytes.as_chunks::<4>();
    let parts: Vec<String> = words.iter().map(|w| u32::from_le_bytes(*w).to_string()).collect();
    format!("S-1-5-83-1-{}", parts.join("-"))
}

/// Full control for the folder, inherited by what is and comes into it.
#[cfg(windows)]
pub(super) fn grant(vm: Uuid, folder: &Path) -> io::Result<()> {
    let system = std::env::var_os("SystemRoot").unwrap_or_else(|| r"C:\Windows".into());
    let output = std::process::Command::new(Path::new(&system).join(r"System32\icacls.exe"))
        .arg(folder)
        .arg("/grant")
        .arg(format!("*{}:(OI)(CI)F", account(vm)))
        .arg("/T")
        .arg("/Q")
        .stdin(std::process::Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = if output.stderr.is_empty() { output.stdout } else { output.stderr };
    Err(io::Error::other(format!("icacls: {}", String::from_utf8_lossy(&said).trim())))
}

/// No accounts of virtual machines here.
#[cfg(not(windows))]
#[allow(clippy::unnecessary_wraps, reason = "the same on every system")]
pub(super) fn grant(_vm: Uuid, _folder: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_account_follows_from_the_guid() {
        let vm = "00112233-4455-6677-8899-AABBCCDDEEFF".parse().expect("a GUID");
        // Memory: 33 22 11 00 | 55 44 77 66 | 88 99 AA BB | CC DD EE FF.
        let expected = format!(
            "S-1-5-83-1-{}-{}-{}-{}",
            0x0011_2233_u32, 0x6677_4455_u32, 0xBBAA_9988_u32, 0xFFEE_DDCC_u32
        );
        assert_eq!(super::account(vm), expected);
    }
}
