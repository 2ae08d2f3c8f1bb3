//! Which blocks a file has.

use super::super::GuestError;
use super::super::bytes::{slice, u16_at, u32_at};
use super::inode::Inode;
use super::superblock::checksum;
use super::{Ext, Run};

/// Deepest extent tree that Linux makes.
const MAX_DEPTH: u16 = 5;
/// Runs of a file that are kept in memory.
const MAX_RUNS: usize = 4 << 20;

fn bad(detail: impl Into<String>) -> GuestError {
    GuestError::damaged("the block map of a file", detail)
}

impl Ext {
    /// The runs of a file, in its order. Holes are left out.
    pub(super) fn runs(&self, inode: &Inode) -> Result<Vec<Run>, GuestError> {
        let mut out = Vec::new();
        if inode.has_extents() {
            let root = inode.block_area();
            let depth = u16_at(root, 6);
            if depth > MAX_DEPTH {
                return Err(bad(format!("its tree of extents claims depth {depth}")));
            }
            self.node(inode, root, depth, &mut out)?;
        } else {
            self.lists(inode, &mut out)?;
        }
        Ok(out)
    }

    /// A node of the tree of extents.
    fn node(
        &self,
        inode: &Inode,
        node: &[u8],
        depth: u16,
        out: &mut Vec<Run>,
    ) -> Result<(), GuestError> {
        let count = usize::from(u16_at(node, 2));
        if u16_at(node, 0) != 0xf30a || u16_at(node, 6) != depth {
            return Err(bad("a node of its tree of extents is none"));
        }
        let entries = slice(node, 12, count * 12)
            .ok_or_else(|| bad("a node of its tree of extents is cut off"))?;
        for entry in entries.chunks_exact(12) {
            let logical = u64::from(u32_at(entry, 0));
            if depth == 0 {
                let len = u16_at(entry, 4);
                let physical = u64::from(u16_at(entry, 6)) << 32 | u64::from(u32_at(entry, 8));
                let (count, unwritten) = if len > 0x8000 {
                    (u64::from(len - 0x8000), true)
                } else {
                    (len.into(), false)
                };
                self.push(out, Run { logical, count, physical, unwritten })?;
            } else {
                let below = u64::from(u16_at(entry, 8)) << 32 | u64::from(u32_at(entry, 4));
                let block = self.block(below)?;
                if let Some(seed) = self.superblock.seed {
                    let tail = 12 + 12 * usize::from(u16_at(&block, 4));
                    let summed = block.get(..tail).unwrap_or_default();
                    if checksum(inode.seed(seed), summed) != u32_at(&block, tail) {
                        return Err(bad(format!(
                            "the checksum of its extents in block {below} is wrong"
                        )));
                    }
                }
                self.node(inode, &block, depth - 1, out)?;
            }
        }
        Ok(())
    }

    /// Adds a run, which must be behind the last one and on the volume.
    fn push(&self, out: &mut Vec<Run>, run: Run) -> Result<(), GuestError> {
        let end = run.physical.checked_add(run.count).filter(|e| *e <= self.superblock.blocks);
        if run.count == 0 || run.physical == 0 || end.is_none() {
            return Err(bad(format!(
                "{} blocks at {} are not on the volume",
                run.count, run.physical
            )));
        }
        if out.len() >= MAX_RUNS {
            return Err(bad(format!("it is in more than {MAX_RUNS} pieces")));
        }
        match out.last_mut() {
            Some(last) if last.logical + last.count > run.logical => {
                return Err(bad("its runs overlap"));
            }
            Some(last)
                if last.logical + last.count == run.logical
                    && last.physical + last.count == run.physical
                    && last.unwritten == run.unwritten =>
            {
                last.count += run.count;
            }
            _ => out.push(run),
        }
        Ok(())
    }

    /// The older way: 12 blocks, then one list of blocks, a list of lists, and a list of those.
    fn lists(&self, inode: &Inode, out: &mut Vec<Run>) -> Result<(), GuestError> {
        let area = inode.block_area();
        let blocks = inode.size.div_ceil(self.superblock.block);
        let mut logical = 0;
        for slot in 0..15 {
            if logical >= blocks {
                break;
            }
            let depth = slot_depth(slot);
            self.list(u32_at(area, slot * 4), depth, blocks, &mut logical, out)?;
        }
        if logical < blocks {
            return Err(bad("it is longer than its lists can say"));
        }
        Ok(())
    }

    fn list(
        &self,
        block: u32,
        depth: u32,
        blocks: u64,
        logical: &mut u64,
        out: &mut Vec<Run>,
    ) -> Result<(), GuestError> {
        let per_block = self.superblock.block / 4;
        if block == 0 {
            *logical += per_block.pow(depth);
            return Ok(());
        }
        if depth == 0 {
            self.push(
                out,
                Run { logical: *logical, count: 1, physical: block.into(), unwritten: false },
            )?;
            *logical += 1;
            return Ok(());
        }
        let list = self.block(block.into())?;
        for entry in list.chunks_exact(4) {
            if *logical >= blocks {
                break;
            }
            self.list(u32_at(entry, 0), depth - 1, blocks, logical, out)?;
        }
        Ok(())
    }
}

fn slot_depth(slot: usize) -> u32 {
    match slot {
        12 => 1,
        13 => 2,
        14 => 3,
        _ => 0,
    }
}
