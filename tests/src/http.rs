//! The plain-HTTP port of a process: metrics and health.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// The body of a plain HTTP answer, which is a good one.
#[must_use]
pub fn get(address: SocketAddr, path: &str) -> String {
    let (status, body) = ask(address, path);
    assert_eq!(status, 200, "{path} of {address}: {body}");
    body
}

/// Status and body of a plain HTTP answer.
#[must_use]
pub fn ask(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a time");
    let request = format!("GET {path} HTTP/1.1\r\nHost: fabric\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("HTTP");
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|h| h.get(..3)?.parse().ok());
    let status = status.unwrap_or_else(|| panic!("{path} of {address}: {answer}"));
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return (status, body.to_owned());
    }
    let (mut plain, mut rest) = (String::new(), body);
    while let Some((size, more)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).expect("a chunk's size");
        plain.push_str(&more[..size]);
        rest = more[size..].trim_start_matches("\r\n");
        if size == 0 {
            break;
        }
    }
    (status, plain)
}

/// One metric without labels out of the text; `None` when it is not there.
#[must_use]
pub fn metric(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.trim().parse().ok())
}
