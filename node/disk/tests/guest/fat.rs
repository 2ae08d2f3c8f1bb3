//! FAT as `mkfs.fat` and mtools write it, cluster chains judged by `mshowfat`.

use outrider_disk::guest::{FileSystemKind, path};

use super::images::{
    Node, Tree, blank, content, have, noise, open, run, text, through_extents, tree,
};

const TOOLS: [&str; 4] = ["mkfs.fat", "mcopy", "mmd", "mshowfat"];

#[test]
fn what_mtools_wrote_is_read_and_found_on_the_disk() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let cases = [
        ("12", 3, "2", FileSystemKind::Fat12),
        ("12", 8, "16", FileSystemKind::Fat12),
        ("16", 24, "2", FileSystemKind::Fat16),
        ("32", 40, "1", FileSystemKind::Fat32),
    ];
    for (bits, mib, sectors, kind) in cases {
        let image = dir.path().join(format!("fat{bits}-{mib}.img"));
        blank(&image, mib);
        run("mkfs.fat", &["-F", bits, "-s", sectors, "-n", "LABEL", text(&image)]);
        let mut expected = Tree::new();
        let mut add = |name: &str, bytes: Vec<u8>| {
            let source = dir.path().join("source");
            std::fs::write(&source, &bytes).expect("a new file");
            run("mcopy", &["-o", "-i", text(&image), text(&source), &format!("::{name}")]);
            expected.insert(name.as_bytes().to_vec(), Node::File(bytes));
        };
        add("/SHORT.TXT", b"short".to_vec());
        add("/lower.txt", b"lower".to_vec());
        add("/empty", Vec::new());
        add("/a long name with spaces and é ü.data", noise(1, 300_001));
        add("/first", noise(2, 60_000));
        add("/between", noise(3, 10_000));
        run("mmd", &["-i", text(&image), "::/folder", "::/folder/in a folder"]);
        for i in 0..60 {
            add(&format!("/folder/in a folder/file number {i}"), format!("{i}").into_bytes());
        }
        // What is written where something was deleted is in pieces.
        run("mdel", &["-i", text(&image), "::/between"]);
        expected.remove(&b"/between"[..]);
        let mut again = |name: &str, bytes: Vec<u8>| {
            let source = dir.path().join("source");
            std::fs::write(&source, &bytes).expect("a new file");
            run("mcopy", &["-o", "-i", text(&image), text(&source), &format!("::{name}")]);
            expected.insert(name.as_bytes().to_vec(), Node::File(bytes));
        };
        again("/in pieces", noise(4, 400_000));
        for folder in ["/folder", "/folder/in a folder"] {
            expected.insert(folder.as_bytes().to_vec(), Node::Directory);
        }
        let fs = open(&image);
        assert_eq!(fs.facts().kind, kind);
        assert_eq!(fs.facts().label.to_string(), "LABEL");
        assert_eq!(fs.doubt().expect("readable"), None);
        let found = tree(&*fs);
        assert_eq!(
            found.keys().collect::<Vec<_>>(),
            expected.keys().collect::<Vec<_>>(),
            "FAT{bits}"
        );
        assert!(found == expected, "contents differ on FAT{bits}");
        for name in ["/in pieces", "/a long name with spaces and é ü.data"] {
            let file = path::find(&*fs, name.as_bytes()).expect("is there");
            assert!(through_extents(&*fs, file, &image) == content(&*fs, file).expect("reads"));
            let clusters: u64 =
                fs.extents(file).expect("plain").iter().map(|e| e.disk.len).sum::<u64>()
                    / u64::from(fs.facts().cluster);
            assert_eq!(clusters, judged(text(&image), name), "{name} on FAT{bits}");
        }
        let upper =
            path::find(&*fs, b"/FOLDER\\In A Folder/FILE NUMBER 7").expect("case does not matter");
        assert_eq!(content(&*fs, upper).expect("reads"), b"7");
    }
}

/// Clusters of a file by `mshowfat`, which prints them as ranges.
fn judged(image: &str, name: &str) -> u64 {
    let out = run("mshowfat", &["-i", image, &format!("::{name}")]);
    out.split('<')
        .skip(1)
        .map(|r| {
            let r = r.split('>').next().unwrap_or_default();
            let numbers: Vec<u64> = r.split('-').filter_map(|n| n.trim().parse().ok()).collect();
            match numbers[..] {
                [first, last] => last - first + 1,
                _ => 1,
            }
        })
        .sum()
}
