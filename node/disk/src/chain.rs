//! A virtual disk with all its parents.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block_file::{BlockFile, ByteSource};
use crate::disk::check_bounds;
use crate::layer::{Layer, Presence, ReadLayer, read_through, visible};
use crate::{DiskError, DiskFormat, DiskInfo, RangeSet, ReadDisk};

/// Opens the bytes of a file of a chain. [`io::ErrorKind::NotFound`] makes the chain look for a parent
/// in the next place.
pub type Opener<'a> = dyn Fn(&Path) -> io::Result<Arc<dyn ByteSource>> + 'a;

/// More files than Hyper-V puts into a chain.
const MAX_DEPTH: usize = 256;

/// A VHDX, AVHDX, VHD or AVHD opened read-only together with every disk that it was made from. All
/// files of a chain have one format, as on Hyper-V.
///
/// # Examples
/// ```
/// use outrider_disk::{DiskChain, DiskKind, ReadDisk, vhdx::{CreateOptions, VhdxWriter}};
/// # fn main() -> Result<(), outrider_disk::DiskError> {
/// # let dir = tempfile::tempdir().unwrap();
/// # let (base, child) = (dir.path().join("disk.vhdx"), dir.path().join("checkpoint.avhdx"));
/// VhdxWriter::create(&base, &CreateOptions::dynamic(1 << 30))?.close()?;
/// let mut disk = VhdxWriter::create_child(&child, &base, None)?;
/// disk.write_at(4096, b"written after the checkpoint")?;
/// disk.close()?;
///
/// let chain = DiskChain::open(&child)?;
/// assert_eq!(chain.info().kind, DiskKind::Differencing);
/// assert_eq!(chain.files().len(), 2);
/// let mut bytes = [0; 7];
/// chain.read_at(4096, &mut bytes)?;
/// assert_eq!(&bytes, b"written");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DiskChain {
    leaf: Layer,
    /// Nearest first.
    parents: Vec<Layer>,
    info: DiskInfo,
}

impl DiskChain {
    /// Opens the leaf and all parents, and checks that each parent is the disk, in the state, that its
    /// child was made from.
    ///
    /// # Errors
    /// [`DiskError::ParentMissing`], [`DiskError::ParentMismatch`], [`DiskError::ChainCycle`],
    /// [`DiskError::ChainTooDeep`], or what opening one of the files met.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        Self::of(Layer::open(path)?, &open_file)
    }

    /// As [`DiskChain::open`], with the bytes of every file from `opener`.
    ///
    /// # Errors
    /// As [`DiskChain::open`]; [`DiskError::Io`] for what the opener met.
    pub fn open_with(path: impl AsRef<Path>, opener: &Opener<'_>) -> Result<Self, DiskError> {
        let open = |path: &Path| {
            let source = opener(path).map_err(DiskError::io(path, "open"))?;
            Layer::from_source(path.to_owned(), source)
        };
        Self::of(open(path.as_ref())?, &open)
    }

    fn of(leaf: Layer, open: &OpenLayer<'_>) -> Result<Self, DiskError> {
        let parents = parents_of(&leaf, open)?;
        let mut info = leaf.info().clone();
        if info.format == DiskFormat::Vhd {
            // Every VHD file has an id of its own; the base's is the disk's.
            info.disk_id = parents.last().unwrap_or(&leaf).info().disk_id;
        }
        Ok(Self { leaf, parents, info })
    }

    /// The files, leaf first, base last.
    pub fn files(&self) -> Vec<PathBuf> {
        self.layers().map(|layer| layer.path().to_owned()).collect()
    }

    /// The layers, leaf first, base last.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        std::iter::once(&self.leaf).chain(&self.parents)
    }

    /// The ranges that the first `count` files, from the leaf on, decide: what they store, and the zeros that hide their
    /// parents. Outside of them this disk is, byte for byte, what the files below show. All of it when `count` is all of
    /// the files, or when a map had to be rounded.
    ///
    /// # Errors
    /// What reading the tables met.
    pub fn decided(&self, count: usize) -> Result<RangeSet, DiskError> {
        let whole = || RangeSet::single(0, self.info.size);
        if count > self.parents.len() {
            return Ok(whole());
        }
        let mut decided = RangeSet::new();
        for layer in self.layers().take(count) {
            let mut map = layer.map()?;
            // A rounded map may leave out what it hides.
            if map.rounded || layer.info().size != self.info.size {
                return Ok(whole());
            }
            map.present.clamp(self.info.size);
            decided = decided.union(&map.present).union(&map.zeroed);
        }
        decided.clamp(self.info.size);
        Ok(decided)
    }

    /// What is odd about the files and did not stop us, in sentences; each begins with the file's name.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let layers: Vec<&Layer> = self.layers().collect();
        for (i, layer) in layers.iter().enumerate() {
            let of_parent = match (layer, layers.get(i + 1)) {
                (Layer::Vhd(child), Some(parent)) => child.parent_time_note(parent.path()),
                _ => None,
            };
            let all = layer.notes().into_iter().chain(of_parent);
            notes.extend(all.map(|note| format!("{}: {note}", layer.path().display())));
        }
        notes
    }

    /// Whether a file of the chain was not closed cleanly, see [`ReadLayer::is_dirty`].
    pub fn is_dirty(&self) -> bool {
        self.layers().any(ReadLayer::is_dirty)
    }
}

