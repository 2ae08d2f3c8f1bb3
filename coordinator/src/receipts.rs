//! Receipts: whether what a commit refers to is durable. A pure function over signed words and the layout.
//!
//! What counts: a receipt signed by a node that keeps the PG in the current layout, given in that node's current life,
//! for this fabric and job, under the current layout epoch. For the puts of a window that is `min_durable` distinct
//! nodes that hold them all; for ids that storage had already it is one node, which attests `min_durable` copies.

use std::collections::{BTreeMap, BTreeSet};

use outrider_proto::frame::Space;
use outrider_proto::ids::{
    ChunkId, FabricId, JobId, NodeIncarnation, PgId, PointId, SessionId, Window,
};
use outrider_proto::layout::Layout;
use outrider_proto::receipt::{NamedReceipt, Receipt};

/// What a client did in one window, and the receipts it was given for it.
#[derive(Debug, Clone)]
pub(crate) struct WindowClaim {
    pub(crate) session: SessionId,
    pub(crate) window: Window,
    /// PG, ids put to it, ids of it that storage had.
    pub(crate) pgs: Vec<(PgId, u32, u32)>,
    /// Encoded receipts.
    pub(crate) receipts: Vec<Vec<u8>>,
}

/// A commit, as far as durability goes.
#[derive(Debug)]
pub(crate) struct Evidence<'a> {
    pub(crate) fabric: FabricId,
    pub(crate) job: JobId,
    pub(crate) point: PointId,
    pub(crate) manifest: ChunkId,
    pub(crate) windows: &'a [WindowClaim],
    /// Encoded receipts of the root record.
    pub(crate) roots: &'a [Vec<u8>],
}

/// Nodes whose receipts count, as they were then.
pub(crate) type Witnesses = BTreeSet<(String, NodeIncarnation)>;

/// What is missing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Lacking {
    /// There is no layout to judge by.
    #[error("too few storage nodes have joined: there is no layout yet")]
    NoLayout,
    /// Chunks or pages of these PGs.
    #[error("receipts of enough current storage nodes are missing for {} placement groups", .0.len())]
    Pgs(Vec<PgId>),
    /// The root record.
    #[error("the root record is confirmed by {found} current storage nodes, {needed} are needed")]
    Root { found: usize, needed: usize },
}

/// Judges the evidence by the layout.
///
/// # Errors
/// [`Lacking`]: the agent asks storage again, sends what is missing and commits anew.
pub(crate) fn verify(evidence: &Evidence<'_>, layout: &Layout) -> Result<Witnesses, Lacking> {
    // A manifest without a PG cannot be: the layout has none.
    let manifest_pg = layout.pg_of(&evidence.manifest).ok_or(Lacking::NoLayout)?;
    let needed = usize::from(layout.min_durable).max(1);
    let mut witnesses = Witnesses::new();
    let mut lacking: BTreeSet<PgId> = BTreeSet::new();
    let mut manifest_claimed = false;
    for claim in evidence.windows {
        let receipts = current_receipts(evidence, claim, layout, &mut witnesses);
        for &(pg, puts, haves) in &claim.pgs {
            manifest_claimed |= pg == manifest_pg && (puts > 0 || haves > 0);
            if !covered(&receipts, layout, pg, puts, haves, needed) {
                lacking.insert(pg);
            }
        }
    }
    // Every point has a manifest of its own; a commit that claims nothing for it cannot have stored it.
    if !manifest_claimed {
        lacking.insert(manifest_pg);
    }
    if !lacking.is_empty() {
        return Err(Lacking::Pgs(lacking.into_iter().collect()));
    }
    verify_root(evidence, layout, needed, &mut witnesses)?;
    Ok(witnesses)
}

/// The receipts of a window that count, one a node, merged by the best word of each node.
fn current_receipts(
    evidence: &Evidence<'_>,
    claim: &WindowClaim,
    layout: &Layout,
    witnesses: &mut Witnesses,
) -> BTreeMap<String, BTreeMap<PgId, (u32, u32)>> {
    let mut by_node: BTreeMap<String, BTreeMap<PgId, (u32, u32)>> = BTreeMap::new();
    for bytes in &claim.receipts {
        let verified = Receipt::verify(bytes, |name| key_of(layout, name));
        let Ok(receipt) = verified else { continue };
        let current =
            layout.node(&receipt.node).is_some_and(|n| n.incarnation == receipt.incarnation);
        let about_this = (receipt.fabric, receipt.job, receipt.session, receipt.window)
            == (evidence.fabric, evidence.job, claim.session, claim.window);
        if !current || !about_this || receipt.layout_epoch != layout.epoch {
            continue;
        }
        witnesses.insert((receipt.node.clone(), receipt.incarnation));
        let node = by_node.entry(receipt.node).or_default();
        for pg in receipt.pgs {
            let word = node.entry(pg.pg).or_default();
            word.0 = word.0.max(pg.puts_through);
            word.1 = word.1.max(pg.haves);
        }
    }
    by_node
}

fn covered(
    receipts: &BTreeMap<String, BTreeMap<PgId, (u32, u32)>>,
    layout: &Layout,
    pg: PgId,
    puts: u32,
    haves: u32,
    needed: usize,
) -> bool {
    if usize::from(pg.0) >= layout.pgs.len() {
        return false;
    }
    let keepers = || {
        receipts.iter().filter(|(node, _)| layout.keeps(node, pg)).filter_map(|(_, r)| r.get(&pg))
    };
    let put = puts == 0 || keepers().filter(|(through, _)| *through >= puts).count() >= needed;
    let had = haves == 0 || keepers().any(|(_, confirmed)| *confirmed >= haves);
    put && had
}

fn verify_root(
    evidence: &Evidence<'_>,
    layout: &Layout,
    needed: usize,
    witnesses: &mut Witnesses,
) -> Result<(), Lacking> {
    let mut by_record: BTreeMap<ChunkId, BTreeSet<String>> = BTreeMap::new();
    for bytes in evidence.roots {
        let Ok(receipt) = NamedReceipt::verify(bytes, |name| key_of(layout, name)) else {
            continue;
        };
        let current =
            layout.node(&receipt.node).is_some_and(|n| n.incarnation == receipt.incarnation);
        let about_this = receipt.fabric == evidence.fabric
            && receipt.space == Space::Root as u8
            && receipt.key == evidence.point.to_bytes();
        if current && about_this {
            witnesses.insert((receipt.node.clone(), receipt.incarnation));
            by_record.entry(receipt.id).or_default().insert(receipt.node);
        }
    }
    // Two different root records under one point do not add up.
    let found = by_record.values().map(BTreeSet::len).max().unwrap_or(0);
    if found >= needed { Ok(()) } else { Err(Lacking::Root { found, needed }) }
}

fn key_of<'l>(layout: &'l Layout, name: &str) -> Option<&'l [u8]> {
    layout.node(name).map(|node| node.receipt_key.as_slice())
}

#[cfg(test)]
mod tests;
