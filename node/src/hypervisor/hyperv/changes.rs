//! What changed on a disk since a reference point: asked of the image service, and of the system's own virtual disks where
//! the service's answer is of no use.

use std::path::Path;

use outrider_disk::{ByteRange, RangeSet};
use outrider_wmi::{Object, Value};

use super::HyperV;
use super::call::{Call, JOB_STARTED};
use crate::hypervisor::error::codes::{self, Next};
use crate::hypervisor::error::{HypervisorError, Retry};

/// Return values for a parameter that is wrong, in both sets of codes.
const BAD_PARAMETER: [u32; 2] = [4, 32773];
/// Portions of a disk begin and end at multiples of this.
const STEP: u64 = 1 << 20;

impl HyperV {
    pub(super) async fn disk_changes(
        &self,
        disk: &Path,
        size: u64,
        tracking_id: &str,
    ) -> Result<RangeSet, HypervisorError> {
        let failure = match self.changes_of_service(disk, size, tracking_id).await {
            Ok(changed) => return Ok(changed),
            Err(failure) => failure,
        };
        let another_way = match &failure {
            HypervisorError::Odd { .. } => true,
            // An id that is not accepted is accepted nowhere; what is busy is asked for again.
            HypervisorError::Refused { .. } => failure.retry() == Retry::No,
            _ => false,
        };
        let found =
            if another_way { self.changes_of_system(disk, size, tracking_id).await } else { None };
        if let Some(changed) = found {
            tracing::info!(disk = %disk.display(), reason = %failure, "the system itself tells what changed");
            return Ok(changed);
        }
        Err(match failure {
            HypervisorError::Odd { detail, .. } => lost(disk, detail),
            failure => failure,
        })
    }

    async fn changes_of_service(
        &self,
        disk: &Path,
        size: u64,
        tracking_id: &str,
    ) -> Result<RangeSet, HypervisorError> {
        let doing = format!("tell what changed on {}", disk.display());
        let mut changed: Vec<ByteRange> = Vec::new();
        let (mut offset, mut most, mut asked_again) = (0, size, false);
        while offset < size {
            let length = most.min(size - offset);
            let call = Call {
                doing: doing.clone(),
                service: "Msvm_ImageManagementService",
                path: String::new(),
                method: "GetVirtualDiskChanges",
                // TargetSnapshotId is for VHD sets only.
                args: vec![
                    ("Path", disk.display().to_string().into()),
                    ("LimitId", tracking_id.into()),
                    ("ByteOffset", offset.into()),
                    ("ByteLength", length.into()),
                ],
            };
            let out = match self.ask(&call).await {
                Ok(finished) => finished.out,
                Err(HypervisorError::Refused { code, reason, .. })
                    if codes::of(code, &reason).is_some_and(|k| k.next == Next::ReadAll) =>
                {
                    return Err(lost(disk, reason));
                }
                // The documentation wants less than the whole disk; others ask for the whole and are answered.
                Err(HypervisorError::Refused { code, .. })
                    if BAD_PARAMETER.contains(&code) && length == size && size > STEP =>
                {
                    most = (size / 2).next_multiple_of(STEP);
                    continue;
                }
                Err(e) => return Err(e),
            };
            // A job that has ended holds no answer; asked again, the service has it.
            if out.u64("ReturnValue") == Some(JOB_STARTED.into())
                && out.get("ProcessedByteLength") == &Value::Null
                && !asked_again
            {
                asked_again = true;
                continue;
            }
            asked_again = false;
            let (ranges, processed) = portion(&out)
                .map_err(|detail| HypervisorError::Odd { doing: doing.clone(), detail })?;
            changed.extend(ranges);
            if processed == 0 {
                let detail = format!("no progress at offset {offset}");
                return Err(HypervisorError::Odd { doing, detail });
            }
            offset = offset.saturating_add(processed);
        }
        Ok(within(changed, size))
    }

