//! An open virtual disk.
//!
//! `unsafe` because virtdisk.dll is C: structures with a version and a union, answers of any length behind them.
#![allow(unsafe_code)]

use std::io;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle};
use std::path::Path;

use windows::Win32::Foundation::{ERROR_INSUFFICIENT_BUFFER, HANDLE, WIN32_ERROR};
use windows::Win32::Storage::Vhd::{
    ATTACH_VIRTUAL_DISK_FLAG, ATTACH_VIRTUAL_DISK_FLAG_NO_LOCAL_HOST,
    ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY, AttachVirtualDisk, GET_VIRTUAL_DISK_INFO,
    GET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE, GET_VIRTUAL_DISK_INFO_PROVIDER_SUBTYPE,
    GET_VIRTUAL_DISK_INFO_SIZE, GET_VIRTUAL_DISK_INFO_VERSION,
    GET_VIRTUAL_DISK_INFO_VHD_PHYSICAL_SECTOR_SIZE, GET_VIRTUAL_DISK_INFO_VIRTUAL_DISK_ID,
    GET_VIRTUAL_DISK_INFO_VIRTUAL_STORAGE_TYPE, GetVirtualDiskInformation, OPEN_VIRTUAL_DISK_FLAG,
    OPEN_VIRTUAL_DISK_PARAMETERS, OPEN_VIRTUAL_DISK_PARAMETERS_0, OPEN_VIRTUAL_DISK_PARAMETERS_0_1,
    OPEN_VIRTUAL_DISK_VERSION_2, OpenVirtualDisk, QUERY_CHANGES_VIRTUAL_DISK_FLAG_NONE,
    QUERY_CHANGES_VIRTUAL_DISK_RANGE, QueryChangesVirtualDisk, VIRTUAL_DISK_ACCESS_NONE,
    VIRTUAL_STORAGE_TYPE, VIRTUAL_STORAGE_TYPE_DEVICE_VHDX,
};
use windows::core::{GUID, HSTRING};

use super::attached::AttachedBytes;
use super::changes::{self, ChangesError, Portion, Range};
use super::tracking::{self, Tracking};
use crate::files::{Attached, DiskFacts};

/// Answers are at most a few hundred bytes; the structure's own size is too small for some.
const ANSWER: usize = 4096;
/// Changed ranges asked for at once.
const RANGES: u32 = 4096;
/// `PROVIDER_SUBTYPE` of a fixed disk.
const FIXED: u32 = 2;

/// A virtual disk, open read-only with its parents. Dropping it closes it.
#[derive(Debug)]
pub struct VirtualDisk {
    handle: OwnedHandle,
    path: String,
}

/// Memory for one answer, aligned as its structure.
#[repr(C, align(8))]
struct Answer([u8; ANSWER]);

