//! `outrider disk` as an administrator uses it: disks made, looked at, exported; and what is refused, with what to do.

use std::path::Path;
use std::process::{Command, Output};

use outrider_disk::{DiskWriter, RawDisk, compare, open_disk};
use outrider_tests::binary::outrider;
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn disk(dir: &Path, args: &[&str]) -> Output {
    let run = Command::new(outrider()).current_dir(dir).arg("disk").args(args).output();
    run.expect("the program runs")
}

/// Runs a command that succeeds and gives its JSON object.
fn json(dir: &Path, args: &[&str]) -> Value {
    let out = disk(dir, &[args, &["--json"]].concat());
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).expect("one JSON object")
}

/// Runs a command that fails and gives its exit code and what it says.
fn refused(dir: &Path, args: &[&str]) -> (i32, String) {
    let out = disk(dir, args);
    assert!(!out.status.success(), "{args:?} succeeded");
    (out.status.code().expect("no signal"), String::from_utf8_lossy(&out.stderr).into_owned())
}

#[test]
fn a_chain_of_either_format_is_made_mapped_and_exported() {
    for extension in ["vhdx", "vhd"] {
        let dir = tempfile::tempdir().expect("a folder");
        let (base, child) = (format!("base.{extension}"), format!("a{extension}.a{extension}"));
        let made = json(dir.path(), &["create", &base, "--size", "16MiB"]);
        assert_eq!((&made["format"], &made["size_bytes"]), (&extension.into(), &(16 * MIB).into()));
        let mut writer = DiskWriter::open(dir.path().join(&base)).expect("opens");
        writer.write_at(5 * MIB, &[1; 8192]).expect("written");
        writer.close().expect("closed");
        json(dir.path(), &["create", &child, "--parent", &base]);
        let mut writer = DiskWriter::open(dir.path().join(&child)).expect("opens");
        writer.write_at(5 * MIB + 4096, &[2; 512]).expect("written");
        writer.close().expect("closed");

        let info = json(dir.path(), &["info", &child]);
        assert_eq!(info["kind"], "differencing");
        assert_eq!(info["layers"].as_array().map(Vec::len), Some(2), "{info}");
        let map = json(dir.path(), &["map", &child]);
        let ranges = map["ranges"].as_array().expect("ranges");
        let of_child: Vec<&Value> = ranges.iter().filter(|range| range["layer"] == 0).collect();
        assert_eq!(of_child.len(), 1, "{map}");
        assert_eq!(of_child[0]["start"], 5 * MIB + 4096);
        assert_eq!(of_child[0]["length"], 512);

        let exported = json(dir.path(), &["export", &child, "out.raw"]);
        assert_eq!(exported["size_bytes"], 16 * MIB);
        let (chain, raw) = (
            open_disk(dir.path().join(&child)).expect("opens"),
            RawDisk::open(dir.path().join("out.raw")).expect("opens"),
        );
        assert_eq!(compare::first_difference(&chain, &raw).expect("read"), None);

        let (code, said) = refused(dir.path(), &["export", &child, "out.raw"]);
        assert!(code == 3 && said.contains("--force"), "{code}: {said}");
        json(dir.path(), &["export", &base, "out.raw", "--force"]);
        let (code, said) = refused(dir.path(), &["export", &child, &base, "--force"]);
        assert!(code == 3 && said.contains("a file of the disk itself"), "{code}: {said}");
        assert!(!dir.path().join("out.raw.part").exists());
    }
}

#[test]
fn what_is_no_disk_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("empty.vhdx"), b"").expect("written");
    std::fs::write(dir.path().join("notes.vhd"), vec![b'x'; 4096]).expect("written");
    std::fs::write(dir.path().join("shared.vhds"), vec![0; 4096]).expect("written");
    std::fs::create_dir(dir.path().join("folder.vhdx")).expect("made");
    for (file, expected) in [
        ("missing.vhdx", "there is no such file"),
        ("folder.vhdx", "this is a folder"),
        ("empty.vhdx", "the file is empty"),
        ("notes.vhd", "without the footer that a VHD ends with"),
        ("shared.vhds", "VHD set"),
    ] {
        for verb in ["info", "map"] {
            let (_, said) = refused(dir.path(), &[verb, file]);
            assert!(said.contains(expected) && said.contains("hint:"), "{verb} {file}: {said}");
        }
        refused(dir.path(), &["export", file, "out.raw"]);
    }
    assert!(!dir.path().join("out.raw").exists() && !dir.path().join("out.raw.part").exists());

    json(dir.path(), &["create", "base.vhd", "--size", "4MiB"]);
    json(dir.path(), &["create", "child.avhd", "--parent", "base.vhd"]);
    for (args, expected) in [
        (vec!["create", "x.vhd"], "--size"),
        (vec!["create", "x.vhd", "--size", "3TiB"], "2040 GiB"),
        (vec!["create", "x.vhd", "--size", "1GiB", "--sector", "4096"], "512 in a VHD"),
        (vec!["create", "x.vhd", "--size", "1GiB", "--format", "vhdx"], "no name for a VHDX"),
        (vec!["create", "x.disk", "--size", "1GiB"], "says no format"),
        (vec!["create", "x.avhdx", "--parent", "base.vhd"], "one format"),
        (vec!["create", "base.vhd", "--size", "1GiB"], "exists"),
        (vec!["create", "x.vhdx", "--size", "1GiB", "--kind", "differencing"], "--parent"),
    ] {
        let (_, said) = refused(dir.path(), &args);
        assert!(said.contains(expected), "{args:?}: {said}");
    }
    assert!(!dir.path().join("x.vhd").exists() && !dir.path().join("x.vhdx").exists());
    std::fs::remove_file(dir.path().join("base.vhd")).expect("removed");
    let (_, said) = refused(dir.path(), &["info", "child.avhd"]);
    assert!(said.contains("its parent was not found") && said.contains("OUT-D-0002"), "{said}");
}
