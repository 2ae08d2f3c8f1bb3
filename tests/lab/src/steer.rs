//! Commands of the control client.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value as Json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::checkpoint::{self, NewCheckpoint};
use crate::cluster::Cluster;
use crate::control::{
    CheckpointState, Command, CreateVm, DiskSource, DiskState, HostState, LabState,
    ReferencePointState, VmState, WaitFor,
};
use crate::disks::{self, locked};
use crate::error::LabError;
use crate::faults::Progress;
use crate::gate::Gate;
use crate::guest::{self, Chance};
use crate::host;
use crate::import;
use crate::merge::Obstacle;
use crate::methods::announce_new;
use crate::migrate;
use crate::model::{Busy, Disk, Power, State, Vm, guid};
use crate::truth;

/// A refusal on the wire.
#[derive(Debug, Serialize, serde::Deserialize)]
pub(crate) struct CommandError {
    pub(crate) code: u32,
    pub(crate) message: String,
}

/// The answer to a control client, and whether the lab is to end once it is sent.
pub(crate) struct Answered {
    pub(crate) value: Json,
    pub(crate) end: bool,
}

/// Does what a control client asks. The work goes on when the client disappears; only waits end with it.
pub(crate) async fn answer(cluster: &Arc<Cluster>, command: Json) -> Answered {
    let mut end = false;
    let result = match serde_json::from_value::<Command>(command) {
        Ok(Command::Wait { condition, deadline_ms }) => {
            wait(cluster, &condition, deadline_ms).await.map(|()| Json::Null)
        }
        Ok(Command::Shutdown) => {
            end = true;
            Ok(Json::Null)
        }
        Ok(command) => {
            let inner = cluster.clone();
            let work = cluster.tasks.spawn(async move {
                tokio::select! {
                    result = obey(&inner, command) => result,
                    () = inner.cancel.cancelled() => Err(LabError::Ending),
                }
            });
            work.await.unwrap_or(Err(LabError::Ending))
        }
        Err(e) => Err(LabError::Config(format!("no command: {e}"))),
    };
    let result = result.map_err(|e| CommandError {
        code: if let LabError::Refused { code, .. } = e { code } else { 0 },
        message: e.to_string(),
    });
    // Results are made of plain maps and lists.
    Answered { value: serde_json::to_value(result).unwrap_or(Json::Null), end }
}

fn json(value: impl Serialize) -> Result<Json, LabError> {
    serde_json::to_value(value).map_err(|e| LabError::Config(e.to_string()))
}

