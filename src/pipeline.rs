//! The loop detector: a keyframe in, a closure or the reason against one out.

use crate::config::{Config, Recommended};
use crate::descriptor::Descriptor;
use crate::error::Result;
use crate::features::{CompactFeatures, Features};
use crate::geometry::View;
use crate::image::{Camera, Glance};
use crate::map::{Changes, Hit, Keyframe, Link, Map, Store};
use crate::rerank::{Budget, Reranked, Reranker};
use nalgebra::Isometry3;
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One described image.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Name of the camera; empty where there is but one.
    pub camera: String,
    /// Header stamp, nanoseconds.
    pub stamp_ns: i64,
    /// File name or topic and stamp, for reports.
    pub name: String,
    /// Its global descriptor.
    pub descriptor: Descriptor,
    /// Standard deviation of its luma, 0 to 255.
    pub luma_std: f32,
    /// Median of the registered depth, metres, where there is one.
    pub median_depth_m: Option<f32>,
    /// What stands still is told by; asked where there is no odometry.
    pub glance: Option<Glance>,
    /// `T_odom_base` at the stamp, metres.
    pub odom_from_base: Option<Isometry3<f64>>,
    /// Local features, where the detector verifies ([`LoopDetector::wants_features`]).
    pub features: Option<Features>,
    /// Calibration of the image as it was described: without distortion coefficients where that was removed.
    pub calibration: Option<Camera>,
}

/// Why an image did not become a keyframe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Skip {
    /// Dark, white, constant, covered, or too near a wall: there is nothing to recognise.
    LowQuality,
    /// Sooner than `keyframe.min_interval_s` after the last keyframe, or after the last image that was
    /// described and found to be none.
    TooSoon,
    /// Nothing moved since the last keyframe: parked.
    Stationary,
    /// Its stamp lies before the last keyframe's, or more than an hour after the last image's.
    TimeJump,
}

impl Skip {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::LowQuality => "LOW_QUALITY",
            Self::TooSoon => "TOO_SOON",
            Self::Stationary => "STATIONARY",
            Self::TimeJump => "TIME_JUMP",
        }
    }
}

/// Why a keyframe closed no loop. Names as in `LoopClosureCandidate.msg`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Reason {
    /// The map holds nothing outside the exclusion window, or only what the robot is still leaving.
    TooRecent,
    /// The similarity of the best match, or its mean along the chain that leads there, is below the
    /// threshold.
    LowSimilarity,
    /// Another place looks nearly as alike.
    Ambiguous,
    /// Too few consecutive keyframes point at the same stretch, or the match does not advance with
    /// the robot.
    NotConsistent,
    /// The odometry says that the places are far apart.
    PoseGate,
    /// The geometry of the two images does not agree, or agrees with another place nearly as well.
    Geometry,
    /// A closure was published too short a time ago.
    RateLimit,
}

impl Reason {
    /// All reasons, in the order in which they are checked.
    pub const ALL: [Self; 7] =
        [Self::TooRecent, Self::LowSimilarity, Self::Ambiguous, Self::NotConsistent, Self::PoseGate, Self::Geometry, Self::RateLimit];

    /// The name in messages and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::TooRecent => "TOO_RECENT",
            Self::LowSimilarity => "LOW_SIMILARITY",
            Self::Ambiguous => "AMBIGUOUS",
            Self::NotConsistent => "NOT_CONSISTENT",
            Self::PoseGate => "POSE_GATE",
            Self::Geometry => "GEOMETRY",
            Self::RateLimit => "RATE_LIMIT",
        }
    }
}

/// What became of a keyframe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A loop, to be published.
    Closure,
    /// None, and why.
    Rejected(Reason),
}

/// The best place and what speaks against it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evidence {
    /// Keyframe of the map.
    pub matched: usize,
    /// Its cosine similarity.
    pub similarity: f32,
    /// The best keyframe of any other place.
    pub second: Option<Hit>,
    /// `similarity - second.similarity`; `None` when there is no other place.
    pub margin: Option<f32>,
    /// Consecutive keyframes, this one included, that point here.
    pub consistent_count: usize,
    /// Mean similarity along the last `min_consistent` of them.
    pub chain_similarity: f32,
    /// How evenly the match advanced over the last `min_consistent` of them; `None` if there are
    /// fewer, or fewer than three.
    pub advance: Option<Advance>,
    /// Stamp of the query less that of the match, seconds.
    pub time_gap_s: f64,
    /// Distance of the two poses in the odometry frame, metres; of one session only.
    pub odometry_distance_m: Option<f64>,
    /// Logarithm of the inliers by those of the best other place; `None` where nothing was verified.
    pub lead: Option<f64>,
}

