//! An agent is not stopped while it works: a checkpoint that loses its owner stays longer than it must (O9).

use std::path::Path;
use std::time::Duration;

use outrider_node::status::Status;
use tokio::time::Instant;

use crate::report::Failure;

const LOOK: Duration = Duration::from_millis(500);

/// Waits until no job runs, or refuses.
pub(super) async fn wait_for_jobs(
    file: &Path,
    patience: Duration,
    say: impl Fn(&str),
) -> Result<(), Failure> {
    let until = Instant::now() + patience;
    let mut told = false;
    loop {
        let jobs = Status::read(file).filter(|s| !s.ended).map_or(0, |s| s.jobs);
        if jobs == 0 {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(Failure::refused(format!(
                "{jobs} job(s) run on this host; nothing was changed"
            ))
            .hint(
                "Wait for them (`outrider job list`), cancel them, or give more time with --wait.",
            ));
        }
        if !told {
            told = true;
            say(&format!("waiting for {jobs} job(s) on this host to end"));
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(file: &Path, jobs: i64, ended: bool) {
        let status = Status {
            pid: 1,
            version: "0.1.0".into(),
            name: "hv1".into(),
            connected: true,
            reason: String::new(),
            jobs,
            ended,
            since_unix_ms: 0,
        };
        let json = serde_json::to_vec(&status).expect("serialises");
        outrider_process::fs::write_atomic(file, &json).expect("written");
    }

    #[tokio::test]
    async fn an_agent_at_work_is_waited_for_or_left_alone() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("status.json");
        let wait = |patience| wait_for_jobs(&file, patience, |_| ());
        wait(Duration::ZERO).await.expect("no agent has ever run");
        write(&file, 2, false);
        let refused = wait(Duration::ZERO).await.expect_err("at work");
        assert!(refused.to_string().contains("2 job(s)"), "{refused}");
        let waiting = wait(Duration::from_secs(60));
        let ending = async { write(&file, 0, false) };
        let (waited, ()) = tokio::join!(waiting, ending);
        waited.expect("its jobs have ended");
        write(&file, 2, true);
        wait(Duration::ZERO).await.expect("an agent that died at work holds nothing up");
    }
}
