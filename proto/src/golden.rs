//! Bytes that must never change: `tests/golden/*.txt` holds one line a sample, name and hexadecimal bytes. Old peers and
//! old segments hold these very bytes; a difference needs a new format version beside the old one, never an edit here.
//!
//! A new file is made by running the test once with `OUTRIDER_GOLDEN=new`, which refuses to touch an existing one.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::ids::{
    CheckpointId, ChunkId, DiskId, DomainId, FabricId, JobId, KeyEpoch, LayoutEpoch, LeaseEpoch,
    NodeIncarnation, PgId, PointId, SessionId, VmGuid, VmIncarnation, VmKey, VmRole, Window,
    WriterId,
};
use crate::journal::{
    FileStamp, JournalClear, JournalDisk, JournalEntry, JournalLayer, JournalStart,
};
use crate::manifest::{
    CheckpointFacts, ClusterGroup, ConfigFile, DiskManifest, FormerDisk, FrozenLayer, Guardian,
    Image, ImageFormat, Layer, Machine, Manifest, Nic, SavedCheckpoint, Security, Switch, Tree,
};
use crate::page::Links;
use crate::receipt::{NamedReceipt, PgReceipt, Receipt};
use crate::record::{Kind, Record};
use crate::root::Root;
use crate::seal::{DomainKeys, Key32, Sealer};
use crate::ticket::{Operations, Ticket};

/// Compares samples with the golden file of this name.
pub(crate) fn compare(file: &str, samples: &[(String, Vec<u8>)]) {
    let path = format!("{}/tests/golden/{file}", env!("CARGO_MANIFEST_DIR"));
    let now: String =
        samples.iter().map(|(name, bytes)| format!("{name} {}\n", hex::encode(bytes))).collect();
    if std::env::var("OUTRIDER_GOLDEN").as_deref() == Ok("new") {
        assert!(!std::path::Path::new(&path).exists(), "{path} exists and is never rewritten");
        std::fs::write(&path, &now).expect("golden folder is writable");
    }
    let golden = std::fs::read_to_string(&path).expect("golden file is in the repository");
    for (now, golden) in now.lines().zip(golden.lines()) {
        assert_eq!(now, golden, "{file}: bytes changed, old data could not be read any more");
    }
    assert_eq!(
        now.lines().count(),
        golden.lines().count(),
        "{file}: samples were added or removed"
    );
}

fn sealer() -> Sealer {
    let keys = DomainKeys {
        domain: DomainId::from_bytes([9; 16]),
        id_key: Key32([1; 32]),
        data_keys: BTreeMap::from([(KeyEpoch(7), Key32([2; 32]))]),
        current: KeyEpoch(7),
    };
    Sealer::new(Arc::new(keys), WriterId([3; 16]))
}

fn manifest() -> Manifest {
    Manifest {
        point: PointId::from_bytes([1; 16]),
        job: JobId::from_bytes([2; 16]),
        vm: VmKey {
            realm: "cluster1".into(),
            guid: VmGuid::from_bytes([3; 16]),
            role: VmRole::Primary,
        },
        vm_name: "데이터베이스".into(),
        incarnation: VmIncarnation(4),
        checkpoint: CheckpointId::from_bytes([5; 16]),
        taken_unix_ms: 1_700_000_000_000,
        chunk_size: 256 << 10,
        consistency: "APPLICATION".into(),
        reasons: vec!["first backup".into()],
        tracking_unproven: true,
        config: vec![ConfigFile {
            name: "vm.vmcx".into(),
            size: 100,
            chunks: vec![ChunkId([6; 32])],
        }],
        disks: vec![DiskManifest {
            disk_id: DiskId::from_bytes([7; 16]),
            slot: "0/0".into(),
            file_name: "os.vhdx".into(),
            size: (1 << 30) + 512,
            logical_sector: 512,
            physical_sector: 4096,
            block_size: 32 << 20,
            fixed: false,
            layers: vec![Layer { root_level: 2, root: ChunkId([8; 32]) }],
            excluded: vec![(4096, 8192)],
            format: ImageFormat::default(),
        }],
        machine: Machine::default(),
        tree: Tree::default(),
    }
}

