//! What a session may do: by the role in its certificate, and by the ticket of its job.

use std::fmt;

use outrider_process::identity::{PeerName, Role};
use outrider_proto::frame::Refusal;
use outrider_proto::ids::{JobId, LayoutEpoch, PgId, SessionId, Window};
use outrider_proto::layout::Layout;
use outrider_proto::record::Header;
use outrider_proto::ticket::{Operations, Ticket};
use outrider_storage_client::transport::WindowHead;

use super::{Ending, Node, refuse};

/// A session's rights.
#[derive(Debug)]
pub(crate) struct Access {
    peer: PeerName,
    session: SessionId,
    ticket: Option<Ticket>,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.peer)
    }
}

impl Access {
    /// Judges certificate and ticket.
    pub(super) fn check(
        node: &Node,
        peer: PeerName,
        session: SessionId,
        ticket: &[u8],
    ) -> Result<Self, Ending> {
        if matches!(peer.role, Role::Storage | Role::Coordinator) {
            return Ok(Self { peer, session, ticket: None });
        }
        let Some(key) = *node.ticket_key.borrow() else {
            return refuse(
                Refusal::Unavailable,
                "this node has not heard from a coordinator yet and cannot check tickets",
            );
        };
        let ticket = Ticket::verify(ticket, &key)
            .and_then(|t| t.check(&peer.name, node.clock.unix_millis()).map(|()| t))
            .or_else(|e| refuse(Refusal::Denied, e.to_string()))?;
        if ticket.fabric != node.fabric {
            return refuse(Refusal::Denied, format!("the ticket is of fabric {}", ticket.fabric));
        }
        Ok(Self { peer, session, ticket: Some(ticket) })
    }

    /// Whether another storage node asks.
    pub(super) fn is_storage(&self) -> bool {
        self.peer.role == Role::Storage
    }

    /// Whether a coordinator asks.
    pub(super) fn is_coordinator(&self) -> bool {
        self.peer.role == Role::Coordinator
    }

    /// The ticket; storage nodes and coordinators have none.
    pub(super) fn ticket(&self) -> Option<&Ticket> {
        self.ticket.as_ref()
    }

    /// Refuses what the ticket does not allow, or allowed once. Other storage nodes may do everything.
    pub(super) fn permit(&self, node: &Node, operation: Operations) -> Result<(), Ending> {
        match &self.ticket {
            None if self.is_storage() => Ok(()),
            None => refuse(Refusal::Denied, format!("{} may not do this", self.peer)),
            Some(ticket) => ticket
                .permit(operation)
                .and_then(|()| ticket.check(&self.peer.name, node.clock.unix_millis()))
                .or_else(|e| refuse(Refusal::Denied, e.to_string())),
        }
    }

    /// Refuses everybody but other storage nodes.
    pub(super) fn storage_only(&self) -> Result<(), Ending> {
        if self.is_storage() {
            Ok(())
        } else {
            refuse(Refusal::Denied, "only storage nodes may ask this")
        }
    }

    /// The window of a request: of the job in the ticket and of this session, unless a storage node forwards it.
    pub(super) fn head(
        &self,
        job: JobId,
        session: SessionId,
        window: Window,
        layout_epoch: LayoutEpoch,
    ) -> Result<WindowHead, Ending> {
        if let Some(ticket) = &self.ticket
            && (ticket.job != job || session != self.session)
        {
            return refuse(
                Refusal::Denied,
                format!("the session was opened for job {}", ticket.job),
            );
        }
        Ok(WindowHead { job, session, window, layout_epoch })
    }

    /// Refuses records of another dedup domain than the ticket's.
    pub(super) fn same_domain(&self, header: &Header) -> Result<(), Ending> {
        match &self.ticket {
            Some(t) if t.domain != header.domain => refuse(
                Refusal::Denied,
                format!(
                    "record {:?} belongs to dedup domain {}, the ticket is for {}",
                    header.id, header.domain, t.domain
                ),
            ),
            _ => Ok(()),
        }
    }
}

/// The layout, if the request was made under the same one.
pub(super) fn layout_of(node: &Node, epoch: LayoutEpoch) -> Result<Layout, Ending> {
    let layout = node.layout.borrow().clone();
    if layout.epoch == LayoutEpoch(0) {
        return refuse(
            Refusal::Unavailable,
            "this node has no layout yet: it has not heard from a coordinator",
        );
    }
    if layout.epoch != epoch {
        return refuse(
            Refusal::StaleLayout,
            format!(
                "the request was made under layout {epoch}, this node works under {}",
                layout.epoch
            ),
        );
    }
    Ok(layout)
}

/// Refuses PGs that this node does not keep.
pub(super) fn keeps(node: &Node, layout: &Layout, pg: PgId) -> Result<(), Ending> {
    if layout.keeps(&node.name, pg) {
        Ok(())
    } else {
        refuse(Refusal::NotAReplica, format!("{} keeps no copy of placement group {pg}", node.name))
    }
}
