//! Who a process is inside its fabric, and how it proves it.
//!
//! Each fabric has a certificate authority of its own ([`ca`]). A certificate names a fabric, a
//! [`Role`] and a name ([`PeerName`], in a URI SAN); its DNS SAN is that of the role, so that a
//! client that means a coordinator cannot be answered by a storage node. Every connection is
//! mutually authenticated TLS 1.3; nothing else is offered.
//!
//! An identity directory holds `ca.pem`, `cert.pem`, `key.pem` and `sign.pk8` ([`sign`]). It is issued beside the
//! authority ([`ca`]), or the machine makes its keys itself and has them signed: by a join [`token`], over connections of
//! their own ([`joining`]), by the coordinators' [`enrolment`] authority.

pub mod ca;
mod current;
pub mod enrolment;
mod error;
pub mod joining;
mod peer;
pub mod sign;
mod tls;
pub mod token;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use current::{Current, Pem, Shown};

pub use error::{IdentityError, PeerError};
pub use peer::{PeerName, Role, peer_of, peer_of_connection, peer_of_request};
pub use sign::SigningKey;

/// File names inside an identity directory.
mod file {
    pub(super) const CA: &str = "ca.pem";
    pub(super) const CERT: &str = "cert.pem";
    pub(super) const KEY: &str = "key.pem";
    pub(super) const SIGN: &str = "sign.pk8";
    /// Coordinators only.
    pub(super) const ENROL_CERT: &str = "enrol.pem";
    pub(super) const ENROL_KEY: &str = "enrol.key";
}

/// The proven identity of this process.
#[derive(Debug)]
pub struct Identity {
    peer: PeerName,
    dir: PathBuf,
    ca: CertificateDer<'static>,
    ca_pem: Vec<u8>,
    current: Arc<Current>,
    signing: SigningKey,
}

impl Identity {
    /// Reads and checks an identity directory.
    ///
    /// It also makes the TLS 1.3 suites of ring the default of this process, since tonic takes its
    /// suites from there.
    ///
    /// # Errors
    /// [`IdentityError`]: a sentence for the operator each; nothing to retry before they acted.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        tls::install_provider();
        let ca_pem = read(&dir.join(file::CA))?;
        let ca = CertificateDer::from_pem_slice(&ca_pem).map_err(|_| {
            IdentityError::Unreadable { path: dir.join(file::CA), expected: "a PEM certificate" }
        })?;
        let (peer, shown) = shown(dir, &ca)?;
        let signing_path = dir.join(file::SIGN);
        let signing = SigningKey::from_pkcs8(&read_private(&signing_path)?)
            .ok_or(IdentityError::Unreadable { path: signing_path, expected: "an Ed25519 key" })?;
        let current = Arc::new(Current::new(shown));
        Ok(Self { peer, dir: dir.to_owned(), ca, ca_pem, current, signing })
    }

    /// Reads the certificate again, which was renewed. Handshakes from now on show it.
    ///
    /// # Errors
    /// [`IdentityError`]; the old certificate stays in use.
    pub fn reload(&self) -> Result<(), IdentityError> {
        let (peer, shown) = shown(&self.dir, &self.ca)?;
        if peer != self.peer {
            return Err(IdentityError::Changed {
                dir: self.dir.clone(),
                expected: self.peer.clone(),
                found: peer.to_string(),
            });
        }
        self.current.replace(shown);
        Ok(())
    }

    /// The name in our own certificate.
    pub fn peer(&self) -> &PeerName {
        &self.peer
    }

    /// The directory it was loaded from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The authority's certificate.
    pub fn authority(&self) -> &CertificateDer<'static> {
        &self.ca
    }

    /// The authority's certificate as PEM.
    pub fn authority_pem(&self) -> &[u8] {
        &self.ca_pem
    }

    /// The key that signs receipts and tickets; its public half is registered with the
    /// coordinator over mutual TLS and stands in no certificate.
    pub fn signing_key(&self) -> &SigningKey {
        &self.signing
    }

    /// When the certificate ends, in seconds since 1970.
    pub fn not_after_unix(&self) -> i64 {
        self.current.validity().1
    }

    /// When the certificate began, in seconds since 1970.
    pub fn not_before_unix(&self) -> i64 {
        self.current.validity().0
    }

    fn chain_and_key(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        self.current.chain_and_key()
    }
}

/// Reads and checks certificate and key of a directory.
fn shown(dir: &Path, ca: &CertificateDer<'static>) -> Result<(PeerName, Shown), IdentityError> {
    let (cert_path, key_path) = (dir.join(file::CERT), dir.join(file::KEY));
    let pem = Pem { cert: read(&cert_path)?, key: read_private(&key_path)? };
    let chain = CertificateDer::pem_slice_iter(&pem.cert)
        .collect::<Result<Vec<_>, _>>()
        .ok()
        .filter(|chain| !chain.is_empty())
        .ok_or_else(|| IdentityError::Unreadable {
            path: cert_path.clone(),
            expected: "a PEM certificate",
        })?;
    let key = PrivateKeyDer::from_pem_slice(&pem.key).map_err(|_| IdentityError::Unreadable {
        path: key_path.clone(),
        expected: "a PEM private key",
    })?;
    let peer = peer_of(&chain)
        .map_err(|source| IdentityError::NotOurs { path: cert_path.clone(), source })?;
    let (not_before, not_after) = tls::check_validity(&cert_path, &peer, &chain[0])?;
    let certified = Arc::new(tls::certified(&cert_path, &key_path, &chain, &key)?);
    tls::check_issuer(dir, &peer, ca, &chain)?;
    Ok((peer, Shown { certified, key, pem: Arc::new(pem), not_before, not_after }))
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    std::fs::read(path).map_err(|source| {
        if source.kind() == std::io::ErrorKind::NotFound {
            IdentityError::Missing { path: path.to_owned() }
        } else {
            IdentityError::Read { path: path.to_owned(), source }
        }
    })
}

fn read_private(path: &Path) -> Result<zeroize::Zeroizing<Vec<u8>>, IdentityError> {
    let bytes = zeroize::Zeroizing::new(read(path)?);
    check_mode(path)?;
    Ok(bytes)
}

/// Only the owner may read a key; its group, too, if root owns it, which is how a Kubernetes
/// volume with `fsGroup` hands a Secret to a process that is not root.
#[cfg(unix)]
fn check_mode(path: &Path) -> Result<(), IdentityError> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path)
        .map_err(|source| IdentityError::Read { path: path.to_owned(), source })?;
    let mode = metadata.mode() & 0o777;
    if is_private(mode, metadata.uid()) {
        Ok(())
    } else {
        Err(IdentityError::TooOpen { path: path.to_owned(), mode })
    }
}

#[cfg(unix)]
fn is_private(mode: u32, owner: u32) -> bool {
    let allowed = if owner == 0 { 0o740 } else { 0o700 };
    mode & !allowed == 0
}

#[cfg(not(unix))]
fn check_mode(_path: &Path) -> Result<(), IdentityError> {
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use super::is_private;

    #[test]
    fn a_group_may_read_a_key_only_where_root_handed_it_over() {
        assert!(is_private(0o600, 1000) && is_private(0o400, 0));
        assert!(is_private(0o440, 0), "a Kubernetes Secret with fsGroup");
        assert!(!is_private(0o440, 1000) && !is_private(0o640, 1000));
        assert!(!is_private(0o444, 0) && !is_private(0o660, 0));
    }
}
