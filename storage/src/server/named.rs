//! Roots, journal entries, copies of the state.

use bytes::Bytes;
use outrider_format::entry::{Name, Provenance};
use outrider_proto::frame::{Frame, MAX_NAMES, Refusal, Space};
use outrider_proto::ids::{JobId, PgId};
use outrider_proto::receipt::NamedReceipt;
use outrider_proto::record::{Kind, Record};
use outrider_proto::root::Root;
use outrider_proto::ticket::Operations;
use outrider_storage_client::frame_io::{finish_with, write_frame};
use quinn::SendStream;

use super::access::Access;
use super::{Ending, Node, refuse};

/// Keeps a record under a name.
pub(super) async fn put(
    node: &Node,
    access: &Access,
    space: Space,
    key: Vec<u8>,
    fence: u64,
    record: Bytes,
    send: &mut SendStream,
) -> Result<(), Ending> {
    let record = match Record::decode(record) {
        Ok(record) => record,
        Err(error) => return refuse(Refusal::Protocol, error.to_string()),
    };
    may_put(node, access, space, &key, fence, &record)?;
    let id = record.id();
    let provenance = Provenance {
        layout_epoch: node.layout.borrow().epoch,
        incarnation: node.store.incarnation(),
        job: access.ticket().map_or(JobId::from_bytes([0; 16]), |t| t.job),
        pg: PgId(0),
    };
    let name = Name { space: space as u8, key: key.clone(), fence };
    node.store.put_named(name, provenance, record).await?;
    let receipt = NamedReceipt {
        fabric: node.fabric,
        node: node.name.clone(),
        incarnation: node.store.incarnation(),
        space: space as u8,
        key,
        id,
    };
    let receipt = receipt.sign(node.identity.signing_key().pair()).into();
    Ok(finish_with(send, &Frame::Named { receipt }).await?)
}

fn may_put(
    node: &Node,
    access: &Access,
    space: Space,
    key: &[u8],
    fence: u64,
    record: &Record,
) -> Result<(), Ending> {
    let expected = match space {
        Space::Root => Kind::Root,
        Space::Journal => Kind::Journal,
        Space::State => Kind::State,
    };
    if record.header().kind != expected {
        return refuse(
            Refusal::Protocol,
            format!("space {space:?} keeps no records of kind {:?}", record.header().kind),
        );
    }
    if space == Space::State {
        return if access.is_coordinator() || access.is_storage() {
            Ok(())
        } else {
            refuse(Refusal::Denied, "only coordinators keep copies of their state")
        };
    }
    let operation = if space == Space::Root { Operations::ROOT } else { Operations::PUT };
    access.permit(node, operation)?;
    access.same_domain(record.header())?;
    let Some(ticket) = access.ticket() else { return Ok(()) };
    if fence > ticket.lease_epoch.0 {
        return refuse(
            Refusal::Denied,
            format!("the ticket is of lease {}, the write of {fence}", ticket.lease_epoch),
        );
    }
    let own = match space {
        Space::Journal => key.starts_with(&ticket.job.to_bytes()),
        _ => Root::decode(record.clear())
            .is_ok_and(|root| root.job == ticket.job && root.point.to_bytes() == key),
    };
    if own {
        Ok(())
    } else {
        refuse(
            Refusal::Denied,
            format!("job {} may write only its own journal and root", ticket.job),
        )
    }
}

/// The named records of a prefix.
pub(super) async fn list(
    node: &Node,
    access: &Access,
    space: Space,
    prefix: &[u8],
    send: &mut SendStream,
) -> Result<(), Ending> {
    if space == Space::State || access.is_coordinator() {
        if !access.is_coordinator() && !access.is_storage() {
            return refuse(Refusal::Denied, "only coordinators read copies of their state");
        }
    } else {
        access.permit(node, Operations::GET_PAGES)?;
    }
    if let Some(ticket) = access.ticket()
        && space == Space::Journal
        && !prefix.starts_with(&ticket.job.to_bytes())
    {
        return refuse(
            Refusal::Denied,
            format!("job {} may read only its own journal", ticket.job),
        );
    }
    for entry in node.store.list_named(space, prefix)? {
        // A damaged one is left out: another node has its copy.
        let Some(record) = node.store.get_named(space, &entry).await else { continue };
        if access.same_domain(record.header()).is_err() {
            continue;
        }
        let record = record.bytes().clone();
        let (key, fence) = (entry.key, entry.fence);
        write_frame(send, &Frame::NamedRecord { key, fence, record }).await?;
    }
    Ok(finish_with(send, &Frame::End).await?)
}

/// The next names of a space, without their records.
pub(super) async fn list_names(
    node: &Node,
    access: &Access,
    space: Space,
    after: &[u8],
    send: &mut SendStream,
) -> Result<(), Ending> {
    access.storage_only()?;
    let entries = node.store.list_names(space, after, MAX_NAMES)?;
    let names = entries.into_iter().map(|entry| (entry.key, entry.fence)).collect();
    Ok(finish_with(send, &Frame::Names { names }).await?)
}
