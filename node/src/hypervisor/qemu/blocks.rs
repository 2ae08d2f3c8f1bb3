//! What a VM's disks are, out of QEMU's answers. Pure.

use std::path::PathBuf;

use outrider_proto::ids::{DiskId, VmGuid};
use serde_json::Value;

/// A dirty bitmap of a block node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bitmap {
    pub(super) name: String,
    /// Records what the guest writes.
    pub(super) recording: bool,
    /// Not stored when QEMU last ended: its bits mean nothing.
    pub(super) inconsistent: bool,
}

/// A disk of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    /// Id of its device, else its node's or drive's name.
    pub(super) slot: String,
    /// The device's place in QEMU's object tree.
    pub(super) device: String,
    /// The node right below the device.
    pub(super) root: String,
    /// The node of the image; bitmaps are here. The same as `root` unless a filter of ours is between.
    pub(super) base: String,
    pub(super) image: PathBuf,
    /// "qcow2", "raw", ...
    pub(super) format: String,
    pub(super) size: u64,
    pub(super) cluster: Option<u32>,
    /// Whether bitmaps are kept in the image.
    pub(super) persistent: bool,
    pub(super) bitmaps: Vec<Bitmap>,
    /// Whether this QEMU holds the image. It does not where a VM has arrived by a migration and was not let go on yet (from
    /// 10.0 on, which tells; older ones tell nothing).
    pub(super) active: bool,
    pub(super) uncapturable: Option<&'static str>,
}

impl Disk {
    /// A name for the file of this disk in a recovery point; its extension tells the format.
    pub(super) fn file_name(&self) -> PathBuf {
        let stem = self.image.file_stem().map_or_else(|| "disk".into(), |s| s.to_string_lossy());
        let extension = if self.format == "qcow2" { "qcow2" } else { "raw" };
        PathBuf::from(format!("{stem}.{extension}"))
    }

    /// The id of this disk.
    pub(super) fn id(&self, vm: VmGuid) -> DiskId {
        disk_id(vm, &self.slot)
    }

    pub(super) fn bitmap(&self, name: &str) -> Option<&Bitmap> {
        self.bitmaps.iter().find(|b| b.name == name)
    }
}

/// The id of a disk: follows from the VM and the slot, so that it is the same on every host.
pub(super) fn disk_id(vm: VmGuid, slot: &str) -> DiskId {
    let mut hash = blake3::Hasher::new_derive_key("outrider 2026-11 qemu disk id");
    hash.update(vm.0.as_bytes());
    hash.update(slot.as_bytes());
    let mut id = [0; 16];
    hash.finalize_xof().fill(&mut id);
    DiskId(uuid::Builder::from_custom_bytes(id).into_uuid())
}

/// The disks of a VM: `query-block`, `query-named-block-nodes` and, for the filters that are between device and image, the pairs
/// (parent, child) of `x-debug-query-block-graph`.
pub(super) fn disks(devices: &Value, nodes: &Value, below: &[(String, String)]) -> Vec<Disk> {
    let empty = Vec::new();
    let nodes = nodes.as_array().unwrap_or(&empty);
    let find = |name: &str| nodes.iter().find(|n| n["node-name"].as_str() == Some(name));
    let mut found: Vec<Disk> = Vec::new();
    for device in devices.as_array().unwrap_or(&empty) {
        let inserted = &device["inserted"];
        // No medium; or one that cannot change: a CD-ROM.
        let removable = device["removable"].as_bool() == Some(true);
        let read_only = inserted["ro"].as_bool() == Some(true);
        if !inserted.is_object() || (removable && read_only) {
            continue;
        }
        let root = text(&inserted["node-name"]);
        let base = below
            .iter()
            .find(|(parent, _)| *parent == root && super::names::parse_node(parent).is_some())
            .map_or_else(|| root.clone(), |(_, child)| child.clone());
        let node = find(&base).unwrap_or(inserted);
        let mut disk = one(device, node, root, base);
        if read_only {
            disk.uncapturable
                .get_or_insert("it is read-only and never changes; copy it once by hand");
        }
        if found.iter().any(|d| d.slot == disk.slot) {
            disk.uncapturable =
                Some("another disk of the VM has the same name; give its device an id of its own");
        }
        found.push(disk);
    }
    found
}

fn one(device: &Value, node: &Value, root: String, base: String) -> Disk {
    let image = &node["image"];
    let format = text(&node["drv"]);
    let compat = image["format-specific"]["data"]["compat"].as_str().unwrap_or_default();
    let mut disk = Disk {
        slot: String::new(),
        device: path_of(device),
        root,
        base,
        image: PathBuf::from(node["file"].as_str().unwrap_or_default()),
        size: image["virtual-size"].as_u64().unwrap_or(0),
        cluster: image["cluster-size"].as_u64().and_then(|c| u32::try_from(c).ok()),
        persistent: format == "qcow2" && compat != "0.10",
        bitmaps: bitmaps(node),
        active: node["active"].as_bool() != Some(false),
        uncapturable: None,
        format,
    };
    if let Some(json) = disk.image.to_str().and_then(|s| s.strip_prefix("json:")) {
        disk.image = file_of_json(json).unwrap_or_default();
    }
    match slot(device, &disk) {
        Some(slot) => disk.slot = slot,
        None => {
            disk.slot = disk.device.clone();
            disk.uncapturable =
                Some("its device has no id; start the VM with id=... at the -device");
        }
    }
    if disk.device.contains("/machine/system.flash") || disk.device.is_empty() {
        disk.uncapturable = Some("it is the firmware's memory and not a disk");
    } else if is_filter(&disk.format) {
        disk.uncapturable = Some("a filter of another program is between the VM and its image");
    } else if disk.size == 0 {
        disk.uncapturable = Some("it is empty");
    }
    disk
}

