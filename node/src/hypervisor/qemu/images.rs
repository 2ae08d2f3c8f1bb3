//! The images that a command line names, and which of them a restored VM may have: its own, never the original's. Pure.
//!
//! A captured disk gets its new file, and stands alone: whatever was below it would show through its holes. Of the others,
//! those that are only read stay, the firmware's variables are copied, and the rest goes together with its devices.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::options::{Options, last};

/// A disk that was captured, and the file that it was restored to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moved<'a> {
    pub(super) slot: &'a str,
    pub(super) from: &'a str,
    pub(super) to: &'a str,
}

/// Where images of a restored VM come to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    /// Folder that relative paths count from.
    pub(super) cwd: &'a Path,
    /// Folder of the restored VM.
    pub(super) folder: &'a Path,
    /// It takes the original's place: what the point does not hold stays with it.
    pub(super) in_place: bool,
}

/// A command line with other images.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Images {
    pub(super) argv: Vec<String>,
    /// Files that have to be copied before it is used: from, to.
    pub(super) copies: Vec<(PathBuf, PathBuf)>,
    /// What differs from the original, in sentences.
    pub(super) notes: Vec<String>,
}

/// Drivers of images that are no files of this host.
const REMOTE: [&str; 11] =
    ["nbd", "rbd", "iscsi", "ssh", "http", "https", "ftp", "ftps", "gluster", "nfs", "nvme"];
/// Keys below which another image is.
const BELOW: [&str; 2] = ["backing", "data-file"];

