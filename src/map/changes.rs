//! What of a map its file does not hold yet, so that a file is written as the map grows and never whole.

use super::{Keyframe, Link, Map};
use crate::features::CompactFeatures;
use crate::image::Camera;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Kept by the map, for one file.
#[derive(Clone, Debug, Default)]
pub(super) struct Unsaved {
    /// The first id that was never written.
    from: u64,
    /// Written keyframes whose picture or features are newer than the file's, each with the count at its last change: a change
    /// that comes while the one before is being written is not forgotten.
    touched: BTreeMap<u64, u64>,
    count: u64,
    /// Written keyframes that the map dropped.
    removed: BTreeSet<u64>,
    /// So many closures, from the first, are in the file.
    links: usize,
    /// How often closures that may be in the file were moved, and how often they had been when the file's were last written anew.
    moved: u64,
    moved_written: u64,
    /// How often the features' identity or a calibration changed, and how often they had when they were last written.
    settings: u64,
    settings_written: u64,
}

impl Unsaved {
    /// A picture or features of a keyframe are new.
    pub(super) fn touch(&mut self, id: u64) {
        if id < self.from {
            self.count += 1;
            self.touched.insert(id, self.count);
        }
    }

    /// The features' identity or a calibration is new.
    pub(super) fn settings(&mut self) {
        self.settings += 1;
    }

    /// Of a file that holds what came before `next_id`; closures and settings are written anew.
    pub(super) fn resuming(next_id: u64) -> Self {
        Self { from: next_id, moved: 1, settings: 1, ..Self::default() }
    }

    /// Keyframes are no more, and closures were moved.
    pub(super) fn removed(&mut self, ids: impl Iterator<Item = u64>) {
        for id in ids.filter(|id| *id < self.from) {
            self.touched.remove(&id);
            self.removed.insert(id);
        }
        self.moved += 1;
    }
}

/// One keyframe as a file holds it.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub id: u64,
    pub position: u32,
    pub keyframe: Keyframe,
    pub descriptor: Vec<f32>,
    pub thumbnail: Option<Arc<[u8]>>,
    pub features: Option<Arc<CompactFeatures>>,
}

/// A written keyframe with what is new of it.
#[derive(Clone, Debug)]
pub(super) struct Touched {
    pub id: u64,
    /// At its last change.
    pub count: u64,
    pub thumbnail: Option<Arc<[u8]>>,
    pub features: Option<Arc<CompactFeatures>>,
}

/// The closures of a batch, by ids.
#[derive(Clone, Debug)]
pub(super) struct Links {
    /// How many of the file's stay; all others go.
    pub keep: usize,
    pub new: Vec<(u64, u64, f32)>,
}

/// What of a map a file does not hold yet, or a part of it.
#[derive(Clone, Debug)]
pub struct Changes {
    pub(super) name: String,
    pub(super) rows: Vec<Row>,
    pub(super) next: u64,
    pub(super) touched: Vec<Touched>,
    pub(super) removed: BTreeSet<u64>,
    pub(super) links: Option<Links>,
    pub(super) features_identity: String,
    pub(super) calibrations: Option<BTreeMap<(u32, String), Camera>>,
    settings: u64,
    moved: u64,
    /// Closures of the map when this was made.
    linked: usize,
}

impl Changes {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.touched.is_empty() && self.removed.is_empty() && self.links.is_none() && self.calibrations.is_none()
    }

    /// Keyframes in it.
    pub fn keyframes(&self) -> usize {
        self.rows.len()
    }
}

impl Map {
    /// What the map's file does not hold yet, with `limit` keyframes at most: the rest comes with the next.
    pub fn changes(&self, limit: usize) -> Changes {
        let start = self.ids.partition_point(|id| *id < self.unsaved.from);
        let end = self.ids.len().min(start.saturating_add(limit));
        let blobs = |row: usize| (self.thumbnails.get(&row).cloned(), self.features.get(&row).cloned());
        let rows = (start..end)
            .map(|row| {
                let (thumbnail, features) = blobs(row);
                let (keyframe, descriptor) = (self.keyframes[row].clone(), self.index.row(row).to_vec());
                Row { id: self.ids[row], position: self.places[row].position, keyframe, descriptor, thumbnail, features }
            })
            .collect();
        let touched = self.unsaved.touched.iter().take(limit).filter_map(|(id, count)| {
            let (thumbnail, features) = blobs(self.row_of(*id)?);
            Some(Touched { id: *id, count: *count, thumbnail, features })
        });
        // A closure is written once its keyframes are.
        let complete = end == self.ids.len();
        let u = &self.unsaved;
        let moved = u.moved != u.moved_written;
        let keep = if moved { 0 } else { u.links };
        let new = |l: &Link| (self.id_of(l.query), self.id_of(l.matched), l.similarity);
        let links =
            (complete && (moved || self.links.len() > keep)).then(|| Links { keep, new: self.links[keep..].iter().map(new).collect() });
        Changes {
            name: self.id(),
            rows,
            next: if complete { self.next_id } else { self.ids[end] },
            touched: touched.collect(),
            removed: self.unsaved.removed.clone(),
            links,
            features_identity: self.features_identity.clone(),
            calibrations: (u.settings != u.settings_written).then(|| self.calibrations.clone()),
            settings: u.settings,
            moved: u.moved,
            linked: self.links.len(),
        }
    }

    /// Takes note that the map's file holds `changes`.
    pub fn saved(&mut self, changes: &Changes) {
        let u = &mut self.unsaved;
        let before = u.from;
        u.removed.retain(|id| !changes.removed.contains(id));
        u.from = changes.next;
        for row in &changes.rows {
            match self.ids.binary_search(&row.id) {
                // A picture or features that came while their keyframe was being written.
                Ok(at) => {
                    let pictures = [self.thumbnails.get(&at), row.thumbnail.as_ref()].map(|t| t.map(|t| t.as_ptr()));
                    let features = [self.features.get(&at), row.features.as_ref()].map(|f| f.map(|f| f.as_bytes().as_ptr()));
                    if pictures[0] != pictures[1] || features[0] != features[1] {
                        u.touch(row.id);
                    }
                }
                // It went meanwhile, and is in the file now.
                Err(_) if row.id >= before => {
                    u.removed.insert(row.id);
                }
                Err(_) => {}
            }
        }
        for touched in &changes.touched {
            if u.touched.get(&touched.id) == Some(&touched.count) {
                u.touched.remove(&touched.id);
            }
        }
        if let Some(links) = &changes.links {
            if links.keep == 0 {
                u.moved_written = changes.moved;
            }
            u.links = changes.linked;
        }
        if changes.calibrations.is_some() {
            u.settings_written = changes.settings;
        }
    }

    /// Whether the map's file holds all of it.
    pub fn is_saved(&self) -> bool {
        self.changes(1).is_empty()
    }

    /// Everything is in a file, or will be written whole elsewhere.
    pub(super) fn all_saved(&mut self) {
        self.unsaved = Unsaved { from: self.next_id, links: self.links.len(), ..Unsaved::default() };
    }
}
