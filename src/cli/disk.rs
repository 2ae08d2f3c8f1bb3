//! `outrider disk`: virtual disk files, without a fabric.

mod create;
mod export;
mod guest;
mod info;
mod map;
mod opened;

use std::ffi::OsString;
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
    /// The volumes of a disk, or the files of one: NTFS, FAT, ext2/3/4 on MBR, GPT or the bare disk
    Ls {
        /// The disk: VHDX, VHD, or a raw image named .raw or .img
        file: PathBuf,
        /// A directory or file on the volume
        path: Option<OsString>,
        #[command(flatten)]
        which: guest::Which,
    },
    /// The content of a file on a disk, to standard output
    Cat {
        /// The disk: VHDX, VHD, or a raw image named .raw or .img
        file: PathBuf,
        /// The file on the volume
        path: OsString,
        #[command(flatten)]
        which: guest::Which,
        /// A new file to write to instead
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

pub(super) async fn run(command: Command, json: bool) -> Done {
    match command {
        Command::Info { file } => info::run(&file, json),
        Command::Map { file } => map::run(&file, json),
        Command::Export(args) => export::run(args, json).await,
        Command::Create(args) => create::run(&args, json),
        Command::Ls { file, path, which } => guest::ls(&file, path.as_deref(), &which, json),
        Command::Cat { file, path, which, out } => guest::cat(&file, &path, &which, out, json),
    }
}
