//! Storage and coordinator in memory, for tests: the same promises, no processes. Faults are told to them.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use outrider_proto::frame::{Presence, Space};
use outrider_proto::ids::{ChunkId, DomainId, DutyId, KeyEpoch, PgId, WriterId};
use outrider_proto::layout::pg_of;
use outrider_proto::record::{Kind, Record};
use outrider_proto::rpc::{
    AskReply, AskRequest, BindReply, BindRequest, Binding, CommitOutcome, CommitReply,
    CommitRequest, Duty, DutyState, FinishRequest, RaiseIncarnationRequest, RecordDutyRequest,
    UpdateDutyRequest, WindowClaim,
};
use outrider_proto::seal::{DomainKeys, Key32, Sealer};

use crate::coordinator_client::{Coordinator, CoordinatorError};
use crate::store::{BarrierError, JobStore, Named, StoreError};

const PGS: usize = 16;

/// A sealer with fixed keys.
#[must_use]
pub fn sealer() -> Sealer {
    let keys = DomainKeys {
        domain: DomainId::from_bytes([9; 16]),
        id_key: Key32([1; 32]),
        data_keys: BTreeMap::from([(KeyEpoch(1), Key32([2; 32]))]),
        current: KeyEpoch(1),
    };
    Sealer::new(Arc::new(keys), WriterId([3; 16]))
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A storage tier of one process. Clones share it.
#[derive(Clone, Default)]
pub struct MemoryStore {
    inner: Arc<Mutex<Kept>>,
}

#[derive(Default)]
struct Kept {
    durable: HashMap<ChunkId, Record>,
    /// Put since the last barrier.
    pending: HashMap<ChunkId, Record>,
    named: BTreeMap<(u8, Vec<u8>), (u64, Record)>,
    fences: HashMap<Vec<u8>, u64>,
    /// How many of the pending records each of the next barriers loses.
    to_lose: VecDeque<usize>,
    puts: u64,
    put_bytes: u64,
    data_puts: u64,
}

impl MemoryStore {
    /// Empty.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The next barrier that has something to make durable loses up to `count` records.
    pub fn lose_at_next_barrier(&self, count: usize) {
        locked(&self.inner).to_lose.push_back(count);
    }

    /// Forgets durable records, as a storage tier would that lost too many nodes.
    pub fn forget(&self, mut which: impl FnMut(&Record) -> bool) {
        locked(&self.inner).durable.retain(|_, record| !which(record));
    }

    /// Records put, their bytes, and how many of them were data chunks.
    #[must_use]
    pub fn puts(&self) -> (u64, u64, u64) {
        let kept = locked(&self.inner);
        (kept.puts, kept.put_bytes, kept.data_puts)
    }

    /// Whether everything put is durable.
    #[must_use]
    pub fn settled(&self) -> bool {
        locked(&self.inner).pending.is_empty()
    }

    /// Whether an id is durable.
    #[must_use]
    pub fn holds(&self, id: &ChunkId) -> bool {
        locked(&self.inner).durable.contains_key(id)
    }
}

#[async_trait]
impl JobStore for MemoryStore {
    async fn have(&self, ids: &[ChunkId]) -> Result<Vec<Presence>, StoreError> {
        let kept = locked(&self.inner);
        let answer = |id| if kept.durable.contains_key(id) { Presence::Yes } else { Presence::No };
        Ok(ids.iter().map(answer).collect())
    }

    async fn put(&self, record: Record) -> Result<(), StoreError> {
        let mut kept = locked(&self.inner);
        kept.puts += 1;
        kept.put_bytes += record.bytes().len() as u64;
        kept.data_puts += u64::from(record.header().kind == Kind::Data);
        kept.pending.insert(record.id(), record);
        Ok(())
    }

    async fn barrier(&self) -> Result<(), BarrierError> {
        let mut kept = locked(&self.inner);
        let pending = std::mem::take(&mut kept.pending);
        let mut lost = Vec::new();
        let lose = if pending.is_empty() { 0 } else { kept.to_lose.pop_front().unwrap_or(0) };
        for (id, record) in pending {
            if lost.len() < lose && !kept.durable.contains_key(&id) {
                lost.push(id);
            } else {
                kept.durable.insert(id, record);
            }
        }
        if lost.is_empty() { Ok(()) } else { Err(BarrierError::Lost { ids: lost }) }
    }

    async fn get(&self, ids: &[ChunkId]) -> Result<Vec<Record>, StoreError> {
        let kept = locked(&self.inner);
        let find = |id: &ChunkId| {
            kept.durable
                .get(id)
                .or_else(|| kept.pending.get(id))
                .cloned()
                .ok_or(StoreError::Missing { id: *id })
        };
        ids.iter().map(find).collect()
    }

    fn claims(&self) -> Vec<WindowClaim> {
        Vec::new()
    }

    fn drop_claims(&self, _pgs: &[PgId]) {}

    fn stored_bytes(&self) -> u64 {
        0
    }

    fn pg_of(&self, id: &ChunkId) -> Option<PgId> {
        pg_of(id, PGS)
    }

    async fn put_named(
        &self,
        space: Space,
        key: Vec<u8>,
        fence: u64,
        record: Record,
    ) -> Result<Vec<Bytes>, StoreError> {
        let mut kept = locked(&self.inner);
        let fenced = kept.fences.entry(key[..key.len().min(16)].to_vec()).or_default();
        if *fenced > fence {
            return Err(StoreError::Fenced {
                reason: format!("fence {fenced} stands before {fence}"),
            });
        }
        *fenced = fence;
        kept.named.insert((space as u8, key), (fence, record));
        Ok(vec![Bytes::from_static(b"receipt")])
    }

    async fn list_named(&self, space: Space, prefix: &[u8]) -> Result<Vec<Named>, StoreError> {
        let kept = locked(&self.inner);
        let found =
            kept.named.iter().filter(|((s, key), _)| *s == space as u8 && key.starts_with(prefix));
        Ok(found
            .map(|((_, key), (fence, record))| Named {
                key: key.clone(),
                fence: *fence,
                record: record.clone(),
            })
            .collect())
    }
}

/// A coordinator of one process, with one VM's state. Clones share it.
#[derive(Clone, Default)]
pub struct MemoryCoordinator {
    inner: Arc<Mutex<Decided>>,
}

/// What the coordinator knows.
#[derive(Debug, Clone, Default)]
pub struct Decided {
    /// All duties.
    pub duties: Vec<Duty>,
    /// The VM's binding.
    pub binding: Option<Binding>,
    /// Commits by job.
    pub commits: HashMap<String, CommitRequest>,
    /// Ends of attempts.
    pub finished: Vec<FinishRequest>,
    /// The VM's incarnation.
    pub incarnation: u64,
    /// The lease that may act; 0: any.
    pub lease_epoch: u64,
    /// PGs that the next commits lack.
    pub lacking: VecDeque<Vec<u32>>,
    /// Calls that are answered with "unavailable" after they took effect, by name.
    pub die_after: HashSet<&'static str>,
    /// Calls that are answered with "unavailable" before they take effect, by name.
    pub die_before: HashSet<&'static str>,
}

impl MemoryCoordinator {
    /// Knows nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at, or changes, what it knows.
    pub fn with<T>(&self, look: impl FnOnce(&mut Decided) -> T) -> T {
        look(&mut locked(&self.inner))
    }

    fn call<T>(
        &self,
        name: &'static str,
        lease_epoch: u64,
        effect: impl FnOnce(&mut Decided) -> T,
    ) -> Result<T, CoordinatorError> {
        let mut decided = locked(&self.inner);
        let gone = || CoordinatorError::Unavailable { doing: name, reason: "told to".into() };
        if decided.die_before.contains(name) {
            return Err(gone());
        }
        if lease_epoch != 0 && decided.lease_epoch != 0 && lease_epoch != decided.lease_epoch {
            return Err(CoordinatorError::Superseded {
                reason: format!("lease {lease_epoch} is old"),
            });
        }
        let result = effect(&mut decided);
        if decided.die_after.contains(name) { Err(gone()) } else { Ok(result) }
    }
}

#[async_trait]
impl Coordinator for MemoryCoordinator {
    async fn record_duty(&self, request: RecordDutyRequest) -> Result<Duty, CoordinatorError> {
        self.call("record_duty", request.lease_epoch, |d| {
            let known = d.duties.iter().find(|k| k.checkpoint_name == request.checkpoint_name);
            if let Some(known) = known {
                return known.clone();
            }
            let duty = Duty {
                duty_id: DutyId::random().to_string(),
                vm: None,
                job_id: request.job_id,
                attempt: request.attempt,
                state: DutyState::Recorded.into(),
                checkpoint_name: request.checkpoint_name,
                ..Duty::default()
            };
            d.duties.push(duty.clone());
            duty
        })
    }

    async fn update_duty(&self, request: UpdateDutyRequest) -> Result<Duty, CoordinatorError> {
        let name = match request.state() {
            DutyState::Created => "update_duty created",
            DutyState::Converted => "update_duty converted",
            _ => "update_duty done",
        };
        let missing = CoordinatorError::Refused { doing: name, reason: "no such duty".into() };
        self.call(name, request.lease_epoch, |d| {
            let duty = d.duties.iter_mut().find(|k| k.duty_id == request.duty_id)?;
            duty.state = request.state;
            duty.checkpoint_id = request.checkpoint_id;
            duty.reference_point_id = request.reference_point_id;
            if request.converting {
                duty.converting = true;
                duty.reference_points_before = request.reference_points_before;
            }
            Some(duty.clone())
        })?
        .ok_or(missing)
    }

    async fn commit(&self, request: CommitRequest) -> Result<CommitReply, CoordinatorError> {
        self.call("commit", request.lease_epoch, |d| {
            if let Some(lacking_pgs) = d.lacking.pop_front() {
                let outcome = CommitOutcome::ReceiptsLacking.into();
                return CommitReply {
                    outcome,
                    lacking_pgs,
                    reason: "told to".into(),
                    ..CommitReply::default()
                };
            }
            let committed = d.commits.entry(request.job_id.clone()).or_insert(request);
            CommitReply {
                outcome: CommitOutcome::Committed.into(),
                point_id: committed.point_id.clone(),
                ..CommitReply::default()
            }
        })
    }

    async fn bind(&self, request: BindRequest) -> Result<BindReply, CoordinatorError> {
        self.call("bind", request.lease_epoch, |d| {
            d.binding = request.binding;
            BindReply { bound: true, reason: String::new() }
        })
    }

    async fn ask(&self, request: AskRequest) -> Result<AskReply, CoordinatorError> {
        self.call("ask", 0, |d| AskReply {
            committed_point_id: d
                .commits
                .get(&request.job_id)
                .map(|c| c.point_id.clone())
                .unwrap_or_default(),
            binding: d.binding.clone(),
            duties: d.duties.iter().filter(|k| k.state() != DutyState::Done).cloned().collect(),
            incarnation: d.incarnation,
            current_lease_epoch: d.lease_epoch,
        })
    }

    async fn raise_incarnation(
        &self,
        request: RaiseIncarnationRequest,
    ) -> Result<u64, CoordinatorError> {
        self.call("raise_incarnation", request.lease_epoch, |d| {
            d.incarnation += 1;
            d.binding = None;
            d.incarnation
        })
    }

    async fn finish(&self, request: FinishRequest) -> Result<(), CoordinatorError> {
        self.call("finish", request.lease_epoch, |d| d.finished.push(request))
    }
}
