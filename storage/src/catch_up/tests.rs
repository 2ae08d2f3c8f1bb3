use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use outrider_process::metrics::Metrics;
use outrider_process::tasks::TaskGroup;
use outrider_proto::frame::Presence;
use outrider_proto::ids::{FabricId, LayoutEpoch, LeaseEpoch, NodeIncarnation};
use outrider_proto::journal::{JournalClear, JournalEntry};
use outrider_proto::record::Record;
use outrider_proto::seal::{DomainKeys, Key32, Sealer};
use outrider_storage_client::transport::{
    ChunkTransport, NamedRecord, NamedStream, NumberedRecord, Opened, Opening, WindowHead,
};

use super::compared::RARELY;
use super::*;
use crate::peers::PeerLimits;
use crate::store::{IndexKind, StoreConfig};

/// The other node: it has names only, and hands one over when the one before is in our store.
struct Other {
    store: Arc<Store>,
    names: Mutex<Vec<NamedRecord>>,
    /// Protocol version that it speaks.
    version: u16,
    lists: AtomicU32,
    records: AtomicU32,
    ahead: AtomicBool,
}

struct Link {
    other: Arc<Other>,
    opened: Opened,
    closed: Arc<AtomicBool>,
}

struct Transport {
    other: Arc<Other>,
    last: Mutex<Arc<AtomicBool>>,
}

#[async_trait]
impl ChunkTransport for Transport {
    async fn open(
        &self,
        node: &StorageNode,
        opening: Opening,
    ) -> Result<Arc<dyn ChunkSession>, TransportError> {
        let opened = Opened {
            fabric: FabricId::from_bytes([7; 16]),
            node: node.name.clone(),
            incarnation: node.incarnation,
            layout_epoch: opening.layout_epoch,
            version: self.other.version,
        };
        let closed = Arc::new(AtomicBool::new(false));
        *self.last.lock().expect("no panic") = Arc::clone(&closed);
        Ok(Arc::new(Link { other: Arc::clone(&self.other), opened, closed }))
    }
}

impl Link {
    fn never<T>(&self) -> Result<T, TransportError> {
        Err(TransportError::Lost { node: self.opened.node.clone(), why: "not asked".to_owned() })
    }
}

#[async_trait]
impl ChunkSession for Link {
    fn opened(&self) -> &Opened {
        &self.opened
    }
    async fn put(&self, _: WindowHead, _: Vec<NumberedRecord>) -> Result<u32, TransportError> {
        self.never()
    }
    async fn have(&self, _: WindowHead, _: Vec<ChunkId>) -> Result<Vec<Presence>, TransportError> {
        self.never()
    }
    async fn have_local(&self, _: Vec<ChunkId>) -> Result<Vec<Presence>, TransportError> {
        self.never()
    }
    async fn get(&self, _: Vec<ChunkId>) -> Result<Vec<Option<Record>>, TransportError> {
        self.never()
    }
    async fn barrier(
        &self,
        _: WindowHead,
        _: Vec<(PgId, u32)>,
    ) -> Result<Vec<Bytes>, TransportError> {
        self.never()
    }
    async fn put_named(
        &self,
        _: Space,
        _: Vec<u8>,
        _: u64,
        _: Record,
    ) -> Result<Bytes, TransportError> {
        self.never()
    }
    fn stream_named(&self, space: Space, prefix: Vec<u8>) -> NamedStream<'_> {
        if space != Space::Journal {
            return futures::stream::empty().boxed();
        }
        if self.other.version < 2 {
            self.other.lists.fetch_add(1, Ordering::SeqCst);
        }
        let mut names = self.other.names.lock().expect("no panic").clone();
        names.retain(|named| named.key.starts_with(&prefix));
        // Whoever wants the next one has kept the one before.
        let keys: Vec<_> = names.iter().map(|named| named.key.clone()).collect();
        let kept = move |n: usize| {
            let found = |key| self.other.store.find_named(Space::Journal, key).expect("asked");
            n.checked_sub(1).is_none_or(|before| found(&keys[before]).is_some())
        };
        futures::stream::iter(names.into_iter().enumerate())
            .map(move |(n, named)| {
                self.other.records.fetch_add(1, Ordering::SeqCst);
                self.other.ahead.fetch_or(!kept(n), Ordering::SeqCst);
                Ok(named)
            })
            .boxed()
    }
    async fn list_names(
        &self,
        space: Space,
        after: Vec<u8>,
    ) -> Result<Vec<(Vec<u8>, u64)>, TransportError> {
        assert!(self.other.version >= 2, "the frame is sent to a node that does not know it");
        if space != Space::Journal {
            return Ok(Vec::new());
        }
        if after.is_empty() {
            self.other.lists.fetch_add(1, Ordering::SeqCst);
        }
        let names = self.other.names.lock().expect("no panic");
        let later = names.iter().filter(|named| named.key > after);
        Ok(later.take(2).map(|named| (named.key.clone(), named.fence)).collect())
    }
    async fn list_pg(&self, _: PgId, _: ChunkId) -> Result<Vec<ChunkId>, TransportError> {
        Ok(Vec::new())
    }
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }
    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }
}