/// The full account of one keyframe.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Its id in the map; where the map is only read, the id that it would have got.
    pub query: usize,
    /// Whether it was added to the map.
    pub added: bool,
    /// Its session.
    pub session: u32,
    /// The nearest neighbours, best first, `search.top_k` at most; in the order of the second stage where there was one.
    pub hits: Vec<Hit>,
    /// What the second stage says of each of `hits`; empty where there was none.
    pub reranked: Vec<Reranked>,
    /// Whether this closes the search that [`LoopDetector::relocalize`] began.
    pub relocalized: bool,
    /// Closure or reason.
    pub outcome: Outcome,
    /// `None` when nothing could be compared.
    pub evidence: Option<Evidence>,
    /// Rows of the map outside the exclusion window: those that a loop could lead to. Of them it was compared with those that
    /// [`Map::past_the_slope`] leaves.
    pub outside_window: Vec<Range<usize>>,
}

/// What became of an image.
#[derive(Clone, Debug, PartialEq)]
// Handed on and taken apart at once, never kept in numbers.
#[allow(clippy::large_enum_variant)]
pub enum Step {
    /// No keyframe.
    Skipped(Skip),
    /// A keyframe, added to the map.
    Keyframe(Decision),
}

/// A straight line through the matches of consecutive keyframes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Advance {
    /// Keyframes of the map per keyframe of the run; negative when driven the other way.
    pub pace: f64,
    /// Largest distance of a match from the line, in keyframes.
    pub error: f64,
}

impl Advance {
    /// The least-squares line through positions along a track; `None` for fewer than three, through
    /// which any line would do.
    fn of(positions: &[u32]) -> Option<Self> {
        if positions.len() < 3 {
            return None;
        }
        let n = positions.len() as f64;
        let (mx, my) = ((n - 1.0) / 2.0, positions.iter().map(|p| f64::from(*p)).sum::<f64>() / n);
        let centred = || positions.iter().enumerate().map(|(i, p)| (i as f64 - mx, f64::from(*p) - my));
        let pace = centred().map(|(x, y)| x * y).sum::<f64>() / centred().map(|(x, _)| x * x).sum::<f64>();
        let error = centred().map(|(x, y)| (y - pace * x).abs()).fold(0.0, f64::max);
        Some(Self { pace, error })
    }
}

/// A place that the last keyframe pointed at, and the chain that led there.
#[derive(Clone, Debug)]
struct Pointer {
    /// Matches of consecutive keyframes, this one's last; at most `min_consistent`.
    hits: Vec<Hit>,
    /// Length of the whole chain.
    count: usize,
}

impl Pointer {
    fn row(&self) -> Option<usize> {
        self.hits.last().map(|h| h.row)
    }
}

/// A keyframe, as the next image is compared with it.
#[derive(Clone, Debug)]
struct Last {
    keyframe: Keyframe,
    descriptor: Descriptor,
    glance: Option<Glance>,
}

/// What is remembered of one camera from one frame to the next.
#[derive(Clone, Debug, Default)]
struct CameraState {
    /// The last keyframe of this run.
    last: Option<Last>,
    /// Where it pointed, with the length of each chain.
    pointers: Vec<Pointer>,
    /// Stamp of the last frame that did not jump.
    seen_ns: Option<i64>,
    /// Stamp of the last frame whose looks were asked for.
    looked_ns: Option<i64>,
    /// Frames in a row whose stamp jumped.
    jumps: usize,
}

/// Detects loops over a stream of frames. Deterministic: the same frames give the same decisions.
#[derive(Debug)]
pub struct LoopDetector {
    config: Config,
    recommended: Recommended,
    threshold: f32,
    min_margin: f64,
    min_descriptor_change: f64,
    map: Map,
    robot: u32,
    session: u32,
    /// The map is only read.
    localization_only: bool,
    /// The next closure answers [`LoopDetector::relocalize`].
    relocalizing: bool,
    cameras: BTreeMap<String, CameraState>,
    last_closure_ns: Option<i64>,
    /// The second stage.
    verifier: Option<Arc<Reranker>>,
    /// How long it took for the last frame.
    verification_time: Duration,
}

