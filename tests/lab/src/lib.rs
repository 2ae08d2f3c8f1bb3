//! The simulated failover cluster: WMI class model, VMs with real VHDX files, RCT, migrations, faults and truth.
//!
//! One process plays all hosts. It answers three kinds of connections on one port: the WMI transport of a host's agent
//! (`outrider_wmi::lab::LabWmi`), an agent's open source files (`outrider_wmi::lab::LabFiles`), and the control client
//! that steers it ([`LabControl`]). It knows virtual disks and Hyper-V's rules, and nothing of coordinators, storage or
//! backup jobs.
//!
//! | file | idea |
//! | --- | --- |
//! | `config`, `control`, `client` | what the outside sees |
//! | `serve` | connections |
//! | `cluster` | the shared state, its changes and events |
//! | `model`, `rct`, `disks`, `guest`, `truth` | a VM and its bytes |
//! | `classes`, `wql`, `methods` | the WMI face |
//! | `hardware` | what hosts and VMs have besides disks |
//! | `checkpoint`, `merge`, `migrate`, `host`, `import` | what Hyper-V and the cluster do |
//! | `shape` | what WMI shows of guests, replication and the cluster besides |
//! | `faults`, `gate` | how a test interferes |

mod checkpoint;
mod classes;
mod client;
mod cluster;
mod config;
mod control;
mod disks;
mod error;
mod faults;
mod gate;
mod guest;
mod hardware;
mod host;
mod host_path;
mod import;
mod jobs;
mod merge;
mod methods;
mod migrate;
mod model;
mod rct;
mod serve;
mod shape;
mod steer;
mod truth;
mod wql;

pub use client::{ControlError, LabControl};
pub use config::{CheckpointOnMigration, CsvConfig, Delays, LabConfig, TruthConfig};
pub use control::{
    CallRecord, CheckpointState, Comparison, CreateVm, DiskSource, DiskState, Fault, FaultKind,
    FileBytes, GateSpec, GroupSetup, GuestWrite, HoldSpec, HostSetup, HostState, LabState,
    MigrationKind, NicSetup, ReferencePointState, TruthRecord, VmSetup, VmState, WaitFor, When,
};
pub use error::LabError;
pub use serve::run;
pub use shape::{HostShape, NetworkShape, Relation, VmShape};
