//! Serial consoles of a VM that can be read by others than the guest: those that QEMU keeps in a file or a ring buffer, by the
//! command line. And what on them says that a system is up.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};

use crate::hypervisor::boot::CONSOLE_LINES;

/// Longest line that is kept.
const LONGEST_LINE: usize = 400;
/// Devices whose character device is a console.
const SERIAL: [&str; 7] = [
    "isa-serial",
    "pci-serial",
    "usb-serial",
    "virtconsole",
    "sclpconsole",
    "spapr-vty",
    "sclplmconsole",
];

/// Where a console's output is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Console {
    /// A file; `appends`: what it holds before the VM starts stays in it.
    File { path: PathBuf, appends: bool },
    /// A ring buffer of this character device. Reading it empties it.
    Ring { chardev: String },
}

/// The consoles of a command line that can be read.
pub(super) fn consoles(argv: &[String], cwd: &Path) -> Vec<Console> {
    let mut chardevs: HashMap<String, HashMap<String, String>> = HashMap::new();
    let mut used = Vec::new();
    let mut found = Vec::new();
    for pair in argv.windows(2) {
        let option = pair[0].trim_start_matches('-');
        let value = pair[1].as_str();
        match option {
            "chardev" => {
                let options = options(value, "backend");
                if let Some(id) = options.get("id") {
                    chardevs.insert(id.clone(), options);
                }
            }
            "serial" => {
                if let Some(id) = value.strip_prefix("chardev:") {
                    used.push(id.to_owned());
                } else if let Some(path) = value.strip_prefix("file:") {
                    found.push(Console::File { path: cwd.join(path), appends: false });
                }
            }
            "device" => {
                let options = options(value, "driver");
                let is_serial = options.get("driver").is_some_and(|d| SERIAL.contains(&d.as_str()));
                used.extend(options.get("chardev").filter(|_| is_serial).cloned());
            }
            _ => {}
        }
    }
    for id in used {
        let Some(options) = chardevs.get(&id) else { continue };
        let is_on = |key: &str| {
            options.get(key).is_some_and(|v| matches!(v.as_str(), "on" | "yes" | "true"))
        };
        let file = |key: &str, appends: &str| {
            let path = cwd.join(options.get(key)?);
            Some(Console::File { path, appends: is_on(appends) })
        };
        let kept = match options.get("backend").map(String::as_str) {
            Some("ringbuf" | "memory") => Some(Console::Ring { chardev: id.clone() }),
            Some("file") => file("path", "append"),
            _ => file("logfile", "logappend"),
        };
        found.extend(kept);
    }
    found
}

/// `first,key=value,...` with doubled commas, or JSON; the value without a key is that of `first`.
fn options(text: &str, first: &str) -> HashMap<String, String> {
    if let Ok(serde_json::Value::Object(object)) = serde_json::from_str(text) {
        let plain = |v: serde_json::Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
        return object.into_iter().map(|(k, v)| (k, plain(v))).collect();
    }
    let doubled = text.replace(",,", "\0");
    let parts = doubled.split(',').map(|p| p.replace('\0', ","));
    parts
        .map(|p| match p.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None => (first.to_owned(), p),
        })
        .collect()
}

/// What a console has said so far: its last lines, and the first line that is a sign.
#[derive(Debug, Default)]
pub(super) struct Transcript {
    lines: VecDeque<String>,
    /// What came after the last line feed.
    open: String,
    sign: Option<String>,
}

impl Transcript {
    /// Takes what came; `wanted` is the text waited for, a login prompt when absent.
    pub(super) fn take(&mut self, bytes: &[u8], wanted: Option<&str>) {
        for c in String::from_utf8_lossy(bytes).chars() {
            if c == '\n' {
                let line = plain(&std::mem::take(&mut self.open));
                self.look(&line, wanted);
                if !line.is_empty() {
                    self.lines.push_back(line);
                }
                if self.lines.len() > CONSOLE_LINES {
                    self.lines.pop_front();
                }
            } else if self.open.len() < LONGEST_LINE {
                self.open.push(c);
            }
        }
        // A prompt has no line feed.
        let open = plain(&self.open);
        self.look(&open, wanted);
    }

