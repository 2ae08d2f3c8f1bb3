//! The store alone: crashes, damage, full and failing disks.

mod cluster;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use outrider_format::entry::{Name, Provenance};
use outrider_proto::frame::Space;
use outrider_proto::ids::{ChunkId, FabricId, JobId, LayoutEpoch, NodeIncarnation, PgId};
use outrider_proto::record::Record;
use outrider_storage::segment::disk::{Disk, DiskFile, SystemDisk};
use outrider_storage::{Append, IndexKind, OpenError, Store, StoreConfig, StoreError};

use cluster::{record, rot};

/// A disk that knows what was synced, and can lose the rest, run full, or fail to sync.
#[derive(Clone, Default)]
struct CrashDisk {
    files: Arc<Mutex<HashMap<PathBuf, OnDisk>>>,
    syncs: Arc<AtomicU64>,
    full: Arc<AtomicBool>,
    /// What every sync fails with.
    fail_sync: Arc<Mutex<Option<io::ErrorKind>>>,
}

/// A file below the memory of the system. Processes that end change nothing about it.
#[derive(Default)]
struct OnDisk {
    synced: Option<Vec<u8>>,
    /// What the next sync writes. A sync that fails forgets it, as systems do: the bytes can still be read, and a second
    /// sync succeeds without them.
    dirty: Vec<(u64, usize)>,
}

struct CrashFile {
    disk: CrashDisk,
    path: PathBuf,
    inner: Box<dyn DiskFile>,
}

impl CrashDisk {
    /// What a power cut leaves: every file as it was at its last sync.
    fn crash(&self, dir: &Path) {
        let mut files = self.files.lock().expect("no panic");
        for entry in std::fs::read_dir(dir).expect("a folder") {
            let path = entry.expect("an entry").path();
            let file = files.entry(path.clone()).or_default();
            file.dirty.clear();
            match &file.synced {
                Some(bytes) => std::fs::write(&path, bytes).expect("written"),
                None => std::fs::remove_file(&path).expect("removed"),
            }
        }
    }

    fn fail_syncs(&self, with: Option<io::ErrorKind>) {
        *self.fail_sync.lock().expect("no panic") = with;
    }
}

impl Disk for CrashDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let inner = SystemDisk.open(path)?;
        Ok(Box::new(CrashFile { disk: self.clone(), path: path.to_owned(), inner }))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut files = self.files.lock().expect("no panic");
        if let Some(file) = files.remove(from) {
            files.insert(to.to_owned(), file);
        }
        SystemDisk.rename(from, to)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        SystemDisk.sync_dir(dir)
    }
    fn free_space(&self, _dir: &Path) -> io::Result<u64> {
        Ok(u64::MAX)
    }
}

