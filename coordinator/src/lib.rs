//! The coordinator: Raft, the replicated state, follow, leases, commit, API.
