//! What happens to a storage node's files while the node is down: a power cut, or rot.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use outrider_format::scan::{Extent, scan};
use outrider_format::segment::{self, HEADER_LEN, SegmentHeader, SegmentKind};
use outrider_format::watermark::{self, Watermarks};

/// All segment files below a node's folder, with their headers.
#[must_use]
pub fn segments(folder: &Path) -> Vec<(PathBuf, SegmentHeader)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if segment::parse_name(&path).is_some() {
                let mut head = vec![0; HEADER_LEN as usize];
                let read = File::open(&path).and_then(|f| f.read_exact_at(&mut head, 0));
                // A file that is just being made has no header yet.
                if let (Ok(()), Ok(header)) = (read, SegmentHeader::decode(&head)) {
                    found.push((path, header));
                }
            }
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// Where the records of a segment lie: offset and length. `None` when a running node has just sealed, that is renamed, it.
fn records(path: &Path) -> Option<Vec<(u64, u64)>> {
    let file = File::open(path).ok()?;
    let len = file.metadata().expect("a file").len();
    let mut found = Vec::new();
    let extent = Extent { len, watermark: 0 };
    scan(&file, extent, |record| found.push((record.offset, record.head.padded_len())))
        .expect("readable");
    Some(found)
}

/// How many records of a kind a node has written. The node may be running.
#[must_use]
pub fn count(folder: &Path, kind: SegmentKind) -> usize {
    loop {
        let of_kind = segments(folder).into_iter().filter(|(_, header)| header.kind == kind);
        let counted: Option<Vec<usize>> =
            of_kind.map(|(path, _)| records(&path).map(|r| r.len())).collect();
        if let Some(counted) = counted {
            return counted.into_iter().sum();
        }
    }
}

/// A power cut in its worst form: all that was not known to be durable is gone. Gives the bytes lost.
pub fn power_cut(folder: &Path) -> u64 {
    let mut lost = 0;
    for (path, header) in segments(folder) {
        if segment::parse_name(&path).is_none_or(|(_, sealed)| sealed) {
            continue;
        }
        let beside = path.with_file_name(watermark::FILE_NAME);
        let marks = std::fs::read(beside).ok().and_then(|bytes| Watermarks::decode(&bytes));
        let known = marks.and_then(|m| m.lengths.get(&header.number).copied());
        let durable = known.unwrap_or(HEADER_LEN);
        let len = std::fs::metadata(&path).expect("a file").len();
        if len > durable {
            lost += len - durable;
            let file = OpenOptions::new().write(true).open(&path).expect("writable");
            file.set_len(durable).expect("cut");
        }
    }
    lost
}

/// Flips a byte in the middle of every data record; gives how many records were ruined.
pub fn ruin_data(folder: &Path) -> usize {
    let mut ruined = 0;
    for (path, _) in segments(folder).iter().filter(|(_, h)| h.kind == SegmentKind::Data) {
        let file = OpenOptions::new().read(true).write(true).open(path).expect("writable");
        for (offset, len) in records(path).expect("the node is down") {
            let at = offset + len / 2;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("readable");
            file.write_all_at(&[byte[0] ^ 0x40], at).expect("writable");
            ruined += 1;
        }
    }
    ruined
}