/// Puts the restored disks into a command line.
///
/// # Errors
/// A sentence: a captured disk is not where the command line says.
pub(super) fn moved(
    argv: &[String],
    disks: &[Moved<'_>],
    place: Place<'_>,
) -> Result<Images, String> {
    let mut line = Line::parse(argv);
    let mut captured = BTreeSet::new();
    for disk in disks {
        let at = line.replace(disk, place.cwd);
        let above = line.above(at);
        if !line.has_device(&above) {
            let Moved { slot, from, .. } = disk;
            return Err(format!(
                "its disk {slot} was on {from} when it was backed up, and its command line attaches no such image: the disk was \
                 plugged in, or got another image (a snapshot, a mirror), after the VM was started. Restore the disks alone \
                 (export the point), and define the VM by hand"
            ));
        }
        captured.extend(above);
    }
    let idle = line.unused();
    line.stand_alone(&captured);
    let mut made = Images::default();
    for at in line.unused() {
        if idle.contains(&at) {
            made.notes.push(format!("{} was left out: no device of it uses it", line.told(at)));
        }
        line.remove(at);
    }
    for at in line.blocks() {
        if !line.is_foreign(at, disks) || line.is_only_read(at) {
            continue;
        }
        let told = line.told(at);
        if place.in_place {
            made.notes
                .push(format!("{told} is not in the recovery point: it stays attached as it is"));
        } else if line.is_firmware(at) {
            for (from, to) in line.copied(at, place) {
                made.notes.push(format!(
                    "the firmware's variables are not in a recovery point: those of today were copied from {} to {}",
                    from.display(),
                    to.display()
                ));
                made.copies.push((from, to));
            }
        } else {
            line.detach(at);
            made.notes.push(format!(
                "{told} is not in the recovery point and was left out: the original may use it"
            ));
        }
    }
    made.argv = line.text();
    Ok(made)
}

enum Item {
    Word(String),
    /// `-device`.
    Device(String, Options),
    Block(Block),
    Gone,
}

/// An option that opens images.
struct Block {
    option: String,
    /// Of `key=value,...`; else the value is a path.
    keyed: bool,
    options: Options,
}

struct Line(Vec<Item>);

impl Line {
    fn parse(argv: &[String]) -> Self {
        let mut items = Vec::with_capacity(argv.len());
        let mut words = argv.iter();
        while let Some(word) = words.next() {
            let option = super::definition::bare(word);
            let keyed = matches!(option, "-blockdev" | "-drive");
            let plain = matches!(
                option,
                "-hda"
                    | "-hdb"
                    | "-hdc"
                    | "-hdd"
                    | "-fda"
                    | "-fdb"
                    | "-sd"
                    | "-mtdblock"
                    | "-pflash"
            );
            let value = if keyed || plain || option == "-device" { words.next() } else { None };
            let Some(value) = value else {
                items.push(Item::Word(word.clone()));
                continue;
            };
            let option = option.to_owned();
            items.push(match (keyed, plain) {
                (false, false) => Item::Device(option, Options::parse(value)),
                (true, _) => Item::Block(Block { option, keyed, options: Options::parse(value) }),
                _ => {
                    let mut options = Options::parse("file=");
                    options.pairs = vec![("file".into(), Value::from(value.as_str()))];
                    Item::Block(Block { option, keyed, options })
                }
            });
        }
        Self(items)
    }

    fn text(self) -> Vec<String> {
        let words = |item| match item {
            Item::Word(word) => vec![word],
            Item::Device(option, options) => vec![option, options.text()],
            Item::Block(block) if block.keyed => vec![block.option, block.options.text()],
            Item::Block(block) => {
                let path = block.options.get("file").unwrap_or_default().to_owned();
                vec![block.option, path]
            }
            Item::Gone => Vec::new(),
        };
        self.0.into_iter().flat_map(words).collect()
    }

    fn block(&self, at: usize) -> Option<&Block> {
        match self.0.get(at) {
            Some(Item::Block(block)) => Some(block),
            _ => None,
        }
    }

    fn blocks(&self) -> Vec<usize> {
        (0..self.0.len()).filter(|at| self.block(*at).is_some()).collect()
    }

    fn devices(&self) -> impl Iterator<Item = (usize, &Options)> {
        self.0.iter().enumerate().filter_map(|(at, item)| match item {
            Item::Device(_, options) => Some((at, options)),
            _ => None,
        })
    }

    fn remove(&mut self, at: usize) {
        if let Some(item) = self.0.get_mut(at) {
            *item = Item::Gone;
        }
    }

    /// Gives a disk its new file, wherever it is opened; not where it is only below another image.
    fn replace(&mut self, disk: &Moved<'_>, cwd: &Path) -> BTreeSet<usize> {
        let mut found = BTreeSet::new();
        for (at, item) in self.0.iter_mut().enumerate() {
            let Item::Block(block) = item else { continue };
            for key in block.files() {
                if is_below(&key) || !block.names_file(&key, disk.from, cwd) {
                    continue;
                }
                block.set(&key, disk.to);
                // A block device's bytes are in a file now.
                let driver = format!("{}driver", &key[..key.len() - last(&key).len()]);
                if block.options.get(&driver) == Some("host_device") {
                    block.set(&driver, "file");
                }
                found.insert(at);
            }
        }
        found
    }

    /// These, and all that open an image through them, as its topmost layer.
    fn above(&self, from: BTreeSet<usize>) -> BTreeSet<usize> {
        let mut all = from;
        loop {
            let names = self.names(&all);
            let more: Vec<usize> = self
                .blocks()
                .into_iter()
                .filter(|at| !all.contains(at))
                .filter(|at| self.block(*at).is_some_and(|b| b.refers_to(&names, false)))
                .collect();
            if more.is_empty() {
                return all;
            }
            all.extend(more);
        }
    }

    fn names(&self, of: &BTreeSet<usize>) -> BTreeSet<String> {
        of.iter().filter_map(|at| self.block(*at)).flat_map(Block::names).collect()
    }

    /// The devices that use these.
    fn used_by(&self, of: &BTreeSet<usize>) -> Vec<usize> {
        let names = self.names(of);
        let uses = |options: &Options| options.get("drive").is_some_and(|d| names.contains(d));
        self.devices().filter(|(_, options)| uses(options)).map(|(at, _)| at).collect()
    }

    fn has_device(&self, of: &BTreeSet<usize>) -> bool {
        // What is no `-blockdev` comes with a device of its own, unless it says that it does not.
        let own = |b: &Block| b.option != "-blockdev" && b.options.get("if") != Some("none");
        of.iter().any(|at| self.block(*at).is_some_and(own)) || !self.used_by(of).is_empty()
    }

    /// Nothing is below these any more.
    fn stand_alone(&mut self, captured: &BTreeSet<usize>) {
        for at in captured {
            if let Some(Item::Block(block)) = self.0.get_mut(*at) {
                block.options.pairs.retain(|(key, _)| !is_below(key));
            }
        }
    }

    /// Nodes that nothing refers to, those first that others are below.
    fn unused(&self) -> Vec<usize> {
        let mut unused: Vec<usize> = Vec::new();
        loop {
            let is_used = |at: usize| {
                let names = self.names(&BTreeSet::from([at]));
                self.0.iter().enumerate().any(|(other, item)| match item {
                    _ if other == at || unused.contains(&other) => false,
                    Item::Word(word) => {
                        word.split([',', '=', '"', ':', ' ']).any(|part| names.contains(part))
                    }
                    Item::Device(_, options) => refers_to(options, &names, true),
                    Item::Block(block) => block.refers_to(&names, true),
                    Item::Gone => false,
                })
            };
            let next = self.blocks().into_iter().find(|at| {
                let node = self.block(*at).is_some_and(|b| b.option == "-blockdev");
                node && !unused.contains(at) && !is_used(*at)
            });
            match next {
                Some(at) => unused.push(at),
                None => return unused,
            }
        }
    }

    /// Whether it opens an image that is not one of the restored ones.
    fn is_foreign(&self, at: usize, disks: &[Moved<'_>]) -> bool {
        self.block(at).is_some_and(|block| {
            let other = |key: &String| {
                let value = block.options.get(key).unwrap_or_default();
                !value.is_empty() && disks.iter().all(|d| d.to != value)
            };
            let remote = |(key, value): &(String, Value)| {
                last(key) == "driver" && value.as_str().is_some_and(|d| REMOTE.contains(&d))
            };
            block.files().iter().any(other) || block.options.pairs.iter().any(remote)
        })
    }

    fn is_only_read(&self, at: usize) -> bool {
        let above = self.above(BTreeSet::from([at]));
        let read_only = |block: &Block| {
            ["read-only", "readonly", "snapshot"].iter().any(|key| block.options.is_on(key))
                || block.options.get("media") == Some("cdrom")
        };
        let is_cd = |at: usize| match &self.0[at] {
            Item::Device(_, options) => driver(options).ends_with("-cd"),
            _ => false,
        };
        above.iter().any(|at| self.block(*at).is_some_and(read_only))
            || self.used_by(&above).into_iter().any(is_cd)
    }

    /// Whether the firmware is in it.
    fn is_firmware(&self, at: usize) -> bool {
        let above = self.above(BTreeSet::from([at]));
        let own = |b: &Block| b.option == "-pflash" || b.options.get("if") == Some("pflash");
        let names = self.names(&above);
        above.iter().any(|at| self.block(*at).is_some_and(own))
            || self.0.iter().any(|item| match item {
                Item::Word(word) => Options::parse(word).pairs.iter().any(|(key, value)| {
                    key.starts_with("pflash") && value.as_str().is_some_and(|v| names.contains(v))
                }),
                _ => false,
            })
    }

    /// Gives it a copy of its files; which is to be made.
    fn copied(&mut self, at: usize, place: Place<'_>) -> Vec<(PathBuf, PathBuf)> {
        let mut copies = Vec::new();
        if let Some(Item::Block(block)) = self.0.get_mut(at) {
            for key in block.files() {
                let from = place.cwd.join(plain(block.options.get(&key).unwrap_or_default()));
                let to = place.folder.join(from.file_name().unwrap_or_default());
                block.set(&key, &to.to_string_lossy());
                copies.push((from, to));
            }
        }
        copies
    }

    /// Removes an image with all that uses it.
    fn detach(&mut self, at: usize) {
        let above = self.above(BTreeSet::from([at]));
        for at in self.used_by(&above).into_iter().chain(above) {
            self.remove(at);
        }
    }

    /// An image, as an operator knows it.
    fn told(&self, at: usize) -> String {
        let Some(block) = self.block(at) else { return String::new() };
        let files = block.files();
        let file = files.iter().find_map(|key| block.options.get(key)).unwrap_or("of the network");
        let devices = self.used_by(&self.above(BTreeSet::from([at])));
        let device = devices.first().and_then(|at| match &self.0[*at] {
            Item::Device(_, options) => options.get("id"),
            _ => None,
        });
        match device {
            Some(device) => format!("the disk {device} ({file})"),
            None => format!("the image {file}"),
        }
    }
}

impl Block {
    fn names(&self) -> Vec<String> {
        let named = |(key, _): &&(String, Value)| key == "id" || last(key) == "node-name";
        let names = self.options.pairs.iter().filter(named).filter_map(|(_, v)| v.as_str());
        names.map(str::to_owned).collect()
    }

    /// Keys whose values are files.
    fn files(&self) -> Vec<String> {
        let is_file =
            |key: &str| last(key) == "filename" || (self.option != "-blockdev" && key == "file");
        let keys = self.options.pairs.iter().map(|(key, _)| key);
        keys.filter(|key| is_file(key)).cloned().collect()
    }

    fn names_file(&self, key: &str, file: &str, cwd: &Path) -> bool {
        let found = self.options.get(key).unwrap_or_default();
        !file.is_empty() && (found == file || cwd.join(plain(found)) == cwd.join(file))
    }

    fn set(&mut self, key: &str, to: &str) {
        for (k, value) in &mut self.options.pairs {
            if k == key {
                *value = to.into();
            }
        }
    }

    fn refers_to(&self, names: &BTreeSet<String>, also_below: bool) -> bool {
        refers_to(&self.options, names, also_below)
    }
}

fn refers_to(options: &Options, names: &BTreeSet<String>, also_below: bool) -> bool {
    options.pairs.iter().any(|(key, value)| {
        let own = matches!(last(key), "node-name" | "id" | "driver" | "filename");
        !own && (also_below || !is_below(key)) && value.as_str().is_some_and(|v| names.contains(v))
    })
}

fn is_below(key: &str) -> bool {
    key.split('.').any(|part| BELOW.contains(&part))
}

/// The driver of a device.
fn driver(options: &Options) -> &str {
    let first = options.pairs.first().filter(|(_, value)| value.is_null());
    options.get("driver").or(first.map(|(key, _)| key.as_str())).unwrap_or_default()
}

fn plain(file: &str) -> &str {
    file.strip_prefix("file:").unwrap_or(file)
}

#[cfg(test)]
mod tests;
