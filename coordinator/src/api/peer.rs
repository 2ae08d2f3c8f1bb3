//! Who calls, and whether that role may.

use outrider_process::identity::enrolment::key_id_of;
use outrider_process::identity::{PeerName, Role, peer_of_request};
use outrider_proto::error_code::DENIED;
use outrider_proto::status::status;
use tonic::{Request, Status};

/// The caller, if it has the role.
///
/// # Errors
/// `DENIED`. The fabric is proven by the handshake: each fabric has an authority of its own.
pub(crate) fn require<T>(request: &Request<T>, role: Role) -> Result<PeerName, Status> {
    let peer = peer_of_request(request)?;
    if peer.role == role {
        return Ok(peer);
    }
    Err(status(
        &DENIED,
        format!(
            "{peer} may not make this call, which is for the role {role}; use a certificate of that role"
        ),
    ))
}

/// SHA-256 of the public key in the caller's certificate, hexadecimal.
pub(crate) fn key_of<T>(request: &Request<T>) -> Option<String> {
    let certs = request.peer_certs()?;
    certs.first().and_then(key_id_of).map(hex::encode)
}

/// Refuses a name that is not the certificate's.
///
/// # Errors
/// `DENIED`.
pub(crate) fn same_name(peer: &PeerName, claimed: &str) -> Result<(), Status> {
    if peer.name == claimed {
        return Ok(());
    }
    Err(status(
        &DENIED,
        format!(
            "{peer} may not speak for {claimed:?}; issue a certificate for that name, or correct `name`"
        ),
    ))
}
