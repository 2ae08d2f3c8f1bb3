//! What this machine has: QEMU, a kernel with its modules, the guest agent. And what to install.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, run};

/// Oldest QEMU that the tests were run with.
const OLDEST: u32 = 7;

/// Everything that real VMs need.
#[derive(Debug, Clone)]
pub struct Installation {
    /// The emulator.
    pub qemu: PathBuf,
    /// Its version, as it says it.
    pub version: String,
    /// The kernel.
    pub kernel: PathBuf,
    /// Its release, e.g. "6.1.0-56-cloud-amd64".
    pub release: String,
    /// `lib/modules/RELEASE` of that kernel.
    pub modules: PathBuf,
    /// The real guest agent, for a guest that can be frozen; without it there is none.
    pub agent: Option<PathBuf>,
}

impl Installation {
    /// Looks for all of it; `kernel` names a kernel file instead of the search.
    ///
    /// # Errors
    /// [`Error::Missing`] with the one thing to install.
    pub fn find(kernel: Option<&Path>) -> Result<Self, Error> {
        // Another one than this machine's, for tests with several versions.
        let named = std::env::var_os("OUTRIDER_QEMU").map(PathBuf::from);
        let qemu = named.or_else(|| program("qemu-system-x86_64")).ok_or_else(|| {
            Error::Missing {
            what: "QEMU".to_owned(),
            remedy:
                "install it, on Debian or Ubuntu with: apt-get install qemu-system-x86 qemu-utils"
                    .to_owned(),
        }
        })?;
        for (tool, package) in [("qemu-img", "qemu-utils"), ("mke2fs", "e2fsprogs")] {
            program(tool).ok_or_else(|| Error::Missing {
                what: tool.to_owned(),
                remedy: format!("install it, on Debian or Ubuntu with: apt-get install {package}"),
            })?;
        }
        let version = run(Command::new(&qemu).arg("--version"))?;
        let version = version.lines().next().unwrap_or_default().to_owned();
        if major(&version).is_none_or(|m| m < OLDEST) {
            return Err(Error::Missing {
                what: format!("a QEMU that is new enough (found: {version})"),
                remedy: format!("version {OLDEST}.2 or newer is needed"),
            });
        }
        let (kernel, release, modules) = match kernel {
            Some(file) => with_modules(file)?,
            None => search()?,
        };
        let agent = tools().map(|t| t.join("guest/usr/sbin/qemu-ga")).filter(|p| p.exists());
        let agent = agent.or_else(|| program("qemu-ga"));
        Ok(Self { qemu, version, kernel, release, modules, agent })
    }
}

fn major(version: &str) -> Option<u32> {
    let number =
        version.split_whitespace().find(|w| w.starts_with(|c: char| c.is_ascii_digit()))?;
    number.split('.').next()?.parse().ok()
}

/// A program in PATH, or where administrators' programs are.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(sbin).map(|d| d.join(name)).find(|p| p.is_file())
}

/// The tool cache that `.ci/tools` fills.
fn tools() -> Option<PathBuf> {
    let named = std::env::var_os("OUTRIDER_TOOLS").map(PathBuf::from);
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache"));
    named.or_else(|| cache.or(home).map(|c| c.join("outrider-tools")))
}

/// `DIR/boot/vmlinuz-RELEASE` has its modules in `DIR/lib/modules/RELEASE`.
fn with_modules(kernel: &Path) -> Result<(PathBuf, String, PathBuf), Error> {
    let missing = |what: String, remedy: &str| Error::Missing { what, remedy: remedy.to_owned() };
    let name = kernel.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let Some(release) = name.strip_prefix("vmlinuz-") else {
        let what = format!("the release in the kernel's file name {}", kernel.display());
        return Err(missing(what, "name a file DIR/boot/vmlinuz-RELEASE"));
    };
    std::fs::File::open(kernel).map_err(Error::file("reading", kernel))?;
    let root = kernel.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let modules = root.join("lib/modules").join(release);
    if !modules.is_dir() {
        let what = format!("the folder {} with the modules of that kernel", modules.display());
        return Err(missing(what, "install or unpack the whole kernel package"));
    }
    Ok((kernel.to_owned(), release.to_owned(), modules))
}

/// The newest kernel of the tool cache, else of this machine, that can be read and has its modules.
fn search() -> Result<(PathBuf, String, PathBuf), Error> {
    let folders = tools().map(|t| t.join("guest/boot")).into_iter().chain(["/boot".into()]);
    let mut reasons = Vec::new();
    for folder in folders {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let mut kernels: Vec<PathBuf> = entries
            .map(|e| e.path())
            .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-")))
            .collect();
        kernels.sort_unstable();
        for kernel in kernels.iter().rev() {
            match with_modules(kernel) {
                Ok(found) => return Ok(found),
                Err(reason) => reasons.push(reason.to_string()),
            }
        }
    }
    let why = reasons.first().map(|r| format!(" ({r})")).unwrap_or_default();
    Err(Error::Missing {
        what: format!("a Linux kernel for the guests that can be read{why}"),
        remedy: "name one with its modules (--kernel DIR/boot/vmlinuz-RELEASE); on Debian: apt-get download \
                 linux-image-cloud-amd64's package, dpkg -x it to DIR"
            .to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_used_only_with_its_modules() {
        let dir = tempfile::tempdir().expect("a folder");
        let kernel = dir.path().join("boot/vmlinuz-6.1-x");
        std::fs::create_dir_all(dir.path().join("boot")).expect("a folder");
        assert!(matches!(with_modules(&kernel), Err(Error::File { .. })), "no such file");
        std::fs::write(&kernel, "k").expect("written");
        assert!(matches!(with_modules(&kernel), Err(Error::Missing { .. })), "no modules");
        std::fs::create_dir_all(dir.path().join("lib/modules/6.1-x")).expect("a folder");
        assert_eq!(with_modules(&kernel).expect("found").1, "6.1-x");
        let other = dir.path().join("boot/bzImage");
        assert!(matches!(with_modules(&other), Err(Error::Missing { .. })), "no release");
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(major("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)"), Some(7));
        assert_eq!(major("QEMU emulator version 10.0.2"), Some(10));
        assert_eq!(major("nothing"), None);
    }
}
