//! A whole run offline: a bag or folders of images through model and detector, with truth.
//!
//! A bag is one more sequence: same trait, same detector, same report.

use crate::bag::messages::{CameraInfo, CompressedImage, Header, Image, Message, NavSatFix, Odometry, PoseStamped};
use crate::bag::{is_bag, Bag};
use crate::dataset::{list_images, Pose2, PoseTable, Sample};
use crate::error::{read_file, Error, Result};
use crate::eval::{KeyframeTruth, RunKeyframe};
use crate::image::{depths_at, median_depth_m, Camera, RgbImage};
use crate::model::Model;
use crate::odometry::Track;
use crate::pipeline::{Decision, Frame, LoopDetector, Outcome, Skip, Step};
use rayon::prelude::*;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};

/// An image of a sequence, not yet decoded.
#[derive(Debug)]
pub struct Shot {
    /// Header stamp, nanoseconds.
    pub stamp_ns: i64,
    /// Unique name in the run.
    pub name: String,
    /// Registered depth of the same moment.
    pub depth: Option<Image>,
    pixels: Pixels,
}

#[derive(Debug)]
enum Pixels {
    File(PathBuf),
    Encoded(Vec<u8>),
    Raw(Image),
}

impl Shot {
    /// Decodes it. Errors name the image.
    pub fn decode(&self) -> Result<RgbImage> {
        match &self.pixels {
            Pixels::File(path) => RgbImage::decode(&read_file(path)?),
            Pixels::Encoded(bytes) => RgbImage::decode(bytes),
            Pixels::Raw(image) => RgbImage::from_raw(&image.raw()),
        }
        .map_err(|e| e.at(Path::new(&self.name)))
    }
}

/// Truth further away in time than this is not used.
const TRUTH_SLACK_NS: i64 = 1_000_000_000;

/// What a replay runs over.
pub trait Sequence {
    /// Number of images, as far as it is known before reading.
    fn len_hint(&self) -> u64;
    /// Odometry, empty if there is none.
    fn odometry(&self) -> &Track;
    /// Truth that the sequence itself carries.
    fn truth(&self) -> &PoseTable;
    /// Calibration that the sequence itself carries.
    fn camera(&self) -> Option<&Camera>;
    /// Visits the images in order. Returns what could not be read, in words.
    fn visit(&self, visit: &mut dyn FnMut(Shot) -> Result<()>) -> Result<Vec<String>>;
    /// What was odd when it was opened.
    fn warnings(&self) -> &[String];
}

/// Which topics of a bag to use, and how to number images of folders.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// Image topic; needed only where a bag has several.
    pub topic: Option<String>,
    /// Odometry topic; likewise.
    pub odom_topic: Option<String>,
    /// Topic of registered depth images (16UC1, 32FC1), used where matches are verified.
    pub depth_topic: Option<String>,
    /// Topic of ground-truth poses (PoseStamped) or NavSatFix; likewise.
    pub truth_topic: Option<String>,
    /// Images per second that folders are taken to have been recorded at.
    pub folder_rate_hz: f64,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self { topic: None, odom_topic: None, depth_topic: None, truth_topic: None, folder_rate_hz: 1.0 }
    }
}

/// Opens one bag, or one or more folders of images that are run one after the other.
///
/// Errors: nothing there, no images, or several topics to choose from (they are listed).
pub fn open(paths: &[PathBuf], options: &SourceOptions) -> Result<Box<dyn Sequence>> {
    match paths {
        [path] if is_bag(path) => Ok(Box::new(BagSequence::open(path, options)?)),
        [path] if path.is_file() => Err(Error::bag("neither a bag (.mcap, .db3) nor a folder").at(path)),
        _ => Ok(Box::new(FolderSequence::open(paths, options)?)),
    }
}

struct FolderSequence {
    samples: Vec<Sample>,
    truth: PoseTable,
    odometry: Track,
    rate_hz: f64,
}

