//! Bytes that replace parts of a file: log updates not yet in their places.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

/// 4 KiB.
pub(crate) type Sector = Box<[u8; super::LOG_SECTOR]>;

/// Replacement of one range.
#[derive(Debug, Clone)]
pub(crate) enum Patch {
    /// Zeros up to the end of the range.
    Zero,
    /// One sector.
    Data(Sector),
}

/// Disjoint patches by file offset. All offsets and lengths are multiples of 4 KiB.
#[derive(Debug, Clone, Default)]
pub(crate) struct Overlay {
    /// Start to (end, patch).
    patches: BTreeMap<u64, (u64, Patch)>,
}

impl Overlay {
    pub(crate) fn len(&self) -> usize {
        self.patches.len()
    }

    pub(crate) fn clear(&mut self) {
        self.patches.clear();
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64, &Patch)> {
        self.patches.iter().map(|(start, (end, patch))| (*start, *end, patch))
    }

    /// Replaces one sector; a later patch hides an earlier one.
    pub(crate) fn put_sector(&mut self, start: u64, sector: Sector) {
        self.put(start, start + super::LOG_SECTOR as u64, Patch::Data(sector));
    }

    /// Replaces `start..end` by zeros.
    pub(crate) fn put_zeros(&mut self, start: u64, end: u64) {
        if start < end {
            self.put(start, end, Patch::Zero);
        }
    }

    fn put(&mut self, start: u64, end: u64, patch: Patch) {
        // Only zero ranges can be longer than a sector, so only they are ever cut.
        if let Some((&from, &(to, _))) = self.patches.range(..start).next_back()
            && to > start
        {
            self.patches.insert(from, (start, Patch::Zero));
            if to > end {
                self.patches.insert(end, (to, Patch::Zero));
            }
        }
        while let Some((&from, &(to, _))) = self.patches.range(start..end).next() {
            self.patches.remove(&from);
            if to > end {
                self.patches.insert(end, (to, Patch::Zero));
            }
        }
        self.patches.insert(start, (end, patch));
    }

    /// Replaces what is patched of `buf`, which holds the file's bytes from `offset` on.
    pub(crate) fn apply(&self, offset: u64, buf: &mut [u8]) {
        if self.patches.is_empty() {
            return;
        }
        let end = offset.saturating_add(buf.len() as u64);
        let first = self.patches.range(..=offset).next_back().map_or(offset, |(start, _)| *start);
        for (&from, (to, patch)) in self.patches.range(first..end) {
            let (a, b) = (from.max(offset), (*to).min(end));
            if a >= b {
                continue;
            }
            let target = &mut buf[(a - offset) as usize..(b - offset) as usize];
            match patch {
                Patch::Zero => target.fill(0),
                Patch::Data(sector) => {
                    target.copy_from_slice(&sector[(a - from) as usize..(b - from) as usize]);
                }
            }
        }
    }
}
