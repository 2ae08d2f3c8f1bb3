//! Reads without the system's cache want offset, length and memory aligned to sectors.

#![cfg_attr(not(any(windows, test)), allow(dead_code))] // only Windows reads so; tested everywhere

use std::io;

/// Sectors of all volumes that Hyper-V keeps disks on are this large or a whole fraction of it.
pub(crate) const SECTOR: usize = 4096;
/// Most that is read by way of a buffer of our own at once.
const BOUNCE: usize = 1 << 20;

/// Reads at any offset into any memory through `read`, which takes aligned ones only. Like `pread` it may give less than
/// asked, and 0 only at the end of the file.
pub(crate) fn read_at(
    buf: &mut [u8],
    offset: u64,
    read: impl Fn(&mut [u8], u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let sector = SECTOR as u64;
    let in_place = buf.as_ptr().addr().is_multiple_of(SECTOR) && offset.is_multiple_of(sector);
    let whole = buf.len() / SECTOR * SECTOR;
    if in_place && whole > 0 {
        return read(&mut buf[..whole], offset);
    }
    let start = offset / sector * sector;
    let skip = (offset - start) as usize;
    let wanted = (skip + buf.len()).next_multiple_of(SECTOR).min(BOUNCE);
    let mut memory = vec![0; wanted + SECTOR];
    let from = memory.as_ptr().align_offset(SECTOR);
    let aligned = &mut memory[from..from + wanted];
    let got = read(aligned, start)?;
    let useful = got.saturating_sub(skip).min(buf.len());
    buf[..useful].copy_from_slice(&aligned[skip..skip + useful]);
    Ok(useful)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of this many bytes, each a function of its place, that refuses what is not aligned.
    fn strict(len: u64) -> impl Fn(&mut [u8], u64) -> io::Result<usize> {
        move |buf, offset| {
            assert_eq!(buf.as_ptr().addr() % SECTOR, 0);
            assert_eq!((offset % SECTOR as u64, buf.len() % SECTOR), (0, 0));
            let count = (len.saturating_sub(offset) as usize).min(buf.len());
            for (i, byte) in buf[..count].iter_mut().enumerate() {
                *byte = byte_at(offset + i as u64);
            }
            Ok(count)
        }
    }

    fn byte_at(at: u64) -> u8 {
        (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
    }

    #[test]
    fn any_range_is_read_through_aligned_reads() {
        let len = 3 * BOUNCE as u64 + 777;
        let read = strict(len);
        for offset in [0, 1, 511, 4095, 4096, 8192, 100_000, len - 5000, len - 1, len, len + 9000] {
            for want in [0, 1, 512, 4096, 4097, 70_000, 2 * BOUNCE + 3] {
                let mut memory = vec![0xee; want + 8];
                for shift in [0, 1, 8] {
                    let buf = &mut memory[shift..(shift + want).min(want + 8)];
                    let mut done = 0;
                    while done < buf.len() {
                        let at = offset + done as u64;
                        let n = read_at(&mut buf[done..], at, &read).expect("read");
                        if n == 0 {
                            break;
                        }
                        for (i, byte) in buf[done..done + n].iter().enumerate() {
                            assert_eq!(*byte, byte_at(at + i as u64), "{offset} {want} {shift}");
                        }
                        done += n;
                    }
                    let there = len.saturating_sub(offset).min(buf.len() as u64) as usize;
                    assert_eq!(done, there, "{offset} {want} {shift}");
                }
            }
        }
    }
}
