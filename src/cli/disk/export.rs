//! `outrider disk export`: the guest's bytes as a raw file. The name given appears only when all is there.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use outrider_disk::{DiskError, export};
use serde_json::json;

use super::opened::Opened;
use crate::cli::Done;
use crate::output::{self, bytes};
use crate::report::Failure;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A VHDX, AVHDX, VHD, AVHD or raw file; it and its parents are only read
    file: PathBuf,
    /// The raw file to make; what is zeros becomes holes
    #[arg(value_name = "OUT.raw")]
    out: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
}

pub(super) async fn run(args: Args, json: bool) -> Done {
    let Args { file, out, force } = args;
    let opened = Opened::open(&file)?;
    check_target(&opened, &file, &out, force)?;
    let size = opened.disk().info().size;
    let mut partial = OsString::from(out.as_os_str());
    partial.push(".part");
    let partial = PathBuf::from(partial);
    // What an earlier, killed export left.
    std::fs::remove_file(&partial).ok();

    let stop = Arc::new(AtomicBool::new(false));
    let (asked, target) = (Arc::clone(&stop), partial.clone());
    let mut writing = tokio::task::spawn_blocking(move || {
        let bar = bar();
        let written = export::to_raw_told(opened.disk(), &target, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
            !asked.load(Ordering::Relaxed)
        });
        bar.finish_and_clear();
        written
    });
    let written = tokio::select! {
        written = &mut writing => written,
        _ = tokio::signal::ctrl_c() => {
            stop.store(true, Ordering::Relaxed);
            writing.await
        }
    };
    let failed = |e: Failure| e.during(format!("{} could not be exported", file.display()));
    let written = written.map_err(|e| failed(e.into()))?.map_err(|e| match e {
        DiskError::Stopped { .. } => Failure::new("interrupted; nothing is left of the export"),
        e => failed(e.into()),
    })?;
    std::fs::rename(&partial, &out).map_err(|e| {
        std::fs::remove_file(&partial).ok();
        failed(Failure::from(e).during(format!("{} could not be named", out.display())))
    })?;
    if json {
        output::json(&json!({
            "ok": true, "file": out, "size_bytes": size, "written_bytes": written,
        }));
    } else {
        println!(
            "{}: {} ({size} bytes), {} of them data",
            out.display(),
            bytes(size),
            bytes(written)
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses a target that exists, and with `--force` one that is a folder or a file of the disk itself.
fn check_target(opened: &Opened, file: &Path, out: &Path, force: bool) -> Result<(), Failure> {
    let folder = match out.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if !folder.is_dir() {
        return Err(Failure::refused(format!("there is no folder {}", folder.display()))
            .hint("Make it first, or name another one."));
    }
    if out.is_dir() {
        return Err(Failure::refused(format!("{} is a folder", out.display()))
            .hint("Name the file to be made in it."));
    }
    let Ok(target) = out.canonicalize() else { return Ok(()) };
    let mut sources = opened.chain().map(outrider_disk::DiskChain::files).unwrap_or_default();
    sources.push(file.to_owned());
    if sources.iter().any(|source| source.canonicalize().is_ok_and(|real| real == target)) {
        return Err(Failure::refused(format!("{} is a file of the disk itself", out.display()))
            .hint("Name another file."));
    }
    if !force {
        return Err(Failure::refused(format!("{} exists", out.display()))
            .hint("Name another file, or add --force to replace it."));
    }
    Ok(())
}

fn bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let template =
        "{bar:40} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(0).with_style(style)
}
