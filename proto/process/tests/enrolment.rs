//! What the enrolment authority may make, and what it may not, with real handshakes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use outrider_process::identity::ca::FabricCa;
use outrider_process::identity::enrolment::{
    OwnKeys, SealedEnrolment, SigningRequest, key_id_of, save_certificate,
};
use outrider_process::identity::joining::{PinError, joining_client};
use outrider_process::identity::token::{JoinToken, token_key_of};
use outrider_process::identity::{Identity, IdentityError, PeerError, Role, peer_of};
use outrider_process::secret::kek::KeyEncryptionKey;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const DAY: Duration = Duration::from_secs(24 * 3600);
const FABRIC: &str = "fab-1";

struct Fabric {
    ca: FabricCa,
    kek: KeyEncryptionKey,
    sealed: SealedEnrolment,
    dir: tempfile::TempDir,
}

impl Fabric {
    fn new() -> Self {
        let ca = FabricCa::create(FABRIC).expect("an authority");
        let kek = KeyEncryptionKey::generate();
        let sealed = ca.enrolment(&kek).expect("an enrolment authority");
        Self { ca, kek, sealed, dir: tempfile::tempdir().expect("a folder") }
    }

    fn issued(&self, role: Role, name: &str) -> Identity {
        let dir = self.dir.path().join(format!("{role}-{name}"));
        self.ca.issue(role, name, DAY).expect("issued").save(&dir).expect("saved");
        Identity::load(&dir).expect("loads")
    }

    /// A machine that made its own keys and had them signed, as `role`.
    fn enrolled(&self, role: Role, name: &str) -> PathBuf {
        let dir = self.dir.path().join(format!("enrolled-{role}-{name}"));
        let request = OwnKeys::load_or_make(&dir).expect("made").request().expect("a request");
        let request = SigningRequest::parse(&request).expect("a request");
        let authority = self.sealed.open(FABRIC, &self.kek).expect("opens");
        let chain = authority
            .sign(&request, role, name, SystemTime::now(), DAY)
            .expect("the authority itself signs anything");
        save_certificate(&dir, self.ca.cert_pem(), &chain).expect("saved");
        dir
    }
}

/// A handshake of a client with a server, over a connection in memory; both ends' errors.
async fn handshake(
    server: Arc<rustls::ServerConfig>,
    client: Arc<rustls::ClientConfig>,
    name: &str,
) -> (Result<Vec<CertificateDer<'static>>, std::io::Error>, Result<(), std::io::Error>) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let accept = async {
        let mut stream = TlsAcceptor::from(server).accept(near).await?;
        stream.write_all(b"hello").await?;
        stream.flush().await?;
        Ok(stream.get_ref().1.peer_certificates().map(<[_]>::to_vec).unwrap_or_default())
    };
    let name = ServerName::try_from(name.to_owned()).expect("a DNS name");
    let connect = async {
        let mut stream = TlsConnector::from(client).connect(name, far).await?;
        // TLS 1.3: what the server thinks of our certificate comes with the first bytes.
        let mut hello = [0; 5];
        stream.read_exact(&mut hello).await.map(drop)
    };
    tokio::join!(accept, connect)
}

#[tokio::test]
async fn an_enrolled_machine_is_a_member_like_an_issued_one() {
    let fabric = Fabric::new();
    let coordinator = fabric.issued(Role::Coordinator, "c1");
    let node = Identity::load(&fabric.enrolled(Role::Node, "호스트 1")).expect("loads");
    let (seen, told) = handshake(
        coordinator.rustls_server(&[]).expect("server"),
        node.rustls_client(&[]).expect("client"),
        &Role::Coordinator.server_name(),
    )
    .await;
    told.expect("accepted");
    let seen = seen.expect("accepted");
    assert_eq!(peer_of(&seen).expect("named").to_string(), "node/호스트 1");
    let request = OwnKeys::load(node.dir()).expect("there").request().expect("a request");
    let request = SigningRequest::parse(&request).expect("a request");
    assert_eq!(key_id_of(&seen[0]), Some(request.key_id()), "one key, told in two ways");

    // As a server, too.
    let storage = Identity::load(&fabric.enrolled(Role::Storage, "s1")).expect("loads");
    let (_, told) = handshake(
        storage.rustls_server(&[]).expect("server"),
        node.rustls_client(&[]).expect("client"),
        &Role::Storage.server_name(),
    )
    .await;
    told.expect("accepted");
}

