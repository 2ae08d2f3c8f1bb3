//! The guest of the tests with real VMs: the only program in it, started by the kernel as its first process.
//!
//! It mounts the ext4 file system of each virtio disk, says over the second serial port in which state it found them,
//! checks its own journal against what the disks hold, and then does what it is told over that port: write a pattern
//! that follows from a seed, stop, check again, hang its guest agent, power off.
//!
//! | file | idea |
//! | --- | --- |
//! | [`kernel`] | the few calls into C library and kernel that `std` lacks |
//! | [`boot`] | devices, modules, mounts, the guest agent |
//! | [`pattern`] | which bytes a record writes, and where: all from seed and sequence |
//! | [`journal`] | what was written: intents before, commits after, on the first disk |
//! | [`verify`] | do the disks hold what the journal says? |
//! | [`writer`] | writes batches at a rate and measures each fsync |
//! | [`steer`] | commands and answers, one line each |

// Compiled twice: for the guest without any dependency (see build.rs), and as a program of the workspace so that
// lints and unit tests reach it.
#[cfg(target_os = "linux")]
mod boot;
#[cfg(target_os = "linux")]
mod journal;
#[cfg(target_os = "linux")]
mod kernel;
#[cfg(target_os = "linux")]
mod pattern;
#[cfg(target_os = "linux")]
mod steer;
#[cfg(target_os = "linux")]
mod verify;
#[cfg(target_os = "linux")]
mod writer;

#[cfg(target_os = "linux")]
fn main() {
    if std::process::id() != 1 {
        eprintln!("this is the first process of a virtual machine; it does nothing elsewhere");
        std::process::exit(2);
    }
    if let Err(error) = boot::boot().and_then(steer::serve) {
        // The console keeps it; the first process must not return.
        eprintln!("guest: {error}");
    }
    kernel::power_off();
}

#[cfg(not(target_os = "linux"))]
fn main() {}
