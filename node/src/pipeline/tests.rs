use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use outrider_disk::{DiskInfo, DiskKind, MaskedDisk, RangeSet};
use outrider_process::clock::{Clock, SystemClock};
use outrider_proto::ids::{CheckpointId, JobId, LeaseEpoch, PgId};
use outrider_proto::journal::{JournalEntry, JournalStart};
use outrider_proto::manifest::{DiskManifest, ImageFormat, Layer};
use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::fakes::{MemoryStore, sealer};
use crate::journal::Journal;
use crate::restore::{Reader, export_disk};

/// Longer than any test.
const LONG: Duration = Duration::from_secs(3600);
const CHUNK: u32 = 64 << 10;
const SECTOR: u64 = 512;

/// A disk in memory that counts what is read of it.
struct MemoryDisk {
    bytes: Vec<u8>,
    info: DiskInfo,
    read: AtomicU64,
}

impl MemoryDisk {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        let info = DiskInfo {
            kind: DiskKind::Dynamic,
            disk_id: Uuid::from_u128(1),
            ..DiskInfo::raw(bytes.len() as u64)
        };
        Arc::new(Self { bytes, info, read: AtomicU64::new(0) })
    }
}

impl ReadDisk for MemoryDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let at = usize::try_from(offset).expect("small");
        buf.copy_from_slice(&self.bytes[at..at + buf.len()]);
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }
    fn allocated(&self) -> Result<RangeSet, DiskError> {
        let chunk = CHUNK as usize;
        let used = self.bytes.chunks(chunk).enumerate().filter(|(_, c)| c.iter().any(|b| *b != 0));
        Ok(used
            .map(|(i, c)| outrider_disk::ByteRange::new((i * chunk) as u64, c.len() as u64))
            .collect())
    }
}

fn lease() -> Lease {
    let clock = Arc::new(SystemClock::new());
    let lease = Lease::granted(
        JobId::random(),
        LeaseEpoch(1),
        Duration::from_secs(3600),
        false,
        clock.clone(),
    );
    lease.renew(clock.monotonic());
    lease
}

fn bounds() -> Bounds {
    Bounds {
        read_size: 256 << 10,
        barrier_bytes: 1 << 20,
        barrier_interval: Duration::from_secs(5),
    }
}

fn pipeline(store: &MemoryStore, disk: &Arc<MemoryDisk>, plan: DiskPlan) -> Pipeline {
    over(store, disk.clone(), plan)
}

fn over(store: &MemoryStore, source: Arc<dyn ReadDisk>, plan: DiskPlan) -> Pipeline {
    bounded(store, source, plan, bounds())
}

fn bounded(
    store: &MemoryStore,
    source: Arc<dyn ReadDisk>,
    plan: DiskPlan,
    bounds: Bounds,
) -> Pipeline {
    Pipeline::new(
        Arc::new(store.clone()),
        sealer(),
        Pool::new(2, 4 << 20),
        lease(),
        Arc::new(Stats::default()),
        bounds,
        CHUNK,
        vec![DiskJob { source, plan }],
    )
}

async fn full(store: &MemoryStore, bytes: &[u8]) -> TreeRoot {
    let disk = MemoryDisk::new(bytes.to_vec());
    let plan = DiskPlan::full(disk.info.size, CHUNK, &disk.allocated().expect("in memory"));
    pipeline(store, &disk, plan).capture().await.expect("captures")[0]
}

async fn restored(store: &MemoryStore, root: TreeRoot, size: u64) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("restored.vhdx");
    let reader =
        Reader { store: Arc::new(store.clone()), sealer: sealer(), pool: Pool::new(2, 4 << 20) };
    let disk = DiskManifest {
        disk_id: outrider_proto::ids::DiskId::random(),
        slot: "0".into(),
        file_name: "restored.vhdx".into(),
        size,
        logical_sector: 512,
        physical_sector: 4096,
        block_size: 1 << 20,
        fixed: false,
        layers: vec![Layer { root_level: root.level, root: root.id }],
        excluded: vec![],
        format: ImageFormat::default(),
    };
    export_disk(&reader, &disk, CHUNK, &path).await.expect("restores");
    let chain = outrider_disk::DiskChain::open(&path).expect("opens");
    let mut bytes = vec![0; usize::try_from(size).expect("small")];
    chain.read_at(0, &mut bytes).expect("reads");
    bytes
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

