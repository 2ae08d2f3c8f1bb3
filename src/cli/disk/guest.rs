//! `outrider disk ls` and `outrider disk cat`: what a disk's guest keeps on it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use outrider_disk::guest::partition::{self, TableKind};
use outrider_disk::guest::{
    Content, Entry, FileId, FileKind, FileSystem, GuestDisk, GuestError, GuestTime, Limits, Stat,
    Volume, path,
};
use outrider_disk::open_disk;
use serde_json::{Value, json};

use crate::cli::Done;
use crate::output::{self, bytes};
use crate::report::Failure;

/// Bytes copied at a time.
const STEP: usize = 1 << 20;

#[derive(Debug, Args)]
pub(in crate::cli) struct Which {
    /// Number of the volume; may be left out when only one can be read
    #[arg(long, value_name = "N")]
    volume: Option<u32>,
}

/// An open file system with what it is on.
struct Open {
    volume: Volume,
    fs: Box<dyn FileSystem>,
}

pub(super) fn ls(file: &Path, at: Option<&OsStr>, which: &Which, json: bool) -> Done {
    let disk = open(file)?;
    let readable = disk.volumes.iter().filter(|v| is_readable(v)).count();
    if at.is_none() && which.volume.is_none() && (readable != 1 || disk.volumes.len() != 1) {
        return volumes(&disk, json);
    }
    let open = choose(&disk, which)?;
    let at = at.unwrap_or(OsStr::new("/"));
    let id = path::find(&*open.fs, at.as_encoded_bytes())?;
    let stat = open.fs.stat(id)?;
    warn(&open);
    if stat.kind == FileKind::Directory {
        return directory(&open, at, id, json);
    }
    one(&open, at, id, &stat, json)
}

pub(super) fn cat(
    file: &Path,
    at: &OsStr,
    which: &Which,
    out: Option<PathBuf>,
    json: bool,
) -> Done {
    if json && out.is_none() {
        return Err(Failure::usage(
            "the content goes to standard output, where JSON would go, too",
        )
        .hint("Name a file with --out."));
    }
    let disk = open(file)?;
    let open = choose(&disk, which)?;
    let id = path::find(&*open.fs, at.as_encoded_bytes())?;
    let stat = open.fs.stat(id)?;
    if stat.kind != FileKind::File {
        let path = at.to_string_lossy().into_owned();
        let failure = Failure::from(GuestError::NotAFile { path, kind: stat.kind.text() });
        return Err(match &stat.target {
            Some(target) => failure.hint(format!("It leads to {target}.")),
            None => failure.hint("List it with `outrider disk ls`."),
        });
    }
    warn(&open);
    let Some(path) = out else {
        let stdout = io::stdout().lock();
        copy(&*open.fs, id, stat.size, stdout)?;
        return Ok(ExitCode::SUCCESS);
    };
    let create = File::create_new(&path)
        .map_err(|e| Failure::new(format!("could not create {}: {e}", path.display())))?;
    let copied = copy(&*open.fs, id, stat.size, &create).and_then(|()| {
        create
            .sync_all()
            .map_err(|e| Failure::new(format!("could not write {}: {e}", path.display())))
    });
    if let Err(failure) = copied {
        // Half a file would look like one.
        let _ = std::fs::remove_file(&path);
        return Err(failure);
    }
    if json {
        output::json(&json!({ "ok": true, "out": path, "size_bytes": stat.size }));
    }
    Ok(ExitCode::SUCCESS)
}

fn copy(fs: &dyn FileSystem, id: FileId, size: u64, mut out: impl Write) -> Result<(), Failure> {
    let mut buf = vec![0; STEP];
    let mut done = 0;
    while done < size {
        let read = fs.read(id, done, &mut buf)?;
        if read == 0 {
            return Err(Failure::new(format!("the file ends after {done} of its {size} bytes")));
        }
        out.write_all(&buf[..read])?;
        done += read as u64;
    }
    out.flush()?;
    Ok(())
}

fn open(file: &Path) -> Result<GuestDisk, Failure> {
    Ok(GuestDisk::open(Arc::from(open_disk(file)?), Limits::default())?)
}

fn is_readable(volume: &Volume) -> bool {
    matches!(volume.content, Content::FileSystem(_))
}

