//! Calls to whoever leads the coordinators. The CLI, the demo and scripts use nothing else.

use std::sync::Arc;
use std::time::Duration;

use outrider_process::backoff::Backoff;
use outrider_process::identity::Identity;
use outrider_process::leader::LeaderClient;
use outrider_proto::rpc::operator_client::OperatorClient;
use outrider_proto::{rpc, status};
use tonic::transport::Channel;
use tonic::{Response, Status};

/// Makes one call; each attempt gets a copy of the request.
macro_rules! ask {
    ($operator:ident, $method:ident, $request:expr) => {{
        let request = $request;
        $operator
            .call(|mut client| {
                let request = request.clone();
                async move { client.$method(request).await }
            })
            .await
    }};
}

/// Lists of thousands of VMs are longer than gRPC's default of 4 MiB.
const MAX_ANSWER: usize = 64 << 20;

/// A connection to the fabric as an operator.
#[derive(Debug)]
pub(crate) struct Operator {
    leader: LeaderClient,
    members: Vec<String>,
    identity: Arc<Identity>,
    /// How long a call looks for a leader before it fails.
    patience: Duration,
}

impl Operator {
    /// Connects lazily: nothing is sent before the first call.
    pub(crate) fn new(members: Vec<String>, identity: Arc<Identity>, patience: Duration) -> Self {
        let leader = LeaderClient::new(members.clone(), Arc::clone(&identity));
        Self { leader, members, identity, patience }
    }

    /// Who we are.
    pub(crate) fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// Addresses of the coordinators, as they were given.
    pub(crate) fn members(&self) -> &[String] {
        &self.members
    }

    async fn call<R, F, Fut>(&self, f: F) -> Result<R, Status>
    where
        F: Fn(OperatorClient<Channel>) -> Fut,
        Fut: Future<Output = Result<Response<R>, Status>>,
    {
        let answer = self.leader.call(self.patience, |channel| f(client(channel))).await?;
        Ok(answer.into_inner())
    }

    /// The leader's view. A member that does not lead answers, too, from what it has: it is believed only when the
    /// leader that it names does not answer.
    /// How the fabric is, as the leader sees it; as another member does (`stale`) only while none leads.
    pub(crate) async fn status(&self) -> Result<rpc::StatusReply, Status> {
        let mut answer = ask!(self, status, rpc::StatusRequest {})?;
        // Any member answers, and only the leader knows who is connected now.
        for _ in 0..answer.members.len() {
            let leader = answer.members.iter().find(|m| m.id == answer.leader_id);
            let Some(leader) = leader.filter(|_| answer.stale) else { break };
            self.leader.learn(&status::not_leader(leader.address.clone()));
            answer = ask!(self, status, rpc::StatusRequest {})?;
        }
        Ok(answer)
    }

    pub(crate) async fn hosts(&self) -> Result<Vec<rpc::Host>, Status> {
        Ok(ask!(self, list_hosts, rpc::ListHostsRequest {})?.hosts)
    }

    /// What backups left on a host (empty: on all) and nothing explains.
    pub(crate) async fn orphans(&self, host: &str) -> Result<rpc::ListOrphansReply, Status> {
        ask!(self, list_orphans, rpc::ListOrphansRequest { host: host.to_owned() })
    }

    pub(crate) async fn retire_host(
        &self,
        host: &str,
        cancel: bool,
    ) -> Result<rpc::RetireHostReply, Status> {
        ask!(self, retire_host, rpc::RetireHostRequest { host: host.to_owned(), cancel })
    }

    pub(crate) async fn forget_host(
        &self,
        host: &str,
        force: bool,
    ) -> Result<rpc::ForgetHostReply, Status> {
        ask!(self, forget_host, rpc::ForgetHostRequest { host: host.to_owned(), force })
    }

    /// All VMs, or those of one name.
    pub(crate) async fn vms(&self, name: &str) -> Result<Vec<rpc::Vm>, Status> {
        let request = rpc::ListVmsRequest { name: name.to_owned() };
        Ok(ask!(self, list_vms, request)?.vms)
    }

    /// What a deleted VM left was looked after.
    pub(crate) async fn settle_vm(&self, vm: &str) -> Result<rpc::Vm, Status> {
        let request = rpc::SettleVmRequest { vm: vm.to_owned() };
        ask!(self, settle_vm, request)
    }

    pub(crate) async fn create_group(
        &self,
        request: rpc::CreateGroupRequest,
    ) -> Result<rpc::Group, Status> {
        ask!(self, create_group, request)
    }

    /// Replaces a group's policy.
    pub(crate) async fn edit_group(
        &self,
        request: rpc::EditGroupRequest,
    ) -> Result<rpc::Group, Status> {
        ask!(self, edit_group, request)
    }

