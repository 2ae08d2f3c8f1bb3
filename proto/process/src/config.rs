//! TOML configuration that refuses what it does not know and says where.
//!
//! One file a role; sections are named as the modules. A configuration type derives `Deserialize`
//! with `#[serde(deny_unknown_fields)]`, times use `#[serde(with = "outrider_process::config::time")]`
//! (`"30s"`), sizes are [`ByteSize`] (`"64 MiB"`).
//!
//! `${NAME}` inside a value is replaced by the environment variable NAME, so that the members of a
//! Kubernetes StatefulSet can share one file and still have names of their own. A variable that is
//! not set is an error, never an empty string.

use std::fmt;
use std::path::{Path, PathBuf};

pub use bytesize::ByteSize;
/// For `#[serde(with = ...)]` on a `Duration`: `"30s"`, `"5m"`, `"72h"`.
pub use humantime_serde as time;
use serde::de::DeserializeOwned;

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A variable of the environment is missing.
    #[error(
        "{path}:{line}: the environment variable {variable} is not set; set it or remove ${{{variable}}}"
    )]
    Variable {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// Its name.
        variable: String,
    },
    /// A key that nobody knows.
    #[error("{path}:{line}: unknown key {key}{}", Suggestion(.nearest, .known))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// The key with its section.
        key: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
        /// All keys that may stand there.
        known: Vec<String>,
    },
    /// A value that does not fit, a missing key, or no TOML.
    #[error("{path}:{line}: {key}: {problem}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// The key with its section, or the section.
        key: String,
        /// What is wrong, in the parser's words.
        problem: String,
    },
}

/// Reads a configuration file.
///
/// # Errors
/// [`ConfigError`]; nothing to retry before the file was changed.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(path, &text, |name| std::env::var(name).ok())
}

/// Whether a process of this configuration type would accept the file.
///
/// # Errors
/// As [`load`].
pub fn check<T: DeserializeOwned>(path: &Path) -> Result<(), ConfigError> {
    load::<T>(path).map(drop)
}

/// As [`load`], over text and an environment given by the caller; `path` is for messages only.
///
/// # Errors
/// As [`load`], except that nothing is read.
pub fn parse<T: DeserializeOwned>(
    path: &Path,
    text: &str,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<T, ConfigError> {
    let text = substitute(path, text, environment)?;
    toml::from_str(&text).map_err(|error| locate(path, &text, &error))
}

/// Replaces `${NAME}` outside of comment lines; line numbers stay as they were.
fn substitute(
    path: &Path,
    text: &str,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<String, ConfigError> {
    let mut result = String::with_capacity(text.len());
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let mut rest = line;
        if !line.trim_start().starts_with('#') {
            while let Some((before, after)) = rest.split_once("${") {
                let Some((variable, after)) = after.split_once('}') else { break };
                let value = environment(variable).ok_or_else(|| ConfigError::Variable {
                    path: path.to_owned(),
                    line: index + 1,
                    variable: variable.to_owned(),
                })?;
                result.push_str(before);
                escape_into(&mut result, &value);
                rest = after;
            }
        }
        result.push_str(rest);
    }
    Ok(result)
}

/// Escapes for a TOML basic string, so that no value can add keys of its own.
fn escape_into(result: &mut String, value: &str) {
    for c in value.chars() {
        match c {
            '"' | '\\' => result.extend(['\\', c]),
            c if c.is_control() => result.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => result.push(c),
        }
    }
}

fn locate(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let path = path.to_owned();
    let offset = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = text.as_bytes()[..offset].iter().filter(|byte| **byte == b'\n').count() + 1;
    let key = key_at(text, line);
    let message = error.message();
    if let Some(after) = message.strip_prefix("unknown field `") {
        let mut names = after.split('`').step_by(2).map(str::to_owned);
        let unknown = names.next().unwrap_or_default();
        let known: Vec<String> = names.collect();
        // The error is at a section header when the section itself is the unknown key.
        let key = match key.rsplit_once('.') {
            Some((section, last)) if last == unknown => format!("{section}.{unknown}"),
            _ if key == unknown => key,
            _ => format!("{key}.{unknown}").trim_start_matches('.').to_owned(),
        };
        let nearest = nearest(&unknown, &known);
        return ConfigError::UnknownKey { path, line, key, nearest, known };
    }
    let key = if key.is_empty() { "the file".to_owned() } else { key };
    ConfigError::Value { path, line, key, problem: message.replace('\n', " ") }
}

/// The key of a line with the section above it, as far as the text tells.
fn key_at(text: &str, line: usize) -> String {
    let mut section = String::new();
    let mut key = String::new();
    for current in text.lines().take(line) {
        let current = current.trim();
        key.clear();
        if current.starts_with('[') && current.contains(']') {
            let end = current.find(']').unwrap_or(current.len());
            section = current[..end].trim_start_matches('[').trim().to_owned();
        } else if let Some((name, _)) = current.split_once('=')
            && !current.starts_with('#')
        {
            key = name.trim().trim_matches('"').to_owned();
        }
    }
    match (section.is_empty(), key.is_empty()) {
        (true, _) => key,
        (false, true) => section,
        (false, false) => format!("{section}.{key}"),
    }
}

struct Suggestion<'a>(&'a Option<String>, &'a [String]);

impl fmt::Display for Suggestion<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self(Some(nearest), _) => write!(f, "; did you mean {nearest}?"),
            Self(None, []) => write!(f, "; no key may stand here"),
            Self(None, known) => write!(f, "; known here: {}", known.join(", ")),
        }
    }
}

