//! `outrider restore`

use clap::Args as ClapArgs;
use outrider_proto::rpc;

use super::connect::Connection;
use super::{Done, job};

/// Restores a VM: its disks are rebuilt sparse, the VM is defined and, if asked, started.
#[derive(Debug, ClapArgs)]
pub(super) struct Args {
    #[command(flatten)]
    what: What,
    /// The host to restore on; without it where the VM ran last
    #[arg(long, value_name = "HOST")]
    to_host: Option<String>,
    /// The name of the restored VM; without it the old one
    #[arg(long)]
    name: Option<String>,
    /// The folder on that host; without it beside the original
    #[arg(long)]
    folder: Option<String>,
    /// Replace the VM that exists
    #[arg(long)]
    overwrite: bool,
    /// Keep the VM's GUID
    #[arg(long)]
    keep_guid: bool,
    /// Make it a clustered role
    #[arg(long)]
    highly_available: bool,
    /// Start the VM afterwards
    #[arg(long)]
    power_on: bool,
    /// Wait for the end
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, ClapArgs)]
#[group(required = true, multiple = false)]
struct What {
    /// A recovery point
    #[arg(long)]
    point: Option<String>,
    /// The latest point of a VM (name or id)
    #[arg(long)]
    vm: Option<String>,
}

pub(super) async fn run(args: Args, json: bool) -> Done {
    let operator = args.connection.open()?;
    let request = rpc::RestoreRequest {
        point_id: args.what.point.unwrap_or_default(),
        vm: args.what.vm.unwrap_or_default(),
        to_host: args.to_host.unwrap_or_default(),
        new_name: args.name.unwrap_or_default(),
        target_folder: args.folder.unwrap_or_default(),
        overwrite: args.overwrite,
        power_on: args.power_on,
        keep_guid: args.keep_guid,
        highly_available: args.highly_available,
    };
    let started = operator.restore(request).await?;
    job::started(&operator, vec![started], args.wait, json).await
}
