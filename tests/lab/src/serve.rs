//! Connections: agents' WMI, agents' files, and the control client, all on one port.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use outrider_wmi::lab::wire::{self, Answer, Ask, Refusal, Reply, Request, Role};
use outrider_wmi::{Object, Value};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::classes;
use crate::cluster::Cluster;
use crate::config::LabConfig;
use crate::control::FaultKind;
use crate::error::LabError;
use crate::host_path::host_path;
use crate::methods::{self, Args, Call};
use crate::model::{Notice, State};
use crate::steer;
use crate::wql::Query;

/// Status of a provider that is not there yet.
const EPT_S_NOT_REGISTERED: u32 = 1753;
/// Status of a subscription that WMI gave up.
const WBEM_E_CALL_CANCELLED: u32 = 0x8004_1032;
/// Calls in flight on one connection; the next one is read when one of them is done.
const IN_FLIGHT: usize = 256;
/// Replies waiting for the socket.
const OUTGOING: usize = 256;
/// How long a connection that ends may take to write its last answers.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Runs the lab until `cancel` (or a control client's shutdown). The bound address is sent through `ready` and written
/// to the configured file as soon as connections are accepted.
///
/// # Errors
/// [`LabError::Listen`], [`LabError::Config`], or folders that cannot be made.
pub async fn run(
    config: LabConfig,
    cancel: CancellationToken,
    ready: Option<oneshot::Sender<SocketAddr>>,
) -> Result<(), LabError> {
    let cancel = cancel.child_token();
    let addr = config.listen;
    let address_file = config.address_file.clone();
    let cluster = Cluster::new(config, cancel.clone())?;
    let listener =
        TcpListener::bind(addr).await.map_err(|source| LabError::Listen { addr, source })?;
    let bound = listener.local_addr().map_err(|source| LabError::Listen { addr, source })?;
    if let Some(file) = address_file {
        write_address(&file, bound)?;
    }
    tracing::info!(%bound, realm = cluster.config.realm, "the lab listens");
    if let Some(ready) = ready {
        // Whoever started us may not care any more.
        let _ = ready.send(bound);
    }
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = cancel.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(cluster.clone(), stream));
                }
                Err(e) => tracing::warn!(error = %e, "a connection could not be accepted"),
            },
        }
    }
    // Each of them hears of the end by itself, and writes what is already answered.
    while connections.join_next().await.is_some() {}
    cluster.tasks.close();
    cluster.tasks.wait().await;
    steer::close_all(&cluster).await
}

fn write_address(file: &Path, addr: SocketAddr) -> Result<(), LabError> {
    // Renamed into place, so that a reader never sees half of it.
    let new = file.with_extension("new");
    std::fs::write(&new, addr.to_string()).map_err(LabError::io("write", &new))?;
    std::fs::rename(&new, file).map_err(LabError::io("write", file))
}

async fn connection(cluster: Arc<Cluster>, stream: TcpStream) {
    if let Err(e) = stream.set_nodelay(true) {
        tracing::debug!(error = %e, "a connection without nodelay");
    }
    let (mut read, write) = stream.into_split();
    let (outgoing, frames) = mpsc::channel(OUTGOING);
    let writer = tokio::spawn(write_frames(write, frames));
    let role = tokio::select! {
        role = hello(&cluster, &mut read, &outgoing) => role,
        () = cluster.cancel.cancelled() => None,
    };
    if let Some(role) = role {
        session(&cluster, read, outgoing, role).await;
    } else {
        drop(outgoing);
    }
    // Ends when the last sender is gone and everything is written; a client that does not read is not waited for.
    let mut writer = writer;
    if tokio::time::timeout(LAST_WORDS, &mut writer).await.is_err() {
        writer.abort();
    }
}

async fn write_frames(mut socket: OwnedWriteHalf, mut frames: mpsc::Receiver<Vec<u8>>) {
    while let Some(frame) = frames.recv().await {
        if wire::write(&mut socket, &frame).await.is_err() {
            return;
        }
    }
}

