//! Devices, modules, mounts, the guest agent.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::journal::Journal;
use crate::kernel;
use crate::writer::Disks;

/// Longest wait for disks to appear.
const PATIENCE: Duration = Duration::from_secs(30);
/// Share of a file system that the pattern may fill: the rest is for ext4 and the journal.
const FILL: (u64, u64) = (6, 10);

/// A machine that is up.
pub(crate) struct Machine {
    /// `None` when there is no disk to write to.
    pub(crate) disks: Option<Disks>,
    /// State of each disk's file system as it was found.
    pub(crate) states: Vec<&'static str>,
    /// The guest agent, when this guest has one.
    pub(crate) agent: Option<Child>,
    /// The steering port.
    pub(crate) port: File,
}

/// Brings the machine up.
pub(crate) fn boot() -> io::Result<Machine> {
    kernel::mount_at("devtmpfs", "/dev", "devtmpfs", "")?;
    kernel::mount_at("proc", "/proc", "proc", "")?;
    kernel::mount_at("sysfs", "/sys", "sysfs", "")?;
    fs::create_dir_all("/run")?;
    // In the order in which they need each other.
    let order = fs::read_to_string("/modules/order").unwrap_or_default();
    for name in order.lines() {
        kernel::load_module(&Path::new("/modules").join(name))
            .map_err(|e| io::Error::other(format!("module {name}: {e}")))?;
    }
    let port = File::options().read(true).write(true).open("/dev/ttyS1")?;
    kernel::make_raw(&port)?;

    let names = appear(parameter("outrider.disks").unwrap_or(0) as usize)?;
    let mut states = Vec::new();
    let mut files = Vec::new();
    let mut journal = None;
    for (number, name) in names.iter().enumerate() {
        let device = PathBuf::from("/dev").join(name);
        let state = file_system_state(&device)?;
        states.push(state);
        if state == "none" {
            continue;
        }
        let folder = format!("/disk{number}");
        let device = device.to_string_lossy();
        kernel::mount_at(&device, &folder, "ext4", "noinit_itable,errors=remount-ro")
            .map_err(|e| io::Error::other(format!("{name} does not mount: {e}")))?;
        let folder = Path::new(&folder);
        if journal.is_none() {
            journal = Some(Journal::open(&folder.join("journal"))?);
        }
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(folder.join("data"))?;
        let sectors = fs::read_to_string(format!("/sys/block/{name}/size"))?;
        let size = 512 * sectors.trim().parse::<u64>().map_err(io::Error::other)?;
        files.push((file, size / FILL.1 * FILL.0));
    }
    Ok(Machine { disks: journal.map(|j| Disks::new(j, files)), states, agent: agent(), port })
}

/// A number from the kernel's command line.
pub(crate) fn parameter(name: &str) -> Option<u64> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    line.split_whitespace()
        .filter_map(|word| word.split_once('='))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.parse().ok())
}

/// Names of the disks, in the order of their devices, once so many are there.
fn appear(wanted: usize) -> io::Result<Vec<String>> {
    let give_up = Instant::now() + PATIENCE;
    loop {
        let mut names: Vec<String> = fs::read_dir("/sys/block")?
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter(|n| n.starts_with("vd") || n.starts_with("sd"))
            .collect();
        names.sort_unstable();
        if names.len() >= wanted {
            return Ok(names);
        }
        if Instant::now() > give_up {
            let found = names.join(", ");
            return Err(io::Error::other(format!("{wanted} disks wanted, found {found}")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What ext4's superblock says before anybody mounts it: `clean` needs no replay.
fn file_system_state(device: &Path) -> io::Result<&'static str> {
    let mut block = [0; 1024];
    let read = File::open(device)?.read_exact_at(&mut block, 1024);
    let word = |at: usize| u32::from(block[at]) | u32::from(block[at + 1]) << 8;
    Ok(if read.is_err() || word(0x38) != 0xef53 {
        "none"
    } else if word(0x3a) & 2 != 0 || word(0x194) != 0 {
        "errors"
    } else if word(0x60) & 4 != 0 {
        "replay"
    } else {
        "clean"
    })
}

/// Errors that ext4 has counted on all mounted disks.
pub(crate) fn file_system_errors() -> u64 {
    let folders = fs::read_dir("/sys/fs/ext4").into_iter().flatten().flatten();
    let count = |folder: fs::DirEntry| -> Option<u64> {
        fs::read_to_string(folder.path().join("errors_count")).ok()?.trim().parse().ok()
    };
    folders.filter_map(count).sum()
}

/// Starts the real guest agent, where the initramfs has it and the machine has the port.
fn agent() -> Option<Child> {
    let program = Path::new("/usr/sbin/qemu-ga");
    if !program.exists() {
        return None;
    }
    let port = fs::read_dir("/sys/class/virtio-ports").ok()?.flatten().find(|p| {
        fs::read_to_string(p.path().join("name"))
            .is_ok_and(|n| n.trim() == "org.qemu.guest_agent.0")
    })?;
    let device = Path::new("/dev").join(port.file_name());
    let started = Command::new(program)
        .args(["--method", "virtio-serial", "--statedir", "/run", "--pidfile", "/run/ga.pid"])
        .arg("--path")
        .arg(device)
        .stdin(Stdio::null())
        .spawn();
    started.inspect_err(|e| eprintln!("guest: the guest agent does not start: {e}")).ok()
}
