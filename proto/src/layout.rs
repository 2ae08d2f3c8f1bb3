//! The layout: which storage nodes keep which PG.
//!
//! A pure function of the nodes, so that it can be tested by the thousand cases. Replicas are chosen by weighted rendezvous
//! hashing, zone by zone: adding or removing a node moves only the PGs that it wins or loses.

use serde::{Deserialize, Serialize};

use crate::ids::{ChunkId, LayoutEpoch, NodeIncarnation, PgId};

/// A storage node as the layout sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageNode {
    /// Name in its certificate.
    pub name: String,
    /// "ip:port" of its QUIC listener, preferred first.
    pub addresses: Vec<String>,
    /// Failure domain.
    pub zone: String,
    /// Capacity, bytes: its weight.
    pub capacity_bytes: u64,
    /// Ed25519 public key of its receipts.
    pub receipt_key: Vec<u8>,
    /// Grows at every start of its process.
    pub incarnation: NodeIncarnation,
    /// Whether it is connected to the leader: a hint for clients, never a reason to trust or distrust a receipt.
    pub online: bool,
}

/// PG -> replicas.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Layout {
    /// Grows with every change of `pgs`. Zero: no layout yet.
    pub epoch: LayoutEpoch,
    /// Copies of each chunk.
    pub replicas: u8,
    /// Copies that make a chunk durable.
    pub min_durable: u8,
    /// The nodes.
    pub nodes: Vec<StorageNode>,
    /// Per PG: indexes into `nodes`, primary first.
    pub pgs: Vec<Vec<u16>>,
}

impl Layout {
    /// The PG of an id: equal slices of the id space, by its first two bytes.
    ///
    /// `None` while there is no layout.
    #[must_use]
    pub fn pg_of(&self, id: &ChunkId) -> Option<PgId> {
        pg_of(id, self.pgs.len())
    }

    /// Replicas of a PG, primary first.
    pub fn replicas_of(&self, pg: PgId) -> impl Iterator<Item = &StorageNode> {
        self.pgs
            .get(usize::from(pg.0))
            .into_iter()
            .flatten()
            .filter_map(|&n| self.nodes.get(usize::from(n)))
    }

    /// A node by name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&StorageNode> {
        self.nodes.iter().find(|n| n.name == name)
    }

    /// Whether `node` keeps `pg`.
    #[must_use]
    pub fn keeps(&self, node: &str, pg: PgId) -> bool {
        self.replicas_of(pg).any(|n| n.name == node)
    }
}

/// The PG of an id among `pg_count` PGs.
#[must_use]
pub fn pg_of(id: &ChunkId, pg_count: usize) -> Option<PgId> {
    if pg_count == 0 {
        return None;
    }
    let slice = usize::from(u16::from_be_bytes([id.0[0], id.0[1]]));
    u16::try_from((slice * pg_count.min(1 << 16)) >> 16).ok().map(PgId)
}

/// Chooses the replicas of every PG among `nodes`: at most one per zone as long as zones last, then the rest by score.
///
/// Returns index lists into `nodes`; fewer than `replicas` entries when there are fewer nodes.
#[must_use]
pub fn assign(nodes: &[StorageNode], pg_count: u16, replicas: u8) -> Vec<Vec<u16>> {
    (0..pg_count)
        .map(|pg| {
            let mut scored: Vec<(f64, u16)> =
                nodes.iter().zip(0u16..).map(|(node, index)| (score(node, pg), index)).collect();
            scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            let mut chosen: Vec<u16> = Vec::with_capacity(usize::from(replicas));
            for fresh_zones_only in [true, false] {
                for &(_, index) in &scored {
                    if chosen.len() == usize::from(replicas) {
                        break;
                    }
                    let zone = &nodes[usize::from(index)].zone;
                    let zone_used = chosen.iter().any(|&c| &nodes[usize::from(c)].zone == zone);
                    let wrong_zone = fresh_zones_only && zone_used;
                    if !wrong_zone && !chosen.contains(&index) {
                        chosen.push(index);
                    }
                }
            }
            chosen
        })
        .collect()
}

/// Weighted rendezvous score: -weight / ln(hash), the hash uniform in (0, 1).
fn score(node: &StorageNode, pg: u16) -> f64 {
    let mut hasher = blake3::Hasher::new_derive_key("outrider 2026 layout score");
    hasher.update(&pg.to_le_bytes());
    hasher.update(node.name.as_bytes());
    let mut head = [0u8; 8];
    head.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    let unit = ((u64::from_le_bytes(head) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -(node.capacity_bytes.max(1) as f64) / unit.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(name: String, zone: String) -> StorageNode {
        StorageNode {
            name,
            addresses: vec![],
            zone,
            capacity_bytes: 1 << 40,
            receipt_key: vec![],
            incarnation: NodeIncarnation(1),
            online: true,
        }
    }

    proptest! {
        #[test]
        fn replicas_are_distinct_and_spread_over_zones(count in 1usize..12, zones in 1usize..5, rf in 1u8..4) {
            let nodes: Vec<_> =
                (0..count).map(|i| node(format!("s{i}"), format!("z{}", i % zones))).collect();
            for pg in assign(&nodes, 64, rf) {
                let mut unique = pg.clone();
                unique.sort_unstable();
                unique.dedup();
                prop_assert_eq!(unique.len(), usize::from(rf).min(count));
                let mut used: Vec<_> = pg.iter().map(|&i| &nodes[usize::from(i)].zone).collect();
                used.sort();
                used.dedup();
                prop_assert_eq!(used.len(), pg.len().min(zones.min(count)));
            }
        }

        #[test]
        fn a_new_node_takes_pgs_and_moves_no_others(count in 3usize..10) {
            let mut nodes: Vec<_> = (0..count).map(|i| node(format!("s{i}"), format!("z{i}"))).collect();
            let before = assign(&nodes, 128, 2);
            nodes.push(node("new".into(), "z-new".into()));
            let after = assign(&nodes, 128, 2);
            let new = u16::try_from(count).unwrap();
            for (b, a) in before.iter().zip(&after) {
                for kept in a.iter().filter(|&&n| n != new) {
                    prop_assert!(b.contains(kept), "a PG moved between old nodes");
                }
            }
        }
    }

    #[test]
    fn every_id_has_a_pg_within_range() {
        for count in [1, 3, 64, 4096] {
            assert_eq!(pg_of(&ChunkId([0; 32]), count), Some(PgId(0)));
            let last = pg_of(&ChunkId([255; 32]), count).expect("in range");
            assert_eq!(usize::from(last.0), count - 1);
        }
        assert_eq!(pg_of(&ChunkId([1; 32]), 0), None);
    }
}
