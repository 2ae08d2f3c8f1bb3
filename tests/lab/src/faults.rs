//! Faults and holds: how a test interferes with methods, merges, events and change tracking.

use uuid::Uuid;

use crate::control::{Fault, FaultKind, HoldSpec, When};
use crate::error::LabError;
use crate::model::State;

/// A fault in force.
#[derive(Debug)]
pub(crate) struct ActiveFault {
    pub(crate) id: u64,
    kind: FaultKind,
    vm: Option<Uuid>,
    host: Option<String>,
    left: Option<u32>,
}

/// One call to be held.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) id: u64,
    method: String,
    vm: Option<Uuid>,
    host: Option<String>,
    when: When,
    pub(crate) progress: Progress,
}

/// How far a hold is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// No call has come yet.
    Waits,
    /// A call has come and has not reached the point yet; further calls pass.
    Caught,
    /// The call stands still.
    Holds,
}

impl State {
    pub(crate) fn set_fault(&mut self, fault: Fault) -> Result<u64, LabError> {
        let vm = fault.vm.map(|vm| self.find_vm(&vm).map(|v| v.id)).transpose()?;
        let id = self.next();
        self.faults.push(ActiveFault {
            id,
            kind: fault.kind,
            vm,
            host: fault.host,
            left: fault.times,
        });
        Ok(id)
    }

    /// Finds a fault for this VM and host, and uses it up if it is counted.
    pub(crate) fn strike<R>(
        &mut self,
        vm: Option<Uuid>,
        host: Option<&str>,
        mut pick: impl FnMut(&FaultKind) -> Option<R>,
    ) -> Option<R> {
        let (at, found) = self.faults.iter().enumerate().find_map(|(i, f)| {
            f.concerns(vm, host).then(|| pick(&f.kind)).flatten().map(|r| (i, r))
        })?;
        if let Some(left) = self.faults[at].left.as_mut() {
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.faults.remove(at);
            }
        }
        Some(found)
    }

    /// Whether such a fault is in force; nothing is used up.
    pub(crate) fn ails(
        &self,
        vm: Option<Uuid>,
        host: Option<&str>,
        mut is: impl FnMut(&FaultKind) -> bool,
    ) -> bool {
        self.faults.iter().any(|f| f.concerns(vm, host) && is(&f.kind))
    }

    /// Free bytes that a CSV pretends to have.
    pub(crate) fn pretended_space(&self, csv: &str) -> Option<u64> {
        self.faults.iter().find_map(|f| match &f.kind {
            FaultKind::LowSpace { csv: name, free } if name == csv => Some(*free),
            _ => None,
        })
    }

    pub(crate) fn set_hold(&mut self, spec: HoldSpec) -> Result<u64, LabError> {
        let vm = spec.vm.map(|vm| self.find_vm(&vm).map(|v| v.id)).transpose()?;
        let id = self.next();
        let (method, host, when) = (spec.method, spec.host, spec.when);
        self.holds.push(Hold { id, method, vm, host, when, progress: Progress::Waits });
        Ok(id)
    }

    /// Catches a call, if a hold waits for one like it.
    pub(crate) fn catch(
        &mut self,
        method: &str,
        vm: Option<Uuid>,
        host: &str,
        when: When,
    ) -> Option<u64> {
        let hold = self.holds.iter_mut().find(|h| {
            h.progress == Progress::Waits
                && h.when == when
                && h.method.eq_ignore_ascii_case(method)
                && (h.vm.is_none() || h.vm == vm)
                && h.host.as_deref().is_none_or(|wanted| wanted == host)
        })?;
        hold.progress = Progress::Caught;
        Some(hold.id)
    }

    /// The call that was caught stands still now.
    pub(crate) fn hold_now(&mut self, id: u64) {
        if let Some(hold) = self.holds.iter_mut().find(|h| h.id == id) {
            hold.progress = Progress::Holds;
        }
    }
}

impl ActiveFault {
    fn concerns(&self, vm: Option<Uuid>, host: Option<&str>) -> bool {
        (self.vm.is_none() || self.vm == vm)
            && (self.host.is_none() || self.host.as_deref() == host)
    }
}

impl FaultKind {
    /// Whether this fault is about calls of `method`.
    pub(crate) fn is_about(&self, wanted: &str) -> bool {
        match self {
            Self::MethodReturns { method, .. }
            | Self::JobFails { method, .. }
            | Self::JobWarns { method }
            | Self::JobVanishes { method }
            | Self::NullResult { method }
            | Self::Delay { method, .. } => method.eq_ignore_ascii_case(wanted),
            _ => false,
        }
    }
}
