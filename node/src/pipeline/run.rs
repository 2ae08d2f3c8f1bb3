//! Several leaves in flight, barriers and the journal beside them, and what has to be done again.

use std::collections::VecDeque;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use outrider_proto::ids::ChunkId;
use tokio::time::Instant;

use super::stats::Stats;
use super::tree::TreeRoot;
use super::{LeafDone, LeafKey, Pipeline, PipelineError};
use crate::store::BarrierError;

/// Leaf pages at work at the same time: one is read while the other is sent. More would not be faster, and whoever takes
/// over after a move reads again what was not finished.
const LEAVES: usize = 2;
/// Leaves finished since the last barrier; bounds what is kept to find lost ids in.
const UNCONFIRMED: usize = 2048;
/// Share of all that was sent which may be without a barrier, as a divisor: what an agent loses when it is killed stays
/// small beside what it did, and the number of windows in a commit stays small, too.
const BARRIER_SHARE: u64 = 8;
/// Least distance of barriers in sealed bytes.
const LEAST_BARRIER: u64 = 32 << 20;
/// Rounds of sending again before storage is called broken.
pub(super) const ROUNDS: u32 = 20;

/// A leaf at work, with the number of losses known when it began.
type Working<'a> = BoxFuture<'a, Result<(u64, LeafDone), PipelineError>>;

/// What one drive keeps.
struct Drive {
    again: VecDeque<LeafKey>,
    /// Where the walk over the disks is; `None` when only `again` is done.
    walk: Option<LeafKey>,
    unconfirmed: Vec<LeafDone>,
    to_journal: Vec<(u32, u64, ChunkId)>,
    unplaced: Vec<ChunkId>,
    last_barrier: Instant,
    sent_before: u64,
    rounds: u32,
}

impl Pipeline {
    /// Captures all disks: afterwards every chunk and page below the roots is durable, with receipts. May be called
    /// again after [`Pipeline::recheck`]: what is done is not done twice.
    ///
    /// # Errors
    /// [`PipelineError`].
    pub async fn capture(&self) -> Result<Vec<TreeRoot>, PipelineError> {
        let total: u64 = self.disks.iter().map(|d| d.plan.size()).sum();
        let changed: u64 = self.disks.iter().map(|d| d.plan.bytes_to_read()).sum();
        Stats::set(&self.stats.disk_bytes, total);
        Stats::set(&self.stats.changed_bytes, changed);
        self.adopt().await?;
        self.drive(Vec::new(), true).await?;
        for _ in 0..ROUNDS {
            let roots = self.assemble_all().await?;
            let forced = self.ask_for_reused().await?;
            if forced.is_empty() && self.flush().await? {
                return Ok(roots);
            }
            self.drive(self.forced_not_done(), true).await?;
        }
        Err(PipelineError::KeepsLosing { rounds: ROUNDS })
    }

    /// Barriers until everything sent so far is durable. False: a part of the tree has to be captured again.
    ///
    /// # Errors
    /// [`PipelineError`].
    pub async fn flush(&self) -> Result<bool, PipelineError> {
        for _ in 0..ROUNDS {
            let lost = match self.store.barrier().await {
                Ok(()) => return Ok(self.forced_not_done().is_empty()),
                Err(BarrierError::Lost { ids }) => ids,
                Err(BarrierError::Store(e)) => return Err(e.into()),
            };
            let unplaced = self.note_lost(&lost).await?;
            if !unplaced.is_empty() {
                self.recheck_ids(unplaced).await?;
            }
        }
        Err(PipelineError::KeepsLosing { rounds: ROUNDS })
    }