fn choose(disk: &GuestDisk, which: &Which) -> Result<Open, Failure> {
    let volume = match which.volume {
        Some(number) => disk.volume(number)?,
        None => {
            let readable: Vec<&Volume> = disk.volumes.iter().filter(|v| is_readable(v)).collect();
            match readable[..] {
                [one] => one,
                [] => return Err(nothing_readable(disk)),
                _ => {
                    let numbers: Vec<String> = readable
                        .iter()
                        .map(|v| format!("{} ({})", v.number, v.describe()))
                        .collect();
                    return Err(Failure::usage("the disk has several volumes that can be read")
                        .hint(format!("Choose one with --volume: {}.", numbers.join(", "))));
                }
            }
        }
    };
    Ok(Open { volume: volume.clone(), fs: disk.file_system(volume)? })
}

fn nothing_readable(disk: &GuestDisk) -> Failure {
    let mut failure = Failure::new(match disk.table {
        TableKind::None => {
            "the disk has neither a partition table nor a file system that can be read"
        }
        _ => "no volume of the disk has a file system that can be read",
    });
    for volume in &disk.volumes {
        failure = failure.because(format!("volume {}: {}", volume.number, volume.describe()));
    }
    failure
}

/// What the guest's own driver might show differently.
fn warn(open: &Open) {
    match open.fs.doubt() {
        Ok(None) => {}
        Ok(Some(doubt)) => {
            eprintln!("note: {doubt}; what is shown may be older than what the guest sees");
        }
        Err(e) => eprintln!("note: whether the file system is at rest cannot be told: {e}"),
    }
}

/// A volume, its file system and what it is, in words.
type Described<'a> = (&'a Volume, Option<Box<dyn FileSystem>>, String);

fn volumes(disk: &GuestDisk, json: bool) -> Done {
    let described: Vec<Described<'_>> = disk
        .volumes
        .iter()
        .map(|v| {
            if !is_readable(v) {
                return (v, None, v.describe());
            }
            match disk.file_system(v) {
                Ok(fs) => {
                    let kind = fs.facts().kind.to_string();
                    (v, Some(fs), kind)
                }
                Err(e) => (v, None, format!("not readable: {e}")),
            }
        })
        .collect();
    let table = match disk.table {
        TableKind::Mbr => "mbr",
        TableKind::Gpt => "gpt",
        TableKind::None => "none",
    };
    if json {
        let volumes: Vec<Value> =
            described.iter().map(|(v, fs, text)| volume_json(v, fs.as_deref(), text)).collect();
        output::json(
            &json!({ "ok": true, "table": table, "doubts": disk.doubts, "volumes": volumes }),
        );
        return Ok(ExitCode::SUCCESS);
    }
    for doubt in &disk.doubts {
        eprintln!("note: {doubt}");
    }
    if described.is_empty() {
        return Err(nothing_readable(disk));
    }
    let rows = described.iter().map(|(v, fs, text)| {
        [
            v.number.to_string(),
            bytes(v.range.len),
            output::or_dash(&v.partition.map(partition::type_name).unwrap_or_default()),
            text.clone(),
            output::or_dash(&fs.as_ref().map(|f| f.facts().label.to_string()).unwrap_or_default()),
            output::or_dash(&v.name),
        ]
    });
    let headers = ["volume", "size", "type", "content", "label", "name"];
    println!("{}", output::right(output::table(headers, rows.collect()), &[0, 1]));
    Ok(ExitCode::SUCCESS)
}

fn volume_json(v: &Volume, fs: Option<&dyn FileSystem>, text: &str) -> Value {
    let file_system = fs.map(|fs| {
        let facts = fs.facts();
        json!({
            "kind": facts.kind.to_string(), "label": facts.label.to_string(), "size_bytes": facts.size,
            "cluster_bytes": facts.cluster, "id": facts.id, "doubt": fs.doubt().unwrap_or_else(|e| Some(e.to_string())),
        })
    });
    json!({
        "volume": v.number, "offset_bytes": v.range.start, "size_bytes": v.range.len,
        "type": v.partition.map(partition::type_name), "name": v.name, "content": text, "file_system": file_system,
    })
}

