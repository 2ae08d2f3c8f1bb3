//! Windows: a service of the service manager, a source in the event log, a rule in the firewall.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use outrider_process::telemetry::event_log::SOURCE;
use windows_registry::LOCAL_MACHINE;
use windows_service::Error;
use windows_service::service::{
    Service as Handle, ServiceAccess, ServiceAction, ServiceActionType, ServiceErrorControl,
    ServiceFailureActions, ServiceFailureResetPeriod, ServiceInfo, ServiceSidType,
    ServiceStartType, ServiceState, ServiceType,
};
use windows_service::service_manager::{ServiceManager, ServiceManagerAccess};

use super::machine::{self, Applied, Machine, Service};
use super::places::Places;
use super::plan::Step;
use crate::report::Failure;

/// Name of the service.
pub(crate) const NAME: &str = "OutriderNode";
const DISPLAY: &str = "Outrider node agent";
const DESCRIPTION: &str =
    "Backs up the virtual machines of this host for an Outrider fabric, and restores them.";
/// Name of the firewall's rule.
const RULE: &str = "Outrider node metrics";
/// Waits before the service is started again, then the last one for ever.
const RESTARTS: [u64; 3] = [5, 30, 120];
/// After a day without a failure the waits begin anew.
const RESET: Duration = Duration::from_secs(24 * 3600);
/// Before the machine goes down, jobs may take so long to close their files.
const PRESHUTDOWN: Duration = Duration::from_secs(60);
/// System and Administrators, in every language of Windows.
const SYSTEM: &str = "*S-1-5-18:(OI)(CI)F";
const ADMINISTRATORS: &str = "*S-1-5-32-544:(OI)(CI)F";

const ACCESS_DENIED: i32 = 5;
const NO_SUCH_SERVICE: i32 = 1060;
const ALREADY_RUNNING: i32 = 1056;
const NOT_ACTIVE: i32 = 1062;
const MARKED_FOR_DELETE: i32 = 1072;

/// This machine.
pub(crate) struct Windows {
    places: Places,
    system: PathBuf,
}

