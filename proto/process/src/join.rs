//! From a join token to an identity directory.
//!
//! The machine makes its own keys, proves the token in the TLS handshake, and accepts only a coordinator of the token's
//! fabric. What crosses the wire is a signing request and a certificate; nothing secret does.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use outrider_proto::error_code::{self, Class};
use outrider_proto::rpc::enrolment_client::EnrolmentClient;
use outrider_proto::rpc::{EnrolRequest, IssuedCertificate};
use outrider_proto::status;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tonic::transport::Endpoint;
use tonic::{Code, Status};

use crate::backoff::Backoff;
use crate::identity::enrolment::{OwnKeys, save_certificate};
use crate::identity::joining::{JOIN_SERVER_NAME, PinError, joining_client};
use crate::identity::token::JoinToken;
use crate::identity::{Identity, IdentityError, PeerName};

/// One coordinator may take this long; the next one is asked then.
const ATTEMPT: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// A machine that joined, or had done so before.
#[derive(Debug)]
pub struct Joined {
    /// Its identity.
    pub identity: Identity,
    /// Where the coordinators want to be reached; those of the token if they said nothing.
    pub coordinators: Vec<String>,
    /// The directory held this identity already; nobody was asked.
    pub before: bool,
}

/// Why a machine did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The identity directory.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The token names another machine.
    #[error(
        "the join token is for {wanted:?} alone, this machine is {found:?}; make a token for it with `outrider fabric token \
         create --name {found:?}`, or give --name {wanted:?} if that is its name"
    )]
    OtherName {
        /// In the token.
        wanted: String,
        /// This machine's.
        found: String,
    },
    /// The directory is somebody's already.
    #[error(
        "{dir} holds the identity of {found} in fabric {}; choose another folder, or remove it if that member is gone",
        .found.fabric
    )]
    Occupied {
        /// The directory.
        dir: PathBuf,
        /// Whose identity it is.
        found: Box<PeerName>,
    },
    /// A coordinator said no.
    #[error("{message}")]
    Refused {
        /// Its sentence.
        message: String,
        /// Its code.
        code: Option<String>,
    },
    /// Whoever answered is not to be believed.
    #[error("{address} is not to be believed")]
    Impostor {
        /// Whom we asked.
        address: String,
        /// What is wrong with it.
        source: PinError,
    },
    /// Nobody answered.
    #[error(
        "no coordinator let this machine in (asked: {asked}); the last one: {last}; check that a majority of the \
         coordinators runs, that this machine reaches them (TCP), and its clock"
    )]
    Unreachable {
        /// Addresses.
        asked: String,
        /// The last failure.
        last: String,
    },
    /// The answer is not what the token promised.
    #[error(
        "the coordinator sent the certificate of another authority than its own; nothing was kept"
    )]
    OtherAuthority,
}

