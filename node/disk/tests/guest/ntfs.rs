//! NTFS as `mkntfs` and `ntfscp` write it, extents judged by `ntfscluster`.

use std::path::Path;

use outrider_disk::guest::{FileSystemKind, GuestError, path};

use super::images::{
    self, Node, blank, content, have, noise, open, run, text, through_extents, tree,
};

const TOOLS: [&str; 3] = ["mkntfs", "ntfscp", "ntfscluster"];

fn format(image: &Path, mib: u64, more: &[&str]) {
    blank(image, mib);
    let mut args = vec!["-F", "-q", "-L", "라벨 🦊"];
    args.extend(more);
    args.push(text(image));
    run("mkntfs", &args);
}

fn put(image: &Path, dir: &Path, name: &str, bytes: &[u8]) {
    let source = dir.join("source");
    std::fs::write(&source, bytes).expect("a new file");
    run("ntfscp", &["-q", text(image), text(&source), name]);
}

/// (VCN, LCN, clusters) as `ntfscluster` tells.
fn judged_runs(image: &Path, name: &str) -> Vec<(u64, u64, u64)> {
    let out = run("ntfscluster", &["-F", name, text(image)]);
    let data = out.split("0x80 - non-resident").nth(1).expect("a non-resident content");
    data.lines()
        .filter_map(|line| {
            let n: Vec<u64> = line.split_whitespace().map_while(|f| f.parse().ok()).collect();
            <[u64; 3]>::try_from(n).ok().map(|[v, l, n]| (v, l, n))
        })
        .collect()
}

#[test]
fn what_ntfscp_wrote_is_read_and_found_on_the_disk() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    for cluster in ["512", "4096", "65536"] {
        let image = dir.path().join("ntfs.img");
        let _ = std::fs::remove_file(&image);
        format(&image, 48, &["-c", cluster]);
        let mut expected = images::Tree::new();
        let mut add = |name: &str, bytes: Vec<u8>| {
            put(&image, dir.path(), name, &bytes);
            expected.insert(format!("/{name}").into_bytes(), Node::File(bytes));
        };
        add("empty", Vec::new());
        add("resident.txt", b"a few bytes".to_vec());
        add("pagefile.sys", noise(1, 3_000_001));
        add("백업 备份 🦊.bin", noise(2, 70_000));
        // Grown after something else was written: in pieces.
        add("grown", noise(3, 200_000));
        add("between", noise(4, 100_000));
        add("grown", noise(5, 900_000));
        let fs = open(&image);
        assert_eq!(fs.facts().kind, FileSystemKind::Ntfs);
        assert_eq!(fs.facts().label.as_bytes(), "라벨 🦊".as_bytes());
        assert_eq!(fs.facts().cluster.to_string(), cluster);
        assert_eq!(fs.doubt().expect("readable"), None);
        assert!(tree(&*fs) == expected, "contents differ with clusters of {cluster}");
        for name in ["pagefile.sys", "grown"] {
            let file = path::find(&*fs, name.as_bytes()).expect("is there");
            let size = u64::from(fs.facts().cluster);
            let ours: Vec<(u64, u64, u64)> = fs
                .extents(file)
                .expect("plain")
                .iter()
                .map(|e| (e.file_offset / size, e.disk.start / size, e.disk.len / size))
                .collect();
            assert_eq!(ours, judged_runs(&image, name), "{name} with clusters of {cluster}");
            assert!(through_extents(&*fs, file, &image) == content(&*fs, file).expect("reads"));
        }
        let resident = path::find(&*fs, b"RESIDENT.TXT").expect("case does not matter");
        let refused = fs.extents(resident).expect_err("it is in its record");
        assert!(matches!(refused, GuestError::NoExtents { .. }), "{refused}");
    }
}

#[test]
fn a_directory_of_many_names_is_read_whole() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("ntfs.img");
    format(&image, 16, &[]);
    let mut expected: Vec<String> = Vec::new();
    for i in 0..150 {
        let name = format!("a rather long name that fills index nodes quickly, number {i:04} ✓");
        put(&image, dir.path(), &name, name.as_bytes());
        expected.push(format!("/{name}"));
    }
    let found = tree(&*open(&image));
    let names: Vec<String> =
        found.keys().map(|n| String::from_utf8(n.clone()).expect("UTF-8")).collect();
    assert_eq!(names, expected);
    for (name, node) in found {
        assert_eq!(node, Node::File(name[1..].to_vec()));
    }
}

#[test]
fn compressed_files_are_unpacked_and_have_no_extents() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("ntfs.img");
    format(&image, 48, &["-C"]);
    let words: String =
        (0..90_000_u64).map(|i| format!("line {} of a text\n", i * i % 1013)).collect();
    let mut mixed = words.clone().into_bytes();
    mixed.splice(100_000..100_000, noise(9, 300_000));
    mixed.splice(600_000..600_000, vec![0; 400_000]);
    for (name, bytes) in
        [("words", words.into_bytes()), ("mixed", mixed), ("noise", noise(8, 500_000))]
    {
        put(&image, dir.path(), name, &bytes);
        let fs = open(&image);
        let file = path::find(&*fs, name.as_bytes()).expect("is there");
        assert!(content(&*fs, file).expect("reads") == bytes, "{name} differs");
        let refused = fs.extents(file).expect_err("compressed");
        assert!(refused.to_string().contains("compressed"), "{refused}");
    }
}

#[test]
fn alternate_streams_are_named() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("ntfs.img");
    format(&image, 16, &[]);
    put(&image, dir.path(), "file", b"main");
    let source = dir.path().join("source");
    std::fs::write(&source, noise(1, 12_345)).expect("a new file");
    run("ntfscp", &["-q", "-N", "Zone.Identifier", text(&image), text(&source), "file"]);
    let fs = open(&image);
    let stat = fs.stat(path::find(&*fs, b"file").expect("is there")).expect("readable");
    assert_eq!(stat.size, 4);
    assert_eq!(stat.streams.len(), 1);
    assert_eq!(
        (stat.streams[0].name.to_string().as_str(), stat.streams[0].size),
        ("Zone.Identifier", 12_345)
    );
}

#[test]
fn a_missing_path_says_what_is_there() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("ntfs.img");
    format(&image, 16, &[]);
    put(&image, dir.path(), "there.txt", b"x");
    let fs = open(&image);
    let missing = path::find(&*fs, b"\\absent").expect_err("not there").to_string();
    assert!(missing.contains("there.txt"), "{missing}");
    let through = path::find(&*fs, b"/there.txt/below").expect_err("a file").to_string();
    assert!(through.contains("not a directory"), "{through}");
}
