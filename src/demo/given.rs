//! The user's own disks: looked at before anything starts, never written to.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use outrider_disk::vhdx::{CreateOptions, VhdxWriter};
use outrider_disk::{DiskChain, DiskKind, ReadDisk};

use crate::report::Failure;

/// A disk that a VM of the demo will have.
#[derive(Debug, Clone)]
pub(super) struct GivenDisk {
    /// Name of the restored files: the stem of the given file, or one made unique.
    pub(super) name: String,
    /// The file as it was given.
    pub(super) path: PathBuf,
    /// Guest-visible bytes.
    pub(super) size: u64,
    /// Bytes of the file that hold anything.
    pub(super) allocated: u64,
    /// Whether it has parents that must be folded into one file.
    pub(super) differencing: bool,
}

/// Opens and reads every disk once, so that a file that is damaged is refused before anything starts.
pub(super) fn check(
    files: &[PathBuf],
    mut say: impl FnMut(String),
) -> Result<Vec<GivenDisk>, Failure> {
    let mut names = HashSet::new();
    let mut disks = Vec::new();
    for path in files {
        let refused = |f: Failure| f.during(format!("the disk {} cannot be used", path.display()));
        if !path.is_file() {
            return Err(refused(Failure::new("there is no such file")));
        }
        let chain = DiskChain::open(path).map_err(|e| refused(e.into()))?;
        read_all(&chain).map_err(refused)?;
        let stem =
            path.file_stem().map_or_else(|| "disk".into(), |s| s.to_string_lossy().into_owned());
        let stem: String =
            stem.chars().map(|c| if c.is_control() { '_' } else { c }).take(80).collect();
        let name = unique(&stem, &mut names);
        if name != stem {
            say(format!(
                "{} is called {name:?}, since another disk has the name {stem:?}",
                path.display()
            ));
        }
        let info = chain.info();
        disks.push(GivenDisk {
            name,
            path: path.clone(),
            size: info.size,
            allocated: chain.allocated()?.total_len(),
            differencing: info.kind == DiskKind::Differencing,
        });
    }
    Ok(disks)
}

/// `name`, or `name-2`, `name-3`, ... Case is ignored: the restored files may go to a file system that does so.
fn unique(name: &str, taken: &mut HashSet<String>) -> String {
    (1..)
        .map(|n| if n == 1 { name.to_owned() } else { format!("{name}-{n}") })
        .find(|candidate| taken.insert(candidate.to_lowercase()))
        .expect("there are more numbers than disks")
}

fn read_all(chain: &DiskChain) -> Result<(), Failure> {
    const STEP: u64 = 1 << 20;
    let mut buf = vec![0; STEP as usize];
    for range in &chain.allocated()? {
        for done in (0..range.len).step_by(STEP as usize) {
            let len = STEP.min(range.len - done) as usize;
            chain.read_at(range.start + done, &mut buf[..len])?;
        }
    }
    Ok(())
}

/// Folds a disk and its parents into one dynamic VHDX: the VM of the demo gets a disk without parents, as the guest
/// sees it now.
pub(super) fn flatten(from: &Path, to: &Path) -> Result<(), Failure> {
    const STEP: u64 = 1 << 20;
    let chain = DiskChain::open(from)?;
    let info = chain.info();
    let options = CreateOptions {
        size: info.size,
        block_size: info.block_size,
        logical_sector: info.logical_sector,
        physical_sector: info.physical_sector,
        kind: DiskKind::Dynamic,
        disk_id: Some(info.disk_id),
    };
    let mut writer = VhdxWriter::create(to, &options)?;
    let mut buf = vec![0; STEP as usize];
    for range in &chain.allocated()? {
        for done in (0..range.len).step_by(STEP as usize) {
            let part = &mut buf[..STEP.min(range.len - done) as usize];
            chain.read_at(range.start + done, part)?;
            if part.iter().any(|b| *b != 0) {
                writer.write_at(range.start + done, part)?;
            }
        }
    }
    writer.close()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_disk::compare;

    fn disk(path: &Path, size: u64) {
        let options = CreateOptions { block_size: 1 << 20, ..CreateOptions::dynamic(size) };
        let mut writer = VhdxWriter::create(path, &options).expect("made");
        writer.write_at(4096, &[7; 5000]).expect("written");
        writer.close().expect("closed");
    }

    #[test]
    fn disks_of_one_name_get_names_of_their_own() {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(dir.path().join("b")).expect("a folder");
        let files = [dir.path().join("디스크.vhdx"), dir.path().join("b/디스크.vhdx")];
        files.iter().for_each(|f| disk(f, 3 << 20));
        let given = check(&files, |_| {}).expect("both are fine");
        assert_eq!(
            given.iter().map(|g| g.name.as_str()).collect::<Vec<_>>(),
            ["디스크", "디스크-2"]
        );
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("a folder");
        let text = dir.path().join("notes.vhdx");
        std::fs::write(&text, "these are my notes, not a disk").expect("written");
        let failure = check(std::slice::from_ref(&text), |_| {}).expect_err("no disk").to_string();
        assert!(
            failure.contains("notes.vhdx") && failure.contains("not a virtual disk"),
            "{failure}"
        );

        let good = dir.path().join("good.vhdx");
        disk(&good, 8 << 20);
        let len = std::fs::metadata(&good).expect("is there").len();
        std::fs::File::options()
            .write(true)
            .open(&good)
            .expect("opens")
            .set_len(len / 2)
            .expect("cut");
        let failure = check(&[good], |_| {}).expect_err("cut off").to_string();
        assert!(failure.contains("good.vhdx"), "{failure}");
    }

    #[test]
    fn a_differencing_disk_is_flattened_and_one_without_its_parent_is_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let (base, child, flat) = (
            dir.path().join("base.vhdx"),
            dir.path().join("child.avhdx"),
            dir.path().join("flat.vhdx"),
        );
        disk(&base, 5 << 20);
        let mut writer = VhdxWriter::create_child(&child, &base, None).expect("a child");
        writer.write_at(1 << 20, b"changed").expect("written");
        writer.close().expect("closed");
        let given = check(std::slice::from_ref(&child), |_| {}).expect("fine");
        assert!(given[0].differencing);
        flatten(&child, &flat).expect("flat");
        let (a, b) =
            (DiskChain::open(&child).expect("chain"), DiskChain::open(&flat).expect("flat"));
        assert_eq!(compare::first_difference(&a, &b).expect("read"), None);
        std::fs::remove_file(&base).expect("removed");
        let failure = check(&[child], |_| {}).expect_err("no parent");
        assert_eq!(failure.code(), Some("OUT-D-0002"));
    }
}
