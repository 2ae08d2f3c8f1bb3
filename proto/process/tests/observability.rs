//! The port that Prometheus and Kubernetes look at, over real HTTP.

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use outrider_process::metrics::Metrics;
use outrider_process::observability::{self, Readiness};
use outrider_process::tasks::TaskGroup;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

/// Kills and joins what it started, also when the test fails.
struct Started(std::process::Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn get(address: SocketAddr, path: &str) -> (String, String) {
    try_get(address, path).await.expect("an answer")
}

async fn try_get(address: SocketAddr, path: &str) -> std::io::Result<(String, String)> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    // Prometheus asks for what it prefers; a path may carry that here: `/metrics application/...`.
    let (path, accept) = path.split_once(' ').unwrap_or((path, "*/*"));
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: test\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    Ok((head.to_owned(), body.to_owned()))
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
    let (head, body) = get(address, "/metrics application/openmetrics-text;version=1.0.0").await;
    assert!(head.contains("application/openmetrics-text"), "{head}");
    assert!(body.contains("outrider_build_info") && body.ends_with("# EOF\n"), "{body}");
    let (head, body) = get(address, "/metrics").await;
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    assert!(body.contains("outrider_build_info") && !body.contains("# EOF"), "{body}");

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

/// A real Prometheus, where one is installed; `.ci/tools` does.
#[tokio::test]
async fn prometheus_takes_what_we_expose() {
    let installed = std::process::Command::new("prometheus")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if installed.is_err() {
        assert!(std::env::var_os("OUTRIDER_CI").is_none(), "prometheus is not installed");
        eprintln!("SKIPPED: prometheus is not installed");
        return;
    }
    let group = TaskGroup::new("test");
    let (_ready, readiness) = watch::channel(Readiness::Ready);
    let metrics = Arc::new(Metrics::new("storage", "s-1"));
    let any: SocketAddr = "127.0.0.1:0".parse().expect("an address");
    let target = observability::serve(any, metrics, readiness, &group).await.expect("bound");

    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("prometheus.yml");
    let text = format!(
        "global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}\n\
         scrape_configs: [{{job_name: outrider, static_configs: [{{targets: ['{target}']}}]}}]\n"
    );
    std::fs::write(&config, text).expect("written");
    let free = std::net::TcpListener::bind(any).expect("bound");
    let address = free.local_addr().expect("bound");
    drop(free);
    let child = std::process::Command::new("prometheus")
        .arg(format!("--config.file={}", config.display()))
        .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
        .arg(format!("--web.listen-address={address}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("started");
    let _prometheus = Started(child);

    for metric in
        ["outrider_build_info", "process_resident_memory_bytes", "process_cpu_seconds_total"]
    {
        let scraped = async {
            loop {
                let path = format!("/api/v1/query?query={metric}");
                if let Ok((_, body)) = try_get(address, &path).await
                    && body.contains(&target.to_string())
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), scraped)
            .await
            .unwrap_or_else(|_| panic!("prometheus never showed {metric}"));
    }
    assert!(group.shutdown(Duration::from_secs(20)).await.is_clean());
}
