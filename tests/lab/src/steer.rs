//! Commands of the control client.

mod view;
mod vms;

use std::sync::Arc;

use serde::Serialize;
use serde_json::Value as Json;
use uuid::Uuid;

use crate::checkpoint;
use crate::cluster::Cluster;
use crate::control::Command;
use crate::disks::locked;
use crate::error::LabError;
use crate::gate::Gate;
use crate::guest;
use crate::hardware;
use crate::host;
use crate::import;
use crate::migrate;
use crate::model::Power;
use crate::truth;

pub(crate) use vms::replace_file;

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
            view::wait(cluster, &condition, deadline_ms).await.map(|()| Json::Null)
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
        Command::State => json(cluster.read(view::describe)),
        Command::CreateVm(new) => {
            let id = on_disks(cluster, move |c| vms::create_vm(c, &new)).await?;
            json(cluster.read(|s| s.vm(id).map(view::describe_vm(s)))?)
        }
        Command::AddDisk { vm, disk } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| vms::add_disk(c, id, &disk)).await.and_then(json)
        }
        Command::RemoveDisk { vm, disk } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| vms::remove_disk(c, id, disk)).await.and_then(json)
        }
        Command::ResizeDisk { vm, disk, size } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| vms::resize_disk(c, id, disk, size)).await.and_then(json)
        }
        Command::ReplaceDisk { vm, disk, with } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| vms::replace_disk(c, id, disk, &with)).await.and_then(json)
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
        Command::SaveVm { vm } => power(cluster, id_of(&vm)?, Power::Saved).await,
        Command::SetUpVm { vm, setup } => {
            let id = id_of(&vm)?;
            json(cluster.change(|s| hardware::set_up_vm(s, id, &setup))?)
        }
        Command::SetUpHost { host, setup } => {
            json(cluster.change(|s| hardware::set_up_host(s, &host, &setup))?)
        }
        Command::SetVss { vm, ok } => json(cluster.change_vm(id_of(&vm)?, |vm| vm.vss = ok)?),
        Command::ShapeVm { vm, shape } => {
            let id = id_of(&vm)?;
            json(cluster.change(|s| {
                let vm = s.vm_mut(id)?;
                vm.version = shape.version.clone().unwrap_or_else(|| vm.version.clone());
                vm.shape.change(*shape);
                s.announce_vm(id);
                s.announce_group(id, None);
                Ok::<_, LabError>(())
            })?)
        }
        Command::ShapeHost { host, shape } => json(cluster.change(|s| {
            s.host_mut(&host)?;
            s.around.change_host(&host, &shape);
            let was = crate::classes::nodes(s)
                .iter()
                .find(|n| n.str("Name") == Some(host.as_str()))
                .and_then(|n| n.u64("State"))
                .and_then(|state| u32::try_from(state).ok())
                .unwrap_or(0);
            s.announce_node(&host, was);
            Ok::<_, LabError>(())
        })?),
        Command::ShapeCluster { functional_level } => {
            cluster.change(|s| s.around.functional_level = functional_level);
            json(())
        }
        Command::ShapeNetworks { networks } => {
            cluster.change(|s| s.around.networks = networks);
            json(())
        }
        Command::ShapeCsv { csv, fault_state } => json(cluster.change(|s| {
            if s.csvs.iter().all(|c| c.name != csv) {
                return Err(LabError::unknown("CSV", &csv));
            }
            s.around.csvs.insert(csv, fault_state);
            Ok(())
        })?),
        Command::GuestWrite(write) => guest::write(cluster, write).await.and_then(json),
        Command::GuestRate { vm, bytes_per_second, seed } => {
            json(vms::guest_rate(cluster, id_of(&vm)?, bytes_per_second, seed).await?)
        }
        Command::UserCheckpoint { vm, name } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| vms::user_checkpoint(c, id, name)).await.and_then(json)
        }
        Command::ApplyCheckpoint { vm, checkpoint } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| vms::apply(c, id, checkpoint)).await.and_then(json)
        }
        Command::DeleteCheckpoint { vm, checkpoint } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| {
                vms::idle(c, id)?;
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
        Command::ResumeHost { host } => json(host::resume(cluster, &host)?),
        Command::ApplyLog { vm, bytes, seed } => {
            let id = id_of(&vm)?;
            on_disks(cluster, move |c| guest::apply_log(c, id, bytes, seed)).await.and_then(json)
        }
        Command::RestartWmi { host } => json(host::restart_wmi(cluster, &host)?),
        Command::SetCheckpointOnMigration(switch) => {
            cluster.change(|s| s.switch = switch);
            json(())
        }
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
            cluster.change(|s| s.faults.retain(|f| f.id != fault));
            json(())
        }
        Command::ClearFaults => {
            cluster.change(|s| s.faults.clear());
            json(())
        }
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
        Command::Release { hold } => {
            cluster.change(|s| s.holds.retain(|h| h.id != hold));
            json(())
        }
        Command::SetGate(spec) => {
            let vm = id_of(&spec.vm)?;
            json(cluster.change(|s| {
                let id = s.next();
                let (host, left) = (spec.host, spec.budget);
                s.gates.push(Gate { id, vm, host, left, blocked: Default::default() });
                id
            }))
        }
        Command::ReleaseGate { gate } => {
            cluster.change(|s| s.gates.retain(|g| g.id != gate));
            json(())
        }
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
            json(view::wait(cluster, &condition, deadline_ms).await?)
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

/// Closes every leaf, so that the files are whole when the lab has ended.
pub(crate) async fn close_all(cluster: &Arc<Cluster>) -> Result<(), LabError> {
    on_disks(cluster, |c| {
        let all: Vec<_> = c.read(|s| s.vms.values().map(|vm| vm.io.clone()).collect());
        all.iter().try_for_each(|io| locked(io).close_all())
    })
    .await
}
