use super::*;

const GUID: Uuid = Uuid::from_u128(7);
const LEN: usize = 64 * LOG_SECTOR;

fn sector(fill: u8) -> Sector {
    Box::new([fill; LOG_SECTOR])
}

/// A log in which entries are put at will.
struct Ring(Vec<u8>);

impl Ring {
    fn new() -> Self {
        Self(vec![0; LEN])
    }

    /// Writes an entry at sector `at` whose tail is sector `tail`.
    fn put(&mut self, at: usize, sequence: u64, tail: usize, updates: &[(u64, Sector)]) {
        let position = (at * LOG_SECTOR) as u64;
        let mut entry = encode_entry(&LogCursor { guid: GUID, sequence, position }, updates, 99);
        put(&mut entry, 12, &((tail * LOG_SECTOR) as u32).to_le_bytes());
        self.write(at, entry);
    }

    /// Writes an entry with one zero descriptor.
    fn put_zeros(&mut self, at: usize, sequence: u64, tail: usize, offset: u64, length: u64) {
        let position = (tail * LOG_SECTOR) as u64;
        let mut entry = encode_entry(&LogCursor { guid: GUID, sequence, position }, &[], 99);
        put(&mut entry, 24, &1_u32.to_le_bytes());
        put(&mut entry, 64, b"zero");
        put(&mut entry, 72, &length.to_le_bytes());
        put(&mut entry, 80, &offset.to_le_bytes());
        put(&mut entry, 88, &sequence.to_le_bytes());
        self.write(at, entry);
    }

    fn write(&mut self, at: usize, mut entry: Vec<u8>) {
        let crc = checksum(&entry);
        put(&mut entry, 4, &crc.to_le_bytes());
        for (i, byte) in entry.iter().enumerate() {
            self.0[(at * LOG_SECTOR + i) % LEN] = *byte;
        }
    }

    /// The first byte of file sector `n` after replay over a file of 0xff.
    fn replayed(&self, n: u64) -> u8 {
        let mut byte = [0xff];
        let replay = replay(&self.0, GUID).expect("a valid sequence");
        replay.updates.apply(n * LOG_SECTOR as u64, &mut byte);
        byte[0]
    }
}

fn at(n: u64) -> u64 {
    n * LOG_SECTOR as u64
}

#[test]
fn a_sequence_is_replayed_from_its_tail_to_its_head() {
    let mut ring = Ring::new();
    ring.put(10, 5, 10, &[(at(0), sector(1))]);
    ring.put(12, 6, 12, &[(at(1), sector(2)), (at(2), sector(2))]);
    ring.put(15, 7, 12, &[(at(2), sector(3))]);
    assert_eq!(ring.replayed(0), 0xff, "what is before the tail is in its place already");
    assert_eq!([ring.replayed(1), ring.replayed(2)], [2, 3], "the later update counts");
}

#[test]
fn a_sequence_may_go_round_the_end_of_the_ring() {
    let mut ring = Ring::new();
    // Two sectors at the end, two at the start; the next entry follows.
    ring.put(62, 1, 62, &[(at(0), sector(1)), (at(1), sector(2)), (at(2), sector(3))]);
    ring.put(2, 2, 62, &[(at(3), sector(4))]);
    let seen: Vec<u8> = (0..4).map(|n| ring.replayed(n)).collect();
    assert_eq!(seen, [1, 2, 3, 4]);
}

#[test]
fn a_newer_sequence_without_its_tail_is_passed_over() {
    let mut ring = Ring::new();
    ring.put(0, 3, 0, &[(at(0), sector(1))]);
    ring.put(20, 9, 30, &[(at(0), sector(2))]);
    assert_eq!(ring.replayed(0), 1);
}

#[test]
fn a_torn_head_leaves_the_sequence_before_it() {
    let mut ring = Ring::new();
    ring.put(0, 3, 0, &[(at(0), sector(1))]);
    ring.put(2, 4, 0, &[(at(0), sector(2)), (at(1), sector(2))]);
    assert_eq!(ring.replayed(0), 2);
    ring.0[4 * LOG_SECTOR + 100] ^= 1;
    assert_eq!([ring.replayed(0), ring.replayed(1)], [1, 0xff]);
}

#[test]
fn zero_descriptors_make_zeros_until_a_later_update() {
    let mut ring = Ring::new();
    ring.put(0, 1, 0, &[(at(5), sector(9))]);
    ring.put_zeros(2, 2, 0, at(4), at(100));
    ring.put(3, 3, 0, &[(at(6), sector(8))]);
    let seen: Vec<u8> = (3..8).map(|n| ring.replayed(n)).collect();
    assert_eq!(seen, [0xff, 0, 0, 8, 0]);
}

#[test]
fn entries_of_another_session_do_not_count() {
    let mut ring = Ring::new();
    ring.put(0, 1, 0, &[(at(0), sector(1))]);
    assert!(replay(&ring.0, Uuid::from_u128(8)).is_err());
    assert!(replay(&vec![0; LEN], GUID).is_err());
}

#[test]
fn an_entry_without_updates_is_a_valid_sequence() {
    let mut ring = Ring::new();
    ring.put(0, 1, 0, &[]);
    assert_eq!(ring.replayed(0), 0xff);
}

#[test]
fn every_byte_of_a_sector_survives_the_log() {
    let mut ring = Ring::new();
    let mut content = sector(0);
    for (i, byte) in content.iter_mut().enumerate() {
        *byte = (i * 7 + i / 256) as u8;
    }
    ring.put(0, u64::MAX - 1, 0, &[(at(3), content.clone())]);
    let mut read = vec![0; LOG_SECTOR];
    replay(&ring.0, GUID).unwrap().updates.apply(at(3), &mut read);
    assert!(read == content[..]);
}

#[test]
fn overlapping_look_alikes_do_not_cost_more_than_a_few_passes() {
    let mut ring = Ring::new();
    for i in 0..64 {
        let cursor = LogCursor { guid: GUID, sequence: 1, position: 0 };
        let mut entry = encode_entry(&cursor, &[], 99);
        put(&mut entry, 8, &(LEN as u32).to_le_bytes());
        put(&mut ring.0, i * LOG_SECTOR, &entry);
    }
    let mut budget = 4 * LEN;
    let valid = (0..64).filter(|at| parse_entry(&ring.0, *at, GUID, &mut budget).is_some()).count();
    assert_eq!((valid, budget), (0, 0));
}

/// As in files that Hyper-V wrote: a session begins with an entry without updates, the tail lags behind
/// the head by some entries, and behind the head is what is left of an older session, whose numbers may be
/// higher.
#[test]
fn a_session_of_windows_is_replayed_without_what_an_older_one_left() {
    let mut ring = Ring::new();
    let first = 2_218_537_444_203_312_167;
    ring.put(0, first, 0, &[]);
    ring.put(1, first + 1, 1, &[(at(0), sector(1)), (at(1), sector(1))]);
    ring.put(4, first + 2, 1, &[(at(1), sector(2))]);
    ring.put(6, first + 3, 4, &[(at(2), sector(3))]);
    let older = LogCursor { guid: Uuid::from_u128(8), sequence: first + 4, position: 8 * 4096 };
    let left = encode_entry(&older, &[(at(0), sector(9)), (at(2), sector(9))], 99);
    ring.write(8, left);
    let seen: Vec<u8> = (0..3).map(|n| ring.replayed(n)).collect();
    assert_eq!(seen, [0xff, 2, 3], "from the head's tail, of this session only");
}
