//! A tree of chunks into a sparse disk file: many gets in flight, every chunk checked against its id, holes never written.

use std::path::{Path, PathBuf};

use futures::{FutureExt, TryStreamExt};
use outrider_disk::{DiskError, DiskFormat, DiskKind, DiskWriter};
use outrider_proto::ids::ChunkId;
use outrider_proto::manifest::{DiskManifest, ImageFormat, ManifestError};
use outrider_proto::seal::SealError;
use tokio::sync::mpsc;

use super::{Reader, remove_file};
use crate::pipeline::{DiskPlan, ParentTree, PipelineError, PoolError};
use crate::store::StoreError;

/// Leaf pages in flight.
const LEAVES: usize = 3;
/// Chunks asked for together.
const CHUNKS: usize = 16;
/// Smallest block of a VHDX.
const SMALLEST_BLOCK: u32 = 1 << 20;
/// Block sizes of VHDs that Windows makes.
const VHD_BLOCKS: [u32; 2] = [512 << 10, 2 << 20];
/// Zeros written at once where a format knows no better way.
const ZEROS: u64 = 1 << 20;
/// Decrypted chunks waiting for the disk.
const WAITING: usize = 32;

/// Why a restore failed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Storage.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A page.
    #[error(transparent)]
    Tree(#[from] PipelineError),
    /// A chunk does not open, or is not what its id names.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The new disk cannot be written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A worker thread failed.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A chunk of another length than its place.
    #[error("chunk {id:?} has {found} bytes, its place on the disk has {expected}")]
    Length {
        /// Chunk.
        id: ChunkId,
        /// Its length.
        found: usize,
        /// Length wanted.
        expected: usize,
    },
    /// No layer.
    #[error("disk {slot} of this recovery point has no layers: the recovery point is damaged")]
    NoLayers {
        /// Slot.
        slot: String,
    },
    /// A configuration file is incomplete.
    #[error("the configuration file {name:?} of the recovery point is incomplete")]
    Configuration {
        /// File.
        name: String,
    },
}

/// Opens one chunk.
pub(super) async fn open_chunk(reader: &Reader, id: ChunkId) -> Result<Vec<u8>, RestoreError> {
    let record = reader.store.get(&[id]).await?.pop().ok_or(StoreError::Missing { id })?;
    if record.id() != id {
        return Err(SealError::WrongContent { id }.into());
    }
    let sealer = reader.sealer.clone();
    Ok(reader.pool.run(move || sealer.open(&record)).await??)
}

/// A disk that a restore fills, at rising offsets; what is not written reads as zeros.
pub trait NewDisk: Send {
    /// Writes bytes.
    ///
    /// # Errors
    /// [`DiskError`].
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError>;

