//! Keys: made once, replicated wrapped, open in memory only.

use std::collections::BTreeMap;
use std::sync::Arc;

use outrider_process::identity::SigningKey;
use outrider_process::secret::Secret;
use outrider_process::secret::kek::{KekError, KeyEncryptionKey};
use outrider_proto::ids::{DomainId, FabricId, KeyEpoch};
use outrider_proto::seal::{DomainKeys, Key32};
use outrider_proto::ticket::Ticket;
use ring::signature::{Ed25519KeyPair, KeyPair};

use crate::state::domains::{Domain, Keys};

/// Size of chunks by default: the knee of the measured curve (design 4.5).
const CHUNK_SIZE: u32 = 256 << 10;

/// Keys that this member cannot use. It must not lead.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// Wrapped by another key, or damaged.
    #[error(
        "the key-encryption key does not open this fabric's keys; start this coordinator with the key file made by `outrider fabric init`, or with the recovery kit"
    )]
    Kek(#[source] KekError),
    /// The database belongs elsewhere.
    #[error(
        "the database holds the keys of fabric {found}, the configuration names fabric {expected}; correct `fabric` or `data_dir`"
    )]
    OtherFabric {
        /// Configured.
        expected: FabricId,
        /// In the database.
        found: FabricId,
    },
    /// Opened, but no key.
    #[error("the {what} opens to something that is no key; restore the database from a copy")]
    NoKey {
        /// Which key.
        what: &'static str,
    },
}

/// Open keys. Never printed, wiped when dropped.
pub(crate) struct KeyRing {
    ticket: Ed25519KeyPair,
    domains: BTreeMap<DomainId, (Arc<DomainKeys>, u32)>,
    default_domain: DomainId,
}

impl std::fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyRing(..)")
    }
}

/// Makes the first keys of a fabric.
pub(crate) fn create(fabric: FabricId, kek: &KeyEncryptionKey) -> Result<Keys, KeysError> {
    let pkcs8 = SigningKey::generate_pkcs8();
    let pair = Ed25519KeyPair::from_pkcs8(pkcs8.expose())
        .map_err(|_| KeysError::NoKey { what: "ticket key" })?;
    let domain = DomainId::random();
    let epoch = KeyEpoch(1);
    let (id_key, data_key) = (Secret::<32>::random(), Secret::<32>::random());
    Ok(Keys {
        fabric,
        ticket_key: kek.wrap(&ticket_aad(fabric), pkcs8.expose()),
        ticket_public: pair.public_key().as_ref().to_vec(),
        domains: BTreeMap::from([(
            domain,
            Domain {
                id_key: kek.wrap(&id_aad(fabric, domain), id_key.expose()),
                data_keys: BTreeMap::from([(
                    epoch,
                    kek.wrap(&data_aad(fabric, domain, epoch), data_key.expose()),
                )]),
                current: epoch,
                chunk_size: CHUNK_SIZE,
            },
        )]),
        default_domain: domain,
    })
}

