//! The guest's file system in memory: a cpio archive of the `newc` kind, as the kernel unpacks it.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use crate::error::{Error, run};
use crate::install::Installation;
use crate::modules;

/// The guest's program, static; empty where it could not be built.
const GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest"));

/// Makes the guest for this installation: our program, the kernel's modules, the guest agent with its libraries.
///
/// # Errors
/// [`Error::Missing`] when this build has no guest program, and what goes wrong with files.
pub fn build(installation: &Installation) -> Result<Vec<u8>, Error> {
    if GUEST.is_empty() {
        return Err(Error::Missing {
            what: "the guest's program".to_owned(),
            remedy: "build outrider on x86-64 Linux with the static C library (package libc6-dev)"
                .to_owned(),
        });
    }
    let mut archive = Archive::default();
    archive.file("init", 0o755, GUEST);
    let modules = modules::needed(&installation.modules, &installation.release)?;
    let order: String = modules.iter().map(|m| format!("{}.ko\n", m.name)).collect();
    for module in &modules {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.content);
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    if let Some(agent) = &installation.agent {
        let read = |path: &Path| std::fs::read(path).map_err(Error::file("reading", path));
        archive.file("usr/sbin/qemu-ga", 0o755, &read(agent)?);
        for library in run(Command::new("ldd").arg(agent))?.lines().filter_map(library) {
            archive.file(library.trim_start_matches('/'), 0o755, &read(Path::new(library))?);
        }
    }
    Ok(archive.finish())
}

/// The path in a line of `ldd`.
fn library(line: &str) -> Option<&str> {
    let (path, _) = line.rsplit_once(" (")?;
    let path = path.rsplit(" => ").next()?.trim();
    path.starts_with('/').then_some(path)
}

/// A cpio archive in the making.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    next: u32,
}

impl Archive {
    fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        let parents: Vec<&str> = path.match_indices('/').map(|(at, _)| &path[..at]).collect();
        for parent in parents {
            if self.folders.insert(parent.to_owned()) {
                self.entry(parent, 0o040_755, &[]);
            }
        }
        self.entry(path, 0o100_000 | mode, content);
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.next += 1;
        let fields = [
            self.next,
            mode,
            0,
            0,
            1,
            0,
            content.len() as u32,
            0,
            0,
            0,
            0,
            path.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Stdio;

    use super::*;

    #[test]
    fn lines_of_ldd_are_understood() {
        let lines = "\tlinux-vdso.so.1 (0x00007f)\n\tlibm.so.6 => /lib/x/libm.so.6 (0x7f)\n\t/lib64/ld.so.2 (0x7f)";
        let found: Vec<_> = lines.lines().filter_map(library).collect();
        assert_eq!(found, ["/lib/x/libm.so.6", "/lib64/ld.so.2"]);
    }

    #[test]
    fn another_cpio_reads_the_archive() {
        let mut archive = Archive::default();
        archive.file("a/b/one", 0o755, b"12345");
        archive.file("a/two", 0o644, &[0; 4096]);
        let bytes = archive.finish();
        let started = Command::new("busybox")
            .args(["cpio", "-t"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut cpio) = started else {
            assert!(std::env::var_os("OUTRIDER_CI").is_none(), "busybox-static is missing");
            println!("SKIPPED: busybox is not installed");
            return;
        };
        cpio.stdin.take().expect("a pipe").write_all(&bytes).expect("written");
        let output = cpio.wait_with_output().expect("it ends");
        assert!(output.status.success());
        assert_eq!(String::from_utf8_lossy(&output.stdout), "a\na/b\na/b/one\na/two\n");
    }
}
