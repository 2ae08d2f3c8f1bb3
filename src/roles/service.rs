//! The node agent under the service manager of Windows.
//!
//! The control handler is registered before anything else, the start is reported step by step, and both a stop and the
//! notice before a shutdown let jobs close their files: another host goes on with them.
#![allow(unsafe_code)] // the entry point that the service manager calls, made by a macro of windows-service

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::Duration;

use outrider_process::telemetry::event_log;
use outrider_process::telemetry::host_events::{FAILED, Kind};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use windows_service::service::{
    ServiceControl, ServiceControlAccept, ServiceExitCode, ServiceState, ServiceStatus, ServiceType,
};
use windows_service::service_control_handler::{
    self, ServiceControlHandlerResult, ServiceStatusHandle,
};
use windows_service::{define_windows_service, service_dispatcher};

use super::{RoleArgs, Steering};
use crate::cli::Done;
use crate::install::scm::NAME;
use crate::report::Failure;

/// How often a start or stop that takes time says that it goes on.
const STEP: Duration = Duration::from_secs(2);
/// How long the service manager may wait for the next word.
const HINT: Duration = Duration::from_secs(20);
/// An agent that has not found its hypervisor by then is up all the same, and goes on looking.
const STARTING: Duration = Duration::from_secs(20);
/// The service manager called from a console.
const NOT_A_SERVICE: i32 = 1063;

/// What the entry point needs; it has no arguments of ours.
static START: OnceLock<(PathBuf, tokio::runtime::Handle)> = OnceLock::new();

define_windows_service!(entry, main);

/// Hands this process to the service manager, until the service has stopped.
pub(crate) async fn dispatch(config: PathBuf) -> Done {
    let _ = START.set((config, tokio::runtime::Handle::current()));
    let served = tokio::task::spawn_blocking(|| service_dispatcher::start(NAME, entry)).await?;
    served.map_err(|error| match &error {
        windows_service::Error::Winapi(io) if io.raw_os_error() == Some(NOT_A_SERVICE) => {
            Failure::usage("only the service manager can run this")
                .hint("outrider node --config FILE runs the agent in this console; outrider node start starts the service.")
        }
        _ => Failure::from(error),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn main(_: Vec<OsString>) {
    let Some((config, runtime)) = START.get() else { return };
    let token = CancellationToken::new();
    let asked = token.clone();
    let handler = move |control| match control {
        ServiceControl::Stop | ServiceControl::Preshutdown | ServiceControl::Shutdown => {
            asked.cancel();
            ServiceControlHandlerResult::NoError
        }
        ServiceControl::Interrogate => ServiceControlHandlerResult::NoError,
        _ => ServiceControlHandlerResult::NotImplemented,
    };
    let Ok(handle) = service_control_handler::register(NAME, handler) else {
        event_log::report(Kind::Error, FAILED, "the service manager took no control handler");
        return;
    };
    let reports = Reports { handle };
    reports.say(ServiceState::StartPending, 1, 0);
    let ended = runtime.block_on(run(config.clone(), token, &reports));
    let code = match ended {
        Ok(_) => 0,
        Err(failure) => {
            event_log::report(Kind::Error, FAILED, &failure.to_string().replace('\n', "\r\n"));
            failure.exit() as u32
        }
    };
    reports.say(ServiceState::Stopped, 0, code);
}

async fn run(config: PathBuf, token: CancellationToken, reports: &Reports) -> Done {
    let args = RoleArgs { config, ready_file: None, log_file: None, until_stdin_closes: false };
    let (ready, mut is_ready) = oneshot::channel();
    let steering = Steering { token: token.clone(), ready: Some(ready) };
    let agent = super::node_with(args, steering);
    tokio::pin!(agent);
    let mut step = tokio::time::interval(STEP);
    let up = tokio::time::sleep(STARTING);
    tokio::pin!(up);
    let (mut running, mut checkpoint) = (false, 1);
    loop {
        let leaving = token.is_cancelled();
        tokio::select! {
            ended = &mut agent => return ended,
            _ = &mut is_ready, if !running && !leaving => running = true,
            () = &mut up, if !running && !leaving => running = true,
            () = token.cancelled(), if !leaving => checkpoint = 0,
            _ = step.tick() => {}
        }
        checkpoint += 1;
        if token.is_cancelled() {
            reports.say(ServiceState::StopPending, checkpoint, 0);
        } else if running {
            reports.say(ServiceState::Running, 0, 0);
        } else {
            reports.say(ServiceState::StartPending, checkpoint, 0);
        }
    }
}

/// What the service manager is told.
struct Reports {
    handle: ServiceStatusHandle,
}

impl Reports {
    fn say(&self, state: ServiceState, checkpoint: u32, code: u32) {
        let controls_accepted = if state == ServiceState::Running {
            ServiceControlAccept::STOP | ServiceControlAccept::PRESHUTDOWN
        } else {
            ServiceControlAccept::empty()
        };
        let exit_code = match code {
            0 => ServiceExitCode::Win32(0),
            code => ServiceExitCode::ServiceSpecific(code),
        };
        let pending = matches!(state, ServiceState::StartPending | ServiceState::StopPending);
        // The service manager that does not listen has gone itself.
        let _ = self.handle.set_service_status(ServiceStatus {
            service_type: ServiceType::OWN_PROCESS,
            current_state: state,
            controls_accepted,
            exit_code,
            checkpoint: if pending { checkpoint } else { 0 },
            wait_hint: if pending { HINT } else { Duration::ZERO },
            process_id: None,
        });
    }
}
