//! The Helm chart, rendered by helm: its objects are valid, and its command lines run with its
//! configuration files as processes of this machine.
//!
//! helm and kubernetes-validate come from `.ci/tools chart`. Where they cannot be had the tests say
//! so and pass, except in `.ci/run` (OUTRIDER_CI), where they must be there.

use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outrider_process::identity::Role;
use outrider_process::identity::ca::FabricCa;
use outrider_process::secret::kek::KeyEncryptionKey;
use outrider_tests::binary::outrider;
use serde_json::Value;

const FABRIC: &str = "0191e7a0-0000-4000-8000-000000000001";
const RELEASE: &str = "fab";
const DAY: Duration = Duration::from_secs(24 * 3600);
/// A process that is not ready by then is stuck, not slow.
const DEADLINE: Duration = Duration::from_secs(60);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Where `.ci/tools chart` puts its programs; `None` when they cannot be had.
fn tools() -> Option<PathBuf> {
    let made = Command::new(root().join(".ci/tools")).arg("chart").stderr(Stdio::null()).status();
    let cache = std::env::var_os("OUTRIDER_TOOLS").map(PathBuf::from).or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        cache.or_else(home).map(|cache| cache.join("outrider-tools"))
    });
    let tools = cache.filter(|tools| {
        made.is_ok_and(|status| status.success()) && tools.join("bin/helm").exists()
    });
    if tools.is_none() {
        assert!(std::env::var_os("OUTRIDER_CI").is_none(), ".ci/tools chart failed");
        eprintln!("SKIPPED: helm cannot be had here; run .ci/tools chart on a machine with npm");
    }
    tools
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// The chart's objects for a file of values and further settings.
fn render(tools: &Path, values: &Path, set: &[&str]) -> (String, Vec<Value>) {
    let mut helm = Command::new(tools.join("bin/helm"));
    helm.arg("template").arg(RELEASE).arg(root().join("charts/outrider"));
    helm.args(["--namespace", "backup", "-f"]).arg(values);
    for setting in set {
        helm.args(["--set", setting]);
    }
    let yaml = output(&mut helm);
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("rendered.yaml");
    std::fs::write(&file, &yaml).expect("written");
    let program = "import json, sys, yaml; \
                   print(json.dumps([d for d in yaml.safe_load_all(open(sys.argv[1])) if d]))";
    let json = output(Command::new(tools.join("venv/bin/python")).args(["-c", program]).arg(&file));
    (yaml, serde_json::from_str(&json).expect("JSON"))
}

fn object<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    objects
        .iter()
        .find(|object| object["kind"] == kind && object["metadata"]["name"] == name)
        .unwrap_or_else(|| panic!("no {kind} {name}"))
}

#[test]
fn every_object_is_valid_kubernetes_for_every_way_to_expose() {
    let Some(tools) = tools() else { return };
    let folder = root().join("charts/outrider/ci");
    let dir = tempfile::tempdir().expect("a directory");
    let mut checked = 0;
    for entry in std::fs::read_dir(folder).expect("readable") {
        let values = entry.expect("readable").path();
        let (yaml, _) = render(&tools, &values, &[]);
        // Objects of the Prometheus operator have no schema among those of Kubernetes.
        let core: Vec<&str> =
            yaml.split("\n---").filter(|part| !part.contains("monitoring.coreos.com")).collect();
        let file = dir.path().join("core.yaml");
        std::fs::write(&file, core.join("\n---")).expect("written");
        output(
            Command::new(tools.join("venv/bin/kubernetes-validate"))
                .args(["--strict", "--quiet"])
                .arg(&file),
        );
        checked += 1;
    }
    assert!(checked >= 5, "a file of values for each way to expose");
}

#[test]
fn each_storage_pod_has_an_address_of_its_own_outside_the_cluster() {
    let Some(tools) = tools() else { return };
    let (_, objects) = render(&tools, &root().join("charts/outrider/ci/nodeport-values.yaml"), &[]);
    let config = object(&objects, "ConfigMap", "fab-outrider-storage");
    for ordinal in 0..5 {
        let pod = format!("fab-outrider-storage-{ordinal}");
        let service = object(&objects, "Service", &pod);
        let selector = &service["spec"]["selector"]["statefulset.kubernetes.io/pod-name"];
        assert_eq!(selector, &Value::from(pod.as_str()));
        let port = &service["spec"]["ports"][0];
        assert_eq!(port["protocol"], "UDP");
        assert_eq!(port["nodePort"], 30811 + ordinal);
        let text = config["data"][format!("{pod}.toml")].as_str().expect("a file a pod");
        let advertised = format!("advertise = [\"k8s.example.com:{}\"]", 30811 + ordinal);
        assert!(text.contains(&advertised), "{text}");
    }
}

