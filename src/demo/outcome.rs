//! What the demo says at its end: the table, or the one JSON object.

use outrider_proto::rpc;
use serde_json::{Value, json};

use super::processes::Facts;
use super::stage::Stage;
use super::steps::{Figures, sum};
use crate::operator::Operator;
use crate::output::{self, bytes, ratio};
use crate::report::Failure;

/// One step as it went.
#[derive(Debug)]
pub(super) struct StepResult {
    pub(super) name: &'static str,
    pub(super) seconds: f64,
    pub(super) result: Result<Figures, String>,
}

/// Everything that is told at the end.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) steps: Vec<StepResult>,
    pub(super) vms: Vec<VmRow>,
    pub(super) processes: Vec<(String, Facts)>,
    /// Storage nodes by name: stored bytes and chunks, as they say themselves.
    pub(super) storage: Vec<(String, u64, u64)>,
}

/// A VM in the table.
#[derive(Debug)]
pub(super) struct VmRow {
    name: String,
    host: String,
    points: usize,
    total: rpc::JobStats,
    /// Of all its jobs, from being asked for to their end.
    job_ms: u64,
}

impl VmRow {
    /// Plain bytes in chunks that storage did not have, from the average chunk.
    fn new_plain(&self) -> u64 {
        let s = &self.total;
        let chunks = s.chunks_new + s.chunks_known;
        if chunks == 0 {
            return 0;
        }
        let plain = s.read_bytes.saturating_sub(s.zero_bytes + s.known_bytes);
        if plain > 0 { plain } else { s.read_bytes / chunks * s.chunks_new }
    }

    fn dedup(&self) -> String {
        ratio(self.total.chunks_new + self.total.chunks_known, self.total.chunks_new)
    }

    fn compression(&self) -> String {
        ratio(self.new_plain(), self.total.sent_bytes)
    }

    fn to_json(&self) -> Value {
        let s = &self.total;
        let part = |whole: u64, part: u64| {
            if part == 0 { Value::Null } else { json!(whole as f64 / part as f64) }
        };
        json!({
            "name": self.name, "host": self.host, "points": self.points,
            "stats": crate::cli::view::stats(Some(s)), "job_ms": self.job_ms,
            "dedup_ratio": part(s.chunks_new + s.chunks_known, s.chunks_new),
            "compression_ratio": part(self.new_plain(), s.sent_bytes),
        })
    }
}

/// Collects the figures of every VM from its recovery points.
pub(super) async fn vm_rows(stage: &Stage) -> Result<Vec<VmRow>, Failure> {
    let mut rows = Vec::new();
    for vm in 0..stage.vms.len() {
        let (name, host) = (stage.vms[vm].name.clone(), stage.lab_vm(vm).await?.host);
        rows.push(vm_row(&stage.operator, &stage.key(vm), name, host).await?);
    }
    Ok(rows)
}

/// The figures of one VM from its recovery points.
pub(super) async fn vm_row(
    operator: &Operator,
    key: &str,
    name: String,
    host: String,
) -> Result<VmRow, Failure> {
    let points = operator.points(key).await?;
    let request = rpc::ListJobsRequest { vm: key.to_owned(), limit: 100, ..Default::default() };
    let jobs = operator.jobs(request).await?;
    let job_ms = jobs.iter().map(|j| j.ended_unix_ms.saturating_sub(j.created_unix_ms)).sum();
    let total = sum(points.iter().map(|p| p.stats.as_ref()));
    Ok(VmRow { name, host, points: points.len(), total, job_ms })
}

/// What each storage node says that it keeps.
pub(super) async fn storage_rows(operator: &Operator) -> Result<Vec<(String, u64, u64)>, Failure> {
    let status = operator.status().await?;
    let row = |n: rpc::StorageNodeStatus| {
        (n.node.map(|n| n.name).unwrap_or_default(), n.stored_bytes, n.chunks)
    };
    Ok(status.storage.into_iter().map(row).collect())
}

impl Outcome {
    pub(super) fn to_json(
        &self,
        failure: Option<&Failure>,
        seconds: f64,
        dir: Option<&std::path::Path>,
    ) -> Value {
        let steps: Vec<Value> = self
            .steps
            .iter()
            .map(|step| {
                let mut object = serde_json::Map::new();
                object.insert("name".into(), json!(step.name));
                object.insert("ok".into(), json!(step.result.is_ok()));
                object.insert("seconds".into(), json!(step.seconds));
                match &step.result {
                    Ok(figures) => object.extend(figures.clone()),
                    Err(error) => {
                        object.insert("error".into(), json!(error));
                    }
                }
                Value::Object(object)
            })
            .collect();
        let storage: Vec<_> = self
            .storage
            .iter()
            .map(|(name, stored, chunks)| {
                json!({ "name": name, "stored_bytes": stored, "chunks": chunks })
            })
            .collect();
        let processes: Vec<_> = self
            .processes
            .iter()
            .map(|(name, f)| json!({ "name": name, "peak_rss_bytes": f.peak_rss, "starts": f.starts }))
            .collect();
        json!({
            "ok": failure.is_none(), "seconds": seconds, "steps": steps,
            "vms": self.vms.iter().map(VmRow::to_json).collect::<Vec<_>>(),
            "storage": storage, "processes": processes, "error": failure.map(Failure::to_json), "dir": dir,
        })
    }

    pub(super) fn print(&self) {
        println!();
        let rows = self.vms.iter().map(|v| {
            let s = &v.total;
            [
                v.name.clone(),
                v.host.clone(),
                v.points.to_string(),
                bytes(s.read_bytes),
                bytes(s.sent_bytes),
                if s.stored_bytes == 0 { "-".to_owned() } else { bytes(s.stored_bytes) },
                v.dedup(),
                v.compression(),
                output::millis(v.job_ms),
            ]
        });
        let headers =
            ["vm", "host", "points", "read", "sent", "stored", "dedup", "compression", "time"];
        println!(
            "{}",
            output::right(output::table(headers, rows.collect()), &[2, 3, 4, 5, 6, 7, 8])
        );
        println!();
        let rows = self.steps.iter().map(|s| {
            let result = if s.result.is_ok() { "ok" } else { "FAILED" };
            [s.name.to_owned(), result.to_owned(), format!("{:.1} s", s.seconds)]
        });
        println!(
            "{}",
            output::right(output::table(["step", "result", "time"], rows.collect()), &[2])
        );
        println!();
        let rows = self
            .storage
            .iter()
            .map(|(name, stored, chunks)| [name.clone(), bytes(*stored), chunks.to_string()]);
        let table = output::table(["storage node", "stored", "chunks"], rows.collect());
        println!("{}", output::right(table, &[1, 2]));
        if self.processes.iter().any(|(_, f)| f.peak_rss > 0) {
            println!();
            let rows = self
                .processes
                .iter()
                .map(|(name, f)| [name.clone(), bytes(f.peak_rss), f.starts.to_string()]);
            println!(
                "{}",
                output::right(
                    output::table(["process", "peak memory", "starts"], rows.collect()),
                    &[1, 2]
                )
            );
        }
    }
}
