//! The places where a parent is looked for: what both formats share.

use std::path::{Component, Path, PathBuf};

fn folder_of(child: &Path) -> &Path {
    child.parent().unwrap_or(Path::new(""))
}

/// A path that a child names relative to its own folder, with backslashes or slashes.
pub(crate) fn below(child: &Path, relative: &str) -> PathBuf {
    let mut path = folder_of(child).to_owned();
    path.extend(relative.split(['\\', '/']).filter(|part| !matches!(*part, "" | ".")));
    path
}

/// Adds the child's own folder: a chain that was copied into one folder, or to a machine of another kind,
/// is found by its files' names. A wrong file of that name is told by its linkage.
pub(crate) fn beside(child: &Path, named: &[Option<&str>], out: &mut Vec<PathBuf>) {
    for path in named.iter().flatten() {
        let Some(name) = path.rsplit(['\\', '/']).find(|part| !part.is_empty()) else { continue };
        let place = folder_of(child).join(name);
        if name != "." && name != ".." && !out.contains(&place) && place != child {
            out.push(place);
        }
    }
}

/// The parent's path from the child's folder, with backslashes; both are absolute. The outer option is
/// whether the names are Unicode, the inner whether the two are on one volume.
pub(crate) fn relative(child: &Path, parent: &Path) -> Option<Option<String>> {
    let from: Vec<Component<'_>> = child.parent()?.components().collect();
    let to: Vec<Component<'_>> = parent.components().collect();
    let shared = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    if shared == 0 {
        return Some(None);
    }
    let mut parts = vec![if shared == from.len() { "." } else { ".." }];
    parts.extend((shared + 1..from.len()).map(|_| ".."));
    for part in &to[shared..] {
        parts.push(part.as_os_str().to_str()?);
    }
    Some(Some(parts.join("\\")))
}
