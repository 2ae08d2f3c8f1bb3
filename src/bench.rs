//! `outrider bench`: how fast this machine is, stage by stage.

mod network;
mod pipeline;
mod sample;
mod stages;
mod whole;

use clap::Subcommand;

use crate::cli::Done;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The backup pipeline: each stage alone, then the whole
    Pipeline(pipeline::Args),
}

pub(crate) async fn run(command: Command, json: bool) -> Done {
    let Command::Pipeline(args) = command;
    Box::pin(pipeline::run(args, json)).await
}
