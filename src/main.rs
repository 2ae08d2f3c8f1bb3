//! The one binary of Outrider.
fn main() {}
