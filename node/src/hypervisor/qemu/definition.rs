//! What a VM is besides its disks: the command line of its QEMU, kept in recovery points as `vm.json`, and made into another
//! command line when it is restored. Pure.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::images::{self, Moved, Place};
use super::network;
use super::options::escaped;

/// The file's name in recovery points.
pub(super) const FILE: &str = "vm.json";
/// Its format.
pub(super) const FORMAT: &str = "outrider-qemu-vm/1";

/// A VM as its QEMU process was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Definition {
    pub(super) format: String,
    pub(super) name: String,
    pub(super) uuid: Uuid,
    /// Program first.
    pub(super) argv: Vec<String>,
    /// Folder that relative paths count from.
    pub(super) cwd: PathBuf,
    pub(super) qmp: PathBuf,
    pub(super) qga: PathBuf,
    pub(super) disks: Vec<DefinedDisk>,
    /// The VM as it is, written down before another one takes its place: made again, it is not changed. Never so in a
    /// recovery point.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) aside: bool,
}

/// A disk that was captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DefinedDisk {
    pub(super) slot: String,
    /// As the command line names it.
    pub(super) path: String,
    pub(super) format: String,
    pub(super) size: u64,
}

/// What a restore makes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted<'a> {
    pub(super) name: &'a str,
    pub(super) uuid: Uuid,
    /// Folder of the host's sockets.
    pub(super) sockets: &'a Path,
    /// New file by slot.
    pub(super) disks: &'a [(String, PathBuf)],
    /// Its network adapters are connected to nothing.
    pub(super) disconnect: bool,
    /// Folder of the restored VM.
    pub(super) folder: &'a Path,
    /// It takes the original's place.
    pub(super) in_place: bool,
}

/// A VM as it is to be defined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rewritten {
    pub(super) definition: Definition,
    /// Files to be copied for it: from, to.
    pub(super) copies: Vec<(PathBuf, PathBuf)>,
    /// What differs from the original, in sentences.
    pub(super) notes: Vec<String>,
}

/// A name that may be part of a socket's name.
pub(super) fn safe(name: &str) -> String {
    let plain = |c: char| if c.is_alphanumeric() || "._-".contains(c) { c } else { '_' };
    let name: String = name.chars().map(plain).take(60).collect();
    let name = name.trim_start_matches('.').to_owned();
    if name.is_empty() { "vm".into() } else { name }
}