/// Kills and joins what it started, also when the test fails.
struct Process(Child, String);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_tcp() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("bound").port()
}

fn free_udp() -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
    socket.local_addr().expect("bound").port()
}

/// A pod moved to this machine: its arguments and its file, with the paths and ports it has here.
struct Pod {
    role: Role,
    name: String,
    args: Vec<String>,
    fabric: u16,
    observability: u16,
}

impl Pod {
    /// Takes its ports; [`Pod::unpack`] makes the rest.
    fn new(role: Role, ordinal: u64) -> Self {
        let fabric = if role == Role::Storage { free_udp() } else { free_tcp() };
        let name = format!("{RELEASE}-outrider-{role}-{ordinal}");
        Self { role, name, args: Vec::new(), fabric, observability: free_tcp() }
    }

    fn set(&self) -> String {
        format!("{RELEASE}-outrider-{}", self.role)
    }

    /// The port that the chart gives the role.
    fn port_inside(&self) -> u16 {
        if self.role == Role::Storage { 9811 } else { 9800 }
    }

    /// Address inside Kubernetes.
    fn inside(&self) -> String {
        let (name, set) = (&self.name, self.set());
        format!("{name}.{set}.backup.svc.cluster.local:{}", self.port_inside())
    }

    /// Writes the pod's volumes under `dir`; `pods` are all that its file may name.
    fn unpack(&mut self, objects: &[Value], dir: &Path, addresses: &[(String, u16)]) {
        let template = &object(objects, "StatefulSet", &self.set())["spec"]["template"]["spec"];
        let container = &template["containers"][0];
        let mounts = container["volumeMounts"].as_array().expect("mounts");
        let mounts: Vec<&str> =
            mounts.iter().filter_map(|mount| mount["mountPath"].as_str()).collect();
        let files = &object(objects, "ConfigMap", &self.set())["data"];
        let text = files[format!("{}.toml", self.name)].as_str().expect("a file for the pod");

        let here = dir.join(&self.name);
        let mut text =
            text.replace("0.0.0.0:9809", &format!("127.0.0.1:{}", self.observability)).replace(
                &format!("0.0.0.0:{}", self.port_inside()),
                &format!("127.0.0.1:{}", self.fabric),
            );
        for (inside, port) in addresses {
            text = text.replace(inside, &format!("127.0.0.1:{port}"));
        }
        for mount in &mounts {
            let path = here.join(mount.trim_start_matches('/'));
            std::fs::create_dir_all(&path).expect("made");
            text = text.replace(mount, &path.display().to_string());
        }
        assert!(!text.contains("svc.cluster.local"), "an address of no pod: {text}");
        let moved = |arg: &Value| {
            let arg = arg.as_str().expect("text").replace("$(OUTRIDER_NAME)", &self.name);
            let mounted = mounts.iter().any(|mount| arg.starts_with(mount));
            if mounted { format!("{}{arg}", here.display()) } else { arg }
        };
        self.args = container["args"].as_array().expect("args").iter().map(moved).collect();
        std::fs::write(self.args.last().expect("--config FILE"), text).expect("written");
    }

    fn volume(&self, dir: &Path, mount: &str) -> PathBuf {
        dir.join(&self.name).join(mount)
    }
}

impl Pod {
    fn start(&self, binary: &Path, log: &Path) -> Process {
        let log = std::fs::File::create(log).expect("a log");
        let child = Command::new(binary)
            .args(&self.args)
            .stdout(log.try_clone().expect("a handle"))
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .expect("started");
        Process(child, self.name.clone())
    }

    /// The body of `/readyz` if it answers 200, else why not.
    fn ready(&self) -> Result<String, String> {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.observability))
            .map_err(|error| error.to_string())?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).map_err(|e| e.to_string())?;
        let request = "GET /readyz HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).map_err(|error| error.to_string())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
        if answer.starts_with("HTTP/1.1 200") { Ok(answer) } else { Err(answer) }
    }
}

