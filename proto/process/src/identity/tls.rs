//! TLS from an identity: 1.3 only, both sides proven, trust in the fabric's authority alone.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite};

use super::peer::name_of;
use super::{Identity, IdentityError, PeerName, Role};

/// A peer that connects and says nothing must not hold a handshake open.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

impl Identity {
    /// A server configuration that demands a certificate of this fabric.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn rustls_server(&self, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, IdentityError> {
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(self.roots()?), provider())
                .build()
                .map_err(|error| IdentityError::Tls(rustls::Error::General(error.to_string())))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(IdentityError::Tls)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(self.current.clone());
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        Ok(Arc::new(config))
    }

    /// A client configuration that shows our certificate; connect with [`Role::server_name`] of
    /// the role that must answer.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn rustls_client(&self, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, IdentityError> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(IdentityError::Tls)?
            .with_root_certificates(self.roots()?)
            .with_client_cert_resolver(self.current.clone());
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        // All servers of a role share one server name: a resumed session could show the name of
        // another server than the one that answers.
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }

    /// For a QUIC endpoint that accepts; the caller tunes the transport.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn quinn_server(
        &self,
        alpn: &[&[u8]],
        transport: Arc<quinn::TransportConfig>,
    ) -> Result<quinn::ServerConfig, IdentityError> {
        let crypto = QuicServerConfig::try_from(self.rustls_server(alpn)?)
            .expect("the provider has QUIC's initial suite");
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(transport);
        Ok(config)
    }

    /// For a QUIC endpoint that connects; the caller tunes the transport.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn quinn_client(
        &self,
        alpn: &[&[u8]],
        transport: Arc<quinn::TransportConfig>,
    ) -> Result<quinn::ClientConfig, IdentityError> {
        let crypto = QuicClientConfig::try_from(self.rustls_client(alpn)?)
            .expect("the provider has QUIC's initial suite");
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(transport);
        Ok(config)
    }

    /// For `tonic::transport::Server::tls_config`.
    pub fn tonic_server_tls(&self) -> tonic::transport::ServerTlsConfig {
        let pem = self.current.pem();
        tonic::transport::ServerTlsConfig::new()
            .identity(tonic::transport::Identity::from_pem(&pem.cert, &*pem.key))
            .client_ca_root(tonic::transport::Certificate::from_pem(&self.ca_pem))
            .timeout(HANDSHAKE_TIMEOUT)
    }

    /// For `tonic::transport::Endpoint::tls_config`; only a server of `role` is accepted.
    pub fn tonic_client_tls(&self, role: Role) -> tonic::transport::ClientTlsConfig {
        let pem = self.current.pem();
        tonic::transport::ClientTlsConfig::new()
            .identity(tonic::transport::Identity::from_pem(&pem.cert, &*pem.key))
            .ca_certificate(tonic::transport::Certificate::from_pem(&self.ca_pem))
            .domain_name(role.server_name())
    }

    fn roots(&self) -> Result<RootCertStore, IdentityError> {
        roots(&self.ca).map_err(IdentityError::Tls)
    }
}

/// Only the TLS 1.3 suites of ring: whoever takes this provider cannot speak 1.2.
pub(super) fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.retain(|suite| matches!(suite, SupportedCipherSuite::Tls13(_)));
    Arc::new(provider)
}

/// tonic has no setting for TLS versions; it takes the process's default provider.
pub(super) fn install_provider() {
    // Refused when it is installed already, which is what we want.
    let _ = CryptoProvider::clone(&provider()).install_default();
}

pub(super) fn roots(ca: &CertificateDer<'static>) -> Result<RootCertStore, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.clone())?;
    Ok(roots)
}

/// Beginning and end of the certificate in seconds since 1970, if it has begun and not ended.
pub(super) fn check_validity(
    path: &Path,
    peer: &PeerName,
    cert: &CertificateDer<'_>,
) -> Result<(i64, i64), IdentityError> {
    let (_, cert) = x509_parser::parse_x509_certificate(cert).map_err(|_| {
        IdentityError::Unreadable { path: path.to_owned(), expected: "a PEM certificate" }
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    let validity = cert.validity();
    let (path, peer) = (path.to_owned(), peer.clone());
    if now > validity.not_after.timestamp() {
        let date = validity.not_after.to_datetime().date().to_string();
        return Err(IdentityError::Expired { path, peer, date });
    }
    if now < validity.not_before.timestamp() {
        let date = validity.not_before.to_datetime().date().to_string();
        return Err(IdentityError::NotYetValid { path, peer, date });
    }
    Ok((validity.not_before.timestamp(), validity.not_after.timestamp()))
}

/// Certificate and key as rustls signs with them, if they are a pair.
pub(super) fn certified(
    certificate: &Path,
    key_path: &Path,
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
) -> Result<CertifiedKey, IdentityError> {
    CertifiedKey::from_der(chain.to_vec(), key.clone_key(), &provider()).map_err(
        |error| match error {
            rustls::Error::InconsistentKeys(_) => IdentityError::KeyMismatch {
                certificate: certificate.to_owned(),
                key: key_path.to_owned(),
            },
            error => IdentityError::Tls(error),
        },
    )
}

/// Whether the authority at hand signed the certificate, and is that of the fabric it names.
pub(super) fn check_issuer(
    dir: &Path,
    peer: &PeerName,
    ca: &CertificateDer<'static>,
    chain: &[CertificateDer<'static>],
) -> Result<(), IdentityError> {
    let ca_fabric = name_of(ca).ok().map(|ca| ca.fabric);
    let roots = Arc::new(roots(ca).map_err(IdentityError::Tls)?);
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|error| IdentityError::Tls(rustls::Error::General(error.to_string())))?;
    let name = peer.role.server_name().try_into().expect("a role makes a DNS name");
    let signed = rustls::client::danger::ServerCertVerifier::verify_server_cert(
        &*verifier,
        &chain[0],
        &chain[1..],
        &name,
        &[],
        UnixTime::now(),
    );
    if signed.is_ok() && ca_fabric.as_ref() == Some(&peer.fabric) {
        return Ok(());
    }
    Err(IdentityError::OtherFabric {
        dir: dir.to_owned(),
        peer: Box::new(peer.clone()),
        ca_fabric: ca_fabric.unwrap_or_else(|| "unknown".to_owned()),
    })
}
