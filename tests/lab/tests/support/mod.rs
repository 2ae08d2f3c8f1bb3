//! A lab for one test, and an agent's hands: the few calls of Hyper-V's backup sequence.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use outrider_lab::{
    CheckpointOnMigration, CreateVm, CsvConfig, Delays, DiskSource, LabConfig, LabControl,
    LabError, TruthConfig, VmState, WaitFor,
};
use outrider_wmi::lab::{LabFiles, LabWmi};
use outrider_wmi::{NS_VIRTUALIZATION, Object, Value, Wmi, embedded};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) const DEADLINE: Duration = Duration::from_secs(60);
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const SNAPSHOT_SERVICE: &str = "Msvm_VirtualSystemSnapshotService";
pub(crate) const REFERENCE_SERVICE: &str = "Msvm_VirtualSystemReferencePointService";
pub(crate) const IMAGE_SERVICE: &str = "Msvm_ImageManagementService";
pub(crate) const MANAGEMENT_SERVICE: &str = "Msvm_VirtualSystemManagementService";

pub(crate) struct Lab {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) addr: SocketAddr,
    pub(crate) control: LabControl,
    task: Option<JoinHandle<Result<(), LabError>>>,
}

impl Lab {
    pub(crate) async fn start(switch: CheckpointOnMigration) -> Self {
        Self::seeded(switch, 1).await
    }

    pub(crate) async fn seeded(switch: CheckpointOnMigration, seed: u64) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let csv = |name: &str| CsvConfig { name: name.into(), path: folder.path().join(name) };
        let config = LabConfig {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            address_file: Some(folder.path().join("address")),
            realm: "cluster".into(),
            hosts: vec!["alpha".into(), "beta".into(), "gamma".into()],
            csvs: vec![csv("Volume1"), csv("Volume2")],
            seed,
            delays: Delays { job_ms: 1, migration_ms: 1, merge_ms: 1, job_retention_ms: 300_000 },
            checkpoint_on_migration: switch,
            truth: TruthConfig { dir: folder.path().join("truth"), keep: 50 },
        };
        let (sender, ready) = tokio::sync::oneshot::channel();
        let run = outrider_lab::run(config, CancellationToken::new(), Some(sender));
        let task = Some(tokio::spawn(run));
        let addr = ready.await.expect("the lab listens");
        let control = LabControl::connect(addr).await.expect("the lab answers");
        Self { folder, addr, control, task }
    }

    /// A running VM `vm` on alpha with one empty disk.
    pub(crate) async fn vm(&self, name: &str, size: u64) -> VmState {
        let disk = DiskSource::Empty { size, block_size: 0 };
        self.control
            .create_vm(CreateVm::new(name, "alpha", "Volume1", vec![disk]))
            .await
            .expect("the VM is made")
    }

    pub(crate) async fn agent(&self, host: &str) -> Agent {
        let wmi = LabWmi::connect(self.addr, host).await.expect("the host answers");
        Agent { wmi, files: LabFiles::new(self.addr, host) }
    }

    pub(crate) async fn wait(&self, condition: WaitFor) {
        self.control.wait(condition, DEADLINE).await.expect("the condition comes true");
    }

    pub(crate) async fn no_merge(&self, vm: &VmState) {
        self.wait(WaitFor::NoMerge { vm: vm.id.to_string() }).await;
    }

    pub(crate) async fn state(&self, vm: &VmState) -> VmState {
        self.control.vm(&vm.id.to_string()).await.expect("the VM is there")
    }

    pub(crate) async fn stop(mut self) {
        self.control.shutdown().await.expect("the lab hears");
        let task = self.task.take().expect("stopped once");
        task.await.expect("no panic").expect("a clean end");
    }
}

pub(crate) struct Agent {
    pub(crate) wmi: LabWmi,
    pub(crate) files: LabFiles,
}

pub(crate) fn guid(vm: &VmState) -> String {
    vm.id.to_string().to_uppercase()
}

