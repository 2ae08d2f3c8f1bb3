//! One leaf page: 128 chunks read, told from zeros, hashed, asked for, sealed, sent.

use std::collections::HashSet;

use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt};
use outrider_disk::{DiskError, ReadDisk};
use outrider_proto::frame::Presence;
use outrider_proto::ids::ChunkId;
use outrider_proto::page::Links;
use outrider_proto::record::{Kind, Record};
use outrider_proto::seal::{SealError, is_zero};

use super::plan::runs;
use super::stats::Stats;
use super::{LeafDone, LeafKey, Pipeline, PipelineError};

/// Reads of one leaf in flight: with the default sizes, the whole leaf. The budget of bytes bounds them all.
const READS: usize = 8;

/// A chunk that was read: its place in the leaf and, unless it is zeros, identity and bytes.
type ReadChunk = (usize, Option<(ChunkId, Bytes)>);

impl Pipeline {
    /// Does one leaf: reads what has to be read, takes the rest from the parent, sends what storage lacks, the page
    /// included.
    pub(super) async fn do_leaf(&self, key: LeafKey) -> Result<LeafDone, PipelineError> {
        self.lease.check()?;
        let (disk, leaf) = key;
        let plan = &self.disks[disk].plan;
        let forced = self.state().forced.contains(&key);
        let mut wanted = plan.chunks_to_read(leaf);
        let mut children = vec![ChunkId::HOLE; wanted.len()];
        if forced {
            wanted.fill(true);
        } else if wanted.iter().any(|w| !w) {
            children = self.parents[disk].lock().await.leaf(leaf, wanted.len()).await?;
            self.require_unchanged(&children, &mut wanted).await?;
        }
        let earlier = self.earlier_children(key).await;
        let longest = (self.bounds.read_size / self.chunk_size as usize).max(1);
        let groups: Vec<Vec<(usize, ChunkId)>> = futures::stream::iter(runs(&wanted, longest))
            .map(|(first, len)| self.do_read(key, first, len, earlier.as_ref()).boxed())
            .buffer_unordered(READS)
            .try_collect()
            .await?;
        for (child, id) in groups.into_iter().flatten() {
            children[child] = id;
        }
        let page = self.put_leaf_page(&children).await?;
        Ok(LeafDone { key, page, children })
    }

    /// What did not change must still be there; what is not is read again, too.
    async fn require_unchanged(
        &self,
        children: &[ChunkId],
        wanted: &mut [bool],
    ) -> Result<(), PipelineError> {
        let kept: Vec<usize> =
            (0..children.len()).filter(|&i| !wanted[i] && !children[i].is_hole()).collect();
        if kept.is_empty() {
            return Ok(());
        }
        let ids: Vec<ChunkId> = kept.iter().map(|&i| children[i]).collect();
        let answers = self.store.have(&ids).await?;
        for (i, _) in kept.into_iter().zip(answers).filter(|(_, a)| *a != Presence::Yes) {
            wanted[i] = true;
        }
        Ok(())
    }

    /// Reads a run of chunks and sees that storage has them.
    async fn do_read(
        &self,
        (disk, leaf): LeafKey,
        first: usize,
        len: usize,
        earlier: Option<&HashSet<ChunkId>>,
    ) -> Result<Vec<(usize, ChunkId)>, PipelineError> {
        let plan = &self.disks[disk].plan;
        let (offset, _) = plan.chunk_range(leaf, first);
        let lengths: Vec<usize> =
            (first..first + len).map(|c| plan.chunk_range(leaf, c).1).collect();
        let total: usize = lengths.iter().sum();
        let source = self.disks[disk].source.clone();
        let sealer = self.sealer.clone();
        let turn = self.turns.next().await;
        pace(source.as_ref(), total).await;
        let read = move || read_and_hash(&*source, offset, first, &lengths, |b| sealer.chunk_id(b));
        // The budget is held until everything read here is sent: this is what bounds the agent's memory.
        let (read, _budget) = self.pool.read(total, read).await?;
        drop(turn);
        let read = read?;
        Stats::add(&self.stats.read_bytes, total as u64);
        if earlier.is_some() {
            Stats::add(&self.stats.reread_bytes, total as u64);
        }
        let zero: usize = read
            .iter()
            .filter(|(_, c)| c.is_none())
            .map(|(i, _)| plan.chunk_range(leaf, *i).1)
            .sum();
        Stats::add(&self.stats.zero_bytes, zero as u64);
        let ids = read
            .iter()
            .map(|(i, c)| (*i, c.as_ref().map_or(ChunkId::HOLE, |(id, _)| *id)))
            .collect();
        self.send_unknown(read, earlier).await?;
        Ok(ids)
    }

