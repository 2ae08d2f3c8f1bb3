//! The join token: what an operator hands to a machine that is to become a member.
//!
//! ```text
//! outrider1_<base64url of body and checksum, without padding>
//! ```
//!
//! The body names the fabric, the fingerprint of its authority (so that the machine knows whom it speaks to), the
//! coordinators, and a secret. The secret is the seed of an Ed25519 key. Coordinators know the public half only, and the
//! machine proves the private one in the TLS handshake: the secret itself never crosses a wire.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rcgen::{CertificateParams, KeyPair};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};

use super::{Role, sha256};
use crate::secret::Secret;

/// Begins every token; the digit is the version.
const PREFIX: &str = "outrider1_";
/// Longest text that is looked at.
const MAX: usize = 4096;
/// Bytes of the checksum.
const CHECK: usize = 4;
/// DER of a PKCS #8 (RFC 8410) Ed25519 key before its 32 bytes.
const PKCS8: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
/// Hexadecimal digits of a token's public key that name it in lists.
const ID: usize = 12;

/// A join token.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The fabric's id.
    pub fabric: String,
    /// What the machine may become.
    pub role: Role,
    /// The only name that it may take; none: it says its own.
    pub name: Option<String>,
    /// SHA-256 of the authority's certificate (DER).
    pub authority: [u8; 32],
    /// When it ends, in seconds since 1970. A hint: the coordinators' clock decides.
    pub expires_unix: u64,
    /// "host:port" of the coordinators.
    pub coordinators: Vec<String>,
    secret: Secret<32>,
}

/// A text that is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Something else.
    #[error(
        "this is no join token, which begins with {PREFIX}; make one with `outrider fabric token create`"
    )]
    NoToken,
    /// Of another release.
    #[error("this join token was made by a newer release; use the same release on this machine")]
    Newer,
    /// Cut or changed.
    #[error("the join token was cut or changed on its way; copy the whole line again")]
    Damaged,
}

/// Its fields in the order of the text.
#[derive(Serialize, Deserialize)]
struct Body {
    fabric: String,
    /// 1 node, 2 storage.
    role: u8,
    name: String,
    authority: [u8; 32],
    secret: [u8; 32],
    expires_unix: u64,
    coordinators: Vec<String>,
}

impl JoinToken {
    /// A token with a fresh secret; the caller tells the coordinators its [`Self::public_key`].
    #[must_use]
    pub fn new(
        fabric: String,
        role: Role,
        name: Option<String>,
        authority: &CertificateDer<'_>,
        expires_unix: u64,
        coordinators: Vec<String>,
    ) -> Self {
        let authority = sha256(authority);
        let secret = Secret::random();
        Self { fabric, role, name, authority, expires_unix, coordinators, secret }
    }

    /// What the coordinators know of the secret.
    #[must_use]
    pub fn public_key(&self) -> [u8; 32] {
        let pair = Ed25519KeyPair::from_seed_unchecked(self.secret.expose())
            .expect("any 32 bytes are an Ed25519 seed");
        pair.public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes")
    }

    /// Its name in lists and logs; tells nothing of the secret.
    #[must_use]
    pub fn id(&self) -> String {
        token_id(&self.public_key())
    }

    /// The text to hand over. A secret: who has it can join.
    #[must_use]
    pub fn to_text(&self) -> String {
        let body = Body {
            fabric: self.fabric.clone(),
            role: if self.role == Role::Storage { 2 } else { 1 },
            name: self.name.clone().unwrap_or_default(),
            authority: self.authority,
            secret: *self.secret.expose(),
            expires_unix: self.expires_unix,
            coordinators: self.coordinators.clone(),
        };
        let mut bytes = postcard::to_stdvec(&body).expect("texts and numbers always encode");
        let check = sha256(&bytes);
        bytes.extend_from_slice(&check[..CHECK]);
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    /// The certificate and key that prove the token in a handshake.
    ///
    /// # Errors
    /// The library's, if it cannot make a certificate.
    pub(super) fn proof(
        &self,
    ) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), rcgen::Error> {
        let der = PrivatePkcs8KeyDer::from([&PKCS8[..], self.secret.expose()].concat());
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&der, &rcgen::PKCS_ED25519)?;
        let cert = CertificateParams::default().self_signed(&key)?;
        Ok((cert.der().clone(), PrivateKeyDer::Pkcs8(der)))
    }
}