async fn reply(outgoing: &mpsc::Sender<Vec<u8>>, id: u64, body: Answer) {
    let frame = wire::encode(&Reply { id, body }).or_else(|e| {
        let reason = e.to_string();
        let body = Answer::Failed(Refusal::Invalid { what: "the answer".into(), reason });
        wire::encode(&Reply { id, body })
    });
    if let Ok(frame) = frame {
        // A closed queue: the client is gone.
        let _ = outgoing.send(frame).await;
    }
}

async fn hello(
    cluster: &Cluster,
    read: &mut OwnedReadHalf,
    outgoing: &mpsc::Sender<Vec<u8>>,
) -> Option<Role> {
    let request: Request = wire::read(read).await.ok().flatten()?;
    let Ask::Hello(role) = request.body else { return None };
    let refusal = match &role {
        Role::Control => None,
        Role::Host(name) | Role::Files(name) => cluster.read(|s| match s.hosts.get(name) {
            None => Some(Refusal::NotFound { namespace: "lab".into(), path: name.clone() }),
            Some(host) if !host.up => Some(Refusal::HostDown(name.clone())),
            Some(_) => None,
        }),
    };
    match refusal {
        Some(refusal) => {
            reply(outgoing, request.id, Answer::Failed(refusal)).await;
            None
        }
        None => {
            reply(outgoing, request.id, Answer::Done).await;
            Some(role)
        }
    }
}

/// What the calls of one connection share.
struct Session {
    cluster: Arc<Cluster>,
    role: Role,
    outgoing: mpsc::Sender<Vec<u8>>,
    gone: CancellationToken,
    file: std::sync::Mutex<Option<u64>>,
}

async fn session(
    cluster: &Arc<Cluster>,
    read: OwnedReadHalf,
    outgoing: mpsc::Sender<Vec<u8>>,
    role: Role,
) {
    let host = match &role {
        Role::Host(name) | Role::Files(name) => Some(name.clone()),
        Role::Control => None,
    };
    let life = host.as_ref().and_then(|name| {
        cluster.change(|s| {
            let host = s.hosts.get_mut(name)?;
            host.connections += 1;
            Some((host.life.clone(), host.wmi.clone()))
        })
    });
    let (life, wmi) = life.unwrap_or_default();
    let speaks_wmi = matches!(role, Role::Host(_));
    let session = Arc::new(Session {
        cluster: cluster.clone(),
        role,
        outgoing,
        gone: CancellationToken::new(),
        file: std::sync::Mutex::new(None),
    });
    // Read by a task of its own: half a frame must not get lost when something else happens meanwhile.
    let (sender, mut requests) = mpsc::channel(1);
    let reader = tokio::spawn(read_requests(read, sender));
    let mut calls = JoinSet::new();
    loop {
        tokio::select! {
            () = cluster.cancel.cancelled() => break,
            () = life.cancelled() => break,
            () = wmi.cancelled(), if speaks_wmi => break,
            Some(_) = calls.join_next() => {}
            request = requests.recv(), if calls.len() < IN_FLIGHT => match request {
                Some(request) => {
                    let session = session.clone();
                    calls.spawn(async move { session.handle(request).await });
                }
                None => break,
            },
        }
    }
    reader.abort();
    session.gone.cancel();
    session.close_file();
    calls.shutdown().await;
    if let Some(name) = host {
        cluster.change(|s| {
            if let Some(host) = s.hosts.get_mut(&name).filter(|_| !life.is_cancelled()) {
                host.connections = host.connections.saturating_sub(1);
            }
        });
    }
}