impl Windows {
    pub(crate) fn new() -> Result<Self, Failure> {
        let folder = |variable: &str| {
            std::env::var_os(variable).map(PathBuf::from).filter(|p| p.is_absolute()).ok_or_else(
                || Failure::new(format!("%{variable}% names no folder; this is no usual Windows")),
            )
        };
        let places = Places::windows(&folder("ProgramFiles")?, &folder("ProgramData")?);
        Ok(Self { places, system: folder("SystemRoot")?.join("System32") })
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String, Failure> {
        // By its whole path: whoever can put a program into the current folder must not be run as an administrator.
        let program = self.system.join(program);
        machine::run(&program.display().to_string(), args)
    }

    /// Closes a folder to everybody but the system and administrators; what is created in it inherits that.
    fn close(&self, path: &Path) -> Result<(), Failure> {
        let path = path.display().to_string();
        self.run("icacls.exe", &[&path, "/setowner", "*S-1-5-32-544", "/T", "/C", "/Q"])?;
        let grant = "/grant:r";
        self.run(
            "icacls.exe",
            &[&path, "/inheritance:r", grant, SYSTEM, grant, ADMINISTRATORS, "/Q"],
        )?;
        Ok(())
    }

    fn event_source() -> String {
        format!(r"SYSTEM\CurrentControlSet\Services\EventLog\Application\{SOURCE}")
    }
}

fn manager(access: ServiceManagerAccess) -> Result<ServiceManager, Failure> {
    ServiceManager::local_computer(None::<&str>, access)
        .map_err(|e| failed("open the service manager", e))
}

/// The service, if it is installed.
fn open(access: ServiceAccess) -> Result<Option<Handle>, Failure> {
    match manager(ServiceManagerAccess::CONNECT)?.open_service(NAME, access) {
        Ok(service) => Ok(Some(service)),
        Err(error) if code(&error) == Some(NO_SUCH_SERVICE) => Ok(None),
        Err(error) => Err(failed("open the service", error)),
    }
}

fn installed(access: ServiceAccess) -> Result<Handle, Failure> {
    open(access)?.ok_or_else(|| Failure::refused(format!("the service {NAME} is not installed")))
}

fn code(error: &Error) -> Option<i32> {
    match error {
        Error::Winapi(io) => io.raw_os_error(),
        _ => None,
    }
}

fn failed(doing: &str, error: Error) -> Failure {
    if code(&error) == Some(ACCESS_DENIED) {
        return Failure::refused(format!("only an administrator may {doing}; nothing was changed"))
            .hint("Run it in a console that was opened with \"Run as administrator\".");
    }
    Failure::from(error).during(format!("cannot {doing}"))
}

fn info(program: &Path, config: &Path) -> ServiceInfo {
    let arguments = ["node", "service", "--config"].map(OsString::from);
    let mut launch_arguments = arguments.to_vec();
    launch_arguments.push(config.as_os_str().to_owned());
    ServiceInfo {
        name: NAME.into(),
        display_name: DISPLAY.into(),
        service_type: ServiceType::OWN_PROCESS,
        start_type: ServiceStartType::AutoStart,
        error_control: ServiceErrorControl::Normal,
        executable_path: program.to_owned(),
        launch_arguments,
        dependencies: Vec::new(),
        // LocalSystem: what WMI, virtual disks and cluster shared volumes demand.
        account_name: None,
        account_password: None,
    }
}

fn create(program: &Path, config: &Path) -> Result<Applied, Failure> {
    let access = ServiceAccess::QUERY_STATUS | ServiceAccess::CHANGE_CONFIG | ServiceAccess::START;
    let info = info(program, config);
    let (service, applied) = match open(access)? {
        Some(service) => {
            service.change_config(&info).map_err(|e| failed("change the service", e))?;
            (service, Applied::Unchanged)
        }
        None => {
            let manager =
                manager(ServiceManagerAccess::CONNECT | ServiceManagerAccess::CREATE_SERVICE)?;
            let created = manager.create_service(&info, access).map_err(|error| {
                if code(&error) == Some(MARKED_FOR_DELETE) {
                    return Failure::refused("the old service is still being removed").hint(
                        "Close the Services console and whatever else looks at it, then try again.",
                    );
                }
                failed("create the service", error)
            })?;
            (created, Applied::Changed)
        }
    };
    let action = |seconds| ServiceAction {
        action_type: ServiceActionType::Restart,
        delay: Duration::from_secs(seconds),
    };
    let failures = ServiceFailureActions {
        reset_period: ServiceFailureResetPeriod::After(RESET),
        reboot_msg: None,
        command: None,
        actions: Some(RESTARTS.map(action).to_vec()),
    };
    // None of these decides whether the agent works; a system that lacks one runs it all the same.
    let wishes = [
        ("a description", service.set_description(DESCRIPTION)),
        ("a delayed start", service.set_delayed_auto_start(true)),
        ("to be started again", service.update_failure_actions(failures)),
        (
            "to be started again after an error",
            service.set_failure_actions_on_non_crash_failures(true),
        ),
        (
            "an identifier of its own",
            service.set_config_service_sid_info(ServiceSidType::Unrestricted),
        ),
        ("time before a shutdown", service.set_preshutdown_timeout(PRESHUTDOWN)),
    ];
    for (what, wish) in wishes {
        if let Err(error) = wish {
            eprintln!("warning: the service was not given {what}: {error}");
        }
    }
    Ok(applied)
}

impl Machine for Windows {
    fn places(&self) -> &Places {
        &self.places
    }

    fn places_inside(&self) -> Places {
        self.places.clone()
    }

    fn check_rights(&self) -> Result<(), Failure> {
        manager(ServiceManagerAccess::CONNECT | ServiceManagerAccess::CREATE_SERVICE).map(drop)
    }

    fn hypervisor(&self) -> &'static str {
        "hyperv"
    }

    fn cluster(&self) -> Option<String> {
        // The hive of the cluster database is loaded on members only.
        let name = LOCAL_MACHINE.open("Cluster").and_then(|key| key.get_string("ClusterName"));
        name.ok().filter(|name| !name.is_empty())
    }

    fn is_windows(&self) -> bool {
        true
    }

