//! Names of files: any bytes that a guest can give.

use std::fmt;

/// A name as the guest wrote it. File systems of Unix have bytes; those of Windows have 16-bit units, kept here as
/// UTF-8 in which a lone surrogate is encoded as if it were a character (WTF-8), so that no two names become one.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Vec<u8>);

impl Name {
    /// A name of bytes.
    #[must_use]
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    /// A name of 16-bit units.
    #[must_use]
    pub fn from_utf16(units: &[u16]) -> Self {
        let mut out = Vec::with_capacity(units.len());
        for decoded in char::decode_utf16(units.iter().copied()) {
            match decoded {
                Ok(c) => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                Err(lone) => {
                    let unit = lone.unpaired_surrogate();
                    out.extend_from_slice(&[
                        0xe0 | (unit >> 12) as u8,
                        0x80 | (unit >> 6 & 0x3f) as u8,
                        0x80 | (unit & 0x3f) as u8,
                    ]);
                }
            }
        }
        Self(out)
    }

    /// Little-endian 16-bit units.
    #[must_use]
    pub fn from_utf16le(bytes: &[u8]) -> Self {
        let units: Vec<u16> =
            bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        Self::from_utf16(&units)
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether two names are the same but for the case of letters, as Windows compares them.
    #[must_use]
    pub fn equals_ignoring_case(&self, other: &Self) -> bool {
        let upper = |name: &Self| -> Option<Vec<char>> {
            let text = std::str::from_utf8(&name.0).ok()?;
            // One to one, as in the volume's own table: "ß" stays itself.
            Some(text.chars().map(one_upper).collect())
        };
        self == other || matches!((upper(self), upper(other)), (Some(a), Some(b)) if a == b)
    }
}

fn one_upper(c: char) -> char {
    let mut upper = c.to_uppercase();
    match (upper.next(), upper.next()) {
        (Some(one), None) => one,
        _ => c,
    }
}

impl fmt::Display for Name {
    /// For people and terminals: what is not text is shown as U+FFFD, control characters as escapes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in String::from_utf8_lossy(&self.0).chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { write!(f, "{c}")? }
        }
        Ok(())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

impl From<&str> for Name {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_any_script_and_of_none_stay_apart() {
        let units = |text: &str| text.encode_utf16().collect::<Vec<_>>();
        for text in ["백업", "备份", "🦊 spaces ", "a:b\\c"] {
            assert_eq!(Name::from_utf16(&units(text)), Name::from(text));
        }
        let (a, b) = (Name::from_utf16(&[0xd800]), Name::from_utf16(&[0xd801]));
        assert_ne!(a, b);
        assert_eq!(a.to_string(), "\u{fffd}\u{fffd}\u{fffd}");
        assert_eq!(Name::from("a\x1b[2Jb").to_string(), "a\\u{1b}[2Jb");
    }

    #[test]
    fn case_is_ignored_one_to_one() {
        assert!(Name::from("PageFile.SYS").equals_ignoring_case(&"pagefile.sys".into()));
        assert!(Name::from("ÄÖ").equals_ignoring_case(&"äö".into()));
        assert!(!Name::from("ß").equals_ignoring_case(&"ss".into()));
        assert!(!Name::from("ß").equals_ignoring_case(&"SS".into()));
    }
}
