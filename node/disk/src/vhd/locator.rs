//! Parent locators: where the parent of a differencing VHD may be.

use std::path::{Path, PathBuf};

use super::Fields;
use crate::fields::put;
use crate::parent_paths;

/// Bytes of a locator in the dynamic header.
pub(crate) const ENTRY_LEN: usize = 24;

/// Longest path that is read; Windows allows 32,767 units.
const MAX_TEXT: u32 = 64 << 10;

const RELATIVE: &[u8; 4] = b"W2ru";
const ABSOLUTE: &[u8; 4] = b"W2ku";

/// A locator: the kind of its text, and where that is in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LocatorEntry {
    pub(crate) code: [u8; 4],
    /// Bytes that are kept for the text. The specification counts sectors here, Windows writes bytes;
    /// nobody needs it for reading.
    pub(crate) space: u32,
    pub(crate) length: u32,
    pub(crate) offset: u64,
}

impl LocatorEntry {
    pub(crate) fn parse(fields: &Fields<'_>, at: usize) -> Self {
        Self {
            code: fields.array(at),
            space: fields.u32(at + 4),
            length: fields.u32(at + 8),
            offset: fields.u64(at + 16),
        }
    }

    pub(crate) fn encode(&self, out: &mut [u8]) {
        put(out, 0, &self.code);
        put(out, 4, &self.space.to_be_bytes());
        put(out, 8, &self.length.to_be_bytes());
        put(out, 16, &self.offset.to_be_bytes());
    }

    /// Where a text can be read that is worth it: one of Windows, of a length that a path may have.
    pub(crate) fn text_range(&self) -> Option<(u64, usize)> {
        let known = [RELATIVE, ABSOLUTE].contains(&&self.code);
        (known && (2..=MAX_TEXT).contains(&self.length))
            .then_some((self.offset, self.length as usize))
    }
}

/// The places that a differencing VHD names for its parent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ParentPaths {
    /// From the child's folder (`W2ru`).
    pub relative: Option<String>,
    /// On the machine that wrote it (`W2ku`).
    pub absolute: Option<String>,
}

impl ParentPaths {
    /// Takes the text of a locator.
    pub(crate) fn set(&mut self, code: [u8; 4], text: &[u8]) {
        let units = text.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]]));
        let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
        let text = Some(String::from_utf16_lossy(&units)).filter(|text| !text.is_empty());
        match &code {
            RELATIVE => self.relative = text,
            ABSOLUTE => self.absolute = text,
            _ => {}
        }
    }

    /// The texts as locators keep them: UTF-16, little-endian.
    pub(crate) fn texts(&self) -> Vec<([u8; 4], Vec<u8>)> {
        let encode = |text: &String| text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        [(*RELATIVE, &self.relative), (*ABSOLUTE, &self.absolute)]
            .into_iter()
            .filter_map(|(code, text)| Some((code, text.as_ref().map(encode)?)))
            .collect()
    }

    /// Where the parent may be, in the order in which to look.
    pub(crate) fn candidates(&self, child: &Path, name: &str) -> Vec<PathBuf> {
        let mut out = Vec::new();
        out.extend(self.relative.as_deref().map(|path| parent_paths::below(child, path)));
        out.extend(self.absolute.as_deref().map(PathBuf::from));
        let names = [self.relative.as_deref(), self.absolute.as_deref(), Some(name)];
        parent_paths::beside(child, &names, &mut out);
        out
    }
}
