//! Disk images: made with an ext4 file system without root, compared by `qemu-img`.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use crate::error::{Error, run};

/// Format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Can keep dirty bitmaps across a stop.
    Qcow2,
    /// Keeps nothing but its bytes.
    Raw,
}

impl Format {
    /// QEMU's name of it, also the file's extension.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// Makes an image with an empty ext4 file system that fills it as far as whole blocks go.
///
/// # Errors
/// What the tools say.
pub fn create(path: &Path, format: Format, size: u64) -> Result<(), Error> {
    let raw = match format {
        Format::Raw => path.to_owned(),
        Format::Qcow2 => path.with_extension("filling"),
    };
    let file = File::create(&raw).map_err(Error::file("making", &raw))?;
    file.set_len(size).map_err(Error::file("sizing", &raw))?;
    drop(file);
    let mke2fs = crate::install::program("mke2fs").unwrap_or_else(|| "mke2fs".into());
    // All tables written now: an idle guest writes nothing by itself.
    let options = "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0";
    run(Command::new(mke2fs).args(["-q", "-F", "-t", "ext4", "-E", options]).arg(&raw))?;
    if format == Format::Qcow2 {
        let convert = ["convert", "-f", "raw", "-O", "qcow2"];
        run(Command::new("qemu-img").args(convert).arg(&raw).arg(path))?;
        std::fs::remove_file(&raw).map_err(Error::file("removing", &raw))?;
    }
    Ok(())
}

/// Copies the bytes of an image, also of one that a VM has open, to a raw file.
///
/// # Errors
/// What `qemu-img` says.
pub fn snapshot(image: &Path, format: Format, to: &Path) -> Result<(), Error> {
    let mut convert = Command::new("qemu-img");
    convert.args(["convert", "-U", "-f", format.as_str(), "-O", "raw"]).arg(image).arg(to);
    run(&mut convert).map(drop)
}

/// Compares two images guest byte by guest byte; gives `qemu-img`'s words when they differ.
///
/// # Errors
/// What `qemu-img` says when it cannot compare.
pub fn compare(a: (&Path, Format), b: (&Path, Format)) -> Result<Option<String>, Error> {
    let mut command = Command::new("qemu-img");
    command.args(["compare", "-U", "-f", a.1.as_str(), "-F", b.1.as_str()]).arg(a.0).arg(b.0);
    match run(&mut command) {
        Ok(_) => Ok(None),
        Err(Error::Tool { status, output, .. }) if status.code() == Some(1) => Ok(Some(output)),
        Err(other) => Err(other),
    }
}

/// What `e2fsck` makes of the file system in an image; the image itself is not touched. `Ok(None)` when it is sound,
/// after the replay of its journal where that is due.
///
/// # Errors
/// What the tools say when they cannot do it.
pub fn check_file_system(
    image: &Path,
    format: Format,
    scratch: &Path,
) -> Result<Option<String>, Error> {
    snapshot(image, format, scratch)?;
    let e2fsck = crate::install::program("e2fsck").unwrap_or_else(|| "e2fsck".into());
    // Replays the journal as a mount would; then nothing at all may be left to correct.
    let replay = run(Command::new(&e2fsck).args(["-E", "journal_only", "-p"]).arg(scratch));
    let checked = run(Command::new(&e2fsck).args(["-f", "-n"]).arg(scratch));
    let removed = std::fs::remove_file(scratch).map_err(Error::file("removing", scratch));
    match (replay, checked) {
        // 1: the journal was replayed.
        (Err(Error::Tool { status, output, .. }), _) if status.code() != Some(1) => {
            Ok(Some(output))
        }
        (_, Err(Error::Tool { output, .. })) => Ok(Some(output)),
        (Err(other @ Error::Start { .. }), _) | (_, Err(other)) => Err(other),
        _ => removed.map(|()| None),
    }
}
