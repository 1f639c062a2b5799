//! A map as one SQLite file that grows with it.
//!
//! While a process writes, a journal (`FILE-wal`) lies beside the file and `FILE.lock` says who writes; when it ends in order both
//! are gone. Each batch of changes is one transaction, on the disk (fsync) when [`Store::apply`] returns. After a kill or a
//! power cut the file opens as it is: SQLite takes in what is whole of the journal.

use super::changes::{Changes, Unsaved};
use super::format::{self, crc_of_blobs, crc_of_calibration, crc_of_closure, Core, Readable, State, APPLICATION_ID, TABLES, VERSION};
use super::lock::Lock;
use super::{Keyframe, Map};
use crate::descriptor::ModelIdentity;
use crate::error::{Error, Result};
use rusqlite::{params, Connection, OpenFlags, Transaction, TransactionBehavior};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Keyframes per transaction: bounds what is copied under the detector's lock.
const BATCH: usize = 1000;

/// A map file that this process writes.
#[derive(Debug)]
pub struct Store {
    db: Connection,
    path: PathBuf,
    state: State,
    /// Device and inode of the file.
    file: (u64, u64),
    _lock: Lock,
}

/// An opened file with its map.
#[derive(Debug)]
pub struct Opened {
    /// Writes to the file.
    pub store: Store,
    /// What it holds.
    pub map: Map,
    /// What a user should hear: a run that did not end in order, a version that was migrated.
    pub notes: Vec<String>,
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// A strict reading: the first damage ends it, with what to do.
fn strict(e: Error) -> Result<()> {
    Err(Error::map(format!("{e} (`structvpr map verify` lists all damage, `structvpr map prune --damaged` keeps what is sound)")))
}

/// Makes a rename last.
fn sync_folder(of: &Path) -> Result<()> {
    let folder = of.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io(folder))
}

fn is_map(path: &Path) -> bool {
    let id = || {
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?.query_row("PRAGMA application_id", [], |r| r.get::<_, i64>(0))
    };
    id().is_ok_and(|id| id == APPLICATION_ID)
}

/// Takes a journal that a killed process left into its file, so that no other file inherits it.
fn fold(path: &Path) -> Result<()> {
    let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    db.pragma_update_and_check(None, "journal_mode", "DELETE", |_| Ok(()))?;
    Ok(())
}

fn write(tx: &Transaction<'_>, state: &State, changes: &Changes) -> Result<State> {
    let mut state = state.clone();
    {
        let mut delete = tx.prepare_cached("DELETE FROM keyframe WHERE id = ?1")?;
        for id in &changes.removed {
            state.keyframes -= delete.execute([*id as i64])? as i64;
        }
        let mut insert = tx.prepare_cached(
            "INSERT INTO keyframe (id, session, robot, camera, position, stamp_ns, name, x, y, z, qx, qy, qz, qw, descriptor, crc, thumbnail, \
             features, blob_crc) VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15,?16,?17,?18,?19)",
        )?;
        for row in &changes.rows {
            let (core, k) = (Core::of(row), &row.keyframe);
            let (thumbnail, features) = (row.thumbnail.as_deref(), row.features.as_ref().map(|f| f.as_bytes()));
            let [x, y, z, qx, qy, qz, qw] = core.pose;
            let blob_crc = crc_of_blobs(thumbnail, features);
            insert.execute(params![
                row.id as i64,
                k.session,
                k.robot,
                k.camera,
                row.position,
                k.stamp_ns,
                k.name,
                x,
                y,
                z,
                qx,
                qy,
                qz,
                qw,
                core.descriptor,
                core.crc,
                thumbnail,
                features,
                blob_crc
            ])?;
            state.keyframes += 1;
        }
        let mut update = tx.prepare_cached("UPDATE keyframe SET thumbnail = ?2, features = ?3, blob_crc = ?4 WHERE id = ?1")?;
        for touched in &changes.touched {
            let (thumbnail, features) = (touched.thumbnail.as_deref(), touched.features.as_ref().map(|f| f.as_bytes()));
            update.execute(params![touched.id as i64, thumbnail, features, crc_of_blobs(thumbnail, features)])?;
        }
        if let Some(links) = &changes.links {
            if links.keep == 0 {
                tx.execute("DELETE FROM closure", [])?;
                state.closures = 0;
            }
            let mut insert = tx.prepare_cached("INSERT INTO closure VALUES (?1, ?2, ?3, ?4, ?5)")?;
            for (query, matched, similarity) in &links.new {
                let (query, matched) = (*query as i64, *matched as i64);
                let similarity = Some(f64::from(*similarity)).filter(|s| !s.is_nan());
                let id = state.closures;
                insert.execute(params![id, query, matched, similarity, crc_of_closure(id, query, matched, similarity)])?;
                state.closures += 1;
            }
        }
        if let Some(calibrations) = &changes.calibrations {
            tx.execute("DELETE FROM calibration", [])?;
            state.calibrations = calibrations.len() as i64;
            let mut insert = tx.prepare_cached("INSERT INTO calibration (session, camera, json, crc) VALUES (?1, ?2, ?3, ?4)")?;
            for ((session, camera), calibration) in calibrations {
                let json = serde_json::to_string(calibration).map_err(|e| Error::map(e.to_string()))?;
                insert.execute(params![session, camera, json, crc_of_calibration(*session, camera, &json)])?;
            }
        }
    }
    state.map.clone_from(&changes.name);
    state.features.clone_from(&changes.features_identity);
    state.next_keyframe = changes.next as i64;
    note(tx, &state)?;
    Ok(state)
}

