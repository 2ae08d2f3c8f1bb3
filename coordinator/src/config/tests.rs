//! Configurations that are taken, and those that contradict themselves.

use std::path::Path;

use super::*;

const GOOD: &str = r#"
name = "c1"
id = 1
fabric = "5c2b3f86-6f0e-4b0e-9a5c-0f6a6c1d2e3f"
identity_dir = "/id"
data_dir = "/data"
kek_file = "/kek"
listen = "127.0.0.1:9701"
members = [{ id = 1, address = "a:1" }, { id = 2, address = "b:1" }, { id = 3, address = "c:1" }]
"#;

fn parse(text: &str) -> Config {
    outrider_process::config::parse(Path::new("coordinator.toml"), text, |_| None).expect("parses")
}

#[test]
fn the_smallest_configuration_is_enough() {
    let config = parse(GOOD);
    assert_eq!(config.validate(), Ok(()));
    assert_eq!(config.lease.duration, Duration::from_secs(30));
    assert_eq!((config.storage.nodes, config.storage.pg_count), (3, 64));
    assert_eq!(config.advertised(), "a:1");
    let told = parse(&format!("advertise = \"out:9\"\n{GOOD}"));
    assert_eq!(told.advertised(), "out:9");
    assert_eq!(told.member_addresses()[&1], "a:1");
}

#[test]
fn everything_in_the_contract_is_understood() {
    let text = format!(
        "observability = \"127.0.0.1:0\"\n{GOOD}\n\
         [lease]\nduration = \"3s\"\nrenew = \"1s\"\ncutoff = \"2s\"\n\
         [storage]\nnodes = 1\npg_count = 8\nreplicas = 1\nmin_durable = 1\n\
         [raft]\nheartbeat = \"50ms\"\nelection_min = \"200ms\"\nelection_max = \"400ms\"\n\
         [telemetry]\notlp_endpoint = \"http://127.0.0.1:4317\"\n"
    );
    assert_eq!(parse(&text).validate(), Ok(()));
}

#[test]
fn contradictions_are_refused() {
    type Change = fn(&mut Config);
    let table: [(Change, ConfigConflict); 7] = [
        (|c| c.id = 9, ConfigConflict::NotListed { id: 9 }),
        (|c| c.members[1].id = 1, ConfigConflict::Twice { id: 1 }),
        (|c| c.members.truncate(2), ConfigConflict::Count { found: 2 }),
        (|c| c.lease.cutoff = c.lease.duration, ConfigConflict::LeaseOrder),
        (|c| c.raft.heartbeat = c.raft.election_min, ConfigConflict::RaftOrder),
        (|c| c.storage.min_durable = 4, ConfigConflict::Copies),
        (|c| c.limits.jobs = 0, ConfigConflict::Limits),
    ];
    for (change, expected) in table {
        let mut config = parse(GOOD);
        change(&mut config);
        assert_eq!(config.validate(), Err(expected));
    }
}
