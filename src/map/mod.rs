//! The map: keyframes, their descriptors, and the closures accepted so far.
//!
//! Knows nothing of images, models or ROS: descriptors come in, neighbours go out.

mod changes;
mod check;
mod codes;
mod dot;
mod export;
mod format;
mod index;
mod lock;
mod store;
mod thin;

pub use changes::Changes;
pub use check::{salvage, Account, SessionAccount, Verdict};
pub use dot::dot;
pub use export::{g2o, json, tum, Edges};
pub use format::VERSION;
pub use index::{Hit, Index};
pub use store::{Opened, Store};
pub use thin::Remap;

use crate::descriptor::{Descriptor, ModelIdentity};
use crate::error::{Error, Result};
use crate::features::CompactFeatures;
use crate::image::Camera;
use changes::Unsaved;
use nalgebra::Isometry3;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// One remembered place.
#[derive(Clone, Debug, PartialEq)]
pub struct Keyframe {
    /// Which robot saw it.
    pub robot: u32,
    /// Which run added it, counting from 0.
    pub session: u32,
    /// Name of the camera; empty where there is but one.
    pub camera: String,
    /// Header stamp, nanoseconds.
    pub stamp_ns: i64,
    /// File name or topic, for reports.
    pub name: String,
    /// `T_odom_base` at the stamp, metres; of its own session only.
    pub odom_from_base: Option<Isometry3<f64>>,
}

/// An accepted closure between two rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Row of the query.
    pub query: usize,
    /// Row of the match.
    pub matched: usize,
    /// Cosine similarity of the two; NaN where a file of version 3 or older did not say.
    pub similarity: f32,
}

/// Keyframes in order of insertion. A keyframe's id is its row, until the map is thinned: then rows move up, and ids stay.
#[derive(Clone, Debug, Default)]
pub struct Map {
    model: ModelIdentity,
    /// How the model prepares images, for people; empty where it is not known.
    preprocessing: String,
    /// Set by the first keyframe, see [`Map::id`].
    name: Option<String>,
    keyframes: Vec<Keyframe>,
    /// Of each row, ascending.
    ids: Vec<u64>,
    /// The id that the next keyframe gets.
    next_id: u64,
    revision: u64,
    unsaved: Unsaved,
    index: Index,
    links: Vec<Link>,
    /// Where each row stands in its track.
    places: Vec<Place>,
    /// Stamp of each row, nanoseconds: what every search asks of all of them lies together.
    stamps: Vec<i64>,
    /// Number and length so far of the track of each session's cameras.
    tracks: BTreeMap<(u32, String), Place>,
    /// Shared, so that a copy of the map for saving does not copy them.
    thumbnails: BTreeMap<usize, Arc<[u8]>>,
    /// Which extractor the features are of; features of another do not compare.
    features_identity: String,
    /// Shared, as the thumbnails are.
    features: BTreeMap<usize, Arc<CompactFeatures>>,
    /// Calibration of each session's cameras.
    calibrations: BTreeMap<(u32, String), Camera>,
}

/// A position along a track: the keyframes of one camera in one session, in order. Neighbourhood is
/// counted along tracks, whatever other cameras' rows lie between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Which track.
    pub track: u32,
    /// Keyframes of the track before this one.
    pub position: u32,
}

impl Place {
    /// Whether both are of one track and at most `radius` keyframes apart.
    pub fn near(self, other: Self, radius: usize) -> bool {
        self.track == other.track && self.position.abs_diff(other.position) as usize <= radius
    }
}

impl Map {
    /// An empty map for descriptors of `model`.
    pub fn new(model: ModelIdentity) -> Self {
        Self { model, ..Self::default() }
    }

    /// Which model its descriptors are from.
    pub fn model(&self) -> &ModelIdentity {
        &self.model
    }

    /// How the model prepares images, JSON; empty where a file of version 3 or older did not say.
    pub fn preprocessing(&self) -> &str {
        &self.preprocessing
    }

