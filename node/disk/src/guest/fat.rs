//! FAT12, FAT16 and FAT32, read-only.
//!
//! Source: Microsoft's FAT specification 1.03. A file has no number of its own: a [`FileId`] is where its directory entry
//! is on the volume.

mod directory;
mod table;

use std::sync::{Arc, Mutex, PoisonError};

use table::Table;

use super::bytes::{array, slice, u8_at, u16_at, u32_at};
use super::file_system::{FileSystemFacts, fill};
use super::window::Window;
use super::{
    Entry, Extent, FileId, FileKind, FileSystem, FileSystemKind, GuestError, GuestTime, Name, Stat,
};
use crate::ByteRange;

/// The root directory.
const ROOT: FileId = FileId(0);
/// Pieces of a file that are kept in memory.
const MAX_PIECES: usize = 4 << 20;

/// A FAT volume.
pub struct Fat {
    window: Window,
    table: Table,
    /// Where the data clusters begin; the first has number 2.
    data: u64,
    cluster: u64,
    root: Root,
    facts: FileSystemFacts,
    /// The chain that was followed last: whoever reads a file reads it piece by piece.
    last: Mutex<Option<(FileId, Chain)>>,
}

/// Runs of a chain: (offset in the file, length, place on the volume).
type Chain = Arc<Vec<(u64, u64, Option<u64>)>>;

#[derive(Debug, Clone, Copy)]
enum Root {
    /// FAT12 and FAT16: a fixed area.
    Fixed { start: u64, len: u64 },
    /// FAT32: a chain.
    Cluster(u32),
}

impl Fat {
    pub(crate) fn open(window: Window) -> Result<Self, GuestError> {
        let bad = |detail: &str| GuestError::damaged("the boot sector of the FAT volume", detail);
        let boot = window.bytes(0, 512)?;
        let sector = u64::from(u16_at(&boot, 11));
        let per_cluster = u64::from(u8_at(&boot, 13));
        if !matches!(sector, 512 | 1024 | 2048 | 4096) || !per_cluster.is_power_of_two() {
            return Err(bad("its sizes are impossible"));
        }
        let pick = |short: u16, long: u32| if short != 0 { u64::from(short) } else { long.into() };
        let reserved = u64::from(u16_at(&boot, 14)) * sector;
        let tables = u64::from(u8_at(&boot, 16));
        let table_size = pick(u16_at(&boot, 22), u32_at(&boot, 36)) * sector;
        let root_len = u64::from(u16_at(&boot, 17)) * 32;
        let total = pick(u16_at(&boot, 19), u32_at(&boot, 32)) * sector;
        let cluster = per_cluster * sector;
        let root_start = reserved + tables * table_size;
        let data = root_start + root_len.next_multiple_of(sector);
        if reserved == 0 || tables == 0 || table_size == 0 || total > window.len() || data >= total
        {
            return Err(bad("its areas do not fit the volume"));
        }
        let clusters = (total - data) / cluster;
        // The number of clusters alone decides; that is the rule.
        let kind = match clusters {
            0..4085 => FileSystemKind::Fat12,
            4085..65525 => FileSystemKind::Fat16,
            _ => FileSystemKind::Fat32,
        };
        let fat32 = kind == FileSystemKind::Fat32;
        if fat32 == (root_len != 0) {
            return Err(bad("its kind does not fit its root directory"));
        }
        let extended = if fat32 { 64 } else { 36 };
        let (mut id, mut label) = (String::new(), Vec::new());
        if u8_at(&boot, extended + 2) == 0x29 {
            let serial = u32_at(&boot, extended + 3);
            id = format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff);
            label = array::<11>(&boot, extended + 7).trim_ascii_end().to_vec();
            if label == b"NO NAME" {
                label.clear();
            }
        }
        let table = Table::new(window.part(ByteRange::new(reserved, table_size)), kind, clusters)?;
        let root = if fat32 {
            Root::Cluster(u32_at(&boot, 44))
        } else {
            Root::Fixed { start: root_start, len: root_len }
        };
        let facts = FileSystemFacts {
            kind,
            label: Name::from_bytes(label),
            size: total,
            cluster: cluster as u32,
            id,
        };
        let last = Mutex::default();
        let mut fat = Self { window, table, data, cluster, root, facts, last };
        // The entry in the root directory is the label that is kept up to date.
        if let Some(label) = fat.label()? {
            fat.facts.label = label;
        }
        Ok(fat)
    }

    fn place(&self, cluster: u32) -> u64 {
        self.data + u64::from(cluster.saturating_sub(2)) * self.cluster
    }

    /// The whole chain of a file.
    fn chain(&self, file: FileId, entry: &[u8]) -> Result<Chain, GuestError> {
        // A lookup and a replacement happen while it is held.
        let lock = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, chain)) = &*lock()
            && *known == file
        {
            return Ok(chain.clone());
        }
        let mut out: Vec<(u64, u64, Option<u64>)> = Vec::new();
        let mut offset = 0;
        let count = u64::from(u32_at(entry, 28)).div_ceil(self.cluster);
        self.table.chain(first_cluster(entry, self.facts.kind), count, true, &mut |cluster| {
            let place = self.place(cluster);
            match out.last_mut() {
                Some((_, len, Some(start))) if *start + *len == place => *len += self.cluster,
                _ => out.push((offset, self.cluster, Some(place))),
            }
            offset += self.cluster;
        })?;
        if out.len() > MAX_PIECES {
            return Err(GuestError::unsupported(
                "the file",
                format!("it is in {} pieces", out.len()),
            ));
        }
        let chain = Arc::new(out);
        *lock() = Some((file, chain.clone()));
        Ok(chain)
    }

    /// The short entry that an id names.
    fn short(&self, file: FileId) -> Result<[u8; 32], GuestError> {
        let mut entry = [0; 32];
        self.window.read(file.0, &mut entry)?;
        Ok(entry)
    }
}

