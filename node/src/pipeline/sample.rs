//! Is what change tracking calls unchanged really unchanged? A random sample is read and compared by id.

use std::sync::Arc;

use outrider_disk::{RangeSet, ReadDisk};
use outrider_proto::ids::ChunkId;
use outrider_proto::page::FANOUT;
use outrider_proto::seal::{Sealer, is_zero};
use rand::Rng;

use super::leaf::pace;
use super::{DiskPlan, ParentTree, PipelineError, Pool};

/// Share of the unchanged chunks that is read again.
pub const FRACTION: f64 = 0.005;
/// Chunks sampled together: one read, one parent page.
const RUN: u64 = 16;

/// What a sample found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sampled {
    /// Chunks compared.
    pub chunks: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Offset of the first chunk that differs.
    pub mismatch: Option<u64>,
}

/// Compares a random part of `allocated` outside of what the plan reads with the parent's tree. At least one run when
/// there is anything to compare.
///
/// # Errors
/// [`PipelineError`].
pub async fn compare(
    source: &Arc<dyn ReadDisk>,
    plan: &DiskPlan,
    allocated: &RangeSet,
    parent: &mut ParentTree,
    sealer: &Sealer,
    pool: &Pool,
) -> Result<Sampled, PipelineError> {
    let mut found = Sampled::default();
    for run in choose(plan, allocated) {
        let leaf = run * RUN / FANOUT as u64;
        let first = usize::try_from(run * RUN % FANOUT as u64).unwrap_or(0);
        let wanted = plan.chunks_to_read(leaf);
        let expected = parent.leaf(leaf, wanted.len()).await?;
        for child in first..(first + RUN as usize).min(wanted.len()) {
            if wanted[child] {
                continue;
            }
            let (offset, length) = plan.chunk_range(leaf, child);
            pace(source.as_ref(), length).await;
            let (source, sealer) = (source.clone(), sealer.clone());
            let read = move || {
                let mut bytes = vec![0; length];
                source.read_at(offset, &mut bytes)?;
                Ok::<_, outrider_disk::DiskError>(if is_zero(&bytes) {
                    ChunkId::HOLE
                } else {
                    sealer.chunk_id(&bytes)
                })
            };
            let id = pool.read(length, read).await?.0?;
            found.chunks += 1;
            found.bytes += length as u64;
            if id != expected[child] {
                found.mismatch = Some(offset);
                return Ok(found);
            }
        }
    }
    Ok(found)
}

/// Run numbers to compare, ascending.
fn choose(plan: &DiskPlan, allocated: &RangeSet) -> Vec<u64> {
    let run_bytes = u64::from(plan.chunk_size()) * RUN;
    let runs = allocated.align_out(run_bytes, plan.size());
    let mut random = rand::rng();
    let mut chosen = Vec::new();
    let mut unchanged = Vec::new();
    for range in &runs {
        for run in range.start / run_bytes..range.end().div_ceil(run_bytes) {
            let leaf = run * RUN / FANOUT as u64;
            let first = usize::try_from(run * RUN % FANOUT as u64).unwrap_or(0);
            let wanted = plan.chunks_to_read(leaf);
            if wanted.iter().skip(first).take(RUN as usize).all(|w| *w) {
                continue;
            }
            // Kept small: one candidate is enough for the smallest sample.
            if unchanged.is_empty() || random.random_bool(0.01) {
                unchanged = vec![run];
            }
            if random.random_bool(FRACTION) {
                chosen.push(run);
            }
        }
    }
    if chosen.is_empty() { unchanged } else { chosen }
}
