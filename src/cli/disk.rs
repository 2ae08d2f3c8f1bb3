//! `outrider disk`: virtual disk files, without a fabric.

mod info;

use std::path::PathBuf;

use clap::Subcommand;

use super::Done;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// What a VHDX file is, and whether it can be read with all its parents
    Info {
        /// The file
        file: PathBuf,
    },
}

pub(super) fn run(command: Command, json: bool) -> Done {
    match command {
        Command::Info { file } => info::run(&file, json),
    }
}
