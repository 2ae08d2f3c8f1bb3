//! Bytes of segments and records; no tokio, no sled.
