//! TLS between a machine that joins and a coordinator, before the machine has an identity.
//!
//! Both sides are proven all the same: the machine by the key of its token, the coordinator by a certificate of the
//! authority whose fingerprint the token carries. Such connections ask for a server name of their own, so that a coordinator
//! serves them nothing but enrolment.

use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible,
    ServerConfig, SignatureScheme,
};

use super::tls::{provider, roots};
use super::token::{JoinToken, token_key_of};
use super::{Identity, IdentityError, Role, peer_of, sha256};

/// The server name that joining machines ask for.
pub const JOIN_SERVER_NAME: &str = "join.outrider.internal";

impl Identity {
    /// For a coordinator: accepts whoever proves *some* token's key; which tokens are good is for the service to say, in
    /// a sentence. The chain is sent with the authority, which joining machines know by its fingerprint only.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn joining_server(&self, alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, IdentityError> {
        let (mut chain, key) = self.chain_and_key();
        chain.push(self.ca.clone());
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(IdentityError::Tls)?
            .with_client_cert_verifier(Arc::new(TokenHolders { provider: provider() }))
            .with_single_cert(chain, key)
            .map_err(IdentityError::Tls)?;
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        // A resumed session would bring its certificate along; there is nothing to gain for one call.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}

/// For the machine: proves the token, and accepts a coordinator of its fabric only. The second value holds the
/// authority's certificate after a handshake.
///
/// # Errors
/// [`IdentityError`].
pub fn joining_client(
    token: &JoinToken,
    alpn: &[&[u8]],
) -> Result<(Arc<ClientConfig>, Arc<Pinned>), IdentityError> {
    let (cert, key) = token.proof().map_err(IdentityError::Issue)?;
    let pinned = Arc::new(Pinned {
        fabric: token.fabric.clone(),
        fingerprint: token.authority,
        authority: OnceLock::new(),
        provider: provider(),
    });
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(IdentityError::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(pinned.clone())
        .with_client_auth_cert(vec![cert], key)
        .map_err(IdentityError::Tls)?;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.resumption = rustls::client::Resumption::disabled();
    Ok((Arc::new(config), pinned))
}

/// Accepts a coordinator whose chain ends at the authority with the token's fingerprint.
#[derive(Debug)]
pub struct Pinned {
    fabric: String,
    fingerprint: [u8; 32],
    authority: OnceLock<CertificateDer<'static>>,
    provider: Arc<CryptoProvider>,
}

/// Why a coordinator was not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// Another authority.
    #[error(
        "the machine that answered is no coordinator of the token's fabric; make a new token, and check the addresses in it"
    )]
    OtherAuthority,
    /// The right authority, another role or fabric.
    #[error("the machine that answered is {found}, not a coordinator of fabric {fabric}")]
    OtherRole {
        /// As its certificate names it.
        found: String,
        /// The token's fabric.
        fabric: String,
    },
}

impl Pinned {
    /// The authority's certificate, once a coordinator was believed.
    #[must_use]
    pub fn authority(&self) -> Option<&CertificateDer<'static>> {
        self.authority.get()
    }
}

fn other(error: PinError) -> Error {
    Error::Other(OtherError(Arc::new(error)))
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _asked_for: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let authority = intermediates.iter().find(|cert| sha256(cert) == self.fingerprint);
        let authority =
            authority.ok_or_else(|| other(PinError::OtherAuthority))?.clone().into_owned();
        let roots = Arc::new(roots(&authority)?);
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, self.provider.clone())
            .build()
            .map_err(|error| Error::General(error.to_string()))?;
        let name = Role::Coordinator.server_name().try_into().expect("a role makes a DNS name");
        let verified =
            verifier.verify_server_cert(end_entity, intermediates, &name, ocsp_response, now)?;
        let found = peer_of(std::slice::from_ref(end_entity))
            .map_err(|error| Error::General(error.to_string()))?;
        if found.role != Role::Coordinator || found.fabric != self.fabric {
            let found = format!("{found} of fabric {}", found.fabric);
            return Err(other(PinError::OtherRole { found, fabric: self.fabric.clone() }));
        }
        let _ = self.authority.set(authority);
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls13RequiredForQuic))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Accepts a certificate that holds a token's kind of key; the handshake proves that the client has the private half.
#[derive(Debug)]
struct TokenHolders {
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for TokenHolders {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if intermediates.is_empty() && token_key_of(end_entity).is_some() {
            return Ok(ClientCertVerified::assertion());
        }
        Err(Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer))
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls13RequiredForQuic))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