    /// Says how the model prepares images.
    pub fn set_preprocessing(&mut self, json: &str) {
        self.preprocessing = json.into();
    }

    /// All keyframes, by row.
    pub fn keyframes(&self) -> &[Keyframe] {
        &self.keyframes
    }

    /// Their descriptors.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Accepted closures in order of acceptance.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// The id of a row: what messages and files name a keyframe by, whatever was removed since.
    pub fn id_of(&self, row: usize) -> u64 {
        self.ids.get(row).copied().unwrap_or(self.next_id)
    }

    /// The row of an id; `None` if there is none, or none any more.
    pub fn row_of(&self, id: u64) -> Option<usize> {
        self.ids.binary_search(&id).ok()
    }

    /// The session number that a new run takes.
    pub fn next_session(&self) -> u32 {
        self.keyframes.iter().map(|k| k.session + 1).max().unwrap_or(0)
    }

    /// Adds a keyframe; returns its row.
    ///
    /// Errors: a descriptor of another dimension; then nothing is added.
    pub fn push(&mut self, keyframe: Keyframe, descriptor: &Descriptor) -> Result<usize> {
        let position = self.next_place(keyframe.session, &keyframe.camera).position;
        self.push_as(self.next_id, position, keyframe, descriptor)
    }

    /// Adds a keyframe that has an id and a position along its track already; both above those before.
    fn push_as(&mut self, id: u64, position: u32, keyframe: Keyframe, descriptor: &Descriptor) -> Result<usize> {
        self.index.push(descriptor)?;
        if self.name.is_none() {
            self.name = Some(name_of(&self.model, Some((&keyframe, descriptor.as_slice()))));
        }
        let mut place = self.next_place(keyframe.session, &keyframe.camera);
        place.position = position;
        self.places.push(place);
        self.stamps.push(keyframe.stamp_ns);
        self.tracks.insert((keyframe.session, keyframe.camera.clone()), Place { position: position.saturating_add(1), ..place });
        self.keyframes.push(keyframe);
        self.ids.push(id);
        self.next_id = id + 1;
        self.revision += 1;
        Ok(self.keyframes.len() - 1)
    }

    /// Adds all of `other`, its sessions numbered from `first` on, or behind this map's.
    ///
    /// Errors: another model; then nothing is added.
    pub fn merge(&mut self, other: &Self, first: u32) -> Result<()> {
        if self.model != other.model {
            return Err(Error::map(format!(
                "it was made with model {}, this one with {}; descriptors of two models do not compare",
                other.model, self.model
            )));
        }
        let (first, rows) = (first.max(self.next_session()), self.keyframes.len());
        let ids = self.next_id;
        for (row, keyframe) in other.keyframes.iter().enumerate() {
            let descriptor = Descriptor::stored(other.index.row(row).to_vec())?;
            let keyframe = Keyframe { session: first.saturating_add(keyframe.session), ..keyframe.clone() };
            self.push_as(ids + other.ids[row], other.places[row].position, keyframe, &descriptor)?;
        }
        other.links.iter().for_each(|l| self.link(Link { query: l.query + rows, matched: l.matched + rows, ..*l }));
        self.thumbnails.extend(other.thumbnails.iter().map(|(row, jpeg)| (row + rows, jpeg.clone())));
        if self.features.is_empty() || other.features_identity == self.features_identity {
            self.features_identity.clone_from(&other.features_identity);
            self.features.extend(other.features.iter().map(|(row, f)| (row + rows, f.clone())));
            self.unsaved.settings();
        }
        if !other.calibrations.is_empty() {
            self.unsaved.settings();
        }
        self.calibrations.extend(other.calibrations.iter().map(|((session, camera), c)| ((first + session, camera.clone()), c.clone())));
        Ok(())
    }

    /// A small JPEG of a keyframe, if it was kept.
    pub fn thumbnail(&self, row: usize) -> Option<&[u8]> {
        self.thumbnails.get(&row).map(|jpeg| &**jpeg)
    }

