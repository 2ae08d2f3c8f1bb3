//! Kernel modules that the guest needs, in the order in which they need each other.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, run};

/// What the guest uses; what a kernel has built in is no module and left out.
const WANTED: [&str; 6] =
    ["crc32c_generic", "ext4", "virtio_pci", "virtio_blk", "virtio_console", "virtio_rng"];

/// A module, ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The plain ELF file.
    pub content: Vec<u8>,
}

/// All modules of a kernel that the guest needs, dependencies first.
///
/// # Errors
/// [`Error::Module`] for one that cannot be read or unpacked.
pub fn needed(folder: &Path, release: &str) -> Result<Vec<Module>, Error> {
    let mut files = BTreeMap::new();
    index(&folder.join("kernel"), &mut files);
    let mut loaded = Vec::new();
    for name in WANTED {
        add(name, release, &files, &mut loaded, 0)?;
    }
    Ok(loaded)
}

fn add(
    name: &str,
    release: &str,
    files: &BTreeMap<String, PathBuf>,
    loaded: &mut Vec<Module>,
    depth: usize,
) -> Result<(), Error> {
    let fail =
        |reason: String| Error::Module { name: name.into(), release: release.into(), reason };
    if loaded.iter().any(|m| m.name == name) {
        return Ok(());
    }
    // Not a file: built in, or not there at all; the guest's devices will tell.
    let Some(path) = files.get(name) else { return Ok(()) };
    if depth > 16 {
        return Err(fail("its dependencies go in a circle".to_owned()));
    }
    let content = unpacked(path).map_err(|e| fail(e.to_string()))?;
    for dependency in dependencies(&content) {
        add(&dependency, release, files, loaded, depth + 1)?;
    }
    loaded.push(Module { name: name.to_owned(), content });
    Ok(())
}

/// Module files below a folder, by name.
fn index(folder: &Path, files: &mut BTreeMap<String, PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            index(&path, files);
        } else if let Some((stem, _)) =
            path.file_name().and_then(|n| n.to_str()).and_then(|n| n.split_once(".ko"))
        {
            files.insert(stem.replace('-', "_"), path);
        }
    }
}

fn unpacked(path: &Path) -> Result<Vec<u8>, Error> {
    let content = std::fs::read(path).map_err(Error::file("reading", path))?;
    let tool = match path.extension().and_then(|e| e.to_str()) {
        Some("zst") => {
            return zstd::decode_all(content.as_slice()).map_err(Error::file("unpacking", path));
        }
        Some("xz") => "xz",
        Some("gz") => "gzip",
        _ => return Ok(content),
    };
    // The tool's output is no text: it goes through a file descriptor of its own.
    let output = Command::new(tool)
        .arg("-dc")
        .arg(path)
        .output()
        .map_err(|source| Error::Start { command: tool.to_owned(), source })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    run(Command::new(tool).arg("-t").arg(path)).map(String::into_bytes)
}

/// The `depends=` entry of the module's information section.
fn dependencies(module: &[u8]) -> Vec<String> {
    let key = b"\0depends=";
    let Some(at) = module.windows(key.len()).position(|w| w == key) else { return Vec::new() };
    let value = &module[at + key.len()..];
    let end = value.iter().position(|b| *b == 0).unwrap_or(0);
    let value = String::from_utf8_lossy(&value[..end]);
    value.split(',').filter(|d| !d.is_empty()).map(|d| d.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_a_circle_ends() {
        let dir = tempfile::tempdir().expect("a folder");
        let kernel = dir.path().join("kernel/drivers");
        std::fs::create_dir_all(&kernel).expect("a folder");
        let write = |file: &str, depends: &str| {
            let content = format!("ELF\0license=GPL\0depends={depends}\0name=x\0");
            std::fs::write(kernel.join(file), content).expect("written");
        };
        write("virtio_blk.ko", "virtio-ring,virtio");
        write("virtio_ring.ko", "");
        let packed = zstd::encode_all(&b"ELF\0depends=virtio_ring\0"[..], 1).expect("packed");
        std::fs::write(kernel.join("virtio.ko.zst"), packed).expect("written");
        let names = |folder| -> Vec<String> {
            needed(folder, "6.1").expect("modules").into_iter().map(|m| m.name).collect()
        };
        assert_eq!(names(dir.path()), ["virtio_ring", "virtio", "virtio_blk"]);
        write("virtio_ring.ko", "virtio_blk");
        assert!(matches!(needed(dir.path(), "6.1"), Err(Error::Module { .. })));
    }
}
