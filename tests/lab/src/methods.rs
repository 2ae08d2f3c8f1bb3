//! Methods: checks, return codes, jobs; and where a test may hold, delay or fail them.

mod args;
mod cluster;
mod image;
mod security;
mod snapshot;
mod system;

use std::path::Path;
use std::sync::Arc;

use outrider_wmi::lab::wire::Refusal;
use outrider_wmi::{NS_CLUSTER, NS_HGS, NS_VIRTUALIZATION, Object, Value, embedded};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cluster::Cluster;
use crate::control::{CallRecord, FaultKind, When};
use crate::jobs::{self, Started};
use crate::model::guid;

pub(crate) use args::Args;
pub(crate) use system::announce_new;

/// Calls remembered.
const MAX_CALLS: usize = 100_000;

/// Return values.
pub(crate) const DONE: u32 = 0;
pub(crate) const STARTED: u32 = 4096;
pub(crate) const FAILED: u32 = 32768;
pub(crate) const INVALID: u32 = 32773;
pub(crate) const IN_USE: u32 = 32774;
pub(crate) const WRONG_STATE: u32 = 32775;
pub(crate) const FILE_NOT_FOUND: u32 = 32779;

/// One call.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) host: String,
    pub(crate) namespace: String,
    pub(crate) path: String,
    pub(crate) method: String,
    pub(crate) args: Args,
}

/// Out parameters, and the end of the job if one was started.
pub(crate) struct Outcome {
    out: Object,
    done: Option<oneshot::Receiver<()>>,
}

impl Outcome {
    /// A return value and nothing else.
    pub(crate) fn code(code: u32) -> Self {
        Self { out: Object::new("__PARAMETERS", "").with("ReturnValue", code), done: None }
    }

    /// 4096 and the job.
    pub(crate) fn job(started: Started) -> Self {
        let mut outcome = Self::code(STARTED).with("Job", Value::Ref(jobs::path(started.id)));
        outcome.done = Some(started.done);
        outcome
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.out.set(name, value);
        self
    }
}

/// Calls a method. A call that has begun its work goes on when the caller disappears; one that is held before it does
/// not happen then.
pub(crate) async fn exec(
    cluster: &Arc<Cluster>,
    call: Call,
    caller_gone: &CancellationToken,
) -> Result<Object, Refusal> {
    let vm = cluster.read(|s| args::vm_of(s, &call));
    if let Some(hold) = cluster.change(|s| s.catch(&call.method, vm, &call.host, When::Before)) {
        cluster.change(|s| s.hold_now(hold));
        let _ends_with_caller = EndHold { cluster, hold };
        tokio::select! {
            () = released(cluster, hold) => {}
            () = caller_gone.cancelled() => {
                return Err(invalid(&call.method, "the caller disappeared before the call happened"));
            }
        }
    }
    let inner = cluster.clone();
    let work = cluster.tasks.spawn(async move { perform(&inner, call, vm).await });
    work.await.unwrap_or_else(|_| Err(invalid("the call", "the lab is ending")))
}

/// Ends a hold when the call that is held ends in any way, its being dropped included.
struct EndHold<'a> {
    cluster: &'a Cluster,
    hold: u64,
}

impl Drop for EndHold<'_> {
    fn drop(&mut self) {
        self.cluster.change(|s| s.holds.retain(|h| h.id != self.hold));
    }
}

async fn released(cluster: &Cluster, hold: u64) {
    cluster.until(|s| s.holds.iter().all(|h| h.id != hold).then_some(())).await;
}

async fn perform(cluster: &Arc<Cluster>, call: Call, vm: Option<Uuid>) -> Result<Object, Refusal> {
    let (delay, code) = cluster.change(|s| {
        let host = Some(call.host.as_str());
        let delay = s.strike(vm, host, |k| match k {
            FaultKind::Delay { ms, .. } if k.is_about(&call.method) => Some(*ms),
            _ => None,
        });
        let code = s.strike(vm, host, |k| match k {
            FaultKind::MethodReturns { code, .. } if k.is_about(&call.method) => Some(*code),
            _ => None,
        });
        (delay, code)
    });
    if let Some(ms) = delay {
        cluster.pause(ms).await;
    }
    let result = match code {
        Some(code) => Ok(Outcome::code(code)),
        None => dispatch(cluster, &call).await,
    };
    let code = match &result {
        Ok(outcome) => outcome.out.u64("ReturnValue").and_then(|c| u32::try_from(c).ok()),
        Err(_) => None,
    };
    cluster.change(|s| {
        let order = s.next();
        if s.calls.len() == MAX_CALLS {
            s.calls.pop_front();
        }
        s.calls.push_back(CallRecord {
            order,
            host: call.host.clone(),
            method: call.method.clone(),
            path: call.path.clone(),
            vm,
            code: code.unwrap_or(FAILED),
        });
    });
    let outcome = result?;
    if let Some(hold) = cluster.change(|s| s.catch(&call.method, vm, &call.host, When::After)) {
        if let Some(done) = outcome.done {
            // The job's end, or the lab's.
            let _ = done.await;
        }
        cluster.change(|s| s.hold_now(hold));
        tokio::select! {
            () = released(cluster, hold) => {}
            () = cluster.cancel.cancelled() => {}
        }
    }
    Ok(outcome.out)
}

