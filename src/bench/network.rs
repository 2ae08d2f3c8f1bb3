//! The network stage: sealed records from a client to a server over QUIC with mutual TLS, on the loopback.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outrider_process::identity::Identity;
use outrider_proto::record::Record;

use crate::report::Failure;

/// Streams side by side, as a client's lanes.
const LANES: usize = 4;
/// Flow-control window of the connection.
const WINDOW: u32 = 64 << 20;
const ALPN: &[&[u8]] = &[b"outrider-bench/1"];

/// Sends all records once and waits until the server has them all.
pub(super) async fn quic(
    server: &Identity,
    client: &Identity,
    records: &[Record],
) -> Result<Duration, Failure> {
    let transport = || {
        let mut config = quinn::TransportConfig::default();
        config.receive_window(WINDOW.into()).send_window(WINDOW.into());
        config.stream_receive_window((WINDOW / 4).into());
        Arc::new(config)
    };
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let listening = quinn::Endpoint::server(server.quinn_server(ALPN, transport())?, any)?;
    let address = listening.local_addr()?;
    let receiver = tokio::spawn(async move {
        let connection = match listening.accept().await {
            Some(incoming) => incoming.await.map_err(|e| e.to_string())?,
            None => return Err("the endpoint was closed".to_owned()),
        };
        let mut lanes = tokio::task::JoinSet::new();
        for _ in 0..LANES {
            let (mut answer, mut stream) =
                connection.accept_bi().await.map_err(|e| e.to_string())?;
            lanes.spawn(async move {
                let mut got = 0_u64;
                while let Some(chunk) =
                    stream.read_chunk(1 << 20, true).await.map_err(|e| e.to_string())?
                {
                    got += chunk.bytes.len() as u64;
                }
                answer.write_all(&got.to_le_bytes()).await.map_err(|e| e.to_string())?;
                answer.finish().map_err(|e| e.to_string())
            });
        }
        while let Some(lane) = lanes.join_next().await {
            lane.map_err(|e| e.to_string())??;
        }
        connection.closed().await;
        Ok(())
    });
    let mut calling = quinn::Endpoint::client(any)?;
    calling.set_default_client_config(client.quinn_client(ALPN, transport())?);
    let name = server.peer().role.server_name();
    let connection = calling.connect(address, &name)?.await?;
    let began = Instant::now();
    let lanes = (0..LANES).map(|lane| {
        let connection = connection.clone();
        async move {
            let (mut stream, mut answer) = connection.open_bi().await?;
            let mut sent = 0_u64;
            for record in records.iter().skip(lane).step_by(LANES) {
                stream.write_chunk(record.bytes().clone()).await?;
                sent += record.bytes().len() as u64;
            }
            stream.finish()?;
            let mut got = [0; 8];
            answer.read_exact(&mut got).await?;
            if u64::from_le_bytes(got) == sent {
                Ok(())
            } else {
                Err(Failure::new("the server received fewer bytes than were sent"))
            }
        }
    });
    futures::future::try_join_all(lanes).await?;
    let took = began.elapsed();
    connection.close(0_u32.into(), b"done");
    calling.wait_idle().await;
    receiver.await?.map_err(Failure::new)?;
    Ok(took)
}
