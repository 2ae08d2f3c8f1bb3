//! `outrider node install` and its counterparts: an agent becomes a service of its machine, and leaves it again.
//!
//! | file | idea |
//! | --- | --- |
//! | `places` | where everything lies |
//! | `plan` | what installing does, as data |
//! | `config_file` | the configuration that it writes, once |
//! | `machine` | the operating system as a trait; files |
//! | `systemd`, `scm` | Linux and Windows |
//! | `upgrade` | never in the middle of a job (O9) |
//! | `leave` | nothing of ours stays at the hypervisor (O9) |
//!
//! Installing again is the upgrade: the identity and the configuration stay, the program is replaced.

mod config_file;
mod leave;
pub(crate) mod machine;
mod places;
mod plan;
#[cfg(windows)]
pub(crate) mod scm;
#[cfg(unix)]
mod systemd;
mod upgrade;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use outrider_node::status::Status;
use outrider_process::identity::{Identity, IdentityError, Role};
use serde_json::{Value, json};

use crate::cli::Done;
use crate::fabric::join::{enrol, host_name, read_token};
use crate::output;
use crate::report::Failure;

use machine::{Applied, Machine, Service};
use plan::{Step, Wanted};

/// How long the service may take to start or stop.
const SERVICE: Duration = Duration::from_secs(120);
/// Between two looks at a service: systems do not announce its states to everybody.
const LOOK: Duration = Duration::from_millis(200);

/// What `node install` was asked for.
#[derive(Debug)]
pub(crate) struct Install {
    pub(crate) join: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) realm: Option<String>,
    pub(crate) hypervisor: Option<String>,
    pub(crate) metrics: Option<SocketAddr>,
    pub(crate) settings: Option<PathBuf>,
    pub(crate) root: Option<PathBuf>,
    pub(crate) wait: Duration,
    pub(crate) connect: Duration,
    pub(crate) quiet: bool,
    pub(crate) dry_run: bool,
}

/// This machine.
pub(crate) fn machine(root: Option<PathBuf>) -> Result<Box<dyn Machine>, Failure> {
    #[cfg(unix)]
    return Ok(Box::new(systemd::Linux::new(root)));
    #[cfg(windows)]
    return match root {
        Some(_) => Err(Failure::usage("--root is for images of Linux machines")),
        None => Ok(Box::new(scm::Windows::new()?)),
    };
}

