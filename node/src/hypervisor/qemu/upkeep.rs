//! What happens to an open checkpoint besides the job that reads it: a migration begins, an agent starts anew, its scratch
//! files grow too large.

use std::sync::Arc;

use outrider_proto::ids::CheckpointId;
use tokio::time::Instant;

use super::checkpoint::Checkpoints;
use super::error::QemuError;
use super::machine::Machine;
use super::scratch;

impl Checkpoints {
    /// A migration begins: whatever is open goes at once. Its bitmap stays and travels.
    pub(super) async fn give_way(&self, machine: &Machine) {
        let _one = machine.graph.lock().await;
        let began = Instant::now();
        match self.remove_half_made(machine, &[]).await {
            Ok(0) => {}
            Ok(_) => tracing::info!(
                vm = machine.name,
                milliseconds = began.elapsed().as_millis(),
                "the checkpoint gave way to a migration; its bitmap travels"
            ),
            Err(e) => {
                tracing::error!(vm = machine.name, error = %e, "the checkpoint could not give way to a migration");
            }
        }
    }

    /// A monitor was just connected: what a dead agent left frozen is thawed, what it left half-made is removed; a whole
    /// checkpoint stays for the job whose duty it is.
    pub(super) async fn take_stock(&self, machine: &Arc<Machine>) {
        self.held.release(machine).await;
        let _one = machine.graph.lock().await;
        let stock = async {
            let open = self.list(machine).await?;
            let whole: Vec<CheckpointId> = open.iter().map(|o| o.id).collect();
            let removed = self.remove_half_made(machine, &whole).await?;
            self.remove_copies(machine).await?;
            Ok::<_, QemuError>((open, removed))
        };
        match stock.await {
            Ok((open, removed)) => {
                machine.set_has_checkpoint(!open.is_empty());
                if removed > 0 {
                    tracing::warn!(
                        vm = machine.name,
                        removed,
                        "removed what an earlier agent had left half-made"
                    );
                }
                for open in open {
                    tracing::info!(
                        vm = machine.name,
                        checkpoint = open.name,
                        "a checkpoint of an earlier agent is open"
                    );
                }
            }
            Err(e) => {
                tracing::warn!(vm = machine.name, error = %e, "what an earlier agent left cannot be looked at");
            }
        }
    }

    /// Gives a checkpoint up that could not be read, or whose scratch files have become too large, or whose folder is nearly full.
    pub(super) async fn watch_scratch(&self, machine: &Machine) {
        // Whoever makes or removes one now holds the graph; the next look is soon.
        let Ok(_one) = machine.graph.try_lock() else { return };
        let (Ok(nodes), Ok(whole)) = (machine.nodes().await, self.list(machine).await) else {
            return;
        };
        let used = scratch::used(&nodes);
        let unreadable =
            || "it could not be read: its scratch file was full or too slow".to_owned();
        let reason = scratch::too_much(&self.scratch, used, self.scratch_limit)
            .or_else(|| whole.is_empty().then(unreadable));
        let Some(reason) = reason else { return };
        tracing::error!(vm = machine.name, used, reason, "the checkpoint is given up");
        if let Err(e) = self.remove_half_made(machine, &[]).await {
            tracing::error!(vm = machine.name, error = %e, "the checkpoint could not be given up");
        }
    }
}
