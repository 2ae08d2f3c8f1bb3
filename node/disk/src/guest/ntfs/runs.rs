//! Mapping pairs: which clusters an attribute has.

use super::super::GuestError;
use super::Ntfs;
use super::record::NonResident;

/// A run of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// First cluster in the attribute.
    pub(super) vcn: u64,
    pub(super) count: u64,
    /// First cluster on the volume; `None`: a hole.
    pub(super) lcn: Option<u64>,
}

impl Ntfs {
    /// All runs of an attribute, checked to follow each other and to be on the volume.
    pub(super) fn runs(&self, body: &NonResident) -> Result<Vec<Run>, GuestError> {
        let mut out = Vec::new();
        for (lowest, highest, encoded) in &body.runs {
            decode(encoded, *lowest, *highest, self.boot.clusters, &mut out)?;
        }
        Ok(out)
    }
}

pub(super) fn decode(
    encoded: &[u8],
    lowest: u64,
    highest: u64,
    clusters: u64,
    out: &mut Vec<Run>,
) -> Result<(), GuestError> {
    let bad = |detail: String| GuestError::damaged("the cluster runs of a file", detail);
    let (mut at, mut vcn, mut lcn) = (0, lowest, 0_i64);
    loop {
        let header = encoded.get(at).copied().unwrap_or(0);
        if header == 0 {
            break;
        }
        let (length, offset) = (usize::from(header & 15), usize::from(header >> 4));
        let bytes = encoded
            .get(at + 1..at + 1 + length + offset)
            .filter(|_| (1..=8).contains(&length) && offset <= 8)
            .ok_or_else(|| bad("they end in the middle of a run".into()))?;
        let count = number(&bytes[..length]);
        let count = u64::try_from(count).ok().filter(|c| *c > 0);
        let end = count.and_then(|c| vcn.checked_add(c));
        let (Some(count), Some(end)) = (count, end) else {
            return Err(bad("a run has an impossible length".into()));
        };
        let place = if offset == 0 {
            None
        } else {
            lcn = lcn
                .checked_add(number(&bytes[length..]))
                .ok_or_else(|| bad("a run is nowhere".into()))?;
            let place = u64::try_from(lcn).ok();
            Some(place.filter(|p| p.checked_add(count).is_some_and(|e| e <= clusters)).ok_or_else(
                || {
                    bad(format!(
                        "a run of {count} clusters at {lcn} is not on the volume of {clusters}"
                    ))
                },
            )?)
        };
        out.push(Run { vcn, count, lcn: place });
        vcn = end;
        at += 1 + length + offset;
    }
    // An empty attribute says that its last cluster is -1.
    if vcn != highest.wrapping_add(1) {
        return Err(bad(format!(
            "they end at cluster {vcn}, but their attribute ends at {}",
            highest.wrapping_add(1)
        )));
    }
    Ok(())
}

/// A signed little-endian number of up to eight bytes.
fn number(bytes: &[u8]) -> i64 {
    let sign = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
    let mut all = [sign; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    i64::from_le_bytes(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_relative_signed_and_may_be_holes() {
        // 0x18 clusters at 0x5634; 0x10 of nothing; 4 clusters at 0x5634 - 0x20.
        let encoded = [0x21, 0x18, 0x34, 0x56, 0x01, 0x10, 0x11, 4, 0xe0, 0];
        let mut runs = Vec::new();
        decode(&encoded, 0, 0x2b, 1 << 20, &mut runs).expect("decodes");
        assert_eq!(
            runs,
            [
                Run { vcn: 0, count: 0x18, lcn: Some(0x5634) },
                Run { vcn: 0x18, count: 0x10, lcn: None },
                Run { vcn: 0x28, count: 4, lcn: Some(0x5614) },
            ]
        );
        assert!(decode(&encoded, 0, 0x2c, 1 << 20, &mut Vec::new()).is_err(), "one is missing");
        assert!(decode(&encoded, 0, 0x2b, 0x5635, &mut Vec::new()).is_err(), "off the volume");
        assert!(decode(&encoded[..2], 0, 0x2b, 1 << 20, &mut Vec::new()).is_err(), "cut");
    }
}