/// Installs, or brings an installation up to date.
pub(crate) async fn install(options: Install, json: bool) -> Done {
    let machine = machine(options.root.clone())?;
    let places = machine.places().clone();
    let say = |text: &str| {
        if !options.quiet {
            eprintln!("{text}");
        }
    };
    if options.dry_run {
        return dry_run(&*machine, &options, json);
    }
    machine.check_rights()?;
    let program = std::env::current_exe()
        .map_err(|e| Failure::from(e).during("the place of this program cannot be told"))?;
    let before = machine.service()?;
    let newer = machine::differs(&program, &places.program)?;
    if newer && matches!(before, Service::Running | Service::Changing) {
        upgrade::wait_for_jobs(&places.status, options.wait, say).await?;
        stop_service(&*machine).await?;
        say("the old agent has stopped");
    }
    let mut changed = Vec::new();
    for step in plan::folders(&places) {
        note(&mut changed, &step, machine.apply(&step)?);
    }
    let (identity, coordinators) = identity(&options, &places.identity).await?;
    let peer = identity.peer().clone();
    let own = &options.settings;
    let more = match own {
        Some(path) => std::fs::read_to_string(path)
            .map_err(|e| Failure::from(e).during(format!("cannot read {}", path.display())))?,
        None => String::new(),
    };
    let realm = options.realm.clone().or_else(|| machine.cluster());
    let config = config_file::text(
        &machine.places_inside(),
        &config_file::Host {
            name: &peer.name,
            fabric: &peer.fabric,
            realm: realm.as_deref().unwrap_or(&peer.name),
            coordinators: &coordinators,
            hypervisor: options.hypervisor.as_deref().unwrap_or(machine.hypervisor()),
            metrics: options.metrics,
            more: &more,
        },
    );
    // A configuration that cannot be read must not be found by a service that then fails for ever.
    outrider_process::config::parse::<outrider_node::Config>(&places.config, &config, |_| None)?;
    let wanted =
        Wanted { program, config, metrics: options.metrics, windows: machine.is_windows() };
    for step in plan::steps(&places, &wanted) {
        note(&mut changed, &step, machine.apply(&step)?);
    }
    let started = machine.service()?;
    if started != Service::Running {
        machine.start()?;
    }
    let status = match started {
        Service::Unknown => None,
        _ => Some(connected(&*machine, &places.status, options.connect).await?),
    };
    if json {
        output::json(&json!({
            "ok": true, "name": peer.name, "fabric": peer.fabric, "changed": changed,
            "connected": status.is_some(), "config": places.config, "identity_dir": places.identity,
            "not_after_unix": identity.not_after_unix(),
        }));
    } else {
        for line in &changed {
            say(line);
        }
        match status {
            Some(_) => say(&format!("{peer} is installed, runs, and is connected")),
            None => say(&format!("{peer} is installed; its service starts with the machine")),
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn note(changed: &mut Vec<String>, step: &Step, applied: Applied) {
    if applied == Applied::Changed {
        changed.push(step.describe());
    }
}

/// The identity that is there, or one by the token. With the addresses of the coordinators.
async fn identity(options: &Install, dir: &Path) -> Result<(Identity, Vec<String>), Failure> {
    let loaded = Identity::load(dir);
    match (&options.join, loaded) {
        (_, Ok(identity)) if identity.peer().role == Role::Node => {
            let token = options.join.as_deref().and_then(|t| read_token(t).ok());
            let coordinators = token.map(|t| t.coordinators).unwrap_or_default();
            Ok((identity, coordinators))
        }
        (Some(text), loaded) => {
            let token = read_token(text)?;
            if token.role != Role::Node {
                return Err(Failure::refused(format!(
                    "this token makes a {} of a machine, not a host",
                    token.role
                ))
                .hint("Make one with `outrider fabric token create --role node`."));
            }
            // A machine keeps the name that it had, also when its certificate has ended.
            let old = match loaded {
                Err(IdentityError::Expired { peer, .. }) => Some(peer.name),
                _ => None,
            };
            let name = match options.name.clone().or_else(|| token.name.clone()).or(old) {
                Some(name) => name,
                None => host_name()?,
            };
            let joined = enrol(&token, &name, dir, Duration::from_secs(60)).await?;
            Ok((joined.identity, joined.coordinators))
        }
        (None, Ok(identity)) => Err(Failure::refused(format!(
            "{} holds the identity of {}, which is no host",
            dir.display(),
            identity.peer()
        ))),
        (None, Err(error)) => Err(Failure::from(error)
            .during("this machine has no identity yet")
            .hint("Give it a token with --join; `outrider fabric token create --role node` makes one.")),
    }
}

fn dry_run(machine: &dyn Machine, options: &Install, json: bool) -> Done {
    let places = machine.places();
    let wanted = Wanted {
        program: std::env::current_exe().unwrap_or_default(),
        config: String::new(),
        metrics: options.metrics,
        windows: machine.is_windows(),
    };
    let steps: Vec<String> = plan::folders(places)
        .iter()
        .chain(&plan::steps(places, &wanted))
        .map(Step::describe)
        .collect();
    if json {
        output::json(
            &json!({ "ok": true, "steps": steps, "service": machine.service()?.as_str() }),
        );
    } else {
        for step in steps {
            println!("{step}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Waits until the agent says that the coordinators welcomed it.
async fn connected(
    machine: &dyn Machine,
    file: &Path,
    patience: Duration,
) -> Result<Status, Failure> {
    let until = tokio::time::Instant::now() + patience;
    loop {
        let status = Status::read(file).filter(|s| !s.ended);
        if let Some(status) = status.clone().filter(|s| s.connected) {
            return Ok(status);
        }
        if tokio::time::Instant::now() >= until {
            let service = machine.service()?.as_str();
            let why = match status {
                Some(status) => status.reason,
                None => format!("the service is {service} and has not said anything"),
            };
            return Err(Failure::unfinished(format!(
                "installed, but not connected to the coordinators after {}",
                humantime::format_duration(patience)
            ))
            .because(why)
            .hint("`outrider node status` tells how it goes on; the service keeps trying."));
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn stop_service(machine: &dyn Machine) -> Result<(), Failure> {
    machine.stop()?;
    settle(machine, "stop", |s| matches!(s, Service::Stopped | Service::Absent | Service::Unknown))
        .await
}

async fn settle(
    machine: &dyn Machine,
    what: &str,
    there: impl Fn(Service) -> bool,
) -> Result<(), Failure> {
    let until = tokio::time::Instant::now() + SERVICE;
    loop {
        let now = machine.service()?;
        if there(now) {
            return Ok(());
        }
        if tokio::time::Instant::now() >= until {
            return Err(Failure::new(format!(
                "the service did not {what}: it is {}",
                now.as_str()
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// What `node uninstall` was asked for.
#[derive(Debug)]
pub(crate) struct Uninstall {
    pub(crate) keep_identity: bool,
    /// What is ours at the hypervisor goes, too, and the fabric forgets the host.
    pub(crate) clean: bool,
    /// Also when that cannot be had.
    pub(crate) force: bool,
    pub(crate) root: Option<PathBuf>,
    pub(crate) wait: Duration,
    pub(crate) quiet: bool,
}

/// Removes everything that installing made.
pub(crate) async fn uninstall(options: Uninstall, json: bool) -> Done {
    let machine = machine(options.root.clone())?;
    let places = machine.places().clone();
    let say = |text: &str| {
        if !options.quiet {
            eprintln!("{text}");
        }
    };
    machine.check_rights()?;
    let mut left = Vec::new();
    let mut farewell = None;
    if options.clean {
        if machine.service()? == Service::Stopped && !options.force {
            return Err(Failure::refused("the agent does not run, and only it can clean up here")
                .hint("Start it with `outrider node start`, or remove it without cleaning by --force."));
        }
        match leave::clean(&places, options.wait, say).await {
            Ok(leaving) => farewell = Some(leaving),
            Err(failure) if options.force => say(&format!("not cleaned: {failure}")),
            Err(failure) => return Err(failure),
        }
    }
    if matches!(machine.service()?, Service::Running | Service::Changing) {
        upgrade::wait_for_jobs(&places.status, options.wait, say).await?;
        stop_service(&*machine).await?;
    }
    let voided = farewell.as_ref().map_or(0, |leaving| leaving.voided);
    match &farewell {
        Some(leaving) => leaving.forget().await?,
        None if options.clean => left = leave::left_behind(&places.config).await,
        None => {}
    }
    let mut removed = Vec::new();
    let wanted = Wanted {
        program: PathBuf::new(),
        config: String::new(),
        // So that a rule of an earlier installation goes, too.
        metrics: Some(SocketAddr::from(([0, 0, 0, 0], 1))),
        windows: machine.is_windows(),
    };
    for step in plan::steps(&places, &wanted).iter().rev() {
        if options.keep_identity && matches!(step, Step::Config { .. }) {
            continue;
        }
        note(&mut removed, step, machine.undo(step)?);
    }
    let kept = |path: &Path| options.keep_identity && path == places.identity;
    for folder in [&places.identity, &places.scratch] {
        if !kept(folder) && machine::remove_folder(folder)? == Applied::Changed {
            removed.push(format!("folder {}", folder.display()));
        }
    }
    if options.keep_identity {
        machine::remove_file(&places.status)?;
        if let Some(log) = &places.log {
            machine::remove_file(log)?;
        }
    } else if machine::remove_folder(&places.state)? == Applied::Changed {
        removed.push(format!("folder {}", places.state.display()));
    }
    for folder in [&places.config_dir, &places.program_dir] {
        if machine::remove_if_empty(folder) == Applied::Changed {
            removed.push(format!("folder {}", folder.display()));
        }
    }
    if json {
        output::json(&json!({
            "ok": true, "removed": removed, "clean": farewell.is_some(), "left": left,
            "vms_without_base": voided,
        }));
        return Ok(ExitCode::SUCCESS);
    }
    for line in &left {
        say(&format!("left behind: {line}"));
    }
    if voided > 0 {
        say(&format!("the next backup of {voided} VM(s) that run here reads everything"));
    }
    if removed.is_empty() {
        say("nothing of an agent is installed here");
    }
    for line in &removed {
        say(&format!("removed: {line}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Starts or stops the service, and waits until it has.
pub(crate) async fn steer(start: bool, json: bool) -> Done {
    let machine = machine(None)?;
    if machine.service()? == Service::Absent {
        return Err(not_installed());
    }
    machine.check_rights()?;
    if start {
        if machine.service()? != Service::Running {
            machine.start()?;
        }
        settle(&*machine, "start", |s| s == Service::Running).await?;
    } else {
        stop_service(&*machine).await?;
    }
    if json {
        output::json(&json!({ "ok": true, "service": machine.service()?.as_str() }));
    }
    Ok(ExitCode::SUCCESS)
}

fn not_installed() -> Failure {
    Failure::refused("no agent is installed on this machine")
        .hint("Install it with `outrider node install --join TOKEN`.")
}

/// How the agent of this machine is. Fails when it is not connected, so that scripts can wait for it.
pub(crate) fn status(root: Option<PathBuf>, json: bool) -> Done {
    let machine = machine(root)?;
    let places = machine.places();
    let service = machine.service()?;
    if service == Service::Absent {
        return Err(not_installed());
    }
    let said = Status::read(&places.status);
    let alive = service != Service::Stopped && said.as_ref().is_some_and(|s| !s.ended);
    let connected = alive && said.as_ref().is_some_and(|s| s.connected);
    let identity = Identity::load(&places.identity);
    let ends = identity.as_ref().map(Identity::not_after_unix).ok();
    if json {
        let said = said.as_ref().map(
            |s| json!({ "version": s.version, "jobs": s.jobs, "reason": s.reason, "pid": s.pid }),
        );
        output::json(&json!({
            "ok": connected, "service": service.as_str(), "connected": connected,
            "agent": said.unwrap_or(Value::Null), "config": places.config,
            "certificate_ends_unix": ends,
        }));
    } else {
        println!("service      {}", service.as_str());
        match (&said, alive) {
            (Some(s), true) if s.connected => println!("coordinator  connected"),
            (Some(s), true) => println!("coordinator  not connected: {}", s.reason),
            _ => println!("coordinator  not connected: the agent does not run"),
        }
        if let Some(s) = said.as_ref().filter(|_| alive) {
            println!("jobs         {}", s.jobs);
            println!("release      {}", s.version);
        }
        match (&identity, ends) {
            (Ok(identity), Some(ends)) => {
                let ends = u64::try_from(ends).unwrap_or(0) * 1000;
                println!("identity     {}, until {}", identity.peer(), output::time(ends));
            }
            (Err(error), _) => println!("identity     {error}"),
            (Ok(_), None) => {}
        }
        println!("config       {}", places.config.display());
    }
    Ok(if connected { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
