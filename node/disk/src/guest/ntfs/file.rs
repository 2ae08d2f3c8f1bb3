//! A file: its base record with all that its attribute list adds.

use std::collections::BTreeMap;

use super::super::GuestError;
use super::super::bytes::{slice, u16_at, u32_at, u64_at};
use super::Ntfs;
use super::record::{Attribute, Body, NonResident, Record, kind};
use super::runs::{self, Run};

/// Longest attribute list: NTFS itself has this bound.
const MAX_LIST: u64 = 256 << 10;

/// A file with its attributes, pieces joined.
#[derive(Debug, Clone)]
pub(super) struct File {
    pub(super) sequence: u16,
    pub(super) links: u16,
    pub(super) directory: bool,
    attributes: Vec<Attribute>,
}

impl File {
    /// The value of the first resident attribute of a kind.
    pub(super) fn resident(&self, kind: u32) -> Option<&[u8]> {
        self.attributes.iter().filter(|a| a.kind == kind).find_map(|a| match &a.body {
            Body::Resident(value) => Some(value.as_slice()),
            Body::NonResident(_) => None,
        })
    }

    pub(super) fn attribute(&self, kind: u32, name: &[u16]) -> Option<&Attribute> {
        self.attributes.iter().find(|a| a.kind == kind && a.name == name)
    }

    /// A data stream.
    pub(super) fn stream(&self, name: &[u16]) -> Option<&Attribute> {
        self.attribute(kind::DATA, name)
    }

    /// The named data streams.
    pub(super) fn streams(&self) -> impl Iterator<Item = &Attribute> {
        self.attributes.iter().filter(|a| a.kind == kind::DATA && !a.name.is_empty())
    }
}

