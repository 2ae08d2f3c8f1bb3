//! Other people's readers and writers of virtual disks. Without a tool a test says `SKIPPED`; where
//! `OUTRIDER_CI` is set the tool must be there.

#![allow(dead_code, reason = "each test program uses some of it")]

use std::path::{Path, PathBuf};
use std::process::Command;

/// Reads a chain, leaf first, with libvhdi into a raw file with holes.
const LIBVHDI: &str = r#"
import sys, pyvhdi
out, names = sys.argv[1], sys.argv[2:]
files = []
for name in names:
    f = pyvhdi.file()
    f.open(name)
    files.append(f)
for child, parent in zip(files, files[1:]):
    child.set_parent(parent)
size, step = files[0].get_media_size(), 1 << 20
with open(out, "wb") as raw:
    raw.truncate(size)
    for at in range(0, size, step):
        data = files[0].read_buffer_at_offset(min(step, size - at), at)
        if any(data):
            raw.seek(at)
            raw.write(data)
"#;

fn works(tool: &str, args: &[&str]) -> bool {
    Command::new(tool).args(args).output().is_ok_and(|out| out.status.success())
}

fn is_there(what: &str, found: bool) -> bool {
    if !found {
        println!("SKIPPED: {what} is not installed");
        assert!(std::env::var_os("OUTRIDER_CI").is_none(), "{what} is not installed");
    }
    found
}

/// Whether QEMU's tools can judge.
pub(crate) fn qemu_is_there() -> bool {
    let found = works("qemu-img", &["--version"]) && works("qemu-io", &["--version"]);
    is_there("qemu-img (qemu-utils)", found)
}

/// Whether libvhdi can judge.
pub(crate) fn libvhdi_is_there() -> bool {
    is_there("libvhdi (python3-libvhdi)", works("/usr/bin/python3", &["-c", "import pyvhdi"]))
}

/// Runs a tool that must succeed and gives its output.
pub(crate) fn run(tool: &str, args: &[&str]) -> String {
    let out = Command::new(tool).args(args).output().expect("it was there before");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(out.status.success(), "{tool} {args:?}: {}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

pub(crate) fn name(path: &Path) -> &str {
    path.to_str().expect("temporary folders have Unicode names")
}

/// What libvhdi reads from a chain, leaf first, as a raw file.
pub(crate) fn read_with_libvhdi(chain: &[PathBuf], raw: &Path) {
    let mut args = vec!["-c", LIBVHDI, name(raw)];
    args.extend(chain.iter().map(|path| name(path)));
    run("/usr/bin/python3", &args);
}

/// What QEMU reads from a disk, as a raw file.
pub(crate) fn read_with_qemu(format: &str, disk: &Path, raw: &Path) {
    run("qemu-img", &["convert", "-f", format, "-O", "raw", name(disk), name(raw)]);
}
