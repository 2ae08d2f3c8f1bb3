//! The enrolment authority: an intermediate of the fabric's authority that coordinators hold, so that hosts and storage
//! nodes can join and renew while the fabric's own key stays in a safe.
//!
//! It can make nothing but hosts and storage nodes: its certificate permits the DNS names of those roles alone (RFC 5280,
//! 4.2.1.10), every TLS handshake checks that, and [`super::peer_of`] demands that a certificate's role and DNS name agree.

use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateSigningRequestParams, Issuer, KeyPair, PublicKeyData};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer};

use super::ca::{BACKDATED, checked, member_params};
use super::peer::name_of;
use super::{IdentityError, Role, file, read};
use crate::fs;
use crate::secret::SecretBytes;
use crate::secret::kek::{KekError, KeyEncryptionKey};

/// Roles that can join a fabric by themselves.
pub const ENROLLED: [Role; 2] = [Role::Node, Role::Storage];

/// The enrolment authority as it lies on disk and in the replicated state: its key is wrapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedEnrolment {
    /// Its certificate, PEM.
    pub cert_pem: String,
    /// Its key, PKCS #8, wrapped by the key-encryption key.
    pub key: Vec<u8>,
}

/// An enrolment authority that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EnrolmentError {
    /// Its key does not open.
    #[error("the key of the enrolment authority does not open")]
    Kek(#[from] KekError),
    /// Its certificate is of another fabric, or none.
    #[error(
        "the enrolment authority is not one of fabric {fabric}; copy enrol.pem and enrol.key from the folder that \
         `outrider fabric init` made"
    )]
    NotOurs {
        /// The fabric at hand.
        fabric: String,
    },
    /// What a machine sent is no request.
    #[error("this is no signing request for one key (PKCS #10)")]
    Request,
    /// The certificate cannot be made.
    #[error("cannot make a certificate")]
    Issue(#[source] rcgen::Error),
    /// The name cannot be carried.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

impl SealedEnrolment {
    /// Seals a fresh authority.
    pub(super) fn seal(
        fabric: &str,
        cert_pem: String,
        key: &KeyPair,
        kek: &KeyEncryptionKey,
    ) -> Self {
        Self { cert_pem, key: kek.wrap(&aad(fabric), key.serialized_der()) }
    }

    /// Reads `enrol.pem` and `enrol.key` of a directory; `None` if it has no such files.
    ///
    /// # Errors
    /// [`IdentityError`] if one of the two is missing or unreadable.
    pub fn load(dir: &Path) -> Result<Option<Self>, IdentityError> {
        let (cert, key) = (dir.join(file::ENROL_CERT), dir.join(file::ENROL_KEY));
        if !cert.exists() && !key.exists() {
            return Ok(None);
        }
        let unreadable =
            |path: &Path, expected| IdentityError::Unreadable { path: path.to_owned(), expected };
        let cert_pem =
            String::from_utf8(read(&cert)?).map_err(|_| unreadable(&cert, "a PEM certificate"))?;
        let wrapped = read(&key)?;
        let wrapped = std::str::from_utf8(&wrapped).ok().and_then(|t| hex::decode(t.trim()).ok());
        let wrapped = wrapped.ok_or_else(|| unreadable(&key, "a wrapped key"))?;
        Ok(Some(Self { cert_pem, key: wrapped }))
    }

    /// Writes both files.
    ///
    /// # Errors
    /// [`IdentityError::Write`].
    pub fn save(&self, dir: &Path) -> Result<(), IdentityError> {
        fs::create_dir_durable(dir)?;
        fs::write_private(&dir.join(file::ENROL_KEY), hex::encode(&self.key).as_bytes())?;
        Ok(fs::write_atomic(&dir.join(file::ENROL_CERT), self.cert_pem.as_bytes())?)
    }

    /// Opens the key.
    ///
    /// # Errors
    /// [`EnrolmentError::Kek`], [`EnrolmentError::NotOurs`].
    pub fn open(
        &self,
        fabric: &str,
        kek: &KeyEncryptionKey,
    ) -> Result<EnrolmentCa, EnrolmentError> {
        let not_ours = || EnrolmentError::NotOurs { fabric: fabric.to_owned() };
        let der =
            CertificateDer::from_pem_slice(self.cert_pem.as_bytes()).map_err(|_| not_ours())?;
        if name_of(&der).map_err(|_| not_ours())?.fabric != fabric {
            return Err(not_ours());
        }
        let plain = kek.unwrap("the key of the enrolment authority", &aad(fabric), &self.key)?;
        let key = KeyPair::try_from(plain.expose()).map_err(|_| not_ours())?;
        Ok(EnrolmentCa { fabric: fabric.to_owned(), cert_pem: self.cert_pem.clone(), key })
    }
}

fn aad(fabric: &str) -> Vec<u8> {
    format!("enrolment key of fabric {fabric}").into_bytes()
}

/// The open enrolment authority. Its key is wiped by nobody: keep it no longer than one signature takes.
pub struct EnrolmentCa {
    fabric: String,
    cert_pem: String,
    key: KeyPair,
}

impl std::fmt::Debug for EnrolmentCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EnrolmentCa({})", self.fabric)
    }
}