    /// Keeps a small JPEG of a keyframe.
    pub fn set_thumbnail(&mut self, row: usize, jpeg: Vec<u8>) {
        if row < self.keyframes.len() {
            self.thumbnails.insert(row, jpeg.into());
            self.unsaved.touch(self.ids[row]);
        }
    }

    /// The file that held this map is gone: all of it is to be written again.
    pub fn nothing_saved(&mut self) {
        self.unsaved = Unsaved::default();
        self.unsaved.settings();
    }

    /// Forgets all thumbnails.
    pub fn drop_thumbnails(&mut self) {
        self.thumbnails.keys().for_each(|r| self.unsaved.touch(self.ids[*r]));
        self.thumbnails.clear();
    }

    /// Forgets all local features.
    pub fn drop_features(&mut self) {
        self.features.keys().for_each(|r| self.unsaved.touch(self.ids[*r]));
        self.features.clear();
        self.features_identity.clear();
        self.unsaved.settings();
    }

    /// Local features of a keyframe, if they were kept and are of the extractor of `identity`.
    pub fn features(&self, row: usize, identity: &str) -> Option<&Arc<CompactFeatures>> {
        self.features.get(&row).filter(|_| self.features_identity == identity)
    }

    /// Which extractor the kept features are of; empty where there are none.
    pub fn features_identity(&self) -> &str {
        &self.features_identity
    }

    /// Keeps the local features of a keyframe. Those of another extractor are dropped: they do not compare.
    pub fn set_features(&mut self, row: usize, identity: &str, features: CompactFeatures) {
        if row >= self.keyframes.len() {
            return;
        }
        if self.features_identity != identity {
            // What the file holds of them goes too.
            self.features.keys().for_each(|r| self.unsaved.touch(self.ids[*r]));
            self.features.clear();
            self.features_identity = identity.into();
            self.unsaved.settings();
        }
        self.features.insert(row, Arc::new(features));
        self.unsaved.touch(self.ids[row]);
    }

    /// Calibration of the camera that saw a keyframe, as far as it was known.
    pub fn calibration(&self, row: usize) -> Option<&Camera> {
        let k = self.keyframes.get(row)?;
        self.calibrations.get(&(k.session, k.camera.clone()))
    }

    /// Keeps the calibration of a session's camera.
    pub fn set_calibration(&mut self, session: u32, camera: &str, calibration: &Camera) {
        let slot = (session, camera.to_string());
        if self.calibrations.get(&slot) != Some(calibration) {
            self.calibrations.insert(slot, calibration.clone());
            self.unsaved.settings();
        }
    }

    /// Grows with every keyframe and closure: tells consumers that something changed.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Tells maps apart: made of the model and the first keyframe, so it stays as the map grows.
    pub fn id(&self) -> String {
        self.name.clone().unwrap_or_else(|| name_of(&self.model, None))
    }

    /// Where a row stands in its track.
    pub fn place(&self, row: usize) -> Place {
        self.places[row]
    }

    /// The place that the next keyframe of this session and camera would take.
    pub fn next_place(&self, session: u32, camera: &str) -> Place {
        let none = Place { track: self.tracks.len() as u32, position: 0 };
        self.tracks.get(&(session, camera.to_string())).copied().unwrap_or(none)
    }

    /// Remembers an accepted closure.
    pub fn link(&mut self, link: Link) {
        self.links.push(link);
        self.revision += 1;
    }

