//! What every long-running process shares: shutdown tree, TLS identity, telemetry, config, crash-safe files.
