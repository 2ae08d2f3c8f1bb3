//! The `lab` transport: WMI requests over a socket to the simulated cluster.
