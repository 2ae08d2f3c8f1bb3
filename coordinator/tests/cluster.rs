//! Coordinators over loopback with real TLS and real databases, agents and storage nodes played by the tests.

#[path = "cluster/fabric.rs"]
mod fabric;
#[path = "cluster/fake.rs"]
mod fake;

use std::time::Duration;

use fabric::Fabric;
use fake::{Agent, StorageNode, eventually};
use outrider_proto::error_code;
use outrider_proto::ids::{ChunkId, VmGuid};
use outrider_proto::rpc::{self, agent_down::What, job_lease::Work};
use outrider_proto::status::detail;

fn code(status: &tonic::Status) -> String {
    detail(status).map(|d| d.code).unwrap_or_else(|| format!("{status:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_leader_is_there_within_three_seconds_and_knows_everything() {
    let mut fabric = Fabric::start(3).await;
    let agent = Agent::attach(&fabric, "hv1", 1).await;
    let vm = VmGuid::random();
    agent.inventory(&[("web", vm, "hv1")]).await;
    fabric.vm_on("web", "hv1").await;
    let old = fabric.leader().await;
    let stopped = tokio::time::Instant::now();
    fabric.stop(old).await;
    let new = fabric.leader().await;
    assert_ne!(old, new);
    assert!(stopped.elapsed() < Duration::from_secs(3), "took {:?}", stopped.elapsed());
    let vms = fabric.operator().await.list_vms(rpc::ListVmsRequest::default()).await;
    assert_eq!(vms.expect("the leader answers").into_inner().vms[0].name, "web");
    fabric.shutdown().await;
}

fn named_group(name: &str) -> rpc::CreateGroupRequest {
    rpc::CreateGroupRequest {
        name: name.into(),
        name_patterns: vec!["*".into()],
        policy: Some(rpc::Policy { require_all_disks: true, ..Default::default() }),
        ..Default::default()
    }
}

/// Two of three have the change: one loses its disk, the other is away, the third never had it. The first and the third are a
/// majority, and must not go on without the change.
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lost_its_disk_outvotes_nobody_who_knows_more() {
    let mut fabric = Fabric::start(3).await;
    let leader = fabric.leader().await;
    let (lost, behind) = (fabric.others(leader)[0], fabric.others(leader)[1]);
    fabric.stop(behind).await;
    let request = named_group("confirmed");
    fabric.operator_at(leader).await.create_group(request).await.expect("a majority has it");
    fabric.stop(lost).await;
    fabric.stop(leader).await;
    fabric.lose_disk(lost);

    fabric.start_again(lost).await;
    fabric.start_again(behind).await;
    let (before, _) = fabric.standing(behind).await;
    eventually("the one that is behind asks for votes in vain", async || {
        (fabric.standing(behind).await.0 >= before + 3).then_some(())
    })
    .await;
    assert_eq!(fabric.standing(lost).await, (0, None), "it took part without knowing anything");

    fabric.start_again(leader).await;
    let groups = fabric.operator().await.list_groups(rpc::ListGroupsRequest {}).await;
    let groups = groups.expect("there is a leader").into_inner().groups;
    assert_eq!(groups[0].name, "confirmed", "what a majority confirmed is there");
    fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_says_who_leads_and_answers_status_as_stale() {
    let fabric = Fabric::start(3).await;
    let leader = fabric.leader().await;
    let follower = fabric.others(leader)[0];
    let mut operator = fabric.operator_at(follower).await;
    let status = operator.list_vms(rpc::ListVmsRequest::default()).await.expect_err("no leader");
    let detail = detail(&status).expect("a detail");
    assert_eq!(detail.code, error_code::NOT_LEADER.code);
    assert_eq!(detail.leader, fabric.address(leader));
    let status = operator.status(rpc::StatusRequest {}).await.expect("any member").into_inner();
    assert!(status.stale && status.members.len() == 3, "{status:?}");
    assert_eq!(status.leader_id, leader);
    fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_and_names_are_kept_apart() {
    let fabric = Fabric::start(1).await;
    let leader = fabric.leader().await;
    let mut as_agent = fabric.operator_as(leader, fabric::Caller::Node("hv1")).await;
    let status = as_agent.list_hosts(rpc::ListHostsRequest {}).await.expect_err("an agent");
    assert_eq!(code(&status), error_code::DENIED.code);
    let status =
        Agent::try_attach(&fabric, "hv1", "hv2", 1).await.map(drop).expect_err("another's name");
    assert_eq!(code(&status), error_code::DENIED.code);
    let status = StorageNode::try_attach(&fabric, "s1", "s2").await.expect_err("another's name");
    assert_eq!(code(&status), error_code::DENIED.code);
    let raft = fabric.raft_as(leader, fabric::Caller::Node("hv1")).await;
    assert_eq!(code(&raft.expect_err("no member")), error_code::DENIED.code);
    fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_vms_of_one_name_are_told_apart_by_key() {
    let fabric = Fabric::start(1).await;
    let agent = Agent::attach(&fabric, "hv1", 1).await;
    let (a, b) = (VmGuid::random(), VmGuid::random());
    agent
        .inventory(&[("twin", a, "hv1"), ("twin", b, "hv1"), ("alone", VmGuid::random(), "hv1")])
        .await;
    fabric.vm_on("alone", "hv1").await;
    let mut operator = fabric.operator().await;
    let group = |vms: &[&str], name: &str| rpc::CreateGroupRequest {
        name: name.to_owned(),
        vms: vms.iter().map(|v| (*v).to_owned()).collect(),
        ..rpc::CreateGroupRequest::default()
    };
    let status = operator.create_group(group(&["twin"], "g")).await.expect_err("ambiguous");
    assert_eq!(code(&status), error_code::AMBIGUOUS_NAME.code);
    assert!(status.message().contains(&a.to_string()) && status.message().contains(&b.to_string()));
    let status = operator.create_group(group(&["nobody"], "g")).await.expect_err("unknown");
    assert_eq!(code(&status), error_code::UNKNOWN_VM.code);
    let status = operator.create_group(group(&["alone"], "a\nb")).await.expect_err("bad name");
    assert_eq!(code(&status), error_code::BAD_NAME.code);
    let key = format!("cluster/{a}");
    let made =
        operator.create_group(group(&[&key, "alone"], "g")).await.expect("by key").into_inner();
    assert_eq!(made.vms.len(), 2);
    let status = operator.create_group(group(&["alone"], "h")).await.expect_err("taken");
    assert_eq!(code(&status), error_code::VM_TAKEN.code);
    let status = operator
        .restore(rpc::RestoreRequest { vm: "alone".into(), ..Default::default() })
        .await
        .expect_err("no point");
    assert_eq!(code(&status), error_code::UNKNOWN_POINT.code);
    fabric.shutdown().await;
}

/// The whole conversation: group, run, lease, duty, commit refused and taken, bind, finish, restore, restart.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_committed_by_receipts_only_and_survives_a_restart_from_disk() {
    let mut fabric = Fabric::start(3).await;
    let nodes = StorageNode::attach_three(&fabric).await;
    let layout = fabric.layout().await;
    let mut hv1 = Agent::attach(&fabric, "hv1", 1).await;
    let vm = VmGuid::random();
    hv1.inventory(&[("db", vm, "hv1")]).await;
    fabric.vm_on("db", "hv1").await;
    let mut operator = fabric.operator().await;
    let group = rpc::CreateGroupRequest {
        name: "all".into(),
        name_patterns: vec!["*".into()],
        ..Default::default()
    };
    operator.create_group(group).await.expect("created");
    let run = rpc::RunBackupRequest { group: "all".into(), ..Default::default() };
    let job = operator.run_backup(run).await.expect("runs").into_inner().jobs.remove(0);
    let lease = hv1.lease().await;
    assert_eq!(lease.job_id, job.job_id);
    assert!(lease.keys.is_some() && lease.layout.is_some() && !lease.predecessor_open);
    let Some(Work::Backup(work)) = lease.work.clone() else { panic!("no backup: {lease:?}") };

    let status = operator
        .run_backup(rpc::RunBackupRequest { vm: "db".into(), ..Default::default() })
        .await
        .expect_err("one job a VM");
    assert_eq!(code(&status), error_code::BUSY.code);

    let duty = hv1.record_duty(&lease).await.expect("recorded");
    hv1.duty(&lease, &duty, rpc::DutyState::Created).await.expect("created");

    let manifest = ChunkId([9; 32]);
    let mut request = fake::commit_request(&lease, &work.point_id, manifest);
    let reply = hv1.commit(request.clone()).await.expect("answers");
    assert_eq!(reply.outcome(), rpc::CommitOutcome::ReceiptsLacking, "{reply:?}");
    fake::claim(&mut request, &fabric, &layout, &nodes[..1], manifest);
    let reply = hv1.commit(request.clone()).await.expect("answers");
    assert_eq!(reply.outcome(), rpc::CommitOutcome::ReceiptsLacking, "one node is too few");
    request.windows.clear();
    request.root_receipts.clear();
    fake::claim(&mut request, &fabric, &layout, &nodes, manifest);
    let reply = hv1.commit(request.clone()).await.expect("answers");
    assert_eq!(reply.outcome(), rpc::CommitOutcome::Committed, "{reply:?}");
    let again = hv1.commit(request.clone()).await.expect("answers");
    assert_eq!((again.outcome(), &again.point_id), (rpc::CommitOutcome::Committed, &work.point_id));

    let bound = hv1.bind(&lease, &work.point_id, manifest).await.expect("answers");
    assert!(bound.bound, "{}", bound.reason);
    hv1.duty(&lease, &duty, rpc::DutyState::Done).await.expect("done");
    hv1.finish(&lease, true).await.expect("finished");
    fabric.job_in(&job.job_id, "completed").await;

    let restore = rpc::RestoreRequest {
        vm: "db".into(),
        new_name: "db copy".into(),
        to_host: "hv1".into(),
        ..Default::default()
    };
    let restore = operator.restore(restore).await.expect("created").into_inner();
    let lease = hv1.lease().await;
    assert_eq!(lease.job_id, restore.job_id);
    assert!(matches!(&lease.work, Some(Work::Restore(r)) if r.target_name == "db copy"));
    let access = operator
        .read_access(rpc::ReadAccessRequest { point_id: work.point_id.clone() })
        .await
        .expect("given")
        .into_inner();
    assert!(access.keys.is_some() && !access.ticket.is_empty());

    fabric.restart_all().await;
    let mut operator = fabric.operator().await;
    let points = operator.list_points(rpc::ListPointsRequest { vm: "db".into() }).await;
    let points = points.expect("answers").into_inner().points;
    assert_eq!(points.len(), 1);
    assert_eq!(points[0].point_id, work.point_id);
    let vms = operator.list_vms(rpc::ListVmsRequest::default()).await.expect("answers");
    assert_eq!(vms.into_inner().vms[0].bound_reference_point, "rp-1");
    // The same agent finds its restore again after the restart, and the old commit is answered as ever.
    let mut hv1 = Agent::attach(&fabric, "hv1", 1).await;
    assert_eq!(hv1.lease().await.job_id, restore.job_id);
    let again = hv1.commit(request).await.expect("answers");
    assert_eq!((again.outcome(), &again.point_id), (rpc::CommitOutcome::Committed, &work.point_id));
    fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_move_the_old_host_is_superseded_and_the_new_one_goes_on_with_the_job() {
    let fabric = Fabric::start(1).await;
    let nodes = StorageNode::attach_three(&fabric).await;
    let layout = fabric.layout().await;
    let mut hv1 = Agent::attach(&fabric, "hv1", 1).await;
    let mut hv2 = Agent::attach(&fabric, "hv2", 7).await;
    let vm = VmGuid::random();
    hv1.inventory(&[("db", vm, "hv1")]).await;
    hv2.inventory(&[]).await;
    fabric.vm_on("db", "hv1").await;
    let mut operator = fabric.operator().await;
    let run = rpc::RunBackupRequest { vm: "db".into(), ..Default::default() };
    let job = operator.run_backup(run).await.expect("runs").into_inner().jobs.remove(0);
    let first = hv1.lease().await;
    let Some(Work::Backup(work)) = first.work.clone() else { panic!("no backup") };
    let duty = hv1.record_duty(&first).await.expect("recorded");

    hv2.seen(("db", vm, "hv2")).await;
    let second = hv2.lease().await;
    assert_eq!(second.job_id, job.job_id);
    assert!(second.lease_epoch > first.lease_epoch && second.attempt == 2);
    assert!(second.placement_epoch > first.placement_epoch);
    assert!(second.predecessor_open, "the old host has not said closed");
    assert_eq!(second.duties.len(), 1, "duties travel");
    let ended = hv1.wait(|what| match what {
        What::Ended(ended) => Some(ended),
        _ => None,
    });
    assert_eq!(ended.await.lease_epoch, first.lease_epoch);

    let manifest = ChunkId([9; 32]);
    let mut stale = fake::commit_request(&first, &work.point_id, manifest);
    fake::claim(&mut stale, &fabric, &layout, &nodes, manifest);
    let reply = hv1.commit(stale).await.expect("answers");
    assert_eq!(reply.outcome(), rpc::CommitOutcome::Superseded);
    let status = hv1.duty(&first, &duty, rpc::DutyState::Done).await.expect_err("superseded");
    assert_eq!(code(&status), error_code::SUPERSEDED.code);
    let foreign = hv1.record_duty(&second).await.expect_err("another's lease");
    assert_eq!(code(&foreign), error_code::DENIED.code);

    hv1.closed(&first).await;
    let closed = hv2.wait(|what| match what {
        What::OldHostClosed(closed) => Some(closed),
        _ => None,
    });
    assert_eq!(closed.await.lease_epoch, second.lease_epoch);
    let mut request = fake::commit_request(&second, &work.point_id, manifest);
    fake::claim(&mut request, &fabric, &layout, &nodes, manifest);
    let reply = hv2.commit(request).await.expect("answers");
    assert_eq!(reply.outcome(), rpc::CommitOutcome::Committed, "{reply:?}");
    let bound = hv2.bind(&second, &work.point_id, manifest).await.expect("answers");
    assert!(bound.bound, "{}", bound.reason);
    // Finished, but something is left: not green, and somebody is sent to clean up.
    hv2.finish(&second, true).await.expect("finished");
    fabric.job_in(&job.job_id, "completed with warnings").await;
    let cleanup = hv2.lease().await;
    assert!(matches!(cleanup.work, Some(Work::Cleanup(_))), "{cleanup:?}");
    assert!(cleanup.keys.is_some(), "agents begin no job without keys");
    hv2.duty(&cleanup, &duty, rpc::DutyState::Done).await.expect("done");
    hv2.finish(&cleanup, true).await.expect("finished");
    fabric.job_in(&cleanup.job_id, "completed").await;
    fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_storage_node_voids_its_receipts() {
    let fabric = Fabric::start(1).await;
    let mut nodes = StorageNode::attach_three(&fabric).await;
    let layout = fabric.layout().await;
    let mut hv1 = Agent::attach(&fabric, "hv1", 1).await;
    hv1.inventory(&[("db", VmGuid::random(), "hv1")]).await;
    fabric.vm_on("db", "hv1").await;
    let run = rpc::RunBackupRequest { vm: "db".into(), ..Default::default() };
    fabric.operator().await.run_backup(run).await.expect("runs");
    let lease = hv1.lease().await;
    let Some(Work::Backup(work)) = lease.work.clone() else { panic!("no backup") };
    let manifest = ChunkId([9; 32]);
    let mut request = fake::commit_request(&lease, &work.point_id, manifest);
    fake::claim(&mut request, &fabric, &layout, &nodes[..2], manifest);
    nodes[1] = StorageNode::attach(&fabric, "s2", 2).await;
    let reply = hv1.commit(request.clone()).await.expect("answers");
    assert_eq!(reply.outcome(), rpc::CommitOutcome::ReceiptsLacking, "{reply:?}");
    assert!(!reply.lacking_pgs.is_empty());
    request.windows.clear();
    request.root_receipts.clear();
    let now = nodes[1].layout().await;
    assert_eq!(now.epoch, layout.epoch, "a restart is no change of the layout");
    fake::claim(&mut request, &fabric, &now, &nodes[1..], manifest);
    let reply = hv1.commit(request).await.expect("answers");
    assert_eq!(reply.outcome(), rpc::CommitOutcome::Committed, "{reply:?}");
    fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_holder_loses_its_lease_and_a_beating_one_keeps_it() {
    let fabric = Fabric::start(1).await;
    let _nodes = StorageNode::attach_three(&fabric).await;
    let mut hv1 = Agent::attach(&fabric, "hv1", 1).await;
    let vm = VmGuid::random();
    hv1.inventory(&[("db", vm, "hv1")]).await;
    fabric.vm_on("db", "hv1").await;
    let run = rpc::RunBackupRequest { vm: "db".into(), ..Default::default() };
    let job =
        fabric.operator().await.run_backup(run).await.expect("runs").into_inner().jobs.remove(0);
    let lease = hv1.lease().await;
    // Longer than a lease of the tests: only renewals can explain that it lives.
    for beat in 1..=8 {
        hv1.beat(beat).await;
        let renewed = hv1.wait(|what| match what {
            What::Renewal(renewal) => Some(renewal),
            _ => None,
        });
        assert_eq!(renewed.await.beat, beat);
        tokio::time::sleep(fabric::LEASE / 4).await;
    }
    let attempts = fabric.job(&job.job_id).await.attempts;
    assert_eq!((attempts.len(), attempts[0].end.as_str()), (1, ""));
    // It stops beating although its stream stands.
    eventually("the lease is lost and given anew", async || {
        let job = fabric.job(&job.job_id).await;
        (job.attempts.len() == 2).then_some(())
    })
    .await;
    let again = hv1.lease().await;
    assert!(again.lease_epoch > lease.lease_epoch);
    // A new process of the agent gets the job at once: the old one is gone.
    drop(hv1);
    let mut hv1 = Agent::attach(&fabric, "hv1", 2).await;
    let third = hv1.lease().await;
    assert!(third.lease_epoch > again.lease_epoch && !third.predecessor_open, "{third:?}");
    fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_goes_on_under_the_next_leader() {
    let mut fabric = Fabric::start(3).await;
    let nodes = StorageNode::attach_three(&fabric).await;
    let layout = fabric.layout().await;
    let mut hv1 = Agent::attach(&fabric, "hv1", 1).await;
    hv1.inventory(&[("db", VmGuid::random(), "hv1")]).await;
    fabric.vm_on("db", "hv1").await;
    let run = rpc::RunBackupRequest { vm: "db".into(), ..Default::default() };
    let job =
        fabric.operator().await.run_backup(run).await.expect("runs").into_inner().jobs.remove(0);
    let lease = hv1.lease().await;
    let Some(Work::Backup(work)) = lease.work.clone() else { panic!("no backup") };
    let old = fabric.leader().await;
    fabric.stop(old).await;
    let mut hv1 = Agent::attach(&fabric, "hv1", 1).await;
    let same = hv1.lease().await;
    assert_eq!((&same.job_id, same.lease_epoch), (&lease.job_id, lease.lease_epoch));
    assert_eq!(same.keys, lease.keys, "the fabric's keys are the same under every leader");
    let manifest = ChunkId([9; 32]);
    let mut request = fake::commit_request(&lease, &work.point_id, manifest);
    fake::claim(&mut request, &fabric, &layout, &nodes, manifest);
    let reply = hv1.commit(request).await.expect("answers");
    assert_eq!(reply.outcome(), rpc::CommitOutcome::Committed, "{reply:?}");
    hv1.finish(&lease, true).await.expect("finished");
    fabric.job_in(&job.job_id, "completed").await;
    fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_another_kek_refuses_to_serve() {
    let mut fabric = Fabric::start(1).await;
    fabric.leader().await;
    let error = fabric.restart_with_wrong_kek().await;
    let text = format!("{:#}", fake::chain(&error));
    assert!(text.contains("key-encryption key does not open"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn watching_shows_progress_and_ends_with_the_job() {
    let fabric = Fabric::start(1).await;
    let _nodes = StorageNode::attach_three(&fabric).await;
    let mut hv1 = Agent::attach(&fabric, "hv1", 1).await;
    hv1.inventory(&[("db", VmGuid::random(), "hv1")]).await;
    fabric.vm_on("db", "hv1").await;
    let mut operator = fabric.operator().await;
    let run = rpc::RunBackupRequest { vm: "db".into(), ..Default::default() };
    let job = operator.run_backup(run).await.expect("runs").into_inner().jobs.remove(0);
    let watch = rpc::WatchJobsRequest { job_ids: vec![job.job_id.clone()] };
    let mut watch = operator.watch_jobs(watch).await.expect("watches").into_inner();
    let lease = hv1.lease().await;
    hv1.progress(&lease, "running", 4096).await;
    let mut states = Vec::new();
    while let Some(job) = watch.message().await.expect("a job") {
        if job.state == "running" && !states.contains(&job.state) {
            assert_eq!(job.stats.unwrap_or_default().read_bytes, 4096);
            operator
                .cancel_job(rpc::CancelJobRequest { job_id: job.job_id.clone() })
                .await
                .expect("cancelled");
        }
        states.push(job.state);
    }
    assert_eq!(states.last().map(String::as_str), Some("cancelled"), "{states:?}");
    let ended = hv1.wait(|what| match what {
        What::Ended(ended) => Some(ended),
        _ => None,
    });
    assert!(ended.await.reason.contains("cancelled"));
    fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_a_majority_lets_its_agents_go_and_calls_itself_stale() {
    let mut fabric = Fabric::start(3).await;
    let mut hv1 = Agent::attach(&fabric, "hv1", 1).await;
    let leader = fabric.leader().await;
    for other in fabric.others(leader) {
        fabric.stop(other).await;
    }
    hv1.cut_off().await;
    let status = fabric.operator_at(leader).await.status(rpc::StatusRequest {}).await;
    assert!(status.expect("answers").into_inner().stale);
    fabric.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shared_leader_client_finds_us() {
    use outrider_process::identity::Role;
    use outrider_process::leader::LeaderClient;
    use outrider_proto::rpc::operator_client::OperatorClient;
    let fabric = Fabric::start(3).await;
    let leader = fabric.leader().await;
    let mut addresses: Vec<String> =
        fabric.others(leader).iter().map(|id| fabric.address(*id)).collect();
    addresses.push(fabric.address(leader));
    let client = LeaderClient::new(addresses, fabric.identity(Role::Operator, "ann"));
    let hosts = client
        .call(Duration::from_secs(10), |channel| async move {
            OperatorClient::new(channel).list_hosts(rpc::ListHostsRequest {}).await
        })
        .await;
    assert!(hosts.expect("the leader answers").into_inner().hosts.is_empty());
    fabric.shutdown().await;
}