fn note(db: &Connection, state: &State) -> Result<()> {
    db.execute(
        "UPDATE state SET map = ?1, features = ?2, keyframes = ?3, closures = ?4, calibrations = ?5, next_keyframe = ?6, crc = ?7, \
         writing = ?8, durable_s = ?9",
        params![
            state.map,
            state.features,
            state.keyframes,
            state.closures,
            state.calibrations,
            state.next_keyframe,
            state.crc(),
            state.writing,
            state.durable_s
        ],
    )?;
    Ok(())
}

impl Store {
    /// Opens a map for writing; one that is not there is made. One of an older version is migrated, and kept as it was beside the file.
    /// `durable_s` is how soon the caller promises to [`Store::apply`] what was added; it is only said back after a crash.
    ///
    /// Errors: another process writes it, not a map, a newer version, another model (by name), damage (with what to do).
    pub fn open(path: &Path, model: &ModelIdentity, preprocessing: &str, durable_s: f64) -> Result<Opened> {
        // Before anything is laid beside a file that is not ours.
        if path.exists() {
            format::open(path, false).map(drop).map_err(|e| e.at(path))?;
        }
        let lock = Lock::take(path)?;
        Self::open_locked(path, model, preprocessing, durable_s, lock).map_err(|e| e.at(path))
    }

