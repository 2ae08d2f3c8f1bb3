//! The privileges of backup programs: reading files whatever their access lists say, and attaching virtual disks. The account of
//! services (LocalSystem) holds both, and has neither enabled.
#![allow(unsafe_code)] // token calls of advapi32

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};

use windows::Win32::Foundation::{ERROR_NOT_ALL_ASSIGNED, GetLastError, HANDLE};
use windows::Win32::Security::{
    AdjustTokenPrivileges, LUID_AND_ATTRIBUTES, LookupPrivilegeValueW, SE_BACKUP_NAME,
    SE_MANAGE_VOLUME_NAME, SE_PRIVILEGE_ENABLED, TOKEN_ADJUST_PRIVILEGES, TOKEN_PRIVILEGES,
    TOKEN_QUERY,
};
use windows::Win32::System::Threading::{GetCurrentProcess, OpenProcessToken};
use windows::core::PCWSTR;

/// Enables SeBackupPrivilege for this process; false when its account does not hold it.
pub(super) fn enable_backup() -> io::Result<bool> {
    enable(SE_BACKUP_NAME)
}

/// Enables SeManageVolumePrivilege for this process, without which virtual disks are not attached; false when its account
/// does not hold it.
pub(super) fn enable_attach() -> io::Result<bool> {
    enable(SE_MANAGE_VOLUME_NAME)
}

fn enable(name: PCWSTR) -> io::Result<bool> {
    let mut token = HANDLE::default();
    // SAFETY: the process handle is a constant; the token is ours and closed by OwnedHandle.
    let token = unsafe {
        OpenProcessToken(
            GetCurrentProcess(),
            TOKEN_ADJUST_PRIVILEGES | TOKEN_QUERY,
            &raw mut token,
        )?;
        OwnedHandle::from_raw_handle(token.0)
    };
    let mut privileges = TOKEN_PRIVILEGES { PrivilegeCount: 1, ..Default::default() };
    // SAFETY: plain calls; all pointers are to locals, and the name is a constant. The last error is that of the call right
    // before.
    unsafe {
        let mut wanted =
            LUID_AND_ATTRIBUTES { Attributes: SE_PRIVILEGE_ENABLED, ..Default::default() };
        LookupPrivilegeValueW(None, name, &raw mut wanted.Luid)?;
        privileges.Privileges[0] = wanted;
        AdjustTokenPrivileges(
            HANDLE(token.as_raw_handle()),
            false,
            Some(&raw const privileges),
            0,
            None,
            None,
        )?;
        Ok(GetLastError() != ERROR_NOT_ALL_ASSIGNED)
    }
}

#[cfg(test)]
mod tests {
    /// An administrator holds both; what is seen under Wine is that the names are known and the calls go through.
    #[test]
    fn privileges_of_backup_programs_can_be_asked_for() {
        assert!(super::enable_backup().is_ok());
        assert!(super::enable_attach().is_ok());
    }
}