#[tokio::test]
async fn the_enrolment_authority_cannot_make_coordinators_or_operators() {
    let fabric = Fabric::new();
    for role in [Role::Coordinator, Role::Operator] {
        let error = Identity::load(&fabric.enrolled(role, "evil")).expect_err("no member");
        assert!(matches!(error, IdentityError::OtherFabric { .. }), "{error}");
    }
    // Whoever stole the key does not ask our code whether the certificate is good: the other side must refuse it.
    let coordinator = fabric.issued(Role::Coordinator, "c1");
    let dir = fabric.enrolled(Role::Operator, "evil");
    let chain: Vec<_> = CertificateDer::pem_file_iter(dir.join("cert.pem"))
        .expect("PEM")
        .collect::<Result<_, _>>()
        .expect("PEM");
    let key = PrivateKeyDer::from_pem_file(dir.join("key.pem")).expect("PEM");
    let mut roots = rustls::RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(fabric.ca.cert_pem().as_bytes()).expect("PEM");
    roots.add(ca).expect("a certificate");
    let client = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .expect("a pair");
    let (seen, told) = handshake(
        coordinator.rustls_server(&[]).expect("server"),
        Arc::new(client),
        &Role::Coordinator.server_name(),
    )
    .await;
    let error = seen.expect_err("refused").to_string();
    assert!(error.contains("NameConstraintViolation") || error.contains("certificate"), "{error}");
    told.expect_err("refused");
}

/// URI names are not limited by the authority's constraints, DNS names are: a certificate in which they disagree names
/// nobody.
#[test]
fn a_role_that_its_dns_name_does_not_tell_is_nobody() {
    let fabric = Fabric::new();
    let aad = format!("enrolment key of fabric {FABRIC}");
    let stolen = fabric.kek.unwrap("it", aad.as_bytes(), &fabric.sealed.key).expect("opens");
    let stolen = KeyPair::try_from(stolen.expose()).expect("a key");
    let issuer = Issuer::from_ca_cert_pem(&fabric.sealed.cert_pem, &stolen).expect("an issuer");
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![
        SanType::URI("outrider://fab-1/operator/evil".try_into().expect("ASCII")),
        SanType::DnsName("node.outrider.internal".try_into().expect("ASCII")),
    ];
    let key = KeyPair::generate().expect("a key");
    let cert = params.signed_by(&key, &issuer).expect("signed");
    let error = peer_of(std::slice::from_ref(cert.der())).expect_err("nobody");
    assert!(matches!(error, PeerError::Role { .. }), "{error}");
}