/// A manifest with everything that version 2 added.
fn manifest_with_sections() -> Manifest {
    let mut manifest = manifest();
    let checkpoint = CheckpointId::from_bytes([9; 16]);
    manifest.machine = Machine {
        host: "hv1".into(),
        version: "10.0".into(),
        generation: 2,
        saved_state: true,
        nics: vec![Nic {
            slot: "nic".into(),
            name: "Network Adapter".into(),
            mac: "00155D012345".into(),
            static_mac: true,
            switch: Some(Switch { id: "id".into(), name: "LAN".into() }),
        }],
        images: vec![Image { slot: "0/1".into(), path: "C:\\iso\\setup.iso".into() }],
        security: Some(Security {
            tpm: true,
            shielded: false,
            key_protector: vec![1, 2, 3],
            guardians: vec![Guardian {
                name: "UntrustedGuardian".into(),
                signing: "AA".into(),
                encryption: "BB".into(),
                private_keys: true,
            }],
        }),
        group: Some(ClusterGroup {
            name: "db".into(),
            priority: 3000,
            failover_threshold: 1,
            failover_period: 6,
            auto_failback: 1,
            failback_start: Some(1),
            failback_end: None,
            persistent: true,
            anti_affinity: vec!["db".into()],
            preferred_owners: vec!["hv1".into(), "hv2".into()],
        }),
    };
    manifest.tree = Tree {
        checkpoints: vec![SavedCheckpoint {
            id: checkpoint,
            parent: None,
            name: "before the upgrade".into(),
            config: vec![ConfigFile {
                name: "cp.vmcx".into(),
                size: 9,
                chunks: vec![ChunkId([10; 32])],
            }],
            facts: CheckpointFacts::default(),
        }],
        current: Some(checkpoint),
        layers: vec![vec![FrozenLayer {
            checkpoint,
            file_name: "os.vhdx".into(),
            written: vec![uuid::Uuid::from_bytes([11; 16])],
        }]],
        former: vec![],
    };
    manifest.disks[0].layers.insert(0, Layer { root_level: 2, root: ChunkId([12; 32]) });
    manifest
}

/// A manifest with a branched checkpoint tree, its facts, and a disk that only a checkpoint has.
fn manifest_with_tree() -> Manifest {
    let mut manifest = manifest_with_sections();
    let first = manifest.tree.checkpoints[0].id;
    let branch = CheckpointId::from_bytes([13; 16]);
    manifest.tree.checkpoints[0].facts = CheckpointFacts {
        notes: "데이터".into(),
        created_unix_ms: 1_600_000_000_000,
        saved_state: true,
        automatic: false,
        security: manifest.machine.security.clone(),
    };
    manifest.tree.checkpoints.push(SavedCheckpoint {
        id: branch,
        parent: Some(first),
        name: "branch".into(),
        config: vec![],
        facts: CheckpointFacts::default(),
    });
    let layer = |checkpoint, name: &str| FrozenLayer {
        checkpoint,
        file_name: name.into(),
        written: vec![uuid::Uuid::from_bytes([14; 16]), uuid::Uuid::from_bytes([11; 16])],
    };
    manifest.tree.layers[0].push(layer(branch, "os_1.avhdx"));
    manifest.disks[0].layers.insert(1, Layer { root_level: 2, root: ChunkId([15; 32]) });
    manifest.tree.former.push(FormerDisk {
        disk: DiskManifest {
            slot: "0/5".into(),
            file_name: "old.vhd".into(),
            layers: vec![Layer { root_level: 2, root: ChunkId([16; 32]) }],
            excluded: vec![],
            format: ImageFormat::Vhd,
            ..manifest.disks[0].clone()
        },
        layers: vec![layer(branch, "old.vhd")],
    });
    manifest
}

fn journal() -> (JournalClear, JournalEntry) {
    let clear = JournalClear {
        sequence: 1,
        job: JobId::from_bytes([2; 16]),
        checkpoint: CheckpointId::from_bytes([5; 16]),
        lease_epoch: LeaseEpoch(6),
    };
    let entry = JournalEntry::Start(JournalStart {
        checkpoint: clear.checkpoint,
        chunk_size: 256 << 10,
        taken_unix_ms: 1_700_000_000_000,
        consistency: "CRASH".into(),
        kind: 1,
        reasons: vec!["asked".into()],
        parent: Some((PointId::from_bytes([1; 16]), ChunkId([4; 32]))),
        disks: vec![JournalDisk {
            disk_id: DiskId::from_bytes([7; 16]),
            size: 1 << 30,
            to_read: vec![(0, 65536), (1 << 20, 4096)],
            incremental: true,
        }],
        excluded: vec![],
    });
    (clear, entry)
}

