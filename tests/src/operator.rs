//! What an operator asks: typed over gRPC, or as it is typed on the command line.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use outrider_process::identity::Identity;
use outrider_process::leader::LeaderClient;
use outrider_proto::rpc;
use outrider_proto::rpc::operator_client::OperatorClient;
use outrider_proto::status::not_leader;
use serde_json::Value;
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::binary::outrider;
use crate::eventually;

/// How long a call looks for a leader.
const PATIENCE: Duration = Duration::from_secs(20);

/// An operator of a fabric.
#[derive(Debug)]
pub struct Operator {
    leader: LeaderClient,
    coordinators: String,
    identity: PathBuf,
}

/// What a command gave.
#[derive(Debug)]
pub struct Outcome {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// The one JSON object of `--json`.
    #[must_use]
    pub fn json(&self) -> Value {
        let text = self.stdout.trim();
        serde_json::from_str(text).unwrap_or_else(|e| panic!("no JSON ({e}): {self:?}"))
    }
}

impl Operator {
    /// With an operator's identity.
    #[must_use]
    pub fn new(coordinators: Vec<String>, identity: PathBuf) -> Self {
        let loaded = Identity::load(&identity).expect("an identity");
        Self {
            coordinators: coordinators.join(","),
            leader: LeaderClient::new(coordinators, Arc::new(loaded)),
            identity,
        }
    }

    async fn call<R, F>(&self, f: F) -> Result<R, Status>
    where
        F: AsyncFn(OperatorClient<Channel>) -> Result<Response<R>, Status>,
    {
        let answer = self.leader.call(PATIENCE, |channel| f(OperatorClient::new(channel))).await?;
        Ok(answer.into_inner())
    }

    /// The fabric, as its leader sees it: a member that does not lead is asked who does.
    pub async fn status(&self) -> Result<rpc::StatusReply, Status> {
        let reply = self.call(async |mut c| c.status(rpc::StatusRequest {}).await).await?;
        if !reply.stale {
            return Ok(reply);
        }
        let leader = reply.members.iter().find(|m| m.id == reply.leader_id);
        self.leader.learn(&not_leader(leader.map_or("", |m| m.address.as_str())));
        Err(Status::unavailable(format!("a member that does not lead answered: {reply:?}")))
    }

    /// One VM by its name.
    pub async fn vm(&self, name: &str) -> Result<rpc::Vm, Status> {
        let request = rpc::ListVmsRequest { name: name.to_owned() };
        let reply = self.call(async |mut c| c.list_vms(request.clone()).await).await?;
        reply.vms.into_iter().next().ok_or_else(|| Status::not_found(format!("no VM {name}")))
    }

    /// All hosts.
    pub async fn hosts(&self) -> Result<Vec<rpc::Host>, Status> {
        Ok(self.call(async |mut c| c.list_hosts(rpc::ListHostsRequest {}).await).await?.hosts)
    }

    /// A group with a policy that only runs when asked.
    pub async fn group(&self, name: &str, vms: &[&str], policy: rpc::Policy) -> rpc::Group {
        let request = rpc::CreateGroupRequest {
            name: name.to_owned(),
            vms: vms.iter().map(|v| (*v).to_owned()).collect(),
            name_patterns: vec![],
            policy: Some(policy),
        };
        self.call(async |mut c| c.create_group(request.clone()).await).await.expect("a group")
    }

    /// Starts a backup.
    pub async fn backup(&self, vm: &str, kind: rpc::BackupKind) -> rpc::Job {
        let request =
            rpc::RunBackupRequest { vm: vm.to_owned(), group: String::new(), kind: kind.into() };
        let reply = self.call(async |mut c| c.run_backup(request.clone()).await).await;
        let mut jobs = reply.unwrap_or_else(|e| panic!("the backup of {vm} starts: {e}")).jobs;
        assert_eq!(jobs.len(), 1, "one VM, one job");
        jobs.remove(0)
    }

    /// A job as it is now.
    pub async fn job(&self, id: &str) -> Result<rpc::Job, Status> {
        let request = rpc::ListJobsRequest { job_id: id.to_owned(), ..Default::default() };
        let reply = self.call(async |mut c| c.list_jobs(request.clone()).await).await?;
        reply.jobs.into_iter().next().ok_or_else(|| Status::not_found(format!("no job {id}")))
    }

    /// All jobs of a VM, newest first.
    pub async fn jobs(&self, vm: &str) -> Vec<rpc::Job> {
        let request = rpc::ListJobsRequest { vm: vm.to_owned(), ..Default::default() };
        let reply = self.call(async |mut c| c.list_jobs(request.clone()).await).await;
        reply.expect("a list").jobs
    }

    /// Waits until nothing more happens to a job.
    pub async fn ended(&self, id: &str) -> rpc::Job {
        eventually(&format!("job {id} ends"), async || {
            let job = self.job(id).await.map_err(|e| e.to_string())?;
            if job.ended_unix_ms != 0 { Ok(job) } else { Err(format!("{job:?}")) }
        })
        .await
    }

    /// Waits until a job has ended with both results good.
    pub async fn done(&self, id: &str) -> rpc::Job {
        let job = self.ended(id).await;
        let good = job.state.starts_with("completed") && job.data_safe && job.host_clean;
        assert!(good && job.error_code.is_empty(), "both results are good: {job:?}");
        job
    }

    /// Runs a backup to its good end and gives its recovery point.
    pub async fn backed_up(&self, vm: &str, kind: rpc::BackupKind) -> rpc::Point {
        let job = self.backup(vm, kind).await;
        let job = self.done(&job.job_id).await;
        self.point(vm, &job.point_id).await
    }

    /// Recovery points of a VM, oldest first.
    pub async fn points(&self, vm: &str) -> Vec<rpc::Point> {
        let request = rpc::ListPointsRequest { vm: vm.to_owned() };
        let reply = self.call(async |mut c| c.list_points(request.clone()).await).await;
        let mut points = reply.expect("a list").points;
        points.sort_by_key(|p| p.committed_unix_ms);
        points
    }

    /// One recovery point.
    pub async fn point(&self, vm: &str, id: &str) -> rpc::Point {
        let points = self.points(vm).await;
        let found = points.iter().find(|p| p.point_id == id).cloned();
        found.unwrap_or_else(|| panic!("point {id:?} of {vm} among {points:?}"))
    }

    /// Starts a restore.
    pub async fn restore(&self, request: rpc::RestoreRequest) -> Result<rpc::Job, Status> {
        self.call(async |mut c| c.restore(request.clone()).await).await
    }

    /// A command of the operator, with its connection in the environment.
    #[must_use]
    pub fn cli(&self, args: &[&str]) -> Outcome {
        self.cli_as(&self.identity, args)
    }

    /// As [`Self::cli`], with another identity.
    #[must_use]
    pub fn cli_as(&self, identity: &std::path::Path, args: &[&str]) -> Outcome {
        run(
            args,
            &[
                ("OUTRIDER_COORDINATORS", self.coordinators.as_ref()),
                ("OUTRIDER_IDENTITY", identity.as_os_str()),
            ],
        )
    }
}

/// Runs the program to its end.
#[must_use]
pub fn run(args: &[&str], env: &[(&str, &std::ffi::OsStr)]) -> Outcome {
    let output = std::process::Command::new(outrider())
        .args(args)
        .envs(env.iter().copied())
        .stdin(std::process::Stdio::null())
        .output()
        .expect("the program runs");
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
