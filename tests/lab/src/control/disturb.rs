//! What a test can let go wrong, hold up and wait for.

use serde::{Deserialize, Serialize};

/// A fault that is in force until it is cleared or used up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fault {
    /// What goes wrong.
    pub kind: FaultKind,
    /// Only for this VM (name or GUID).
    pub vm: Option<String>,
    /// Only on this host.
    pub host: Option<String>,
    /// How often; `None` until cleared.
    pub times: Option<u32>,
}

impl Fault {
    /// A fault for everybody until cleared.
    #[must_use]
    pub fn new(kind: FaultKind) -> Self {
        Self { kind, vm: None, host: None, times: None }
    }

    /// Only for `vm`.
    #[must_use]
    pub fn on_vm(mut self, vm: &str) -> Self {
        self.vm = Some(vm.to_owned());
        self
    }

    /// Only on `host`.
    #[must_use]
    pub fn on_host(mut self, host: &str) -> Self {
        self.host = Some(host.to_owned());
        self
    }

    /// Only `times` times.
    #[must_use]
    pub fn times(mut self, times: u32) -> Self {
        self.times = Some(times);
        self
    }
}

/// Kinds of faults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FaultKind {
    /// `method` returns `code` at once, without effect.
    MethodReturns {
        /// Method name.
        method: String,
        /// Return code.
        code: u32,
    },
    /// The job of `method` ends as an exception, without effect (guest VSS writers fail this way).
    JobFails {
        /// Method name.
        method: String,
        /// ErrorCode of the job.
        code: u32,
        /// ErrorDescription of the job.
        description: String,
    },
    /// The job of `method` works but ends in state 32768, completed with warnings.
    JobWarns {
        /// Method name.
        method: String,
    },
    /// The job of `method` works and is forgotten at once: it cannot be asked for any more.
    JobVanishes {
        /// Method name.
        method: String,
    },
    /// The `Resulting...` references of `method` stay null.
    NullResult {
        /// Method name.
        method: String,
    },
    /// `method` is delayed before its effect.
    Delay {
        /// Method name.
        method: String,
        /// Milliseconds.
        ms: u64,
    },
    /// Background merges do not go on.
    StuckMerge,
    /// A CSV says it has only so many bytes free.
    LowSpace {
        /// Name of the CSV.
        csv: String,
        /// Bytes.
        free: u64,
    },
    /// Change tracking ids are refused as invalid (0xC03A0029).
    RejectIds {
        /// As the error of a job (true) or as a return value (false).
        as_job: bool,
    },
    /// Events are not delivered, and nobody is told.
    DropEvents,
    /// Events of one provider wait until this is cleared, then all arrive in their order: reads are ahead of them.
    HoldEvents {
        /// The failover cluster's (true) or the hypervisor's (false).
        cluster: bool,
    },
    /// Events are ahead of reads: a VM that moved is read as if it were where it was before its move.
    LateReads,
    /// Events are ahead of reads of the cluster's database: a group that moved is read with the owner before.
    LateClusterReads,
    /// Instead of an event its subscriber hears that events were lost.
    OverflowEvents,
    /// Instead of an event its subscription ends.
    EndSubscriptions,
    /// WMI answers nothing, as for a while after its service or the host was started.
    WmiAway,
    /// Reads from a CSV stand still.
    CsvPaused {
        /// Name of the CSV.
        csv: String,
    },
    /// Reads from a CSV fail, as when its pause took too long (5979).
    CsvFails {
        /// Name of the CSV.
        csv: String,
        /// Windows' code.
        code: u32,
    },
    /// Opening such a file meets a sharing violation.
    FileBusy {
        /// How its name ends.
        ends_with: String,
    },
}

/// When a held method is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum When {
    /// Before it has any effect. If the caller dies meanwhile the method never happens.
    Before,
    /// After its effect, its job included, before the caller hears of it.
    After,
}

/// Holds one call of a method.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HoldSpec {
    /// Method name.
    pub method: String,
    /// Only for this VM (name or GUID).
    pub vm: Option<String>,
    /// Only on this host.
    pub host: Option<String>,
    /// Before or after its effect.
    pub when: When,
}

/// Pauses reads of a VM's files after so many bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GateSpec {
    /// VM by name or GUID.
    pub vm: String,
    /// Host; `None` counts and pauses all hosts together.
    pub host: Option<String>,
    /// Bytes that may still be read.
    pub budget: u64,
}

/// A condition to wait for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum WaitFor {
    /// The VM is realized on the host, the cluster agrees, and no migration is running.
    VmOnHost {
        /// VM.
        vm: String,
        /// Host.
        host: String,
    },
    /// The VM has no merge pending and no job running.
    NoMerge {
        /// VM.
        vm: String,
    },
    /// The VM has exactly so many recovery checkpoints.
    RecoveryCheckpoints {
        /// VM.
        vm: String,
        /// How many.
        count: usize,
    },
    /// A merge of the VM waits for readers that hold its files open.
    MergeWaitsForReaders {
        /// VM.
        vm: String,
    },
    /// A reader is blocked at this gate.
    GateBlocked {
        /// Gate id.
        gate: u64,
    },
    /// A reader waits for a paused CSV.
    ReadsPaused {
        /// Name of the CSV.
        csv: String,
    },
    /// A call is held by this hold.
    MethodHeld {
        /// Hold id.
        hold: u64,
    },
    /// The method was called so many times on the VM (any host) since the lab began.
    Called {
        /// Method.
        method: String,
        /// VM.
        vm: String,
        /// At least so often.
        count: usize,
    },
}
