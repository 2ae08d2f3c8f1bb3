//! Puts and barriers.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use outrider_format::entry::Provenance;
use outrider_proto::frame::{Frame, Refusal};
use outrider_proto::ids::PgId;
use outrider_proto::layout::{Layout, StorageNode};
use outrider_proto::receipt::Receipt;
use outrider_proto::record::{Kind, Record};
use outrider_proto::ticket::Operations;
use outrider_storage_client::frame_io::{FrameReader, finish_with};
use outrider_storage_client::transport::{NumberedRecord, WindowHead};
use quinn::SendStream;
use tokio::time::{Instant, timeout_at};
use tracing::Instrument as _;

use crate::store::Append;

use super::access::{Access, keeps, layout_of};
use super::{Ending, Node, refuse};

/// Bytes handed to the store at once.
const BATCH: usize = 2 << 20;

/// Takes the records of a put in; forwards them to the other replicas unless a replica sent them.
pub(super) async fn put(
    node: &Node,
    access: &Access,
    head: WindowHead,
    recv: &mut FrameReader,
    send: &mut SendStream,
) -> Result<(), Ending> {
    access.permit(node, Operations::PUT)?;
    let layout = layout_of(node, head.layout_epoch)?;
    let forwards = !access.is_storage();
    let mut taken = 0;
    let mut batch = Vec::new();
    let mut bytes = 0;
    while let Some(frame) = recv.next().await? {
        let Frame::Chunk { pg, sequence, record } = frame else {
            return refuse(Refusal::Protocol, format!("{} in a put", frame.name()));
        };
        let record = match Record::decode(record) {
            Ok(record) => record,
            Err(error) => return refuse(Refusal::Protocol, error.to_string()),
        };
        if !matches!(record.header().kind, Kind::Data | Kind::Page) {
            return refuse(
                Refusal::Protocol,
                "only data and pages are put; other records have names",
            );
        }
        if layout.pg_of(&record.id()) != Some(pg) || sequence == 0 {
            return refuse(
                Refusal::Protocol,
                format!(
                    "record {:?} is not number {sequence} of placement group {pg}",
                    record.id()
                ),
            );
        }
        access.same_domain(record.header())?;
        keeps(node, &layout, pg)?;
        let numbered = NumberedRecord { pg, sequence, record };
        if forwards {
            forward(node, &layout, head, &numbered).await;
        }
        bytes += numbered.record.bytes().len();
        batch.push(numbered);
        if bytes >= BATCH {
            taken += append(node, head, std::mem::take(&mut batch)).await?;
            bytes = 0;
        }
    }
    taken += append(node, head, batch).await?;
    let counter =
        if forwards { &node.metrics.put_records } else { &node.metrics.forwarded_records };
    counter.inc_by(u64::from(taken));
    Ok(finish_with(send, &Frame::PutDone { taken }).await?)
}

async fn append(node: &Node, head: WindowHead, batch: Vec<NumberedRecord>) -> Result<u32, Ending> {
    if batch.is_empty() {
        return Ok(0);
    }
    let numbers: Vec<_> = batch.iter().map(|n| (n.pg, n.sequence)).collect();
    let appends = batch
        .into_iter()
        .map(|n| {
            node.metrics.put_bytes.inc_by(n.record.bytes().len() as u64);
            let provenance = Provenance {
                layout_epoch: head.layout_epoch,
                incarnation: node.store.incarnation(),
                job: head.job,
                pg: n.pg,
            };
            Append { provenance, record: n.record }
        })
        .collect();
    node.store.append(appends).await?;
    // Only what is written may be counted; a barrier syncs after it has read these numbers.
    for &(pg, sequence) in &numbers {
        node.windows.note_put(head, pg, sequence);
    }
    Ok(u32::try_from(numbers.len()).unwrap_or(u32::MAX))
}

async fn forward(node: &Node, layout: &Layout, head: WindowHead, numbered: &NumberedRecord) {
    for replica in others(node, layout, numbered.pg) {
        let tracker = node.windows.forwarded(head, &replica.name);
        if !node.peers.forward(replica, head, numbered.clone(), &tracker).await {
            node.metrics.left_behind.inc();
        }
    }
}

/// The other replicas of a PG.
pub(super) fn others<'a>(
    node: &'a Node,
    layout: &'a Layout,
    pg: PgId,
) -> impl Iterator<Item = &'a StorageNode> {
    layout.replicas_of(pg).filter(|n| n.name != node.name)
}

