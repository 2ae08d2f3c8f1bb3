//! Storage nodes and clients over real QUIC: receipts, losses, refusals.

mod cluster;

use std::sync::Arc;

use bytes::Bytes;
use outrider_process::identity::Role;
use outrider_process::identity::ca::FabricCa;
use outrider_proto::frame::{Presence, Refusal, Space};
use outrider_proto::ids::{
    ChunkId, JobId, LayoutEpoch, LeaseEpoch, PointId, SessionId, VmGuid, VmIncarnation, Window,
};
use outrider_proto::receipt::Receipt;
use outrider_proto::root::Root;
use outrider_proto::ticket::Operations;
use outrider_storage_client::transport::{
    ChunkSession, ChunkTransport, NumberedRecord, Opening, WindowHead,
};
use outrider_storage_client::{BarrierError, ClientRole, StoreError, TransportError};

use cluster::{Cluster, issue, put_all, record, rot, until};

const BACKUP: Operations = Operations::BACKUP;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_travel_once_and_every_replica_signs_for_them() {
    let cluster = Cluster::start(3, 3, 2).await;
    let agent = cluster.agent("hv-서울");
    let client = cluster.client(&agent, ClientRole::Agent);
    let store = cluster.job(&client, "hv-서울", BACKUP);
    let ids = put_all(&store, 0..200).await;
    store.barrier().await.expect("durable");
    let layout = cluster.layout.borrow().clone();
    let claims = store.claims();
    assert_eq!(claims.iter().flat_map(|c| &c.puts).sum::<u32>(), 200);
    for claim in &claims {
        assert!(claim.receipt.len() >= 2, "own and forwarded");
        for bytes in &claim.receipt {
            let key = |name: &str| layout.node(name).map(|n| n.receipt_key.as_slice());
            let receipt = Receipt::verify(bytes, key).expect("signed by the node it names");
            assert_eq!(receipt.layout_epoch, LayoutEpoch(1));
        }
    }
    assert_eq!(store.have(&ids).await.expect("asked"), vec![Presence::Yes; 200]);
    let sent: u64 = store.stats().put_bytes;
    assert_eq!(sent, (0..200).map(|n| record(n).bytes().len() as u64).sum::<u64>());
    until("three copies", || cluster.nodes.values().all(|n| n.store.status().chunks == 200)).await;
    let restore = cluster.job(&client, "hv-서울", Operations::RESTORE);
    let read = restore.get(&ids).await.expect("read");
    assert!((0..200).zip(&read).all(|(n, r)| r.id() == record(n).id()));
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_between_put_and_barrier_loses_nothing_that_was_acknowledged() {
    let mut cluster = Cluster::start(1, 1, 1).await;
    let agent = cluster.agent("hv1");
    let client = cluster.client(&agent, ClientRole::Agent);
    let store = cluster.job(&client, "hv1", BACKUP);
    let kept = put_all(&store, 0..40).await;
    store.barrier().await.expect("durable");
    let before = cluster.nodes["s1"].store.incarnation();
    put_all(&store, 40..80).await;
    cluster.stop_node("s1").await;
    cluster.start_node("s1").await;
    assert_ne!(cluster.nodes["s1"].store.incarnation(), before);
    cluster.publish(1);
    let deadline = tokio::time::Instant::now() + cluster::DEADLINE;
    loop {
        match store.barrier().await {
            Ok(()) => break,
            Err(BarrierError::Lost { ids, .. }) => {
                assert!(ids.iter().all(|id| !kept.contains(id)), "an acknowledged one was lost");
                for n in 40..80 {
                    if ids.contains(&record(n).id()) {
                        store.put(record(n)).await.expect("taken");
                    }
                }
            }
            Err(BarrierError::Store(error)) => assert!(error.may_succeed_later(), "{error}"),
        }
        assert!(tokio::time::Instant::now() < deadline, "never durable");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(cluster.nodes["s1"].store.status().chunks, 80);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_replica_gives_no_receipt_and_catches_up_when_it_is_back() {
    let mut cluster = Cluster::start(3, 3, 2).await;
    let agent = cluster.agent("hv1");
    let client = cluster.client(&agent, ClientRole::Agent);
    let store = cluster.job(&client, "hv1", BACKUP);
    put_all(&store, 0..30).await;
    cluster.stop_node("s2").await;
    put_all(&store, 30..60).await;
    loop {
        match store.barrier().await {
            Ok(()) => break,
            Err(BarrierError::Lost { ids, .. }) => {
                for n in 0..60 {
                    if ids.contains(&record(n).id()) {
                        store.put(record(n)).await.expect("taken");
                    }
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    let point = PointId::random();
    let root = Root {
        point,
        job: store.access().job,
        vm_hash: [1; 32],
        vm_guid: VmGuid::random(),
        incarnation: VmIncarnation(1),
        manifest: record(1).id(),
        taken_unix_ms: 1,
        lock_until_unix_ms: 0,
        lease_epoch: LeaseEpoch(5),
    };
    let sealed = root.seal(&cluster::sealer()).expect("sealed");
    let receipts = store
        .put_named(Space::Root, point.to_bytes().to_vec(), 5, sealed)
        .await
        .expect("on two of three");
    assert_eq!(receipts.len(), 2);
    cluster.start_node("s2").await;
    cluster.publish(1);
    until("the returned node has everything", || {
        let store = &cluster.nodes["s2"].store;
        store.status().chunks == 60
            && store.list_named(Space::Root, &[]).expect("listed").len() == 1
    })
    .await;
    cluster.shutdown().await;
}

/// Its place says no until a good copy is there: from whoever puts it, or, as here, from another replica.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotten_copy_is_fetched_from_another_replica() {
    let cluster = Cluster::start(3, 3, 3).await;
    let agent = cluster.agent("hv1");
    let client = cluster.client(&agent, ClientRole::Agent);
    let store = cluster.job(&client, "hv1", BACKUP);
    let ids = put_all(&store, 0..20).await;
    store.barrier().await.expect("durable on all three");
    let s2 = &cluster.nodes["s2"].store;
    rot(s2.dir(), &record(7));
    assert!(s2.get(ids[7]).await.expect("asked").is_none());
    until("the copy is fetched", || s2.contains(&ids[7]).expect("asked")).await;
    assert!(s2.get(ids[7]).await.expect("asked").is_some_and(|r| r.id() == ids[7]));
    assert_eq!((s2.status().damaged, s2.status().chunks), (1, 20));
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_borrowed_tickets_are_refused() {
    let cluster = Cluster::start(1, 1, 1).await;
    let node = cluster.nodes["s1"].described.clone();
    let open = async |transport: &dyn ChunkTransport, ticket: Bytes| {
        let opening =
            Opening { session: SessionId::random(), layout_epoch: LayoutEpoch(1), ticket };
        transport.open(&node, opening).await.map(drop)
    };
    let denied = |result: Result<(), TransportError>| {
        let error = result.expect_err("refused");
        assert_eq!(error.refusal(), Some(Refusal::Denied), "{error}");
    };
    let agent = cluster.agent("hv1");
    let transport = cluster.transport(&agent, ClientRole::Agent);
    let job = JobId::random();
    let good = cluster.access(job, "hv1", BACKUP).ticket;
    open(&transport, good.clone()).await.expect("the ticket's own host");
    denied(open(&transport, cluster.access(job, "hv2", BACKUP).ticket).await);
    let mut forged = good.to_vec();
    forged[20] ^= 1;
    denied(open(&transport, forged.into()).await);
    let mut old = cluster.ticket(job, "hv1", BACKUP);
    old.not_after_unix_ms = 1;
    denied(open(&transport, old.sign(cluster.tickets.signing_key().pair()).into()).await);
    denied(open(&cluster.transport(&agent, ClientRole::Storage), good.clone()).await);

    let other = FabricCa::create("another-fabric").expect("a fabric");
    let dir = tempfile::tempdir().expect("a directory");
    let stranger = issue(&other, dir.path(), Role::Node, "hv1");
    let refused = open(&cluster.transport(&stranger, ClientRole::Agent), good).await;
    assert!(
        matches!(refused, Err(TransportError::Unreachable { .. } | TransportError::Lost { .. })),
        "{refused:?}"
    );
    let mut renamed = node.clone();
    renamed.name = "s9".to_owned();
    let opening = Opening {
        session: SessionId::random(),
        layout_epoch: LayoutEpoch(1),
        ticket: Bytes::new(),
    };
    let wrong = transport.open(&renamed, opening).await.map(drop);
    assert!(matches!(wrong, Err(TransportError::WrongPeer { .. })), "{wrong:?}");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_ticket_cannot_read_data_nor_write_for_other_jobs() {
    let cluster = Cluster::start(1, 1, 1).await;
    let agent = cluster.agent("hv1");
    let client = cluster.client(&agent, ClientRole::Agent);
    let store = cluster.job(&client, "hv1", BACKUP);
    let ids = put_all(&store, 0..3).await;
    store.barrier().await.expect("durable");
    let read = store.get(&ids).await;
    assert!(matches!(read, Err(StoreError::Refused { .. })), "{read:?}");

    let transport = cluster.transport(&agent, ClientRole::Agent);
    let job = JobId::random();
    let session = SessionId::random();
    let opening = Opening {
        session,
        layout_epoch: LayoutEpoch(1),
        ticket: cluster.access(job, "hv1", Operations::RESTORE).ticket,
    };
    let node = cluster.nodes["s1"].described.clone();
    let link: Arc<dyn ChunkSession> = transport.open(&node, opening).await.expect("opened");
    let head = WindowHead { job, session, window: Window(1), layout_epoch: LayoutEpoch(1) };
    let pg = cluster.layout.borrow().pg_of(&record(9).id()).expect("a layout");
    let one = || vec![NumberedRecord { pg, sequence: 1, record: record(9) }];
    let refusal = |e: TransportError| e.refusal();
    assert_eq!(link.put(head, one()).await.map_err(refusal), Err(Some(Refusal::Denied)));
    let other = WindowHead { job: JobId::random(), ..head };
    assert_eq!(link.have(other, ids.clone()).await.map_err(refusal), Err(Some(Refusal::Denied)));
    let stale = WindowHead { layout_epoch: LayoutEpoch(9), ..head };
    assert_eq!(
        link.have(stale, ids.clone()).await.map_err(refusal),
        Err(Some(Refusal::StaleLayout))
    );
    assert_eq!(link.have_local(ids).await.map_err(refusal), Err(Some(Refusal::Denied)));
    assert_eq!(link.list_pg(pg, ChunkId::HOLE).await.map_err(refusal), Err(Some(Refusal::Denied)));
    let names = link.list_names(Space::Root, Vec::new()).await;
    assert_eq!(names.map_err(refusal), Err(Some(Refusal::Denied)));
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stale_lease_cannot_write_the_journal() {
    use outrider_proto::ids::CheckpointId;
    use outrider_proto::journal::{JournalClear, JournalEntry};

    let cluster = Cluster::start(3, 3, 2).await;
    let agent = cluster.agent("hv1");
    let client = cluster.client(&agent, ClientRole::Agent);
    let job = JobId::random();
    let store = client.open_job(cluster.access(job, "hv1", BACKUP));
    let entry = |sequence: u32| {
        let clear = JournalClear {
            sequence,
            job,
            checkpoint: CheckpointId::random(),
            lease_epoch: LeaseEpoch(5),
        };
        let sealed = JournalEntry::Leaves(vec![(0, u64::from(sequence), record(sequence).id())]);
        let key = [job.to_bytes().as_slice(), &sequence.to_be_bytes()].concat();
        (key, sealed.seal(&cluster::sealer(), &clear).expect("sealed"))
    };
    let (key, sealed) = entry(1);
    store.put_named(Space::Journal, key, 5, sealed).await.expect("kept");
    let (key, sealed) = entry(2);
    let stale = store.put_named(Space::Journal, key, 4, sealed).await;
    assert!(matches!(stale, Err(StoreError::Fenced { .. })), "{stale:?}");
    let listed = store.list_named(Space::Journal, &job.to_bytes()).await.expect("listed");
    assert_eq!(listed.len(), 1);
    let foreign = store.list_named(Space::Journal, &[9; 16]).await;
    assert!(matches!(foreign, Err(StoreError::Refused { .. })), "{foreign:?}");
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_oversize_frame_is_refused() {
    use outrider_proto::frame::{ALPN, Frame};
    use outrider_storage_client::frame_io::{FrameReader, finish, write_frame};

    let cluster = Cluster::start(1, 1, 1).await;
    let agent = cluster.agent("hv1");
    let config = agent.quinn_client(&[ALPN], Arc::default()).expect("client");
    let mut endpoint =
        quinn::Endpoint::client("127.0.0.1:0".parse().expect("an address")).expect("bound");
    endpoint.set_default_client_config(config);
    let address = cluster.nodes["s1"].address;
    let connection = endpoint
        .connect(address, &Role::Storage.server_name())
        .expect("well formed")
        .await
        .expect("connected");
    let (mut send, recv) = connection.open_bi().await.expect("a stream");
    let mut recv = FrameReader::new(recv);
    write_frame(&mut send, &Frame::Hello { version: 1, oldest: 1, role: 1 }).await.expect("sent");
    let ticket = cluster.access(JobId::random(), "hv1", BACKUP).ticket;
    let open = Frame::Open { session: SessionId::random(), layout_epoch: LayoutEpoch(1), ticket };
    write_frame(&mut send, &open).await.expect("sent");
    finish(&mut send);
    assert!(matches!(recv.expect("Hello").await, Ok(Frame::Hello { .. })));
    assert!(matches!(recv.expect("Opened").await, Ok(Frame::Opened { .. })));
    let (mut send, recv) = connection.open_bi().await.expect("a stream");
    send.write_all(&u32::MAX.to_le_bytes()).await.expect("sent");
    send.write_all(&[0; 100]).await.expect("sent");
    let answer = FrameReader::new(recv).expect("a refusal").await.expect("answered");
    assert!(matches!(answer, Frame::Refused { refusal: Refusal::Protocol, .. }), "{answer:?}");
    cluster.shutdown().await;
}
