//! The line that installs an agent on a machine of its own, as its operator types it.

use std::path::Path;

use crate::fabric::Fabric;

/// The line for one host whose hypervisor is the fabric's simulated cluster.
pub struct InstallLine {
    name: String,
    token: String,
    settings: String,
    quiet: bool,
}

impl InstallLine {
    /// Makes a token and a file of settings.
    ///
    /// # Panics
    /// When the fabric gives no token, or the file cannot be written.
    pub async fn of(fabric: &mut Fabric, name: &str) -> Self {
        let made = fabric.operator.cli(&["fabric", "token", "create", "--role", "node", "--json"]);
        let token = made.json()["join"].as_str().expect("a token").to_owned();
        let settings = fabric.dir().join("settings.toml");
        let lab = fabric.lab_process.ready().await.addresses["lab"];
        std::fs::write(&settings, format!("[lab]\naddress = \"{lab}\"\n")).expect("written");
        let settings = settings.to_str().expect("Unicode").to_owned();
        Self { name: name.to_owned(), token, settings, quiet: false }
    }

    /// Prints nothing but its answer.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// For a machine that sees this one's files under other paths.
    #[must_use]
    pub fn seen_as(mut self, path: impl FnOnce(&Path) -> String) -> Self {
        self.settings = path(Path::new(&self.settings));
        self
    }

    /// What comes after `outrider node`.
    #[must_use]
    pub fn arguments(&self) -> Vec<&str> {
        let mut line = self.again();
        line.extend(["--join", &self.token, "--name", &self.name, "--realm", "cluster"]);
        line.extend(self.quiet.then_some("--quiet"));
        line
    }

    /// On a machine where all is installed already: no token is needed, and no name.
    #[must_use]
    pub fn again(&self) -> Vec<&str> {
        vec!["install", "--hypervisor", "lab", "--settings", &self.settings]
    }
}
