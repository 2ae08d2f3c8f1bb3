//! Formats of disk images.

/// The format that a disk's image had; its number in section 3 of a manifest never changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ImageFormat {
    /// VHDX, also where a manifest does not say.
    #[default]
    Vhdx = 0,
    /// VHD.
    Vhd = 1,
    /// The guest's bytes alone.
    Raw = 2,
}

/// A number that this release knows no format for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a disk image of the unknown format {0}: upgrade")]
pub struct UnknownFormat(pub u8);

impl TryFrom<u8> for ImageFormat {
    type Error = UnknownFormat;

    fn try_from(number: u8) -> Result<Self, UnknownFormat> {
        match number {
            0 => Ok(Self::Vhdx),
            1 => Ok(Self::Vhd),
            2 => Ok(Self::Raw),
            other => Err(UnknownFormat(other)),
        }
    }
}
