//! Segments that were cut, flipped, or carried away: what is still read, what is called damage, what may be cut.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use outrider_format::entry::{EntryHead, Name, Provenance, encode_head, padded};
use outrider_format::footer::{Footer, FooterLine};
use outrider_format::inspect::inspect;
use outrider_format::scan::{Extent, read_entry, scan};
use outrider_format::segment::{
    self, HEADER_LEN, SegmentHeader, SegmentKind, SegmentNumber, node_hash,
};
use outrider_format::watermark::{self, Watermarks};
use outrider_proto::ids::{
    ChunkId, DomainId, FabricId, JobId, KeyEpoch, LayoutEpoch, NodeIncarnation, PgId, WriterId,
};
use outrider_proto::record::{CIPHER_AES_256_GCM, Codec, Header, Kind, Record};
use outrider_proto::seal::{DomainKeys, Key32, Sealer};
use proptest::prelude::*;

fn header() -> SegmentHeader {
    SegmentHeader {
        kind: SegmentKind::Data,
        fabric: FabricId::from_bytes([1; 16]),
        node: node_hash("s-서울"),
        number: SegmentNumber(7),
        created: NodeIncarnation(3),
    }
}

/// A record with fixed bytes: well formed and hashed, sealed by nobody.
fn record(n: u8, len: usize) -> Record {
    let payload = vec![n; len.max(16)];
    let header = Header {
        kind: Kind::Data,
        cipher: CIPHER_AES_256_GCM,
        codec: Codec::Stored,
        key_epoch: KeyEpoch(1),
        plain_len: (payload.len() - 16) as u32,
        clear_len: 0,
        payload_len: payload.len() as u32,
        id: ChunkId([n.max(1); 32]),
        domain: DomainId::from_bytes([2; 16]),
        writer: WriterId([3; 16]),
        nonce: [4; 12],
        payload_hash: *blake3::hash(&payload).as_bytes(),
    };
    let bytes = [header.encode().as_slice(), &payload].concat();
    Record::decode(Bytes::from(bytes)).expect("well formed")
}

fn provenance(pg: u16) -> Provenance {
    Provenance {
        layout_epoch: LayoutEpoch(5),
        incarnation: NodeIncarnation(3),
        job: JobId::from_bytes([6; 16]),
        pg: PgId(pg),
    }
}

/// A segment of records with these payload lengths, and where each entry begins.
fn build(lens: &[usize]) -> (Vec<u8>, Vec<FooterLine>) {
    let mut bytes = header().encode();
    let mut lines = Vec::new();
    for (n, len) in lens.iter().enumerate() {
        let record = record(n as u8 + 1, *len);
        let name = (n % 3 == 2).then(|| Name { space: 2, key: vec![n as u8; 20], fence: 9 });
        let head = encode_head(&provenance(n as u16), name.as_ref(), &record);
        let offset = bytes.len() as u64;
        let entry = head.len() + record.bytes().len();
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(record.bytes());
        bytes.resize((offset + padded(entry)) as usize, 0);
        let (id, pg) = (record.id(), PgId(n as u16));
        lines.push(FooterLine { id, offset, len: entry as u32, pg });
    }
    (bytes, lines)
}

fn all(bytes: &[u8], watermark: u64) -> (Vec<u64>, outrider_format::scan::ScanReport) {
    let mut found = Vec::new();
    let extent = Extent { len: bytes.len() as u64, watermark };
    let report = scan(bytes, extent, |f| found.push(f.offset)).expect("readable");
    (found, report)
}

#[test]
fn a_whole_segment_reads_back_with_names_and_provenance() {
    let (bytes, lines) = build(&[100, 5000, 16, 1 << 20, 33]);
    assert_eq!(SegmentHeader::decode(&bytes).expect("own header"), header());
    let mut seen = Vec::new();
    let extent = Extent { len: bytes.len() as u64, watermark: bytes.len() as u64 };
    let report = scan(bytes.as_slice(), extent, |f| seen.push((f.offset, f.head))).expect("read");
    assert_eq!((report.records, report.verified_len), (5, bytes.len() as u64));
    assert!(report.damage.is_empty());
    for ((offset, head), line) in seen.iter().zip(&lines) {
        assert_eq!((*offset, head.header.id), (line.offset, line.id));
        assert_eq!(head.provenance.pg, line.pg);
        let (_, record) = read_entry(bytes.as_slice(), line.offset, line.len).expect("good");
        assert_eq!(record.id(), line.id);
    }
    assert_eq!(seen[2].1.name, Some(Name { space: 2, key: vec![2; 20], fence: 9 }));
}

