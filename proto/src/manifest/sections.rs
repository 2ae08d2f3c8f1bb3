//! What stands behind the body of a manifest, by number: a reader skips the numbers that it does not know.

use super::{
    CheckpointFacts, DiskManifest, FormerDisk, FrozenLayer, ImageFormat, Machine, Manifest, Tree,
    UnknownFormat,
};

/// Sections that a manifest may have.
const MAX_SECTIONS: usize = 64;
/// Numbers of the sections.
const MACHINE: u16 = 1;
const TREE: u16 = 2;
const FORMATS: u16 = 3;
const CHECKPOINT_FACTS: u16 = 4;
const FORMER_DISKS: u16 = 5;

/// Why the sections behind a manifest's first part cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum SectionError {
    #[error(transparent)]
    List(#[from] postcard::Error),
    #[error("{0} sections")]
    TooMany(usize),
    #[error("section {number}: {source}")]
    Content { number: u16, source: postcard::Error },
    #[error("section {number}: {found} entries, not as many as there are of what it tells about")]
    Count { number: u16, found: usize },
    #[error(transparent)]
    Format(#[from] UnknownFormat),
}

/// A disk of section 5: the disk, its format, what its layers are.
type Former = (DiskManifest, u8, Vec<FrozenLayer>);

pub(super) fn of(manifest: &Manifest) -> Result<Vec<(u16, Vec<u8>)>, postcard::Error> {
    let mut sections = Vec::new();
    if manifest.machine != Machine::default() {
        sections.push((MACHINE, postcard::to_stdvec(&manifest.machine)?));
    }
    let tree = &manifest.tree;
    if *tree != Tree::default() {
        sections.push((TREE, postcard::to_stdvec(tree)?));
    }
    if manifest.disks.iter().any(|d| d.format != ImageFormat::default()) {
        let formats: Vec<u8> = manifest.disks.iter().map(|d| d.format as u8).collect();
        sections.push((FORMATS, postcard::to_stdvec(&formats)?));
    }
    if tree.checkpoints.iter().any(|c| c.facts != CheckpointFacts::default()) {
        let facts: Vec<&CheckpointFacts> = tree.checkpoints.iter().map(|c| &c.facts).collect();
        sections.push((CHECKPOINT_FACTS, postcard::to_stdvec(&facts)?));
    }
    if !tree.former.is_empty() {
        let former: Vec<(&DiskManifest, u8, &[FrozenLayer])> = tree
            .former
            .iter()
            .map(|f| (&f.disk, f.disk.format as u8, f.layers.as_slice()))
            .collect();
        sections.push((FORMER_DISKS, postcard::to_stdvec(&former)?));
    }
    Ok(sections)
}

pub(super) fn read(manifest: &mut Manifest, bytes: &[u8]) -> Result<(), SectionError> {
    let mut sections: Vec<(u16, Vec<u8>)> = postcard::from_bytes(bytes)?;
    if sections.len() > MAX_SECTIONS {
        return Err(SectionError::TooMany(sections.len()));
    }
    // The facts of checkpoints and their disks belong to the tree, whatever the order.
    sections.sort_by_key(|(number, _)| *number);
    for (number, content) in sections {
        read_one(manifest, number, &content)?;
    }
    Ok(())
}

fn read_one(manifest: &mut Manifest, number: u16, content: &[u8]) -> Result<(), SectionError> {
    let failed = |source| SectionError::Content { number, source };
    match number {
        MACHINE => manifest.machine = postcard::from_bytes(content).map_err(failed)?,
        TREE => manifest.tree = postcard::from_bytes(content).map_err(failed)?,
        FORMATS => {
            let formats: Vec<u8> = postcard::from_bytes(content).map_err(failed)?;
            if formats.len() != manifest.disks.len() {
                return Err(SectionError::Count { number, found: formats.len() });
            }
            for (disk, format) in manifest.disks.iter_mut().zip(formats) {
                disk.format = format.try_into()?;
            }
        }
        CHECKPOINT_FACTS => {
            let facts: Vec<CheckpointFacts> = postcard::from_bytes(content).map_err(failed)?;
            if facts.len() != manifest.tree.checkpoints.len() {
                return Err(SectionError::Count { number, found: facts.len() });
            }
            for (checkpoint, facts) in manifest.tree.checkpoints.iter_mut().zip(facts) {
                checkpoint.facts = facts;
            }
        }
        FORMER_DISKS => {
            let former: Vec<Former> = postcard::from_bytes(content).map_err(failed)?;
            for (mut disk, format, layers) in former {
                disk.format = format.try_into()?;
                manifest.tree.former.push(FormerDisk { disk, layers });
            }
        }
        // Of a later release, and nothing that this one needs.
        _ => {}
    }
    Ok(())
}
