//! Whether the volume is as its driver would show it.

use super::super::GuestError;
use super::super::bytes::{slice, u16_at, u32_at, u64_at};
use super::Ntfs;
use super::record::{Body, fix_up, kind};

/// Record of `$LogFile`.
const LOG_FILE: u64 = 2;
/// Record of `$Volume`.
pub(super) const VOLUME: u64 = 3;

impl Ntfs {
    pub(super) fn health(&self) -> Result<Option<String>, GuestError> {
        let volume = self.file(VOLUME)?;
        let information = volume
            .resident(kind::VOLUME_INFORMATION)
            .ok_or_else(|| GuestError::damaged("$Volume", "it has no volume information"))?;
        let flags = u16_at(information, 10);
        if flags & 1 != 0 {
            return Ok(Some("the volume is marked dirty: Windows would check it".into()));
        }
        // Resize the log, upgrade on mount, chkdsk under way.
        if flags & 0x8006 != 0 {
            return Ok(Some(format!("work on the volume is under way (flags {flags:#06x})")));
        }
        self.log()
    }

    /// `$LogFile` begins with two restart pages; the newer one tells whether somebody uses the log.
    fn log(&self) -> Result<Option<String>, GuestError> {
        let file = self.file(LOG_FILE)?;
        let body = match file.stream(&[]).map(|a| &a.body) {
            Some(Body::NonResident(body)) => body,
            _ => return Err(GuestError::damaged("$LogFile", "it has no content")),
        };
        let runs = self.runs(body)?;
        let read = |offset: u64, len: usize| {
            let mut page = vec![0; len];
            self.plain(&runs, body, offset, &mut page, true).map(|()| page)
        };
        let first = read(0, 4096)?;
        // As mkfs and recovery leave it.
        if first.iter().all(|b| *b == 0xff) {
            return Ok(None);
        }
        let mut newest: Option<(u64, bool)> = None;
        let page = u32_at(&first, 16);
        let size = if first.starts_with(b"RSTR")
            && (512..=65536).contains(&page)
            && page.is_multiple_of(512)
        {
            page
        } else {
            4096
        };
        for offset in [0, u64::from(size)] {
            if let Some((lsn, clean)) = restart(read(offset, size as usize)?)
                && newest.is_none_or(|(n, _)| lsn > n)
            {
                newest = Some((lsn, clean));
            }
        }
        Ok(match newest {
            Some((_, true)) => None,
            Some((_, false)) => Some(
                "its log ($LogFile) is in use: changes in it are not in the file system yet".into(),
            ),
            None => Some("its log ($LogFile) cannot be understood".into()),
        })
    }
}

/// (current LSN, whether nothing has to be replayed) of a restart page.
fn restart(mut page: Vec<u8>) -> Option<(u64, bool)> {
    const NO_CLIENT: u16 = 0xffff;
    const VOLUME_IS_CLEAN: u16 = 2;
    if !page.starts_with(b"RSTR") {
        return None;
    }
    fix_up(&mut page).ok()?;
    let area = slice(&page, u16_at(&page, 24).into(), 48)?;
    let clean = u16_at(area, 12) == NO_CLIENT || u16_at(area, 14) & VOLUME_IS_CLEAN != 0;
    Some((u64_at(area, 0), clean))
}