    fn open_locked(path: &Path, model: &ModelIdentity, preprocessing: &str, durable_s: f64, lock: Lock) -> Result<Opened> {
        let mut notes = Vec::new();
        if !path.exists() {
            let mut map = Map::new(model.clone());
            map.preprocessing = preprocessing.into();
            map.replace(path)?;
        }
        let mut file = format::open(path, true)?;
        let mut map = format::read(&file, Some(model), &mut strict)?;
        if map.preprocessing.is_empty() {
            map.preprocessing = preprocessing.into();
        }
        if file.version < VERSION {
            let old = file.version;
            drop(file);
            let backup = (0..).map(|n| if n == 0 { format!(".version-{old}") } else { format!(".version-{old}-{n}") });
            // As many numbers as anybody has backups.
            let backup = backup.map(|ending| beside(path, &ending)).find(|p| !p.exists()).unwrap_or_else(|| beside(path, ".old"));
            std::fs::copy(path, &backup).map_err(Error::io(&backup))?;
            File::open(&backup).and_then(|f| f.sync_all()).map_err(Error::io(&backup))?;
            map.replace(path)?;
            map.all_saved();
            notes.push(format!("the map was of version {old} and is of version {VERSION} now; as it was it is in {}", backup.display()));
            file = format::open(path, true)?;
        }
        let Readable { db, .. } = file;
        // Where this is refused (some network file systems) a rollback journal does as well.
        let _mode: String = db.pragma_update_and_check(None, "journal_mode", "WAL", |r| r.get(0))?;
        db.pragma_update(None, "synchronous", "FULL")?;
        let file = Readable { db, version: VERSION };
        let mut state = format::state(&file)?;
        if state.writing {
            let last =
                map.keyframes.last().map(|k| format!("its last keyframe is {}, of {}", map.next_id.saturating_sub(1), seconds(k.stamp_ns)));
            notes.push(format!(
                "the run before did not end in order; {}; what came in the {} s before its end may be missing, nothing else is",
                last.unwrap_or_else(|| "it holds no keyframe".into()),
                state.durable_s
            ));
        }
        let Readable { mut db, .. } = file;
        (state.writing, state.durable_s) = (true, durable_s);
        let tx = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        note(&tx, &state)?;
        tx.commit()?;
        let file = identity(path).ok_or_else(|| Error::map("the file went away while it was being opened"))?;
        Ok(Opened { store: Self { db, path: path.into(), state, file, _lock: lock }, map, notes })
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the file is where it was opened. One that was deleted or replaced takes what is written with it, without a word.
    pub fn in_place(&self) -> bool {
        identity(&self.path) == Some(self.file)
    }

    /// Writes changes; they are on the disk when this returns.
    ///
    /// Errors: the disk is full or gone, or somebody removed or replaced the file; then the file is as it was, and the same changes may be
    /// tried again.
    pub fn apply(&mut self, changes: &Changes) -> Result<()> {
        let at = |e: Error| e.at(&self.path);
        if !self.in_place() {
            return Err(at(Error::map("the file was removed or replaced while it was in use")));
        }
        let tx = self.db.transaction_with_behavior(TransactionBehavior::Immediate).map_err(|e| at(e.into()))?;
        let state = write(&tx, &self.state, changes).map_err(at)?;
        tx.commit().map_err(|e| at(e.into()))?;
        self.state = state;
        Ok(())
    }

    /// Writes all that `map` has and the file does not. Returns the number of keyframes that were new.
    ///
    /// Errors: as [`Store::apply`]; what was written before stays written.
    pub fn write_all(&mut self, map: &mut Map) -> Result<usize> {
        let mut n = 0;
        loop {
            let changes = map.changes(BATCH);
            if changes.is_empty() {
                return Ok(n);
            }
            self.apply(&changes)?;
            map.saved(&changes);
            n += changes.keyframes();
        }
    }

    /// Ends in order: one file, no journal.
    ///
    /// Errors: the disk is full or gone; all that was applied is there nevertheless.
    pub fn close(self) -> Result<()> {
        note(&self.db, &State { writing: false, ..self.state.clone() }).map_err(|e| e.at(&self.path))?;
        // Refused while somebody reads the map; then the journal stays until the next who opens it, and nothing is missing.
        let _ = self.db.pragma_update_and_check(None, "journal_mode", "DELETE", |_| Ok(()));
        Ok(())
    }
}

// By name only: opening and closing the file would give up SQLite's locks on it.
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

pub(super) fn seconds(stamp_ns: i64) -> String {
    format!("{}.{:09}", stamp_ns.div_euclid(1_000_000_000), stamp_ns.rem_euclid(1_000_000_000))
}

impl Map {
    /// Writes the whole map to `path`; the file there before stays whole if this fails. A file that is no map
    /// is not overwritten, nor one that a process is writing.
    pub fn save(&self, path: &Path) -> Result<()> {
        if path.exists() && !is_map(path) {
            return Err(Error::map("the file exists and is not a StructVPR map; it is not overwritten").at(path));
        }
        let _lock = Lock::take(path)?;
        if path.exists() {
            fold(path).map_err(|e| Error::map(format!("the file there is damaged; move it away first ({e})")).at(path))?;
        }
        self.replace(path).map_err(|e| e.at(path))
    }