    fn service(&self) -> Result<Service, Failure> {
        let Some(service) = open(ServiceAccess::QUERY_STATUS)? else {
            return Ok(Service::Absent);
        };
        let status = service.query_status().map_err(|e| failed("ask for the service", e))?;
        Ok(match status.current_state {
            ServiceState::Running => Service::Running,
            ServiceState::Stopped => Service::Stopped,
            _ => Service::Changing,
        })
    }

    fn start(&self) -> Result<(), Failure> {
        match installed(ServiceAccess::START)?.start::<&str>(&[]) {
            Err(error) if code(&error) != Some(ALREADY_RUNNING) => {
                Err(failed("start the service", error))
            }
            _ => Ok(()),
        }
    }

    fn stop(&self) -> Result<(), Failure> {
        match installed(ServiceAccess::STOP)?.stop() {
            Err(error) if code(&error) != Some(NOT_ACTIVE) => {
                Err(failed("stop the service", error))
            }
            _ => Ok(()),
        }
    }

    fn apply(&self, step: &Step) -> Result<Applied, Failure> {
        match step {
            Step::Folder { path, private } => {
                let applied = machine::folder(path)?;
                // The others lie in this one and inherit.
                if *private && *path == self.places.config_dir {
                    self.close(path)?;
                }
                Ok(applied)
            }
            Step::Program { from, to } => machine::program(from, to),
            Step::Config { path, content } => machine::config(path, content),
            Step::EventSource => {
                let known = LOCAL_MACHINE.open(Self::event_source()).is_ok();
                let key = LOCAL_MACHINE.create(Self::event_source())?;
                key.set_expand_string(
                    "EventMessageFile",
                    r"%SystemRoot%\System32\EventCreate.exe",
                )?;
                key.set_u32("TypesSupported", 7)?;
                Ok(if known { Applied::Unchanged } else { Applied::Changed })
            }
            Step::Firewall { port, program } => {
                self.undo(step)?;
                let rule = [
                    "advfirewall",
                    "firewall",
                    "add",
                    "rule",
                    &format!("name={RULE}"),
                    "dir=in",
                    "action=allow",
                    "protocol=TCP",
                    &format!("localport={port}"),
                    &format!("program={}", program.display()),
                ];
                self.run("netsh.exe", &rule).map(|_| Applied::Changed)
            }
            Step::Service { program, config } => create(program, config),
        }
    }

    fn undo(&self, step: &Step) -> Result<Applied, Failure> {
        match step {
            Step::Service { .. } => match open(ServiceAccess::DELETE)? {
                Some(service) => {
                    service.delete().map_err(|e| failed("remove the service", e))?;
                    Ok(Applied::Changed)
                }
                None => Ok(Applied::Unchanged),
            },
            Step::EventSource => {
                if LOCAL_MACHINE.open(Self::event_source()).is_err() {
                    return Ok(Applied::Unchanged);
                }
                LOCAL_MACHINE.remove_tree(Self::event_source())?;
                Ok(Applied::Changed)
            }
            Step::Firewall { .. } => {
                let name = format!("name={RULE}");
                let args = ["advfirewall", "firewall", "delete", "rule", name.as_str()];
                // It fails where there is no such rule.
                Ok(if self.run("netsh.exe", &args).is_ok() {
                    Applied::Changed
                } else {
                    Applied::Unchanged
                })
            }
            Step::Config { path, .. } => machine::remove_file(path),
            Step::Program { to, .. } => self.remove_program(to),
            Step::Folder { path, .. } => Ok(machine::remove_if_empty(path)),
        }
    }

    fn remove_program(&self, path: &Path) -> Result<Applied, Failure> {
        let running = std::env::current_exe().ok();
        let same =
            running.and_then(|r| std::fs::canonicalize(r).ok()) == std::fs::canonicalize(path).ok();
        if same && path.exists() {
            // A running program cannot be removed; a helper does it a moment after we have ended.
            self_replace::self_delete_outside_path(&self.places.program_dir).map_err(|e| {
                Failure::from(e).during(format!("cannot remove {}", path.display()))
            })?;
            return Ok(Applied::Changed);
        }
        machine::remove_file(path)
    }
}
