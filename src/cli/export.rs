//! `outrider export`: a restore that this machine performs itself, straight from the storage nodes.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args as ClapArgs;
use serde_json::json;

use super::Done;
use super::connect::Connection;
use crate::output;
use crate::roles::{What, export_disks};

#[derive(Debug, ClapArgs)]
pub(super) struct Args {
    /// The recovery point
    #[arg(long)]
    point: String,
    /// A folder for the VHDX files; nothing in it is overwritten
    #[arg(long)]
    to: PathBuf,
    /// The disks as they were at this checkpoint of the point (name or GUID)
    #[arg(long, value_name = "CHECKPOINT", conflicts_with = "with_checkpoints")]
    checkpoint: Option<String>,
    /// A differencing disk for each checkpoint, too, over the one that it follows
    #[arg(long)]
    with_checkpoints: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn run(args: Args, json: bool) -> Done {
    let operator = args.connection.open()?;
    let what = match &args.checkpoint {
        Some(checkpoint) => What::Checkpoint(checkpoint),
        None if args.with_checkpoints => What::Tree,
        None => What::Point,
    };
    let files = Box::pin(export_disks(&operator, &args.point, what, &args.to)).await?;
    if json {
        output::json(&json!({ "ok": true, "point_id": args.point, "files": files }));
    } else {
        for file in files {
            println!("{}", file.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}