#[test]
fn the_rendered_command_lines_become_ready_with_the_rendered_files() {
    let Some(tools) = tools() else { return };
    let binary = outrider();
    let help = output(Command::new(binary).args(["coordinator", "--help"]));
    if !help.contains("--config") {
        eprintln!("SKIPPED: this build of outrider has no coordinator command yet");
        return;
    }
    let values = root().join("charts/outrider/ci/default-values.yaml");
    let set = ["storage.capacity=64 MiB", "storage.segmentSize=16 MiB"];
    let (_, objects) = render(&tools, &values, &set);

    let dir = tempfile::tempdir().expect("a directory");
    let of = |role| (0..3).map(move |ordinal| Pod::new(role, ordinal));
    let mut pods: Vec<Pod> = of(Role::Coordinator).chain(of(Role::Storage)).collect();
    let addresses: Vec<_> = pods.iter().map(|pod| (pod.inside(), pod.fabric)).collect();
    let ca = FabricCa::create(FABRIC).expect("a fabric");
    let kek = KeyEncryptionKey::generate();
    for pod in &mut pods {
        pod.unpack(&objects, dir.path(), &addresses);
        let identity = ca.issue(pod.role, &pod.name, DAY).expect("issued");
        identity.save(&pod.volume(dir.path(), "etc/outrider/identity")).expect("saved");
        if pod.role == Role::Coordinator {
            let file = pod.volume(dir.path(), "etc/outrider/kek").join("kek");
            std::fs::write(file, kek.to_text().expose()).expect("written");
        }
    }

    let log = |pod: &Pod| dir.path().join(format!("{}.log", pod.name));
    let mut processes: Vec<Process> = pods.iter().map(|pod| pod.start(binary, &log(pod))).collect();
    let give_up = Instant::now() + DEADLINE;
    for (pod, process) in pods.iter().zip(&mut processes) {
        while let Err(reason) = pod.ready() {
            let ended = process.0.try_wait().expect("a child");
            if ended.is_some() || Instant::now() > give_up {
                let log = std::fs::read_to_string(log(pod)).unwrap_or_default();
                panic!("{} ({ended:?}) is not ready: {reason}\n{log}", process.1);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Every query of the dashboard, with Grafana's variables filled in.
fn dashboard_queries() -> Vec<String> {
    let path = root().join("charts/outrider/dashboards/outrider.json");
    let text = std::fs::read_to_string(path).expect("the dashboard");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    targets
        .map(|target| {
            let query = target["expr"].as_str().expect("a query");
            query.replace("$__rate_interval", "1m").replace("$role", ".*").replace("$name", ".*")
        })
        .collect()
}

/// A metric that nobody exposes makes an empty panel, which looks like a quiet fabric.
#[test]
fn the_dashboard_asks_only_for_metrics_that_a_process_exposes() {
    let sources = [
        ("coordinator", "coordinator/src/metrics.rs"),
        ("node", "node/src/metrics.rs"),
        ("storage", "storage/src/metrics.rs"),
    ];
    let mut asked = 0;
    for query in dashboard_queries() {
        let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for metric in words.filter(|word| word.starts_with("outrider_")) {
            asked += 1;
            if metric == "outrider_build_info" {
                continue;
            }
            let (part, rest) = metric["outrider_".len()..].split_once('_').expect("a part");
            let name = rest.strip_suffix("_total").unwrap_or(rest);
            let name = name.strip_suffix("_bucket").unwrap_or(name);
            let source = sources.iter().find(|(owner, _)| *owner == part);
            let (_, file) = source.unwrap_or_else(|| panic!("{metric}: no part {part}"));
            let text = std::fs::read_to_string(root().join(file)).expect("the part's metrics");
            assert!(text.contains(&format!("\"{name}\"")), "{metric} is not registered in {file}");
        }
    }
    assert!(asked > 10, "the dashboard lost its queries");
}

#[test]
fn prometheus_understands_every_query_of_the_dashboard() {
    if Command::new("promtool").arg("--version").output().is_err() {
        assert!(std::env::var_os("OUTRIDER_CI").is_none(), "promtool is not installed");
        eprintln!("SKIPPED: promtool is not installed");
        return;
    }
    let rule = |(index, expr): (usize, String)| serde_json::json!({"record": format!("panel:query:{index}"), "expr": expr});
    let rules: Vec<Value> = dashboard_queries().into_iter().enumerate().map(rule).collect();
    let groups = serde_json::json!({"groups": [{"name": "dashboard", "rules": rules}]});
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("rules.yaml");
    std::fs::write(&file, groups.to_string()).expect("written");
    output(Command::new("promtool").args(["check", "rules"]).arg(&file));
}
