//! The key-encryption key of a fabric, and what is wrapped by it.
//!
//! Wrapped bytes, version 1: version (1), key id (8), nonce (12), AES-256-GCM ciphertext and tag.
//! Version and key id are associated data, followed by what the caller gives. Nonces are random:
//! a fabric wraps thousands of keys, far from the 2^32 that NIST SP 800-38D allows.

use std::fmt;
use std::path::{Path, PathBuf};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

use super::{Secret, SecretBytes, SecretError};

const VERSION: u8 = 1;
const ID_LEN: usize = 8;
const HEADER_LEN: usize = 1 + ID_LEN;

/// The key that wraps all other keys of a fabric.
#[derive(Debug, Clone)]
pub struct KeyEncryptionKey {
    key: Secret<32>,
    id: KeyId,
}

/// Tells key-encryption keys apart without showing anything of them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyId([u8; ID_LEN]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

/// A key that cannot be wrapped, unwrapped or loaded.
#[derive(Debug, thiserror::Error)]
pub enum KekError {
    /// Wrapped by another key.
    #[error(
        "cannot unwrap {object}: this is not the key that wrapped it (that was {wanted}, this is \
         {found}); give this process the fabric's key-encryption key, or rebuild it with the \
         recovery kit"
    )]
    WrongKey {
        /// What was to be unwrapped.
        object: String,
        /// Id of the key that wrapped it.
        wanted: KeyId,
        /// Id of the key at hand.
        found: KeyId,
    },
    /// The right key, but the bytes were changed or belong to something else.
    #[error(
        "cannot unwrap {object}: its bytes were changed or were wrapped for something else; restore \
         it from a copy of the coordinator's state"
    )]
    Damaged {
        /// What was to be unwrapped.
        object: String,
    },
    /// Written by a later release.
    #[error(
        "cannot unwrap {object}: format {version} is newer than this program; use the release that \
         wrote it"
    )]
    Newer {
        /// What was to be unwrapped.
        object: String,
        /// Its version.
        version: u8,
    },
    /// The file holds no key.
    #[error(
        "{path} holds no key-encryption key: expected 64 hexadecimal digits or 32 bytes, found \
         {found} bytes; use the file that fabric creation wrote, or rebuild it with the recovery kit"
    )]
    NoKey {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        found: usize,
    },
    /// The file cannot be had.
    #[error(transparent)]
    Secret(#[from] SecretError),
}

impl KeyEncryptionKey {
    /// A fresh key.
    pub fn generate() -> Self {
        Self::new(Secret::random())
    }

    /// Uses the given key.
    pub fn new(key: Secret<32>) -> Self {
        let mac = hmac::Key::new(hmac::HMAC_SHA256, key.expose());
        let tag = hmac::sign(&mac, b"outrider key-encryption key id");
        let mut id = [0; ID_LEN];
        id.copy_from_slice(&tag.as_ref()[..ID_LEN]);
        Self { key, id: KeyId(id) }
    }

    /// Which key this is.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// The text to keep in a file or a Kubernetes Secret: 64 hexadecimal digits.
    pub fn to_text(&self) -> SecretBytes {
        SecretBytes::new(hex::encode(self.key.expose()).into_bytes())
    }

    /// Wraps a key; `aad` must be given again to unwrap it.
    pub fn wrap(&self, aad: &[u8], plain: &[u8]) -> Vec<u8> {
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new()
            .fill(&mut nonce)
            .expect("a system that cannot give random bytes cannot run this program");
        let mut sealed = plain.to_vec();
        let mut wrapped = vec![VERSION];
        wrapped.extend_from_slice(&self.id.0);
        let aad = Aad::from([&wrapped[..], aad].concat());
        self.cipher()
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut sealed)
            .expect("keys are far shorter than AES-GCM's limit");
        wrapped.extend_from_slice(&nonce);
        wrapped.extend_from_slice(&sealed);
        wrapped
    }

    /// Unwraps what [`Self::wrap`] gave; `object` is for the message only.
    ///
    /// # Errors
    /// [`KekError::WrongKey`], [`KekError::Damaged`], [`KekError::Newer`].
    pub fn unwrap(
        &self,
        object: &str,
        aad: &[u8],
        wrapped: &[u8],
    ) -> Result<SecretBytes, KekError> {
        let damaged = || KekError::Damaged { object: object.to_owned() };
        let (header, rest) = wrapped.split_at_checked(HEADER_LEN).ok_or_else(damaged)?;
        let (version, id) = header.split_first().ok_or_else(damaged)?;
        if *version != VERSION {
            return Err(KekError::Newer { object: object.to_owned(), version: *version });
        }
        let wanted = KeyId(id.try_into().map_err(|_| damaged())?);
        if wanted != self.id {
            return Err(KekError::WrongKey { object: object.to_owned(), wanted, found: self.id });
        }
        let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>().ok_or_else(damaged)?;
        let mut sealed = sealed.to_vec();
        let aad = Aad::from([header, aad].concat());
        let length = self
            .cipher()
            .open_in_place(Nonce::assume_unique_for_key(*nonce), aad, &mut sealed)
            .map_err(|_| damaged())?
            .len();
        sealed.truncate(length);
        Ok(SecretBytes::new(sealed))
    }

    fn cipher(&self) -> LessSafeKey {
        let key = UnboundKey::new(&AES_256_GCM, self.key.expose()).expect("the key has 32 bytes");
        LessSafeKey::new(key)
    }
}