/// Some writes: (sector, sectors, seed; seed 0 writes zeros).
fn writes() -> impl Strategy<Value = Vec<(u64, u64, u64)>> {
    prop::collection::vec((0u64..80_000, 1u64..600, 0u64..5), 0..12)
}

fn apply(bytes: &mut [u8], writes: &[(u64, u64, u64)]) -> RangeSet {
    let mut changed = RangeSet::new();
    for (sector, count, seed) in writes {
        let start = usize::try_from(sector * SECTOR).expect("small").min(bytes.len());
        let end = (start + usize::try_from(count * SECTOR).expect("small")).min(bytes.len());
        if start < end {
            let content = if *seed == 0 { vec![0; end - start] } else { noise(*seed, end - start) };
            bytes[start..end].copy_from_slice(&content);
            changed.insert(start as u64, (end - start) as u64);
        }
    }
    changed
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn an_incremental_gives_the_tree_of_a_full_rebuild_and_restores_to_the_exact_bytes(
        sectors in 1u64..70_000,
        first in writes(),
        second in writes(),
        third in writes(),
    ) {
        runtime().block_on(async {
            let size = sectors * SECTOR;
            let mut bytes = vec![0; usize::try_from(size).expect("small")];
            apply(&mut bytes, &first);
            let store = MemoryStore::new();
            let mut root = full(&store, &bytes).await;
            for writes in [second, third] {
                let changed = apply(&mut bytes, &writes);
                let disk = MemoryDisk::new(bytes.clone());
                let plan = DiskPlan::incremental(size, CHUNK, &changed, root.id);
                let wanted = plan.bytes_to_read();
                let p = pipeline(&store, &disk, plan);
                root = p.capture().await.expect("captures")[0];
                prop_assert_eq!(disk.read.load(Ordering::Relaxed), wanted, "it reads what changed and no more");
                prop_assert_eq!(root, full(&MemoryStore::new(), &bytes).await);
            }
            prop_assert!(restored(&store, root, size).await == bytes);
            Ok(())
        })?;
    }

    #[test]
    fn points_that_leave_different_ranges_out_are_exact_outside_of_them_and_zeros_within(
        sectors in 1u64..70_000,
        first in writes(),
        rounds in prop::collection::vec((writes(), writes()), 1..4),
    ) {
        runtime().block_on(async {
            let size = sectors * SECTOR;
            let mut bytes = vec![0; usize::try_from(size).expect("small")];
            apply(&mut bytes, &first);
            let store = MemoryStore::new();
            let mut root = full(&store, &bytes).await;
            let mut before = RangeSet::new();
            for (writes, left_out) in rounds {
                let changed = apply(&mut bytes, &writes);
                // The ranges of some writes, whatever they would have written.
                let now = apply(&mut bytes.clone(), &left_out);
                let mut expected = bytes.clone();
                for range in &now {
                    expected[range.start as usize..range.end() as usize].fill(0);
                }
                let disk: Arc<dyn ReadDisk> =
                    Arc::new(MaskedDisk::new(MemoryDisk::new(bytes.clone()), now.clone()));
                let look = plan::to_look_at(&changed, &before, &now);
                let plan = DiskPlan::incremental(size, CHUNK, &look, root.id);
                let mut tree =
                    ParentTree::new(Arc::new(store.clone()), sealer(), root.id, plan.root_level());
                let allocated = RangeSet::single(0, size);
                let sampled =
                    sample::compare(&disk, &plan, &allocated, &mut tree, &sealer(), &Pool::new(1, 1 << 20))
                        .await
                        .expect("compares");
                prop_assert_eq!(sampled.mismatch, None, "tracking is right, whatever is left out");
                let p = over(&store, disk, plan);
                root = p.capture().await.expect("captures")[0];
                prop_assert_eq!(root, full(&MemoryStore::new(), &expected).await);
                before = now;
            }
            Ok(())
        })?;
    }

    #[test]
    fn whatever_storage_loses_is_sent_again(
        sectors in 1u64..70_000,
        first in writes(),
        losses in prop::collection::vec(1usize..40, 0..6),
    ) {
        runtime().block_on(async {
            let size = sectors * SECTOR;
            let mut bytes = vec![0; usize::try_from(size).expect("small")];
            apply(&mut bytes, &first);
            let store = MemoryStore::new();
            for count in losses {
                store.lose_at_next_barrier(count);
            }
            let root = full(&store, &bytes).await;
            prop_assert!(restored(&store, root, size).await == bytes);
            Ok(())
        })?;
    }
}

