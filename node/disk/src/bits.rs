//! Sector bitmaps: 1 = the sector is in this file. VHDX puts the least significant bit first, VHD the most
//! significant one.

#[cfg(test)]
mod tests;

/// Calls `found(start, count, set)` for each run of equal bits among `count` bits from `first` on.
pub(crate) fn runs<E>(
    bits: &[u8],
    first: usize,
    count: usize,
    mut found: impl FnMut(usize, usize, bool) -> Result<(), E>,
) -> Result<(), E> {
    let end = first + count;
    let mut at = first;
    while at < end {
        let set = bits[at / 8] >> (at % 8) & 1 == 1;
        let start = at;
        at = run_end(bits, at, end, set);
        found(start, at - start, set)?;
    }
    Ok(())
}

/// The first bit after `at` that differs from `set`, or `end`.
fn run_end(bits: &[u8], mut at: usize, end: usize, set: bool) -> usize {
    let whole = if set { u64::MAX } else { 0 };
    while at < end {
        let byte = at / 8;
        if at.is_multiple_of(64) && at + 64 <= end {
            let word = bits[byte..byte + 8].try_into().expect("eight bytes");
            let differing = u64::from_le_bytes(word) ^ whole;
            if differing != 0 {
                return at + differing.trailing_zeros() as usize;
            }
            at += 64;
        } else if (bits[byte] >> (at % 8) & 1 == 1) == set {
            at += 1;
        } else {
            return at;
        }
    }
    end
}

/// Sets `count` bits from `first` on.
pub(crate) fn set(bits: &mut [u8], first: usize, count: usize) {
    let mut at = first;
    let end = first + count;
    while at < end {
        if at.is_multiple_of(8) && at + 8 <= end {
            bits[at / 8] = 0xff;
            at += 8;
        } else {
            bits[at / 8] |= 1 << (at % 8);
            at += 1;
        }
    }
}

/// [`runs`] of bits of which the most significant comes first. `bits` are turned round in place.
pub(crate) fn msb_runs<E>(
    bits: &mut [u8],
    first: usize,
    count: usize,
    found: impl FnMut(usize, usize, bool) -> Result<(), E>,
) -> Result<(), E> {
    bits.iter_mut().for_each(|byte| *byte = byte.reverse_bits());
    runs(bits, first, count, found)
}

/// Sets `count` bits from `first` on, the most significant of each byte first.
pub(crate) fn set_msb(bits: &mut [u8], first: usize, count: usize) {
    bits.iter_mut().for_each(|byte| *byte = byte.reverse_bits());
    set(bits, first, count);
    bits.iter_mut().for_each(|byte| *byte = byte.reverse_bits());
}
