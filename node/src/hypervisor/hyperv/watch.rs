//! Differences, as the providers' events arrive.
//!
//! An event only says where to look: reads are what is told on. Neither of the two is sure to be first (facts, sections 1
//! and 4.2), so that what an event was about is looked at at once and twice more; and because events get lost without a word,
//! for instance while a provider restarts, everything is looked at now and then.
//!
//! | file | idea |
//! | --- | --- |
//! | `due` | when to look at what |
//! | `told` | what the reader knows, and what a look adds to it |

mod due;
mod told;

use std::time::Instant;

use outrider_wmi::{EventStream, NS_CLUSTER, NS_VIRTUALIZATION, Object, WmiError};
use tokio::sync::mpsc;

use self::due::{Due, Round};
use self::told::Told;
use super::call::provider;
use super::{HyperV, wql};
use crate::hypervisor::{Change, HypervisorError};

/// Changes waiting for their reader; while it is slower, events wait in their own queues, which tell when they overflow.
const WAITING: usize = 256;

const SYSTEMS: &str = "SELECT * FROM __InstanceOperationEvent WITHIN 2 WHERE TargetInstance ISA 'Msvm_ComputerSystem'";
const RESOURCES: &str = "SELECT * FROM __InstanceOperationEvent WITHIN 2 WHERE TargetInstance ISA 'MSCluster_Resource' \
     AND TargetInstance.Type = 'Virtual Machine'";
const NODES: &str =
    "SELECT * FROM __InstanceModificationEvent WITHIN 2 WHERE TargetInstance ISA 'MSCluster_Node'";
/// What changes all the time and says nothing.
const CLOCK: &str = "OnTimeInMilliseconds";

