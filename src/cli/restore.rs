//! `outrider restore`

use std::time::Duration;

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
    /// Connect what was connected to the virtual switch OLD to the switch NEW of that host (name or
    /// id; may be given several times)
    #[arg(long = "switch", value_name = "OLD=NEW", value_parser = switch)]
    switches: Vec<rpc::SwitchChoice>,
    /// Leave the network adapters unconnected
    #[arg(long)]
    disconnect: bool,
    /// Throw a saved state away that another host could not resume
    #[arg(long)]
    discard_saved_state: bool,
    /// Restore the checkpoints that the point holds, too; without it the VM comes back flat
    #[arg(long)]
    with_checkpoints: bool,
    /// Restore the VM as it was at this checkpoint of the point (name or GUID)
    #[arg(long, value_name = "CHECKPOINT", conflicts_with = "with_checkpoints")]
    checkpoint: Option<String>,
    /// Keep the files of the VM that --overwrite replaces
    #[arg(long, requires = "overwrite")]
    keep_replaced: bool,
    /// Start the VM afterwards
    #[arg(long)]
    power_on: bool,
    /// Start the VM and see whether it boots: within TIME its guest agent (Hyper-V: its heartbeat
    /// service) must answer, or a login prompt stand on its serial console
    #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "5m", value_parser = super::duration)]
    boot_check: Option<Duration>,
    /// With --boot-check: only this text on the serial console counts (QEMU)
    #[arg(long, value_name = "TEXT", requires = "boot_check")]
    boot_text: Option<String>,
    /// With --boot-check: a settled picture on the screen counts, too; weak, for a boot loader's
    /// menu is one (QEMU)
    #[arg(long, requires = "boot_check", conflicts_with = "boot_text")]
    boot_screen: bool,
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

/// "OLD=NEW"; a name with "=" in it cannot be given, its id can.
fn switch(text: &str) -> Result<rpc::SwitchChoice, String> {
    match text.split_once('=') {
        Some((from, to)) if !from.is_empty() && !to.is_empty() => {
            Ok(rpc::SwitchChoice { from: from.to_owned(), to: to.to_owned() })
        }
        _ => Err("expected OLD=NEW: a switch of the VM, and one of the host".to_owned()),
    }
}

pub(super) async fn run(args: Args, json: bool) -> Done {
    let boot_check = args.boot_check.map(|patience| rpc::BootCheck {
        patience_ms: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX).max(1),
        text: args.boot_text.unwrap_or_default(),
        screen: args.boot_screen,
    });
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
        switches: args.switches,
        disconnect: args.disconnect,
        discard_saved_state: args.discard_saved_state,
        with_checkpoints: args.with_checkpoints,
        checkpoint: args.checkpoint.unwrap_or_default(),
        keep_replaced: args.keep_replaced,
        boot_check,
    };
    let started = operator.restore(request).await?;
    job::started(&operator, vec![started], args.wait, json).await
}
