//! `outrider demo`: the main job, told step by step with real processes of this very binary.
//!
//! | module | idea |
//! | --- | --- |
//! | [`setup`], [`disks`], [`given`] | disks and VMs before the story |
//! | [`configs`], [`processes`] | the fabric's processes, started, killed, watched |
//! | [`stage`] | what the steps ask of fabric and lab |
//! | [`steps`] | one file a step; each proves its result |
//! | [`real`] | the same on real VMs (`--hypervisor qemu`) |
//! | [`tell`], [`outcome`] | the story's lines, the table, the JSON |

mod configs;
mod disks;
mod given;
mod outcome;
mod processes;
#[cfg(unix)]
mod real;
mod setup;
mod stage;
mod steps;
mod tell;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use outcome::{Outcome, StepResult};
use outrider_process::signals;
use processes::Processes;
use serde_json::json;
use stage::Stage;
use steps::{Figures, RestoreTo, STORY};
use tell::Tell;

use crate::cli::Done;
use crate::output;
use crate::report::{Exit, Failure};

/// The protection group of the story.
const GROUP: &str = "everything";

/// Options of the demo.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Use this VHDX as a VM's disk (a copy of it; the file is never touched); may be given several times
    #[arg(long = "disk", value_name = "FILE.vhdx")]
    disks: Vec<PathBuf>,
    /// With --disk: so many of the given disks make one VM
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    disks_per_vm: u8,
    /// Also write every disk's first and last recovery point here, as NAME-first.vhdx and NAME-last.vhdx
    #[arg(long, value_name = "DIR")]
    restore_to: Option<PathBuf>,
    /// A simulated Hyper-V cluster, or real VMs of an installed QEMU
    #[arg(long, value_enum, default_value_t = On::Lab, value_name = "KIND")]
    hypervisor: On,
    /// With --hypervisor qemu: the guests' kernel, a file DIR/boot/vmlinuz-RELEASE with its modules in DIR/lib/modules/RELEASE
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Leave everything running, and say how to talk to it and how to stop it
    #[arg(long)]
    keep: bool,
    /// Makes guests, places and names the same again
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Work below this folder instead of the system's temporary one
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// What the demo's VMs run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum On {
    // A simulated Hyper-V failover cluster.
    Lab,
    // Real VMs of QEMU or KVM, with live migration.
    Qemu,
}

impl Options {
    /// Refuses options that do not go together.
    fn check(&self) -> Result<(), Failure> {
        let given = [
            ("--disk", !self.disks.is_empty(), "its guests make disks of their own"),
            (
                "--restore-to",
                self.restore_to.is_some(),
                "its points are judged by the guests that boot from them; `outrider export` writes points of a fabric of your own",
            ),
            (
                "--keep",
                self.keep,
                "its VMs end with it; docs/qemu.md says how hosts of your own are protected",
            ),
        ];
        match (self.hypervisor, given.iter().find(|(_, given, _)| *given)) {
            (On::Qemu, Some((option, _, why))) => {
                Err(Failure::usage(format!("{option} does not go with --hypervisor qemu: {why}")))
            }
            (On::Lab, _) if self.kernel.is_some() => {
                Err(Failure::usage("--kernel goes with --hypervisor qemu only"))
            }
            _ => Ok(()),
        }
    }
}

pub(crate) async fn run(options: Options, json: bool) -> Done {
    options.check()?;
    let began = Instant::now();
    let tell = Tell::new(json);
    let mut outcome = Outcome::default();
    let mut folder = None;
    let result = Box::pin(play(&options, tell, &mut outcome, &mut folder)).await;

    let kept = match (&result, folder) {
        (_, None) => None,
        // Interrupted or done: nothing is left behind. Failed: the logs stay.
        (Ok(End::Done) | Err(Problem::Interrupted(_)), Some(folder)) => {
            if let Err(error) = folder.close() {
                tell.say(format!("a part of the demo's folder could not be removed: {error}"));
            }
            None
        }
        (Ok(End::LeftRunning) | Err(Problem::Failed(_)), Some(folder)) => Some(folder.keep()),
    };
    let failure = match result {
        Ok(_) => None,
        Err(Problem::Failed(failure) | Problem::Interrupted(failure)) => Some(failure),
    };
    let seconds = began.elapsed().as_secs_f64();
    if json {
        output::json(&outcome.to_json(failure.as_ref(), seconds, kept.as_deref()));
    } else if !outcome.vms.is_empty() {
        outcome.print();
    }
    match failure {
        None => {
            tell.say(format!("\nAll steps succeeded in {seconds:.1} s."));
            Ok(ExitCode::SUCCESS)
        }
        Some(failure) => {
            eprintln!("\n{failure}");
            if let Some(kept) = kept {
                eprintln!("The logs and all data of this run are kept in {}", kept.display());
            }
            Ok(ExitCode::from(if failure.exit() == Exit::Refused { 3 } else { 1 }))
        }
    }
}