impl Definition {
    /// Reads a definition.
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let read: Self = serde_json::from_slice(text).map_err(|e| e.to_string())?;
        if read.format != FORMAT {
            return Err(format!("its format is {:?}; this agent knows {FORMAT:?}", read.format));
        }
        if read.argv.is_empty() {
            return Err(UNREADABLE.into());
        }
        Ok(read)
    }

    /// The same VM with other disks, sockets, name and UUID.
    ///
    /// # Errors
    /// A sentence: why its disks can be restored, and not the VM.
    pub(super) fn rewritten(&self, wanted: &Wanted<'_>) -> Result<Rewritten, String> {
        let original = match wanted.disconnect {
            true => network::disconnected(&self.argv),
            false => self.argv.clone(),
        };
        passable(&original)?;
        let mut disks = Vec::with_capacity(self.disks.len());
        for disk in &self.disks {
            let Some(new) = path_for(wanted.disks, &disk.slot) else { continue };
            let to = new.to_str().ok_or("a disk's new path is no UTF-8")?;
            disks.push(Moved { slot: &disk.slot, from: &disk.path, to });
        }
        let (folder, in_place) = (wanted.folder, wanted.in_place);
        let place = Place { cwd: &self.cwd, folder, in_place };
        let images = images::moved(&original, &disks, place)?;
        let mut argv = Vec::with_capacity(images.argv.len());
        let mut option = String::new();
        for argument in at_rest(&images.argv) {
            let new = match option.as_str() {
                "-uuid" => wanted.uuid.to_string(),
                option => self.argument(option, &argument, wanted),
            };
            argv.push(new);
            option = bare(&argument).to_owned();
        }
        if !argv.iter().any(|a| bare(a) == "-uuid") {
            argv.extend(["-uuid".to_owned(), wanted.uuid.to_string()]);
        }
        let file = safe(wanted.name);
        let definition = Self {
            format: FORMAT.into(),
            name: wanted.name.to_owned(),
            uuid: wanted.uuid,
            argv,
            cwd: self.cwd.clone(),
            qmp: wanted.sockets.join(format!("{file}.qmp")),
            qga: wanted.sockets.join(format!("{file}.qga")),
            disks: self
                .disks
                .iter()
                .map(|d| match path_for(wanted.disks, &d.slot) {
                    Some(path) => {
                        DefinedDisk { path: path.to_string_lossy().into_owned(), ..d.clone() }
                    }
                    None => d.clone(),
                })
                .collect(),
            aside: false,
        };
        Ok(Rewritten { definition, copies: images.copies, notes: images.notes })
    }

    /// Why no VM can be made of it, whatever is wished. That another program starts it is no news.
    pub(super) fn obstacle(&self) -> Option<String> {
        if self.argv.is_empty() {
            return Some(UNREADABLE.into());
        }
        passable(&network::disconnected(&self.argv)).ok()?;
        let restored = |(at, disk): (usize, &DefinedDisk)| {
            (disk.slot.clone(), PathBuf::from(format!("/outrider/{at}")))
        };
        let disks: Vec<_> = self.disks.iter().enumerate().map(restored).collect();
        let wanted = Wanted {
            name: &self.name,
            uuid: self.uuid,
            sockets: Path::new("/"),
            disks: &disks,
            disconnect: true,
            folder: Path::new("/"),
            in_place: false,
        };
        self.rewritten(&wanted).err()
    }

    /// This very VM, to be started again as it is.
    ///
    /// # Errors
    /// A sentence: why only whoever started it can.
    pub(super) fn set_aside(self) -> Result<Self, String> {
        if self.argv.is_empty() {
            return Err(UNREADABLE.into());
        }
        passable(&self.argv)?;
        Ok(Self { argv: at_rest(&self.argv), aside: true, ..self })
    }

    /// One argument; `option` is what stands before it.
    fn argument(&self, option: &str, argument: &str, wanted: &Wanted<'_>) -> String {
        if option == "-name" {
            return renamed(argument, &escaped(wanted.name));
        }
        let mut out = argument.to_owned();
        let file = safe(wanted.name);
        for (old, new) in [(&self.qmp, "qmp"), (&self.qga, "qga")] {
            let new = wanted.sockets.join(format!("{file}.{new}"));
            out = replace_path(&out, &old.to_string_lossy(), &new.to_string_lossy());
        }
        // Sockets and logs, never images.
        let opens_files = matches!(
            option,
            "-chardev"
                | "-serial"
                | "-parallel"
                | "-monitor"
                | "-qmp"
                | "-vnc"
                | "-spice"
                | "-debugcon"
                | "-D"
        );
        if wanted.name != self.name && opens_files {
            out = rename_files(&out, &safe(&self.name), &file);
        }
        if wanted.uuid != self.uuid {
            out = out.replace(&self.uuid.to_string(), &wanted.uuid.to_string());
            if matches!(option, "-device" | "-nic" | "-net") {
                out = network::with_own_mac(&out, wanted.uuid);
            }
        }
        out
    }
}

const UNREADABLE: &str = "it holds no command line: the agent could not read /proc/PID/cmdline of the VM's process. Run the \
                          agent as root or as the user of QEMU";

/// Whether all that a command line needs can be had again.
fn passable(argv: &[String]) -> Result<(), String> {
    let inherited = |a: &&String| {
        a.contains("/dev/fdset/")
            || a.split([',', ' ']).any(|p| {
                let value = p.rsplit_once("fd=").map(|(_, v)| v);
                value.is_some_and(|v| !v.is_empty() && v.bytes().all(|b| b.is_ascii_digit()))
            })
    };
    match argv.iter().find(inherited) {
        Some(argument) => Err(format!(
            "its command line uses a file that only its starter could pass ({argument}): define the VM through that program \
             (libvirt: virsh define) with the restored disks"
        )),
        None => Ok(()),
    }
}