impl DiskFile for CrashFile {
    fn write_at(&mut self, offset: u64, parts: &[&[u8]]) -> io::Result<()> {
        let mut files = self.disk.files.lock().expect("no panic");
        let len = parts.iter().map(|p| p.len()).sum();
        files.entry(self.path.clone()).or_default().dirty.push((offset, len));
        if self.disk.full.load(Ordering::SeqCst) {
            // A real disk takes a part of it first.
            let half = parts[0].len() / 2;
            self.inner.write_at(offset, &[&parts[0][..half]])?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.inner.write_at(offset, parts)
    }
    fn sync(&mut self) -> io::Result<()> {
        let mut files = self.disk.files.lock().expect("no panic");
        let file = files.entry(self.path.clone()).or_default();
        let dirty = std::mem::take(&mut file.dirty);
        if let Some(kind) = *self.disk.fail_sync.lock().expect("no panic") {
            return Err(io::Error::new(kind, "the medium did not take it"));
        }
        self.inner.sync()?;
        self.disk.syncs.fetch_add(1, Ordering::SeqCst);
        let now = std::fs::read(&self.path)?;
        let synced = file.synced.get_or_insert_default();
        synced.resize(now.len(), 0);
        for (offset, len) in dirty {
            let from = usize::try_from(offset).expect("small").min(now.len());
            let to = (from + len).min(now.len());
            synced[from..to].copy_from_slice(&now[from..to]);
        }
        Ok(())
    }
    fn set_len(&mut self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }
}

fn config(index: IndexKind) -> StoreConfig {
    StoreConfig {
        segment_size: 64 << 10,
        min_free: 0,
        index,
        ..StoreConfig::new(FabricId::from_bytes([7; 16]), "s1")
    }
}

fn append(record: Record) -> Append {
    let provenance = Provenance {
        layout_epoch: LayoutEpoch(1),
        incarnation: NodeIncarnation(1),
        job: JobId::from_bytes([1; 16]),
        pg: PgId(0),
    };
    Append { provenance, record }
}

async fn put(store: &Store, numbers: std::ops::Range<u32>) -> Vec<ChunkId> {
    let records: Vec<_> = numbers.map(record).collect();
    let ids = records.iter().map(Record::id).collect();
    store.append(records.into_iter().map(append).collect()).await.expect("taken");
    ids
}

fn all_there(store: &Store, ids: &[ChunkId]) -> bool {
    ids.iter().all(|id| store.contains(id).expect("asked"))
}

#[tokio::test]
async fn an_id_is_known_only_after_its_bytes_are_synced_and_a_crash_takes_only_the_rest() {
    for index in [IndexKind::Sled, IndexKind::Memory] {
        let dir = tempfile::tempdir().expect("a directory");
        let disk = CrashDisk::default();
        let open = || Store::open_on(dir.path(), config(index), Arc::new(disk.clone()));
        let store = open().expect("opened");
        let first = put(&store, 0..20).await;
        let before = disk.syncs.load(Ordering::SeqCst);
        assert!(!store.contains(&first[19]).expect("asked"), "known before it is durable");
        store.sync().await.expect("synced");
        assert!(disk.syncs.load(Ordering::SeqCst) > before, "no sync, no promise");
        assert!(all_there(&store, &first));
        let second = put(&store, 20..21).await;
        // The thread would sync at the end; a power cut does not wait for that.
        disk.fail_syncs(Some(io::ErrorKind::Other));
        store.close();
        disk.fail_syncs(None);
        disk.crash(&dir.path().join("segments"));
        let store = open().expect("recovered");
        assert!(all_there(&store, &first), "{index:?}");
        assert!(second.iter().all(|id| !store.contains(id).expect("asked")), "claimed, but gone");
        assert_eq!(store.status().damaged, 0);
        for id in &first {
            assert!(store.get(*id).await.expect("asked").is_some());
        }
        put(&store, 20..21).await;
        store.sync().await.expect("synced");
        assert!(all_there(&store, &second));
    }
}

/// Its receipts of before would speak of what is not there any more.
#[test]
fn a_folder_that_was_emptied_or_set_back_is_another_incarnation() {
    let dir = tempfile::tempdir().expect("a directory");
    let folder = dir.path().join("store");
    let file = folder.join("incarnation");
    let open = || Store::open(&folder, config(IndexKind::Memory)).expect("opened").incarnation();
    let first = open();
    let snapshot = std::fs::read(&file).expect("written");
    let second = open();
    let later = || {
        let mut now = std::time::SystemTime::now();
        let reached = std::time::UNIX_EPOCH + std::time::Duration::from_millis(second.0 + 1);
        while now < reached {
            std::thread::yield_now();
            now = std::time::SystemTime::now();
        }
    };
    later();
    std::fs::remove_dir_all(&folder).expect("emptied");
    let emptied = open();
    assert!(first < second && second < emptied, "{first:?} {second:?} {emptied:?}");
    std::fs::write(&file, snapshot).expect("set back");
    let set_back = open();
    assert!(set_back > second, "{set_back:?}");
    // Starts in one millisecond, or with a clock that goes wrong.
    let ahead = u64::MAX / 2;
    std::fs::write(&file, ahead.to_string()).expect("written");
    assert_eq!(open().0, ahead + 1);
}

#[tokio::test]
async fn a_lost_index_is_rebuilt_with_the_same_answers_and_incarnations_grow() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Store::open(dir.path(), config(IndexKind::Sled)).expect("opened");
    let ids = put(&store, 0..60).await;
    let name = Name { space: Space::Journal as u8, key: vec![5; 20], fence: 3 };
    store.put_named(name.clone(), append(record(1)).provenance, journal()).await.expect("kept");
    store.sync().await.expect("synced");
    let (incarnation, status) = (store.incarnation(), store.status());
    assert!(status.segments > 3, "several were sealed: {status:?}");
    store.close();
    std::fs::remove_dir_all(dir.path().join("tables")).expect("removed");
    let store = Store::open(dir.path(), config(IndexKind::Sled)).expect("rebuilt");
    assert!(store.incarnation() > incarnation, "grows with each start");
    assert!(all_there(&store, &ids));
    assert_eq!(store.status().chunks, 60);
    let named = store.list_named(Space::Journal, &[5; 16]).expect("listed");
    assert_eq!((named.len(), named[0].fence), (1, 3));
    assert!(store.get_named(Space::Journal, &named[0]).await.is_some());
    let stale = Name { fence: 2, ..name };
    let refused = store.put_named(stale, append(record(1)).provenance, journal()).await;
    assert_eq!(refused, Err(StoreError::Fenced { seen: 3, given: 2 }), "fences survive, too");
}

