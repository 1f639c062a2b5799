//! A map as one SQLite file. Written whole under a temporary name, then renamed.

use super::{Keyframe, Link, Map};
use crate::descriptor::{Descriptor, ModelIdentity};
use crate::error::{Error, Result};
use crate::features::CompactFeatures;
use nalgebra::{Isometry3, Quaternion, Translation3, UnitQuaternion};
use rusqlite::{params, Connection, OpenFlags};
use std::path::{Path, PathBuf};

/// `PRAGMA application_id`: "SVPR".
const APPLICATION_ID: i64 = 0x5356_5052;
/// `PRAGMA user_version`: version of the tables below.
const VERSION: i64 = 3;

const TABLES: &str = "
CREATE TABLE model (name TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE keyframe (
  id INTEGER PRIMARY KEY, session INTEGER NOT NULL, stamp_ns INTEGER NOT NULL, name TEXT NOT NULL,
  x REAL, y REAL, z REAL, qx REAL, qy REAL, qz REAL, qw REAL, descriptor BLOB NOT NULL,
  robot INTEGER NOT NULL, camera TEXT NOT NULL, thumbnail BLOB, features BLOB);
CREATE TABLE features (identity TEXT NOT NULL);
CREATE TABLE calibration (session INTEGER NOT NULL, camera TEXT NOT NULL, json TEXT NOT NULL);
CREATE TABLE closure (query INTEGER NOT NULL, matched INTEGER NOT NULL);";

fn is_map(path: &Path) -> bool {
    let id = || {
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?.query_row("PRAGMA application_id", [], |r| r.get::<_, i64>(0))
    };
    id().is_ok_and(|id| id == APPLICATION_ID)
}

impl Map {
    /// Writes the map to `path`; the file there before stays whole if this fails. A file that is no map
    /// is not overwritten.
    pub fn save(&self, path: &Path) -> Result<()> {
        if path.exists() && !is_map(path) {
            return Err(Error::map("the file exists and is not a StructVPR map; it is not overwritten").at(path));
        }
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".tmp");
        let temporary = PathBuf::from(temporary);
        if temporary.exists() {
            std::fs::remove_file(&temporary).map_err(Error::io(&temporary))?;
        }
        self.write(&temporary).map_err(|e| e.at(path))?;
        std::fs::rename(&temporary, path).map_err(Error::io(path))
    }

    fn write(&self, path: &Path) -> Result<()> {
        let mut db = Connection::open(path)?;
        db.pragma_update(None, "application_id", APPLICATION_ID)?;
        db.pragma_update(None, "user_version", VERSION)?;
        let tx = db.transaction()?;
        tx.execute_batch(TABLES)?;
        tx.execute("INSERT INTO model VALUES (?1, ?2)", params![self.model.name, self.model.sha256])?;
        {
            let mut insert = tx.prepare("INSERT INTO keyframe VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15,?16)")?;
            for (id, k) in self.keyframes.iter().enumerate() {
                let pose = k.odom_from_base.map(|p| {
                    let (t, q) = (p.translation.vector, p.rotation.coords);
                    [t.x, t.y, t.z, q.x, q.y, q.z, q.w]
                });
                let at = |i: usize| pose.map(|p| p[i]);
                let blob: Vec<u8> = self.index.row(id).iter().flat_map(|v| v.to_le_bytes()).collect();
                insert.execute(params![
                    id as i64,
                    k.session,
                    k.stamp_ns,
                    k.name,
                    at(0),
                    at(1),
                    at(2),
                    at(3),
                    at(4),
                    at(5),
                    at(6),
                    blob,
                    k.robot,
                    k.camera,
                    self.thumbnail(id),
                    self.features.get(&id).map(|f| f.as_bytes())
                ])?;
            }
            tx.execute("INSERT INTO features VALUES (?1)", params![self.features_identity])?;
            let mut insert = tx.prepare("INSERT INTO calibration VALUES (?1, ?2, ?3)")?;
            for ((session, camera), calibration) in &self.calibrations {
                let json = serde_json::to_string(calibration).map_err(|e| Error::map(e.to_string()))?;
                insert.execute(params![session, camera, json])?;
            }
            let mut insert = tx.prepare("INSERT INTO closure VALUES (?1, ?2)")?;
            for l in &self.links {
                insert.execute(params![l.query as i64, l.matched as i64])?;
            }
        }
        tx.commit()?;
        Ok(())
    }

    /// Reads a map, checking that it was made by `model`.
    ///
    /// Errors: no such file, not a map, a newer version, another model (by name), damaged rows.
    pub fn load(path: &Path, model: &ModelIdentity) -> Result<Self> {
        Self::read(path, model).map_err(|e| e.at(path))
    }

    fn read(path: &Path, model: &ModelIdentity) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::map("no such file"));
        }
        let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
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
        let found = db.query_row("SELECT name, sha256 FROM model", [], |r| Ok(ModelIdentity { name: r.get(0)?, sha256: r.get(1)? }))?;
        if &found != model {
            return Err(Error::map(format!(
                "made with model {found}, but the model in use is {model}; descriptors of two models do not compare"
            )));
        }
        let mut map = Map::new(found);
        let mut identity = String::new();
        let mut calibrations = std::collections::BTreeMap::new();
        if version >= 3 {
            identity = db.query_row("SELECT identity FROM features", [], |r| r.get(0))?;
            let mut rows = db.prepare("SELECT session, camera, json FROM calibration")?;
            let mut rows = rows.query([])?;
            while let Some(row) = rows.next()? {
                let (slot, json): ((u32, String), String) = ((row.get(0)?, row.get(1)?), row.get(2)?);
                let camera = serde_json::from_str(&json).map_err(|e| Error::map(format!("calibration of camera `{}`: {e}", slot.1)))?;
                calibrations.insert(slot, camera);
            }
        }
        let mut rows = db.prepare("SELECT * FROM keyframe ORDER BY id")?;
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            let id: i64 = row.get(0)?;
            if id != map.keyframes.len() as i64 {
                return Err(Error::map(format!("keyframe {} is missing", map.keyframes.len())));
            }
            let mut pose = [0f64; 7];
            let mut has_pose = true;
            for (i, p) in pose.iter_mut().enumerate() {
                match row.get::<_, Option<f64>>(4 + i)? {
                    Some(v) if v.is_finite() => *p = v,
                    _ => has_pose = false,
                }
            }
            let rotation = UnitQuaternion::try_new(Quaternion::new(pose[6], pose[3], pose[4], pose[5]), 1e-6);
            let odom_from_base = match (has_pose, rotation) {
                (true, Some(q)) => Some(Isometry3::from_parts(Translation3::new(pose[0], pose[1], pose[2]), q)),
                _ => None,
            };
            let blob: Vec<u8> = row.get(11)?;
            let values = blob.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
            let descriptor = Descriptor::new(values).map_err(|e| Error::map(format!("keyframe {id}: {e}")))?;
            // Version 1 knew one robot with one camera.
            let (robot, camera, thumbnail) =
                if version == 1 { (0, String::new(), None) } else { (row.get(12)?, row.get(13)?, row.get(14)?) };
            let features: Option<Vec<u8>> = if version >= 3 { row.get(15)? } else { None };
            let keyframe = Keyframe { robot, session: row.get(1)?, camera, stamp_ns: row.get(2)?, name: row.get(3)?, odom_from_base };
            let id = map.push(keyframe, &descriptor)?;
            if let Some(jpeg) = thumbnail {
                map.set_thumbnail(id, jpeg);
            }
            if let Some(bytes) = features {
                let features = CompactFeatures::from_bytes(bytes).map_err(|e| Error::map(format!("keyframe {id}: {e}")))?;
                map.set_features(id, &identity, features);
            }
        }
        map.calibrations = calibrations;
        let mut rows = db.prepare("SELECT query, matched FROM closure ORDER BY rowid")?;
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            let (query, matched) = (row.get::<_, i64>(0)?, row.get::<_, i64>(1)?);
            let n = map.keyframes.len() as i64;
            if !(0..n).contains(&query) || !(0..n).contains(&matched) {
                return Err(Error::map(format!("closure {query} - {matched} names a keyframe that is not there")));
            }
            map.links.push(Link { query: query as usize, matched: matched as usize });
        }
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Map {
        let mut map = Map::new(ModelIdentity { name: "m".into(), sha256: "0123456789abcdef".into() });
        for i in 0..5u8 {
            let d = Descriptor::new(vec![1.0, f32::from(i), 0.5]).unwrap();
            let pose = (i % 2 == 0).then(|| Isometry3::translation(f64::from(i), 1.0, 2.0));
            let camera = ["front", "rear"][usize::from(i) % 2].to_string();
            let (stamp_ns, name) = (i64::from(i) * 7, format!("{i}.jpg"));
            map.push(Keyframe { robot: 3, session: 0, camera, stamp_ns, name, odom_from_base: pose }, &d).unwrap();
        }
        map.set_thumbnail(3, vec![0xff, 0xd8]);
        let features = crate::features::Features::new(64, 48, vec![[3.0, 4.5]], vec![0.5], 3, vec![1.0, -0.5, 0.2]).unwrap();
        map.set_features(2, "sift", CompactFeatures::new(&features));
        let k = [50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0];
        let camera =
            crate::image::Camera { width: 64, height: 48, k, d: vec![0.1, -0.05, 0.0, 0.0, 0.0], distortion_model: "plumb_bob".into() };
        map.set_calibration(0, "front", &camera);
        map.link(Link { query: 4, matched: 1 });
        map
    }

    #[test]
    fn what_is_saved_is_loaded_and_saving_again_gives_the_same_bytes() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a.map"), dir.path().join("b.map"));
        let map = sample();
        map.save(&a)?;
        let back = Map::load(&a, map.model())?;
        assert_eq!((back.keyframes(), back.links()), (map.keyframes(), map.links()));
        assert_eq!((back.thumbnail(3), back.thumbnail(2)), (map.thumbnail(3), None));
        assert_eq!(back.place(4), map.place(4));
        assert_eq!(back.features(2, "sift"), map.features(2, "sift"));
        assert!(back.features(2, "sift").is_some() && back.features(2, "orb").is_none() && back.features(3, "sift").is_none());
        assert_eq!((back.calibration(2), back.calibration(1)), (map.calibration(2), None));
        assert!(back.calibration(2).is_some());
        back.save(&b)?;
        back.save(&b)?;
        assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
        Ok(())
    }

    #[test]
    fn another_model_a_foreign_file_and_a_newer_version_are_refused_by_name() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.map");
        let map = sample();
        map.save(&path)?;
        let check = |model: &ModelIdentity, want: &str| {
            let said = Map::load(&path, model).map(|_| ()).unwrap_err().to_string();
            assert!(said.contains(want) && said.contains("x.map"), "{said}");
        };
        check(&ModelIdentity { name: "other".into(), sha256: String::new() }, "`other`");
        Connection::open(&path)?.pragma_update(None, "user_version", 99)?;
        check(map.model(), "version 99");
        std::fs::write(&path, b"hello").unwrap();
        check(map.model(), "not a StructVPR map");
        let said = map.save(&path).unwrap_err().to_string();
        assert!(said.contains("not overwritten") && std::fs::read(&path).unwrap() == b"hello", "{said}");
        std::fs::remove_file(&path).unwrap();
        check(map.model(), "no such file");
        Ok(())
    }

    #[test]
    fn a_map_of_version_1_is_read() -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("old.map");
        let map = sample();
        map.save(&path)?;
        let db = Connection::open(&path)?;
        for column in ["robot", "camera", "thumbnail", "features"] {
            db.execute_batch(&format!("ALTER TABLE keyframe DROP COLUMN {column}"))?;
        }
        db.pragma_update(None, "user_version", 1)?;
        drop(db);
        let back = Map::load(&path, map.model())?;
        assert_eq!(back.keyframes().len(), 5);
        assert_eq!((back.keyframes()[3].robot, back.keyframes()[3].camera.as_str(), back.thumbnail(3)), (0, "", None));
        Ok(())
    }
}