/// How the play ended well.
enum End {
    Done,
    LeftRunning,
}

/// How it ended badly.
enum Problem {
    Failed(Failure),
    Interrupted(Failure),
}

impl<E: Into<Failure>> From<E> for Problem {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

async fn play(
    options: &Options,
    tell: Tell,
    outcome: &mut Outcome,
    folder: &mut Option<tempfile::TempDir>,
) -> Result<End, Problem> {
    let began = Instant::now();
    #[cfg(unix)]
    let installation = match options.hypervisor {
        On::Qemu => Some(real::installation(options.kernel.as_deref())?),
        On::Lab => None,
    };
    #[cfg(not(unix))]
    if options.hypervisor == On::Qemu {
        return Err(Failure::refused("real VMs of QEMU need a Unix machine").into());
    }
    let hosts = match options.hypervisor {
        On::Lab => "of a simulated cluster",
        On::Qemu => "with real VMs",
    };
    tell.step(&format!(
        "Setup: three coordinators, three storage nodes, three hosts {hosts} with their agents"
    ));
    let given = setup::given_disks(options.disks.clone(), tell).await?;
    let parent = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    std::fs::create_dir_all(&parent)
        .map_err(|e| Failure::from(e).during(format!("cannot make {}", parent.display())))?;
    let restore_to = options.restore_to.clone().map(RestoreTo);
    if let Some(to) = &restore_to {
        let names: Vec<&str> = given.iter().map(|g| g.name.as_str()).collect();
        steps::check_target(to, names.into_iter())?;
    }
    setup::check_space(&parent, &given, options.restore_to.as_deref())?;
    let dir =
        folder
            .insert(tempfile::Builder::new().prefix("outrider-demo-").tempdir_in(&parent).map_err(
                |e| Failure::from(e).during(format!("cannot work in {}", parent.display())),
            )?)
            .path()
            .to_owned();
    let dir = dir.canonicalize()?;
    #[cfg(unix)]
    if let Some(installation) = installation {
        return Box::pin(play_real(&installation, options.seed, &dir, tell, outcome)).await;
    }

    let mut processes = None;
    let mut stage = None;
    let result = tokio::select! {
        result = Box::pin(story(options, &dir, tell, given, restore_to, began, outcome, &mut processes, &mut stage)) => {
            result.map_err(Problem::Failed)
        }
        signal = signals::wait_for_shutdown() => {
            let name = signal.unwrap_or("a signal");
            Err(Problem::Interrupted(Failure::new(format!("interrupted by {name}; everything was stopped"))))
        }
    };
    // Whoever owns the processes by now: the stage, or what was started before there was one.
    let mut owners: Vec<Processes> = Vec::new();
    if let Some(stage) = stage {
        if result.is_ok() && options.keep {
            how_to_talk(&stage, &dir, tell)?;
            stage.processes.let_go();
            return Ok(End::LeftRunning);
        }
        owners.push(stage.processes);
    }
    owners.extend(processes);
    let mut complaints = Vec::new();
    for mut owner in owners {
        complaints.extend(owner.stop().await);
    }
    result?;
    in_order(complaints)
}

/// All went well when every process left in order, too.
fn in_order(complaints: Vec<String>) -> Result<End, Problem> {
    let mut complaints = complaints.into_iter();
    let Some(first) = complaints.next() else { return Ok(End::Done) };
    let failure = Failure::new(format!("the story went well, but {first}"));
    Err(Problem::Failed(complaints.fold(failure, Failure::because)))
}

/// The story on real VMs.
#[cfg(unix)]
async fn play_real(
    installation: &outrider_qemulab::Installation,
    seed: u64,
    dir: &Path,
    tell: Tell,
    outcome: &mut Outcome,
) -> Result<End, Problem> {
    let mut stage = None;
    let story = real::story(dir, seed, tell, installation, outcome, &mut stage);
    let result = tokio::select! {
        result = Box::pin(story) => result.map_err(Problem::Failed),
        signal = signals::wait_for_shutdown() => {
            let name = signal.unwrap_or("a signal");
            Err(Problem::Interrupted(Failure::new(format!("interrupted by {name}; everything was stopped"))))
        }
    };
    // The agents leave before their VMs do.
    let complaints = match &mut stage {
        Some(stage) => stage.processes.stop().await,
        None => Vec::new(),
    };
    drop(stage);
    result?;
    in_order(complaints)
}

#[expect(
    clippy::too_many_arguments,
    reason = "the caller keeps what must outlive a cancelled story"
)]
async fn story(
    options: &Options,
    dir: &Path,
    tell: Tell,
    given: Vec<given::GivenDisk>,
    restore_to: Option<RestoreTo>,
    began: Instant,
    outcome: &mut Outcome,
    processes: &mut Option<Processes>,
    slot: &mut Option<Stage>,
) -> Result<(), Failure> {
    let setting = async {
        let plans = setup::plan(dir, given, options.disks_per_vm.into(), tell).await?;
        if let Some(to) = &restore_to {
            steps::check_target(to, plans.iter().flat_map(setup::Plan::disk_names))?;
        }
        let stage = setup::raise(dir, options.seed, options.keep, tell, plans, processes).await?;
        let stage = slot.insert(stage);
        let status = setup::settle(stage).await?;
        tell.note(format!(
            "coordinator {} leads; {} storage nodes, {} hosts and {} VMs are in sight",
            status.leader_id,
            status.storage.len(),
            status.hosts_up,
            status.vms
        ));
        Ok::<_, Failure>(stage)
    };
    let set = Box::pin(setting).await;
    let set = note(outcome, "setup", began, set.map(|stage| (stage, Figures::new())))?;
    let stage = set;
    let mut fatal = stage.processes.fatal();
    for step in STORY {
        tell.step(step.title);
        let began = Instant::now();
        let result = tokio::select! {
            result = (step.run)(stage) => result,
            dead = gone(&mut fatal) => Err(dead),
        };
        note(outcome, step.name, began, result.map(|figures| ((), figures)))?;
    }
    if let Some(to) = &restore_to {
        tell.step("Every VM's first and last recovery point is written as VHDX");
        let began = Instant::now();
        let result = Box::pin(steps::restore_to(stage, to)).await;
        note(outcome, "restore-to", began, result.map(|figures| ((), figures)))?;
    }
    outcome.vms = outcome::vm_rows(stage).await?;
    outcome.storage = outcome::storage_rows(&stage.operator).await?;
    outcome.processes = stage.processes.all();
    Ok(())
}

