use proptest::prelude::*;

use super::Overlay;
use crate::vhdx::LOG_SECTOR;

const SECTORS: usize = 24;

proptest! {
    #[test]
    fn later_patches_hide_earlier_ones(
        patches in prop::collection::vec((0..SECTORS, 1..9_usize, 0..255_u8), 0..20),
        from in 0..SECTORS * LOG_SECTOR,
        len in 0..3 * LOG_SECTOR,
    ) {
        let mut model = vec![255; SECTORS * LOG_SECTOR];
        let mut overlay = Overlay::default();
        for (sector, count, fill) in patches {
            let start = sector * LOG_SECTOR;
            // Fill 0 to 127 is a data sector, the rest are zeros.
            if fill < 128 {
                overlay.put_sector(start as u64, Box::new([fill; LOG_SECTOR]));
                model[start..start + LOG_SECTOR].fill(fill);
            } else {
                let end = (start + count * LOG_SECTOR).min(model.len());
                overlay.put_zeros(start as u64, end as u64);
                model[start..end].fill(0);
            }
        }
        let to = (from + len).min(model.len());
        let mut seen = vec![255; to - from];
        overlay.apply(from as u64, &mut seen);
        prop_assert!(seen == model[from..to]);
    }
}
