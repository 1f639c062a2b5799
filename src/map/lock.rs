//! One writer per map, across processes.

use crate::error::{Error, Result};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The right to write a map file, held by a lock on `FILE.lock`. It ends with the process, however that ends; the file that a killed
/// process leaves locks nobody out.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the right to write `map`.
    ///
    /// Errors: another process has it (said by its number), or the folder cannot be written to.
    pub(super) fn take(map: &Path) -> Result<Self> {
        let mut path = map.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        // Bounded: each round but the last saw another process end.
        for _ in 0..100 {
            let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(Error::io(&path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut who = String::new();
                    // Whoever holds it may be about to write its name.
                    let _ = Read::by_ref(&mut file).take(200).read_to_string(&mut who);
                    let who = if who.trim().is_empty() { "another process".into() } else { format!("process {}", who.trim()) };
                    return Err(Error::map(format!(
                        "{who} is writing this map; two cannot (stop it, or open the map for localization only)"
                    ))
                    .at(map));
                }
                Err(TryLockError::Error(e)) => return Err(Error::io(&path)(e)),
            }
            // The one before may have removed the file between our opening and locking it.
            let ours = file.metadata().map_err(Error::io(&path))?;
            if std::fs::metadata(&path).is_ok_and(|there| (there.ino(), there.dev()) == (ours.ino(), ours.dev())) {
                let program = std::env::args().next().unwrap_or_default();
                let program = Path::new(&program).file_name().unwrap_or_default().to_string_lossy().into_owned();
                // For the message above only: a full disk does not keep a map from being opened.
                let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{} ({program})", std::process::id()));
                return Ok(Self { file, path });
            }
        }
        Err(Error::map("its lock comes and goes; try again").at(map))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Removed while it is still held; a process that waits for it looks again.
        let _ = std::fs::remove_file(&self.path);
        let _ = self.file.unlock();
    }
}
