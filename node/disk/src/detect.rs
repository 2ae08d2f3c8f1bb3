//! Which reader a file needs.

use std::path::Path;

use crate::block_file::ByteSource;
use crate::{DiskChain, DiskError, RawDisk, ReadDisk};

/// Opens any virtual disk that we can read, with all its parents.
///
/// The names `.raw` and `.img` declare a raw image, whatever its first bytes are: those belong to the
/// guest, which must not be able to turn its disk into one that names other files as its parents.
/// Everything else must carry the VHDX signature.
///
/// # Errors
/// [`DiskError::NotAVirtualDisk`], or what opening the format met.
pub fn open_disk(path: impl AsRef<Path>) -> Result<Box<dyn ReadDisk>, DiskError> {
    let path = path.as_ref();
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    if extension.eq_ignore_ascii_case("raw") || extension.eq_ignore_ascii_case("img") {
        return Ok(Box::new(RawDisk::open(path)?));
    }
    Ok(Box::new(DiskChain::open(path)?))
}

/// Says what a file that is not VHDX looks like.
pub(crate) fn describe(source: &dyn ByteSource, len: u64) -> String {
    if len == 0 {
        return "an empty file".to_owned();
    }
    let mut start = vec![0; len.min(512) as usize];
    if source.read_exact_at(0, &mut start).is_err() {
        return "a file whose start cannot be read".to_owned();
    }
    let mut end = [0; 8];
    let has_footer =
        len >= 512 && source.read_exact_at(len - 512, &mut end).is_ok() && &end == b"conectix";
    if has_footer || start.starts_with(b"conectix") {
        return "a VHD (the older format; convert it with Convert-VHD)".to_owned();
    }
    let known: [(&[u8], &str); 6] = [
        (b"QFI\xfb", "a QEMU qcow2 image"),
        (b"KDMV", "a VMware VMDK"),
        (b"# Disk DescriptorFile", "a VMware VMDK descriptor"),
        (b"<<< ", "a VirtualBox VDI"),
        (b"MZ", "a Windows program"),
        (b"vhds", "a VHD set"),
    ];
    if let Some((_, name)) = known.iter().find(|(magic, _)| start.starts_with(magic)) {
        return (*name).to_owned();
    }
    if start.iter().all(|b| *b == 0) {
        return format!("a file of {len} bytes that starts with zeros");
    }
    if start.get(510..512) == Some(&[0x55, 0xaa]) {
        return "what looks like a raw disk (a boot sector)".to_owned();
    }
    let shown = &start[..start.len().min(8)];
    format!("a file of {len} bytes that starts with {shown:02x?}")
}

/// Refuses a file without the VHDX signature.
pub(crate) fn require_vhdx(
    path: &Path,
    source: &dyn ByteSource,
    len: u64,
) -> Result<(), DiskError> {
    let mut magic = [0; 8];
    let is_vhdx = len >= 8 && {
        source.read_exact_at(0, &mut magic).map_err(DiskError::io(path, "read"))?;
        &magic == crate::vhdx::SIGNATURE
    };
    if is_vhdx {
        return Ok(());
    }
    Err(DiskError::NotAVirtualDisk { path: path.to_owned(), found: describe(source, len) })
}
