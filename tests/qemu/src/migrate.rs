//! Live migrations between two hosts: one that succeeds, one that fails and returns, one that is held in the middle.

use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::cluster::{Cluster, END, Vm};
use crate::error::Error;
use crate::wait::until;

/// A migration of a small guest takes no longer.
const PATIENCE: Duration = Duration::from_secs(120);
/// So slow that a migration stays in the middle until it is let go, bytes a second.
const HELD: u64 = 64 << 10;
/// As fast as it goes.
const FAST: u64 = 4 << 30;

/// A migration under way.
#[derive(Debug)]
pub struct Migration {
    /// The VM on its new host, waiting.
    target: Vm,
    name: String,
}

/// The process at the target of a migration that came to nothing, as it was before it was ended.
#[derive(Debug)]
pub struct Abandoned {
    /// Its run state.
    pub state: String,
    /// What a backup could have left in it (see [`crate::qmp::Qmp::leftovers`]).
    pub left: Vec<String>,
}

/// A migration that succeeded.
#[derive(Debug, Clone, Copy)]
pub struct Moved {
    /// From its start to the moment when the VM ran on its new host.
    pub took: Duration,
    /// How long the guest stood still, by QEMU's account.
    pub downtime: Duration,
    /// When the VM was seen running on its new host.
    pub ended: SystemTime,
}

impl Cluster {
    /// Migrates a running VM, with its dirty bitmaps.
    ///
    /// # Errors
    /// Of QEMU; the VM is then still on its old host.
    pub async fn migrate(&mut self, name: &str, to: &str) -> Result<Moved, Error> {
        let migration = self.begin(name, to, FAST).await?;
        self.complete(migration).await
    }

    /// Starts a migration that stays in the middle until [`Self::complete`] or [`Self::fail`].
    ///
    /// # Errors
    /// Of QEMU.
    pub async fn begin_migration(&mut self, name: &str, to: &str) -> Result<Migration, Error> {
        self.begin(name, to, HELD).await
    }

    /// Starts a migration that stops right before its end, the guest standing still already, until [`Self::hand_over`].
    /// What is left to be said by then is so little that the sockets hold it: a QEMU that has more to say than a broken link
    /// takes hangs as a whole, with its monitors.
    ///
    /// # Errors
    /// Of QEMU.
    pub async fn begin_to_the_brink(&mut self, name: &str, to: &str) -> Result<Migration, Error> {
        let source = self.vm(name)?;
        set_capability(source, "pause-before-switchover", true).await?;
        let brief = json!({ "downtime-limit": 1 });
        source.qmp.execute("migrate-set-parameters", brief).await?;
        let migration = self.begin(name, to, FAST).await?;
        reaches_status(self.vm(name)?, name, "pre-switchover").await?;
        Ok(migration)
    }

    async fn begin(&mut self, name: &str, to: &str, rate: u64) -> Result<Migration, Error> {
        let machine = self.vm(name)?.machine.clone();
        let address = self.places(to)?.address;
        let mut target = self.launch(machine, to, true).await?;
        capable(&mut target).await?;
        target
            .qmp
            .execute("migrate-incoming", json!({ "uri": format!("tcp:{address}:0") }))
            .await?;
        let listening = target.qmp.execute("query-migrate", json!({})).await?;
        let address = &listening["socket-address"][0];
        let (Some(host), Some(port)) = (address["host"].as_str(), address["port"].as_str()) else {
            let reason = format!("it does not say where it listens: {listening}");
            return Err(Error::Gone { vm: name.to_owned(), reason });
        };
        let source = self.vm(name)?;
        capable(source).await?;
        set_rate(source, rate).await?;
        let uri = format!("tcp:{host}:{port}");
        source.qmp.execute("migrate", json!({ "uri": uri })).await?;
        until(&format!("{name}'s migration under way"), PATIENCE, async || {
            let info = migration_of(source).await?;
            let status = info["status"].as_str().unwrap_or_default();
            Ok(match status {
                "none" | "setup" => Err(info.to_string()),
                _ => Ok(()),
            })
        })
        .await?;
        Ok(Migration { target, name: name.to_owned() })
    }

    /// Lets a migration go on and waits for its end. The old process is gone afterwards.
    ///
    /// # Errors
    /// Of QEMU; [`Error::Refused`] with the reason when the migration failed: the VM is still on its old host.
    pub async fn complete(&mut self, migration: Migration) -> Result<Moved, Error> {
        let Migration { mut target, name } = migration;
        let source = self.vm(&name)?;
        set_rate(source, FAST).await?;
        let began = Instant::now();
        let info = finished(source, &name).await?;
        if info["status"] != "completed" {
            let reason = info.to_string();
            return Err(Error::Refused { vm: name, command: "migrate".to_owned(), reason });
        }
        target.qmp.reaches("running", PATIENCE).await?;
        let (ended, waited) = (SystemTime::now(), began.elapsed());
        let downtime = Duration::from_millis(info["downtime"].as_u64().unwrap_or(0));
        let took = Duration::from_millis(info["total-time"].as_u64().unwrap_or(0));
        // The old process is of no use any more; its sockets go with it.
        source.qmp.execute("quit", json!({})).await?;
        source.process.ended(&name, END).await?;
        self.put(target);
        Ok(Moved { took: took.max(waited), downtime, ended })
    }

