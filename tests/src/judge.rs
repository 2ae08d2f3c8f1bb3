//! Is the restore exact, is the host clean? Judged by the simulated cluster, which knows every checkpoint's bytes.

use outrider_lab::{Comparison, VmState, WaitFor};
use outrider_proto::rpc;
use uuid::Uuid;

use crate::eventually;
use crate::fabric::Fabric;
use crate::wait::DEADLINE;

impl Fabric {
    /// Restores a point as a new VM on `host` through the product and compares every disk with what the checkpoint froze.
    pub async fn assert_restores_exactly(&self, point: &rpc::Point, host: &str) {
        let name = format!("restored {}", point.point_id);
        let request = rpc::RestoreRequest {
            point_id: point.point_id.clone(),
            to_host: host.to_owned(),
            new_name: name.clone(),
            ..Default::default()
        };
        let job = self.operator.restore(request).await.expect("the restore starts");
        let job = self.operator.ended(&job.job_id).await;
        assert!(job.state.starts_with("completed") && job.error_code.is_empty(), "{job:?}");
        let restored = self.seen(&name).await;
        self.assert_disks_are(&restored, point).await;
        self.lab.delete_vm(&restored.id.to_string()).await.expect("deleted");
        for file in restored.disks.iter().flat_map(|d| &d.chain) {
            std::fs::remove_file(file).expect("a file of the restored VM");
        }
    }

    /// Compares the disks of a VM with a point's checkpoint.
    pub async fn assert_disks_are(&self, restored: &VmState, point: &rpc::Point) {
        let checkpoint: Uuid = point.checkpoint_id.parse().expect("a checkpoint's GUID");
        assert!(!restored.disks.is_empty(), "the VM has disks: {restored:?}");
        for (place, disk) in restored.disks.iter().enumerate() {
            let leaf = disk.chain.last().expect("a file");
            let compared = self.lab.compare_disk(leaf, checkpoint, place).await;
            let compared = compared.expect("the lab compares");
            assert_eq!(compared, Comparison::Identical, "disk {place} of {}", point.point_id);
        }
    }

    /// Exports a point with the operator's command line and compares every disk.
    pub async fn assert_exports_exactly(&self, point: &rpc::Point) {
        let folder = self.dir().join(format!("export-{}", point.point_id));
        let to = folder.display().to_string();
        let args = ["export", "--json", "--point", &point.point_id, "--to", &to];
        let outcome = tokio::task::block_in_place(|| self.operator.cli(&args));
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let files = outcome.json()["files"].as_array().expect("files").clone();
        assert_eq!(files.len(), point.disks.len(), "a file a disk");
        let checkpoint: Uuid = point.checkpoint_id.parse().expect("a checkpoint's GUID");
        for (place, file) in files.iter().enumerate() {
            let file = std::path::Path::new(file.as_str().expect("a path"));
            let compared = self.lab.compare_disk(file, checkpoint, place).await;
            assert_eq!(compared.expect("compared"), Comparison::Identical, "{}", file.display());
        }
        std::fs::remove_dir_all(folder).expect("removed");
    }

    /// No checkpoint of ours, exactly one reference point, which is the bound one, and chains as short as at the start.
    pub async fn assert_clean(&self, vm: &str) {
        let id = self.seen(vm).await.id.to_string();
        self.lab.wait(WaitFor::NoMerge { vm: id }, DEADLINE).await.expect("merges end");
        let seen = self.seen(vm).await;
        assert_eq!(
            seen.recovery_checkpoints().count(),
            0,
            "no checkpoint of ours is left: {seen:?}"
        );
        assert_eq!(seen.reference_points.len(), 1, "one reference point: {seen:?}");
        for disk in &seen.disks {
            assert_eq!(disk.chain.len(), 1, "the chain is as short as it was: {seen:?}");
        }
        let known = self.operator.vm(vm).await.expect("the VM is known");
        let bound = known.bound_reference_point.to_lowercase();
        let there = seen.reference_points[0].id.to_string();
        assert!(bound.contains(&there), "bound is {bound:?}, the host has {there}");
        eventually("no duty is open", async || {
            let status = self.operator.status().await.map_err(|e| e.to_string())?;
            match status.open_duties {
                0 => Ok(()),
                n => Err(format!("{n} open duties")),
            }
        })
        .await;
    }

    /// Guest writes, an incremental, its exact restore, clean hosts: what must hold after whatever happened before.
    pub async fn assert_next_incremental_is_exact(&self, vm: &str, seed: u64) -> rpc::Point {
        self.write(vm, 2 << 20, seed).await;
        let point = self.operator.backed_up(vm, rpc::BackupKind::Incremental).await;
        assert_eq!(point.kind(), rpc::BackupKind::Incremental, "no fall-back: {point:?}");
        self.assert_restores_exactly(&point, &self.seen(vm).await.host).await;
        self.assert_clean(vm).await;
        point
    }

    /// Bytes of a VM's files that hosts were granted to read so far, by the simulated cluster's own accounting.
    pub async fn bytes_read(&self, vm: &str, host: Option<&str>) -> u64 {
        let files = self.lab.bytes_read(Some(vm), host).await.expect("the lab counts");
        files.iter().map(|f| f.bytes).sum()
    }
}