fn journal() -> Record {
    use outrider_proto::ids::{CheckpointId, LeaseEpoch};
    use outrider_proto::journal::{JournalClear, JournalEntry};
    let clear = JournalClear {
        sequence: 1,
        job: JobId::from_bytes([5; 16]),
        checkpoint: CheckpointId::from_bytes([6; 16]),
        lease_epoch: LeaseEpoch(3),
    };
    JournalEntry::Leaves(vec![]).seal(&cluster::sealer(), &clear).expect("sealed")
}

fn newest(dir: &Path, extension: &str) -> PathBuf {
    let mut files: Vec<_> = std::fs::read_dir(dir.join("segments"))
        .expect("a folder")
        .map(|e| e.expect("an entry").path())
        .filter(|p| p.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    files.pop().expect("there is one")
}

#[tokio::test]
async fn a_torn_tail_is_cut_and_damage_below_the_watermark_is_reported() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Store::open(dir.path(), config(IndexKind::Sled)).expect("opened");
    let ids = put(&store, 0..4).await;
    store.sync().await.expect("synced");
    store.close();
    let path = newest(dir.path(), "open");
    let whole = std::fs::read(&path).expect("read");
    std::fs::write(&path, [whole.as_slice(), b"OSR1 torn"].concat()).expect("written");
    let store = Store::open(dir.path(), config(IndexKind::Sled)).expect("opened");
    assert_eq!(store.status().damaged, 0);
    store.close();
    assert_eq!(std::fs::metadata(&path).expect("there").len(), whole.len() as u64);

    let mut bytes = whole.clone();
    bytes[400] ^= 1;
    std::fs::write(&path, &bytes).expect("written");
    let store = Store::open(dir.path(), config(IndexKind::Sled)).expect("opened");
    assert_eq!(store.status().damaged, 1);
    assert!(!store.contains(&ids[0]).expect("asked"), "damaged bytes are not answered with yes");
    assert!(all_there(&store, &ids[1..]));
    put(&store, 0..1).await;
    store.sync().await.expect("synced");
    assert!(store.get(ids[0]).await.expect("asked").is_some(), "sent again, it is there again");
    store.close();
    assert!(std::fs::metadata(&path).expect("there").len() >= whole.len() as u64, "never cut");
}

#[tokio::test]
async fn a_full_disk_is_a_refusal_and_costs_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = CrashDisk::default();
    let store = Store::open_on(dir.path(), config(IndexKind::Memory), Arc::new(disk.clone()));
    let store = store.expect("opened");
    let first = put(&store, 0..3).await;
    disk.full.store(true, Ordering::SeqCst);
    let refused = store.append(vec![append(record(3))]).await;
    assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
    disk.full.store(false, Ordering::SeqCst);
    let second = put(&store, 3..6).await;
    store.sync().await.expect("synced");
    assert!(all_there(&store, &first) && all_there(&store, &second));
    store.close();
    let store = Store::open(dir.path(), config(IndexKind::Memory)).expect("opened");
    assert!(all_there(&store, &first) && all_there(&store, &second));
    assert_eq!(store.status().damaged, 0);
}

#[tokio::test]
async fn a_failed_sync_is_never_tried_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = CrashDisk::default();
    let store = Store::open_on(dir.path(), config(IndexKind::Memory), Arc::new(disk.clone()));
    let store = store.expect("opened");
    let ids = put(&store, 0..3).await;
    disk.fail_syncs(Some(io::ErrorKind::Other));
    assert!(matches!(store.sync().await, Err(StoreError::Failed { .. })));
    disk.fail_syncs(None);
    assert!(matches!(store.sync().await, Err(StoreError::Failed { .. })), "it worked, as if");
    let more = store.append(vec![append(record(9))]).await;
    assert!(matches!(more, Err(StoreError::Failed { .. })));
    assert!(ids.iter().all(|id| !store.contains(id).expect("asked")));
}

