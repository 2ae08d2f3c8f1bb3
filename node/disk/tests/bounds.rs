//! The largest disks in bounded memory: their tables are read once, in order, and not kept.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use outrider_disk::block_file::{BlockFile, ByteSource};
use outrider_disk::vhdx::{CreateOptions, RegionTable, VhdxWriter};
use outrider_disk::{DiskChain, ReadDisk};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 << 40;
const BLOCK: u64 = 8 * MIB;
/// Blocks that share a bitmap: the entry behind them is none of a block.
const RATIO: u64 = (512 << 23) / BLOCK;
/// Most that the map may take.
const MOST_MIB: f32 = 64.0;

/// A VHDX of 64 TiB in blocks of 8 MiB of which every second one is stored. Its table is computed: few file systems
/// take such a file.
struct Fragmented {
    file: BlockFile,
    table: (u64, u64),
    first: u64,
    table_bytes: AtomicU64,
}

impl Fragmented {
    fn new(path: &Path) -> Self {
        let options = CreateOptions { block_size: BLOCK as u32, ..CreateOptions::dynamic(SIZE) };
        VhdxWriter::create(path, &options).expect("made").close().expect("closed");
        let file = BlockFile::open(path).expect("opens");
        let mut regions = vec![0; 64 << 10];
        file.read_exact_at(192 << 10, &mut regions).expect("has regions");
        let bat = RegionTable::parse(&regions).expect("sound").bat;
        Self {
            first: file.size().expect("has a size").next_multiple_of(MIB),
            file,
            table: (bat.offset, bat.offset + u64::from(bat.length)),
            table_bytes: AtomicU64::new(0),
        }
    }

    fn entry(&self, index: u64) -> u64 {
        let (chunk, place) = (index / (RATIO + 1), index % (RATIO + 1));
        let block = chunk * RATIO + place;
        let stored = place < RATIO && block < SIZE / BLOCK && block.is_multiple_of(2);
        if stored { (self.first + block / 2 * BLOCK) | 6 } else { 0 }
    }
}

impl ByteSource for Fragmented {
    fn size(&self) -> io::Result<u64> {
        Ok(self.first + SIZE / 2)
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if !(self.table.0..self.table.1).contains(&offset) {
            return self.file.read_exact_at(offset, buf);
        }
        self.table_bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        for (index, entry) in ((offset - self.table.0) / 8..).zip(buf.chunks_exact_mut(8)) {
            entry.copy_from_slice(&self.entry(index).to_le_bytes());
        }
        Ok(())
    }
}

#[test]
fn the_map_of_the_largest_disk_takes_little_memory_and_reads_its_table_once() {
    let dir = tempfile::tempdir().unwrap();
    let source = Arc::new(Fragmented::new(&dir.path().join("huge.vhdx")));
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage_as_mb();
    let chain = DiskChain::open_with("huge.vhdx", &|_: &Path| Ok(source.clone() as _)).unwrap();
    let allocated = chain.allocated().unwrap();
    let used = MEMORY.peak_usage_as_mb() - before;
    assert!(used < MOST_MIB, "{used} MiB");
    let table = (SIZE / BLOCK + SIZE / BLOCK / RATIO) * 8;
    let read = source.table_bytes.load(Ordering::Relaxed);
    assert!(read <= table, "{read} bytes of a table of {table}");
    // Every second block is stored: the map may name more, never less.
    assert!(allocated.total_len() >= SIZE / 2);
    assert!((0..SIZE / BLOCK).step_by(2 << 10).all(|block| allocated.contains(block * BLOCK)));

    // Reading keeps a bounded part of the table, too.
    let before = MEMORY.current_usage_as_mb();
    let mut byte = [0];
    for block in (1..SIZE / BLOCK).step_by(4095 * 2) {
        chain.read_at(block * BLOCK, &mut byte).unwrap();
    }
    let kept = MEMORY.current_usage_as_mb() - before;
    assert!(kept < 24.0, "{kept} MiB are kept");
}
