//! The port that Prometheus and Kubernetes look at, over real HTTP.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use outrider_process::metrics::Metrics;
use outrider_process::observability::{self, Readiness};
use outrider_process::tasks::TaskGroup;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

async fn get(address: SocketAddr, path: &str) -> (String, String) {
    let mut stream = tokio::net::TcpStream::connect(address).await.expect("connected");
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("answered");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
    (head.to_owned(), body.to_owned())
}

#[tokio::test]
async fn readiness_follows_the_process_and_shutdown_does_not_wait_for_idle_clients() {
    let group = TaskGroup::new("test");
    let (ready, readiness) = watch::channel(Readiness::starting());
    let metrics = Arc::new(Metrics::new("storage", "s-1"));
    let any = "127.0.0.1:0".parse().expect("an address");
    let address = observability::serve(any, metrics, readiness, &group).await.expect("bound");

    let (head, _) = get(address, "/healthz").await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let (head, body) = get(address, "/readyz").await;
    assert!(head.starts_with("HTTP/1.1 503"), "{head}");
    assert_eq!(body, "not ready: starting\n");
    ready.send_replace(Readiness::Ready);
    let (head, _) = get(address, "/readyz").await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let (head, body) = get(address, "/metrics").await;
    assert!(head.contains("application/openmetrics-text"), "{head}");
    assert!(body.contains("outrider_build_info"), "{body}");

    let _idle = tokio::net::TcpStream::connect(address).await.expect("connected");
    assert!(group.shutdown(Duration::from_secs(20)).await.is_clean());
}

#[tokio::test]
async fn a_taken_port_names_the_setting() {
    let group = TaskGroup::new("test");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = taken.local_addr().expect("bound");
    let (_ready, readiness) = watch::channel(Readiness::starting());
    let metrics = Arc::new(Metrics::new("storage", "s-1"));
    let error = observability::serve(address, metrics, readiness, &group).await;
    let text = error.expect_err("taken").to_string();
    assert!(text.contains("set observability"), "{text}");
}
