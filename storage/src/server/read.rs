//! Questions and reads.

use std::collections::BTreeMap;

use futures::future::join_all;
use outrider_proto::frame::{Frame, MAX_IDS, Presence, Refusal};
use outrider_proto::ids::{ChunkId, PgId};
use outrider_proto::record::Kind;
use outrider_proto::ticket::Operations;
use outrider_storage_client::frame_io::{finish, finish_with, write_frame};
use outrider_storage_client::transport::WindowHead;
use quinn::SendStream;

use super::access::{Access, keeps, layout_of};
use super::write::others;
use super::{Ending, Node, refuse};

/// Whether ids are durable on `min_durable` replicas: this one's own index and the others' word.
pub(super) async fn have(
    node: &Node,
    access: &Access,
    head: WindowHead,
    ids: Vec<ChunkId>,
    send: &mut SendStream,
) -> Result<(), Ending> {
    access.permit(node, Operations::HAVE)?;
    let layout = layout_of(node, head.layout_epoch)?;
    let needed = usize::from(layout.min_durable.max(1));
    // A replica that is in sync has what the others have; one that is not must ask them.
    let incomplete = *node.catching_up.borrow();
    let mut pgs = Vec::with_capacity(ids.len());
    let mut copies = Vec::with_capacity(ids.len());
    let mut questions: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, id) in ids.iter().enumerate() {
        let Some(pg) = layout.pg_of(id) else {
            return refuse(Refusal::Unavailable, "this node has no layout yet");
        };
        keeps(node, &layout, pg)?;
        let own = node.store.contains(id)?;
        pgs.push(pg);
        copies.push(usize::from(own));
        if (own || incomplete) && usize::from(own) < needed {
            for replica in others(node, &layout, pg) {
                questions.entry(&replica.name).or_default().push(index);
            }
        }
    }
    let asked = questions.iter().filter_map(|(name, indexes)| {
        let replica = layout.node(name)?;
        let ids = &ids;
        Some(async move {
            let ids: Vec<ChunkId> = indexes.iter().map(|&i| ids[i]).collect();
            let question = async {
                let session = node.peers.session(replica).await.ok()?;
                session.have_local(ids).await.ok()
            };
            let answer = tokio::time::timeout(node.peer_request, question).await.ok().flatten();
            (indexes, answer)
        })
    });
    let mut silent = vec![false; ids.len()];
    for (indexes, answer) in join_all(asked).await {
        for (position, &index) in indexes.iter().enumerate() {
            match answer.as_ref().and_then(|a| a.get(position)) {
                Some(Presence::Yes) => copies[index] += 1,
                Some(_) => {}
                None => silent[index] = true,
            }
        }
    }
    let answers = (0..ids.len())
        .map(|i| {
            if copies[i] >= needed {
                node.windows.note_have(head, pgs[i]);
                Presence::Yes
            } else if silent[i] {
                Presence::Unknown
            } else {
                Presence::No
            }
        })
        .collect();
    node.metrics.asked_ids.inc_by(ids.len() as u64);
    Ok(finish_with(send, &Frame::HaveAnswer { answers }).await?)
}

/// Whether ids are durable on this node.
pub(super) async fn have_local(
    node: &Node,
    access: &Access,
    ids: &[ChunkId],
    send: &mut SendStream,
) -> Result<(), Ending> {
    access.storage_only()?;
    let mut answers = Vec::with_capacity(ids.len());
    for id in ids {
        answers.push(if node.store.contains(id)? { Presence::Yes } else { Presence::No });
    }
    Ok(finish_with(send, &Frame::HaveAnswer { answers }).await?)
}

/// Records, in the order asked.
pub(super) async fn get(
    node: &Node,
    access: &Access,
    ids: Vec<ChunkId>,
    send: &mut SendStream,
) -> Result<(), Ending> {
    access.permit(node, Operations::GET_PAGES)?;
    for id in ids {
        let Some(record) = node.store.get(id).await? else {
            write_frame(send, &Frame::Missing { id }).await?;
            continue;
        };
        access.same_domain(record.header())?;
        if record.header().kind == Kind::Data {
            access.permit(node, Operations::GET_DATA)?;
        }
        let (pg, sequence) = (PgId(0), 0);
        write_frame(send, &Frame::Chunk { pg, sequence, record: record.bytes().clone() }).await?;
        node.metrics.got_records.inc();
    }
    finish(send);
    Ok(())
}

/// The next ids of a PG.
pub(super) async fn list_pg(
    node: &Node,
    access: &Access,
    pg: PgId,
    after: ChunkId,
    send: &mut SendStream,
) -> Result<(), Ending> {
    access.storage_only()?;
    let count = node.layout.borrow().pgs.len();
    let Some((first, last)) = range_of(pg, count) else {
        return refuse(Refusal::Protocol, format!("there is no placement group {pg}"));
    };
    let ids = node.store.list(after.max(first), last, MAX_IDS)?;
    if !ids.is_empty() {
        write_frame(send, &Frame::PgIds { ids }).await?;
    }
    Ok(finish_with(send, &Frame::End).await?)
}

/// The ids of a PG lie after the first of these and not after the second.
pub(crate) fn range_of(pg: PgId, pg_count: usize) -> Option<(ChunkId, ChunkId)> {
    // `pg_of` cuts the 65536 heads into slices: those with head * count / 65536 == pg.
    let (pg, count) = (usize::from(pg.0), pg_count.min(1 << 16));
    if pg >= count {
        return None;
    }
    let first = (pg << 16).div_ceil(count);
    let end = ((pg + 1) << 16).div_ceil(count);
    let head = |n: usize| u16::try_from(n).unwrap_or(u16::MAX).to_be_bytes();
    let before = match first.checked_sub(1) {
        None => ChunkId::HOLE,
        Some(n) => {
            let mut id = [255; 32];
            id[..2].copy_from_slice(&head(n));
            ChunkId(id)
        }
    };
    let mut last = [255; 32];
    last[..2].copy_from_slice(&head(end - 1));
    Some((before, ChunkId(last)))
}

#[cfg(test)]
mod tests {
    use outrider_proto::layout::pg_of;

    use super::*;

    #[test]
    fn ranges_are_exactly_what_belongs_to_the_group() {
        for count in [1, 3, 7, 64, 4096] {
            for pg in 0..count {
                let pg = PgId(u16::try_from(pg).expect("small"));
                let (before, last) = range_of(pg, count).expect("exists");
                assert_eq!(pg_of(&last, count), Some(pg));
                if before != ChunkId::HOLE {
                    assert_eq!(pg_of(&before, count), Some(PgId(pg.0 - 1)));
                }
                let next = range_of(PgId(pg.0 + 1), count).map(|(b, _)| b);
                assert!(next.is_none_or(|b| b == last), "no gap and no overlap");
            }
        }
        assert_eq!(range_of(PgId(3), 3), None);
    }
}
