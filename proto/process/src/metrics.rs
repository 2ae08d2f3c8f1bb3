//! Prometheus metrics of a process: its own registry, filled at the start and served by
//! [`crate::observability`].
//!
//! Names are `outrider_<crate>_<what>_<unit>`; each crate defines its own in its `metrics.rs`, in
//! the sub-registry that [`Metrics::of`] gives. What is true of any process has the names that
//! every Prometheus client uses (`process_*`).

mod process;

use prometheus_client::encoding::text;
use prometheus_client::metrics::info::Info;
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
        let build = [
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("role", role.to_owned()),
            ("name", name.to_owned()),
        ];
        registry.sub_registry_with_prefix("outrider").register(
            "build",
            "Release, role and name of this process",
            Info::new(build),
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
