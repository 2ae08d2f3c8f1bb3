//! Disks with a real file system and real files of this machine, made by our own code: no root, no external tool.
//!
//! A disk is a dynamic VHDX with an MBR and one FAT32 partition; behind the partition is room where the lab's guests
//! write, so that the file system stays whole. The disks of different VMs begin with the same files in the same order,
//! as machines installed from one image do: that is what deduplication finds.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use fatfs::{Dir, FatType, FileSystem, FormatVolumeOptions, FsOptions};
use outrider_disk::vhdx::{CreateOptions, VhdxWriter};
use outrider_disk::{DiskError, ReadDisk};

use crate::report::Failure;

const MIB: u64 = 1 << 20;
/// The partition begins where every partitioning tool lets it begin.
const PARTITION_START: u64 = MIB;
/// 8 KiB clusters: more than 65,525 of them, as FAT32 demands.
const PARTITION_SIZE: u64 = 640 * MIB;
const CLUSTER: u32 = 8192;
/// Size of a disk.
pub(super) const DISK_SIZE: u64 = 1536 * MIB;
/// Where guests write: behind the partition.
pub(super) const GUEST_WINDOW: (u64, u64) = (704 * MIB, DISK_SIZE - 704 * MIB);
/// Files that are larger would make one disk of one file; of smaller ones there are so many that FAT's directories, which
/// are searched from their start, would take most of the time.
const FILE_SIZES: RangeInclusive<u64> = 32 << 10..=24 * MIB;

/// What a disk is filled with.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    /// Up to so many bytes that all disks have in common.
    pub(super) shared: u64,
    /// Up to so many bytes of its own.
    pub(super) own: u64,
    /// Which part of the machine's files is its own.
    pub(super) part: usize,
}

/// The files of this machine that disks are filled with, in an order that does not depend on the directory's.
#[derive(Debug)]
pub(super) struct Files {
    shared: Vec<(PathBuf, u64)>,
    own: Vec<(PathBuf, u64)>,
}

impl Files {
    /// Looks through the machine's programs and libraries.
    pub(super) fn of_this_machine() -> Self {
        let (shared, own): (&[&str], &[&str]) = if cfg!(windows) {
            (&["C:\\Windows\\System32"], &["C:\\Windows\\System32\\en-US", "C:\\Program Files"])
        } else {
            (&["/usr/bin", "/usr/sbin"], &["/usr/lib", "/usr/share"])
        };
        Self {
            shared: collect(shared, 256 * MIB, FILE_SIZES),
            own: collect(own, 1024 * MIB, FILE_SIZES),
        }
    }

    fn pick(&self, recipe: &Recipe) -> Vec<&Path> {
        fn take<'a>(
            files: impl Iterator<Item = &'a (PathBuf, u64)>,
            limit: u64,
        ) -> impl Iterator<Item = &'a Path> {
            files.scan(0, move |sum, (path, len)| {
                *sum += len;
                (*sum <= limit).then_some(path.as_path())
            })
        }
        // Parts follow each other, so that disks with different parts have different files.
        let skip = recipe.part * self.own.len() / PARTS;
        let own = self.own.iter().cycle().skip(skip).take(self.own.len());
        take(self.shared.iter(), recipe.shared).chain(take(own, recipe.own)).collect()
    }
}

/// Parts that the machine's own files are divided into.
pub(super) const PARTS: usize = 4;

/// Regular files below the folders, sorted by path, until `limit` bytes were found.
fn collect(folders: &[&str], limit: u64, sizes: RangeInclusive<u64>) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    let mut total = 0;
    let mut queue: VecDeque<PathBuf> = folders.iter().map(PathBuf::from).collect();
    while let Some(folder) = queue.pop_front() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        let mut entries: Vec<_> = entries.flatten().collect();
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                queue.push_back(entry.path());
            } else if kind.is_file()
                && let Ok(metadata) = entry.metadata()
                && sizes.contains(&metadata.len())
                && fat_name(&entry.path()).is_some()
            {
                total += metadata.len();
                found.push((entry.path(), metadata.len()));
                if total > limit {
                    return found;
                }
            }
        }
    }
    found
}

/// The file's path below the root, if FAT can have such a name.
fn fat_name(path: &Path) -> Option<String> {
    let text = path.to_str()?;
    let text = text.trim_start_matches(|c: char| {
        c == '/' || c == '\\' || c.is_ascii_alphabetic() && text.starts_with("C:")
    });
    let text = text.trim_start_matches([':', '\\']).replace('\\', "/");
    let legal = |part: &str| {
        !part.is_empty()
            && part.len() < 200
            && !part.ends_with(['.', ' '])
            && part.chars().all(|c| !c.is_control() && !"\"*:<>?|".contains(c))
    };
    text.split('/').all(legal).then_some(text)
}