/// The known name within a third of the word's length, rounded up, if there is one.
fn nearest(unknown: &str, known: &[String]) -> Option<String> {
    let bound = unknown.chars().count().div_ceil(3);
    known
        .iter()
        .map(|name| (distance(unknown, name), name))
        .min()
        .filter(|(distance, _)| *distance <= bound)
        .map(|(_, name)| name.clone())
}

/// Levenshtein's edit distance, one row at a time.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let change = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Storage {
        name: String,
        #[serde(default)]
        scrub: Scrub,
    }

    #[derive(Debug, Default, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Scrub {
        #[serde(with = "super::time")]
        interval: Duration,
        budget: ByteSize,
    }

    fn parsed(text: &str) -> Result<Storage, ConfigError> {
        parse(Path::new("storage.toml"), text, |name| {
            (name == "OUTRIDER_NAME").then(|| "s-\"1\"".to_owned())
        })
    }

    #[test]
    fn times_and_sizes_are_typed() {
        let storage = parsed("name = \"a\"\n[scrub]\ninterval = \"72h\"\nbudget = \"64 MiB\"\n")
            .expect("good");
        assert_eq!(storage.scrub.interval, Duration::from_secs(72 * 3600));
        assert_eq!(storage.scrub.budget, ByteSize::mib(64));
        let error = parsed("name = \"a\"\n[scrub]\ninterval = \"soon\"\n").expect_err("no time");
        assert!(error.to_string().starts_with("storage.toml:3: scrub.interval: "), "{error}");
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_known_one() {
        let error = parsed("name = \"a\"\n\n[scrub]\nintervall = \"72h\"\n").expect_err("unknown");
        assert_eq!(
            error.to_string(),
            "storage.toml:4: unknown key scrub.intervall; did you mean interval?"
        );
        let error = parsed("name = \"a\"\n[scurb]\ninterval = \"1h\"\n").expect_err("unknown");
        assert_eq!(error.to_string(), "storage.toml:2: unknown key scurb; did you mean scrub?");
        let error = parsed("name = \"a\"\nzzzzzz = 1\n").expect_err("unknown");
        assert_eq!(
            error.to_string(),
            "storage.toml:2: unknown key zzzzzz; known here: name, scrub"
        );
    }

    #[test]
    fn a_missing_key_and_a_broken_file_are_told_with_their_line() {
        let error = parsed("[scrub]\n").expect_err("no name");
        assert!(error.to_string().contains("missing field `name`"), "{error}");
        let error = parsed("name = \"a\"\nscrub = [\n").expect_err("no TOML");
        assert!(error.to_string().starts_with("storage.toml:"), "{error}");
    }

    #[test]
    fn the_environment_fills_values_and_cannot_add_keys() {
        let storage =
            parsed("# ${NOT_SET} in a comment\nname = \"${OUTRIDER_NAME}\"\n").expect("good");
        assert_eq!(storage.name, "s-\"1\"");
        let error = parsed("name = \"${OUTRIDER_NAM}\"\n").expect_err("not set");
        assert_eq!(
            error.to_string(),
            "storage.toml:1: the environment variable OUTRIDER_NAM is not set; \
             set it or remove ${OUTRIDER_NAM}"
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = check::<Storage>(Path::new("/nowhere/storage.toml")).expect_err("missing");
        assert!(error.to_string().contains("/nowhere/storage.toml"));
    }
}
