//! `outrider disk map`: where each stored range is. Printed while it is read: a map may have millions of lines.

use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;

use outrider_disk::{DiskError, Origin};
use serde_json::json;

use super::opened::Opened;
use crate::cli::Done;
use crate::report::Failure;

pub(super) fn run(file: &Path, json: bool) -> Done {
    let opened = Opened::open(file)?;
    let mut out = BufWriter::new(io::stdout().lock());
    let printed = if json { print_json(&opened, &mut out) } else { print(&opened, &mut out) };
    match printed.and_then(|()| Ok(out.flush()?)) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        // Whoever reads has seen enough.
        Err(Stop::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        Err(Stop::Output(e)) => Err(Failure::from(e).during("the map could not be printed")),
        Err(Stop::Disk(e)) => Err(e.into()),
    }
}

/// What can end the printing.
enum Stop {
    Output(io::Error),
    Disk(DiskError),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

fn print(opened: &Opened, out: &mut impl Write) -> Result<(), Stop> {
    let files = files(opened);
    for (layer, file) in files.iter().enumerate() {
        writeln!(out, "layer {layer:<4} {file}")?;
    }
    writeln!(out, "{:>18} {:>18} {:>6} {:>18}", "START", "LENGTH", "LAYER", "IN FILE AT")?;
    for_origins(opened, &mut |at| {
        Ok(writeln!(
            out,
            "{:>18} {:>18} {:>6} {:>18}",
            at.offset, at.len, at.layer, at.file_offset
        )?)
    })
}

fn print_json(opened: &Opened, out: &mut impl Write) -> Result<(), Stop> {
    let info = opened.disk().info();
    let head = json!({ "ok": true, "size_bytes": info.size, "layers": files(opened) }).to_string();
    // One object on one line, whatever its length.
    write!(out, "{},\"ranges\":[", head.trim_end_matches('}'))?;
    let mut first = true;
    for_origins(opened, &mut |at| {
        let range = json!({
            "start": at.offset, "length": at.len, "layer": at.layer, "file_offset": at.file_offset,
        });
        let comma = if std::mem::take(&mut first) { "" } else { "," };
        Ok(write!(out, "{comma}{range}")?)
    })?;
    Ok(writeln!(out, "]}}")?)
}

fn files(opened: &Opened) -> Vec<String> {
    let files = opened.chain().map(outrider_disk::DiskChain::files).unwrap_or_default();
    files.iter().map(|file| file.display().to_string()).collect()
}

fn for_origins(
    opened: &Opened,
    found: &mut dyn FnMut(Origin) -> Result<(), Stop>,
) -> Result<(), Stop> {
    let Some(chain) = opened.chain() else {
        for range in &opened.disk().allocated().map_err(Stop::Disk)? {
            let (offset, len) = (range.start, range.len);
            found(Origin { offset, len, layer: 0, file_offset: offset })?;
        }
        return Ok(());
    };
    let mut stopped = None;
    let listed = chain.origins(&mut |at| {
        found(at).map_err(|stop| {
            stopped = Some(stop);
            // Never seen: what stopped it is given instead.
            DiskError::Stopped { path: "map".into() }
        })
    });
    match stopped {
        Some(stop) => Err(stop),
        None => listed.map_err(Stop::Disk),
    }
}