/// Makes one disk and gives the bytes of files in it.
pub(super) fn make(path: &Path, recipe: &Recipe, files: &Files) -> Result<u64, Failure> {
    let options = CreateOptions { block_size: 2 << 20, ..CreateOptions::dynamic(DISK_SIZE) };
    let mut writer = VhdxWriter::create(path, &options)?;
    writer.write_at(0, &mbr())?;
    let mut partition = Partition::new(writer);
    let sectors = u32::try_from(PARTITION_SIZE / 512).unwrap_or(u32::MAX);
    let format = FormatVolumeOptions::new()
        .fat_type(FatType::Fat32)
        .bytes_per_cluster(CLUSTER)
        .total_sectors(sectors)
        .volume_id(0x4f55_5452)
        .volume_label(*b"OUTRIDER   ");
    fatfs::format_volume(&mut partition, format)?;
    let mut written = 0;
    {
        let fs = FileSystem::new(&mut partition, FsOptions::new().time_provider(&STILL))?;
        {
            let mut folders = HashMap::from([(String::new(), fs.root_dir())]);
            let mut names = HashSet::new();
            for file in files.pick(recipe) {
                if let Some(name) = fat_name(file)
                    // FAT takes names that differ in case only for one.
                    && names.insert(name.to_lowercase())
                {
                    written += copy_in(&mut folders, file, &name)?;
                }
            }
        }
        fs.unmount()?;
    }
    partition.finish()?.close()?;
    Ok(written)
}

/// The folders made so far, by their path: to look them up in the file system each time would take long.
type Folders<'a, 'p> = HashMap<String, Dir<'a, &'p mut Partition>>;

/// Copies one file; files that vanish, that we may not read or that FAT does not take are left out.
fn copy_in(folders: &mut Folders<'_, '_>, path: &Path, name: &str) -> Result<u64, io::Error> {
    let Ok(content) = std::fs::read(path) else { return Ok(0) };
    let (parent, file_name) = name.rsplit_once('/').unwrap_or(("", name));
    let Some(folder) = folder(folders, parent) else { return Ok(0) };
    let mut file = match folder.create_file(file_name) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(0),
        Err(error) => return Err(error),
    };
    file.write_all(&content)?;
    file.flush()?;
    Ok(content.len() as u64)
}

/// A folder, made with its parents if it is missing; `None` where a file has its name.
fn folder<'a, 'p>(folders: &mut Folders<'a, 'p>, path: &str) -> Option<Dir<'a, &'p mut Partition>> {
    if let Some(known) = folders.get(path) {
        return Some(known.clone());
    }
    let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
    let made = folder(folders, parent)?.create_dir(name).ok()?;
    folders.insert(path.to_owned(), made.clone());
    Some(made)
}

