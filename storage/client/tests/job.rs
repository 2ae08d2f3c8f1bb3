//! A job's store over a storage tier in memory: receipts, losses, reads.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use outrider_proto::frame::{Presence, Space};
use outrider_proto::ids::{ChunkId, DomainId, JobId, KeyEpoch, LeaseEpoch, WriterId};
use outrider_proto::record::{Kind, Record};
use outrider_proto::seal::{DomainKeys, Key32, Sealer};
use outrider_storage_client::memory::{MemoryTier, MemoryTransport};
use outrider_storage_client::{BarrierError, JobAccess, JobStore, Limits, StoreClient, StoreError};
use tokio::sync::watch;

fn sealer() -> Sealer {
    let keys = DomainKeys {
        domain: DomainId::from_bytes([1; 16]),
        id_key: Key32([2; 32]),
        data_keys: BTreeMap::from([(KeyEpoch(1), Key32([3; 32]))]),
        current: KeyEpoch(1),
    };
    Sealer::new(Arc::new(keys), WriterId([4; 16]))
}

fn record(n: u32) -> Record {
    let sealer = sealer();
    let plain = n.to_le_bytes().repeat(200);
    sealer.seal(Kind::Data, sealer.chunk_id(&plain), &[], &plain).expect("sealed")
}

struct Fixture {
    tier: Arc<MemoryTier>,
    client: StoreClient,
    _layout: watch::Sender<outrider_proto::layout::Layout>,
}

fn fixture(nodes: usize, replicas: u8, min_durable: u8) -> (Fixture, JobStore) {
    let tier = MemoryTier::new(nodes, 16, replicas, min_durable);
    let (sender, layout) = watch::channel(tier.layout());
    let limits = Limits {
        first_pause: Duration::from_millis(1),
        longest_pause: Duration::from_millis(4),
        laggards: Duration::from_millis(1),
        barrier_attempts: 2,
        ..Limits::default()
    };
    let client = StoreClient::over(Arc::new(MemoryTransport(Arc::clone(&tier))), layout, limits);
    let store = client.open_job(JobAccess {
        job: JobId::random(),
        ticket: Bytes::new(),
        lease_epoch: LeaseEpoch(1),
    });
    (Fixture { tier, client, _layout: sender }, store)
}

async fn put_all(store: &JobStore, numbers: std::ops::Range<u32>) -> Vec<ChunkId> {
    let mut ids = Vec::new();
    for n in numbers {
        let record = record(n);
        ids.push(record.id());
        store.put(record).await.expect("taken");
    }
    ids
}

fn claimed(store: &JobStore) -> (u32, u32) {
    let claims = store.claims();
    let puts = claims.iter().flat_map(|c| &c.puts).sum();
    let haves = claims.iter().flat_map(|c| &c.haves).sum();
    (puts, haves)
}

#[tokio::test]
async fn a_closed_window_is_claimed_with_receipts_and_can_be_read() {
    let (fixture, store) = fixture(3, 3, 2);
    let ids = put_all(&store, 0..100).await;
    assert!(store.claims().is_empty(), "nothing is claimed before its barrier");
    store.barrier().await.expect("durable");
    assert_eq!(claimed(&store), (100, 0));
    assert!(store.claims().iter().all(|c| c.receipt.len() >= 2));
    assert!(ids.iter().all(|&id| fixture.tier.copies(id) == 3));
    let read = store.get(&ids).await.expect("read");
    assert!(read.iter().zip(&ids).all(|(r, id)| r.id() == *id));
    assert_eq!(store.have(&ids).await.expect("asked"), vec![Presence::Yes; 100]);
    store.barrier().await.expect("durable");
    assert_eq!(claimed(&store), (100, 100), "what was found present is claimed, too");
    fixture.client.shutdown(Duration::from_secs(5)).await;
}

#[tokio::test]
async fn after_a_restart_only_what_is_missing_has_to_be_sent_again() {
    let (fixture, store) = fixture(1, 1, 1);
    let kept = put_all(&store, 0..20).await;
    store.barrier().await.expect("durable");
    let again = put_all(&store, 10..40).await;
    // What is in line arrives before the node is killed: the numbers below are exact.
    while fixture.tier.records() < 20 {
        tokio::task::yield_now().await;
    }
    fixture.tier.restart("s1");
    let Err(BarrierError::Lost { mut ids, .. }) = store.barrier().await else {
        panic!("a void window must not be durable")
    };
    ids.sort();
    let mut missing: Vec<_> = again.iter().copied().filter(|id| !kept.contains(id)).collect();
    missing.sort();
    assert_eq!(ids, missing);
    put_all(&store, 20..40).await;
    store.barrier().await.expect("durable");
    assert_eq!(claimed(&store), (20 + 20, 10), "asked again: found or put, each claimed once");
}

