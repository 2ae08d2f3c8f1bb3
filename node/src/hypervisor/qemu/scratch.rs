//! Scratch files of checkpoints: opened without a name and passed to QEMU, so that nothing can be left behind, and bounded.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use serde_json::Value;

use super::error::QemuError;
use super::names::{self, Node};

/// What stays free in the scratch folder, whatever happens.
const RESERVE: u64 = 256 << 20;

/// A new, empty, nameless file of a disk's size.
pub(super) fn file(folder: &Path, size: u64) -> Result<OwnedFd, QemuError> {
    let failed = |reason: &dyn std::fmt::Display| QemuError::Scratch {
        path: folder.to_owned(),
        reason: reason.to_string(),
    };
    std::fs::create_dir_all(folder).map_err(|e| failed(&e))?;
    let file = nameless(folder).map_err(|e| failed(&e))?;
    rustix::fs::ftruncate(&file, size).map_err(|e| failed(&e))?;
    Ok(file)
}

#[cfg(target_os = "linux")]
fn nameless(folder: &Path) -> std::io::Result<OwnedFd> {
    let mode = Mode::RUSR | Mode::WUSR;
    let opened = rustix::fs::open(folder, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode);
    match opened {
        Ok(file) => Ok(file),
        // A file system that cannot: a name for a moment.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => named_for_a_moment(folder),
        Err(e) => Err(e.into()),
    }
}

#[cfg(not(target_os = "linux"))]
fn nameless(folder: &Path) -> std::io::Result<OwnedFd> {
    named_for_a_moment(folder)
}

fn named_for_a_moment(folder: &Path) -> std::io::Result<OwnedFd> {
    let path = folder.join(format!("outrider-{}.scratch", uuid::Uuid::new_v4().simple()));
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

/// Free bytes of a folder's file system.
pub(super) fn free(folder: &Path) -> std::io::Result<u64> {
    let told = rustix::fs::statvfs(folder)?;
    Ok(told.f_bavail.saturating_mul(told.f_frsize))
}

/// Bytes that the scratch files in a QEMU use, by its `query-named-block-nodes`.
pub(super) fn used(nodes: &Value) -> u64 {
    let ours = |n: &&Value| {
        n["node-name"]
            .as_str()
            .and_then(names::parse_node)
            .is_some_and(|(k, ..)| k == Node::Scratch)
    };
    let all = nodes.as_array().into_iter().flatten();
    all.filter(ours).filter_map(|n| n["image"]["actual-size"].as_u64()).sum()
}

/// Why a checkpoint must be given up.
pub(super) fn too_much(folder: &Path, used: u64, limit: u64) -> Option<String> {
    if used > limit {
        return Some(format!(
            "the guest has overwritten {} MiB since its checkpoint, more than [qemu] scratch_limit allows ({} MiB)",
            used >> 20,
            limit >> 20
        ));
    }
    let free = free(folder).ok()?;
    (free < RESERVE).then(|| {
        format!(
            "{} has only {} MiB left; free space there or name another folder as [qemu] scratch",
            folder.display(),
            free >> 20
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_files_have_no_name_and_the_size_asked_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = file(folder.path(), 12345 * 512).expect("a file");
        assert_eq!(std::fs::File::from(file).metadata().expect("its size").len(), 12345 * 512);
        assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 0);
    }

    #[test]
    fn a_checkpoint_that_grows_too_large_is_given_up_with_the_setting_named() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(too_much(folder.path(), 1, 1), None);
        assert!(
            too_much(folder.path(), 2 << 20, 1 << 20).expect("too much").contains("scratch_limit")
        );
    }
}
