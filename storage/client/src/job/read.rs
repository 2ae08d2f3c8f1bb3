//! Reading: any replica, verified, the next one when the bytes are missing or wrong.

use std::collections::HashMap;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use outrider_proto::ids::{ChunkId, PgId};
use outrider_proto::record::Record;

use crate::error::StoreError;

use super::JobStore;
use super::sessions::NodeSession;

impl JobStore {
    /// Reads records, in the order asked. Each was checked end to end without a key: header, lengths, payload hash, id.
    ///
    /// # Errors
    /// [`StoreError::Missing`] when every replica was asked and none has a readable copy.
    pub async fn get(&self, ids: &[ChunkId]) -> Result<Vec<Record>, StoreError> {
        let layout = self.inner.layout()?;
        let mut records: Vec<Option<Record>> = vec![None; ids.len()];
        let mut tried: HashMap<PgId, Vec<String>> = HashMap::new();
        let mut open: Vec<usize> = (0..ids.len()).collect();
        let mut last = None;
        while !open.is_empty() {
            let mut by_node: HashMap<String, (Arc<NodeSession>, Vec<usize>)> = HashMap::new();
            for &index in &open {
                let pg = layout.pg_of(&ids[index]).ok_or(StoreError::NoLayout)?;
                let tried = tried.entry(pg).or_default();
                let session = match self.inner.any_session(&layout, pg, tried, &mut last).await {
                    Ok(session) => session,
                    Err(StoreError::NoReplica { last, .. }) => {
                        return Err(StoreError::Missing { id: ids[index], pg, last });
                    }
                    Err(error) => return Err(error),
                };
                let (_, of_node) = by_node
                    .entry(session.node().to_owned())
                    .or_insert_with(|| (session, Vec::new()));
                of_node.push(index);
            }
            let mut requests = FuturesUnordered::new();
            for (session, indexes) in by_node.into_values() {
                for part in indexes.chunks(self.inner.limits.ids_per_get.max(1)) {
                    let (part, session) = (part.to_vec(), Arc::clone(&session));
                    let asked = part.iter().map(|&i| ids[i]).collect();
                    requests.push(async move { (session.link().get(asked).await, session, part) });
                }
            }
            open.clear();
            while let Some((answer, session, part)) = requests.next().await {
                let given = match answer {
                    Ok(given) => given,
                    Err(error) => {
                        self.inner.failed_over(&session, &error)?;
                        last = Some(error);
                        Vec::new()
                    }
                };
                let mut given = given.into_iter();
                for index in part {
                    match given.next().flatten() {
                        Some(record) if is_good(&record, ids[index], session.node()) => {
                            records[index] = Some(record);
                        }
                        _ => {
                            let pg = layout.pg_of(&ids[index]).ok_or(StoreError::NoLayout)?;
                            let tried = tried.entry(pg).or_default();
                            if !tried.iter().any(|n| n == session.node()) {
                                tried.push(session.node().to_owned());
                            }
                            open.push(index);
                        }
                    }
                }
            }
        }
        let records: Vec<Record> = records.into_iter().flatten().collect();
        let mut state = self.inner.lock();
        state.stats.got_records += records.len() as u64;
        state.stats.got_bytes += records.iter().map(|r| r.bytes().len() as u64).sum::<u64>();
        drop(state);
        Ok(records)
    }
}

fn is_good(record: &Record, asked: ChunkId, node: &str) -> bool {
    let good = record.id() == asked && record.verify().is_ok();
    if !good {
        tracing::warn!(node, id = ?asked, "a storage node gave wrong bytes for this record; another replica is asked");
    }
    good
}