    /// Makes a range zeros, also where a parent has something else.
    ///
    /// # Errors
    /// [`DiskError`].
    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        let zeros = vec![0; usize::try_from(len.min(ZEROS)).unwrap_or_default()];
        let mut at = 0;
        while at < len {
            let part = zeros.get(..usize::try_from(len - at).unwrap_or(usize::MAX));
            let part = part.unwrap_or(&zeros);
            self.write_at(offset + at, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Makes everything durable and closes the file.
    ///
    /// # Errors
    /// [`DiskError`].
    fn finish(self: Box<Self>) -> Result<(), DiskError>;
}

impl NewDisk for DiskWriter {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        DiskWriter::write_at(self, offset, bytes)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), DiskError> {
        DiskWriter::write_zeroes(self, offset, len)
    }

    fn finish(mut self: Box<Self>) -> Result<(), DiskError> {
        self.flush()?;
        self.close()
    }
}

/// A new disk of a disk's format, kind, size, block size and sectors. What was no VHD becomes a VHDX.
///
/// # Errors
/// [`DiskError`].
pub fn new_image(
    path: &Path,
    disk: &DiskManifest,
    keep_disk_id: bool,
) -> Result<Box<dyn NewDisk>, DiskError> {
    let kind = if disk.fixed { DiskKind::Fixed } else { DiskKind::Dynamic };
    let vhd = disk.format == ImageFormat::Vhd;
    let format = if vhd { DiskFormat::Vhd } else { DiskFormat::Vhdx };
    let block_size = match vhd {
        // Other programs than Windows make VHDs of other blocks, which Windows would not open.
        true => Some(disk.block_size).filter(|size| VHD_BLOCKS.contains(size)),
        // Another format may have had smaller units than VHDX knows.
        false => Some(disk.block_size.max(SMALLEST_BLOCK)),
    };
    let new = outrider_disk::NewDisk {
        format,
        kind,
        size: disk.size,
        block_size,
        logical_sector: disk.logical_sector,
        physical_sector: disk.physical_sector,
        disk_id: keep_disk_id.then_some(disk.disk_id.0),
    };
    Ok(Box::new(DiskWriter::create(path, &new)?))
}

/// A new differencing disk over `parent`, which is closed and must not change any more.
///
/// # Errors
/// [`DiskError`].
pub fn new_child(path: &Path, parent: &Path) -> Result<Box<dyn NewDisk>, DiskError> {
    Ok(Box::new(DiskWriter::create_child(path, parent, None)?))
}

/// Extension of the file that [`new_image`] makes.
#[must_use]
pub fn image_extension(disk: &DiskManifest) -> &'static str {
    match disk.format {
        ImageFormat::Vhd => "vhd",
        ImageFormat::Vhdx | ImageFormat::Raw => "vhdx",
    }
}

/// A part of a disk to be written.
enum Piece {
    Bytes(u64, Vec<u8>),
    Zeros(u64, u64),
}

/// Writes a disk as the new file that `create` makes; removed again when it fails. Of a child, only the chunks that differ
/// from the tree below are written. Gives the bytes written.
pub(super) async fn write(
    reader: &Reader,
    disk: &DiskManifest,
    below: Option<ChunkId>,
    chunk_size: u32,
    path: &Path,
    create: impl FnOnce() -> Result<Box<dyn NewDisk>, DiskError> + Send + 'static,
) -> Result<u64, RestoreError> {
    // The last layer is the whole disk at the point itself.
    let Some(layer) = disk.layers.last() else {
        return Err(RestoreError::NoLayers { slot: disk.slot.clone() });
    };
    let created = reader.pool.run(create).await??;
    let guard = HalfWritten { path: path.to_owned(), whole: false };
    let (sender, receiver) = mpsc::channel::<Piece>(WAITING);
    // Not on the pool: it waits for chunks that the pool decrypts.
    let writing = tokio::task::spawn_blocking(move || write_all(created, receiver));
    // Only ranges with chunks are asked for: the plan of a full read over the whole disk names every leaf once.
    let plan = DiskPlan::full(disk.size, chunk_size, &outrider_disk::RangeSet::new());
    let fetched = fetch_all(reader, &plan, layer.root, below, sender).await;
    let written = writing.await.map_err(|_| PoolError)?;
    // A failed write closes the channel, which looks like nothing to the fetching side: it is the better reason.
    let written = written?;
    fetched?;
    guard.keep();
    Ok(written)
}

fn write_all(
    mut writer: Box<dyn NewDisk>,
    mut pieces: mpsc::Receiver<Piece>,
) -> Result<u64, DiskError> {
    let mut written = 0;
    while let Some(piece) = pieces.blocking_recv() {
        match piece {
            Piece::Bytes(offset, bytes) => {
                writer.write_at(offset, &bytes)?;
                written += bytes.len() as u64;
            }
            Piece::Zeros(offset, len) => writer.write_zeroes(offset, len)?,
        }
    }
    writer.finish()?;
    Ok(written)
}

