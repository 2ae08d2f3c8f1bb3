//! A storage tier inside the process: no sockets, no disks, the same answers. For tests and simulation.
//!
//! Records are *taken in* by a put and *durable* after a barrier. [`MemoryTier::restart`] loses what is not durable and
//! raises the node's incarnation; [`MemoryTier::stop`] makes a node unreachable.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use outrider_process::identity::SigningKey;
use outrider_proto::frame::{PROTOCOL_VERSION, Presence, Refusal, Space};
use outrider_proto::ids::{ChunkId, FabricId, LayoutEpoch, NodeIncarnation, PgId};
use outrider_proto::layout::{Layout, StorageNode, assign};
use outrider_proto::receipt::{NamedReceipt, PgReceipt, Receipt};
use outrider_proto::record::Record;

use crate::error::TransportError;
use crate::transport::{
    ChunkSession, ChunkTransport, NamedRecord, NamedStream, NumberedRecord, Opened, Opening,
    WindowHead,
};

/// The tier: nodes, their layout, and switches to break them.
pub struct MemoryTier {
    fabric: FabricId,
    layout: Layout,
    nodes: Mutex<Vec<Node>>,
    keys: Vec<SigningKey>,
}

struct Node {
    up: bool,
    incarnation: NodeIncarnation,
    durable: BTreeMap<ChunkId, Record>,
    taken: BTreeMap<ChunkId, Record>,
    puts: HashMap<(WindowHead, PgId), BTreeSet<u32>>,
    haves: HashMap<(WindowHead, PgId), u32>,
    named: BTreeMap<(u8, Vec<u8>), (u64, Record)>,
}

impl MemoryTier {
    /// `count` nodes named `s1`, `s2`, ... with a layout of `pgs` PGs.
    #[must_use]
    pub fn new(count: usize, pgs: u16, replicas: u8, min_durable: u8) -> Arc<Self> {
        let keys: Vec<SigningKey> = (0..count)
            .map(|_| {
                SigningKey::from_pkcs8(SigningKey::generate_pkcs8().expose())
                    .expect("a fresh key is a key")
            })
            .collect();
        let nodes: Vec<StorageNode> = keys
            .iter()
            .enumerate()
            .map(|(i, key)| StorageNode {
                name: format!("s{}", i + 1),
                addresses: vec![format!("memory:{i}")],
                zone: format!("z{i}"),
                capacity_bytes: 1 << 40,
                receipt_key: key.public_key().to_vec(),
                incarnation: NodeIncarnation(1),
                online: true,
            })
            .collect();
        let pgs = assign(&nodes, pgs, replicas);
        let layout = Layout { epoch: LayoutEpoch(1), replicas, min_durable, nodes, pgs };
        let nodes = (0..count).map(|_| Node::new()).collect();
        Arc::new(Self { fabric: FabricId::random(), layout, nodes: Mutex::new(nodes), keys })
    }

    /// The fabric.
    #[must_use]
    pub fn fabric(&self) -> FabricId {
        self.fabric
    }

    /// The layout, with the incarnations of this moment.
    #[must_use]
    pub fn layout(&self) -> Layout {
        let mut layout = self.layout.clone();
        for (described, node) in layout.nodes.iter_mut().zip(self.lock().iter()) {
            described.incarnation = node.incarnation;
            described.online = node.up;
        }
        layout
    }

    /// Makes a node unreachable; what it keeps stays.
    pub fn stop(&self, name: &str) {
        self.change(name, |node| node.up = false);
    }

    /// Makes a node reachable again, as the same process.
    pub fn resume(&self, name: &str) {
        self.change(name, |node| node.up = true);
    }

    /// Kills and starts a node: what was not durable is gone, its windows too, its incarnation is a new one.
    pub fn restart(&self, name: &str) {
        self.change(name, |node| {
            node.up = true;
            node.incarnation = node.incarnation.next();
            node.taken.clear();
            node.puts.clear();
            node.haves.clear();
        });
    }

    /// Removes a durable record from a node.
    pub fn lose(&self, name: &str, id: ChunkId) {
        self.change(name, |node| {
            node.durable.remove(&id);
        });
    }

    /// How many nodes have the record durable.
    #[must_use]
    pub fn copies(&self, id: ChunkId) -> usize {
        self.lock().iter().filter(|n| n.durable.contains_key(&id)).count()
    }

    /// Number of different durable records.
    #[must_use]
    pub fn records(&self) -> usize {
        let nodes = self.lock();
        let ids: BTreeSet<_> = nodes.iter().flat_map(|n| n.durable.keys().copied()).collect();
        ids.len()
    }

