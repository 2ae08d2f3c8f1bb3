//! Keeps the certificate of a member fresh: renewed at two thirds of its life, over the member's own connection, with the
//! same key. Handshakes from then on show the new one; nothing is restarted.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use outrider_proto::rpc::certificates_client::CertificatesClient;
use outrider_proto::rpc::{IssuedCertificate, RenewRequest};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::fs::{self, FsError};
use crate::identity::enrolment::OwnKeys;
use crate::identity::{Identity, IdentityError};
use crate::leader::LeaderClient;
use crate::telemetry::host_events;

/// How long a renewal looks for a leader before it is tried again later.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest sleep: clocks are set, machines sleep.
const LOOK: Duration = Duration::from_secs(3600);
/// Pause after a renewal that failed, at most.
const RETRY: Duration = Duration::from_secs(1800);

/// Why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// The coordinators refused, or none leads.
    #[error("{}", .0.message())]
    Coordinator(Status),
    /// What came is not ours.
    #[error("the coordinators answered with another authority's certificate")]
    OtherAuthority,
    /// It cannot be kept.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// It cannot be used.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// Renews for ever, until cancelled.
///
/// # Cancel safety
/// Safe: the certificate on disk is the old or the new one.
pub async fn keep_fresh(
    identity: Arc<Identity>,
    leader: Arc<LeaderClient>,
    token: CancellationToken,
) {
    loop {
        let (begin, end) = life(&identity);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let wait = due(begin, end).saturating_sub(now);
        let pause = if wait.is_zero() {
            let renewed = tokio::select! {
                renewed = renew(&identity, &leader) => renewed,
                () = token.cancelled() => return,
            };
            match renewed {
                Ok(()) => {
                    tracing::info!(
                        not_after_unix = identity.not_after_unix(),
                        "the certificate was renewed"
                    );
                    // A coordinator that gives very short lives is not asked without end.
                    Duration::from_millis(200)
                }
                Err(error) => {
                    let left = end.saturating_sub(now);
                    tracing::warn!(
                        event_id = host_events::NOT_RENEWED,
                        %error,
                        left = humantime(left),
                        "the certificate was not renewed; when it ends, this machine is shut out until it joins again"
                    );
                    RETRY.min(left / 10).max(Duration::from_secs(1))
                }
            }
        } else {
            wait.min(LOOK)
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = token.cancelled() => return,
        }
    }
}

fn humantime(time: Duration) -> String {
    humantime_serde::re::humantime::format_duration(Duration::from_secs(time.as_secs())).to_string()
}

/// Renews once.
///
/// # Errors
/// [`RenewalError`]; the old certificate stays.
pub async fn renew(identity: &Identity, leader: &LeaderClient) -> Result<(), RenewalError> {
    let signing_request = OwnKeys::load(identity.dir())?.request()?;
    let request = RenewRequest { signing_request };
    let issued: IssuedCertificate = leader
        .call(PATIENCE, |channel| {
            let request = request.clone();
            async move {
                CertificatesClient::new(channel)
                    .renew(request)
                    .await
                    .map(tonic::Response::into_inner)
            }
        })
        .await
        .map_err(RenewalError::Coordinator)?;
    let authority = CertificateDer::from_pem_slice(issued.ca_pem.as_bytes()).ok();
    if authority.as_ref() != Some(identity.authority()) {
        return Err(RenewalError::OtherAuthority);
    }
    let cert = identity.dir().join("cert.pem");
    let old = std::fs::read(&cert).map_err(FsError::io("read", &cert))?;
    fs::write_atomic(&cert, issued.chain_pem.as_bytes())?;
    if let Err(error) = identity.reload() {
        // A certificate that we cannot use must not be what the next start finds.
        fs::write_atomic(&cert, &old)?;
        return Err(error.into());
    }
    leader.renewed();
    Ok(())
}

/// When the certificate was issued and when it ends, since 1970.
fn life(identity: &Identity) -> (Duration, Duration) {
    let seconds = |at: i64| Duration::from_secs(u64::try_from(at).unwrap_or(0));
    let begin = seconds(identity.not_before_unix()) + crate::identity::ca::BACKDATED;
    (begin, seconds(identity.not_after_unix()))
}

/// Two thirds of the life, so that weeks are left to mend what keeps it from being renewed.
fn due(begin: Duration, end: Duration) -> Duration {
    begin + end.saturating_sub(begin) * 2 / 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_due_at_two_thirds_of_its_life() {
        let day = Duration::from_secs(86_400);
        assert_eq!(due(day * 10, day * 100), day * 70);
        assert_eq!(
            due(day * 10, day * 9),
            day * 10,
            "one that ended before it began is due at once"
        );
    }
}
