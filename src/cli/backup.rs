//! `outrider backup`

use clap::{Args, Subcommand, ValueEnum};
use outrider_proto::rpc;

use super::connect::Connection;
use super::{Done, job};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Back up now
    Run(Run),
}

#[derive(Debug, Args)]
pub(super) struct Run {
    #[command(flatten)]
    what: What,
    /// What to read
    #[arg(long, value_enum, default_value = "incremental")]
    kind: Kind,
    /// Wait for the end, and exit with 1 unless every job is done
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct What {
    /// A VM by name or id
    #[arg(long)]
    vm: Option<String>,
    /// All VMs of a group
    #[arg(long)]
    group: Option<String>,
}

/// Kinds of backups as they are typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// All that is allocated
    Full,
    /// What changed since the last point; full where there is no proven base
    Incremental,
    /// All that is allocated, compared with what is stored
    Check,
}

impl From<Kind> for rpc::BackupKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Full => Self::Full,
            Kind::Incremental => Self::Incremental,
            Kind::Check => Self::ConsistencyCheck,
        }
    }
}

pub(super) async fn run(command: Command, json: bool) -> Done {
    let Command::Run(Run { what, kind, wait, connection }) = command;
    let operator = connection.open()?;
    let request = rpc::RunBackupRequest {
        vm: what.vm.unwrap_or_default(),
        group: what.group.unwrap_or_default(),
        kind: rpc::BackupKind::from(kind).into(),
    };
    let jobs = operator.run_backup(request).await?;
    job::started(&operator, jobs, wait, json).await
}