    /// `None` where the system does not tell, either.
    async fn changes_of_system(
        &self,
        disk: &Path,
        size: u64,
        tracking_id: &str,
    ) -> Option<RangeSet> {
        let (files, path, id) = (self.files.clone(), disk.to_owned(), tracking_id.to_owned());
        let asked = tokio::task::spawn_blocking(move || files.changes(&path, &id, size)).await;
        match asked.ok()? {
            Ok(found) => {
                let ranges =
                    found?.into_iter().map(|(start, length)| ByteRange::new(start, length));
                Some(within(ranges, size))
            }
            Err(e) => {
                tracing::warn!(disk = %disk.display(), error = %e, "the system does not tell what changed, either");
                None
            }
        }
    }
}

fn lost(disk: &Path, reason: String) -> HypervisorError {
    HypervisorError::TrackingLost { disk: disk.to_owned(), reason }
}

fn within(ranges: impl IntoIterator<Item = ByteRange>, size: u64) -> RangeSet {
    let mut changed: RangeSet = ranges.into_iter().collect();
    changed.clamp(size);
    changed
}

/// The ranges of an answer, and how much of the disk it is about.
fn portion(out: &Object) -> Result<(Vec<ByteRange>, u64), String> {
    let numbers =
        |name: &str| -> Option<Vec<u64>> { out.array(name).iter().map(Value::as_u64).collect() };
    let (starts, lengths) = numbers("ChangedByteOffsets")
        .zip(numbers("ChangedByteLengths"))
        .filter(|(s, l)| s.len() == l.len())
        .ok_or("the answer's offsets and lengths do not pair")?;
    let ranges = starts.into_iter().zip(lengths).map(|(s, l)| ByteRange::new(s, l)).collect();
    Ok((ranges, out.u64("ProcessedByteLength").unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use outrider_wmi::files::{HostFile, HostFiles};
    use outrider_wmi::{EventStream, Wmi, WmiError};

    use super::*;
    use crate::config::JobTimes;

    const SIZE: u64 = 64 << 20;

    /// An image service that answers from a list; each question is an offset and a length.
    #[derive(Default)]
    struct Service {
        answers: Mutex<Vec<Object>>,
        asked: Mutex<Vec<(u64, u64)>>,
    }

    #[async_trait::async_trait]
    impl Wmi for Service {
        async fn query(&self, _: &str, _: &str) -> Result<Vec<Object>, WmiError> {
            Ok(vec![Object::new("Msvm_ImageManagementService", "service")])
        }
        async fn get(&self, _: &str, path: &str) -> Result<Object, WmiError> {
            Ok(Object::new("Msvm_ConcreteJob", path)
                .with("JobState", 7_u16)
                .with("ErrorCode", 0_u16))
        }
        async fn associators(
            &self,
            _: &str,
            _: &str,
            _: &str,
            _: &str,
        ) -> Result<Vec<Object>, WmiError> {
            Ok(Vec::new())
        }
        async fn exec_method(
            &self,
            _: &str,
            _: &str,
            _: &str,
            args: Vec<(String, Value)>,
        ) -> Result<Object, WmiError> {
            let of =
                |name: &str| args.iter().find(|(n, _)| n == name).and_then(|(_, v)| v.as_u64());
            let question = (of("ByteOffset").expect("told"), of("ByteLength").expect("told"));
            self.asked.lock().expect("no panic").push(question);
            Ok(self.answers.lock().expect("no panic").remove(0))
        }
        async fn subscribe(&self, namespace: &str, _: &str) -> Result<EventStream, WmiError> {
            Err(WmiError::NoNamespace { namespace: namespace.into() })
        }
    }

    struct System(Option<Vec<(u64, u64)>>);

    impl HostFiles for System {
        fn open_read(&self, _: &Path) -> io::Result<Arc<dyn HostFile>> {
            Err(io::ErrorKind::NotFound.into())
        }
        fn changes(&self, _: &Path, _: &str, _: u64) -> io::Result<Option<Vec<(u64, u64)>>> {
            Ok(self.0.clone())
        }
    }

    fn code(code: u32) -> Object {
        Object::new("__PARAMETERS", "").with("ReturnValue", code)
    }

    fn answer(processed: u64, ranges: &[(u64, u64)]) -> Object {
        let texts = |of: fn(&(u64, u64)) -> u64| -> Vec<String> {
            ranges.iter().map(|r| of(r).to_string()).collect()
        };
        code(0)
            .with("ProcessedByteLength", processed.to_string())
            .with("ChangedByteOffsets", texts(|r| r.0))
            .with("ChangedByteLengths", texts(|r| r.1))
    }

    async fn ask(
        answers: Vec<Object>,
        system: Option<Vec<(u64, u64)>>,
    ) -> (Result<Vec<(u64, u64)>, HypervisorError>, Vec<(u64, u64)>) {
        let service = Arc::new(Service { answers: Mutex::new(answers), ..Service::default() });
        let hyperv = HyperV::new(service.clone(), Arc::new(System(system)), JobTimes::default());
        let told = hyperv.disk_changes(Path::new("/d.vhdx"), SIZE, "rct").await;
        let told = told.map(|set| set.iter().map(|r| (r.start, r.len)).collect());
        let asked = service.asked.lock().expect("no panic").clone();
        (told, asked)
    }

    /// The documentation of ByteLength says less than the disk; programs of others ask for all of it.
    #[tokio::test]
    async fn a_service_that_does_not_tell_of_a_whole_disk_is_asked_in_parts() {
        let half = SIZE / 2;
        let answers = vec![code(32773), answer(half, &[(0, 4096)]), answer(half, &[(half, 512)])];
        let (told, asked) = ask(answers, None).await;
        assert_eq!(told.expect("told"), [(0, 4096), (half, 512)]);
        assert_eq!(asked, [(0, SIZE), (0, half), (half, half)]);
        let (told, asked) = ask(vec![code(4), code(4)], None).await;
        assert!(matches!(told, Err(HypervisorError::Refused { code: 4, .. })), "{told:?}");
        assert_eq!(asked.len(), 2, "not for ever");
    }

    /// One program that is known asks again after a job; whether the service ever starts one is told nowhere.
    #[tokio::test]
    async fn a_job_instead_of_an_answer_is_waited_for_and_asked_after() {
        let job = || code(4096).with("Job", Value::Ref("Msvm_ConcreteJob.InstanceID=\"1\"".into()));
        let (told, asked) = ask(vec![job(), answer(SIZE, &[(0, 512)])], None).await;
        assert_eq!(told.expect("told"), [(0, 512)]);
        assert_eq!(asked.len(), 2);
        let (told, asked) = ask(vec![job(), job()], Some(vec![(0, 1)])).await;
        assert_eq!((told.expect("told"), asked.len()), (vec![(0, 1)], 2), "not for ever");
    }

    #[tokio::test]
    async fn an_answer_of_no_use_leads_to_the_system_itself_and_else_to_a_full_read() {
        let changed = vec![(4096, 512), (SIZE - 10, 100)];
        for useless in [code(0), answer(0, &[]), code(32770)] {
            let (told, _) = ask(vec![useless], Some(changed.clone())).await;
            assert_eq!(told.expect("told"), [(4096, 512), (SIZE - 10, 10)]);
        }
        let (told, _) = ask(vec![answer(0, &[])], None).await;
        assert!(matches!(told, Err(HypervisorError::TrackingLost { .. })), "{told:?}");
        // An id that is not known is not asked for in another way.
        let (told, _) = ask(vec![code(0xC03A_0029)], Some(changed)).await;
        assert!(matches!(told, Err(HypervisorError::TrackingLost { .. })), "{told:?}");
    }
}