fn directory(open: &Open, at: &OsStr, id: FileId, json: bool) -> Done {
    let mut found: Vec<(Entry, Result<Stat, GuestError>)> = Vec::new();
    for entry in path::sorted(&*open.fs, id)? {
        let stat = open.fs.stat(entry.id);
        found.push((entry, stat));
    }
    if json {
        let entries: Vec<Value> = found.iter().map(|(e, s)| entry_json(e, s)).collect();
        output::json(&json!({
            "ok": true, "volume": open.volume.number, "path": at.to_string_lossy(), "entries": entries,
        }));
        return Ok(ExitCode::SUCCESS);
    }
    let rows = found.iter().map(|(entry, stat)| match stat {
        Ok(stat) => row(&entry.name.to_string(), stat),
        Err(e) => ["?".into(), "?".into(), "?".into(), format!("{} ({e})", entry.name)],
    });
    let headers = ["kind", "size", "modified", "name"];
    println!("{}", output::right(output::table(headers, rows.collect()), &[1]));
    Ok(ExitCode::SUCCESS)
}

fn row(name: &str, stat: &Stat) -> [String; 4] {
    let mut name = name.to_owned();
    if let Some(target) = &stat.target {
        name.push_str(&format!(" -> {target}"));
    }
    for stream in &stat.streams {
        name.push_str(&format!(" +{}", stream.name));
    }
    [
        kind(stat.kind).to_owned(),
        if stat.kind == FileKind::File { stat.size.to_string() } else { "-".into() },
        stat.modified.map_or_else(|| "-".into(), time),
        name,
    ]
}

fn kind(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "link",
        FileKind::Other => "other",
    }
}

fn entry_json(entry: &Entry, stat: &Result<Stat, GuestError>) -> Value {
    let mut value = match stat {
        Ok(stat) => stat_json(stat),
        Err(e) => json!({ "kind": kind(entry.kind), "error": e.to_string() }),
    };
    value["name"] = json!(entry.name.to_string());
    value
}

fn stat_json(stat: &Stat) -> Value {
    let streams: Vec<Value> = stat
        .streams
        .iter()
        .map(|s| json!({ "name": s.name.to_string(), "size_bytes": s.size }))
        .collect();
    json!({
        "kind": kind(stat.kind), "size_bytes": stat.size, "modified": stat.modified.map(time),
        "created": stat.created.map(time), "accessed": stat.accessed.map(time), "links": stat.links,
        "mode": stat.mode.map(|m| format!("{m:04o}")), "uid": stat.owner.map(|o| o.0), "gid": stat.owner.map(|o| o.1),
        "attributes": stat.attributes, "target": stat.target.as_ref().map(ToString::to_string), "streams": streams,
        "unreadable": stat.unreadable,
    })
}

/// One file: its facts, and where its content is on the disk.
fn one(open: &Open, at: &OsStr, id: FileId, stat: &Stat, json: bool) -> Done {
    let extents = open.fs.extents(id);
    if json {
        let mut value = stat_json(stat);
        value["ok"] = json!(true);
        value["volume"] = json!(open.volume.number);
        value["path"] = json!(at.to_string_lossy());
        value["extents"] = match &extents {
            Ok(e) => e.iter().map(|e| json!([e.file_offset, e.disk.start, e.disk.len])).collect(),
            Err(_) => Value::Null,
        };
        output::json(&value);
        return Ok(ExitCode::SUCCESS);
    }
    let headers = ["kind", "size", "modified", "name"];
    let shown = row(&at.to_string_lossy(), stat);
    println!("{}", output::right(output::table(headers, vec![shown]), &[1]));
    if let Some(why) = &stat.unreadable {
        println!("content     not readable: {why}");
    }
    for stream in &stat.streams {
        println!("stream      {} ({} bytes), not read", stream.name, stream.size);
    }
    match (&extents, stat.kind) {
        (Ok(extents), _) => {
            let total: u64 = extents.iter().map(|e| e.disk.len).sum();
            println!("on disk     {} in {} pieces", bytes(total), extents.len());
        }
        (Err(GuestError::NoExtents { reason }), FileKind::File) => println!("on disk     {reason}"),
        (Err(e), FileKind::File) => println!("on disk     {e}"),
        _ => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// RFC 3339; the guest's local time has no zone.
fn time(t: GuestTime) -> String {
    let nanos = i32::try_from(t.nanos).unwrap_or(0);
    let Ok(stamp) = jiff::Timestamp::new(t.seconds, nanos) else {
        return format!("@{}", t.seconds);
    };
    let zoned = stamp.to_zoned(jiff::tz::TimeZone::UTC);
    let zone = if t.local { "" } else { "Z" };
    format!("{}{zone}", zoned.strftime("%Y-%m-%dT%H:%M:%S"))
}