/// A token's name in lists and logs, from its public key.
#[must_use]
pub fn token_id(public_key: &[u8; 32]) -> String {
    let mut id = hex::encode(public_key);
    id.truncate(ID);
    id
}

/// The public key that the holder of a token proved in a handshake; `None` for any other certificate.
#[must_use]
pub fn token_key_of(cert: &CertificateDer<'_>) -> Option<[u8; 32]> {
    let (_, cert) = x509_parser::parse_x509_certificate(cert).ok()?;
    let key = &cert.tbs_certificate.subject_pki;
    let ed25519 = key.algorithm.algorithm == x509_parser::oid_registry::OID_SIG_ED25519;
    ed25519.then(|| key.subject_public_key.data.as_ref().try_into().ok()).flatten()
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let Some(encoded) = text.strip_prefix(PREFIX).filter(|_| text.len() <= MAX) else {
            let ours = text.strip_prefix("outrider").is_some_and(|rest| {
                rest.find('_')
                    .is_some_and(|end| end > 0 && rest[..end].bytes().all(|b| b.is_ascii_digit()))
            });
            return Err(if ours { TokenError::Newer } else { TokenError::NoToken });
        };
        let bytes = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| TokenError::Damaged)?;
        let (body, check) = bytes.split_last_chunk::<CHECK>().ok_or(TokenError::Damaged)?;
        if sha256(body)[..CHECK] != check[..] {
            return Err(TokenError::Damaged);
        }
        let (body, rest): (Body, _) =
            postcard::take_from_bytes(body).map_err(|_| TokenError::Damaged)?;
        let role = match body.role {
            1 => Role::Node,
            2 => Role::Storage,
            _ => return Err(TokenError::Newer),
        };
        if !rest.is_empty() || body.coordinators.is_empty() {
            return Err(TokenError::Damaged);
        }
        Ok(Self {
            fabric: body.fabric,
            role,
            name: (!body.name.is_empty()).then_some(body.name),
            authority: body.authority,
            expires_unix: body.expires_unix,
            coordinators: body.coordinators,
            secret: Secret::new(body.secret),
        })
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({} for a {} of {})", self.id(), self.role, self.fabric)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken::new(
            "fab-1".into(),
            Role::Node,
            Some("호스트 1".into()),
            &CertificateDer::from(vec![1, 2, 3]),
            1_900_000_000,
            vec!["10.0.0.1:9801".into(), "[fd00::1]:9801".into()],
        )
    }

    #[test]
    fn a_token_comes_back_from_its_text_and_a_changed_one_does_not() {
        let token = token();
        let text = token.to_text();
        assert!(
            text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-'),
            "{text}"
        );
        assert_eq!(format!(" {text}\r\n").parse(), Ok(token));
        for cut in PREFIX.len()..text.len() {
            assert_eq!(text[..cut].parse::<JoinToken>(), Err(TokenError::Damaged), "{cut}");
        }
        for at in PREFIX.len()..text.len() {
            let mut changed = text.clone().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).expect("ASCII");
            assert_eq!(changed.parse::<JoinToken>(), Err(TokenError::Damaged), "{at}");
        }
        assert_eq!("hello".parse::<JoinToken>(), Err(TokenError::NoToken));
        assert_eq!("outrider2_AAAA".parse::<JoinToken>(), Err(TokenError::Newer));
    }

    #[test]
    fn the_secret_stays_in_the_text() {
        let token = token();
        let secret = hex::encode(token.secret.expose());
        assert!(!format!("{token:?}{}", token.id()).contains(&secret[..12]));
    }

    #[test]
    fn the_proof_carries_the_public_key() {
        let token = token();
        let (cert, _) = token.proof().expect("made");
        assert_eq!(token_key_of(&cert), Some(token.public_key()));
    }
}
