//! The node agent: hypervisors, backup, restore.
