//! Manifests: the description of a recovery point.
//!
//! A record of kind page whose clear bytes are [`Links::Manifest`] (so that trees can be walked without a key) and whose
//! sealed bytes are a version (16 bits), the [`Manifest`] in postcard encoding and, from version 2 on, sections by number,
//! of which a reader skips those that it does not know (docs/formats.md lists them).

mod at;
mod format;
mod machine;
mod sections;
mod tree;

pub use at::AtError;
pub use format::{ImageFormat, UnknownFormat};
pub use machine::{ClusterGroup, Guardian, Image, Machine, Nic, Security, Switch};
pub use tree::{CheckpointFacts, FormerDisk, FrozenLayer, SavedCheckpoint, Tree};

use serde::{Deserialize, Serialize};

use crate::ids::{CheckpointId, ChunkId, DiskId, JobId, PointId, VmIncarnation, VmKey};
use crate::page::{Link, Links, root_level};
use crate::record::{Kind, Record};
use crate::seal::{SealError, Sealer};
use crate::wire::{DecodeError, Put, Reader};

/// Version of the sealed body that is written as a rule.
pub const MANIFEST_VERSION: u16 = 2;
/// The version without sections.
const FIRST_VERSION: u16 = 1;
/// The version with [`Tree::former`] disks: their trees are among the links in clear, so that a release which skipped
/// their section would call the manifest damaged.
const VERSION_WITH_FORMER: u16 = 3;

/// What a recovery point is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The point.
    pub point: PointId,
    /// The job that made it.
    pub job: JobId,
    /// The VM.
    pub vm: VmKey,
    /// Its name at that time: a label.
    pub vm_name: String,
    /// Incarnation of its disks.
    pub incarnation: VmIncarnation,
    /// The checkpoint that was read.
    pub checkpoint: CheckpointId,
    /// When the checkpoint was made, milliseconds since the Unix epoch.
    pub taken_unix_ms: u64,
    /// Chunk size of all trees, bytes.
    pub chunk_size: u32,
    /// Consistency that was reached (text form of the RPC enum, e.g. `APPLICATION`).
    pub consistency: String,
    /// Reasons shown with the point.
    pub reasons: Vec<String>,
    /// Change tracking after a host crash was taken but not proven yet.
    pub tracking_unproven: bool,
    /// One configuration set for the checkpoint.
    pub config: Vec<ConfigFile>,
    /// The disks, in slot order.
    pub disks: Vec<DiskManifest>,
    /// What the VM was besides its disks (section 1).
    #[serde(skip)]
    pub machine: Machine,
    /// The checkpoints that an administrator had made (section 2).
    #[serde(skip)]
    pub tree: Tree,
}

/// A file of the VM's configuration (`.vmcx`, `.vmrs`, `.vmgs`), kept as chunks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigFile {
    /// File name without folders.
    pub name: String,
    /// Length, bytes.
    pub size: u64,
    /// Its chunks in order, `chunk_size` bytes each, the last one shorter.
    pub chunks: Vec<ChunkId>,
}

/// A disk of a recovery point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskManifest {
    /// VirtualDiskId.
    pub disk_id: DiskId,
    /// Stable tail of the settings' InstanceID (controller/location).
    pub slot: String,
    /// File name of the disk at that time (the base's name, without folders).
    pub file_name: String,
    /// Guest-visible size, bytes.
    pub size: u64,
    /// 512 or 4096.
    pub logical_sector: u32,
    /// 512 or 4096.
    pub physical_sector: u32,
    /// Block size of the image, bytes; used again at restore.
    pub block_size: u32,
    /// Whether the image was fixed.
    pub fixed: bool,
    /// The disk at each checkpoint of [`Manifest::tree`] that has it, ancestors first, and last the disk at the point
    /// itself. Each layer is the whole disk at that moment: unchanged pages are shared, so that it costs what differs.
    pub layers: Vec<Layer>,
    /// Ranges that the policy left out, as (offset, length): restored as zeros, masked in comparisons.
    pub excluded: Vec<(u64, u64)>,
    /// Format of the image; a restore makes one of the same (section 3).
    #[serde(skip)]
    pub format: ImageFormat,
}

/// One layer's tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Level of the root page.
    pub root_level: u8,
    /// Root page; [`ChunkId::HOLE`] when the layer is all zeros.
    pub root: ChunkId,
}