fn first_cluster(entry: &[u8], kind: FileSystemKind) -> u32 {
    let high = if kind == FileSystemKind::Fat32 { u32::from(u16_at(entry, 20)) << 16 } else { 0 };
    high | u32::from(u16_at(entry, 26))
}

impl FileSystem for Fat {
    fn facts(&self) -> &FileSystemFacts {
        &self.facts
    }

    fn root(&self) -> FileId {
        ROOT
    }

    fn case_sensitive(&self) -> bool {
        false
    }

    fn doubt(&self) -> Result<Option<String>, GuestError> {
        Ok(self.table.doubt()?.map(str::to_owned))
    }

    fn list(
        &self,
        directory: FileId,
        each: &mut dyn FnMut(Entry) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        self.entries(directory, &mut |found| {
            if found.is_dot() || found.is_label() {
                return Ok(());
            }
            let kind = if found.is_directory() { FileKind::Directory } else { FileKind::File };
            each(Entry { name: found.name(), id: FileId(found.place), kind })
        })
    }

    fn stat(&self, file: FileId) -> Result<Stat, GuestError> {
        let mut stat = Stat {
            kind: FileKind::Directory,
            size: 0,
            modified: None,
            created: None,
            accessed: None,
            mode: None,
            owner: None,
            attributes: Some(0x10),
            links: 1,
            target: None,
            streams: Vec::new(),
            unreadable: None,
        };
        if file == ROOT {
            return Ok(stat);
        }
        let entry = self.short(file)?;
        stat.attributes = Some(u8_at(&entry, 11).into());
        if u8_at(&entry, 11) & directory::DIRECTORY == 0 {
            (stat.kind, stat.size) = (FileKind::File, u32_at(&entry, 28).into());
        }
        stat.modified = time(u16_at(&entry, 24), u16_at(&entry, 22), 0);
        stat.created = time(u16_at(&entry, 16), u16_at(&entry, 14), u8_at(&entry, 13));
        stat.accessed = time(u16_at(&entry, 18), 0, 0);
        Ok(stat)
    }

    fn read(&self, file: FileId, offset: u64, buf: &mut [u8]) -> Result<usize, GuestError> {
        let entry = self.short(file)?;
        let size = u64::from(u32_at(&entry, 28));
        let len = size.saturating_sub(offset).min(buf.len() as u64) as usize;
        if len > 0 {
            let pieces = self.chain(file, &entry)?;
            fill(offset, &mut buf[..len], &pieces, |place, part| self.window.content(place, part))?;
        }
        Ok(len)
    }

    fn extents(&self, file: FileId) -> Result<Vec<Extent>, GuestError> {
        if self.stat(file)?.kind != FileKind::File {
            return Err(GuestError::NoExtents { reason: "is a directory's" });
        }
        let entry = self.short(file)?;
        let size = u64::from(u32_at(&entry, 28));
        if size == 0 {
            return Err(GuestError::NoExtents { reason: "is empty" });
        }
        let chain = self.chain(file, &entry)?;
        Ok(chain
            .iter()
            .filter_map(|&(file_offset, len, place)| {
                let disk = ByteRange::new(self.window.on_disk(place?), len);
                Some(Extent { file_offset, disk })
            })
            .collect())
    }
}

/// A date, a time of two seconds' precision, hundredths of a second beyond.
fn time(date: u16, clock: u16, hundredths: u8) -> Option<GuestTime> {
    let (year, month, day) =
        (i64::from(date >> 9) + 1980, i64::from(date >> 5 & 15), i64::from(date & 31));
    if !(1..=12).contains(&month) || day == 0 {
        return None;
    }
    // Days since the epoch of the proleptic Gregorian calendar, March first.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    let seconds =
        i64::from(clock >> 11) * 3600 + i64::from(clock >> 5 & 63) * 60 + i64::from(clock & 31) * 2;
    let hundredths = u32::from(hundredths.min(199));
    Some(GuestTime {
        seconds: days * 86400 + seconds + i64::from(hundredths / 100),
        nanos: hundredths % 100 * 10_000_000,
        local: true,
    })
}

impl Fat {
    fn label(&self) -> Result<Option<Name>, GuestError> {
        let mut label = None;
        self.entries(ROOT, &mut |found| {
            if found.is_label() && label.is_none() {
                let text = slice(&found.short, 0, 11).unwrap_or_default();
                label = Some(Name::from_bytes(text.trim_ascii_end()));
            }
            Ok(())
        })?;
        Ok(label)
    }
}