/// So many frames in a row whose stamp jumped begin a new session.
const JUMPS: usize = 5;
/// A gap between two frames above this is a jump: a clock that was set, or a stamp that is nonsense.
const LONGEST_GAP_NS: i64 = 3_600_000_000_000;

impl LoopDetector {
    /// Starts a session on `map`. `recommended` is what the model's header says.
    ///
    /// Errors: a setting out of range.
    pub fn new(config: Config, map: Map, recommended: Recommended) -> Result<Self> {
        let session = map.next_session();
        let mut detector = Self {
            config: Config::default(),
            recommended,
            threshold: 0.0,
            min_margin: 0.0,
            min_descriptor_change: 0.0,
            map,
            robot: 0,
            session,
            localization_only: false,
            relocalizing: false,
            cameras: BTreeMap::new(),
            last_closure_ns: None,
            verifier: None,
            verification_time: Duration::ZERO,
        };
        detector.set_config(config)?;
        Ok(detector)
    }

    /// Takes new settings from the next frame on.
    ///
    /// Errors: a setting out of range; then nothing changes.
    pub fn set_config(&mut self, config: Config) -> Result<()> {
        config.validate()?;
        self.threshold = self.recommended.similarity_threshold(config.decision.similarity_threshold);
        self.min_margin = self.recommended.min_margin(config.decision.min_margin);
        self.min_descriptor_change = self.recommended.min_descriptor_change(config.keyframe.min_descriptor_change);
        self.config = config;
        Ok(())
    }

    /// Verifies from the next keyframe on. Without this, `verification.enabled` does nothing.
    pub fn set_verifier(&mut self, verifier: Option<Arc<Reranker>>) {
        self.verifier = verifier;
    }

    /// The second stage.
    pub fn verifier(&self) -> Option<&Arc<Reranker>> {
        self.verifier.as_ref().filter(|_| self.config.verification.enabled)
    }

    /// How long matching and geometry took for the last frame.
    pub fn verification_time(&self) -> Duration {
        self.verification_time
    }

    /// Whether [`Self::process`] could use local features of this frame: it verifies, and the frame will not be
    /// skipped. Extracting them costs more than describing the image.
    pub fn wants_features(&self, frame: &Frame) -> bool {
        let skipped =
            || self.skips(&frame.camera, frame.stamp_ns, frame.odom_from_base.as_ref()).or_else(|| self.skips_for_its_looks(frame));
        self.verifier().is_some() && skipped().is_none()
    }

    /// The number of this robot in the map's keyframes.
    pub fn set_robot(&mut self, robot: u32) {
        self.robot = robot;
    }

    /// With `true` places are looked up and none is added.
    pub fn set_localization_only(&mut self, on: bool) {
        self.localization_only = on;
    }

    /// Whether places are only looked up.
    pub fn localization_only(&self) -> bool {
        self.localization_only
    }

    /// The robot may be anywhere: forgets what led here, and takes all keyframes, those of a moment ago
    /// too, as places to be found again. The next closure says that it answers this.
    pub fn relocalize(&mut self) {
        self.begin_session();
        self.relocalizing = true;
    }

    /// Whether a relocalization is still sought.
    pub fn relocalizing(&self) -> bool {
        self.relocalizing
    }

    /// Puts another map in the place of this one and begins a session on it; the old one comes back.
    pub fn replace_map(&mut self, map: Map) -> Map {
        let old = std::mem::replace(&mut self.map, map);
        self.begin_session();
        old
    }

    /// Adds another map's keyframes as earlier sessions.
    ///
    /// Errors: another model; then nothing changes.
    pub fn merge_map(&mut self, other: &Map) -> Result<()> {
        self.map.merge(other, self.session + 1)
    }

    /// Keeps a small JPEG of a keyframe of the map.
    pub fn set_thumbnail(&mut self, row: usize, jpeg: Vec<u8>) {
        self.map.set_thumbnail(row, jpeg);
    }

