//! The parent locator: which disk a differencing disk was made from, and where it may be.

use std::path::{Path, PathBuf};

use uuid::{Uuid, uuid};

use super::Fields;
use crate::error::FormatError;
use crate::fields::put;
use crate::parent_paths;

const TYPE: Uuid = uuid!("b04aefb7-d19e-4a81-b789-25b8e9445913");
const NAME: &str = "parent locator";

/// Keys and values in the order in which they are stored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ParentLocator {
    entries: Vec<(String, String)>,
}

impl ParentLocator {
    /// Reads a locator item.
    ///
    /// # Errors
    /// An unknown type, or keys and values outside of the item.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let fields = Fields::new(bytes, NAME, 20)?;
        let kind = fields.guid(0);
        if kind != TYPE {
            return Err(FormatError::unsupported(NAME, format!("is of the unknown type {kind}")));
        }
        let count = usize::from(fields.u16(18));
        Fields::new(bytes, NAME, 20 + count * 12)?;
        // Texts that share bytes would make a small item large in memory.
        let lengths = (0..count)
            .map(|i| 20 + i * 12)
            .map(|at| usize::from(fields.u16(at + 8)) + usize::from(fields.u16(at + 10)));
        if lengths.sum::<usize>() > bytes.len() {
            return Err(FormatError::corrupt(NAME, "has texts that overlap"));
        }
        let mut entries = Vec::with_capacity(count);
        for at in (0..count).map(|i| 20 + i * 12) {
            let key = text(bytes, fields.u32(at), fields.u16(at + 8))?;
            let value = text(bytes, fields.u32(at + 4), fields.u16(at + 10))?;
            entries.push((key, value));
        }
        Ok(Self { entries })
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; 20 + self.entries.len() * 12];
        put(&mut out, 0, &TYPE.to_bytes_le());
        put(&mut out, 18, &(self.entries.len() as u16).to_le_bytes());
        for (i, (key, value)) in self.entries.iter().enumerate() {
            let at = 20 + i * 12;
            for (offset_at, length_at, text) in [(at, at + 8, key), (at + 4, at + 10, value)] {
                let bytes: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
                let offset = (out.len() as u32).to_le_bytes();
                put(&mut out, offset_at, &offset);
                put(&mut out, length_at, &(bytes.len() as u16).to_le_bytes());
                out.extend_from_slice(&bytes);
            }
        }
        out
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.entries.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// Sets a key, or removes it.
    pub(crate) fn set(&mut self, key: &str, value: Option<String>) {
        self.entries.retain(|(k, _)| k != key);
        self.entries.extend(value.map(|v| (key.to_owned(), v)));
    }

    /// The DataWriteGuids that the parent may have: the one when the child was made and, while a merge
    /// into the parent runs, the one that the parent has from then on. Windows writes zeros for none.
    pub fn linkages(&self) -> Vec<Uuid> {
        ["parent_linkage", "parent_linkage2"]
            .iter()
            .filter_map(|key| Uuid::parse_str(self.get(key)?.trim()).ok())
            .filter(|linkage| !linkage.is_nil())
            .collect()
    }

    /// Where the parent may be, in the order in which to look: the relative path, from the child's
    /// folder; the volume path, which means something only on the host that wrote it; the absolute
    /// path; and a file of its name beside the child.
    pub fn candidates(&self, child: &Path) -> Vec<PathBuf> {
        let path_of = |key: &str| self.get(key).filter(|path| !path.is_empty());
        let (relative, absolute) = (path_of("relative_path"), path_of("absolute_win32_path"));
        let mut out = Vec::new();
        out.extend(relative.map(|path| parent_paths::below(child, path)));
        if cfg!(windows) {
            out.extend(path_of("volume_path").map(PathBuf::from));
        }
        out.extend(absolute.map(PathBuf::from));
        parent_paths::beside(child, &[relative, absolute, path_of("volume_path")], &mut out);
        out
    }

    /// A locator that names `parent` from `child`, both absolute; `None` if a name is not Unicode.
    pub(crate) fn naming(child: &Path, parent: &Path, linkage: Uuid) -> Option<Self> {
        let mut locator = Self::default();
        locator.set("parent_linkage", Some(linkage_text(linkage)));
        locator.set("relative_path", parent_paths::relative(child, parent)?);
        locator.set("absolute_win32_path", Some(parent.to_str()?.to_owned()));
        Some(locator)
    }
}

/// A GUID as locators write it.
pub(crate) fn linkage_text(guid: Uuid) -> String {
    format!("{{{guid}}}")
}

fn text(bytes: &[u8], offset: u32, length: u16) -> Result<String, FormatError> {
    let (start, end) = (offset as usize, offset as usize + usize::from(length));
    let found = bytes.len() as u64;
    let truncated = FormatError::Truncated { structure: NAME, needed: end as u64, found };
    let raw = bytes.get(start..end).ok_or(truncated)?;
    if !length.is_multiple_of(2) {
        return Err(FormatError::corrupt(NAME, "has a text of an odd number of bytes"));
    }
    let units: Vec<u16> = raw.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect();
    String::from_utf16(&units)
        .map_err(|_| FormatError::corrupt(NAME, "has a text that is not UTF-16"))
}
