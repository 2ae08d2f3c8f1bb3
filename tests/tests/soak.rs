//! Processes killed at random moments, VMs moved at random moments, round after round: after each round the next backup is
//! exact and the hosts are clean. Not part of the usual run:
//!
//! ```sh
//! cargo test -p outrider-tests --test soak -- --ignored --nocapture
//! ```
//!
//! `OUTRIDER_SOAK_ROUNDS` (20) and `OUTRIDER_SOAK_SEED` (1) choose how long and which; times of the machine remain, so a seed
//! repeats the plan, not the run.

use std::time::Duration;

use outrider_lab::{CheckpointOnMigration, MigrationKind};
use outrider_proto::rpc::BackupKind;
use outrider_tests::fabric::MIB;
use outrider_tests::{Fabric, Plan, eventually};

const VM: &str = "survivor";

/// Numbers that a seed repeats.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes; see docs/testing.md"]
async fn random_kills_and_moves_cost_no_byte_and_leave_nothing() {
    let plan = Plan { coordinators: 3, storage: 3, replicas: 3, min_durable: 2, ..Plan::default() };
    let mut fabric = Fabric::start(plan).await;
    fabric.vm(VM, "alpha", 48 * MIB).await;
    fabric.operator.backed_up(VM, BackupKind::Full).await;
    let mut dice = Dice(setting("OUTRIDER_SOAK_SEED", 1));
    for round in 1..=setting("OUTRIDER_SOAK_ROUNDS", 20) {
        let switch = match dice.below(3) {
            0 => CheckpointOnMigration::Travels,
            1 => CheckpointOnMigration::Lost,
            _ => CheckpointOnMigration::Blocks,
        };
        fabric.lab.set_checkpoint_on_migration(switch).await.expect("set");
        fabric.write(VM, 8 * MIB, round * 100).await;
        let job = fabric.operator.backup(VM, BackupKind::Incremental).await;
        for step in 0..=dice.below(3) {
            tokio::time::sleep(Duration::from_millis(dice.below(400))).await;
            let what = dice.below(4);
            eprintln!(
                "round {round}.{step}: {} ({switch:?})",
                ["agent", "storage", "coordinator", "move"][what as usize]
            );
            disturb(&mut fabric, &mut dice, what).await;
        }
        let job = fabric.operator.ended(&job.job_id).await;
        assert!(job.data_safe, "{job:?}");
        let point = fabric.operator.point(VM, &job.point_id).await;
        fabric.assert_restores_exactly(&point, &fabric.seen(VM).await.host).await;
        // What the job could not clean, a cleanup does; nobody acts.
        eventually("the duties are done", async || {
            let status = fabric.operator.status().await.map_err(|e| e.to_string())?;
            if status.open_duties + status.jobs_running == 0 {
                Ok(())
            } else {
                Err(format!("{status:?}"))
            }
        })
        .await;
        fabric.assert_clean(VM).await;
    }
}

/// Kills and restarts a process, or moves the VM.
async fn disturb(fabric: &mut Fabric, dice: &mut Dice, what: u64) {
    let process = match what {
        0 => {
            let host = fabric.seen(VM).await.host;
            fabric.agent(&host)
        }
        1 => &mut fabric.storage[dice.below(3) as usize],
        2 => &mut fabric.coordinators[dice.below(3) as usize],
        _ => {
            let other = fabric.other_host(&fabric.seen(VM).await.host);
            // Refused while something else is at work on the VM, or where a checkpoint blocks it.
            let _ = fabric.lab.migrate(VM, &other, MigrationKind::Live).await;
            return;
        }
    };
    process.kill();
    tokio::time::sleep(Duration::from_millis(dice.below(300))).await;
    process.restart();
    process.ready().await;
}