async fn fetch_all(
    reader: &Reader,
    plan: &DiskPlan,
    root: ChunkId,
    below: Option<ChunkId>,
    sender: mpsc::Sender<Piece>,
) -> Result<(), RestoreError> {
    let tree = |root| {
        ParentTree::new(reader.store.clone(), reader.sealer.clone(), root, plan.root_level())
    };
    // Over nothing, everything that is no hole differs.
    let (mut tree, mut below) = (tree(root), tree(below.unwrap_or(ChunkId::HOLE)));
    let mut wanted = Vec::new();
    let mut leaf = 0;
    while leaf < plan.leaf_count() {
        // Collected in portions, so that several leaf pages are fetched at once.
        wanted.clear();
        while wanted.len() < 64 && leaf < plan.leaf_count() {
            let pages = (tree.page_id(1, leaf).await?, below.page_id(1, leaf).await?);
            if pages.0 != pages.1 {
                wanted.push((leaf, pages));
            }
            leaf += 1;
        }
        futures::stream::iter(wanted.drain(..).map(Ok))
            .try_for_each_concurrent(LEAVES, |(leaf, pages)| {
                fetch_leaf(reader, plan, leaf, pages, &sender).boxed()
            })
            .await?;
    }
    Ok(())
}

/// The children of a leaf page, as many as the leaf has.
async fn children(
    reader: &Reader,
    page: ChunkId,
    len: usize,
) -> Result<Vec<ChunkId>, PipelineError> {
    let mut children = match page.is_hole() {
        true => Vec::new(),
        false => crate::pipeline::fetch_page(&*reader.store, &reader.sealer, page, 1).await?,
    };
    children.resize(len, ChunkId::HOLE);
    Ok(children)
}

async fn fetch_leaf(
    reader: &Reader,
    plan: &DiskPlan,
    leaf: u64,
    (page, below): (ChunkId, ChunkId),
    sender: &mpsc::Sender<Piece>,
) -> Result<(), RestoreError> {
    let len = plan.leaf_len(leaf);
    let own = children(reader, page, len).await?;
    let below = children(reader, below, len).await?;
    let differ = own.iter().zip(&below).enumerate().filter(|(_, (own, below))| own != below);
    let (holes, present): (Vec<_>, Vec<_>) =
        differ.map(|(i, (own, _))| (i, *own)).partition(|(_, id)| id.is_hole());
    for (child, _) in holes {
        let (offset, length) = plan.chunk_range(leaf, child);
        if sender.send(Piece::Zeros(offset, length as u64)).await.is_err() {
            // The writer failed and says why.
            return Ok(());
        }
    }
    let parts: Vec<Vec<(usize, ChunkId)>> = present.chunks(CHUNKS).map(<[_]>::to_vec).collect();
    futures::stream::iter(parts.into_iter().map(Ok::<_, RestoreError>))
        .try_for_each_concurrent(2, |part| async move {
            let total: usize = part.iter().map(|(child, _)| plan.chunk_range(leaf, *child).1).sum();
            let _budget = reader.pool.reserve(total).await;
            let ids: Vec<ChunkId> = part.iter().map(|(_, id)| *id).collect();
            let records = reader.store.get(&ids).await?;
            let sealer = reader.sealer.clone();
            let opened = reader
                .pool
                .run(move || {
                    ids.iter()
                        .zip(&records)
                        .map(|(id, record)| match record.id() == *id {
                            true => sealer.open(record),
                            false => Err(SealError::WrongContent { id: *id }),
                        })
                        .collect::<Result<Vec<_>, _>>()
                })
                .await??;
            for ((child, id), bytes) in part.into_iter().zip(opened) {
                let (offset, expected) = plan.chunk_range(leaf, child);
                if bytes.len() != expected {
                    return Err(RestoreError::Length { id, found: bytes.len(), expected });
                }
                if sender.send(Piece::Bytes(offset, bytes)).await.is_err() {
                    // The writer failed and says why.
                    return Ok(());
                }
            }
            Ok(())
        })
        .await
}

/// Removes the file unless it became whole.
struct HalfWritten {
    path: PathBuf,
    whole: bool,
}

impl HalfWritten {
    fn keep(mut self) {
        self.whole = true;
    }
}

impl Drop for HalfWritten {
    fn drop(&mut self) {
        if !self.whole {
            remove_file(&self.path);
        }
    }
}
