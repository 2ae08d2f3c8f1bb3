//! Positional access with `pread` and `pwrite`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::RangeSet;

pub(super) fn read_exact_at(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    file.read_exact_at(buf, offset)
}

pub(super) fn write_all_at(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    file.write_all_at(bytes, offset)
}

/// Asks for data and holes in turn. The cursor that this moves is used by nobody else.
pub(super) fn data_ranges(file: &File, len: u64) -> io::Result<Option<RangeSet>> {
    let mut set = RangeSet::new();
    let mut at = 0;
    while at < len {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.max(start + 1);
        set.insert(start, end - start);
        at = end;
    }
    set.clamp(len);
    Ok(Some(set))
}
