//! Threads that enter COM's multi-threaded apartment, and run calls there.
//!
//! A call that COM never returns from cannot be ended from outside. Its caller is told in time that the outcome is
//! unknown, and another thread takes its place; when too many are stuck, nothing more is started.
#![allow(unsafe_code)] // entering and leaving COM

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use windows::Win32::System::Com::{
    COINIT_MULTITHREADED, CoInitializeEx, CoInitializeSecurity, CoUninitialize, EOAC_NONE,
    RPC_C_AUTHN_LEVEL_PKT_PRIVACY, RPC_C_IMP_LEVEL_IMPERSONATE,
};

use super::failure::Failure;
use super::session::{CONNECT, Patience, Session};
use super::status::{self, Doing};
use crate::WmiError;

/// Calls waiting for a thread; beyond that callers wait.
const WAITING: usize = 64;
/// Threads that may hang in calls that never return.
const MAX_STUCK: usize = 8;
/// Beyond a call's own limit: how long its thread may take to notice.
const NOTICE: Duration = Duration::from_secs(5);

type Work = Box<dyn FnOnce(&mut Sessions) + Send>;

/// Threads of one kind of work.
pub(super) struct Apartment {
    name: &'static str,
    shared: Arc<Shared>,
    calls: mpsc::Sender<Work>,
}

struct Shared {
    queue: Mutex<mpsc::Receiver<Work>>,
    closed: AtomicBool,
    stuck: AtomicUsize,
}

impl Apartment {
    /// Starts `threads` threads.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(super) fn start(name: &'static str, threads: usize) -> std::io::Result<Self> {
        let (calls, queue) = mpsc::channel(WAITING);
        let shared = Arc::new(Shared {
            queue: Mutex::new(queue),
            closed: AtomicBool::new(false),
            stuck: AtomicUsize::new(0),
        });
        let apartment = Self { name, shared, calls };
        for _ in 0..threads {
            apartment.add_thread()?;
        }
        Ok(apartment)
    }

    fn add_thread(&self) -> std::io::Result<()> {
        let shared = self.shared.clone();
        // Not joined: a thread may hang in a call for ever. It ends by itself when the queue is closed.
        std::thread::Builder::new().name(format!("wmi-{}", self.name)).spawn(move || {
            let Ok(_com) = Com::enter() else { return };
            let mut sessions = Sessions::default();
            loop {
                // Held while waiting: another thread gets its turn when this one has work.
                let work = {
                    let mut queue = shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
                    queue.blocking_recv()
                };
                match work {
                    Some(work) => work(&mut sessions),
                    None => break,
                }
            }
        })?;
        Ok(())
    }

    /// Runs `call` with the session of `namespace` on one of the threads, for at most `limit`.
    ///
    /// # Cancel safety
    /// Dropping the future asks the call to stop at its next slice; what it did until then is done.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        namespace: &str,
        what: &str,
        limit: Duration,
        again: Again,
        call: impl Fn(&Session, &Patience<'_>) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, WmiError> {
        let started = Instant::now();
        let doing = |what: &str| Doing {
            namespace: namespace.to_owned(),
            what: what.to_owned(),
            waited: started.elapsed(),
        };
        if self.shared.stuck.load(Ordering::Relaxed) >= MAX_STUCK {
            let reason = "too many earlier calls have never returned; WMI on this host hangs \
                          (restart the service \"winmgmt\", then this agent)";
            return Err(status::unreachable(reason.into(), doing(what)));
        }
        let (sender, receiver) = oneshot::channel();
        let fate = Arc::new(Fate::default());
        let wanted = namespace.to_owned();
        let (shared, its_fate) = (self.shared.clone(), fate.clone());
        let work: Work = Box::new(move |sessions| {
            let gone = || its_fate.dropped.load(Ordering::Relaxed) || sender.is_closed();
            let patience = Patience { until: started + limit, cancelled: &gone };
            let done = sessions.call(&wanted, again, |session| call(session, &patience));
            if its_fate.given_up.load(Ordering::Relaxed) {
                shared.stuck.fetch_sub(1, Ordering::Relaxed);
            }
            // The caller may have gone.
            let _ = sender.send(done);
        });
        let _watch = DropFlag(fate.clone());
        // Connecting has a bound of its own, longer than most calls.
        let bound = limit.max(CONNECT) + NOTICE;
        let asked = async {
            self.calls.send(work).await.map_err(|_| None)?;
            receiver.await.map_err(|_| None::<Failure>)?.map_err(Some)
        };
        match tokio::time::timeout(bound, asked).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(Some(Failure::Com { code, message }))) => {
                Err(status::error(code, &message, doing(what)))
            }
            Ok(Err(Some(Failure::Late))) => {
                Err(status::unreachable("not finished in time".into(), doing(what)))
            }
            Ok(Err(Some(Failure::Arguments(reason)))) => {
                Err(WmiError::Invalid { what: what.to_owned(), reason })
            }
            Ok(Err(Some(Failure::Cancelled) | None)) => {
                Err(status::unreachable("the agent is ending".into(), doing(what)))
            }
            Err(_) => {
                fate.given_up.store(true, Ordering::Relaxed);
                self.shared.stuck.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%namespace, what, "a WMI call does not return; its thread is replaced");
                if let Err(e) = self.add_thread() {
                    tracing::error!(error = %e, "no thread in its place");
                }
                Err(status::unreachable("the call does not return".into(), doing(what)))
            }
        }
    }
}