async fn obey(cluster: &Arc<Cluster>, command: Command) -> Result<Json, LabError> {
    let id_of = |vm: &str| cluster.read(|s| s.find_vm(vm).map(|vm| vm.id));
    match command {
        Command::State => json(cluster.read(describe)),
        Command::CreateVm(new) => {
            let id = on_disks(cluster, move |c| create_vm(c, &new)).await?;
            json(cluster.read(|s| s.vm(id).map(describe_vm(s)))?)
        }
        Command::AddDisk { vm, disk } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| add_disk(c, id, &disk)).await.and_then(json)
        }
        Command::ResizeDisk { vm, disk, size } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| resize_disk(c, id, disk, size)).await.and_then(json)
        }
        Command::ReplaceDisk { vm, disk, with } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| replace_disk(c, id, disk, &with)).await.and_then(json)
        }
        Command::StartVm { vm } => power(cluster, id_of(&vm)?, Power::Running).await,
        Command::StopVm { vm } => power(cluster, id_of(&vm)?, Power::Off).await,
        Command::PauseVm { vm } => power(cluster, id_of(&vm)?, Power::Paused).await,
        Command::DeleteVm { vm } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| {
                host::power(c, id, Power::Off)?;
                import::destroy(c, id)
            })
            .await
            .and_then(json)
        }
        Command::SetVss { vm, ok } => json(cluster.change_vm(id_of(&vm)?, |vm| vm.vss = ok)?),
        Command::GuestWrite(write) => guest::write(cluster, write).await.and_then(json),
        Command::GuestRate { vm, bytes_per_second, seed } => {
            json(guest_rate(cluster, id_of(&vm)?, bytes_per_second, seed)?)
        }
        Command::UserCheckpoint { vm, name } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| user_checkpoint(c, id, name)).await.and_then(json)
        }
        Command::ApplyCheckpoint { vm, checkpoint } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| apply(c, id, checkpoint)).await.and_then(json)
        }
        Command::DeleteCheckpoint { vm, checkpoint } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| {
                idle(c, id)?;
                checkpoint::remove(c, id, checkpoint, None)
            })
            .await
            .and_then(json)
        }
        Command::Migrate { vm, target, kind } => {
            json(migrate::migrate(cluster, id_of(&vm)?, &target, kind).await?)
        }
        Command::MigrateStorage { vm, csv } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| migrate::storage(c, id, &csv)).await.and_then(json)
        }
        Command::CrashHost { host } => json(host::crash(cluster, &host).await?),
        Command::StartHost { host } => json(host::start(cluster, &host)?),
        Command::DrainHost { host } => json(host::drain(cluster, &host).await?),
        Command::ResumeHost { host } => {
            json(cluster.change(|s| s.host_mut(&host).map(|h| h.paused = false))?)
        }
        Command::SetCheckpointOnMigration(switch) => json(cluster.change(|s| s.switch = switch)),
        Command::TruthList { vm } => {
            let id = id_of(&vm)?;
            json(
                cluster
                    .read(|s| s.truth.iter().filter(|t| t.vm == id).cloned().collect::<Vec<_>>()),
            )
        }
        Command::Compare { disk_path, checkpoint, disk } => {
            on_disks(cluster, move |c| truth::compare_with(c, &disk_path, checkpoint, disk))
                .await
                .and_then(json)
        }
        Command::SetFault(fault) => json(cluster.change(|s| s.set_fault(fault))?),
        Command::ClearFault { fault } => {
            json(cluster.change(|s| s.faults.retain(|f| f.id != fault)))
        }
        Command::ClearFaults => json(cluster.change(|s| s.faults.clear())),
        Command::LoseRct { vm } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| {
                let io = c.read(|s| s.vm(id).map(|vm| vm.io.clone()))?;
                locked(&io).forget_all();
                Ok(())
            })
            .await
            .and_then(json)
        }
        Command::Hold(spec) => json(cluster.change(|s| s.set_hold(spec))?),
        Command::Release { hold } => json(cluster.change(|s| s.holds.retain(|h| h.id != hold))),
        Command::SetGate(spec) => {
            let vm = id_of(&spec.vm)?;
            json(cluster.change(|s| {
                let id = s.next();
                let (host, left) = (spec.host, spec.budget);
                s.gates.push(Gate { id, vm, host, left, blocked: Default::default() });
                id
            }))
        }
        Command::ReleaseGate { gate } => json(cluster.change(|s| s.gates.retain(|g| g.id != gate))),
        Command::BytesRead { vm, host } => {
            let id = vm.map(|vm| id_of(&vm)).transpose()?;
            json(cluster.read(|s| {
                let wanted = s.bytes_read.values().filter(|f| {
                    (id.is_none() || f.vm == id) && host.as_ref().is_none_or(|h| *h == f.host)
                });
                wanted.cloned().collect::<Vec<_>>()
            }))
        }
        Command::CallLog { host } => json(cluster.read(|s| {
            let wanted = s.calls.iter().filter(|c| host.as_ref().is_none_or(|h| *h == c.host));
            wanted.cloned().collect::<Vec<_>>()
        })),
        Command::Wait { condition, deadline_ms } => {
            json(wait(cluster, &condition, deadline_ms).await?)
        }
        Command::Shutdown => json(()),
    }
}

async fn on_disks<R: Send + 'static>(
    cluster: &Arc<Cluster>,
    work: impl FnOnce(&Arc<Cluster>) -> Result<R, LabError> + Send + 'static,
) -> Result<R, LabError> {
    let inner = cluster.clone();
    cluster.blocking(move || work(&inner)).await?
}

async fn power(cluster: &Arc<Cluster>, id: Uuid, wanted: Power) -> Result<Json, LabError> {
    on_disks(cluster, move |c| host::power(c, id, wanted)).await.and_then(json)
}

/// Refuses while something else is at work on the VM.
fn idle(cluster: &Cluster, id: Uuid) -> Result<(), LabError> {
    cluster.read(|s| {
        let vm = s.vm(id)?;
        match s.obstacle(vm) {
            Some((code, why)) => Err(LabError::refused(&vm.name, code, why)),
            None => Ok(()),
        }
    })
}