#[test]
fn damage_below_the_watermark_is_reported_and_the_scan_goes_on() {
    let (mut bytes, lines) = build(&[300, 300, 300, 300]);
    bytes[lines[1].offset as usize + 250] ^= 1;
    bytes[lines[2].offset as usize] ^= 1;
    let (found, report) = all(&bytes, bytes.len() as u64);
    assert_eq!(found, [lines[0].offset, lines[3].offset]);
    assert_eq!(report.damage.len(), 1, "neighbours are one range: {report:?}");
    assert_eq!(report.damage[0].offset, lines[1].offset);
    assert_eq!(report.damage[0].len, lines[3].offset - lines[1].offset);
    assert_eq!(report.verified_len, bytes.len() as u64, "nothing durable is cut");
}

#[test]
fn a_torn_tail_above_the_watermark_ends_the_segment() {
    let (bytes, lines) = build(&[300, 300, 300]);
    let torn = &bytes[..bytes.len() - 40];
    let (found, report) = all(torn, lines[1].offset);
    assert_eq!(found.len(), 2);
    assert_eq!(report.verified_len, lines[2].offset);
    assert!(report.damage.is_empty());
}

#[test]
fn a_file_shorter_than_its_watermark_is_damage() {
    let (bytes, lines) = build(&[300, 300]);
    let cut = &bytes[..lines[1].offset as usize];
    let (found, report) = all(cut, bytes.len() as u64);
    assert_eq!(found.len(), 1);
    assert_eq!(report.damage.len(), 1);
}

#[test]
fn the_newer_good_slot_of_the_watermarks_counts() {
    let one = Watermarks { generation: 8, lengths: BTreeMap::from([(SegmentNumber(1), 100)]) };
    let two = Watermarks { generation: 9, lengths: BTreeMap::from([(SegmentNumber(1), 200)]) };
    let mut file = vec![0; watermark::FILE_LEN];
    assert_eq!(Watermarks::decode(&file), None);
    for marks in [&one, &two] {
        let at = marks.slot_offset() as usize;
        file[at..at + watermark::SLOT_LEN].copy_from_slice(&marks.encode_slot());
    }
    assert_eq!(Watermarks::decode(&file), Some(two.clone()));
    file[two.slot_offset() as usize + 20] ^= 1;
    assert_eq!(Watermarks::decode(&file), Some(one), "a torn slot leaves the other");
}

#[test]
fn inspect_tells_sound_from_damaged() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut bytes, lines) = build(&[300, 300, 300]);
    let footer = Footer::new(lines.clone(), bytes.len() as u64);
    bytes.extend_from_slice(&footer.encode());
    let path = segment::path(dir.path(), SegmentNumber(7), true);
    std::fs::write(&path, &bytes).expect("written");
    let sound = inspect(&path).expect("a segment");
    assert!(sound.is_sound() && sound.scan.records == 3, "{sound}");
    bytes[lines[1].offset as usize + 240] ^= 1;
    std::fs::write(&path, &bytes).expect("written");
    let damaged = inspect(&path).expect("a segment");
    assert!(!damaged.is_sound() && damaged.scan.records == 2, "{damaged}");
    assert!(damaged.to_string().contains("DAMAGED"));
    std::fs::write(&path, b"no segment").expect("written");
    let error = inspect(&path).expect_err("refused").to_string();
    assert!(error.contains(&path.display().to_string()), "{error}");
}