    /// Lets QEMU go on with a migration that nothing arrives of, as fast as it wants; gives what it says of it.
    ///
    /// # Errors
    /// Of QEMU.
    pub async fn hurry(&mut self, migration: &Migration) -> Result<String, Error> {
        let source = self.vm(&migration.name)?;
        set_rate(source, FAST).await?;
        let info = migration_of(source).await?;
        Ok(info["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Cancels a migration, as an operator does with one that hangs: the VM goes on where it was. The process that waited
    /// is ended.
    ///
    /// # Errors
    /// Of QEMU; [`Error::Late`] when the VM does not run again.
    pub async fn cancel(&mut self, migration: Migration) -> Result<Abandoned, Error> {
        let Migration { target, name } = migration;
        let source = self.vm(&name)?;
        source.qmp.execute("migrate_cancel", json!({})).await?;
        reaches_status(source, &name, "cancelled").await?;
        source.qmp.reaches("running", PATIENCE).await?;
        abandoned(target).await
    }

    /// The last step of a migration from [`Self::begin_to_the_brink`] whose link is broken: the source says all it has to
    /// say and calls itself done, and nothing arrives. Then nobody has the VM.
    ///
    /// # Errors
    /// Of QEMU.
    pub async fn hand_over(&mut self, migration: Migration) -> Result<Abandoned, Error> {
        let Migration { target, name } = migration;
        let source = self.vm(&name)?;
        let from = json!({ "state": "pre-switchover" });
        source.qmp.execute("migrate-continue", from).await?;
        reaches_status(source, &name, "completed").await?;
        set_capability(source, "pause-before-switchover", false).await?;
        let usual = json!({ "downtime-limit": 300 });
        source.qmp.execute("migrate-set-parameters", usual).await?;
        abandoned(target).await
    }

    /// Lets a VM go on that QEMU has stopped: by an operator who knows that it runs nowhere else.
    ///
    /// # Errors
    /// Of QEMU; [`Error::Late`] when it does not run.
    pub async fn resume(&mut self, name: &str) -> Result<(), Error> {
        let vm = self.vm(name)?;
        vm.qmp.execute("cont", json!({})).await?;
        vm.qmp.reaches("running", PATIENCE).await
    }

    /// Kills the waiting process in mid-migration: the VM goes on where it was. Gives QEMU's reason.
    ///
    /// # Errors
    /// Of QEMU; [`Error::Late`] when the VM does not run again.
    pub async fn fail(&mut self, migration: Migration) -> Result<String, Error> {
        let Migration { mut target, name } = migration;
        target.process.kill();
        let source = self.vm(&name)?;
        set_rate(source, FAST).await?;
        let info = finished(source, &name).await?;
        source.qmp.reaches("running", PATIENCE).await?;
        Ok(info["error-desc"].as_str().unwrap_or(info["status"].as_str().unwrap_or("")).to_owned())
    }
}

/// Looks at the process that a migration did not reach, and ends it.
async fn abandoned(mut target: Vm) -> Result<Abandoned, Error> {
    let disks: Vec<String> = (0..target.machine.disks.len()).map(|n| format!("disk{n}")).collect();
    let state = target.qmp.status().await?;
    let left = target.qmp.leftovers(&disks).await?;
    target.process.kill();
    Ok(Abandoned { state, left })
}

async fn capable(vm: &mut Vm) -> Result<(), Error> {
    set_capability(vm, "dirty-bitmaps", true).await?;
    set_capability(vm, "events", true).await
}

async fn set_capability(vm: &mut Vm, capability: &str, state: bool) -> Result<(), Error> {
    let one = json!({ "capabilities": [{ "capability": capability, "state": state }] });
    vm.qmp.execute("migrate-set-capabilities", one).await.map(drop)
}

async fn set_rate(vm: &mut Vm, rate: u64) -> Result<(), Error> {
    let parameters = json!({ "max-bandwidth": rate });
    vm.qmp.execute("migrate-set-parameters", parameters).await.map(drop)
}

async fn migration_of(vm: &mut Vm) -> Result<Value, Error> {
    vm.qmp.execute("query-migrate", json!({})).await
}

async fn reaches_status(source: &mut Vm, name: &str, status: &str) -> Result<(), Error> {
    until(&format!("{name}'s migration {status}"), PATIENCE, async || {
        let info = migration_of(source).await?;
        Ok(if info["status"] == status { Ok(()) } else { Err(info.to_string()) })
    })
    .await
}

async fn finished(source: &mut Vm, name: &str) -> Result<Value, Error> {
    until(&format!("the end of {name}'s migration"), PATIENCE, async || {
        let info = migration_of(source).await?;
        Ok(match info["status"].as_str() {
            Some("completed" | "failed" | "cancelled") => Ok(info),
            _ => Err(info.to_string()),
        })
    })
    .await
}
