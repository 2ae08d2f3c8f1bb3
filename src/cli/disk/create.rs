//! `outrider disk create`: a new disk of zeros, or a differencing disk over another one.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bytesize::ByteSize;
use clap::ValueEnum;
use outrider_disk::{DiskFormat, DiskInfo, DiskKind, DiskWriter, NewDisk, ReadDisk};
use serde_json::json;

use crate::cli::Done;
use crate::output::{self, bytes};
use crate::report::Failure;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file to make, named .vhdx or .vhd (a differencing one also .avhdx or .avhd)
    file: PathBuf,
    /// Size that the guest sees, for example 40GiB; of a differencing disk that of its parent
    #[arg(
        long,
        value_name = "SIZE",
        required_unless_present = "parent",
        conflicts_with = "parent"
    )]
    size: Option<ByteSize>,
    /// What the file's name says, unless given
    #[arg(long)]
    format: Option<Format>,
    /// Dynamic, unless a parent is named
    #[arg(long)]
    kind: Option<Kind>,
    /// The disk that a differencing disk is made from, and that must not change from then on
    #[arg(long, value_name = "FILE")]
    parent: Option<PathBuf>,
    /// 1 to 256 MiB in a VHDX (32MiB unless given, 2MiB for differencing disks); 512KiB or 2MiB in a VHD
    #[arg(long, value_name = "SIZE")]
    block_size: Option<ByteSize>,
    /// Logical sector size; a VHD has 512 only
    #[arg(long, value_name = "BYTES", value_parser = ["512", "4096"])]
    sector: Option<String>,
    /// Physical sector size of a VHDX
    #[arg(long, value_name = "BYTES", value_parser = ["512", "4096"])]
    physical_sector: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Vhdx,
    Vhd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Dynamic,
    Fixed,
    Differencing,
}

pub(super) fn run(args: &Args, json: bool) -> Done {
    let format = format(args)?;
    if args.file.exists() {
        return Err(Failure::refused(format!("{} exists", args.file.display()))
            .hint("A disk is never overwritten: name another file or remove this one."));
    }
    let writer = match (&args.parent, args.kind) {
        (Some(parent), None | Some(Kind::Differencing)) => child(args, parent, format)?,
        (Some(_), Some(_)) => {
            return Err(Failure::usage("only a differencing disk has a parent")
                .hint("Leave out --parent, or --kind."));
        }
        (None, Some(Kind::Differencing)) => {
            return Err(Failure::usage("a differencing disk is made from a parent")
                .hint("Name it with --parent."));
        }
        (None, kind) => DiskWriter::create(&args.file, &new_disk(args, format, kind)?)?,
    };
    let info = writer.info().clone();
    writer.close()?;
    tell(&args.file, &info, json);
    Ok(ExitCode::SUCCESS)
}

fn new_disk(args: &Args, format: DiskFormat, kind: Option<Kind>) -> Result<NewDisk, Failure> {
    let kind = if kind == Some(Kind::Fixed) { DiskKind::Fixed } else { DiskKind::Dynamic };
    let size = args.size.unwrap_or_default().as_u64();
    let default = NewDisk::of(format, kind, size);
    let sector =
        |given: &Option<String>, otherwise: u32| given.as_deref().map_or(Ok(otherwise), str::parse);
    Ok(NewDisk {
        block_size: block_size(args)?,
        logical_sector: sector(&args.sector, default.logical_sector)?,
        physical_sector: sector(&args.physical_sector, default.physical_sector)?,
        ..default
    })
}

fn child(args: &Args, parent: &Path, format: DiskFormat) -> Result<DiskWriter, Failure> {
    if args.sector.is_some() || args.physical_sector.is_some() {
        return Err(Failure::usage("a differencing disk has the sectors of its parent")
            .hint("Leave out --sector and --physical-sector."));
    }
    let opened = super::opened::Opened::open(parent)?;
    let of_parent = opened.disk().info().format;
    if of_parent != format {
        return Err(Failure::refused(format!(
            "{} would be a {format}, its parent {} is a {of_parent}",
            args.file.display(),
            parent.display()
        ))
        .hint("All files of a chain have one format: name the new file accordingly."));
    }
    drop(opened);
    Ok(DiskWriter::create_child(&args.file, parent, block_size(args)?)?)
}

fn block_size(args: &Args) -> Result<Option<u32>, Failure> {
    let convert = |size: ByteSize| {
        u32::try_from(size.as_u64()).map_err(|_| {
            Failure::usage("a block has at most 256 MiB").hint("Give a smaller --block-size.")
        })
    };
    args.block_size.map(convert).transpose()
}

/// The format asked for, which the name must agree with: disks are opened by their names.
fn format(args: &Args) -> Result<DiskFormat, Failure> {
    let extension =
        args.file.extension().and_then(|e| e.to_str()).unwrap_or_default().to_lowercase();
    let named = match extension.as_str() {
        "vhdx" | "avhdx" => DiskFormat::Vhdx,
        "vhd" | "avhd" => DiskFormat::Vhd,
        _ => {
            return Err(Failure::usage(format!(
                "{} says no format that can be made",
                args.file.display()
            ))
            .hint(
                "Name the file .vhdx or .vhd (for an empty raw disk: truncate -s SIZE FILE.raw).",
            ));
        }
    };
    let asked = match args.format {
        Some(Format::Vhdx) => DiskFormat::Vhdx,
        Some(Format::Vhd) => DiskFormat::Vhd,
        None => named,
    };
    if asked != named {
        return Err(Failure::usage(format!("{} is no name for a {asked}", args.file.display()))
            .hint("Leave out --format, or name the file accordingly."));
    }
    Ok(named)
}

fn tell(file: &Path, info: &DiskInfo, json: bool) {
    if json {
        output::json(&json!({
            "ok": true, "file": file, "format": info.format.to_string().to_lowercase(),
            "kind": info.kind.to_string(), "size_bytes": info.size, "block_size": info.block_size,
            "logical_sector": info.logical_sector, "physical_sector": info.physical_sector,
            "disk_id": info.disk_id.to_string(),
        }));
    } else {
        println!(
            "{}: {} {}, {} ({} bytes)",
            file.display(),
            info.kind,
            info.format,
            bytes(info.size),
            info.size
        );
    }
}
