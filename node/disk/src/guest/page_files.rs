//! Where a guest keeps what it moved out of its memory: bytes that are worth nothing once the guest has restarted
//! (requirement P8).
//!
//! | found | how it is certain |
//! | --- | --- |
//! | Windows page file | `pagefile.sys` or `swapfile.sys` in the root of an NTFS volume that needs no repair and no replay of its log |
//! | Linux swap partition | the partition table says so *and* the header has the signature `SWAPSPACE2` |
//! | Linux swap file | `/etc/fstab` of an ext file system that needs no replay names it *and* it begins with that header |
//!
//! The first page of a Linux swap area is kept, since the guest finds the area by the UUID in it. Windows makes its page
//! file anew at every start, so it may be zeros as a whole. `hiberfil.sys` is left in: it is not a page file but the
//! whole memory of a hibernated guest, and where it holds one, the page files belong to it and are left in, too. The
//! same goes for hibernation images in a swap area. Whatever is not certain is kept, and the reason is told.

use std::sync::Arc;

use super::disk::{GuestDisk, Volume};
use super::error::GuestError;
use super::file_system::{FileId, FileKind, FileSystem};
use super::name::Name;
use super::path;
use super::recognise::{Content, Family};
use super::swap::{self, SwapArea, SwapContent};
use super::window::Limits;
use crate::{ByteRange, RangeSet, ReadDisk};

/// Longest `/etc/fstab` that is read.
const MAX_FSTAB: usize = 256 << 10;
/// Swap files of one `fstab`, and bytes of such a path, that are looked at.
const MAX_SWAP_FILES: usize = 16;
const MAX_SWAP_PATH: usize = 512;
/// The names that Windows gives its page files.
const WINDOWS: [&str; 2] = ["pagefile.sys", "swapfile.sys"];
const HIBERNATION: &str = "hiberfil.sys";

/// A page file, swap file or swap partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageFile {
    /// Volume that it is on.
    pub volume: u32,
    /// What it is, for people.
    pub what: String,
    /// Its bytes on the disk, without what is kept of it.
    pub ranges: RangeSet,
}

/// What was found on a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Search {
    /// What is certain.
    pub found: Vec<PageFile>,
    /// What was kept though it may be such a file, and why, as sentences.
    pub kept: Vec<String>,
    /// The guest is hibernated, or may be: nothing of any of its disks may be left out.
    pub hibernated: bool,
}

impl Search {
    /// All bytes found.
    #[must_use]
    pub fn ranges(&self) -> RangeSet {
        self.found.iter().flat_map(|f| f.ranges.iter()).collect()
    }
}

