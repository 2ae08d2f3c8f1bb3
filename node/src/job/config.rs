//! Configuration sets of checkpoints: files of the hypervisor, kept as chunks. Most are small; with a saved state one is as
//! large as the VM's memory, and goes through a pipeline like a disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::FutureExt;
use outrider_disk::{DiskError, DiskInfo, RangeSet, ReadDisk};
use outrider_proto::ids::{ChunkId, PgId};
use outrider_proto::manifest::ConfigFile;
use outrider_proto::page::FANOUT;

use super::{JobContext, JobError};
use crate::hypervisor::Checkpoint;
use crate::pipeline::{DiskJob, DiskPlan, ParentTree, Pipeline, Stats};
use crate::source::Sources;

/// Files up to this length are read at once.
const SMALL: u64 = 8 << 20;
/// Chunks of configuration files in one manifest: it lists them all, and holds 65,536 links.
const MOST_CHUNKS: usize = 60_000;

/// Writes the configuration sets of one job, and keeps what may have to be sent again.
pub(super) struct ConfigSets {
    chunk_size: u32,
    figures: Arc<Stats>,
    chunks: usize,
    large: Vec<Pipeline>,
}

impl ConfigSets {
    pub(super) fn new(chunk_size: u32) -> Self {
        Self { chunk_size, figures: Arc::default(), chunks: 0, large: Vec::new() }
    }

    /// The configuration files of a checkpoint, small ones put through `pipeline`.
    pub(super) async fn save(
        &mut self,
        context: &JobContext,
        checkpoint: &Checkpoint,
        pipeline: &Pipeline,
    ) -> Result<Vec<ConfigFile>, JobError> {
        let mut config = Vec::new();
        for path in context.hypervisor.checkpoint_config(checkpoint).await? {
            let (files, file) = (context.hypervisor.files(), path.clone());
            let size = context.pool.read(0, move || files.open_read(&file)?.len()).await?.0;
            let size = size.map_err(JobError::file("read", &path))?;
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
            let name = name.unwrap_or_default();
            self.chunks +=
                usize::try_from(size.div_ceil(self.chunk_size.into())).unwrap_or(usize::MAX);
            if self.chunks > MOST_CHUNKS {
                let most = MOST_CHUNKS as u64 * u64::from(self.chunk_size);
                let detail =
                    format!("configuration files of more than {most} bytes in one recovery point");
                let too_large = std::io::Error::new(std::io::ErrorKind::FileTooLarge, detail);
                return Err(JobError::file("keep", &path)(too_large));
            }
            let chunks = match size <= SMALL {
                true => {
                    let (sources, file) = (context.sources.clone(), path.clone());
                    let read = move || sources.read_file(&file, SMALL);
                    let (bytes, _budget) =
                        context.pool.read(usize::try_from(size).unwrap_or(0), read).await?;
                    let bytes = bytes.map_err(JobError::file("read", &path))?;
                    if bytes.len() as u64 != size {
                        let changed = std::io::Error::other("its length changed while it was read");
                        return Err(JobError::file("read", &path)(changed));
                    }
                    pipeline.put_file(&bytes).await?
                }
                false => {
                    // A barrier of the large file's pipeline could not send again what this one has put.
                    if !pipeline.flush().await? {
                        pipeline.capture().boxed().await?;
                    }
                    self.put_large(context, &path, size).await?
                }
            };
            config.push(ConfigFile { name, size, chunks });
        }
        Ok(config)
    }

    async fn put_large(
        &mut self,
        context: &JobContext,
        path: &Path,
        size: u64,
    ) -> Result<Vec<ChunkId>, JobError> {
        let source = Arc::new(FileDisk::new(context.sources.clone(), path.to_owned(), size));
        let plan = DiskPlan::full(size, self.chunk_size, &RangeSet::single(0, size));
        let (leaves, level) = (plan.leaf_count(), plan.root_level());
        let pipeline = Pipeline::new(
            context.store.clone(),
            context.sealer.clone(),
            context.pool.clone(),
            context.lease.clone(),
            self.figures.clone(),
            context.bounds(),
            self.chunk_size,
            vec![DiskJob { source, plan }],
        );
        let roots = pipeline.capture().boxed().await?;
        self.large.push(pipeline);
        let root = roots.first().map_or(ChunkId::HOLE, |r| r.id);
        let mut tree = ParentTree::new(context.store.clone(), context.sealer.clone(), root, level);
        let count = usize::try_from(size.div_ceil(self.chunk_size.into())).unwrap_or(usize::MAX);
        let mut chunks = Vec::with_capacity(count);
        for leaf in 0..leaves {
            let len = (count - chunks.len()).min(FANOUT);
            chunks.extend(tree.leaf(leaf, len).await?);
        }
        Ok(chunks)
    }

    /// Sends again what storage has lost of large files.
    pub(super) async fn capture(&self) -> Result<(), JobError> {
        for pipeline in &self.large {
            pipeline.capture().boxed().await?;
        }
        Ok(())
    }

    /// As [`Pipeline::recheck`], for large files; afterwards everything is durable again.
    pub(super) async fn recheck(&self, pgs: &[PgId]) -> Result<(), JobError> {
        for pipeline in &self.large {
            pipeline.recheck(pgs).boxed().await?;
            pipeline.capture().boxed().await?;
        }
        Ok(())
    }

    /// What reading and sending large files took.
    pub(super) fn add_to(&self, stats: &Stats) {
        stats.absorb(&self.figures.snapshot(), &Stats::default().snapshot());
    }
}

/// A file's bytes, read like a disk's. It is opened for each read: reads are large, and nothing stays open.
struct FileDisk {
    sources: Sources,
    path: PathBuf,
    info: DiskInfo,
}

impl FileDisk {
    fn new(sources: Sources, path: PathBuf, size: u64) -> Self {
        let info = DiskInfo::raw(size);
        Self { sources, path, info }
    }
}

impl ReadDisk for FileDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let read = self.sources.read_part(&self.path, offset, buf);
        read.map_err(|source| DiskError::Io { path: self.path.clone(), op: "read", source })
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        Ok(RangeSet::single(0, self.info.size))
    }
}
