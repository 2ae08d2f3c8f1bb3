//! Whether a restored VM boots: what is asked, and what was seen. A VM is called booted only for a sign that was seen.

use std::path::PathBuf;
use std::time::Duration;

/// Most lines of a console that are told.
#[cfg(unix)]
pub(super) const CONSOLE_LINES: usize = 12;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootCheck {
    /// How long it may take.
    pub patience: Duration,
    /// Text on a serial console. When given, nothing else counts.
    pub text: Option<String>,
    /// Whether a settled picture counts, too: weak, for a boot loader's menu is one.
    pub screen: bool,
}

/// What says that a VM has booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sign {
    /// The guest agent answered.
    GuestAgent,
    /// The heartbeat integration service is in contact.
    Heartbeat,
    /// This line stands on a serial console.
    Console(String),
    /// The screen shows a picture of this size that does not change any more.
    Screen {
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
    },
}

impl std::fmt::Display for Sign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::GuestAgent => f.write_str("its guest agent answers"),
            Self::Heartbeat => f.write_str("its heartbeat service is in contact"),
            Self::Console(line) => write!(f, "its serial console says {line:?}"),
            Self::Screen { width, height } => write!(
                f,
                "its screen shows a settled picture of {width} x {height}, which a boot loader's menu would, too"
            ),
        }
    }
}

/// What was seen of a VM that was started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Booting {
    /// The sign that it has booted; `None`: it was not seen to.
    pub sign: Option<Sign>,
    /// How long it was watched.
    pub watched: Duration,
    /// It ended or stopped by itself: what is known of that.
    pub ended: Option<String>,
    /// What was looked at in vain, one clause each; what could not be looked at, too.
    pub in_vain: Vec<String>,
    /// The last lines of its console.
    pub console: Vec<String>,
    /// A picture of its screen.
    pub picture: Option<PathBuf>,
}

impl Booting {
    /// One sentence for the report.
    #[must_use]
    pub fn sentence(&self, vm: &str) -> String {
        let seconds = self.watched.as_secs_f64();
        if let Some(sign) = &self.sign {
            return format!("VM {vm:?} has booted: after {seconds:.1} s {sign}");
        }
        let mut out = match &self.ended {
            Some(how) => {
                format!(
                    "VM {vm:?} was restored and started and did not boot: after {seconds:.1} s {how}"
                )
            }
            None => {
                format!(
                    "VM {vm:?} was restored and runs, but was not seen to boot within {seconds:.1} s"
                )
            }
        };
        if !self.in_vain.is_empty() {
            out += &format!("; {}", self.in_vain.join("; "));
        }
        if !self.console.is_empty() {
            out += &format!("; its console ends with: {}", self.console.join(" | "));
        }
        if let Some(picture) = &self.picture {
            out += &format!("; its screen is in {}", picture.display());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sign_makes_it_booted_and_the_sign_is_named() {
        let mut booting = Booting {
            watched: Duration::from_millis(61_500),
            in_vain: vec!["its guest agent did not answer".into()],
            console: vec!["a".into(), "No bootable device.".into()],
            picture: Some("/vms/web.screen.png".into()),
            ..Booting::default()
        };
        let told = booting.sentence("web");
        for part in ["not seen to boot within 61.5 s", "agent", "a | No bootable", "web.screen.png"]
        {
            assert!(told.contains(part), "{told}");
        }
        booting.ended = Some("its QEMU ended".into());
        assert!(booting.sentence("web").contains("did not boot: after 61.5 s its QEMU ended"));
        booting.sign = Some(Sign::Console("web login:".into()));
        let told = booting.sentence("web");
        assert_eq!(
            told,
            "VM \"web\" has booted: after 61.5 s its serial console says \"web login:\""
        );
    }
}
