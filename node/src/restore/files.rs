//! Which disk files a restore writes, and which of them are children of others: pure.
//!
//! Flat, each disk is one file. With its checkpoints, each layer is a file: the first of a chain whole, the others
//! differencing disks over the file of the layer that they follow.

use std::path::{Path, PathBuf};

use outrider_proto::ids::CheckpointId;
use outrider_proto::manifest::{DiskManifest, FrozenLayer, ImageFormat, Layer, Manifest};

/// A disk file to be written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct DiskFile {
    /// File name without folders.
    pub(super) name: String,
    pub(super) slot: String,
    /// What the file shows, with this one layer.
    pub(super) disk: DiskManifest,
    /// Position of the file that it is a child of, which stands before it.
    pub(super) over: Option<usize>,
    /// The checkpoint that it is the frozen disk of; none: the VM's own disk.
    pub(super) checkpoint: Option<CheckpointId>,
}

/// The files of the disks as they are at the point alone.
pub(super) fn flat(
    manifest: &Manifest,
    extension: impl Fn(&DiskManifest) -> &'static str,
) -> Vec<DiskFile> {
    let mut files: Vec<DiskFile> = Vec::with_capacity(manifest.disks.len());
    for (index, disk) in manifest.disks.iter().enumerate() {
        files.push(DiskFile {
            name: free(&files, named(disk, index, extension(disk))),
            slot: disk.slot.clone(),
            disk: only(disk, disk.layers.last().copied()),
            over: None,
            checkpoint: None,
        });
    }
    files
}

/// The files of the disks with all checkpoints, parents before children.
pub(super) fn with_checkpoints(
    manifest: &Manifest,
    extension: impl Fn(&DiskManifest) -> &'static str,
) -> Vec<DiskFile> {
    let tree = &manifest.tree;
    let now = manifest.disks.iter().zip(&tree.layers).map(|(disk, layers)| (disk, layers, true));
    let former = tree.former.iter().map(|f| (&f.disk, &f.layers, false));
    let mut files: Vec<DiskFile> = Vec::new();
    for (index, (disk, layers, is_now)) in now.chain(former).enumerate() {
        let of_disk = files.len();
        let name = |files: &[DiskFile], over: Option<usize>, id: String| {
            let wanted = match over {
                None if files.len() == of_disk => named(disk, index, extension(disk)),
                None => format!("{}_{id}.{}", stem(disk, index), extension(disk)),
                Some(_) => format!("{}_{id}.{}", stem(disk, index), child_extension(disk)),
            };
            free(files, wanted)
        };
        // Layers stand in the order of the checkpoints: parents first, so a layer's file is at its position.
        for (at, layer) in layers.iter().enumerate() {
            let over = tree.parent_of(layers, at).map(|parent| of_disk + parent);
            files.push(DiskFile {
                name: name(&files, over, layer.checkpoint.to_string()),
                slot: disk.slot.clone(),
                disk: only(disk, disk.layers.get(at).copied()),
                over,
                checkpoint: Some(layer.checkpoint),
            });
        }
        if is_now {
            let over = followed(manifest, layers).map(|parent| of_disk + parent);
            files.push(DiskFile {
                name: name(&files, over, manifest.point.to_string()),
                slot: disk.slot.clone(),
                disk: only(disk, disk.layers.last().copied()),
                over,
                checkpoint: None,
            });
        }
    }
    files
}

fn followed(manifest: &Manifest, layers: &[FrozenLayer]) -> Option<usize> {
    manifest.tree.layer_at(layers, manifest.tree.current)
}

fn only(disk: &DiskManifest, layer: Option<Layer>) -> DiskManifest {
    DiskManifest { layers: layer.into_iter().collect(), ..disk.clone() }
}

/// The name, numbered if a file before it has it: disks of a VM may come from several folders, and Windows takes names that
/// differ in case for one.
fn free(before: &[DiskFile], name: String) -> String {
    let taken: Vec<&str> = before.iter().map(|f| f.name.as_str()).collect();
    unlike(&taken, name)
}

/// As [`free`], beside plain names.
pub(super) fn unlike(taken: &[impl AsRef<str>], name: String) -> String {
    let is_free = |name: &str| {
        let name = name.to_lowercase();
        taken.iter().all(|taken| taken.as_ref().to_lowercase() != name)
    };
    if is_free(&name) {
        return name;
    }
    let (stem, extension) = name.rsplit_once('.').unwrap_or((&name, ""));
    let mut numbered = (2_u32..).map(|n| format!("{stem} ({n}).{extension}"));
    numbered.find(|name| is_free(name)).unwrap_or_default()
}

/// A file name for a disk.
fn named(disk: &DiskManifest, index: usize, extension: &str) -> String {
    format!("{}.{extension}", stem(disk, index))
}

fn stem(disk: &DiskManifest, index: usize) -> String {
    let name = super::safe_name(&disk.file_name, "disk");
    let stem =
        Path::new(&name).file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    match index {
        0 => stem,
        _ => format!("{stem}-{index}"),
    }
}