/// Without what was for one start only.
fn at_rest(argv: &[String]) -> Vec<String> {
    let mut kept = Vec::with_capacity(argv.len());
    let mut arguments = argv.iter();
    while let Some(argument) = arguments.next() {
        match bare(argument) {
            "-incoming" | "-pidfile" | "-loadvm" => drop(arguments.next()),
            "-daemonize" => {}
            _ => kept.push(argument.clone()),
        }
    }
    kept
}

/// An option as QEMU takes it, with one dash.
pub(super) fn bare(argument: &str) -> &str {
    if argument.starts_with("--") { &argument[1..] } else { argument }
}

fn path_for<'a>(disks: &'a [(String, PathBuf)], slot: &str) -> Option<&'a PathBuf> {
    disks.iter().find(|(s, _)| s == slot).map(|(_, p)| p)
}

fn renamed(argument: &str, name: &str) -> String {
    let mut parts: Vec<String> = argument.split(',').map(str::to_owned).collect();
    match parts.iter().position(|p| p.starts_with("guest=")) {
        Some(at) => parts[at] = format!("guest={name}"),
        None => parts[0] = name.to_owned(),
    }
    parts.join(",")
}

/// Replaces a whole path, as it stands in `key=value,...` and in JSON.
fn replace_path(text: &str, old: &str, new: &str) -> String {
    if old.is_empty() {
        return text.to_owned();
    }
    let json = text.trim_start().starts_with('{');
    let (old, new) = if json {
        let inner = |s: &str| {
            let quoted = serde_json::Value::from(s).to_string();
            quoted[1..quoted.len() - 1].to_owned()
        };
        (inner(old), inner(new))
    } else {
        (escaped(old), escaped(new))
    };
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(&old) {
        let before = rest[..at].chars().next_back().or_else(|| out.chars().next_back());
        let after = rest[at + old.len()..].chars().next();
        let begins = before.is_none_or(|c| "=\":,".contains(c));
        let ends = after.is_none_or(|c| "\",".contains(c));
        out.push_str(&rest[..at]);
        out.push_str(if begins && ends { &new } else { &old });
        rest = &rest[at + old.len()..];
    }
    out.push_str(rest);
    out
}

