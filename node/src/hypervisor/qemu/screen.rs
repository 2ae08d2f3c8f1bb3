//! A VM's screen, as QEMU draws it. We make the file and pass it, so that QEMU needs no right to make one.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::machine::Machine;
use super::qmp::QmpError;

/// Largest picture that is looked at, bytes.
const LARGEST: usize = 256 << 20;
/// How long a picture has to stay to be called settled.
const SETTLED: Duration = Duration::from_secs(10);
/// A cursor may blink, a clock may tick: pixels of a thousand that may differ.
const RESTLESS: usize = 10;
/// The text modes in which firmware says that it found nothing to boot.
const TEXT_MODES: [(u32, u32); 3] = [(720, 400), (640, 400), (640, 350)];

/// A picture, three bytes a pixel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Picture {
    pub(super) width: u32,
    pub(super) height: u32,
    pixels: Vec<u8>,
}

impl Picture {
    /// Reads a PPM as QEMU writes it.
    fn parse(ppm: &[u8]) -> Option<Self> {
        // P6, width, height, 255, one white space, pixels.
        let mut fields = ppm.splitn(4, u8::is_ascii_whitespace);
        let mut number = |expected: Option<&[u8]>| {
            let field = fields.next()?;
            expected.is_none_or(|e| e == field).then_some(field)
        };
        number(Some(b"P6"))?;
        let parse = |field: &[u8]| std::str::from_utf8(field).ok()?.parse::<u32>().ok();
        let (width, height) = (parse(number(None)?)?, parse(number(None)?)?);
        let pixels = fields.next()?.strip_prefix(b"255\n")?;
        let size = usize::try_from(u64::from(width) * u64::from(height) * 3).ok()?;
        (pixels.len() == size && size > 0).then(|| Self { width, height, pixels: pixels.to_vec() })
    }

    /// Whether it may be a system's: not of one colour, and in no text mode of firmware.
    fn shows_something(&self) -> bool {
        let first = &self.pixels[..3];
        let blank = self.pixels.chunks_exact(3).all(|pixel| pixel == first);
        !blank && !TEXT_MODES.contains(&(self.width, self.height))
    }

    fn is_like(&self, other: &Self) -> bool {
        if (self.width, self.height) != (other.width, other.height) {
            return false;
        }
        let pairs = self.pixels.chunks_exact(3).zip(other.pixels.chunks_exact(3));
        let differing = pairs.filter(|(a, b)| a != b).count();
        differing * 1000 <= RESTLESS * (self.pixels.len() / 3)
    }
}

/// Waits for a picture to stay.
#[derive(Debug, Default)]
pub(super) struct Settling(Option<(Picture, Instant)>);

impl Settling {
    /// Takes the picture of now; gives its size once it has settled.
    pub(super) fn take(&mut self, now: Picture, at: Instant) -> Option<(u32, u32)> {
        match &self.0 {
            Some((first, since)) if first.is_like(&now) => {
                let settled = at.saturating_duration_since(*since) >= SETTLED;
                (settled && first.shows_something()).then_some((first.width, first.height))
            }
            _ => {
                self.0 = Some((now, at));
                None
            }
        }
    }
}

/// The picture of now; `None` when the VM has no screen.
pub(super) async fn look(machine: &Machine, scratch: &Path) -> Result<Option<Picture>, QmpError> {
    let path = scratch.join(format!("screen-{}", uuid::Uuid::new_v4().simple()));
    let drawn = draw(machine, &path, "ppm").await;
    let read = std::fs::read(&path).unwrap_or_default();
    let _ = std::fs::remove_file(&path);
    match drawn {
        Ok(true) if read.len() <= LARGEST => Ok(Picture::parse(&read)),
        Ok(_) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Keeps the picture of now beside the monitor; `None` when there is no screen, or no picture can be had.
pub(super) async fn keep(machine: &Machine) -> Option<PathBuf> {
    for format in ["png", "ppm"] {
        let path = machine.qmp.socket().with_extension(format!("screen.{format}"));
        match draw(machine, &path, format).await {
            Ok(true) => return Some(path),
            Ok(false) | Err(_) => {
                let _ = std::fs::remove_file(&path);
            }
        }
    }
    None
}

/// Lets QEMU draw into a new file; false: it refuses, having no screen or not this format.
async fn draw(machine: &Machine, path: &Path, format: &str) -> Result<bool, QmpError> {
    let opened = std::fs::File::options().write(true).create(true).truncate(true).open(path);
    let file = match opened {
        Ok(file) => OwnedFd::from(file),
        Err(e) => {
            tracing::debug!(path = %path.display(), error = %e, "no file for a picture");
            return Ok(false);
        }
    };
    let added =
        machine.qmp.execute_with("add-fd", json!({ "opaque": "outrider-screen" }), file).await?;
    let set = added["fdset-id"].as_u64().unwrap_or_default();
    let arguments = json!({ "filename": format!("/dev/fdset/{set}"), "format": format });
    let drawn = machine.qmp.execute("screendump", arguments).await;
    if let Err(e) = machine.qmp.execute("remove-fd", json!({ "fdset-id": set })).await {
        tracing::debug!(vm = machine.name, error = %e, "a passed file stays with QEMU until it closes it");
    }
    match drawn {
        Ok(Value::Null | Value::Object(_)) => Ok(true),
        Ok(_) => Ok(false),
        Err(e) if e.is_refusal() => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(width: u32, height: u32, ink: usize) -> Picture {
        let mut ppm = format!("P6\n{width} {height}\n255\n").into_bytes();
        let size = (width * height * 3) as usize;
        ppm.extend((0..size).map(|at| u8::from(at < ink * 3) * 200));
        Picture::parse(&ppm).expect("a picture")
    }

    #[test]
    fn a_picture_counts_when_it_stays_and_is_neither_blank_nor_firmwares_text() {
        let start = Instant::now();
        let settles = |first: &Picture, second: &Picture| {
            let mut settling = Settling::default();
            assert_eq!(settling.take(first.clone(), start), None, "at once it is not settled");
            assert_eq!(settling.take(second.clone(), start + SETTLED / 2), None, "nor soon");
            settling.take(second.clone(), start + SETTLED)
        };
        let login = picture(100, 100, 500);
        assert_eq!(settles(&login, &login), Some((100, 100)));
        assert_eq!(settles(&login, &picture(100, 100, 560)), Some((100, 100)), "a cursor blinks");
        assert_eq!(settles(&login, &picture(100, 100, 700)), None, "it changes");
        assert_eq!(settles(&picture(100, 100, 0), &picture(100, 100, 0)), None, "blank");
        let bios = picture(720, 400, 5000);
        assert_eq!(settles(&bios, &bios), None, "\"No bootable device.\" is no sign");
        for bad in ["", "P6\n", "P6\n1 1\n255\n", "P5\n1 1\n255\nabc", "P6\n99999 99999\n255\nabc"]
        {
            assert_eq!(Picture::parse(bad.as_bytes()), None, "{bad:?}");
        }
    }
}
