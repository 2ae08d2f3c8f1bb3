//! Leaving with the parent.
//!
//! The parent holds the write end of our standard input. However it ends, SIGKILL included, the system closes that end,
//! and we read the end of the file. No process id is compared, so none can be mistaken for another.

use std::io::Read;
use std::process;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// An orderly end that takes longer than this is no longer waited for: nobody is left who could see it.
const GRACE: Duration = Duration::from_secs(10);

/// Cancels `token` when standard input closes, and ends the process if it has not ended by itself soon after.
pub(super) fn leave_with_parent(token: CancellationToken) {
    // A thread of its own: tokio's stdin would hold up the runtime's end.
    let watch = move || {
        let mut bytes = [0; 64];
        while std::io::stdin().read(&mut bytes).is_ok_and(|n| n > 0) {}
        tracing::info!("the parent is gone; leaving");
        token.cancel();
        std::thread::sleep(GRACE);
        process::exit(1);
    };
    if let Err(error) = std::thread::Builder::new().name("parent-watch".into()).spawn(watch) {
        tracing::warn!(%error, "cannot watch the parent; this process may outlive it");
    }
}
