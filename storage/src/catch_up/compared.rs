//! When the names of another node are compared with this node's own: where something may have been missed, and rarely
//! otherwise.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use outrider_storage_client::transport::ChunkSession;

/// A look compares all names when so many before it did not: a writer may have reached the other node and not this one.
pub(super) const RARELY: u32 = 20;

/// What was compared with whom.
#[derive(Default)]
pub(super) struct Compared {
    peers: HashMap<String, Seen>,
}

struct Seen {
    session: Weak<dyn ChunkSession>,
    damaged: u64,
    looks: u32,
}

impl Compared {
    /// Whether this look has to compare the names: after a start, a lost session, damage found here, or long ago.
    pub(super) fn is_due(&mut self, session: &Arc<dyn ChunkSession>, damaged: u64) -> bool {
        let Some(seen) = self.peers.get_mut(&session.opened().node) else { return true };
        seen.looks += 1;
        let same = std::ptr::addr_eq(seen.session.as_ptr(), Arc::as_ptr(session));
        !same || seen.damaged != damaged || seen.looks > RARELY
    }

    /// All names were compared over this session; `damaged` as it was before.
    pub(super) fn note(&mut self, session: &Arc<dyn ChunkSession>, damaged: u64) {
        let seen = Seen { session: Arc::downgrade(session), damaged, looks: 0 };
        self.peers.insert(session.opened().node.clone(), seen);
    }
}