impl FolderSequence {
    fn open(paths: &[PathBuf], options: &SourceOptions) -> Result<Self> {
        let (mut samples, mut truth) = (Vec::new(), PoseTable::default());
        for dir in paths {
            let found = list_images(dir)?;
            if found.is_empty() {
                return Err(Error::dataset("no JPEG or PNG below this folder, and no bag (.mcap, .db3) in it").at(dir));
            }
            let folder = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // With several folders names are told apart by the folder.
            let name = |n: String| if paths.len() > 1 { format!("{folder}/{n}") } else { n };
            samples.extend(found.into_iter().map(|s| Sample { name: name(s.name), path: s.path }));
        }
        if let [dir] = paths {
            let path = dir.join("poses.csv");
            if path.is_file() {
                let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
                truth = PoseTable::parse(&text).map_err(|e| e.at(&path))?;
            }
        }
        Ok(Self { samples, truth, odometry: Track::default(), rate_hz: options.folder_rate_hz })
    }
}

impl Sequence for FolderSequence {
    fn len_hint(&self) -> u64 {
        self.samples.len() as u64
    }

    fn odometry(&self) -> &Track {
        &self.odometry
    }

    fn truth(&self) -> &PoseTable {
        &self.truth
    }

    fn camera(&self) -> Option<&Camera> {
        None
    }

    fn visit(&self, visit: &mut dyn FnMut(Shot) -> Result<()>) -> Result<Vec<String>> {
        for (i, s) in self.samples.iter().enumerate() {
            let stamp_ns = (i as f64 / self.rate_hz * 1e9).round() as i64;
            visit(Shot { stamp_ns, name: s.name.clone(), depth: None, pixels: Pixels::File(s.path.clone()) })?;
        }
        Ok(Vec::new())
    }

    fn warnings(&self) -> &[String] {
        &[]
    }
}

struct BagSequence {
    bag: Bag,
    topic: String,
    depth: Option<String>,
    compressed: bool,
    images: u64,
    odometry: Track,
    truth: PoseTable,
    camera: Option<Camera>,
    warnings: Vec<String>,
}

impl BagSequence {
    fn open(path: &Path, options: &SourceOptions) -> Result<Self> {
        let bag = Bag::open(path)?;
        let topic = image_topic(&bag, options.topic.as_deref()).map_err(|e| e.at(path))?;
        let depth = options.depth_topic.clone();
        if let Some(wanted) = &depth {
            match bag.topics().get(wanted) {
                None => return Err(no_topic(&bag, wanted).at(path)),
                Some(t) if t.type_name != Image::TYPE => {
                    return Err(Error::bag(format!("topic `{wanted}` is {}, not {}", t.type_name, Image::TYPE)).at(path));
                }
                Some(_) => {}
            }
        }
        let info = &bag.topics()[&topic];
        let mut sequence = Self {
            depth,
            compressed: info.type_name == CompressedImage::TYPE,
            images: info.messages,
            topic,
            odometry: Track::default(),
            truth: PoseTable::default(),
            camera: None,
            warnings: bag.warnings().to_vec(),
            bag,
        };
        sequence.read_poses(options).map_err(|e| e.at(path))?;
        Ok(sequence)
    }

