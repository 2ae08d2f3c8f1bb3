//! The generated gRPC messages, clients and servers (`proto/proto/*.proto`).
//!
//! Seen by the two ends of a call only; everything between speaks the checked twins of [`crate::model`].
#![allow(missing_docs, unreachable_pub, clippy::all, unused_qualifications)]

tonic::include_proto!("outrider.v1");
