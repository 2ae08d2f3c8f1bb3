//! One member: starts Raft, proposes, proves that it leads.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use openraft::error::{CheckIsLeaderError, ClientWriteError, InitializeError, RaftError};
use openraft::{BasicNode, Config, ServerState, SnapshotPolicy};
use outrider_process::clock::Clock;
use outrider_process::identity::Identity;
use tokio::sync::{Mutex, watch};

use super::Raft;
use super::admission::{Admission, Standing};
use super::network::Network;
use super::store::{Replica, Store};
use crate::state::{Change, Command, Outcome};

/// How long a proof of leadership may be used again. Far below the time between the cut-off of an agent and the end of
/// its lease, so that it shortens no safety margin.
const PROOF_AGE: Duration = Duration::from_millis(100);
/// Rounds to the majority before a proof is given up.
const PROOF_ROUNDS: u32 = 3;
/// A leader without a majority waits for ever; whoever asked is told to ask again.
const PATIENCE: Duration = Duration::from_secs(5);
/// Log entries between snapshots: a restart replays at most these.
const SNAPSHOT_EVERY: u64 = 2_000;
/// Entries kept behind a snapshot, for members that lag a little.
const KEEP_LOG: u64 = 1_000;
/// Bytes of a snapshot in one message.
const SNAPSHOT_PART: u64 = 512 << 10;
/// Entries in one append.
const APPEND_ENTRIES: u64 = 64;

/// Raft's times.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RaftTimes {
    pub(crate) heartbeat: Duration,
    pub(crate) election_min: Duration,
    pub(crate) election_max: Duration,
}

/// A member of the Raft group.
#[derive(Clone)]
pub(crate) struct Member {
    raft: Raft,
    replica: Replica,
    clock: Arc<dyn Clock>,
    proof: Arc<Mutex<Option<Proof>>>,
    id: u64,
    admission: Arc<Admission>,
    stood_back: Arc<AtomicBool>,
}

struct Proof {
    at: Duration,
    term: u64,
}

/// Why a command was not applied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProposeError {
    /// Another member leads, or none.
    #[error("this coordinator is not the leader")]
    NotLeader { leader: Option<String> },
    /// The change may take effect later, or never.
    #[error("no majority of the coordinators confirmed the change in time")]
    NoMajority,
    /// Raft has stopped.
    #[error("Raft has stopped on this member")]
    Stopped(#[source] Box<openraft::error::Fatal<u64>>),
}

