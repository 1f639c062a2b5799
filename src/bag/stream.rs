//! One MCAP file as a stream of bytes.

use super::{RawMessage, Visit, MAX_MESSAGE};
use crate::error::Result;
use mcap::records::op;
use mcap::sans_io::linear_reader::{LinearReadEvent, LinearReader, LinearReaderOptions};
use std::collections::HashMap;
use std::io::Read;

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
pub fn read_mcap(mut source: impl Read, visit: Visit) -> Result<Option<String>> {
    let options = LinearReaderOptions::default().with_record_length_limit(MAX_MESSAGE).with_validate_chunk_crcs(true);
    let mut reader = LinearReader::new_with_options(options);
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