fn named(n: u8) -> NamedRecord {
    let keys = DomainKeys {
        domain: outrider_proto::ids::DomainId::from_bytes([1; 16]),
        id_key: Key32([2; 32]),
        data_keys: [(outrider_proto::ids::KeyEpoch(1), Key32([3; 32]))].into(),
        current: outrider_proto::ids::KeyEpoch(1),
    };
    let sealer = Sealer::new(Arc::new(keys), outrider_proto::ids::WriterId([4; 16]));
    let clear = JournalClear {
        sequence: u32::from(n),
        job: JobId::from_bytes([n; 16]),
        checkpoint: outrider_proto::ids::CheckpointId::from_bytes([6; 16]),
        lease_epoch: LeaseEpoch(3),
    };
    let record = JournalEntry::Leaves(vec![]).seal(&sealer, &clear).expect("sealed");
    NamedRecord { key: vec![n; 20], fence: 3, record }
}

fn described(name: &str) -> StorageNode {
    StorageNode {
        name: name.to_owned(),
        addresses: vec![],
        zone: name.to_owned(),
        capacity_bytes: 1,
        receipt_key: vec![],
        incarnation: NodeIncarnation(1),
        online: true,
    }
}

#[tokio::test]
async fn names_are_taken_one_by_one_and_compared_only_where_some_may_be_missing() {
    // Each record is read once only; the mended one twice.
    assert_eq!(catch_up_with(2).await, 7);
    // Four comparisons of five or six names.
    assert_eq!(catch_up_with(1).await, 22);
}

/// Gives how many records were read from a node of this version.
async fn catch_up_with(version: u16) -> u32 {
    let dir = tempfile::tempdir().expect("a directory");
    let config = StoreConfig {
        min_free: 0,
        index: IndexKind::Memory,
        ..StoreConfig::new(FabricId::from_bytes([7; 16]), "s1")
    };
    let store = Arc::new(Store::open(dir.path(), config).expect("opened"));
    let other = Arc::new(Other {
        store: Arc::clone(&store),
        names: Mutex::new((1..=5).map(named).collect()),
        version,
        lists: AtomicU32::new(0),
        records: AtomicU32::new(0),
        ahead: AtomicBool::new(false),
    });
    let layout = Layout {
        epoch: LayoutEpoch(1),
        replicas: 2,
        min_durable: 2,
        nodes: vec![described("s1"), described("s2")],
        pgs: vec![vec![0, 1]],
    };
    let (_layout, view) = watch::channel(layout);
    let transport = Arc::new(Transport { other: Arc::clone(&other), last: Mutex::default() });
    let limits = PeerLimits {
        queue_bytes: 1,
        patience: Duration::ZERO,
        pauses: (Duration::from_millis(1), Duration::from_millis(1)),
    };
    let tasks = TaskGroup::new("test");
    let peers = Peers::new(Arc::clone(&transport) as _, view.clone(), limits, tasks.child("peers"));
    let catch_up = CatchUp {
        name: "s1".to_owned(),
        store: Arc::clone(&store),
        peers: Arc::new(peers),
        layout: view,
        incomplete: watch::channel(true).0,
        metrics: StorageMetrics::register(&mut Metrics::new("storage", "s1")),
        rate: u64::MAX,
        every: Duration::ZERO,
    };
    let mut compared = Compared::default();
    let here = |n: u8| store.find_named(Space::Journal, &[n; 20]).expect("asked");
    let lists = || other.lists.load(Ordering::SeqCst);

    assert!(catch_up.look(&mut compared).await, "after a start");
    assert!((1..=5).all(|n| here(n).is_some()));
    assert!(!other.ahead.load(Ordering::SeqCst), "one was sent before the one before was kept");
    for _ in 0..RARELY {
        assert!(catch_up.look(&mut compared).await);
    }
    assert_eq!(lists(), 1, "nothing can have been missed");
    assert!(catch_up.look(&mut compared).await);
    assert_eq!(lists(), 2, "but rarely it is made sure");

    other.names.lock().expect("no panic").push(named(6));
    transport.last.lock().expect("no panic").store(true, Ordering::SeqCst);
    assert!(catch_up.look(&mut compared).await, "after a lost session");
    assert_eq!((lists(), here(6).is_some()), (3, true));

    for file in std::fs::read_dir(dir.path().join("segments")).expect("a folder") {
        let path = file.expect("an entry").path();
        let mut bytes = std::fs::read(&path).expect("read");
        let at = bytes.windows(32).position(|w| w == named(2).record.id().0);
        if let Some(at) = at {
            bytes[at] ^= 1;
            std::fs::write(&path, bytes).expect("rotten");
        }
    }
    let rotten = here(2).expect("listed");
    assert!(store.get_named(Space::Journal, &rotten).await.is_none());
    assert!(catch_up.look(&mut compared).await, "after damage");
    let mended = here(2).expect("there again");
    assert!(store.get_named(Space::Journal, &mended).await.is_some());
    assert!(catch_up.look(&mut compared).await);
    assert_eq!(lists(), 4);
    tasks.shutdown(Duration::from_secs(5)).boxed().await;
    other.records.load(Ordering::SeqCst)
}