#[tokio::test]
async fn zeros_are_neither_sent_nor_stored_and_equal_chunks_once() {
    let store = MemoryStore::new();
    let mut bytes = vec![0; 40 * CHUNK as usize];
    for at in [1, 7, 30] {
        bytes[at * CHUNK as usize..(at + 1) * CHUNK as usize].fill(b'x');
    }
    full(&store, &bytes).await;
    let (_, _, data) = store.puts();
    assert_eq!(data, 1);
}

#[tokio::test]
async fn an_adopted_leaf_is_neither_read_nor_sent_again() {
    let store = MemoryStore::new();
    let bytes = noise(4, 300 * CHUNK as usize);
    let disk = MemoryDisk::new(bytes.clone());
    let whole = RangeSet::single(0, disk.info.size);
    let plan = || DiskPlan::full(disk.info.size, CHUNK, &whole);
    let (job, checkpoint) = (JobId::random(), CheckpointId::random());
    let writer = |journal: &Journal, epoch| {
        let writer = JournalWriter::after(
            journal,
            Arc::new(store.clone()),
            sealer(),
            job,
            checkpoint,
            LeaseEpoch(epoch),
        );
        Arc::new(tokio::sync::Mutex::new(writer))
    };
    let start = JournalEntry::Start(JournalStart {
        checkpoint,
        chunk_size: CHUNK,
        taken_unix_ms: 0,
        consistency: "CRASH".into(),
        kind: 2,
        reasons: vec![],
        parent: None,
        disks: vec![],
        excluded: vec![],
    });
    let first = writer(&Journal::default(), 1);
    first.lock().await.append(&start).await.expect("journals");
    let root = pipeline(&store, &disk, plan())
        .with_journal(first.clone(), HashMap::new())
        .capture()
        .await
        .expect("captures");

    let journal = Journal::read(&store, &sealer(), job).await.expect("reads");
    let adopted = journal.of(checkpoint).expect("begun");
    assert_eq!(adopted.leaves.len(), 3);
    assert!(journal.of(CheckpointId::random()).is_none(), "another checkpoint: void");

    let (before, _, _) = store.puts();
    disk.read.store(0, Ordering::Relaxed);
    let second =
        pipeline(&store, &disk, plan()).with_journal(writer(&journal, 2), adopted.leaves.clone());
    assert_eq!(second.capture().await.expect("captures"), root);
    assert_eq!(disk.read.load(Ordering::Relaxed), 0, "nothing is read again");
    assert_eq!(store.puts().0, before, "nothing is sent again");
    let stats = second.stats().snapshot();
    assert_eq!((stats.adopted_pages, stats.reread_bytes, stats.resent_bytes), (3, 0, 0));

    // A leaf of which storage lost a chunk is done anew, and counted as done twice.
    let lost = sealer().chunk_id(&bytes[200 * CHUNK as usize..201 * CHUNK as usize]);
    store.forget(|r| r.id() == lost);
    let third = pipeline(&store, &disk, plan()).with_journal(writer(&journal, 3), adopted.leaves);
    assert_eq!(third.capture().await.expect("captures"), root);
    let stats = third.stats().snapshot();
    assert_eq!(stats.adopted_pages, 2);
    assert_eq!(stats.reread_bytes, u64::from(CHUNK) * 128);
    assert!(stats.resent_bytes > 0);
    assert!(store.holds(&lost));

    // The older lease is fenced by now.
    let stale = first.lock().await.append(&start).await.expect_err("fenced");
    assert!(stale.to_string().contains("fence"), "{stale}");
}

