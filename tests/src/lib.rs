//! What crosses crates: end to end with real processes, and faults.
//!
//! A test starts a whole [`Fabric`] of real processes of the one binary on loopback (coordinators, storage nodes, agents,
//! and the simulated cluster that the agents believe to be Hyper-V), steers it as an operator and as a saboteur, and
//! judges it by restoring and by the simulated cluster's own view of its hosts.
//!
//! | file | idea |
//! | --- | --- |
//! | [`binary`] | the program under test, built with the test's own profile |
//! | [`process`] | one process: started, stopped, killed, and never left behind |
//! | [`config`] | the configuration files |
//! | [`fabric`] | all processes of a fabric together |
//! | [`far`] | a second simulated cluster in the same fabric |
//! | [`operator`] | what an operator asks, typed; and the command line as it is typed |
//! | [`http`] | metrics and health of a process |
//! | [`install`] | the line that installs an agent |
//! | [`judge`] | is the restore exact, is the host clean? |
//! | [`real`] | the same fabric with real VMs: QEMU instead of the simulated cluster |
//! | [`restores`] | restores, and their ends |
//! | [`sabotage`] | power cuts and rot in a storage node's files |
//! | [`traces`] | an OTLP receiver |
//! | [`wait`] | waiting for states, never for time |

pub mod binary;
pub mod config;
pub mod fabric;
pub mod far;
pub mod http;
pub mod install;
pub mod judge;
pub mod operator;
pub mod process;
#[cfg(target_os = "linux")]
pub mod real;
pub mod restores;
pub mod sabotage;
pub mod traces;
pub mod wait;

pub use fabric::{Fabric, Plan};
pub use wait::eventually;
