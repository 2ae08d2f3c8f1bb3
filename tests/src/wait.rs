//! Waiting for states. A deadline says "stuck", never "slow".

use std::time::Duration;

use tokio::time::Instant;

/// No state that a test waits for may take longer, even on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// Between two looks at a state that no event announces.
const LOOK: Duration = Duration::from_millis(40);

/// Looks until `probe` has its answer; panics with its last reason after [`DEADLINE`].
pub async fn eventually<T>(what: &str, probe: impl AsyncFnMut() -> Result<T, String>) -> T {
    within(DEADLINE, what, probe).await
}

/// As [`eventually`], with a deadline of its own.
pub async fn within<T>(
    deadline: Duration,
    what: &str,
    mut probe: impl AsyncFnMut() -> Result<T, String>,
) -> T {
    let until = Instant::now() + deadline;
    loop {
        match probe().await {
            Ok(answer) => return answer,
            Err(reason) if Instant::now() >= until => {
                panic!("waited {deadline:?} in vain until {what}: {reason}")
            }
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}