    async fn send_unknown(
        &self,
        read: Vec<ReadChunk>,
        earlier: Option<&HashSet<ChunkId>>,
    ) -> Result<(), PipelineError> {
        let mut fresh: Vec<(ChunkId, Bytes)> = Vec::new();
        {
            let mut state = self.state();
            for (id, bytes) in read.into_iter().filter_map(|(_, c)| c) {
                // On its way already, from here or from another leaf: that one's barrier covers it, and a loss leads to
                // its being sent again.
                let on_its_way = state.recent.iter().any(|r| r.contains(&id));
                if on_its_way && !state.lost.contains_key(&id) {
                    self.count_known(bytes.len());
                } else {
                    state.recent[0].insert(id);
                    fresh.push((id, bytes));
                }
            }
        }
        if fresh.is_empty() {
            return Ok(());
        }
        let ids: Vec<ChunkId> = fresh.iter().map(|(id, _)| *id).collect();
        let answers = self.store.have(&ids).await?;
        let mut missing = Vec::new();
        for ((id, bytes), answer) in fresh.into_iter().zip(answers) {
            if answer == Presence::Yes {
                self.count_known(bytes.len());
                // Whole leaves are counted where they are read.
                if self.resumed && earlier.is_none() {
                    Stats::add(&self.stats.reread_bytes, bytes.len() as u64);
                }
            } else {
                missing.push((id, bytes));
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let sealer = self.sealer.clone();
        let sealed: Vec<Record> = self
            .pool
            .run(move || {
                missing
                    .iter()
                    .map(|(id, bytes)| sealer.seal(Kind::Data, *id, &[], bytes))
                    .collect::<Result<_, SealError>>()
            })
            .await??;
        for record in sealed {
            let (id, length) = (record.id(), record.bytes().len() as u64);
            self.put(record).await?;
            Stats::add(&self.stats.chunks_new, 1);
            if earlier.is_some_and(|e| e.is_empty() || e.contains(&id)) {
                Stats::add(&self.stats.resent_bytes, length);
            }
        }
        Ok(())
    }

    fn count_known(&self, plain: usize) {
        Stats::add(&self.stats.known_bytes, plain as u64);
        Stats::add(&self.stats.chunks_known, 1);
    }

    async fn put_leaf_page(&self, children: &[ChunkId]) -> Result<ChunkId, PipelineError> {
        let Some(record) = self.seal_page(1, children)? else { return Ok(ChunkId::HOLE) };
        let id = record.id();
        if self.store.have(&[id]).await?[0] != Presence::Yes {
            self.put(record).await?;
        }
        Ok(id)
    }

    /// A page's record; `None` when it refers to zeros only.
    pub(super) fn seal_page(
        &self,
        level: u8,
        children: &[ChunkId],
    ) -> Result<Option<Record>, PipelineError> {
        if children.iter().all(ChunkId::is_hole) {
            return Ok(None);
        }
        let clear = Links::Page { level, children: children.to_vec() }.encode();
        let id = self.sealer.id_of(Kind::Page, &clear, &[]);
        Ok(Some(self.sealer.seal(Kind::Page, id, &clear, &[])?))
    }
}

/// Waits until the source may be read again: no thread is held meanwhile.
pub(super) async fn pace(source: &dyn ReadDisk, bytes: usize) {
    let wait = source.wait_before(bytes as u64);
    if !wait.is_zero() {
        tokio::time::sleep(wait).await;
    }
}

/// Blocks: one read, then one look at each chunk.
fn read_and_hash(
    source: &dyn ReadDisk,
    offset: u64,
    first: usize,
    lengths: &[usize],
    id_of: impl Fn(&[u8]) -> ChunkId,
) -> Result<Vec<ReadChunk>, DiskError> {
    let mut buffer = vec![0; lengths.iter().sum()];
    source.read_at(offset, &mut buffer)?;
    let buffer = Bytes::from(buffer);
    let mut at = 0;
    let mut out = Vec::with_capacity(lengths.len());
    for (i, &length) in lengths.iter().enumerate() {
        let chunk = buffer.slice(at..at + length);
        at += length;
        let content = if is_zero(&chunk) { None } else { Some((id_of(&chunk), chunk)) };
        out.push((first + i, content));
    }
    Ok(out)
}