fn child_extension(disk: &DiskManifest) -> &'static str {
    match disk.format {
        ImageFormat::Vhd => "avhd",
        ImageFormat::Vhdx | ImageFormat::Raw => "avhdx",
    }
}

/// Where the files go.
pub(super) fn paths(files: &[DiskFile], folder: &Path) -> Vec<PathBuf> {
    files.iter().map(|f| folder.join(super::DISKS).join(&f.name)).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use outrider_proto::ids::{ChunkId, DiskId};
    use outrider_proto::manifest::{CheckpointFacts, FormerDisk, SavedCheckpoint, Tree};

    use super::*;

    fn id(n: u8) -> CheckpointId {
        CheckpointId::from_bytes([n; 16])
    }

    pub(in crate::restore) fn disk(name: &str, layers: &[u8]) -> DiskManifest {
        let layer = |n: &u8| Layer { root_level: 1, root: ChunkId([*n; 32]) };
        DiskManifest {
            disk_id: DiskId::random(),
            slot: name.into(),
            file_name: format!("{name}.vhdx"),
            size: 1 << 20,
            logical_sector: 512,
            physical_sector: 4096,
            block_size: 1 << 20,
            fixed: false,
            layers: layers.iter().map(layer).collect(),
            excluded: vec![],
            format: ImageFormat::Vhdx,
        }
    }

    fn frozen(checkpoints: &[u8]) -> Vec<FrozenLayer> {
        let layer =
            |n: &u8| FrozenLayer { checkpoint: id(*n), file_name: String::new(), written: vec![] };
        checkpoints.iter().map(layer).collect()
    }

    /// Checkpoint 1 has two followers, 2 and 3, and the VM follows 3. The second disk came after 1; a third one is of 2 only.
    fn manifest() -> Manifest {
        let mut manifest = crate::restore::target::tests::manifest();
        manifest.disks = vec![disk("os", &[1, 2, 3, 9]), disk("data", &[2, 9])];
        let saved = |n: u8, parent: Option<u8>| SavedCheckpoint {
            id: id(n),
            parent: parent.map(id),
            name: format!("cp{n}"),
            config: vec![],
            facts: CheckpointFacts::default(),
        };
        manifest.tree.checkpoints = vec![saved(1, None), saved(2, Some(1)), saved(3, Some(1))];
        manifest.tree.current = Some(id(3));
        manifest.tree.layers = vec![frozen(&[1, 2, 3]), frozen(&[2])];
        manifest.tree.former = vec![FormerDisk { disk: disk("old", &[2]), layers: frozen(&[2]) }];
        manifest
    }

    #[test]
    fn each_layer_is_a_file_over_the_one_that_it_follows() {
        let files = with_checkpoints(&manifest(), |_| "vhdx");
        let shape: Vec<_> = files
            .iter()
            .map(|f| (f.slot.as_str(), f.checkpoint.map(|c| c.to_bytes()[0]), f.over))
            .collect();
        assert_eq!(
            shape,
            [
                ("os", Some(1), None),
                ("os", Some(2), Some(0)),
                ("os", Some(3), Some(0)),
                ("os", None, Some(2)),
                // It follows checkpoint 3, which has it not: whole.
                ("data", Some(2), None),
                ("data", None, None),
                ("old", Some(2), None),
            ]
        );
        let mut names: Vec<_> = files.iter().map(|f| f.name.clone()).collect();
        assert_eq!((names[0].as_str(), names[4].as_str()), ("os.vhdx", "data-1.vhdx"));
        assert!(names[1].ends_with(".avhdx") && names[5].ends_with(".vhdx"), "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), files.len(), "no two files of one name");
    }

    #[test]
    fn no_two_disks_become_one_file_whatever_they_were_called() {
        let mut manifest = manifest();
        manifest.disks = vec![disk("data-1", &[1]), disk("data", &[2]), disk("DATA-1", &[3])];
        manifest.disks[2].file_name = "Data.VHDX".into();
        manifest.tree = Tree::default();
        manifest.tree.layers = vec![vec![]; 3];
        let names: Vec<_> = flat(&manifest, |_| "vhdx").into_iter().map(|file| file.name).collect();
        assert_eq!(names, ["data-1.vhdx", "data-1 (2).vhdx", "Data-2.vhdx"]);
        manifest.disks[1].file_name = "DATA.vhdx".into();
        let files = with_checkpoints(&manifest, |_| "vhdx");
        let mut names: Vec<_> = files.iter().map(|file| file.name.to_lowercase()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 3, "{files:?}");
    }

    #[test]
    fn flat_each_disk_is_its_last_layer() {
        let files = flat(&manifest(), |_| "vhdx");
        let roots: Vec<_> = files.iter().map(|f| f.disk.layers[0].root.0[0]).collect();
        assert_eq!(roots, [9, 9]);
        assert!(files.iter().all(|f| f.over.is_none() && f.checkpoint.is_none()));
    }
}