async fn dispatch(cluster: &Arc<Cluster>, call: &Call) -> Result<Outcome, Refusal> {
    // The object must exist for the provider of this host.
    let target =
        cluster.read(|s| crate::classes::get(s, &call.host, &call.namespace, &call.path))?;
    let unknown = || invalid(&call.method, "no such method on this class");
    let class = target.class.as_str();
    if call.namespace.eq_ignore_ascii_case(NS_CLUSTER) {
        return cluster::call(cluster, call, &target).await.unwrap_or_else(|| Err(unknown()));
    }
    if call.namespace.eq_ignore_ascii_case(NS_HGS) {
        return security::call(cluster, call).unwrap_or_else(|| Err(unknown()));
    }
    if !call.namespace.eq_ignore_ascii_case(NS_VIRTUALIZATION) {
        return Err(Refusal::NoNamespace(call.namespace.clone()));
    }
    match class {
        "Msvm_VirtualSystemSnapshotService" | "Msvm_VirtualSystemReferencePointService" => {
            snapshot::call(cluster, call).unwrap_or_else(|| Err(unknown()))
        }
        "Msvm_ImageManagementService" => {
            image::call(cluster, call).await.unwrap_or_else(|| Err(unknown()))
        }
        "Msvm_VirtualSystemManagementService" | "Msvm_ComputerSystem" => {
            system::call(cluster, call).unwrap_or_else(|| Err(unknown()))
        }
        "Msvm_SecurityService" => security::call(cluster, call).unwrap_or_else(|| Err(unknown())),
        "Msvm_ConcreteJob" if call.method == "GetErrorEx" => Ok(job_errors(cluster, &target)),
        _ => Err(unknown()),
    }
}

/// What went wrong in a job, each with the device that it is about.
fn job_errors(cluster: &Cluster, job: &Object) -> Outcome {
    let details = cluster.read(|s| {
        let found = s.jobs.values().find(|j| job.str("InstanceID") == Some(&guid(j.id)));
        found.map(|j| j.details.clone()).unwrap_or_default()
    });
    let error = |(source, message): &(String, String)| {
        let error = Object::new("Msvm_Error", "")
            .with("CIMStatusCode", 1_u32)
            .with("ErrorType", 4_u16)
            .with("PerceivedSeverity", 3_u16)
            .with("MessageID", "32773")
            .with("Message", message.as_str())
            .with("ErrorSource", source.as_str())
            .with("ErrorSourceFormat", 2_u16);
        Value::Str(embedded::to_text(&error))
    };
    let errors: Vec<Value> = details.iter().map(error).collect();
    Outcome::code(DONE).with("Errors", Value::Array(errors))
}

/// Writes properties of an instance: of cluster groups, which is all that may be written here.
pub(crate) fn put(
    cluster: &Cluster,
    host: &str,
    namespace: &str,
    path: &str,
    properties: &[(String, Value)],
) -> Result<(), Refusal> {
    let target = cluster.read(|s| crate::classes::get(s, host, namespace, path))?;
    if target.class != "MSCluster_ResourceGroup" {
        return Err(invalid(path, "instances of this class cannot be written"));
    }
    cluster.change(|s| {
        let id = cluster::vm_of_group(s, &target).ok_or_else(|| invalid(path, "no such group"))?;
        let vm = s.vm_mut(id).map_err(|e| invalid(path, &e.to_string()))?;
        for (name, value) in properties {
            vm.group.set(name, value).map_err(|e| invalid(path, &e))?;
        }
        s.announce_group(id, None);
        Ok(())
    })
}

/// Lets a VM's account open what lies in a folder.
pub(crate) fn grant(cluster: &Cluster, vm: &str, folder: &Path) -> Result<(), Refusal> {
    let id: Uuid = vm.parse().map_err(|_| invalid("grant", "no GUID"))?;
    cluster.change(|s| {
        let vm = s.vm_mut(id).map_err(|e| invalid("grant", &e.to_string()))?;
        vm.rights = vm.disks.iter().flat_map(|d| &d.chain).all(|file| file.starts_with(folder));
        Ok(())
    })
}

pub(crate) fn invalid(what: &str, reason: &str) -> Refusal {
    Refusal::Invalid { what: what.to_owned(), reason: reason.to_owned() }
}
