//! Taking checkpoints down: exports, filters, scratch files. Their bitmaps stay.

use std::time::Duration;

use outrider_proto::ids::CheckpointId;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::blocks::Disk;
use super::checkpoint::Checkpoints;
use super::machine::Machine;
use super::names::{self, Node};
use super::qmp::QmpError;
use super::server::{self, export_ids};

/// How long an export may take to go.
const EXPORT_PATIENCE: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(5);

impl Checkpoints {
    /// Takes a checkpoint out of the guest's way and removes it; its bitmaps stay. What is gone already is no error.
    pub(super) async fn take_down(
        &self,
        machine: &Machine,
        id: CheckpointId,
    ) -> Result<(), QmpError> {
        self.take_down_named(machine, &names::digits(id)).await
    }

    async fn take_down_named(&self, machine: &Machine, digits: &str) -> Result<(), QmpError> {
        let qmp = &machine.qmp;
        let of_this = |name: &str| names::parse_node(name).is_some_and(|(_, _, d)| d == digits);
        let devices: Vec<Disk> =
            machine.disks().await?.into_iter().filter(|d| of_this(&d.root)).collect();
        let exports = qmp.execute("query-block-exports", Value::Null).await?;
        let exports: Vec<String> = export_ids(&exports)
            .into_iter()
            .filter(|e| {
                names::parse_export(e).is_some_and(|(_, id, _)| names::digits(id) == digits)
            })
            .collect();
        let mut failure = None;
        let ends = exports
            .iter()
            .map(|export| ("block-export-del", json!({ "id": export, "mode": "hard" })));
        for answer in qmp.execute_all(ends.collect()).await {
            failure = failure.or(answer.err());
        }
        self.exports_gone(machine, &exports).await?;
        let mut nodes = self.nodes_of(machine, &of_this).await?;
        nodes.sort();
        let (access, below): (Vec<_>, Vec<_>) =
            nodes.into_iter().partition(|(kind, _)| *kind == Node::Access);
        // As long as it is read through, a filter keeps others from writing to the disk: so that goes first, then the device
        // returns to its disk, then the filter goes.
        let delete = |(_, name): (Node, String)| ("blockdev-del", json!({ "node-name": name }));
        let mut commands: Vec<(&str, Value)> = access.into_iter().map(delete).collect();
        for disk in &devices {
            let value = json!({ "path": disk.device, "property": "drive", "value": disk.base });
            commands.push(("qom-set", value));
        }
        commands.extend(below.into_iter().map(delete));
        for answer in qmp.execute_all(commands).await {
            failure = failure.or(answer.err());
        }
        if let Err(e) = self.close_scratch(machine, &of_this).await {
            tracing::debug!(vm = machine.name, error = %e, "scratch files stay with QEMU until it closes them");
        }
        server::stop_if_idle(machine).await?;
        // What counts is what is left.
        let left = self.nodes_of(machine, &of_this).await?;
        match failure {
            Some(failure) if !left.is_empty() => Err(failure),
            _ => {
                machine.set_has_checkpoint(false);
                Ok(())
            }
        }
    }

    async fn nodes_of(
        &self,
        machine: &Machine,
        wanted: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<Vec<(Node, String)>, QmpError> {
        let nodes = machine.nodes().await?;
        let names = nodes.as_array().into_iter().flatten().filter_map(|n| n["node-name"].as_str());
        let ours = names.filter(|n| wanted(n));
        Ok(ours.filter_map(|n| Some((names::parse_node(n)?.0, n.to_owned()))).collect())
    }

    pub(super) async fn exports_gone(
        &self,
        machine: &Machine,
        wanted: &[String],
    ) -> Result<(), QmpError> {
        let until = Instant::now() + EXPORT_PATIENCE;
        loop {
            let left = export_ids(&machine.qmp.execute("query-block-exports", Value::Null).await?);
            if !left.iter().any(|id| wanted.contains(id)) || Instant::now() >= until {
                return Ok(());
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    async fn close_scratch(
        &self,
        machine: &Machine,
        wanted: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<(), QmpError> {
        let sets = machine.qmp.execute("query-fdsets", Value::Null).await?;
        for set in sets.as_array().into_iter().flatten() {
            let opaque =
                set["fds"].as_array().and_then(|f| f.first()).and_then(|f| f["opaque"].as_str());
            if opaque.is_some_and(wanted) {
                machine.qmp.execute("remove-fd", json!({ "fdset-id": set["fdset-id"] })).await?;
            }
        }
        Ok(())
    }

    /// Removes every node, export and copy of a bitmap of ours that is no part of the checkpoints in `whole`.
    pub(super) async fn remove_half_made(
        &self,
        machine: &Machine,
        whole: &[CheckpointId],
    ) -> Result<usize, QmpError> {
        let kept: Vec<String> = whole.iter().map(|id| names::digits(*id)).collect();
        let nodes = machine.nodes().await?;
        let nodes = nodes.as_array().into_iter().flatten().filter_map(|n| n["node-name"].as_str());
        let mut found: Vec<String> =
            nodes.filter_map(|n| Some(names::parse_node(n)?.2.to_owned())).collect();
        found.sort();
        found.dedup();
        found.retain(|digits| !kept.contains(digits));
        for digits in &found {
            self.take_down_named(machine, digits).await?;
        }
        Ok(found.len())
    }
}
