//! Commands around a job (C5): programs that the host's owner permits, by names that policies refer to (decision 0032).
//!
//! A policy comes from the coordinators; what runs comes from this host's own configuration alone. No shell, no arguments from
//! elsewhere: what is known of the job stands in the environment.

#[cfg(windows)]
mod job_object;

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use futures::FutureExt;
use futures::future::FusedFuture;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{Child, Command};

/// What is kept of a command's output: its end, where the reason of a failure stands.
const KEPT: usize = 8 << 10;
/// How long the output of a command that has ended is waited for: something that it started may still hold it.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How much later than we the system's own `timeout` ends a command: it is for the case that we are no more.
#[cfg(unix)]
const WATCHED: Duration = Duration::from_secs(5);

/// `[commands.NAME]`: a program that policies may name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Permitted {
    /// Absolute path.
    pub program: PathBuf,
    /// Its arguments, as they are.
    #[serde(default)]
    pub arguments: Vec<String>,
    /// It is killed after this, with all that it started.
    #[serde(default = "five_minutes", with = "humantime_serde")]
    pub timeout: Duration,
}

fn five_minutes() -> Duration {
    Duration::from_secs(300)
}

/// The commands that the host's owner permits, by name.
pub type Table = BTreeMap<String, Permitted>;

/// What is wrong with a table, in a sentence.
#[must_use]
pub fn wrong(table: &Table) -> Option<(String, String)> {
    table.iter().find_map(|(name, command)| {
        let reason = if !command.program.is_absolute() {
            "expected an absolute path: nothing is looked for in a search path"
        } else if command.timeout.is_zero() {
            "expected a timeout of more than 0s"
        } else {
            return None;
        };
        Some((format!("[commands.{name}]"), reason.to_owned()))
    })
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code was 0.
    pub good: bool,
    /// "ok", or what went wrong.
    pub how: String,
    /// The end of what it printed, standard output and standard error together.
    pub output: String,
    /// How long it took.
    pub took: Duration,
}

