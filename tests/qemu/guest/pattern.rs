//! Which bytes a record writes, and where: all of it follows from a seed and a sequence number.

/// Unit of comparison: a block is there as a whole or not at all.
pub(crate) const BLOCK: usize = 4096;
/// Blocks of a slot; a record begins at a slot's first block.
pub(crate) const SLOT: u32 = 16;

/// The generator of everything (SplitMix64).
struct Mix(u64);

impl Mix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

fn seeded(seed: u64, sequence: u64, salt: u64) -> Mix {
    let mut mix = Mix(seed);
    let (a, b) = (mix.next(), mix.next());
    Mix(a ^ sequence.wrapping_mul(0xd6e8_feb8_6659_fd93) ^ b.wrapping_mul(salt | 1 << 32))
}

/// Where a record goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) disk: u32,
    pub(crate) slot: u32,
    pub(crate) blocks: u32,
}

/// The place of a record on disks with so many slots each.
pub(crate) fn place(seed: u64, sequence: u64, slots: &[u32]) -> Place {
    let mut mix = seeded(seed, sequence, 1);
    let mut pick = |below: u32| (mix.next() % u64::from(below.max(1))) as u32;
    let disk = pick(slots.len() as u32);
    let of_disk = slots.get(disk as usize).copied().unwrap_or(1);
    Place { disk, slot: pick(of_disk), blocks: 1 + pick(SLOT) }
}

/// The content of one block of a record. The sequence stands in front, so that a wrong block says whose it is.
pub(crate) fn block(seed: u64, sequence: u64, index: u32) -> [u8; BLOCK] {
    let mut mix = seeded(seed, sequence, 2 + u64::from(index));
    let mut bytes = [0; BLOCK];
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&mix.next().to_le_bytes());
    }
    bytes[..8].copy_from_slice(&sequence.to_le_bytes());
    bytes
}

/// A checksum of a journal record: finds torn and stale ones.
pub(crate) fn check(bytes: &[u8]) -> u64 {
    let mut mix = Mix(bytes.len() as u64);
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        mix.0 ^= u64::from_le_bytes(word);
        mix.0 = mix.next();
    }
    mix.next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_follows_from_seed_and_sequence() {
        assert_eq!(block(1, 2, 3), block(1, 2, 3));
        for other in [block(2, 2, 3), block(1, 3, 3), block(1, 2, 4)] {
            assert_ne!(block(1, 2, 3)[8..], other[8..]);
        }
        for sequence in 0..1000 {
            let place = place(7, sequence, &[10, 3]);
            assert!(place.slot < [10, 3][place.disk as usize], "{place:?}");
            assert!((1..=SLOT).contains(&place.blocks), "{place:?}");
        }
    }

    #[test]
    fn a_changed_bit_changes_the_checksum() {
        let mut bytes = [7; 48];
        let before = check(&bytes);
        bytes[40] ^= 1;
        assert_ne!(before, check(&bytes));
    }
}