#[test]
fn really_sealed_records_pass_through_unchanged() {
    let keys = DomainKeys {
        domain: DomainId::from_bytes([1; 16]),
        id_key: Key32([2; 32]),
        data_keys: BTreeMap::from([(KeyEpoch(1), Key32([3; 32]))]),
        current: KeyEpoch(1),
    };
    let sealer = Sealer::new(Arc::new(keys), WriterId([4; 16]));
    let plain = b"guest bytes".repeat(100);
    let sealed = sealer.seal(Kind::Data, sealer.chunk_id(&plain), &[], &plain).expect("sealed");
    let mut bytes = encode_head(&provenance(1), None, &sealed);
    bytes.extend_from_slice(sealed.bytes());
    let (_, read) = read_entry(bytes.as_slice(), 0, bytes.len() as u32).expect("good");
    assert_eq!(sealer.open(&read).expect("opens"), plain);
}

/// `tests/golden/segment-v1.hex`: a sealed segment of three records. A change of any byte needs a new version.
#[test]
fn golden_segment_never_changes() {
    let (mut bytes, lines) = build(&[20, 40, 60]);
    let footer = Footer::new(lines, bytes.len() as u64);
    bytes.extend_from_slice(&footer.encode());
    let marks = Watermarks { generation: 3, lengths: BTreeMap::from([(SegmentNumber(7), 640)]) };
    let hex = |bytes: &[u8]| {
        let lines: Vec<String> = bytes
            .chunks(32)
            .map(|line| line.iter().map(|b| format!("{b:02x}")).collect())
            .collect();
        lines.join("\n")
    };
    let now = format!("{}\n\n{}\n", hex(&bytes), hex(&marks.encode_slot()[..64]));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/segment-v1.hex");
    let golden = std::fs::read_to_string(path).unwrap_or_default();
    assert!(now == golden, "segment bytes changed: old segments could not be read.\n{now}");
}

proptest! {
    #[test]
    fn a_flipped_bit_costs_at_most_its_record(
        lens in prop::collection::vec(16usize..2000, 1..8), at in any::<prop::sample::Index>(), bit in 0u8..8,
    ) {
        let (good, lines) = build(&lens);
        let mut bytes = good.clone();
        let at = HEADER_LEN as usize + at.index(bytes.len() - HEADER_LEN as usize);
        bytes[at] ^= 1 << bit;
        let (found, report) = all(&bytes, bytes.len() as u64);
        let hit = lines.iter().rposition(|l| l.offset <= at as u64).expect("behind the header");
        let in_padding = at as u64 >= lines[hit].offset + u64::from(lines[hit].len);
        let expected: Vec<u64> = lines.iter().enumerate()
            .filter(|(i, _)| in_padding || *i != hit).map(|(_, l)| l.offset).collect();
        prop_assert_eq!(found, expected);
        prop_assert_eq!(report.damage.len(), usize::from(!in_padding));
        prop_assert_eq!(report.verified_len, bytes.len() as u64);
    }

    #[test]
    fn a_cut_file_keeps_every_record_before_the_cut(
        lens in prop::collection::vec(16usize..2000, 1..8), cut in any::<prop::sample::Index>(),
    ) {
        let (bytes, lines) = build(&lens);
        let cut = cut.index(bytes.len() + 1);
        let (found, report) = all(&bytes[..cut], 0);
        let whole = lines.iter().filter(|l| l.offset + u64::from(l.len) <= cut as u64).count();
        prop_assert_eq!(found.len(), whole);
        prop_assert!(report.damage.is_empty());
        prop_assert!(report.verified_len <= cut as u64);
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
        let _ = SegmentHeader::decode(&bytes);
        let _ = EntryHead::decode(&bytes);
        let _ = Watermarks::decode(&bytes);
        let _ = Footer::read(bytes.as_slice(), bytes.len() as u64);
        let _ = all(&bytes, bytes.len() as u64);
    }

    #[test]
    fn a_flipped_footer_is_refused(at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (bytes, lines) = build(&[20, 30, 40]);
        let footer = Footer::new(lines, bytes.len() as u64);
        let mut file = [bytes.clone(), footer.encode()].concat();
        let read = Footer::read(file.as_slice(), file.len() as u64).expect("own footer");
        prop_assert_eq!(read, footer);
        let at = bytes.len() + at.index(file.len() - bytes.len());
        file[at] ^= 1 << bit;
        prop_assert!(Footer::read(file.as_slice(), file.len() as u64).is_err());
    }
}
