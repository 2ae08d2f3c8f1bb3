//! A group's policy as an operator asks for it.

use outrider_proto::rpc;
use tonic::Status;

use super::names;
use super::refusals::named;
use crate::api::wire;
use crate::state::facts::Consistency;
use crate::state::groups::Policy;

/// Chunk sizes that the format allows.
const CHUNK_SIZES: std::ops::RangeInclusive<u32> = 64 << 10..=4 << 20;

/// The policy as asked for, with what was left open filled in.
pub(super) fn policy(p: rpc::Policy) -> Result<Policy, Status> {
    let default = Policy::default();
    let chunk_size = p.chunk_size;
    if chunk_size != 0 && !(chunk_size.is_power_of_two() && CHUNK_SIZES.contains(&chunk_size)) {
        return Err(Status::invalid_argument(format!(
            "chunk size {chunk_size} is not a power of two from 64 KiB to 4 MiB"
        )));
    }
    let policy = Policy {
        every_ms: p.every_ms,
        wanted: wire::to_consistency(p.wanted()).unwrap_or(default.wanted),
        minimum: wire::to_consistency(p.minimum()).unwrap_or(default.minimum),
        chunk_size,
        require_all_disks: p.require_all_disks,
        allow_offline: p.allow_offline,
        no_quiesce: p.no_quiesce,
        truncate_logs: p.truncate_logs,
        no_change_tracking: p.no_change_tracking,
        skip_page_files: p.skip_page_files,
        before_command: p.before_command,
        after_command: p.after_command,
        command_failure_fails: p.command_failure_fails,
        check_within_ms: p.check_within_ms.unwrap_or(default.check_within_ms),
        flat_checkpoints: p.flat_checkpoints,
    };
    for command in [&policy.before_command, &policy.after_command] {
        if !command.is_empty() {
            names::check_name("command", command).map_err(named)?;
        }
    }
    let needs_guest = matches!(policy.minimum, Consistency::Application | Consistency::FileSystem);
    if policy.no_quiesce && needs_guest {
        return Err(Status::invalid_argument(
            "guests that are not brought to rest give no application or file-system consistency: leave out --no-quiesce, \
             or accept crash consistency as the minimum",
        ));
    }
    if policy.minimum == Consistency::Off {
        return Err(Status::invalid_argument(
            "\"off\" is what a VM that is off gives, no minimum: choose application, file-system, saved-state or crash",
        ));
    }
    Ok(policy)
}
