//! Differences, as the providers' events arrive.

use std::collections::HashSet;

use outrider_proto::ids::VmGuid;
use outrider_wmi::{EventStream, NS_CLUSTER, NS_VIRTUALIZATION, Object, WmiError};
use tokio::sync::mpsc;

use super::call::provider;
use super::{HyperV, cluster, wql};
use crate::hypervisor::{Change, HypervisorError};

/// Changes waiting for their reader; a reader that is slower hears that some were lost.
const WAITING: usize = 256;

const SYSTEMS: &str = "SELECT * FROM __InstanceOperationEvent WITHIN 2 WHERE TargetInstance ISA 'Msvm_ComputerSystem'";
const RESOURCES: &str = "SELECT * FROM __InstanceOperationEvent WITHIN 2 WHERE TargetInstance ISA 'MSCluster_Resource' \
     AND TargetInstance.Type = 'Virtual Machine'";
const NODES: &str =
    "SELECT * FROM __InstanceModificationEvent WITHIN 2 WHERE TargetInstance ISA 'MSCluster_Node'";

/// Subscribes and passes changes on until the providers or the reader are gone.
pub(super) async fn start(hyperv: HyperV) -> Result<mpsc::Receiver<Change>, HypervisorError> {
    let doing = "subscribe to the hypervisor's events";
    let systems =
        hyperv.wmi.subscribe(NS_VIRTUALIZATION, SYSTEMS).await.map_err(provider(doing))?;
    let resources = optional(hyperv.wmi.subscribe(NS_CLUSTER, RESOURCES).await, doing)?;
    let nodes = optional(hyperv.wmi.subscribe(NS_CLUSTER, NODES).await, doing)?;
    let (sender, receiver) = mpsc::channel(WAITING);
    // Ends with the reader: sending fails then, and `closed` is watched.
    tokio::spawn(async move {
        if let Err(e) = pass_on(&hyperv, systems, resources, nodes, &sender).await {
            tracing::warn!(error = %e, "the hypervisor's events ended; subscribing anew");
        }
    });
    Ok(receiver)
}

fn optional(
    answer: Result<EventStream, WmiError>,
    doing: &str,
) -> Result<Option<EventStream>, HypervisorError> {
    match answer {
        Ok(stream) => Ok(Some(stream)),
        // A stand-alone host.
        Err(WmiError::NoNamespace { .. }) => Ok(None),
        Err(e) => Err(provider(doing)(e)),
    }
}

async fn next(stream: &mut Option<EventStream>) -> Option<Result<Object, WmiError>> {
    match stream {
        Some(stream) => stream.next().await,
        None => std::future::pending().await,
    }
}

async fn pass_on(
    hyperv: &HyperV,
    mut systems: EventStream,
    mut resources: Option<EventStream>,
    mut nodes: Option<EventStream>,
    sender: &mpsc::Sender<Change>,
) -> Result<(), HypervisorError> {
    let mut known: HashSet<VmGuid> = HashSet::new();
    loop {
        let (kind, event) = tokio::select! {
            () = sender.closed() => return Ok(()),
            event = systems.next() => (Source::System, event),
            event = next(&mut resources) => (Source::Resource, event),
            event = next(&mut nodes) => (Source::Node, event),
        };
        let change = match event {
            None => return Ok(()),
            Some(Err(WmiError::EventsLost)) => Some(Change::Lost),
            Some(Err(e)) => return Err(provider("listen to the hypervisor's events")(e)),
            Some(Ok(event)) => match event.object("TargetInstance") {
                None => None,
                Some(target) => {
                    let deleted = event.class.eq_ignore_ascii_case("__InstanceDeletionEvent");
                    translate(hyperv, &mut known, kind, target, deleted).await?
                }
            },
        };
        if let Some(change) = change
            && sender.send(change).await.is_err()
        {
            return Ok(());
        }
    }
}

#[derive(Clone, Copy)]
enum Source {
    System,
    Resource,
    Node,
}

async fn translate(
    hyperv: &HyperV,
    known: &mut HashSet<VmGuid>,
    source: Source,
    target: &Object,
    deleted: bool,
) -> Result<Option<Change>, HypervisorError> {
    Ok(match source {
        Source::Node => cluster::node_state(target).map(|(host, up)| Change::Host { host, up }),
        Source::Resource if deleted => None,
        Source::Resource => cluster::owner_of(target).map(|(vm, owner)| Change::Owner(vm, owner)),
        Source::System => {
            let Some(vm) = wql::named_guid(target) else { return Ok(None) };
            // Events lag behind reads: what is true now is asked for, in both directions.
            match hyperv.one_vm(vm).await? {
                Some(seen) => {
                    known.insert(vm);
                    Some(Change::Seen(Box::new(seen)))
                }
                None if deleted || known.remove(&vm) => Some(Change::Gone(vm)),
                None => None,
            }
        }
    })
}
