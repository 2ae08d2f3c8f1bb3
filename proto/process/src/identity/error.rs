//! What can be wrong with an identity, ours or a peer's.

use std::io;
use std::path::PathBuf;

use super::{PeerName, Role};

/// An identity that cannot be used, made or saved.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file of the identity is not there.
    #[error("{path} is missing; copy the whole identity directory again, or issue a new identity")]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {path}; check that this user may read it")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error(transparent)]
    Write(#[from] crate::fs::FsError),
    /// Others can read a private key.
    #[error(
        "{path} can be read by others (mode {mode:o}); run chmod 600 on it, and issue a new identity \
         if somebody may have copied it"
    )]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A file holds something else.
    #[error("{path} does not hold {expected}; copy it again, or issue a new identity")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What belongs there.
        expected: &'static str,
    },
    /// The certificate was not made by a fabric.
    #[error("the certificate {path} is not one of a fabric; issue an identity for this process")]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// What it lacks.
        source: PeerError,
    },
    /// Certificate and key are not a pair.
    #[error(
        "the key {key} does not belong to the certificate {certificate}; copy both from the same \
         identity, or issue a new one"
    )]
    KeyMismatch {
        /// The certificate.
        certificate: PathBuf,
        /// The key.
        key: PathBuf,
    },
    /// Too late.
    #[error("the certificate {path} of {peer} expired on {date}; issue a new identity for {peer}")]
    Expired {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        peer: PeerName,
        /// Day of its end (UTC).
        date: String,
    },
    /// Too early.
    #[error(
        "the certificate {path} of {peer} is not valid before {date}; set this machine's clock, or \
         issue a new identity"
    )]
    NotYetValid {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        peer: PeerName,
        /// Day of its beginning (UTC).
        date: String,
    },
    /// Another fabric's authority.
    #[error(
        "{dir}: the certificate of {peer} (fabric {}) was not signed by the authority in ca.pem \
         (fabric {ca_fabric}); copy ca.pem of its own fabric, or issue an identity in fabric {ca_fabric}",
        .peer.fabric
    )]
    OtherFabric {
        /// The identity directory.
        dir: PathBuf,
        /// Whose certificate it is.
        peer: Box<PeerName>,
        /// The fabric of ca.pem, "unknown" if it names none.
        ca_fabric: String,
    },
    /// A name that no certificate can carry.
    #[error(
        "{name:?} cannot be the name of a {role}; use 1 to 200 characters without control characters"
    )]
    Name {
        /// The role.
        role: Role,
        /// The name.
        name: String,
    },
    /// The certificate cannot be made.
    #[error("cannot make a certificate")]
    Issue(#[source] rcgen::Error),
    /// A renewed certificate is not the old one's.
    #[error(
        "the certificate in {dir} changed from {expected} to {found} while this process ran; start it again, or put the \
         old one back"
    )]
    Changed {
        /// The identity directory.
        dir: PathBuf,
        /// Whose identity the process has.
        expected: PeerName,
        /// Whose certificate is there now, or another authority's.
        found: String,
    },
    /// The TLS library refuses the identity.
    #[error("the identity cannot be used for TLS")]
    Tls(#[source] rustls::Error),
}

/// A peer whose certificate does not say who it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// No certificate was presented.
    #[error("the peer presented no certificate; connect with an identity of this fabric")]
    NoCertificate,
    /// The certificate cannot be parsed.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// The certificate has not exactly one name of ours.
    #[error("the certificate names {count} fabric members instead of one")]
    Names {
        /// How many `outrider://` names it has.
        count: usize,
    },
    /// Role and DNS name disagree.
    #[error("{uri} does not go with the DNS name {dns:?} in the same certificate")]
    Role {
        /// The name.
        uri: String,
        /// DNS names of the certificate.
        dns: String,
    },
    /// The name is malformed.
    #[error("{uri} is no fabric name (outrider://fabric/role/name)")]
    Malformed {
        /// The name.
        uri: String,
    },
}

impl From<PeerError> for tonic::Status {
    fn from(error: PeerError) -> Self {
        Self::unauthenticated(error.to_string())
    }
}
