//! The answer that says how far a disk's changes are tracked.
//!
//! Its C structure ends with an array of one character that stands for a text of any length: read as the structure it is
//! declared as, the id is cut to its first character.

/// What the system tells about a disk's change tracking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tracking {
    /// Whether changes are tracked.
    pub enabled: bool,
    /// Whether there are changes after the most recent id.
    pub newer_changes: bool,
    /// The most recent change tracking id; empty when there is none.
    pub most_recent_id: String,
}

/// Longest id, in characters, its end included.
pub const MAX_ID: usize = 256;
/// Where the union begins in the answer: after a version of four bytes, aligned to eight.
const UNION: usize = 8;

/// Reads the answer of `GetVirtualDiskInformation` for the change tracking state. `used` bytes of it are valid.
#[must_use]
pub fn parse(answer: &[u8], used: usize) -> Option<Tracking> {
    let answer = answer.get(UNION..used.min(answer.len()))?;
    let flag = |at: usize| Some(u32::from_le_bytes(answer.get(at..at + 4)?.try_into().ok()?) != 0);
    let units: Vec<u16> = answer
        .get(8..)
        .unwrap_or_default()
        .chunks_exact(2)
        .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
        .take(MAX_ID)
        .take_while(|unit| *unit != 0)
        .collect();
    Some(Tracking {
        enabled: flag(0)?,
        newer_changes: flag(4)?,
        most_recent_id: String::from_utf16(&units).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_id_is_read_and_a_short_answer_is_none() {
        let id = "rctX:8f6ab0b4:0000:0000:0001";
        let mut answer = vec![0; UNION];
        answer.extend(1_u32.to_le_bytes());
        answer.extend(0_u32.to_le_bytes());
        answer.extend(id.encode_utf16().chain([0]).flat_map(u16::to_le_bytes));
        let used = answer.len();
        answer.extend([0xaa; 100]);
        let read = parse(&answer, used).expect("an answer");
        assert_eq!(
            read,
            Tracking { enabled: true, newer_changes: false, most_recent_id: id.into() }
        );
        assert_eq!(parse(&answer, UNION + 8).expect("no id").most_recent_id, "");
        assert_eq!(parse(&answer, UNION + 7), None);
        assert_eq!(parse(&answer, 3), None);
        assert!(parse(&answer, usize::MAX).is_some(), "a length that lies is no reason to read on");
    }
}
