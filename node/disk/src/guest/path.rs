//! From a path to a file.

use super::{Entry, FileId, FileKind, FileSystem, GuestError, Name};

/// Names shown when one is missing.
const SHOWN: usize = 8;

/// The file at a path. `/` separates, and on file systems of Windows `\` too; `.` and empty parts are skipped. Symbolic
/// links are not followed.
///
/// # Errors
/// [`GuestError::NotFound`] saying what is there instead; [`GuestError::NotADirectory`].
pub fn find(fs: &dyn FileSystem, path: &[u8]) -> Result<FileId, GuestError> {
    let mut at = fs.root();
    let mut done = String::from("/");
    let separates = |b: &u8| *b == b'/' || (*b == b'\\' && !fs.case_sensitive());
    for part in path.split(separates).filter(|p| !p.is_empty() && *p != b".") {
        let kind = fs.stat(at)?.kind;
        if kind != FileKind::Directory {
            return Err(GuestError::NotADirectory { path: done, kind: kind.text() });
        }
        let wanted = Name::from_bytes(part);
        let Some(entry) = child(fs, at, &wanted)? else {
            return Err(GuestError::NotFound {
                path: Name::from_bytes(path).to_string(),
                found_until: done,
                there: names(fs, at)?,
            });
        };
        at = entry.id;
        if !done.ends_with('/') {
            done.push('/');
        }
        done.push_str(&entry.name.to_string());
    }
    Ok(at)
}

/// An entry by name: exactly, else as the file system compares names.
///
/// # Errors
/// [`GuestError`].
pub fn child(
    fs: &dyn FileSystem,
    directory: FileId,
    name: &Name,
) -> Result<Option<Entry>, GuestError> {
    let (mut exact, mut alike) = (None, None);
    fs.list(directory, &mut |entry| {
        if entry.name == *name {
            exact = Some(entry);
        } else if !fs.case_sensitive() && entry.name.equals_ignoring_case(name) {
            alike = Some(entry);
        }
        Ok(())
    })?;
    Ok(exact.or(alike))
}

/// A directory's entries, sorted by name.
///
/// # Errors
/// [`GuestError`].
pub fn sorted(fs: &dyn FileSystem, directory: FileId) -> Result<Vec<Entry>, GuestError> {
    let mut entries = Vec::new();
    fs.list(directory, &mut |entry| {
        entries.push(entry);
        Ok(())
    })?;
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

fn names(fs: &dyn FileSystem, directory: FileId) -> Result<Vec<String>, GuestError> {
    let entries = sorted(fs, directory)?;
    let mut names: Vec<String> = entries.iter().take(SHOWN).map(|e| e.name.to_string()).collect();
    if entries.len() > SHOWN {
        names.push(format!("and {} more", entries.len() - SHOWN));
    }
    Ok(names)
}
