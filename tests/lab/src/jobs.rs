//! Job objects: what a method that returned 4096 does meanwhile, and how it ended.

use std::sync::Arc;

use tokio::sync::oneshot;
use uuid::Uuid;

use crate::classes;
use crate::cluster::{Cluster, now};
use crate::control::FaultKind;
use crate::error::LabError;
use crate::model::{Busy, State, guid};

pub(crate) const RUNNING: u16 = 4;
pub(crate) const COMPLETED: u16 = 7;
pub(crate) const EXCEPTION: u16 = 10;
pub(crate) const WARNINGS: u16 = 32768;

/// A job object.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) id: Uuid,
    pub(crate) host: String,
    pub(crate) vm: Option<Uuid>,
    pub(crate) method: String,
    pub(crate) kind: u16,
    pub(crate) state: u16,
    pub(crate) error_code: u16,
    pub(crate) error: String,
    /// What GetErrorEx tells: (object path of the device, sentence).
    pub(crate) details: Vec<(String, String)>,
    /// Object paths that Msvm_AffectedJobElement leads to.
    pub(crate) affected: Vec<String>,
    pub(crate) started: u64,
}

/// How a job ends badly.
#[derive(Debug)]
pub(crate) struct JobError {
    pub(crate) code: u16,
    pub(crate) text: String,
    /// What GetErrorEx tells: (object path of the device, sentence).
    pub(crate) details: Vec<(String, String)>,
}

impl JobError {
    pub(crate) fn new(code: u16, text: impl Into<String>) -> Self {
        Self { code, text: text.into(), details: Vec::new() }
    }
}

impl From<LabError> for JobError {
    fn from(e: LabError) -> Self {
        let code = match &e {
            LabError::Refused { code, .. } => u16::try_from(*code).unwrap_or(32768),
            _ => 32768,
        };
        Self::new(code, e.to_string())
    }
}

/// A job that was started: its reference, and the moment of its end.
pub(crate) struct Started {
    pub(crate) id: Uuid,
    pub(crate) done: oneshot::Receiver<()>,
}

impl State {
    /// Makes the job object and marks the VM busy.
    pub(crate) fn begin_job(
        &mut self,
        host: &str,
        vm: Option<Uuid>,
        method: &str,
        kind: u16,
        busy: Option<Busy>,
    ) -> Uuid {
        let id = self.new_guid();
        let job = Job {
            id,
            host: host.to_owned(),
            vm,
            method: method.to_owned(),
            kind,
            state: RUNNING,
            error_code: 0,
            error: String::new(),
            details: Vec::new(),
            affected: Vec::new(),
            started: now(),
        };
        self.jobs.insert(id, job);
        if let Some(vm) = vm
            && let Some(busy) = busy
            && let Some(found) = self.vms.get_mut(&vm)
        {
            found.busy = Some(busy);
            self.announce_vm(vm);
        }
        id
    }

    fn end_job(&mut self, id: Uuid, result: Result<Vec<String>, JobError>) {
        let Some(job) = self.jobs.get(&id) else { return };
        let (vm, host, method) = (job.vm, job.host.clone(), job.method.clone());
        let warned = self
            .strike(vm, Some(&host), |k| {
                (matches!(k, FaultKind::JobWarns { .. }) && k.is_about(&method)).then_some(())
            })
            .is_some();
        if let Some(job) = self.jobs.get_mut(&id) {
            match result {
                Ok(affected) => {
                    job.state = if warned { WARNINGS } else { COMPLETED };
                    job.affected = affected;
                }
                Err(e) => {
                    job.state = EXCEPTION;
                    job.error_code = e.code;
                    job.error = e.text;
                    job.details = e.details;
                }
            }
        }
        if let Some(vm) = vm
            && let Some(found) = self.vms.get_mut(&vm)
            && found.busy.take().is_some()
        {
            self.announce_vm(vm);
        }
    }
}

impl Cluster {
    /// Does the work of a job after the usual delay, then forgets the job when its time has come.
    pub(crate) fn run_job(
        self: &Arc<Self>,
        id: Uuid,
        work: impl FnOnce(&Arc<Self>) -> Result<Vec<String>, JobError> + Send + 'static,
    ) -> Started {
        let (sender, done) = oneshot::channel();
        let cluster = self.clone();
        self.tasks.spawn(async move {
            cluster.pause(cluster.config.delays.job_ms).await;
            let failure = cluster.change(|s| {
                let job = s.jobs.get(&id)?;
                let (vm, host, method) = (job.vm, job.host.clone(), job.method.clone());
                s.strike(vm, Some(&host), |k| match k {
                    FaultKind::JobFails { code, description, .. } if k.is_about(&method) => {
                        let code = u16::try_from(*code).unwrap_or(32768);
                        Some(JobError::new(code, description.clone()))
                    }
                    _ => None,
                })
            });
            let result = match failure {
                Some(e) => Err(e),
                None => {
                    let inner = cluster.clone();
                    match cluster.blocking(move || work(&inner)).await {
                        Ok(result) => result,
                        Err(e) => Err(e.into()),
                    }
                }
            };
            cluster.change(|s| {
                let job = s.jobs.get(&id).map(|j| (j.vm, j.host.clone(), j.method.clone()));
                s.end_job(id, result);
                let forgotten = job.and_then(|(vm, host, method)| {
                    s.strike(vm, Some(&host), |k| {
                        (matches!(k, FaultKind::JobVanishes { .. }) && k.is_about(&method))
                            .then_some(())
                    })
                });
                if forgotten.is_some() {
                    s.jobs.remove(&id);
                }
            });
            // Who does not wait for the end is free not to.
            let _ = sender.send(());
            tokio::select! {
                () = cluster.pause(cluster.config.delays.job_retention_ms) => {
                    cluster.change(|s| s.jobs.remove(&id));
                }
                () = cluster.cancel.cancelled() => {}
            }
        });
        Started { id, done }
    }
}

/// The object path of a job.
pub(crate) fn path(id: Uuid) -> String {
    classes::job_path(&guid(id))
}
