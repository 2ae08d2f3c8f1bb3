//! The configuration that an installation writes. It is written once; from then on it is the operator's.

use std::fmt::Write as _;
use std::net::SocketAddr;

use super::places::Places;

/// What an installation knows of a host.
#[derive(Debug, Clone)]
pub(crate) struct Host<'a> {
    pub(crate) name: &'a str,
    pub(crate) fabric: &'a str,
    pub(crate) realm: &'a str,
    pub(crate) coordinators: &'a [String],
    pub(crate) hypervisor: &'a str,
    pub(crate) metrics: Option<SocketAddr>,
    /// Settings of the operator's own, as TOML.
    pub(crate) more: &'a str,
}

/// The text of `node.toml`.
pub(crate) fn text(places: &Places, host: &Host<'_>) -> String {
    let path = |path: &std::path::Path| quoted(&path.display().to_string());
    let coordinators: Vec<_> = host.coordinators.iter().map(|c| quoted(c)).collect();
    let mut out = String::from(
        "# Written by `outrider node install`, and never overwritten by it: change what you like, then start the service again.\n",
    );
    let _ = writeln!(out, "name = {}", quoted(host.name));
    let _ = writeln!(out, "fabric = {}", quoted(host.fabric));
    let _ = writeln!(
        out,
        "# The failover cluster that this host belongs to, or its own name.\nrealm = {}",
        quoted(host.realm)
    );
    let _ = writeln!(out, "coordinators = [{}]", coordinators.join(", "));
    let _ = writeln!(out, "hypervisor = {}", quoted(host.hypervisor));
    let _ = writeln!(out, "identity_dir = {}", path(&places.identity));
    let _ = writeln!(out, "scratch_dir = {}", path(&places.scratch));
    let _ = writeln!(out, "status_file = {}", path(&places.status));
    if let Some(metrics) = host.metrics {
        let _ = writeln!(out, "observability = {}", quoted(&metrics.to_string()));
    }
    // Tables come after all plain keys.
    let own_log = host.more.lines().any(|line| line.trim_start().starts_with("[log]"));
    let (keys, tables) = split(host.more);
    out.push_str(keys);
    if let Some(log) = places.log.as_ref().filter(|_| !own_log) {
        let _ = writeln!(out, "\n[log]\nfile = {}", path(log));
    }
    out.push_str(tables);
    out
}

/// Plain keys and tables of a TOML text.
fn split(more: &str) -> (&str, &str) {
    let at = more
        .split_inclusive('\n')
        .scan(0, |offset, line| {
            let begin = *offset;
            *offset += line.len();
            Some((begin, line))
        })
        .find(|(_, line)| line.trim_start().starts_with('['))
        .map_or(more.len(), |(begin, _)| begin);
    more.split_at(at)
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        for places in [
            Places::linux(Path::new("/")),
            Places::windows(Path::new(r"C:\Program Files"), Path::new(r"C:\ProgramData")),
        ] {
            let coordinators = ["10.0.0.1:9801".to_owned(), "[fd00::1]:9801".to_owned()];
            let host = Host {
                name: "호스트 \"1\"",
                fabric: "0191f2f4-0000-7000-8000-000000000000",
                realm: "cluster\\1",
                coordinators: &coordinators,
                hypervisor: "lab",
                metrics: Some("[::]:9803".parse().expect("an address")),
                more: "# mine\n[limits]\nread_size = \"1 MiB\"\n[lab]\naddress = \"127.0.0.1:1\"\n",
            };
            let text = text(&places, &host);
            let read = outrider_process::config::parse::<outrider_node::Config>(
                Path::new("node.toml"),
                &text,
                |_| None,
            );
            let config = read.unwrap_or_else(|e| panic!("{e}\n{text}"));
            assert_eq!(config.name, host.name);
            assert_eq!(config.realm, host.realm);
            assert_eq!(config.identity_dir, places.identity);
            assert_eq!(config.status_file.as_ref(), Some(&places.status));
            assert_eq!(config.limits.read_size.0, 1 << 20);
            assert_eq!(config.log.file, places.log);
        }
    }
}
