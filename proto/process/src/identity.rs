//! Who a process is inside its fabric, and how it proves it.
//!
//! Each fabric has a certificate authority of its own ([`ca`]). A certificate names a fabric, a
//! [`Role`] and a name ([`PeerName`], in a URI SAN); its DNS SAN is that of the role, so that a
//! client that means a coordinator cannot be answered by a storage node. Every connection is
//! mutually authenticated TLS 1.3; nothing else is offered.
//!
//! An identity directory holds `ca.pem`, `cert.pem`, `key.pem` and `sign.pk8` ([`sign`]).

pub mod ca;
mod error;
mod peer;
pub mod sign;
mod tls;

use std::path::{Path, PathBuf};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

pub use error::{IdentityError, PeerError};
pub use peer::{PeerName, Role, peer_of, peer_of_connection, peer_of_request};
pub use sign::SigningKey;

/// File names inside an identity directory.
mod file {
    pub(super) const CA: &str = "ca.pem";
    pub(super) const CERT: &str = "cert.pem";
    pub(super) const KEY: &str = "key.pem";
    pub(super) const SIGN: &str = "sign.pk8";
}

/// The proven identity of this process.
#[derive(Debug)]
pub struct Identity {
    peer: PeerName,
    dir: PathBuf,
    ca: CertificateDer<'static>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    pem: Pem,
    signing: SigningKey,
    not_after: i64,
}

/// tonic takes PEM only.
struct Pem {
    ca: Vec<u8>,
    cert: Vec<u8>,
    key: zeroize::Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for Pem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pem(..)")
    }
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
        let pem = Pem {
            ca: read(&dir.join(file::CA))?,
            cert: read(&dir.join(file::CERT))?,
            key: read_private(&dir.join(file::KEY))?,
        };
        let signing_path = dir.join(file::SIGN);
        let signing = SigningKey::from_pkcs8(&read_private(&signing_path)?)
            .ok_or(IdentityError::Unreadable { path: signing_path, expected: "an Ed25519 key" })?;

        let (cert_path, key_path) = (dir.join(file::CERT), dir.join(file::KEY));
        let ca = CertificateDer::from_pem_slice(&pem.ca).map_err(|_| {
            IdentityError::Unreadable { path: dir.join(file::CA), expected: "a PEM certificate" }
        })?;
        let chain = CertificateDer::pem_slice_iter(&pem.cert)
            .collect::<Result<Vec<_>, _>>()
            .ok()
            .filter(|chain| !chain.is_empty())
            .ok_or_else(|| IdentityError::Unreadable {
                path: cert_path.clone(),
                expected: "a PEM certificate",
            })?;
        let key = PrivateKeyDer::from_pem_slice(&pem.key).map_err(|_| {
            IdentityError::Unreadable { path: key_path.clone(), expected: "a PEM private key" }
        })?;

        let peer = peer_of(&chain)
            .map_err(|source| IdentityError::NotOurs { path: cert_path.clone(), source })?;
        let not_after = tls::check_validity(&cert_path, &peer, &chain[0])?;
        tls::check_key(&cert_path, &key_path, &chain, &key)?;
        tls::check_issuer(dir, &peer, &ca, &chain)?;
        Ok(Self { peer, dir: dir.to_owned(), ca, chain, key, pem, signing, not_after })
    }

    /// The name in our own certificate.
    pub fn peer(&self) -> &PeerName {
        &self.peer
    }

    /// The directory it was loaded from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The key that signs receipts and tickets; its public half is registered with the
    /// coordinator over mutual TLS and stands in no certificate.
    pub fn signing_key(&self) -> &SigningKey {
        &self.signing
    }

    /// When the certificate ends, in seconds since 1970.
    pub fn not_after_unix(&self) -> i64 {
        self.not_after
    }
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
