//! The Wmi transport: one trait, with the lab's socket and Windows COM behind it.
