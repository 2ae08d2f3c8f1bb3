//! Identities, each a type of its own with one text form.
//!
//! | kind | text form |
//! | --- | --- |
//! | fabric, job, point, group, domain, session, VM and checkpoint GUIDs | UUID, lower case, hyphens |
//! | chunk id | 64 hexadecimal digits; [`ChunkId::short`] for logs |
//! | epochs, incarnations, windows | decimal |

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A text that is no id of the kind expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {kind}: expected {expected}")]
pub struct ParseIdError {
    kind: &'static str,
    expected: &'static str,
    text: String,
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A fresh random id.
            #[must_use]
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }
            /// The id with these 16 bytes.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
            /// The 16 bytes as they stand in records and frames.
            #[must_use]
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0.into_bytes()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0.hyphenated(), f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(s: &str) -> Result<Self, ParseIdError> {
                Uuid::try_parse(s).map(Self).map_err(|_| ParseIdError {
                    kind: $kind,
                    expected: "a UUID",
                    text: s.to_owned(),
                })
            }
        }
    };
}

uuid_id!(
    /// A fabric: one set of coordinators, storage nodes and agents under one CA.
    FabricId, "fabric id");
uuid_id!(
    /// One unit of work leased to one host at a time.
    JobId, "job id");
uuid_id!(
    /// A recovery point. Chosen when the job is created, so that a commit is idempotent.
    PointId, "recovery point id");
uuid_id!(
    /// A protection group.
    GroupId, "protection group id");
uuid_id!(
    /// A dedup domain: the groups that share keys and so share chunks.
    DomainId, "dedup domain id");
uuid_id!(
    /// One client session with one storage node; sequence numbers live inside it.
    SessionId, "session id");
uuid_id!(
    /// The hypervisor's GUID of a VM. Survives migration.
    VmGuid, "VM GUID");
uuid_id!(
    /// The hypervisor's GUID of a checkpoint.
    CheckpointId, "checkpoint GUID");
uuid_id!(
    /// A duty to leave a host clean.
    DutyId, "duty id");
uuid_id!(
    /// VirtualDiskId (SCSI page 83) of a disk: the same for all files of a chain.
    DiskId, "disk id");

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);
        impl $name {
            /// The number that follows.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number!(
    /// Grows by one at every move of a VM between hosts.
    PlacementEpoch(u64));
number!(
    /// Grows whenever a job is leased; fences its journal and its commit. Unique per job.
    LeaseEpoch(u64));
number!(
    /// Grows whenever the replicas of any PG change.
    LayoutEpoch(u64));
number!(
    /// Grows at every start of a storage node's process.
    NodeIncarnation(u64));
number!(
    /// Grows whenever a VM's disks may have changed behind change tracking.
    VmIncarnation(u64));
number!(
    /// Which data key of a domain sealed a record.
    KeyEpoch(u32));
number!(
    /// Index of a placement group.
    PgId(u16));
number!(
    /// The puts of a session between two barriers.
    Window(u32));

/// Identity of a chunk or page: BLAKE3 of the plaintext, keyed with the dedup domain's id key.
///
/// The all-zero id is never the id of a chunk: in a page it means "all zeros, nothing stored".
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChunkId(pub [u8; 32]);

impl ChunkId {
    /// Length in bytes.
    pub const LEN: usize = 32;
    /// The hole: a range of zeros, for which nothing is stored.
    pub const HOLE: Self = Self([0; 32]);

    /// Whether this stands for zeros.
    #[must_use]
    pub fn is_hole(&self) -> bool {
        *self == Self::HOLE
    }

    /// The first eight digits, for logs.
    #[must_use]
    pub fn short(&self) -> String {
        hex::encode(&self.0[..4])
    }
}
impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}
impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}
impl FromStr for ChunkId {
    type Err = ParseIdError;
    fn from_str(s: &str) -> Result<Self, ParseIdError> {
        let mut id = [0; 32];
        hex::decode_to_slice(s, &mut id).map_err(|_| ParseIdError {
            kind: "chunk id",
            expected: "64 hexadecimal digits",
            text: s.to_owned(),
        })?;
        Ok(Self(id))
    }
}

/// Who sealed a record: BLAKE3 of the host's name within its fabric, cut to 16 bytes. Attributable, yet no name in clear.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct WriterId(pub [u8; 16]);

impl WriterId {
    /// The writer id of `host` in `fabric`.
    #[must_use]
    pub fn of(fabric: FabricId, host: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("outrider 2026 writer id");
        hasher.update(&fabric.to_bytes());
        hasher.update(host.as_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(id)
    }
}

/// What a VM is to its realm.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum VmRole {
    /// The VM itself.
    Primary,
    /// The receiving side of Hyper-V Replica.
    Replica,
    /// A test failover of a replica.
    TestReplica,
}

/// A VM: the hypervisor's GUID within a realm, and its role. Text form `realm/guid`, with `/replica` or `/test-replica`
/// appended for those roles. (Realms are host or cluster names and hold no slash.)
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct VmKey {
    /// Failover cluster or stand-alone host.
    pub realm: String,
    /// The hypervisor's GUID.
    pub guid: VmGuid,
    /// Primary, replica, test replica.
    pub role: VmRole,
}

impl fmt::Display for VmKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.realm, self.guid)?;
        match self.role {
            VmRole::Primary => Ok(()),
            VmRole::Replica => f.write_str("/replica"),
            VmRole::TestReplica => f.write_str("/test-replica"),
        }
    }
}
impl FromStr for VmKey {
    type Err = ParseIdError;
    fn from_str(s: &str) -> Result<Self, ParseIdError> {
        let bad = || ParseIdError {
            kind: "VM key",
            expected: "realm/guid, realm/guid/replica or realm/guid/test-replica",
            text: s.to_owned(),
        };
        let mut parts = s.split('/');
        let realm = parts.next().filter(|r| !r.is_empty()).ok_or_else(bad)?.to_owned();
        let guid = parts.next().and_then(|g| g.parse().ok()).ok_or_else(bad)?;
        let role = match parts.next() {
            None => VmRole::Primary,
            Some("replica") => VmRole::Replica,
            Some("test-replica") => VmRole::TestReplica,
            Some(_) => return Err(bad()),
        };
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self { realm, guid, role })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_forms_round_trip() {
        let vm =
            VmKey { realm: "클러스터".into(), guid: VmGuid::random(), role: VmRole::Replica };
        assert_eq!(vm.to_string().parse::<VmKey>().expect("own text form"), vm);
        let id = ChunkId([7; 32]);
        assert_eq!(id.to_string().parse::<ChunkId>().expect("own text form"), id);
    }

    #[test]
    fn a_bad_id_says_what_was_expected() {
        let error = "xyz".parse::<JobId>().expect_err("not a UUID").to_string();
        assert!(error.contains("job id") && error.contains("xyz"), "{error}");
        assert!("a/b/c/d".parse::<VmKey>().is_err());
    }
}
