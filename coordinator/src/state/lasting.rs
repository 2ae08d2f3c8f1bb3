//! What lasts on hosts that should not, as it is told to every next leader.

use outrider_proto::ids::VmKey;

use super::{Outcome, State};
use crate::traces::Lasting;

/// VMs that are remembered. Far more than that at once is another problem than one of counting hours.
const MOST: usize = 10_000;

impl State {
    /// What lasts on a host now; of what lasted there before nothing stays.
    pub(super) fn lasts(&mut self, host: &str, vms: Vec<(VmKey, Lasting)>) -> Outcome {
        self.lasting.retain(|_, lasting| lasting.host != host);
        for (vm, lasting) in vms {
            if self.lasting.len() < MOST || self.lasting.contains_key(&vm) {
                self.lasting.insert(vm, lasting);
            }
        }
        Outcome::Done
    }
}