    fn change(&self, name: &str, with: impl FnOnce(&mut Node)) {
        if let Some(index) = self.index(name) {
            with(&mut self.lock()[index]);
        }
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.layout.nodes.iter().position(|n| n.name == name)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Node {
    fn new() -> Self {
        Self {
            up: true,
            incarnation: NodeIncarnation(1),
            durable: BTreeMap::new(),
            taken: BTreeMap::new(),
            puts: HashMap::new(),
            haves: HashMap::new(),
            named: BTreeMap::new(),
        }
    }

    fn take(&mut self, head: WindowHead, records: &[NumberedRecord]) {
        for n in records {
            if !self.durable.contains_key(&n.record.id()) {
                self.taken.insert(n.record.id(), n.record.clone());
            }
            self.puts.entry((head, n.pg)).or_default().insert(n.sequence);
        }
    }

    fn contiguous(&self, head: WindowHead, pg: PgId) -> u32 {
        let numbers = self.puts.get(&(head, pg));
        let run = numbers.map_or(0, |n| n.iter().zip(1..).take_while(|(a, b)| *a == b).count());
        u32::try_from(run).unwrap_or(u32::MAX)
    }
}

/// Sessions with a [`MemoryTier`].
#[derive(Clone)]
pub struct MemoryTransport(pub Arc<MemoryTier>);

struct MemorySession {
    tier: Arc<MemoryTier>,
    index: usize,
    opened: Opened,
    closed: std::sync::atomic::AtomicBool,
}

impl MemorySession {
    fn nodes(&self) -> Result<MutexGuard<'_, Vec<Node>>, TransportError> {
        let nodes = self.tier.lock();
        let node = &nodes[self.index];
        if node.up && node.incarnation == self.opened.incarnation && !self.is_closed() {
            return Ok(nodes);
        }
        drop(nodes);
        self.close();
        Err(TransportError::Lost {
            node: self.opened.node.clone(),
            why: "the node was stopped".to_owned(),
        })
    }

    fn keepers(&self, pg: PgId) -> Vec<usize> {
        let replicas = self.tier.layout.replicas_of(pg);
        replicas.filter_map(|n| self.tier.index(&n.name)).collect()
    }
}

#[async_trait]
impl ChunkTransport for MemoryTransport {
    async fn open(
        &self,
        node: &StorageNode,
        opening: Opening,
    ) -> Result<Arc<dyn ChunkSession>, TransportError> {
        let unreachable = || TransportError::Unreachable {
            node: node.name.clone(),
            address: "memory".to_owned(),
            why: "the node was stopped".to_owned(),
        };
        let index = self.0.index(&node.name).ok_or_else(unreachable)?;
        let nodes = self.0.lock();
        if !nodes[index].up {
            return Err(unreachable());
        }
        let opened = Opened {
            fabric: self.0.fabric,
            node: node.name.clone(),
            incarnation: nodes[index].incarnation,
            layout_epoch: opening.layout_epoch,
            version: PROTOCOL_VERSION,
        };
        drop(nodes);
        let closed = std::sync::atomic::AtomicBool::new(false);
        Ok(Arc::new(MemorySession { tier: Arc::clone(&self.0), index, opened, closed }))
    }
}

#[async_trait]
impl ChunkSession for MemorySession {
    fn opened(&self) -> &Opened {
        &self.opened
    }

    async fn put(
        &self,
        head: WindowHead,
        records: Vec<NumberedRecord>,
    ) -> Result<u32, TransportError> {
        let mut nodes = self.nodes()?;
        nodes[self.index].take(head, &records);
        for numbered in &records {
            for other in self.keepers(numbered.pg) {
                if other != self.index && nodes[other].up {
                    nodes[other].take(head, std::slice::from_ref(numbered));
                }
            }
        }
        Ok(u32::try_from(records.len()).unwrap_or(u32::MAX))
    }

    async fn have(
        &self,
        head: WindowHead,
        ids: Vec<ChunkId>,
    ) -> Result<Vec<Presence>, TransportError> {
        let mut nodes = self.nodes()?;
        let min = usize::from(self.tier.layout.min_durable.max(1));
        let mut answers = Vec::with_capacity(ids.len());
        for id in ids {
            let pg = self.tier.layout.pg_of(&id).unwrap_or_default();
            let keepers = self.keepers(pg);
            let sure = |n: &&usize| nodes[**n].up && nodes[**n].durable.contains_key(&id);
            let confirmed = keepers.iter().filter(sure).count();
            let silent = keepers.iter().any(|&n| !nodes[n].up);
            answers.push(if confirmed >= min {
                *nodes[self.index].haves.entry((head, pg)).or_default() += 1;
                Presence::Yes
            } else if confirmed > 0 && silent {
                Presence::Unknown
            } else {
                Presence::No
            });
        }
        Ok(answers)
    }

