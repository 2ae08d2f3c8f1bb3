//! Receipts: a storage node's signed word that bytes are durable.
//!
//! A *window* is what a client session sent between two barriers; in it, each PG's puts are numbered from 1. A receipt
//! says, for every PG of the window: on this node every put 1..=`puts_through` is fsynced; and this node has confirmed `haves`
//! ids of the PG to be durable on `min_durable` replicas each. The coordinator refuses a commit unless every PG of every
//! window is covered (see [`crate::layout`] for which replicas count).
//!
//! ```text
//! window receipt: 0 1 version (1) · 1 1 kind (1) · 2 2 zero · 4 4 window · 8 16 fabric · 24 16 job · 40 16 session
//!   56 8 node incarnation · 64 8 layout epoch · 72 2+n node name · 4 count · count x (2 pg, 4 puts through, 4 haves) · 64 signature
//! named receipt:  0 1 version · 1 1 kind (2) · 2 1 space · 3 1 zero · 4 4 zero · 8 16 fabric · 24 8 node incarnation
//!   32 32 record id · 64 2+n node name · 2+k key · 64 signature
//! ```

use ring::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};

use crate::ids::{ChunkId, FabricId, JobId, LayoutEpoch, NodeIncarnation, PgId, SessionId, Window};
use crate::wire::{DecodeError, Put, Reader};

/// What a receipt says of one PG.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PgReceipt {
    /// PG.
    pub pg: PgId,
    /// Puts 1..=this are fsynced on the node.
    pub puts_through: u32,
    /// Ids confirmed durable on `min_durable` replicas.
    pub haves: u32,
}

/// A receipt for a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// Fabric.
    pub fabric: FabricId,
    /// Job.
    pub job: JobId,
    /// Session of the client, also for what was forwarded to this node.
    pub session: SessionId,
    /// Window.
    pub window: Window,
    /// Node that speaks.
    pub node: String,
    /// Its incarnation.
    pub incarnation: NodeIncarnation,
    /// Layout it worked under.
    pub layout_epoch: LayoutEpoch,
    /// PGs.
    pub pgs: Vec<PgReceipt>,
}

/// A receipt for a named record (root, journal entry).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedReceipt {
    /// Fabric.
    pub fabric: FabricId,
    /// Node that speaks.
    pub node: String,
    /// Its incarnation.
    pub incarnation: NodeIncarnation,
    /// Space (see [`crate::frame::Space`]).
    pub space: u8,
    /// Key in the space.
    pub key: Vec<u8>,
    /// Record kept under it.
    pub id: ChunkId,
}

/// Why a receipt is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptError {
    /// Malformed.
    #[error("receipt is malformed")]
    Malformed(#[source] DecodeError),
    /// Not signed by the node it names.
    #[error("receipt was not signed by the storage node it names")]
    Signature,
}

impl Receipt {
    /// Encodes and signs.
    #[must_use]
    pub fn sign(&self, key: &Ed25519KeyPair) -> Vec<u8> {
        let mut out = vec![1, 1, 0, 0];
        out.put_u32(self.window.0);
        out.extend_from_slice(&self.fabric.to_bytes());
        out.extend_from_slice(&self.job.to_bytes());
        out.extend_from_slice(&self.session.to_bytes());
        out.put_u64(self.incarnation.0);
        out.put_u64(self.layout_epoch.0);
        out.put_text(&self.node);
        out.put_u32(self.pgs.len() as u32);
        for pg in &self.pgs {
            out.put_u16(pg.pg.0);
            out.put_u32(pg.puts_through);
            out.put_u32(pg.haves);
        }
        let signature = key.sign(&out);
        out.extend_from_slice(signature.as_ref());
        out
    }

    /// Decodes without checking the signature: enough for the client, whose connection is authenticated.
    ///
    /// # Errors
    /// [`ReceiptError::Malformed`].
    pub fn decode(bytes: &[u8]) -> Result<Self, ReceiptError> {
        let (body, _) = split(bytes)?;
        Self::body(body).map_err(ReceiptError::Malformed)
    }

    /// Decodes and checks the signature with the key of the node that `key_of` returns for the name.
    ///
    /// # Errors
    /// [`ReceiptError`].
    pub fn verify<'k>(
        bytes: &[u8],
        key_of: impl FnOnce(&str) -> Option<&'k [u8]>,
    ) -> Result<Self, ReceiptError> {
        let receipt = Self::decode(bytes)?;
        check(bytes, key_of(&receipt.node))?;
        Ok(receipt)
    }

    fn body(body: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("receipt", body);
        expect(&mut r, 1)?;
        r.u16()?;
        let window = Window(r.u32()?);
        let mut receipt = Self {
            fabric: FabricId::from_bytes(r.array()?),
            job: JobId::from_bytes(r.array()?),
            session: SessionId::from_bytes(r.array()?),
            window,
            incarnation: NodeIncarnation(r.u64()?),
            layout_epoch: LayoutEpoch(r.u64()?),
            node: r.text()?,
            pgs: Vec::new(),
        };
        let count = r.count(10)?;
        receipt.pgs = (0..count)
            .map(|_| Ok(PgReceipt { pg: PgId(r.u16()?), puts_through: r.u32()?, haves: r.u32()? }))
            .collect::<Result<_, DecodeError>>()?;
        r.finish()?;
        Ok(receipt)
    }
}

