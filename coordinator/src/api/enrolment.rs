//! Joining and renewing. Two services: machines that join have a connection of their own and reach nothing else.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use outrider_process::identity::enrolment::{ENROLLED, SigningRequest, key_id_of};
use outrider_process::identity::token::{token_id, token_key_of};
use outrider_process::identity::{PeerName, Role, peer_of_request};
use outrider_proto::error_code::{self, DENIED};
use outrider_proto::rpc;
use outrider_proto::rpc::certificates_server::{Certificates, CertificatesServer};
use outrider_proto::rpc::enrolment_server::{Enrolment, EnrolmentServer};
use outrider_proto::status::status;
use tonic::{Request, Response, Status};

use crate::enrolment::{Enroller, SignError};
use crate::leader::Leader;
use crate::state::enrolment::{Enrol, member_key};
use crate::state::{Change, Outcome, Refusal};

/// Nothing that joining machines send is longer.
const MAX_REQUEST: usize = 64 << 10;

/// Serves machines that hold a join token.
pub(crate) struct EnrolmentService {
    leader: Arc<Leader>,
    enroller: Arc<Enroller>,
}

impl EnrolmentService {
    pub(crate) fn server(leader: Arc<Leader>, enroller: Arc<Enroller>) -> EnrolmentServer<Self> {
        EnrolmentServer::new(Self { leader, enroller }).max_decoding_message_size(MAX_REQUEST)
    }
}

#[tonic::async_trait]
impl Enrolment for EnrolmentService {
    async fn enrol(
        &self,
        request: Request<rpc::EnrolRequest>,
    ) -> Result<Response<rpc::IssuedCertificate>, Status> {
        let certs = request.peer_certs();
        let token = certs.as_ref().and_then(|c| c.first()).and_then(token_key_of);
        let token = token
            .ok_or_else(|| Status::unauthenticated("this connection was made without a token"))?;
        let r = request.into_inner();
        if !PeerName::is_valid_name(&r.name) {
            return Err(status(
                &error_code::BAD_NAME,
                format!(
                    "{:?} cannot be a member's name; use 1 to 200 characters without control characters",
                    r.name
                ),
            ));
        }
        let signing = SigningRequest::parse(&r.signing_request).map_err(bad_request)?;
        let leader = &self.leader;
        leader.member().prove().await.map_err(|error| super::proposal(leader, error))?;
        // Before a use of the token is spent.
        let ready = leader.member().replica().read(|s| s.enrolment.authority.is_some());
        if !ready {
            return Err(not_signed(&SignError::NoAuthority));
        }
        let enrol = Enrol { token, name: r.name.clone(), key: hex::encode(signing.key_id()) };
        let id = token_id(&token);
        match leader.propose(Change::Enrol(Box::new(enrol))).await {
            Ok(Outcome::Refused(refusal)) => {
                tracing::warn!(token = id, name = r.name, %refusal, "a machine was not let in");
                return Err(super::refused(&refusal));
            }
            Ok(_) => {}
            Err(error) => return Err(super::proposal(leader, error)),
        }
        let role = leader
            .member()
            .replica()
            .read(|state| state.enrolment.tokens.get(&hex::encode(token)).map(|token| token.role));
        let role = role.ok_or_else(|| Status::unavailable("the token was just forgotten"))?;
        let issued = issue(leader, &self.enroller, &signing, role, &r.name)?;
        tracing::info!(token = id, %role, name = r.name, version = r.version, "a machine joined");
        Ok(Response::new(issued))
    }
}

/// Serves members whose certificate is to be renewed.
pub(crate) struct CertificatesService {
    leader: Arc<Leader>,
    enroller: Arc<Enroller>,
}

impl CertificatesService {
    pub(crate) fn server(leader: Arc<Leader>, enroller: Arc<Enroller>) -> CertificatesServer<Self> {
        CertificatesServer::new(Self { leader, enroller }).max_decoding_message_size(MAX_REQUEST)
    }
}

#[tonic::async_trait]
impl Certificates for CertificatesService {
    async fn renew(
        &self,
        request: Request<rpc::RenewRequest>,
    ) -> Result<Response<rpc::IssuedCertificate>, Status> {
        let peer = peer_of_request(&request)?;
        if !ENROLLED.contains(&peer.role) {
            return Err(status(
                &DENIED,
                format!(
                    "certificates of the role {} are issued by hand; run `outrider fabric issue`",
                    peer.role
                ),
            ));
        }
        let certs = request.peer_certs();
        let shown = certs.as_ref().and_then(|c| c.first()).and_then(key_id_of);
        let signing =
            SigningRequest::parse(&request.into_inner().signing_request).map_err(bad_request)?;
        if shown != Some(signing.key_id()) {
            return Err(status(&DENIED, format!("{peer} may renew its own key only")));
        }
        let leader = &self.leader;
        leader.member().prove().await.map_err(|error| super::proposal(leader, error))?;
        let key = hex::encode(signing.key_id());
        if let Some(revoked) = leader.member().replica().read(|s| s.revoked(&key).cloned()) {
            let (member, by) = (revoked.member, revoked.by);
            return Err(super::refused(&Refusal::Revoked { member, by }));
        }
        let replaced = leader.member().replica().read(|state| {
            let joined = state.enrolment.members.get(&member_key(peer.role, &peer.name));
            joined.is_some_and(|joined| joined.key != key)
        });
        if replaced {
            // Another machine took this name over with the operator's leave.
            return Err(status(
                &error_code::NAME_HELD,
                format!(
                    "{peer} has joined with another key since; this machine's certificate is not renewed"
                ),
            ));
        }
        let issued = issue(leader, &self.enroller, &signing, peer.role, &peer.name)?;
        tracing::info!(%peer, "a certificate was renewed");
        Ok(Response::new(issued))
    }
}

fn issue(
    leader: &Leader,
    enroller: &Enroller,
    signing: &SigningRequest,
    role: Role,
    name: &str,
) -> Result<rpc::IssuedCertificate, Status> {
    let now = UNIX_EPOCH + Duration::from_millis(leader.member().clock().unix_millis());
    let (chain, coordinators) = leader.member().replica().read(|state| {
        let coordinators = state.advertised.values().cloned().collect();
        (enroller.sign(state, signing, role, name, now), coordinators)
    });
    let chain_pem = chain.map_err(|error| not_signed(&error))?;
    let ca_pem = leader.settings().ca_pem.clone();
    Ok(rpc::IssuedCertificate { chain_pem, ca_pem, coordinators })
}

fn bad_request(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

fn not_signed(error: &SignError) -> Status {
    match error {
        SignError::NoAuthority => status(&error_code::NO_ENROLMENT, error.to_string()),
        SignError::Enrolment(inner) => status(
            &error_code::INTERNAL,
            format!("the enrolment authority did not sign: {}", chain(inner)),
        ),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