/// Sealing syncs, too: what it could not bring to the disk is told once, by whatever error.
#[tokio::test]
async fn space_that_a_sync_lacks_is_a_failed_sync() {
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded] {
        // The first append makes a segment, the ninth seals one.
        for before in [0, 7] {
            let dir = tempfile::tempdir().expect("a directory");
            let disk = CrashDisk::default();
            let open =
                || Store::open_on(dir.path(), config(IndexKind::Memory), Arc::new(disk.clone()));
            let store = open().expect("opened");
            let ids = put(&store, 0..before).await;
            disk.fail_syncs(Some(kind));
            let refused = store.append(vec![append(record(9))]).await;
            assert!(matches!(refused, Err(StoreError::Failed { .. })), "{before}: {refused:?}");
            disk.fail_syncs(None);
            let synced = store.sync().await;
            assert!(matches!(synced, Err(StoreError::Failed { .. })), "it worked, as if");
            assert!(ids.iter().all(|id| !store.contains(id).expect("asked")));
        }
    }
}

/// The system forgets that it could not write bytes, but still shows them to whoever reads.
#[tokio::test]
async fn bytes_that_a_failed_sync_left_in_memory_are_on_the_disk_before_a_restart_answers_for_them()
{
    // With eight more records the failed sync is that of sealing: the footer can be read as well.
    for more in [3, 8] {
        let dir = tempfile::tempdir().expect("a directory");
        let disk = CrashDisk::default();
        let open = || Store::open_on(dir.path(), config(IndexKind::Memory), Arc::new(disk.clone()));
        let store = open().expect("opened");
        let mut ids = put(&store, 0..2).await;
        store.sync().await.expect("synced");
        disk.fail_syncs(Some(io::ErrorKind::Other));
        let records: Vec<_> = (2..2 + more).map(record).collect();
        ids.extend(records.iter().map(Record::id));
        let appended = store.append(records.into_iter().map(append).collect()).await;
        assert_eq!(appended.is_err(), more == 8, "{appended:?}");
        assert!(matches!(store.sync().await, Err(StoreError::Failed { .. })));
        store.close();
        disk.fail_syncs(None);

        let store = open().expect("started again");
        let claimed: Vec<_> =
            ids.into_iter().filter(|id| store.contains(id).expect("asked")).collect();
        assert!(claimed.len() > 2, "the test is about what was not synced before");
        store.close();
        disk.crash(&dir.path().join("segments"));
        let store = open().expect("started after a power cut");
        assert_eq!(store.status().damaged, 0, "{more}");
        for id in &claimed {
            assert!(store.get(*id).await.expect("asked").is_some(), "{more}: it was answered for");
        }
    }
}

#[tokio::test]
async fn without_watermarks_damage_costs_the_damaged_record_only() {
    for lose in [|p: &Path| std::fs::remove_file(p), |p: &Path| std::fs::write(p, [7; 8192])] {
        let dir = tempfile::tempdir().expect("a directory");
        let open = || Store::open(dir.path(), config(IndexKind::Sled)).expect("opened");
        let store = open();
        let ids = put(&store, 0..4).await;
        store.sync().await.expect("synced");
        store.close();
        let path = newest(dir.path(), "open");
        let mut bytes = std::fs::read(&path).expect("read");
        let whole = bytes.len();
        bytes[400] ^= 1;
        // Bytes that a crash left, not a multiple of eight: the next record must begin where one can.
        bytes.extend_from_slice(b"OSR1 torn");
        std::fs::write(&path, &bytes).expect("written");
        lose(&dir.path().join("segments/WATERMARKS")).expect("lost");

        let store = open();
        assert!(store.status().damaged > 0);
        assert!(!store.contains(&ids[0]).expect("asked"));
        assert!(all_there(&store, &ids[1..]), "they were durable");
        assert!(std::fs::metadata(&path).expect("there").len() >= whole as u64, "never cut");
        let more = put(&store, 4..6).await;
        store.sync().await.expect("synced");
        store.close();
        let store = open();
        assert!(all_there(&store, &ids[1..]) && all_there(&store, &more));
        for id in ids[1..].iter().chain(&more) {
            assert!(store.get(*id).await.expect("asked").is_some());
        }
    }
}