    /// The best `top_k` matches of a descriptor in the whole map, and the best of any other place than
    /// the first; nothing is remembered.
    pub fn query(&self, descriptor: &Descriptor, top_k: usize) -> (Vec<Hit>, Option<Hit>) {
        self.search(descriptor, top_k, &[0..self.map.keyframes().len()])
    }

    /// Keeps at most `keyframes` of the map: see [`Map::thin`]. Rows change, so decisions made before do not name them any more.
    /// Returns how many keyframes went.
    pub fn thin(&mut self, keyframes: usize) -> usize {
        let before = self.map.keyframes().len();
        let remap = self.map.thin(keyframes);
        for pointer in self.cameras.values_mut().flat_map(|c| &mut c.pointers) {
            pointer.hits.retain_mut(|h| remap.to(h.row).map(|row| h.row = row).is_some());
        }
        before - self.map.keyframes().len()
    }

    /// Takes note of what a file holds now; see [`Map::changes`].
    pub fn saved(&mut self, changes: &Changes) {
        self.map.saved(changes);
    }

    /// The file of the map is gone; see [`Map::nothing_saved`].
    pub fn nothing_saved(&mut self) {
        self.map.nothing_saved();
    }

    /// Takes note of what the map's file holds; see [`Map::resume`].
    pub fn resume(&mut self, file: &Map) -> bool {
        self.map.resume(file)
    }

    /// Writes what is new of the map to its file.
    ///
    /// Errors: it cannot be written; what was there stays whole.
    pub fn write(&mut self, store: &mut Store) -> Result<usize> {
        store.write_all(&mut self.map)
    }

    /// The map with all that was added.
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// The settings in use.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The similarity threshold in use, after the model's recommendation.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// The smallest lead of the best place in use, after the model's recommendation.
    pub fn min_margin(&self) -> f64 {
        self.min_margin
    }

    /// The smallest change of the descriptor in use, after the model's recommendation.
    pub fn min_descriptor_change(&self) -> f64 {
        self.min_descriptor_change
    }

    /// The number of this run in the map.
    pub fn session(&self) -> u32 {
        self.session
    }

    /// Whether a frame with this stamp would be skipped whatever it shows: known before it is described.
    /// A pose that is not known yet is `None`.
    pub fn skips(&self, camera: &str, stamp_ns: i64, odom_from_base: Option<&Isometry3<f64>>) -> Option<Skip> {
        let settings = &self.config.keyframe;
        let state = self.cameras.get(camera)?;
        let last = &state.last.as_ref()?.keyframe;
        let since = stamp_ns.saturating_sub(last.stamp_ns);
        if since < 0 || stamp_ns.saturating_sub(state.seen_ns.unwrap_or(stamp_ns)) > LONGEST_GAP_NS {
            return Some(Skip::TimeJump);
        }
        // An image that changed too little was described for that; the next is not before the interval is over,
        // or a robot that stands before a camera of 30 Hz would describe without a pause.
        let since = stamp_ns.saturating_sub(state.looked_ns.unwrap_or(last.stamp_ns));
        if (since as f64) < settings.min_interval_s * 1e9 {
            return Some(Skip::TooSoon);
        }
        let (a, b) = (last.odom_from_base.as_ref()?, odom_from_base?);
        let still = (a.translation.vector - b.translation.vector).norm() < settings.min_distance_m
            && a.rotation.angle_to(&b.rotation).to_degrees() < settings.min_rotation_deg;
        still.then_some(Skip::Stationary)
    }

    /// Takes note of a frame that [`Self::skips`] said is skipped, as [`Self::process`] would. `None`: the
    /// clock was set, a session has begun, and the frame is wanted after all.
    pub fn skip(&mut self, camera: &str, stamp_ns: i64, skip: Skip) -> Option<Skip> {
        let state = self.cameras.entry(camera.to_string()).or_default();
        if skip == Skip::TimeJump {
            state.jumps += 1;
            // One stamp out of line is a glitch; several in a row are a new clock, or a bag that began again.
            if state.jumps >= JUMPS {
                self.begin_session();
                return None;
            }
        } else {
            state.jumps = 0;
            state.seen_ns = Some(stamp_ns);
        }
        Some(skip)
    }