fn user_checkpoint(cluster: &Cluster, id: Uuid, name: String) -> Result<Uuid, LabError> {
    idle(cluster, id)?;
    let new = cluster.change(|s| {
        let new = NewCheckpoint { id: s.new_guid(), name, recovery: false, consistency: 0 };
        s.vm_mut(id).map(|vm| vm.busy = Some(Busy::CreatingCheckpoint)).map(|()| new)
    })?;
    let made = checkpoint::create(cluster, id, &new);
    cluster.change_vm(id, |vm| vm.busy = None)?;
    made.map(|()| new.id)
}

fn apply(cluster: &Cluster, id: Uuid, checkpoint: Uuid) -> Result<(), LabError> {
    idle(cluster, id)?;
    let was = cluster.read(|s| s.vm(id).map(|vm| vm.power))?;
    host::power(cluster, id, Power::Off)?;
    let applied = checkpoint::apply(cluster, id, checkpoint);
    host::power(cluster, id, was)?;
    applied
}

/// Longest name of a VM's folder in bytes; file systems end at 255.
const MAX_FOLDER: usize = 120;

/// A VM's folder: its name where that is a file name, made unique by its GUID.
fn folder_name(name: &str, id: Uuid) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if out.len() + c.len_utf8() > MAX_FOLDER {
            break;
        }
        let odd =
            c.is_control() || matches!(c, '/' | '\\' | ':' | '*' | '?' | '"' | '<' | '>' | '|');
        out.push(if odd { '_' } else { c });
    }
    format!("{out} {}", &guid(id)[..8])
}

fn create_vm(cluster: &Arc<Cluster>, new: &CreateVm) -> Result<Uuid, LabError> {
    let (id, volume) = cluster.change(|s| {
        s.host_mut(&new.host)?;
        let volume = s.csvs.iter().find(|c| c.name == new.csv).map(|c| c.path.clone());
        let volume = volume.ok_or_else(|| LabError::unknown("CSV", &new.csv))?;
        let wanted = Chance::new(s.chance.clone().next() ^ new.seed).guid();
        s.chance.next();
        Ok::<_, LabError>((if s.vms.contains_key(&wanted) { s.new_guid() } else { wanted }, volume))
    })?;
    let folder = volume.join(folder_name(&new.name, id));
    let mut vm = Vm::new(id, &new.name, &new.host, folder);
    vm.generation = new.generation;
    vm.owner = new.clustered.then(|| new.host.clone());
    for (place, source) in new.disks.iter().enumerate() {
        let disk = make_disk(cluster, &vm, place, source)?;
        vm.disks.push(disk);
    }
    import::write_vm_files(&vm)?;
    cluster.change(|s| s.vms.insert(id, vm));
    announce_new(cluster, id);
    if new.start {
        host::power(cluster, id, Power::Running)?;
    }
    Ok(id)
}

fn make_disk(
    cluster: &Cluster,
    vm: &Vm,
    place: usize,
    source: &DiskSource,
) -> Result<Disk, LabError> {
    let folder = vm.folder.join("Virtual Hard Disks");
    std::fs::create_dir_all(&folder).map_err(LabError::io("make the folder", &folder))?;
    let id = cluster.change(State::new_guid);
    let path = disks::provide(source, &folder, &format!("disk{place}-{}", &guid(id)[..8]))?;
    let location = u32::try_from(place).unwrap_or(u32::MAX);
    let mut disk = Disk { id, location, chain: Vec::new(), size: 0, disk_id: Uuid::nil() };
    if let Some(path) = path {
        let info = disks::info(&path)?;
        disk.size = info.size;
        disk.disk_id = info.disk_id;
        let chain = outrider_disk::DiskChain::open(&path)?;
        disk.chain = chain.files();
        disk.chain.reverse();
        // The chain's own spelling may differ; the leaf is named as it was given.
        if let Some(leaf) = disk.chain.last_mut() {
            *leaf = path;
        }
    }
    Ok(disk)
}

fn add_disk(cluster: &Cluster, id: Uuid, source: &DiskSource) -> Result<usize, LabError> {
    idle(cluster, id)?;
    let (io, place) = cluster.read(|s| s.vm(id).map(|vm| (vm.io.clone(), vm.disks.len())))?;
    let shape = cluster.read(|s| {
        s.vm(id).map(|vm| {
            let mut shape = Vm::new(vm.id, &vm.name, &vm.host, vm.folder.clone());
            shape.generation = vm.generation;
            shape
        })
    })?;
    let disk = make_disk(cluster, &shape, place, source)?;
    let mut io = locked(&io);
    let runs = cluster.read(|s| s.vm(id).map(|vm| vm.power.holds_disks()))?;
    if runs && let Some(leaf) = disk.leaf() {
        io.open(disk.id, leaf)?;
    }
    cluster.change(|s| {
        let vm = s.vm_mut(id)?;
        vm.disks.push(disk);
        import::write_vm_files(vm)?;
        s.announce_vm(id);
        Ok(place)
    })
}

