//! Since when something lasts on a host that should not last: replicated, so that a new leader does not begin to count anew.
//! Small: only VMs that show something, and only what no host tells by itself. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Chain, Kind, VmTraces, unexplained_chain};

/// Checkpoints without a creation time that are remembered of a VM.
const MOST_UNDATED: usize = 16;

/// What lasts at a VM, and since when by the leader's clock, Unix milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lasting {
    /// The host that showed it last.
    pub(crate) host: String,
    /// It merges.
    pub(crate) merging_ms: Option<u64>,
    /// It writes to child files that no checkpoint explains.
    pub(crate) unexplained_ms: Option<u64>,
    /// How long the longest chain was when that began.
    pub(crate) began_with: u32,
    /// Checkpoints of backups whose age the host does not tell, and when each was seen first.
    pub(crate) undated_ms: BTreeMap<String, u64>,
}

/// Files of the longest chain that are children.
pub(super) fn children(vm: &VmTraces) -> u32 {
    let longest = vm.chains.iter().map(Chain::children).max().unwrap_or(0);
    u32::try_from(longest).unwrap_or(u32::MAX)
}

/// What lasts by this look, with what lasted by the one before; none: nothing does.
pub(crate) fn looked_at(
    host: &str,
    vm: &VmTraces,
    before: Option<&Lasting>,
    now_ms: u64,
) -> Option<Lasting> {
    let nothing = Lasting::default();
    let before = before.unwrap_or(&nothing);
    let children = children(vm);
    let unexplained = vm.chains.iter().any(|c| unexplained_chain(vm, c).is_some())
        || (vm.merging && children as usize > vm.checkpoints.len());
    let undated = vm.checkpoints.iter().filter(|c| c.kind == Kind::Recovery && c.created_ms == 0);
    let lasting = Lasting {
        host: host.to_owned(),
        merging_ms: vm.merging.then(|| before.merging_ms.unwrap_or(now_ms)),
        unexplained_ms: unexplained.then(|| before.unexplained_ms.unwrap_or(now_ms)),
        began_with: match (unexplained, before.unexplained_ms) {
            (false, _) => 0,
            (true, Some(_)) => before.began_with,
            (true, None) => children,
        },
        undated_ms: undated
            .map(|c| (c.id.clone(), before.undated_ms.get(&c.id).copied().unwrap_or(now_ms)))
            .take(MOST_UNDATED)
            .collect(),
    };
    let lasts = lasting.merging_ms.is_some()
        || lasting.unexplained_ms.is_some()
        || !lasting.undated_ms.is_empty();
    lasts.then_some(lasting)
}