    fn look(&mut self, line: &str, wanted: Option<&str>) {
        let is_sign = match wanted {
            Some(text) => line.contains(text),
            None => is_login_prompt(line),
        };
        if is_sign && self.sign.is_none() {
            self.sign = Some(line.to_owned());
        }
    }

    /// The first line that is a sign.
    pub(super) fn sign(&self) -> Option<&str> {
        self.sign.as_deref()
    }

    /// The last lines.
    pub(super) fn last(&self) -> Vec<String> {
        let open = Some(plain(&self.open)).filter(|l| !l.is_empty());
        self.lines.iter().cloned().chain(open).collect()
    }
}

/// `web login:`, and perhaps what somebody else said to the same console after it.
fn is_login_prompt(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let host = words.next().filter(|w| !w.starts_with('['));
    line == "login:" || (host.is_some() && words.next() == Some("login:"))
}

/// Without escape sequences and other control characters.
fn plain(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut rest = line.chars().peekable();
    while let Some(c) = rest.next() {
        if c == '\x1b' {
            if rest.next_if_eq(&'[').is_some() {
                // Parameters, and the letter that ends them.
                while rest.next_if(|c| !('@'..='~').contains(c)).is_some() {}
            }
            rest.next();
        } else if !c.is_control() {
            out.push(c);
        }
    }
    out.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(line: &str) -> Vec<Console> {
        let argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
        consoles(&argv, Path::new("/vm"))
    }

    #[test]
    fn consoles_that_are_kept_are_found_however_they_are_written() {
        let file = |path: &str, appends| Console::File { path: path.into(), appends };
        assert_eq!(
            found(
                "qemu -chardev file,id=c,append=on,path=/l/a,,b -serial chardev:c -serial file:own.txt"
            ),
            [file("/vm/own.txt", false), file("/l/a,b", true)]
        );
        assert_eq!(
            found(
                r#"qemu -chardev pty,id=s0,logfile=/l/s0 -device {"driver":"isa-serial","chardev":"s0"}"#
            ),
            [file("/l/s0", false)]
        );
        assert_eq!(
            found("qemu -chardev ringbuf,id=r,size=65536 -device virtconsole,chardev=r"),
            [Console::Ring { chardev: "r".into() }]
        );
        for unread in [
            "qemu -chardev pty,id=s -serial chardev:s",
            "qemu -chardev file,id=m,path=/x -mon chardev=m",
            "qemu -chardev file,id=q,path=/x -device virtserialport,chardev=q",
            "qemu -serial stdio -nodefaults",
        ] {
            assert_eq!(found(unread), [], "{unread}");
        }
    }

    #[test]
    fn a_prompt_or_the_text_wanted_is_a_sign_and_nothing_else() {
        let mut seen = Transcript::default();
        seen.take(b"[ 0.1] login: is a word here\r\nDebian 12 web ttyS0\r\n\r\nweb lo", None);
        assert_eq!(seen.sign(), None);
        seen.take(b"gin: \x1b[0;1m", None);
        assert_eq!(seen.sign(), Some("web login:"));
        for (line, is) in [
            ("web login: .", true),
            ("login:", true),
            ("[1.0] login: x", false),
            ("Last login: Mon", true),
            ("a login", false),
        ] {
            assert_eq!(is_login_prompt(line), is, "{line}");
        }
        let mut seen = Transcript::default();
        seen.take("a\n\x1b[32mservices are up\x1b[0m\nKernel panic\n".as_bytes(), Some("are up"));
        assert_eq!(seen.sign(), Some("services are up"));
        assert_eq!(seen.last(), ["a", "services are up", "Kernel panic"]);
        let mut seen = Transcript::default();
        seen.take("line\n".repeat(100).as_bytes(), Some("login:"));
        seen.take(&[b'x'; 100_000], None);
        assert_eq!((seen.last().len(), seen.sign()), (CONSOLE_LINES + 1, None));
        assert!(seen.last().iter().all(|l| l.len() <= LONGEST_LINE));
    }
}
