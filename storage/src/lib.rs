//! The storage node: segments, index, QUIC server, forwarding, receipts.
