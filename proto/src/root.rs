//! Root records: the small signed record of a recovery point that every storage node keeps.
//!
//! Clear bytes (what garbage collection, locks and recovery need without a key), 160 bytes:
//! ```text
//!   0  2 version (1) · 2 6 zero · 8 16 point · 24 16 job · 40 32 BLAKE3 of the VM key's text form
//!  72 16 VM GUID · 88 8 incarnation · 96 32 manifest id · 128 8 taken (ms) · 136 8 lock until (ms, 0 = none)
//! 144  8 lease epoch · 152 8 zero
//! ```
//! The sealed part is empty: its AEAD tag is the root's MAC, which only holders of the domain's keys can make.

use crate::ids::{ChunkId, JobId, LeaseEpoch, PointId, VmGuid, VmIncarnation, VmKey};
use crate::record::{Kind, Record};
use crate::seal::{SealError, Sealer};
use crate::wire::{DecodeError, Put, Reader};

/// Length of the clear bytes.
pub const ROOT_CLEAR_LEN: usize = 160;

/// What a root record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// The point; also the record's name in the storage nodes' root space.
    pub point: PointId,
    /// The job.
    pub job: JobId,
    /// BLAKE3 of the VM key's text form: tells VMs of two realms with one GUID apart, and names none.
    pub vm_hash: [u8; 32],
    /// The VM's GUID.
    pub vm_guid: VmGuid,
    /// Incarnation.
    pub incarnation: VmIncarnation,
    /// Manifest.
    pub manifest: ChunkId,
    /// When the checkpoint was made.
    pub taken_unix_ms: u64,
    /// Not removable before; 0 = not locked.
    pub lock_until_unix_ms: u64,
    /// Lease under which it was proposed.
    pub lease_epoch: LeaseEpoch,
}

impl Root {
    /// The hash that stands for a VM key.
    #[must_use]
    pub fn vm_hash(vm: &VmKey) -> [u8; 32] {
        *blake3::hash(vm.to_string().as_bytes()).as_bytes()
    }

    /// Encodes the clear bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(ROOT_CLEAR_LEN);
        out.put_u16(1);
        out.extend_from_slice(&[0; 6]);
        out.extend_from_slice(&self.point.to_bytes());
        out.extend_from_slice(&self.job.to_bytes());
        out.extend_from_slice(&self.vm_hash);
        out.extend_from_slice(&self.vm_guid.to_bytes());
        out.put_u64(self.incarnation.0);
        out.extend_from_slice(&self.manifest.0);
        out.put_u64(self.taken_unix_ms);
        out.put_u64(self.lock_until_unix_ms);
        out.put_u64(self.lease_epoch.0);
        out.put_u64(0);
        out
    }

    /// Decodes the clear bytes of a root record.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(clear: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("root record", clear);
        let version = r.u16()?;
        if version != 1 {
            return Err(DecodeError::Value {
                what: "root record version",
                found: version.to_string(),
                expected: "1",
            });
        }
        r.bytes(6)?;
        let root = Self {
            point: PointId::from_bytes(r.array()?),
            job: JobId::from_bytes(r.array()?),
            vm_hash: r.array()?,
            vm_guid: VmGuid::from_bytes(r.array()?),
            incarnation: VmIncarnation(r.u64()?),
            manifest: ChunkId(r.array()?),
            taken_unix_ms: r.u64()?,
            lock_until_unix_ms: r.u64()?,
            lease_epoch: LeaseEpoch(r.u64()?),
        };
        r.u64()?;
        r.finish()?;
        Ok(root)
    }

    /// Seals the root record.
    ///
    /// # Errors
    /// [`SealError`].
    pub fn seal(&self, sealer: &Sealer) -> Result<Record, SealError> {
        let clear = self.encode();
        sealer.seal(Kind::Root, sealer.id_of(Kind::Root, &clear, &[]), &clear, &[])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_round_trips_at_its_documented_length() {
        let root = Root {
            point: PointId::random(),
            job: JobId::random(),
            vm_hash: [1; 32],
            vm_guid: VmGuid::random(),
            incarnation: VmIncarnation(3),
            manifest: ChunkId([4; 32]),
            taken_unix_ms: 5,
            lock_until_unix_ms: 6,
            lease_epoch: LeaseEpoch(7),
        };
        let bytes = root.encode();
        assert_eq!(bytes.len(), ROOT_CLEAR_LEN);
        assert_eq!(Root::decode(&bytes).expect("decodes"), root);
        assert!(Root::decode(&bytes[..159]).is_err());
    }
}
