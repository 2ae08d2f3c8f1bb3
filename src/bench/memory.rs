//! The most memory that this process had between two moments, where the system tells (Linux).

use std::fs;

fn status(field: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib << 10)
}

/// Forgets the peak so far and gives what is in use now.
pub(super) fn start_peak() -> Option<u64> {
    // 5 resets the peak of resident memory, proc(5).
    fs::write("/proc/self/clear_refs", "5").ok()?;
    status("VmRSS")
}

/// How far the peak since [`start_peak`] was above what it gave.
pub(super) fn peak_above(before: u64) -> Option<u64> {
    Some(status("VmHWM")?.saturating_sub(before))
}
