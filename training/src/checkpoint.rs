//! Files that are whole or not there: checkpoints, logs, TensorBoard events.

use anyhow::{ensure, Context, Result};
use prost::Message;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Writes a file whole or not at all, and through to the disk: a temporary name, a sync, a rename.
///
/// Errors name the file; what was there before stays.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let written = File::create(&temporary).and_then(|mut f| f.write_all(bytes).and_then(|()| f.sync_all()));
    if let Err(cause) = written.and_then(|()| std::fs::rename(&temporary, path)) {
        let _ = std::fs::remove_file(&temporary);
        return Err(cause).with_context(|| format!("cannot write {}", path.display()));
    }
    Ok(())
}

/// The state of a training between two refreshes of its cache.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checkpoint {
    /// What is not a tensor.
    pub header: Header,
    /// Flat vectors by name.
    pub tensors: BTreeMap<String, Vec<f32>>,
}

/// What of a [`Checkpoint`] is not a tensor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Version of this layout.
    pub version: u32,
    /// SHA-256 of everything that decides the training: another recipe does not go on here.
    pub identity: String,
    /// Steps done.
    pub step: usize,
    /// Steps of the optimiser (skipped ones do not count).
    pub optimiser_steps: u64,
    /// Best validation recall@5 so far, and its step.
    pub best: Option<(f64, usize)>,
    /// Steps left out for a loss that was not a number.
    pub skipped: usize,
}

/// Version of the layout.
pub const VERSION: u32 = 1;

impl Checkpoint {
    /// Writes it, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        let views: Vec<(String, Bytes)> = self.tensors.iter().map(|(n, v)| (n.clone(), Bytes::new(v))).collect();
        let header = serde_json::to_string(&self.header)?;
        let metadata = Some([("structvpr.training".to_string(), header)].into());
        write_whole(path, &safetensors::serialize(views, metadata)?)
    }

    /// Reads one.
    ///
    /// Errors name the file: not a checkpoint, another version.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        Self::parse(&bytes).with_context(|| format!("{} is not a checkpoint that this version reads", path.display()))
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        let (_, metadata) = safetensors::SafeTensors::read_metadata(bytes)?;
        let text = metadata.metadata().as_ref().and_then(|m| m.get("structvpr.training")).context("no header `structvpr.training`")?;
        let header: Header = serde_json::from_str(text)?;
        ensure!(header.version == VERSION, "version {}, this one reads {VERSION}", header.version);
        let file = safetensors::SafeTensors::deserialize(bytes)?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            ensure!(view.dtype() == safetensors::Dtype::F32, "tensor `{name}` is {:?}", view.dtype());
            let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            tensors.insert(name, values);
        }
        Ok(Self { header, tensors })
    }

    /// Takes a tensor out.
    pub fn take(&mut self, name: &str) -> Result<Vec<f32>> {
        self.tensors.remove(name).with_context(|| format!("the checkpoint has no tensor `{name}`"))
    }
}

struct Bytes {
    shape: [usize; 1],
    data: Vec<u8>,
}

impl Bytes {
    fn new(values: &[f32]) -> Self {
        Self { shape: [values.len()], data: values.iter().flat_map(|v| v.to_le_bytes()).collect() }
    }
}

impl safetensors::View for Bytes {
    fn dtype(&self) -> safetensors::Dtype {
        safetensors::Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        (&self.data).into()
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// One line of a training's log: losses at a step, or a validation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Line {
    pub step: usize,
    #[serde(flatten)]
    pub values: BTreeMap<String, f64>,
}

/// `log.jsonl` and the TensorBoard file beside it.
///
/// Both hold what the checkpoint holds and nothing later: a training that was killed goes on from its checkpoint, and what
/// was logged after it is dropped first.
pub struct Log {
    lines: Vec<Line>,
    jsonl: PathBuf,
    events: PathBuf,
}

impl Log {
    /// Opens the log of a folder, keeping lines up to `step`.
    pub fn open(dir: &Path, step: usize) -> Result<Self> {
        let jsonl = dir.join("log.jsonl");
        let mut lines = Vec::new();
        if step > 0 && jsonl.is_file() {
            for (i, line) in std::fs::read_to_string(&jsonl).with_context(|| jsonl.display().to_string())?.lines().enumerate() {
                let line: Line = serde_json::from_str(line).with_context(|| format!("{}, line {}", jsonl.display(), i + 1))?;
                lines.extend((line.step <= step).then_some(line));
            }
        }
        Ok(Self { lines, jsonl, events: dir.join("events.out.tfevents.0.structvpr") })
    }

