//! Each way in which a commit may lack durability.

use outrider_proto::ids::{LayoutEpoch, VmGuid};
use outrider_proto::layout::StorageNode;
use outrider_proto::receipt::PgReceipt;
use ring::signature::{Ed25519KeyPair, KeyPair};

use super::*;

const PGS: usize = 4;
/// First byte 0x00: PG 0 of 4.
const MANIFEST: ChunkId = ChunkId([0; 32]);

fn pair(seed: u8) -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).expect("a seed of 32 bytes")
}

/// Four nodes; PG n is kept by all but node n.
fn layout() -> Layout {
    let nodes = (1..=4u8)
        .map(|n| StorageNode {
            name: format!("s{n}"),
            addresses: vec![],
            zone: String::new(),
            capacity_bytes: 1,
            receipt_key: pair(n).public_key().as_ref().to_vec(),
            incarnation: NodeIncarnation(7),
            online: false,
        })
        .collect();
    let pgs = (0..PGS as u16).map(|pg| (0..4u16).filter(|n| *n != pg).collect()).collect();
    Layout { epoch: LayoutEpoch(2), replicas: 3, min_durable: 2, nodes, pgs }
}

#[derive(Clone)]
struct Case {
    fabric: FabricId,
    job: JobId,
    point: PointId,
    session: SessionId,
    claims: Vec<(PgId, u32, u32)>,
    receipts: Vec<Vec<u8>>,
    roots: Vec<Vec<u8>>,
}

impl Case {
    /// PG 0 has 3 puts (with the manifest), PG 1 has 2 ids that storage had.
    fn new() -> Self {
        Self {
            fabric: FabricId::random(),
            job: JobId::random(),
            point: PointId::random(),
            session: SessionId::random(),
            claims: vec![(PgId(0), 3, 0), (PgId(1), 0, 2)],
            receipts: Vec::new(),
            roots: Vec::new(),
        }
    }

    fn receipt(&self, node: u8) -> Receipt {
        Receipt {
            fabric: self.fabric,
            job: self.job,
            session: self.session,
            window: Window(1),
            node: format!("s{node}"),
            incarnation: NodeIncarnation(7),
            layout_epoch: LayoutEpoch(2),
            pgs: vec![
                PgReceipt { pg: PgId(0), puts_through: 3, haves: 0 },
                PgReceipt { pg: PgId(1), puts_through: 0, haves: 2 },
            ],
        }
    }

    fn root(&self, node: u8) -> NamedReceipt {
        NamedReceipt {
            fabric: self.fabric,
            node: format!("s{node}"),
            incarnation: NodeIncarnation(7),
            space: Space::Root as u8,
            key: self.point.to_bytes().to_vec(),
            id: ChunkId([5; 32]),
        }
    }

    /// Nodes 2, 3 and 4 keep PG 0; all but node 2 keep PG 1.
    fn good() -> Self {
        let mut case = Self::new();
        for node in [3, 4] {
            case.receipts.push(case.receipt(node).sign(&pair(node)));
            case.roots.push(case.root(node).sign(&pair(node)));
        }
        case
    }

    /// As good, with node 4's receipt changed before it was signed.
    fn changed(change: impl FnOnce(&mut Receipt)) -> Self {
        let mut case = Self::good();
        let mut receipt = case.receipt(4);
        change(&mut receipt);
        case.receipts[1] = receipt.sign(&pair(4));
        case
    }

    fn changed_root(change: impl FnOnce(&mut NamedReceipt)) -> Self {
        let mut case = Self::good();
        let mut root = case.root(4);
        change(&mut root);
        case.roots[1] = root.sign(&pair(4));
        case
    }

    fn verify(&self) -> Result<Witnesses, Lacking> {
        self.verify_with(&layout())
    }

    fn verify_with(&self, layout: &Layout) -> Result<Witnesses, Lacking> {
        let windows = [WindowClaim {
            session: self.session,
            window: Window(1),
            pgs: self.claims.clone(),
            receipts: self.receipts.clone(),
        }];
        let evidence = Evidence {
            fabric: self.fabric,
            job: self.job,
            point: self.point,
            manifest: MANIFEST,
            windows: &windows,
            roots: &self.roots,
        };
        verify(&evidence, layout)
    }
}

fn pgs(numbers: &[u16]) -> Result<Witnesses, Lacking> {
    Err(Lacking::Pgs(numbers.iter().map(|n| PgId(*n)).collect()))
}

#[test]
fn enough_current_receipts_are_taken_and_their_nodes_are_witnesses() {
    let witnesses = Case::good().verify().expect("complete");
    let names: Vec<_> = witnesses.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["s3", "s4"]);
}

#[test]
fn a_third_and_useless_receipt_does_no_harm() {
    let mut case = Case::good();
    case.receipts.push(vec![1, 2, 3]);
    case.receipts.push(Vec::new());
    case.roots.push(vec![0; 200]);
    assert!(case.verify().is_ok());
}

