//! The allocation table: which cluster follows which.

use super::super::bytes::{u16_at, u32_at};
use super::super::window::Window;
use super::super::{FileSystemKind, GuestError};

/// The first copy of the table.
pub(super) struct Table {
    window: Window,
    kind: FileSystemKind,
    clusters: u64,
}

impl Table {
    pub(super) fn new(
        window: Window,
        kind: FileSystemKind,
        clusters: u64,
    ) -> Result<Self, GuestError> {
        let table = Self { window, kind, clusters };
        let needed = match kind {
            FileSystemKind::Fat12 => ((clusters + 2) * 3).div_ceil(2),
            FileSystemKind::Fat16 => (clusters + 2) * 2,
            _ => (clusters + 2) * 4,
        };
        if needed > table.window.len() {
            return Err(GuestError::damaged(
                "the allocation table of the FAT volume",
                "it is shorter than its volume needs",
            ));
        }
        Ok(table)
    }

    /// The clusters of a chain, at most `most` of them. `exact`: all of them must be there.
    pub(super) fn chain(
        &self,
        first: u32,
        most: u64,
        exact: bool,
        each: &mut dyn FnMut(u32),
    ) -> Result<(), GuestError> {
        let bad = |detail: String| GuestError::damaged("a cluster chain of the FAT volume", detail);
        let mut cluster = first;
        // A chain cannot be longer than the volume: a longer one is a loop.
        for done in 0..=self.clusters {
            if done == most {
                return Ok(());
            }
            if cluster < 2 || u64::from(cluster) >= self.clusters + 2 {
                return Err(bad(format!("cluster {cluster} does not exist")));
            }
            each(cluster);
            match self.next(cluster)? {
                Some(next) => cluster = next,
                None if !exact || done + 1 == most => return Ok(()),
                None => return Err(bad(format!("it ends after {} of {most} clusters", done + 1))),
            }
        }
        Err(bad("it is a loop".into()))
    }

    /// The cluster that follows; `None`: the chain ends.
    fn next(&self, cluster: u32) -> Result<Option<u32>, GuestError> {
        let n = u64::from(cluster);
        let (value, end) = match self.kind {
            FileSystemKind::Fat12 => {
                let mut bytes = [0; 2];
                self.window.read(n * 3 / 2, &mut bytes)?;
                let both = u32::from(u16_at(&bytes, 0));
                (if n % 2 == 0 { both & 0xfff } else { both >> 4 }, 0xff8)
            }
            FileSystemKind::Fat16 => {
                let mut bytes = [0; 2];
                self.window.read(n * 2, &mut bytes)?;
                (u16_at(&bytes, 0).into(), 0xfff8)
            }
            _ => {
                let mut bytes = [0; 4];
                self.window.read(n * 4, &mut bytes)?;
                (u32_at(&bytes, 0) & 0x0fff_ffff, 0x0fff_fff8)
            }
        };
        Ok((value < end).then_some(value))
    }

    /// Entry 1 tells whether the volume was taken off in order and without errors.
    pub(super) fn doubt(&self) -> Result<Option<&'static str>, GuestError> {
        let mut bytes = [0; 8];
        self.window.read(0, &mut bytes)?;
        let (clean, sound) = match self.kind {
            FileSystemKind::Fat12 => (true, true),
            FileSystemKind::Fat16 => {
                let value = u16_at(&bytes, 2);
                (value & 0x8000 != 0, value & 0x4000 != 0)
            }
            _ => {
                let value = u32_at(&bytes, 4);
                (value & 0x0800_0000 != 0, value & 0x0400_0000 != 0)
            }
        };
        Ok(match (clean, sound) {
            (_, false) => Some("the guest met errors of its medium"),
            (false, _) => Some("the guest has it in use, or did not take it off in order"),
            (true, true) => None,
        })
    }
}
