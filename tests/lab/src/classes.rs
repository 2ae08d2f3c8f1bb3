//! The WMI classes: instances, object paths and associations, as the facts describe them.

mod cluster;
mod devices;
mod facts;
mod virtualization;

use outrider_wmi::lab::wire::Refusal;
use outrider_wmi::{NS_CIM, NS_CLUSTER, NS_HGS, NS_VIRTUALIZATION, Object};

pub(crate) use cluster::{group_objects, nodes};
pub(crate) use devices::{image_path, port_path, switch_of};
pub(crate) use facts::summary_of;
pub(crate) use virtualization::{
    checkpoint_path, computer_system, disk_path, job_path, planned_system, reference_point_path,
    system_path,
};

use crate::model::State;
use crate::wql::{ObjectPath, Query};

/// All instances of a class that the providers of `host` show.
fn instances(
    state: &State,
    host: &str,
    namespace: &str,
    class: &str,
) -> Result<Vec<Object>, Refusal> {
    let found = if namespace.eq_ignore_ascii_case(NS_VIRTUALIZATION) {
        virtualization::instances(state, host, class)
    } else if namespace.eq_ignore_ascii_case(NS_CLUSTER) {
        cluster::instances(state, class)
    } else if namespace.eq_ignore_ascii_case(NS_CIM) {
        facts::windows(state, host, class)
    } else if namespace.eq_ignore_ascii_case(NS_HGS) {
        state.hosts.get(host).and_then(|h| devices::guardians(h, class))
    } else {
        return Err(Refusal::NoNamespace(namespace.to_owned()));
    };
    found.ok_or_else(|| Refusal::Invalid {
        what: class.to_owned(),
        reason: "invalid class (0x80041010)".into(),
    })
}

/// Answers a WQL query.
pub(crate) fn query(
    state: &State,
    host: &str,
    namespace: &str,
    wql: &str,
) -> Result<Vec<Object>, Refusal> {
    let query = Query::parse(wql)
        .map_err(|e| Refusal::Invalid { what: wql.to_owned(), reason: e.to_string() })?;
    let all = instances(state, host, namespace, &query.class)?;
    Ok(all.into_iter().filter(|o| query.accepts(o)).map(|o| query.project(o)).collect())
}

/// Reads one instance.
pub(crate) fn get(
    state: &State,
    host: &str,
    namespace: &str,
    path: &str,
) -> Result<Object, Refusal> {
    let not_found = || Refusal::NotFound { namespace: namespace.to_owned(), path: path.to_owned() };
    let parsed = ObjectPath::parse(path).ok_or_else(not_found)?;
    let all = instances(state, host, namespace, &parsed.class)?;
    all.into_iter().find(|o| parsed.names(o)).ok_or_else(not_found)
}

/// Instances associated with the one at `path`.
pub(crate) fn associators(
    state: &State,
    host: &str,
    namespace: &str,
    path: &str,
    assoc_class: &str,
    result_class: &str,
) -> Result<Vec<Object>, Refusal> {
    let source = get(state, host, namespace, path)?;
    let found = if namespace.eq_ignore_ascii_case(NS_VIRTUALIZATION) {
        virtualization::associated(state, host, &source, assoc_class)
    } else {
        cluster::associated(state, &source, assoc_class)
    };
    let wanted = |o: &Object| result_class.is_empty() || o.class.eq_ignore_ascii_case(result_class);
    Ok(found.into_iter().filter(wanted).collect())
}
