//! Keys, wrapped: the Raft log never holds an open one.

use std::collections::BTreeMap;

use outrider_proto::ids::{DomainId, FabricId, KeyEpoch};
use serde::{Deserialize, Serialize};

use super::{Outcome, State};

/// Wrapped keys of the fabric.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Keys {
    /// The fabric they were made for.
    pub(crate) fabric: FabricId,
    /// Ed25519 key that signs tickets, PKCS #8, wrapped.
    pub(crate) ticket_key: Vec<u8>,
    /// Its public half.
    pub(crate) ticket_public: Vec<u8>,
    /// Dedup domains.
    pub(crate) domains: BTreeMap<DomainId, Domain>,
    /// The domain of groups that name none.
    pub(crate) default_domain: DomainId,
}

/// A dedup domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Domain {
    /// Key of ids, wrapped; never changes.
    pub(crate) id_key: Vec<u8>,
    /// Keys of contents, wrapped.
    pub(crate) data_keys: BTreeMap<KeyEpoch, Vec<u8>>,
    /// Epoch for new records.
    pub(crate) current: KeyEpoch,
    /// Bytes.
    pub(crate) chunk_size: u32,
}

impl State {
    /// The first ones stand: two leaders may both have made some.
    pub(super) fn create_keys(&mut self, keys: Keys) -> Outcome {
        self.keys.get_or_insert(keys);
        Outcome::Done
    }
}
