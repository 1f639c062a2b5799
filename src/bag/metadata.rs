//! metadata.yaml of rosbag2, versions 1 to 9.

use super::Topic;
use crate::error::{Error, Result};
use serde::Deserialize;
use std::collections::BTreeMap;

/// What we need of it.
#[derive(Debug)]
pub struct Metadata {
    pub files: Vec<String>,
    pub topics: BTreeMap<String, Topic>,
    pub message_compression: bool,
}

#[derive(Deserialize)]
struct Yaml {
    rosbag2_bagfile_information: Information,
}

#[derive(Deserialize)]
struct Information {
    #[serde(default)]
    relative_file_paths: Vec<String>,
    #[serde(default)]
    topics_with_message_count: Vec<Counted>,
    #[serde(default)]
    compression_format: String,
    #[serde(default)]
    compression_mode: String,
}

#[derive(Deserialize)]
struct Counted {
    topic_metadata: TopicMetadata,
    message_count: u64,
}

#[derive(Deserialize)]
struct TopicMetadata {
    name: String,
    #[serde(rename = "type")]
    type_name: String,
    #[serde(default)]
    serialization_format: String,
}

impl Metadata {
    /// Errors: not rosbag2's YAML; a compression that we do not unpack.
    pub fn parse(text: &str) -> Result<Self> {
        let yaml: Yaml = serde_yaml::from_str(text).map_err(|e| Error::bag(e.to_string()))?;
        let info = yaml.rosbag2_bagfile_information;
        let mode = info.compression_mode.to_ascii_lowercase();
        if !matches!(info.compression_format.as_str(), "" | "zstd") && !matches!(mode.as_str(), "" | "none") {
            return Err(Error::bag(format!("compression `{}` (known: zstd)", info.compression_format)));
        }
        let topic = |c: Counted| {
            let t = c.topic_metadata;
            (t.name, Topic { type_name: t.type_name, serialization: t.serialization_format, messages: c.message_count })
        };
        Ok(Self {
            files: info.relative_file_paths,
            topics: info.topics_with_message_count.into_iter().map(topic).collect(),
            message_compression: mode == "message",
        })
    }
}
