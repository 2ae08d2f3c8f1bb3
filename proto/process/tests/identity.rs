//! Mutual TLS between members of a fabric, over QUIC and gRPC, with real certificates.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use outrider_process::identity::ca::{FabricCa, IssuedIdentity};
use outrider_process::identity::{
    Identity, IdentityError, PeerName, Role, peer_of_connection, peer_of_request, sign,
};
use outrider_process::tasks::TaskGroup;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tonic::transport::{Channel, Server};

const DAY: Duration = Duration::from_secs(24 * 3600);
const DEADLINE: Duration = Duration::from_secs(30);
const ALPN: &[&[u8]] = &[b"outrider-test/1"];
const KOREAN: &str = "호스트-서울 1";

struct Fabric {
    ca: FabricCa,
    dir: tempfile::TempDir,
}

impl Fabric {
    fn new(name: &str) -> Self {
        let ca = FabricCa::create(name).expect("a fabric");
        Self { ca, dir: tempfile::tempdir().expect("a directory") }
    }

    fn member_dir(&self, role: Role, name: &str) -> PathBuf {
        let dir = self.dir.path().join(format!("{role}-{name}"));
        self.ca.issue(role, name, DAY).expect("issued").save(&dir).expect("saved");
        dir
    }

    fn member(&self, role: Role, name: &str) -> Identity {
        Identity::load(&self.member_dir(role, name)).expect("loaded")
    }
}

fn transport() -> Arc<quinn::TransportConfig> {
    Arc::new(quinn::TransportConfig::default())
}

fn loopback() -> SocketAddr {
    "127.0.0.1:0".parse().expect("an address")
}

/// Connects a QUIC client to a server and tells whom each side saw.
async fn quic(
    server: &Identity,
    client: &Identity,
    wanted: Role,
) -> Result<(PeerName, PeerName), String> {
    let config = server.quinn_server(ALPN, transport()).expect("server");
    let listening = quinn::Endpoint::server(config, loopback()).expect("bound");
    let mut dialing = quinn::Endpoint::client(loopback()).expect("bound");
    dialing.set_default_client_config(client.quinn_client(ALPN, transport()).expect("client"));
    let address = listening.local_addr().expect("bound");
    let accept = async {
        let incoming = listening.accept().await.expect("the endpoint is open");
        incoming.await.map_err(|error| error.to_string())
    };
    let connect = async {
        let connecting = dialing.connect(address, &wanted.server_name()).expect("well formed");
        let connection = connecting.await.map_err(|error| error.to_string())?;
        // TLS 1.3: the server judges our certificate after we believe the handshake is over.
        Ok::<_, String>(connection)
    };
    let (accepted, connected) =
        tokio::time::timeout(DEADLINE, async { tokio::join!(accept, connect) })
            .await
            .expect("a handshake ends");
    let (accepted, connected) = (accepted?, connected?);
    let seen = (
        peer_of_connection(&connected).map_err(|error| error.to_string())?,
        peer_of_connection(&accepted).map_err(|error| error.to_string())?,
    );
    Ok(seen)
}

#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<PeerName>>>);