/// Joins as `name`, and leaves an identity directory that [`Identity::load`] reads. A directory that is this member's
/// already stays as it is. Repeating it after a lost answer uses the same keys, which is the same use of the token.
///
/// # Errors
/// [`JoinError`].
pub async fn join(
    token: &JoinToken,
    name: &str,
    dir: &Path,
    patience: Duration,
) -> Result<Joined, JoinError> {
    if let Some(wanted) = token.name.as_ref().filter(|wanted| *wanted != name) {
        return Err(JoinError::OtherName { wanted: wanted.clone(), found: name.to_owned() });
    }
    let me = PeerName { fabric: token.fabric.clone(), role: token.role, name: name.to_owned() };
    match Identity::load(dir) {
        Ok(identity) if *identity.peer() == me => {
            let coordinators = token.coordinators.clone();
            return Ok(Joined { identity, coordinators, before: true });
        }
        Ok(identity) => return Err(occupied(dir, identity.peer())),
        // An old certificate of ours is replaced, with the same keys.
        Err(IdentityError::Expired { peer, .. }) if peer != me => return Err(occupied(dir, &peer)),
        Err(_) => {}
    }
    let keys = OwnKeys::load_or_make(dir)?;
    let request = EnrolRequest {
        name: name.to_owned(),
        signing_request: keys.request()?,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let issued = ask_all(token, &request, patience).await?;
    save_certificate(dir, &issued.ca_pem, &issued.chain_pem)?;
    let identity = Identity::load(dir)?;
    if *identity.peer() != me {
        return Err(occupied(dir, identity.peer()));
    }
    let coordinators = if issued.coordinators.is_empty() {
        token.coordinators.clone()
    } else {
        // Those of the token have been tried from here.
        let mut all = token.coordinators.clone();
        all.extend(issued.coordinators.into_iter().filter(|a| !token.coordinators.contains(a)));
        all
    };
    Ok(Joined { identity, coordinators, before: false })
}

fn occupied(dir: &Path, found: &PeerName) -> JoinError {
    JoinError::Occupied { dir: dir.to_owned(), found: Box::new(found.clone()) }
}

/// How one attempt failed.
enum Attempt {
    /// Nobody else will say anything better.
    Final(JoinError),
    /// Another coordinator may; the leader's address, if it is known.
    Next { why: String, leader: Option<String> },
}

async fn ask_all(
    token: &JoinToken,
    request: &EnrolRequest,
    patience: Duration,
) -> Result<IssuedCertificate, JoinError> {
    let until = Instant::now() + patience;
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE, Backoff::any_seed());
    let mut leader = None;
    let mut turn = 0;
    loop {
        let redirected = leader.is_some();
        let address = leader.take().unwrap_or_else(|| {
            let address = token.coordinators[turn % token.coordinators.len()].clone();
            turn += 1;
            address
        });
        let attempt = tokio::time::timeout(ATTEMPT, ask(token, &address, request)).await;
        let last = match attempt {
            Ok(Ok(issued)) => return Ok(issued),
            Ok(Err(Attempt::Final(error))) => return Err(error),
            Ok(Err(Attempt::Next { why, leader: named })) => {
                leader = named.filter(|named| !redirected && *named != address);
                why
            }
            Err(_) => format!("no answer within {ATTEMPT:?}"),
        };
        tracing::debug!(address, last, "this coordinator did not let us in");
        if leader.is_none() && turn % token.coordinators.len() == 0 {
            let pause = backoff.next_wait();
            if Instant::now() + pause >= until {
                let asked = token.coordinators.join(", ");
                return Err(JoinError::Unreachable { asked, last: format!("{address}: {last}") });
            }
            tokio::time::sleep(pause).await;
        }
    }
}

async fn ask(
    token: &JoinToken,
    address: &str,
    request: &EnrolRequest,
) -> Result<IssuedCertificate, Attempt> {
    let next = |why: String| Attempt::Next { why, leader: None };
    let (config, pinned) = joining_client(token, &[b"h2"]).map_err(|e| Attempt::Final(e.into()))?;
    let stream = TcpStream::connect(address).await.map_err(|e| next(e.to_string()))?;
    let name = ServerName::try_from(JOIN_SERVER_NAME).expect("a DNS name");
    let stream = match TlsConnector::from(config).connect(name, stream).await {
        Ok(stream) => stream,
        Err(error) => {
            return Err(match pin_error(&error) {
                Some(source) => {
                    Attempt::Final(JoinError::Impostor { address: address.to_owned(), source })
                }
                None => next(error.to_string()),
            });
        }
    };
    let mut stream = Some(TokioIo::new(stream));
    let once = tower::service_fn(move |_| {
        let stream = stream.take();
        async move { stream.ok_or_else(|| std::io::Error::other("the connection ended")) }
    });
    let channel = Endpoint::from_static("http://join.outrider.internal")
        .connect_with_connector(once)
        .await
        .map_err(|e| next(e.to_string()))?;
    let answer = EnrolmentClient::new(channel).enrol(request.clone()).await;
    let issued = answer.map_err(|failure| judge(&failure))?.into_inner();
    let sent = CertificateDer::from_pem_slice(issued.ca_pem.as_bytes()).ok();
    if sent.as_ref() != pinned.authority() {
        return Err(Attempt::Final(JoinError::OtherAuthority));
    }
    Ok(issued)
}

/// Finds our own judgement below the layers of TLS.
fn pin_error(error: &std::io::Error) -> Option<PinError> {
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::Other(other) => other.0.downcast_ref::<PinError>().cloned(),
        _ => None,
    }
}

fn judge(failure: &Status) -> Attempt {
    let detail = status::detail(failure);
    let class = detail.as_ref().and_then(|d| error_code::find(&d.code)).map(|c| c.class);
    let passing = match class {
        Some(class) => class == Class::Retry,
        None => matches!(
            failure.code(),
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded
        ),
    };
    let leader = detail.as_ref().map(|d| d.leader.clone()).filter(|leader| !leader.is_empty());
    let message = match failure.message() {
        "" => format!("the coordinator answered {:?} without a word", failure.code()),
        message => message.to_owned(),
    };
    if passing {
        Attempt::Next { why: message, leader }
    } else {
        Attempt::Final(JoinError::Refused { message, code: detail.map(|d| d.code) })
    }
}
