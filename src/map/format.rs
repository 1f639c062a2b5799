//! A map's tables, and how a row is read without believing it.
//!
//! A file may come from anywhere: its tables must be ours to the letter (no views, no triggers), no value is longer than
//! [`LONGEST`], every row carries a checksum, and the counts of rows are kept beside them, so that what is lost is noticed.

use super::changes::Row;
use super::{Keyframe, Link, Map};
use crate::descriptor::{Descriptor, ModelIdentity};
use crate::error::{Error, Result};
use crate::features::CompactFeatures;
use crate::image::Camera;
use crate::sqlite;
use nalgebra::{Isometry3, Quaternion, Translation3, UnitQuaternion};
use rusqlite::types::{FromSql, ValueRef};
use rusqlite::{Connection, OptionalExtension};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// `PRAGMA application_id`: "SVPR".
pub(super) const APPLICATION_ID: i64 = 0x5356_5052;
/// Version of the tables below, in `PRAGMA user_version`.
pub const VERSION: i64 = 4;
/// Bytes of one value: a keyframe's features are the longest, a few hundred kilobytes.
const LONGEST: usize = 64 << 20;
/// How long to wait for another process that is at the file, a backup for example.
const PATIENCE: Duration = Duration::from_secs(5);

/// Our tables: name, and how it is made.
pub(super) const TABLES: [(&str, &str); 5] = [
    ("model", "CREATE TABLE model (name TEXT NOT NULL, sha256 TEXT NOT NULL, preprocessing TEXT NOT NULL)"),
    (
        "state",
        "CREATE TABLE state (map TEXT NOT NULL, features TEXT NOT NULL, keyframes INTEGER NOT NULL, closures INTEGER NOT NULL, \
         calibrations INTEGER NOT NULL, next_keyframe INTEGER NOT NULL, crc INTEGER NOT NULL, writing INTEGER NOT NULL, durable_s REAL NOT NULL)",
    ),
    (
        "keyframe",
        "CREATE TABLE keyframe (id INTEGER PRIMARY KEY, session INTEGER NOT NULL, robot INTEGER NOT NULL, camera TEXT NOT NULL, \
         position INTEGER NOT NULL, stamp_ns INTEGER NOT NULL, name TEXT NOT NULL, x REAL, y REAL, z REAL, qx REAL, qy REAL, qz REAL, qw REAL, \
         descriptor BLOB NOT NULL, crc INTEGER NOT NULL, thumbnail BLOB, features BLOB, blob_crc INTEGER NOT NULL)",
    ),
    ("calibration", "CREATE TABLE calibration (session INTEGER NOT NULL, camera TEXT NOT NULL, json TEXT NOT NULL, crc INTEGER NOT NULL)"),
    ("closure", "CREATE TABLE closure (id INTEGER PRIMARY KEY, query INTEGER NOT NULL, matched INTEGER NOT NULL, similarity REAL, crc INTEGER NOT NULL)"),
];

/// CRC-32 over values, each with its length: no two rows give the same bytes.
pub(super) struct Crc(crc32fast::Hasher);

impl Crc {
    pub(super) fn new() -> Self {
        Self(crc32fast::Hasher::new())
    }
    pub(super) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }
    pub(super) fn int(self, v: i64) -> Self {
        self.bytes(&v.to_le_bytes())
    }
    pub(super) fn real(self, v: Option<f64>) -> Self {
        match v {
            // SQLite keeps no sign of a zero.
            Some(v) => self.bytes(&(v + 0.0).to_bits().to_le_bytes()),
            None => self.bytes(&[]),
        }
    }
    pub(super) fn get(self) -> i64 {
        self.0.finalize().into()
    }
}

pub(super) fn crc_of_blobs(thumbnail: Option<&[u8]>, features: Option<&[u8]>) -> i64 {
    let one = |crc: Crc, b: Option<&[u8]>| crc.int(b.is_some().into()).bytes(b.unwrap_or_default());
    one(one(Crc::new(), thumbnail), features).get()
}

/// `id`: its place in the order of acceptance.
pub(super) fn crc_of_closure(id: i64, query: i64, matched: i64, similarity: Option<f64>) -> i64 {
    Crc::new().int(id).int(query).int(matched).real(similarity).get()
}

pub(super) fn crc_of_calibration(session: u32, camera: &str, json: &str) -> i64 {
    Crc::new().int(session.into()).bytes(camera.as_bytes()).bytes(json.as_bytes()).get()
}

