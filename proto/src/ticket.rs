//! Tickets: what a job may do at the storage nodes, signed by the coordinator (Ed25519).
//!
//! ```text
//! 0 2 version (1) · 2 2 zero · 4 4 operations · 8 16 fabric · 24 16 job · 40 16 VM GUID · 56 16 domain
//! 72 8 lease epoch · 80 8 not after (Unix ms) · 88 2+n host · then 64 signature over all before it
//! ```

use ring::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};

use crate::ids::{DomainId, FabricId, JobId, LeaseEpoch, VmGuid};
use crate::wire::{DecodeError, Put, Reader};

/// Operations a ticket allows, as bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operations(pub u32);

impl Operations {
    /// Put chunks, pages and journal entries.
    pub const PUT: Self = Self(1);
    /// Ask whether chunks are there.
    pub const HAVE: Self = Self(2);
    /// Read pages.
    pub const GET_PAGES: Self = Self(4);
    /// Read data chunks: restore and verify only.
    pub const GET_DATA: Self = Self(8);
    /// Put root records.
    pub const ROOT: Self = Self(16);
    /// What a backup needs. It cannot read data.
    pub const BACKUP: Self = Self(1 | 2 | 4 | 16);
    /// What a restore needs.
    pub const RESTORE: Self = Self(2 | 4 | 8);

    /// Whether all of `other` are allowed.
    #[must_use]
    pub const fn allows(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What a ticket says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// Operations allowed.
    pub operations: Operations,
    /// Fabric.
    pub fabric: FabricId,
    /// Job.
    pub job: JobId,
    /// VM.
    pub vm: VmGuid,
    /// Dedup domain that records must belong to.
    pub domain: DomainId,
    /// Lease epoch: fences journal entries.
    pub lease_epoch: LeaseEpoch,
    /// Milliseconds since the Unix epoch.
    pub not_after_unix_ms: u64,
    /// Name in the certificate of the only host that may present it.
    pub host: String,
}

/// Why a ticket is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Malformed.
    #[error("ticket is malformed")]
    Malformed(#[source] DecodeError),
    /// Not signed by this fabric's coordinators.
    #[error("ticket was not signed by this fabric's coordinators")]
    Signature,
    /// Another host's.
    #[error("ticket was given to host {given_to:?}, but {presented_by:?} presents it")]
    Host {
        /// Host it was given to.
        given_to: String,
        /// Host that presents it.
        presented_by: String,
    },
    /// Too old.
    #[error(
        "ticket ended at {not_after_unix_ms} ms, now is {now_unix_ms} ms: ask the coordinator for a new lease, and check the clocks"
    )]
    Expired {
        /// End.
        not_after_unix_ms: u64,
        /// Now.
        now_unix_ms: u64,
    },
    /// Not for this.
    #[error("ticket of job {job} does not allow this operation")]
    NotAllowed {
        /// Job.
        job: JobId,
    },
}

impl Ticket {
    /// Encodes and signs.
    #[must_use]
    pub fn sign(&self, key: &Ed25519KeyPair) -> Vec<u8> {
        let mut out = Vec::with_capacity(160);
        out.put_u16(1);
        out.put_u16(0);
        out.put_u32(self.operations.0);
        out.extend_from_slice(&self.fabric.to_bytes());
        out.extend_from_slice(&self.job.to_bytes());
        out.extend_from_slice(&self.vm.to_bytes());
        out.extend_from_slice(&self.domain.to_bytes());
        out.put_u64(self.lease_epoch.0);
        out.put_u64(self.not_after_unix_ms);
        out.put_text(&self.host);
        let signature = key.sign(&out);
        out.extend_from_slice(signature.as_ref());
        out
    }

    /// Decodes a ticket and checks its signature with the fabric's ticket key.
    ///
    /// # Errors
    /// [`TicketError::Malformed`], [`TicketError::Signature`].
    pub fn verify(bytes: &[u8], key: &[u8]) -> Result<Self, TicketError> {
        let split =
            bytes.len().checked_sub(64).ok_or(TicketError::Malformed(DecodeError::Short {
                what: "ticket",
                needed: 64,
                left: bytes.len(),
            }))?;
        let (body, signature) = bytes.split_at(split);
        UnparsedPublicKey::new(&ED25519, key)
            .verify(body, signature)
            .map_err(|_| TicketError::Signature)?;
        Self::decode(body).map_err(TicketError::Malformed)
    }

    fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("ticket", body);
        let version = r.u16()?;
        if version != 1 {
            return Err(DecodeError::Value {
                what: "ticket version",
                found: version.to_string(),
                expected: "1",
            });
        }
        r.u16()?;
        let ticket = Self {
            operations: Operations(r.u32()?),
            fabric: FabricId::from_bytes(r.array()?),
            job: JobId::from_bytes(r.array()?),
            vm: VmGuid::from_bytes(r.array()?),
            domain: DomainId::from_bytes(r.array()?),
            lease_epoch: LeaseEpoch(r.u64()?),
            not_after_unix_ms: r.u64()?,
            host: r.text()?,
        };
        r.finish()?;
        Ok(ticket)
    }

    /// Checks holder and time.
    ///
    /// # Errors
    /// [`TicketError::Host`], [`TicketError::Expired`].
    pub fn check(&self, presented_by: &str, now_unix_ms: u64) -> Result<(), TicketError> {
        if self.host != presented_by {
            return Err(TicketError::Host {
                given_to: self.host.clone(),
                presented_by: presented_by.to_owned(),
            });
        }
        if now_unix_ms > self.not_after_unix_ms {
            return Err(TicketError::Expired {
                not_after_unix_ms: self.not_after_unix_ms,
                now_unix_ms,
            });
        }
        Ok(())
    }

    /// Checks an operation.
    ///
    /// # Errors
    /// [`TicketError::NotAllowed`].
    pub fn permit(&self, operation: Operations) -> Result<(), TicketError> {
        if self.operations.allows(operation) {
            Ok(())
        } else {
            Err(TicketError::NotAllowed { job: self.job })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::signature::KeyPair;

    #[test]
    fn a_changed_or_foreign_ticket_is_refused() {
        let key = Ed25519KeyPair::from_seed_unchecked(&[1; 32]).expect("seed of 32 bytes");
        let other = Ed25519KeyPair::from_seed_unchecked(&[2; 32]).expect("seed of 32 bytes");
        let ticket = Ticket {
            operations: Operations::BACKUP,
            fabric: FabricId::random(),
            job: JobId::random(),
            vm: VmGuid::random(),
            domain: DomainId::random(),
            lease_epoch: LeaseEpoch(2),
            not_after_unix_ms: 1000,
            host: "hv-서울".into(),
        };
        let bytes = ticket.sign(&key);
        let public = key.public_key().as_ref();
        assert_eq!(Ticket::verify(&bytes, public).expect("own ticket"), ticket);
        assert_eq!(
            Ticket::verify(&bytes, other.public_key().as_ref()),
            Err(TicketError::Signature)
        );
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(Ticket::verify(&changed, public).is_err(), "change at {at} went unnoticed");
        }
        assert!(ticket.check("hv-서울", 1000).is_ok());
        assert!(ticket.check("hv-서울", 1001).is_err());
        assert!(ticket.check("hv2", 1).is_err());
        assert!(ticket.permit(Operations::GET_DATA).is_err());
    }
}
