use proptest::prelude::*;

use super::*;

fn samples() -> Vec<Frame> {
    let (job, session) = (JobId::from_bytes([1; 16]), SessionId::from_bytes([2; 16]));
    let (window, layout_epoch) = (Window(3), LayoutEpoch(4));
    let ids = vec![ChunkId([5; 32]), ChunkId([6; 32])];
    let record = Bytes::from_static(b"record bytes");
    vec![
        Frame::Hello { version: 1, oldest: 1, role: 1 },
        Frame::Open { session, layout_epoch, ticket: record.clone() },
        Frame::Opened {
            fabric: FabricId::from_bytes([7; 16]),
            node: "s1".into(),
            incarnation: NodeIncarnation(8),
            layout_epoch,
        },
        Frame::Put { job, session, window, layout_epoch },
        Frame::Chunk { pg: PgId(9), sequence: 10, record: record.clone() },
        Frame::PutDone { taken: 11 },
        Frame::Have { job, session, window, layout_epoch, ids: ids.clone() },
        Frame::HaveAnswer { answers: vec![Presence::No, Presence::Yes, Presence::Unknown] },
        Frame::Get { ids: ids.clone() },
        Frame::Missing { id: ids[0] },
        Frame::Barrier {
            job,
            session,
            window,
            layout_epoch,
            pgs: vec![(PgId(1), 2), (PgId(3), 4)],
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into(),
        },
        Frame::Receipts { receipts: vec![record.clone(), Bytes::new()] },
        Frame::PutNamed { space: Space::Root, key: vec![1; 16], fence: 12, record: record.clone() },
        Frame::Named { receipt: record.clone() },
        Frame::ListNamed { space: Space::Journal, prefix: vec![2; 16] },
        Frame::NamedRecord { key: vec![3; 20], fence: 13, record },
        Frame::End,
        Frame::ListPg { pg: PgId(14), after: ChunkId::HOLE },
        Frame::PgIds { ids: ids.clone() },
        Frame::HaveLocal { ids },
        Frame::Refused { refusal: Refusal::Fenced, message: "a newer lease wrote here".into() },
    ]
}

/// What version 2 added.
fn samples_of_version_2() -> Vec<Frame> {
    vec![
        Frame::ListNames { space: Space::Root, after: vec![1; 16] },
        Frame::Names { names: vec![(vec![2; 16], 3), (vec![4; 20], 5)] },
    ]
}

fn wire(frame: &Frame) -> Vec<u8> {
    let (head, tail) = frame.encode();
    [head.as_ref(), tail.as_ref()].concat()
}

#[test]
fn every_frame_round_trips() {
    for frame in samples().into_iter().chain(samples_of_version_2()) {
        let bytes = wire(&frame);
        let len = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
        assert_eq!(len as usize, bytes.len() - 4, "{}", frame.name());
        let body = Bytes::from(bytes[4..].to_vec());
        assert_eq!(Frame::decode(&body).expect("decodes"), frame);
    }
}

#[test]
fn the_hello_is_frozen() {
    let bytes = wire(&Frame::Hello { version: 1, oldest: 1, role: 2 });
    assert_eq!(hex::encode(bytes), "1100000001010001000200000000000000000000 00".replace(' ', ""));
}

#[test]
fn a_length_beyond_the_cap_is_refused_before_anything_is_allocated() {
    assert!(Frame::check_len(u32::MAX).is_err());
    assert!(Frame::check_len(0).is_err());
    assert!(Frame::check_len(100).is_ok());
}

#[test]
fn golden_frames_never_change() {
    let now: Vec<_> = samples().iter().map(|f| (f.name().to_owned(), wire(f))).collect();
    crate::golden::compare("frames-v1.txt", &now);
}

#[test]
fn golden_frames_of_version_2_never_change() {
    let added: Vec<_> =
        samples_of_version_2().iter().map(|f| (f.name().to_owned(), wire(f))).collect();
    crate::golden::compare("frames-v2.txt", &added);
}

#[test]
fn the_common_version_is_the_highest_that_neither_side_left_behind() {
    assert_eq!(common_version(1, 1), Some(1), "an older peer");
    assert_eq!(common_version(2, 1), Some(2));
    assert_eq!(common_version(9, 2), Some(2), "a newer one that still understands us");
    assert_eq!(common_version(9, 3), None);
    assert_eq!(common_version(0, 0), None);
}

#[test]
fn more_names_than_a_page_holds_are_refused() {
    let names = vec![(vec![], 0); MAX_NAMES + 1];
    let bytes = wire(&Frame::Names { names });
    assert!(Frame::decode(&Bytes::from(bytes[4..].to_vec())).is_err());
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Frame::decode(&Bytes::from(bytes));
    }

    #[test]
    fn a_cut_frame_is_refused(index in 0usize..23, cut in 1usize..40) {
        let frame = samples().into_iter().chain(samples_of_version_2()).nth(index).expect("so many");
        let bytes = wire(&frame);
        if bytes.len() > 5 + cut
            && let Ok(other) = Frame::decode(&Bytes::from(bytes[4..bytes.len() - cut].to_vec()))
        {
            // Only frames that end in free bytes may decode, and never to the same value.
            prop_assert_ne!(other, frame);
        }
    }
}
