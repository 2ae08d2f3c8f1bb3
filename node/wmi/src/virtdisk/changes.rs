//! Asking for changed ranges portion by portion.

/// A changed range: offset and length in bytes.
pub type Range = (u64, u64);

/// An answer: the ranges of the portion that was looked at, and how long that portion is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Portion {
    /// What changed in it.
    pub ranges: Vec<Range>,
    /// How many bytes from the asked offset on were looked at.
    pub processed: u64,
}

/// Why the changes are not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangesError<E> {
    /// The question failed.
    #[error("{0}")]
    Asked(E),
    /// An answer that goes nowhere: the disk has to be read in full.
    #[error("no progress at offset {0}")]
    Stuck(u64),
}

/// Collects what `ask(offset, length)` tells for the whole of a disk of `size` bytes. Ranges are cut at the disk's end.
///
/// # Errors
/// [`ChangesError`].
pub fn collect<E>(
    size: u64,
    mut ask: impl FnMut(u64, u64) -> Result<Portion, E>,
) -> Result<Vec<Range>, ChangesError<E>> {
    let mut all = Vec::new();
    let mut offset = 0;
    while offset < size {
        let portion = ask(offset, size - offset).map_err(ChangesError::Asked)?;
        if portion.processed == 0 {
            return Err(ChangesError::Stuck(offset));
        }
        all.extend(
            portion
                .ranges
                .into_iter()
                .filter(|(start, _)| *start < size)
                .map(|(start, length)| (start, length.min(size - start))),
        );
        offset = offset.saturating_add(portion.processed);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portions_are_joined_cut_at_the_end_and_never_asked_for_for_ever() {
        let mut asked = Vec::new();
        let got = collect(1000, |offset, length| {
            asked.push((offset, length));
            Ok::<_, ()>(Portion {
                ranges: vec![(offset + 10, 20), (offset + 590, 900)],
                processed: 600,
            })
        });
        assert_eq!(got, Ok(vec![(10, 20), (590, 410), (610, 20)]));
        assert_eq!(asked, [(0, 1000), (600, 400)]);
        let stuck = collect(1000, |_, _| Ok::<_, ()>(Portion::default()));
        assert_eq!(stuck, Err(ChangesError::Stuck(0)));
        assert_eq!(collect(5, |_, _| Err("no")), Err(ChangesError::Asked("no")));
        assert_eq!(collect(0, |_, _| Err("never asked")), Ok(vec![]));
    }
}
