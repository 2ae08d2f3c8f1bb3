//! LZNT1: chunks of up to 4 KiB, each with a header, of literal bytes and references backwards.

use super::super::bytes::u16_at;

const CHUNK: usize = 4096;

/// Unpacks into exactly `size` bytes; what the packed bytes do not say is zeros. `None`: malformed.
pub(super) fn decompress(packed: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(size);
    let mut at = 0;
    while out.len() < size && at + 2 <= packed.len() {
        let header = u16_at(packed, at);
        if header == 0 {
            break;
        }
        let len = usize::from(header & 0x0fff) + 1;
        let chunk = packed.get(at + 2..at + 2 + len)?;
        let start = out.len();
        if header & 0x8000 == 0 {
            out.extend_from_slice(chunk);
        } else {
            unpack(chunk, &mut out)?;
        }
        if out.len() - start > CHUNK {
            return None;
        }
        at += 2 + len;
        // A chunk that says less stands for zeros up to its end, unless it is the last.
        if at + 2 <= packed.len() && u16_at(packed, at) != 0 {
            out.resize(start + CHUNK, 0);
        }
    }
    out.resize(size, 0);
    Some(out)
}

fn unpack(chunk: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let start = out.len();
    let mut at = 0;
    while at < chunk.len() {
        let flags = chunk[at];
        at += 1;
        for bit in 0..8 {
            if at >= chunk.len() {
                return Some(());
            }
            if flags >> bit & 1 == 0 {
                out.push(chunk[at]);
                at += 1;
            } else {
                let token = usize::from(u16_at(chunk.get(at..at + 2)?, 0));
                at += 2;
                let done = out.len() - start;
                // The further into the chunk, the more bits tell how far back.
                let (mut shift, mut reach) = (12, done.checked_sub(1)?);
                while reach >= 16 {
                    shift -= 1;
                    reach >>= 1;
                }
                let back = (token >> shift) + 1;
                let len = (token & ((1 << shift) - 1)) + 3;
                if back > done || done + len > CHUNK {
                    return None;
                }
                for _ in 0..len {
                    out.push(out[out.len() - back]);
                }
            }
            if out.len() - start > CHUNK {
                return None;
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_specification_unpacks() {
        // [MS-XCA] 3.3: "F# F# G A A G F# E D E F# ..."
        let packed = [
            0x38, 0xb0, 0x88, 0x46, 0x23, 0x20, 0x00, 0x20, 0x47, 0x20, 0x41, 0x00, 0x10, 0xa2,
            0x47, 0x01, 0xa0, 0x45, 0x20, 0x44, 0x00, 0x08, 0x45, 0x01, 0x50, 0x79, 0x00, 0xc0,
            0x45, 0x20, 0x05, 0x24, 0x13, 0x88, 0x05, 0xb4, 0x02, 0x4a, 0x44, 0xef, 0x03, 0x58,
            0x02, 0x8c, 0x09, 0x16, 0x01, 0x48, 0x45, 0x00, 0xbe, 0x00, 0x9e, 0x00, 0x04, 0x01,
            0x18, 0x90, 0x00,
        ];
        let plain = "F# F# G A A G F# E D D E F# F# E E F# F# G A A G F# E D D E F# E D D E E F# D E F# G F# D E F# \
                     G F# E D E A F# F# G A A G F# E D D E F# E D D\0";
        let unpacked = decompress(&packed, plain.len()).expect("well-formed");
        assert_eq!(String::from_utf8_lossy(&unpacked), plain);
    }

    #[test]
    fn malformed_chunks_are_refused() {
        assert!(decompress(&[0x01, 0xb0, 0x01, 0x00], 4096).is_none(), "a reference cut off");
        let before_the_start = [0x02, 0xb0, 0x01, 0x00, 0x00];
        assert!(decompress(&before_the_start, 4096).is_none(), "a reference before the start");
        assert!(decompress(&[0xff, 0xbf, 0x00], 4096).is_none(), "longer than what is there");
    }
}
