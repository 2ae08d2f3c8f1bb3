//! The command line of a VM.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::image::Format;

/// How disks are written on the command line. All are in use out there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shape {
    /// `-blockdev driver=qcow2,node-name=...`
    #[default]
    Blockdev,
    /// `-blockdev {"driver":"qcow2",...}`, as libvirt writes it.
    Json,
    /// `-drive file=...,format=...,if=none`
    Drive,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
}

/// A VM as the cluster manager defines it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// `-name`.
    pub name: String,
    /// `-uuid`.
    pub guid: Uuid,
    /// In the order of their devices.
    pub disks: Vec<Disk>,
    /// How they are written.
    pub shape: Shape,
    /// Whether there is a port for the guest agent.
    pub agent: bool,
    /// MiB.
    pub memory: u32,
    /// Seconds without a word from its tester after which a guest turns itself off; 0: never.
    pub idle: u64,
}

/// Where a VM's sockets are on a host.
#[derive(Debug, Clone)]
pub struct Places {
    /// The host's own address; migrations come in there.
    pub address: std::net::IpAddr,
    /// For Outrider: `NAME.qmp` and `NAME.qga`.
    pub sockets: PathBuf,
    /// The cluster manager's own: monitor, serial ports, logs.
    pub control: PathBuf,
}

impl Places {
    /// The cluster manager's monitor.
    #[must_use]
    pub fn monitor(&self, vm: &str) -> PathBuf {
        self.control.join(format!("{vm}.qmp"))
    }

    /// The socket of the steering port.
    #[must_use]
    pub fn steering(&self, vm: &str) -> PathBuf {
        self.control.join(format!("{vm}.steer"))
    }

    /// All that the guest ever said over the steering port on this host.
    #[must_use]
    pub fn said(&self, vm: &str) -> PathBuf {
        self.control.join(format!("{vm}.said"))
    }

    /// The kernel's console.
    #[must_use]
    pub fn console(&self, vm: &str) -> PathBuf {
        self.control.join(format!("{vm}.console"))
    }

    /// What QEMU itself says.
    #[must_use]
    pub fn log(&self, vm: &str) -> PathBuf {
        self.control.join(format!("{vm}.log"))
    }
}

/// What all VMs of a cluster boot.
#[derive(Debug, Clone)]
pub struct Boot {
    /// The emulator.
    pub qemu: PathBuf,
    /// "kvm" or "tcg".
    pub accel: &'static str,
    /// Kernel.
    pub kernel: PathBuf,
    /// File system in memory.
    pub initramfs: PathBuf,
}

impl Machine {
    /// The whole command line; `incoming` for a VM that waits for its migration.
    #[must_use]
    pub fn command_line(&self, boot: &Boot, places: &Places, incoming: bool) -> Vec<OsString> {
        let mut line = Line(vec![boot.qemu.clone().into()]);
        line.pair("-name", &self.name);
        line.pair("-uuid", self.guid);
        line.pair("-machine", "q35");
        line.pair("-accel", boot.accel);
        line.pair("-cpu", "max");
        line.pair("-m", self.memory);
        line.pair("-display", "none");
        for flag in ["-nodefaults", "-no-user-config"] {
            line.0.push(flag.into());
        }
        line.pair("-kernel", boot.kernel.display());
        line.pair("-initrd", boot.initramfs.display());
        // An emulated timer on a busy host may miss the check that the kernel makes of it.
        let idle = self.idle;
        line.pair(
            "-append",
            format!(
                "console=ttyS0 loglevel=5 panic=0 no_timer_check outrider.disks={} outrider.idle={idle}",
                self.disks.len()
            ),
        );
        for (number, disk) in self.disks.iter().enumerate() {
            self.disk(&mut line, number, disk);
        }
        let name = &self.name;
        line.monitor("qmp-outrider", &places.sockets.join(format!("{name}.qmp")));
        line.monitor("qmp-cluster", &places.monitor(name));
        if self.agent {
            line.socket("qga", &places.sockets.join(format!("{name}.qga")), "");
            line.pair("-device", "virtio-serial-pci");
            line.pair("-device", "virtserialport,chardev=qga,name=org.qemu.guest_agent.0");
        }
        line.pair("-device", "virtio-rng-pci");
        let console = places.console(name);
        line.pair("-chardev", format!("file,id=console,append=on,path={}", escaped(&console)));
        line.pair("-serial", "chardev:console");
        let said = format!(",logappend=on,logfile={}", escaped(&places.said(name)));
        line.socket("steer", &places.steering(name), &said);
        line.pair("-serial", "chardev:steer");
        if incoming {
            line.pair("-incoming", "defer");
        }
        line.0
    }

    fn disk(&self, line: &mut Line, number: usize, disk: &Disk) {
        let (node, format, path) = (format!("disk{number}"), disk.format.as_str(), &disk.path);
        match self.shape {
            Shape::Blockdev => line.pair(
                "-blockdev",
                format!(
                    "driver={format},node-name={node},file.driver=file,file.filename={}",
                    escaped(path)
                ),
            ),
            Shape::Json => line.pair(
                "-blockdev",
                serde_json::json!({
                    "driver": format,
                    "node-name": node,
                    "discard": "unmap",
                    "file": { "driver": "file", "filename": path },
                }),
            ),
            Shape::Drive => line.pair(
                "-drive",
                format!("file={},format={format},if=none,id={node}", escaped(path)),
            ),
        }
        line.pair("-device", format!("virtio-blk-pci,drive={node},id=virtio-{node}"));
    }
}

struct Line(Vec<OsString>);

impl Line {
    fn pair(&mut self, option: &str, value: impl std::fmt::Display) {
        self.0.push(option.into());
        self.0.push(value.to_string().into());
    }

    fn socket(&mut self, id: &str, path: &Path, more: &str) {
        let path = escaped(path);
        self.pair("-chardev", format!("socket,id={id},path={path},server=on,wait=off{more}"));
    }

    fn monitor(&mut self, id: &str, path: &Path) {
        self.socket(id, path, "");
        self.pair("-mon", format!("chardev={id},mode=control"));
    }
}

/// A path inside an option: a comma separates, two are one.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