pub(crate) fn vm_path(vm: &VmState) -> String {
    format!(r#"Msvm_ComputerSystem.CreationClassName="Msvm_ComputerSystem",Name="{}""#, guid(vm))
}

pub(crate) fn code(out: &Object) -> u64 {
    out.u64("ReturnValue").expect("a return value")
}

pub(crate) fn args(list: &[(&str, Value)]) -> Vec<(String, Value)> {
    list.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect()
}

pub(crate) fn snapshot_args(vm: &VmState) -> Vec<(String, Value)> {
    let settings = Object::new("Msvm_VirtualSystemSnapshotSettingData", "")
        .with("ConsistencyLevel", 1_u16)
        .with("IgnoreNonSnapshottableDisks", true)
        .with("GuestBackupType", 2_u16);
    args(&[
        ("AffectedSystem", Value::Ref(vm_path(vm))),
        ("SnapshotSettings", embedded::to_text(&settings).into()),
        ("SnapshotType", 32768_u32.into()),
    ])
}

impl Agent {
    pub(crate) async fn query(&self, wql: &str) -> Vec<Object> {
        self.wmi.query(NS_VIRTUALIZATION, wql).await.expect("an answer")
    }

    pub(crate) async fn call(
        &self,
        service: &str,
        method: &str,
        args: Vec<(String, Value)>,
    ) -> Object {
        let services = self.query(&format!("SELECT * FROM {service}")).await;
        let path = &services.first().expect("one service").path;
        self.wmi.exec_method(NS_VIRTUALIZATION, path, method, args).await.expect("an answer")
    }

    /// Waits for the end of the job that `out` names.
    pub(crate) async fn job(&self, out: &Object) -> Object {
        assert_eq!(code(out), 4096, "{out:?}");
        let path = out.str("Job").expect("a job").to_owned();
        let ended = async {
            loop {
                let job = self.wmi.get(NS_VIRTUALIZATION, &path).await.expect("the job exists");
                if job.u64("JobState").is_some_and(|s| s >= 7) {
                    return job;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(DEADLINE, ended).await.expect("the job ends")
    }

    pub(crate) async fn succeed(
        &self,
        service: &str,
        method: &str,
        args: Vec<(String, Value)>,
    ) -> Object {
        let out = self.call(service, method, args).await;
        let job = self.job(&out).await;
        assert_eq!((job.u64("JobState"), job.u64("ErrorCode")), (Some(7), Some(0)), "{job:?}");
        job
    }

    pub(crate) async fn affected(&self, job: &Object, class: &str) -> Vec<Object> {
        self.wmi
            .associators(NS_VIRTUALIZATION, &job.path, "Msvm_AffectedJobElement", class)
            .await
            .expect("an answer")
    }

    /// A recovery checkpoint.
    pub(crate) async fn checkpoint(&self, vm: &VmState) -> Object {
        let job = self.succeed(SNAPSHOT_SERVICE, "CreateSnapshot", snapshot_args(vm)).await;
        let mut made = self.affected(&job, "Msvm_VirtualSystemSettingData").await;
        assert_eq!(made.len(), 1);
        made.remove(0)
    }

    /// Frozen files of a checkpoint.
    pub(crate) async fn frozen(&self, checkpoint: &Object) -> Vec<PathBuf> {
        let disks = self
            .wmi
            .associators(
                NS_VIRTUALIZATION,
                &checkpoint.path,
                "Msvm_VirtualSystemSettingDataComponent",
                "Msvm_StorageAllocationSettingData",
            )
            .await
            .expect("an answer");
        let path = |o: &Object| o.array("HostResource")[0].as_str().map(PathBuf::from);
        disks.iter().filter_map(path).collect()
    }

    /// The reference point made of the checkpoint.
    pub(crate) async fn convert(&self, checkpoint: &Object) -> Object {
        let affected = args(&[("AffectedSnapshot", Value::Ref(checkpoint.path.clone()))]);
        let job = self.succeed(SNAPSHOT_SERVICE, "ConvertToReferencePoint", affected).await;
        let mut made = self.affected(&job, "Msvm_VirtualSystemReferencePoint").await;
        assert_eq!(made.len(), 1);
        made.remove(0)
    }

    pub(crate) async fn destroy(&self, checkpoint: &Object) {
        let affected = args(&[("AffectedSnapshot", Value::Ref(checkpoint.path.clone()))]);
        self.succeed(SNAPSHOT_SERVICE, "DestroySnapshot", affected).await;
    }

    /// Changes of a frozen file since an RCT id, or the code of the refusal.
    pub(crate) async fn changes(
        &self,
        path: &Path,
        id: &str,
        size: u64,
    ) -> Result<Vec<(u64, u64)>, u64> {
        let mut all = Vec::new();
        let mut at = 0;
        while at < size {
            let asked = args(&[
                ("Path", path.display().to_string().into()),
                ("LimitId", id.into()),
                ("ByteOffset", at.to_string().into()),
                ("ByteLength", (size - at).to_string().into()),
            ]);
            let out = self.call(IMAGE_SERVICE, "GetVirtualDiskChanges", asked).await;
            if code(&out) != 0 {
                return Err(code(&out));
            }
            let numbers =
                |name: &str| out.array(name).iter().filter_map(Value::as_u64).collect::<Vec<_>>();
            all.extend(
                numbers("ChangedByteOffsets").into_iter().zip(numbers("ChangedByteLengths")),
            );
            let processed = out.u64("ProcessedByteLength").expect("how far");
            assert!(processed > 0, "the loop must go on");
            at += processed;
        }
        Ok(all)
    }
}

/// First RCT id of a reference point.
pub(crate) fn rct_id(point: &Object) -> String {
    point.array("ResilientChangeTrackingIdentifiers")[0].as_str().expect("an id").to_owned()
}

/// Checkpoint GUID of a checkpoint's settings.
pub(crate) fn checkpoint_id(checkpoint: &Object) -> uuid::Uuid {
    checkpoint.str("ConfigurationID").expect("an id").parse().expect("a GUID")
}
