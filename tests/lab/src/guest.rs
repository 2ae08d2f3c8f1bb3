//! Guests: writers whose places and bytes follow from a seed alone.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::cluster::Cluster;
use crate::control::GuestWrite;
use crate::disks::locked;
use crate::error::LabError;
use crate::model::Power;

/// A reproducible stream of numbers (SplitMix64); nothing here needs to be unpredictable.
#[derive(Debug, Clone)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound` (which is at least 1).
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(crate) fn guid(&mut self) -> Uuid {
        let bits = u128::from(self.next()) << 64 | u128::from(self.next());
        uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid()
    }
}

/// Unit in which content is generated.
const BLOCK: u64 = 4096;
/// Longest contiguous piece of a scattered write.
const PIECE: u64 = 1 << 20;

/// What a guest with this seed has at `offset`: half noise, half text, so that it compresses about two to one.
pub(crate) fn fill(seed: u64, offset: u64, buf: &mut [u8]) {
    let mut block = [0_u8; BLOCK as usize];
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let number = at / BLOCK;
        let mut chance = Chance::new(seed ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93));
        let (noise, text) = block.split_at_mut(BLOCK as usize / 2);
        for word in noise.chunks_exact_mut(8) {
            word.copy_from_slice(&chance.next().to_le_bytes());
        }
        let line = format!("guest {seed:016x} wrote block {number:012x}\n");
        for (to, from) in text.iter_mut().zip(line.bytes().cycle()) {
            *to = from;
        }
        let skip = (at % BLOCK) as usize;
        let n = (block.len() - skip).min(buf.len() - done);
        buf[done..done + n].copy_from_slice(&block[skip..skip + n]);
        done += n;
    }
}

/// The pieces `(disk place, offset, length)` of a write.
fn pieces(write: &GuestWrite, sizes: &[u64]) -> Vec<(usize, u64, u64)> {
    let mut chance = Chance::new(write.seed);
    let candidates: Vec<usize> =
        (0..sizes.len()).filter(|i| sizes[*i] > 0 && write.disk.is_none_or(|d| d == *i)).collect();
    let mut out = Vec::new();
    let mut left = write.bytes;
    let mut place = 0;
    while left > 0 && !candidates.is_empty() {
        let disk = candidates[chance.below(candidates.len() as u64) as usize];
        let (start, window) = write.window.unwrap_or((0, sizes[disk]));
        let window = window.min(sizes[disk].saturating_sub(start));
        if window == 0 {
            break;
        }
        let (offset, room) = if write.sequential {
            (place % window, window - place % window)
        } else {
            let offset = chance.below(window.div_ceil(BLOCK)) * BLOCK;
            (offset, window - offset)
        };
        let len = left.min(PIECE).min(room);
        out.push((disk, start + offset, len));
        place += len;
        left -= len;
    }
    out
}

/// What replication does to the disks of a VM that is off: it writes, and change tracking need not see it. Blocks.
pub(crate) fn apply_log(
    cluster: &Cluster,
    id: Uuid,
    bytes: u64,
    seed: u64,
) -> Result<u64, LabError> {
    let (io, disks) = cluster.read(|s| {
        let vm = s.vm(id)?;
        if vm.power.holds_disks() || vm.checkpoints.iter().any(|c| c.recovery) {
            return Err(LabError::refused(&vm.name, 32775, "the VM runs or is being backed up"));
        }
        Ok((vm.io.clone(), vm.disks.clone()))
    })?;
    let mut io = locked(&io);
    let sizes: Vec<u64> = disks.iter().map(|d| if d.is_virtual() { d.size } else { 0 }).collect();
    let all = GuestWrite { disk: None, ..GuestWrite::scattered("", bytes, seed) };
    let mut written = 0;
    io.open_all(&disks)?;
    for (place, offset, length) in pieces(&all, &sizes) {
        let mut data = vec![0; usize::try_from(length).unwrap_or(0)];
        fill(seed, offset, &mut data);
        io.write_unseen(disks[place].id, offset, &data)?;
        written += length;
    }
    io.close_all()?;
    Ok(written)
}

/// Writes now, and returns when all is written. The bytes reach change tracking with the same lock held.
pub(crate) async fn write(cluster: &Arc<Cluster>, write: GuestWrite) -> Result<u64, LabError> {
    let (vm, sizes) = cluster.read(|s| {
        let vm = s.find_vm(&write.vm)?;
        if vm.power != Power::Running {
            return Err(LabError::refused(&vm.name, 32775, "only running guests write"));
        }
        let sizes =
            vm.disks.iter().map(|d| if d.is_virtual() { d.size } else { 0 }).collect::<Vec<_>>();
        Ok((vm.id, sizes))
    })?;
    let plan = pieces(&write, &sizes);
    let cluster = cluster.clone();
    let inner = cluster.clone();
    cluster.blocking(move || write_pieces(&inner, vm, write.seed, &plan)).await?
}

fn write_pieces(
    cluster: &Cluster,
    vm: Uuid,
    seed: u64,
    plan: &[(usize, u64, u64)],
) -> Result<u64, LabError> {
    let mut buf = vec![0; PIECE as usize];
    let mut written = 0;
    for (place, offset, len) in plan {
        let part = &mut buf[..*len as usize];
        fill(seed, *offset, part);
        let (io, disk) = cluster.read(|s| {
            let vm = s.vm(vm)?;
            let disk = vm.disks.get(*place).ok_or_else(|| LabError::unknown("disk", place))?;
            Ok::<_, LabError>((vm.io.clone(), disk.id))
        })?;
        locked(&io).write(disk, *offset, part)?;
        written += len;
    }
    Ok(written)
}

/// Keeps writing at a rate until told to stop or the VM is gone. A guest that is not running waits.
pub(crate) async fn write_steadily(
    cluster: &Arc<Cluster>,
    vm: Uuid,
    bytes_per_second: u64,
    seed: u64,
    stop: &CancellationToken,
) -> Result<(), LabError> {
    const TICKS: u64 = 10;
    let mut tick = tokio::time::interval(Duration::from_millis(1000 / TICKS));
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut round = seed;
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = stop.cancelled() => return Ok(()),
            () = cluster.cancel.cancelled() => return Ok(()),
        }
        round = round.wrapping_add(1);
        let bytes = (bytes_per_second / TICKS).max(1);
        match write(cluster, GuestWrite::scattered(&vm.to_string(), bytes, round)).await {
            // Off, paused, or in the middle of going there.
            Ok(_) | Err(LabError::Refused { .. }) => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_does_not_depend_on_how_it_is_cut() {
        let mut whole = vec![0; 10_000];
        fill(3, 777, &mut whole);
        let mut cut = vec![0; 10_000];
        let (a, b) = cut.split_at_mut(4321);
        fill(3, 777, a);
        fill(3, 777 + 4321, b);
        assert_eq!(whole, cut);
    }

    #[test]
    fn a_write_covers_its_bytes_and_stays_in_its_window() {
        let mut write = GuestWrite::scattered("x", 5_000_000, 9);
        write.window = Some((BLOCK, 3 << 20));
        let pieces = pieces(&write, &[16 << 20, 0, 8 << 20]);
        assert_eq!(pieces.iter().map(|p| p.2).sum::<u64>(), 5_000_000);
        assert!(
            pieces.iter().all(|(d, o, l)| *d != 1 && *o >= BLOCK && o + l <= BLOCK + (3 << 20))
        );
    }
}