/// Looks for page and swap files on one disk. Blocks. Never fails: what cannot be read is kept.
#[must_use]
pub fn search(disk: Arc<dyn ReadDisk>, limits: Limits) -> Search {
    let mut search = Search::default();
    let disk = match GuestDisk::open(disk, limits) {
        Ok(disk) => disk,
        Err(e) => {
            search.kept.push(format!("nothing is left out of the disk: {e}"));
            return search;
        }
    };
    if !disk.doubts.is_empty() {
        search.kept.push(format!("nothing is left out of the disk: {}", disk.doubts.join("; ")));
        return search;
    }
    for volume in &disk.volumes {
        let result = match volume.content {
            Content::FileSystem(Family::Ntfs) => windows(&disk, volume, &mut search),
            Content::FileSystem(Family::Ext) => linux(&disk, volume, &mut search),
            Content::Swap(area) => {
                partition(volume, area, &mut search);
                Ok(())
            }
            Content::SwapInUse { what } => {
                search.kept.push(format!("volume {} is kept: it holds {what}", volume.number));
                search.hibernated = true;
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(e) = result {
            search.kept.push(format!("nothing is left out of volume {}: {e}", volume.number));
        }
    }
    if search.hibernated {
        search.found.clear();
    }
    search
}

fn partition(volume: &Volume, area: SwapArea, search: &mut Search) {
    if !volume.partition.is_some_and(super::partition::PartitionType::is_linux_swap) {
        search.kept.push(format!(
            "volume {} is kept: it looks like Linux swap, but the partition table does not say so",
            volume.number
        ));
        return;
    }
    let page = u64::from(area.page);
    search.found.push(PageFile {
        volume: volume.number,
        what: format!("swap partition {}", volume.number),
        ranges: RangeSet::single(volume.range.start + page, area.len - page),
    });
}

fn windows(disk: &GuestDisk, volume: &Volume, search: &mut Search) -> Result<(), GuestError> {
    let fs = disk.file_system(volume)?;
    let mut files = Vec::new();
    let mut hibernation = None;
    fs.list(fs.root(), &mut |entry| {
        let is = |name: &str| entry.name.equals_ignoring_case(&Name::from(name));
        if entry.kind != FileKind::File {
            return Ok(());
        }
        if is(HIBERNATION) {
            hibernation = Some(entry.id);
        } else if WINDOWS.into_iter().any(is) {
            files.push(entry);
        }
        Ok(())
    })?;
    if let Some(file) = hibernation
        && is_hibernated(&*fs, file)
    {
        search.hibernated = true;
        search.kept.push(format!(
            "page files are kept: the guest is hibernated, or may be ({HIBERNATION} on volume {})",
            volume.number
        ));
        return Ok(());
    }
    if files.is_empty() {
        return Ok(());
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let doubt = fs.doubt()?;
    let mut taken = RangeSet::new();
    for file in files {
        let name = file.name;
        let mut keep = |why: &str| {
            search.kept.push(format!("{name} on volume {} is kept: {why}", volume.number));
        };
        if let Some(doubt) = &doubt {
            keep(doubt);
            continue;
        }
        let extents = match fs.extents(file.id) {
            Ok(extents) => extents,
            Err(e) => {
                keep(&e.to_string());
                continue;
            }
        };
        let ranges: RangeSet = extents.iter().map(|e| e.disk).collect();
        let apart = ranges.total_len() == extents.iter().map(|e| e.disk.len).sum::<u64>();
        if !apart || !ranges.intersect(&taken).is_empty() {
            keep("its clusters are claimed twice");
            continue;
        }
        taken = taken.union(&ranges);
        search.found.push(PageFile {
            volume: volume.number,
            what: format!("{name} on volume {}", volume.number),
            ranges,
        });
    }
    Ok(())
}

/// Whether `hiberfil.sys` holds the memory of a guest that will go on from it.
fn is_hibernated(fs: &dyn FileSystem, file: FileId) -> bool {
    let mut magic = [0; 4];
    match fs.read(file, 0, &mut magic) {
        Ok(0) => false,
        // Never used, or used up by the last start.
        Ok(4) => !matches!(&magic, b"\0\0\0\0" | b"wake" | b"WAKE"),
        _ => true,
    }
}

fn linux(disk: &GuestDisk, volume: &Volume, search: &mut Search) -> Result<(), GuestError> {
    let fs = disk.file_system(volume)?;
    let Some(fstab) = small_file(&*fs, b"/etc/fstab")? else { return Ok(()) };
    let listed = swap_files(&fstab);
    for swap_path in listed.paths {
        let shown = Name::from_bytes(swap_path.clone());
        let mut keep = |why: &str| {
            search
                .kept
                .push(format!("swap file {shown} on volume {} is kept: {why}", volume.number));
        };
        if listed.mounts.iter().any(|mount| is_below(&swap_path, mount)) {
            keep("it is on another file system that is mounted there");
            continue;
        }
        if let Some(doubt) = fs.doubt()? {
            keep(&doubt);
            continue;
        }
        match swap_file(&*fs, &swap_path) {
            Ok(Found::Area(ranges)) => search.found.push(PageFile {
                volume: volume.number,
                what: format!("swap file {shown} on volume {}", volume.number),
                ranges,
            }),
            Ok(Found::Hibernated(what)) => {
                keep(&format!("it is {what}"));
                search.hibernated = true;
            }
            // The names that are there instead are nobody's business.
            Err(GuestError::NotFound { .. }) => keep("it does not exist"),
            Err(e) => keep(&e.to_string()),
        }
    }
    Ok(())
}

enum Found {
    Area(RangeSet),
    Hibernated(&'static str),
}

fn swap_file(fs: &dyn FileSystem, at: &[u8]) -> Result<Found, GuestError> {
    let file = path::find(fs, at)?;
    let stat = fs.stat(file)?;
    if stat.kind != FileKind::File {
        let path = Name::from_bytes(at).to_string();
        return Err(GuestError::NotAFile { path, kind: stat.kind.text() });
    }
    let mut head = vec![0; 65536.min(stat.size as usize)];
    fs.read(file, 0, &mut head)?;
    let area = match swap::recognise(&head, stat.size) {
        Some(SwapContent::Pages(area)) => area,
        Some(SwapContent::Other(what)) => return Ok(Found::Hibernated(what)),
        None => {
            return Err(GuestError::damaged("a swap file", "it does not begin with a swap header"));
        }
    };
    let (first, end) = (u64::from(area.page), area.len);
    let mut pieces = Vec::new();
    for extent in fs.extents(file)? {
        let from = extent.file_offset.max(first);
        let to = (extent.file_offset + extent.disk.len).min(end);
        if from < to {
            let start = extent.disk.start + (from - extent.file_offset);
            pieces.push(ByteRange::new(start, to - from));
        }
    }
    let ranges: RangeSet = pieces.into_iter().collect();
    if ranges.total_len() != end - first {
        return Err(GuestError::damaged("a swap file", "its blocks are claimed twice"));
    }
    Ok(Found::Area(ranges))
}

/// A file of at most [`MAX_FSTAB`] bytes; `None`: there is none.
fn small_file(fs: &dyn FileSystem, at: &[u8]) -> Result<Option<Vec<u8>>, GuestError> {
    let file = match path::find(fs, at) {
        Ok(file) => file,
        Err(GuestError::NotFound { .. } | GuestError::NotADirectory { .. }) => return Ok(None),
        Err(e) => return Err(e),
    };
    let stat = fs.stat(file)?;
    if stat.kind != FileKind::File || stat.size > MAX_FSTAB as u64 {
        return Ok(None);
    }
    let mut bytes = vec![0; stat.size as usize];
    fs.read(file, 0, &mut bytes)?;
    Ok(Some(bytes))
}

struct Fstab {
    /// Swap files.
    paths: Vec<Vec<u8>>,
    /// Where other file systems are mounted.
    mounts: Vec<Vec<u8>>,
}

/// The swap files that an `fstab` names. Devices and areas named by UUID or label are partitions.
fn swap_files(fstab: &[u8]) -> Fstab {
    let mut out = Fstab { paths: Vec::new(), mounts: Vec::new() };
    for line in fstab.split(|b| *b == b'\n') {
        let fields: Vec<&[u8]> =
            line.split(u8::is_ascii_whitespace).filter(|f| !f.is_empty()).collect();
        let [what, place, kind, ..] = fields[..] else { continue };
        if what.starts_with(b"#") {
            continue;
        }
        let is_file = what.starts_with(b"/") && !what.starts_with(b"/dev/");
        if kind == b"swap" {
            let path = unescape(what);
            let few = out.paths.len() < MAX_SWAP_FILES && path.len() <= MAX_SWAP_PATH;
            if is_file && few && !out.paths.contains(&path) {
                out.paths.push(path);
            }
        } else if place != b"/" {
            out.mounts.push(unescape(place));
        }
    }
    out
}

fn is_below(path: &[u8], mount: &[u8]) -> bool {
    let mount = mount.strip_suffix(b"/").unwrap_or(mount);
    !mount.is_empty() && path.strip_prefix(mount).is_some_and(|rest| rest.starts_with(b"/"))
}

/// Blanks are written as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        if let [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] = rest {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fstab_names_swap_files_and_mounts() {
        let found = swap_files(
            b"# /old none swap sw 0 0\nUUID=1 / ext4 defaults 0 1\n/dev/sda2 none swap sw 0 0\n\
              /swap\\040file none swap sw 0 0\n/home/swap swap swap defaults\n/dev/sdb1 /home ext4 defaults 0 2\n\
              UUID=2 none swap sw\nbroken\n",
        );
        assert_eq!(found.paths, [b"/swap file".to_vec(), b"/home/swap".to_vec()]);
        assert_eq!(found.mounts, [b"/home".to_vec()]);
        assert!(is_below(b"/home/swap", b"/home/"));
        assert!(!is_below(b"/homes/swap", b"/home"));
    }
}
