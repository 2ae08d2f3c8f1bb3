//! `outrider demo` is the product's main job on one machine: whoever tries Outrider sees this first.

use std::path::{Path, PathBuf};
use std::process::Command;

use outrider_disk::compare::first_difference;
use outrider_disk::open_disk;
use outrider_disk::vhdx::{CreateOptions, VhdxWriter};

const MIB: u64 = 1 << 20;

/// A dynamic disk with some content; sizes and block sizes are none that the demo would choose.
fn disk(folder: &Path, name: &str, size: u64, block_size: u32, seed: u8) -> PathBuf {
    let path = folder.join(name);
    let mut options = CreateOptions::dynamic(size);
    options.block_size = block_size;
    let mut writer = VhdxWriter::create(&path, &options).expect("a new disk");
    let mut piece = vec![0u8; 300 << 10];
    for (n, offset) in (0..size - piece.len() as u64).step_by(3 << 20).enumerate() {
        let tag = u8::try_from(n % 251).expect("below 251");
        piece.iter_mut().zip(0u64..).for_each(|(byte, at)| {
            *byte = if at % 7 < 3 { seed } else { (at / 5) as u8 ^ tag };
        });
        writer.write_at(offset - offset % 512, &piece).expect("written");
    }
    writer.close().expect("closed");
    path
}

#[test]
fn the_demo_tells_its_whole_story_on_given_disks_and_gives_them_back_unchanged() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("restored");
    let disks = [
        disk(folder.path(), "web server.vhdx", 40 * MIB + 512, 1 << 20, 1),
        disk(folder.path(), "데이터.vhdx", 25 * MIB + 1536, 256 << 20, 2),
    ];
    let mut demo = Command::new(outrider_tests::binary::outrider());
    demo.args(["demo", "--json", "--seed", "7", "--restore-to"]).arg(&out);
    for disk in &disks {
        demo.arg("--disk").arg(disk);
    }
    let output = demo.env("TMPDIR", folder.path()).output().expect("the demo runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}\n{}", String::from_utf8_lossy(&output.stdout));

    let result: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("one JSON object on standard output");
    assert_eq!(result["ok"], true, "{result}");
    let steps = result["steps"].as_array().expect("steps");
    for name in [
        "first-backup",
        "incremental",
        "migrate-mid-backup",
        "leader-killed",
        "storage-killed",
        "restore",
        "hosts-clean",
    ] {
        let step = steps.iter().find(|s| s["name"] == name);
        assert!(step.is_some_and(|s| s["ok"] == true), "{name}: {result}");
    }
    assert_eq!(result["vms"].as_array().map(Vec::len), Some(disks.len()), "{result}");

    for given in &disks {
        let stem = given.file_stem().and_then(|s| s.to_str()).expect("a name");
        let first = open_disk(out.join(format!("{stem}-first.vhdx"))).expect("it was restored");
        let given = open_disk(given).expect("it is still there");
        assert_eq!(first_difference(&*given, &*first).expect("comparable"), None, "{stem}");
        open_disk(out.join(format!("{stem}-last.vhdx"))).expect("the last point, too");
    }
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .expect("readable")
        .map(|e| e.expect("an entry").file_name())
        .filter(|n| n.to_string_lossy().starts_with("outrider-demo"))
        .collect();
    assert!(left.is_empty(), "the demo left its folder: {left:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn the_demo_on_real_vms_tells_its_whole_story_or_says_what_to_install() {
    let installed = outrider_tests::real::installation().is_some();
    let folder = tempfile::tempdir().expect("a folder");
    let mut demo = Command::new(outrider_tests::binary::outrider());
    demo.args(["demo", "--hypervisor", "qemu", "--json", "--dir"]).arg(folder.path());
    if !installed {
        let output = demo.output().expect("the demo runs");
        let told = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(3), "{told}");
        assert!(told.contains("install"), "{told}");
        return;
    }
    let output = demo.output().expect("the demo runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}\n{}", String::from_utf8_lossy(&output.stdout));
    let result: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("one JSON object");
    let steps = result["steps"].as_array().expect("steps");
    let names: Vec<_> = steps.iter().filter_map(|s| s["name"].as_str()).collect();
    let story = "setup first-backup incremental migrate-mid-backup leader-killed host-killed restore hosts-clean";
    assert_eq!(names.join(" "), story, "{result}");
    assert!(std::fs::read_dir(folder.path()).expect("a folder").next().is_none(), "all is gone");
}

#[cfg(target_os = "linux")]
#[test]
fn without_qemu_the_demo_says_in_one_line_what_to_install_and_other_options_say_why_not() {
    let empty = tempfile::tempdir().expect("a folder");
    let demo = |more: &[&str]| {
        let mut demo = Command::new(outrider_tests::binary::outrider());
        demo.args(["demo", "--hypervisor", "qemu"]).args(more).env("PATH", empty.path());
        let output = demo.output().expect("the demo runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, told) = demo(&[]);
    assert_eq!(code, Some(3), "{told}");
    let line =
        told.lines().find(|l| l.contains("QEMU is missing")).expect("it says what is missing");
    assert!(line.contains("apt-get install qemu-system-x86 qemu-utils"), "{told}");
    for (option, why) in
        [("--keep", "its VMs end with it"), ("--restore-to=x", "`outrider export`")]
    {
        let (code, told) = demo(&[option]);
        assert_eq!(code, Some(2), "{told}");
        assert!(
            told.contains("does not go with --hypervisor qemu") && told.contains(why),
            "{told}"
        );
    }
    assert!(std::fs::read_dir(empty.path()).expect("a folder").next().is_none(), "nothing is made");
}
