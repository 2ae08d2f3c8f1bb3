//! The UDP socket of an endpoint. Where the system refuses the socket options that make QUIC fast (segmentation offload,
//! ECN, don't-fragment), a plain socket serves: slower, but whole.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Endpoint, ServerConfig, TokioRuntime, UdpPoller};

use super::tuning;

/// An endpoint over a bound socket, or over a fresh one of any port. With a server configuration it also accepts.
///
/// # Errors
/// The system's answer when it gives no UDP socket.
pub fn endpoint(bound: Option<UdpSocket>, server: Option<ServerConfig>) -> io::Result<Endpoint> {
    let socket = match bound {
        Some(socket) => socket,
        // Without IPv6 there is still IPv4.
        None => any_v6().or_else(|_| UdpSocket::bind("0.0.0.0:0"))?,
    };
    socket.set_nonblocking(true)?;
    let spare = socket.try_clone()?;
    let runtime = Arc::new(TokioRuntime);
    match Endpoint::new(tuning::endpoint(), server.clone(), socket, runtime.clone()) {
        Ok(endpoint) => Ok(endpoint),
        Err(error) => {
            tracing::warn!(%error, "this system refuses QUIC's socket options; a plain UDP socket is used, which is slower");
            let plain = PlainSocket { io: tokio::net::UdpSocket::from_std(spare)? };
            let plain = Arc::new(plain);
            Endpoint::new_with_abstract_socket(tuning::endpoint(), server, plain, runtime)
        }
    }
}

fn any_v6() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind("[::]:0")?;
    // A system whose IPv6 sockets do not carry IPv4 would reach half of the nodes.
    let probe = UdpSocket::bind("127.0.0.1:0")?;
    let port = probe.local_addr()?.port();
    socket.send_to(&[], ("::ffff:127.0.0.1", port))?;
    Ok(socket)
}

/// One datagram a call, no offload, no ECN.
#[derive(Debug)]
struct PlainSocket {
    io: tokio::net::UdpSocket,
}

impl AsyncUdpSocket for PlainSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable(self))
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.io.try_send_to(transmit.contents, transmit.destination).map(drop)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let (Some(buffer), Some(meta)) = (buffers.first_mut(), meta.first_mut()) else {
            return Poll::Ready(Ok(0));
        };
        let mut buffer = tokio::io::ReadBuf::new(buffer);
        let addr = ready!(self.io.poll_recv_from(cx, &mut buffer))?;
        let len = buffer.filled().len();
        *meta = RecvMeta { addr, len, stride: len, ecn: None, dst_ip: None };
        Poll::Ready(Ok(1))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }
}

struct Writable(Arc<PlainSocket>);

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Writable")
    }
}

impl UdpPoller for Writable {
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.io.poll_send_ready(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_plain_socket_carries_an_endpoint() {
        let std = UdpSocket::bind("127.0.0.1:0").expect("a port");
        std.set_nonblocking(true).expect("settable");
        let plain = PlainSocket { io: tokio::net::UdpSocket::from_std(std).expect("usable") };
        let endpoint = Endpoint::new_with_abstract_socket(
            tuning::endpoint(),
            None,
            Arc::new(plain),
            Arc::new(TokioRuntime),
        );
        assert!(endpoint.expect("made").local_addr().expect("bound").port() > 0);
    }
}
