//! `outrider bench pipeline`: the rate of each stage alone and of the whole, all in guest bytes per second, so that they
//! can be compared and the slowest is seen.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outrider_process::fs;
use outrider_process::identity::{Identity, Role};
use outrider_proto::ids::FabricId;
use serde_json::json;

use super::sample::{Sample, read_through, synthesize};
use super::whole::Whole;
use super::{network, stages};
use crate::cli::Done;
use crate::fabric::Fabric;
use crate::output::{self, bytes};
use crate::report::Failure;

/// What is measured with.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A VHDX (with its parents) or raw disk; it is only read
    #[arg(required_unless_present = "synthetic", conflicts_with = "synthetic")]
    file: Option<PathBuf>,
    /// Make a disk of this size instead
    #[arg(long, value_name = "SIZE")]
    synthetic: Option<bytesize::ByteSize>,
    /// Where segments are written: the disk to be measured
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Worker threads; without it one for each processor
    #[arg(long)]
    workers: Option<usize>,
}

/// One stage's result.
struct Stage {
    name: &'static str,
    /// Guest bytes.
    bytes: u64,
    took: Duration,
    note: String,
}

impl Stage {
    /// 10^6 guest bytes a second.
    fn rate(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.took.as_secs_f64().max(1e-9)
    }
}

pub(super) async fn run(args: Args, json: bool) -> Done {
    let dir = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    if fs::is_tmpfs(&dir)? {
        return Err(Failure::refused(format!(
            "{} lies in memory, where an fsync proves nothing",
            dir.display()
        ))
        .hint("Choose a folder on a disk with --dir."));
    }
    let scratch = tempfile::Builder::new().prefix("outrider-bench-").tempdir_in(&dir)?;
    let path = match (&args.file, args.synthetic) {
        (Some(file), _) => file.clone(),
        (None, Some(size)) => synthesize(scratch.path(), size.as_u64())?,
        (None, None) => return Err(Failure::usage("neither a file nor --synthetic")),
    };
    let workers = args
        .workers
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(2, std::num::NonZero::get));

    let fabric = Fabric::create(&scratch.path().join("fabric"))?;
    let day = Duration::from_secs(86_400);
    let server = Identity::load(&fabric.issue(Role::Storage, "bench", day)?)?;
    let client = Identity::load(&fabric.issue(Role::Node, "bench", day)?)?;
    let id: FabricId = fabric.id().parse()?;
    let sealer = stages::sealer(id, "bench");

    let sample = Sample::read(&path)?;
    let began = Instant::now();
    let read = read_through(&path)?;
    let mut all = vec![Stage {
        name: "read",
        bytes: read,
        took: began.elapsed(),
        note: "one reader, from the page cache: the file was read before".into(),
    }];
    let mut stage = |name, took, note| all.push(Stage { name, bytes: sample.bytes, took, note });

    let (took, zeros) = stages::zero_detect(&sample, workers);
    stage("zero-detect", took, format!("{zeros} of {} chunks are zeros", sample.chunks.len()));
    stage("hash", stages::hash(&sample, workers, &sealer), "keyed BLAKE3".into());
    let (took, lengths) = stages::compress(&sample, workers);
    let left: u64 =
        sample.chunks.iter().zip(&lengths).map(|(c, left)| left.unwrap_or(c.len()) as u64).sum();
    stage("compress", took, format!("zstd -1: {} left of {}", bytes(left), bytes(sample.bytes)));
    let took = stages::encrypt(&sample, workers, &sealer, &lengths);
    stage("seal", took, "AES-256-GCM and payload hash of what compression left".into());
    let records = stages::records(&sample, workers, &sealer)?;
    let sealed: u64 = records.iter().map(|r| r.bytes().len() as u64).sum();
    let took = network::quic(&server, &client, &records).await?;
    stage("quic", took, format!("{} of records, both ends on this machine", bytes(sealed)));
    let took = stages::segment_write(&scratch.path().join("store"), id, &records).await?;
    stage("segment-write", took, format!("{} of records, with fsync", bytes(sealed)));

    let slowest = all
        .iter()
        .min_by(|a, b| a.rate().total_cmp(&b.rate()))
        .map_or(0, |s| all.iter().position(|o| o.name == s.name).unwrap_or(0));
    let run = Whole {
        disk: &path,
        dir: &scratch.path().join("whole"),
        fabric: id,
        storage: Arc::new(server),
        agent: &client,
        sealer,
        workers,
    };
    let (read, took) = Box::pin(run.run()).await?;
    let whole = Stage { name: "whole", bytes: read, took, note: String::new() };
    // Alone, each stage had all processors; together they share them. Times add up, so rates do by their reciprocals.
    let shared = 1.0 / all.iter().map(|s| 1.0 / s.rate()).sum::<f64>();
    if json {
        let rates: Vec<_> = all
            .iter()
            .map(|s| json!({ "name": s.name, "mb_per_s": s.rate(), "bytes": s.bytes, "note": s.note }))
            .collect();
        output::json(&json!({
            "ok": true, "workers": workers, "allocated_bytes": sample.allocated, "sample_bytes": sample.bytes,
            "stages": rates, "slowest": all[slowest].name,
            "whole_mb_per_s": whole.rate(),
            "whole_of_slowest": whole.rate() / all[slowest].rate(),
            "shared_mb_per_s": shared,
            "whole_of_shared": whole.rate() / shared,
        }));
        return Ok(ExitCode::SUCCESS);
    }
    let rows = all.iter().enumerate().map(|(i, s)| {
        let mark = if i == slowest { "  <- slowest" } else { "" };
        [s.name.to_owned(), format!("{:.0}", s.rate()), format!("{}{mark}", s.note)]
    });
    println!("{}", output::right(output::table(["stage", "MB/s", "note"], rows.collect()), &[1]));
    println!(
        "\nthe whole: {:.0} MB/s, {:.0}% of its slowest stage ({}), {:.0}% of what the stages could do sharing the \
         processors ({shared:.0} MB/s)",
        whole.rate(),
        100.0 * whole.rate() / all[slowest].rate(),
        all[slowest].name,
        100.0 * whole.rate() / shared
    );
    eprintln!(
        "rates are guest bytes of the disk per second; {workers} workers; each stage had the machine to itself"
    );
    Ok(ExitCode::SUCCESS)
}
