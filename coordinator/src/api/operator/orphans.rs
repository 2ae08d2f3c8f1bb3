//! What backups left on hosts and nothing explains, for operators.

use futures::future::join_all;
use outrider_proto::rpc;

use crate::leader::Leader;
use crate::state::absence::LeftBehind;
use crate::traces::{Known, Orphan, Owner, VmTraces, orphans};

/// Looks at the hosts, all at once.
pub(super) async fn list(leader: &Leader, hosts: Vec<String>) -> rpc::ListOrphansReply {
    let mut reply = rpc::ListOrphansReply {
        orphans: leader.member().replica().read(|state| {
            let left = state.left_by_deleted().into_iter();
            left.filter(|left| left.host.is_none_or(|host| hosts.iter().any(|h| h == host)))
                .map(|left| deleted(&left))
                .collect()
        }),
        looked: Vec::new(),
    };
    let looks = hosts.into_iter().map(|host| async move { (leader.survey(&host).await, host) });
    for (found, host) in join_all(looks).await {
        let mut looked = rpc::Looked { host: host.clone(), ..rpc::Looked::default() };
        match found {
            Err(error) => looked.failure = error.to_string(),
            Ok(vms) => {
                for vm in vms {
                    let known = leader.member().replica().read(|state| Known::of(state, &vm.vm));
                    let (found, explained) = orphans(&vm, &known);
                    looked.explained += explained;
                    reply.orphans.extend(found.into_iter().map(|o| message(&host, &vm, o)));
                }
            }
        }
        reply.looked.push(looked);
    }
    reply
}

fn message(host: &str, vm: &VmTraces, orphan: Orphan) -> rpc::Orphan {
    rpc::Orphan {
        host: host.to_owned(),
        vm: Some((&vm.vm).into()),
        vm_name: vm.name.clone(),
        what: orphan.what.as_str().to_owned(),
        id: orphan.id,
        name: orphan.name,
        owner: orphan.owner.as_str().to_owned(),
        created_unix_ms: orphan.created_ms,
        chain: orphan.chain,
        why: orphan.why,
        next: orphan.next.to_owned(),
    }
}

/// What a VM that is nowhere any more may have left on its volume: no host can be asked for it.
fn deleted(left: &LeftBehind<'_>) -> rpc::Orphan {
    rpc::Orphan {
        host: left.host.unwrap_or_default().to_owned(),
        vm: Some(left.vm.into()),
        vm_name: left.name.to_owned(),
        what: "deleted VM".to_owned(),
        id: left.duty.checkpoint.clone(),
        name: left.duty.checkpoint_name.clone(),
        owner: Owner::Ours.as_str().to_owned(),
        created_unix_ms: 0,
        chain: Vec::new(),
        why: left.why(),
        next: left.next(),
    }
}
