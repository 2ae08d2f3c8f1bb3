//! The names that certificates carry.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use x509_parser::extensions::GeneralName;

use super::PeerError;

const SCHEME: &str = "outrider://";

/// What a member of a fabric is allowed to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A member of the Raft group.
    Coordinator,
    /// A storage node.
    Storage,
    /// The agent on a host.
    Node,
    /// A person or a script.
    Operator,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 4] = [Self::Coordinator, Self::Storage, Self::Node, Self::Operator];

    /// Its word in names, configurations and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Storage => "storage",
            Self::Node => "node",
            Self::Operator => "operator",
        }
    }

    /// The server name that clients of this role ask for in TLS.
    pub fn server_name(self) -> String {
        format!("{self}.outrider.internal")
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|role| role.as_str() == text).ok_or(())
    }
}

/// A member of a fabric, as its certificate names it.
///
/// `Display` gives `role/name` for people; [`Self::to_uri`] the whole name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PeerName {
    /// The fabric's id.
    pub fabric: String,
    /// The role.
    pub role: Role,
    /// The name inside role and fabric; any Unicode.
    pub name: String,
}

impl PeerName {
    /// `outrider://<fabric>/<role>/<name>`, percent-encoded (RFC 3986, section 2.1).
    pub fn to_uri(&self) -> String {
        format!("{SCHEME}{}/{}/{}", encode(&self.fabric), self.role, encode(&self.name))
    }

    /// Parses [`Self::to_uri`].
    ///
    /// # Errors
    /// [`PeerError::Malformed`].
    pub fn from_uri(uri: &str) -> Result<Self, PeerError> {
        Self::parse(uri).ok_or_else(|| PeerError::Malformed { uri: uri.to_owned() })
    }

    /// Whether a certificate can carry such a name.
    pub fn is_valid_name(name: &str) -> bool {
        !name.is_empty() && name.chars().count() <= 200 && !name.chars().any(char::is_control)
    }

    fn parse(uri: &str) -> Option<Self> {
        let mut parts = uri.strip_prefix(SCHEME)?.split('/');
        let fabric = decode(parts.next()?)?;
        let role = parts.next()?.parse().ok()?;
        let name = decode(parts.next()?)?;
        let whole = parts.next().is_none() && Self::is_valid_name(&fabric);
        (whole && Self::is_valid_name(&name)).then_some(Self { fabric, role, name })
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.role, self.name)
    }
}

/// The name in a verified certificate chain.
///
/// It reads, it does not verify: give it only what a TLS handshake accepted. Its DNS name must be that of its role: what
/// the enrolment authority may sign is limited by DNS names, so a role that disagreed with them would be stolen.
///
/// # Errors
/// [`PeerError`].
pub fn peer_of(certs: &[CertificateDer<'_>]) -> Result<PeerName, PeerError> {
    let leaf = certs.first().ok_or(PeerError::NoCertificate)?;
    let (peer, dns) = names(leaf)?;
    if dns == [peer.role.server_name()] {
        Ok(peer)
    } else {
        Err(PeerError::Role { uri: peer.to_uri(), dns: dns.join(", ") })
    }
}

/// The name in any certificate of ours, also in an authority's, which has no DNS name.
pub(super) fn name_of(cert: &CertificateDer<'_>) -> Result<PeerName, PeerError> {
    names(cert).map(|(peer, _)| peer)
}

/// Our name and the DNS names of a certificate.
fn names(cert: &CertificateDer<'_>) -> Result<(PeerName, Vec<String>), PeerError> {
    let (_, cert) = x509_parser::parse_x509_certificate(cert).map_err(|_| PeerError::Unreadable)?;
    let names = cert.subject_alternative_name().map_err(|_| PeerError::Unreadable)?;
    let (mut ours, mut dns) = (Vec::new(), Vec::new());
    for name in names.iter().flat_map(|extension| &extension.value.general_names) {
        match name {
            GeneralName::URI(uri) if uri.starts_with(SCHEME) => ours.push(*uri),
            GeneralName::DNSName(name) => dns.push((*name).to_owned()),
            _ => {}
        }
    }
    match ours[..] {
        [uri] => Ok((PeerName::from_uri(uri)?, dns)),
        _ => Err(PeerError::Names { count: ours.len() }),
    }
}

/// Who sent a gRPC request.
///
/// # Errors
/// [`PeerError`]; it converts into a `tonic::Status`.
pub fn peer_of_request<T>(request: &tonic::Request<T>) -> Result<PeerName, PeerError> {
    peer_of(&request.peer_certs().ok_or(PeerError::NoCertificate)?)
}

/// Who is at the other end of a QUIC connection.
///
/// # Errors
/// [`PeerError`].
pub fn peer_of_connection(connection: &quinn::Connection) -> Result<PeerName, PeerError> {
    let identity = connection.peer_identity().ok_or(PeerError::NoCertificate)?;
    let certs = identity
        .downcast::<Vec<CertificateDer<'static>>>()
        .map_err(|_| PeerError::NoCertificate)?;
    peer_of(&certs)
}

fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let byte = if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            let mut decoded = [0];
            hex::decode_to_slice(digits, &mut decoded).ok()?;
            decoded[0]
        } else {
            byte
        };
        bytes.push(byte);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_comes_back_from_its_uri() {
        for name in ["hv-1", "호스트-서울 1", "a/b%c?#", "🦀"] {
            for role in Role::ALL {
                let peer = PeerName { fabric: "fab-01".to_owned(), role, name: name.to_owned() };
                let uri = peer.to_uri();
                assert!(uri.is_ascii(), "{uri}");
                assert_eq!(PeerName::from_uri(&uri), Ok(peer));
            }
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for uri in [
            "",
            "outrider://",
            "outrider://f/node",
            "outrider://f/node/",
            "outrider:///node/n",
            "outrider://f/king/n",
            "outrider://f/node/n/more",
            "outrider://f/node/%4",
            "outrider://f/node/%FF",
            "outrider://f/node/%0A",
            "https://f/node/n",
        ] {
            assert!(PeerName::from_uri(uri).is_err(), "{uri}");
        }
    }
}
