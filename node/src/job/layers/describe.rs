//! The tree as the manifest and the point's report tell it.

use outrider_proto::manifest::{DiskManifest, FormerDisk, FrozenLayer, Layer, Tree};

use super::order::From;
use super::{Layers, Roots, Steps, find};

impl Layers {
    /// Puts the layers before those of the point, and gives the tree.
    pub(in crate::job) fn describe(&self, roots: &Roots, disks: &mut [DiskManifest]) -> Tree {
        let mut tree = Tree {
            checkpoints: self.checkpoints.clone(),
            current: self.current,
            layers: vec![Vec::new(); disks.len()],
            former: Vec::new(),
        };
        for (index, disk) in self.disks.iter().enumerate() {
            let frozen = disk.layers.iter().map(|layer| FrozenLayer {
                checkpoint: self.checkpoints[layer.checkpoint].id,
                file_name: find::name_of(layer.source.leaf()),
                written: if layer.tells() {
                    layer.source.stamps().iter().map(|s| s.written).collect()
                } else {
                    Vec::new()
                },
            });
            let frozen: Vec<FrozenLayer> = frozen.collect();
            let layers = (0..disk.layers.len()).filter_map(|l| roots.get(&(index, l)));
            let layers = layers.map(|r| Layer { root_level: r.level, root: r.id });
            match disk.now.and_then(|now| Some((now, disks.get_mut(now)?))) {
                Some((now, of)) => {
                    of.layers.splice(0..0, layers);
                    tree.layers[now] = frozen;
                }
                None => tree.former.push(FormerDisk {
                    disk: DiskManifest { layers: layers.collect(), ..disk.like.clone() },
                    layers: frozen,
                }),
            }
        }
        tree
    }

    pub(super) fn report(&self, steps: &Steps) -> String {
        let names: Vec<String> = self.checkpoints.iter().map(|c| format!("{:?}", c.name)).collect();
        let all = steps.iter().flatten().count();
        let same = steps.iter().flatten().filter(|s| s.from == From::Parent).count();
        format!(
            "checkpoints kept with the point: {} ({all} layers of disks, {same} of them unchanged since the point before)",
            names.join(", ")
        )
    }
}
