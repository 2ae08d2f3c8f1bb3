//! Linux: a systemd unit.

use std::path::{Path, PathBuf};

use super::machine::{self, Applied, Machine, Service};
use super::places::Places;
use super::plan::Step;
use crate::report::Failure;

/// The unit's name.
const UNIT: &str = "outrider-node.service";

/// This machine, or an image of one below another root folder (then the service is enabled, not started).
pub(crate) struct Linux {
    places: Places,
    root: PathBuf,
}

impl Linux {
    pub(crate) fn new(root: Option<PathBuf>) -> Self {
        let root = root.unwrap_or_else(|| PathBuf::from("/"));
        Self { places: Places::linux(&root), root }
    }

    fn is_live(&self) -> bool {
        self.root == Path::new("/")
    }

    fn unit_file(&self) -> PathBuf {
        self.root.join("etc/systemd/system").join(UNIT)
    }

    /// What `systemctl enable` does; done by hand below another root.
    fn link(&self) -> PathBuf {
        self.root.join("etc/systemd/system/multi-user.target.wants").join(UNIT)
    }

    fn systemctl(&self, args: &[&str]) -> Result<String, Failure> {
        machine::run("systemctl", args)
    }
}

/// The unit. It may read every disk and write what a restore asks for, and nothing of the system itself.
pub(crate) fn unit(program: &Path, config: &Path) -> String {
    let quote = |path: &Path| {
        let text = path.display().to_string().replace('\\', "\\\\").replace('"', "\\\"");
        // Specifiers and variables.
        format!("\"{}\"", text.replace('%', "%%").replace('$', "$$"))
    };
    format!(
        "# Written by `outrider node install`.\n\
         [Unit]\n\
         Description=Outrider node agent\n\
         Wants=network-online.target\n\
         After=network-online.target\n\
         StartLimitIntervalSec=0\n\
         \n\
         [Service]\n\
         Type=exec\n\
         ExecStart={program} node --config {config}\n\
         Restart=on-failure\n\
         RestartSec=10\n\
         # Jobs close their files and say so; another host goes on with them.\n\
         TimeoutStopSec=60\n\
         # VMs that a restore has started are no part of it, also where they are in its control group.\n\
         KillMode=process\n\
         UMask=0077\n\
         LimitNOFILE=65536\n\
         OOMScoreAdjust=200\n\
         NoNewPrivileges=yes\n\
         ProtectSystem=full\n\
         ProtectKernelTunables=yes\n\
         ProtectKernelModules=yes\n\
         ProtectKernelLogs=yes\n\
         ProtectControlGroups=yes\n\
         ProtectClock=yes\n\
         ProtectHostname=yes\n\
         RestrictSUIDSGID=yes\n\
         RestrictRealtime=yes\n\
         RestrictNamespaces=yes\n\
         RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK\n\
         LockPersonality=yes\n\
         MemoryDenyWriteExecute=yes\n\
         SystemCallArchitectures=native\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target\n",
        program = quote(program),
        config = quote(config),
    )
}

impl Machine for Linux {
    fn places(&self) -> &Places {
        &self.places
    }

    fn places_inside(&self) -> Places {
        Places::linux(Path::new("/"))
    }

    fn check_rights(&self) -> Result<(), Failure> {
        if !self.is_live() || rustix::process::geteuid().is_root() {
            return Ok(());
        }
        Err(Failure::refused("only root can install or remove a service; nothing was changed")
            .hint("Run it again with sudo."))
    }

