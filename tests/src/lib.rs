//! What crosses crates: end to end with real processes, and faults.
