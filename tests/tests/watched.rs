//! One trace follows a job through all processes, and Prometheus understands what every process exposes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};

use outrider_proto::rpc::BackupKind;
use outrider_tests::fabric::MIB;
use outrider_tests::http::get;
use outrider_tests::traces::{Arrived, Receiver};
use outrider_tests::{Fabric, Plan, eventually};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_trace_follows_a_job_from_the_decision_to_the_fsync() {
    let receiver = Receiver::start().await;
    let plan = Plan { otlp: Some(format!("http://{}", receiver.address)), ..Plan::default() };
    let fabric = Fabric::start(plan).await;
    fabric.vm("watched", "alpha", 16 * MIB).await;
    fabric.operator.backed_up("watched", BackupKind::Full).await;

    let services = ["outrider-coordinator", "outrider-node", "outrider-storage"];
    eventually("one trace holds the decision, the job and the fsync", async || {
        let spans = receiver.spans();
        let mut traces: BTreeMap<Vec<u8>, Vec<&Arrived>> = BTreeMap::new();
        for arrived in &spans {
            traces.entry(arrived.span.trace_id.clone()).or_default().push(arrived);
        }
        let whole = traces.values().find(|trace| {
            let seen: BTreeSet<&str> = trace.iter().map(|a| a.service.as_str()).collect();
            let synced = trace
                .iter()
                .any(|a| a.service == "outrider-storage" && a.span.name.contains("fsync"));
            services.iter().all(|s| seen.contains(s)) && synced
        });
        let names = || {
            let all = spans.iter().map(|a| format!("{}:{}", a.service, a.span.name));
            all.collect::<BTreeSet<_>>()
        };
        let whole = whole.ok_or_else(|| format!("{:?}", names()))?;
        connected(whole)
    })
    .await;
}

/// Every span of the trace hangs below one root, which is the coordinator's decision, and the fsync does so through the
/// agent.
fn connected(trace: &[&Arrived]) -> Result<(), String> {
    let by_id: BTreeMap<&[u8], &Arrived> =
        trace.iter().map(|a| (a.span.span_id.as_slice(), *a)).collect();
    let fsync = trace.iter().filter(|a| a.span.name.contains("fsync"));
    for start in fsync {
        let mut path = vec![start.service.as_str()];
        let mut at = *start;
        while !at.span.parent_span_id.is_empty() {
            let Some(parent) = by_id.get(at.span.parent_span_id.as_slice()) else {
                break;
            };
            at = parent;
            path.push(at.service.as_str());
        }
        path.dedup();
        let root = at.span.parent_span_id.is_empty();
        if root && path.ends_with(&["outrider-node", "outrider-coordinator"]) {
            return Ok(());
        }
    }
    Err("no fsync leads back to the coordinator yet".to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_process_exposes_metrics_that_prometheus_understands_and_says_that_it_is_healthy() {
    let mut fabric = Fabric::start(Plan::default()).await;
    fabric.vm("watched", "alpha", 16 * MIB).await;
    fabric.operator.backed_up("watched", BackupKind::Full).await;
    let promtool = Command::new("promtool").arg("--version").output().is_ok();
    if !promtool {
        assert!(std::env::var_os("OUTRIDER_CI").is_none(), "promtool is not installed");
        eprintln!("SKIPPED in part: promtool is not installed; see docs/testing.md");
    }
    let Fabric { coordinators, storage, agents, .. } = &mut fabric;
    for process in coordinators.iter_mut().chain(storage).chain(agents) {
        let name = process.name().to_owned();
        let address = process.observability().await;
        assert_eq!(get(address, "/healthz"), "ok\n", "{name}");
        assert_eq!(get(address, "/readyz"), "ready\n", "{name}");
        let metrics = get(address, "/metrics");
        assert!(metrics.contains("process_resident_memory_bytes"), "{name}: {metrics}");
        assert!(metrics.contains("outrider_build_info"), "{name}: {metrics}");
        if promtool {
            check(&name, &metrics);
        }
    }
}

/// `promtool check metrics`: parses the text and complains about names against the conventions.
fn check(name: &str, metrics: &str) {
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool runs");
    let mut input = promtool.stdin.take().expect("a pipe");
    input.write_all(metrics.as_bytes()).expect("promtool reads");
    drop(input);
    let output = promtool.wait_with_output().expect("promtool ends");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success(),
        "{name}: {said}{}\n{metrics}",
        String::from_utf8_lossy(&output.stdout)
    );
}
