//! Little-endian, fixed-width reading and writing, shared by every format of this crate.
//!
//! [`Reader`] is total: it never panics and never allocates before a length has been checked against what is left.

/// Bytes that are not what their format says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Fewer bytes than the structure needs.
    #[error("{what} is cut short: {needed} bytes needed, {left} left")]
    Short {
        /// The structure or field.
        what: &'static str,
        /// Bytes needed.
        needed: usize,
        /// Bytes left.
        left: usize,
    },
    /// A field holds a value that its format does not allow.
    #[error("{what} holds {found}, expected {expected}")]
    Value {
        /// The field.
        what: &'static str,
        /// What was found.
        found: String,
        /// What the format allows.
        expected: &'static str,
    },
    /// A checksum or hash does not match: the bytes were changed.
    #[error("checksum of {what} does not match its bytes")]
    Checksum {
        /// The structure.
        what: &'static str,
    },
    /// Bytes are left over after the structure.
    #[error("{left} bytes left over after {what}")]
    Trailing {
        /// The structure.
        what: &'static str,
        /// Bytes left over.
        left: usize,
    },
}

/// Reads fields from a slice, front to back.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// A reader over `bytes` of the structure `what` (named in errors).
    #[must_use]
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { rest: bytes, what }
    }

    /// Bytes not yet read.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// [`DecodeError::Short`] when fewer are left.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        match self.rest.split_at_checked(len) {
            Some((head, tail)) => {
                self.rest = tail;
                Ok(head)
            }
            None => Err(DecodeError::Short { what: self.what, needed: len, left: self.rest.len() }),
        }
    }

    /// The next `N` bytes as an array.
    ///
    /// # Errors
    /// [`DecodeError::Short`].
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(N)?);
        Ok(out)
    }

    /// One byte.
    ///
    /// # Errors
    /// [`DecodeError::Short`].
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }
    /// Two bytes.
    ///
    /// # Errors
    /// [`DecodeError::Short`].
    pub fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    /// Four bytes.
    ///
    /// # Errors
    /// [`DecodeError::Short`].
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    /// Eight bytes.
    ///
    /// # Errors
    /// [`DecodeError::Short`].
    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of items of `item_len` bytes each, checked to fit into what is left.
    ///
    /// # Errors
    /// [`DecodeError::Short`] when that many items cannot follow.
    pub fn count(&mut self, item_len: usize) -> Result<usize, DecodeError> {
        let n = self.u32()? as usize;
        let needed = n.saturating_mul(item_len.max(1));
        if needed > self.rest.len() {
            return Err(DecodeError::Short { what: self.what, needed, left: self.rest.len() });
        }
        Ok(n)
    }

    /// UTF-8 text with a 16-bit length in front.
    ///
    /// # Errors
    /// [`DecodeError::Short`], or [`DecodeError::Value`] when it is not UTF-8.
    pub fn text(&mut self) -> Result<String, DecodeError> {
        let len = usize::from(self.u16()?);
        let bytes = self.bytes(len)?;
        String::from_utf8(bytes.to_vec()).map_err(|e| DecodeError::Value {
            what: self.what,
            found: format!("text that is not UTF-8 ({e})"),
            expected: "UTF-8",
        })
    }

    /// Everything that is left.
    #[must_use]
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Confirms that nothing is left.
    ///
    /// # Errors
    /// [`DecodeError::Trailing`].
    pub fn finish(self) -> Result<(), DecodeError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(DecodeError::Trailing { what: self.what, left: self.rest.len() })
        }
    }
}

/// Appends fields to a byte vector.
pub trait Put {
    /// Two bytes.
    fn put_u16(&mut self, n: u16);
    /// Four bytes.
    fn put_u32(&mut self, n: u32);
    /// Eight bytes.
    fn put_u64(&mut self, n: u64);
    /// Text with a 16-bit length in front; cut at a character boundary to what 16 bits can count.
    fn put_text(&mut self, s: &str);
}

impl Put for Vec<u8> {
    fn put_u16(&mut self, n: u16) {
        self.extend_from_slice(&n.to_le_bytes());
    }
    fn put_u32(&mut self, n: u32) {
        self.extend_from_slice(&n.to_le_bytes());
    }
    fn put_u64(&mut self, n: u64) {
        self.extend_from_slice(&n.to_le_bytes());
    }
    fn put_text(&mut self, s: &str) {
        let mut end = s.len().min(usize::from(u16::MAX));
        while !s.is_char_boundary(end) {
            end -= 1;
        }
        self.put_u16(u16::try_from(end).unwrap_or(u16::MAX));
        self.extend_from_slice(&s.as_bytes()[..end]);
    }
}
