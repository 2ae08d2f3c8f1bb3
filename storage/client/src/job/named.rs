//! Named records: roots and journal entries, kept outside the PGs on enough nodes that any later reader meets one.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use outrider_proto::frame::Space;
use outrider_proto::layout::{Layout, StorageNode};
use outrider_proto::record::Record;
use tokio::time::{Instant, timeout_at};

use crate::error::{StoreError, TransportError};
use crate::transport::NamedRecord;

use super::JobStore;

impl JobStore {
    /// Keeps a record under a name, durable on at least `min_durable` nodes when this returns; gives their signed
    /// receipts. Nodes beyond those are waited for a moment only; they copy it from the others.
    ///
    /// # Errors
    /// [`StoreError::Fenced`] as soon as one node has seen a newer fence; [`StoreError::TooFewNodes`].
    pub async fn put_named(
        &self,
        space: Space,
        key: Vec<u8>,
        fence: u64,
        record: Record,
    ) -> Result<Vec<Bytes>, StoreError> {
        let layout = self.inner.layout()?;
        let needed = usize::from(layout.min_durable.max(1));
        let mut writes: FuturesUnordered<_> = layout
            .nodes
            .iter()
            .map(|node| {
                let (key, record, layout) = (key.clone(), record.clone(), &layout);
                async move {
                    let session = self.named_session(layout, node).await?;
                    let written = session.link().put_named(space, key, fence, record).await;
                    written.inspect_err(|error| {
                        if error.ends_session() {
                            session.give_up(error);
                        }
                    })
                }
            })
            .collect();
        let mut receipts = Vec::new();
        let mut last = None;
        let mut until: Option<Instant> = None;
        loop {
            let next = match until {
                None => writes.next().await,
                Some(until) => timeout_at(until, writes.next()).await.ok().flatten(),
            };
            match next {
                None => break,
                Some(Ok(receipt)) => receipts.push(receipt),
                Some(Err(error)) => {
                    if let Some(refused @ StoreError::Fenced { .. }) =
                        StoreError::final_refusal(&error)
                    {
                        return Err(refused);
                    }
                    last = Some(error);
                }
            }
            if receipts.len() >= needed && until.is_none() {
                until = Some(Instant::now() + self.inner.limits.laggards);
            }
        }
        if receipts.len() >= needed {
            return Ok(receipts);
        }
        if let Some(refused) = last.as_ref().and_then(StoreError::final_refusal) {
            return Err(refused);
        }
        Err(StoreError::TooFewNodes { space, got: receipts.len(), needed, last })
    }

    /// The named records whose key starts with `prefix`, in key order: the union over the nodes, the highest fence of each
    /// key. So many nodes are asked that at least one of them took part in every write.
    ///
    /// # Errors
    /// [`StoreError::TooFewNodes`].
    pub async fn list_named(
        &self,
        space: Space,
        prefix: &[u8],
    ) -> Result<Vec<NamedRecord>, StoreError> {
        let layout = self.inner.layout()?;
        let writers = usize::from(layout.min_durable.max(1)).min(layout.nodes.len());
        let needed = layout.nodes.len() + 1 - writers;
        let mut lists: FuturesUnordered<_> = layout
            .nodes
            .iter()
            .map(|node| {
                let layout = &layout;
                async move {
                    let session = self.named_session(layout, node).await?;
                    let listed = session.link().list_named(space, prefix.to_vec()).await;
                    listed.inspect_err(|error| {
                        if error.ends_session() {
                            session.give_up(error);
                        }
                    })
                }
            })
            .collect();
        let mut merged: BTreeMap<Vec<u8>, NamedRecord> = BTreeMap::new();
        let (mut got, mut last) = (0, None);
        while let Some(list) = lists.next().await {
            match list {
                Ok(list) => {
                    got += 1;
                    for named in list {
                        let known = merged.get(&named.key).map(|k| k.fence);
                        if known.is_none_or(|fence| fence < named.fence)
                            && named.record.verify().is_ok()
                        {
                            merged.insert(named.key.clone(), named);
                        }
                    }
                    if got >= needed {
                        return Ok(merged.into_values().collect());
                    }
                }
                Err(error) => last = Some(error),
            }
        }
        if let Some(refused) = last.as_ref().and_then(StoreError::final_refusal) {
            return Err(refused);
        }
        Err(StoreError::TooFewNodes { space, got, needed, last })
    }

    async fn named_session(
        &self,
        layout: &Layout,
        node: &StorageNode,
    ) -> Result<std::sync::Arc<super::sessions::NodeSession>, TransportError> {
        self.inner.sessions.with(node, layout.epoch).await
    }
}
