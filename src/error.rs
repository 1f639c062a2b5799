//! The library's error type: one enum whose variants carry the values a user needs to act.

use std::path::{Path, PathBuf};

/// Result with the library's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in the library. Each message names the file, field, tensor or
/// topic it is about and, where there is one, the allowed range. A message holds its cause's, so
/// `source()` gives none: printing a chain would say everything twice.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {cause}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// An image whose header does not fit its data.
    #[error("image: {reason}")]
    Image {
        /// What is wrong, with the numbers.
        reason: String,
    },
    /// A pixel encoding that we do not read.
    #[error("image encoding `{encoding}` is not supported; supported: {supported}")]
    ImageEncoding {
        /// The encoding as the message gave it.
        encoding: String,
        /// All that we read.
        supported: &'static str,
    },
    /// A weight file lacks a tensor.
    #[error("weights: tensor `{name}` is missing (layout: {layout})")]
    TensorMissing {
        /// Name in the file's own naming scheme.
        name: String,
        /// The naming scheme that was recognised.
        layout: &'static str,
    },
    /// A weight file holds tensors that the architecture has no place for.
    #[error("weights: unexpected tensor(s) {} (layout: {layout})", names.join(", "))]
    TensorUnexpected {
        /// The first few names.
        names: Vec<String>,
        /// The naming scheme that was recognised.
        layout: &'static str,
    },
    /// A tensor with another shape than the architecture wants.
    #[error("weights: tensor `{name}` has shape {found:?}, expected {expected:?}")]
    TensorShape {
        /// Name in the file's own naming scheme.
        name: String,
        /// Shape that the architecture wants.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A weight file that cannot be read at all, or whose header contradicts itself.
    #[error("weights: {reason}")]
    Weights {
        /// What is wrong.
        reason: String,
    },
    /// A vector that cannot be a descriptor.
    #[error("descriptor: {reason}")]
    Descriptor {
        /// What is wrong.
        reason: String,
    },
    /// A device that is not there, or that fails.
    #[error("device: {reason}")]
    Device {
        /// What is wrong and what to do.
        reason: String,
    },
    /// Local features that cannot be used.
    #[error("features: {reason}")]
    Features {
        /// What is wrong.
        reason: String,
    },
    /// Bytes that are not the CDR message they claim to be.
    #[error("CDR at byte {offset}: {reason}")]
    Cdr {
        /// Offset from the start of the message.
        offset: usize,
        /// What is wrong.
        reason: String,
    },
    /// A bag that cannot be read, or a topic that it lacks.
    #[error("bag: {reason}")]
    Bag {
        /// What is wrong and what to do.
        reason: String,
    },
    /// A data set whose folder or tables are not as its format wants.
    #[error("data set: {reason}")]
    Dataset {
        /// What is wrong and what to do.
        reason: String,
    },
    /// A setting out of range, unknown or contradictory.
    #[error("setting `{field}`: {value} is not allowed; allowed: {allowed}")]
    Config {
        /// Dotted name, as in the YAML file.
        field: String,
        /// The value given.
        value: String,
        /// The allowed range in words.
        allowed: String,
    },
    /// A map that cannot be used.
    #[error("map: {reason}")]
    Map {
        /// What is wrong and what to do.
        reason: String,
    },
    /// Any of the above with the file it came from.
    #[error("{}: {cause}", path.display())]
    In {
        /// The file.
        path: PathBuf,
        /// The error inside it.
        cause: Box<Error>,
    },
    /// Candle refused a tensor operation.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// OpenCV refused an image operation.
    #[error(transparent)]
    OpenCv(#[from] opencv::Error),
    /// SQLite refused.
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
}

impl Error {
    /// An image error in words.
    pub fn image(reason: impl Into<String>) -> Self {
        Self::Image { reason: reason.into() }
    }
    /// A weights error in words.
    pub fn weights(reason: impl Into<String>) -> Self {
        Self::Weights { reason: reason.into() }
    }
    /// A bag error in words.
    pub fn bag(reason: impl Into<String>) -> Self {
        Self::Bag { reason: reason.into() }
    }
    /// A data set error in words.
    pub fn dataset(reason: impl Into<String>) -> Self {
        Self::Dataset { reason: reason.into() }
    }
    /// A map error in words.
    pub fn map(reason: impl Into<String>) -> Self {
        Self::Map { reason: reason.into() }
    }
    /// The same error, naming the file it is about.
    pub fn at(self, path: &Path) -> Self {
        match self {
            Self::In { .. } | Self::Io { .. } => self,
            other => Self::In { path: path.into(), cause: Box::new(other) },
        }
    }
    /// For `map_err` on `std::io` calls.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |cause| Self::Io { path: path.into(), cause }
    }
}

/// `std::fs::read` whose error names the file.
pub fn read_file(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(Error::io(path))
}

/// Writes a file whole or not at all: a temporary name in the same folder, then a rename.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    std::fs::write(&temporary, bytes).map_err(Error::io(&temporary))?;
    std::fs::rename(&temporary, path).map_err(Error::io(path))
}
