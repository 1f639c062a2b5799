//! One .db3 file of rosbag2.

use super::{RawMessage, Topic, Visit, MAX_MESSAGE};
use crate::error::{Error, Result};
use rusqlite::Connection;
use std::collections::HashMap;
use std::path::Path;

/// Visits all messages by time of recording. `Some(why)` if the file could not be read to its end.
pub fn read(path: &Path, visit: Visit) -> Result<Option<String>> {
    match crate::sqlite::open(path, false, MAX_MESSAGE) {
        Ok(db) => read_connection(&db, visit),
        Err(e) => Ok(Some(format!("not a database ({e})"))),
    }
}

/// [`read`] on an open database.
fn read_connection(db: &Connection, visit: Visit) -> Result<Option<String>> {
    let topics = match topics(db) {
        Ok(t) => t,
        Err(e) => return Ok(Some(format!("not a rosbag2 database ({e})"))),
    };
    // Errors of the visitor end the reading; those of SQLite are damage, and what was read counts.
    let mut failed: Option<Error> = None;
    let damage = (|| -> rusqlite::Result<()> {
        let mut statement = db.prepare("SELECT topic_id, timestamp, data FROM messages ORDER BY timestamp, id")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let Some((name, topic)) = topics.get(&row.get::<_, i64>(0)?) else { continue };
            let message = RawMessage {
                topic: name,
                type_name: &topic.type_name,
                serialization: &topic.serialization,
                log_time_ns: row.get(1)?,
                data: row.get_ref(2)?.as_blob().unwrap_or(&[]),
            };
            if let Err(e) = visit(message) {
                failed = Some(e);
                return Ok(());
            }
        }
        Ok(())
    })();
    match (failed, damage) {
        (Some(e), _) => Err(e),
        (None, Err(e)) => Ok(Some(format!("damaged: {e}"))),
        (None, Ok(())) => Ok(None),
    }
}

fn topics(db: &Connection) -> rusqlite::Result<HashMap<i64, (String, Topic)>> {
    let mut statement = db.prepare("SELECT id, name, type, serialization_format FROM topics")?;
    let rows = statement.query_map([], |r| {
        let topic = Topic { type_name: r.get(2)?, serialization: r.get(3)?, messages: 0 };
        Ok((r.get(0)?, (r.get(1)?, topic)))
    })?;
    rows.collect()
}
