//! What backups left on hosts and nothing explains, for operators.

use futures::future::join_all;
use outrider_proto::rpc;

use crate::leader::Leader;
use crate::traces::{Known, Orphan, VmTraces, orphans};

/// Looks at the hosts, all at once.
pub(super) async fn list(leader: &Leader, hosts: Vec<String>) -> rpc::ListOrphansReply {
    let looks = hosts.into_iter().map(|host| async move { (leader.survey(&host).await, host) });
    let mut reply = rpc::ListOrphansReply::default();
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
