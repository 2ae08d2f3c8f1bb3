//! Page and swap files left out by policy (P8): which ranges of which disk, and what that means for what is read.
//!
//! A point holds its disks *as if* the excluded ranges were zeros: chunks that lie in them are holes, a chunk that is
//! excluded in part has zeros there, and every comparison sees the same ([`MaskedDisk`]). What is excluded may differ
//! from point to point; [`to_look_at`](crate::pipeline::plan::to_look_at) is the rule that keeps incrementals exact then (docs/decisions/0008).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use outrider_disk::guest::Limits;
use outrider_disk::guest::page_files::{self, Search};
use outrider_disk::{ByteRange, DiskError, DiskInfo, MaskedDisk, RangeSet, ReadDisk};
use outrider_proto::rpc::Consistency;

use super::{JobContext, JobError};
use crate::lease::Lease;

/// What looking into one guest disk may cost: a root directory, a file's runs, `/etc/fstab`. Whatever needs more is not
/// looked into, and nothing of it is left out.
const LIMITS: Limits = Limits { bytes: 64 << 20, time: Some(Duration::from_secs(15)) };
/// Sentences about one disk that are kept with the point.
const MAX_REASONS: usize = 32;
/// Memory that a search takes from the pool's budget.
const MEMORY: usize = 4 << 20;

/// What is left out of a VM's disks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Exclusion {
    /// A disk each, in order.
    pub(super) ranges: Vec<RangeSet>,
    /// What was left out, what was kept and why: shown with the point.
    pub(super) reasons: Vec<String>,
}

impl Exclusion {
    /// Nothing of any disk.
    pub(super) fn nothing(disks: usize) -> Self {
        Self { ranges: vec![RangeSet::new(); disks], reasons: Vec::new() }
    }

    /// As the journal keeps it.
    pub(super) fn journalled(&self) -> Vec<Vec<(u64, u64)>> {
        if self.ranges.iter().all(RangeSet::is_empty) {
            return Vec::new();
        }
        self.ranges.iter().map(|r| r.iter().map(|r| (r.start, r.len)).collect()).collect()
    }
}

/// Looks into the disks of a checkpoint. Anything that goes wrong leaves everything in.
///
/// # Errors
/// The lease is over, or a worker failed.
pub(super) async fn find(
    context: &JobContext,
    gives: Consistency,
    carries_memory: bool,
    disks: Vec<(String, Arc<dyn ReadDisk>)>,
) -> Result<Exclusion, JobError> {
    if gives == Consistency::SavedState || carries_memory {
        let reason = "page files are kept: the point holds the VM's memory, which they belong to";
        return Ok(Exclusion {
            reasons: vec![reason.to_owned()],
            ..Exclusion::nothing(disks.len())
        });
    }
    let mut searches = Vec::with_capacity(disks.len());
    for (slot, disk) in disks {
        let leased: Arc<dyn ReadDisk> = Arc::new(Leased { disk, lease: context.lease.clone() });
        let (found, _budget) =
            context.pool.read(MEMORY, move || page_files::search(leased, LIMITS)).await?;
        context.lease.check()?;
        searches.push((slot, found));
    }
    Ok(combine(searches))
}

/// Puts the disks' findings together: a guest that is hibernated on one disk needs the page files of all.
fn combine(searches: Vec<(String, Search)>) -> Exclusion {
    let hibernated = searches.iter().any(|(_, s)| s.hibernated);
    let mut out = Exclusion::default();
    for (slot, search) in searches {
        out.reasons
            .extend(search.kept.iter().take(MAX_REASONS).map(|k| format!("disk {slot}: {k}")));
        if hibernated {
            out.ranges.push(RangeSet::new());
            continue;
        }
        out.reasons.extend(search.found.iter().take(MAX_REASONS).map(|f| {
            format!("disk {slot}: {} is left out, {} bytes", f.what, f.ranges.total_len())
        }));
        out.ranges.push(search.ranges());
    }
    out
}

/// A disk as a point holds it.
pub(super) fn masked(disk: Arc<dyn ReadDisk>, excluded: &[(u64, u64)]) -> Arc<dyn ReadDisk> {
    if excluded.is_empty() {
        return disk;
    }
    let ranges = excluded.iter().map(|(start, len)| ByteRange::new(*start, *len)).collect();
    Arc::new(MaskedDisk::new(disk, ranges))
}

/// A disk that stops giving bytes when the lease is over, so that a search ends at once.
struct Leased {
    disk: Arc<dyn ReadDisk>,
    lease: Lease,
}

impl ReadDisk for Leased {
    fn info(&self) -> &DiskInfo {
        self.disk.info()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.lease.check().map_err(|lost| DiskError::Io {
            path: std::path::PathBuf::new(),
            op: "go on reading",
            source: io::Error::other(lost.to_string()),
        })?;
        self.disk.read_at(offset, buf)
    }

    fn allocated(&self) -> Result<RangeSet, DiskError> {
        self.disk.allocated()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_disk::guest::page_files::PageFile;

    fn found(what: &str, start: u64, len: u64) -> Search {
        let file = PageFile { volume: 1, what: what.into(), ranges: RangeSet::single(start, len) };
        Search { found: vec![file], ..Search::default() }
    }

    #[test]
    fn a_guest_hibernated_on_one_disk_keeps_the_page_files_of_all() {
        let asleep = Search { kept: vec!["asleep".into()], hibernated: true, ..Search::default() };
        let out = combine(vec![("a".into(), found("pagefile.sys", 10, 5)), ("b".into(), asleep)]);
        assert_eq!(out.ranges, [RangeSet::new(), RangeSet::new()]);
        assert_eq!(out.reasons, ["disk b: asleep"]);

        let out = combine(vec![("a".into(), found("pagefile.sys", 10, 5))]);
        assert_eq!(out.ranges, [RangeSet::single(10, 5)]);
        assert_eq!(out.reasons, ["disk a: pagefile.sys is left out, 5 bytes"]);
    }
}