/// What is kept of the map as a whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct State {
    /// Name, hash and preprocessing of the model: in a table of their own, and in this one's checksum.
    pub model: [String; 3],
    pub map: String,
    pub features: String,
    pub keyframes: i64,
    pub closures: i64,
    pub calibrations: i64,
    pub next_keyframe: i64,
    /// A process was writing when this was written.
    pub writing: bool,
    pub durable_s: f64,
}

impl State {
    pub(super) fn crc(&self) -> i64 {
        let text = self.model.iter().chain([&self.map, &self.features]).fold(Crc::new(), |crc, s| crc.bytes(s.as_bytes()));
        text.int(self.keyframes).int(self.closures).int(self.calibrations).int(self.next_keyframe).get()
    }
}

/// The columns of a keyframe that never change.
pub(super) struct Core {
    pub pose: [Option<f64>; 7],
    pub descriptor: Vec<u8>,
    pub crc: i64,
}

impl Core {
    pub(super) fn of(row: &Row) -> Self {
        let pose = row.keyframe.odom_from_base.map(|p| {
            let (t, q) = (p.translation.vector, p.rotation.coords);
            [t.x, t.y, t.z, q.x, q.y, q.z, q.w]
        });
        // SQLite keeps no NaN; a pose that is none is none.
        let pose = pose.filter(|p| p.iter().all(|v| v.is_finite()));
        let pose = std::array::from_fn(|i| pose.map(|p| p[i]));
        let descriptor: Vec<u8> = row.descriptor.iter().flat_map(|v| v.to_le_bytes()).collect();
        let crc = Self::crc(row.id as i64, &row.keyframe, row.position, &pose, &descriptor);
        Self { pose, descriptor, crc }
    }

    fn crc(id: i64, k: &Keyframe, position: u32, pose: &[Option<f64>; 7], descriptor: &[u8]) -> i64 {
        let text = Crc::new().bytes(k.camera.as_bytes()).bytes(k.name.as_bytes()).bytes(descriptor);
        let ints = text.int(id).int(k.session.into()).int(k.robot.into()).int(position.into()).int(k.stamp_ns);
        pose.iter().fold(ints, |crc, p| crc.real(*p)).get()
    }
}

/// A map file that may be read, its header checked.
pub(super) struct Readable {
    pub db: Connection,
    pub version: i64,
}

/// The first look at a file: SQLite opens its journals now.
fn look(db: &Connection) -> rusqlite::Result<()> {
    db.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))
}

/// Opens a map file that may be anything.
///
/// Errors: not a map, a newer version, tables that are not ours. None names the file.
pub(super) fn open(path: &Path, write: bool) -> Result<Readable> {
    if !path.is_file() {
        return Err(Error::map("no such file"));
    }
    let mut db = sqlite::open(path, write, LONGEST)?;
    db.busy_timeout(PATIENCE)?;
    if let (false, Err(e)) = (write, look(&db)) {
        // A process was killed while it changed the kind of journal, or left one that has to be taken in: that wants to write, once.
        if matches!(e.sqlite_error_code(), Some(rusqlite::ErrorCode::ReadOnly | rusqlite::ErrorCode::CannotOpen)) {
            let recover = || -> rusqlite::Result<()> {
                let writer = sqlite::open(path, true, LONGEST)?;
                writer.busy_timeout(PATIENCE)?;
                look(&writer)
            };
            recover().map_err(|_| {
                Error::map(
                    "it was not closed in order, and its journal (the file beside it) cannot be taken in here: copy both to a folder that can be \
                     written to, or make this one writable",
                )
            })?;
            db = sqlite::open(path, false, LONGEST)?;
            db.busy_timeout(PATIENCE)?;
        }
    }
    db.pragma_update(None, "cell_size_check", true)?;
    db.pragma_update(None, "mmap_size", 0)?;
    let pragma = |name: &str| -> Result<i64> {
        db.query_row(&format!("PRAGMA {name}"), [], |r| r.get(0)).map_err(|e| Error::map(format!("not a StructVPR map ({e})")))
    };
    if pragma("application_id")? != APPLICATION_ID {
        return Err(Error::map("not a StructVPR map"));
    }
    let version = pragma("user_version")?;
    if !(1..=VERSION).contains(&version) {
        return Err(Error::map(format!("version {version}; this program reads versions 1 to {VERSION}")));
    }
    {
        let mut schema = db.prepare("SELECT type, name, coalesce(sql, '') FROM sqlite_schema")?;
        let mut schema = schema.query([])?;
        while let Some(row) = schema.next()? {
            let (kind, name, sql): (String, String, String) = (row.get(0)?, row.get(1)?, row.get(2)?);
            let ours = match version {
                VERSION => TABLES.iter().any(|(n, s)| *n == name && *s == sql),
                _ => kind == "table" && ["model", "keyframe", "closure", "features", "calibration"].contains(&name.as_str()),
            };
            let computed = sql.to_ascii_uppercase().contains(" AS ") || sql.to_ascii_uppercase().contains("VIRTUAL");
            if !ours || computed {
                return Err(Error::map(format!("the {kind} `{name}` in it is not of a StructVPR map; it is not read")));
            }
        }
    }
    Ok(Readable { db, version })
}