/// Subscribes and passes changes on until the providers or the reader are gone.
pub(super) async fn start(hyperv: HyperV) -> Result<mpsc::Receiver<Change>, HypervisorError> {
    let doing = "subscribe to the hypervisor's events";
    let systems =
        hyperv.wmi.subscribe(NS_VIRTUALIZATION, SYSTEMS).await.map_err(provider(doing))?;
    let resources = optional(hyperv.wmi.subscribe(NS_CLUSTER, RESOURCES).await, doing)?;
    let nodes = optional(hyperv.wmi.subscribe(NS_CLUSTER, NODES).await, doing)?;
    let events = Events { systems, resources, nodes };
    let (sender, receiver) = mpsc::channel(WAITING);
    // Ends with the reader: sending fails then, and `closed` is watched.
    tokio::spawn(async move {
        if let Err(e) = pass_on(&hyperv, events, &sender).await {
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

/// The subscriptions of one watch.
struct Events {
    systems: EventStream,
    resources: Option<EventStream>,
    nodes: Option<EventStream>,
}

impl Events {
    /// The next event and whether it is the hypervisor's own.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn next(&mut self) -> (bool, Option<Result<Object, WmiError>>) {
        async fn of(stream: &mut Option<EventStream>) -> Option<Result<Object, WmiError>> {
            match stream {
                Some(stream) => stream.next().await,
                None => std::future::pending().await,
            }
        }
        tokio::select! {
            event = self.systems.next() => (true, event),
            event = of(&mut self.resources) => (false, event),
            event = of(&mut self.nodes) => (false, event),
        }
    }
}

async fn pass_on(
    hyperv: &HyperV,
    mut events: Events,
    sender: &mpsc::Sender<Change>,
) -> Result<(), HypervisorError> {
    let mut due = Due::new(hyperv.times.inventory_interval);
    // The reader takes an inventory of its own, after this one: what lies between the two is in its favour.
    let (vms, view) = hyperv.everything().await?;
    let mut told = Told::new(vms, view);
    due.looked_at_all(Instant::now());
    loop {
        let (of_hypervisor, event) = tokio::select! {
            () = sender.closed() => return Ok(()),
            event = events.next() => event,
            () = tokio::time::sleep_until(due.next().into()) => {
                let round = due.take(Instant::now());
                for change in look(hyperv, round, &mut told, &mut due).await? {
                    if sender.send(change).await.is_err() {
                        return Ok(());
                    }
                }
                continue;
            }
        };
        match event {
            None => return Ok(()),
            Some(Err(WmiError::EventsLost)) => {
                due.all(Instant::now());
                if sender.send(Change::Lost).await.is_err() {
                    return Ok(());
                }
            }
            Some(Err(e)) => return Err(provider("listen to the hypervisor's events")(e)),
            Some(Ok(event)) => note(&event, of_hypervisor, &mut due),
        }
    }
}

/// Notes where an event says to look.
fn note(event: &Object, of_hypervisor: bool, due: &mut Due) {
    let Some(target) = event.object("TargetInstance") else { return };
    if event.object("PreviousInstance").is_some_and(|before| says_nothing(before, target)) {
        return;
    }
    let now = Instant::now();
    if !of_hypervisor {
        // Also when the event does not name its VM: private properties need not come with events.
        due.cluster(now);
    } else if let Some(vm) = wql::named_guid(target) {
        let deleted = event.class.eq_ignore_ascii_case("__InstanceDeletionEvent");
        due.vm(vm, deleted, now);
    }
}

/// Whether two states of an object differ in their clock only.
fn says_nothing(before: &Object, now: &Object) -> bool {
    let without_clock = |object: &Object| object.clone().with(CLOCK, outrider_wmi::Value::Null);
    before != now && without_clock(before) == without_clock(now)
}

/// Looks at what is due; gives what the reader does not know yet.
async fn look(
    hyperv: &HyperV,
    round: Round,
    told: &mut Told,
    due: &mut Due,
) -> Result<Vec<Change>, HypervisorError> {
    if round.all {
        let (vms, view) = hyperv.everything().await?;
        let now = Instant::now();
        due.looked_at_all(now);
        let mut changes = told.cluster(view);
        let (more, missing) = told.all(vms);
        changes.extend(more);
        for vm in missing {
            due.vm(vm, false, now);
        }
        return Ok(changes);
    }
    let mut changes = Vec::new();
    // A VM that comes or goes is a reason to ask who owns it: the cluster's own event may be late or lost, too.
    let moves = |(vm, deleted): &(_, bool)| *deleted || !told.has(*vm);
    if round.cluster || round.vms.iter().any(moves) {
        changes = told.cluster(hyperv.cluster_view().await?);
        for vm in told.expected() {
            due.expect(vm, Instant::now());
        }
    }
    let mut seen = Vec::with_capacity(round.vms.len());
    for (vm, deleted) in round.vms {
        seen.push((vm, deleted, hyperv.one_vm(vm, told.view()).await?));
    }
    let (more, missing) = told.some(seen, Instant::now());
    changes.extend(more);
    for vm in missing {
        due.confirm(vm, Instant::now());
    }
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(class: &str, target: Object, before: Option<Object>) -> Object {
        let inner = |o: Object| outrider_wmi::Value::Object(Box::new(o));
        let event = Object::new(class, "").with("TargetInstance", inner(target));
        match before {
            Some(before) => event.with("PreviousInstance", inner(before)),
            None => event,
        }
    }

    fn system(state: u32, clock: u32) -> Object {
        Object::new(wql::SYSTEM, "p")
            .with("Name", "11111111-2222-3333-4444-555555555555")
            .with("EnabledState", state)
            .with("OnTimeInMilliseconds", clock)
    }

    const MODIFIED: &str = "__InstanceModificationEvent";

    #[test]
    fn an_event_that_only_tells_the_time_is_no_reason_to_look() {
        let far = Instant::now() + std::time::Duration::from_secs(3600);
        let due_after = |event: Object| {
            let mut due = Due::new(std::time::Duration::from_secs(7200));
            note(&event, true, &mut due);
            due.take(Instant::now()).vms.len()
        };
        assert_eq!(due_after(event(MODIFIED, system(2, 5), Some(system(2, 4)))), 0);
        assert_eq!(due_after(event(MODIFIED, system(3, 5), Some(system(2, 4)))), 1);
        assert_eq!(due_after(event(MODIFIED, system(2, 5), Some(system(2, 5)))), 1, "who knows");
        assert_eq!(due_after(event(MODIFIED, system(2, 5), None)), 1);
        assert!(Instant::now() < far);
    }

    #[test]
    fn a_cluster_event_that_does_not_name_its_vm_is_still_a_reason_to_look() {
        let mut due = Due::new(std::time::Duration::from_secs(7200));
        let target = Object::new("MSCluster_Resource", "p").with("Type", "Virtual Machine");
        note(&event(MODIFIED, target, None), false, &mut due);
        let round = due.take(Instant::now());
        assert!(round.cluster && round.vms.is_empty());
    }
}
