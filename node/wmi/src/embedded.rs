//! Embedded instances in the text form of WMI (DTD 2.0), as `SnapshotSettings` and the like want them.
