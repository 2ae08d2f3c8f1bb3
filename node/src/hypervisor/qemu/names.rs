//! The names of what we make in a QEMU, so that it can be told from everything else, and found again by an agent that knows
//! nothing. Pure.
//!
//! | what | name |
//! | --- | --- |
//! | dirty bitmap of a reference point | `outrider-FABRIC-CHECKPOINT` (FABRIC: first 8 digits of the fabric's id) |
//! | copy of one while it is read | `outrider-FABRIC-CHECKPOINT-changes` |
//! | block nodes of a checkpoint | `outrider-a0-CHECKPOI...` (12 digits), `a`: what is read, `c`: copy before write, `s`: scratch |
//! | export of a frozen disk | `outrider-0-CHECKPOINT-NAME`, NAME being the checkpoint's name with `_XX` for what QEMU does not allow |

use std::path::{Path, PathBuf};

use outrider_proto::ids::{CheckpointId, FabricId};
use uuid::Uuid;

const PREFIX: &str = "outrider-";
const CHANGES: &str = "-changes";
/// QEMU's own bound is 31.
const NODE_DIGITS: usize = 12;

/// The role of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Node {
    /// What is exported: the disk as it was.
    Access,
    /// The filter below the guest's device.
    Filter,
    /// Where it copies to.
    Scratch,
}

impl Node {
    fn letter(self) -> char {
        match self {
            Self::Access => 'a',
            Self::Filter => 'c',
            Self::Scratch => 's',
        }
    }
}

/// The name of a node of a checkpoint.
pub(super) fn node(kind: Node, disk: usize, checkpoint: CheckpointId) -> String {
    format!("{PREFIX}{}{disk}-{}", kind.letter(), digits(checkpoint))
}

/// What a node's name says, when it is ours: role, disk and the checkpoint's first digits.
pub(super) fn parse_node(name: &str) -> Option<(Node, usize, &str)> {
    let rest = name.strip_prefix(PREFIX)?;
    let kind = match rest.chars().next()? {
        'a' => Node::Access,
        'c' => Node::Filter,
        's' => Node::Scratch,
        _ => return None,
    };
    let (disk, checkpoint) = rest[1..].split_once('-')?;
    let hex = checkpoint.len() == NODE_DIGITS && checkpoint.bytes().all(|b| b.is_ascii_hexdigit());
    hex.then_some((kind, disk.parse().ok()?, checkpoint))
}

/// The first digits of a checkpoint's id, as they are in node names.
pub(super) fn digits(checkpoint: CheckpointId) -> String {
    checkpoint.0.simple().to_string()[..NODE_DIGITS].to_owned()
}

/// The id of the export of a frozen disk.
pub(super) fn export(disk: usize, checkpoint: CheckpointId, name: &str) -> String {
    let mut id = format!("{PREFIX}{disk}-{}-", checkpoint.0.simple());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() {
            id.push(char::from(byte));
        } else {
            id.push_str(&format!("_{byte:02x}"));
        }
    }
    id
}

/// What an export's id says: disk, checkpoint, its name.
pub(super) fn parse_export(id: &str) -> Option<(usize, CheckpointId, String)> {
    let mut parts = id.strip_prefix(PREFIX)?.splitn(3, '-');
    let disk = parts.next()?.parse().ok()?;
    let checkpoint = parts.next().filter(|p| p.len() == 32)?;
    let checkpoint = CheckpointId(Uuid::try_parse(checkpoint).ok()?);
    let mut name = Vec::new();
    let mut bytes = parts.next()?.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'_' {
            name.push(byte);
            continue;
        }
        let pair = [bytes.next()?, bytes.next()?];
        name.push(u8::from_str_radix(std::str::from_utf8(&pair).ok()?, 16).ok()?);
    }
    Some((disk, checkpoint, String::from_utf8(name).ok()?))
}

/// The NBD name of a frozen disk.
pub(super) fn nbd_export(disk: usize, checkpoint: CheckpointId) -> String {
    format!("{}-{disk}", checkpoint.0.simple())
}

/// An NBD address, as other programs write it, too.
pub(super) fn uri(socket: &Path, export: &str) -> PathBuf {
    PathBuf::from(format!("nbd+unix:///{export}?socket={}", socket.display()))
}

/// Names of bitmaps of one fabric.
#[derive(Debug, Clone)]
pub(super) struct Bitmaps {
    prefix: String,
}

/// A bitmap of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ours {
    /// Records since a checkpoint.
    Since(CheckpointId),
    /// A copy that was being read.
    Changes(CheckpointId),
}

impl Bitmaps {
    pub(super) fn of(fabric: FabricId) -> Self {
        Self { prefix: format!("{PREFIX}{}-", &fabric.0.simple().to_string()[..8]) }
    }

    /// The bitmap that records since a checkpoint.
    pub(super) fn since(&self, checkpoint: CheckpointId) -> String {
        format!("{}{}", self.prefix, checkpoint.0.simple())
    }

    /// The copy of it that is read.
    pub(super) fn changes(&self, checkpoint: CheckpointId) -> String {
        format!("{}{CHANGES}", self.since(checkpoint))
    }

    /// Whether a bitmap is ours, and which.
    pub(super) fn parse(&self, name: &str) -> Option<Ours> {
        let rest = name.strip_prefix(&self.prefix)?;
        let id = |digits: &str| {
            let whole = digits.len() == 32;
            whole.then(|| Uuid::try_parse(digits).ok().map(CheckpointId)).flatten()
        };
        match rest.strip_suffix(CHANGES) {
            Some(digits) => id(digits).map(Ours::Changes),
            None => id(rest).map(Ours::Since),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_again_what_they_were_made_of_and_fit_into_qemus_bounds() {
        let id = CheckpointId::random();
        for kind in [Node::Access, Node::Filter, Node::Scratch] {
            let name = node(kind, 99, id);
            assert!(name.len() <= 31, "{name}");
            assert_eq!(parse_node(&name), Some((kind, 99, digits(id).as_str())));
        }
        let name = "Outrider 0195-a 3 7";
        let export_id = export(12, id, name);
        assert!(export_id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)));
        assert_eq!(parse_export(&export_id), Some((12, id, name.to_owned())));
        let bitmaps = Bitmaps::of(FabricId::random());
        assert_eq!(bitmaps.parse(&bitmaps.since(id)), Some(Ours::Since(id)));
        assert_eq!(bitmaps.parse(&bitmaps.changes(id)), Some(Ours::Changes(id)));
    }

    #[test]
    fn what_others_made_is_not_taken_for_ours() {
        let bitmaps = Bitmaps::of(FabricId::random());
        let other = Bitmaps::of(FabricId::random());
        assert_eq!(bitmaps.parse(&other.since(CheckpointId::random())), None);
        for name in ["libvirt-3-format", "outrider-x", "outrider-", "#block123", "outrider-a-b", ""]
        {
            assert_eq!(parse_node(name), None, "{name}");
            assert_eq!(parse_export(name), None, "{name}");
            assert_eq!(bitmaps.parse(name), None, "{name}");
        }
    }
}