    /// Takes one frame.
    ///
    /// Errors: a descriptor of another dimension than the map's; then nothing changes.
    pub fn process(&mut self, frame: Frame) -> Result<Step> {
        let early = self.skips(&frame.camera, frame.stamp_ns, frame.odom_from_base.as_ref());
        if early.is_none() {
            self.cameras.entry(frame.camera.clone()).or_default().looked_ns = Some(frame.stamp_ns);
        }
        if let Some(skip) = early.or_else(|| self.skips_for_its_looks(&frame)) {
            if let Some(skip) = self.skip(&frame.camera, frame.stamp_ns, skip) {
                return Ok(Step::Skipped(skip));
            }
            // After a jump the looks have not been asked yet.
            if let Some(skip) = self.skips_for_its_looks(&frame) {
                return Ok(Step::Skipped(skip));
            }
        }
        let outside_window = self.outside_window(&frame);
        let rows = self.map.past_the_slope(outside_window.clone(), self.session, &frame.descriptor, self.config.decision.place_radius);
        let (hits, second) = self.search(&frame.descriptor, self.config.search.top_k, &rows);
        let clock = Instant::now();
        let (hits, second, reranked) = self.second_stage(&frame, hits, second)?;
        self.verification_time = clock.elapsed();
        let best = hits.first().copied();
        let pointers = self.follow(&frame.camera, &hits);
        let mut evidence = best.map(|best| self.evidence(&frame, best, second, &pointers));
        if let (Some(e), Some(r)) = (&mut evidence, reranked.first()) {
            e.lead = r.verification.is_some().then_some(r.lead);
        }
        let outcome = self.decide(&frame, evidence.as_ref());
        let relocalized = self.relocalizing && outcome == Outcome::Closure;
        let (query, added) = self.remember(frame, evidence.as_ref(), outcome, pointers)?;
        Ok(Step::Keyframe(Decision { query, added, session: self.session, outcome, evidence, hits, reranked, outside_window, relocalized }))
    }

    /// Orders the hits by geometry where that can matter: not where no hit is similar enough to be a closure.
    #[allow(clippy::type_complexity)]
    fn second_stage(&self, frame: &Frame, hits: Vec<Hit>, second: Option<Hit>) -> Result<(Vec<Hit>, Option<Hit>, Vec<Reranked>)> {
        let (Some(verifier), Some(features)) = (self.verifier(), &frame.features) else { return Ok((hits, second, Vec::new())) };
        if hits.first().is_none_or(|h| h.similarity < self.threshold) {
            return Ok((hits, second, Vec::new()));
        }
        let reranked = self.rerank(verifier, &View { features, camera: frame.calibration.as_ref() }, &hits)?;
        let hits: Vec<Hit> = reranked.iter().map(|r| r.hit).collect();
        let radius = self.config.decision.place_radius;
        // The best of any other place than the new first; what was the second before may be of this place now.
        let second = hits.first().and_then(|best| {
            let around = self.map.around(best.row, radius);
            let other = hits.iter().copied().chain(second).filter(|h| !around.holds(self.map.place(h.row)));
            other.max_by(|a, b| a.similarity.total_cmp(&b.similarity))
        });
        Ok((hits, second, reranked))
    }

    /// `hits` in the order of the second stage, with the features that the map kept, within the settings' budget.
    ///
    /// Errors: features that do not compare.
    pub fn rerank(&self, verifier: &Reranker, query: &View, hits: &[Hit]) -> Result<Vec<Reranked>> {
        let v = &self.config.verification;
        let budget = Budget {
            candidates: v.candidates,
            time: (v.budget_ms > 0.0).then(|| Duration::from_secs_f64(v.budget_ms * 1e-3)),
            sure: (v.stop_lead > 0.0).then_some(v.stop_lead),
        };
        let reference = |row: usize| {
            // Features that do not unpack were never packed: then the place is taken as one without.
            let features = self.map.features(row, &verifier.identity())?.unpack().ok()?;
            Some((features, self.map.calibration(row).cloned()))
        };
        let radius = self.config.decision.place_radius;
        verifier.rerank(query, hits, &budget, reference, |a, b| self.map.same_place(a, b, radius))
    }