#[test]
fn golden_records_open_to_the_same_bytes_for_ever() {
    let sealer = sealer();
    let seal = |kind, clear: &[u8], plain: &[u8]| {
        let id = sealer.id_of(kind, clear, plain);
        sealer.seal_with_nonce(kind, id, clear, plain, [4; 12]).expect("seals").bytes().to_vec()
    };
    let page = Links::Page { level: 1, children: vec![ChunkId([5; 32]), ChunkId::HOLE] }.encode();
    let manifest = manifest();
    let mut body = 1u16.to_le_bytes().to_vec();
    body.extend(postcard::to_stdvec(&manifest).expect("encodes"));
    let (journal_clear, journal_entry) = journal();
    let mut journal_body = 1u16.to_le_bytes().to_vec();
    journal_body.extend(postcard::to_stdvec(&journal_entry).expect("encodes"));
    let samples = vec![
        ("data-stored".to_owned(), seal(Kind::Data, b"", b"short plain bytes")),
        ("page".to_owned(), seal(Kind::Page, &page, b"")),
        ("manifest".to_owned(), seal(Kind::Page, &manifest.links().encode(), &body)),
        ("journal".to_owned(), seal(Kind::Journal, &journal_clear.encode(), &journal_body)),
    ];
    compare("records-v1.txt", &samples);

    let open = |at: usize| Record::decode(Bytes::from(samples[at].1.clone())).expect("decodes");
    assert_eq!(sealer.open(&open(0)).expect("opens"), b"short plain bytes");
    assert_eq!(Manifest::open(&sealer, &open(2)).expect("opens"), manifest);
    assert_eq!(
        JournalEntry::open(&sealer, &open(3)).expect("opens"),
        (journal_clear, journal_entry)
    );
}

#[test]
fn golden_manifests_of_version_2_open_to_the_same_bytes_for_ever() {
    let sealer = sealer();
    let samples: Vec<(String, Vec<u8>)> =
        [("manifest-plain", manifest()), ("manifest-sections", manifest_with_sections())]
            .map(|(name, manifest)| {
                let sealed = manifest.seal(&sealer).expect("seals");
                let body = sealer.open(&sealed).expect("opens");
                assert_eq!(Manifest::open(&sealer, &sealed).expect("opens"), manifest);
                (name.to_owned(), body)
            })
            .to_vec();
    compare("manifests-v2.txt", &samples);
}

#[test]
fn golden_manifests_of_other_disk_formats_open_to_the_same_bytes_for_ever() {
    let sealer = sealer();
    let mut manifest = manifest();
    manifest.disks.push(DiskManifest { format: ImageFormat::Raw, ..manifest.disks[0].clone() });
    manifest.disks[0].format = ImageFormat::Vhd;
    let sealed = manifest.seal(&sealer).expect("seals");
    assert_eq!(Manifest::open(&sealer, &sealed).expect("opens"), manifest);
    let body = sealer.open(&sealed).expect("opens");
    compare("manifests-v2-formats.txt", &[("manifest-formats".to_owned(), body)]);
}

#[test]
fn golden_manifests_with_checkpoint_trees_open_to_the_same_bytes_for_ever() {
    let sealer = sealer();
    let with_former = manifest_with_tree();
    let mut without = with_former.clone();
    without.tree.former.clear();
    let samples = [("manifest-tree", without), ("manifest-tree-former", with_former)];
    let samples: Vec<(String, Vec<u8>)> = samples
        .map(|(name, manifest)| {
            let sealed = manifest.seal(&sealer).expect("seals");
            assert_eq!(Manifest::open(&sealer, &sealed).expect("opens"), manifest);
            (name.to_owned(), sealer.open(&sealed).expect("opens"))
        })
        .to_vec();
    assert_eq!((samples[0].1[0], samples[1].1[0]), (2, 3), "older releases read what they can");
    compare("manifests-v3-trees.txt", &samples);
}