/// Closes a window: syncs, and collects receipts until each PG has `min_durable`.
pub(super) async fn barrier(
    node: &Node,
    access: &Access,
    head: WindowHead,
    pgs: Vec<(PgId, u32)>,
    send: &mut SendStream,
) -> Result<(), Ending> {
    access.permit(node, Operations::HAVE)?;
    let layout = layout_of(node, head.layout_epoch)?;
    for &(pg, _) in &pgs {
        keeps(node, &layout, pg)?;
    }
    let mut receipts = Vec::new();
    let mut lacking: BTreeMap<PgId, (u32, usize)> = pgs
        .iter()
        .filter(|(_, puts)| *puts > 0)
        .map(|&(pg, puts)| (pg, (puts, usize::from(layout.min_durable.max(1)))))
        .collect();
    let mut asked = FuturesUnordered::new();
    if !access.is_storage() {
        let mut by_replica: BTreeMap<&str, Vec<(PgId, u32)>> = BTreeMap::new();
        for &(pg, puts) in pgs.iter().filter(|(_, puts)| *puts > 0) {
            for replica in others(node, &layout, pg) {
                by_replica.entry(&replica.name).or_default().push((pg, puts));
            }
        }
        for (name, pgs) in by_replica {
            let replica = layout.node(name);
            asked.extend(replica.map(|replica| ask_replica(node, replica, head, pgs)));
        }
    }
    let own = own_receipt(node, head, &pgs);
    futures::pin_mut!(own);
    let deadline = Instant::now() + node.barrier;
    let mut own_done = false;
    while !own_done || !lacking.is_empty() {
        tokio::select! {
            receipt = &mut own, if !own_done => {
                own_done = true;
                cover(&mut lacking, &receipt.as_ref().map_err(|(r, m)| Ending::Refused(*r, m.clone()))?.1);
                receipts.insert(0, receipt.map_err(|(r, m)| Ending::Refused(r, m))?.0);
                if access.is_storage() {
                    break;
                }
            }
            next = timeout_at(deadline, asked.next()), if !asked.is_empty() => match next {
                Ok(Some(Some(bytes))) => {
                    if let Ok(receipt) = Receipt::decode(&bytes) {
                        cover(&mut lacking, &receipt);
                        receipts.push(bytes);
                    }
                }
                Ok(_) => {}
                // What is there is told; the client sees what falls short.
                Err(_) => asked.clear(),
            },
            else => break,
        }
    }
    node.metrics.barriers.inc();
    Ok(finish_with(send, &Frame::Receipts { receipts }).await?)
}

fn cover(lacking: &mut BTreeMap<PgId, (u32, usize)>, receipt: &Receipt) {
    for said in &receipt.pgs {
        if let Some((puts, missing)) = lacking.get_mut(&said.pg)
            && said.puts_through >= *puts
        {
            *missing = missing.saturating_sub(1);
        }
    }
    lacking.retain(|_, (_, missing)| *missing > 0);
}

async fn own_receipt(
    node: &Node,
    head: WindowHead,
    pgs: &[(PgId, u32)],
) -> Result<(Bytes, Receipt), (Refusal, String)> {
    let pgs: Vec<PgId> = pgs.iter().map(|&(pg, _)| pg).collect();
    // First the numbers, then the sync: what comes in between is not spoken of.
    let said = node.windows.receipt(head, &pgs);
    let synced =
        node.store.sync().instrument(tracing::info_span!("fsync", job_id = %head.job)).await;
    if let Err(error) = synced {
        return Err(match Ending::from(error) {
            Ending::Refused(refusal, message) => (refusal, message),
            Ending::Broken(error) => (Refusal::Unavailable, error.to_string()),
        });
    }
    let receipt = Receipt {
        fabric: node.fabric,
        job: head.job,
        session: head.session,
        window: head.window,
        node: node.name.clone(),
        incarnation: node.store.incarnation(),
        layout_epoch: head.layout_epoch,
        pgs: said,
    };
    Ok((receipt.sign(node.identity.signing_key().pair()).into(), receipt))
}

/// The receipt of another replica, after everything on its way there has arrived or failed.
async fn ask_replica(
    node: &Node,
    replica: &StorageNode,
    head: WindowHead,
    pgs: Vec<(PgId, u32)>,
) -> Option<Bytes> {
    node.windows.forwarded(head, &replica.name).wait().await;
    let asked = async {
        let session = node.peers.session(replica).await?;
        session.barrier(head, pgs).await
    };
    match asked.await {
        Ok(receipts) => receipts.into_iter().next(),
        Err(error) => {
            tracing::info!(%error, replica = %replica.name, "no receipt from a replica");
            None
        }
    }
}
