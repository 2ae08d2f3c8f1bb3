//! Source files in the lab: the bytes come from the disk, the permission to read them from the simulated cluster.

use std::fs::File;
use std::io::{self, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::wire::{self, Answer, Ask, Refusal, Reply, Request, Role};
use crate::files::{HostFile, HostFiles, positional_read};

/// How long closing a file waits for the lab to have noticed.
const CLOSE_WAIT: Duration = Duration::from_secs(2);

/// Files of one simulated host. Every open file holds a connection of its own, so that a killed process closes its files
/// as on a real host, and every read asks first: reads are counted per host and file, and a gate can pause them.
#[derive(Debug, Clone)]
pub struct LabFiles {
    addr: String,
    host: String,
}

impl LabFiles {
    /// Files as `host` sees them, in the lab listening at `addr`.
    #[must_use]
    pub fn new(addr: impl std::fmt::Display, host: impl Into<String>) -> Self {
        Self { addr: addr.to_string(), host: host.into() }
    }

    fn link(&self) -> io::Result<Link> {
        let stream = TcpStream::connect(&self.addr)?;
        stream.set_nodelay(true)?;
        let mut link = Link { stream, next_id: 0 };
        link.call(Ask::Hello(Role::Files(self.host.clone())))?;
        Ok(link)
    }
}

impl HostFiles for LabFiles {
    fn open_read(&self, path: &Path) -> io::Result<Arc<dyn HostFile>> {
        let name = unicode(path)?;
        let mut link = self.link()?;
        link.call(Ask::OpenFile { path: name.to_owned() })?;
        let file = File::open(path)?;
        Ok(Arc::new(LabFile { file, path: path.to_owned(), link: Mutex::new(link) }))
    }

    fn grant(&self, vm: uuid::Uuid, folder: &Path) -> io::Result<()> {
        let folder = unicode(folder)?.to_owned();
        self.link()?.call(Ask::Grant { vm: vm.to_string(), folder }).map(drop)
    }
}

fn unicode(path: &Path) -> io::Result<&str> {
    path.to_str().ok_or_else(|| {
        let text = format!("{} is no Unicode path", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, text)
    })
}

struct LabFile {
    file: File,
    path: PathBuf,
    link: Mutex<Link>,
}

impl HostFile for LabFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = self.len()?.saturating_sub(offset);
        let wanted = left.min(buf.len() as u64);
        if wanted == 0 {
            return Ok(0);
        }
        let answer = {
            let mut link = self.link.lock().map_err(|_| self.broken())?;
            link.call(Ask::Read { length: wanted })?
        };
        let Answer::Granted(granted) = answer else { return Err(self.broken()) };
        let granted = usize::try_from(granted.min(wanted)).map_err(io::Error::other)?;
        let mut done = 0;
        // The lab has counted these bytes: read all of them.
        while done < granted {
            let n = positional_read(&self.file, &mut buf[done..granted], offset + done as u64)?;
            if n == 0 {
                break;
            }
            done += n;
        }
        Ok(done)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}

impl LabFile {
    fn broken(&self) -> io::Error {
        io::Error::other(format!("the connection behind {} is broken", self.path.display()))
    }
}

impl Drop for LabFile {
    fn drop(&mut self) {
        // Waits for the answer, so that a merge asked for after this cannot find the file still open.
        if let Ok(link) = self.link.get_mut() {
            let waited = link.stream.set_read_timeout(Some(CLOSE_WAIT));
            if waited.is_ok()
                && let Err(e) = link.call(Ask::CloseFile)
            {
                tracing::debug!(path = %self.path.display(), error = %e, "file closed by dropping its connection");
            }
        }
    }
}

struct Link {
    stream: TcpStream,
    next_id: u64,
}

impl Link {
    fn call(&mut self, body: Ask) -> io::Result<Answer> {
        self.next_id += 1;
        let id = self.next_id;
        self.stream.write_all(&wire::encode(&Request { id, body })?)?;
        let reply: Reply = wire::read_blocking(&mut self.stream)?;
        if reply.id != id {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the lab answered another request",
            ));
        }
        match reply.body {
            Answer::Failed(refusal) => Err(io_error(refusal)),
            answer => Ok(answer),
        }
    }
}

fn io_error(refusal: Refusal) -> io::Error {
    let kind = match &refusal {
        Refusal::NotFound { .. } => io::ErrorKind::NotFound,
        Refusal::Sharing { .. } => io::ErrorKind::ResourceBusy,
        Refusal::Paused { .. } => io::ErrorKind::TimedOut,
        Refusal::HostDown(_) => io::ErrorKind::ConnectionAborted,
        Refusal::NoNamespace(_) | Refusal::Invalid { .. } => io::ErrorKind::InvalidInput,
    };
    io::Error::new(kind, refusal)
}
