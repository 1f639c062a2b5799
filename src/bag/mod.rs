//! rosbag2 without ROS: MCAP and SQLite3, split, compressed, truncated.
//!
//! What can be read is used: damage is reported as warnings, and only a bag with nothing to read is
//! an error.

pub mod cdr;
pub mod messages;
mod metadata;
mod sqlite;
mod stream;
mod writer;

pub use stream::read_mcap;
pub use writer::BagWriter;

use crate::error::{Error, Result};
use metadata::Metadata;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Largest message, and largest compressed file's unpacked record, in bytes.
pub const MAX_MESSAGE: usize = 256 << 20;
/// Largest unpacked size of a file-compressed bag.
const MAX_UNPACKED: u64 = 64 << 30;

/// A topic of a bag.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topic {
    /// Its type, `package/msg/Name`.
    pub type_name: String,
    /// `cdr`, or what a foreign middleware wrote.
    pub serialization: String,
    /// Messages on it.
    pub messages: u64,
}

/// A message as it lies in the bag.
#[derive(Clone, Copy, Debug)]
pub struct RawMessage<'a> {
    /// Name of the topic.
    pub topic: &'a str,
    /// Its type.
    pub type_name: &'a str,
    /// How it is serialised.
    pub serialization: &'a str,
    /// When it was recorded, nanoseconds.
    pub log_time_ns: i64,
    /// Serialised.
    pub data: &'a [u8],
}

/// What a visitor of messages is.
pub type Visit<'v> = &'v mut dyn FnMut(RawMessage) -> Result<()>;

/// An opened bag.
#[derive(Debug)]
pub struct Bag {
    path: PathBuf,
    files: Vec<PathBuf>,
    topics: BTreeMap<String, Topic>,
    message_compression: bool,
    warnings: Vec<String>,
}

