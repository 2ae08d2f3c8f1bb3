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

/// Extension of the file that [`new_image`] makes.
#[must_use]
pub fn image_extension(disk: &DiskManifest) -> &'static str {
    match disk.format {
        ImageFormat::Vhd => "vhd",
        ImageFormat::Vhdx | ImageFormat::Raw => "vhdx",
    }
}

/// Writes a disk as the new file that `create` makes; removed again when it fails. Gives the bytes written.
pub(super) async fn write(
    reader: &Reader,
    disk: &DiskManifest,
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
    let (sender, receiver) = mpsc::channel::<(u64, Vec<u8>)>(WAITING);
    // Not on the pool: it waits for chunks that the pool decrypts.
    let writing = tokio::task::spawn_blocking(move || write_all(created, receiver));
    // Only ranges with chunks are asked for: the plan of a full read over the whole disk names every leaf once.
    let plan = DiskPlan::full(disk.size, chunk_size, &outrider_disk::RangeSet::new());
    let fetched = fetch_all(reader, &plan, layer.root, sender).await;
    let written = writing.await.map_err(|_| PoolError)?;
    // A failed write closes the channel, which looks like nothing to the fetching side: it is the better reason.
    let written = written?;
    fetched?;
    guard.keep();
    Ok(written)
}

fn write_all(
    mut writer: Box<dyn NewDisk>,
    mut chunks: mpsc::Receiver<(u64, Vec<u8>)>,
) -> Result<u64, DiskError> {
    let mut written = 0;
    while let Some((offset, bytes)) = chunks.blocking_recv() {
        writer.write_at(offset, &bytes)?;
        written += bytes.len() as u64;
    }
    writer.finish()?;
    Ok(written)
}

async fn fetch_all(
    reader: &Reader,
    plan: &DiskPlan,
    root: ChunkId,
    sender: mpsc::Sender<(u64, Vec<u8>)>,
) -> Result<(), RestoreError> {
    let mut tree =
        ParentTree::new(reader.store.clone(), reader.sealer.clone(), root, plan.root_level());
    let mut wanted = Vec::new();
    let mut leaf = 0;
    while leaf < plan.leaf_count() {
        // Collected in portions, so that several leaf pages are fetched at once.
        wanted.clear();
        while wanted.len() < 64 && leaf < plan.leaf_count() {
            let id = tree.page_id(1, leaf).await?;
            if !id.is_hole() {
                wanted.push((leaf, id));
            }
            leaf += 1;
        }
        futures::stream::iter(wanted.drain(..).map(Ok))
            .try_for_each_concurrent(LEAVES, |(leaf, id)| {
                fetch_leaf(reader, plan, leaf, id, &sender).boxed()
            })
            .await?;
    }
    Ok(())
}

async fn fetch_leaf(
    reader: &Reader,
    plan: &DiskPlan,
    leaf: u64,
    page: ChunkId,
    sender: &mpsc::Sender<(u64, Vec<u8>)>,
) -> Result<(), RestoreError> {
    let children = crate::pipeline::fetch_page(&*reader.store, &reader.sealer, page, 1).await?;
    let present: Vec<(usize, ChunkId)> = children
        .iter()
        .copied()
        .enumerate()
        .filter(|(i, id)| !id.is_hole() && *i < plan.leaf_len(leaf))
        .collect();
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
                if sender.send((offset, bytes)).await.is_err() {
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