    /// Does leaves: those named, and (with `walk`) all that the plans want and that are not done yet.
    pub(super) async fn drive(&self, again: Vec<LeafKey>, walk: bool) -> Result<(), PipelineError> {
        let mut drive = Drive {
            again: again.into(),
            walk: walk.then_some((0, 0)),
            unconfirmed: Vec::new(),
            to_journal: Vec::new(),
            unplaced: Vec::new(),
            last_barrier: Instant::now(),
            sent_before: self.stats.snapshot().sent_bytes,
            rounds: 0,
        };
        loop {
            self.work_off(&mut drive).await?;
            // The last barrier of this drive covers everything that is not confirmed yet.
            let outcome =
                if drive.unconfirmed.is_empty() { Ok(()) } else { self.store.barrier().await };
            let covered = drive.unconfirmed.len();
            self.after_barrier(&mut drive, covered, outcome).await?;
            if drive.again.is_empty() {
                break;
            }
        }
        if !drive.unplaced.is_empty() {
            Box::pin(self.recheck_ids(drive.unplaced)).await?;
        }
        Ok(())
    }

    async fn work_off(&self, drive: &mut Drive) -> Result<(), PipelineError> {
        let mut working: FuturesUnordered<Working<'_>> = FuturesUnordered::new();
        let mut barrier: Option<BoxFuture<'_, (usize, Result<(), BarrierError>)>> = None;
        let mut journal: Option<BoxFuture<'_, Result<(), PipelineError>>> = None;
        loop {
            while working.len() < LEAVES
                && drive.unconfirmed.len() < UNCONFIRMED
                && let Some(key) = self.next_key(drive)
            {
                let begun = self.state().losses;
                working.push(async move { Ok((begun, self.do_leaf(key).await?)) }.boxed());
            }
            if journal.is_none() && !drive.to_journal.is_empty() {
                journal = self.journal_leaves(std::mem::take(&mut drive.to_journal));
            }
            if barrier.is_none() && self.barrier_is_due(drive) {
                drive.last_barrier = Instant::now();
                drive.sent_before = self.stats.snapshot().sent_bytes;
                let covered = drive.unconfirmed.len();
                barrier = Some(async move { (covered, self.store.barrier().await) }.boxed());
            }
            if working.is_empty() && barrier.is_none() && journal.is_none() {
                return Ok(());
            }
            tokio::select! {
                Some(done) = working.next() => {
                    let (begun, done) = done?;
                    self.leaf_done(drive, begun, done);
                }
                (covered, outcome) = maybe(&mut barrier) => {
                    barrier = None;
                    self.after_barrier(drive, covered, outcome).await?;
                }
                // Reads may stand still for long (a volume pauses I/O): what was sent before becomes durable anyway.
                () = tokio::time::sleep(self.bounds.barrier_interval), if barrier.is_none() => {}
                written = maybe(&mut journal) => {
                    journal = None;
                    written?;
                }
            }
        }
    }

    fn next_key(&self, drive: &mut Drive) -> Option<LeafKey> {
        if let Some(key) = drive.again.pop_front() {
            return Some(key);
        }
        let (mut disk, mut from) = drive.walk?;
        let state = self.state();
        while disk < self.disks.len() {
            match self.disks[disk].plan.next_leaf(from) {
                Some(leaf) => {
                    from = leaf + 1;
                    if !state.leaves[disk].contains_key(&leaf) {
                        drive.walk = Some((disk, from));
                        return Some((disk, leaf));
                    }
                }
                None => (disk, from) = (disk + 1, 0),
            }
        }
        drive.walk = None;
        None
    }

    fn barrier_is_due(&self, drive: &Drive) -> bool {
        let total = self.stats.snapshot().sent_bytes;
        let sent = total.saturating_sub(drive.sent_before);
        // Chunks of a leaf that is still at work count, too: they are what a successor need not send.
        if drive.unconfirmed.is_empty() && sent == 0 {
            return false;
        }
        let distance = (total / BARRIER_SHARE).max(LEAST_BARRIER).min(self.bounds.barrier_bytes);
        sent >= distance
            || drive.unconfirmed.len() >= UNCONFIRMED
            || drive.last_barrier.elapsed() >= self.bounds.barrier_interval
    }

