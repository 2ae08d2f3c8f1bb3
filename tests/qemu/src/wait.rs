//! Waiting for states, with a deadline.

use std::time::{Duration, Instant};

use crate::error::Error;

/// Between two looks.
const STEP: Duration = Duration::from_millis(20);

/// Looks until `look` gives something; `Err` of the inner result is what was seen instead.
pub(crate) async fn until<T>(
    what: &str,
    patience: Duration,
    mut look: impl AsyncFnMut() -> Result<Result<T, String>, Error>,
) -> Result<T, Error> {
    let give_up = Instant::now() + patience;
    loop {
        match look().await? {
            Ok(found) => return Ok(found),
            Err(seen) if Instant::now() > give_up => {
                return Err(Error::Late { what: what.to_owned(), after: patience, seen });
            }
            Err(_) => tokio::time::sleep(STEP).await,
        }
    }
}