    fn skips_for_its_looks(&self, frame: &Frame) -> Option<Skip> {
        let settings = &self.config.keyframe;
        if frame.luma_std.is_nan() || f64::from(frame.luma_std) < settings.min_luma_std {
            return Some(Skip::LowQuality);
        }
        if frame.median_depth_m.is_some_and(|d| f64::from(d) < settings.min_depth_m) {
            return Some(Skip::LowQuality);
        }
        let last = self.cameras.get(&frame.camera)?.last.as_ref()?;
        // Where both poses are known they have decided already.
        let blind = last.keyframe.odom_from_base.is_none() || frame.odom_from_base.is_none();
        // Rounding puts the cosine of equals above 1; a setting of 0 is to hold nothing back.
        let change = (1.0 - f64::from(last.descriptor.similarity(&frame.descriptor))).max(0.0);
        let unmoved = || last.glance.as_ref().filter(|_| self.min_descriptor_change > 0.0)?.unmoved(frame.glance.as_ref()?);
        let still = change < self.min_descriptor_change || unmoved().is_some_and(|share| f64::from(share) > settings.max_still_share);
        (blind && still).then_some(Skip::Stationary)
    }

    /// What was mapped so far becomes an earlier session: its stamps do not compare with new ones.
    fn begin_session(&mut self) {
        // A number is not used twice, even if nothing was added under it, or the map was replaced.
        self.session = self.map.next_session().max(self.session + u32::from(!self.cameras.is_empty()));
        self.last_closure_ns = None;
        self.cameras.clear();
    }

    fn outside_window(&self, frame: &Frame) -> Vec<Range<usize>> {
        let s = &self.config.search;
        self.map.outside_window(self.session, frame.stamp_ns, s.exclusion_s, s.exclusion_keyframes)
    }

    /// The best hits among `rows`, and the best one that is another place than the
    /// first: neighbouring hits, and those that closures join, are one.
    fn search(&self, descriptor: &Descriptor, top_k: usize, rows: &[Range<usize>]) -> (Vec<Hit>, Option<Hit>) {
        let radius = self.config.decision.place_radius;
        let mut k = top_k;
        loop {
            let mut hits = self.map.index().search(descriptor, k, rows);
            let around = hits.first().map(|best| self.map.around(best.row, radius));
            let second = around.and_then(|around| hits.iter().find(|h| !around.holds(self.map.place(h.row))).copied());
            // Where one place fills the list (a dense map, many laps) the rival lies further down.
            if second.is_some() || hits.len() < k {
                hits.truncate(top_k);
                return (hits, second);
            }
            k *= 4;
        }
    }

    /// Where this keyframe points: the best hit of each stretch of the map, with the longest chain
    /// that leads there.
    fn follow(&self, camera: &str, hits: &[Hit]) -> Vec<Pointer> {
        let d = &self.config.decision;
        let near = |a: usize, b: usize, n: usize| self.map.place(a).near(self.map.place(b), n);
        let led = self.cameras.get(camera).map_or(&[][..], |t| &t.pointers);
        let mut stretches: Vec<Hit> = Vec::new();
        for hit in hits {
            if stretches.len() == d.consistency_places {
                break;
            }
            if !stretches.iter().any(|s| near(s.row, hit.row, d.place_radius)) {
                stretches.push(*hit);
            }
        }
        let extend = |hit: Hit| {
            let before = led.iter().filter(|p| p.row().is_some_and(|row| near(row, hit.row, d.consistency_window)));
            // The longest; the first (best) of equals.
            let before = before.reduce(|a, b| if b.count > a.count { b } else { a });
            let mut chain = before.map(|p| p.hits.clone()).unwrap_or_default();
            chain.push(hit);
            let surplus = chain.len().saturating_sub(d.min_consistent);
            chain.drain(..surplus);
            Pointer { hits: chain, count: 1 + before.map_or(0, |p| p.count) }
        };
        stretches.into_iter().map(extend).collect()
    }