impl NamedReceipt {
    /// Encodes and signs.
    #[must_use]
    pub fn sign(&self, key: &Ed25519KeyPair) -> Vec<u8> {
        let mut out = vec![1, 2, self.space, 0, 0, 0, 0, 0];
        out.extend_from_slice(&self.fabric.to_bytes());
        out.put_u64(self.incarnation.0);
        out.extend_from_slice(&self.id.0);
        out.put_text(&self.node);
        out.put_u16(u16::try_from(self.key.len()).unwrap_or(u16::MAX));
        out.extend_from_slice(&self.key);
        let signature = key.sign(&out);
        out.extend_from_slice(signature.as_ref());
        out
    }

    /// Decodes and checks the signature, as [`Receipt::verify`].
    ///
    /// # Errors
    /// [`ReceiptError`].
    pub fn verify<'k>(
        bytes: &[u8],
        key_of: impl FnOnce(&str) -> Option<&'k [u8]>,
    ) -> Result<Self, ReceiptError> {
        let (body, _) = split(bytes)?;
        let receipt = Self::body(body).map_err(ReceiptError::Malformed)?;
        check(bytes, key_of(&receipt.node))?;
        Ok(receipt)
    }

    fn body(body: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("named receipt", body);
        expect(&mut r, 2)?;
        let space = r.u8()?;
        r.bytes(5)?;
        let fabric = FabricId::from_bytes(r.array()?);
        let incarnation = NodeIncarnation(r.u64()?);
        let id = ChunkId(r.array()?);
        let node = r.text()?;
        let key_len = usize::from(r.u16()?);
        let key = r.bytes(key_len)?.to_vec();
        r.finish()?;
        Ok(Self { fabric, node, incarnation, space, key, id })
    }
}

fn expect(r: &mut Reader<'_>, kind: u8) -> Result<(), DecodeError> {
    let found = (r.u8()?, r.u8()?);
    if found == (1, kind) {
        Ok(())
    } else {
        Err(DecodeError::Value {
            what: "receipt version and kind",
            found: format!("{found:?}"),
            expected: "version 1 of the kind asked for",
        })
    }
}

fn split(bytes: &[u8]) -> Result<(&[u8], &[u8]), ReceiptError> {
    bytes.len().checked_sub(64).map(|at| bytes.split_at(at)).ok_or(ReceiptError::Malformed(
        DecodeError::Short { what: "receipt", needed: 64, left: bytes.len() },
    ))
}

fn check(bytes: &[u8], key: Option<&[u8]>) -> Result<(), ReceiptError> {
    let (body, signature) = split(bytes)?;
    UnparsedPublicKey::new(&ED25519, key.ok_or(ReceiptError::Signature)?)
        .verify(body, signature)
        .map_err(|_| ReceiptError::Signature)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ring::signature::KeyPair;

    #[test]
    fn receipts_round_trip_and_forged_ones_are_refused() {
        let key = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).expect("seed of 32 bytes");
        let public = key.public_key().as_ref().to_vec();
        let receipt = Receipt {
            fabric: FabricId::random(),
            job: JobId::random(),
            session: SessionId::random(),
            window: Window(4),
            node: "s1".into(),
            incarnation: NodeIncarnation(2),
            layout_epoch: LayoutEpoch(1),
            pgs: vec![PgReceipt { pg: PgId(3), puts_through: 10, haves: 2 }],
        };
        let bytes = receipt.sign(&key);
        assert_eq!(Receipt::verify(&bytes, |_| Some(&public)).expect("own"), receipt);
        for at in 0..bytes.len() {
            let mut forged = bytes.clone();
            forged[at] ^= 4;
            assert!(Receipt::verify(&forged, |_| Some(&public)).is_err(), "flip at {at}");
        }
        let named = NamedReceipt {
            fabric: receipt.fabric,
            node: "s1".into(),
            incarnation: NodeIncarnation(2),
            space: 1,
            key: vec![1, 2, 3],
            id: ChunkId([8; 32]),
        };
        let bytes = named.sign(&key);
        assert_eq!(NamedReceipt::verify(&bytes, |_| Some(&public)).expect("own"), named);
        assert!(NamedReceipt::verify(&bytes, |_| None).is_err());
        assert!(Receipt::verify(&bytes, |_| Some(&public)).is_err(), "kinds are told apart");
    }
}