impl Bag {
    /// Opens a bag's folder, its metadata.yaml, or one .mcap / .db3 file (either may end in .zstd).
    ///
    /// Errors: no such path, a folder without bag files, files that hold nothing readable.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_inner(path).map_err(|e| e.at(path))
    }

    fn open_inner(path: &Path) -> Result<Self> {
        let folder = if path.is_dir() {
            Some(path)
        } else if path.file_name().is_some_and(|n| n == "metadata.yaml") {
            path.parent()
        } else {
            None
        };
        let mut bag =
            Self { path: path.into(), files: Vec::new(), topics: BTreeMap::new(), message_compression: false, warnings: Vec::new() };
        match folder {
            Some(folder) => bag.open_folder(folder)?,
            None if path.is_file() => bag.files.push(path.into()),
            None => return Err(Error::bag("no such file or folder")),
        }
        if bag.topics.is_empty() {
            bag.scan()?;
        }
        Ok(bag)
    }

    fn open_folder(&mut self, folder: &Path) -> Result<()> {
        let yaml = folder.join("metadata.yaml");
        let metadata = match std::fs::read_to_string(&yaml) {
            Ok(text) => {
                Metadata::parse(&text).map_err(|e| self.warnings.push(format!("metadata.yaml: {e}; the files are read without it"))).ok()
            }
            Err(_) => {
                self.warnings.push("no metadata.yaml; the files are read without it".into());
                None
            }
        };
        if let Some(metadata) = metadata {
            self.message_compression = metadata.message_compression;
            for name in &metadata.files {
                // Some writers give the path from the folder's parent.
                let file = Path::new(name).file_name().unwrap_or_default();
                match [folder.join(name), folder.join(file)].into_iter().find(|p| p.is_file() && inside(p, folder)) {
                    Some(path) => self.files.push(path),
                    None => self.warnings.push(format!("metadata.yaml names `{name}`, which is not there")),
                }
            }
            if !self.files.is_empty() {
                self.topics = metadata.topics;
            }
        }
        if self.files.is_empty() {
            self.files = bag_files(folder)?;
        }
        if self.files.is_empty() {
            return Err(Error::bag("no .mcap or .db3 file in this folder: not a rosbag2 bag"));
        }
        Ok(())
    }

    /// Counts the topics by reading every message; for bags without metadata.
    fn scan(&mut self) -> Result<()> {
        let mut topics: BTreeMap<String, Topic> = BTreeMap::new();
        let warnings = self.read(None, &mut |m| {
            let topic = topics.entry(m.topic.to_string()).or_insert_with(|| Topic {
                type_name: m.type_name.to_string(),
                serialization: m.serialization.to_string(),
                messages: 0,
            });
            topic.messages += 1;
            Ok(())
        })?;
        if topics.is_empty() {
            let why = if warnings.is_empty() { "it is empty".to_string() } else { warnings.join("; ") };
            return Err(Error::bag(format!("no message could be read: {why}")));
        }
        self.topics = topics;
        Ok(())
    }

    /// Topics by name.
    pub fn topics(&self) -> &BTreeMap<String, Topic> {
        &self.topics
    }

    /// What was odd when it was opened.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The names of the topics of a type.
    pub fn topics_of(&self, type_name: &str) -> Vec<&str> {
        self.topics.iter().filter(|(_, t)| t.type_name == type_name).map(|(n, _)| n.as_str()).collect()
    }

    /// Visits the messages of `topics` (all if `None`), file by file, in the order of each file.
    /// Returns what could not be read, in words.
    ///
    /// Errors: those of `visit`, and a topic that is not serialised as CDR when it was asked for by
    /// name.
    pub fn read(&self, topics: Option<&[&str]>, visit: Visit) -> Result<Vec<String>> {
        // metadata.yaml may know of a foreign middleware what the files do not say.
        let foreign = |name: &&&str| self.topics.get(**name).is_some_and(|t| !matches!(t.serialization.as_str(), "cdr" | ""));
        if let Some(name) = topics.unwrap_or(&[]).iter().find(foreign) {
            return Err(not_cdr(name, &self.topics[*name].serialization).at(&self.path));
        }
        let mut warnings = Vec::new();
        let mut unpacked = Vec::new();
        let mut checked = |m: RawMessage| -> Result<()> {
            if topics.is_some_and(|t| !t.contains(&m.topic)) {
                return Ok(());
            }
            if topics.is_some() && m.serialization != "cdr" {
                return Err(not_cdr(m.topic, m.serialization));
            }
            if !self.message_compression {
                return visit(m);
            }
            unpacked.clear();
            let decoder = zstd::stream::read::Decoder::new(m.data);
            let unpack = decoder.and_then(|d| d.take(MAX_MESSAGE as u64 + 1).read_to_end(&mut unpacked));
            match unpack {
                Ok(n) if n <= MAX_MESSAGE => visit(RawMessage { data: &unpacked, ..m }),
                _ => Err(Error::bag(format!("a message on `{}` does not unpack (zstd)", m.topic))),
            }
        };
        for file in &self.files {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(why) = read_one(file, &mut checked).map_err(|e| e.at(file))? {
                warnings.push(format!("{name}: {why}"));
            }
        }
        Ok(warnings)
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn not_cdr(topic: &str, serialization: &str) -> Error {
    Error::bag(format!("topic `{topic}` is serialised as `{serialization}`, not as CDR"))
}

fn inside(path: &Path, folder: &Path) -> bool {
    match (path.canonicalize(), folder.canonicalize()) {
        (Ok(p), Ok(f)) => p.starts_with(f),
        _ => false,
    }
}

fn bag_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if is_bag_file(&path) {
            files.push(path);
        }
    }
    files.sort_by(|a, b| crate::dataset::natural(&a.to_string_lossy(), &b.to_string_lossy()));
    Ok(files)
}

/// Whether a path's name is that of a bag file.
pub fn is_bag_file(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(".zstd").unwrap_or(&name);
    path.is_file() && (name.ends_with(".mcap") || name.ends_with(".db3"))
}

/// Whether a path looks like a bag: a bag file, or a folder with one.
pub fn is_bag(path: &Path) -> bool {
    is_bag_file(path)
        || path.join("metadata.yaml").is_file()
        || path.file_name().is_some_and(|n| n == "metadata.yaml")
        || (path.is_dir() && bag_files(path).is_ok_and(|f| !f.is_empty()))
}

/// Reads one file; `Some(why)` if it ended before its end.
fn read_one(path: &Path, visit: Visit) -> Result<Option<String>> {
    let open = || File::open(path).map_err(Error::io(path));
    let name = path.to_string_lossy();
    if let Some(inner) = name.strip_suffix(".zstd") {
        let decoder = zstd::stream::read::Decoder::new(open()?).map_err(Error::io(path))?;
        if inner.ends_with(".mcap") {
            return read_mcap(decoder.take(MAX_UNPACKED), visit);
        }
        // SQLite wants a file to seek in.
        let mut temporary = tempfile::NamedTempFile::new().map_err(Error::io(&std::env::temp_dir()))?;
        let cut = std::io::copy(&mut decoder.take(MAX_UNPACKED), &mut temporary).err();
        let read = sqlite::read(temporary.path(), visit)?;
        return Ok(cut.map(|e| format!("does not unpack to its end: {e}")).or(read));
    }
    if name.ends_with(".db3") {
        sqlite::read(path, visit)
    } else {
        read_mcap(std::io::BufReader::new(open()?), visit)
    }
}
