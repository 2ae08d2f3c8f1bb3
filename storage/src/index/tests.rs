//! One suite for every implementation.

use super::*;

fn id(n: u8) -> ChunkId {
    ChunkId([n; 32])
}

fn at(segment: u64, offset: u64) -> Location {
    Location { segment: SegmentNumber(segment), offset, len: 100 }
}

fn suite(index: &dyn ChunkIndex) {
    assert_eq!(index.get(&id(1)), Ok(None));
    let entries = [(id(3), at(1, 64)), (id(1), at(1, 200)), (id(2), at(2, 64))];
    let marks = [(SegmentNumber(1), 400), (SegmentNumber(2), 200)];
    index.insert(&entries, &marks).expect("inserted");
    assert_eq!(index.get(&id(1)), Ok(Some(at(1, 200))));
    assert_eq!(index.count(), 3);
    assert_eq!(index.through().expect("read"), marks);
    assert_eq!(index.list(ChunkId::HOLE, id(255), 10), Ok(vec![id(1), id(2), id(3)]));
    assert_eq!(index.list(id(1), id(2), 10), Ok(vec![id(2)]), "after is exclusive, last is not");
    assert_eq!(index.list(id(1), id(255), 1), Ok(vec![id(2)]));
    assert_eq!(index.list(id(9), id(3), 1), Ok(vec![]));

    // A second copy wins, and a cut of the first place leaves it.
    index.insert(&[(id(1), at(2, 300))], &[(SegmentNumber(2), WHOLE)]).expect("inserted");
    assert_eq!(index.count(), 3);
    index.cut(SegmentNumber(1), 100, 400).expect("cut");
    assert_eq!(index.get(&id(1)), Ok(Some(at(2, 300))));
    index.cut(SegmentNumber(1), 64, 65).expect("cut");
    assert_eq!(index.get(&id(3)), Ok(None), "an entry that begins in the range is cut");
    assert_eq!(index.remove(&id(1), &at(1, 200)), Ok(false), "a copy elsewhere stays");
    assert_eq!(index.remove(&id(2), &at(2, 64)), Ok(true));
    assert_eq!((index.get(&id(2)), index.count()), (Ok(None), 1));
    assert_eq!(index.remove(&id(2), &at(2, 64)), Ok(false), "once");
    index.forget(SegmentNumber(2)).expect("forgotten");
    assert_eq!(index.count(), 0);
    assert_eq!(index.through().expect("read"), [(SegmentNumber(1), 400)]);
    index.flush().expect("flushed");
}

#[test]
fn memory_keeps_the_promises_of_an_index() {
    suite(&MemoryIndex::default());
}

#[test]
fn sled_keeps_the_promises_of_an_index() {
    let dir = tempfile::tempdir().expect("a directory");
    let db = sled::open(dir.path()).expect("opened");
    suite(&SledIndex::open(db.open_tree("chunks").expect("a tree")).expect("opened"));
}
