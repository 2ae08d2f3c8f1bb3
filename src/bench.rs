//! `outrider bench`: how fast this machine is, stage by stage.

mod disk;
mod memory;
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
    /// Virtual disks: reading through one, mapping the largest, reckoning with ranges
    Disk(disk::Args),
}

pub(crate) async fn run(command: Command, json: bool) -> Done {
    match command {
        Command::Pipeline(args) => Box::pin(pipeline::run(args, json)).await,
        Command::Disk(args) => disk::run(&args, json),
    }
}