/// Bytes that are no manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The record could not be opened.
    #[error("manifest {0:?} cannot be opened")]
    Seal(ChunkId, #[source] SealError),
    /// Its clear links are malformed.
    #[error("manifest has malformed links")]
    Links(#[source] DecodeError),
    /// The sealed body is malformed.
    #[error("manifest {id:?} has a malformed body: {detail}")]
    Body {
        /// Manifest.
        id: ChunkId,
        /// What is wrong.
        detail: String,
    },
}

impl Manifest {
    /// The links that storage nodes see.
    #[must_use]
    pub fn links(&self) -> Links {
        let of_checkpoints = self.tree.checkpoints.iter().flat_map(|c| &c.config);
        let former = self.tree.former.iter().map(|f| &f.disk);
        let config = self.config.iter().chain(of_checkpoints).flat_map(|f| &f.chunks);
        let config = config.map(|&id| Link { level: 0, id });
        let trees = self
            .disks
            .iter()
            .chain(former)
            .flat_map(|d| &d.layers)
            .map(|l| Link { level: l.root_level, id: l.root });
        Links::Manifest(config.chain(trees).filter(|l| !l.id.is_hole()).collect())
    }

    /// Seals the manifest; the record's id is the manifest's id.
    ///
    /// # Errors
    /// [`ManifestError`] when it is too large or cannot be sealed.
    pub fn seal(&self, sealer: &Sealer) -> Result<Record, ManifestError> {
        let clear = self.links().encode();
        let mut body = Vec::new();
        let former = !self.tree.former.is_empty();
        body.put_u16(if former { VERSION_WITH_FORMER } else { MANIFEST_VERSION });
        let failed =
            |e: postcard::Error| ManifestError::Body { id: ChunkId::HOLE, detail: e.to_string() };
        let body = postcard::to_extend(self, body).map_err(failed)?;
        let sections = sections::of(self).map_err(failed)?;
        let body = postcard::to_extend(&sections, body).map_err(failed)?;
        let id = sealer.id_of(Kind::Page, &clear, &body);
        sealer.seal(Kind::Page, id, &clear, &body).map_err(|e| ManifestError::Seal(id, e))
    }

    /// Opens a manifest record and checks it: sizes, levels, and that its links are those it shows in clear.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn open(sealer: &Sealer, record: &Record) -> Result<Self, ManifestError> {
        let id = record.id();
        let plain = sealer.open(record).map_err(|e| ManifestError::Seal(id, e))?;
        let body = |detail: String| ManifestError::Body { id, detail };
        let mut r = Reader::new("manifest body", &plain);
        let version = r.u16().map_err(|e| body(e.to_string()))?;
        if !(FIRST_VERSION..=VERSION_WITH_FORMER).contains(&version) {
            return Err(body(format!(
                "version {version}, this release reads 1 to {VERSION_WITH_FORMER}: upgrade"
            )));
        }
        let (mut manifest, rest): (Self, &[u8]) =
            postcard::take_from_bytes(r.rest()).map_err(|e| body(e.to_string()))?;
        if version > FIRST_VERSION {
            sections::read(&mut manifest, rest).map_err(|e| body(e.to_string()))?;
        }
        if !manifest.chunk_size.is_power_of_two()
            || !(64 << 10..=4 << 20).contains(&manifest.chunk_size)
        {
            return Err(body(format!("chunk size {}", manifest.chunk_size)));
        }
        let former = manifest.tree.former.iter().map(|f| &f.disk);
        for disk in manifest.disks.iter().chain(former) {
            let expected = root_level(disk.size, manifest.chunk_size);
            if disk.size > 64 << 40 || disk.layers.is_empty() {
                return Err(body(format!("disk {} of {} bytes", disk.slot, disk.size)));
            }
            if disk.layers.iter().any(|l| l.root_level != expected) {
                return Err(body(format!("disk {} has a tree of the wrong height", disk.slot)));
            }
        }
        manifest.tree.check(&manifest.disks).map_err(|e| body(e.to_string()))?;
        let links = Links::decode(record.clear()).map_err(ManifestError::Links)?;
        if links != manifest.links() {
            return Err(body("links in clear differ from the sealed trees".into()));
        }
        Ok(manifest)
    }
}