#[test]
fn a_point_shows_itself_as_of_a_checkpoint() {
    let manifest = manifest_with_tree();
    let tree = &manifest.tree;
    assert_eq!(tree.parent_of(&tree.layers[0], 1), Some(0), "the branch follows the first");
    assert_eq!(tree.layer_at(&tree.former[0].layers, tree.current), None, "it has no such disk");
    let first = manifest.at("before the upgrade").expect("it is held");
    assert_eq!(first.disks.len(), 1);
    assert_eq!(first.disks[0].layers, [Layer { root_level: 2, root: ChunkId([12; 32]) }]);
    assert_eq!(first.config[0].name, "cp.vmcx");
    assert!(first.machine.saved_state && first.machine.security.is_some());
    let branch = manifest.at(&tree.checkpoints[1].id.to_string()).expect("by its GUID");
    let names: Vec<_> = branch.disks.iter().map(|d| d.file_name.as_str()).collect();
    assert_eq!(names, ["os.vhdx", "old.vhd"]);
    assert!(!branch.machine.saved_state && branch.machine.security.is_none());
    let unknown = manifest.at("nothing").expect_err("no such checkpoint").to_string();
    assert!(unknown.contains("before the upgrade") && unknown.contains("branch"), "{unknown}");
    let mut twins = manifest.clone();
    twins.tree.checkpoints[1].name = "before the upgrade".into();
    twins.at("before the upgrade").expect_err("which one?");
}

#[test]
fn trees_that_do_not_fit_their_disks_are_refused() {
    let sealer = sealer();
    type Spoil = fn(&mut Manifest);
    let odd: [(&str, Spoil); 5] = [
        ("two layers of one checkpoint", |m| {
            m.tree.layers[0][1].checkpoint = m.tree.layers[0][0].checkpoint;
        }),
        ("a former disk without its layer", |m| m.tree.former[0].layers.clear()),
        ("a former disk of no checkpoint", |m| {
            m.tree.former[0].layers[0].checkpoint = CheckpointId::from_bytes([99; 16]);
        }),
        ("a former disk's tree of another height", |m| {
            m.tree.former[0].disk.layers[0].root_level = 1;
        }),
        ("a child before its parent", |m| m.tree.checkpoints.swap(0, 1)),
    ];
    for (what, spoil) in odd {
        let mut manifest = manifest_with_tree();
        spoil(&mut manifest);
        let sealed = manifest.seal(&sealer).expect("seals");
        assert!(Manifest::open(&sealer, &sealed).is_err(), "{what}");
    }
}

#[test]
fn formats_that_are_unknown_or_of_too_many_disks_are_refused() {
    let sealer = sealer();
    let manifest = manifest();
    for formats in [vec![9_u8], vec![0, 0]] {
        let clear = manifest.links().encode();
        let mut body = 2u16.to_le_bytes().to_vec();
        body.extend(postcard::to_stdvec(&manifest).expect("encodes"));
        let section = postcard::to_stdvec(&formats).expect("encodes");
        body.extend(postcard::to_stdvec(&[(3_u16, section)].as_slice()).expect("encodes"));
        let id = sealer.id_of(Kind::Page, &clear, &body);
        let sealed = sealer.seal(Kind::Page, id, &clear, &body).expect("seals");
        Manifest::open(&sealer, &sealed).expect_err("formats that do not fit");
    }
}

#[test]
fn sections_of_a_later_release_are_skipped_and_a_tree_that_does_not_fit_is_refused() {
    let sealer = sealer();
    let seal = |manifest: &Manifest, sections: &[(u16, Vec<u8>)]| {
        let clear = manifest.links().encode();
        let mut body = 2u16.to_le_bytes().to_vec();
        body.extend(postcard::to_stdvec(manifest).expect("encodes"));
        body.extend(postcard::to_stdvec(sections).expect("encodes"));
        let id = sealer.id_of(Kind::Page, &clear, &body);
        sealer.seal(Kind::Page, id, &clear, &body).expect("seals")
    };
    let plain = manifest();
    let later = seal(&plain, &[(999, vec![1, 2, 3])]);
    assert_eq!(Manifest::open(&sealer, &later).expect("opens"), plain);
    let mut odd = manifest_with_sections();
    odd.tree.layers[0].clear();
    let tree = postcard::to_stdvec(&odd.tree).expect("encodes");
    Manifest::open(&sealer, &seal(&odd, &[(2, tree)])).expect_err("a layer too many");
}

