//! VMs that are stopped for a moment go on, whatever becomes of who wanted that. By a scripted monitor.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrider_process::tasks::TaskGroup;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::sync::watch;

use super::super::held::Held;
use super::super::machine::Machine;
use super::real::until;
use crate::hypervisor::VmGuid;

#[derive(Debug)]
struct Monitor {
    state: &'static str,
    /// So many are refused.
    conts_refused: usize,
    /// What becomes of the VM while its disks are changed.
    meanwhile: Option<&'static str>,
    told: Vec<String>,
}

/// A VM that is asked through a monitor of ours.
struct Scene {
    _dir: tempfile::TempDir,
    tasks: TaskGroup,
    monitor: Arc<Mutex<Monitor>>,
    /// Disks are changed only when this is true.
    gate: watch::Sender<bool>,
    held: Held,
    machine: Arc<Machine>,
}

impl Scene {
    async fn new(state: &'static str, conts_refused: usize, open: bool) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let (socket, tasks) = (dir.path().join("web.qmp"), TaskGroup::new("test"));
        let monitor = Monitor { state, conts_refused, meanwhile: None, told: Vec::new() };
        let monitor = Arc::new(Mutex::new(monitor));
        let gate = watch::Sender::new(open);
        serve(&socket, monitor.clone(), gate.subscribe());
        let (machine, _) = Machine::open(&socket, &tasks.spawner()).await.expect("opened");
        let held = Held {
            folder: dir.path().join("held"),
            freeze: Duration::from_secs(5),
            patience: Duration::from_secs(5),
            tasks: tasks.spawner(),
        };
        Self { _dir: dir, tasks, monitor, gate, held, machine: Arc::new(machine) }
    }

    fn now<T>(&self, look: impl FnOnce(&mut Monitor) -> T) -> T {
        look(&mut self.monitor.lock().expect("no panic"))
    }

    fn was_told(&self, command: &str) -> usize {
        self.now(|m| m.told.iter().filter(|c| *c == command).count())
    }

    fn recorded(&self) -> usize {
        std::fs::read_dir(&self.held.folder).map_or(0, Iterator::count)
    }

    async fn idle(&self) {
        until("nothing is under way", || async {
            let busy = self.tasks.running().iter().any(|t| t.starts_with("still"));
            (!busy).then_some(())
        })
        .await;
    }
}

fn serve(socket: &Path, monitor: Arc<Mutex<Monitor>>, mut gate: watch::Receiver<bool>) {
    let listener = UnixListener::bind(socket).expect("listens");
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.expect("a client");
        let (read, mut write) = stream.into_split();
        let version = json!({ "qemu": { "major": 7, "minor": 2, "micro": 0 } });
        let mut out = json!({ "QMP": { "version": version, "capabilities": [] } });
        let mut lines = BufReader::new(read).lines();
        while write.write_all(format!("{out}\n").as_bytes()).await.is_ok() {
            let Ok(Some(line)) = lines.next_line().await else { return };
            let asked: Value = serde_json::from_str(&line).expect("JSON");
            let command = asked["execute"].as_str().expect("a command");
            monitor.lock().expect("no panic").told.push(command.to_owned());
            if command == "qom-set" && gate.wait_for(|open| *open).await.is_err() {
                return;
            }
            out = monitor.lock().expect("no panic").answer(command);
            out["id"] = asked["id"].clone();
        }
    });
}

impl Monitor {
    fn answer(&mut self, command: &str) -> Value {
        let fine = |value: Value| json!({ "return": value });
        match command {
            "query-uuid" => fine(json!({ "UUID": VmGuid::random().to_string() })),
            "query-status" => fine(json!({ "status": self.state })),
            "qom-set" => {
                self.state = self.meanwhile.take().unwrap_or(self.state);
                fine(json!({}))
            }
            "cont" if self.conts_refused > 0 => {
                self.conts_refused -= 1;
                json!({ "error": { "class": "GenericError", "desc": "not now" } })
            }
            "stop" | "cont" => {
                self.state = if command == "stop" { "paused" } else { "running" };
                fine(json!({}))
            }
            _ => fine(json!({})),
        }
    }
}

const CHANGE: (&str, Value) = ("qom-set", Value::Null);

#[tokio::test]
async fn a_vm_goes_on_though_the_job_that_stopped_it_is_gone() {
    let scene = Scene::new("running", 0, false).await;
    let (held, machine) = (scene.held.clone(), scene.machine.clone());
    let job = tokio::spawn(async move { held.while_still(&machine, vec![CHANGE]).await });
    until("it is stopped", || async { (scene.was_told("qom-set") == 1).then_some(()) }).await;
    assert_eq!(scene.now(|m| m.state), "paused");
    // The lease was lost, or an operator cancelled it.
    job.abort();
    assert!(job.await.expect_err("aborted").is_cancelled());
    scene.gate.send_replace(true);
    until("it goes on", || async { (scene.now(|m| m.state) == "running").then_some(()) }).await;
    scene.idle().await;
    assert_eq!(scene.recorded(), 0);
}

#[tokio::test]
async fn a_vm_that_cannot_go_on_at_once_is_told_and_tried_again_and_not_taken_for_paused() {
    let scene = Scene::new("running", 2, true).await;
    let failed = scene.held.while_still(&scene.machine, vec![CHANGE]).await.expect_err("told");
    assert!(failed.to_string().contains("not now"), "{failed}");
    let next = scene.held.while_still(&scene.machine, vec![CHANGE]).await.expect_err("not now");
    assert!(next.passes(), "{next}");
    assert_eq!(scene.recorded(), 1, "an agent that dies now leaves word");
    until("it goes on", || async { (scene.now(|m| m.state) == "running").then_some(()) }).await;
    scene.idle().await;
    assert_eq!((scene.was_told("cont"), scene.was_told("stop"), scene.recorded()), (3, 1, 0));
    scene.held.while_still(&scene.machine, vec![CHANGE]).await.expect("as before");
}

#[tokio::test]
async fn a_vm_that_somebody_else_stopped_or_took_away_is_not_let_go_on() {
    let scene = Scene::new("paused", 0, true).await;
    scene.held.while_still(&scene.machine, vec![CHANGE]).await.expect("changed");
    assert_eq!((scene.was_told("stop"), scene.was_told("cont")), (0, 0));

    let scene = Scene::new("running", 0, true).await;
    scene.now(|m| m.meanwhile = Some("postmigrate"));
    scene.held.while_still(&scene.machine, vec![CHANGE]).await.expect("changed");
    scene.idle().await;
    assert_eq!((scene.was_told("stop"), scene.was_told("cont")), (1, 0));
    assert_eq!(scene.recorded(), 0);
}