/// Files called `OLD.something` become `NEW.something`.
fn rename_files(text: &str, old: &str, new: &str) -> String {
    text.replace(&format!("/{old}."), &format!("/{new}."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition(extra: &[&str]) -> Definition {
        let mut argv: Vec<String> = [
            "/usr/bin/qemu-system-x86_64", "-name", "guest=web,debug-threads=on", "-uuid",
            "11111111-2222-3333-4444-555555555555",
            "-blockdev", "driver=file,node-name=f0,filename=/srv/web.qcow2",
            "-blockdev", r#"{"driver":"qcow2","node-name":"d0","backing":"base","file":{"driver":"file","filename":"/srv/web.qcow2"}}"#,
            "-device", "virtio-blk-pci,id=disk0,drive=d0",
            "-device", "virtio-net-pci,netdev=n0,mac=52:54:00:aa:bb:cc",
            "-chardev", "socket,id=q,path=/run/a/web.qmp,server=on,wait=off",
            "-chardev", "socket,id=s,path=/run/c/web.steer,server=on",
            "-incoming", "defer", "-daemonize", "-S",
        ]
        .map(str::to_owned)
        .to_vec();
        argv.extend(extra.iter().map(|s| (*s).to_owned()));
        Definition {
            format: FORMAT.into(),
            name: "web".into(),
            uuid: Uuid::parse_str("11111111-2222-3333-4444-555555555555").expect("a uuid"),
            argv,
            cwd: "/".into(),
            qmp: "/run/a/web.qmp".into(),
            qga: "/run/a/web.qga".into(),
            disks: vec![DefinedDisk {
                slot: "disk0".into(),
                path: "/srv/web.qcow2".into(),
                format: "qcow2".into(),
                size: 1,
            }],
            aside: false,
        }
    }

    #[test]
    fn a_copy_has_its_own_disks_sockets_name_uuid_and_addresses_and_does_not_wait_for_a_migration()
    {
        let disks = [("disk0".to_owned(), PathBuf::from("/new/a,b.qcow2"))];
        let uuid = Uuid::from_u128(7);
        let wanted = Wanted {
            name: "web copy",
            uuid,
            sockets: Path::new("/run/b"),
            disks: &disks,
            disconnect: false,
            folder: Path::new("/new"),
            in_place: false,
        };
        let made = definition(&[]).rewritten(&wanted).expect("rewritten").definition;
        let line = made.argv.join(" ");
        assert!(line.contains("guest=web copy,debug-threads=on"), "{line}");
        assert!(line.contains(r#""filename":"/new/a,b.qcow2""#), "{line}");
        assert!(!line.contains("/srv/web.qcow2"), "{line}");
        assert!(!line.contains("backing"), "{line}");
        assert!(
            line.contains("path=/run/b/web_copy.qmp") && line.contains("/run/c/web_copy.steer"),
            "{line}"
        );
        assert!(
            !line.contains("-incoming") && !line.contains("defer") && !line.contains("-daemonize"),
            "{line}"
        );
        assert!(line.contains(&uuid.to_string()) && !line.contains("11111111"), "{line}");
        assert!(!line.contains("aa:bb:cc") && line.contains("mac=52:54:00:"), "{line}");
        assert_eq!(made.disks[0].path, "/new/a,b.qcow2");
        let text = serde_json::to_vec(&made).expect("written");
        assert_eq!(Definition::parse(&text), Ok(made));
    }

    #[test]
    fn files_passed_by_a_starter_cannot_be_passed_again() {
        let wanted = Wanted {
            name: "web",
            uuid: Uuid::nil(),
            sockets: Path::new("/"),
            disks: &[],
            disconnect: false,
            folder: Path::new("/new"),
            in_place: false,
        };
        for argument in ["tap,fd=27,id=n0", "tap,fd=27", "driver=file,filename=/dev/fdset/3"] {
            let refused =
                definition(&["-netdev", argument]).rewritten(&wanted).expect_err("refused");
            assert!(refused.contains("libvirt"), "{refused}");
        }
        // What connects an adapter is not needed where none is connected.
        let alone = Wanted { disconnect: true, ..wanted };
        let made = definition(&["-netdev", "tap,fd=27,id=n0"]).rewritten(&alone).expect("made");
        let made = made.definition;
        assert!(made.argv.contains(&"hubport,hubid=1000,id=n0".to_owned()), "{:?}", made.argv);
        assert!(Definition::parse(b"{}").is_err());
    }

    #[test]
    fn what_no_vm_can_be_made_of_is_known_when_it_is_backed_up() {
        assert_eq!(definition(&[]).obstacle(), None);
        assert_eq!(definition(&["-chardev", "socket,fd=3"]).obstacle(), None, "libvirt's own");
        let unread = Definition { argv: Vec::new(), ..definition(&[]) };
        let why = unread.obstacle().expect("nothing to start");
        assert!(why.contains("/proc/PID/cmdline"), "{why}");
        let mut moved = definition(&[]);
        moved.disks[0].path = "/srv/snapshot.qcow2".into();
        let why = moved.obstacle().expect("it has another image");
        assert!(why.contains("disk0") && why.contains("/srv/snapshot.qcow2"), "{why}");
    }

    #[test]
    fn a_vm_that_is_set_aside_is_itself_and_waits_for_no_migration() {
        let aside = definition(&[]).set_aside().expect("readable");
        let line = aside.argv.join(" ");
        assert!(line.contains("/srv/web.qcow2") && line.contains("11111111"), "{line}");
        assert!(!line.contains("-incoming") && !line.contains("-daemonize"), "{line}");
        let text = serde_json::to_vec(&aside).expect("written");
        assert_eq!(Definition::parse(&text), Ok(aside));
        assert!(definition(&["-netdev", "tap,fd=27"]).set_aside().is_err());
    }
}
