//! Looking into files without a fabric: `outrider disk info`, `outrider storage inspect`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use outrider_disk::vhdx::VhdxLayer;
use outrider_disk::{DiskChain, DiskKind, ReadDisk};
use serde_json::json;

use super::Done;
use crate::output::{self, bytes};

#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// What a VHDX file is, and whether it can be read with all its parents
    Info {
        /// The file
        file: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum StorageCommand {
    /// Which records a segment file holds, and whether each is whole
    Inspect {
        /// The file
        segment: PathBuf,
    },
}

pub(super) fn disk(command: DiskCommand, json: bool) -> Done {
    let DiskCommand::Info { file } = command;
    let chain = DiskChain::open(&file)?;
    let info = chain.info();
    let allocated = chain.allocated()?.total_len();
    let kind = match info.kind {
        DiskKind::Fixed => "fixed",
        DiskKind::Dynamic => "dynamic",
        DiskKind::Differencing => "differencing",
    };
    let files = chain.files();
    let dirty = chain.layers().any(VhdxLayer::is_dirty);
    if json {
        output::json(&json!({
            "ok": true, "size_bytes": info.size, "block_size": info.block_size, "kind": kind,
            "logical_sector": info.logical_sector, "physical_sector": info.physical_sector,
            "disk_id": info.disk_id.to_string(), "allocated_bytes": allocated, "files": files,
            "log_replayed": dirty,
        }));
        return Ok(ExitCode::SUCCESS);
    }
    println!("kind        {kind}");
    println!("size        {} ({} bytes)", bytes(info.size), info.size);
    println!("allocated   {}", bytes(allocated));
    println!("block       {}", bytes(info.block_size.into()));
    println!("sectors     {} logical, {} physical", info.logical_sector, info.physical_sector);
    println!("disk id     {}", info.disk_id);
    println!("log         {}", if dirty { "was not empty; replayed in memory" } else { "empty" });
    for (depth, file) in files.iter().enumerate() {
        println!("{}{}", if depth == 0 { "files       " } else { "  parent    " }, file.display());
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn storage(command: StorageCommand, json: bool) -> Done {
    let StorageCommand::Inspect { segment } = command;
    inspect(&segment, json)
}

fn inspect(segment: &Path, json: bool) -> Done {
    let found = outrider_format::inspect::inspect(segment)?;
    let sound = found.is_sound();
    if json {
        let damage: Vec<_> = found.scan.damage.iter().map(|d| format!("{d:?}")).collect();
        output::json(&json!({
            "ok": sound, "path": found.path, "file_bytes": found.file_len, "sealed": found.sealed,
            "watermark": found.watermark, "record_bytes": found.record_bytes, "named": found.named,
            "records_by_pg": found.by_pg.iter().map(|(pg, n)| json!([pg.0, n])).collect::<Vec<_>>(),
            "footer_problem": found.footer_problem, "damage": damage,
        }));
    } else {
        println!("{found}");
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