/// Raft that cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Times that cannot work together.
    #[error("[raft] has times that cannot work together: {0}")]
    Config(#[source] Box<openraft::ConfigError>),
    /// openraft stopped at once.
    #[error("Raft cannot be started; look at the database")]
    Raft(#[source] Box<openraft::error::Fatal<u64>>),
    /// The database does not keep where this member stands.
    #[error("the database does not take what this member has to remember; look at its disk")]
    Mark(#[source] sled::Error),
}

impl Member {
    /// Starts Raft on a store.
    ///
    /// # Errors
    /// [`StartError`].
    pub(crate) async fn start(
        id: u64,
        store: Store,
        identity: Arc<Identity>,
        times: RaftTimes,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, StartError> {
        let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let config = Config {
            cluster_name: "outrider".to_owned(),
            heartbeat_interval: millis(times.heartbeat),
            election_timeout_min: millis(times.election_min),
            election_timeout_max: millis(times.election_max),
            install_snapshot_timeout: 10_000,
            max_payload_entries: APPEND_ENTRIES,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
            max_in_snapshot_log_to_keep: KEEP_LOG,
            snapshot_max_chunk_size: SNAPSHOT_PART,
            ..Config::default()
        };
        let config = Arc::new(config.validate().map_err(|e| StartError::Config(Box::new(e)))?);
        let network = Network { identity };
        let raft = Raft::new(id, config, network, store.log, store.machine)
            .await
            .map_err(|fatal| StartError::Raft(Box::new(fatal)))?;
        let admission = Arc::new(store.admission);
        if admission.standing() != Standing::Full {
            // The one that begins a new fabric stands for election all the same: see `bootstrap`.
            raft.runtime_config().elect(false);
        }
        Ok(Self {
            raft,
            replica: store.replica,
            clock,
            proof: Arc::default(),
            id,
            admission,
            stood_back: Arc::default(),
        })
    }

    /// This member's id.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Whether this member votes and acknowledges without bounds: not right after it started with an empty database.
    pub(crate) fn takes_part(&self) -> watch::Receiver<bool> {
        self.admission.full()
    }

    /// What this member may do.
    pub(super) fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Makes the first membership of a new fabric unless there is one, and stands for election.
    ///
    /// # Errors
    /// [`StartError::Raft`].
    pub(super) async fn bootstrap(
        &self,
        members: &BTreeMap<u64, String>,
    ) -> Result<(), StartError> {
        self.stand();
        let members: BTreeMap<u64, BasicNode> =
            members.iter().map(|(id, address)| (*id, BasicNode::new(address))).collect();
        match self.raft.initialize(members).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(RaftError::APIError(InitializeError::NotInMembers(error))) => {
                // The configuration was checked; openraft does not tell how to go on from here.
                tracing::error!(%error, "this member is not in its own list of members");
                Ok(())
            }
            Err(RaftError::Fatal(fatal)) => Err(StartError::Raft(Box::new(fatal))),
        }
    }

    /// The state as it stands here.
    pub(crate) fn replica(&self) -> &Replica {
        &self.replica
    }

    /// openraft's handle.
    pub(crate) fn raft(&self) -> &Raft {
        &self.raft
    }

    /// The clocks that commands and leases use.
    pub(crate) fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// The term in which this member believes to lead. A belief is enough to try, never to promise: see [`Self::prove`].
    pub(crate) fn leads(&self) -> Option<u64> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        (metrics.state == ServerState::Leader && metrics.current_leader == Some(metrics.id))
            .then_some(metrics.current_term)
    }

    /// Address of the leader, as far as this member knows.
    pub(crate) fn leader_address(&self) -> Option<String> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let leader = metrics.current_leader?;
        let advertised = self.replica.read(|state| state.advertised.get(&leader).cloned());
        advertised.or_else(|| {
            metrics.membership_config.membership().get_node(&leader).map(|node| node.addr.clone())
        })
    }

    /// Proposes a change with the time of now, and returns its outcome once a majority has it on disk and it was
    /// applied here.
    ///
    /// # Errors
    /// [`ProposeError`]. An error may hide a change that takes effect all the same: changes can be proposed again.
    ///
    /// # Cancel safety
    /// The proposal goes on when the future is dropped.
    pub(crate) async fn propose(&self, change: Change) -> Result<Outcome, ProposeError> {
        let command = Command { at_ms: self.clock.unix_millis(), change };
        let written = tokio::time::timeout(PATIENCE, self.raft.client_write(command));
        let Ok(written) = written.await else { return Err(ProposeError::NoMajority) };
        match written {
            Ok(written) => Ok(written.data),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to))) => {
                let told = to.leader_node.map(|node| node.addr);
                Err(ProposeError::NotLeader { leader: self.leader_address().or(told) })
            }
            Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(_))) => {
                // Commands never change the membership.
                Err(ProposeError::NotLeader { leader: None })
            }
            Err(RaftError::Fatal(fatal)) => Err(ProposeError::Stopped(Box::new(fatal))),
        }
    }

    /// Proves by a round to a majority that this member leads, and that what it reads is current.
    ///
    /// A proof is shared by all that ask within [`PROOF_AGE`] of its beginning.
    ///
    /// # Errors
    /// [`ProposeError`].
    pub(crate) async fn prove(&self) -> Result<u64, ProposeError> {
        // Held over the round on purpose: those who wait share its result.
        let mut proof = self.proof.lock().await;
        let leads = self.leads();
        if let Some(proof) = &*proof
            && leads == Some(proof.term)
            && self.clock.monotonic().saturating_sub(proof.at) < PROOF_AGE
        {
            return Ok(proof.term);
        }
        *proof = None;
        let mut rounds = 1;
        loop {
            let at = self.clock.monotonic();
            match self.raft.ensure_linearizable().await {
                Ok(_) => {
                    let not_leader = || ProposeError::NotLeader { leader: self.leader_address() };
                    let term = self.leads().ok_or_else(not_leader)?;
                    *proof = Some(Proof { at, term });
                    return Ok(term);
                }
                Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(to))) => {
                    let told = to.leader_node.map(|node| node.addr);
                    return Err(ProposeError::NotLeader { leader: self.leader_address().or(told) });
                }
                // A member that is busy writing may miss one round.
                Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_)))
                    if rounds < PROOF_ROUNDS =>
                {
                    rounds += 1;
                }
                Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_))) => {
                    return Err(ProposeError::NotLeader { leader: None });
                }
                Err(RaftError::Fatal(fatal)) => {
                    return Err(ProposeError::Stopped(Box::new(fatal)));
                }
            }
        }
    }

    /// Never stands for election again.
    pub(crate) fn stand_back(&self) {
        self.stood_back.store(true, Ordering::SeqCst);
        self.raft.runtime_config().elect(false);
    }

    /// Stands for election, unless it stood back.
    pub(super) fn stand(&self) {
        if !self.stood_back.load(Ordering::SeqCst) {
            self.raft.runtime_config().elect(true);
        }
    }

    /// Stops Raft and waits for it.
    pub(crate) async fn shutdown(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::error!(%error, "Raft did not stop in order");
        }
        self.admission.close();
    }
}

impl std::fmt::Debug for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Member")
    }
}
