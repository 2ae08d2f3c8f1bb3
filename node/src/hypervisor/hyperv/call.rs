//! Calling methods: return codes, job objects, and when to ask again.

use std::time::Duration;

use outrider_process::backoff::Backoff;
use outrider_wmi::{NS_CLUSTER, NS_VIRTUALIZATION, Object, Value, WmiError, embedded};
use tokio::time::Instant;

use super::HyperV;
use crate::hypervisor::error::{HypervisorError, Retry, codes, meaning};
use crate::lease::Lease;

/// Return values of methods.
const DONE: u32 = 0;
pub(super) const JOB_STARTED: u32 = 4096;
/// Job states.
const COMPLETED: u64 = 7;
const COMPLETED_WITH_WARNINGS: u64 = 32768;
const ENDED_BADLY: [u64; 3] = [8, 9, 10];
/// Pauses between two looks at a job: WMI has no event that is sure to come.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LONGEST_LOOK: Duration = Duration::from_secs(2);

/// What a finished method left.
pub(super) struct Finished {
    pub(super) out: Object,
    /// Objects that its job made or touched.
    pub(super) affected: Vec<Object>,
}

impl Finished {
    /// An affected object of a class.
    pub(super) fn affected(&self, class: &str) -> Option<&Object> {
        self.affected.iter().find(|o| o.class.eq_ignore_ascii_case(class))
    }
}

/// A method call, ready to be made more than once.
pub(super) struct Call<'a> {
    /// What is wanted, for sentences: "create a checkpoint of VM x".
    pub(super) doing: String,
    /// Class of the service, or empty when `path` is given.
    pub(super) service: &'static str,
    /// Object path, when it is no service.
    pub(super) path: String,
    pub(super) method: &'static str,
    pub(super) args: Vec<(&'a str, Value)>,
}

impl HyperV {
    pub(super) async fn query(
        &self,
        doing: &str,
        wql: &str,
    ) -> Result<Vec<Object>, HypervisorError> {
        self.wmi.query(NS_VIRTUALIZATION, wql).await.map_err(provider(doing))
    }

    pub(super) async fn cluster_query(
        &self,
        doing: &str,
        wql: &str,
    ) -> Result<Vec<Object>, HypervisorError> {
        match self.wmi.query(NS_CLUSTER, wql).await {
            // A stand-alone host has no cluster provider.
            Err(WmiError::NoNamespace { .. }) => Ok(Vec::new()),
            answer => answer.map_err(provider(doing)),
        }
    }

    pub(super) async fn associated(
        &self,
        doing: &str,
        path: &str,
        association: &str,
        result: &str,
    ) -> Result<Vec<Object>, HypervisorError> {
        self.wmi
            .associators(NS_VIRTUALIZATION, path, association, result)
            .await
            .map_err(provider(doing))
    }

    /// Makes a call that changes nothing, and waits for its job.
    pub(super) async fn ask(&self, call: &Call<'_>) -> Result<Finished, HypervisorError> {
        self.once(call, None).await
    }

    /// Makes a call that changes something: the lease is asked before each attempt, and an attempt that met a busy VM is
    /// repeated with growing pauses for as long as the configuration is patient.
    pub(super) async fn change(
        &self,
        lease: &Lease,
        call: &Call<'_>,
    ) -> Result<Finished, HypervisorError> {
        self.change_unless(lease, call, || async { Ok(()) }).await
    }

