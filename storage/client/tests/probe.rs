//! Paths to storage nodes: how large packets may be, and what nobody answers at. A relay between client and server plays a network
//! that carries small packets only, or none.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use outrider_process::identity::ca::FabricCa;
use outrider_process::identity::{Identity, Role};
use outrider_process::network::Network;
use outrider_proto::frame::ALPN;
use outrider_proto::ids::{FabricId, NodeIncarnation};
use outrider_proto::layout::StorageNode;
use outrider_storage_client::quic::probe::Prober;
use outrider_storage_client::quic::{endpoint, tuning};
use outrider_storage_client::{ClientRole, TransportError};
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

struct World {
    prober: Prober,
    server: SocketAddr,
    tasks: Vec<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn world() -> World {
    let folder = tempfile::tempdir().expect("a folder");
    let fabric = FabricId::random();
    let ca = FabricCa::create(&fabric.to_string()).expect("an authority");
    let load = |role, name: &str| {
        let dir = folder.path().join(name);
        ca.issue(role, name, Duration::from_secs(3600)).expect("issued").save(&dir).expect("saved");
        Identity::load(&dir).expect("loads")
    };
    let storage = load(Role::Storage, "s1");
    let config = storage.quinn_server(&[ALPN], Arc::new(tuning::server(1 << 20))).expect("TLS");
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
    let server = socket.local_addr().expect("bound");
    let endpoint = endpoint(Some(socket), Some(config)).expect("an endpoint");
    let accepting = tokio::spawn(async move {
        let mut connections = Vec::new();
        while let Some(incoming) = endpoint.accept().await {
            connections.extend(incoming.await.ok());
        }
    });
    let node = load(Role::Node, "hv1");
    let prober = Prober::new(&node, fabric, ClientRole::Agent, Network::default()).expect("made");
    World { prober, server, tasks: vec![accepting], _folder: folder }
}

fn node(name: &str) -> StorageNode {
    StorageNode {
        name: name.into(),
        addresses: vec![],
        zone: "z".into(),
        capacity_bytes: 1,
        receipt_key: vec![1; 32],
        incarnation: NodeIncarnation(1),
        online: true,
    }
}

impl World {
    /// A way to the server that drops datagrams of more than `largest` bytes.
    async fn relay(&mut self, largest: usize) -> String {
        let front = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let back = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        back.connect(self.server).await.expect("an address");
        let address = front.local_addr().expect("bound").to_string();
        self.tasks.push(tokio::spawn(async move {
            let (mut to, mut there, mut here) = (None, vec![0; 65_536], vec![0; 65_536]);
            loop {
                tokio::select! {
                    Ok((n, from)) = front.recv_from(&mut there) => {
                        to = Some(from);
                        if n <= largest {
                            let _ = back.send(&there[..n]).await;
                        }
                    }
                    Ok(n) = back.recv(&mut here) => if let Some(to) = to.filter(|_| n <= largest) {
                        let _ = front.send_to(&here[..n], to).await;
                    },
                    else => return,
                }
            }
        }));
        address
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_packet_that_passes_is_found_and_a_narrow_path_is_called_so() {
    let mut world = world().await;
    let direct = world.server.to_string();
    let wide = world.prober.try_path(&node("s1"), &direct).await.expect("reached");
    assert!(wide.packet > 9_000 && !wide.is_narrow(), "{wide:?}");
    let narrow = world.relay(1_350).await;
    let narrow = world.prober.try_path(&node("s1"), &narrow).await.expect("reached");
    assert!((1_200..=1_350).contains(&narrow.packet) && narrow.is_narrow(), "{narrow:?}");
    assert!(narrow.packet > 1_280, "the search goes near the bound: {narrow:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_carries_nothing_and_one_to_somebody_else_are_told_apart() {
    let mut world = world().await;
    // Less than QUIC needs, as a firewall that drops all.
    let blocked = world.relay(1_000).await;
    let failure = world.prober.try_path(&node("s1"), &blocked).await.expect_err("blocked");
    assert!(matches!(failure, TransportError::Unreachable { .. }), "{failure}");
    let direct = world.server.to_string();
    let failure = world.prober.try_path(&node("s2"), &direct).await.expect_err("another node");
    assert!(matches!(failure, TransportError::WrongPeer { .. }), "{failure}");
}
