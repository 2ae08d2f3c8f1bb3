//! `outrider disk info`: the facts of a disk and its chain.

use std::path::Path;
use std::process::ExitCode;

use outrider_disk::{DiskChain, DiskKind, ReadDisk};
use serde_json::json;

use crate::cli::Done;
use crate::output::{self, bytes};

pub(super) fn run(file: &Path, json: bool) -> Done {
    let chain = DiskChain::open(file)?;
    let info = chain.info();
    let allocated = chain.allocated()?.total_len();
    let kind = match info.kind {
        DiskKind::Fixed => "fixed",
        DiskKind::Dynamic => "dynamic",
        DiskKind::Differencing => "differencing",
    };
    let files = chain.files();
    let dirty = chain.is_dirty();
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