    /// As [`HyperV::change`]; before an attempt is repeated, `obstacle` may say that it makes no sense any more.
    pub(super) async fn change_unless<F, Fut>(
        &self,
        lease: &Lease,
        call: &Call<'_>,
        obstacle: F,
    ) -> Result<Finished, HypervisorError>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<(), HypervisorError>>,
    {
        let until = Instant::now() + self.times.busy_patience;
        let mut backoff =
            Backoff::new(self.times.busy_first, self.times.busy_ceiling, Backoff::any_seed());
        loop {
            lease.wait_to_mutate().await?;
            let failure = match self.once(call, Some(lease)).await {
                Ok(finished) => return Ok(finished),
                Err(failure) => failure,
            };
            if failure.retry() != Retry::Later {
                return Err(failure);
            }
            obstacle().await?;
            let pause = backoff.next_wait();
            if Instant::now() + pause >= until {
                return Err(failure);
            }
            tracing::info!(doing = call.doing, error = %failure, ?pause, "the hypervisor is busy, asking again");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                lost = lease.lost() => return Err(lost.into()),
            }
        }
    }

    async fn once(
        &self,
        call: &Call<'_>,
        lease: Option<&Lease>,
    ) -> Result<Finished, HypervisorError> {
        let path = if call.path.is_empty() {
            self.service(&call.doing, call.service).await?
        } else {
            call.path.clone()
        };
        let args = call.args.iter().map(|(n, v)| ((*n).to_owned(), v.clone())).collect();
        if let Some(lease) = lease {
            lease.may_mutate()?;
        }
        let out = self
            .wmi
            .exec_method(NS_VIRTUALIZATION, &path, call.method, args)
            .await
            .map_err(provider(&call.doing))?;
        let code = return_value(&out).ok_or_else(|| HypervisorError::Odd {
            doing: call.doing.clone(),
            detail: format!("{} gave no ReturnValue", call.method),
        })?;
        match code {
            DONE => Ok(Finished { out, affected: Vec::new() }),
            JOB_STARTED => {
                let job =
                    out.str("Job").map(str::to_owned).ok_or_else(|| HypervisorError::Odd {
                        doing: call.doing.clone(),
                        detail: format!("{} started a job and does not name it", call.method),
                    })?;
                self.wait_for_job(&call.doing, &job, lease).await?;
                let affected = self
                    .associated(&call.doing, &job, "Msvm_AffectedJobElement", "")
                    .await
                    // The job did its work; what it made can be found in other ways.
                    .unwrap_or_default();
                Ok(Finished { out, affected })
            }
            code => {
                let (reason, remedy) = meaning(code, "");
                Err(HypervisorError::Refused {
                    doing: call.doing.clone(),
                    code,
                    reason: reason.to_owned(),
                    remedy,
                })
            }
        }
    }

    /// Looks at a job until it ended. One that vanishes was finished and forgotten, or never seen: nobody knows how it
    /// ended.
    async fn wait_for_job(
        &self,
        doing: &str,
        job: &str,
        lease: Option<&Lease>,
    ) -> Result<(), HypervisorError> {
        let until = Instant::now() + self.times.hypervisor_job;
        let mut backoff = Backoff::new(FIRST_LOOK, LONGEST_LOOK, Backoff::any_seed());
        loop {
            let object = match self.wmi.get(NS_VIRTUALIZATION, job).await {
                Ok(object) => object,
                Err(WmiError::NotFound { .. }) => {
                    return Err(HypervisorError::OutcomeUnknown { doing: doing.to_owned() });
                }
                Err(e) => return Err(provider(doing)(e)),
            };
            let state = object.u64("JobState").unwrap_or(0);
            let code = object.u64("ErrorCode").and_then(|c| u32::try_from(c).ok()).unwrap_or(0);
            if matches!(state, COMPLETED | COMPLETED_WITH_WARNINGS) && code == 0 {
                if state == COMPLETED_WITH_WARNINGS {
                    tracing::warn!(doing, "the hypervisor's job completed with warnings");
                }
                return Ok(());
            }
            if ENDED_BADLY.contains(&state) || matches!(state, COMPLETED | COMPLETED_WITH_WARNINGS)
            {
                let told = told_by(&object);
                let (meant, remedy) = meaning(code, &told);
                let errors = self.job_errors(job).await;
                return Err(HypervisorError::Refused {
                    doing: doing.to_owned(),
                    code,
                    reason: match errors.is_empty() {
                        false => errors.join("; "),
                        true if told.is_empty() => meant.to_owned(),
                        true => told,
                    },
                    remedy,
                });
            }
            if Instant::now() >= until {
                return Err(HypervisorError::TooLong {
                    doing: doing.to_owned(),
                    waited: self.times.hypervisor_job,
                });
            }
            let pause = tokio::time::sleep(backoff.next_wait());
            match lease {
                // The job goes on without us; whoever holds the next lease finds what it made.
                Some(lease) => tokio::select! {
                    () = pause => {}
                    lost = lease.lost() => return Err(lost.into()),
                },
                None => pause.await,
            }
        }
    }

    /// What went wrong in a job, in the hypervisor's words: each names its device. Nothing when it does not tell.
    async fn job_errors(&self, job: &str) -> Vec<String> {
        let answer = self.wmi.exec_method(NS_VIRTUALIZATION, job, "GetErrorEx", vec![]).await;
        let Ok(out) = answer else { return Vec::new() };
        let message = |value: &Value| {
            let error = match value {
                Value::Object(object) => (**object).clone(),
                value => embedded::from_text(value.as_str()?).ok()?,
            };
            error.str("Message").map(str::trim).filter(|m| !m.is_empty()).map(str::to_owned)
        };
        let mut messages: Vec<String> = Vec::new();
        for message in out.array("Errors").iter().filter_map(message) {
            if !messages.contains(&message) {
                messages.push(message);
            }
        }
        messages
    }

    async fn service(&self, doing: &str, class: &str) -> Result<String, HypervisorError> {
        let found = self.query(doing, &format!("SELECT * FROM {class}")).await?;
        found.into_iter().next().map(|o| o.path).ok_or_else(|| HypervisorError::Odd {
            doing: doing.to_owned(),
            detail: format!("this host has no {class}"),
        })
    }
}

/// A method's return value; HRESULTs arrive as negative numbers.
fn return_value(out: &Object) -> Option<u32> {
    match out.get("ReturnValue") {
        Value::Int(n) => codes::from_signed(*n),
        Value::UInt(n) => u32::try_from(*n).ok(),
        Value::Str(text) => text.parse().ok().and_then(codes::from_signed),
        _ => None,
    }
}

/// A failed job's own words; the summary where there is no description.
fn told_by(job: &Object) -> String {
    let of = |name| job.str(name).map(str::trim).filter(|t| !t.is_empty());
    of("ErrorDescription").or_else(|| of("ErrorSummaryDescription")).unwrap_or_default().to_owned()
}

pub(super) fn provider(doing: &str) -> impl FnOnce(WmiError) -> HypervisorError + '_ {
    move |source| HypervisorError::Provider { doing: doing.to_owned(), source }
}
