//! Prometheus metrics of a process: its own registry, filled at the start and served by
//! [`crate::observability`].
//!
//! Names are `outrider_<crate>_<what>_<unit>`; each crate defines its own in its `metrics.rs`, in
//! the sub-registry that [`Metrics::of`] gives. What is true of any process has the names that
//! every Prometheus client uses (`process_*`).

mod process;

use std::collections::HashSet;

use prometheus_client::encoding::text;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// The metrics of one process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
}

impl Metrics {
    /// A registry with the process metrics and `outrider_build_info`.
    pub fn new(role: &str, name: &str) -> Self {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(process::ProcessCollector));
        let build = vec![
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("role", role.to_owned()),
            ("name", name.to_owned()),
        ];
        // A gauge, not OpenMetrics' info type, which tools that read the older text do not know.
        let info = Family::<Vec<(&'static str, String)>, Gauge>::default();
        info.get_or_create(&build).set(1);
        registry.sub_registry_with_prefix("outrider").register(
            "build_info",
            "Release, role and name of this process; always 1",
            info,
        );
        Self { registry }
    }

    /// The registry of one crate: names in it begin with `outrider_<part>_`.
    pub fn of(&mut self, part: &str) -> &mut Registry {
        self.registry.sub_registry_with_prefix("outrider").sub_registry_with_prefix(part)
    }

    /// The OpenMetrics text of this moment.
    pub fn render(&self) -> String {
        let mut text = String::new();
        text::encode(&mut text, &self.registry).expect("writing to a String cannot fail");
        text
    }

    /// The same in Prometheus' older text format (0.0.4), for readers that do not ask for OpenMetrics: there a counter's
    /// description bears the name of its sample, and there are neither units nor an end mark.
    pub fn render_classic(&self) -> String {
        let open = self.render();
        let mut counters: HashSet<&str> = HashSet::new();
        for line in open.lines() {
            if let Some(counter) =
                line.strip_prefix("# TYPE ").and_then(|l| l.strip_suffix(" counter"))
            {
                counters.insert(counter);
            }
        }
        let mut classic = String::with_capacity(open.len());
        for line in open.lines() {
            let described = ["# HELP ", "# TYPE "].into_iter().find_map(|mark| {
                let (name, rest) = line.strip_prefix(mark)?.split_once(' ')?;
                Some((mark, name, rest))
            });
            match described {
                Some((mark, name, rest)) if counters.contains(name) => {
                    classic.extend([mark, name, "_total ", rest, "\n"]);
                }
                None if line.starts_with("# ") => {}
                _ => classic.extend([line, "\n"]),
            }
        }
        classic
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    #[test]
    fn names_are_prefixed_and_the_text_ends_as_openmetrics_wants() {
        let mut metrics = Metrics::new("storage", "s-1");
        let puts = Counter::<u64>::default();
        metrics.of("storage").register("puts", "Chunks put", puts.clone());
        puts.inc_by(3);
        let text = metrics.render();
        assert!(text.contains("outrider_storage_puts_total 3"), "{text}");
        assert!(text.contains("outrider_build_info{version="), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");

        let classic = metrics.render_classic();
        assert!(classic.contains("# TYPE outrider_storage_puts_total counter\n"), "{classic}");
        assert!(classic.contains("# HELP outrider_storage_puts_total Chunks put"), "{classic}");
        assert!(classic.contains("\noutrider_storage_puts_total 3\n"), "{classic}");
        assert!(!classic.contains("# EOF") && !classic.contains("# UNIT"), "{classic}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_process_tells_its_memory_files_time_and_start() {
        let text = Metrics::new("node", "n").render();
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
            let line = line.unwrap_or_else(|| panic!("{name} in {text}"));
            line.rsplit(' ').next().and_then(|v| v.parse().ok()).expect("a number")
        };
        assert!(value("process_resident_memory_bytes") > 1e6);
        assert!(value("process_open_fds") >= 3.0);
        assert!(value("process_cpu_seconds_total") >= 0.0);
        assert!(value("process_start_time_seconds") > 1.6e9);
    }
}