    /// All that is small is read first, so that poses can be interpolated at each image's stamp
    /// whatever the order of recording.
    fn read_poses(&mut self, options: &SourceOptions) -> Result<()> {
        let bag = &self.bag;
        let mut pick = |wanted: &Option<String>, found: Vec<&str>, what: &str| -> Result<Option<String>> {
            match (wanted, found.as_slice()) {
                (Some(w), _) if bag.topics().contains_key(w) => Ok(Some(w.clone())),
                (Some(w), _) => Err(no_topic(bag, w)),
                (None, [one]) => Ok(Some(one.to_string())),
                (None, []) => Ok(None),
                (None, many) => {
                    self.warnings.push(format!("several {what} topics ({}); none is used; choose one", many.join(", ")));
                    Ok(None)
                }
            }
        };
        let odom = pick(&options.odom_topic, bag.topics_of(Odometry::TYPE), "odometry")?;
        let named = |t: &&str| t.contains("ground_truth") || t.contains("groundtruth") || t.contains("/gt");
        let mut truths: Vec<&str> = bag.topics_of(PoseStamped::TYPE).into_iter().filter(named).collect();
        if truths.is_empty() {
            truths = bag.topics_of(NavSatFix::TYPE);
        }
        let truth = pick(&options.truth_topic, truths, "ground-truth")?;
        let base = self.topic.strip_suffix("/compressed").unwrap_or(&self.topic);
        let sibling = base.rsplit_once('/').map_or("", |(p, _)| p);
        let info = format!("{sibling}/camera_info");
        let info = bag.topics().get(&info).filter(|t| t.type_name == CameraInfo::TYPE).map(|_| info);
        let wanted: Vec<&str> = [&odom, &truth, &info].into_iter().flatten().map(String::as_str).collect();
        let (mut track, mut places, mut camera, mut bad) = (Vec::new(), Vec::new(), None, 0u64);
        let mut origin = None;
        let mut take = |topic: &str, type_name: &str, data: &[u8]| -> Result<()> {
            if Some(topic) == odom.as_deref() {
                let m = Odometry::decode(data)?;
                track.push((m.header.stamp_ns, m.pose));
            } else if Some(topic) == info.as_deref() {
                if camera.is_none() {
                    camera = Some(CameraInfo::decode(data)?.camera);
                }
            } else if type_name == NavSatFix::TYPE {
                let m = NavSatFix::decode(data)?;
                if m.status >= 0 && m.latitude.is_finite() && m.longitude.is_finite() {
                    let (lat0, lon0) = *origin.get_or_insert((m.latitude, m.longitude));
                    places.push((m.header.stamp_ns, local_metres(m.latitude, m.longitude, lat0, lon0)));
                }
            } else {
                let m = PoseStamped::decode(data)?;
                let (t, yaw) = (m.pose.translation.vector, m.pose.rotation.euler_angles().2);
                places.push((m.header.stamp_ns, Pose2 { x: t.x, y: t.y, heading_deg: Some(yaw.to_degrees()) }));
            }
            Ok(())
        };
        if !wanted.is_empty() {
            self.bag.read(Some(&wanted), &mut |m| {
                if take(m.topic, m.type_name, m.data).is_err() {
                    bad += 1;
                }
                Ok(())
            })?;
        }
        if bad > 0 {
            self.warnings.push(format!("{bad} pose or calibration message(s) did not decode and were left out"));
        }
        places.sort_by_key(|(t, _)| *t);
        self.odometry = Track::new(track);
        places.into_iter().for_each(|(t, p)| self.truth.push(t, p));
        self.camera = camera;
        Ok(())
    }
}

/// Metres east and north of an origin, on a sphere: good to a metre over tens of kilometres.
fn local_metres(lat: f64, lon: f64, lat0: f64, lon0: f64) -> Pose2 {
    const EARTH_RADIUS_M: f64 = 6_371_008.8;
    let x = (lon - lon0).to_radians() * EARTH_RADIUS_M * lat0.to_radians().cos();
    Pose2 { x, y: (lat - lat0).to_radians() * EARTH_RADIUS_M, heading_deg: None }
}

fn no_topic(bag: &Bag, wanted: &str) -> Error {
    let all: Vec<String> = bag.topics().iter().map(|(n, t)| format!("{n} [{}]", t.type_name)).collect();
    Error::bag(format!("no topic `{wanted}`; the bag has {}", all.join(", ")))
}

