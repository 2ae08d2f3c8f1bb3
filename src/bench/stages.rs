//! The stages that only compute, each on all workers with nothing else running, and the two that touch the disk.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outrider_format::entry::Provenance;
use outrider_proto::ids::{DomainId, FabricId, JobId, KeyEpoch, LayoutEpoch, PgId, WriterId};
use outrider_proto::record::{Kind, Record};
use outrider_proto::seal::{self, DomainKeys, Key32, Sealer};
use outrider_storage::{Append, Store, StoreConfig};

use super::sample::{CHUNK, Sample};
use crate::report::Failure;

/// Bytes of records that are appended at a time, as one put request carries.
const BATCH: usize = 4 << 20;

/// Keys of a domain that exists for this run only.
pub(super) fn sealer(fabric: FabricId, host: &str) -> Sealer {
    let key = || Key32(*outrider_process::secret::Secret::<32>::random().expose());
    let epoch = KeyEpoch(1);
    let keys = DomainKeys {
        domain: DomainId::random(),
        id_key: key(),
        data_keys: BTreeMap::from([(epoch, key())]),
        current: epoch,
    };
    Sealer::new(Arc::new(keys), WriterId::of(fabric, host))
}

/// Runs `work` over all chunks on `workers` threads; gives the time and the results in the chunks' order.
pub(super) fn on_all<'a, T: Send>(
    sample: &'a Sample,
    workers: usize,
    work: impl Fn(&'a [u8]) -> T + Sync,
) -> (Duration, Vec<T>) {
    let share = sample.chunks.len().div_ceil(workers).max(1);
    let began = Instant::now();
    let results = std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = sample
            .chunks
            .chunks(share)
            .map(|part| scope.spawn(move || part.iter().map(|c| work(c)).collect::<Vec<_>>()))
            .collect();
        threads
            .into_iter()
            .flat_map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    (began.elapsed(), results)
}

/// Is every chunk looked at for zeros?
pub(super) fn zero_detect(sample: &Sample, workers: usize) -> (Duration, usize) {
    let (took, zeros) = on_all(sample, workers, seal::is_zero);
    (took, zeros.into_iter().filter(|z| *z).count())
}

/// Keyed BLAKE3 of every chunk.
pub(super) fn hash(sample: &Sample, workers: usize, sealer: &Sealer) -> Duration {
    on_all(sample, workers, |chunk| sealer.chunk_id(chunk)).0
}

/// zstd; gives what is left of each chunk, `None` where it is not worth it.
pub(super) fn compress(sample: &Sample, workers: usize) -> (Duration, Vec<Option<usize>>) {
    on_all(sample, workers, |chunk| {
        thread_local! {
            static OUT: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; CHUNK]);
        }
        OUT.with_borrow_mut(|out| seal::compress_into(chunk, out))
    })
}

/// Encryption of what compression left: noise of the same lengths, which sealing does not compress again.
pub(super) fn encrypt(
    sample: &Sample,
    workers: usize,
    sealer: &Sealer,
    lengths: &[Option<usize>],
) -> Duration {
    let mut noise = vec![0; CHUNK];
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for word in noise.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
    let chunks = sample
        .chunks
        .iter()
        .zip(lengths)
        .map(|(chunk, left)| noise[..left.unwrap_or(chunk.len())].to_vec())
        .collect();
    let left = Sample { chunks, bytes: 0, allocated: 0 };
    let id = sealer.chunk_id(b"any");
    on_all(&left, workers, |chunk| sealer.seal(Kind::Data, id, &[], chunk).is_ok()).0
}

/// Seals every chunk that is not zeros (not timed): what the network and the disk get.
pub(super) fn records(
    sample: &Sample,
    workers: usize,
    sealer: &Sealer,
) -> Result<Vec<Record>, Failure> {
    let (_, sealed) = on_all(sample, workers, |chunk| {
        (!seal::is_zero(chunk))
            .then(|| sealer.seal(Kind::Data, sealer.chunk_id(chunk), &[], chunk))
            .transpose()
    });
    let mut records = Vec::new();
    for record in sealed {
        records.extend(record?);
    }
    Ok(records)
}

/// Appends the records to a store as a storage node does, and waits until they are on the medium.
pub(super) async fn segment_write(
    dir: &Path,
    fabric: FabricId,
    records: &[Record],
) -> Result<Duration, Failure> {
    let store = Store::open(dir, StoreConfig::new(fabric, "bench"))?;
    let provenance = Provenance {
        layout_epoch: LayoutEpoch(1),
        incarnation: store.incarnation(),
        job: JobId::random(),
        pg: PgId(0),
    };
    let began = Instant::now();
    let mut batch = Vec::new();
    let mut bytes = 0;
    for record in records {
        bytes += record.bytes().len();
        batch.push(Append { provenance, record: record.clone() });
        if bytes >= BATCH {
            store.append(std::mem::take(&mut batch)).await?;
            bytes = 0;
        }
    }
    store.append(batch).await?;
    store.sync().await?;
    let took = began.elapsed();
    tokio::task::spawn_blocking(move || store.close()).await?;
    Ok(took)
}