    /// The rows that a query of `session` at `stamp_ns` may match: every other session, and of its
    /// own those that are neither among the last `keyframes` of their camera nor younger than `seconds`.
    pub fn outside_window(&self, session: u32, stamp_ns: i64, seconds: f64, keyframes: usize) -> Vec<Range<usize>> {
        let window = (seconds * 1e9) as i64;
        // First position of each own track that is too recent by count. Tracks of other sessions are not among them.
        let own: Vec<(u32, usize)> = self
            .tracks
            .iter()
            .filter(|((s, _), _)| *s == session)
            .map(|(_, end)| (end.track, (end.position as usize).saturating_sub(keyframes)))
            .collect();
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for (row, (place, stamp)) in self.places.iter().zip(&self.stamps).enumerate() {
            let too_recent = own.iter().find(|(track, _)| *track == place.track).map(|(_, first)| *first);
            let open = too_recent.is_none_or(|first| (place.position as usize) < first && stamp_ns.saturating_sub(*stamp) >= window);
            if open {
                match ranges.last_mut() {
                    Some(last) if last.end == row => last.end += 1,
                    _ => ranges.push(row..row + 1),
                }
            }
        }
        ranges
    }

    /// `open`, rows that [`Map::outside_window`] gives for `session`, without those on whose track the similarity to `query` still rises
    /// towards now at the window's edge.
    ///
    /// As a robot leaves a place, the best match outside the window is for a while the newest one that the window lets through, and moves
    /// on as fast as the robot does: a chain like a loop's. A row counts only if none of the `radius` rows after it that is inside the window,
    /// or was taken away for such a one itself, is more similar; going back from the edge, the search ends after `radius` rows that count. [ours]
    pub fn past_the_slope(&self, open: Vec<Range<usize>>, session: u32, query: &Descriptor, radius: usize) -> Vec<Range<usize>> {
        let is_open = |row: usize| open.get(open.partition_point(|r| r.end <= row)).is_some_and(|r| r.contains(&row));
        let mut barred: Vec<usize> = Vec::new();
        for end in self.tracks.iter().filter(|((s, _), _)| *s == session).map(|(_, end)| end) {
            // Similarities of the last rows, from now backwards, that are inside the window or taken away; none where a row counts.
            let mut after: VecDeque<Option<f32>> = VecDeque::with_capacity(radius + 1);
            let mut outside = false;
            let mut left = end.position as usize;
            for row in (0..self.places.len()).rev() {
                if left == 0 || outside && after.iter().all(Option::is_none) {
                    break;
                }
                if self.places[row].track != end.track {
                    continue;
                }
                left -= 1;
                let own = dot(query.as_slice(), self.index.row(row));
                let inside = !is_open(row);
                outside |= !inside;
                // NaN is above nothing, and nothing above it.
                let below = after.iter().flatten().any(|s| *s > own);
                if !inside && below {
                    barred.push(row);
                }
                after.push_back((inside || below).then_some(own));
                if after.len() > radius {
                    after.pop_front();
                }
            }
        }
        without(open, barred)
    }

    /// Whether rows `a` and `b` show one place: at most `radius` keyframes apart along one track, or
    /// joined by an accepted closure whose ends are that near to them.
    pub fn same_place(&self, a: usize, b: usize, radius: usize) -> bool {
        self.places[a].near(self.places[b], radius) || self.around(a, radius).holds(self.places[b])
    }

    /// The place that `row` shows; one look at all closures, for any number of [`Map::same_place`].
    pub fn around(&self, row: usize, radius: usize) -> Around {
        let own = self.places[row];
        let mut places = vec![own];
        for link in &self.links {
            let (query, matched) = (self.places[link.query], self.places[link.matched]);
            places.extend(own.near(query, radius).then_some(matched));
            places.extend(own.near(matched, radius).then_some(query));
        }
        Around { places, radius }
    }
}

/// One place: all that is near a row, or near the other end of a closure that ends near it.
#[derive(Clone, Debug)]
pub struct Around {
    places: Vec<Place>,
    radius: usize,
}

impl Around {
    /// Whether `place` is part of it.
    pub fn holds(&self, place: Place) -> bool {
        self.places.iter().any(|p| p.near(place, self.radius))
    }
}

