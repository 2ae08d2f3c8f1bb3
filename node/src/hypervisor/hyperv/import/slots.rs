//! Which restored file goes where in a definition, and what is taken out of it: pure.
//!
//! A definition may name disks that its recovery point does not hold: shared ones, pass-through disks, whatever a checkpoint
//! leaves out. They are taken out. No file is in two places, and every restored file is in one.

use std::path::{Path, PathBuf};

use outrider_wmi::{Object, Value};

use super::odd;
use crate::hypervisor::HypervisorError;
use crate::hypervisor::hyperv::disks::{PASS_THROUGH, described};
use crate::hypervisor::hyperv::snapshot::is_virtual_disk;
use crate::hypervisor::hyperv::wql;

/// What becomes of the disks of a definition.
#[derive(Debug, Default)]
pub(super) struct Assigned<'a> {
    /// Settings with the restored files in them.
    pub(super) set: Vec<Object>,
    /// Settings of disks that the recovery point does not hold.
    pub(super) out: Vec<&'a Object>,
}

/// Puts each of `files` (by slot) in its place. With a new GUID the disk part of a slot may be new, too; controller and
/// location are not: such a slot takes the file of its place, if no other slot and no other file may be meant. With
/// `others_stay`, what has no file is left as it is.
pub(super) fn assign<'a>(
    parts: &'a [Object],
    files: &[(String, PathBuf)],
    others_stay: bool,
) -> Result<Assigned<'a>, HypervisorError> {
    let disks: Vec<&Object> = parts.iter().filter(|o| is_virtual_disk(o)).collect();
    let mut left: Vec<&(String, PathBuf)> = files.iter().collect();
    let mut found: Vec<(&Object, Option<&Path>)> = Vec::new();
    for disk in &disks {
        let exact = left.iter().position(|(slot, _)| slot.eq_ignore_ascii_case(slot_of(disk)));
        found.push((disk, exact.map(|at| left.remove(at).1.as_path())));
    }
    // No checkpoint holds these, so no restored file can be meant for them.
    let uncapturable: Vec<String> = described(parts)
        .into_iter()
        .filter(|d| d.uncapturable.is_some())
        .map(|d| d.slot.to_ascii_lowercase())
        .collect();
    let is_open = |(disk, file): &(&Object, Option<&Path>)| {
        file.is_none() && !uncapturable.contains(&slot_of(disk).to_ascii_lowercase())
    };
    let places: Vec<String> =
        found.iter().filter(|f| is_open(f)).map(|(d, _)| place(slot_of(d))).collect();
    let once = |all: &[String], wanted: &String| all.iter().filter(|p| *p == wanted).count() == 1;
    let of_files: Vec<String> = left.iter().map(|(slot, _)| place(slot)).collect();
    for disk in &mut found {
        let wanted = place(slot_of(disk.0));
        if is_open(disk) && once(&places, &wanted) && once(&of_files, &wanted) {
            let file = left.iter().position(|(slot, _)| place(slot) == wanted);
            disk.1 = file.map(|file| left.remove(file).1.as_path());
        }
    }
    if !left.is_empty() {
        let files: Vec<String> = left.iter().map(|(_, f)| f.display().to_string()).collect();
        return Err(odd(
            "set the disks of the planned VM",
            &format!(
                "no place of the definition is surely that of the restored {}; restore with the VM's own GUID, or export \
                 the disks",
                files.join(", ")
            ),
        ));
    }
    let mut assigned = Assigned::default();
    for (disk, file) in found {
        match file {
            Some(file) => {
                let mut disk = disk.clone();
                disk.set("HostResource", vec![file.display().to_string()]);
                assigned.set.push(disk);
            }
            None => assigned.out.push(disk),
        }
    }
    assigned.out.extend(parts.iter().filter(|o| o.str("ResourceSubType") == Some(PASS_THROUGH)));
    if others_stay {
        assigned.out.clear();
    }
    Ok(assigned)
}

/// The sentence for a disk that was taken out.
pub(super) fn told(disk: &Object, of: &str) -> String {
    let file = disk.array("HostResource").first().and_then(Value::as_str).unwrap_or_default();
    format!(
        "the recovery point does not hold the disk {file:?} (slot {}) of the definition: it was taken out of {of}; attach it \
         again if it is needed",
        slot_of(disk)
    )
}

