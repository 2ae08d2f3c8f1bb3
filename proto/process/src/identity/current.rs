//! The certificate that is shown now. A renewed one takes its place: the next handshake shows it, running connections stay.

use std::sync::{Arc, PoisonError, RwLock};

use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

/// tonic takes PEM only.
pub(super) struct Pem {
    pub(super) cert: Vec<u8>,
    pub(super) key: zeroize::Zeroizing<Vec<u8>>,
}

/// One certificate in all the forms that libraries want.
pub(super) struct Shown {
    pub(super) certified: Arc<CertifiedKey>,
    pub(super) key: PrivateKeyDer<'static>,
    pub(super) pem: Arc<Pem>,
    pub(super) not_before: i64,
    pub(super) not_after: i64,
}

/// The one in use. Locks are held for the length of a clone.
pub(super) struct Current(RwLock<Shown>);

impl Current {
    pub(super) fn new(shown: Shown) -> Self {
        Self(RwLock::new(shown))
    }

    pub(super) fn replace(&self, shown: Shown) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = shown;
    }

    fn read<T>(&self, look: impl FnOnce(&Shown) -> T) -> T {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn pem(&self) -> Arc<Pem> {
        self.read(|shown| shown.pem.clone())
    }

    pub(super) fn validity(&self) -> (i64, i64) {
        self.read(|shown| (shown.not_before, shown.not_after))
    }

    pub(super) fn chain_and_key(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        self.read(|shown| (shown.certified.cert.clone(), shown.key.clone_key()))
    }

    fn certified(&self) -> Arc<CertifiedKey> {
        self.read(|shown| shown.certified.clone())
    }
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Current(..)")
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certified())
    }
}

impl ResolvesClientCert for Current {
    fn resolve(&self, _: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let certified = self.certified();
        certified.key.choose_scheme(schemes).map(|_| certified)
    }

    fn has_certs(&self) -> bool {
        true
    }
}
