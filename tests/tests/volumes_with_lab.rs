//! Volumes that stand still or fail for a while, and files that somebody else holds (facts, sections 6 and 13).

mod lab_world;

use std::time::Duration;

use lab_world::{DEADLINE, Job, MIB, World, times, work};
use outrider_lab::{Fault, FaultKind, GateSpec, WaitFor};
use outrider_node::config::JobTimes;
use outrider_proto::rpc::{BackupKind, FinishRequest};

const CSV: &str = "Volume1";
/// ERROR_CLUSTER_CSV_IO_PAUSE_TIMEOUT
const PAUSED_TOO_LONG: u32 = 5979;

fn fails() -> FaultKind {
    FaultKind::CsvFails { csv: CSV.into(), code: PAUSED_TOO_LONG }
}

fn impatient() -> JobTimes {
    JobTimes { volume_patience: Duration::from_millis(300), ..times() }
}

impl World {
    /// A job with little patience that has to fail; says nothing of the host.
    async fn gives_up(&self) -> FinishRequest {
        let job = Job::new(BackupKind::Incremental);
        let attempt = self.attempt_with(job, "alpha", 1, work(), impatient()).await;
        assert!(!attempt.end().await);
        self.coordinator.with(|d| d.finished.last().cloned()).expect("it ended")
    }
}

/// A backup whose reads stand still, since its volume was paused.
struct Standing {
    job: Job,
    attempt: lab_world::Attempt,
    paused: u64,
}

impl Standing {
    async fn in_mid_read(world: &World) -> Self {
        let gate = GateSpec { vm: world.name(), host: None, budget: 2 * MIB };
        let gate = world.lab.set_gate(gate).await.expect("a gate");
        let job = Job::new(BackupKind::Full);
        let attempt = world.attempt(job, "alpha", 1).await;
        world.lab.wait(WaitFor::GateBlocked { gate }, DEADLINE).await.expect("it reads");
        let paused = FaultKind::CsvPaused { csv: CSV.into() };
        let paused = world.lab.set_fault(Fault::new(paused)).await.expect("in force");
        world.lab.release_gate(gate).await.expect("open");
        let stands = WaitFor::ReadsPaused { csv: CSV.into() };
        world.lab.wait(stands, DEADLINE).await.expect("its reads stand still");
        Self { job, attempt, paused }
    }

    /// The volume is there again; the job ends well.
    async fn goes_on(self, world: &World) {
        world.lab.clear_fault(self.paused).await.expect("goes on");
        assert!(self.attempt.end().await, "{:?}", world.coordinator.with(|d| d.finished.clone()));
        world.judge(self.job).await;
        world.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_volume_is_waited_for_in_the_middle_of_reading() {
    let world = World::small().await;
    let standing = Standing::in_mid_read(&world).await;
    assert!(world.coordinator.with(|d| d.finished.is_empty()), "that is no failure");
    standing.goes_on(&world).await;
}

/// The reads of a volume that is away stand still on their threads; the other jobs of the agent have theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_is_away_keeps_no_job_on_another_volume_from_its_end() {
    let world = World::small().await;
    let other = world.neighbour("Volume2").await;
    let standing = Standing::in_mid_read(&world).await;
    let neighbours = other.back_up("alpha", BackupKind::Full).await;
    other.judge(neighbours).await;
    assert!(world.coordinator.with(|d| d.finished.is_empty()), "the first one waits");
    standing.goes_on(&world).await;
    other.assert_clean().await;
}

/// Code 5979: the same handle, then a new one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_fail_because_a_volume_was_paused_too_long_are_repeated() {
    let world = World::small().await;
    world.lab.set_fault(Fault::new(fails()).times(12)).await.expect("in force");
    let job = world.back_up("alpha", BackupKind::Full).await;
    world.judge(job).await;
    assert_eq!(world.lab.truth_list(&world.name()).await.expect("told").len(), 1, "one checkpoint");
    world.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_does_not_come_back_ends_the_job_with_a_sentence_and_a_clean_host() {
    let world = World::small().await;
    let fault = world.lab.set_fault(Fault::new(fails())).await.expect("in force");
    let end = world.gives_up().await;
    assert!(!end.data_safe && end.host_clean && end.retry, "{end:?}");
    for says in ["5979", "5120", "vhdx"] {
        assert!(end.message.contains(says), "{says}: {}", end.message);
    }
    assert_eq!(end.error_code, "OUT-N-0022", "{}", end.message);
    world.assert_clean().await;
    world.lab.clear_fault(fault).await.expect("back");
    let job = world.back_up("alpha", BackupKind::Incremental).await;
    world.judge(job).await;
}

/// A host that lost its lease says that everything is closed, however patient its reads are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_is_taken_away_closes_its_files_while_the_volume_is_away() {
    let world = World::small().await;
    let gate = GateSpec { vm: world.name(), host: None, budget: 2 * MIB };
    let gate = world.lab.set_gate(gate).await.expect("a gate");
    let job = Job::new(BackupKind::Full);
    let attempt = world.attempt(job, "alpha", 1).await;
    world.lab.wait(WaitFor::GateBlocked { gate }, DEADLINE).await.expect("it reads");
    let fault = world.lab.set_fault(Fault::new(fails())).await.expect("in force");
    world.lab.release_gate(gate).await.expect("open");
    tokio::time::timeout(DEADLINE, attempt.kill()).await.expect("its files are closed");
    world.lab.clear_fault(fault).await.expect("back");
    assert!(world.attempt(job, "alpha", 2).await.end().await);
    world.judge(job).await;
    world.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_somebody_else_holds_is_waited_for_and_then_named() {
    let world = World::small().await;
    let busy = || FaultKind::FileBusy { ends_with: ".vhdx".into() };
    world.lab.set_fault(Fault::new(busy()).times(6)).await.expect("in force");
    let job = world.back_up("alpha", BackupKind::Full).await;
    world.judge(job).await;
    world.lab.set_fault(Fault::new(busy())).await.expect("in force");
    let end = world.gives_up().await;
    assert!(!end.data_safe && end.host_clean && end.retry, "{end:?}");
    assert!(end.message.contains(".vhdx") && end.message.contains("holds"), "{}", end.message);
    world.assert_clean().await;
}