fn slot_of(disk: &Object) -> &str {
    disk.str("InstanceID").and_then(wql::slot).unwrap_or_default()
}

/// Controller and location.
fn place(slot: &str) -> String {
    slot.split_once('\\').map(|(_, place)| place).unwrap_or(slot).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::hyperv::wql::{RESOURCE, STORAGE};

    fn disk(slot: &str, file: &str) -> Object {
        Object::new(STORAGE, slot)
            .with("InstanceID", format!(r"Microsoft:VM\{slot}"))
            .with("ResourceType", 31_u16)
            .with("ResourceSubType", "Microsoft:Hyper-V:Virtual Hard Disk")
            .with("HostResource", vec![file])
    }

    fn file(slot: &str, file: &str) -> (String, PathBuf) {
        (slot.into(), file.into())
    }

    fn is(assigned: &Assigned) -> (Vec<(String, String)>, Vec<String>) {
        let file = |o: &Object| o.array("HostResource")[0].as_str().unwrap_or_default().to_owned();
        let set = assigned.set.iter().map(|o| (slot_of(o).to_owned(), file(o)));
        (set.collect(), assigned.out.iter().map(|o| slot_of(o).to_owned()).collect())
    }

    #[test]
    fn no_file_is_in_two_places() {
        // The same place on the second controller, and no file for it.
        let parts = [disk(r"A\0\0\D", "os.vhdx"), disk(r"B\0\0\D", "data.vhdx")];
        let files = [file(r"a\0\0\d", "new")];
        let assigned = assign(&parts, &files, false).expect("it fits");
        let expected = (vec![(r"A\0\0\D".into(), "new".into())], vec![r"B\0\0\D".into()]);
        assert_eq!(is(&assigned), expected);
        assert!(told(assigned.out[0], "the VM").contains("data.vhdx"));
        let assigned = assign(&parts, &files, true).expect("it fits");
        assert_eq!(is(&assigned), (expected.0, vec![]));
    }

    #[test]
    fn under_a_new_guid_a_disk_is_known_by_its_place_alone() {
        let parts = [disk(r"X\0\0\D", "os.vhdx"), disk(r"X\0\1\D", "data.vhdx")];
        let files = [file(r"A\0\1\D", "data"), file(r"A\0\0\D", "os")];
        let (set, out) = is(&assign(&parts, &files, false).expect("each has its place"));
        let expected = [(r"X\0\0\D".into(), "os".into()), (r"X\0\1\D".into(), "data".into())];
        assert_eq!((set.as_slice(), out.len()), (expected.as_slice(), 0));
        // A shared one at the same place of another controller is no candidate; one that may be meant is.
        let one = [file(r"A\0\0\D", "os")];
        let shared = disk(r"Y\0\0\D", "quorum.vhdx").with("PersistentReservationsSupported", true);
        let parts = [shared, disk(r"X\0\0\D", "os.vhdx")];
        let (set, out) = is(&assign(&parts, &one, false).expect("the other one"));
        assert_eq!(set, [(r"X\0\0\D".to_owned(), "os".to_owned())]);
        assert_eq!(out, [r"Y\0\0\D"]);
        let parts = [disk(r"Y\0\0\D", "data.vhdx"), disk(r"X\0\0\D", "os.vhdx")];
        let refused = assign(&parts, &one, false).expect_err("which one?");
        assert!(refused.to_string().contains("os"), "{refused}");
    }

    #[test]
    fn a_pass_through_disk_is_of_another_host_perhaps_and_goes() {
        let device = Object::new(RESOURCE, "p")
            .with("InstanceID", r"Microsoft:VM\A\0\1\L")
            .with("ResourceSubType", PASS_THROUGH);
        let parts = [disk(r"A\0\0\D", "os.vhdx"), device];
        let files = [file(r"A\0\0\D", "os")];
        let (set, out) = is(&assign(&parts, &files, false).expect("it fits"));
        assert_eq!((set.len(), out), (1, vec![r"A\0\1\L".to_owned()]));
    }
}
