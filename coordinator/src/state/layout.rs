//! Storage nodes as registered, and the layout over them.

use std::collections::BTreeMap;

use outrider_proto::ids::LayoutEpoch;
use outrider_proto::layout::{Layout, StorageNode};
use serde::{Deserialize, Serialize};

use super::{Outcome, Refusal, State};

/// Storage nodes and layout.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Storage {
    /// By name; `online` means nothing here, it is the leader's to know.
    pub(crate) nodes: BTreeMap<String, StorageNode>,
    /// Which of them keep what.
    pub(crate) layout: Slots,
}

/// The layout by node names: entries of nodes change without a new epoch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Slots {
    pub(crate) epoch: LayoutEpoch,
    pub(crate) replicas: u8,
    pub(crate) min_durable: u8,
    pub(crate) nodes: Vec<String>,
    pub(crate) pgs: Vec<Vec<u16>>,
}

/// A layout to take effect.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct NewLayout(pub(crate) Slots);

impl Storage {
    /// The layout with the nodes' facts of now.
    pub(crate) fn layout(&self) -> Layout {
        let slots = &self.layout;
        let nodes: Option<Vec<_>> =
            slots.nodes.iter().map(|name| self.nodes.get(name).cloned()).collect();
        match nodes {
            Some(nodes) => Layout {
                epoch: slots.epoch,
                replicas: slots.replicas,
                min_durable: slots.min_durable,
                nodes,
                pgs: slots.pgs.clone(),
            },
            // Cannot be: a layout names registered nodes only, and nodes are never removed.
            None => Layout::default(),
        }
    }
}

impl State {
    /// An older incarnation is a process that has been replaced: it must not void its successor's receipts.
    pub(super) fn storage_seen(&mut self, node: StorageNode) -> Outcome {
        if let Some(known) = self.storage.nodes.get(&node.name) {
            let same_start = known.incarnation == node.incarnation;
            let other_key = known.receipt_key != node.receipt_key;
            if node.incarnation < known.incarnation || same_start && other_key {
                return Refusal::StaleStorageNode {
                    node: node.name,
                    current: known.incarnation.0,
                    found: node.incarnation.0,
                }
                .into();
            }
        }
        self.storage.nodes.insert(node.name.clone(), node);
        Outcome::Done
    }

    pub(super) fn set_layout(&mut self, new: NewLayout) -> Outcome {
        let current = self.storage.layout.epoch;
        let known = new.0.nodes.iter().all(|name| self.storage.nodes.contains_key(name));
        if new.0.epoch != current.next() || !known {
            return Refusal::StaleLayout { current: current.0, found: new.0.epoch.0 }.into();
        }
        self.storage.layout = new.0;
        Outcome::Done
    }
}
