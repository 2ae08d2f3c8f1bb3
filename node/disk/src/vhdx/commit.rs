//! How changes of a VHDX's tables become durable: log entry, flush, in place, flush.

use uuid::Uuid;

use super::header::HEADER_OFFSETS;
use super::log::{LogCursor, encode_entry};
use super::overlay::{Patch, Sector};
use super::{LOG_SECTOR, MIB, VhdxWriter};
use crate::DiskError;
use crate::block_file::BlockFile;
use crate::error::FormatError;
use crate::layer::ReadLayer;

/// Where a simulated crash interrupts a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrashPoint {
    /// Payload is on the medium, the log knows nothing of it: table changes since the last flush are lost.
    BeforeLog,
    /// Half of the log entry was written: as if it were not there.
    LogTorn,
    /// The log entry is durable, nothing is in its place.
    AfterLog,
    /// The log entry is durable, some of it is in its place.
    HalfApplied,
}

impl VhdxWriter {
    /// Begins a flush and drops the writer in the middle of it, as a power failure would: the file
    /// stays marked as in use. For tests and the lab's simulated host crashes.
    ///
    /// # Errors
    /// [`DiskError::Io`].
    pub fn crash(mut self, at: CrashPoint) -> Result<(), DiskError> {
        self.fail_on_error(|writer| writer.commit(Some(at)))
    }

    /// Marks the file as in use before its first change, with new identifiers.
    pub(crate) fn begin(&mut self, guest_data: bool) -> Result<(), DiskError> {
        let new_data_guid = guest_data && !self.next_data_guid.is_nil();
        if self.log.is_some() && !new_data_guid {
            return Ok(());
        }
        self.fail_on_error(|writer| {
            let mut header = writer.layer.header;
            if writer.log.is_none() {
                let cursor = LogCursor { guid: Uuid::new_v4(), sequence: 1, position: 0 };
                // An empty entry, so that there is a valid sequence as soon as the header names it.
                writer.append_entry(cursor, &[], None)?;
                header.log_guid = cursor.guid;
                header.file_write_guid = Uuid::new_v4();
            }
            if new_data_guid {
                header.data_write_guid = std::mem::take(&mut writer.next_data_guid);
            }
            writer.layer.header = header;
            writer.write_headers()
        })
    }

    /// Takes the mark off; everything was committed.
    pub(crate) fn end(&mut self) -> Result<(), DiskError> {
        if self.log.take().is_none() {
            return Ok(());
        }
        self.layer.header.log_guid = Uuid::nil();
        self.write_headers()
    }

    /// Makes all changes durable.
    pub(crate) fn commit(&mut self, crash: Option<CrashPoint>) -> Result<(), DiskError> {
        // Payload first: no table may ever name bytes that are not there.
        self.file.sync()?;
        let Some(cursor) = self.log else { return Ok(()) };
        let updates: Vec<(u64, Sector)> = (self.layer.image.overlay.iter())
            .filter_map(|(at, _, patch)| match patch {
                Patch::Data(sector) => Some((at, sector.clone())),
                Patch::Zero => None,
            })
            .collect();
        if updates.is_empty() || crash == Some(CrashPoint::BeforeLog) {
            return Ok(());
        }
        self.append_entry(cursor, &updates, crash)?;
        let applied = match crash {
            None => updates.len(),
            Some(CrashPoint::HalfApplied) => updates.len().div_ceil(2),
            Some(_) => return Ok(()),
        };
        for (at, sector) in &updates[..applied] {
            self.file.write_all_at(*at, &sector[..])?;
        }
        self.file.sync()?;
        self.layer.image.overlay.clear();
        Ok(())
    }

    /// Appends one entry to the ring and waits for it.
    fn append_entry(
        &mut self,
        cursor: LogCursor,
        updates: &[(u64, Sector)],
        crash: Option<CrashPoint>,
    ) -> Result<(), DiskError> {
        let header = &self.layer.header;
        let ring = u64::from(header.log_length);
        if ring < MIB {
            let error = FormatError::corrupt("log", "has no room; a writer needs at least 1 MiB");
            return Err(error.in_file(self.layer.path()));
        }
        let mut entry = encode_entry(&cursor, updates, self.layer.image.len);
        let length = entry.len() as u64;
        if crash == Some(CrashPoint::LogTorn) {
            entry.truncate(entry.len() - LOG_SECTOR);
        }
        let until_end = ((ring - cursor.position) as usize).min(entry.len());
        let (first, wrapped) = entry.split_at(until_end);
        self.file.write_all_at(header.log_offset + cursor.position, first)?;
        self.file.write_all_at(header.log_offset, wrapped)?;
        self.file.sync()?;
        let position = (cursor.position + length) % ring;
        self.log = Some(LogCursor { sequence: cursor.sequence + 1, position, ..cursor });
        Ok(())
    }

    /// Writes the header over both copies, one after the other: one is valid at every moment, and in the
    /// end either alone says the same.
    fn write_headers(&mut self) -> Result<(), DiskError> {
        self.write_header()?;
        self.write_header()
    }

    /// Writes the header over the copy that does not count, which from then on does.
    fn write_header(&mut self) -> Result<(), DiskError> {
        let layer = &mut self.layer;
        layer.header.sequence += 1;
        layer.header_slot = 1 - layer.header_slot;
        self.file.write_all_at(HEADER_OFFSETS[layer.header_slot], &layer.header.encode())?;
        layer.info.data_write_guid = layer.header.data_write_guid;
        self.file.sync()
    }

    /// Puts what the log of an earlier, crashed writer holds into its places.
    pub(crate) fn recover(&mut self) -> Result<(), DiskError> {
        if self.layer.header.log_guid.is_nil() {
            return Ok(());
        }
        tracing::info!(path = %self.layer.path().display(), "replaying the log of a disk that was not closed");
        let image = &mut self.layer.image;
        if image.len > image.physical_len {
            self.file.set_len(image.len)?;
            image.physical_len = image.len;
        }
        for (start, end, patch) in image.overlay.iter() {
            match patch {
                Patch::Data(sector) => self.file.write_all_at(start, &sector[..])?,
                Patch::Zero => write_zeros(&self.file, start, end)?,
            }
        }
        self.file.sync()?;
        image.overlay.clear();
        self.layer.header.log_guid = Uuid::nil();
        self.layer.header.file_write_guid = Uuid::new_v4();
        self.write_headers()
    }
}

fn write_zeros(file: &BlockFile, start: u64, end: u64) -> Result<(), DiskError> {
    let zeros = vec![0; (end - start).min(MIB) as usize];
    let mut at = start;
    while at < end {
        let len = (end - at).min(MIB);
        file.write_all_at(at, &zeros[..len as usize])?;
        at += len;
    }
    Ok(())
}
