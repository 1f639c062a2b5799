//! One MCAP file as a stream of bytes.

use super::{RawMessage, Visit, MAX_MESSAGE};
use crate::error::Result;
use mcap::records::Record;
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
            Ok(LinearReadEvent::Record { opcode, data }) => match mcap::parse_record(opcode, data) {
                Err(e) => return ended(messages, e.to_string()),
                Ok(Record::Schema { header, .. }) => drop(schemas.insert(header.id, header.name)),
                Ok(Record::Channel(c)) => {
                    let type_name = schemas.get(&c.schema_id).cloned().unwrap_or_default();
                    channels.insert(c.id, Channel { topic: c.topic, type_name, serialization: c.message_encoding });
                }
                Ok(Record::Message { header, data }) => {
                    if let Some(c) = channels.get(&header.channel_id) {
                        messages += 1;
                        visit(RawMessage {
                            topic: &c.topic,
                            type_name: &c.type_name,
                            serialization: &c.serialization,
                            log_time_ns: header.log_time as i64,
                            data: &data,
                        })?;
                    }
                }
                Ok(_) => {}
            },
        }
    }
    Ok(None)
}
