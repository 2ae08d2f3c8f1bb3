//! The puts and questions of a session between two barriers, and what a barrier makes of them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use outrider_proto::ids::{ChunkId, PgId, SessionId, Window};
use outrider_proto::layout::Layout;
use outrider_proto::receipt::Receipt;
use outrider_proto::rpc;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::transport::WindowHead;

/// A window that takes puts and answers.
#[derive(Debug)]
pub(super) struct OpenWindow {
    pub(super) head: WindowHead,
    /// Requests of this window that have not ended.
    pub(super) requests: TaskTracker,
    contents: Mutex<Contents>,
}

#[derive(Debug, Default)]
struct Contents {
    puts: BTreeMap<PgId, Vec<ChunkId>>,
    put_bytes: BTreeMap<PgId, u64>,
    haves: BTreeMap<PgId, Vec<ChunkId>>,
}

/// A put's place in its window.
#[derive(Debug)]
pub(super) struct Number {
    pub(super) head: WindowHead,
    pub(super) sequence: u32,
    pub(super) token: TaskTrackerToken,
}

impl OpenWindow {
    pub(super) fn new(head: WindowHead) -> Self {
        Self { head, requests: TaskTracker::new(), contents: Mutex::default() }
    }

    pub(super) fn number(&self, pg: PgId, id: ChunkId, sealed_bytes: u64) -> Number {
        let mut contents = self.lock();
        *contents.put_bytes.entry(pg).or_default() += sealed_bytes;
        let puts = contents.puts.entry(pg).or_default();
        puts.push(id);
        let sequence = u32::try_from(puts.len()).unwrap_or(u32::MAX);
        Number { head: self.head, sequence, token: self.requests.token() }
    }

    pub(super) fn add_have(&self, pg: PgId, id: ChunkId) {
        self.lock().haves.entry(pg).or_default().push(id);
    }

    pub(super) fn is_empty(&self) -> bool {
        let contents = self.lock();
        contents.puts.is_empty() && contents.haves.is_empty()
    }

    /// Per PG: (puts, haves).
    pub(super) fn counts(&self) -> BTreeMap<PgId, (u32, u32)> {
        let contents = self.lock();
        let mut counts: BTreeMap<PgId, (u32, u32)> = BTreeMap::new();
        for (&pg, ids) in &contents.puts {
            counts.entry(pg).or_default().0 = u32::try_from(ids.len()).unwrap_or(u32::MAX);
        }
        for (&pg, ids) in &contents.haves {
            counts.entry(pg).or_default().1 = u32::try_from(ids.len()).unwrap_or(u32::MAX);
        }
        counts
    }

    /// Sealed bytes put to a PG.
    pub(super) fn bytes_of(&self, pg: PgId) -> u64 {
        self.lock().put_bytes.get(&pg).copied().unwrap_or(0)
    }

    /// The ids of some PGs, or of all.
    pub(super) fn ids(&self, of: Option<&[PgId]>) -> Vec<ChunkId> {
        let contents = self.lock();
        contents
            .puts
            .iter()
            .chain(&contents.haves)
            .filter(|(pg, _)| of.is_none_or(|of| of.contains(pg)))
            .flat_map(|(_, ids)| ids.iter().copied())
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one PG of a closed window claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PgClaim {
    pub(super) pg: PgId,
    pub(super) puts: u32,
    pub(super) haves: u32,
    /// Replicas whose receipts cover the puts.
    pub(super) copies: u32,
}

/// A closed window with its receipts.
#[derive(Debug, Clone)]
pub(super) struct Claim {
    pub(super) session: SessionId,
    pub(super) window: Window,
    pub(super) pgs: Vec<PgClaim>,
    pub(super) receipts: Vec<Bytes>,
}

impl Claim {
    pub(super) fn to_rpc(&self) -> rpc::WindowClaim {
        rpc::WindowClaim {
            session: self.session.to_string(),
            window: self.window.0,
            pg: self.pgs.iter().map(|c| u32::from(c.pg.0)).collect(),
            puts: self.pgs.iter().map(|c| c.puts).collect(),
            haves: self.pgs.iter().map(|c| c.haves).collect(),
            receipt: self.receipts.iter().map(|r| r.to_vec()).collect(),
        }
    }
}

/// Judges the receipts of a window as the coordinator will: what is covered, and which PGs are not.
pub(super) fn judge(
    head: &WindowHead,
    counts: &BTreeMap<PgId, (u32, u32)>,
    receipts: Vec<Bytes>,
    layout: &Layout,
) -> (Option<Claim>, Vec<PgId>) {
    let read: Vec<Receipt> = receipts
        .iter()
        .filter_map(|bytes| Receipt::decode(bytes).ok())
        .filter(|r| {
            r.session == head.session
                && r.window == head.window
                && r.job == head.job
                && r.layout_epoch == layout.epoch
        })
        .collect();
    let mut covered = Vec::new();
    let mut lacking = Vec::new();
    for (&pg, &(puts, haves)) in counts {
        let said = |r: &Receipt| r.pgs.iter().find(|p| p.pg == pg).copied();
        let mut nodes: Vec<&str> = read
            .iter()
            .filter(|r| layout.keeps(&r.node, pg))
            .filter(|r| said(r).is_some_and(|p| p.puts_through >= puts))
            .map(|r| r.node.as_str())
            .collect();
        nodes.sort_unstable();
        nodes.dedup();
        let puts_covered = puts == 0 || nodes.len() >= usize::from(layout.min_durable.max(1));
        let haves_covered =
            haves == 0 || read.iter().any(|r| said(r).is_some_and(|p| p.haves >= haves));
        if puts_covered && haves_covered {
            let copies = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
            covered.push(PgClaim { pg, puts, haves, copies });
        } else {
            lacking.push(pg);
        }
    }
    let claim = (!covered.is_empty()).then(|| Claim {
        session: head.session,
        window: head.window,
        pgs: covered,
        receipts,
    });
    (claim, lacking)
}
