//! The Ed25519 key that signs receipts (storage nodes) and tickets (coordinators).
//!
//! It is apart from the TLS key: receipts are kept and checked long after the connection ended,
//! and a renewed certificate must not void them.

use std::fmt;

use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

use crate::secret::SecretBytes;

/// An Ed25519 key pair.
pub struct SigningKey {
    pair: Ed25519KeyPair,
}

impl SigningKey {
    /// A fresh key in PKCS #8, as `sign.pk8` holds it.
    pub fn generate_pkcs8() -> SecretBytes {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .expect("a system that cannot give random bytes cannot run this program");
        SecretBytes::new(pkcs8.as_ref().to_vec())
    }

    /// Reads PKCS #8; `None` if it is no Ed25519 key.
    pub fn from_pkcs8(pkcs8: &[u8]) -> Option<Self> {
        Ed25519KeyPair::from_pkcs8(pkcs8).ok().map(|pair| Self { pair })
    }

    /// The public half.
    pub fn public_key(&self) -> [u8; 32] {
        self.pair.public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes")
    }

    /// The pair, for formats that sign themselves (receipts, tickets).
    pub fn pair(&self) -> &Ed25519KeyPair {
        &self.pair
    }

    /// Signs a message.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        let signature = self.pair.sign(message);
        signature.as_ref().try_into().expect("an Ed25519 signature has 64 bytes")
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey(public {})", hex::encode(self.public_key()))
    }
}

/// Whether `signature` over `message` was made by the owner of `public`.
#[must_use]
pub fn verify(public: &[u8; 32], message: &[u8], signature: &[u8; 64]) -> bool {
    UnparsedPublicKey::new(&ED25519, public).verify(message, signature).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_holds_for_its_key_and_message_only() {
        let key =
            || SigningKey::from_pkcs8(SigningKey::generate_pkcs8().expose()).expect("a fresh key");
        let (one, two) = (key(), key());
        let signature = one.sign(b"receipt");
        assert!(verify(&one.public_key(), b"receipt", &signature));
        assert!(!verify(&two.public_key(), b"receipt", &signature));
        assert!(!verify(&one.public_key(), b"receipts", &signature));
        assert!(SigningKey::from_pkcs8(b"no key").is_none());
    }
}
