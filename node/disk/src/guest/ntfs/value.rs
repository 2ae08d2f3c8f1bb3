//! The bytes of an attribute.

use super::super::GuestError;
use super::super::file_system::fill;
use super::Ntfs;
use super::compress::decompress;
use super::record::{Attribute, Body, NonResident};
use super::runs::Run;

impl Ntfs {
    /// A whole value of at most `limit` bytes: structures of the file system itself.
    pub(super) fn value(&self, attribute: &Attribute, limit: u64) -> Result<Vec<u8>, GuestError> {
        let size = attribute.size();
        if size > limit {
            return Err(GuestError::damaged(
                "a file of NTFS itself",
                format!("it has {size} bytes, at most {limit} are expected"),
            ));
        }
        match &attribute.body {
            Body::Resident(value) => Ok(value.clone()),
            Body::NonResident(body) => {
                let mut bytes = vec![0; size as usize];
                self.plain(&self.runs(body)?, body, 0, &mut bytes, true)?;
                Ok(bytes)
            }
        }
    }

    /// Content of a file.
    pub(super) fn read_content(
        &self,
        attribute: &Attribute,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<usize, GuestError> {
        if let Some(reason) = attribute.why_unreadable() {
            return Err(GuestError::unsupported("the content of this file", reason));
        }
        let len = attribute.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let buf = &mut buf[..len];
        match &attribute.body {
            Body::Resident(value) => buf.copy_from_slice(&value[offset as usize..][..len]),
            Body::NonResident(body) => {
                let runs = self.runs(body)?;
                if attribute.is_compressed() {
                    self.compressed(&runs, body, offset, buf)?;
                } else {
                    self.plain(&runs, body, offset, buf, false)?;
                }
            }
        }
        Ok(len)
    }

    /// What was never written reads as zeros, whatever is in its clusters.
    pub(super) fn plain(
        &self,
        runs: &[Run],
        body: &NonResident,
        offset: u64,
        buf: &mut [u8],
        structure: bool,
    ) -> Result<(), GuestError> {
        let cluster = u64::from(self.boot.cluster);
        let pieces: Vec<(u64, u64, Option<u64>)> = runs
            .iter()
            .map(|r| (r.vcn * cluster, r.count * cluster, r.lcn.map(|l| l * cluster)))
            .collect();
        let written = body.initialized.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (head, tail) = buf.split_at_mut(written);
        tail.fill(0);
        fill(offset, head, &pieces, |place, part| {
            if structure { self.window.read(place, part) } else { self.window.content(place, part) }
        })
    }

    /// Compression units: all clusters there: stored plainly; some: compressed; none: zeros.
    fn compressed(
        &self,
        runs: &[Run],
        body: &NonResident,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), GuestError> {
        let cluster = u64::from(self.boot.cluster);
        let unit = 1_u64
            .checked_shl(body.unit.into())
            .and_then(|clusters| clusters.checked_mul(cluster))
            .filter(|unit| body.unit > 0 && *unit <= 64 << 20)
            .ok_or_else(|| {
                GuestError::damaged("a compressed file", "its compression unit is impossible")
            })?;
        let clusters = unit / cluster;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let first = at / unit * clusters;
            let within = (at % unit) as usize;
            let len = (buf.len() - done).min(unit as usize - within);
            let part = &mut buf[done..done + len];
            let there: u64 = runs
                .iter()
                .filter(|r| r.lcn.is_some())
                .map(|r| {
                    let (start, end) =
                        (r.vcn.max(first), (r.vcn + r.count).min(first.saturating_add(clusters)));
                    end.saturating_sub(start)
                })
                .sum();
            if there == 0 || at >= body.initialized {
                part.fill(0);
            } else if there == clusters {
                self.plain(runs, body, at, part, false)?;
            } else {
                let mut packed = vec![0; (there * cluster) as usize];
                let whole = NonResident { initialized: u64::MAX, ..body.clone() };
                self.plain(runs, &whole, first * cluster, &mut packed, false)?;
                let plain = decompress(&packed, unit as usize).ok_or_else(|| {
                    GuestError::damaged(
                        "a compressed file",
                        "a compression unit cannot be unpacked",
                    )
                })?;
                part.copy_from_slice(&plain[within..within + len]);
                let written = body.initialized.saturating_sub(at).min(len as u64) as usize;
                part[written..].fill(0);
            }
            done += len;
        }
        Ok(())
    }
}
