//! Changing a VHDX's bytes so that what was changed is reached.

/// Makes the checksums of headers and region tables right again, so that a change gets past them.
pub(crate) fn reseal(bytes: &mut [u8]) {
    let parts = [(64 << 10, 4096), (128 << 10, 4096), (192 << 10, 65536), (256 << 10, 65536)];
    for (at, len) in parts {
        if let Some(part) = bytes.get_mut(at..at + len) {
            part[4..8].fill(0);
            let crc = crc32c::crc32c(part);
            part[4..8].copy_from_slice(&crc.to_le_bytes());
        }
    }
}