/// A guest-visible range that is stored, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// First byte, as the guest counts.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// Which layer stores it: 0 is the leaf.
    pub layer: usize,
    /// Offset of the first byte in that layer's file.
    pub file_offset: u64,
}

impl DiskChain {
    /// Calls `found` for each range that is stored in any layer and not hidden by one above, in ascending
    /// order; everything else is zeros. Nothing is collected, so this takes any disk.
    ///
    /// # Errors
    /// What reading the tables met, or what `found` returned.
    pub fn origins(
        &self,
        found: &mut dyn FnMut(Origin) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let layers: Vec<&Layer> = self.layers().collect();
        origins(&layers, 0, (0, self.info.size), found)
    }
}

fn origins(
    layers: &[&Layer],
    layer: usize,
    (offset, len): (u64, u64),
    found: &mut dyn FnMut(Origin) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let Some(of) = layers.get(layer) else { return Ok(()) };
    // A parent may be smaller than its child.
    let len = len.min(of.info().size.saturating_sub(offset));
    of.runs(offset.min(of.info().size), len, &mut |run| match run.presence {
        Presence::Here { file_offset } => {
            found(Origin { offset: run.offset, len: run.len, layer, file_offset })
        }
        Presence::Parent => origins(layers, layer + 1, (run.offset, run.len), found),
        Presence::Zero => Ok(()),
    })
}

impl ReadDisk for DiskChain {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        check_bounds(self.leaf.path(), self.info.size, offset, buf.len())?;
        read_through(&self.leaf, &self.parents, offset, buf)
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        visible(&self.leaf, &self.parents)
    }
}

type OpenLayer<'a> = dyn Fn(&Path) -> Result<Layer, DiskError> + 'a;

fn open_file(path: &Path) -> Result<Layer, DiskError> {
    Layer::from_source(path.to_owned(), Arc::new(BlockFile::open(path)?))
}

/// The parents of a layer on this machine, nearest first; none unless it is a differencing disk.
pub(crate) fn open_parents(leaf: &dyn ReadLayer) -> Result<Vec<Layer>, DiskError> {
    // Opened a second time: a chain owns its layers.
    if leaf.parent_candidates().is_none() {
        return Ok(Vec::new());
    }
    parents_of(&open_file(leaf.path())?, &open_file)
}

fn parents_of(leaf: &Layer, open: &OpenLayer<'_>) -> Result<Vec<Layer>, DiskError> {
    let mut parents: Vec<Layer> = Vec::new();
    let mut seen = HashSet::from([real(leaf.path())]);
    loop {
        let child = parents.last().unwrap_or(leaf);
        let Some(tried) = child.parent_candidates() else { return Ok(parents) };
        let parent = open_parent(child, &tried, open)?;
        if !seen.insert(real(parent.path())) {
            let (leaf, again) = (leaf.path().to_owned(), parent.path().to_owned());
            return Err(DiskError::ChainCycle { leaf, again });
        }
        if seen.len() > MAX_DEPTH {
            return Err(DiskError::ChainTooDeep { leaf: leaf.path().to_owned(), limit: MAX_DEPTH });
        }
        child.check_parent(&parent)?;
        parents.push(parent);
    }
}

/// The file at the first place that has the right one; what stands in the way of the first that has any.
fn open_parent(child: &Layer, tried: &[PathBuf], open: &OpenLayer<'_>) -> Result<Layer, DiskError> {
    let mut wrong = None;
    for path in tried {
        let candidate = match open(path) {
            Err(DiskError::Io { source, .. }) if is_absent(&source) => continue,
            other => other,
        };
        match candidate {
            Ok(parent) if child.check_parent(&parent).is_ok() => return Ok(parent),
            other => wrong = wrong.or(Some(other)),
        }
    }
    // A wrong parent is given, too: it may be the child itself, which says more than its linkage.
    wrong.unwrap_or_else(|| {
        Err(DiskError::ParentMissing { child: child.path().to_owned(), tried: tried.to_vec() })
    })
}

/// Whether an error says that there is no file of that name, or none that could be one of ours.
fn is_absent(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::NotFound
            | Kind::NotADirectory
            | Kind::InvalidFilename
            | Kind::InvalidInput
            | Kind::IsADirectory
    )
}

fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}
