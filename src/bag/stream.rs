//! One MCAP file as a stream of bytes.

use super::{RawMessage, Visit, MAX_MESSAGE};
use crate::error::Result;
use mcap::records::op;
use mcap::sans_io::linear_reader::{LinearReadEvent, LinearReader, LinearReaderOptions};
use std::collections::HashMap;
use std::io::{Error, ErrorKind, Read};

/// Most bytes that are asked of the file at once: a lying length must not allocate more.
const MAX_STEP: usize = 1 << 20;

struct Channel {
    topic: String,
    type_name: String,
    serialization: String,
}

/// Visits all messages in the order of the file. `Some(why)` if it could not be read to its end:
/// cut short, damaged, or not MCAP at all.
///
/// Errors: those of `visit`.
pub fn read_mcap(source: impl Read, visit: Visit) -> Result<Option<String>> {
    let options = LinearReaderOptions::default().with_record_length_limit(MAX_MESSAGE).with_validate_chunk_crcs(true);
    let mut reader = LinearReader::new_with_options(options);
    let mut source = Framed::new(source);
    let mut schemas: HashMap<u16, String> = HashMap::new();
    let mut channels: HashMap<u16, Channel> = HashMap::new();
    let mut messages = 0u64;
    let ended = |messages: u64, why: String| Ok(Some(format!("{why}; {messages} messages were read before")));
    while let Some(event) = reader.next_event() {
        match event {
            Err(e) => return ended(messages, e.to_string()),
            Ok(LinearReadEvent::ReadRequest(n)) => {
                let buffer = reader.insert(n.min(MAX_STEP));
                match source.read(buffer) {
                    Ok(0) => {
                        reader.notify_read(0);
                        return ended(messages, "the file is cut short".into());
                    }
                    Ok(n) => reader.notify_read(n),
                    Err(e) => return ended(messages, e.to_string()),
                }
            }
            Ok(LinearReadEvent::Record { opcode, data }) => match Record::parse(opcode, data) {
                None => return ended(messages, format!("a record of kind {opcode} contradicts itself")),
                Some(Record::Schema { id, name }) => drop(schemas.insert(id, name)),
                Some(Record::Channel { id, schema, topic, serialization }) => {
                    let type_name = schemas.get(&schema).cloned().unwrap_or_default();
                    channels.insert(id, Channel { topic, type_name, serialization });
                }
                Some(Record::Message { channel, log_time_ns, data }) => {
                    if let Some(c) = channels.get(&channel) {
                        messages += 1;
                        visit(RawMessage { topic: &c.topic, type_name: &c.type_name, serialization: &c.serialization, log_time_ns, data })?;
                    }
                }
                Some(Record::Other) => {}
            },
        }
    }
    Ok(None)
}

/// An MCAP file whose chunks hold the records that they claim. The crate (0.26) subtracts a record's length
/// from what is left of an uncompressed chunk and does not look whether it fits: the difference wraps, the chunk
/// never ends, and the messages of all later chunks are passed over in silence (a debug build panics).
struct Framed<R> {
    source: R,
    /// Bytes up to the next record's header.
    skip: u64,
    /// What has come of that header.
    header: Vec<u8>,
    /// Inside an uncompressed chunk: bytes of records that are left, and of padding behind them.
    chunk: Option<(u64, u64)>,
}

impl<R: Read> Framed<R> {
    /// A kind and a length.
    const RECORD: usize = 9;
    /// A chunk's times, size, CRC, the (empty) name of its compression, and the size of its records.
    const CHUNK: usize = 40;

    fn new(source: R) -> Self {
        Self { source, skip: mcap::MAGIC.len() as u64, header: Vec::with_capacity(Self::RECORD + Self::CHUNK), chunk: None }
    }

    /// Errors: a record that is longer than what is left of its chunk.
    fn follow(&mut self, mut bytes: &[u8]) -> std::io::Result<()> {
        while !bytes.is_empty() {
            let skipped = bytes.len().min(usize::try_from(self.skip).unwrap_or(usize::MAX));
            (self.skip, bytes) = (self.skip - skipped as u64, &bytes[skipped..]);
            let taken = bytes.len().min(self.whole() - self.header.len());
            self.header.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.header.len() == self.whole() {
                self.record()?;
                self.header.clear();
            }
        }
        Ok(())
    }

    /// Length of the header that is being read, as far as its first byte tells.
    fn whole(&self) -> usize {
        match (self.chunk, self.header.first()) {
            (None, Some(&op::CHUNK)) => Self::RECORD + Self::CHUNK,
            _ => Self::RECORD,
        }
    }

    /// A header is whole.
    fn record(&mut self) -> std::io::Result<()> {
        let u64_at = |at: usize| self.header[at..at + 8].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
        let len = u64_at(1);
        (self.skip, self.chunk) = match self.chunk {
            Some((left, padding)) => match left.checked_sub(len.saturating_add(Self::RECORD as u64)) {
                Some(0) => (len.saturating_add(padding), None),
                Some(left) => (len, Some((left, padding))),
                None => return Err(Error::new(ErrorKind::InvalidData, "a record is longer than the chunk that holds it")),
            },
            None if self.header[0] == op::CHUNK => {
                let rest = len.saturating_sub(Self::CHUNK as u64);
                let compressed = self.header[Self::RECORD + 28..Self::RECORD + 32] != [0; 4];
                match u64_at(Self::RECORD + 32) {
                    // More than the chunk holds: the crate says so itself.
                    size if !compressed && size > 0 => (0, Some((size, rest.saturating_sub(size)))),
                    _ => (rest, None),
                }
            }
            None => (len, None),
        };
        Ok(())
    }
}

impl<R: Read> Read for Framed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.source.read(buffer)?;
        self.follow(&buffer[..n])?;
        Ok(n)
    }
}

/// The records that we use. Parsed here and not by the crate, which reserves what a string's length
/// claims (up to 4 GB) before it looks for the bytes.
enum Record<'a> {
    Schema { id: u16, name: String },
    Channel { id: u16, schema: u16, topic: String, serialization: String },
    Message { channel: u16, log_time_ns: i64, data: &'a [u8] },
    Other,
}

impl<'a> Record<'a> {
    /// `None`: shorter than its own lengths say.
    fn parse(opcode: u8, data: &'a [u8]) -> Option<Self> {
        let u16_at = |at: usize| Some(u16::from_le_bytes(data.get(at..at + 2)?.try_into().ok()?));
        let string_at = |at: usize| -> Option<(String, usize)> {
            let len = u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?) as usize;
            let end = (at + 4).checked_add(len)?;
            Some((String::from_utf8_lossy(data.get(at + 4..end)?).into_owned(), end))
        };
        Some(match opcode {
            op::SCHEMA => Self::Schema { id: u16_at(0)?, name: string_at(2)?.0 },
            op::CHANNEL => {
                let (topic, end) = string_at(4)?;
                Self::Channel { id: u16_at(0)?, schema: u16_at(2)?, topic, serialization: string_at(end)?.0 }
            }
            op::MESSAGE => {
                let log_time = u64::from_le_bytes(data.get(6..14)?.try_into().ok()?);
                Self::Message { channel: u16_at(0)?, log_time_ns: i64::try_from(log_time).unwrap_or(i64::MAX), data: data.get(22..)? }
            }
            _ => Self::Other,
        })
    }
}
