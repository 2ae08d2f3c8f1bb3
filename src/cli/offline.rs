//! Looking into a storage node's files without a fabric: `outrider storage inspect`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use serde_json::json;

use super::Done;
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum StorageCommand {
    /// Which records a segment file holds, and whether each is whole
    Inspect {
        /// The file
        segment: PathBuf,
    },
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
