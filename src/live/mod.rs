//! The node without its middleware: messages as bytes in, decisions out. `src/ros` connects it to topics.
//!
//! One thread works ([`Engine::work`]); everything else only queues, asks or steers. What a bag gives
//! live is what `structvpr replay` gives for it, as long as nothing is dropped: the same readers, the same
//! detector, the pose at the image's stamp.

pub mod candidate;
pub mod geometry;
pub mod inbox;
pub mod picture;
pub mod qos;
pub mod stats;

use crate::bag::messages::{stamp_of, CameraInfo, CompressedImage, Header, Image, Message, Odometry};
use crate::confidence::Confidence;
use crate::config::{Config, Settings};
use crate::descriptor::Descriptor;
use crate::error::{read_file, Error, Result};
use crate::features::Features;
use crate::geometry::View;
use crate::image::{depths_at, median_depth_m, Camera, RgbImage};
use crate::map::{Hit, Map, Store};
use crate::model::{ComputeDevice, Model, Precision};
use crate::odometry::Track;
use crate::pipeline::{Decision, Frame, LoopDetector, Reason, Step};
use crate::rerank::{lead, Reranked, Reranker};
use candidate::{Asking, Candidate, Standing, Why};
use geometry::{checked, Checked};
use inbox::{Inbox, Level};
use nalgebra::Isometry3;
use sha2::{Digest, Sha256};
use stats::{Rate, Stats, Timings};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Odometry is kept so long.
const ODOMETRY_KEPT_NS: i64 = 60_000_000_000;
/// Odometry that has been silent for so long is not waited for.
const ODOMETRY_SILENT: Duration = Duration::from_secs(1);
/// Depth images that are remembered per camera.
const DEPTHS_KEPT: usize = 32;
/// Depth images that are kept whole per camera: as many as may come while an image waits.
const DEPTH_IMAGES_KEPT: usize = 8;
/// Depth further from the image's stamp is another view.
const DEPTH_SLACK_NS: u64 = 50_000_000;
/// Refused edges that a viewer is shown.
const REFUSED_KEPT: usize = 50;
/// So many images wait for odometry before it is taken that there is none.
const FIRST_WAITS: u64 = 3;

/// An image message as it came.
#[derive(Debug)]
pub struct Arrival {
    /// When.
    pub at: Instant,
    /// CDR of `sensor_msgs/Image` or `CompressedImage`.
    pub bytes: Vec<u8>,
}

/// A keyframe with all that is to be published of it.
#[derive(Debug)]
pub struct Keyed {
    /// Which camera.
    pub camera: usize,
    /// Of the image.
    pub header: Header,
    /// What was decided.
    pub decision: Decision,
    /// Its id in the map, if it was added.
    pub id: Option<u64>,
    /// Best first.
    pub candidates: Vec<Candidate>,
    /// Of the image.
    pub descriptor: Descriptor,
    /// `T_odom_base` at the stamp.
    pub odom_from_base: Option<Isometry3<f64>>,
    /// `T_frame_base` of the first candidate, where it is known.
    pub match_pose: Option<Isometry3<f64>>,
    /// Decoded.
    pub image: RgbImage,
    /// Names the map.
    pub map_id: String,
    /// Its state.
    pub map_revision: u64,
    /// `total` is still open.
    pub timings: Timings,
    arrived: Instant,
    generation: u64,
}

impl Keyed {
    /// From arrival to now, milliseconds.
    pub fn age_ms(&self) -> f32 {
        ms(self.arrived)
    }
}

fn ms(since: Instant) -> f32 {
    since.elapsed().as_secs_f32() * 1e3
}

/// A thread that panicked has been reported, and the node ends for it; what can still be saved is.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
struct CameraState {
    calibration: Option<Camera>,
    rate: Rate,
    last: Option<Instant>,
    received: u64,
    /// Stamp and median of the last depth images.
    depth: VecDeque<(i64, Option<f32>)>,
    /// The last depth images themselves, where matches are verified.
    depth_images: VecDeque<Image>,
}

#[derive(Debug, Default)]
struct OdometryState {
    track: Track,
    last: Option<Instant>,
    frame_id: String,
    waits: u64,
}

#[derive(Debug)]
struct Storage {
    /// Where the map is saved; none: in memory only.
    path: Option<PathBuf>,
    error: Option<String>,
}

/// How one camera fares.
#[derive(Clone, Debug)]
pub struct CameraReport {
    /// Its name.
    pub name: String,
    /// Images per second, lately.
    pub rate_hz: f64,
    /// Images so far.
    pub received: u64,
    /// Time since the last.
    pub silent: Option<Duration>,
    /// Its queue.
    pub level: Level,
    /// Whether a `camera_info` has come.
    pub calibrated: bool,
    /// The last median depth, metres.
    pub depth_m: Option<f32>,
}

/// How the map fares.
#[derive(Clone, Debug)]
pub struct MapReport {
    /// Names it.
    pub id: String,
    /// Its state.
    pub revision: u64,
    /// Keyframes in it.
    pub keyframes: usize,
    /// Closures in it.
    pub closures: usize,
    /// The session that runs.
    pub session: u32,
    /// Its file.
    pub file: Option<PathBuf>,
    /// Whether all of it is in the file.
    pub saved: bool,
    /// Why the last save failed.
    pub error: Option<String>,
    /// Whether it is only read.
    pub localization_only: bool,
    /// Whether a relocalization is sought.
    pub relocalizing: bool,
}