impl VirtualDisk {
    /// Opens a disk; the system finds its parents.
    ///
    /// # Errors
    /// The system's refusal, with the path.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Unknown type and vendor: the system looks at the file.
        let kind = VIRTUAL_STORAGE_TYPE { DeviceId: 0, VendorId: GUID::zeroed() };
        let parameters = OPEN_VIRTUAL_DISK_PARAMETERS {
            Version: OPEN_VIRTUAL_DISK_VERSION_2,
            Anonymous: OPEN_VIRTUAL_DISK_PARAMETERS_0 {
                Version2: OPEN_VIRTUAL_DISK_PARAMETERS_0_1 {
                    GetInfoOnly: false.into(),
                    ReadOnly: true.into(),
                    ResiliencyGuid: GUID::zeroed(),
                },
            },
        };
        let mut handle = HANDLE::default();
        let path_text = path.display().to_string();
        // SAFETY: all pointers are to locals that outlive the call; the access mask of version 2 is NONE.
        let opened = unsafe {
            OpenVirtualDisk(
                &raw const kind,
                &HSTRING::from(path.as_os_str()),
                VIRTUAL_DISK_ACCESS_NONE,
                OPEN_VIRTUAL_DISK_FLAG(0),
                Some(&raw const parameters),
                &raw mut handle,
            )
        };
        check(opened, "open", &path_text)?;
        // SAFETY: the call succeeded: the handle is open and ours alone.
        let handle = unsafe { OwnedHandle::from_raw_handle(handle.0) };
        Ok(Self { handle, path: path_text })
    }

    fn raw(&self) -> HANDLE {
        HANDLE(self.handle.as_raw_handle())
    }

    /// Asks for one kind of information; gives the whole answer and how much of it is valid.
    fn ask(&self, version: GET_VIRTUAL_DISK_INFO_VERSION) -> io::Result<(Box<Answer>, usize)> {
        let mut answer = Box::new(Answer([0; ANSWER]));
        answer.0[..4].copy_from_slice(&version.0.to_le_bytes());
        let (mut size, mut used) = (ANSWER as u32, 0);
        // SAFETY: the memory is as large as `size` says and aligned as the structure; the version lies at its start.
        let asked = unsafe {
            GetVirtualDiskInformation(
                self.raw(),
                &raw mut size,
                answer.0.as_mut_ptr().cast::<GET_VIRTUAL_DISK_INFO>(),
                Some(&raw mut used),
            )
        };
        check(asked, "ask about", &self.path)?;
        let valid = if used == 0 { size } else { used };
        Ok((answer, (valid as usize).min(ANSWER)))
    }

    /// As `ask`, with the answer as the structure that it is for all kinds of fixed length.
    fn info(&self, version: GET_VIRTUAL_DISK_INFO_VERSION) -> io::Result<GET_VIRTUAL_DISK_INFO> {
        let (answer, _) = self.ask(version)?;
        // SAFETY: larger than the structure, aligned, and all of it initialised; every bit pattern is valid in it.
        Ok(unsafe { std::ptr::from_ref(&*answer).cast::<GET_VIRTUAL_DISK_INFO>().read() })
    }

    /// Its facts.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn facts(&self) -> io::Result<DiskFacts> {
        let size = self.info(GET_VIRTUAL_DISK_INFO_SIZE)?;
        let id = self.info(GET_VIRTUAL_DISK_INFO_VIRTUAL_DISK_ID)?;
        let subtype = self.info(GET_VIRTUAL_DISK_INFO_PROVIDER_SUBTYPE)?;
        let kind = self.info(GET_VIRTUAL_DISK_INFO_VIRTUAL_STORAGE_TYPE)?;
        let physical = self.info(GET_VIRTUAL_DISK_INFO_VHD_PHYSICAL_SECTOR_SIZE)?;
        // SAFETY: each member is read from the answer to the question for it.
        unsafe {
            let size = size.Anonymous.Size;
            let guid = id.Anonymous.VirtualDiskId;
            let mut disk_id = [0; 16];
            disk_id[..4].copy_from_slice(&guid.data1.to_le_bytes());
            disk_id[4..6].copy_from_slice(&guid.data2.to_le_bytes());
            disk_id[6..8].copy_from_slice(&guid.data3.to_le_bytes());
            disk_id[8..].copy_from_slice(&guid.data4);
            Ok(DiskFacts {
                size: size.VirtualSize,
                block_size: size.BlockSize,
                logical_sector: size.SectorSize,
                physical_sector: physical.Anonymous.VhdPhysicalSectorSize,
                disk_id,
                fixed: subtype.Anonymous.ProviderSubtype == FIXED,
                vhdx: kind.Anonymous.VirtualStorageType.DeviceId
                    == VIRTUAL_STORAGE_TYPE_DEVICE_VHDX,
            })
        }
    }

    /// How far its changes are tracked.
    ///
    /// # Errors
    /// The system's refusal; [`io::ErrorKind::InvalidData`] for an answer without the flags.
    pub fn tracking(&self) -> io::Result<Tracking> {
        let (answer, used) = self.ask(GET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE)?;
        tracking::parse(&answer.0, used).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the change tracking state of {} is no answer", self.path),
            )
        })
    }

    /// What changed on a disk of `size` bytes since the id.
    ///
    /// # Errors
    /// The system's refusal, or [`io::ErrorKind::InvalidData`] when it makes no progress: read the disk in full.
    pub fn changes(&self, tracking_id: &str, size: u64) -> io::Result<Vec<Range>> {
        let id = HSTRING::from(tracking_id);
        let mut room =
            vec![QUERY_CHANGES_VIRTUAL_DISK_RANGE::default(); RANGES as usize].into_boxed_slice();
        let collected = changes::collect(size, |offset, length| {
            let (mut count, mut processed) = (RANGES, 0);
            // SAFETY: room for as many ranges as `count` says; the id lives until the call returns.
            let asked = unsafe {
                QueryChangesVirtualDisk(
                    self.raw(),
                    &id,
                    offset,
                    length,
                    QUERY_CHANGES_VIRTUAL_DISK_FLAG_NONE,
                    room.as_mut_ptr(),
                    &raw mut count,
                    &raw mut processed,
                )
            };
            if asked != ERROR_INSUFFICIENT_BUFFER || processed == 0 {
                check(asked, "ask for the changes of", &self.path)?;
            }
            let ranges = room.iter().take(count as usize).map(|r| (r.ByteOffset, r.ByteLength));
            Ok(Portion { ranges: ranges.collect(), processed })
        });
        collected.map_err(|e| match e {
            ChangesError::Asked(e) => e,
            ChangesError::Stuck(_) => io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the changes of {}: {e}", self.path),
            ),
        })
    }

    /// Attaches it for reading by this process alone: it does not become a disk of this host.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn attach(self) -> io::Result<Attached> {
        let facts = self.facts()?;
        let flags = ATTACH_VIRTUAL_DISK_FLAG(
            ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY.0 | ATTACH_VIRTUAL_DISK_FLAG_NO_LOCAL_HOST.0,
        );
        // SAFETY: no pointer is passed; without an OVERLAPPED the call is finished when it returns.
        let attached = unsafe { AttachVirtualDisk(self.raw(), None, flags, 0, None, None) };
        check(attached, "attach", &self.path)?;
        let bytes = AttachedBytes::new(self.handle, facts.size);
        Ok(Attached { bytes: std::sync::Arc::new(bytes), facts })
    }
}

fn check(status: WIN32_ERROR, doing: &str, path: &str) -> io::Result<()> {
    status.ok().map_err(|e| {
        let error = io::Error::from(e);
        let code = status.0;
        io::Error::new(error.kind(), format!("cannot {doing} {path} (0x{code:08X}): {error}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_virtual_disk_is_refused_with_its_path() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("no disk.vhdx");
        std::fs::write(&path, vec![0; 1 << 20]).expect("written");
        let refused = VirtualDisk::open(&path).expect_err("it is no disk").to_string();
        assert!(refused.contains("no disk.vhdx"), "{refused}");
    }
}
