//! Reading an attached disk: overlapped reads on its handle, sector by sector.
#![allow(unsafe_code)] // overlapped I/O of kernel32

use std::io;
use std::os::windows::io::{AsRawHandle, OwnedHandle};

use windows::Win32::Foundation::{ERROR_HANDLE_EOF, ERROR_IO_PENDING, HANDLE};
use windows::Win32::Storage::FileSystem::ReadFile;
use windows::Win32::Storage::Vhd::{DETACH_VIRTUAL_DISK_FLAG_NONE, DetachVirtualDisk};
use windows::Win32::System::IO::{GetOverlappedResult, OVERLAPPED};
use windows::Win32::System::Threading::CreateEventW;

use crate::files::{HostFile, aligned};

/// The guest's bytes of an attached disk. Dropping it detaches the disk.
pub(super) struct AttachedBytes {
    handle: OwnedHandle,
    size: u64,
}

impl AttachedBytes {
    pub(super) fn new(handle: OwnedHandle, size: u64) -> Self {
        Self { handle, size }
    }

    fn raw(&self) -> HANDLE {
        HANDLE(self.handle.as_raw_handle())
    }

    fn read_sectors(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        // The end of a disk may lie within one of our larger sectors, but not within one of its own.
        let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = buf.len().min(left);
        if length == 0 {
            return Ok(0);
        }
        // SAFETY: an unnamed event of our own.
        let event = unsafe { CreateEventW(None, true, false, None)? };
        // SAFETY: just made, and ours alone.
        let event = unsafe {
            <OwnedHandle as std::os::windows::io::FromRawHandle>::from_raw_handle(event.0)
        };
        let mut overlapped =
            OVERLAPPED { hEvent: HANDLE(event.as_raw_handle()), ..Default::default() };
        overlapped.Anonymous.Anonymous.Offset = offset as u32;
        overlapped.Anonymous.Anonymous.OffsetHigh = (offset >> 32) as u32;
        // SAFETY: buffer, event and OVERLAPPED live until the result was waited for, whatever it is.
        unsafe {
            let begun =
                ReadFile(self.raw(), Some(&mut buf[..length]), None, Some(&raw mut overlapped));
            if let Err(e) = begun
                && e.code() != ERROR_IO_PENDING.to_hresult()
            {
                return if e.code() == ERROR_HANDLE_EOF.to_hresult() {
                    Ok(0)
                } else {
                    Err(e.into())
                };
            }
            let mut count = 0;
            GetOverlappedResult(self.raw(), &raw const overlapped, &raw mut count, true)?;
            Ok(count as usize)
        }
    }
}

impl HostFile for AttachedBytes {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        aligned::read_at(buf, offset, |buf, offset| self.read_sectors(buf, offset))
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.size)
    }
}

impl Drop for AttachedBytes {
    fn drop(&mut self) {
        // SAFETY: the handle is open until after this. Closing it detaches, too, should this be refused.
        let status = unsafe { DetachVirtualDisk(self.raw(), DETACH_VIRTUAL_DISK_FLAG_NONE, 0) };
        if let Err(e) = status.ok() {
            tracing::debug!(error = %e, "a virtual disk was detached by closing it");
        }
    }
}