#[tokio::test]
async fn who_joins_proves_the_token_and_believes_its_own_fabric_only() {
    let fabric = Fabric::new();
    let coordinator = fabric.issued(Role::Coordinator, "c1");
    let token_for = |authority: &CertificateDer<'_>| {
        JoinToken::new(FABRIC.into(), Role::Node, None, authority, 0, vec!["x:1".into()])
    };
    let token = token_for(coordinator.authority());
    let (config, pinned) = joining_client(&token, &[]).expect("client");
    let server = || coordinator.joining_server(&[]).expect("server");
    let (seen, told) = handshake(server(), config, "join.outrider.internal").await;
    told.expect("accepted");
    let proven = seen.expect("accepted").first().and_then(token_key_of);
    assert_eq!(proven, Some(token.public_key()));
    assert_eq!(pinned.authority(), Some(coordinator.authority()));

    // A token of another fabric.
    let other = Fabric::new().issued(Role::Coordinator, "c1");
    let (config, pinned) = joining_client(&token_for(other.authority()), &[]).expect("client");
    let (_, told) = handshake(server(), config, "join.outrider.internal").await;
    let error = told.expect_err("refused");
    assert!(error.to_string().contains(&PinError::OtherAuthority.to_string()), "{error}");
    assert_eq!(pinned.authority(), None);

    // A member of the fabric that poses as a coordinator.
    let storage = fabric.issued(Role::Storage, "s1");
    let (config, _) = joining_client(&token, &[]).expect("client");
    let posing = storage.joining_server(&[]).expect("server");
    let (_, told) = handshake(posing, config, "join.outrider.internal").await;
    told.expect_err("refused");

    // The other door is not opened by a token.
    let (config, _) = joining_client(&token, &[]).expect("client");
    let members = coordinator.rustls_server(&[]).expect("server");
    let (seen, _) = handshake(members, config, "coordinator.outrider.internal").await;
    seen.expect_err("refused");
    // And the joining door is not for members: a fabric's certificate is no token.
    let node = fabric.issued(Role::Node, "n1");
    let client = node.rustls_client(&[]).expect("client");
    let (seen, _) = handshake(server(), client, "coordinator.outrider.internal").await;
    seen.expect_err("refused");
}

#[tokio::test]
async fn a_renewed_certificate_is_shown_in_the_next_handshake() {
    let fabric = Fabric::new();
    let coordinator = fabric.issued(Role::Coordinator, "c1");
    let dir = fabric.enrolled(Role::Node, "n1");
    let node = Identity::load(&dir).expect("loads");
    let client = node.rustls_client(&[]).expect("client");
    let shown = async || {
        let server = coordinator.rustls_server(&[]).expect("server");
        let name = Role::Coordinator.server_name();
        let (seen, told) = handshake(server, client.clone(), &name).await;
        told.expect("accepted");
        seen.expect("accepted")[0].clone()
    };
    let before = shown().await;
    fabric.enrolled(Role::Node, "n1");
    assert_eq!(shown().await, before, "the files alone change nothing");
    node.reload().expect("the same member");
    let after = shown().await;
    assert_ne!(after, before);
    assert_eq!(key_id_of(&after), key_id_of(&before), "the key stays");

    // Somebody else's certificate is not taken up.
    let other = fabric.enrolled(Role::Node, "n2");
    for file in ["cert.pem", "key.pem"] {
        std::fs::copy(other.join(file), dir.join(file)).expect("copied");
    }
    let error = node.reload().expect_err("another member");
    assert!(matches!(error, IdentityError::Changed { .. }), "{error}");
    assert_eq!(shown().await, after);
}

#[test]
fn an_enrolment_authority_opens_with_its_own_key_and_in_its_own_fabric_only() {
    let fabric = Fabric::new();
    let dir = fabric.dir.path().join("c1");
    assert!(SealedEnrolment::load(&dir).expect("nothing there").is_none());
    fabric.sealed.save(&dir).expect("saved");
    let loaded = SealedEnrolment::load(&dir).expect("readable").expect("there");
    assert_eq!(loaded, fabric.sealed);
    loaded.open(FABRIC, &fabric.kek).expect("opens");
    loaded.open(FABRIC, &KeyEncryptionKey::generate()).expect_err("another key");
    loaded.open("fab-2", &fabric.kek).expect_err("another fabric");
    std::fs::remove_file(dir.join("enrol.key")).expect("removed");
    SealedEnrolment::load(&dir).expect_err("half of it");
}

#[test]
fn what_is_no_request_is_refused() {
    for bytes in [&b""[..], b"hello", &[0x30; 9000]] {
        SigningRequest::parse(bytes).expect_err("no request");
    }
    // A request for a key that the sender does not have.
    let dir = tempfile::tempdir().expect("a folder");
    let mut request = OwnKeys::load_or_make(dir.path()).expect("made").request().expect("made");
    let last = request.len() - 1;
    request[last] ^= 1;
    SigningRequest::parse(&request).expect_err("not signed by its key");
}