#[test]
fn golden_journals_with_excluded_ranges_open_to_the_same_bytes_for_ever() {
    let sealer = sealer();
    let (clear, mut entry) = journal();
    if let JournalEntry::Start(start) = &mut entry {
        start.excluded = vec![vec![(4096, 1 << 20), (3 << 20, 512)]];
    }
    let sealed = entry.seal(&sealer, &clear).expect("seals");
    let body = sealer.open(&sealed).expect("opens");
    assert_eq!(JournalEntry::open(&sealer, &sealed).expect("opens"), (clear, entry.clone()));
    compare("journal-v2.txt", &[("journal-excluded".to_owned(), body)]);

    // One list a disk, no more and no less.
    if let JournalEntry::Start(start) = &mut entry {
        start.excluded.push(vec![]);
    }
    let odd = entry.seal(&sealer, &clear).expect("seals");
    JournalEntry::open(&sealer, &odd).expect_err("two lists for one disk");
}

#[test]
fn golden_journals_with_layers_open_to_the_same_bytes_for_ever() {
    let sealer = sealer();
    let (clear, _) = journal();
    let stamp = |n: u8| FileStamp {
        name: format!("os_{n}.avhdx"),
        written: uuid::Uuid::from_bytes([n; 16]),
        sequence: 300,
    };
    let entry = JournalEntry::Layers(vec![JournalLayer {
        checkpoint: CheckpointId::from_bytes([9; 16]),
        disk_id: DiskId::from_bytes([7; 16]),
        slot: "0/0".into(),
        size: 1 << 30,
        files: vec![stamp(2), stamp(1)],
    }]);
    let sealed = entry.seal(&sealer, &clear).expect("seals");
    let body = sealer.open(&sealed).expect("opens");
    assert_eq!(JournalEntry::open(&sealer, &sealed).expect("opens"), (clear, entry));
    compare("journal-v3.txt", &[("journal-layers".to_owned(), body)]);
}

#[test]
fn golden_roots_tickets_and_receipts_never_change() {
    let key = ring::signature::Ed25519KeyPair::from_seed_unchecked(&[7; 32]).expect("32 bytes");
    let root = Root {
        point: PointId::from_bytes([1; 16]),
        job: JobId::from_bytes([2; 16]),
        vm_hash: [3; 32],
        vm_guid: VmGuid::from_bytes([4; 16]),
        incarnation: VmIncarnation(5),
        manifest: ChunkId([6; 32]),
        taken_unix_ms: 7,
        lock_until_unix_ms: 8,
        lease_epoch: LeaseEpoch(9),
    };
    let ticket = Ticket {
        operations: Operations::BACKUP,
        fabric: FabricId::from_bytes([1; 16]),
        job: JobId::from_bytes([2; 16]),
        vm: VmGuid::from_bytes([3; 16]),
        domain: DomainId::from_bytes([4; 16]),
        lease_epoch: LeaseEpoch(5),
        not_after_unix_ms: 6,
        host: "hv1".into(),
    };
    let receipt = Receipt {
        fabric: FabricId::from_bytes([1; 16]),
        job: JobId::from_bytes([2; 16]),
        session: SessionId::from_bytes([3; 16]),
        window: Window(4),
        node: "s1".into(),
        incarnation: NodeIncarnation(5),
        layout_epoch: LayoutEpoch(6),
        pgs: vec![PgReceipt { pg: PgId(7), puts_through: 8, haves: 9 }],
    };
    let named = NamedReceipt {
        fabric: FabricId::from_bytes([1; 16]),
        node: "s1".into(),
        incarnation: NodeIncarnation(5),
        space: 1,
        key: vec![2; 16],
        id: ChunkId([3; 32]),
    };
    compare(
        "signed-v1.txt",
        &[
            ("root-clear".to_owned(), root.encode()),
            ("ticket".to_owned(), ticket.sign(&key)),
            ("receipt".to_owned(), receipt.sign(&key)),
            ("named-receipt".to_owned(), named.sign(&key)),
        ],
    );
}