impl Ntfs {
    /// Finds the clusters of the MFT, which is itself a file whose attribute list may lie in it.
    pub(super) fn map_mft(&mut self) -> Result<(), GuestError> {
        let cluster = u64::from(self.boot.cluster);
        let bytes = self.window.bytes(self.boot.mft * cluster, self.boot.record as usize)?;
        let record = Record::parse(bytes, 0)?;
        let no_data = || GuestError::damaged("the master file table", "it has no content");
        let data = record.attributes.iter().find(|a| a.kind == kind::DATA && a.name.is_empty());
        let Some(Attribute { body: Body::NonResident(body), .. }) = data else {
            return Err(no_data());
        };
        self.mft = self.runs(body)?;
        let Some(list) = record.attributes.iter().find(|a| a.kind == kind::ATTRIBUTE_LIST) else {
            return Ok(());
        };
        // Each piece lies in what the pieces before it map.
        for (number, _) in
            self.list_entries(list)?.into_iter().filter(|(n, k)| *n != 0 && *k == kind::DATA)
        {
            let extension = self.record(number)?;
            for attribute in extension.attributes {
                if let (kind::DATA, true, Body::NonResident(body)) =
                    (attribute.kind, attribute.name.is_empty(), attribute.body)
                {
                    let mapped = self.mft.last().map_or(0, |r| r.vcn + r.count);
                    if body.lowest != mapped {
                        return Err(GuestError::damaged(
                            "the master file table",
                            "a piece of it is missing",
                        ));
                    }
                    for (lowest, highest, encoded) in &body.runs {
                        runs::decode(
                            encoded,
                            *lowest,
                            *highest,
                            self.boot.clusters,
                            &mut self.mft,
                        )?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A record of the MFT.
    pub(super) fn record(&self, number: u64) -> Result<Record, GuestError> {
        let (record, cluster) = (u64::from(self.boot.record), u64::from(self.boot.cluster));
        let outside = || {
            GuestError::damaged(
                "the master file table",
                format!("record {number} is behind its end"),
            )
        };
        let offset = number.checked_mul(record).ok_or_else(outside)?;
        let mut bytes = vec![0; record as usize];
        let mut done = 0;
        // A record may be larger than a cluster, so it may be in several runs.
        while done < record {
            let at = offset + done;
            let run = self.run_at(at / cluster).ok_or_else(outside)?;
            let lcn = run.lcn.ok_or_else(outside)?;
            let within = at - run.vcn * cluster;
            let len = (record - done).min(run.count * cluster - within);
            let part = &mut bytes[done as usize..(done + len) as usize];
            self.window.read(lcn * cluster + within, part)?;
            done += len;
        }
        Record::parse(bytes, number)
    }

    fn run_at(&self, vcn: u64) -> Option<Run> {
        let at = self.mft.partition_point(|r| r.vcn + r.count <= vcn);
        self.mft.get(at).copied().filter(|r| r.vcn <= vcn)
    }

    /// A file by the number of its base record.
    pub(super) fn file(&self, number: u64) -> Result<File, GuestError> {
        let bad = |detail: String| {
            GuestError::damaged("the master file table", format!("record {number} {detail}"))
        };
        let base = self.record(number)?;
        if !base.in_use {
            return Err(bad("is not in use".into()));
        }
        if base.base != 0 {
            return Err(bad(format!("is an extension of record {}", base.base)));
        }
        let mut attributes = base.attributes;
        if let Some(list) = attributes.iter().find(|a| a.kind == kind::ATTRIBUTE_LIST) {
            let mut others: Vec<u64> = self
                .list_entries(list)?
                .into_iter()
                .map(|(n, _)| n)
                .filter(|n| *n != number)
                .collect();
            others.sort_unstable();
            others.dedup();
            for other in others {
                let extension = self.record(other)?;
                if !extension.in_use || extension.base != number {
                    return Err(bad(format!(
                        "names record {other} as its extension, which it is not"
                    )));
                }
                attributes.extend(extension.attributes);
            }
        }
        let attributes = join(attributes)
            .map_err(|name| bad(format!("lacks a piece of attribute {name:#x}")))?;
        Ok(File {
            sequence: base.sequence,
            links: base.links,
            directory: base.directory,
            attributes,
        })
    }

    /// An attribute list: (record, kind) of each entry.
    fn list_entries(&self, list: &Attribute) -> Result<Vec<(u64, u32)>, GuestError> {
        let bad = |detail: &str| GuestError::damaged("an attribute list", detail);
        if list.size() > MAX_LIST {
            return Err(bad("it is longer than NTFS allows"));
        }
        let value = self.value(list, MAX_LIST)?;
        let (mut at, mut out) = (0, Vec::new());
        while at + 26 <= value.len() {
            let len = usize::from(u16_at(&value, at + 4));
            let entry = slice(&value, at, len)
                .filter(|_| len >= 26)
                .ok_or_else(|| bad("an entry is cut off"))?;
            out.push((u64_at(entry, 16) & 0xffff_ffff_ffff, u32_at(entry, 0)));
            at += len;
        }
        Ok(out)
    }
}

/// Joins the pieces of non-resident attributes. Gives the kind of one that has a gap.
fn join(attributes: Vec<Attribute>) -> Result<Vec<Attribute>, u32> {
    let mut out = Vec::new();
    /// Type and name.
    type Key = (u32, Vec<u16>);
    let mut pieces: BTreeMap<Key, Vec<(u16, NonResident)>> = BTreeMap::new();
    for attribute in attributes {
        match attribute.body {
            Body::Resident(_) => out.push(attribute),
            Body::NonResident(body) => {
                pieces
                    .entry((attribute.kind, attribute.name))
                    .or_default()
                    .push((attribute.flags, body));
            }
        }
    }
    for ((kind, name), mut parts) in pieces {
        parts.sort_by_key(|(_, p)| p.lowest);
        let mut parts = parts.into_iter();
        let Some((flags, mut whole)) = parts.next() else { continue };
        if whole.lowest != 0 {
            return Err(kind);
        }
        for (_, part) in parts {
            if part.lowest != whole.highest.wrapping_add(1) {
                return Err(kind);
            }
            whole.highest = part.highest;
            whole.runs.extend(part.runs);
        }
        out.push(Attribute { kind, name, flags, body: Body::NonResident(whole) });
    }
    Ok(out)
}
