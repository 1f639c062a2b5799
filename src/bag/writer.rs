//! Writes a rosbag2 folder: one MCAP file and metadata.yaml.

use super::messages::{definition, Message};
use super::Topic;
use crate::error::{write_file, Error, Result};
use mcap::records::MessageHeader;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

/// A bag being written. [`BagWriter::finish`] must be called; a bag without it has no index, but can
/// still be read.
pub struct BagWriter {
    folder: PathBuf,
    file: String,
    mcap: mcap::Writer<BufWriter<File>>,
    channels: BTreeMap<String, (u16, Topic)>,
    range: Option<(i64, i64)>,
}

fn failed(e: mcap::McapError) -> Error {
    Error::bag(format!("writing: {e}"))
}

impl BagWriter {
    /// Makes the folder and begins `FOLDER/NAME_0.mcap`, chunks compressed with zstd.
    ///
    /// Errors: the folder cannot be made or written.
    pub fn create(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let file = format!("{}_0.mcap", folder.file_name().unwrap_or_default().to_string_lossy());
        let path = folder.join(&file);
        let out = BufWriter::new(File::create(&path).map_err(Error::io(&path))?);
        let options = mcap::WriteOptions::new().profile("ros2").library("structvpr").compression(Some(mcap::Compression::Zstd));
        let mcap = options.create(out).map_err(failed)?;
        Ok(Self { folder: folder.into(), file, mcap, channels: BTreeMap::new(), range: None })
    }

    /// Writes one message, recorded at `log_time_ns`.
    pub fn write<M: Message>(&mut self, topic: &str, log_time_ns: i64, message: &M) -> Result<()> {
        if !self.channels.contains_key(topic) {
            let text = definition(M::TYPE).ok_or_else(|| Error::bag(format!("no definition of {}", M::TYPE)))?;
            let schema = self.mcap.add_schema(M::TYPE, "ros2msg", text.as_bytes()).map_err(failed)?;
            let id = self.mcap.add_channel(schema, topic, "cdr", &BTreeMap::new()).map_err(failed)?;
            let entry = Topic { type_name: M::TYPE.into(), serialization: "cdr".into(), messages: 0 };
            self.channels.insert(topic.into(), (id, entry));
        }
        let Some((id, entry)) = self.channels.get_mut(topic) else { return Ok(()) };
        let time = log_time_ns.max(0) as u64;
        let header = MessageHeader { channel_id: *id, sequence: entry.messages as u32, log_time: time, publish_time: time };
        self.mcap.write_to_known_channel(&header, &message.encode()).map_err(failed)?;
        entry.messages += 1;
        let (first, last) = self.range.unwrap_or((log_time_ns, log_time_ns));
        self.range = Some((first.min(log_time_ns), last.max(log_time_ns)));
        Ok(())
    }

    /// Writes the index and metadata.yaml (version 5, which every ROS 2 since Galactic reads).
    pub fn finish(mut self) -> Result<()> {
        self.mcap.finish().map_err(failed)?;
        let (first, last) = self.range.unwrap_or((0, 0));
        let total: u64 = self.channels.values().map(|(_, t)| t.messages).sum();
        let mut y = String::from("rosbag2_bagfile_information:\n  version: 5\n  storage_identifier: mcap\n");
        let _ = writeln!(y, "  duration:\n    nanoseconds: {}", last - first);
        let _ =
            writeln!(y, "  starting_time:\n    nanoseconds_since_epoch: {first}\n  message_count: {total}\n  topics_with_message_count:");
        for (name, (_, t)) in &self.channels {
            let _ = writeln!(
                y,
                "    - topic_metadata:\n        name: {name}\n        type: {}\n        serialization_format: cdr\n        offered_qos_profiles: \"\"\n      message_count: {}",
                t.type_name, t.messages
            );
        }
        let _ = writeln!(y, "  compression_format: \"\"\n  compression_mode: \"\"\n  relative_file_paths:\n    - {}", self.file);
        let _ = writeln!(
            y,
            "  files:\n    - path: {}\n      starting_time:\n        nanoseconds_since_epoch: {first}\n      duration:\n        nanoseconds: {}\n      message_count: {total}",
            self.file,
            last - first
        );
        write_file(&self.folder.join("metadata.yaml"), y.as_bytes())
    }
}
