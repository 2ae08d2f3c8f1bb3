//! A disk whose files the system does not let us open is attached by the system itself, and read through that (design
//! 4.1). Chosen disk by disk, at the first refusal.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use outrider_disk::{ByteRange, DiskError, DiskFormat, DiskInfo, DiskKind, RangeSet, ReadDisk};
use outrider_wmi::files::{Attached, HostFiles};
use uuid::Uuid;

use crate::source::{FrozenSource, open_chain};

/// What large reads suit when the system tells no block size.
const BLOCK: u32 = 2 << 20;

/// Opens a disk with its parents: by our own reader, else by the system.
pub(super) fn open(
    files: &Arc<dyn HostFiles>,
    path: &Path,
) -> Result<Box<dyn FrozenSource>, DiskError> {
    let refusal = match open_chain(files, path) {
        Err(e) if is_refusal(&e) => e,
        answer => return answer,
    };
    match files.attach(path) {
        Ok(Some(attached)) => {
            tracing::info!(
                disk = %path.display(), reason = %refusal,
                "a file of this disk cannot be opened; the disk is attached and read through the system"
            );
            Ok(Box::new(AttachedDisk::new(path, attached)))
        }
        Ok(None) => Err(refusal),
        Err(e) => {
            tracing::warn!(disk = %path.display(), error = %e, "the disk cannot be attached either");
            Err(refusal)
        }
    }
}

/// Whether somebody or something keeps us from a file that is there.
fn is_refusal(error: &DiskError) -> bool {
    let DiskError::Io { op: "open", source, .. } = error else { return false };
    matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ResourceBusy)
}

struct AttachedDisk {
    path: PathBuf,
    attached: Attached,
    info: DiskInfo,
}

impl AttachedDisk {
    fn new(path: &Path, attached: Attached) -> Self {
        let facts = &attached.facts;
        let info = DiskInfo {
            size: facts.size,
            logical_sector: facts.logical_sector,
            physical_sector: facts.physical_sector,
            block_size: if facts.block_size == 0 { BLOCK } else { facts.block_size },
            kind: if facts.fixed { DiskKind::Fixed } else { DiskKind::Dynamic },
            format: if facts.vhdx { DiskFormat::Vhdx } else { DiskFormat::Vhd },
            disk_id: Uuid::from_bytes_le(facts.disk_id),
            data_write_guid: Uuid::nil(),
        };
        Self { path: path.to_owned(), attached, info }
    }

    fn failed(&self, source: io::Error) -> DiskError {
        DiskError::Io { path: self.path.clone(), op: "read", source }
    }
}

impl ReadDisk for AttachedDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.info.size) {
            return Err(DiskError::OutOfBounds {
                path: self.path.clone(),
                offset,
                len: buf.len() as u64,
                size: self.info.size,
            });
        }
        let mut done = 0;
        while done < buf.len() {
            match self.attached.bytes.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => return Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        Ok(())
    }

    /// The system does not tell what is allocated: all of it may be. Zeros are noticed when they are read.
    fn allocated(&self) -> Result<RangeSet, DiskError> {
        Ok([ByteRange::new(0, self.info.size)].into_iter().collect())
    }
}

impl FrozenSource for AttachedDisk {
    fn files(&self) -> Vec<PathBuf> {
        vec![self.path.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrider_wmi::files::{DiskFacts, HostFile};

    /// A host that opens nothing, and may attach.
    struct Refusing {
        kind: io::ErrorKind,
        attaches: bool,
    }

    struct Bytes(Vec<u8>);

    impl HostFile for Bytes {
        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            let from = self.0.get(offset as usize..).unwrap_or_default();
            // Short reads are allowed.
            let n = from.len().min(buf.len()).min(1000);
            buf[..n].copy_from_slice(&from[..n]);
            Ok(n)
        }
        fn len(&self) -> io::Result<u64> {
            Ok(self.0.len() as u64)
        }
    }

    impl HostFiles for Refusing {
        fn open_read(&self, _path: &Path) -> io::Result<Arc<dyn HostFile>> {
            Err(self.kind.into())
        }
        fn attach(&self, _path: &Path) -> io::Result<Option<Attached>> {
            let facts = DiskFacts {
                size: 8192,
                block_size: 0,
                logical_sector: 512,
                physical_sector: 4096,
                disk_id: [7; 16],
                fixed: true,
                vhdx: true,
            };
            let bytes = Arc::new(Bytes((0..8192).map(|i| (i / 3) as u8).collect()));
            Ok(self.attaches.then_some(Attached { bytes, facts }))
        }
    }

    fn opened(kind: io::ErrorKind, attaches: bool) -> Result<Box<dyn FrozenSource>, DiskError> {
        let files: Arc<dyn HostFiles> = Arc::new(Refusing { kind, attaches });
        open(&files, Path::new("leaf.avhdx"))
    }

    #[test]
    fn a_refused_disk_is_attached_and_read_whole() {
        for kind in [io::ErrorKind::ResourceBusy, io::ErrorKind::PermissionDenied] {
            let disk = opened(kind, true).expect("attached");
            assert_eq!((disk.info().size, disk.info().kind), (8192, DiskKind::Fixed));
            assert_eq!(disk.allocated().expect("all").total_len(), 8192);
            let mut buf = vec![0; 5000];
            disk.read_at(3000, &mut buf).expect("read");
            assert!(buf.iter().zip(3000..).all(|(b, i)| *b == (i / 3) as u8));
            assert!(disk.read_at(8000, &mut buf).is_err(), "beyond the end");
        }
    }

    #[test]
    fn what_is_not_there_is_not_attached_and_a_host_without_means_says_the_refusal() {
        assert!(opened(io::ErrorKind::NotFound, true).is_err());
        let refused = opened(io::ErrorKind::ResourceBusy, false).map(drop).expect_err("refused");
        assert!(is_refusal(&refused), "{refused}");
    }
}