    /// Adds a line; it is on disk after [`Log::write`].
    pub fn add(&mut self, step: usize, values: impl IntoIterator<Item = (&'static str, f64)>) {
        self.lines.push(Line { step, values: values.into_iter().map(|(k, v)| (k.to_string(), v)).collect() });
    }

    /// All lines.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Writes both files.
    pub fn write(&self) -> Result<()> {
        let mut text = String::new();
        for line in &self.lines {
            text += &serde_json::to_string(line)?;
            text.push('\n');
        }
        write_whole(&self.jsonl, text.as_bytes())?;
        write_whole(&self.events, &events(&self.lines))
    }
}

/// TensorBoard's messages, as far as scalars need them. The crates that write event files either panic on a full disk or
/// want a protoc to build; `prost` and a checksum are all that is needed.
#[derive(Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

#[derive(Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// The bytes of an event file. Wall times are steps: the same training gives the same bytes.
fn events(lines: &[Line]) -> Vec<u8> {
    let crc = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);
    let masked = |bytes: &[u8]| {
        let sum = crc.checksum(bytes);
        (sum.rotate_right(15)).wrapping_add(0xa282_ead8).to_le_bytes()
    };
    let mut out = Vec::new();
    let first = Event { file_version: Some("brain.Event:2".into()), ..Event::default() };
    let event = |line: &Line| Event {
        wall_time: line.step as f64,
        step: line.step as i64,
        summary: Some(Summary {
            value: line.values.iter().map(|(k, v)| Value { tag: k.clone(), simple_value: Some(*v as f32) }).collect(),
        }),
        ..Event::default()
    };
    for event in std::iter::once(first).chain(lines.iter().map(event)) {
        let data = event.encode_to_vec();
        let length = (data.len() as u64).to_le_bytes();
        out.extend_from_slice(&length);
        out.extend_from_slice(&masked(&length));
        out.extend_from_slice(&data);
        out.extend_from_slice(&masked(&data));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_comes_back_and_what_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.safetensors");
        let header = Header { version: VERSION, identity: "a".into(), step: 7, best: Some((0.5, 3)), ..Header::default() };
        let c = Checkpoint { header, tensors: [("w".into(), vec![1.0, f32::MIN_POSITIVE])].into() };
        c.write(&path).unwrap();
        assert_eq!(Checkpoint::read(&path).unwrap(), c);
        std::fs::write(&path, b"nonsense").unwrap();
        let said = format!("{:#}", Checkpoint::read(&path).unwrap_err());
        assert!(said.contains("c.safetensors is not a checkpoint"), "{said}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_named_and_takes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.safetensors");
        let old = Checkpoint { header: Header { version: VERSION, step: 1, ..Header::default() }, ..Checkpoint::default() };
        old.write(&path).unwrap();
        // Writing to /dev/full fails as a full disk does.
        std::os::unix::fs::symlink("/dev/full", dir.path().join("c.safetensors.tmp")).unwrap();
        let new = Checkpoint { header: Header { step: 2, ..old.header.clone() }, tensors: [("w".into(), vec![0.0; 9])].into() };
        let said = format!("{:#}", new.write(&path).unwrap_err());
        assert!(said.contains("c.safetensors") && said.contains("No space left"), "{said}");
        assert_eq!(Checkpoint::read(&path).unwrap(), old);
        new.write(&path).unwrap();
        assert_eq!(Checkpoint::read(&path).unwrap(), new, "and with room again it goes on");
    }

    #[test]
    fn the_log_forgets_what_came_after_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(dir.path(), 0).unwrap();
        for step in 1..=4 {
            log.add(step, [("loss", 0.5 / step as f64)]);
        }
        log.write().unwrap();
        let again = Log::open(dir.path(), 2).unwrap();
        assert_eq!(again.lines(), &log.lines()[..2]);
        again.write().unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("log.jsonl")).unwrap().lines().count(), 2);
    }

    /// Bytes made with TensorFlow's format as documented: checksum of the CRC-32C "123456789" vector, and a record's frame.
    #[test]
    fn event_records_are_framed_as_tensorboard_reads_them() {
        let crc = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI);
        assert_eq!(crc.checksum(b"123456789"), 0xe306_9283);
        let bytes = events(&[Line { step: 3, values: [("loss".to_string(), 0.25)].into() }]);
        let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(Event::decode(&bytes[12..12 + n]).unwrap().file_version.as_deref(), Some("brain.Event:2"));
        let second = &bytes[16 + n..];
        let m = u64::from_le_bytes(second[..8].try_into().unwrap()) as usize;
        let event = Event::decode(&second[12..12 + m]).unwrap();
        assert_eq!((event.step, event.summary.unwrap().value[0].simple_value), (3, Some(0.25)));
        assert_eq!(second.len(), 16 + m);
    }
}
