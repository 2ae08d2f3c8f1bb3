//! Real VMs for tests and demo: QEMU hosts with shared storage and live migration, and a guest that keeps a journal of
//! its writes, so that a restored VM can say by itself whether everything is there.
//!
//! The "cluster manager" here is what libvirt or an operator would be: it starts QEMU processes, migrates them, kills
//! them. It talks over a second monitor of each VM; the first one, with the guest agent's socket, is for Outrider and
//! lies alone in the host's socket folder.
//!
//! | module | idea |
//! | --- | --- |
//! | [`install`] | what QEMU, kernel and guest agent this machine has, and what to install |
//! | [`modules`], [`initramfs`] | the guest's file system in memory, made by our own code |
//! | [`image`] | disk images: ext4 without root, qcow2 and raw, compared by `qemu-img` |
//! | [`machine`] | the command line of a VM |
//! | [`process`], `keeper` | a QEMU process that never outlives its owner |
//! | [`qmp`] | the cluster manager's monitor |
//! | [`guest`] | steering a guest over its serial port |
//! | [`network`] | hosts in network namespaces, which can be cut off |
//! | [`cluster`], [`migrate`] | hosts, VMs and what happens to them |
#![cfg(unix)]

pub mod cluster;
pub mod error;
pub mod guest;
pub mod image;
pub mod initramfs;
pub mod install;
mod keeper;
pub mod machine;
pub mod migrate;
pub mod modules;
pub mod network;
pub mod process;
pub mod qmp;
mod wait;

pub use cluster::{Cluster, NewVm};
pub use error::Error;
pub use guest::{Guest, Verdict};
pub use image::Format;
pub use install::Installation;
pub use machine::{Disk, Machine, Shape};
pub use network::Network;
