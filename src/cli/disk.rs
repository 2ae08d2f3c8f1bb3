//! `outrider disk`: virtual disk files, without a fabric.

mod create;
mod export;
mod info;
mod map;
mod opened;

use std::path::PathBuf;

use clap::Subcommand;

use super::Done;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// What a disk file is, and whether it can be read with all its parents
    Info {
        /// A VHDX, AVHDX, VHD, AVHD or raw file; it is only read
        file: PathBuf,
    },
    /// Which parts of a disk are stored, and in which file of its chain
    Map {
        /// A VHDX, AVHDX, VHD or AVHD file; it is only read
        file: PathBuf,
    },
    /// Write what the guest sees of a disk and its parents as a raw file with holes
    Export(export::Args),
    /// Make a new disk
    Create(create::Args),
}

pub(super) async fn run(command: Command, json: bool) -> Done {
    match command {
        Command::Info { file } => info::run(&file, json),
        Command::Map { file } => map::run(&file, json),
        Command::Export(args) => export::run(args, json).await,
        Command::Create(args) => create::run(&args, json),
    }
}