/// Runs a command to its end, or until its time is over. Dropping the future kills it, too.
pub async fn run(command: &Permitted, environment: &[(&'static str, String)]) -> Ended {
    let started = tokio::time::Instant::now();
    let ended = |good: bool, how: String, output: String| Ended {
        good,
        how,
        output,
        took: started.elapsed(),
    };
    let mut tree = match spawn(command, environment) {
        Ok(tree) => tree,
        Err(e) => {
            return ended(
                false,
                format!("{} did not start: {e}", shown(&command.program)),
                String::new(),
            );
        }
    };
    let (mut out, mut err) = (Tail::default(), Tail::default());
    let (stdout, stderr) = (tree.child.stdout.take(), tree.child.stderr.take());
    let mut reading = Box::pin(
        async {
            tokio::join!(out.read(stdout), err.read(stderr));
        }
        .fuse(),
    );
    let waited = {
        let mut waiting = std::pin::pin!(tokio::time::timeout(command.timeout, tree.child.wait()));
        loop {
            tokio::select! {
                waited = &mut waiting => break waited,
                // It may close its output and go on.
                () = &mut reading, if !reading.is_terminated() => {}
            }
        }
    };
    let (good, how) = match waited {
        Err(_) => {
            tree.kill().await;
            let limit = humantime_of(command.timeout);
            (false, format!("it was killed after {limit}, with all that it had started"))
        }
        Ok(Err(e)) => (false, format!("its end cannot be told: {e}")),
        Ok(Ok(status)) => {
            tree.leave();
            match (status.success(), status.code()) {
                (true, _) => (true, "ok".to_owned()),
                // As shells and `timeout` tell of signals.
                (false, Some(code @ 129..=192)) if cfg!(unix) => {
                    (false, format!("it was ended by signal {}", code - 128))
                }
                (false, Some(code)) => (false, format!("it ended with exit code {code}")),
                (false, None) => (false, "it was ended by a signal".to_owned()),
            }
        }
    };
    if !reading.is_terminated() {
        // Whatever it started and left running may hold its output open for ever.
        let _ = tokio::time::timeout(LAST_WORDS, &mut reading).await;
    }
    drop(reading);
    let output = format!("{}\n{}", out.text(), err.text()).trim().to_owned();
    ended(good, how, output)
}

fn spawn(command: &Permitted, environment: &[(&'static str, String)]) -> std::io::Result<Tree> {
    let mut process = limited(command)?;
    process
        .args(&command.arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    // What the agent itself was told by its environment, secrets included, is not theirs.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("OUTRIDER_") {
            process.env_remove(name);
        }
    }
    for (name, value) in environment {
        process.env(name, value.replace('\0', ""));
    }
    #[cfg(unix)]
    {
        process.process_group(0);
        Ok(Tree { child: process.spawn()?, done: false })
    }
    #[cfg(windows)]
    {
        // It does not run before it is in the job: whatever it starts is in it, too.
        process.creation_flags(job_object::SUSPENDED);
        let child = process.spawn()?;
        let job = job_object::JobObject::of(&child)?;
        Ok(Tree { child, job, done: false })
    }
}

/// The program. Nobody ends what an agent that was killed leaves (its unit's KillMode is `process`, for VMs live in it), so
/// another process has an eye on the time, too.
#[cfg(unix)]
fn limited(command: &Permitted) -> std::io::Result<Command> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(&command.program)?.permissions().mode();
    if mode & 0o111 == 0 {
        return Err(std::io::ErrorKind::PermissionDenied.into());
    }
    let timeout = ["/usr/bin/timeout", "/bin/timeout"].map(Path::new);
    let Some(timeout) = timeout.into_iter().find(|program| program.is_file()) else {
        return Ok(Command::new(&command.program));
    };
    let seconds = (command.timeout + WATCHED).as_secs().saturating_add(1);
    let mut process = Command::new(timeout);
    process.args(["-s", "KILL", &seconds.to_string()]).arg(&command.program);
    Ok(process)
}

#[cfg(not(unix))]
fn limited(command: &Permitted) -> std::io::Result<Command> {
    Ok(Command::new(&command.program))
}

fn shown(program: &Path) -> String {
    program.display().to_string()
}

fn humantime_of(time: Duration) -> String {
    format!("{} s", time.as_secs_f64())
}

/// A process and all that it started.
struct Tree {
    child: Child,
    /// Dropping it ends all that is in it.
    #[cfg(windows)]
    job: job_object::JobObject,
    done: bool,
}

impl Tree {
    async fn kill(&mut self) {
        #[cfg(unix)]
        self.kill_group();
        #[cfg(windows)]
        if let Err(e) = self.job.end() {
            tracing::warn!(error = %e, "what a command started may go on");
        }
        // Dead already is what was wanted.
        let _ = self.child.kill().await;
        self.done = true;
    }

    /// It has ended by itself: what it left running may go on.
    fn leave(&mut self) {
        self.done = true;
        #[cfg(windows)]
        if let Err(e) = self.job.release() {
            tracing::warn!(error = %e, "what a command left running ends with it");
        }
    }

    #[cfg(unix)]
    fn kill_group(&self) {
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok());
        if let Some(group) = pid.and_then(rustix::process::Pid::from_raw) {
            // Nobody left in the group is what was wanted.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        #[cfg(unix)]
        if !self.done {
            self.kill_group();
        }
    }
}

/// The end of a stream of output.
#[derive(Default)]
struct Tail {
    kept: VecDeque<u8>,
    cut: bool,
}

impl Tail {
    async fn read(&mut self, from: Option<impl AsyncRead + Unpin>) {
        let Some(mut from) = from else { return };
        let mut buffer = [0; 4096];
        // An output that cannot be read has ended.
        while let Ok(n @ 1..) = from.read(&mut buffer).await {
            self.kept.extend(&buffer[..n]);
            let over = self.kept.len().saturating_sub(KEPT / 2);
            self.cut |= over > 0;
            self.kept.drain(..over);
        }
    }

    fn text(&self) -> String {
        let bytes: Vec<u8> = self.kept.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        if self.cut { format!("...{text}") } else { text.into_owned() }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn shell(script: &str, timeout: Duration) -> Permitted {
        Permitted {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            timeout,
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    /// Waits until the process whose id a script wrote into `file` is dead.
    async fn until_gone(file: &Path) {
        let pid: u32 = std::fs::read_to_string(file).expect("begun").trim().parse().expect("a pid");
        let gone = async {
            // Killed, and reaped by whoever is the parent now; a zombie is dead, too.
            while std::fs::read_to_string(format!("/proc/{pid}/stat"))
                .is_ok_and(|stat| !stat.contains(") Z "))
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(LONG, gone).await.expect("the child is gone");
    }

    #[tokio::test]
    async fn a_command_knows_its_job_and_is_judged_by_its_exit_code() {
        let environment = [("OUTRIDER_VM", "장부 <1>".to_owned())];
        let script = "echo \"vm=$OUTRIDER_VM\"; echo wrong >&2; exit 3";
        let ended = run(&shell(script, LONG), &environment).await;
        assert!(!ended.good && ended.how.contains("exit code 3"), "{ended:?}");
        assert!(
            ended.output.contains("vm=장부 <1>") && ended.output.contains("wrong"),
            "{ended:?}"
        );
        let ended = run(&shell("true", LONG), &[]).await;
        assert_eq!((ended.good, ended.how.as_str(), ended.output.as_str()), (true, "ok", ""));
        let missing = Permitted { program: "/nowhere/at-all".into(), ..shell("", LONG) };
        let ended = run(&missing, &[]).await;
        assert!(!ended.good && ended.how.contains("/nowhere/at-all did not start"), "{ended:?}");
    }

    #[tokio::test]
    async fn one_that_takes_too_long_is_killed_with_all_that_it_started() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("pid");
        // The shell's child would go on for an hour.
        let script = format!("sleep 3600 & echo $! > {}; echo begun; wait", file.display());
        let ended = run(&shell(&script, Duration::from_secs(1)), &[]).await;
        assert!(!ended.good && ended.how.contains("killed after 1 s"), "{ended:?}");
        assert!(ended.output.contains("begun"), "{ended:?}");
        until_gone(&file).await;
    }

    #[tokio::test]
    async fn one_whose_agent_was_killed_ends_with_its_time_limit_all_the_same() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("pid");
        let script = format!("sleep 3600 & echo $! > {}; wait", file.display());
        let command = shell(&script, Duration::from_millis(100));
        // As an agent that dies: nobody waits for it, nobody drops it.
        let mut process = limited(&command).expect("a program");
        let mut child = process
            .args(&command.arguments)
            .process_group(0)
            .stdin(Stdio::null())
            .spawn()
            .expect("started");
        let ended = tokio::time::timeout(LONG, child.wait()).await.expect("in time");
        assert!(!ended.expect("waited for").success());
        until_gone(&file).await;
    }

    #[tokio::test]
    async fn output_is_bounded_and_its_end_is_kept() {
        let script = "i=0; while [ $i -lt 4000 ]; do echo \"line $i\"; i=$((i+1)); done";
        let ended = run(&shell(script, LONG), &[]).await;
        assert!(ended.good && ended.output.len() <= KEPT, "{} bytes", ended.output.len());
        assert!(
            ended.output.starts_with("...") && ended.output.ends_with("line 3999"),
            "{ended:?}"
        );
    }

    #[tokio::test]
    async fn one_that_leaves_something_running_does_not_hold_the_job_up() {
        let started = std::time::Instant::now();
        let ended = run(&shell("sleep 20 & echo left; exit 0", LONG), &[]).await;
        assert!(ended.good && ended.output == "left", "{ended:?}");
        assert!(started.elapsed() < Duration::from_secs(15), "waited for what it left running");
    }

    #[test]
    fn a_table_names_absolute_programs_only() {
        let parse = |text: &str| {
            #[derive(Deserialize)]
            struct File {
                commands: Table,
            }
            let path = Path::new("node.toml");
            outrider_process::config::parse::<File>(path, text, |_| None).map(|f| f.commands)
        };
        let good =
            parse("[commands.flush]\nprogram = \"/opt/flush\"\ntimeout = \"20s\"").expect("read");
        assert_eq!(good["flush"].timeout, Duration::from_secs(20));
        assert_eq!(wrong(&good), None);
        let relative = parse("[commands.flush]\nprogram = \"flush\"").expect("read");
        let (key, reason) = wrong(&relative).expect("wrong");
        assert!(key.contains("flush") && reason.contains("absolute"), "{key} {reason}");
        assert!(
            parse("[commands.flush]\nprogram = \"/f\"\nshell = true").is_err(),
            "an unknown key"
        );
    }
}

/// As Windows programs, under Wine, too. The programs are this very test program, told by its arguments which part to play.
#[cfg(all(test, windows))]
mod windows_tests {
    use std::fs::OpenOptions;
    use std::os::windows::fs::OpenOptionsExt;

    use super::*;

    const HELD: &str = "COMMAND_TEST_FILE";
    const LONG: Duration = Duration::from_secs(60);

    fn part(name: &str, timeout: Duration) -> Permitted {
        let name = format!("commands::windows_tests::{name}");
        let arguments = ["--ignored", "--exact", "--nocapture"].map(str::to_owned);
        Permitted {
            program: std::env::current_exe().expect("this program"),
            arguments: arguments.into_iter().chain([name]).collect(),
            timeout,
        }
    }

    fn start(name: &str) -> std::process::Child {
        let part = part(name, LONG);
        std::process::Command::new(part.program).args(part.arguments).spawn().expect("started")
    }

    /// The grandchild: holds a file that nobody else can open until it ends.
    #[test]
    #[ignore = "a part of other tests"]
    fn leaf() {
        let Some(file) = std::env::var_os(HELD) else { return };
        let stop = Path::new(&file).with_extension("stop");
        let _held = OpenOptions::new().create(true).write(true).share_mode(0).open(file);
        let begun = std::time::Instant::now();
        while !stop.exists() && begun.elapsed() < 3 * LONG {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    #[ignore = "a part of other tests"]
    fn parent_that_waits() {
        println!("begun");
        let _ = start("leaf").wait();
    }

    #[test]
    #[ignore = "a part of other tests"]
    fn parent_that_ends() {
        // Its output is not the parent's, which would be waited for.
        let part = part("leaf", LONG);
        let mut leaf = std::process::Command::new(part.program);
        leaf.args(part.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = leaf.spawn().expect("started");
        let file = std::env::var_os(HELD).expect("told");
        while !is_held(Path::new(&file)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(child);
    }

    fn is_held(file: &Path) -> bool {
        file.exists() && OpenOptions::new().read(true).open(file).is_err()
    }

    async fn until(held: bool, file: &Path) {
        let there = async {
            while is_held(file) != held || held && !file.exists() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let what = if held { "the grandchild runs" } else { "the grandchild has ended" };
        tokio::time::timeout(LONG, there).await.expect(what);
    }

    #[tokio::test]
    async fn one_that_takes_too_long_is_ended_with_all_that_it_started() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("held");
        let environment = [(HELD, file.display().to_string())];
        let command = part("parent_that_waits", Duration::from_secs(15));
        let (ended, ()) = tokio::join!(run(&command, &environment), until(true, &file));
        assert!(!ended.good && ended.how.contains("killed after 15 s"), "{ended:?}");
        assert!(ended.output.contains("begun"), "{ended:?}");
        until(false, &file).await;
    }

    #[tokio::test]
    async fn one_that_nobody_waits_for_any_more_is_ended_with_all_that_it_started() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("held");
        let environment = [(HELD, file.display().to_string())];
        let command = part("parent_that_waits", LONG);
        tokio::select! {
            ended = run(&command, &environment) => panic!("{ended:?}"),
            () = until(true, &file) => {}
        }
        until(false, &file).await;
    }

    #[tokio::test]
    async fn what_a_command_that_ended_left_running_goes_on() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("held");
        let environment = [(HELD, file.display().to_string())];
        let ended = run(&part("parent_that_ends", LONG), &environment).await;
        assert!(ended.good, "{ended:?}");
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(is_held(&file), "what it left running was ended");
        std::fs::write(file.with_extension("stop"), "").expect("written");
        until(false, &file).await;
    }
}
