//! A masked disk is its disk with zeros in the masked ranges, and never reads them.

use std::sync::{Arc, Mutex};

use outrider_disk::{ByteRange, DiskError, DiskInfo, MaskedDisk, RangeSet, ReadDisk};
use proptest::prelude::*;

const SIZE: usize = 300;

/// Every byte is its offset, never zero; remembers what was read.
struct Counted {
    info: DiskInfo,
    read: Mutex<RangeSet>,
}

impl Counted {
    fn byte(at: usize) -> u8 {
        (at % 255) as u8 + 1
    }
}

impl ReadDisk for Counted {
    fn info(&self) -> &DiskInfo {
        &self.info
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        assert!(offset as usize + buf.len() <= SIZE, "within the disk");
        self.read.lock().expect("no panic").insert(offset, buf.len() as u64);
        for (i, byte) in buf.iter_mut().enumerate() {
            *byte = Self::byte(offset as usize + i);
        }
        Ok(())
    }
    fn allocated(&self) -> Result<RangeSet, DiskError> {
        Ok(RangeSet::single(0, SIZE as u64))
    }
}

proptest! {
    #[test]
    fn masked_bytes_are_zeros_that_nobody_reads(
        ranges in prop::collection::vec((0..400_u64, 0..60_u64), 0..6),
        reads in prop::collection::vec((0..SIZE, 0..SIZE), 1..5),
    ) {
        let masked: RangeSet = ranges.into_iter().map(|(s, l)| ByteRange::new(s, l)).collect();
        let info = DiskInfo::raw(SIZE as u64);
        let below = Arc::new(Counted { info, read: Mutex::default() });
        let disk = MaskedDisk::new(below.clone(), masked.clone());
        for (start, len) in reads {
            let mut buf = vec![0xee; len.min(SIZE - start)];
            disk.read_at(start as u64, &mut buf).expect("within the disk");
            for (i, byte) in buf.iter().enumerate() {
                let at = start + i;
                let expected = if masked.contains(at as u64) { 0 } else { Counted::byte(at) };
                prop_assert_eq!(*byte, expected, "at {}", at);
            }
        }
        prop_assert!(below.read.lock().expect("no panic").intersect(&masked).is_empty());
        let allocated = disk.allocated().expect("known");
        prop_assert!(allocated.intersect(&masked).is_empty());
        prop_assert_eq!(allocated.total_len() + disk.masked().total_len(), SIZE as u64);
    }
}
