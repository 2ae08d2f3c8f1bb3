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

impl TryFrom<u8> for ImageFormat {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        match number {
            0 => Ok(Self::Vhdx),
            1 => Ok(Self::Vhd),
            2 => Ok(Self::Raw),
            other => Err(format!("a disk image of the unknown format {other}: upgrade")),
        }
    }
}
