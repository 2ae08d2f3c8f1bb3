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

use cluster::record;

/// A disk that knows what was synced, and can lose the rest, run full, or fail to sync.
#[derive(Clone, Default)]
struct CrashDisk {
    synced: Arc<Mutex<HashMap<PathBuf, Vec<u8>>>>,
    syncs: Arc<AtomicU64>,
    full: Arc<AtomicBool>,
    fail_sync: Arc<AtomicBool>,
}

struct CrashFile {
    disk: CrashDisk,
    path: Arc<Mutex<PathBuf>>,
    inner: Box<dyn DiskFile>,
}

impl CrashDisk {
    /// What a power cut leaves: every file as it was at its last sync.
    fn crash(&self, dir: &Path) {
        for entry in std::fs::read_dir(dir).expect("a folder") {
            let path = entry.expect("an entry").path();
            match self.synced.lock().expect("no panic").get(&path) {
                Some(bytes) => std::fs::write(&path, bytes).expect("written"),
                None => std::fs::remove_file(&path).expect("removed"),
            }
        }
    }
}

impl Disk for CrashDisk {
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let path_cell = Arc::new(Mutex::new(path.to_owned()));
        Ok(Box::new(CrashFile {
            disk: self.clone(),
            path: path_cell,
            inner: SystemDisk.open(path)?,
        }))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut synced = self.synced.lock().expect("no panic");
        if let Some(bytes) = synced.remove(from) {
            synced.insert(to.to_owned(), bytes);
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
        if self.disk.full.load(Ordering::SeqCst) {
            // A real disk takes a part of it first.
            let half = parts[0].len() / 2;
            self.inner.write_at(offset, &[&parts[0][..half]])?;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.inner.write_at(offset, parts)
    }
    fn sync(&mut self) -> io::Result<()> {
        if self.disk.fail_sync.load(Ordering::SeqCst) {
            return Err(io::Error::other("the medium does not answer"));
        }
        self.inner.sync()?;
        self.disk.syncs.fetch_add(1, Ordering::SeqCst);
        let path = self.path.lock().expect("no panic").clone();
        let bytes = std::fs::read(&path)?;
        self.disk.synced.lock().expect("no panic").insert(path, bytes);
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
        disk.fail_sync.store(true, Ordering::SeqCst);
        store.close();
        disk.fail_sync.store(false, Ordering::SeqCst);
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
    assert!(store.get_named(&named[0]).await.is_some());
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
    disk.fail_sync.store(true, Ordering::SeqCst);
    assert!(matches!(store.sync().await, Err(StoreError::Failed { .. })));
    disk.fail_sync.store(false, Ordering::SeqCst);
    assert!(matches!(store.sync().await, Err(StoreError::Failed { .. })), "it worked, as if");
    let more = store.append(vec![append(record(9))]).await;
    assert!(matches!(more, Err(StoreError::Failed { .. })));
    assert!(ids.iter().all(|id| !store.contains(id).expect("asked")));
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
