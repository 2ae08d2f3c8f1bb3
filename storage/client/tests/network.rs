//! Connections leave from the networks that the operator wants (O8): in a network namespace of this test's own, with
//! addresses of several networks.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use outrider_process::identity::ca::FabricCa;
use outrider_process::identity::{Identity, Role};
use outrider_process::leader::LeaderClient;
use outrider_process::network::{Network, NetworkConfig};
use outrider_proto::ids::{FabricId, LayoutEpoch, NodeIncarnation, SessionId};
use outrider_proto::layout::StorageNode;
use outrider_proto::rpc;
use outrider_proto::rpc::operator_client::OperatorClient;
use outrider_storage_client::quic::QuicTransport;
use outrider_storage_client::transport::{ChunkTransport, Opening};
use outrider_storage_client::{ClientRole, Limits};

const INSIDE: &str = "OUTRIDER_TEST_NAMESPACE";
const DEADLINE: Duration = Duration::from_secs(30);
/// Two networks of the host; other machines are 10.79.0.1 and fd79::1.
const ADDRESSES: [&str; 6] =
    ["10.77.0.1/16", "10.78.0.1/16", "10.79.0.1/16", "fd77::1/64", "fd78::1/64", "fd79::1/64"];

fn ip(args: &str) {
    let status = Command::new("ip").args(args.split(' ')).status().expect("iproute2");
    assert!(status.success(), "ip {args}");
}

/// Runs the named test again in a namespace; `true` inside.
fn in_namespace(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        ip("link set lo up");
        for address in ADDRESSES {
            let nodad = if address.contains(':') { " nodad" } else { "" };
            ip(&format!("addr add {address} dev lo{nodad}"));
        }
        return true;
    }
    let permitted = Command::new("unshare").args(["-rn", "true"]).output();
    if !permitted.is_ok_and(|o| o.status.success()) {
        assert!(std::env::var_os("OUTRIDER_CI").is_none(), "unshare -rn is not permitted here");
        eprintln!("SKIPPED: this user may not make network namespaces");
        return false;
    }
    let status = Command::new("unshare")
        .args(["-rn"])
        .arg(std::env::current_exe().expect("a test has a path"))
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status();
    assert!(status.expect("unshare runs").success(), "the test failed in its namespace");
    false
}

fn network(text: &str) -> Network {
    let path = std::path::Path::new("network.toml");
    let config = outrider_process::config::parse::<NetworkConfig>(path, text, |_| None);
    Network::new(config.unwrap_or_else(|e| panic!("{e}")))
}

fn identity(dir: &std::path::Path) -> Identity {
    let ca = FabricCa::create("f").expect("an authority");
    let issued = ca.issue(Role::Node, "hv1", Duration::from_secs(3600)).expect("issued");
    issued.save(dir).expect("saved");
    Identity::load(dir).expect("loads")
}

fn node(addresses: Vec<String>) -> StorageNode {
    StorageNode {
        name: "s1".into(),
        addresses,
        zone: "z".into(),
        capacity_bytes: 1,
        receipt_key: vec![1; 32],
        incarnation: NodeIncarnation(1),
        online: true,
    }
}

/// Who knocks first at one of these sockets: from where, and at which.
async fn knock(transport: &QuicTransport, at: &[&str]) -> (IpAddr, usize) {
    let mut sockets = Vec::new();
    for address in at {
        let address: IpAddr = address.parse().expect("an address");
        sockets.push(tokio::net::UdpSocket::bind((address, 0)).await.expect("an address of ours"));
    }
    let addresses = sockets.iter().map(|s| s.local_addr().expect("bound").to_string()).collect();
    let opening = Opening {
        session: SessionId::random(),
        layout_epoch: LayoutEpoch(1),
        ticket: bytes::Bytes::new(),
    };
    let node = node(addresses);
    let mut buffers = vec![[0u8; 2048]; sockets.len()];
    let knocks = sockets.iter().zip(&mut buffers).enumerate().map(|(place, (socket, buffer))| {
        Box::pin(async move { (socket.recv_from(buffer).await.expect("a datagram").1.ip(), place) })
    });
    let heard = tokio::time::timeout(DEADLINE, async {
        tokio::select! {
            (first, ..) = futures::future::select_all(knocks) => Ok(first),
            opened = transport.open(&node, opening) => Err(opened.map(drop)),
        }
    });
    heard.await.expect("somebody knocks").unwrap_or_else(|e| panic!("nobody knocked: {e:?}"))
}

#[tokio::test]
async fn connections_leave_from_the_preferred_network_and_never_through_a_forbidden_one() {
    if !in_namespace(
        "connections_leave_from_the_preferred_network_and_never_through_a_forbidden_one",
    ) {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let identity = Arc::new(identity(dir.path()));
    let limits = Limits { connect: Duration::from_secs(5), ..Limits::default() };
    let transport = |text: &str| {
        QuicTransport::new(&identity, FabricId::random(), ClientRole::Agent, &limits)
            .expect("a transport")
            .over(network(text))
    };
    let from = |text: &str| text.parse::<IpAddr>().expect("an address");

    // QUIC, both families.
    let preferring = transport("source = [\"10.78.0.0/16\", \"fd78::/64\"]");
    assert_eq!(knock(&preferring, &["10.79.0.1"]).await.0, from("10.78.0.1"));
    assert_eq!(knock(&preferring, &["fd79::1"]).await.0, from("fd78::1"));
    let other = transport("source = [\"10.77.0.0/16\"]");
    assert_eq!(knock(&other, &["10.79.0.1"]).await.0, from("10.77.0.1"));
    // Of several advertised addresses the one in the preferred network is tried first.
    let (_, place) = knock(&preferring, &["10.79.0.1", "10.77.0.1", "10.78.0.1"]).await;
    assert_eq!(place, 2);

    // A forbidden network is not connected to, and the sentence says so.
    let avoiding = transport("avoid = [\"10.79.0.0/16\"]");
    let opening = Opening {
        session: SessionId::random(),
        layout_epoch: LayoutEpoch(1),
        ticket: bytes::Bytes::new(),
    };
    let error = avoiding.open(&node(vec!["10.79.0.1:1".into()]), opening).await.map(drop);
    let error = error.expect_err("forbidden").to_string();
    assert!(error.contains("may be used"), "{error}");

    // gRPC.
    let listener = tokio::net::TcpListener::bind("10.79.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("bound");
    let dial = async |text: &str, to: SocketAddr| {
        let leader = LeaderClient::new(vec![to.to_string()], identity.clone()).over(network(text));
        let channel = leader.channel().await?;
        OperatorClient::new(channel).status(rpc::StatusRequest {}).await.map(drop)
    };
    let heard = tokio::time::timeout(DEADLINE, async {
        tokio::select! {
            accepted = listener.accept() => accepted.expect("somebody").1.ip(),
            answer = dial("source = [\"10.78.0.0/16\"]", address) => panic!("{answer:?}"),
        }
    });
    assert_eq!(heard.await.expect("somebody calls"), from("10.78.0.1"));
    let refused = dial("source = [\"10.99.0.0/16\"]", address).await.expect_err("no such address");
    assert!(refused.message().contains("10.99.0.0/16"), "{refused}");
}
