//! `outrider disk info`: the facts of a disk and its chain.

use std::path::Path;
use std::process::ExitCode;

use outrider_disk::{DiskFormat, Layer, ReadLayer};
use serde_json::{Value, json};

use super::opened::Opened;
use crate::cli::Done;
use crate::output::{self, bytes};

pub(super) fn run(file: &Path, json: bool) -> Done {
    let opened = Opened::open(file)?;
    let info = opened.disk().info();
    let allocated = opened.disk().allocated()?.total_len();
    let (mut layers, mut notes, mut dirty) = (Vec::new(), Vec::new(), false);
    if let Some(chain) = opened.chain() {
        chain.layers().try_for_each(ReadLayer::check)?;
        layers = chain.layers().map(of_layer).collect::<Result<_, _>>()?;
        (notes, dirty) = (chain.notes(), chain.is_dirty());
    }
    let format = info.format.to_string().to_lowercase();
    if json {
        let files: Vec<&Value> = layers.iter().map(|layer| &layer["file"]).collect();
        output::json(&json!({
            "ok": true, "format": format, "size_bytes": info.size, "block_size": info.block_size,
            "kind": info.kind.to_string(), "logical_sector": info.logical_sector,
            "physical_sector": info.physical_sector, "disk_id": info.disk_id.to_string(),
            "allocated_bytes": allocated, "files": files, "layers": layers, "log_replayed": dirty,
            "notes": notes,
        }));
        return Ok(ExitCode::SUCCESS);
    }
    println!("format      {format}, {}", info.kind);
    println!("size        {} ({} bytes)", bytes(info.size), info.size);
    println!("allocated   {}", bytes(allocated));
    if info.format != DiskFormat::Raw {
        println!("block       {}", bytes(info.block_size.into()));
        println!("sectors     {} logical, {} physical", info.logical_sector, info.physical_sector);
        println!("disk id     {}", info.disk_id);
    }
    for (depth, layer) in layers.iter().enumerate() {
        let name = layer["file"].as_str().unwrap_or_default();
        let stored = bytes(layer["stored_bytes"].as_u64().unwrap_or_default());
        let label = if depth == 0 { "file" } else { "  parent" };
        println!(
            "{label:<12}{name} ({}, {stored} stored)",
            layer["kind"].as_str().unwrap_or_default()
        );
    }
    for note in notes {
        println!("note        {note}");
    }
    Ok(ExitCode::SUCCESS)
}

fn of_layer(layer: &Layer) -> Result<Value, outrider_disk::DiskError> {
    let info = layer.info();
    let map = layer.map()?;
    Ok(json!({
        "file": layer.path(), "kind": info.kind.to_string(), "size_bytes": info.size,
        "block_size": info.block_size, "stored_bytes": map.present.total_len(), "dirty": layer.is_dirty(),
    }))
}