/// What a damaged row does: an error ends the reading, `Ok` leaves the row out.
pub(super) type OnDamage<'a> = &'a mut dyn FnMut(Error) -> Result<()>;

/// A keyframe of a file with its checksums not yet looked at.
struct Read {
    row: Row,
    sound: bool,
}

fn get<T: FromSql>(row: &rusqlite::Row<'_>, column: &str) -> Result<T> {
    row.get(column).map_err(|e| Error::map(format!("column {column}: {e}")))
}

fn bytes<'a>(row: &'a rusqlite::Row<'_>, column: &str) -> Result<Option<&'a [u8]>> {
    match row.get_ref(column)? {
        ValueRef::Null => Ok(None),
        ValueRef::Blob(b) => Ok(Some(b)),
        _ => Err(Error::map(format!("column {column} holds no bytes"))),
    }
}

/// `old`: the version, below 4, of a file without checksums, ids that are rows, and fewer columns.
fn keyframe(row: &rusqlite::Row<'_>, version: i64) -> Result<Read> {
    let old = version < 4;
    let id: i64 = get(row, "id")?;
    // Version 1 knew one robot with one camera.
    let (robot, camera) = if version == 1 { (0, String::new()) } else { (get(row, "robot")?, get(row, "camera")?) };
    let mut pose = [None; 7];
    for (slot, column) in pose.iter_mut().zip(["x", "y", "z", "qx", "qy", "qz", "qw"]) {
        *slot = get::<Option<f64>>(row, column)?;
    }
    let odom_from_base = match pose.map(|p| p.filter(|v| v.is_finite())) {
        [Some(x), Some(y), Some(z), Some(i), Some(j), Some(k), Some(w)] => {
            let q = Quaternion::new(w, i, j, k);
            // As it was: normalising once more would move it by a rounding.
            ((q.norm() - 1.0).abs() < 1e-6).then(|| Isometry3::from_parts(Translation3::new(x, y, z), UnitQuaternion::new_unchecked(q)))
        }
        _ => None,
    };
    let keyframe =
        Keyframe { robot, session: get(row, "session")?, camera, stamp_ns: get(row, "stamp_ns")?, name: get(row, "name")?, odom_from_base };
    let blob = bytes(row, "descriptor")?.ok_or_else(|| Error::map("no descriptor"))?;
    let descriptor = blob.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let position: u32 = if old { 0 } else { get(row, "position")? };
    let sound = old || get::<i64>(row, "crc")? == Core::crc(id, &keyframe, position, &pose, blob);
    let thumbnail = if version == 1 { None } else { bytes(row, "thumbnail")? };
    let features = if version < 3 { None } else { bytes(row, "features")? };
    let sound = sound && (old || get::<i64>(row, "blob_crc")? == crc_of_blobs(thumbnail, features));
    let features = features.map(|b| CompactFeatures::from_bytes(b.to_vec())).transpose()?.map(Arc::new);
    let id = u64::try_from(id).map_err(|_| Error::map("its number is negative"))?;
    Ok(Read { row: Row { id, position, keyframe, descriptor, thumbnail: thumbnail.map(Arc::from), features }, sound })
}

