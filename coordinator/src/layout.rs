//! Layout: the first one is made as soon as enough storage nodes have registered, and stays.
//!
//! The leader computes it and proposes the result: floating-point logarithms need not agree between machines.

use outrider_proto::layout::assign;

use crate::config::StorageConfig;
use crate::state::layout::{NewLayout, Slots, Storage};

/// The layout that should follow, if any.
pub(crate) fn plan(storage: &Storage, wanted: &StorageConfig) -> Option<NewLayout> {
    let has_layout = !storage.layout.pgs.is_empty();
    if has_layout || storage.nodes.len() < usize::from(wanted.nodes) {
        return None;
    }
    let nodes: Vec<_> = storage.nodes.values().take(usize::from(wanted.nodes)).cloned().collect();
    Some(NewLayout(Slots {
        epoch: storage.layout.epoch.next(),
        replicas: wanted.replicas,
        min_durable: wanted.min_durable,
        pgs: assign(&nodes, wanted.pg_count, wanted.replicas),
        nodes: nodes.into_iter().map(|node| node.name).collect(),
    }))
}

#[cfg(test)]
mod tests {
    use outrider_proto::ids::{LayoutEpoch, NodeIncarnation};
    use outrider_proto::layout::StorageNode;

    use super::*;
    use crate::state::{Change, Command, Outcome, State};

    fn node(name: &str, incarnation: u64) -> StorageNode {
        StorageNode {
            name: name.to_owned(),
            addresses: vec!["127.0.0.1:1".to_owned()],
            zone: name.to_owned(),
            capacity_bytes: 1 << 40,
            receipt_key: vec![7; 32],
            incarnation: NodeIncarnation(incarnation),
            online: false,
        }
    }

    fn apply(state: &mut State, change: Change) -> Outcome {
        state.apply(Command { at_ms: 1, change })
    }

    #[test]
    fn the_layout_waits_for_all_nodes_and_is_made_once() {
        let (mut state, wanted) = (State::default(), StorageConfig::default());
        for name in ["s1", "s2"] {
            apply(&mut state, Change::StorageSeen(Box::new(node(name, 1))));
            assert_eq!(plan(&state.storage, &wanted), None);
        }
        apply(&mut state, Change::StorageSeen(Box::new(node("s3", 1))));
        let planned = plan(&state.storage, &wanted).expect("three nodes");
        apply(&mut state, Change::SetLayout(Box::new(planned)));
        let layout = state.storage.layout();
        assert_eq!((layout.epoch, layout.pgs.len(), layout.nodes.len()), (LayoutEpoch(1), 64, 3));
        assert_eq!(plan(&state.storage, &wanted), None);
    }

    #[test]
    fn a_restarted_node_changes_its_entry_but_not_the_epoch() {
        let (mut state, wanted) = (State::default(), StorageConfig::default());
        for name in ["s1", "s2", "s3"] {
            apply(&mut state, Change::StorageSeen(Box::new(node(name, 1))));
        }
        let planned = plan(&state.storage, &wanted).expect("three nodes");
        apply(&mut state, Change::SetLayout(Box::new(planned)));
        apply(&mut state, Change::StorageSeen(Box::new(node("s2", 5))));
        let layout = state.storage.layout();
        assert_eq!(layout.epoch, LayoutEpoch(1));
        assert_eq!(layout.node("s2").expect("there").incarnation, NodeIncarnation(5));
        let old = apply(&mut state, Change::StorageSeen(Box::new(node("s2", 4))));
        assert!(matches!(old, Outcome::Refused(_)), "an older process must not come back");
        let mut stolen = node("s2", 5);
        stolen.receipt_key = vec![8; 32];
        let stolen = apply(&mut state, Change::StorageSeen(Box::new(stolen)));
        assert!(matches!(stolen, Outcome::Refused(_)), "one start has one key");
    }
}
