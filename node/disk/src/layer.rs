//! One file of a chain, whatever its format: what it stores itself and what it leaves to its parent.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block_file::{BlockFile, ByteSource};
use crate::detect;
use crate::error::DiskError;
use crate::ranges::BoundedRanges;
use crate::vhd::VhdLayer;
use crate::vhdx::{self, VhdxLayer};
use crate::{DiskFormat, DiskInfo, RangeSet};

/// Where the bytes of a range are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// In this file, from this file offset on.
    Here {
        /// File offset of the range's first byte.
        file_offset: u64,
    },
    /// Zeros, whatever the parent has.
    Zero,
    /// The parent's bytes; zeros without a parent.
    Parent,
}

/// A guest-visible range whose bytes are all in one kind of place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First byte, as the guest counts.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// Where they are.
    pub presence: Presence,
}

impl Run {
    /// Whether `next`, which begins where this run ends, only goes on with it.
    fn goes_on(&self, next: &Self) -> bool {
        match (self.presence, next.presence) {
            (Presence::Here { file_offset: a }, Presence::Here { file_offset: b }) => {
                a + self.len == b
            }
            (a, b) => a == b,
        }
    }
}

/// Takes the runs of a layer one by one.
pub type RunSink<'a> = dyn FnMut(Run) -> Result<(), DiskError> + 'a;

/// Gives `found` the runs that `walk` pushes, in order, those that only go on with one another as one.
pub(crate) fn joined(
    found: &mut RunSink<'_>,
    walk: impl FnOnce(&mut RunSink<'_>) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let mut last: Option<Run> = None;
    walk(&mut |run: Run| match &mut last {
        Some(previous) if previous.goes_on(&run) => {
            previous.len += run.len;
            Ok(())
        }
        _ => last.replace(run).map_or(Ok(()), &mut *found),
    })?;
    last.map_or(Ok(()), found)
}

/// What one layer decides about the guest-visible disk; the rest is its parent's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerMap {
    /// Stored in this file.
    pub present: RangeSet,
    /// Zeros that hide the parent.
    pub zeroed: RangeSet,
    /// There were too many ranges to keep each: `present` may name more than is stored, `zeroed` less
    /// than is hidden.
    pub rounded: bool,
}

/// Collects a [`LayerMap`] in bounded memory.
pub(crate) struct MapBuilder {
    present: BoundedRanges,
    zeroed: RangeSet,
    left_out: bool,
}

impl MapBuilder {
    pub(crate) fn new(size: u64) -> Self {
        Self { present: BoundedRanges::new(size), zeroed: RangeSet::new(), left_out: false }
    }

    #[inline]
    pub(crate) fn present(&mut self, start: u64, len: u64) {
        self.present.insert(start, len);
    }

    #[inline]
    pub(crate) fn zeroed(&mut self, start: u64, len: u64) {
        // What is left out is asked of the parents, and is zeros when it is read.
        if self.zeroed.len() < BoundedRanges::LIMIT {
            self.zeroed.insert(start, len);
        } else {
            self.left_out = true;
        }
    }

    pub(crate) fn run(&mut self, run: Run) {
        match run.presence {
            Presence::Here { .. } => self.present(run.offset, run.len),
            Presence::Zero => self.zeroed(run.offset, run.len),
            Presence::Parent => {}
        }
    }

    pub(crate) fn finish(self) -> LayerMap {
        let (present, rounded) = self.present.finish();
        LayerMap { present, zeroed: self.zeroed, rounded: rounded || self.left_out }
    }
}

/// What every format can say about one of its files. Nothing here changes any state, so any number of
/// threads may ask at once.
pub trait ReadLayer: Send + Sync + std::fmt::Debug {
    /// The path that the layer was opened by.
    fn path(&self) -> &Path;

    /// The facts of this layer.
    fn info(&self) -> &DiskInfo;

    /// Calls `found` for the runs of a range within the disk, in ascending order. Neighbours that are
    /// neighbours in the file, too, come as one run, so sequential reads stay large.
    ///
    /// # Errors
    /// [`DiskError::OutOfBounds`], what reading the tables met, or what `found` returned.
    fn runs(&self, offset: u64, len: u64, found: &mut RunSink<'_>) -> Result<(), DiskError>;

    /// Fills `buf` with bytes that a run said to be [`Presence::Here`].
    ///
    /// # Errors
    /// What reading met.
    fn read_stored(&self, file_offset: u64, buf: &mut [u8]) -> Result<(), DiskError>;

    /// What this layer stores and hides, in bounded memory: of a disk with more than some hundred
    /// thousand separate ranges the map is [rounded](LayerMap::rounded).
    ///
    /// # Errors
    /// What reading the tables met.
    fn map(&self) -> Result<LayerMap, DiskError>;

    /// Looks at every block's place: within the file, and no two in one place. Opening a file checks
    /// only what it reads; a restore or an import checks everything.
    ///
    /// # Errors
    /// [`DiskError::Corrupt`] or [`DiskError::Truncated`] for the first bad place.
    fn check(&self) -> Result<(), DiskError>;

    /// Whether the file was not closed cleanly: a VHDX whose log had to be replayed in memory, a VHD
    /// whose footer at the end is missing.
    fn is_dirty(&self) -> bool;

    /// Where the parent may be, in the order in which to look; `None` unless it is a differencing disk.
    fn parent_candidates(&self) -> Option<Vec<PathBuf>>;

    /// What is odd about the file and did not stop us, in sentences.
    fn notes(&self) -> Vec<String>;
}

/// One file of a chain, opened read-only.
#[derive(Debug)]
pub enum Layer {
    /// VHDX or AVHDX.
    Vhdx(VhdxLayer),
    /// VHD or AVHD.
    Vhd(VhdLayer),
}

impl Layer {
    /// Opens a file read-only, in the format that its name and content say.
    ///
    /// # Errors
    /// [`DiskError::NotAVirtualDisk`] or what opening the format met.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        let file = BlockFile::open(path.as_ref())?;
        Self::from_source(path.as_ref().to_owned(), Arc::new(file))
    }