    fn evidence(&self, frame: &Frame, best: Hit, second: Option<Hit>, pointers: &[Pointer]) -> Evidence {
        let matched = &self.map.keyframes()[best.row];
        let pose = matched.odom_from_base.filter(|_| matched.session == self.session);
        let chain = pointers.iter().find(|p| p.row() == Some(best.row));
        let along = chain.map_or(&[][..], |p| &p.hits);
        let positions: Vec<u32> = along.iter().map(|h| self.map.place(h.row).position).collect();
        let mean = along.iter().map(|h| f64::from(h.similarity)).sum::<f64>() / along.len().max(1) as f64;
        let distance = |(a, b): (Isometry3<f64>, Isometry3<f64>)| (a.translation.vector - b.translation.vector).norm();
        Evidence {
            matched: best.row,
            similarity: best.similarity,
            second,
            margin: second.map(|s| best.similarity - s.similarity),
            consistent_count: chain.map_or(0, |p| p.count),
            chain_similarity: mean as f32,
            advance: Advance::of(&positions).filter(|_| along.len() >= self.config.decision.min_consistent),
            time_gap_s: frame.stamp_ns.saturating_sub(matched.stamp_ns) as f64 * 1e-9,
            odometry_distance_m: pose.zip(frame.odom_from_base).map(distance),
            lead: None,
        }
    }

    fn decide(&self, frame: &Frame, evidence: Option<&Evidence>) -> Outcome {
        let d = &self.config.decision;
        let Some(e) = evidence else { return Outcome::Rejected(Reason::TooRecent) };
        let too_soon = |last: i64| (frame.stamp_ns.saturating_sub(last) as f64) < d.min_closure_interval_s * 1e9;
        let verifies = self.verifier().is_some();
        let agrees = e.lead.is_some_and(|lead| lead >= self.config.verification.min_lead);
        // Geometry that agrees with one place only says more than the margin and a long chain.
        let enough = if agrees { self.config.verification.min_consistent.min(d.min_consistent) } else { d.min_consistent };
        let reason = if e.similarity.min(e.chain_similarity) < self.threshold {
            Reason::LowSimilarity
        } else if !agrees && e.margin.is_some_and(|m| f64::from(m) < self.min_margin) {
            Reason::Ambiguous
        } else if e.consistent_count < enough || !e.advance.is_none_or(|a| self.is_even(a)) {
            Reason::NotConsistent
        } else if d.max_odometry_distance_m > 0.0 && e.odometry_distance_m.is_some_and(|m| m > d.max_odometry_distance_m) {
            Reason::PoseGate
        } else if verifies && !agrees {
            Reason::Geometry
        } else if self.last_closure_ns.is_some_and(too_soon) {
            Reason::RateLimit
        } else {
            return Outcome::Closure;
        };
        Outcome::Rejected(reason)
    }

    fn is_even(&self, a: Advance) -> bool {
        let d = &self.config.decision;
        (d.min_pace..=d.max_pace).contains(&a.pace.abs()) && a.error <= d.max_pace_error
    }

    fn remember(&mut self, frame: Frame, evidence: Option<&Evidence>, outcome: Outcome, pointers: Vec<Pointer>) -> Result<(usize, bool)> {
        let Frame { camera, stamp_ns, name, descriptor, glance, odom_from_base, features, calibration, .. } = frame;
        let keyframe = Keyframe { robot: self.robot, session: self.session, camera, stamp_ns, name, odom_from_base };
        let added = !self.localization_only;
        let query = if added { self.map.push(keyframe.clone(), &descriptor)? } else { self.map.keyframes().len() };
        if let (true, Some(v)) = (added, self.verifier.as_ref().filter(|_| self.config.verification.enabled)) {
            if let Some(features) = &features {
                self.map.set_features(query, &v.identity(), CompactFeatures::new(features));
            }
            if let Some(calibration) = &calibration {
                self.map.set_calibration(keyframe.session, &keyframe.camera, calibration);
            }
        }
        if let (Outcome::Closure, Some(e)) = (outcome, evidence) {
            if added {
                self.map.link(Link { query, matched: e.matched, similarity: e.similarity });
            }
            self.last_closure_ns = Some(stamp_ns);
            self.relocalizing = false;
        }
        let state = self.cameras.entry(keyframe.camera.clone()).or_default();
        let last = Some(Last { keyframe, descriptor, glance });
        *state = CameraState { last, pointers, seen_ns: Some(stamp_ns), looked_ns: Some(stamp_ns), jumps: 0 };
        Ok((query, added))
    }
}

#[cfg(test)]
mod tests;
