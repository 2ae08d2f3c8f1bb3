//! What Hyper-V's files have and those of our writer do not: seen in files that Windows wrote
//! (docs/disks.md has the list), made here by changing files of ours.

use std::path::{Path, PathBuf};

use outrider_disk::merge::merge_child_into_parent;
use outrider_disk::vhdx::{CreateOptions, VhdxLayer, VhdxWriter};
use outrider_disk::{DiskChain, DiskError, ReadDisk, ReadLayer, compare};
use uuid::Uuid;

#[path = "bytes/vhdx.rs"]
mod bytes;

use bytes::reseal;

const MIB: u64 = 1 << 20;
const METADATA: usize = 2 << 20;
const LOCATOR_TYPE: &str = "b04aefb7-d19e-4a81-b789-25b8e9445913";
const NIL: &str = "{00000000-0000-0000-0000-000000000000}";

struct Pair {
    _dir: tempfile::TempDir,
    parent: PathBuf,
    child: PathBuf,
}

/// A disk with a checkpoint, both with bytes.
fn pair() -> Pair {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [parent, child] = ["web disk.vhdx", "web disk_49C4.avhdx"].map(|n| dir.path().join(n));
    let options = CreateOptions { block_size: MIB as u32, ..CreateOptions::dynamic(5 * MIB) };
    let mut disk = VhdxWriter::create(&parent, &options).expect("a new disk");
    disk.write_at(0, &[1; 3 * MIB as usize]).expect("within the disk");
    disk.close().expect("a sound disk");
    let mut disk = VhdxWriter::create_child(&child, &parent, None).expect("a parent at rest");
    disk.write_at(MIB + 512, &[2; 4096]).expect("within the disk");
    disk.close().expect("a sound disk");
    Pair { _dir: dir, parent, child }
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).expect("it is there");
    change(&mut bytes);
    reseal(&mut bytes);
    std::fs::write(path, bytes).expect("it can be written");
}

fn data_write_guid(path: &Path) -> Uuid {
    VhdxLayer::open(path).expect("a sound disk").header().data_write_guid
}

/// A parent locator with these texts.
fn locator(entries: &[(&str, &str)]) -> Vec<u8> {
    let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
    let kind = Uuid::parse_str(LOCATOR_TYPE).expect("a GUID");
    let mut out =
        [&kind.to_bytes_le()[..], &[0, 0], &(entries.len() as u16).to_le_bytes()].concat();
    let mut texts = Vec::new();
    let texts_at = out.len() + entries.len() * 12;
    for (key, value) in entries {
        let (key, value) = (utf16(key), utf16(value));
        let at = (texts_at + texts.len()) as u32;
        out.extend(at.to_le_bytes());
        out.extend((at + key.len() as u32).to_le_bytes());
        out.extend((key.len() as u16).to_le_bytes());
        out.extend((value.len() as u16).to_le_bytes());
        texts.extend(key);
        texts.extend(value);
    }
    out.extend(texts);
    out
}

/// Puts a locator into a child, where ours is: it is the last of six items.
fn put_locator(child: &Path, entries: &[(&str, &str)]) {
    let new = locator(entries);
    change(child, |bytes| {
        let entry = METADATA + 32 + 5 * 32;
        let offset = u32::from_le_bytes(bytes[entry + 16..entry + 20].try_into().expect("four"));
        let at = METADATA + offset as usize;
        bytes[at..at + new.len()].copy_from_slice(&new);
        bytes[entry + 20..entry + 24].copy_from_slice(&(new.len() as u32).to_le_bytes());
    });
}

/// The locator that Hyper-V writes: five keys in this order, the second linkage being zeros.
fn put_hyper_v_locator(pair: &Pair) {
    let linkage = format!("{{{}}}", data_write_guid(&pair.parent));
    put_locator(
        &pair.child,
        &[
            ("parent_linkage", &linkage),
            ("absolute_win32_path", r"C:\Virtual hard disks\web disk.vhdx"),
            ("relative_path", r".\web disk.vhdx"),
            (
                "volume_path",
                r"\\?\Volume{0eba351e-5634-46d6-a8cf-4ddc2d6ac0b9}\disks\web disk.vhdx",
            ),
            ("parent_linkage2", NIL),
        ],
    );
}

#[test]
fn a_second_linkage_of_zeros_names_no_parent() {
    let pair = pair();
    put_hyper_v_locator(&pair);
    DiskChain::open(&pair.child).expect("the parent is the right one");
    change(&pair.parent, |bytes| {
        for header in [64 << 10, 128 << 10] {
            bytes[header + 32..header + 48].fill(0);
        }
    });
    let error = DiskChain::open(&pair.child).expect_err("the parent was written to");
    assert!(matches!(error, DiskError::ParentMismatch { what: "DataWriteGuid", .. }), "{error}");
}

#[test]
fn a_checkpoint_of_windows_merges_into_a_parent_of_a_new_state() {
    let pair = pair();
    put_hyper_v_locator(&pair);
    let before = DiskChain::open(&pair.child).expect("a sound chain");
    let mut expected = vec![0; 5 * MIB as usize];
    before.read_at(0, &mut expected).expect("within the disk");
    let old = data_write_guid(&pair.parent);
    merge_child_into_parent(&pair.child, &pair.parent).expect("they belong together");
    let new = data_write_guid(&pair.parent);
    assert!(new != old && !new.is_nil(), "{new}");
    let merged = DiskChain::open(&pair.parent).expect("a sound disk");
    let chain = DiskChain::open(&pair.child).expect("the child knows the parent's new state");
    for disk in [&merged, &chain] {
        let mut bytes = vec![0; expected.len()];
        disk.read_at(0, &mut bytes).expect("within the disk");
        assert!(bytes == expected);
    }
}

