//! Cylinders, heads and sectors of a disk, which old guests and Virtual PC go by.

/// The geometry in a footer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chs {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors of a track.
    pub sectors: u8,
}

impl Chs {
    /// The geometry that the specification's appendix computes for a disk of `size` bytes. It is at most
    /// as large as the disk, and most often a little smaller.
    pub fn of(size: u64) -> Self {
        let total = (size / 512).min(65535 * 16 * 255);
        let (sectors, heads, tracks) = if total >= 65535 * 16 * 63 {
            (255, 16, total / 255)
        } else {
            let tracks = total / 17;
            let heads = tracks.div_ceil(1024).max(4);
            if tracks >= heads * 1024 || heads > 16 {
                let tracks = total / 31;
                match tracks >= 16 * 1024 {
                    true => (63, 16, total / 63),
                    false => (31, 16, tracks),
                }
            } else {
                (17, heads, tracks)
            }
        };
        // At most 65535 cylinders, 16 heads and 255 sectors by what was done above.
        Self {
            cylinders: u16::try_from(tracks / heads).unwrap_or(u16::MAX),
            heads: heads as u8,
            sectors: sectors as u8,
        }
    }

    /// Bytes of a disk of this geometry.
    pub fn bytes(&self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors) * 512
    }
}

#[cfg(test)]
mod tests {
    use super::Chs;

    #[test]
    fn the_geometry_is_that_of_the_specification() {
        for (size, expected) in [
            (1_u64 << 20, (30, 4, 17)),
            (100 << 20, (1003, 12, 17)),
            (200 << 20, (825, 16, 31)),
            (1 << 30, (2080, 16, 63)),
            (40 << 30, (20560, 16, 255)),
        ] {
            let chs = Chs::of(size);
            assert_eq!((chs.cylinders, chs.heads, chs.sectors), expected, "{size}");
            assert!(chs.bytes() <= size, "{size}");
        }
        let largest = Chs::of(2040 << 30);
        assert_eq!((largest.cylinders, largest.heads, largest.sectors), (65535, 16, 255));
    }
}
