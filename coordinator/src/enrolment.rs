//! Signing those that join and those that renew, by the enrolment authority in the replicated state.

use std::time::{Duration, SystemTime};

use outrider_process::identity::Role;
use outrider_process::identity::enrolment::{EnrolmentError, SealedEnrolment, SigningRequest};
use outrider_process::secret::kek::KeyEncryptionKey;

use crate::state::State;

/// What a coordinator needs to sign.
#[derive(Debug)]
pub(crate) struct Enroller {
    fabric: String,
    kek: KeyEncryptionKey,
    validity: Duration,
}

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SignError {
    #[error(
        "the coordinators of this fabric have no enrolment authority: put enrol.pem and enrol.key, which `outrider fabric \
         init` made, into a coordinator's identity folder and start it again, or issue the identity by hand with `outrider \
         fabric issue`"
    )]
    NoAuthority,
    #[error(transparent)]
    Enrolment(#[from] EnrolmentError),
}

impl Enroller {
    pub(crate) fn new(fabric: String, kek: KeyEncryptionKey, validity: Duration) -> Self {
        Self { fabric, kek, validity }
    }

    /// Signs a member's key; gives the chain as PEM. The key is open for the length of this call.
    pub(crate) fn sign(
        &self,
        state: &State,
        request: &SigningRequest,
        role: Role,
        name: &str,
        now: SystemTime,
    ) -> Result<String, SignError> {
        let authority = state.enrolment.authority.as_ref().ok_or(SignError::NoAuthority)?;
        let sealed =
            SealedEnrolment { cert_pem: authority.cert_pem.clone(), key: authority.key.clone() };
        let ca = sealed.open(&self.fabric, &self.kek)?;
        Ok(ca.sign(request, role, name, now, self.validity)?)
    }
}
