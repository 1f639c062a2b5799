//! What a map file holds, whether it is sound, and what of it can be saved.

use super::format::{self, State};
use super::Map;
use crate::descriptor::ModelIdentity;
use crate::error::{Error, Result};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Messages of damage that are kept: a file of noise would give one per row.
const MESSAGES: usize = 1000;

/// One run in a map.
#[derive(Clone, Debug, Serialize)]
pub struct SessionAccount {
    /// Its number.
    pub session: u32,
    /// Which robot.
    pub robot: u32,
    /// Names of its cameras; one empty name where there is but one camera.
    pub cameras: Vec<String>,
    /// Keyframes.
    pub keyframes: usize,
    /// Those with a pose in the odometry frame.
    pub with_pose: usize,
    /// Header stamp of the earliest, nanoseconds.
    pub first_stamp_ns: i64,
    /// Header stamp of the latest, nanoseconds.
    pub last_stamp_ns: i64,
    /// Length of its odometry along the keyframes, metres.
    pub path_m: f64,
}

/// What a map file holds.
#[derive(Clone, Debug, Serialize)]
pub struct Account {
    /// Of the file's tables.
    pub version: i64,
    /// Names the map.
    pub id: String,
    /// Which model its descriptors are of.
    pub model: ModelIdentity,
    /// How that model prepares images, JSON; empty where the file does not say.
    pub preprocessing: String,
    /// Keyframes.
    pub keyframes: usize,
    /// Values per descriptor.
    pub dimensions: usize,
    /// Accepted closures.
    pub closures: usize,
    /// Those between two sessions.
    pub closures_between_sessions: usize,
    /// Keyframes with a picture.
    pub thumbnails: usize,
    /// Keyframes with local features.
    pub features: usize,
    /// The extractor of those features.
    pub features_of: String,
    /// Cameras with a calibration.
    pub calibrations: usize,
    /// Bytes of the file.
    pub bytes: u64,
    /// A process is writing, or did not end in order.
    pub open: bool,
    /// By session.
    pub sessions: Vec<SessionAccount>,
}

/// What `verify` found.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Version of the tables.
    pub version: i64,
    /// Sound keyframes.
    pub keyframes: usize,
    /// Sound closures.
    pub closures: usize,
    /// What is wrong, in words; empty: nothing.
    pub damage: Vec<String>,
}

impl Map {
    fn sessions(&self) -> Vec<SessionAccount> {
        let mut sessions: BTreeMap<u32, (SessionAccount, BTreeSet<&str>)> = BTreeMap::new();
        let mut last: BTreeMap<u32, nalgebra::Vector3<f64>> = BTreeMap::new();
        for k in &self.keyframes {
            let (account, cameras) = sessions.entry(k.session).or_insert_with(|| {
                let (first_stamp_ns, last_stamp_ns) = (k.stamp_ns, k.stamp_ns);
                let new = SessionAccount {
                    session: k.session,
                    robot: k.robot,
                    cameras: Vec::new(),
                    keyframes: 0,
                    with_pose: 0,
                    first_stamp_ns,
                    last_stamp_ns,
                    path_m: 0.0,
                };
                (new, BTreeSet::new())
            });
            cameras.insert(&k.camera);
            account.keyframes += 1;
            account.first_stamp_ns = account.first_stamp_ns.min(k.stamp_ns);
            account.last_stamp_ns = account.last_stamp_ns.max(k.stamp_ns);
            if let Some(pose) = k.odom_from_base {
                account.with_pose += 1;
                let at = pose.translation.vector;
                account.path_m += last.insert(k.session, at).map_or(0.0, |before| (at - before).norm());
            }
        }
        sessions
            .into_values()
            .map(|(account, cameras)| SessionAccount { cameras: cameras.into_iter().map(String::from).collect(), ..account })
            .collect()
    }

    /// What a map file holds.
    ///
    /// Errors: as [`Map::load_any`].
    pub fn account(path: &Path) -> Result<Account> {
        let map = Self::load_any(path)?;
        let file = || {
            let file = format::open(path, false)?;
            Ok((file.version, format::state(&file)?))
        };
        let (version, state): (i64, State) = file().map_err(|e: Error| e.at(path))?;
        let session = |row: usize| map.keyframes[row].session;
        Ok(Account {
            version,
            id: map.id(),
            model: map.model.clone(),
            preprocessing: map.preprocessing.clone(),
            keyframes: map.keyframes.len(),
            dimensions: if map.keyframes.is_empty() { 0 } else { map.index.row(0).len() },
            closures: map.links.len(),
            closures_between_sessions: map.links.iter().filter(|l| session(l.query) != session(l.matched)).count(),
            thumbnails: map.thumbnails.len(),
            features: map.features.len(),
            features_of: map.features_identity.clone(),
            calibrations: map.calibrations.len(),
            bytes: std::fs::metadata(path).map_err(Error::io(path))?.len(),
            open: state.writing,
            sessions: map.sessions(),
        })
    }

    /// Looks at every page and every row of a map file.
    ///
    /// Errors: a file that is no map at all, or of a newer version.
    pub fn verify(path: &Path) -> Result<Verdict> {
        let (map, version, damage) = tolerant(path)?;
        Ok(Verdict { version, keyframes: map.keyframes.len(), closures: map.links.len(), damage })
    }
}

/// All of a map file that is sound, and what is not, in words.
///
/// Errors: a file that is no map at all, or of a newer version.
pub fn salvage(path: &Path) -> Result<(Map, Vec<String>)> {
    tolerant(path).map(|(map, _, damage)| (map, damage))
}

fn tolerant(path: &Path) -> Result<(Map, i64, Vec<String>)> {
    let mut damage: Vec<String> = Vec::new();
    let mut more = 0usize;
    let mut note = |words: String| {
        if damage.len() < MESSAGES {
            damage.push(words);
        } else {
            more += 1;
        }
    };
    let read = |note: &mut dyn FnMut(String)| -> Result<(Map, i64)> {
        let file = format::open(path, false)?;
        let version = file.version;
        match pages(&file) {
            Ok(words) => words.into_iter().for_each(&mut *note),
            Err(e) => note(e.to_string()),
        }
        let map = format::read(&file, None, &mut |e| {
            note(e.to_string());
            Ok(())
        })?;
        Ok((map, version))
    };
    let (map, version) = read(&mut note).map_err(|e| e.at(path))?;
    if more > 0 {
        damage.push(format!("and {more} more"));
    }
    Ok((map, version, damage))
}

/// SQLite's own look at its pages.
fn pages(file: &format::Readable) -> Result<Vec<String>> {
    let mut rows = file.db.prepare("PRAGMA integrity_check(20)")?;
    let words = rows.query_map([], |r| r.get::<_, String>(0))?.collect::<rusqlite::Result<Vec<_>>>()?;
    Ok(words.into_iter().filter(|w| w != "ok").map(|w| w.replace('\n', " ")).collect())
}
