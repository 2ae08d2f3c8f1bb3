//! A disk file that a command looks at: refused in plain words when it is none.

use std::path::Path;

use outrider_disk::{DiskChain, RawDisk, ReadDisk};
use outrider_proto::error_code;

use crate::report::Failure;

/// An open disk; raw ones have no chain.
pub(super) enum Opened {
    Raw(RawDisk),
    Chain(Box<DiskChain>),
}

impl Opened {
    /// Opens a disk with its parents, read-only.
    pub(super) fn open(file: &Path) -> Result<Self, Failure> {
        refuse_what_is_no_file(file)?;
        let extension = file.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if ["raw", "img"].iter().any(|raw| extension.eq_ignore_ascii_case(raw)) {
            return Ok(Self::Raw(RawDisk::open(file)?));
        }
        Ok(Self::Chain(Box::new(DiskChain::open(file)?)))
    }

    pub(super) fn disk(&self) -> &dyn ReadDisk {
        match self {
            Self::Raw(disk) => disk,
            Self::Chain(chain) => &**chain,
        }
    }

    pub(super) fn chain(&self) -> Option<&DiskChain> {
        match self {
            Self::Raw(_) => None,
            Self::Chain(chain) => Some(chain),
        }
    }
}

fn refuse_what_is_no_file(file: &Path) -> Result<(), Failure> {
    let refused = |what: String| Failure::new(format!("{}: {what}", file.display()));
    match std::fs::metadata(file) {
        Ok(found) if found.is_dir() => Err(refused("this is a folder".into())
            .hint("Name a disk file: a .vhdx, .avhdx, .vhd, .avhd, .raw or .img.")),
        Ok(found) if found.len() == 0 && found.is_file() => {
            Err(refused("the file is empty".into())
                .hint("Whatever wrote it did not get further: copy or create the disk again.")
                .with_code(error_code::DISK_BROKEN.code))
        }
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            Err(refused("there is no such file".into()).hint("Check the path for typing errors."))
        }
        Err(e) => Err(Failure::from(e).during(format!("{} cannot be opened", file.display()))),
    }
}
