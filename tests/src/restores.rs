//! Restores as tests ask for them, and their ends.

use outrider_lab::GroupSetup;
use outrider_proto::rpc;

use crate::Fabric;

/// A running VM of another name, on this host.
#[must_use]
pub fn copy_to(point: &rpc::Point, host: &str, name: &str) -> rpc::RestoreRequest {
    rpc::RestoreRequest {
        point_id: point.point_id.clone(),
        to_host: host.to_owned(),
        new_name: name.to_owned(),
        power_on: true,
        ..Default::default()
    }
}

/// The VM itself again, in its own place; not started.
#[must_use]
pub fn in_place(point: &rpc::Point) -> rpc::RestoreRequest {
    rpc::RestoreRequest {
        point_id: point.point_id.clone(),
        overwrite: true,
        keep_guid: true,
        ..Default::default()
    }
}

/// The job of a restore, when it has ended.
pub async fn restored(fabric: &Fabric, request: rpc::RestoreRequest) -> rpc::Job {
    let job = fabric.operator.restore(request).await.expect("the restore starts");
    fabric.operator.ended(&job.job_id).await
}

/// A restore that works, with its report in one text.
pub async fn report(fabric: &Fabric, request: rpc::RestoreRequest) -> String {
    let job = restored(fabric, request).await;
    assert!(job.state.starts_with("completed") && job.error_code.is_empty(), "{job:?}");
    job.warnings.join("\n")
}

/// VMs in the making that the simulated cluster has: by host and name.
pub async fn planned(fabric: &Fabric) -> Vec<(String, String)> {
    fabric.lab.state().await.expect("the lab").planned
}

/// Settings of a cluster group, none of them a default.
#[must_use]
pub fn group() -> GroupSetup {
    GroupSetup {
        values: vec![
            ("Priority".into(), 3000),
            ("FailoverThreshold".into(), 3),
            ("FailoverPeriod".into(), 12),
            ("AutoFailbackType".into(), 1),
            ("FailbackWindowStart".into(), 2),
            ("FailbackWindowEnd".into(), 4),
            ("PersistentState".into(), 1),
        ],
        anti_affinity: vec!["databases".into()],
        preferred_owners: vec!["beta".into(), "alpha".into()],
    }
}