fn bitmaps(node: &Value) -> Vec<Bitmap> {
    let list = node["dirty-bitmaps"].as_array().map(Vec::as_slice).unwrap_or_default();
    let one = |b: &Value| {
        Some(Bitmap {
            name: b["name"].as_str()?.to_owned(),
            recording: b["recording"].as_bool() == Some(true),
            inconsistent: b["inconsistent"].as_bool() == Some(true),
        })
    };
    list.iter().filter_map(one).collect()
}

/// The object that `drive` is set on.
fn path_of(device: &Value) -> String {
    match device["qdev"].as_str() {
        Some(path) if path.starts_with('/') => path.to_owned(),
        Some(id) if !id.is_empty() => format!("/machine/peripheral/{id}"),
        _ => String::new(),
    }
}

fn slot(device: &Value, disk: &Disk) -> Option<String> {
    let named = disk.device.strip_prefix("/machine/peripheral/").and_then(|p| p.split('/').next());
    let own = |name: &str| (!name.is_empty() && !name.starts_with('#')).then(|| name.to_owned());
    named
        .and_then(own)
        .or_else(|| own(&disk.base))
        .or_else(|| own(device["device"].as_str().unwrap_or_default()))
}

pub(super) fn is_filter(driver: &str) -> bool {
    matches!(
        driver,
        "throttle"
            | "copy-on-read"
            | "copy-before-write"
            | "blkdebug"
            | "blklogwrites"
            | "blkverify"
            | "compress"
            | "preallocate"
            | "quorum"
            | "replication"
            | "mirror_top"
            | "commit_top"
            | "backup-top"
            | "snapshot-access"
    )
}

fn file_of_json(json: &str) -> Option<PathBuf> {
    let value: Value = serde_json::from_str(json).ok()?;
    let mut at = &value;
    for _ in 0..8 {
        if let Some(file) = at["filename"].as_str() {
            return Some(PathBuf::from(file));
        }
        at = &at["file"];
    }
    None
}

/// The pairs (parent, child) that are called `file` in the block graph.
pub(super) fn below(graph: &Value) -> Vec<(String, String)> {
    let list = |key: &str| graph[key].as_array().cloned().unwrap_or_default();
    let names: Vec<(u64, String)> = list("nodes")
        .iter()
        .filter_map(|n| Some((n["id"].as_u64()?, n["name"].as_str()?.to_owned())))
        .collect();
    let name =
        |id: &Value| names.iter().find(|(i, _)| Some(*i) == id.as_u64()).map(|(_, n)| n.clone());
    list("edges")
        .iter()
        .filter(|e| e["name"].as_str() == Some("file"))
        .filter_map(|e| Some((name(&e["parent"])?, name(&e["child"])?)))
        .collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn device(qdev: &str, node: &str) -> Value {
        json!({ "device": "", "qdev": qdev, "removable": false, "inserted": { "node-name": node, "drv": "qcow2", "ro": false } })
    }

    fn node(name: &str, drv: &str, compat: &str) -> Value {
        json!({
            "node-name": name, "drv": drv, "file": "/srv/web.img",
            "image": { "virtual-size": 1000448, "cluster-size": 65536, "format-specific": { "type": drv, "data": { "compat": compat } } },
            "dirty-bitmaps": [{ "name": "b", "recording": true }, { "name": "c", "recording": false, "inconsistent": true }, { "count": 1 }]
        })
    }

    #[test]
    fn a_disk_is_known_by_its_device_also_below_a_filter_of_ours() {
        let devices =
            json!([device("/machine/peripheral/disk0/virtio-backend", "outrider-c0-0123456789ab")]);
        let nodes = json!([
            node("outrider-c0-0123456789ab", "copy-before-write", ""),
            node("d0", "qcow2", "1.1")
        ]);
        let below = [("outrider-c0-0123456789ab".to_owned(), "d0".to_owned())];
        let disk = disks(&devices, &nodes, &below).remove(0);
        assert_eq!((disk.slot.as_str(), disk.base.as_str(), disk.size), ("disk0", "d0", 1_000_448));
        assert!(disk.persistent && disk.uncapturable.is_none());
        assert_eq!(disk.file_name(), PathBuf::from("web.qcow2"));
        assert!(disk.bitmap("c").is_some_and(|b| b.inconsistent && !b.recording));
        let vm = VmGuid::random();
        assert_eq!(disk.id(vm), disk.clone().id(vm));
        assert_ne!(disk.id(vm), disk.id(VmGuid::random()));
    }

    #[test]
    fn what_cannot_be_captured_says_why() {
        let devices = json!([
            device("/machine/system.flash0", "f"),
            device("/machine/peripheral-anon/device[3]", "#block123"),
            device("sd0", "t"),
            { "device": "cd", "qdev": "cd0", "removable": true },
            device("/machine/peripheral-anon/device[4]", "data"),
        ]);
        let nodes = json!([
            node("f", "raw", ""),
            node("#block123", "raw", ""),
            node("t", "throttle", ""),
            node("data", "qcow2", "0.10")
        ]);
        let found = disks(&devices, &nodes, &[]);
        assert_eq!(found.len(), 4, "the empty drive is left out");
        let why = |i: usize| found[i].uncapturable.unwrap_or_default();
        assert!(why(0).contains("firmware") && why(1).contains("id=") && why(2).contains("filter"));
        assert_eq!(found[2].device, "/machine/peripheral/sd0");
        assert_eq!(
            (found[3].slot.as_str(), found[3].uncapturable, found[3].persistent),
            ("data", None, false)
        );
    }
}
