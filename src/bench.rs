//! stub
use crate::cli::Done;
use crate::report::Failure;
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// p
    Pipeline,
}
pub(crate) async fn run(_o: Command, _json: bool) -> Done {
    Err(Failure::new("x"))
}