fn image_topic(bag: &Bag, wanted: Option<&str>) -> Result<String> {
    let is_image = |t: &str| bag.topics().get(t).is_some_and(|t| t.type_name == Image::TYPE || t.type_name == CompressedImage::TYPE);
    if let Some(w) = wanted {
        return match bag.topics().get(w) {
            None => Err(no_topic(bag, w)),
            Some(_) if is_image(w) => Ok(w.to_string()),
            Some(t) => Err(Error::bag(format!("topic `{w}` is {}, not {} or {}", t.type_name, Image::TYPE, CompressedImage::TYPE))),
        };
    }
    let mut found: Vec<&str> =
        bag.topics().keys().map(String::as_str).filter(|t| is_image(t) && !t.ends_with("/compressedDepth")).collect();
    // Depth is no picture, where there are pictures.
    let pictures: Vec<&str> = found.iter().copied().filter(|t| !t.contains("depth")).collect();
    if !pictures.is_empty() {
        found = pictures;
    }
    // The same camera raw and compressed is one camera; the raw images are the better ones.
    let names: HashSet<&str> = found.iter().copied().collect();
    found.retain(|t| t.strip_suffix("/compressed").is_none_or(|base| !names.contains(base)));
    let counts = |t: &&str| format!("{t} ({} images)", bag.topics()[*t].messages);
    match found.as_slice() {
        [one] => Ok(one.to_string()),
        [] => {
            let all: Vec<String> = bag.topics().iter().map(|(n, t)| format!("{n} [{}]", t.type_name)).collect();
            Err(Error::bag(format!("no topic of type {} or {}; the bag has {}", Image::TYPE, CompressedImage::TYPE, all.join(", "))))
        }
        many => Err(Error::bag(format!(
            "several image topics, choose one with --topic: {}",
            many.iter().map(counts).collect::<Vec<_>>().join(", ")
        ))),
    }
}

/// Images that wait for the depth of their moment, which a bag may hold before or after them.
#[derive(Default)]
struct Pairs {
    shots: VecDeque<Shot>,
    depths: VecDeque<Image>,
}

/// Images that wait for depth at most, and depth images that are kept.
const PAIRS_KEPT: usize = 8;
/// Depth further from the image's stamp is another view.
const DEPTH_SLACK_NS: u64 = 50_000_000;

impl Pairs {
    /// Hands on what needs to wait no longer; at the end all of it.
    fn hand_on(&mut self, end: bool, visit: &mut dyn FnMut(Shot) -> Result<()>) -> Result<()> {
        let newest = self.depths.back().map(|d| d.header.stamp_ns);
        while self.shots.front().is_some_and(|s| end || self.shots.len() > PAIRS_KEPT || newest.is_some_and(|n| n >= s.stamp_ns)) {
            let Some(mut shot) = self.shots.pop_front() else { break };
            let apart = |d: &&Image| d.header.stamp_ns.abs_diff(shot.stamp_ns);
            shot.depth = self.depths.iter().min_by_key(apart).filter(|d| apart(d) <= DEPTH_SLACK_NS).cloned();
            visit(shot)?;
        }
        let surplus = self.depths.len().saturating_sub(PAIRS_KEPT);
        self.depths.drain(..surplus);
        Ok(())
    }
}

impl Sequence for BagSequence {
    fn len_hint(&self) -> u64 {
        self.images
    }

    fn odometry(&self) -> &Track {
        &self.odometry
    }

    fn truth(&self) -> &PoseTable {
        &self.truth
    }

    fn camera(&self) -> Option<&Camera> {
        self.camera.as_ref()
    }