    /// Writes a new file under a temporary name, then renames it. The caller has the lock.
    fn replace(&self, path: &Path) -> Result<()> {
        let temporary = beside(path, ".tmp");
        let mut leftovers = vec![temporary.clone(), beside(&temporary, "-journal")];
        if !path.exists() {
            // The journal of a file that somebody deleted would be taken for the new one's.
            leftovers.extend([beside(path, "-wal"), beside(path, "-shm"), beside(path, "-journal")]);
        }
        for left in &leftovers {
            if left.exists() {
                std::fs::remove_file(left).map_err(Error::io(left))?;
            }
        }
        self.write(&temporary).inspect_err(|_| {
            let _ = std::fs::remove_file(&temporary);
        })?;
        File::open(&temporary).and_then(|f| f.sync_all()).map_err(Error::io(&temporary))?;
        std::fs::rename(&temporary, path).map_err(Error::io(path))?;
        sync_folder(path)
    }

    fn write(&self, path: &Path) -> Result<()> {
        let mut db = Connection::open(path)?;
        db.pragma_update(None, "application_id", APPLICATION_ID)?;
        db.pragma_update(None, "user_version", VERSION)?;
        let tx = db.transaction()?;
        for (_, sql) in TABLES {
            tx.execute(sql, [])?;
        }
        tx.execute("INSERT INTO model VALUES (?1, ?2, ?3)", params![self.model.name, self.model.sha256, self.preprocessing])?;
        tx.execute("INSERT INTO state VALUES ('', '', 0, 0, 0, 0, 0, 0, 0)", [])?;
        let mut whole = self.clone();
        whole.nothing_saved();
        let model = [self.model.name.clone(), self.model.sha256.clone(), self.preprocessing.clone()];
        let mut state = State { model, ..State::default() };
        loop {
            let changes = whole.changes(BATCH);
            if changes.is_empty() {
                break;
            }
            state = write(&tx, &state, &changes)?;
            whole.saved(&changes);
        }
        tx.commit()?;
        Ok(())
    }

    /// Reads a map, checking that it was made by `model`. The file is not written to, and may be one that a process is writing.
    ///
    /// Errors: no such file, not a map, a newer version, another model (by name), damage.
    pub fn load(path: &Path, model: &ModelIdentity) -> Result<Self> {
        let read = || format::read(&format::open(path, false)?, Some(model), &mut strict);
        read().map_err(|e| e.at(path))
    }

    /// Reads a map of whatever model.
    ///
    /// Errors: as [`Map::load`], but for the model.
    pub fn load_any(path: &Path) -> Result<Self> {
        let read = || format::read(&format::open(path, false)?, None, &mut strict);
        read().map_err(|e| e.at(path))
    }

    /// Takes note that `file`, just read, is this map's file, at an earlier state of this map or at this one. `false`, and nothing changes, if it holds
    /// anything that this map never held, or lacks what only an earlier write could bring: somebody else has written it.
    pub fn resume(&mut self, file: &Self) -> bool {
        if file.next_id > self.next_id || (file.next_id > 0 && self.id() != file.id()) {
            return false;
        }
        // What is not here any more was thinned.
        let known = |(id, k): (&u64, &Keyframe)| self.row_of(*id).is_none_or(|row| self.keyframes[row] == *k);
        let there = |id: &u64| *id >= file.next_id || file.row_of(*id).is_some();
        if !file.ids.iter().zip(&file.keyframes).all(known) || !self.ids.iter().all(there) {
            return false;
        }
        let mut unsaved = Unsaved::resuming(file.next_id);
        unsaved.removed(file.ids.iter().copied().filter(|id| self.row_of(*id).is_none()));
        for (row, id) in self.ids.iter().enumerate().take_while(|(_, id)| **id < file.next_id) {
            let at = file.row_of(*id).unwrap_or(usize::MAX);
            if self.thumbnails.get(&row) != file.thumbnails.get(&at) || self.features.get(&row) != file.features.get(&at) {
                unsaved.touch(*id);
            }
        }
        self.unsaved = unsaved;
        true
    }
}

#[cfg(test)]
mod tests;
