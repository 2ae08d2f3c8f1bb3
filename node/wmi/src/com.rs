//! The `com` transport: WMI of this very machine, through COM (Windows only).
//!
//! | file | idea |
//! | --- | --- |
//! | `cim` | values as COM carries them, and ours: pure, tested everywhere |
//! | `status` | what a COM status means for the caller: pure, tested everywhere |
//! | `path` | object paths with and without server and namespace: pure, tested everywhere |
//! | `variant` | VARIANT and SAFEARRAY |
//! | `session` | one namespace as one thread sees it: queries, objects, methods |
//! | `apartment` | threads that enter COM, run calls, and are replaced when a call never returns |
//! | `events` | a thread a subscription |
//! | `overflow` | when WMI loses events itself: pure, tested everywhere |
//!
//! No COM pointer ever leaves the thread that made it: calls travel to the threads as closures, answers come back as
//! [`Object`](crate::Object)s.

pub mod cim;
pub mod overflow;
pub mod path;
pub mod status;

#[cfg(windows)]
mod apartment;
#[cfg(windows)]
mod events;
#[cfg(windows)]
mod failure;
#[cfg(windows)]
mod proxy;
#[cfg(windows)]
mod session;
#[cfg(windows)]
mod variant;

#[cfg(windows)]
mod transport;
#[cfg(windows)]
pub use transport::ComWmi;