/// One FAT32 partition (type 0x0c), addressed by sector number.
fn mbr() -> [u8; 512] {
    let mut sector = [0; 512];
    sector[440..444].copy_from_slice(b"OUTR");
    let entry = &mut sector[446..462];
    entry[1..4].copy_from_slice(&[0xfe, 0xff, 0xff]);
    entry[4] = 0x0c;
    entry[5..8].copy_from_slice(&[0xfe, 0xff, 0xff]);
    let number = |bytes: u64| u32::try_from(bytes / 512).unwrap_or(u32::MAX).to_le_bytes();
    entry[8..12].copy_from_slice(&number(PARTITION_START));
    entry[12..16].copy_from_slice(&number(PARTITION_SIZE));
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// Time stands still, so that one seed gives one disk.
#[derive(Debug)]
struct Still;
static STILL: Still = Still;

impl fatfs::TimeProvider for Still {
    fn get_current_date(&self) -> fatfs::Date {
        fatfs::Date { year: 2026, month: 1, day: 1 }
    }
    fn get_current_date_time(&self) -> fatfs::DateTime {
        let time = fatfs::Time { hour: 12, min: 0, sec: 0, millis: 0 };
        fatfs::DateTime { date: self.get_current_date(), time }
    }
}

/// The partition as a stream, with a small write-back cache: FAT entries are written four bytes at a time.
struct Partition {
    disk: VhdxWriter,
    position: u64,
    /// The most recently used last.
    lines: VecDeque<Line>,
}

struct Line {
    start: u64,
    bytes: Vec<u8>,
    dirty: bool,
}

const LINE: u64 = 64 << 10;
const LINES: usize = 16;

impl Partition {
    fn new(disk: VhdxWriter) -> Self {
        Self { disk, position: 0, lines: VecDeque::new() }
    }

    fn line(&mut self, start: u64) -> Result<&mut Line, DiskError> {
        let line = match self
            .lines
            .iter()
            .position(|l| l.start == start)
            .and_then(|at| self.lines.remove(at))
        {
            Some(line) => line,
            None => {
                if self.lines.len() == LINES
                    && let Some(old) = self.lines.pop_front()
                {
                    self.put_back(&old)?;
                }
                let mut bytes = vec![0; LINE.min(PARTITION_SIZE - start) as usize];
                self.disk.read_at(PARTITION_START + start, &mut bytes)?;
                Line { start, bytes, dirty: false }
            }
        };
        self.lines.push_back(line);
        Ok(self.lines.back_mut().expect("just pushed"))
    }

    fn put_back(&mut self, line: &Line) -> Result<(), DiskError> {
        if line.dirty {
            self.disk.write_at(PARTITION_START + line.start, &line.bytes)
        } else {
            Ok(())
        }
    }

    fn finish(mut self) -> Result<VhdxWriter, DiskError> {
        while let Some(line) = self.lines.pop_front() {
            self.put_back(&line)?;
        }
        Ok(self.disk)
    }

    /// The cached bytes from the position on, at most `wanted`, and moves on.
    fn step(&mut self, wanted: usize) -> io::Result<Option<(&mut Line, std::ops::Range<usize>)>> {
        let room = PARTITION_SIZE.saturating_sub(self.position).min(wanted as u64);
        if room == 0 {
            return Ok(None);
        }
        let start = self.position / LINE * LINE;
        let from = (self.position - start) as usize;
        let take = room.min(LINE - from as u64) as usize;
        self.position += take as u64;
        let line = self.line(start).map_err(io::Error::other)?;
        Ok(Some((line, from..from + take)))
    }
}

impl Read for Partition {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some((line, range)) = self.step(buf.len())? else { return Ok(0) };
        let n = range.len();
        buf[..n].copy_from_slice(&line.bytes[range]);
        Ok(n)
    }
}

impl Write for Partition {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let Some((line, range)) = self.step(buf.len())? else { return Ok(0) };
        let n = range.len();
        line.bytes[range].copy_from_slice(&buf[..n]);
        line.dirty = true;
        Ok(n)
    }

    /// What counts is [`Partition::finish`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Partition {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(n) => Some(n),
            SeekFrom::Current(n) => self.position.checked_add_signed(n),
            SeekFrom::End(n) => PARTITION_SIZE.checked_add_signed(n),
        };
        self.position = target.ok_or_else(|| io::Error::other("a position before the start"))?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_disk::{DiskChain, compare};

    fn tiny(folder: &Path) -> Files {
        let content = folder.join("content");
        std::fs::create_dir_all(content.join("deep/er")).expect("a folder");
        for (name, len) in [("a", 70_000), ("deep/서울.txt", 9), ("deep/er/c", 300_000)] {
            std::fs::write(content.join(name), vec![len as u8; len]).expect("a file");
        }
        let all = collect(&[content.to_str().expect("text")], u64::MAX, 1..=MIB);
        Files { shared: all.clone(), own: all }
    }

    #[test]
    fn a_disk_holds_the_files_and_the_same_recipe_gives_the_same_disk() {
        let dir = tempfile::tempdir().expect("a folder");
        let files = tiny(dir.path());
        assert_eq!(files.shared.len(), 3);
        let recipe = Recipe { shared: 380_000, own: 0, part: 0 };
        let (one, two) = (dir.path().join("1.vhdx"), dir.path().join("2.vhdx"));
        assert_eq!(make(&one, &recipe, &files).expect("made"), 370_009);
        make(&two, &recipe, &files).expect("made");
        let chains = [&one, &two].map(|p| DiskChain::open(p).expect("a VHDX"));
        assert_eq!(compare::first_difference(&chains[0], &chains[1]).expect("read"), None);

        let mut partition = Partition::new(VhdxWriter::open(&one).expect("opens"));
        let fs = FileSystem::new(&mut partition, FsOptions::new()).expect("a file system");
        assert_eq!(fs.fat_type(), FatType::Fat32);
        let name = fat_name(&dir.path().join("content/deep/서울.txt")).expect("a name");
        let mut content = Vec::new();
        fs.root_dir().open_file(&name).expect("is there").read_to_end(&mut content).expect("read");
        assert_eq!(content, [9; 9]);
    }

    #[test]
    fn names_that_fat_cannot_have_are_left_out() {
        assert_eq!(fat_name(Path::new("/usr/bin/ls")).as_deref(), Some("usr/bin/ls"));
        assert_eq!(fat_name(Path::new("/usr/share/man/A::B.gz")), None);
    }
}