    fn visit(&self, visit: &mut dyn FnMut(Shot) -> Result<()>) -> Result<Vec<String>> {
        let name = |h: &Header| format!("{}.{:09}", h.stamp_ns.div_euclid(1_000_000_000), h.stamp_ns.rem_euclid(1_000_000_000));
        let mut bad = Vec::new();
        let mut damaged = 0u64;
        let mut pairs = Pairs::default();
        let topics: Vec<&str> = [Some(self.topic.as_str()), self.depth.as_deref()].into_iter().flatten().collect();
        let mut warnings = self.bag.read(Some(&topics), &mut |m| {
            if Some(m.topic) == self.depth.as_deref() {
                // Depth that does not decode is depth that is missing.
                pairs.depths.extend(Image::decode(m.data).ok());
                return pairs.hand_on(false, visit);
            }
            let shot = if self.compressed {
                CompressedImage::decode(m.data).map(|c| Shot {
                    stamp_ns: c.header.stamp_ns,
                    name: name(&c.header),
                    depth: None,
                    pixels: Pixels::Encoded(c.data),
                })
            } else {
                Image::decode(m.data).map(|i| Shot {
                    stamp_ns: i.header.stamp_ns,
                    name: name(&i.header),
                    depth: None,
                    pixels: Pixels::Raw(i),
                })
            };
            match shot {
                Ok(shot) if self.depth.is_none() => visit(shot),
                Ok(shot) => {
                    pairs.shots.push_back(shot);
                    pairs.hand_on(false, visit)
                }
                Err(e) => {
                    damaged += 1;
                    if bad.is_empty() {
                        bad.push(e.to_string());
                    }
                    Ok(())
                }
            }
        })?;
        pairs.hand_on(true, visit)?;
        if damaged > 0 {
            warnings.push(format!("{damaged} message(s) on {} did not decode; the first: {}", self.topic, bad[0]));
        }
        Ok(warnings)
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// A finished run.
#[derive(Debug)]
pub struct Run {
    /// The detector with its map.
    pub detector: LoopDetector,
    /// What was decided of each keyframe of this run, in order.
    pub decisions: Vec<Decision>,
    /// Images that did not become keyframes, by reason.
    pub skipped: BTreeMap<Skip, u64>,
    /// Images seen.
    pub images: u64,
    /// Truth of every keyframe in the map, where there is one.
    pub truth: Vec<Option<KeyframeTruth>>,
    /// What could not be read, in words.
    pub warnings: Vec<String>,
}

/// Images that are decoded and described at a time: enough to keep the cores busy.
const BATCH: usize = 16;

/// What of the sequence's own data a run uses.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions {
    /// Remove lens distortion with the sequence's calibration.
    pub undistort: bool,
    /// Use the sequence's odometry.
    pub odometry: bool,
}

/// Called now and then with the number of images done; may write what is new of the map.
pub type Progress<'a> = &'a mut dyn FnMut(u64, &mut LoopDetector) -> Result<()>;

/// Runs `sequence` through model and detector. `truth` overrides the sequence's own.
///
/// Errors: `progress` fails, no usable image, no calibration where `undistort` wants one. Single images that cannot be used
/// become warnings.
pub fn run(
    sequence: &dyn Sequence,
    model: &Model,
    mut detector: LoopDetector,
    truth: Option<&PoseTable>,
    options: RunOptions,
    progress: Progress<'_>,
) -> Result<Run> {
    let camera = match (options.undistort, sequence.camera()) {
        (true, None) => return Err(Error::bag("--undistort needs a camera_info topic beside the image topic")),
        (true, camera) => camera,
        (false, _) => None,
    };
    // Where distortion was removed, the calibration has none.
    let calibration = sequence.camera().map(|c| if options.undistort { Camera { d: Vec::new(), ..c.clone() } } else { c.clone() });
    let calibration = calibration.as_ref();
    let none = Track::default();
    let odometry = if options.odometry { sequence.odometry() } else { &none };
    let (mut decisions, mut skipped, mut images) = (Vec::new(), BTreeMap::new(), 0u64);
    let mut unreadable: Vec<String> = Vec::new();
    let mut batch: Vec<Shot> = Vec::new();
    let mut flush = |batch: &mut Vec<Shot>| -> Result<()> {
        let verifier = detector.verifier().cloned();
        let described: Vec<Result<(Frame, RgbImage)>> =
            batch.par_iter().map(|s| describe(s, model, camera, calibration, odometry)).collect();
        images += batch.len() as u64;
        for (shot, frame) in batch.iter().zip(described) {
            let (mut frame, image) = match frame {
                Ok(f) => f,
                Err(e) => {
                    unreadable.push(e.to_string());
                    continue;
                }
            };
            if let (Some(v), true) = (&verifier, detector.wants_features(&frame)) {
                let features = v.extract(&image)?;
                frame.features = Some(match &shot.depth {
                    Some(depth) => {
                        let depths =
                            depths_at(&depth.raw(), features.size(), features.points()).map_err(|e| e.at(Path::new(&shot.name)))?;
                        features.with_depths(depths)?
                    }
                    None => features,
                });
            }
            match detector.process(frame)? {
                Step::Skipped(why) => *skipped.entry(why).or_insert(0) += 1,
                Step::Keyframe(decision) => decisions.push(decision),
            }
        }
        batch.clear();
        progress(images, &mut detector)
    };
    let read = sequence.visit(&mut |shot| {
        batch.push(shot);
        if batch.len() == BATCH {
            flush(&mut batch)?;
        }
        Ok(())
    })?;
    flush(&mut batch)?;
    let mut warnings: Vec<String> = sequence.warnings().iter().cloned().chain(read).collect();
    if let Some(first) = unreadable.first() {
        warnings.push(format!("{} image(s) could not be used; the first: {first}", unreadable.len()));
    }
    if images == unreadable.len() as u64 {
        return Err(Error::bag(format!("no usable image{}", warnings.last().map(|w| format!(": {w}")).unwrap_or_default())));
    }
    let table = truth.unwrap_or(sequence.truth());
    let truth = detector
        .map()
        .keyframes()
        .iter()
        .map(|k| table.named(&k.name).or_else(|| table.at(k.stamp_ns, TRUTH_SLACK_NS)))
        .map(|p| p.map(|p| KeyframeTruth { x: p.x, y: p.y, heading: p.heading_deg.map(f64::to_radians) }))
        .collect();
    Ok(Run { detector, decisions, skipped, images, truth, warnings })
}

fn describe(
    shot: &Shot,
    model: &Model,
    camera: Option<&Camera>,
    calibration: Option<&Camera>,
    odometry: &Track,
) -> Result<(Frame, RgbImage)> {
    let at = |e: Error| e.at(Path::new(&shot.name));
    let mut image = shot.decode()?;
    if let Some(camera) = camera {
        image = image.undistort(camera).map_err(at)?;
    }
    let odom_from_base = odometry.at(shot.stamp_ns);
    let frame = Frame {
        camera: String::new(),
        stamp_ns: shot.stamp_ns,
        name: shot.name.clone(),
        descriptor: model.describe(&image).map_err(at)?,
        luma_std: image.luma_stats().1,
        median_depth_m: shot.depth.as_ref().map(|d| median_depth_m(&d.raw())).transpose().map_err(at)?.flatten(),
        glance: odom_from_base.is_none().then(|| image.glance()).transpose().map_err(at)?,
        odom_from_base,
        features: None,
        calibration: calibration.cloned(),
    };
    Ok((frame, image))
}

impl Run {
    /// The run as the scores want it: one entry per row of the map, earlier sessions included.
    pub fn keyframes(&self) -> Vec<RunKeyframe> {
        let mut all: Vec<RunKeyframe> =
            self.truth.iter().map(|t| RunKeyframe { truth: *t, allowed: Vec::new(), closed_to: None }).collect();
        for d in &self.decisions {
            let slot = &mut all[d.query];
            slot.allowed = d.outside_window.clone();
            slot.closed_to = d.evidence.filter(|_| d.outcome == Outcome::Closure).map(|e| e.matched);
        }
        all
    }

    /// Decodes the images of the named keyframes again.
    pub fn fetch(&self, sequence: &dyn Sequence, names: &HashSet<&str>) -> Result<BTreeMap<String, RgbImage>> {
        let mut out = BTreeMap::new();
        sequence.visit(&mut |shot| {
            if names.contains(shot.name.as_str()) {
                if let Ok(image) = shot.decode() {
                    out.insert(shot.name.clone(), image);
                }
            }
            Ok(())
        })?;
        Ok(out)
    }
}
