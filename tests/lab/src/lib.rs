//! The simulated failover cluster: WMI class model, VMs with real VHDX files, RCT, migrations, faults and truth.
