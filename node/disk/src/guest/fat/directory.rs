//! Directories: short entries, and long names in the entries before them.

use super::super::bytes::{u8_at, u16_at};
use super::super::{FileId, GuestError, Name};
use super::{Fat, ROOT, Root, first_cluster};

const VOLUME_LABEL: u8 = 0x08;
pub(super) const DIRECTORY: u8 = 0x10;
const LONG_NAME: u8 = 0x0f;
/// Entries of a directory: 2 MiB, the specification's bound.
const MAX_BYTES: u64 = 2 << 20;

/// A directory entry.
pub(super) struct Found {
    pub(super) short: [u8; 32],
    long: Vec<u16>,
    /// Where the short entry is on the volume.
    pub(super) place: u64,
}

impl Found {
    pub(super) fn is_directory(&self) -> bool {
        u8_at(&self.short, 11) & DIRECTORY != 0
    }

    pub(super) fn is_label(&self) -> bool {
        u8_at(&self.short, 11) & VOLUME_LABEL != 0
    }

    pub(super) fn is_dot(&self) -> bool {
        self.short[0] == b'.'
    }

    pub(super) fn name(&self) -> Name {
        if !self.long.is_empty() {
            return Name::from_utf16(&self.long);
        }
        // Bits of Windows NT: a name of lower case letters needs no long one.
        let case = u8_at(&self.short, 12);
        let part = |bytes: &[u8], lower: bool| {
            let mut text = bytes.trim_ascii_end().to_vec();
            if lower {
                text.make_ascii_lowercase();
            }
            text
        };
        let mut name = part(&self.short[..8], case & 0x08 != 0);
        // 0xe5 as a first character would mean "deleted".
        if name.first() == Some(&0x05) {
            name[0] = 0xe5;
        }
        let extension = part(&self.short[8..11], case & 0x10 != 0);
        if !extension.is_empty() {
            name.push(b'.');
            name.extend(extension);
        }
        Name::from_bytes(name)
    }
}

impl Fat {
    pub(super) fn entries(
        &self,
        directory: FileId,
        each: &mut dyn FnMut(Found) -> Result<(), GuestError>,
    ) -> Result<(), GuestError> {
        let pieces = if directory == ROOT {
            match self.root {
                Root::Fixed { start, len } => vec![(0, len, Some(start))],
                Root::Cluster(first) => self.whole(first)?,
            }
        } else {
            let entry = self.short(directory)?;
            if u8_at(&entry, 11) & DIRECTORY == 0 {
                return Err(GuestError::damaged(
                    "a directory",
                    "its entry is not one of a directory",
                ));
            }
            self.whole(first_cluster(&entry, self.facts.kind))?
        };
        let (mut long, mut seen) = (LongName::default(), 0);
        for (_, len, place) in pieces {
            let Some(place) = place else { continue };
            for at in (place..place + len).step_by(32) {
                let mut entry = [0; 32];
                self.window.read(at, &mut entry)?;
                seen += 32;
                match (entry[0], entry[11] & 0x3f) {
                    (0, _) => return Ok(()),
                    (0xe5, _) => long = LongName::default(),
                    (_, LONG_NAME) => long.push(&entry),
                    _ => {
                        let long = std::mem::take(&mut long).of(&entry);
                        each(Found { short: entry, long, place: at })?;
                    }
                }
                if seen > MAX_BYTES {
                    return Err(GuestError::damaged("a directory", "it is longer than FAT allows"));
                }
            }
        }
        Ok(())
    }

    fn whole(&self, first: u32) -> Result<Vec<(u64, u64, Option<u64>)>, GuestError> {
        let mut out = Vec::new();
        let mut offset = 0;
        self.table.chain(first, MAX_BYTES / self.cluster + 1, false, &mut |cluster| {
            out.push((offset, self.cluster, Some(self.place(cluster))));
            offset += self.cluster;
        })?;
        Ok(out)
    }
}

/// Collects the entries of a long name, which come last piece first.
#[derive(Default)]
struct LongName {
    /// Pieces still to come; `None`: none has been seen, or they do not fit together.
    expected: Option<u8>,
    sum: u8,
    units: Vec<u16>,
}

impl LongName {
    fn push(&mut self, entry: &[u8; 32]) {
        let order = entry[0];
        if order & 0x40 != 0 {
            *self = Self { expected: Some(order & 0x3f), sum: entry[13], units: Vec::new() };
        }
        let fits = self.expected == Some(order & 0x3f)
            && (1..=20).contains(&(order & 0x3f))
            && self.sum == entry[13];
        if !fits {
            *self = Self::default();
            return;
        }
        let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain((28..32).step_by(2));
        let piece: Vec<u16> = places.map(|at| u16_at(entry, at)).collect();
        self.units.splice(0..0, piece);
        self.expected = Some((order & 0x3f) - 1);
    }

    /// The name, if all pieces were there and belong to this entry.
    fn of(mut self, short: &[u8; 32]) -> Vec<u16> {
        let sum = short[..11].iter().fold(0_u8, |sum, b| sum.rotate_right(1).wrapping_add(*b));
        if self.expected != Some(0) || self.sum != sum {
            return Vec::new();
        }
        if let Some(end) = self.units.iter().position(|u| *u == 0) {
            self.units.truncate(end);
        }
        self.units
    }
}
