//! A VHDX with all its parents.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block_file::ByteSource;
use crate::disk::check_bounds;
use crate::vhdx::{VhdxLayer, check_linkage, read_through, visible};
use crate::{DiskError, DiskInfo, RangeSet, ReadDisk};

/// Opens the bytes of a file of a chain.
pub type Opener<'a> = dyn Fn(&Path) -> io::Result<Arc<dyn ByteSource>> + 'a;

/// More files than Hyper-V puts into a chain.
const MAX_DEPTH: usize = 256;

/// A VHDX or AVHDX opened read-only together with every disk that it was made from.
#[derive(Debug)]
pub struct DiskChain {
    leaf: VhdxLayer,
    /// Nearest first.
    parents: Vec<VhdxLayer>,
}

impl DiskChain {
    /// Opens the leaf and all parents, and checks that each parent is the disk, in the state, that its
    /// child was made from.
    ///
    /// # Errors
    /// [`DiskError::ParentMissing`], [`DiskError::ParentMismatch`], [`DiskError::ChainCycle`],
    /// [`DiskError::ChainTooDeep`], or what opening one of the files met.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        let leaf = VhdxLayer::open(path)?;
        let parents = open_parents(&leaf)?;
        Ok(Self { leaf, parents })
    }

    /// As [`DiskChain::open`], with the bytes of every file from `opener`.
    ///
    /// # Errors
    /// As [`DiskChain::open`]; [`DiskError::Io`] for what the opener met.
    pub fn open_with(path: impl AsRef<Path>, opener: &Opener<'_>) -> Result<Self, DiskError> {
        let open = |path: &Path| {
            let source = opener(path).map_err(DiskError::io(path, "open"))?;
            VhdxLayer::from_source(path.to_owned(), source)
        };
        let leaf = open(path.as_ref())?;
        let parents = open_parents_with(&leaf, &open)?;
        Ok(Self { leaf, parents })
    }

    /// The files, leaf first, base last.
    pub fn files(&self) -> Vec<PathBuf> {
        self.layers().map(|layer| layer.path().to_owned()).collect()
    }

    /// The layers, leaf first, base last.
    pub fn layers(&self) -> impl Iterator<Item = &VhdxLayer> {
        std::iter::once(&self.leaf).chain(&self.parents)
    }
}

impl ReadDisk for DiskChain {
    fn info(&self) -> &DiskInfo {
        self.leaf.info()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        check_bounds(self.leaf.path(), self.leaf.info().size, offset, buf.len())?;
        read_through(&self.leaf, &self.parents, offset, buf)
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        visible(&self.leaf, &self.parents)
    }
}

/// The parents of a layer, nearest first; none unless it is a differencing disk.
pub(crate) fn open_parents(leaf: &VhdxLayer) -> Result<Vec<VhdxLayer>, DiskError> {
    open_parents_with(leaf, &|path: &Path| VhdxLayer::open(path))
}

fn open_parents_with(
    leaf: &VhdxLayer,
    open: &dyn Fn(&Path) -> Result<VhdxLayer, DiskError>,
) -> Result<Vec<VhdxLayer>, DiskError> {
    let real = |path: &Path| path.canonicalize().map_err(DiskError::io(path, "find"));
    let mut parents: Vec<VhdxLayer> = Vec::new();
    let mut seen = HashSet::new();
    if leaf.parent().is_some() {
        seen.insert(real(leaf.path())?);
    }
    loop {
        let child = parents.last().unwrap_or(leaf);
        let Some(locator) = child.parent() else { return Ok(parents) };
        let tried = locator.candidates(child.path());
        let Some(path) = tried.iter().find(|path| path.is_file()) else {
            return Err(DiskError::ParentMissing { child: child.path().to_owned(), tried });
        };
        if !seen.insert(real(path)?) {
            return Err(DiskError::ChainCycle {
                leaf: leaf.path().to_owned(),
                again: path.clone(),
            });
        }
        if seen.len() > MAX_DEPTH {
            return Err(DiskError::ChainTooDeep { leaf: leaf.path().to_owned(), limit: MAX_DEPTH });
        }
        let parent = open(path)?;
        check_linkage(child, &parent)?;
        parents.push(parent);
    }
}