/// A position in the odometry frame, metres.
pub type Point = [f64; 3];

fn point(pose: &Isometry3<f64>) -> Point {
    pose.translation.vector.into()
}

/// What a viewer shows of the running session.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scene {
    /// Keyframes.
    pub nodes: Vec<Point>,
    /// Closures.
    pub accepted: Vec<(Point, Point)>,
    /// The last matches that were alike and yet refused.
    pub refused: Vec<(Point, Point)>,
}

/// The node without its middleware.
#[derive(Debug)]
pub struct Engine {
    model: Model,
    names: Vec<String>,
    compressed: bool,
    undistort: bool,
    verifies: bool,
    /// `T_base_optical` of each camera.
    camera_poses: Vec<Isometry3<f64>>,
    confidence: Option<Confidence>,
    robot: u32,
    start: Instant,
    /// Images that wait.
    pub inbox: Inbox<Arrival>,
    cameras: Vec<Mutex<CameraState>>,
    detector: Mutex<LoopDetector>,
    odometry: Mutex<OdometryState>,
    odometry_came: Condvar,
    settings: Mutex<Settings>,
    /// Of the detector's settings.
    config_hash: Mutex<String>,
    changing: Mutex<()>,
    stats: Mutex<Stats>,
    /// Writes the map's file, where there is one that is not only read. Held while the map is written or replaced; taken before
    /// `storage`, which is taken before `detector`.
    store: Mutex<Option<Store>>,
    storage: Mutex<Storage>,
    /// Edges that were refused although alike, in this session, newest last.
    refused: Mutex<VecDeque<(Point, Point)>>,
    /// Counts maps: a row number belongs to one.
    generation: AtomicU64,
    paused: AtomicBool,
    stopping: AtomicBool,
    /// What the log should say of the start.
    notes: Vec<String>,
}

/// Keyframes that are copied for the file at a time: bounds how long the detector waits.
const WRITTEN_AT_ONCE: usize = 200;

impl Engine {
    /// Loads model and map.
    ///
    /// Errors: a setting out of range, a weight file or a map that cannot be used, a map file that could
    /// not be written later; each names the file.
    pub fn new(settings: Settings) -> Result<Self> {
        settings.validate()?;
        let model = match settings.model.file.as_str() {
            "" => Model::shipped()?,
            file => Model::from_bytes(&read_file(Path::new(file))?).map_err(|e| e.at(Path::new(file)))?,
        };
        let m = &settings.model;
        let wrong = |field: &str, value: &str, allowed| Error::Config { field: field.into(), value: value.into(), allowed };
        let device: ComputeDevice = m.device.parse().map_err(|e| wrong("model.device", &m.device, e))?;
        let precision: Precision = m.compute.parse().map_err(|e| wrong("model.compute", &m.compute, e))?;
        let model = model.on(device, precision)?;
        let path = (!settings.map.file.is_empty()).then(|| PathBuf::from(&settings.map.file));
        if let Some(path) = &path {
            check_folder(path)?;
        }
        let (mut notes, mut store) = (Vec::new(), None);
        let map = match &path {
            // Read-only: any number of nodes may look places up in one map.
            Some(path) if settings.map.localization_only && path.exists() => Map::load(path, model.identity())?,
            Some(path) if !settings.map.localization_only => {
                let opened = Store::open(path, model.identity(), &model.preprocessing(), settings.map.durable_s)?;
                (store, notes) = (Some(opened.store), opened.notes);
                opened.map
            }
            _ => new_map(&model),
        };
        let mut detector = LoopDetector::new(settings.detector(), map, model.spec().recommended())?;
        // validate() has checked the range.
        let robot = u32::try_from(settings.map.robot_id).unwrap_or(u32::MAX);
        detector.set_robot(robot);
        detector.set_localization_only(settings.map.localization_only);
        if model.precision() != precision {
            notes.push(format!(
                "model.compute: {precision}: this processor has neither AMX nor AVX-512 BF16; computing in {}",
                model.precision()
            ));
        }
        let verifier = Reranker::from_settings(&settings.verification)?;
        let verifies = verifier.is_some();
        let confidence = match settings.publish.calibration.as_str() {
            "" => None,
            file => {
                let path = Path::new(file);
                let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
                let verification = if verifies { settings.verification.features.as_str() } else { "" };
                Some(Confidence::parse(&text, model.identity(), verification).map_err(|e| e.at(path))?)
            }
        };
        detector.set_verifier(verifier.map(Arc::new));
        let names = settings.input.cameras.clone();
        let camera_poses = (0..names.len()).map(|i| settings.input.camera_pose(i)).collect::<Result<_>>()?;
        Ok(Self {
            model,
            compressed: settings.input.image_transport == "compressed",
            undistort: settings.input.undistort,
            verifies,
            camera_poses,
            confidence,
            robot,
            start: Instant::now(),
            inbox: Inbox::new(names.len(), settings.input.queue_depth),
            cameras: names.iter().map(|_| Mutex::default()).collect(),
            names,
            config_hash: Mutex::new(config_hash(detector.config())),
            detector: Mutex::new(detector),
            odometry: Mutex::default(),
            odometry_came: Condvar::new(),
            settings: Mutex::new(settings),
            changing: Mutex::default(),
            stats: Mutex::default(),
            store: Mutex::new(store),
            notes,
            refused: Mutex::default(),
            storage: Mutex::new(Storage { path, error: None }),
            generation: AtomicU64::new(0),
            paused: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        })
    }

