//! Which reader a file needs.

use std::path::Path;

use crate::block_file::ByteSource;
use crate::error::FormatError;
use crate::vhd::{self, Placed};
use crate::{DiskChain, DiskError, DiskFormat, RawDisk, ReadDisk, vhdx};

/// Opens any virtual disk that we can read, with all its parents.
///
/// The names `.raw` and `.img` declare a raw image, whatever its first bytes are: those belong to the
/// guest, which must not be able to turn its disk into one that names other files as its parents.
/// The names `.vhd` and `.avhd`, `.vhdx` and `.avhdx` ask for that format, for the same reason: a
/// fixed VHD, too, begins with the guest's bytes. Any other name is no promise, and a file that could be
/// two things is refused.
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

/// The format of a file that is VHDX or VHD.
pub(crate) fn format_of(path: &Path, source: &dyn ByteSource) -> Result<DiskFormat, DiskError> {
    let len = source.size().map_err(DiskError::io(path, "get the length of"))?;
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let named = |names: [&str; 2]| names.iter().any(|name| extension.eq_ignore_ascii_case(name));
    if extension.eq_ignore_ascii_case("vhds") {
        let detail = "is a VHD set, a disk shared by guest clusters: it holds no data, its disks are the .avhdx files \
                      beside it, whose order only Hyper-V knows. Back up such disks from inside the guests";
        return Err(FormatError::unsupported("kind", detail).in_file(path));
    }
    let refuse = |found: String| Err(DiskError::NotAVirtualDisk { path: path.to_owned(), found });
    let is_vhdx = starts_with(path, source, len, vhdx::SIGNATURE)?;
    if named(["vhdx", "avhdx"]) {
        return match is_vhdx {
            true => Ok(DiskFormat::Vhdx),
            false if vhd::find_footer(path, source, len)?.is_some() => refuse(
                "a VHD with the name of a VHDX (rename it to .vhd, a checkpoint to .avhd)".into(),
            ),
            false => refuse(describe(source, len)),
        };
    }
    let footer = vhd::find_footer(path, source, len)?;
    let is_fixed = footer.as_ref().is_some_and(Placed::is_fixed);
    match (footer.is_some(), is_vhdx) {
        (true, _) if named(["vhd", "avhd"]) => Ok(DiskFormat::Vhd),
        (false, true) if named(["vhd", "avhd"]) => refuse(
            "a VHDX with the name of a VHD (rename it to .vhdx, a checkpoint to .avhdx)".into(),
        ),
        // The start of a fixed VHD, and the end of a VHDX, are the guest's.
        (true, true) if is_fixed => refuse(
            "what may be a VHDX or a fixed VHD (name it .vhdx or .vhd, whichever it is)".into(),
        ),
        (_, true) => Ok(DiskFormat::Vhdx),
        (true, false) => Ok(DiskFormat::Vhd),
        (false, false) if named(["vhd", "avhd"]) && len > 0 => refuse(format!(
            "{}, without the footer that a VHD ends with; it may be cut off",
            describe(source, len)
        )),
        (false, false) => refuse(describe(source, len)),
    }
}

fn starts_with(
    path: &Path,
    source: &dyn ByteSource,
    len: u64,
    magic: &[u8; 8],
) -> Result<bool, DiskError> {
    let mut start = [0; 8];
    if len < 8 {
        return Ok(false);
    }
    source.read_exact_at(0, &mut start).map_err(DiskError::io(path, "read"))?;
    Ok(&start == magic)
}

/// Says what a file that is neither VHDX nor VHD looks like.
pub(crate) fn describe(source: &dyn ByteSource, len: u64) -> String {
    if len == 0 {
        return "an empty file".to_owned();
    }
    let mut start = vec![0; len.min(512) as usize];
    if source.read_exact_at(0, &mut start).is_err() {
        return "a file whose start cannot be read".to_owned();
    }
    if start.starts_with(b"conectix") {
        return "the start of a VHD whose footers are both damaged".to_owned();
    }
    if start.starts_with(vhdx::SIGNATURE) {
        return "a VHDX".to_owned();
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
    if starts_with(path, source, len, vhdx::SIGNATURE)? {
        return Ok(());
    }
    Err(DiskError::NotAVirtualDisk { path: path.to_owned(), found: describe(source, len) })
}
