//! One port, two doors. Which one a connection takes is what it asks for in TLS (SNI): members show a certificate of the
//! fabric and reach all services; machines that join prove a token and reach enrolment alone.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use outrider_process::identity::joining::JOIN_SERVER_NAME;
use outrider_process::identity::{Identity, IdentityError};
use outrider_process::tasks::TaskSpawner;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;

/// Whoever connects and says nothing must not hold a handshake open.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at a time. More wait in the listener's backlog: a leader's end makes everybody connect at once.
const HANDSHAKES: usize = 128;
/// Connections that wait for their server to take them.
const WAITING: usize = 16;

/// Connections whose handshake is done.
pub(crate) type Incoming = ReceiverStream<std::io::Result<TlsStream<TcpStream>>>;

/// The two doors.
pub(crate) struct Doors {
    /// Proven members.
    pub(crate) members: Incoming,
    /// Proven holders of tokens.
    pub(crate) joining: Incoming,
}

/// Opens the doors; gives them and the future that serves them until it is dropped.
///
/// # Errors
/// [`IdentityError::Tls`].
pub(crate) fn open(
    listener: TcpListener,
    identity: &Identity,
    tasks: TaskSpawner,
) -> Result<(Doors, impl Future<Output = ()> + use<>), IdentityError> {
    let (members, member_queue) = mpsc::channel(WAITING);
    let (joining, joining_queue) = mpsc::channel(WAITING);
    let member_door = Door { config: identity.rustls_server(&[b"h2"])?, queue: members };
    let joining_door = Door { config: identity.joining_server(&[b"h2"])?, queue: joining };
    let doors = Doors {
        members: ReceiverStream::new(member_queue),
        joining: ReceiverStream::new(joining_queue),
    };
    let serve = async move {
        let room = Arc::new(Semaphore::new(HANDSHAKES));
        loop {
            let Ok(permit) = room.clone().acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of file descriptors, mostly: others close theirs.
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (member, joining) = (member_door.clone(), joining_door.clone());
            let stop = tasks.token();
            tasks.spawn("handshake", async move {
                let _permit = permit;
                let passing = tokio::time::timeout(HANDSHAKE, pass(stream, member, joining));
                let passed = tokio::select! {
                    passed = passing => passed,
                    () = stop.cancelled() => return,
                };
                match passed {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%error, "a connection was refused"),
                    Err(_) => tracing::debug!("a connection did not finish its handshake"),
                }
            });
        }
    };
    Ok((doors, serve))
}

#[derive(Clone)]
struct Door {
    config: Arc<ServerConfig>,
    queue: mpsc::Sender<std::io::Result<TlsStream<TcpStream>>>,
}

async fn pass(stream: TcpStream, members: Door, joining: Door) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let hello = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), stream).await?;
    let joins = hello.client_hello().server_name() == Some(JOIN_SERVER_NAME);
    let door = if joins { joining } else { members };
    let proven = hello.into_stream(door.config).await?;
    // Closed only while the process ends.
    let _ = door.queue.send(Ok(proven)).await;
    Ok(())
}