#[tokio::test]
async fn a_stopped_replica_is_passed_over_and_the_barrier_holds_at_min_durable() {
    let (fixture, store) = fixture(3, 3, 2);
    fixture.tier.stop("s2");
    let ids = put_all(&store, 0..50).await;
    store.barrier().await.expect("two of three are enough");
    assert!(ids.iter().all(|&id| fixture.tier.copies(id) == 2));
    assert_eq!(store.get(&ids).await.expect("read").len(), 50);
}

#[tokio::test]
async fn with_too_few_replicas_nothing_is_claimed_and_nothing_is_forgotten() {
    let (fixture, store) = fixture(3, 3, 2);
    fixture.tier.stop("s2");
    fixture.tier.stop("s3");
    let ids = put_all(&store, 0..10).await;
    let Err(BarrierError::Lost { ids: lost, .. }) = store.barrier().await else {
        panic!("one copy is not durable")
    };
    assert_eq!(lost.len(), ids.len());
    assert!(store.claims().is_empty());
    fixture.tier.stop("s1");
    assert!(matches!(store.have(&ids).await, Err(StoreError::NoReplica { .. })));
    assert!(matches!(store.put(record(1)).await, Err(StoreError::NoReplica { .. })));
}

#[tokio::test]
async fn a_suspect_survives_until_somebody_can_be_asked() {
    let (fixture, store) = fixture(1, 1, 1);
    let ids = put_all(&store, 0..5).await;
    fixture.tier.stop("s1");
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    assert!(matches!(store.barrier().await, Err(BarrierError::Store(_))));
    fixture.tier.restart("s1");
    loop {
        match store.barrier().await {
            Err(BarrierError::Lost { ids: lost, .. }) => {
                assert_eq!(lost.len(), ids.len());
                break;
            }
            Err(BarrierError::Store(_)) => assert!(tokio::time::Instant::now() < deadline),
            Ok(()) => panic!("the ids of a failed window were forgotten"),
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_dropped_barrier_leaves_its_window_suspect() {
    let (_fixture, store) = fixture(3, 3, 2);
    let ids = put_all(&store, 0..5).await;
    {
        let barrier = store.barrier();
        futures::pin_mut!(barrier);
        // Polled once: the window is closed, its puts are still on their way.
        assert!(futures::poll!(&mut barrier).is_pending());
    }
    match store.barrier().await {
        Ok(()) => {}
        Err(BarrierError::Lost { ids: lost, .. }) => {
            for n in 0..5 {
                if lost.contains(&record(n).id()) {
                    store.put(record(n)).await.expect("taken");
                }
            }
            store.barrier().await.expect("durable");
        }
        Err(error) => panic!("{error}"),
    }
    let (puts, haves) = claimed(&store);
    assert_eq!((puts + haves) as usize, ids.len(), "every id is claimed once");
}

#[tokio::test]
async fn a_lost_copy_is_read_from_another_replica() {
    let (fixture, store) = fixture(3, 3, 2);
    let ids = put_all(&store, 0..10).await;
    store.barrier().await.expect("durable");
    for id in &ids {
        fixture.tier.lose("s1", *id);
        fixture.tier.lose("s2", *id);
    }
    assert_eq!(store.get(&ids).await.expect("the third has it").len(), 10);
    fixture.tier.lose("s3", ids[3]);
    assert!(matches!(store.get(&ids).await, Err(StoreError::Missing { id, .. }) if id == ids[3]));
}

#[tokio::test]
async fn a_stale_fence_is_refused_and_the_newest_entry_is_listed() {
    let (fixture, store) = fixture(3, 3, 2);
    let key = |n: u8| [[7; 16].as_slice(), &[0, 0, 0, n]].concat();
    let receipts =
        store.put_named(Space::Journal, key(1), 5, record(1)).await.expect("kept on enough");
    assert!(receipts.len() >= 2);
    fixture.tier.stop("s3");
    store.put_named(Space::Journal, key(2), 6, record(2)).await.expect("two of three");
    let stale = store.put_named(Space::Journal, key(3), 5, record(3)).await;
    assert!(matches!(stale, Err(StoreError::Fenced { .. })), "{stale:?}");
    let listed = store.list_named(Space::Journal, &[7; 16]).await.expect("listed");
    assert_eq!(listed.iter().map(|n| n.fence).collect::<Vec<_>>(), [5, 6]);
    fixture.tier.stop("s2");
    let few = store.list_named(Space::Journal, &[7; 16]).await;
    assert!(matches!(few, Err(StoreError::TooFewNodes { needed: 2, .. })), "{few:?}");
}

#[tokio::test]
async fn dropped_claims_leave_the_other_groups_alone() {
    let (_fixture, store) = fixture(3, 3, 2);
    let ids = put_all(&store, 0..60).await;
    store.barrier().await.expect("durable");
    let pg = store.pg_of(&ids[0]).expect("a layout");
    let of_pg = ids.iter().filter(|id| store.pg_of(id) == Some(pg)).count();
    store.drop_claims(&[pg]);
    assert_eq!(claimed(&store).0 as usize, 60 - of_pg);
}