#[tokio::test]
async fn chunks_of_the_parent_that_storage_lost_are_read_from_the_source() {
    let store = MemoryStore::new();
    let mut bytes = noise(5, 700 * CHUNK as usize);
    let root = full(&store, &bytes).await;
    store.forget(|r| r.header().kind == Kind::Page && r.id() != root.id && r.id().0[0] % 2 == 0);
    let changed = apply(&mut bytes, &[(10, 4, 3)]);
    let disk = MemoryDisk::new(bytes.clone());
    let size = disk.info.size;
    let plan = DiskPlan::incremental(size, CHUNK, &changed, root.id);
    let captured = pipeline(&store, &disk, plan).capture().await;
    // The one leaf that is changed needs its parent page; if that very page is lost there is no incremental.
    match captured {
        Ok(root) => assert!(restored(&store, root[0], size).await == bytes),
        Err(e) => assert!(matches!(e, PipelineError::Store(StoreError::Missing { .. })), "{e}"),
    }
}

#[tokio::test]
async fn void_receipts_lead_to_the_same_tree() {
    let bytes = noise(6, 300 * CHUNK as usize);
    // With few barriers most of what was sent counts as just sent when its receipts become void.
    let few = Bounds { barrier_bytes: u64::MAX, barrier_interval: LONG, ..bounds() };
    for bounds in [bounds(), few] {
        let store = MemoryStore::new();
        let disk = MemoryDisk::new(bytes.clone());
        let plan = DiskPlan::full(disk.info.size, CHUNK, &RangeSet::single(0, disk.info.size));
        let pipeline = bounded(&store, disk.clone(), plan, bounds);
        let roots = pipeline.capture().await.expect("captures");
        // A node restarted: a third of everything is gone, small records included; then all pages, with the chunks below them.
        for lost in [
            |r: &Record| r.id().0[1].is_multiple_of(3),
            |r: &Record| r.header().kind == Kind::Page || r.id().0[1].is_multiple_of(2),
        ] {
            store.forget(lost);
            let all: Vec<PgId> = (0..16).map(PgId).collect();
            pipeline.recheck(&all).await.expect("asks again");
            assert_eq!(pipeline.capture().await.expect("captures"), roots);
            assert!(restored(&store, roots[0], disk.info.size).await == bytes);
        }
    }
}

#[tokio::test]
async fn a_change_that_tracking_missed_is_found_by_the_sample() {
    let store = MemoryStore::new();
    let mut bytes = noise(7, 16 * CHUNK as usize);
    let root = full(&store, &bytes).await;
    bytes[5 * CHUNK as usize] ^= 1;
    let disk = MemoryDisk::new(bytes);
    let plan = DiskPlan::incremental(disk.info.size, CHUNK, &RangeSet::new(), root.id);
    let mut tree = ParentTree::new(Arc::new(store.clone()), sealer(), root.id, plan.root_level());
    let allocated = disk.allocated().expect("in memory");
    let source: Arc<dyn ReadDisk> = disk;
    let found =
        sample::compare(&source, &plan, &allocated, &mut tree, &sealer(), &Pool::new(1, 1 << 20))
            .await
            .expect("compares");
    assert_eq!(found.mismatch, Some(5 * u64::from(CHUNK)));
}
