//! The zip archive that torch.save writes: stored entries, found through the central directory and used in place.
//!
//! Only what that needs is read (zip64 included); nothing is ever unpacked. Layout: PKWARE's APPNOTE.TXT 6.3.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// More entries than any shard has tensors.
const MAX_ENTRIES: u64 = 200_000;
const END_LENGTH: usize = 22;
const CENTRAL_LENGTH: usize = 46;
const LOCAL_LENGTH: usize = 30;
/// What a 32-bit field says when the zip64 field has the number.
const IN_ZIP64: u64 = u32::MAX as u64;

/// Where the bytes of an entry lie in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) start: usize,
    pub(super) len: usize,
}

/// Entry name to its bytes; every span lies within the file.
#[derive(Debug)]
pub(super) struct Archive {
    entries: BTreeMap<String, Span>,
}

/// The little-endian number of `N` bytes at `at`, if it is there.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<u64> {
    let found: [u8; N] = bytes.get(at..)?.first_chunk().copied()?;
    Some(found.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
}

impl Archive {
    /// Whether this begins like a zip file with entries.
    pub(super) fn recognises(bytes: &[u8]) -> bool {
        bytes.starts_with(b"PK\x03\x04")
    }

    pub(super) fn parse(file: &str, bytes: &[u8]) -> Result<Self> {
        let broken = |what: &str| {
            Error::data(format!("{file}: the zip archive is broken: {what}"))
                .hint("the file may be truncated: fetch it again")
        };
        let (count, size, start) = directory(bytes).ok_or_else(|| broken("its end record is missing"))?;
        let directory = usize::try_from(start).ok().zip(usize::try_from(size).ok());
        let directory = directory.and_then(|(start, size)| bytes.get(start..start.checked_add(size)?));
        let mut directory = directory.ok_or_else(|| broken("its directory is not within the file"))?;
        if count > MAX_ENTRIES {
            return Err(broken(&format!("it claims {count} entries, and {MAX_ENTRIES} is the limit")));
        }
        let mut entries = BTreeMap::new();
        for index in 0..count {
            let entry = central(directory).ok_or_else(|| broken(&format!("directory entry {index} is cut short")))?;
            directory = entry.rest;
            let name = std::str::from_utf8(entry.name);
            let name = name.map_err(|_| broken(&format!("the name of entry {index} is not UTF-8")))?;
            if entry.flags & 1 != 0 || entry.method != 0 || entry.stored != entry.size {
                let how = if entry.flags & 1 != 0 { "encrypted" } else { "compressed" };
                return Err(Error::data(format!(
                    "{file}: its entry {name} is {how}; torch.save stores entries as they are"
                ))
                .hint("load the file in PyTorch (weights_only=True) and save it again"));
            }
            let span = local(bytes, entry.header, entry.size);
            let span = span.ok_or_else(|| broken(&format!("{name} is not within the file")))?;
            if entries.insert(name.to_owned(), span).is_some() {
                return Err(broken(&format!("{name} is there twice")));
            }
        }
        Ok(Self { entries })
    }

    pub(super) fn get(&self, name: &str) -> Option<Span> {
        self.entries.get(name).copied()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }
}

/// Number of entries, bytes and place of the central directory.
fn directory(bytes: &[u8]) -> Option<(u64, u64, u64)> {
    // The end record is the last thing in the file, but for a comment of up to 65535 bytes.
    let last = bytes.len().checked_sub(END_LENGTH)?;
    let first = last.saturating_sub(usize::from(u16::MAX));
    let end = (first..=last).rev().find(|&at| bytes[at..].starts_with(b"PK\x05\x06"))?;
    let found = (number::<2>(bytes, end + 10)?, number::<4>(bytes, end + 12)?, number::<4>(bytes, end + 16)?);
    let locator = end.checked_sub(20).filter(|&at| bytes[at..].starts_with(b"PK\x06\x07"));
    let Some(locator) = locator else { return Some(found) };
    let record = usize::try_from(number::<8>(bytes, locator + 8)?).ok()?;
    let record = bytes.get(record..).filter(|record| record.starts_with(b"PK\x06\x06"))?;
    Some((number::<8>(record, 32)?, number::<8>(record, 40)?, number::<8>(record, 48)?))
}

struct Central<'a> {
    flags: u64,
    method: u64,
    stored: u64,
    size: u64,
    /// Where the entry's local header is.
    header: u64,
    name: &'a [u8],
    rest: &'a [u8],
}

fn central(directory: &[u8]) -> Option<Central<'_>> {
    if !directory.starts_with(b"PK\x01\x02") {
        return None;
    }
    let (name_length, extra_length) = (number::<2>(directory, 28)? as usize, number::<2>(directory, 30)? as usize);
    let comment_length = number::<2>(directory, 32)? as usize;
    let (name, rest) = directory.get(CENTRAL_LENGTH..)?.split_at_checked(name_length)?;
    let (mut extra, rest) = rest.split_at_checked(extra_length)?;
    let rest = rest.get(comment_length..)?;
    let mut fields = [number::<4>(directory, 24)?, number::<4>(directory, 20)?, number::<4>(directory, 42)?];
    while let (Some(id), Some(length)) = (number::<2>(extra, 0), number::<2>(extra, 2)) {
        let field = extra.get(4..)?.get(..length as usize)?;
        if id == 1 {
            // The zip64 field: 64-bit numbers for those that did not fit, in this order.
            let overflowing = fields.iter_mut().filter(|value| **value == IN_ZIP64);
            for (index, value) in overflowing.enumerate() {
                *value = number::<8>(field, index * 8)?;
            }
        }
        extra = &extra[4 + field.len()..];
    }
    let [size, stored, header] = fields;
    Some(Central {
        flags: number::<2>(directory, 8)?,
        method: number::<2>(directory, 10)?,
        stored,
        size,
        header,
        name,
        rest,
    })
}

/// The entry's bytes, after its local header.
fn local(bytes: &[u8], header: u64, size: u64) -> Option<Span> {
    let at = usize::try_from(header).ok()?;
    let header = bytes.get(at..).filter(|header| header.starts_with(b"PK\x03\x04"))?;
    let names = number::<2>(header, 26)? as usize + number::<2>(header, 28)? as usize;
    let start = at.checked_add(LOCAL_LENGTH + names)?;
    let len = usize::try_from(size).ok()?;
    (start.checked_add(len)? <= bytes.len()).then_some(Span { start, len })
}
