//! Disks of restored VMs: raw files by our own hand, qcow2 through QEMU's own `qemu-img` and `qemu-nbd`, so that they are what QEMU
//! itself would make.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outrider_disk::DiskError;
use outrider_proto::manifest::DiskManifest;

use super::nbd::Nbd;
use crate::restore::NewDisk;

/// How long `qemu-nbd` may take to listen, and to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes written between two flushes: what a server, or the system, keeps in memory and has to write out at the end.
const UNFLUSHED: u64 = 1 << 30;

/// An empty disk of the format that its file name tells.
pub(super) fn create(path: &Path, disk: &DiskManifest) -> Result<Box<dyn NewDisk>, DiskError> {
    let failed = |source| DiskError::Io { path: path.to_owned(), op: "make", source };
    if path.extension().is_some_and(|e| e == "qcow2") {
        Ok(Box::new(Qcow2::create(path, disk).map_err(failed)?))
    } else {
        let file = File::options().write(true).create_new(true).open(path).map_err(failed)?;
        file.set_len(disk.size).map_err(failed)?;
        Ok(Box::new(Raw { file, path: path.to_owned(), written: Written::default() }))
    }
}

/// What was written since the last flush.
#[derive(Default)]
struct Written(u64);

impl Written {
    /// Whether it is time to flush, after so many bytes more.
    fn is_much(&mut self, more: usize) -> bool {
        self.0 += more as u64;
        let much = self.0 >= UNFLUSHED;
        if much {
            self.0 = 0;
        }
        much
    }
}

struct Raw {
    file: File,
    path: PathBuf,
    written: Written,
}

impl NewDisk for Raw {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let mut written = self.file.write_all_at(bytes, offset);
        if written.is_ok() && self.written.is_much(bytes.len()) {
            written = self.file.sync_data();
        }
        written.map_err(|source| DiskError::Io { path: self.path.clone(), op: "write", source })
    }

    fn finish(self: Box<Self>) -> Result<(), DiskError> {
        let synced = self.file.sync_all();
        synced.map_err(|source| DiskError::Io { path: self.path.clone(), op: "sync", source })
    }
}

struct Qcow2 {
    path: PathBuf,
    /// Taken when it is finished.
    nbd: Option<Nbd>,
    written: Written,
    server: Server,
}

/// A `qemu-nbd` that ends with us.
struct Server {
    child: Child,
    // The folder of its socket, removed with it.
    _folder: tempfile_folder::Folder,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already waited for, when all went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qcow2 {
    fn create(path: &Path, disk: &DiskManifest) -> io::Result<Self> {
        if path.exists() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let cluster = disk.block_size;
        let usual = (512..=2 << 20).contains(&cluster) && cluster.is_power_of_two();
        let mut make = Command::new("qemu-img");
        make.args(["create", "-q", "-f", "qcow2"]);
        if usual {
            make.args(["-o", &format!("cluster_size={cluster}")]);
        }
        run(make.arg(path).arg(disk.size.to_string()))?;
        let folder = tempfile_folder::Folder::new()?;
        let socket = folder.path().join("s");
        let child = Command::new("qemu-nbd")
            .args(["--format=qcow2", "--cache=writeback", "--discard=unmap"])
            .arg(format!("--socket={}", socket.display()))
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(|e| missing("qemu-nbd", e))?;
        let mut server = Server { child, _folder: folder };
        let nbd = connect(&socket, &mut server.child)?;
        if nbd.size() != disk.size {
            return Err(io::Error::other(format!(
                "qemu-img made {} bytes of {}",
                nbd.size(),
                disk.size
            )));
        }
        let written = Written::default();
        Ok(Self { path: path.to_owned(), nbd: Some(nbd), written, server })
    }

    fn close(&mut self) -> io::Result<()> {
        let Some(mut nbd) = self.nbd.take() else { return Ok(()) };
        nbd.flush()?;
        nbd.disconnect()?;
        // Without its only client it closes the image and ends.
        let until = Instant::now() + PATIENCE;
        loop {
            match self.server.child.try_wait()? {
                Some(status) if status.success() => break,
                Some(status) => {
                    return Err(io::Error::other(format!("qemu-nbd failed ({status})")));
                }
                None if Instant::now() > until => return Err(io::ErrorKind::TimedOut.into()),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        File::open(&self.path)?.sync_all()
    }
}

impl NewDisk for Qcow2 {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let written = match &mut self.nbd {
            Some(nbd) if self.written.is_much(bytes.len()) => {
                nbd.write(offset, bytes).and_then(|()| nbd.flush())
            }
            Some(nbd) => nbd.write(offset, bytes),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        written.map_err(|source| DiskError::Io { path: self.path.clone(), op: "write", source })
    }

    fn finish(mut self: Box<Self>) -> Result<(), DiskError> {
        let closed = self.close();
        closed.map_err(|source| DiskError::Io { path: self.path.clone(), op: "close", source })
    }
}

fn connect(socket: &Path, child: &mut Child) -> io::Result<Nbd> {
    let until = Instant::now() + PATIENCE;
    loop {
        match Nbd::connect(socket, "", None) {
            Ok(nbd) => return Ok(nbd),
            Err(e) if Instant::now() > until => return Err(e),
            Err(_) => {}
        }
        if let Some(status) = child.try_wait()? {
            return Err(io::Error::other(format!("qemu-nbd ended at once ({status})")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn run(command: &mut Command) -> io::Result<()> {
    let out = command.stdin(Stdio::null()).output().map_err(|e| missing("qemu-img", e))?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(io::Error::other(format!("qemu-img failed ({}): {}", out.status, said.trim())))
}

fn missing(program: &str, e: io::Error) -> io::Error {
    match e.kind() {
        io::ErrorKind::NotFound => io::Error::new(
            e.kind(),
            format!("{program} is not installed: install the package qemu-utils"),
        ),
        _ => e,
    }
}

/// A folder with a short path, for a socket.
mod tempfile_folder {
    use std::io;
    use std::path::{Path, PathBuf};

    pub(super) struct Folder(PathBuf);

    impl Folder {
        pub(super) fn new() -> io::Result<Self> {
            use std::os::unix::fs::DirBuilderExt;
            let name = format!("outrider-{}", uuid::Uuid::new_v4().simple());
            let path = std::env::temp_dir().join(name);
            std::fs::DirBuilder::new().mode(0o700).create(&path)?;
            Ok(Self(path))
        }

        pub(super) fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            // Only a socket is in it.
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_holds_a_gib_and_no_more() {
        let mut written = Written::default();
        let flushes = (0..5 * 1024).filter(|_| written.is_much(1 << 20)).count();
        assert_eq!(flushes, 5);
    }
}
