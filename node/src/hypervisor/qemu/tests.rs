//! Against real QEMU processes that run no guest: what they write is told to them through a second monitor. And against a scripted
//! peer, for what a real one does not do on demand.

mod boot;
mod jobs;
mod real;
mod replace;
mod scripted;
mod still;