    async fn have_local(&self, ids: Vec<ChunkId>) -> Result<Vec<Presence>, TransportError> {
        let nodes = self.nodes()?;
        let durable = &nodes[self.index].durable;
        Ok(ids
            .iter()
            .map(|id| if durable.contains_key(id) { Presence::Yes } else { Presence::No })
            .collect())
    }

    async fn get(&self, ids: Vec<ChunkId>) -> Result<Vec<Option<Record>>, TransportError> {
        let nodes = self.nodes()?;
        Ok(ids.iter().map(|id| nodes[self.index].durable.get(id).cloned()).collect())
    }

    async fn barrier(
        &self,
        head: WindowHead,
        pgs: Vec<(PgId, u32)>,
    ) -> Result<Vec<Bytes>, TransportError> {
        let mut nodes = self.nodes()?;
        let mut speakers = vec![self.index];
        let others = pgs.iter().flat_map(|&(pg, _)| self.keepers(pg));
        speakers.extend(others.filter(|&n| n != self.index && nodes[n].up));
        let first = speakers.remove(0);
        speakers.sort_unstable();
        speakers.dedup();
        speakers.insert(0, first);
        let mut receipts = Vec::new();
        for speaker in speakers {
            let node = &mut nodes[speaker];
            let taken = std::mem::take(&mut node.taken);
            node.durable.extend(taken);
            let said = pgs.iter().filter(|(pg, _)| self.keepers(*pg).contains(&speaker));
            let receipt = Receipt {
                fabric: self.tier.fabric,
                job: head.job,
                session: head.session,
                window: head.window,
                node: self.tier.layout.nodes[speaker].name.clone(),
                incarnation: node.incarnation,
                layout_epoch: head.layout_epoch,
                pgs: said
                    .map(|&(pg, _)| PgReceipt {
                        pg,
                        puts_through: node.contiguous(head, pg),
                        haves: node.haves.get(&(head, pg)).copied().unwrap_or(0),
                    })
                    .collect(),
            };
            receipts.push(Bytes::from(receipt.sign(self.tier.keys[speaker].pair())));
        }
        Ok(receipts)
    }

    async fn put_named(
        &self,
        space: Space,
        key: Vec<u8>,
        fence: u64,
        record: Record,
    ) -> Result<Bytes, TransportError> {
        let mut nodes = self.nodes()?;
        let node = &mut nodes[self.index];
        let owner = &key[..key.len().min(16)];
        let newer = node
            .named
            .iter()
            .any(|((s, k), (f, _))| *s == space as u8 && k.starts_with(owner) && *f > fence);
        if newer {
            return Err(TransportError::Refused {
                node: self.opened.node.clone(),
                refusal: Refusal::Fenced,
                message: "a newer lease of this job has written".to_owned(),
            });
        }
        let id = record.id();
        node.named.insert((space as u8, key.clone()), (fence, record));
        let receipt = NamedReceipt {
            fabric: self.tier.fabric,
            node: self.opened.node.clone(),
            incarnation: node.incarnation,
            space: space as u8,
            key,
            id,
        };
        Ok(receipt.sign(self.tier.keys[self.index].pair()).into())
    }

    fn stream_named(&self, space: Space, prefix: Vec<u8>) -> NamedStream<'_> {
        let listed = self.nodes().map(|nodes| {
            let named = nodes[self.index].named.iter();
            named
                .filter(|((s, key), _)| *s == space as u8 && key.starts_with(&prefix))
                .map(|((_, key), (fence, record))| {
                    Ok(NamedRecord { key: key.clone(), fence: *fence, record: record.clone() })
                })
                .collect()
        });
        futures::stream::iter(listed.unwrap_or_else(|error| vec![Err(error)])).boxed()
    }

    async fn list_names(
        &self,
        space: Space,
        after: Vec<u8>,
    ) -> Result<Vec<(Vec<u8>, u64)>, TransportError> {
        let nodes = self.nodes()?;
        let named = nodes[self.index].named.iter();
        Ok(named
            .filter(|((s, key), _)| *s == space as u8 && *key > after)
            .map(|((_, key), (fence, _))| (key.clone(), *fence))
            .collect())
    }

    async fn list_pg(&self, pg: PgId, after: ChunkId) -> Result<Vec<ChunkId>, TransportError> {
        let nodes = self.nodes()?;
        let ids = nodes[self.index].durable.keys().copied();
        Ok(ids.filter(|id| *id > after && self.tier.layout.pg_of(id) == Some(pg)).collect())
    }

    fn is_closed(&self) -> bool {
        self.closed.load(std::sync::atomic::Ordering::Acquire)
    }

    fn close(&self) {
        self.closed.store(true, std::sync::atomic::Ordering::Release);
    }
}