fn take(map: &mut Map, read: Result<Read>, id: i64, version: i64, features: &str) -> Result<()> {
    let named = |e: Error| Error::map(format!("keyframe {id}: {e}"));
    let Read { row, sound } = read.map_err(named)?;
    if !sound {
        return Err(Error::map(format!("keyframe {id} is damaged: its checksum is another")));
    }
    if row.id < map.next_id || row.id == u64::MAX {
        return Err(named(Error::map("out of order")));
    }
    let expected = map.next_place(row.keyframe.session, &row.keyframe.camera).position;
    if version < 4 && row.id != map.next_id {
        return Err(Error::map(format!("keyframe {} is missing", map.next_id)));
    }
    let position = if version < 4 { expected } else { row.position };
    if position < expected {
        return Err(named(Error::map("out of order along its track")));
    }
    let descriptor = Descriptor::stored(row.descriptor).map_err(named)?;
    let at = map.push_as(row.id, position, row.keyframe, &descriptor).map_err(named)?;
    if let Some(thumbnail) = row.thumbnail {
        map.thumbnails.insert(at, thumbnail);
    }
    if let Some(packed) = row.features {
        map.features_identity = features.into();
        map.features.insert(at, packed);
    }
    Ok(())
}

/// Which model a map is of, and how its images are prepared, as far as the file says.
fn model(file: &Readable) -> Result<(ModelIdentity, String)> {
    let preprocessing = if file.version < 4 { "''" } else { "preprocessing" };
    let sql = format!("SELECT name, sha256, {preprocessing} FROM model");
    Ok(file.db.query_row(&sql, [], |r| Ok((ModelIdentity { name: r.get(0)?, sha256: r.get(1)? }, r.get(2)?)))?)
}

pub(super) fn state(file: &Readable) -> Result<State> {
    if file.version < 4 {
        return Ok(State::default());
    }
    let (identity, preprocessing) = model(file)?;
    let (state, crc): (State, i64) = file.db.query_row("SELECT * FROM state", [], |r| {
        let state = State {
            model: [identity.name, identity.sha256, preprocessing],
            map: r.get("map")?,
            features: r.get("features")?,
            keyframes: r.get("keyframes")?,
            closures: r.get("closures")?,
            calibrations: r.get("calibrations")?,
            next_keyframe: r.get("next_keyframe")?,
            writing: r.get("writing")?,
            durable_s: r.get("durable_s")?,
        };
        Ok((state, r.get("crc")?))
    })?;
    match state.crc() == crc {
        true => Ok(state),
        false => Err(Error::map("its account of itself is damaged: the checksum is another")),
    }
}

/// Reads a whole map.
///
/// Errors: another model than `want`, and what `damage` does not forgive.
pub(super) fn read(file: &Readable, want: Option<&ModelIdentity>, damage: OnDamage<'_>) -> Result<Map> {
    let version = file.version;
    let mut forgiven = false;
    let mut damage = |e: Error| {
        forgiven = true;
        damage(e)
    };
    // Before the model: a flipped bit in its hash is no other model.
    let mut kept = match state(file) {
        Ok(state) => Some(state),
        Err(e) => {
            damage(e)?;
            None
        }
    };
    let (found, preprocessing) = model(file)?;
    if let Some(want) = want.filter(|want| **want != found) {
        return Err(Error::map(format!(
            "made with model {found}, but the model in use is {want}; descriptors of two models do not compare"
        )));
    }
    let mut map = Map::new(found);
    map.preprocessing = preprocessing;
    let mut features = kept.as_ref().map(|s| s.features.clone()).unwrap_or_default();
    if version == 3 {
        features = file.db.query_row("SELECT identity FROM features", [], |r| r.get(0))?;
    }
    if version >= 3 {
        map.calibrations = calibrations(file, &mut damage)?;
        let found = map.calibrations.len() as i64;
        if kept.as_ref().is_some_and(|s| version >= 4 && s.calibrations != found) {
            damage(Error::map("damaged: a calibration is missing"))?;
        }
    }
    keyframes(file, &features, &mut map, &mut damage)?;
    closures(file, &mut map, &mut damage)?;
    if let Some(state) = kept.take().filter(|_| version >= 4) {
        let found = map.keyframes.len() as i64;
        if found != state.keyframes {
            damage(Error::map(format!("damaged: {} of {} keyframes are missing", state.keyframes.saturating_sub(found), state.keyframes)))?;
        }
        if map.links.len() as i64 != state.closures {
            damage(Error::map(format!(
                "damaged: {} of its {} closures are missing",
                state.closures.saturating_sub(map.links.len() as i64),
                state.closures
            )))?;
        }
        map.next_id = map.next_id.max(u64::try_from(state.next_keyframe).unwrap_or(0));
        // An empty map has no name of its own yet.
        if map.next_id > 0 && !state.map.is_empty() {
            map.name = Some(state.map);
        }
    }
    if !forgiven {
        map.all_saved();
    }
    Ok(map)
}

