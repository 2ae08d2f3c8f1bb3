//! The command line: noun, then verb. Parsing here, one file a noun in `cli/`.

pub(crate) mod backup;
pub(crate) mod connect;
mod disk;
#[cfg(test)]
mod docs;
mod export;
mod group;
mod host;
pub(crate) mod job;
pub(crate) mod node;
mod offline;
pub(crate) use offline::StorageCommand;
mod point;
mod restore;
mod status;
pub(crate) mod view;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::report::Failure;
use crate::roles::{NodeArgs, RoleArgs, StorageArgs};
use crate::{bench, demo, fabric};

/// What a command gives to the shell.
pub(crate) type Done = Result<ExitCode, Failure>;

/// Protects virtual machines of Hyper-V failover clusters and follows them wherever they move.
#[derive(Debug, Parser)]
#[command(name = "outrider", version, propagate_version = true, arg_required_else_help = true)]
#[command(
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused, 4 installed but not connected yet.\nStart with: outrider demo"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print JSON instead of tables
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the main job on this machine: protect, follow a migration, survive kills, restore
    Demo(Box<demo::Options>),
    /// How is the fabric?
    Status(connect::Connection),
    /// Hypervisor hosts
    #[command(subcommand)]
    Host(host::Command),
    /// Virtual machines
    #[command(subcommand)]
    Vm(vm::Command),
    /// Protection groups
    #[command(subcommand)]
    Group(group::Command),
    /// Backups
    #[command(subcommand)]
    Backup(backup::Command),
    /// Jobs
    #[command(subcommand)]
    Job(job::Command),
    /// Recovery points
    #[command(subcommand)]
    Point(point::Command),
    /// Restore a VM on a host
    Restore(restore::Args),
    /// Write the disks of a recovery point as VHDX files on this machine
    Export(export::Args),
    /// A new fabric and its identities
    #[command(subcommand)]
    Fabric(fabric::Command),
    /// Virtual disk files
    #[command(subcommand)]
    Disk(disk::Command),
    /// Run a coordinator
    Coordinator(RoleArgs),
    /// Run a storage node, or look into its files
    Storage(StorageArgs),
    /// Run a node agent, or install it as a service
    Node(NodeArgs),
    /// Run a simulated failover cluster
    Lab(RoleArgs),
    /// Measure this machine
    #[command(subcommand)]
    Bench(bench::Command),
}

impl Cli {
    pub(crate) fn wants_json(&self) -> bool {
        // The demo prints its own one object, failed or not.
        self.json && !matches!(self.command, Command::Demo(_))
    }

    pub(crate) async fn run(self) -> Done {
        let json = self.json;
        match self.command {
            Command::Demo(options) => demo::run(*options, json).await,
            Command::Status(connection) => status::run(&connection, json).await,
            Command::Host(command) => host::run(command, json).await,
            Command::Vm(command) => vm::run(command, json).await,
            Command::Group(command) => group::run(command, json).await,
            Command::Backup(command) => backup::run(command, json).await,
            Command::Job(command) => job::run(command, json).await,
            Command::Point(command) => point::run(command, json).await,
            Command::Restore(args) => restore::run(args, json).await,
            Command::Export(args) => export::run(args, json).await,
            Command::Fabric(command) => fabric::run(command, json).await,
            Command::Disk(command) => disk::run(command, json).await,
            Command::Coordinator(args) => crate::roles::coordinator(args).await,
            Command::Storage(StorageArgs { command: Some(command), .. }) => {
                offline::storage(command, json).await
            }
            Command::Storage(StorageArgs { role: Some(role), .. }) => {
                crate::roles::storage(role).await
            }
            Command::Storage(_) => Err(Failure::usage("neither a configuration nor a command")
                .hint("outrider storage --config FILE, or outrider storage inspect SEGMENT")),
            Command::Node(NodeArgs { command: Some(command), .. }) => {
                node::run(command, json).await
            }
            Command::Node(NodeArgs { role: Some(role), .. }) => crate::roles::node(role).await,
            Command::Node(_) => Err(Failure::usage("neither a configuration nor a command")
                .hint("outrider node --config FILE, or outrider node install --join TOKEN")),
            Command::Lab(args) => crate::roles::lab(args).await,
            Command::Bench(command) => bench::run(command, json).await,
        }
    }
}

/// Parses `15m`, `1h 30m`.
pub(crate) fn duration(text: &str) -> Result<std::time::Duration, String> {
    humantime::parse_duration(text).map_err(|e| format!("{e}; write for example 15m or 4h"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn node_is_a_process_and_a_service() {
        Cli::try_parse_from(["outrider", "node", "--config", "n.toml"]).expect("a process");
        Cli::try_parse_from(["outrider", "node", "install", "--quiet"]).expect("a service");
        Cli::try_parse_from(["outrider", "node"]).expect_err("neither");
    }

    #[test]
    fn storage_is_a_process_and_a_tool() {
        Cli::try_parse_from(["outrider", "storage", "--config", "s.toml"]).expect("a process");
        Cli::try_parse_from(["outrider", "storage", "inspect", "seg"]).expect("a tool");
        Cli::try_parse_from(["outrider", "storage"]).expect_err("neither");
    }
}
