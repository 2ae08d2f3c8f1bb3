//! The signals that ask a process to leave.

use std::io;

/// Waits for SIGINT or SIGTERM (Ctrl-C where there are no signals) and returns its name.
///
/// Call it again during a slow shutdown: a second signal is heard, too.
///
/// # Errors
/// The signal handler cannot be installed; there is nothing to retry.
///
/// # Cancel safety
/// Safe: a dropped wait takes no signal with it.
pub async fn wait_for_shutdown() -> io::Result<&'static str> {
    platform::wait().await
}

#[cfg(unix)]
mod platform {
    use tokio::signal::unix::{SignalKind, signal};

    pub(super) async fn wait() -> std::io::Result<&'static str> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            _ = interrupt.recv() => Ok("SIGINT"),
            _ = terminate.recv() => Ok("SIGTERM"),
        }
    }
}

#[cfg(not(unix))]
mod platform {
    pub(super) async fn wait() -> std::io::Result<&'static str> {
        tokio::signal::ctrl_c().await?;
        Ok("Ctrl-C")
    }
}