    fn leaf_done(&self, drive: &mut Drive, begun: u64, done: LeafDone) {
        let mut state = self.state();
        let touches_lost = |id: &ChunkId| state.lost.get(id).is_some_and(|loss| *loss > begun);
        if touches_lost(&done.page) || done.children.iter().any(touches_lost) {
            drop(state);
            drive.again.push_back(done.key);
            return;
        }
        let (disk, leaf) = done.key;
        state.leaves[disk].insert(leaf, done.page);
        state.forced.remove(&done.key);
        drop(state);
        let disk = self.numbers.get(disk).copied().unwrap_or(u32::MAX);
        drive.to_journal.push((disk, leaf, done.page));
        drive.unconfirmed.push(done);
    }

    /// The first `covered` of the unconfirmed leaves are durable, except what was lost.
    async fn after_barrier(
        &self,
        drive: &mut Drive,
        covered: usize,
        outcome: Result<(), BarrierError>,
    ) -> Result<(), PipelineError> {
        let lost = match outcome {
            Ok(()) => Vec::new(),
            Err(BarrierError::Lost { ids }) => ids,
            Err(BarrierError::Store(e)) => return Err(e.into()),
        };
        {
            let mut state = self.state();
            let last = std::mem::take(&mut state.recent[0]);
            state.recent[1] = last;
        }
        if lost.is_empty() {
            drive.unconfirmed.drain(..covered);
            return Ok(());
        }
        drive.rounds += 1;
        if drive.rounds > ROUNDS {
            return Err(PipelineError::KeepsLosing { rounds: ROUNDS });
        }
        tracing::warn!(count = lost.len(), "storage lost records; they are read and sent again");
        let mut unplaced: std::collections::HashSet<ChunkId> =
            self.note_lost(&lost).await?.into_iter().collect();
        let is_lost: std::collections::HashSet<ChunkId> = lost.into_iter().collect();
        let mut kept = Vec::new();
        for (position, done) in std::mem::take(&mut drive.unconfirmed).into_iter().enumerate() {
            let ids = || {
                std::iter::once(&done.page).chain(&done.children).filter(|id| is_lost.contains(*id))
            };
            if ids().next().is_some() {
                ids().for_each(|id| {
                    unplaced.remove(id);
                });
                drive.again.push_back(done.key);
            } else if position >= covered {
                kept.push(done);
            }
        }
        drive.unconfirmed = kept;
        // Perhaps of a leaf that is at work: it finds out when it is done. The rest is looked for at the end.
        drive.unplaced.extend(unplaced);
        Ok(())
    }

    /// Remembers lost ids, and puts back those whose records are at hand. Gives the ids that leaves have to be searched
    /// for.
    pub(super) async fn note_lost(&self, lost: &[ChunkId]) -> Result<Vec<ChunkId>, PipelineError> {
        let mut records = Vec::new();
        let mut unplaced = Vec::new();
        {
            let mut state = self.state();
            state.losses += 1;
            let loss = state.losses;
            for id in lost {
                state.lost.insert(*id, loss);
                for recent in &mut state.recent {
                    recent.remove(id);
                }
                if let Some(record) = state.small.get(id) {
                    records.push(record.clone());
                } else if let Some((disk, level, index)) = state.reused.remove(id) {
                    let leaves = self.disks[disk].plan.leaves_below(level, index);
                    state.forced.extend(leaves.map(|leaf| (disk, leaf)));
                } else {
                    unplaced.push(*id);
                }
            }
        }
        for record in records {
            self.put(record).await?;
        }
        Ok(unplaced)
    }

    /// Leaves that must be read whole and have not been yet.
    pub(super) fn forced_not_done(&self) -> Vec<LeafKey> {
        self.state().forced.iter().copied().collect()
    }

    fn journal_leaves(
        &self,
        leaves: Vec<(u32, u64, ChunkId)>,
    ) -> Option<BoxFuture<'_, Result<(), PipelineError>>> {
        let journal = self.journal.as_ref()?;
        Some(async move { Ok(journal.lock().await.leaves(&leaves).await?) }.boxed())
    }
}

async fn maybe<T>(future: &mut Option<BoxFuture<'_, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