#[test]
fn a_parent_of_which_only_a_path_of_another_machine_is_known_is_found_beside_its_child() {
    let linkage = |pair: &Pair| format!("{{{}}}", data_write_guid(&pair.parent));
    for (key, path) in [
        ("absolute_win32_path", r"C:\ClusterStorage\Volume1\web\web disk.vhdx"),
        ("volume_path", r"\\?\Volume{0eba351e-5634-46d6-a8cf-4ddc2d6ac0b9}\web\web disk.vhdx"),
    ] {
        let pair = pair();
        put_locator(&pair.child, &[("parent_linkage", &linkage(&pair)), (key, path)]);
        let chain = DiskChain::open(&pair.child).expect("the parent is beside it");
        assert_eq!(chain.files(), [pair.child.clone(), pair.parent.clone()], "{key}");
    }
}

/// Appends an entry to the region tables.
fn add_region(bytes: &mut [u8], offset: u64, required: u32) {
    for table in [192 << 10, 256 << 10] {
        let entry = table + 16 + 2 * 32;
        bytes[table + 8..table + 12].copy_from_slice(&3_u32.to_le_bytes());
        bytes[entry..entry + 16].copy_from_slice(&[0x5a; 16]);
        bytes[entry + 16..entry + 24].copy_from_slice(&offset.to_le_bytes());
        bytes[entry + 24..entry + 28].copy_from_slice(&(1_u32 << 20).to_le_bytes());
        bytes[entry + 28..entry + 32].copy_from_slice(&required.to_le_bytes());
    }
}

#[test]
fn a_region_of_a_later_version_is_passed_over_unless_it_must_be_understood() {
    let pair = pair();
    let end = std::fs::metadata(&pair.parent).expect("it is there").len();
    change(&pair.parent, |bytes| {
        add_region(bytes, end, 0);
        bytes.resize(bytes.len() + MIB as usize, 0xee);
    });
    let disk = VhdxLayer::open(&pair.parent).expect("nobody must understand the region");
    disk.check().expect("a sound disk");
    change(&pair.parent, |bytes| add_region(bytes, end, 1));
    let error = VhdxLayer::open(&pair.parent).expect_err("the region must be understood");
    assert!(matches!(error, DiskError::Unsupported { .. }), "{error}");
}

/// Appends an item of eight bytes to the metadata.
fn add_item(bytes: &mut [u8], id: &[u8], flags: u32) {
    let count = u16::from_le_bytes([bytes[METADATA + 10], bytes[METADATA + 11]]);
    bytes[METADATA + 10..METADATA + 12].copy_from_slice(&(count + 1).to_le_bytes());
    let entry = METADATA + 32 + usize::from(count) * 32;
    bytes[entry..entry + 16].copy_from_slice(id);
    let words = [(128_u32 << 10).to_le_bytes(), 8_u32.to_le_bytes(), flags.to_le_bytes()];
    bytes[entry + 16..entry + 28].copy_from_slice(&words.concat());
}

#[test]
fn metadata_of_others_is_passed_over_unless_it_must_be_understood() {
    const USER: u32 = 1;
    const REQUIRED: u32 = 4;
    let size = Uuid::parse_str("2fa54224-cd1b-4876-b211-5dbed83bf4b8").expect("a GUID");
    let unknown = [0x5a; 16];
    let pair = pair();
    change(&pair.parent, |bytes| {
        add_item(bytes, &unknown, 0);
        // A user's item may have the id of one of the format's: it is another item.
        add_item(bytes, &size.to_bytes_le(), USER);
    });
    let disk = VhdxLayer::open(&pair.parent).expect("nobody must understand the items");
    assert_eq!(disk.info().size, 5 * MIB);
    change(&pair.parent, |bytes| add_item(bytes, &unknown, REQUIRED));
    let error = VhdxLayer::open(&pair.parent).expect_err("the item must be understood");
    assert!(matches!(error, DiskError::Unsupported { .. }), "{error}");
}

#[test]
fn an_unused_place_for_a_bitmap_may_hold_anything_in_a_disk_without_a_parent() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [plain, odd] = ["plain.vhdx", "odd.vhdx"].map(|n| dir.path().join(n));
    // More than one chunk: 128 blocks of 32 MiB share a bitmap.
    let options = CreateOptions::dynamic(5 << 30);
    let mut disk = VhdxWriter::create(&plain, &options).expect("a new disk");
    disk.write_at(130 << 25, &[3; 4096]).expect("within the disk");
    disk.close().expect("a sound disk");
    // Old versions of QEMU left such entries.
    std::fs::copy(&plain, &odd).expect("room for a sparse file");
    let file = std::fs::File::options().write(true).open(&odd).expect("it is there");
    put_at(&file, (3 << 20) + 128 * 8, &(0x40_u64 << 20 | 3).to_le_bytes());
    let [plain, odd] = [plain, odd].map(|path| DiskChain::open(path).expect("a sound disk"));
    assert_eq!(compare::first_difference(&plain, &odd).expect("both can be read"), None);
    odd.layers().for_each(|layer| layer.check().expect("nothing is wrong with it"));
}

fn put_at(mut file: &std::fs::File, at: u64, bytes: &[u8]) {
    use std::io::{Seek, SeekFrom, Write};
    file.seek(SeekFrom::Start(at)).expect("a file");
    file.write_all(bytes).expect("it can be written");
}