/// Puts another file into a disk's slot. Change tracking of that disk ends.
pub(crate) fn replace_file(
    cluster: &Cluster,
    id: Uuid,
    disk: Uuid,
    path: &Path,
) -> Result<(), LabError> {
    let io = cluster.read(|s| s.vm(id).map(|vm| vm.io.clone()))?;
    let mut io = locked(&io);
    let info = disks::info(path)?;
    let was_open = io.close(disk)?;
    io.forget(disk);
    if was_open {
        io.open(disk, path)?;
    }
    cluster.change(|s| {
        let vm = s.vm_mut(id)?;
        let slot = vm.disks.iter_mut().find(|d| d.id == disk);
        let slot = slot.ok_or_else(|| LabError::unknown("disk", disk))?;
        slot.chain = vec![path.to_owned()];
        slot.size = info.size;
        slot.disk_id = info.disk_id;
        import::write_vm_files(vm)?;
        s.announce_vm(id);
        Ok(())
    })
}

fn slot_without_checkpoints(
    cluster: &Cluster,
    id: Uuid,
    place: usize,
) -> Result<(Disk, std::path::PathBuf), LabError> {
    idle(cluster, id)?;
    cluster.read(|s| {
        let vm = s.vm(id)?;
        if !vm.checkpoints.is_empty() {
            return Err(LabError::refused(&vm.name, 32775, "the VM has checkpoints"));
        }
        let disk = vm.disks.get(place).filter(|d| d.is_virtual());
        let disk = disk.ok_or_else(|| LabError::unknown("virtual disk", place))?;
        Ok((disk.clone(), vm.folder.join("Virtual Hard Disks")))
    })
}

fn replace_disk(
    cluster: &Cluster,
    id: Uuid,
    place: usize,
    with: &DiskSource,
) -> Result<(), LabError> {
    let (disk, folder) = slot_without_checkpoints(cluster, id, place)?;
    let stem = format!("disk{place}-{}", &guid(cluster.change(State::new_guid))[..8]);
    let path = disks::provide(with, &folder, &stem)?;
    let path =
        path.ok_or_else(|| LabError::refused(place, 32773, "a pass-through disk has no file"))?;
    replace_file(cluster, id, disk.id, &path)
}

/// Grows a disk: the same VirtualDiskId, another size. Change tracking of that disk ends.
fn resize_disk(cluster: &Cluster, id: Uuid, place: usize, size: u64) -> Result<(), LabError> {
    let (disk, _) = slot_without_checkpoints(cluster, id, place)?;
    let Some(old) = disk.leaf().map(Path::to_owned) else { return Ok(()) };
    let io = cluster.read(|s| s.vm(id).map(|vm| vm.io.clone()))?;
    {
        let mut io = locked(&io);
        let was_open = io.close(disk.id)?;
        let grown = disks::grow(&old, size);
        io.forget(disk.id);
        if was_open {
            io.open(disk.id, &old)?;
        }
        grown?;
    }
    cluster.change_vm(id, |vm| {
        for d in vm.disks.iter_mut().filter(|d| d.id == disk.id) {
            d.size = size;
        }
    })
}

fn guest_rate(cluster: &Arc<Cluster>, id: Uuid, rate: u64, seed: u64) -> Result<(), LabError> {
    let token = CancellationToken::new();
    let before = cluster.change(|s| {
        let vm = s.vm_mut(id)?;
        Ok::<_, LabError>(if rate == 0 { vm.rate.take() } else { vm.rate.replace(token.clone()) })
    })?;
    if let Some(before) = before {
        before.cancel();
    }
    if rate > 0 {
        let inner = cluster.clone();
        cluster.tasks.spawn(async move {
            tokio::select! {
                result = guest::write_steadily(inner.clone(), id, rate, seed) => {
                    if let Err(e) = result {
                        tracing::debug!(vm = %id, error = %e, "a guest stopped writing");
                    }
                }
                () = token.cancelled() => {}
                () = inner.cancel.cancelled() => {}
            }
        });
    }
    Ok(())
}

