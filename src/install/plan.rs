//! What installing does, as data: a list of steps, each of which can be done again and undone.

use std::net::SocketAddr;
use std::path::PathBuf;

use super::places::Places;

/// One change of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// A folder that only the system and its administrators may look into, or one for all.
    Folder { path: PathBuf, private: bool },
    /// A copy of the program.
    Program { from: PathBuf, to: PathBuf },
    /// The configuration; one that is there already stays.
    Config { path: PathBuf, content: String },
    /// Where Windows' event log finds the texts of our events.
    EventSource,
    /// A port that the firewall lets in.
    Firewall { port: u16, program: PathBuf },
    /// The service, started with the machine and started again when it fails.
    Service { program: PathBuf, config: PathBuf },
}

impl Step {
    /// For people, and for `--dry-run`.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Folder { path, private: true } => {
                format!("folder {}, for the system and administrators only", path.display())
            }
            Self::Folder { path, private: false } => format!("folder {}", path.display()),
            Self::Program { from, to } => {
                format!("program {} (from {})", to.display(), from.display())
            }
            Self::Config { path, .. } => format!("configuration {}", path.display()),
            Self::EventSource => "event log source Outrider".to_owned(),
            Self::Firewall { port, .. } => format!("firewall rule for TCP port {port}"),
            Self::Service { program, config } => {
                format!("service: {} node --config {}", program.display(), config.display())
            }
        }
    }
}

/// What is to be installed.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// The program that is running now.
    pub(crate) program: PathBuf,
    /// Text of the configuration.
    pub(crate) config: String,
    /// Where metrics are served; others than this machine need a way through the firewall.
    pub(crate) metrics: Option<SocketAddr>,
    /// Whether this is Windows.
    pub(crate) windows: bool,
}

/// Folders come first: they must be closed to others before anything secret is put into them.
pub(crate) fn folders(places: &Places) -> Vec<Step> {
    let private = |path: &PathBuf| Step::Folder { path: path.clone(), private: true };
    vec![
        Step::Folder { path: places.program_dir.clone(), private: false },
        private(&places.config_dir),
        private(&places.state),
        private(&places.identity),
        private(&places.scratch),
    ]
}

/// The rest, once this machine has an identity.
pub(crate) fn steps(places: &Places, wanted: &Wanted) -> Vec<Step> {
    let mut steps = vec![
        Step::Program { from: wanted.program.clone(), to: places.program.clone() },
        Step::Config { path: places.config.clone(), content: wanted.config.clone() },
    ];
    if wanted.windows {
        steps.push(Step::EventSource);
        let reachable = wanted.metrics.filter(|at| !at.ip().is_loopback() && at.port() != 0);
        if let Some(at) = reachable {
            steps.push(Step::Firewall { port: at.port(), program: places.program.clone() });
        }
    }
    steps.push(Step::Service { program: places.program.clone(), config: places.config.clone() });
    steps
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn wanted(metrics: Option<&str>, windows: bool) -> Wanted {
        Wanted {
            program: "/tmp/outrider".into(),
            config: String::new(),
            metrics: metrics.map(|m| m.parse().expect("an address")),
            windows,
        }
    }

    #[test]
    fn nothing_secret_is_written_before_its_folder_is_closed() {
        let places = Places::windows(Path::new("P"), Path::new("D"));
        let folders = folders(&places);
        for path in [&places.identity, &places.state, &places.scratch] {
            let private = Step::Folder { path: path.clone(), private: true };
            assert!(folders.contains(&private), "{}", path.display());
        }
        // From the outside in: a folder inherits what the one above allows.
        for pair in folders.windows(2) {
            if let [Step::Folder { path: a, .. }, Step::Folder { path: b, .. }] = pair {
                assert!(!a.starts_with(b), "{} comes after {}", a.display(), b.display());
            }
        }
    }

    #[test]
    fn the_firewall_is_opened_only_for_what_others_can_reach() {
        let places = Places::windows(Path::new("P"), Path::new("D"));
        let opens = |metrics| {
            let steps = steps(&places, &wanted(metrics, true));
            steps.iter().any(|s| matches!(s, Step::Firewall { .. }))
        };
        assert!(!opens(None));
        assert!(!opens(Some("127.0.0.1:9803")));
        assert!(!opens(Some("[::1]:9803")));
        assert!(opens(Some("0.0.0.0:9803")));
    }

    #[test]
    fn the_service_comes_last_and_only_windows_has_an_event_source() {
        for windows in [true, false] {
            let places = Places::linux(Path::new("/"));
            let steps = steps(&places, &wanted(None, windows));
            assert!(matches!(steps.last(), Some(Step::Service { .. })));
            assert_eq!(steps.contains(&Step::EventSource), windows);
        }
    }
}
