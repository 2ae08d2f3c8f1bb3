//! Where the things of an installed agent lie.

use std::path::{Path, PathBuf};

/// Paths of an installed agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Places {
    /// Folder of the program; ours alone.
    pub(crate) program_dir: PathBuf,
    /// The program.
    pub(crate) program: PathBuf,
    /// Folder of the configuration; may hold other roles' files.
    pub(crate) config_dir: PathBuf,
    /// The agent's configuration.
    pub(crate) config: PathBuf,
    /// Folder of everything that the agent keeps; ours alone.
    pub(crate) state: PathBuf,
    /// Certificate and keys.
    pub(crate) identity: PathBuf,
    /// Files of restores.
    pub(crate) scratch: PathBuf,
    /// How the agent is.
    pub(crate) status: PathBuf,
    /// The log; none: standard error, which systemd keeps.
    pub(crate) log: Option<PathBuf>,
}

impl Places {
    /// As the file system hierarchy of Linux wants it, below `root`.
    #[cfg_attr(windows, allow(dead_code))]
    pub(crate) fn linux(root: &Path) -> Self {
        let program_dir = root.join("usr/local/lib/outrider-node");
        let config_dir = root.join("etc/outrider");
        let state = root.join("var/lib/outrider-node");
        Self {
            program: program_dir.join("outrider"),
            program_dir,
            config: config_dir.join("node.toml"),
            config_dir,
            identity: state.join("identity"),
            scratch: state.join("scratch"),
            status: state.join("status.json"),
            log: None,
            state,
        }
    }

    /// As Windows wants it: `%ProgramFiles%` and `%ProgramData%`.
    #[cfg_attr(not(windows), allow(dead_code))]
    pub(crate) fn windows(program_files: &Path, program_data: &Path) -> Self {
        let program_dir = program_files.join("Outrider");
        let config_dir = program_data.join("Outrider");
        let state = config_dir.join("Node");
        Self {
            program: program_dir.join("outrider.exe"),
            program_dir,
            config: config_dir.join("node.toml"),
            config_dir,
            identity: state.join("identity"),
            scratch: state.join("scratch"),
            status: state.join("status.json"),
            log: Some(state.join("node.log")),
            state,
        }
    }
}