#[tokio::test]
async fn a_rotten_record_is_forgotten_counted_once_and_taken_in_again() {
    for index in [IndexKind::Sled, IndexKind::Memory] {
        let dir = tempfile::tempdir().expect("a directory");
        let open = || Store::open(dir.path(), config(index)).expect("opened");
        let store = open();
        let ids = put(&store, 0..20).await;
        store.sync().await.expect("synced");
        assert!(store.status().segments > 2, "the first ones are sealed");
        rot(dir.path(), &record(0));
        rot(dir.path(), &record(1));
        assert!(store.get(ids[0]).await.expect("asked").is_none());
        assert!(store.get(ids[0]).await.expect("asked").is_none());
        assert_eq!(store.status().damaged, 1, "once");
        assert_eq!(store.status().chunks, 19);
        assert!(!store.contains(&ids[0]).expect("asked"), "no answer for bytes that are not there");
        let listed = store.list(ChunkId::HOLE, ChunkId([255; 32]), 100).expect("listed");
        assert!(!listed.contains(&ids[0]) && listed.len() == 19);
        put(&store, 0..1).await;
        store.sync().await.expect("synced");
        assert!(store.get(ids[0]).await.expect("asked").is_some(), "{index:?}: sent again");
        // Found, and not sent again before the restart.
        assert!(store.get(ids[1]).await.expect("asked").is_none());
        store.close();

        let store = open();
        assert!(store.get(ids[0]).await.expect("asked").is_some(), "{index:?}: the good copy");
        // The footer of its segment still lists it: the first read tells.
        assert!(store.get(ids[1]).await.expect("asked").is_none());
        assert!(!store.contains(&ids[1]).expect("asked"));
        put(&store, 1..2).await;
        store.sync().await.expect("synced");
        for id in &ids {
            assert!(store.get(*id).await.expect("asked").is_some());
        }
    }
}

#[tokio::test]
async fn a_rotten_named_record_is_taken_in_again_and_its_fence_stays() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Store::open(dir.path(), config(IndexKind::Sled)).expect("opened");
    let provenance = append(record(1)).provenance;
    let name = Name { space: Space::Journal as u8, key: vec![5; 20], fence: 3 };
    let entry = journal();
    store.put_named(name.clone(), provenance, entry.clone()).await.expect("kept");
    rot(dir.path(), &entry);
    let find = || store.find_named(Space::Journal, &[5; 20]).expect("asked");
    let found = find().expect("not read yet");
    assert!(store.get_named(Space::Journal, &found).await.is_none());
    assert!(store.get_named(Space::Journal, &found).await.is_none());
    assert_eq!((find(), store.status().damaged), (None, 1));
    let stale = Name { fence: 2, ..name.clone() };
    let refused = store.put_named(stale, provenance, entry.clone()).await;
    assert_eq!(refused, Err(StoreError::Fenced { seen: 3, given: 2 }));
    store.put_named(name, provenance, entry).await.expect("kept again");
    let found = find().expect("there again");
    assert!(store.get_named(Space::Journal, &found).await.is_some());
}

#[tokio::test]
async fn names_are_listed_page_by_page_and_only_of_their_space() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Store::open(dir.path(), config(IndexKind::Memory)).expect("opened");
    let provenance = append(record(1)).provenance;
    for (space, keys) in [(Space::Root, 1..=2u8), (Space::Journal, 3..=7), (Space::State, 8..=9)] {
        for n in keys {
            let name = Name { space: space as u8, key: vec![n; 20], fence: u64::from(n) };
            store.put_named(name, provenance, journal()).await.expect("kept");
        }
    }
    let mut pages = Vec::new();
    let mut after = Vec::new();
    loop {
        let page = store.list_names(Space::Journal, &after, 2).expect("listed");
        let Some(last) = page.last() else { break };
        after = last.key.clone();
        pages.push(page.iter().map(|name| (name.key[0], name.fence)).collect::<Vec<_>>());
    }
    assert_eq!(pages, [vec![(3, 3), (4, 4)], vec![(5, 5), (6, 6)], vec![(7, 7)]]);
}

#[tokio::test]
async fn another_nodes_folder_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = Store::open(dir.path(), config(IndexKind::Memory)).expect("opened");
    let second = Store::open(dir.path(), config(IndexKind::Memory));
    assert!(matches!(second, Err(OpenError::Fs(_))), "two stores on one folder");
    put(&store, 0..1).await;
    store.close();
    let other = StoreConfig { node: "s2".into(), ..config(IndexKind::Memory) };
    assert!(matches!(Store::open(dir.path(), other), Err(OpenError::Foreign { .. })));
}
