//! What following a real VM costs, in figures. Not part of `cargo test`: figures are for reading, and a machine that does
//! something else at the same time spoils them.
//!
//! ```sh
//! cargo test --release -p outrider-tests --test qemu_measures -- --ignored --nocapture
//! ```
//! Latencies are taken in rounds, idle and backup by turns, so that what else the machine does falls on both; each round gives
//! a ratio, and the median of the rounds is the figure. `OUTRIDER_MEASURE_ROUNDS` says how many (7).
#![cfg(target_os = "linux")]

use std::time::{Duration, UNIX_EPOCH};

use outrider_proto::rpc::{self, BackupKind};
use outrider_qemulab::Shape;
use outrider_qemulab::guest::{Guest, Latency};
use outrider_tests::fabric::MIB;
use outrider_tests::real::{RealFabric, installation};
use outrider_tests::{Plan, eventually};

/// What the guest writes all the time, bytes a second.
const TRICKLE: u64 = MIB / 2;
/// fsyncs that a percentile of an idle phase is taken of, at least.
const ENOUGH: u64 = 100;
/// Rounds when nothing else is said.
const ROUNDS: usize = 7;

fn rounds() -> usize {
    let said = std::env::var("OUTRIDER_MEASURE_ROUNDS").ok();
    said.and_then(|n| n.parse().ok()).filter(|n| *n > 0).unwrap_or(ROUNDS)
}

/// The middle one, the least and the greatest.
fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let median = values[values.len() / 2];
    format!("{median:.2} (from {:.2} to {:.2})", values[0], values[values.len() - 1])
}

fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b.max(1) as f64
}

/// Latencies of a guest that nobody backs up.
async fn idle(guest: &mut Guest) -> Latency {
    guest.latency().await.expect("figures");
    let mut seen = guest.last_committed();
    // An fsync commits several records, nobody knows how many; and asking begins the figures anew.
    let mut records = ENOUGH;
    loop {
        seen = guest.commits_beyond(seen + records).await.expect("it commits");
        let found = guest.latency().await.expect("figures");
        // A percentile of few is none.
        if found.count >= ENOUGH / 2 {
            return found;
        }
        records *= 2;
    }
}

async fn read(fabric: &RealFabric, job: &rpc::Job, least: u64) {
    eventually("the backup has read enough", async || {
        let now = fabric.operator.job(&job.job_id).await.map_err(|e| e.to_string())?;
        let bytes = now.stats.unwrap_or_default().read_bytes;
        let enough = bytes >= least || now.ended_unix_ms != 0;
        if enough { Ok(()) } else { Err(format!("{bytes} bytes read")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "figures for reading, see the file's head"]
async fn what_following_a_real_vm_costs() {
    let Some(installation) = installation() else { return };
    let more = "max_read_rate = \"4 MiB\"";
    let mut fabric = RealFabric::start(Plan::default(), &installation, more).await;
    let name = "measured";
    fabric.vm(name, "alpha", Shape::Blockdev).await;
    let guest = &mut fabric.cluster.vm(name).expect("it runs").guest;
    guest.write(1, 24 * MIB).await.expect("it writes");
    guest.write_at(2, TRICKLE).await.expect("it writes");
    let (mut medians, mut tails) = (Vec::new(), Vec::new());
    for round in 1..=rounds() {
        let guest = &mut fabric.cluster.vm(name).expect("it runs").guest;
        let idle = idle(guest).await;
        let job = fabric.operator.backup(name, BackupKind::Full).await;
        // From its first read on: what came before is no backup yet.
        read(&fabric, &job, 1).await;
        fabric.cluster.vm(name).expect("it runs").guest.latency().await.expect("figures");
        let job = fabric.operator.done(&job.job_id).await;
        let busy =
            fabric.cluster.vm(name).expect("it runs").guest.latency().await.expect("figures");
        println!("round {round}: fsync idle {idle:?}, during backup {busy:?} (microseconds)");
        println!("round {round}: {:?}", job.stats.expect("figures"));
        medians.push(ratio(busy.p50, idle.p50));
        tails.push(ratio(busy.p99, idle.p99));
    }
    println!("fsync p50, backup / idle:      {}", spread(medians));
    println!("fsync p99, backup / idle:      {}", spread(tails));

    let before = fabric.cluster.vm(name).expect("it runs").guest.total_bytes();
    let guest = &mut fabric.cluster.vm(name).expect("it runs").guest;
    guest.stop().await.expect("it stops");
    guest.write(3, 4 * MIB).await.expect("it writes");
    let point = fabric.operator.backed_up(name, BackupKind::Incremental).await;
    let written = fabric.cluster.vm(name).expect("it runs").guest.total_bytes() - before;
    let stats = point.stats.expect("figures");
    println!("incremental, guest wrote:      {written}");
    println!("  named by bitmaps / written:  {:.2}", ratio(stats.changed_bytes, written));
    println!("  sent / written:              {:.2}", ratio(stats.sent_bytes, written));

    let guest = &mut fabric.cluster.vm(name).expect("it runs").guest;
    guest.write(4, 24 * MIB).await.expect("it writes");
    guest.write_at(5, TRICKLE).await.expect("it writes");
    let job = fabric.operator.backup(name, BackupKind::Incremental).await;
    read(&fabric, &job, 12 * MIB).await;
    let moved = fabric.cluster.migrate(name, "beta").await.expect("it moves");
    let job = fabric.operator.done(&job.job_id).await;
    let stats = job.stats.expect("figures");
    let on_beta = job.attempts.iter().find(|a| a.host == "beta").expect("it went along");
    let ended = moved.ended.duration_since(UNIX_EPOCH).expect("a clock");
    let resumed = Duration::from_millis(on_beta.started_unix_ms).saturating_sub(ended);
    println!("migration:                     {:?}, {:?} of it still", moved.took, moved.downtime);
    println!("end of migration to resumed:   {resumed:?} (goal: below 2 s)");
    println!("sent again because of it:      {} of {}", stats.resent_bytes, stats.sent_bytes);
    println!("read in all / changed:         {:.2}", ratio(stats.read_bytes, stats.changed_bytes));
}
