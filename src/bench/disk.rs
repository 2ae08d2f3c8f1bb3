//! `outrider bench disk`: what reading a virtual disk costs over reading its file, how fast the largest disk is mapped,
//! and how fast ranges are reckoned with.

mod huge;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use outrider_disk::block_file::{BlockFile, ByteSource};
use outrider_disk::{ByteRange, DiskChain, Origin, RangeSet, ReadDisk};
use serde_json::json;

use super::memory;
use super::sample::synthesize;
use crate::cli::Done;
use crate::output::{self, bytes};
use crate::report::Failure;
use huge::Huge;

/// Size of one read, as the agent's default.
const READ: u64 = 4 << 20;
/// Both ways of reading are measured in turn, and the best of each counts: what else the machine does, slows either.
const ROUNDS: usize = 5;
/// Ranges in each set.
const RANGES: u64 = 1_000_000;

/// Guest reads are at least this part of plain reads.
const LEAST_RATIO: f64 = 0.9;
const MOST_MAP_TIME: Duration = Duration::from_secs(1);
const MOST_MAP_BYTES: u64 = 64 << 20;
const MOST_MATHS_TIME: Duration = Duration::from_millis(100);

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A disk to read; without it one is made
    file: Option<PathBuf>,
    /// Size of the disk that is made
    #[arg(long, value_name = "SIZE", default_value = "1GiB", conflicts_with = "file")]
    size: bytesize::ByteSize,
    /// Where it is made
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Fail when a limit is not kept
    #[arg(long)]
    check: bool,
}

/// One measure with its limit.
struct Measure {
    name: String,
    value: String,
    limit: String,
    kept: bool,
    facts: serde_json::Value,
}