    /// What the log should say of the start: a run before that did not end in order, a map that was migrated, a processor without what
    /// was asked for.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The model in use.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Names of the cameras.
    pub fn cameras(&self) -> &[String] {
        &self.names
    }

    /// Whether images come as JPEG or PNG.
    pub fn compressed(&self) -> bool {
        self.compressed
    }

    /// The number of this robot.
    pub fn robot(&self) -> u32 {
        self.robot
    }

    /// A copy of the settings in use.
    pub fn settings(&self) -> Settings {
        lock(&self.settings).clone()
    }

    /// Of the detector's settings: equal hashes decide alike.
    pub fn config_hash(&self) -> String {
        lock(&self.config_hash).clone()
    }

    /// Held from reading the settings to [`Self::apply`], so that two changes do not undo each other.
    pub fn changing(&self) -> MutexGuard<'_, ()> {
        lock(&self.changing)
    }

    /// Takes new settings, of which those that want a restart are as they were.
    ///
    /// Errors: a setting out of range; then nothing changes.
    pub fn apply(&self, new: Settings) -> Result<()> {
        new.validate()?;
        {
            let mut detector = lock(&self.detector);
            detector.set_config(new.detector())?;
            *lock(&self.config_hash) = config_hash(detector.config());
            detector.set_localization_only(new.map.localization_only);
        }
        self.inbox.set_depth(new.input.queue_depth);
        *lock(&self.settings) = new;
        Ok(())
    }

    /// An image has come.
    pub fn image(&self, camera: usize, bytes: Vec<u8>) {
        let at = Instant::now();
        {
            let mut state = lock(&self.cameras[camera]);
            state.rate.add(at);
            state.last = Some(at);
            state.received += 1;
        }
        if self.paused.load(Ordering::Relaxed) {
            lock(&self.stats).paused += 1;
        } else {
            self.inbox.push(camera, Arrival { at, bytes });
        }
    }

    /// A `sensor_msgs/CameraInfo` has come.
    ///
    /// Errors: it does not decode.
    pub fn camera_info(&self, camera: usize, bytes: &[u8]) -> Result<()> {
        let calibration = CameraInfo::decode(bytes)?.camera;
        lock(&self.cameras[camera]).calibration = Some(calibration);
        Ok(())
    }

    /// A depth image has come.
    ///
    /// Errors: it does not decode, or is no depth.
    pub fn depth(&self, camera: usize, bytes: &[u8]) -> Result<()> {
        let m = Image::decode(bytes)?;
        let median = median_depth_m(&m.raw())?;
        let mut state = lock(&self.cameras[camera]);
        state.depth.push_back((m.header.stamp_ns, median));
        let surplus = state.depth.len().saturating_sub(DEPTHS_KEPT);
        state.depth.drain(..surplus);
        if self.verifies {
            state.depth_images.push_back(m);
            let surplus = state.depth_images.len().saturating_sub(DEPTH_IMAGES_KEPT);
            state.depth_images.drain(..surplus);
        }
        Ok(())
    }

    /// The features with the depth at the image's stamp, where there is one.
    fn with_depth(&self, camera: usize, stamp_ns: i64, features: Features) -> Result<Features> {
        let state = lock(&self.cameras[camera]);
        let near = |m: &&Image| m.header.stamp_ns.abs_diff(stamp_ns) <= DEPTH_SLACK_NS;
        let Some(m) = state.depth_images.iter().filter(near).min_by_key(|m| m.header.stamp_ns.abs_diff(stamp_ns)) else {
            return Ok(features);
        };
        let depths = depths_at(&m.raw(), features.size(), features.points())?;
        features.with_depths(depths)
    }

    /// The calibration of the images as they are described; `None` where none is known.
    fn calibration(&self, camera: usize) -> Option<Camera> {
        let calibration = lock(&self.cameras[camera]).calibration.clone()?;
        Some(if self.undistort { Camera { d: Vec::new(), ..calibration } } else { calibration })
    }

    /// `T_base_optical` of the camera that saw a keyframe; of the first where its name is not known.
    fn camera_pose(&self, name: &str) -> Isometry3<f64> {
        let at = self.names.iter().position(|n| n == name).unwrap_or(0);
        self.camera_poses.get(at).copied().unwrap_or_default()
    }

    /// The account of one re-ranked hit.
    fn checked(&self, detector: &LoopDetector, verifier: &Reranker, camera: &str, keypoints: usize, hit: &Reranked) -> Option<Checked> {
        let result = hit.verification.as_ref()?;
        let (map, row) = (detector.map(), hit.hit.row);
        let other = map.features(row, &verifier.identity()).map_or(0, |f| f.len());
        let success = result.is_ok() && hit.lead >= detector.config().verification.min_lead;
        let poses = [self.camera_pose(camera), self.camera_pose(&map.keyframes()[row].camera)];
        Some(checked(result, success, verifier.verify.method, [keypoints, other], poses, verifier.verify.seed))
    }

    /// The geometry of two keyframes of the map, `query` and `matched` by id. Believed where there are clearly more inliers
    /// than chance gives.
    ///
    /// Errors: verification is off, an id that is not there, or one without features.
    pub fn verify_pair(&self, query: u64, matched: u64) -> Result<Checked> {
        let (verifier, sides, names, min_lead) = {
            let detector = lock(&self.detector);
            let verifier = detector.verifier().cloned().ok_or_else(verification_is_off)?;
            let map = detector.map();
            let side = |id: u64| -> Result<(Features, Option<Camera>)> {
                let row = map.row_of(id).ok_or_else(|| Error::map(format!("no keyframe {id}; the map has {}", map.keyframes().len())))?;
                let packed = map.features(row, &verifier.identity()).ok_or_else(|| {
                    Error::map(format!("keyframe {id} has no features of {}; it was mapped without", verifier.identity()))
                })?;
                Ok((packed.unpack()?, map.calibration(row).cloned()))
            };
            let camera = |id: u64| map.row_of(id).and_then(|row| map.keyframes().get(row)).map(|k| k.camera.clone());
            let names = [query, matched].map(|id| camera(id).unwrap_or_default());
            let sides = [side(query)?, side(matched)?];
            (verifier, sides, names, detector.config().verification.min_lead)
        };
        let [(fq, cq), (fm, cm)] = &sides;
        let result = verifier.pair(&View { features: fq, camera: cq.as_ref() }, &View { features: fm, camera: cm.as_ref() })?;
        let success = result.as_ref().is_ok_and(|v| lead(v.inliers.len(), 0) >= min_lead);
        let poses = names.map(|n| self.camera_pose(&n));
        Ok(checked(&result, success, verifier.verify.method, [fq.len(), fm.len()], poses, verifier.verify.seed))
    }

    /// The median depth at an image's stamp.
    fn depth_at(&self, camera: usize, stamp_ns: i64) -> Option<f32> {
        let state = lock(&self.cameras[camera]);
        let nearest = state.depth.iter().min_by_key(|(t, _)| t.abs_diff(stamp_ns))?;
        if nearest.0.abs_diff(stamp_ns) <= DEPTH_SLACK_NS {
            nearest.1
        } else {
            None
        }
    }

    /// A `nav_msgs/Odometry` has come.
    ///
    /// Errors: it does not decode.
    pub fn odometry(&self, bytes: &[u8]) -> Result<()> {
        let m = Odometry::decode(bytes)?;
        let mut odometry = lock(&self.odometry);
        odometry.track.push(m.header.stamp_ns, m.pose, ODOMETRY_KEPT_NS);
        odometry.last = Some(Instant::now());
        if odometry.frame_id != m.header.frame_id {
            odometry.frame_id = m.header.frame_id;
        }
        drop(odometry);
        self.odometry_came.notify_all();
        Ok(())
    }

    /// Name of the odometry frame; empty before the first message.
    pub fn odometry_frame(&self) -> String {
        lock(&self.odometry).frame_id.clone()
    }

    /// Handles images until [`Self::stop`]; `publish` is called for every keyframe, before its thumbnail is
    /// made, and says when it had published the decision.
    pub fn work(&self, publish: &mut dyn FnMut(&Keyed)) {
        while let Some((camera, arrival)) = self.inbox.pop() {
            match self.handle(camera, arrival) {
                Ok(Some(keyed)) => {
                    publish(&keyed);
                    self.keep_thumbnail(&keyed);
                }
                Ok(None) => {}
                Err(e) => {
                    let mut stats = lock(&self.stats);
                    stats.unusable += 1;
                    stats.last_unusable = format!("{}: {e}", self.names[camera]);
                }
            }
        }
    }

    /// Ends [`Self::work`].
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.inbox.close();
        self.odometry_came.notify_all();
    }

    /// Notes the times of a keyframe that has been published.
    pub fn published(&self, timings: &Timings) {
        lock(&self.stats).time(timings);
    }

    fn handle(&self, camera: usize, arrival: Arrival) -> Result<Option<Keyed>> {
        let mut timings = Timings { queue: ms(arrival.at), ..Timings::default() };
        // With one camera the map does not tell cameras apart, as offline.
        let name = if self.names.len() == 1 { "" } else { self.names[camera].as_str() };
        if self.skips_early(name, stamp_of(&arrival.bytes)?) {
            return Ok(None);
        }
        let clock = Instant::now();
        let (header, image) = self.decode(camera, arrival.bytes)?;
        let luma_std = image.luma_stats().1;
        timings.decode = ms(clock);
        let clock = Instant::now();
        let descriptor = self.model.describe(&image)?;
        timings.describe = ms(clock);
        let clock = Instant::now();
        let odom_from_base = self.pose(header.stamp_ns);
        timings.odometry = ms(clock);
        let clock = Instant::now();
        let mut frame = Frame {
            camera: name.into(),
            stamp_ns: header.stamp_ns,
            name: format!("{}.{:09}", header.stamp_ns.div_euclid(1_000_000_000), header.stamp_ns.rem_euclid(1_000_000_000)),
            descriptor: descriptor.clone(),
            luma_std,
            median_depth_m: self.depth_at(camera, header.stamp_ns),
            // Odometry tells better; without it every frame that is described is asked.
            glance: odom_from_base.is_none().then(|| image.glance()).transpose()?,
            odom_from_base,
            features: None,
            calibration: self.calibration(camera),
        };
        // Outside the lock: a network takes as long as the descriptor's.
        let verifier = {
            let detector = lock(&self.detector);
            detector.verifier().cloned().filter(|_| detector.wants_features(&frame))
        };
        let keypoints = match &verifier {
            Some(v) => frame.features.insert(self.with_depth(camera, header.stamp_ns, v.extract(&image)?)?).len(),
            None => 0,
        };
        timings.verify = ms(clock);
        let clock = Instant::now();
        let (limit, most) = {
            let settings = lock(&self.settings);
            (settings.publish.max_candidates, settings.map.max_keyframes)
        };
        let mut detector = lock(&self.detector);
        // Before the frame, so that the rows of its decision hold until the next; in batches, for it looks at the whole map.
        if most > 0 && detector.map().keyframes().len() >= most && !detector.localization_only() {
            let gone = detector.thin((most - most / 50).saturating_sub(1).max(1));
            lock(&self.stats).thinned += gone as u64;
        }
        let session = detector.session();
        let step = detector.process(frame)?;
        let verification = detector.verification_time();
        lock(&self.stats).count(&step);
        self.notice_session(session, &detector);
        let Step::Keyframe(decision) = step else { return Ok(None) };
        let asking = Asking { robot: self.robot, session: decision.session, stamp_ns: header.stamp_ns };
        let mut candidates = candidate::of_decision(&detector, asking, &decision, limit);
        if let Some(v) = &verifier {
            for (c, hit) in candidates.iter_mut().zip(&decision.reranked) {
                c.checked = self.checked(&detector, v, name, keypoints, hit);
            }
        }
        if let (Some(c), Some(e), Some(confidence)) = (candidates.first_mut(), &decision.evidence, &self.confidence) {
            c.confidence = Some(confidence.of(e));
        }
        let match_pose = candidates.first().and_then(|c| detector.map().keyframes()[c.row].odom_from_base);
        let (map_id, map_revision) = (detector.map().id(), detector.map().revision());
        let id = decision.added.then(|| detector.map().id_of(decision.query));
        let generation = self.generation.load(Ordering::Relaxed);
        drop(detector);
        self.remember_refused(candidates.first(), odom_from_base, match_pose, decision.session);
        let verification = verification.as_secs_f32() * 1e3;
        timings.search = ms(clock) - verification;
        timings.verify += verification;
        let arrived = arrival.at;
        Ok(Some(Keyed {
            camera,
            header,
            decision,
            id,
            candidates,
            descriptor,
            odom_from_base,
            match_pose,
            image,
            map_id,
            map_revision,
            timings,
            arrived,
            generation,
        }))
    }

    fn remember_refused(&self, first: Option<&Candidate>, query: Option<Isometry3<f64>>, matched: Option<Isometry3<f64>>, session: u32) {
        let Some(c) = first.filter(|c| c.session == session) else { return };
        let alike = !matches!(c.standing, Standing::Accepted | Standing::Rejected(Why::Detector(Reason::LowSimilarity)));
        if let (true, Some(q), Some(m)) = (alike, query, matched) {
            let mut refused = lock(&self.refused);
            refused.push_back((point(&q), point(&m)));
            let surplus = refused.len().saturating_sub(REFUSED_KEPT);
            refused.drain(..surplus);
        }
    }

    /// What a stamp or a pose alone decides costs no network.
    fn skips_early(&self, camera: &str, stamp_ns: i64) -> bool {
        let pose = {
            let odometry = lock(&self.odometry);
            // A pose that a later message may still change decides nothing.
            if odometry.track.reaches(stamp_ns) {
                odometry.track.at(stamp_ns)
            } else {
                None
            }
        };
        let mut detector = lock(&self.detector);
        let session = detector.session();
        let Some(skip) = detector.skips(camera, stamp_ns, pose.as_ref()) else { return false };
        let skipped = detector.skip(camera, stamp_ns, skip);
        self.notice_session(session, &detector);
        if let Some(skip) = skipped {
            lock(&self.stats).skipped(skip);
        }
        skipped.is_some()
    }

    fn notice_session(&self, before: u32, detector: &LoopDetector) {
        if detector.session() != before {
            lock(&self.stats).sessions += 1;
            lock(&self.refused).clear();
        }
    }

    /// Keyframes and closures of the running session that have poses.
    pub fn scene(&self) -> Scene {
        let detector = lock(&self.detector);
        let map = detector.map();
        let at = |row: usize| {
            let k = &map.keyframes()[row];
            k.odom_from_base.as_ref().filter(|_| k.session == detector.session() && k.robot == self.robot).map(point)
        };
        Scene {
            nodes: (0..map.keyframes().len()).filter_map(at).collect(),
            accepted: map.links().iter().filter_map(|l| Some((at(l.query)?, at(l.matched)?))).collect(),
            refused: lock(&self.refused).iter().copied().collect(),
        }
    }

    fn decode(&self, camera: usize, message: Vec<u8>) -> Result<(Header, RgbImage)> {
        let (header, image) = if self.compressed {
            let m = CompressedImage::decode(&message)?;
            let image = RgbImage::decode(&m.data)?;
            (m.header, image)
        } else {
            Image::picture(message)?
        };
        if !self.undistort {
            return Ok((header, image));
        }
        let calibration = lock(&self.cameras[camera]).calibration.clone();
        let calibration = calibration.ok_or_else(|| Error::image("input.undistort is on and no camera_info has come yet"))?;
        let image = image.undistort(&calibration)?;
        Ok((header, image))
    }

    /// The pose at the stamp, waiting for the message after it as long as the settings say.
    fn pose(&self, stamp_ns: i64) -> Option<Isometry3<f64>> {
        let (on, wait) = {
            let settings = lock(&self.settings);
            (settings.input.odometry, Duration::from_secs_f64(settings.input.odometry_wait_s))
        };
        if !on {
            return None;
        }
        let mut odometry = lock(&self.odometry);
        let deadline = Instant::now() + wait;
        loop {
            let expected = match odometry.last {
                Some(last) => last.elapsed() < ODOMETRY_SILENT,
                None => odometry.waits < FIRST_WAITS,
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if odometry.track.reaches(stamp_ns) || !expected || left.is_zero() || self.stopping.load(Ordering::Relaxed) {
                odometry.waits += u64::from(odometry.last.is_none());
                return odometry.track.at(stamp_ns);
            }
            odometry = self.odometry_came.wait_timeout(odometry, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn keep_thumbnail(&self, keyed: &Keyed) {
        let width = lock(&self.settings).map.thumbnail_width;
        if width == 0 || !keyed.decision.added {
            return;
        }
        // An image that was decoded can be encoded; if not, the pair is shown without it.
        let Ok(jpeg) = keyed.image.thumbnail(width as u32) else { return };
        let mut detector = lock(&self.detector);
        if self.generation.load(Ordering::Relaxed) == keyed.generation {
            detector.set_thumbnail(keyed.decision.query, jpeg);
        }
    }

    /// Query and best match side by side; `None` where there is no match, or no picture of it.
    pub fn picture(&self, keyed: &Keyed) -> Option<RgbImage> {
        let candidate = keyed.candidates.first()?;
        let jpeg = {
            let detector = lock(&self.detector);
            if self.generation.load(Ordering::Relaxed) != keyed.generation {
                return None;
            }
            detector.map().thumbnail(candidate.row)?.to_vec()
        };
        let matched = RgbImage::decode(&jpeg).ok()?;
        let lines = keyed.decision.reranked.first().and_then(Reranked::verified).map(|v| v.lines()).unwrap_or_default();
        picture::side_by_side(&keyed.image, &matched, candidate, &lines).ok()
    }

    /// Looks an encoded image up in the whole map. Returns its descriptor's time and the search's,
    /// milliseconds, with map id and revision.
    ///
    /// With `verify` the best places are ordered by their geometry, and the first is accepted by that.
    ///
    /// Errors: it is no JPEG or PNG; `verify`, and verification is off.
    pub fn query(&self, image: &[u8], stamp_ns: i64, top_k: usize, verify: bool) -> Result<(Vec<Candidate>, Timings, String, u64)> {
        let mut timings = Timings::default();
        let verifier = match verify {
            true => Some(lock(&self.detector).verifier().cloned().ok_or_else(verification_is_off)?),
            false => None,
        };
        let clock = Instant::now();
        let image = RgbImage::decode(image)?;
        timings.decode = ms(clock);
        let clock = Instant::now();
        let descriptor = self.model.describe(&image)?;
        timings.describe = ms(clock);
        let clock = Instant::now();
        let features = verifier.as_ref().map(|v| v.extract(&image)).transpose()?;
        timings.verify = ms(clock);
        let clock = Instant::now();
        let top_k = if top_k == 0 { lock(&self.settings).publish.max_candidates } else { top_k };
        let detector = lock(&self.detector);
        let (hits, second) = detector.query(&descriptor, top_k);
        // It belongs to no run, so every match is one of another session.
        let asking = Asking { robot: self.robot, session: u32::MAX, stamp_ns };
        let mut candidates = candidate::of_query(&detector, asking, &hits, second);
        timings.search = ms(clock);
        if let (Some(v), Some(features)) = (&verifier, &features) {
            let clock = Instant::now();
            let reranked = detector.rerank(v, &View::of(features), &hits)?;
            let order: Vec<Hit> = reranked.iter().map(|r| r.hit).collect();
            candidates = candidate::of_query(&detector, asking, &order, second);
            for (c, hit) in candidates.iter_mut().zip(&reranked) {
                c.checked = self.checked(&detector, v, "", features.len(), hit);
            }
            if let Some(first) = candidates.first_mut() {
                first.standing = match first.checked.is_some_and(|c| c.success) {
                    true => Standing::Accepted,
                    false => Standing::Rejected(Why::Detector(Reason::Geometry)),
                };
            }
            timings.verify += ms(clock);
        }
        timings.total = timings.decode + timings.describe + timings.search + timings.verify;
        Ok((candidates, timings, detector.map().id(), detector.map().revision()))
    }

    /// Images that come are counted and thrown away.
    pub fn pause(&self, on: bool) {
        self.paused.store(on, Ordering::Relaxed);
        if on {
            self.inbox.clear();
        }
    }

    /// Whether images are thrown away.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Begins the search for the place of a robot that was carried away. Returns the size of the map.
    pub fn relocalize(&self) -> usize {
        let mut detector = lock(&self.detector);
        detector.relocalize();
        lock(&self.stats).sessions += 1;
        detector.map().keyframes().len()
    }

    /// An empty map takes the place of this one, which is kept beside its file if it has one. Says so.
    ///
    /// Errors: the old map could not be written; then nothing changes.
    pub fn reset(&self) -> Result<String> {
        let mut store = lock(&self.store);
        let Some(path) = lock(&self.storage).path.clone() else {
            self.swap(new_map(&self.model));
            return Ok("the map is empty".into());
        };
        if store.is_none() && lock(&self.detector).localization_only() {
            self.swap(new_map(&self.model));
            return Ok(format!("the map is empty; its file {} was only read, and stays", path.display()));
        }
        self.write(&mut store)?;
        self.open_store(&mut store, &path)?;
        let mut detector = lock(&self.detector);
        self.write_rest(&mut store, &mut detector)?;
        if let Some(open) = store.take() {
            open.close()?;
        }
        let kept = (!detector.map().keyframes().is_empty()).then(|| beside(&path));
        if let Some(backup) = &kept {
            std::fs::rename(&path, backup).map_err(Error::io(&path))?;
        }
        // From here on the old map is safe, whatever happens to the new file: that is opened again by the next write.
        detector.replace_map(new_map(&self.model));
        self.generation.fetch_add(1, Ordering::Relaxed);
        drop(detector);
        self.open_store(&mut store, &path)?;
        Ok(match kept {
            Some(path) => format!("the map is empty; the one before is in {}", path.display()),
            None => "the map is empty".into(),
        })
    }

    fn swap(&self, map: Map) {
        lock(&self.detector).replace_map(map);
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    /// Reads a map into the place of this one, or adds it as earlier sessions. Says what was done, and
    /// how many keyframes there are now. Where the node has a map file, new keyframes go to the file of the map that is read.
    ///
    /// Errors: a file that is no map, of another model, or that another process writes; then nothing changes.
    pub fn load(&self, path: &Path, merge: bool) -> Result<(String, usize)> {
        if merge {
            let map = Map::load(path, self.model.identity())?;
            let n = map.keyframes().len();
            let mut detector = lock(&self.detector);
            detector.merge_map(&map)?;
            return Ok((format!("{n} keyframes of {} added", path.display()), detector.map().keyframes().len()));
        }
        let mut store = lock(&self.store);
        let own = lock(&self.storage).path.clone();
        let Some(own) = own else {
            let map = Map::load(path, self.model.identity())?;
            let n = map.keyframes().len();
            self.swap(map);
            return Ok((format!("{n} keyframes of {}", path.display()), n));
        };
        let reads_only = store.is_none() && lock(&self.detector).localization_only();
        if !reads_only {
            self.write(&mut store)?;
        }
        let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
        if same(&own, path) || reads_only {
            let mut detector = lock(&self.detector);
            if !reads_only {
                self.write_rest(&mut store, &mut detector)?;
            }
            let map = Map::load(path, self.model.identity())?;
            let n = map.keyframes().len();
            detector.replace_map(map);
            self.generation.fetch_add(1, Ordering::Relaxed);
            drop(detector);
            lock(&self.storage).path = Some(path.into());
            return Ok((format!("{n} keyframes of {}; the map before is in {}", path.display(), own.display()), n));
        }
        if !path.is_file() {
            return Err(Error::map("no such file").at(path));
        }
        let opened = Store::open(path, self.model.identity(), &self.model.preprocessing(), lock(&self.settings).map.durable_s)?;
        let n = opened.map.keyframes().len();
        let mut storage = lock(&self.storage);
        let mut detector = lock(&self.detector);
        self.write_rest(&mut store, &mut detector)?;
        if let Some(open) = store.replace(opened.store) {
            open.close()?;
        }
        detector.replace_map(opened.map);
        self.generation.fetch_add(1, Ordering::Relaxed);
        storage.path = Some(path.into());
        let notes: String = opened.notes.iter().map(|n| format!("; {n}")).collect();
        Ok((
            format!("{n} keyframes of {}; new keyframes go to this file; the map before is in {}{notes}", path.display(), own.display()),
            n,
        ))
    }

    /// The file's writer, opened if it is not: the map was only read so far, or replaced.
    fn open_store<'a>(&self, store: &'a mut Option<Store>, path: &Path) -> Result<&'a mut Store> {
        let open = match store.take() {
            Some(open) => open,
            None => {
                let existed = path.exists();
                let durable_s = lock(&self.settings).map.durable_s;
                let opened = Store::open(path, self.model.identity(), &self.model.preprocessing(), durable_s)?;
                if existed && !lock(&self.detector).resume(&opened.map) {
                    opened.store.close()?;
                    let why =
                        "the file holds more than was read from it, or less than was written: somebody else has written it; load it again \
                               (~/load_map), or save under another name (~/save_map)";
                    return Err(Error::map(why).at(path));
                }
                opened.store
            }
        };
        Ok(store.insert(open))
    }

    /// Writes what the file does not hold, a part at a time; images are handled between the parts. Returns whether there was anything.
    fn write(&self, store: &mut Option<Store>) -> Result<bool> {
        let Some(path) = lock(&self.storage).path.clone() else { return Ok(false) };
        let mut wrote = false;
        if store.take_if(|open| !open.in_place()).is_some() {
            // Removed under our hands: what it held is in memory, and is written anew.
            lock(&self.detector).nothing_saved();
        }
        let result = loop {
            let changes = lock(&self.detector).map().changes(WRITTEN_AT_ONCE);
            if changes.is_empty() {
                break Ok(wrote);
            }
            if store.is_none() {
                // What the file holds already may be less than was thought, or more.
                match self.open_store(store, &path) {
                    Ok(_) => continue,
                    Err(e) => break Err(e),
                }
            }
            if let Err(e) = self.open_store(store, &path).and_then(|open| open.apply(&changes)) {
                break Err(e);
            }
            lock(&self.detector).saved(&changes);
            wrote = true;
        };
        lock(&self.storage).error = result.as_ref().err().map(|e| e.to_string());
        result
    }

    /// Writes what is left while the detector waits.
    fn write_rest(&self, store: &mut Option<Store>, detector: &mut LoopDetector) -> Result<()> {
        loop {
            let changes = detector.map().changes(usize::MAX);
            if changes.is_empty() {
                return Ok(());
            }
            let open = store.as_mut().ok_or_else(|| Error::map("a keyframe came while the map was being put away; try again"))?;
            open.apply(&changes)?;
            detector.saved(&changes);
        }
    }

    /// Writes the map to `path`, or what is new to its own file. Returns where and how many keyframes.
    ///
    /// Errors: no file is named, or it cannot be written; what was there stays whole.
    pub fn save(&self, path: Option<&Path>) -> Result<(PathBuf, usize)> {
        let mut store = lock(&self.store);
        let own = lock(&self.storage).path.clone();
        match path.filter(|p| Some(*p) != own.as_deref()) {
            Some(target) => {
                // A copy, so that images are handled meanwhile.
                let map = lock(&self.detector).map().clone();
                map.save(target)?;
                Ok((target.into(), map.keyframes().len()))
            }
            None => {
                let own = own.ok_or_else(|| Error::map("no file: give a path, or set map.file"))?;
                self.write(&mut store)?;
                Ok((own, lock(&self.detector).map().keyframes().len()))
            }
        }
    }

    /// Writes what is new to the map's own file, if it has one. Called every so often, it bounds what a power cut may cost.
    ///
    /// Errors: it cannot be written; what was there stays whole, and the next call tries again.
    pub fn save_changes(&self) -> Result<Option<(PathBuf, usize)>> {
        let mut store = lock(&self.store);
        // A map that is only looked at is not written, whatever was merged into it.
        if store.is_none() && lock(&self.detector).localization_only() {
            return Ok(None);
        }
        let wrote = self.write(&mut store)?;
        let path = lock(&self.storage).path.clone().filter(|_| wrote);
        Ok(path.map(|path| (path, lock(&self.detector).map().keyframes().len())))
    }

    /// Writes what is new and ends the file in order; for the end of a run. Returns where and how many keyframes; `None` where the map
    /// has no file, or is only read.
    ///
    /// Errors: as [`Self::save_changes`].
    pub fn close(&self) -> Result<Option<(PathBuf, usize)>> {
        self.save_changes()?;
        let Some(open) = lock(&self.store).take() else { return Ok(None) };
        let path = open.path().to_path_buf();
        open.close()?;
        Ok(Some((path, lock(&self.detector).map().keyframes().len())))
    }

    /// How the cameras fare.
    pub fn camera_reports(&self) -> Vec<CameraReport> {
        let now = Instant::now();
        let report = |(i, name): (usize, &String)| {
            let mut state = lock(&self.cameras[i]);
            CameraReport {
                name: name.clone(),
                rate_hz: state.rate.per_second(now),
                received: state.received,
                silent: state.last.map(|l| now.duration_since(l)),
                level: self.inbox.level(i),
                calibrated: state.calibration.is_some(),
                depth_m: state.depth.back().and_then(|(_, d)| *d),
            }
        };
        self.names.iter().enumerate().map(report).collect()
    }

    /// Time since the engine was made.
    pub fn age(&self) -> Duration {
        self.start.elapsed()
    }

    /// Time since the last odometry; `None` if none has come.
    pub fn odometry_silent(&self) -> Option<Duration> {
        lock(&self.odometry).last.map(|l| l.elapsed())
    }

    /// How the map fares.
    pub fn map_report(&self) -> MapReport {
        let storage = lock(&self.storage);
        let detector = lock(&self.detector);
        let map = detector.map();
        MapReport {
            id: map.id(),
            revision: map.revision(),
            keyframes: map.keyframes().len(),
            closures: map.links().len(),
            session: detector.session(),
            file: storage.path.clone(),
            saved: storage.path.is_none() || map.is_saved(),
            error: storage.error.clone(),
            localization_only: detector.localization_only(),
            relocalizing: detector.relocalizing(),
        }
    }

    /// Counts and times so far.
    pub fn stats(&self) -> Stats {
        lock(&self.stats).clone()
    }
}

fn verification_is_off() -> Error {
    Error::map("verification is off; start the node with verification.enabled: true")
}

/// First 16 hexadecimal digits of the settings' SHA-256.
fn config_hash(config: &Config) -> String {
    // A struct of numbers always has a JSON form.
    let json = serde_json::to_vec(config).unwrap_or_default();
    Sha256::digest(json).iter().take(8).map(|b| format!("{b:02x}")).collect()
}

/// `map.svpr` -> `map.svpr.before-1`, or the next number that is free.
fn beside(path: &Path) -> PathBuf {
    let name = |n: u32| {
        let mut s = path.as_os_str().to_owned();
        s.push(format!(".before-{n}"));
        PathBuf::from(s)
    };
    (1..).map(name).find(|p| !p.exists()).unwrap_or_else(|| name(0))
}

/// Fails now, in words, rather than in SQLite's.
fn check_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        return Err(Error::map(format!("the folder {} does not exist; make it or change map.file", folder.display())).at(path));
    }
    if path.is_dir() {
        return Err(Error::map("map.file is a folder; name a file").at(path));
    }
    Ok(())
}

fn new_map(model: &Model) -> Map {
    let mut map = Map::new(model.identity().clone());
    map.set_preprocessing(&model.preprocessing());
    map
}

#[cfg(test)]
mod tests;