impl Drop for Apartment {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Relaxed);
    }
}

/// Whether a call may be repeated on a new connection when the old one turns out to be dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// It only reads.
    Once,
    /// It may have had its effect.
    Never,
}

/// What became of a call whose caller waits no longer.
#[derive(Default)]
struct Fate {
    given_up: AtomicBool,
    dropped: AtomicBool,
}

struct DropFlag(Arc<Fate>);

impl Drop for DropFlag {
    fn drop(&mut self) {
        self.0.dropped.store(true, Ordering::Relaxed);
    }
}

/// The connections of one thread, by namespace.
#[derive(Default)]
pub(super) struct Sessions(HashMap<String, Session>);

impl Sessions {
    fn call<T>(
        &mut self,
        namespace: &str,
        again: Again,
        call: impl Fn(&Session) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let kept = self.0.contains_key(namespace);
        match self.call_once(namespace, &call) {
            Err(Failure::Com { code, .. })
                if kept && again == Again::Once && status::breaks_connection(code) =>
            {
                self.call_once(namespace, &call)
            }
            done => done,
        }
    }

    fn call_once<T>(
        &mut self,
        namespace: &str,
        call: impl Fn(&Session) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        if !self.0.contains_key(namespace) {
            self.0.insert(namespace.to_owned(), Session::open(namespace)?);
        }
        let Some(session) = self.0.get(namespace) else { return Err(Failure::Cancelled) };
        let done = call(session);
        if let Err(Failure::Com { code, .. }) = &done
            && status::breaks_connection(*code)
        {
            self.0.remove(namespace);
        }
        done
    }
}

/// A thread's stay in the multi-threaded apartment.
pub(super) struct Com(());

impl Com {
    /// Enters; the process's security is set by whoever comes first.
    pub(super) fn enter() -> windows::core::Result<Self> {
        static SECURITY: OnceLock<()> = OnceLock::new();
        // SAFETY: balanced by CoUninitialize in drop, on this thread (`Com` is not sent: it lives on its stack).
        unsafe { CoInitializeEx(None, COINIT_MULTITHREADED).ok()? };
        SECURITY.get_or_init(|| {
            // SAFETY: no pointer is passed. It fails when somebody in this process did it before, which is as good.
            let set = unsafe {
                CoInitializeSecurity(
                    None,
                    -1,
                    None,
                    None,
                    RPC_C_AUTHN_LEVEL_PKT_PRIVACY,
                    RPC_C_IMP_LEVEL_IMPERSONATE,
                    None,
                    EOAC_NONE,
                    None,
                )
            };
            if let Err(e) = set {
                tracing::debug!(error = %e, "COM security is as the process had it");
            }
        });
        Ok(Self(()))
    }
}

impl Drop for Com {
    fn drop(&mut self) {
        // SAFETY: balances CoInitializeEx; everything of COM on this thread was dropped before.
        unsafe { CoUninitialize() };
    }
}