/// `ranges` (ascending, disjoint) without these of their rows.
fn without(ranges: Vec<Range<usize>>, mut rows: Vec<usize>) -> Vec<Range<usize>> {
    if rows.is_empty() {
        return ranges;
    }
    rows.sort_unstable();
    let mut left = Vec::with_capacity(ranges.len() + 1);
    for range in ranges {
        let mut from = range.start;
        let first = rows.partition_point(|r| *r < range.start);
        for row in rows[first..].iter().take_while(|r| **r < range.end) {
            if from < *row {
                left.push(from..*row);
            }
            from = row + 1;
        }
        if from < range.end {
            left.push(from..range.end);
        }
    }
    left
}

fn name_of(model: &ModelIdentity, first: Option<(&Keyframe, &[f32])>) -> String {
    let mut hash = Sha256::new();
    hash.update(&model.sha256);
    if let Some((k, descriptor)) = first {
        hash.update(k.robot.to_le_bytes());
        hash.update(k.stamp_ns.to_le_bytes());
        hash.update(&k.name);
        descriptor.iter().for_each(|v| hash.update(v.to_le_bytes()));
    }
    hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyframe(session: u32, seconds: i64) -> Keyframe {
        of_camera(session, "", seconds)
    }

    fn of_camera(session: u32, camera: &str, seconds: i64) -> Keyframe {
        let (stamp_ns, camera) = (seconds * 1_000_000_000, camera.into());
        Keyframe { robot: 0, session, camera, stamp_ns, name: String::new(), odom_from_base: None }
    }

    fn map(keyframes: &[(u32, i64)]) -> Map {
        let mut map = Map::new(ModelIdentity::default());
        let d = Descriptor::new(vec![1.0, 0.0]).unwrap();
        for (session, seconds) in keyframes {
            map.push(keyframe(*session, *seconds), &d).unwrap();
        }
        map
    }

    #[test]
    fn the_exclusion_window_is_time_and_count_and_own_session_only() {
        let m = map(&[(0, 0), (0, 1), (1, 0), (1, 10), (1, 50), (1, 51), (1, 52)]);
        let at = |seconds: i64, s: f64, n| m.outside_window(1, seconds * 1_000_000_000, s, n);
        assert_eq!(at(53, 20.0, 0), [0..4], "by time");
        assert_eq!(at(53, 0.0, 2), [0..5], "by count");
        assert_eq!(at(53, 20.0, 5), [0..2], "the stricter of both");
        assert_eq!(at(53, 1e9, 100), [0..2], "other sessions are never excluded");
        // A stamp from before the map: everything of this session is in the future.
        assert_eq!(at(-100, 20.0, 0), [0..2]);
    }

    /// One track whose similarities to the query along it are these, a keyframe a second.
    fn similar(similarities: &[f32]) -> (Map, Descriptor) {
        let mut map = Map::new(ModelIdentity::default());
        for (i, s) in similarities.iter().enumerate() {
            map.push(keyframe(0, i as i64), &Descriptor::new(vec![*s, (1.0 - s * s).sqrt()]).unwrap()).unwrap();
        }
        (map, Descriptor::new(vec![1.0, 0.0]).unwrap())
    }

    /// Three keyframes at a door of Gardens Point were taken for those 20 before, at the window's edge, all along a chain of ten.
    #[test]
    fn what_the_robot_is_still_leaving_is_no_match() {
        let rows = |similarities: &[f32], inside: usize, radius: usize| {
            let (map, query) = similar(similarities);
            let open = map.outside_window(0, i64::MAX, 0.0, inside);
            map.past_the_slope(open, 0, &query, radius)
        };
        let rising = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9];
        assert!(rows(&rising, 3, 2).is_empty(), "all of it leads up to now");
        assert_eq!(rows(&rising, 0, 2), [0..7], "without a window there is no edge");
        assert_eq!(rows(&rising, 3, 0), [0..4], "a radius of 0 looks at nothing");
        // A peak behind the slope stays, with all that lies behind it.
        let peak = [0.2, 0.5, 0.8, 0.5, 0.3, 0.4, 0.5, 0.6, 0.7];
        assert_eq!(rows(&peak, 3, 2), [0..4]);
        // One at the edge, too.
        assert_eq!(rows(&[0.1, 0.2, 0.8, 0.6, 0.5, 0.4], 3, 2), [2..3]);
        // But not one that is lower than what is inside, near by.
        assert_eq!(rows(&[0.9, 0.2, 0.2, 0.5, 0.4, 0.6], 2, 2), [0..1]);
        assert!(rows(&[0.4, 0.9], 5, 8).is_empty());
        assert!(rows(&[], 5, 8).is_empty());
    }

    #[test]
    fn the_slope_is_the_own_cameras_of_this_session() {
        let mut m = Map::new(ModelIdentity::default());
        let query = Descriptor::new(vec![1.0, 0.0]).unwrap();
        let mut push = |session: u32, camera: &str, i: i64, s: f32| {
            m.push(of_camera(session, camera, i), &Descriptor::new(vec![s, (1.0 - s * s).sqrt()]).unwrap()).unwrap();
        };
        // An earlier session that ends with a rise, then two cameras: the front's similarity rises, the rear's falls.
        (0..4).for_each(|i| push(0, "front", i, 0.2 * i as f32));
        for i in 0..6 {
            push(1, "front", i, 0.1 * i as f32);
            push(1, "rear", i, 0.6 - 0.1 * i as f32);
        }
        let open = m.outside_window(1, i64::MAX, 0.0, 2);
        assert_eq!(open, [0..12]);
        assert_eq!(m.past_the_slope(open, 1, &query, 3), [0..4, 5..6, 7..8, 9..10, 11..12]);
    }

    proptest::proptest! {
        /// Against the definition, row by row.
        #[test]
        fn a_row_counts_only_if_nothing_after_it_is_still_more_similar(similarities in proptest::collection::vec(0u8..20, 0..40), inside in 0usize..20, radius in 0usize..9) {
            let similarities: Vec<f32> = similarities.into_iter().map(|s| f32::from(s) / 20.0).collect();
            let (map, query) = similar(&similarities);
            let n = similarities.len();
            let open = map.outside_window(0, i64::MAX, 0.0, inside);
            let got: Vec<usize> = map.past_the_slope(open, 0, &query, radius).into_iter().flatten().collect();
            let edge = n.saturating_sub(inside);
            let mut counts = vec![false; n];
            for r in (0..edge).rev() {
                counts[r] = (r + 1..(r + 1 + radius).min(n)).all(|j| counts[j] || similarities[j] <= similarities[r]);
            }
            let want: Vec<usize> = (0..n).filter(|r| counts[*r]).collect();
            proptest::prop_assert_eq!(got, want);
        }
    }

    proptest::proptest! {
        /// Against the definitions, row by row, also where rows have gone.
        #[test]
        fn the_window_and_a_place_are_what_they_are_said_to_be(
            rows in proptest::collection::vec((0u32..3, 0usize..2, 0i64..60), 1..60), at in -9i64..90, seconds in 0i64..30, count in 0usize..5,
            ends in proptest::collection::vec((0usize..60, 0usize..60), 0..12), radius in 0usize..4, left in 1usize..60,
        ) {
            let mut m = Map::new(ModelIdentity::default());
            let d = Descriptor::new(vec![1.0, 0.0]).unwrap();
            for (session, camera, stamp) in &rows {
                m.push(of_camera(*session, ["front", "rear"][*camera], *stamp), &d).unwrap();
            }
            ends.iter().for_each(|(a, b)| m.link(Link { query: a % rows.len(), matched: b % rows.len(), similarity: 0.5 }));
            m.thin(left);
            let n = m.keyframes().len();
            for session in 0..4 {
                let got: Vec<usize> = m.outside_window(session, at * 1_000_000_000, seconds as f64, count).into_iter().flatten().collect();
                let open = |row: &usize| {
                    let k = &m.keyframes()[*row];
                    let behind = m.place(*row).position as usize + count < m.next_place(k.session, &k.camera).position as usize;
                    k.session != session || behind && at * 1_000_000_000 - k.stamp_ns >= seconds * 1_000_000_000
                };
                proptest::prop_assert_eq!(got, (0..n).filter(open).collect::<Vec<_>>());
            }
            for a in 0..n {
                let around = m.around(a, radius);
                for b in 0..n {
                    let near = |a: usize, b: usize| m.place(a).near(m.place(b), radius);
                    let joined = |l: &Link| near(a, l.query) && near(b, l.matched) || near(b, l.query) && near(a, l.matched);
                    let same = near(a, b) || m.links().iter().any(joined);
                    proptest::prop_assert_eq!((around.holds(m.place(b)), m.same_place(a, b, radius)), (same, same));
                }
            }
        }
    }

    #[test]
    fn closures_join_places_so_that_a_third_lap_is_not_ambiguous() {
        let mut m = map(&(0..60).map(|i| (0, i)).collect::<Vec<_>>());
        assert!(m.same_place(10, 14, 5) && !m.same_place(10, 40, 5));
        m.link(Link { query: 41, matched: 11, similarity: 0.9 });
        assert!(m.same_place(10, 40, 5) && m.same_place(40, 10, 5));
        assert!(!m.same_place(10, 50, 5));
    }

    #[test]
    fn neighbours_are_counted_along_a_camera_and_the_window_holds_for_all_of_them() {
        let mut m = Map::new(ModelIdentity::default());
        let d = Descriptor::new(vec![1.0, 0.0]).unwrap();
        for i in 0..20 {
            m.push(of_camera(0, ["front", "rear"][i % 2], i as i64), &d).unwrap();
        }
        assert!(m.same_place(0, 4, 2) && !m.same_place(0, 6, 2), "four rows are two keyframes");
        assert!(!m.same_place(0, 1, 2), "the rear camera looks elsewhere");
        assert_eq!(m.outside_window(0, 19_000_000_000, 0.0, 3), [0..14], "the last three of each camera");
        assert_eq!(m.outside_window(0, 19_000_000_000, 10.0, 0), [0..10]);
        assert_eq!(m.outside_window(1, 0, 1e9, 100), [0..20]);
        assert_eq!(m.next_place(0, "rear"), Place { track: 1, position: 10 });
    }

    #[test]
    fn merging_keeps_sessions_links_and_pictures_apart() {
        let model = |name: &str| ModelIdentity { name: name.into(), sha256: String::new() };
        let d = Descriptor::new(vec![1.0, 0.0]).unwrap();
        let build = |name: &str| {
            let mut m = Map::new(model(name));
            (0..4).for_each(|i| assert_eq!(m.push(keyframe(i / 2, i.into()), &d).unwrap(), i as usize));
            m.link(Link { query: 3, matched: 0, similarity: 0.5 });
            m.set_thumbnail(2, vec![7]);
            m
        };
        let (mut a, b) = (build("m"), build("m"));
        let id = a.id();
        a.merge(&b, 0).unwrap();
        assert_eq!(a.keyframes().iter().map(|k| k.session).collect::<Vec<_>>(), [0, 0, 1, 1, 2, 2, 3, 3]);
        assert_eq!(a.links()[1], Link { query: 7, matched: 4, similarity: 0.5 });
        assert_eq!((a.thumbnail(6), a.thumbnail(3)), (Some(&[7u8][..]), None));
        assert_eq!((a.id(), a.revision(), a.next_session()), (id, 10, 4));
        let said = a.merge(&build("other"), 0).unwrap_err().to_string();
        assert!(said.contains("`other`") && said.contains("`m`"), "{said}");
        assert_eq!(a.keyframes().len(), 8);
    }
}
