//! Checkpoints that administrators made: the tree that a recovery checkpoint stands in.
//!
//! A checkpoint is told to be a user's by its type, `Snapshot:Realized`; what it follows, by its `Parent`. Recovery
//! checkpoints (ours, another product's) are passed over: what follows one of them follows what that follows.

use std::collections::HashMap;

use outrider_proto::ids::{CheckpointId, VmGuid};
use outrider_proto::manifest::Security;
use outrider_wmi::{Object, Value};

use super::HyperV;
use super::snapshot::checkpoint;
use super::wql::{self, SETTINGS, literal};
use crate::hypervisor::error::HypervisorError;
use crate::hypervisor::{Checkpoint, UserCheckpoint, UserCheckpoints};

/// VirtualSystemType of a checkpoint that an administrator made.
pub(super) const USER_CHECKPOINT: &str = "Microsoft:Hyper-V:Snapshot:Realized";
/// More than Hyper-V allows (50), so that an odd answer ends.
const MOST: usize = 1024;

impl HyperV {
    pub(super) async fn tree_at(
        &self,
        vm: VmGuid,
        at: &Checkpoint,
    ) -> Result<UserCheckpoints, HypervisorError> {
        let wql = format!(
            "SELECT * FROM {SETTINGS} WHERE VirtualSystemIdentifier={}",
            literal(&wql::guid(vm.0))
        );
        let mut found = self.query("list the user checkpoints of a VM", &wql).await?;
        found.retain(|o| o.str("VirtualSystemType").is_some_and(|t| t.contains(":Snapshot:")));
        Ok(tree(&found, at.id))
    }

    pub(super) async fn security_of(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<Option<Security>, HypervisorError> {
        let doing = "read what guards a checkpoint's secrets";
        let parts = self
            .associated(doing, &checkpoint.path, "Msvm_VirtualSystemSettingDataComponent", "")
            .await?;
        self.security_at(&parts).await
    }
}

/// The user checkpoints among a VM's checkpoints, parents first, and the one that `at` follows.
fn tree(settings: &[Object], at: CheckpointId) -> UserCheckpoints {
    let id = |o: &Object| wql::settings_guid(o).map(CheckpointId);
    let is_user = |o: &Object| o.str("VirtualSystemType") == Some(USER_CHECKPOINT);
    let by_id: HashMap<CheckpointId, &Object> =
        settings.iter().filter_map(|o| Some((id(o)?, o))).collect();
    let followed = |of: &Object| {
        let mut next = parent(of);
        for _ in 0..MOST {
            let settings = by_id.get(&next?)?;
            if is_user(settings) {
                return next;
            }
            next = parent(settings);
        }
        None
    };
    let mut left: Vec<UserCheckpoint> = settings
        .iter()
        .filter(|o| is_user(o))
        .filter_map(|o| {
            Some(UserCheckpoint {
                checkpoint: checkpoint(o)?,
                parent: followed(o),
                notes: notes(o),
                created_unix_ms: o.unix_ms("CreationTime").unwrap_or(0),
                automatic: o.bool("IsAutomaticSnapshot").unwrap_or(false),
                saved_state: o.bool("IsSaved").unwrap_or(false),
            })
        })
        .collect();
    left.sort_by_key(|c| (c.created_unix_ms, c.checkpoint.id));
    let mut all: Vec<UserCheckpoint> = Vec::with_capacity(left.len());
    // Parents first. What goes round in circles, which no tree does, is left out.
    loop {
        let placed = |id: CheckpointId| all.iter().any(|c| c.checkpoint.id == id);
        let Some(next) = left.iter().position(|c| c.parent.is_none_or(placed)) else { break };
        all.push(left.remove(next));
    }
    let current = by_id.get(&at).and_then(|settings| followed(settings));
    UserCheckpoints { current: current.filter(|c| all.iter().any(|a| a.checkpoint.id == *c)), all }
}

/// The checkpoint that settings name as their parent: an object path.
fn parent(settings: &Object) -> Option<CheckpointId> {
    let instance = wql::instance_id_of(settings.str("Parent")?)?;
    let guid = instance.strip_prefix("Microsoft:")?.split('\\').next()?;
    Some(CheckpointId(guid.parse().ok()?))
}

fn notes(settings: &Object) -> String {
    let lines: Vec<&str> = settings.array("Notes").iter().filter_map(Value::as_str).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn settings(n: u8, kind: &str, parent: Option<u8>) -> Object {
        let path = |n: u8| format!(r#"{SETTINGS}.InstanceID="Microsoft:{}""#, wql::guid(guid(n)));
        let object = Object::new(SETTINGS, path(n))
            .with("InstanceID", format!("Microsoft:{}", wql::guid(guid(n))))
            .with("VirtualSystemType", format!("Microsoft:Hyper-V:Snapshot:{kind}"))
            .with("ElementName", format!("cp{n}"))
            .with("CreationTime", format!("202401010000{n:02}.000000+060"));
        match parent {
            Some(parent) => object.with("Parent", path(parent)),
            None => object,
        }
    }

    fn guid(n: u8) -> Uuid {
        Uuid::from_bytes([n; 16])
    }

    fn id(n: u8) -> CheckpointId {
        CheckpointId(guid(n))
    }

    #[test]
    fn branches_come_parents_first_and_recovery_checkpoints_are_passed_over() {
        // 1 <- 2 <- recovery 9 <- 3, and 1 <- 4 <- our own recovery 8.
        let found = [
            settings(3, "Realized", Some(9)),
            settings(9, "Recovery", Some(2)),
            settings(2, "Realized", Some(1)),
            settings(8, "Recovery", Some(4)),
            settings(4, "Realized", Some(1)),
            settings(1, "Realized", None),
        ];
        let tree = tree(&found, id(8));
        let shape: Vec<_> = tree.all.iter().map(|c| (c.checkpoint.id, c.parent)).collect();
        let expected = [(1, None), (2, Some(1)), (3, Some(2)), (4, Some(1))];
        assert_eq!(shape, expected.map(|(n, p)| (id(n), p.map(id))));
        assert_eq!(tree.current, Some(id(4)));
        assert_eq!(tree.all[0].created_unix_ms, 1_704_063_601_000, "one hour east of UTC");
    }

    #[test]
    fn odd_trees_end_and_lose_what_has_no_place() {
        let circle = [settings(1, "Realized", Some(2)), settings(2, "Realized", Some(1))];
        assert_eq!(tree(&circle, id(1)), UserCheckpoints::default());
        let recovery = [settings(1, "Recovery", Some(2)), settings(2, "Recovery", Some(1))];
        assert_eq!(tree(&recovery, id(1)), UserCheckpoints::default());
        // A parent that is gone is no parent.
        let orphan = [settings(3, "Realized", Some(7)), settings(8, "Recovery", Some(3))];
        let tree = tree(&orphan, id(8));
        assert_eq!((tree.all.len(), tree.all[0].parent, tree.current), (1, None, Some(id(3))));
    }
}