    fn hypervisor(&self) -> &'static str {
        "qemu"
    }

    fn cluster(&self) -> Option<String> {
        None
    }

    fn is_windows(&self) -> bool {
        false
    }

    fn service(&self) -> Result<Service, Failure> {
        if !self.unit_file().exists() {
            return Ok(Service::Absent);
        }
        if !self.is_live() {
            return Ok(Service::Unknown);
        }
        // A stopped service makes it fail, with the word on standard output.
        let output = std::process::Command::new("systemctl")
            .args(["is-active", UNIT])
            .output()
            .map_err(|e| Failure::from(e).during("cannot run systemctl"))?;
        Ok(match String::from_utf8_lossy(&output.stdout).trim() {
            "active" => Service::Running,
            "activating" | "deactivating" | "reloading" => Service::Changing,
            _ => Service::Stopped,
        })
    }

    fn start(&self) -> Result<(), Failure> {
        if self.is_live() { self.systemctl(&["start", UNIT]).map(drop) } else { Ok(()) }
    }

    fn stop(&self) -> Result<(), Failure> {
        if self.is_live() { self.systemctl(&["stop", UNIT]).map(drop) } else { Ok(()) }
    }

    fn apply(&self, step: &Step) -> Result<Applied, Failure> {
        use std::os::unix::fs::PermissionsExt;
        match step {
            Step::Folder { path, private } => {
                let applied = machine::folder(path)?;
                if *private {
                    let only_us = std::fs::Permissions::from_mode(0o700);
                    // Other roles' files may lie beside the configuration; theirs are closed by themselves.
                    if *path != self.places.config_dir {
                        std::fs::set_permissions(path, only_us)?;
                    }
                }
                Ok(applied)
            }
            Step::Program { from, to } => {
                let applied = machine::program(from, to)?;
                std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o755))?;
                Ok(applied)
            }
            Step::Config { path, content } => machine::config(path, content),
            Step::Service { .. } => {
                let inside = self.places_inside();
                let text = unit(&inside.program, &inside.config);
                let file = self.unit_file();
                let same = std::fs::read_to_string(&file).is_ok_and(|found| found == text);
                if !same {
                    machine::folder(file.parent().unwrap_or(Path::new("/")))?;
                    outrider_process::fs::write_atomic(&file, text.as_bytes())?;
                }
                if self.is_live() {
                    self.systemctl(&["daemon-reload"])?;
                    self.systemctl(&["enable", "--quiet", UNIT])?;
                } else if !self.link().is_symlink() {
                    machine::folder(self.link().parent().unwrap_or(Path::new("/")))?;
                    std::os::unix::fs::symlink(
                        Path::new("/etc/systemd/system").join(UNIT),
                        self.link(),
                    )?;
                }
                Ok(if same { Applied::Unchanged } else { Applied::Changed })
            }
            Step::EventSource | Step::Firewall { .. } => Ok(Applied::Unchanged),
        }
    }

    fn undo(&self, step: &Step) -> Result<Applied, Failure> {
        match step {
            Step::Service { .. } => {
                if self.unit_file().exists() && self.is_live() {
                    self.systemctl(&["disable", "--quiet", UNIT])?;
                }
                machine::remove_file(&self.link())?;
                let removed = machine::remove_file(&self.unit_file())?;
                if removed == Applied::Changed && self.is_live() {
                    self.systemctl(&["daemon-reload"])?;
                }
                Ok(removed)
            }
            Step::Config { path, .. } => machine::remove_file(path),
            Step::Program { to, .. } => self.remove_program(to),
            Step::Folder { path, .. } => Ok(machine::remove_if_empty(path)),
            Step::EventSource | Step::Firewall { .. } => Ok(Applied::Unchanged),
        }
    }

    fn remove_program(&self, path: &Path) -> Result<Applied, Failure> {
        machine::remove_file(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_ends_the_agent_ends_no_vm() {
        let text = unit(Path::new("/a"), Path::new("/b"));
        let kill: Vec<&str> = text.lines().filter(|line| line.starts_with("KillMode")).collect();
        assert_eq!(kill, ["KillMode=process"]);
    }

    #[test]
    fn systemd_understands_the_unit() {
        let dir = tempfile::tempdir().expect("a folder");
        let program = dir.path().join("with space").join("outrider");
        std::fs::create_dir_all(program.parent().expect("a parent")).expect("made");
        std::fs::copy("/bin/true", &program).expect("a program");
        let file = dir.path().join(UNIT);
        std::fs::write(&file, unit(&program, &dir.path().join("node.toml"))).expect("written");
        let verified =
            std::process::Command::new("systemd-analyze").arg("verify").arg(&file).output();
        let Ok(output) = verified else {
            assert!(std::env::var_os("OUTRIDER_CI").is_none(), "systemd-analyze is missing");
            eprintln!("SKIPPED: no systemd-analyze here");
            return;
        };
        let said = String::from_utf8_lossy(&output.stderr);
        // Units of this machine that are broken are not our concern.
        let ours: Vec<&str> = said.lines().filter(|line| line.contains("outrider")).collect();
        assert!(ours.is_empty(), "{ours:?}");
    }
}
