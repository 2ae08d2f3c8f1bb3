//! Images made by real tools, and looking into them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use outrider_disk::guest::{FileId, FileKind, FileSystem, GuestDisk, GuestError, Limits, path};
use outrider_disk::{DiskError, DiskInfo, RangeSet, RawDisk, ReadDisk};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Whether these tools are here. Without them a test says so and proves nothing; in CI that is a failure.
pub(crate) fn have(tools: &[&str]) -> bool {
    let missing: Vec<&&str> = tools.iter().filter(|t| find(t).is_none()).collect();
    if missing.is_empty() {
        return true;
    }
    assert!(std::env::var_os("OUTRIDER_CI").is_none(), "missing: {missing:?}; run .ci/tools");
    eprintln!("SKIPPED: needs {missing:?}");
    false
}

fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|d| d.join(tool)).find(|p| p.is_file())
}

/// Runs a tool, which must succeed; gives what it printed.
pub(crate) fn run(tool: &str, args: &[&str]) -> String {
    run_with(tool, args, "")
}

/// As [`run`], with standard input.
pub(crate) fn run_with(tool: &str, args: &[&str], input: &str) -> String {
    use std::io::Write;
    use std::process::Stdio;
    let program = find(tool).expect("asked for with `have`");
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C.UTF-8")
        .env("MTOOLS_SKIP_CHECK", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a program");
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("reads its input");
    let out = child.wait_with_output().expect("ends");
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    assert!(out.status.success(), "{tool} {args:?}: {}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have Unicode names")
}

/// An empty image.
pub(crate) fn blank(path: &Path, mib: u64) {
    std::fs::File::create(path).and_then(|f| f.set_len(mib << 20)).expect("a new file");
}

pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes
}

/// An image of one file system without a partition table.
pub(crate) fn open(path: &Path) -> Box<dyn FileSystem> {
    let raw = RawDisk::open(path).expect("just made");
    let disk = GuestDisk::open(Arc::new(raw), Limits::default()).expect("readable");
    let volume = disk.volumes.first().expect("one volume").clone();
    disk.file_system(&volume).expect("a file system")
}

pub(crate) fn content(fs: &dyn FileSystem, file: FileId) -> Result<Vec<u8>, GuestError> {
    let size = fs.stat(file)?.size;
    let mut out = Vec::new();
    // Odd sizes, so that pieces begin anywhere.
    let mut piece = vec![0xaa; 77_777];
    while (out.len() as u64) < size {
        let read = fs.read(file, out.len() as u64, &mut piece)?;
        assert!(read > 0, "a file of {size} bytes ends after {}", out.len());
        out.extend_from_slice(&piece[..read]);
    }
    Ok(out)
}

/// What a tree holds: path -> content, link or nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Node {
    File(Vec<u8>),
    Link(Vec<u8>),
    Directory,
    Other,
}

pub(crate) type Tree = BTreeMap<Vec<u8>, Node>;

pub(crate) fn tree(fs: &dyn FileSystem) -> Tree {
    let mut out = Tree::new();
    walk(fs, fs.root(), Vec::new(), &mut out).expect("readable");
    out
}

fn walk(
    fs: &dyn FileSystem,
    directory: FileId,
    prefix: Vec<u8>,
    out: &mut Tree,
) -> Result<(), GuestError> {
    for entry in path::sorted(fs, directory)? {
        let mut path = prefix.clone();
        path.push(b'/');
        path.extend_from_slice(entry.name.as_bytes());
        let node = match entry.kind {
            FileKind::Directory => {
                walk(fs, entry.id, path.clone(), out)?;
                Node::Directory
            }
            FileKind::File => Node::File(content(fs, entry.id)?),
            FileKind::Symlink => {
                let target = fs.stat(entry.id)?.target;
                Node::Link(target.map(|t| t.as_bytes().to_vec()).unwrap_or_default())
            }
            FileKind::Other => Node::Other,
        };
        assert_eq!(fs.stat(entry.id)?.kind, entry.kind);
        assert!(out.insert(path, node).is_none(), "a name comes twice");
    }
    Ok(())
}

/// The bytes that a file's extents name, read from the image itself.
pub(crate) fn through_extents(fs: &dyn FileSystem, file: FileId, image: &Path) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let image = std::fs::File::open(image).expect("the image");
    let mut out = Vec::new();
    for extent in fs.extents(file).expect("plainly laid out") {
        assert_eq!(extent.file_offset, out.len() as u64, "extents follow each other");
        let mut bytes = vec![0; extent.disk.len as usize];
        image.read_exact_at(&mut bytes, extent.disk.start).expect("within the image");
        out.extend(bytes);
    }
    out.truncate(fs.stat(file).expect("exists").size as usize);
    out
}

/// A disk in memory.
pub(crate) struct MemoryDisk {
    pub(crate) info: DiskInfo,
    pub(crate) bytes: Vec<u8>,
}

impl MemoryDisk {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let info = DiskInfo::raw(bytes.len() as u64);
        Self { info, bytes }
    }
}

impl ReadDisk for MemoryDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let at = offset as usize;
        buf.copy_from_slice(&self.bytes[at..at + buf.len()]);
        Ok(())
    }
    fn allocated(&self) -> Result<RangeSet, DiskError> {
        Ok(RangeSet::single(0, self.info.size))
    }
}