#[test]
fn a_forged_receipt_does_not_count() {
    let mut case = Case::good();
    case.receipts[1] = case.receipt(4).sign(&pair(9));
    assert_eq!(case.verify(), pgs(&[0]));
    let mut case = Case::good();
    let at = case.receipts[1].len() / 2;
    case.receipts[1][at] ^= 1;
    assert_eq!(case.verify(), pgs(&[0]));
}

#[test]
fn a_receipt_for_anything_else_does_not_count() {
    type Change = fn(&mut Receipt);
    let table: [(&str, Change); 7] = [
        ("another life of the node", |r| r.incarnation = NodeIncarnation(6)),
        ("another layout", |r| r.layout_epoch = LayoutEpoch(1)),
        ("another fabric", |r| r.fabric = FabricId::random()),
        ("another job", |r| r.job = JobId::random()),
        ("another session", |r| r.session = SessionId::random()),
        ("another window", |r| r.window = Window(2)),
        ("fewer puts", |r| r.pgs[0].puts_through = 2),
    ];
    for (what, change) in table {
        assert_eq!(Case::changed(change).verify(), pgs(&[0]), "{what}");
    }
}

#[test]
fn a_node_that_does_not_keep_the_pg_does_not_count() {
    let mut case = Case::good();
    // Node 1 keeps every PG but 0.
    case.receipts[1] = case.receipt(1).sign(&pair(1));
    assert_eq!(case.verify(), pgs(&[0]));
}

#[test]
fn one_node_that_speaks_twice_is_one_node() {
    let mut case = Case::good();
    case.receipts[1] = case.receipts[0].clone();
    assert_eq!(case.verify(), pgs(&[0]));
}

#[test]
fn one_node_vouches_for_ids_that_storage_had() {
    let mut case = Case::good();
    case.claims = vec![(PgId(0), 0, 2)];
    let mut receipt = case.receipt(3);
    receipt.pgs = vec![PgReceipt { pg: PgId(0), puts_through: 0, haves: 2 }];
    case.receipts = vec![receipt.sign(&pair(3))];
    assert!(case.verify().is_ok());
    case.claims = vec![(PgId(0), 0, 3)];
    assert_eq!(case.verify(), pgs(&[0]), "it confirmed fewer");
    let mut foreign = case.receipt(1);
    foreign.pgs = vec![PgReceipt { pg: PgId(0), puts_through: 0, haves: 3 }];
    case.receipts = vec![foreign.sign(&pair(1))];
    assert_eq!(case.verify(), pgs(&[0]), "it does not keep the PG");
}

#[test]
fn every_claimed_pg_needs_receipts() {
    let mut case = Case::good();
    case.claims.push((PgId(2), 1, 0));
    case.claims.push((PgId(99), 1, 0));
    assert_eq!(case.verify(), pgs(&[2, 99]));
}

#[test]
fn a_commit_that_stored_no_manifest_is_refused() {
    let mut case = Case::good();
    case.claims = vec![(PgId(1), 0, 2)];
    assert_eq!(case.verify(), pgs(&[0]));
    case.claims = vec![(PgId(0), 0, 0), (PgId(1), 0, 2)];
    assert_eq!(case.verify(), pgs(&[0]), "a claim of nothing");
    case.claims.clear();
    case.receipts.clear();
    assert_eq!(case.verify(), pgs(&[0]), "no window at all");
}

#[test]
fn a_layout_that_moved_on_voids_all() {
    let mut now = layout();
    now.epoch = LayoutEpoch(3);
    assert_eq!(Case::good().verify_with(&now), pgs(&[0, 1]));
    assert_eq!(Case::good().verify_with(&Layout::default()), Err(Lacking::NoLayout));
}

#[test]
fn the_root_needs_enough_current_nodes() {
    type Change = fn(&mut NamedReceipt);
    let table: [(&str, Change); 5] = [
        ("another life", |r| r.incarnation = NodeIncarnation(1)),
        ("another fabric", |r| r.fabric = FabricId::random()),
        ("another space", |r| r.space = Space::Journal as u8),
        ("another point", |r| r.key = VmGuid::random().to_bytes().to_vec()),
        ("another record", |r| r.id = ChunkId([6; 32])),
    ];
    for (what, change) in table {
        let lacking = Case::changed_root(change).verify();
        assert_eq!(lacking, Err(Lacking::Root { found: 1, needed: 2 }), "{what}");
    }
    let mut case = Case::good();
    case.roots[1] = case.root(4).sign(&pair(3));
    assert_eq!(case.verify(), Err(Lacking::Root { found: 1, needed: 2 }), "forged");
    case.roots[1] = case.roots[0].clone();
    assert_eq!(case.verify(), Err(Lacking::Root { found: 1, needed: 2 }), "twice the same");
    case.roots.clear();
    assert_eq!(case.verify(), Err(Lacking::Root { found: 0, needed: 2 }), "none");
}
