//! Reaching the coordinator that leads, wherever it is now.
//!
//! Agents, storage nodes and operators know the addresses of all members. Whoever is asked and does not lead says who
//! does (`OUT-C-0001` with the leader's address in the status details); [`LeaderClient`] remembers that and asks there.

use std::collections::HashMap;
use std::future::Future;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use outrider_proto::error_code::{NO_LEADER, NOT_LEADER};
use outrider_proto::status;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::backoff::Backoff;
use crate::identity::{Identity, Role};
use crate::network::Network;

/// A member that does not answer a connection attempt within this is asked again later; the next one is asked now.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause after all members were asked in vain; doubles up to the ceiling.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// HTTP/2 pings find a member that vanished without closing its connection.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Finds and follows the leader. Cheap to share; connections are kept per address.
#[derive(Debug)]
pub struct LeaderClient {
    members: Vec<String>,
    identity: Arc<Identity>,
    network: Network,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    believed: Option<String>,
    next: usize,
    channels: HashMap<String, Channel>,
}

impl LeaderClient {
    /// `members` are "ip:port" addresses of the coordinators' API; at least one.
    #[must_use]
    pub fn new(members: Vec<String>, identity: Arc<Identity>) -> Self {
        Self { members, identity, network: Network::default(), state: Mutex::default() }
    }

    /// Connects over these networks only.
    #[must_use]
    pub fn over(mut self, network: Network) -> Self {
        self.network = network;
        self
    }

    /// The member to ask now: the believed leader, else the members in turn.
    #[must_use]
    pub fn target(&self) -> String {
        let state = self.lock();
        state
            .believed
            .clone()
            .or_else(|| self.members.get(state.next % self.members.len().max(1)).cloned())
            .unwrap_or_default()
    }

    /// A channel to [`LeaderClient::target`]. Connects lazily: a dead member shows in the call's status, which has to
    /// be given to [`LeaderClient::learn`].
    ///
    /// # Errors
    /// A status when the address or the identity is unusable.
    pub async fn channel(&self) -> Result<Channel, Status> {
        let address = self.target();
        if let Some(channel) = self.lock().channels.get(&address) {
            return Ok(channel.clone());
        }
        let unusable = |e: &dyn std::fmt::Display| {
            Status::invalid_argument(format!(
                "coordinator address {address:?} cannot be used: {e}; expected ip:port"
            ))
        };
        let channel = Endpoint::from_shared(format!("https://{address}"))
            .map_err(|e| unusable(&e))?
            .tls_config(self.identity.tonic_client_tls(Role::Coordinator))
            .map_err(|e| unusable(&e))?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
            .local_address(self.source_for(&address).await?)
            .connect_lazy();
        self.lock().channels.insert(address, channel.clone());
        Ok(channel)
    }

    /// Which of our addresses to connect from.
    async fn source_for(&self, address: &str) -> Result<Option<IpAddr>, Status> {
        if self.network.is_any() {
            return Ok(None);
        }
        let resolved = tokio::net::lookup_host(address).await.map(Iterator::collect::<Vec<_>>);
        // A name that does not resolve now is told by the connection itself.
        let remotes = self.network.order(resolved.unwrap_or_default());
        let mut refusal = None;
        for remote in remotes {
            match self.network.source_for(remote.ip()) {
                Ok(source) => return Ok(source),
                Err(error) => refusal = Some(error),
            }
        }
        let why = refusal.map_or_else(
            || {
                "all its addresses lie in networks that `[network] avoid` forbids, or it has none"
                    .to_owned()
            },
            |error| error.to_string(),
        );
        Err(Status::unavailable(format!("coordinator {address} is not connected to: {why}")))
    }

    /// Learns from a failed call who leads, or that the member asked is no use. Returns whether trying again makes
    /// sense: the member was not the leader or could not be reached.
    pub fn learn(&self, failure: &Status) -> bool {
        let detail = status::detail(failure);
        let code = detail.as_ref().map(|d| d.code.as_str());
        let mut state = self.lock();
        if code == Some(NOT_LEADER.code) {
            let asked = state.believed.take();
            let named = detail.map(|d| d.leader).filter(|l| !l.is_empty());
            // A member that names the one we just asked knows no better than we do.
            state.believed = named.filter(|n| Some(n) != asked.as_ref());
            if state.believed.is_none() {
                state.next += 1;
            }
            return true;
        }
        if code == Some(NO_LEADER.code)
            || (code.is_none()
                && matches!(failure.code(), Code::Unavailable | Code::Unknown | Code::Cancelled))
        {
            let asked = state.believed.take();
            if let Some(address) = asked {
                state.channels.remove(&address);
            }
            state.next += 1;
            return true;
        }
        false
    }

    /// Makes a call at the leader, following redirections and trying other members until `deadline` has passed.
    ///
    /// The call must be idempotent: it is made again when its outcome is unknown.
    ///
    /// # Errors
    /// The first failure that another member would not cure, or the last one when the time is over.
    ///
    /// # Cancel safety
    /// Dropping it leaves the outcome of the call under way unknown.
    pub async fn call<T, F, Fut>(&self, deadline: Duration, mut f: F) -> Result<T, Status>
    where
        F: FnMut(Channel) -> Fut,
        Fut: Future<Output = Result<T, Status>>,
    {
        let until = Instant::now() + deadline;
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE, Backoff::any_seed());
        let mut failures = 0usize;
        loop {
            let channel = self.channel().await?;
            let failure = match tokio::time::timeout_at(until, f(channel)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(failure)) => failure,
                Err(_) => {
                    self.lock().believed = None;
                    return Err(Status::deadline_exceeded(format!(
                        "no coordinator answered within {deadline:?} (asked: {}); check that a majority of them is \
                         running and reachable",
                        self.members.join(", ")
                    )));
                }
            };
            if !self.learn(&failure) {
                return Err(failure);
            }
            failures += 1;
            // A redirection is followed at once; a full round without success waits.
            if self.lock().believed.is_none() && failures >= self.members.len() {
                let pause = backoff.next_wait();
                if Instant::now() + pause >= until {
                    return Err(failure);
                }
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// Connections from now on are made with the identity as it is now. Calls under way go on.
    pub fn renewed(&self) {
        self.lock().channels.clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // The state is a hint: a panic elsewhere cannot have left it wrong in a way that matters.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
