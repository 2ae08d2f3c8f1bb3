//! `outrider group`

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use outrider_proto::rpc;
use serde_json::json;

use super::connect::Connection;
use super::{Done, view};
use crate::output;
use crate::report::Failure;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// A new protection group
    Create {
        /// Its name
        name: String,
        /// A VM by name or id; may be given several times
        #[arg(long = "vm", value_name = "VM")]
        vms: Vec<String>,
        /// A pattern of names with * and ?; VMs created later are included
        #[arg(long = "match", value_name = "PATTERN")]
        patterns: Vec<String>,
        #[command(flatten)]
        policy: PolicyArgs,
        #[command(flatten)]
        connection: Connection,
    },
    /// Another policy for a protection group; what is not named stays
    Edit {
        /// Its name or id
        group: String,
        #[command(flatten)]
        policy: PolicyArgs,
        #[command(flatten)]
        connection: Connection,
    },
    /// All protection groups
    List(Connection),
}

/// What a group wants. Switches can be turned off again with `=false`.
#[derive(Debug, Args)]
pub(super) struct PolicyArgs {
    /// How often to back up, 0s only when asked
    #[arg(long, value_parser = super::duration, value_name = "TIME")]
    every: Option<Duration>,
    /// The best consistency that is tried for
    #[arg(long, value_enum, value_name = "LEVEL")]
    consistency: Option<Level>,
    /// The least that is accepted: anything less is a failure
    #[arg(long, value_enum, value_name = "LEVEL")]
    minimum: Option<Level>,
    /// A running VM may be saved for a moment (usually under a minute) where nothing better works
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    allow_offline: Option<bool>,
    /// Do not bring guests to rest: crash consistency only
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    no_quiesce: Option<bool>,
    /// Let writers in guests truncate their logs; breaks log backups made inside the guest
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    truncate_logs: Option<bool>,
    /// Fail when a disk cannot be captured, instead of leaving it out with a warning
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    require_all_disks: Option<bool>,
    /// Read everything each time instead of asking the hypervisor what changed
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    no_change_tracking: Option<bool>,
    /// Leave out page and swap files where they are certain: they are restored as zeros
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    skip_page_files: Option<bool>,
    /// Run this command on the host before each backup: a name that the host's own configuration defines under `commands`;
    /// '' for none
    #[arg(long, value_name = "NAME")]
    before: Option<String>,
    /// Run this command on the host when a backup has ended, well or not; '' for none
    #[arg(long, value_name = "NAME")]
    after: Option<String>,
    /// A command before that fails ends the run, instead of being a warning
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    before_must_succeed: Option<bool>,
    /// After a crash of a VM's host, everything is read and compared once within this time (7days unless named), 0s at
    /// the next run
    #[arg(long, value_parser = super::duration, value_name = "TIME")]
    check_within: Option<Duration>,
    /// What points keep of checkpoints that administrators made: each of them (tree, the default), or
    /// only what they add up to (flat)
    #[arg(long, value_name = "HOW")]
    checkpoints: Option<Checkpoints>,
}

/// What points keep of user checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Checkpoints {
    Tree,
    Flat,
}

/// Consistency levels that can be asked for.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Level {
    Application,
    FileSystem,
    SavedState,
    Crash,
}

impl Level {
    fn wire(self) -> i32 {
        match self {
            Self::Application => rpc::Consistency::Application,
            Self::FileSystem => rpc::Consistency::FileSystem,
            Self::SavedState => rpc::Consistency::SavedState,
            Self::Crash => rpc::Consistency::Crash,
        }
        .into()
    }
}

impl PolicyArgs {
    /// `policy` with what was named on the command line.
    fn apply(self, policy: &mut rpc::Policy) {
        if let Some(every) = self.every {
            policy.every_ms = millis(every);
        }
        if let Some(within) = self.check_within {
            policy.check_within_ms = Some(millis(within));
        }
        if let Some(level) = self.consistency {
            policy.wanted = level.wire();
        }
        if let Some(level) = self.minimum {
            policy.minimum = level.wire();
        }
        let set = |field: &mut bool, wish: Option<bool>| *field = wish.unwrap_or(*field);
        set(&mut policy.allow_offline, self.allow_offline);
        set(&mut policy.no_quiesce, self.no_quiesce);
        set(&mut policy.truncate_logs, self.truncate_logs);
        set(&mut policy.require_all_disks, self.require_all_disks);
        set(&mut policy.no_change_tracking, self.no_change_tracking);
        set(&mut policy.skip_page_files, self.skip_page_files);
        let flat = self.checkpoints.map(|how| how == Checkpoints::Flat);
        set(&mut policy.flat_checkpoints, flat);
        set(&mut policy.command_failure_fails, self.before_must_succeed);
        if let Some(before) = self.before {
            policy.before_command = before;
        }
        if let Some(after) = self.after {
            policy.after_command = after;
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

pub(super) async fn run(command: Command, json: bool) -> Done {
    match command {
        Command::Create { name, vms, patterns, policy: wanted, connection } => {
            if vms.is_empty() && patterns.is_empty() {
                return Err(Failure::usage(format!("the group {name:?} would protect nothing"))
                    .hint("Name its VMs with --vm, or a pattern with --match '*'."));
            }
            let mut policy = rpc::Policy::default();
            wanted.apply(&mut policy);
            let request = rpc::CreateGroupRequest {
                name,
                vms,
                name_patterns: patterns,
                policy: Some(policy),
            };
            let group = connection.open()?.create_group(request).await?;
            if json {
                output::json(&json!({ "ok": true, "group": view::group(&group) }));
            } else {
                println!("{}  {}", group.group_id, group.name);
                eprintln!("made; run it now with `outrider backup run --group {:?}`", group.name);
            }
        }
        Command::Edit { group, policy: wanted, connection } => {
            let operator = connection.open()?;
            let found = operator.groups().await?;
            let named = found.into_iter().find(|g| g.name == group || g.group_id == group);
            let Some(named) = named else {
                return Err(Failure::refused(format!("no protection group {group:?} is known"))
                    .hint("List the groups with `outrider group list`."));
            };
            let mut policy = named.policy.unwrap_or_default();
            wanted.apply(&mut policy);
            let request =
                rpc::EditGroupRequest { group: named.group_id.clone(), policy: Some(policy) };
            let group = operator.edit_group(request).await?;
            if json {
                output::json(&json!({ "ok": true, "group": view::group(&group) }));
            } else {
                println!("{}  {}", group.group_id, group.name);
                eprintln!("changed; it holds for runs that begin from now on");
            }
        }
        Command::List(connection) => {
            let groups = connection.open()?.groups().await?;
            if json {
                let groups: Vec<_> = groups.iter().map(view::group).collect();
                output::json(&json!({ "ok": true, "groups": groups }));
                return Ok(ExitCode::SUCCESS);
            }
            let rows = groups.into_iter().map(|g| {
                let every = g.policy.as_ref().map_or(0, |p| p.every_ms);
                let every = match every {
                    0 => "when asked".to_owned(),
                    ms => humantime::format_duration(Duration::from_millis(ms)).to_string(),
                };
                let patterns = output::or_dash(&g.name_patterns.join(", "));
                let next = output::time(g.next_run_unix_ms);
                [
                    g.name,
                    g.vms.len().to_string(),
                    patterns,
                    every,
                    next,
                    g.skipped_runs.to_string(),
                    g.group_id,
                ]
            });
            let headers = ["group", "vms", "match", "every", "next run", "skipped", "id"];
            println!("{}", output::right(output::table(headers, rows.collect()), &[1, 5]));
        }
    }
    Ok(ExitCode::SUCCESS)
}