async fn read_requests(mut read: OwnedReadHalf, requests: mpsc::Sender<Request>) {
    loop {
        match wire::read::<Request>(&mut read).await {
            Ok(Some(request)) => {
                if requests.send(request).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(e) => {
                tracing::debug!(error = %e, "a connection broke");
                return;
            }
        }
    }
}

impl Session {
    async fn handle(&self, request: Request) {
        let id = request.id;
        let answer = match request.body {
            Ask::Subscribe { namespace, wql } => {
                self.subscribe(id, &namespace, &wql).await;
                return;
            }
            Ask::Control(command) if self.role == Role::Control => {
                let answered = steer::answer(&self.cluster, command).await;
                reply(&self.outgoing, id, Answer::Value(answered.value)).await;
                if answered.end {
                    self.cluster.cancel.cancel();
                }
                return;
            }
            ask => match &self.role {
                Role::Host(host) => self.ask(host, ask).await,
                Role::Files(host) => self.file(host, ask).await,
                Role::Control => Err(methods::invalid("request", "not one of a control client")),
            },
        };
        reply(&self.outgoing, id, answer.unwrap_or_else(Answer::Failed)).await;
    }

    async fn ask(&self, host: &str, ask: Ask) -> Result<Answer, Refusal> {
        let cluster = &self.cluster;
        self.answers(host)?;
        match ask {
            Ask::Query { namespace, wql } => {
                cluster.read(|s| classes::query(s, host, &namespace, &wql)).map(Answer::Objects)
            }
            Ask::Get { namespace, path } => {
                cluster.read(|s| classes::get(s, host, &namespace, &path)).map(Answer::Object)
            }
            Ask::Associators { namespace, path, assoc_class, result_class } => cluster
                .read(|s| {
                    classes::associators(s, host, &namespace, &path, &assoc_class, &result_class)
                })
                .map(Answer::Objects),
            Ask::Exec { namespace, path, method, args } => {
                let call =
                    Call { host: host.to_owned(), namespace, path, method, args: Args::new(args) };
                methods::exec(cluster, call, &self.gone).await.map(Answer::Object)
            }
            Ask::Put { namespace, path, properties } => {
                methods::put(cluster, host, &namespace, &path, &properties).map(|()| Answer::Done)
            }
            _ => Err(methods::invalid("request", "not one of an agent's WMI")),
        }
    }

    async fn file(&self, host: &str, ask: Ask) -> Result<Answer, Refusal> {
        match ask {
            Ask::OpenFile { path } => {
                let not_found =
                    |_| Refusal::NotFound { namespace: "lab".into(), path: path.clone() };
                let real = tokio::fs::canonicalize(host_path(&path)).await.map_err(not_found)?;
                let id = self.cluster.change(|s| s.open_file(host, &real))?;
                let before = self.file_slot().replace(id);
                if let Some(before) = before {
                    self.cluster.change(|s| s.close_file(before));
                }
                Ok(Answer::Done)
            }
            Ask::Read { length } => {
                let no_file = || methods::invalid("read", "no file is open on this connection");
                let id = (*self.file_slot()).ok_or_else(no_file)?;
                if length == 0 {
                    return Ok(Answer::Granted(0));
                }
                loop {
                    if let Some(code) = self.cluster.change(|s| s.failing_read(id)) {
                        return Err(Refusal::Paused { what: "a read".into(), code });
                    }
                    if let Some(granted) = self.cluster.change(|s| s.grant(id, length)) {
                        return Ok(Answer::Granted(granted));
                    }
                    if self.cluster.read(|s| !s.open_files.contains_key(&id)) {
                        return Err(Refusal::HostDown(host.to_owned()));
                    }
                    self.cluster.until(|s| s.may_ask_again(id).then_some(())).await;
                }
            }
            Ask::Grant { vm, folder } => {
                let folder = tokio::fs::canonicalize(host_path(&folder)).await.map_err(|_| {
                    Refusal::NotFound { namespace: "lab".into(), path: folder.clone() }
                })?;
                methods::grant(&self.cluster, &vm, &folder).map(|()| Answer::Done)
            }
            Ask::CloseFile => {
                self.close_file();
                Ok(Answer::Done)
            }
            _ => Err(methods::invalid("request", "not one of an open file")),
        }
    }

    fn file_slot(&self) -> std::sync::MutexGuard<'_, Option<u64>> {
        self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn close_file(&self) {
        let id = self.file_slot().take();
        if let Some(id) = id {
            self.cluster.change(|s| s.close_file(id));
        }
    }

    /// Refuses while WMI of this host is away.
    fn answers(&self, host: &str) -> Result<(), Refusal> {
        let away = |k: &FaultKind| (*k == FaultKind::WmiAway).then_some(());
        match self.cluster.change(|s| s.strike(None, Some(host), away)).is_some() {
            true => {
                Err(Refusal::Paused { what: format!("WMI of {host}"), code: EPT_S_NOT_REGISTERED })
            }
            false => Ok(()),
        }
    }

    /// Confirms a subscription and delivers its events until the connection ends.
    async fn subscribe(&self, id: u64, namespace: &str, wql: &str) {
        let Role::Host(host) = &self.role else {
            let refusal = methods::invalid(wql, "only agents subscribe");
            return reply(&self.outgoing, id, Answer::Failed(refusal)).await;
        };
        if let Err(refusal) = self.answers(host) {
            return reply(&self.outgoing, id, Answer::Failed(refusal)).await;
        }
        let query = match Query::parse(wql) {
            Ok(query) => query,
            Err(e) => {
                let refusal = methods::invalid(wql, &e.to_string());
                return reply(&self.outgoing, id, Answer::Failed(refusal)).await;
            }
        };
        // Subscribed before confirmed: nothing that happens after the answer is missed.
        let mut events = self.cluster.events();
        reply(&self.outgoing, id, Answer::Done).await;
        loop {
            let body = match events.recv().await {
                Ok(notice) => match self.heard(host, namespace, &query, &notice) {
                    Some(event) => match self.delivered(host, namespace, event).await {
                        Some(answer) => answer,
                        None => continue,
                    },
                    None => continue,
                },
                Err(broadcast::error::RecvError::Lagged(_)) => Answer::EventsLost,
                Err(broadcast::error::RecvError::Closed) => return,
            };
            let ends = matches!(body, Answer::Failed(_));
            reply(&self.outgoing, id, body).await;
            if ends {
                return;
            }
        }
    }

    /// What becomes of an event on its way: it may have to wait, get lost with or without a word, or end its subscription.
    async fn delivered(&self, host: &str, namespace: &str, event: Object) -> Option<Answer> {
        let of_cluster = namespace.eq_ignore_ascii_case(outrider_wmi::NS_CLUSTER);
        let held = FaultKind::HoldEvents { cluster: of_cluster };
        let free = |s: &mut State| (!s.ails(None, Some(host), |k| *k == held)).then_some(());
        self.cluster.until(free).await;
        self.cluster.change(|s| {
            s.strike(None, Some(host), |k| match k {
                FaultKind::DropEvents => Some(None),
                FaultKind::OverflowEvents => Some(Some(Answer::EventsLost)),
                FaultKind::EndSubscriptions => Some(Some(Answer::Failed(Refusal::Paused {
                    what: format!("the subscription of {host}"),
                    code: WBEM_E_CALL_CANCELLED,
                }))),
                _ => None,
            })
            .unwrap_or(Some(Answer::Event(event)))
        })
    }

    fn heard(&self, host: &str, namespace: &str, query: &Query, notice: &Notice) -> Option<Object> {
        let of_cluster = notice.host.is_none();
        let asked_cluster = namespace.eq_ignore_ascii_case(outrider_wmi::NS_CLUSTER);
        if of_cluster != asked_cluster || notice.host.as_deref().is_some_and(|h| h != host) {
            return None;
        }
        let kind = notice.kind;
        let class = query.class.as_str();
        if !class.eq_ignore_ascii_case(kind)
            && !class.eq_ignore_ascii_case("__InstanceOperationEvent")
        {
            return None;
        }
        let event = Object::new(kind, "")
            .with("TargetInstance", Value::Object(Box::new(notice.target.clone())));
        let event = match &notice.previous {
            Some(previous) => {
                event.with("PreviousInstance", Value::Object(Box::new(previous.clone())))
            }
            None => event,
        };
        query.accepts(&event).then_some(event)
    }
}
