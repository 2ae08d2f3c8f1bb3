//! Secrets that cannot be printed by accident and are wiped when dropped.

pub mod kek;

use std::fmt;
use std::path::{Path, PathBuf};

use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// A secret of fixed length.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Secret<const N: usize>([u8; N]);

impl<const N: usize> Secret<N> {
    /// Takes the bytes; the caller wipes its own copy.
    pub fn new(bytes: [u8; N]) -> Self {
        Self(bytes)
    }

    /// Fresh random bytes.
    pub fn random() -> Self {
        use ring::rand::SecureRandom;
        let mut bytes = [0; N];
        ring::rand::SystemRandom::new()
            .fill(&mut bytes)
            .expect("a system that cannot give random bytes cannot run this program");
        Self(bytes)
    }

    /// The bytes; a word that stands out in a review.
    pub fn expose(&self) -> &[u8; N] {
        &self.0
    }
}

impl<const N: usize> fmt::Debug for Secret<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret<{N}>(..)")
    }
}

impl<const N: usize> TryFrom<&SecretBytes> for Secret<N> {
    type Error = usize;

    /// Refuses other lengths and tells the one found.
    fn try_from(bytes: &SecretBytes) -> Result<Self, usize> {
        bytes.expose().try_into().map(Self).map_err(|_| bytes.expose().len())
    }
}

/// A secret of any length.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct SecretBytes(Vec<u8>);

impl SecretBytes {
    /// Takes the bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The bytes; a word that stands out in a review.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// Reads a whole file.
    ///
    /// # Errors
    /// [`SecretError::Read`].
    pub fn from_file(path: &Path) -> Result<Self, SecretError> {
        std::fs::read(path)
            .map(Self)
            .map_err(|source| SecretError::Read { path: path.to_owned(), source })
    }

    /// Reads the file named by `<NAME>_FILE`, else the value of `<NAME>` itself.
    ///
    /// # Errors
    /// [`SecretError::NotSet`] if neither is set, [`SecretError::Read`].
    pub fn from_env(name: &str) -> Result<Self, SecretError> {
        if let Some(path) = std::env::var_os(format!("{name}_FILE")) {
            return Self::from_file(Path::new(&path));
        }
        match std::env::var(name) {
            Ok(value) => Ok(Self(value.into_bytes())),
            Err(_) => Err(SecretError::NotSet { variable: name.to_owned() }),
        }
    }

    /// The text without white space around it, if it is UTF-8.
    fn trimmed(&self) -> Option<Zeroizing<String>> {
        std::str::from_utf8(&self.0).ok().map(|text| Zeroizing::new(text.trim().to_owned()))
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretBytes(..)")
    }
}

/// A secret that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read.
    #[error(
        "cannot read the secret in {path}; check that the file exists and that this user may read it"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The environment does not name it.
    #[error(
        "neither {variable}_FILE nor {variable} is set; set {variable}_FILE to a file that holds the secret"
    )]
    NotSet {
        /// The variable.
        variable: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_does_not_show_in_debug_output() {
        let shown =
            format!("{:?} {:?}", Secret::new([0x41; 4]), SecretBytes::new(b"AAAA".to_vec()));
        assert_eq!(shown, "Secret<4>(..) SecretBytes(..)");
    }

    #[test]
    fn random_secrets_differ() {
        assert_ne!(Secret::<32>::random(), Secret::<32>::random());
    }
}
