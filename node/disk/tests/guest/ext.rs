//! ext2, ext3 and ext4 as `mke2fs` fills them, extents judged by `debugfs`.

use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use outrider_disk::guest::{FileSystemKind, GuestError, path};

use super::images::{
    Node, Tree, blank, content, have, noise, open, run, text, through_extents, tree,
};

const TOOLS: [&str; 2] = ["mke2fs", "debugfs"];

/// A folder with all that matters, and what it holds.
fn source(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut add = |name: &str, bytes: Vec<u8>| {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().expect("below the root")).expect("a folder");
        std::fs::write(&path, &bytes).expect("a new file");
        for above in Path::new(name).ancestors().skip(1).filter(|a| !a.as_os_str().is_empty()) {
            tree.insert(format!("/{}", above.display()).into_bytes(), Node::Directory);
        }
        tree.insert(format!("/{name}").into_bytes(), Node::File(bytes));
    };
    add("empty", Vec::new());
    add("tiny", b"fits the inode".to_vec());
    add("small", noise(3, 110));
    add("one block", noise(1, 1024));
    add("big", noise(2, 6_000_007));
    add("deep/er/and/deeper/백업 🦊 with spaces ", b"here".to_vec());
    for i in 0..700 {
        add(&format!("many/a name of some length, number {i:05}"), format!("{i}").into_bytes());
    }
    let long = "x".repeat(200);
    for (name, target) in [("link", "deep/er"), ("long link", long.as_str())] {
        symlink(target, root.join(name)).expect("a link");
        tree.insert(format!("/{name}").into_bytes(), Node::Link(target.as_bytes().to_vec()));
    }
    tree
}

fn image(kind: &str, block: &str, features: &str, root: &Path, image: &Path) {
    let _ = std::fs::remove_file(image);
    blank(image, 32);
    let args = ["-q", "-F", "-t", kind, "-b", block, "-O", features, "-L", "로그", "-N", "2000"];
    let mut args = args.to_vec();
    args.extend(["-d", text(root), text(image)]);
    run("mke2fs", &args);
}

#[test]
fn what_mke2fs_wrote_is_read_with_all_sorts_of_features() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let root = dir.path().join("root");
    std::fs::create_dir(&root).expect("a folder");
    let expected = source(&root);
    let path = dir.path().join("ext.img");
    let cases = [
        ("ext2", "1024", "none,filetype,sparse_super", FileSystemKind::Ext2),
        ("ext2", "4096", "none", FileSystemKind::Ext2),
        ("ext3", "2048", "none,filetype,has_journal,dir_index", FileSystemKind::Ext3),
        ("ext4", "1024", "64bit,metadata_csum", FileSystemKind::Ext4),
        ("ext4", "4096", "^64bit,^metadata_csum", FileSystemKind::Ext4),
        ("ext4", "4096", "inline_data,metadata_csum_seed", FileSystemKind::Ext4),
        ("ext4", "1024", "meta_bg,^resize_inode", FileSystemKind::Ext4),
        ("ext4", "4096", "^extent,^64bit", FileSystemKind::Ext4),
    ];
    for (kind, block, features, is) in cases {
        image(kind, block, features, &root, &path);
        let fs = open(&path);
        let case = format!("{kind}, blocks of {block}, {features}");
        assert_eq!(fs.facts().kind, is, "{case}");
        assert_eq!(fs.facts().label.to_string(), "로그", "{case}");
        assert_eq!(fs.doubt().expect("readable"), None, "{case}");
        let mut found = tree(&*fs);
        assert_eq!(found.remove(&b"/lost+found"[..]), Some(Node::Directory), "{case}");
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{case}");
        assert!(found == expected, "contents differ: {case}");
        let file = path::find(&*fs, b"/big").expect("is there");
        assert_eq!(blocks(&*fs, file, block), judged_blocks(&path, "/big"), "{case}");
        assert!(
            through_extents(&*fs, file, &path) == content(&*fs, file).expect("reads"),
            "{case}"
        );
        let (stat, real) =
            (fs.stat(file).expect("there"), std::fs::metadata(root.join("big")).expect("there"));
        assert_eq!(stat.modified.expect("has one").seconds, real.mtime(), "{case}");
        assert_eq!(u32::from(stat.mode.expect("has one")), real.mode() & 0o7777, "{case}");
    }
}

/// Data blocks in file order.
fn blocks(
    fs: &dyn outrider_disk::guest::FileSystem,
    file: outrider_disk::guest::FileId,
    block: &str,
) -> Vec<u64> {
    let size: u64 = block.parse().expect("a number");
    fs.extents(file)
        .expect("plain")
        .iter()
        .flat_map(|e| e.disk.start / size..e.disk.end() / size)
        .collect()
}

/// The same by `debugfs`; `bmap` leaves out what is not content.
fn judged_blocks(image: &Path, name: &str) -> Vec<u64> {
    let stat = run("debugfs", &["-R", &format!("stat {name}"), text(image)]);
    let field = |name: &str| -> u64 {
        let at = stat.split(name).nth(1).expect("debugfs tells it");
        at.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number")
    };
    let super_block = run("debugfs", &["-R", "stats", text(image)]);
    let at = super_block.split("Block size:").nth(1).expect("debugfs tells it");
    let block: u64 = at.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let commands = dir.path().join("commands");
    let count = field(" Size: ").div_ceil(block);
    let asked: String = (0..count).map(|b| format!("bmap {name} {b}\n")).collect();
    std::fs::write(&commands, asked).expect("a new file");
    run("debugfs", &["-f", text(&commands), text(image)])
        .lines()
        .filter_map(|line| line.trim().parse().ok())
        .collect()
}

#[test]
fn holes_read_as_zeros_and_have_no_extents() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let root = dir.path().join("root");
    std::fs::create_dir(&root).expect("a folder");
    let file = std::fs::File::create(root.join("holes")).expect("a new file");
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 5000], 3_000_000).expect("writes");
    file.set_len(9_000_000).expect("longer");
    let path = dir.path().join("ext.img");
    for features in ["metadata_csum", "^extent,^64bit"] {
        image("ext4", "4096", features, &root, &path);
        let fs = open(&path);
        let file = path::find(&*fs, b"holes").expect("is there");
        let found = content(&*fs, file).expect("reads");
        let mut expected = vec![0; 9_000_000];
        expected[3_000_000..3_005_000].fill(7);
        assert!(found == expected, "{features}");
        let refused = fs.extents(file).expect_err("sparse");
        assert!(matches!(refused, GuestError::NoExtents { .. }), "{refused}");
    }
}

#[test]
fn a_journal_that_must_be_replayed_and_errors_are_doubts() {
    if !have(&TOOLS) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let root = dir.path().join("root");
    std::fs::create_dir(&root).expect("a folder");
    let path = dir.path().join("ext.img");
    for (command, word) in [
        ("feature needs_recovery", "journal"),
        ("ssv state 2", "errors"),
        ("ssv state 0", "in use"),
    ] {
        image("ext4", "4096", "metadata_csum", &root, &path);
        run("debugfs", &["-w", "-R", command, text(&path)]);
        let doubt = open(&path).doubt().expect("readable").expect("there is one");
        assert!(doubt.contains(word), "{command}: {doubt}");
    }
}