/// Loads the key from a file of 64 hexadecimal digits or 32 bytes.
///
/// # Errors
/// [`KekError::NoKey`], [`KekError::Secret`].
pub fn load_kek(path: &Path) -> Result<KeyEncryptionKey, KekError> {
    let bytes = SecretBytes::from_file(path)?;
    parse(&bytes)
        .ok_or_else(|| KekError::NoKey { path: path.to_owned(), found: bytes.expose().len() })
}

/// Loads the key as [`SecretBytes::from_env`] does, by default from `OUTRIDER_KEK_FILE`.
///
/// # Errors
/// As [`load_kek`].
pub fn load_kek_from_env(variable: &str) -> Result<KeyEncryptionKey, KekError> {
    let bytes = SecretBytes::from_env(variable)?;
    parse(&bytes).ok_or_else(|| KekError::NoKey {
        path: PathBuf::from(format!("${variable}")),
        found: bytes.expose().len(),
    })
}

fn parse(bytes: &SecretBytes) -> Option<KeyEncryptionKey> {
    if let Ok(key) = Secret::try_from(bytes) {
        return Some(KeyEncryptionKey::new(key));
    }
    let mut key = [0; 32];
    hex::decode_to_slice(bytes.trimmed()?.as_bytes(), &mut key).ok()?;
    Some(KeyEncryptionKey::new(Secret::new(key)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrapped_key_comes_back_and_only_for_its_purpose() {
        let kek = KeyEncryptionKey::generate();
        let wrapped = kek.wrap(b"domain 7", b"the id key");
        assert_ne!(wrapped, kek.wrap(b"domain 7", b"the id key"), "nonces are random");
        let plain = kek.unwrap("the keys of domain 7", b"domain 7", &wrapped).expect("unwrapped");
        assert_eq!(plain.expose(), b"the id key");
        let error = kek.unwrap("the keys of domain 8", b"domain 8", &wrapped).expect_err("other");
        assert!(matches!(error, KekError::Damaged { .. }), "{error}");
    }

    #[test]
    fn a_wrong_key_is_told_from_damage() {
        let kek = KeyEncryptionKey::generate();
        let mut wrapped = kek.wrap(b"", b"plain");
        let other = KeyEncryptionKey::generate();
        let error = other.unwrap("the keys of domain d", b"", &wrapped).expect_err("wrong key");
        let text = error.to_string();
        assert!(
            text.starts_with("cannot unwrap the keys of domain d: this is not the key"),
            "{text}"
        );
        assert!(text.contains("recovery kit") && text.contains(&kek.id().to_string()), "{text}");

        for cut in 0..wrapped.len() {
            kek.unwrap("it", b"", &wrapped[..cut]).expect_err("cut");
        }
        let last = wrapped.len() - 1;
        wrapped[last] ^= 1;
        assert!(matches!(kek.unwrap("it", b"", &wrapped), Err(KekError::Damaged { .. })));
    }

    #[test]
    fn a_key_is_loaded_from_text_or_bytes_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("kek");
        let kek = KeyEncryptionKey::generate();
        let mut text = kek.to_text().expose().to_vec();
        text.push(b'\n');
        std::fs::write(&path, &text).expect("written");
        assert_eq!(load_kek(&path).expect("loaded").id(), kek.id());
        std::fs::write(&path, kek.key.expose()).expect("written");
        assert_eq!(load_kek(&path).expect("loaded").id(), kek.id());
        std::fs::write(&path, b"hello").expect("written");
        assert!(matches!(load_kek(&path), Err(KekError::NoKey { found: 5, .. })));
        let missing = load_kek(Path::new("/nowhere/kek")).expect_err("missing");
        assert!(missing.to_string().contains("/nowhere/kek"), "{missing}");
    }
}