impl EnrolmentCa {
    /// Signs the key of a request. What the request says beside its key is ignored. Gives the chain as PEM: the new
    /// certificate, then this authority's.
    ///
    /// # Errors
    /// [`EnrolmentError`].
    pub fn sign(
        &self,
        request: &SigningRequest,
        role: Role,
        name: &str,
        now: SystemTime,
        validity: Duration,
    ) -> Result<String, EnrolmentError> {
        let peer = checked(&self.fabric, role, name)?;
        let params = member_params(&peer, now - BACKDATED, now + validity)?;
        let issuer =
            Issuer::from_ca_cert_pem(&self.cert_pem, &self.key).map_err(EnrolmentError::Issue)?;
        let cert =
            params.signed_by(&request.0.public_key, &issuer).map_err(EnrolmentError::Issue)?;
        Ok(format!("{}{}", cert.pem(), self.cert_pem))
    }
}

/// What a machine sends to have its key signed. Its own signature was checked: whoever sent it has the key.
#[derive(Debug)]
pub struct SigningRequest(CertificateSigningRequestParams);

impl SigningRequest {
    /// Longest request that is looked at; one of ours has some 300 bytes.
    pub const MAX: usize = 8 << 10;

    /// Parses and checks PKCS #10.
    ///
    /// # Errors
    /// [`EnrolmentError::Request`].
    pub fn parse(der: &[u8]) -> Result<Self, EnrolmentError> {
        if der.len() > Self::MAX {
            return Err(EnrolmentError::Request);
        }
        CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der))
            .map(Self)
            .map_err(|_| EnrolmentError::Request)
    }

    /// Tells keys apart: the SHA-256 of the public key's SubjectPublicKeyInfo.
    #[must_use]
    pub fn key_id(&self) -> [u8; 32] {
        super::sha256(&self.0.public_key.subject_public_key_info())
    }
}

/// As [`SigningRequest::key_id`], of the key in a certificate.
#[must_use]
pub fn key_id_of(cert: &CertificateDer<'_>) -> Option<[u8; 32]> {
    let (_, cert) = x509_parser::parse_x509_certificate(cert).ok()?;
    Some(super::sha256(cert.tbs_certificate.subject_pki.raw))
}

/// A machine's own keys: made where they are used, never sent.
pub struct OwnKeys {
    key: KeyPair,
}

impl std::fmt::Debug for OwnKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OwnKeys(..)")
    }
}

impl OwnKeys {
    /// The keys of an identity directory; made, and durable, if there are none: who repeats an enrolment whose answer
    /// was lost asks for the same key.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load_or_make(dir: &Path) -> Result<Self, IdentityError> {
        let path = dir.join(file::KEY);
        if path.exists() {
            return Self::load(dir);
        }
        fs::create_dir_durable(dir)?;
        let key = KeyPair::generate().map_err(IdentityError::Issue)?;
        let sign = super::SigningKey::generate_pkcs8();
        fs::write_private(&dir.join(file::SIGN), sign.expose())?;
        let pem = SecretBytes::new(key.serialize_pem().into_bytes());
        fs::write_private(&path, pem.expose())?;
        Ok(Self { key })
    }

    /// The keys of an identity directory.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let path = dir.join(file::KEY);
        let pem = super::read_private(&path)?;
        let key = std::str::from_utf8(&pem).ok().and_then(|pem| KeyPair::from_pem(pem).ok());
        key.map(|key| Self { key })
            .ok_or(IdentityError::Unreadable { path, expected: "a PEM private key" })
    }

    /// The request to have the key signed, PKCS #10.
    ///
    /// # Errors
    /// [`IdentityError::Issue`].
    pub fn request(&self) -> Result<Vec<u8>, IdentityError> {
        let request = rcgen::CertificateParams::default()
            .serialize_request(&self.key)
            .map_err(IdentityError::Issue)?;
        Ok(request.der().to_vec())
    }
}

/// Puts a signed certificate beside the keys that [`OwnKeys`] made. The certificate is written last: a directory with one
/// is complete.
///
/// # Errors
/// [`IdentityError::Write`].
pub fn save_certificate(dir: &Path, ca_pem: &str, chain_pem: &str) -> Result<(), IdentityError> {
    fs::write_atomic(&dir.join(file::CA), ca_pem.as_bytes())?;
    Ok(fs::write_atomic(&dir.join(file::CERT), chain_pem.as_bytes())?)
}
