//! Paths as hosts write them.
//!
//! An agent that is a Windows program joins its paths with backslashes, and under Wine this machine's root is a drive
//! (`Z:`). The simulated cluster keeps its files under Unix paths, so what comes from a host is read in either spelling.

use std::path::PathBuf;

/// The path of this machine that a host means.
pub(crate) fn host_path(text: &str) -> PathBuf {
    if cfg!(windows) {
        return PathBuf::from(text);
    }
    let plain = text.strip_prefix(r"\\?\").unwrap_or(text);
    let mut letters = plain.chars();
    let drive = letters.next().is_some_and(|c| c.is_ascii_alphabetic())
        && letters.next() == Some(':')
        && matches!(letters.next(), Some('\\' | '/'));
    let plain = if drive { &plain[2..] } else { plain };
    PathBuf::from(plain.replace('\\', "/"))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn all_spellings_of_a_path_are_one() {
        for text in
            ["/csv/web/a.vhdx", r"Z:\csv\web\a.vhdx", r"\\?\Z:\csv/web\a.vhdx", r"/csv/web\a.vhdx"]
        {
            assert_eq!(host_path(text), PathBuf::from("/csv/web/a.vhdx"), "{text}");
        }
    }
}
