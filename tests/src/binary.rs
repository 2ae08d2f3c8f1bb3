//! The program under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The `outrider` binary of this test's own target folder and profile.
///
/// Cargo is asked for it once a test process: it returns at once when nothing changed, and a stale program would prove
/// nothing. `OUTRIDER_BIN` names another program and skips that.
pub fn outrider() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match std::env::var_os("OUTRIDER_BIN") {
        Some(path) => PathBuf::from(path),
        None => build(),
    })
}

/// How a program is started: what runs it, if something has to, and the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program(Vec<PathBuf>);

impl Program {
    /// The program under test, built for this machine.
    #[must_use]
    pub fn native() -> Self {
        Self(vec![outrider().to_owned()])
    }

    /// The agent built for Windows: `OUTRIDER_WINDOWS_EXE`, run by `OUTRIDER_WINDOWS_RUNNER` (.ci/windows sets both).
    #[must_use]
    pub fn windows() -> Option<Self> {
        let exe = PathBuf::from(std::env::var_os("OUTRIDER_WINDOWS_EXE")?);
        let runner = std::env::var_os("OUTRIDER_WINDOWS_RUNNER").map(PathBuf::from);
        Some(Self(runner.into_iter().chain([exe]).collect()))
    }

    /// The same, run by a command line that takes it as its last arguments.
    #[must_use]
    pub fn behind(self, runner: Vec<std::ffi::OsString>) -> Self {
        Self(runner.into_iter().map(PathBuf::from).chain(self.0).collect())
    }

    /// A command that runs it.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.0[0]);
        command.args(&self.0[1..]);
        command
    }
}

fn build() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let profile = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
    let target = profile.parent().expect("target/PROFILE");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    // Cargo itself lets one build at a time into a target folder.
    build.args(["build", "--quiet", "-p", "outrider", "--bin", "outrider", "--target-dir"]);
    build.arg(target).current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    let status = build.status().expect("cargo runs");
    assert!(status.success(), "{build:?} failed");
    profile.join(format!("outrider{}", std::env::consts::EXE_SUFFIX))
}