impl KeyRing {
    /// Opens the replicated keys.
    ///
    /// # Errors
    /// [`KeysError`]: this member must not lead.
    pub(crate) fn open(
        keys: &Keys,
        fabric: FabricId,
        kek: &KeyEncryptionKey,
    ) -> Result<Self, KeysError> {
        if keys.fabric != fabric {
            return Err(KeysError::OtherFabric { expected: fabric, found: keys.fabric });
        }
        let pkcs8 = kek
            .unwrap("the ticket key", &ticket_aad(fabric), &keys.ticket_key)
            .map_err(KeysError::Kek)?;
        let ticket = Ed25519KeyPair::from_pkcs8(pkcs8.expose())
            .map_err(|_| KeysError::NoKey { what: "ticket key" })?;
        let open = |what: &'static str, aad: &[u8], wrapped: &[u8]| {
            let plain = kek.unwrap(what, aad, wrapped).map_err(KeysError::Kek)?;
            <[u8; 32]>::try_from(plain.expose()).map(Key32).map_err(|_| KeysError::NoKey { what })
        };
        let mut domains = BTreeMap::new();
        for (id, domain) in &keys.domains {
            let mut data_keys = BTreeMap::new();
            for (epoch, wrapped) in &domain.data_keys {
                let key = open("data key", &data_aad(fabric, *id, *epoch), wrapped)?;
                data_keys.insert(*epoch, key);
            }
            let open = DomainKeys {
                domain: *id,
                id_key: open("id key", &id_aad(fabric, *id), &domain.id_key)?,
                data_keys,
                current: domain.current,
            };
            domains.insert(*id, (Arc::new(open), domain.chunk_size));
        }
        if !domains.contains_key(&keys.default_domain) {
            return Err(KeysError::NoKey { what: "default dedup domain" });
        }
        Ok(Self { ticket, domains, default_domain: keys.default_domain })
    }

    /// Public half of the key that signs tickets.
    pub(crate) fn ticket_public(&self) -> Vec<u8> {
        self.ticket.public_key().as_ref().to_vec()
    }

    /// Signs a ticket.
    pub(crate) fn sign(&self, ticket: &Ticket) -> Vec<u8> {
        ticket.sign(&self.ticket)
    }

    /// Keys and chunk size of the domain of groups that name none.
    pub(crate) fn default_domain(&self) -> (&Arc<DomainKeys>, u32) {
        let (keys, size) = &self.domains[&self.default_domain];
        (keys, *size)
    }
}

fn ticket_aad(fabric: FabricId) -> Vec<u8> {
    format!("ticket key of fabric {fabric}").into_bytes()
}

fn id_aad(fabric: FabricId, domain: DomainId) -> Vec<u8> {
    format!("id key of domain {domain} in fabric {fabric}").into_bytes()
}

fn data_aad(fabric: FabricId, domain: DomainId, epoch: KeyEpoch) -> Vec<u8> {
    format!("data key {epoch} of domain {domain} in fabric {fabric}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_open_with_their_own_kek_and_fabric_only() {
        let (fabric, kek) = (FabricId::random(), KeyEncryptionKey::generate());
        let keys = create(fabric, &kek).expect("made");
        let ring = KeyRing::open(&keys, fabric, &kek).expect("opens");
        assert_eq!(ring.ticket_public(), keys.ticket_public);
        assert_eq!(ring.default_domain().1, CHUNK_SIZE);
        let other = KeyEncryptionKey::generate();
        let error = KeyRing::open(&keys, fabric, &other).expect_err("another kek");
        assert!(matches!(error, KeysError::Kek(_)), "{error}");
        let error = KeyRing::open(&keys, FabricId::random(), &kek).expect_err("another fabric");
        assert!(matches!(error, KeysError::OtherFabric { .. }), "{error}");
    }

    #[test]
    fn the_replicated_form_holds_no_open_key() {
        let (fabric, kek) = (FabricId::random(), KeyEncryptionKey::generate());
        let keys = create(fabric, &kek).expect("made");
        let ring = KeyRing::open(&keys, fabric, &kek).expect("opens");
        let stored = serde_json::to_string(&keys).expect("serialises");
        let (open, _) = ring.default_domain();
        for key in open.data_keys.values().chain([&open.id_key]) {
            let plain = serde_json::to_string(&key.0.to_vec()).expect("serialises");
            assert!(!stored.contains(plain.trim_matches(['[', ']'])), "an open key in the log");
        }
    }

    #[test]
    fn a_wrapped_key_moved_to_another_place_does_not_open() {
        let (fabric, kek) = (FabricId::random(), KeyEncryptionKey::generate());
        let mut keys = create(fabric, &kek).expect("made");
        let domain = keys.domains.values_mut().next().expect("one");
        domain.id_key = domain.data_keys[&KeyEpoch(1)].clone();
        assert!(KeyRing::open(&keys, fabric, &kek).is_err());
    }
}