fn calibrations(file: &Readable, damage: OnDamage<'_>) -> Result<BTreeMap<(u32, String), Camera>> {
    let mut out = BTreeMap::new();
    let mut rows = file.db.prepare("SELECT * FROM calibration")?;
    let mut rows = rows.query([])?;
    let mut one = |row: &rusqlite::Row<'_>| -> Result<()> {
        let (session, camera, json): (u32, String, String) = (get(row, "session")?, get(row, "camera")?, get(row, "json")?);
        if file.version >= 4 && get::<i64>(row, "crc")? != crc_of_calibration(session, &camera, &json) {
            return Err(Error::map(format!("calibration of camera `{camera}` is damaged: its checksum is another")));
        }
        let parsed = serde_json::from_str(&json).map_err(|e| Error::map(format!("calibration of camera `{camera}`: {e}")))?;
        out.insert((session, camera), parsed);
        Ok(())
    };
    loop {
        match rows.next() {
            Ok(Some(row)) => one(row).or_else(&mut *damage)?,
            Ok(None) => break,
            Err(e) => {
                damage(e.into())?;
                break;
            }
        }
    }
    Ok(out)
}

fn keyframes(file: &Readable, features: &str, map: &mut Map, damage: OnDamage<'_>) -> Result<()> {
    let mut all = file.db.prepare("SELECT * FROM keyframe ORDER BY id")?;
    let mut all = all.query([])?;
    let broken = loop {
        match all.next() {
            Ok(Some(row)) => {
                let id = get(row, "id").unwrap_or(-1);
                take(map, keyframe(row, file.version), id, file.version, features).or_else(&mut *damage)?;
            }
            Ok(None) => return Ok(()),
            Err(e) => break e,
        }
    };
    // A page cannot be read. What lies behind it can still be found one by one.
    let first = map.next_id as i64;
    damage(Error::map(format!("behind keyframe {}: {broken}", first - 1)))?;
    let size =
        file.db.query_row("SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()", [], |r| r.get(0)).unwrap_or(0i64);
    let last = state(file).map_or(i64::MAX, |s| s.next_keyframe).min(first.saturating_add(size / 100));
    let mut one = file.db.prepare("SELECT * FROM keyframe WHERE id = ?1")?;
    for id in first..last {
        match one.query_row([id], |row| Ok(keyframe(row, file.version))).optional() {
            Ok(Some(read)) => take(map, read, id, file.version, features).or_else(&mut *damage)?,
            Ok(None) => {}
            Err(e) => damage(Error::map(format!("keyframe {id}: {e}")))?,
        }
    }
    Ok(())
}

fn closures(file: &Readable, map: &mut Map, damage: OnDamage<'_>) -> Result<()> {
    let mut rows = file.db.prepare("SELECT * FROM closure ORDER BY rowid")?;
    let mut rows = rows.query([])?;
    let mut last = -1;
    let mut one = |map: &mut Map, row: &rusqlite::Row<'_>| -> Result<()> {
        let (query, matched): (i64, i64) = (get(row, "query")?, get(row, "matched")?);
        let similarity: Option<f64> = if file.version < 4 { None } else { get(row, "similarity")? };
        if file.version >= 4 {
            let id: i64 = get(row, "id")?;
            if get::<i64>(row, "crc")? != crc_of_closure(id, query, matched, similarity) || id <= last {
                return Err(Error::map(format!("closure {query} - {matched} is damaged: its checksum is another, or its place")));
            }
            last = id;
        }
        let at = |id: i64| u64::try_from(id).ok().and_then(|id| map.row_of(id));
        let (Some(query), Some(matched)) = (at(query), at(matched)) else {
            return Err(Error::map(format!("closure {query} - {matched} names a keyframe that is not there")));
        };
        map.link(Link { query, matched, similarity: similarity.map_or(f32::NAN, |s| s as f32) });
        Ok(())
    };
    loop {
        match rows.next() {
            Ok(Some(row)) => one(map, row).or_else(&mut *damage)?,
            Ok(None) => return Ok(()),
            Err(e) => return damage(e.into()),
        }
    }
}
