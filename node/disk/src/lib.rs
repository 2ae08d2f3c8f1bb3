//! Virtual disks: VHDX, AVHDX chains and raw images, read and written by our own code.