#[tonic::async_trait]
impl TraceService for Seen {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0.lock().expect("no panic").push(peer_of_request(&request)?);
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Calls a gRPC service and tells whom it saw.
async fn grpc(server: &Identity, client: &Identity, wanted: Role) -> Result<PeerName, String> {
    let group = TaskGroup::new("test");
    let listener = tokio::net::TcpListener::bind(loopback()).await.expect("bound");
    let address = listener.local_addr().expect("bound");
    let seen = Seen::default();
    let router = Server::builder()
        .tls_config(server.tonic_server_tls())
        .expect("server")
        .add_service(TraceServiceServer::new(seen.clone()));
    let token = group.token();
    group.spawn("server", async move {
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let stop = token.cancelled_owned();
        router.serve_with_incoming_shutdown(incoming, stop).await.expect("served");
    });
    let called = async {
        let channel = Channel::from_shared(format!("https://{address}"))
            .expect("well formed")
            .tls_config(client.tonic_client_tls(wanted))
            .expect("client")
            .connect()
            .await
            .map_err(|error| format!("{error:?}"))?;
        TraceServiceClient::new(channel)
            .export(ExportTraceServiceRequest::default())
            .await
            .map_err(|error| format!("{error:?}"))
    };
    let called = tokio::time::timeout(DEADLINE, called).await.expect("a call ends");
    assert!(group.shutdown(DEADLINE).await.is_clean());
    called?;
    let mut seen = seen.0.lock().expect("no panic");
    Ok(seen.pop().expect("the server saw the call"))
}

#[tokio::test]
async fn members_of_one_fabric_see_each_others_names() {
    let fabric = Fabric::new("fab-1");
    let storage = fabric.member(Role::Storage, "s-1");
    let node = fabric.member(Role::Node, KOREAN);
    let (server_seen, client_seen) = quic(&storage, &node, Role::Storage).await.expect("QUIC");
    assert_eq!(server_seen, *storage.peer());
    assert_eq!(client_seen, *node.peer());
    assert_eq!(client_seen.name, KOREAN);
    assert_eq!(client_seen.fabric, "fab-1");
    let seen = grpc(&storage, &node, Role::Storage).await.expect("gRPC");
    assert_eq!(seen, *node.peer());
}

#[tokio::test]
async fn a_member_of_another_fabric_does_not_accept_our_server() {
    let ours = Fabric::new("ours");
    let theirs = Fabric::new("theirs");
    let storage = ours.member(Role::Storage, "s-1");
    let stranger = theirs.member(Role::Node, "n-1");
    quic(&storage, &stranger, Role::Storage).await.expect_err("QUIC");
    let error = grpc(&storage, &stranger, Role::Storage).await.expect_err("gRPC");
    assert!(error.contains("UnknownIssuer") || error.contains("BadSignature"), "{error}");
}

#[tokio::test]
async fn a_server_of_another_role_is_refused_by_the_client() {
    let fabric = Fabric::new("f");
    let storage = fabric.member(Role::Storage, "s-1");
    let node = fabric.member(Role::Node, "n-1");
    let error = quic(&storage, &node, Role::Coordinator).await.expect_err("QUIC");
    assert!(!error.is_empty());
    let error = grpc(&storage, &node, Role::Coordinator).await.expect_err("gRPC");
    assert!(error.contains("NotValidForName"), "{error}");
}

/// What a server says to a QUIC client that trusts it but shows these credentials.
async fn answer_to(
    fabric: &Fabric,
    shown: Option<&IssuedIdentity>,
) -> Result<(), quinn::ConnectionError> {
    let storage = fabric.member(Role::Storage, "s-1");
    let config = storage.quinn_server(ALPN, transport()).expect("server");
    let listening = quinn::Endpoint::server(config, loopback()).expect("bound");
    let mut roots = rustls::RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(fabric.ca.cert_pem().as_bytes()).expect("PEM");
    roots.add(ca).expect("a certificate");
    let builder = rustls::ClientConfig::builder().with_root_certificates(roots);
    let mut client = match shown {
        Some(issued) => {
            let cert = CertificateDer::from_pem_slice(issued.cert_pem.as_bytes()).expect("PEM");
            let key = PrivateKeyDer::from_pem_slice(issued.key_pem.expose()).expect("PEM");
            builder.with_client_auth_cert(vec![cert], key).expect("a pair")
        }
        None => builder.with_no_client_auth(),
    };
    client.alpn_protocols = vec![ALPN[0].to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(client).expect("TLS 1.3");
    let mut dialing = quinn::Endpoint::client(loopback()).expect("bound");
    dialing.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    let address = listening.local_addr().expect("bound");
    let connecting = dialing.connect(address, &Role::Storage.server_name()).expect("well formed");
    let accept = async { listening.accept().await.expect("open").await.map(drop) };
    let both = async { tokio::join!(accept, connecting) };
    let (accepted, _) = tokio::time::timeout(DEADLINE, both).await.expect("a handshake ends");
    accepted
}

#[tokio::test]
async fn a_server_refuses_strangers_and_those_whose_time_is_over() {
    let fabric = Fabric::new("f");
    let theirs = FabricCa::create("f").expect("a fabric of the same id");
    let now = SystemTime::now();
    let good = fabric.ca.issue(Role::Node, "n-1", DAY).expect("issued");
    let stranger = theirs.issue(Role::Node, "n-1", DAY).expect("issued");
    let expired = fabric.ca.issue_between(Role::Node, "n-1", now - 2 * DAY, now - DAY);
    answer_to(&fabric, Some(&good)).await.expect("a member");
    answer_to(&fabric, None).await.expect_err("no certificate");
    answer_to(&fabric, Some(&stranger)).await.expect_err("another authority");
    answer_to(&fabric, Some(&expired.expect("issued"))).await.expect_err("expired");
}

#[test]
fn tls_1_2_is_not_offered() {
    let fabric = Fabric::new("f");
    let node = fabric.member(Role::Node, "n-1");
    let provider = rustls::crypto::CryptoProvider::get_default().expect("installed by load");
    assert!(
        provider
            .cipher_suites
            .iter()
            .all(|suite| suite.version().version == rustls::ProtocolVersion::TLSv1_3),
        "tonic takes its suites from the default provider"
    );
    let config = node.rustls_server(ALPN).expect("server");
    assert!(config.crypto_provider().cipher_suites.iter().all(|suite| suite.tls13().is_some()));
}

fn load_error(dir: &Path) -> (IdentityError, String) {
    let error = Identity::load(dir).expect_err("refused");
    let text = error.to_string();
    (error, text)
}

#[test]
fn an_expired_or_future_certificate_is_a_sentence_with_its_date() {
    let fabric = Fabric::new("f");
    let now = SystemTime::now();
    let dir = fabric.dir.path().join("old");
    let issued = fabric.ca.issue_between(Role::Node, KOREAN, now - 20 * DAY, now - 10 * DAY);
    issued.expect("issued").save(&dir).expect("saved");
    let (error, text) = load_error(&dir);
    assert!(matches!(error, IdentityError::Expired { .. }), "{text}");
    assert!(text.contains("of node/호스트-서울 1 expired on 20"), "{text}");
    assert!(text.contains("issue a new identity"), "{text}");

    let issued = fabric.ca.issue_between(Role::Node, "n", now + 10 * DAY, now + 20 * DAY);
    issued.expect("issued").save(&dir).expect("saved");
    let (error, text) = load_error(&dir);
    assert!(matches!(error, IdentityError::NotYetValid { .. }), "{text}");
}

#[test]
fn a_foreign_authority_a_foreign_key_and_a_missing_file_are_told_apart() {
    let ours = Fabric::new("ours");
    let theirs = Fabric::new("theirs");
    let dir = ours.member_dir(Role::Storage, "s-1");
    let other = ours.member_dir(Role::Storage, "s-2");
    Identity::load(&dir).expect("good");

    std::fs::write(dir.join("ca.pem"), theirs.ca.cert_pem()).expect("written");
    let (error, text) = load_error(&dir);
    assert!(matches!(error, IdentityError::OtherFabric { .. }), "{text}");
    assert!(text.contains("fabric ours") && text.contains("fabric theirs"), "{text}");
    std::fs::write(dir.join("ca.pem"), ours.ca.cert_pem()).expect("written");

    let key = std::fs::read(dir.join("key.pem")).expect("there");
    std::fs::copy(other.join("key.pem"), dir.join("key.pem")).expect("copied");
    let (error, text) = load_error(&dir);
    assert!(matches!(error, IdentityError::KeyMismatch { .. }), "{text}");
    std::fs::write(dir.join("key.pem"), &key).expect("written");
    Identity::load(&dir).expect("good again");

    std::fs::write(dir.join("cert.pem"), b"hello").expect("written");
    let (error, text) = load_error(&dir);
    assert!(matches!(error, IdentityError::Unreadable { .. }), "{text}");

    std::fs::remove_file(dir.join("cert.pem")).expect("removed");
    let (error, text) = load_error(&dir);
    assert!(matches!(error, IdentityError::Missing { .. }), "{text}");
    assert!(text.contains("cert.pem is missing"), "{text}");
}

/// Same name, same fabric id, other authority: the name alone must not be enough.
#[test]
fn a_second_authority_of_the_same_name_is_another_fabric() {
    let (one, two) = (Fabric::new("twin"), Fabric::new("twin"));
    let dir = one.member_dir(Role::Node, "n-1");
    std::fs::write(dir.join("ca.pem"), two.ca.cert_pem()).expect("written");
    assert!(matches!(load_error(&dir).0, IdentityError::OtherFabric { .. }));
}

#[cfg(unix)]
#[test]
fn a_key_that_others_can_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let fabric = Fabric::new("f");
    let dir = fabric.member_dir(Role::Node, "n-1");
    let key = dir.join("key.pem");
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o644)).expect("changed");
    let (error, text) = load_error(&dir);
    assert!(matches!(error, IdentityError::TooOpen { mode: 0o644, .. }), "{text}");
    assert!(text.contains("chmod 600"), "{text}");
}

#[test]
fn an_authority_survives_saving_and_issues_as_before() {
    let fabric = Fabric::new("fab 하나");
    let dir = fabric.dir.path().join("ca");
    fabric.ca.save(&dir).expect("saved");
    let loaded = FabricCa::load(&dir).expect("loaded");
    assert_eq!(loaded.fabric(), "fab 하나");
    let member = fabric.dir.path().join("member");
    let issued = loaded.issue(Role::Operator, "kim", DAY).expect("issued");
    issued.save(&member).expect("saved");
    std::fs::write(member.join("ca.pem"), fabric.ca.cert_pem()).expect("written");
    let identity = Identity::load(&member).expect("the same authority");
    let signature = identity.signing_key().sign(b"message");
    assert!(sign::verify(&identity.signing_key().public_key(), b"message", &signature));
    assert!(loaded.issue(Role::Node, "", DAY).is_err());
    assert!(loaded.issue(Role::Node, "a\nb", DAY).is_err());
}