    pub(crate) async fn groups(&self) -> Result<Vec<rpc::Group>, Status> {
        Ok(ask!(self, list_groups, rpc::ListGroupsRequest {})?.groups)
    }

    pub(crate) async fn run_backup(
        &self,
        request: rpc::RunBackupRequest,
    ) -> Result<Vec<rpc::Job>, Status> {
        Ok(ask!(self, run_backup, request)?.jobs)
    }

    pub(crate) async fn jobs(
        &self,
        request: rpc::ListJobsRequest,
    ) -> Result<Vec<rpc::Job>, Status> {
        Ok(ask!(self, list_jobs, request)?.jobs)
    }

    pub(crate) async fn cancel_job(&self, job_id: &str) -> Result<rpc::Job, Status> {
        let request = rpc::CancelJobRequest { job_id: job_id.to_owned() };
        ask!(self, cancel_job, request)
    }

    pub(crate) async fn points(&self, vm: &str) -> Result<Vec<rpc::Point>, Status> {
        let request = rpc::ListPointsRequest { vm: vm.to_owned() };
        Ok(ask!(self, list_points, request)?.points)
    }

    pub(crate) async fn restore(&self, request: rpc::RestoreRequest) -> Result<rpc::Job, Status> {
        ask!(self, restore, request)
    }

    pub(crate) async fn read_access(&self, point_id: &str) -> Result<rpc::ReadAccessReply, Status> {
        let request = rpc::ReadAccessRequest { point_id: point_id.to_owned() };
        ask!(self, read_access, request)
    }

    pub(crate) async fn create_join_token(
        &self,
        request: rpc::CreateJoinTokenRequest,
    ) -> Result<rpc::JoinToken, Status> {
        ask!(self, create_join_token, request)
    }

    pub(crate) async fn join_tokens(&self) -> Result<Vec<rpc::JoinToken>, Status> {
        Ok(ask!(self, list_join_tokens, rpc::ListJoinTokensRequest {})?.tokens)
    }

    pub(crate) async fn revoke_join_token(&self, id: &str) -> Result<rpc::JoinToken, Status> {
        let request = rpc::RevokeJoinTokenRequest { token_id: id.to_owned() };
        ask!(self, revoke_join_token, request)
    }

    /// Follows jobs until all named ones have ended (without names: until `seen` says stop), across changes of leader.
    /// `seen` hears of every job at least once, and may hear of the same state twice. Returns the last state of each
    /// job in the order of their first appearance.
    pub(crate) async fn watch(
        &self,
        job_ids: &[String],
        mut seen: impl FnMut(&rpc::Job) -> Follow,
    ) -> Result<Vec<rpc::Job>, Status> {
        let mut jobs: Vec<rpc::Job> = Vec::new();
        let mut backoff =
            Backoff::new(Duration::from_millis(100), Duration::from_secs(2), Backoff::any_seed());
        let mut silent_since = tokio::time::Instant::now();
        loop {
            let request = rpc::WatchJobsRequest { job_ids: job_ids.to_vec() };
            let failure = match client(self.leader.channel().await?).watch_jobs(request).await {
                Ok(stream) => {
                    let mut stream = stream.into_inner();
                    loop {
                        match stream.message().await {
                            Ok(Some(job)) => {
                                silent_since = tokio::time::Instant::now();
                                backoff.reset();
                                let follow = seen(&job);
                                match jobs.iter_mut().find(|j| j.job_id == job.job_id) {
                                    Some(known) => *known = job,
                                    None => jobs.push(job),
                                }
                                if follow == Follow::Stop || all_ended(job_ids, &jobs) {
                                    return Ok(jobs);
                                }
                            }
                            Ok(None) if all_ended(job_ids, &jobs) => return Ok(jobs),
                            Ok(None) => {
                                break Status::unavailable("the coordinator ended the watch");
                            }
                            Err(status) => break status,
                        }
                    }
                }
                Err(status) => status,
            };
            if !self.leader.learn(&failure) || silent_since.elapsed() > self.patience {
                return Err(failure);
            }
            tokio::time::sleep(backoff.next_wait()).await;
        }
    }
}

/// What a watcher wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Follow {
    /// Go on.
    On,
    /// That was enough.
    Stop,
}

fn client(channel: Channel) -> OperatorClient<Channel> {
    OperatorClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

fn all_ended(wanted: &[String], jobs: &[rpc::Job]) -> bool {
    !wanted.is_empty()
        && wanted.iter().all(|id| jobs.iter().any(|j| j.job_id == *id && has_ended(j)))
}

/// Whether nothing more will happen to the job.
pub(crate) fn has_ended(job: &rpc::Job) -> bool {
    job.ended_unix_ms != 0
}

/// Whether the data is safe and the job did what it was asked for.
pub(crate) fn has_succeeded(job: &rpc::Job) -> bool {
    has_ended(job) && job.error_code.is_empty() && job.state.starts_with("completed")
}