pub(super) fn run(args: &Args, json: bool) -> Done {
    let dir = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let scratch = tempfile::Builder::new().prefix("outrider-bench-").tempdir_in(&dir)?;
    let path = match &args.file {
        Some(file) => file.clone(),
        None => synthesize(scratch.path(), args.size.as_u64())?,
    };
    let mut measures = vec![sequential(&path)?];
    for huge in [Huge::full(1 << 20), Huge::every_second(1 << 20), Huge::every_second(32 << 20)] {
        measures.push(map(&huge, scratch.path())?);
    }
    measures.extend(maths());
    let kept = measures.iter().all(|measure| measure.kept);
    if json {
        let all: Vec<_> = measures
            .iter()
            .map(|m| json!({ "name": m.name, "value": m.value, "limit": m.limit, "kept": m.kept, "facts": m.facts }))
            .collect();
        output::json(&json!({ "ok": kept || !args.check, "kept": kept, "measures": all }));
    } else {
        let rows = measures.into_iter().map(|m| {
            let kept = if m.kept { "yes" } else { "NO" };
            [m.name, m.value, m.limit, kept.to_owned()]
        });
        println!("{}", output::table(["measure", "value", "limit", "kept"], rows.collect()));
        eprintln!("times depend on the machine and on what else it does; the ratio much less");
    }
    Ok(if kept || !args.check { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Guest bytes through the disk, against the same bytes by their places in the files.
fn sequential(path: &Path) -> Result<Measure, Failure> {
    let chain = DiskChain::open(path)?;
    let files = chain.files().iter().map(|f| BlockFile::open(f)).collect::<Result<Vec<_>, _>>()?;
    let mut stored: Vec<Origin> = Vec::new();
    chain.origins(&mut |origin| {
        stored.push(origin);
        Ok(())
    })?;
    let total: u64 = stored.iter().map(|origin| origin.len).sum();
    if total == 0 {
        return Err(Failure::refused(format!("{} holds no data to measure with", path.display())));
    }
    let mut buf = vec![0; READ as usize];
    let (mut guest, mut plain) = (Duration::MAX, Duration::MAX);
    // The first round fills the page cache.
    for round in 0..=ROUNDS {
        let began = Instant::now();
        for origin in &stored {
            for done in (0..origin.len).step_by(READ as usize) {
                let part = &mut buf[..READ.min(origin.len - done) as usize];
                files[origin.layer].read_exact_at(origin.file_offset + done, part)?;
            }
        }
        let took_plain = began.elapsed();
        let began = Instant::now();
        for range in &chain.allocated()? {
            for done in (0..range.len).step_by(READ as usize) {
                let part = &mut buf[..READ.min(range.len - done) as usize];
                chain.read_at(range.start + done, part)?;
            }
        }
        let took_guest = began.elapsed();
        if round > 0 {
            (guest, plain) = (guest.min(took_guest), plain.min(took_plain));
        }
    }
    let ratio = plain.as_secs_f64() / guest.as_secs_f64().max(1e-9);
    let rate = |took: Duration| total as f64 / 1e6 / took.as_secs_f64().max(1e-9);
    Ok(Measure {
        name: format!("guest read of {}, against a plain read", bytes(total)),
        value: format!("{:.1}%  ({:.0} and {:.0} MB/s)", ratio * 100.0, rate(guest), rate(plain)),
        limit: format!("at least {:.0}%", LEAST_RATIO * 100.0),
        kept: ratio >= LEAST_RATIO,
        facts: json!({
            "ratio": ratio, "bytes": total, "guest_mb_per_s": rate(guest), "plain_mb_per_s": rate(plain),
        }),
    })
}

/// The allocation map of a disk of 64 TiB, opened for it.
fn map(huge: &Huge, dir: &Path) -> Result<Measure, Failure> {
    let source = huge.source(dir)?;
    let before = memory::start_peak();
    let began = Instant::now();
    let chain = DiskChain::open_with("huge.vhdx", &|_: &Path| Ok(source.clone()))?;
    let allocated = chain.allocated()?;
    let took = began.elapsed();
    let used = before.and_then(memory::peak_above);
    let memory = used.map_or_else(|| "memory not known here".to_owned(), bytes);
    Ok(Measure {
        name: format!("map of 64 TiB, {huge}"),
        value: format!("{:.3} s, {memory}, {} ranges", took.as_secs_f64(), allocated.len()),
        limit: format!("{} s, {}", MOST_MAP_TIME.as_secs(), bytes(MOST_MAP_BYTES)),
        kept: took < MOST_MAP_TIME && used.is_none_or(|used| used < MOST_MAP_BYTES),
        facts: json!({
            "seconds": took.as_secs_f64(), "memory_bytes": used, "ranges": allocated.len(),
            "allocated_bytes": allocated.total_len(),
        }),
    })
}

/// What a backup does with change lists, on sets of a million ranges.
fn maths() -> Vec<Measure> {
    let set = |shift: u64| -> RangeSet {
        (0..RANGES).map(|i| ByteRange::new(i * 65536 + shift, 20_000 + i % 7 * 4096)).collect()
    };
    let (changed, allocated) = (set(0), set(16_384));
    // Change lists come unsorted from nowhere, but joined from parts.
    let parts: Vec<ByteRange> = changed.iter().rev().collect();
    let size = RANGES * 65536 + (1 << 20);
    let works: [(&str, &dyn Fn() -> RangeSet); 5] = [
        ("sorting and joining", &|| parts.iter().copied().collect()),
        ("union", &|| changed.union(&allocated)),
        ("intersection", &|| changed.intersect(&allocated)),
        ("difference", &|| changed.subtract(&allocated)),
        ("rounding to chunks of 256 KiB", &|| changed.align_out(256 << 10, size)),
    ];
    let measure = |(name, work): (&str, &dyn Fn() -> RangeSet)| {
        let mut best = Duration::MAX;
        let mut ranges = 0;
        for _ in 0..3 {
            let began = Instant::now();
            ranges = std::hint::black_box(work()).len();
            best = best.min(began.elapsed());
        }
        Measure {
            name: format!("{name} of 1 M ranges"),
            value: format!("{:.1} ms, {ranges} ranges", best.as_secs_f64() * 1e3),
            limit: format!("{} ms", MOST_MATHS_TIME.as_millis()),
            kept: best < MOST_MATHS_TIME,
            facts: json!({ "seconds": best.as_secs_f64(), "ranges": ranges }),
        }
    };
    works.into_iter().map(measure).collect()
}