/// Writes a step down, whichever way it went.
fn note<T>(
    outcome: &mut Outcome,
    name: &'static str,
    began: Instant,
    result: Result<(T, Figures), Failure>,
) -> Result<T, Failure> {
    let seconds = began.elapsed().as_secs_f64();
    let (value, result) = match result {
        Ok((value, figures)) => (Ok(value), Ok(figures)),
        Err(failure) => {
            let text = failure.to_string();
            (Err(failure.during(format!("step {name} failed"))), Err(text))
        }
    };
    outcome.steps.push(StepResult { name, seconds, result });
    value
}

/// Resolves when a process cannot be kept alive.
async fn gone(fatal: &mut tokio::sync::watch::Receiver<Option<String>>) -> Failure {
    match fatal.wait_for(Option::is_some).await {
        Ok(text) => Failure::new(text.clone().unwrap_or_default()),
        // Nobody is left who could say so: the story ends by itself.
        Err(_) => std::future::pending().await,
    }
}

fn how_to_talk(stage: &Stage, dir: &Path, tell: Tell) -> Result<(), Failure> {
    let all = stage.processes.all();
    let pids: Vec<_> = all.iter().filter_map(|(_, f)| f.pid).map(|p| p.to_string()).collect();
    let env = dir.join("env");
    let exports = format!(
        "export OUTRIDER_COORDINATORS={}\nexport OUTRIDER_IDENTITY='{}'\n",
        stage.configs.coordinators.join(","),
        stage.configs.operator.display()
    );
    std::fs::write(&env, exports)?;
    std::fs::write(dir.join("processes.json"), json!(all_json(&all)).to_string())?;
    tell.say(format!("\nEverything is left running in {}. Talk to it:", dir.display()));
    tell.say(format!("  . {}", env.display()));
    tell.say("  outrider status\n  outrider vm list\n  outrider point list\n  outrider backup run --group everything --wait");
    for (name, address) in &stage.configs.watch {
        tell.say(format!("  curl http://{address}/metrics    # {name}"));
    }
    tell.say(format!("  the lab listens on {}", stage.configs.lab_address));
    tell.say(format!(
        "Stop it and remove it:\n  kill {} && rm -r {}",
        pids.join(" "),
        dir.display()
    ));
    Ok(())
}

fn all_json(all: &[(String, processes::Facts)]) -> serde_json::Value {
    all.iter().map(|(name, f)| json!({ "name": name, "pid": f.pid, "ready": f.ready })).collect()
}