    /// Reads a layer from any bytes; `path` names it in errors, tells its format and finds its parent.
    ///
    /// # Errors
    /// As [`Layer::open`].
    pub fn from_source(path: PathBuf, source: Arc<dyn ByteSource>) -> Result<Self, DiskError> {
        match detect::format_of(&path, &*source)? {
            DiskFormat::Vhd => VhdLayer::from_source(path, source).map(Self::Vhd),
            DiskFormat::Vhdx | DiskFormat::Raw => {
                VhdxLayer::from_source(path, source).map(Self::Vhdx)
            }
        }
    }

    /// Sequence number of the header in force: it grows whenever anything of the file is written. `None` for a format that
    /// has none.
    #[must_use]
    pub fn header_sequence(&self) -> Option<u64> {
        match self {
            Self::Vhdx(layer) => Some(layer.header().sequence),
            Self::Vhd(_) => None,
        }
    }

    fn inner(&self) -> &dyn ReadLayer {
        match self {
            Self::Vhdx(layer) => layer,
            Self::Vhd(layer) => layer,
        }
    }

    /// Refuses a parent that is not the disk, or not in the state, that this layer was made from.
    pub(crate) fn check_parent(&self, parent: &Self) -> Result<(), DiskError> {
        match (self, parent) {
            (Self::Vhdx(child), Self::Vhdx(parent)) => vhdx::check_linkage(child, parent),
            (Self::Vhd(child), Self::Vhd(parent)) => child.check_parent(parent),
            (child, parent) => Err(DiskError::ParentMismatch {
                child: child.path().to_owned(),
                parent: parent.path().to_owned(),
                what: "format",
                expected: child.info().format.to_string().into(),
                found: parent.info().format.to_string().into(),
            }),
        }
    }
}

impl ReadLayer for Layer {
    fn path(&self) -> &Path {
        self.inner().path()
    }
    fn info(&self) -> &DiskInfo {
        self.inner().info()
    }
    fn runs(&self, offset: u64, len: u64, found: &mut RunSink<'_>) -> Result<(), DiskError> {
        self.inner().runs(offset, len, found)
    }
    fn read_stored(&self, file_offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.inner().read_stored(file_offset, buf)
    }
    fn map(&self) -> Result<LayerMap, DiskError> {
        self.inner().map()
    }
    fn check(&self) -> Result<(), DiskError> {
        self.inner().check()
    }
    fn is_dirty(&self) -> bool {
        self.inner().is_dirty()
    }
    fn parent_candidates(&self) -> Option<Vec<PathBuf>> {
        self.inner().parent_candidates()
    }
    fn notes(&self) -> Vec<String> {
        self.inner().notes()
    }
}

/// Fills `buf` with the guest's bytes from `offset` on, from `top` where it has them and from its
/// parents, nearest first, where it has not. The range was checked against the size of `top`; a parent
/// that is smaller, since the child was made bigger, has zeros beyond its end.
pub(crate) fn read_through(
    top: &dyn ReadLayer,
    parents: &[Layer],
    offset: u64,
    buf: &mut [u8],
) -> Result<(), DiskError> {
    top.runs(offset, buf.len() as u64, &mut |run| {
        let from = (run.offset - offset) as usize;
        let part = &mut buf[from..from + run.len as usize];
        match (run.presence, parents.split_first()) {
            (Presence::Here { file_offset }, _) => top.read_stored(file_offset, part),
            (Presence::Parent, Some((parent, rest))) => {
                let inside = parent.info().size.saturating_sub(run.offset).min(run.len);
                let (known, beyond) = part.split_at_mut(inside as usize);
                beyond.fill(0);
                read_through(parent.inner(), rest, run.offset.min(parent.info().size), known)
            }
            (Presence::Zero, _) | (Presence::Parent, None) => {
                part.fill(0);
                Ok(())
            }
        }
    })
}

/// What of a chain may be anything but zeros: each layer's own bytes, and of its parents' what it
/// neither stores nor hides.
pub(crate) fn visible(top: &dyn ReadLayer, parents: &[Layer]) -> Result<RangeSet, DiskError> {
    let map = top.map()?;
    let mut seen = map.present;
    if parents.is_empty() {
        return Ok(seen);
    }
    // What a rounded map calls stored may still be the parent's, so it hides nothing.
    let mut decided = if map.rounded { map.zeroed } else { seen.union(&map.zeroed) };
    for parent in parents {
        let mut map = parent.map()?;
        map.present.clamp(top.info().size);
        seen = seen.union(&map.present.subtract(&decided));
        decided = decided.union(&map.zeroed);
        if !map.rounded {
            decided = decided.union(&map.present);
        }
    }
    Ok(seen)
}