fn describe(s: &State) -> LabState {
    let hosts = s.hosts.iter().map(|(name, h)| HostState {
        name: name.clone(),
        up: h.up,
        paused: h.paused,
        connections: h.connections,
    });
    let mut vms: Vec<VmState> = s.vms.values().map(describe_vm(s)).collect();
    vms.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    LabState {
        realm: s.realm.clone(),
        hosts: hosts.collect(),
        vms,
        checkpoint_on_migration: s.switch,
    }
}

fn describe_vm(s: &State) -> impl Fn(&Vm) -> VmState + '_ {
    |vm| VmState {
        id: vm.id,
        name: vm.name.clone(),
        host: vm.host.clone(),
        owner: vm.owner.clone(),
        enabled_state: vm.power.enabled_state(),
        disks: vm
            .disks
            .iter()
            .map(|d| DiskState { chain: d.chain.clone(), size: d.size })
            .collect(),
        checkpoints: vm
            .checkpoints
            .iter()
            .map(|c| CheckpointState { id: c.id, name: c.name.clone(), recovery: c.recovery })
            .collect(),
        reference_points: vm
            .reference_points
            .iter()
            .map(|r| ReferencePointState {
                id: r.id,
                rct_ids: vm
                    .disks
                    .iter()
                    .map(|d| r.marks.iter().find(|(id, _)| *id == d.id).map(|(_, m)| m.clone()))
                    .collect(),
            })
            .collect(),
        merges: vm.merges.len(),
        merge_waits: vm.merges.first().and_then(|m| match s.merge_obstacle(vm, m) {
            Some(Obstacle::Readers(text)) => Some(text),
            Some(Obstacle::Stuck) => Some("stuck by a fault".into()),
            None => m.waits.clone(),
        }),
        migrating: vm.migration.is_some(),
        busy: vm.busy.is_some(),
    }
}

fn holds(s: &State, condition: &WaitFor) -> Result<bool, LabError> {
    Ok(match condition {
        WaitFor::VmOnHost { vm, host } => {
            let vm = s.find_vm(vm)?;
            vm.host == *host
                && vm.migration.is_none()
                && vm.owner.as_ref().is_none_or(|owner| owner == host)
        }
        WaitFor::NoMerge { vm } => {
            let vm = s.find_vm(vm)?;
            vm.merges.is_empty() && vm.busy.is_none()
        }
        WaitFor::RecoveryCheckpoints { vm, count } => {
            s.find_vm(vm)?.checkpoints.iter().filter(|c| c.recovery).count() == *count
        }
        WaitFor::MergeWaitsForReaders { vm } => {
            let vm = s.find_vm(vm)?;
            vm.merges
                .first()
                .is_some_and(|m| matches!(s.merge_obstacle(vm, m), Some(Obstacle::Readers(_))))
        }
        WaitFor::GateBlocked { gate } => {
            let gate = s.gates.iter().find(|g| g.id == *gate);
            !gate
                .ok_or_else(|| LabError::unknown("gate", "released or never set"))?
                .blocked
                .is_empty()
        }
        WaitFor::MethodHeld { hold } => {
            let hold = s.holds.iter().find(|h| h.id == *hold);
            hold.ok_or_else(|| LabError::unknown("hold", "released or never set"))?.progress
                == Progress::Holds
        }
        WaitFor::Called { method, vm, count } => {
            let id = s.find_vm(vm)?.id;
            let calls = s.calls.iter().filter(|c| c.vm == Some(id) && c.method == *method);
            calls.count() >= *count
        }
    })
}

async fn wait(cluster: &Cluster, condition: &WaitFor, deadline_ms: u64) -> Result<(), LabError> {
    let begun = Instant::now();
    let held = cluster.until(|s| match holds(s, condition) {
        Ok(true) => Some(Ok(())),
        Ok(false) => None,
        Err(e) => Some(Err(e)),
    });
    match tokio::time::timeout(Duration::from_millis(deadline_ms), held).await {
        Ok(result) => result,
        Err(_) => Err(LabError::Deadline {
            what: format!("{condition:?}"),
            waited_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            now: cluster.read(|s| format!("{:?}", describe(s).vms)),
        }),
    }
}

/// Closes every leaf, so that the files are whole when the lab has ended.
pub(crate) async fn close_all(cluster: &Arc<Cluster>) -> Result<(), LabError> {
    on_disks(cluster, |c| {
        let all: Vec<_> = c.read(|s| s.vms.values().map(|vm| vm.io.clone()).collect());
        all.iter().try_for_each(|io| locked(io).close_all())
    })
    .await
}
