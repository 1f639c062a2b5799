//! Two images of one place: the model that their matches agree on, how surprising that is, and the relative pose.

use super::camera::{is_uncalibrated, rays};
use super::pose::{epipolar_errors, inverse_covariance, parallax, refine_direction, refine_metric, reprojection_errors, RelativePose};
use super::Match;
use crate::error::Result;
use crate::features::Features;
use crate::image::Camera;
use nalgebra::{Isometry3, Matrix3, Rotation3, UnitQuaternion, Vector3};
use opencv::calib3d::{self, UsacParams};
use opencv::core::{no_array, Mat, MatTraitConst, MatTraitConstManual, Point2d, Point2f, Point3d, Vector};

/// Which model the matches must agree on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// The one that says most: with depth PnP, with calibration the essential matrix, else the fundamental matrix.
    #[default]
    Auto,
    /// A fundamental matrix, whatever else is known.
    Fundamental,
    /// An essential matrix; needs calibration.
    Essential,
    /// A homography: a plane, or a camera that turns.
    Homography,
    /// A metric pose; needs calibration, and depth of one of the images.
    Pnp,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Auto, Self::Fundamental, Self::Essential, Self::Homography, Self::Pnp];

    /// Name in settings and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Fundamental => "fundamental",
            Self::Essential => "essential",
            Self::Homography => "homography",
            Self::Pnp => "pnp",
        }
    }
}

/// Settings of a verification.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VerifyConfig {
    /// Which model.
    pub method: Method,
    /// Largest distance of a point from where the model has it, pixels.
    pub threshold_px: f64,
    /// Iterations of the robust estimation at most; of a fundamental matrix half as many.
    pub max_iterations: i32,
    /// Of its random numbers: the same seed gives the same bytes.
    pub seed: u64,
}

impl Default for VerifyConfig {
    fn default() -> Self {
        Self { method: Method::Auto, threshold_px: 2.0, max_iterations: 2000, seed: 1 }
    }
}

/// One image's features, and its calibration where there is one.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Its features, with depths where they are known.
    pub features: &'a Features,
    /// Its calibration.
    pub camera: Option<&'a Camera>,
}

impl<'a> View<'a> {
    /// Without calibration.
    pub fn of(features: &'a Features) -> Self {
        Self { features, camera: None }
    }
}

/// Why there is no verification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// An image has no keypoints.
    NoKeypoints,
    /// Fewer matches than a model needs.
    TooFewMatches,
    /// All matched points of one image lie on a line, or in one spot.
    OnALine,
    /// No model was found.
    NoModel,
    /// The method needs calibration, and an image has none.
    NoCalibration,
    /// The calibration cannot be used: zeros, another aspect ratio, an unknown distortion model.
    BadCalibration,
    /// The method needs depth, and too few inliers have any.
    NoDepth,
}

impl Failure {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoKeypoints => "NO_KEYPOINTS",
            Self::TooFewMatches => "TOO_FEW_MATCHES",
            Self::OnALine => "ON_A_LINE",
            Self::NoModel => "NO_MODEL",
            Self::NoCalibration => "NO_CALIBRATION",
            Self::BadCalibration => "BAD_CALIBRATION",
            Self::NoDepth => "NO_DEPTH",
        }
    }
}

/// What makes a relative pose unsure although the images agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Degeneracy {
    /// Without calibration: a homography explains the inliers as well: a plane, or a camera that only turned.
    PlaneOrRotation,
    /// A turn alone explains the inliers: the translation's direction is unknown.
    PureRotation,
    /// The inliers lie on a plane: a second pose may explain them.
    Plane,
    /// The camera moved too little for the distance of what it saw: the translation's direction is unsure.
    LittleParallax,
}

impl Degeneracy {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::PlaneOrRotation => "PLANE_OR_ROTATION",
            Self::PureRotation => "PURE_ROTATION",
            Self::Plane => "PLANE",
            Self::LittleParallax => "LITTLE_PARALLAX",
        }
    }
}

/// What the matches agree on.
#[derive(Clone, Debug, PartialEq)]
pub struct Verification {
    /// The model that was found; never [`Method::Auto`].
    pub method: Method,
    /// Matches that were tried.
    pub matches: usize,
    /// Points of the query and of the reference that agree, pixels of each image as the extractor scaled it.
    pub inliers: Vec<([f32; 2], [f32; 2])>,
    /// Columns and rows of those images: the query's, the reference's.
    pub sizes: [(u32, u32); 2],
    /// Inliers by matches.
    pub inlier_ratio: f64,
    /// Share of the cells of an 8 x 6 grid over the query that hold an inlier.
    pub coverage: f64,
    /// How much larger things are in the reference than in the query, by the distances between inliers: 1 at the
    /// same distance, more when the reference was taken further ahead.
    pub zoom: f64,
    /// How differently the inliers moved: median distance of their motion in the image from their median motion, as a
    /// share of the diagonal. Small where the two images were taken from nearly one distance, whichever way they look.
    pub spread: f64,
    /// Mean distance of the inliers from the model, pixels.
    pub mean_error_px: f64,
    /// Decades by which so many inliers are less likely than one accident; see [`evidence`].
    pub evidence: f64,
    /// What makes a pose unsure.
    pub degeneracy: Option<Degeneracy>,
    /// With calibration.
    pub pose: Option<RelativePose>,
}

/// What stands for [`Verification::spread`] where nothing agrees: as random motions differ.
pub const NO_SPREAD: f64 = 0.125;

/// How well a pair agrees, for ordering: the logarithm of the inliers, less what their spread says against one place
/// [ours]. An evidence alone does not know which of several verified neighbours is the nearest.
pub fn agreement(verification: Option<&Verification>) -> f64 {
    let (inliers, spread) = verification.map_or((0, NO_SPREAD), |v| (v.inliers.len(), v.spread));
    ((inliers + 5) as f64).ln() - SPREAD_WEIGHT * (1.0 + spread.min(NO_SPREAD) / SPREAD_UNIT).ln()
}

/// Chosen on synthetic streets (seeds 5001 to 5006, driven up to 2.5 m to the side), where twice and half of it differ
/// little. A penalty on the motion itself does better where both drives keep their lane, and much worse where not.
const SPREAD_WEIGHT: f64 = 0.3;
/// Five pixels of an image 640 wide.
const SPREAD_UNIT: f64 = 0.00625;

/// A fundamental matrix from points needs so many.
const SAMPLE: usize = 7;
/// And one more tells something.
const FEWEST: usize = SAMPLE + 1;
/// Cells of the grid that coverage and crowding are counted over.
const GRID: (usize, usize) = (8, 6);
/// More inliers than this in one cell say no more than so many: they are of one thing.
const CROWD: usize = 4;
/// Points nearer than this to one line, root mean square in pixels, span no image.
const LINE_PX: f64 = 2.0;
/// A homography or a turn that explains this share of the inliers explains them.
const EXPLAINED: f64 = 0.9;
/// Parallax below this many pixels is within what matching is off.
const PARALLAX_PX: f64 = 3.0;
/// Neighbours that an inlier's motion is compared with.
const NEIGHBOURS: usize = 8;
/// An inlier that is off its neighbours' motion by more than this share of it is not steady.
const UNSTEADY: f64 = 0.2;
/// A metric pose needs so many inliers with depth.
const FEWEST_DEPTHS: usize = 6;

/// ln of the binomial coefficient.
fn ln_choose(n: usize, k: usize) -> f64 {
    (1..=k.min(n - k)).map(|i| ((n - i + 1) as f64 / i as f64).ln()).sum()
}

/// Minus the decimal logarithm of the number of false alarms (Moisan and Stival, IJCV 2004): how many models
/// with `inliers` of `matches` would be expected among matches that are random, where one is an inlier of
/// a given model with probability `chance`. Below 0 accident explains it; 3 is one accident in a thousand pairs.
pub fn evidence(matches: usize, inliers: usize, chance: f64) -> f64 {
    if inliers < FEWEST || matches < inliers {
        return 0.0;
    }
    let models = ((matches - SAMPLE) as f64).ln() + ln_choose(matches, inliers) + ln_choose(inliers, SAMPLE);
    -(models + (inliers - SAMPLE) as f64 * chance.clamp(1e-12, 1.0).ln()) / std::f64::consts::LN_10
}

fn sampson(f: &[f64; 9], q: [f64; 2], r: [f64; 2]) -> f64 {
    let line = [0, 3, 6].map(|i| f[i] * q[0] + f[i + 1] * q[1] + f[i + 2]);
    let back = [0, 1].map(|i| f[i] * r[0] + f[i + 3] * r[1] + f[i + 6]);
    let error = r[0] * line[0] + r[1] * line[1] + line[2];
    let scale = line[0] * line[0] + line[1] * line[1] + back[0] * back[0] + back[1] * back[1];
    if scale > 0.0 {
        error.abs() / scale.sqrt()
    } else {
        f64::INFINITY
    }
}

/// Whether the points lie on one line.
fn on_a_line(points: &[[f64; 2]]) -> bool {
    let n = points.len() as f64;
    let mean = [0, 1].map(|i| points.iter().map(|p| p[i]).sum::<f64>() / n);
    let moment = |i: usize, j: usize| points.iter().map(|p| (p[i] - mean[i]) * (p[j] - mean[j])).sum::<f64>() / n;
    let (a, b, c) = (moment(0, 0), moment(0, 1), moment(1, 1));
    // Smaller eigenvalue of the covariance: mean squared distance from the best line.
    let least = (a + c) / 2.0 - (((a - c) / 2.0).powi(2) + b * b).sqrt();
    least < LINE_PX * LINE_PX
}

fn cell(p: [f64; 2], size: (u32, u32)) -> usize {
    let index = |v: f64, extent: u32, cells: usize| ((v / f64::from(extent) * cells as f64).max(0.0) as usize).min(cells - 1);
    index(p[1], size.1, GRID.1) * GRID.0 + index(p[0], size.0, GRID.0)
}

/// Both images' matched points as the model takes them.
struct Points {
    /// Pixels; of a calibrated pair without distortion, from the principal point.
    query: Vec<[f64; 2]>,
    reference: Vec<[f64; 2]>,
    /// Of a calibrated pair.
    rays: Option<Rays>,
}

/// Rays of query and reference, and the focal length that turns them into pixels.
type Rays = (Vec<[f64; 2]>, Vec<[f64; 2]>, f64);

fn wide(p: [f32; 2]) -> [f64; 2] {
    [f64::from(p[0]), f64::from(p[1])]
}

/// Finds what `matches` agree on with MAGSAC++ (OpenCV), weighs it, and, with calibration, estimates the pose.
///
/// Errors: OpenCV refuses; that the images do not agree is a [`Failure`], not an error.
pub fn verify(
    query: &View,
    reference: &View,
    matches: &[Match],
    config: &VerifyConfig,
) -> Result<std::result::Result<Verification, Failure>> {
    if query.features.is_empty() || reference.features.is_empty() {
        return Ok(Err(Failure::NoKeypoints));
    }
    if matches.len() < FEWEST {
        return Ok(Err(Failure::TooFewMatches));
    }
    let q: Vec<[f64; 2]> = matches.iter().map(|m| wide(query.features.points()[m.query])).collect();
    let r: Vec<[f64; 2]> = matches.iter().map(|m| wide(reference.features.points()[m.reference])).collect();
    if on_a_line(&q) || on_a_line(&r) {
        return Ok(Err(Failure::OnALine));
    }
    let points = match points_of(query, reference, &q, &r, config.method)? {
        Ok(points) => points,
        Err(failure) => return Ok(Err(failure)),
    };
    let found = match (config.method, &points.rays) {
        (Method::Homography, _) => by_homography(&points, config)?,
        (_, Some((rq, rr, focal))) => by_essential(&points, rq, rr, *focal, config)?,
        _ => by_fundamental(&points, matches, config)?,
    };
    // Two images from one spot fit no epipolar geometry, for they fit every one: what they agree on is a homography.
    let found = match found {
        None if config.method != Method::Homography => by_turn(&points, config)?,
        found => found,
    };
    let Some(mut found) = found else { return Ok(Err(Failure::NoModel)) };
    if let (Some((rq, rr, focal)), true) = (&points.rays, matches!(config.method, Method::Auto | Method::Pnp)) {
        let metric = by_depth(query, reference, matches, (rq, rr, *focal), &found, config)?;
        match metric {
            Some(pose) => {
                (found.pose, found.method) = (Some(pose), Method::Pnp);
                // A metric pose of a turn or a plane is sure, for depth determines it.
                found.degeneracy = None;
            }
            None if config.method == Method::Pnp => return Ok(Err(Failure::NoDepth)),
            None => {}
        }
    }
    Ok(Ok(weigh(query, reference, &q, &r, found, config)))
}

/// A model with its inliers.
struct Found {
    method: Method,
    /// Positions in the list of matches, and how far each is off.
    inliers: Vec<usize>,
    errors: Vec<f64>,
    pose: Option<RelativePose>,
    degeneracy: Option<Degeneracy>,
}

fn points_of(
    query: &View,
    reference: &View,
    q: &[[f64; 2]],
    r: &[[f64; 2]],
    method: Method,
) -> Result<std::result::Result<Points, Failure>> {
    let plain = || Ok(Ok(Points { query: q.to_vec(), reference: r.to_vec(), rays: None }));
    let wanted = matches!(method, Method::Essential | Method::Pnp);
    if matches!(method, Method::Fundamental | Method::Homography) {
        return plain();
    }
    let (Some(cq), Some(cr)) = (query.camera, reference.camera) else {
        return if wanted { Ok(Err(Failure::NoCalibration)) } else { plain() };
    };
    // Drivers publish zeros where there is no calibration.
    if !wanted && (is_uncalibrated(cq) || is_uncalibrated(cr)) {
        return plain();
    }
    let (Some((rq, fq)), Some((rr, fr))) = (rays(cq, query.features.size(), q)?, rays(cr, reference.features.size(), r)?) else {
        return Ok(Err(Failure::BadCalibration));
    };
    let focal = (fq + fr) / 2.0;
    let scaled = |rays: &[[f64; 2]]| rays.iter().map(|p| p.map(|v| v * focal)).collect();
    Ok(Ok(Points { query: scaled(&rq), reference: scaled(&rr), rays: Some((rq, rr, focal)) }))
}

/// Positions of errors within the threshold, and those errors; `None` if they are too few.
fn within(errors: &[f64], config: &VerifyConfig) -> Option<(Vec<usize>, Vec<f64>)> {
    let inliers: Vec<usize> = (0..errors.len()).filter(|i| errors[*i] <= config.threshold_px).collect();
    (inliers.len() >= FEWEST).then(|| (inliers.clone(), inliers.iter().map(|i| errors[*i]).collect()))
}

/// The more similar matches are drawn first (PROSAC; Chum and Matas, CVPR 2005), and then half of the iterations will do: of 812 pairs of
/// frames of CamVid, 1 to 4 frames apart, SIFT agrees on 518 in place of 487, in 0.7 of the time, and on none of 203 that are 37 apart.
/// Not so an essential matrix: where facades repeat, the wrong window is as similar as the right one, and of 120 poses of a synthetic
/// street 109 are right in place of 114.
fn by_fundamental(points: &Points, matches: &[Match], config: &VerifyConfig) -> Result<Option<Found>> {
    let mut order: Vec<usize> = (0..matches.len()).collect();
    order.sort_by(|a, b| matches[*b].similarity.total_cmp(&matches[*a].similarity));
    let sorted = |points: &[[f64; 2]]| vector(order.iter().map(|i| points[*i]));
    let mut params = params(&VerifyConfig { max_iterations: config.max_iterations / 2, ..*config })?;
    params.sampler = calib3d::SamplingMethod::SAMPLING_PROSAC;
    let (q, r) = (sorted(&points.query), sorted(&points.reference));
    let Some(f) = nine(&calib3d::find_fundamental_mat_2(&q, &r, &mut Mat::default(), params)?)? else { return Ok(None) };
    let errors: Vec<f64> = points.query.iter().zip(&points.reference).map(|(q, r)| sampson(&f, *q, *r)).collect();
    let Some((inliers, errors)) = within(&errors, config) else { return Ok(None) };
    let plane = explained_by_homography(points, &inliers, config)? as f64 >= EXPLAINED * inliers.len() as f64;
    let degeneracy = plane.then_some(Degeneracy::PlaneOrRotation);
    Ok(Some(Found { method: Method::Fundamental, inliers, errors, pose: None, degeneracy }))
}

fn by_homography(points: &Points, config: &VerifyConfig) -> Result<Option<Found>> {
    let Some(h) = homography(&points.query, &points.reference, config)? else { return Ok(None) };
    let errors: Vec<f64> = points.query.iter().zip(&points.reference).map(|(q, r)| transfer(&h, *q, *r)).collect();
    Ok(within(&errors, config).map(|(inliers, errors)| Found { method: Method::Homography, inliers, errors, pose: None, degeneracy: None }))
}

/// A homography where no epipolar geometry was found; with calibration and without parallax the turn that it is.
fn by_turn(points: &Points, config: &VerifyConfig) -> Result<Option<Found>> {
    let Some(found) = by_homography(points, config)? else { return Ok(None) };
    let Some((rq, rr, focal)) = &points.rays else {
        return Ok(Some(Found { degeneracy: Some(Degeneracy::PlaneOrRotation), ..found }));
    };
    let pairs: Vec<([f64; 2], [f64; 2])> = found.inliers.iter().map(|i| (rq[*i], rr[*i])).collect();
    let (q, r): (Vec<[f64; 2]>, Vec<[f64; 2]>) = pairs.iter().copied().unzip();
    if (explained_by_turn(&q, &r, *focal, config) as f64) < EXPLAINED * pairs.len() as f64 {
        return Ok(Some(Found { degeneracy: Some(Degeneracy::Plane), ..found }));
    }
    let sigma = config.threshold_px / focal / (pairs.len() as f64).sqrt();
    let pose = RelativePose::turn(turn_alone(&pairs), sigma);
    Ok(Some(Found { degeneracy: Some(Degeneracy::PureRotation), pose: Some(pose), ..found }))
}

fn by_essential(points: &Points, rq: &[[f64; 2]], rr: &[[f64; 2]], focal: f64, config: &VerifyConfig) -> Result<Option<Found>> {
    let doubles = |p: &[[f64; 2]]| p.iter().map(|p| Point2d::new(p[0], p[1])).collect::<Vector<Point2d>>();
    let (q, r) = (doubles(&points.query), doubles(&points.reference));
    let (k, none) = (camera_matrix(focal)?, no_array());
    let Some(e) = nine(&calib3d::find_essential_mat_4(&q, &r, &k, &k, &none, &none, &mut Mat::default(), params(config)?)?)? else {
        return Ok(None);
    };
    // In pixels: F = K^-T E K^-1.
    let f: [f64; 9] = std::array::from_fn(|i| e[i] / (if i / 3 < 2 { focal } else { 1.0 } * if i % 3 < 2 { focal } else { 1.0 }));
    let errors: Vec<f64> = points.query.iter().zip(&points.reference).map(|(q, r)| sampson(&f, *q, *r)).collect();
    let Some((mut inliers, mut errors)) = within(&errors, config) else { return Ok(None) };
    let Some(mut first) = recover(&e, rq, rr, &inliers)? else { return Ok(None) };
    let mut pose = RelativePose::unsure(first);
    // The pose of all inliers decides anew who is one.
    for _ in 0..3 {
        let chosen = steady(points, &inliers, config);
        let pick = |rays: &[[f64; 2]]| chosen.iter().map(|i| rays[*i]).collect::<Vec<_>>();
        let Some(refined) = refine_direction(&first, &pick(rq), &pick(rr), focal) else { break };
        let all = epipolar_errors(&refined.reference_from_query, rq, rr, focal);
        match within(&all, config) {
            // A few may be lost: E has more freedom than a pose that is in front of both cameras.
            Some(again) if again.0.len() * 10 >= inliers.len() * 8 => (inliers, errors) = again,
            _ => break,
        }
        first = refined.reference_from_query;
        pose = refined;
    }
    let pick = |rays: &[[f64; 2]]| inliers.iter().map(|i| rays[*i]).collect::<Vec<_>>();
    let (iq, ir) = (pick(rq), pick(rr));
    let share = |n: usize| n as f64 >= EXPLAINED * inliers.len() as f64;
    let degeneracy = if share(explained_by_turn(&iq, &ir, focal, config)) {
        Some(Degeneracy::PureRotation)
    } else if share(explained_by_homography(points, &inliers, config)?) {
        Some(Degeneracy::Plane)
    } else if parallax(&first.rotation, &iq, &ir) * focal < PARALLAX_PX {
        Some(Degeneracy::LittleParallax)
    } else {
        None
    };
    Ok(Some(Found { method: Method::Essential, inliers, errors, pose: Some(pose), degeneracy }))
}

/// Of `inliers` those that move as the median of their neighbours does; all, where those are few.
///
/// Windows that repeat match along the right epipolar line, a period off: they fit the right pose as well as a turned
/// one, and pull it. [ours] On 360 loops of three synthetic streets the direction of translation from SIFT is right
/// to 10 degrees in 343, without this in 332.
fn steady(points: &Points, inliers: &[usize], config: &VerifyConfig) -> Vec<usize> {
    let of = |a: [f64; 2], b: [f64; 2]| [a[0] - b[0], a[1] - b[1]];
    let flow: Vec<[f64; 2]> = inliers.iter().map(|i| of(points.reference[*i], points.query[*i])).collect();
    let moves_along = |a: usize| {
        let away = |b: usize| {
            let [x, y] = of(points.query[inliers[b]], points.query[inliers[a]]);
            x.hypot(y)
        };
        // The same corner at another scale is no second opinion.
        let mut near: Vec<(f64, usize)> = (0..inliers.len()).map(|b| (away(b), b)).filter(|n| n.0 > 0.5).collect();
        if near.len() > NEIGHBOURS {
            near.select_nth_unstable_by(NEIGHBOURS, |x, y| x.0.total_cmp(&y.0).then(x.1.cmp(&y.1)));
            near.truncate(NEIGHBOURS);
        }
        let common = [0, 1].map(|axis| median(near.iter().map(|(_, b)| flow[*b][axis]).collect()).unwrap_or(0.0));
        let [x, y] = of(flow[a], common);
        x.hypot(y) <= (2.0 * config.threshold_px).max(UNSTEADY * common[0].hypot(common[1]))
    };
    let kept: Vec<usize> = (0..inliers.len()).filter(|a| moves_along(*a)).map(|a| inliers[a]).collect();
    if kept.len() >= FEWEST.max(inliers.len() / 3) {
        kept
    } else {
        inliers.to_vec()
    }
}

fn camera_matrix(focal: f64) -> Result<Mat> {
    Ok(Mat::from_slice(&[focal, 0.0, 0.0, 0.0, focal, 0.0, 0.0, 0.0, 1.0])?.reshape(1, 3)?.try_clone()?)
}

/// Number of pairs of rays that one rotation explains.
fn explained_by_turn(q: &[[f64; 2]], r: &[[f64; 2]], focal: f64, config: &VerifyConfig) -> usize {
    let mut kept: Vec<usize> = (0..q.len()).collect();
    let mut explained = 0;
    // Matches that are wrong along their epipolar line are left out one half at a time.
    for round in 0..4 {
        let turn = turn_alone(&kept.iter().map(|i| (q[*i], r[*i])).collect::<Vec<_>>());
        let mut errors: Vec<(f64, usize)> = (0..q.len())
            .map(|i| {
                let p = turn * Vector3::new(q[i][0], q[i][1], 1.0);
                let miss = focal * (p.x / p.z - r[i][0]).hypot(p.y / p.z - r[i][1]);
                (if p.z > 0.0 { miss } else { f64::INFINITY }, i)
            })
            .collect();
        errors.sort_by(|a, b| a.0.total_cmp(&b.0));
        explained = explained.max(errors.iter().filter(|(e, _)| *e <= config.threshold_px).count());
        let next = if round < 2 { q.len() / 2 } else { explained };
        kept = errors.into_iter().take(next.max(3)).map(|(_, i)| i).collect();
    }
    explained
}

/// The rotation that brings the first rays nearest to the second (Kabsch).
fn turn_alone(pairs: &[([f64; 2], [f64; 2])]) -> UnitQuaternion<f64> {
    let unit = |p: &[f64; 2]| Vector3::new(p[0], p[1], 1.0).normalize();
    let sum = pairs.iter().fold(Matrix3::zeros(), |m, (q, r)| m + unit(r) * unit(q).transpose());
    let svd = sum.svd(true, true);
    let (Some(u), Some(v)) = (svd.u, svd.v_t) else { return UnitQuaternion::identity() };
    let flip = Matrix3::from_diagonal(&Vector3::new(1.0, 1.0, (u * v).determinant().signum()));
    UnitQuaternion::from_rotation_matrix(&Rotation3::from_matrix_unchecked(u * flip * v))
}

/// Rotation and direction of the essential matrix, by which side of the cameras the points lie on.
fn recover(e: &[f64; 9], rq: &[[f64; 2]], rr: &[[f64; 2]], inliers: &[usize]) -> Result<Option<Isometry3<f64>>> {
    let pick = |rays: &[[f64; 2]]| inliers.iter().map(|i| Point2d::new(rays[*i][0], rays[*i][1])).collect::<Vector<Point2d>>();
    let e = Mat::from_slice(e)?;
    let (mut rotation, mut translation) = (Mat::default(), Mat::default());
    let (one, centre, mut mask) = (1.0, Point2d::new(0.0, 0.0), Mat::default());
    let good = calib3d::recover_pose(&e.reshape(1, 3)?, &pick(rq), &pick(rr), &mut rotation, &mut translation, one, centre, &mut mask)?;
    let (Some(m), t) = (nine(&rotation)?, translation.data_typed::<f64>()?) else { return Ok(None) };
    if good == 0 || t.len() != 3 || t.iter().any(|v| !v.is_finite()) {
        return Ok(None);
    }
    let rotation = UnitQuaternion::from_matrix(&Matrix3::from_row_slice(&m));
    Ok(Some(Isometry3::from_parts(Vector3::new(t[0], t[1], t[2]).into(), rotation)))
}

/// The metric pose that the inliers with depth agree on.
fn by_depth(
    query: &View,
    reference: &View,
    matches: &[Match],
    (rq, rr, focal): (&[[f64; 2]], &[[f64; 2]], f64),
    found: &Found,
    config: &VerifyConfig,
) -> Result<Option<RelativePose>> {
    let solid = |ray: [f64; 2], depth: f32| {
        let z = f64::from(depth);
        (z.is_finite() && z > 0.0).then_some([ray[0] * z, ray[1] * z, z])
    };
    // Points in the frame of the image that has depth, and rays of the other.
    let of = |depths: &[f32], index: &dyn Fn(&Match) -> usize, own: &[[f64; 2]], other: &[[f64; 2]]| -> (Vec<[f64; 3]>, Vec<[f64; 2]>) {
        let pairs = found.inliers.iter().filter_map(|i| Some((solid(own[*i], *depths.get(index(&matches[*i]))?)?, other[*i])));
        pairs.unzip()
    };
    let forwards = of(query.features.depths(), &|m| m.query, rq, rr);
    let backwards = of(reference.features.depths(), &|m| m.reference, rr, rq);
    let inverse = backwards.0.len() > forwards.0.len();
    let (points, rays) = if inverse { backwards } else { forwards };
    if points.len() < FEWEST_DEPTHS {
        return Ok(None);
    }
    let mut guesses = Vec::new();
    if let Some(p) = &found.pose {
        let pose = if inverse { p.reference_from_query.inverse() } else { p.reference_from_query };
        guesses.push(with_length(&pose, &points, &rays));
    }
    guesses.extend(pnp(&points, &rays, focal, config)?);
    // Depth is coarser than matching: a point may be off a little more than by its epipolar line.
    let limit = 2.0 * config.threshold_px;
    let mut best: Option<(Isometry3<f64>, nalgebra::Matrix6<f64>, Vec<f64>)> = None;
    for guess in guesses {
        let (mut pose, mut kept) = (guess, (0..points.len()).collect::<Vec<_>>());
        let mut covariance = None;
        for _ in 0..3 {
            let pick = (kept.iter().map(|i| points[*i]).collect::<Vec<_>>(), kept.iter().map(|i| rays[*i]).collect::<Vec<_>>());
            let Some((refined, c)) = refine_metric(&pose, &pick.0, &pick.1, focal) else { break };
            let errors = reprojection_errors(&refined, &points, &rays, focal);
            let next: Vec<usize> = (0..points.len()).filter(|i| errors[*i] <= limit).collect();
            if next.len() < FEWEST_DEPTHS {
                break;
            }
            (pose, kept, covariance) = (refined, next, Some(c));
        }
        let errors: Vec<f64> = reprojection_errors(&pose, &points, &rays, focal).into_iter().filter(|e| *e <= limit).collect();
        if let Some(c) = covariance.filter(|_| best.as_ref().is_none_or(|b| errors.len() > b.2.len())) {
            best = Some((pose, c, errors));
        }
    }
    Ok(best.filter(|(_, _, errors)| 2 * errors.len() >= points.len()).map(|(pose, c, _)| {
        let (pose, c) = if inverse { (pose.inverse(), inverse_covariance(&pose, &c)) } else { (pose, c) };
        RelativePose { reference_from_query: pose, covariance: c, scale_known: true }
    }))
}

/// The pose with the length of translation that fits the depths best.
fn with_length(pose: &Isometry3<f64>, points: &[[f64; 3]], rays: &[[f64; 2]]) -> Isometry3<f64> {
    let t = pose.translation.vector;
    let (mut over, mut under) = (0.0, 0.0);
    for (p, ray) in points.iter().zip(rays) {
        let ray = Vector3::new(ray[0], ray[1], 1.0);
        let (a, b) = (ray.cross(&(pose.rotation * Vector3::from(*p))) / p[2], ray.cross(&t) / p[2]);
        over -= a.dot(&b);
        under += b.dot(&b);
    }
    let length = if under > 0.0 { over / under } else { 0.0 };
    Isometry3::from_parts((t * length).into(), pose.rotation)
}

fn pnp(points: &[[f64; 3]], rays: &[[f64; 2]], focal: f64, config: &VerifyConfig) -> Result<Option<Isometry3<f64>>> {
    let solid: Vector<Point3d> = points.iter().map(|p| Point3d::new(p[0], p[1], p[2])).collect();
    let flat: Vector<Point2d> = rays.iter().map(|p| Point2d::new(p[0] * focal, p[1] * focal)).collect();
    let mut k = camera_matrix(focal)?;
    let (mut turn, mut shift, mut inliers) = (Mat::default(), Mat::default(), Mat::default());
    let found = calib3d::solve_pnp_ransac_1(&solid, &flat, &mut k, &no_array(), &mut turn, &mut shift, &mut inliers, params(config)?)?;
    if !found {
        return Ok(None);
    }
    let (w, t) = (turn.data_typed::<f64>()?, shift.data_typed::<f64>()?);
    let sound = w.len() == 3 && t.len() == 3 && w.iter().chain(t).all(|v| v.is_finite());
    Ok(sound.then(|| Isometry3::new(Vector3::new(t[0], t[1], t[2]), Vector3::new(w[0], w[1], w[2]))))
}

fn weigh(query: &View, reference: &View, q: &[[f64; 2]], r: &[[f64; 2]], found: Found, config: &VerifyConfig) -> Verification {
    let (from, to) = (query.features.size(), reference.features.size());
    let inliers = &found.inliers;
    let mut cells = [0usize; GRID.0 * GRID.1];
    inliers.iter().for_each(|i| cells[cell(q[*i], from)] += 1);
    let counted: usize = cells.iter().map(|n| (*n).min(CROWD)).sum();
    // Inliers of a crowd are taken out of the matches too: they are neither for nor against.
    let of = q.len() - (inliers.len() - counted);
    let (w, h) = (f64::from(to.0), f64::from(to.1));
    // The band around an epipolar line, at its longest, by the image; around a point for a homography.
    let chance = match found.method {
        Method::Homography => std::f64::consts::PI * config.threshold_px * config.threshold_px / (w * h),
        _ => 2.0 * config.threshold_px * w.hypot(h) / (w * h),
    };
    let (sx, sy) = (w / f64::from(from.0), h / f64::from(from.1));
    let moved: Vec<[f64; 2]> = inliers.iter().map(|i| [r[*i][0] - q[*i][0] * sx, r[*i][1] - q[*i][1] * sy]).collect();
    let common = [0, 1].map(|axis| median(moved.iter().map(|m| m[axis]).collect()).unwrap_or(0.0));
    let spread = median(moved.iter().map(|m| (m[0] - common[0]).hypot(m[1] - common[1])).collect());
    let narrow = |p: [f64; 2]| [p[0] as f32, p[1] as f32];
    Verification {
        method: found.method,
        matches: q.len(),
        inlier_ratio: inliers.len() as f64 / q.len() as f64,
        coverage: cells.iter().filter(|n| **n > 0).count() as f64 / cells.len() as f64,
        zoom: zoom(q, r, inliers, from, to),
        spread: spread.map_or(NO_SPREAD, |m| m / w.hypot(h)),
        mean_error_px: found.errors.iter().sum::<f64>() / found.errors.len().max(1) as f64,
        evidence: evidence(of, counted, chance),
        degeneracy: found.degeneracy,
        inliers: inliers.iter().map(|i| (narrow(q[*i]), narrow(r[*i]))).collect(),
        sizes: [from, to],
        pose: found.pose,
    }
}

impl Verification {
    /// The inliers as shares of each image's width and height, for drawing.
    pub fn lines(&self) -> Vec<([f32; 2], [f32; 2])> {
        let share = |p: &[f32; 2], size: (u32, u32)| [p[0] / size.0.max(1) as f32, p[1] / size.1.max(1) as f32];
        self.inliers.iter().map(|(q, r)| (share(q, self.sizes[0]), share(r, self.sizes[1]))).collect()
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Median ratio of distances between inliers, each to those a third and two thirds of the list further on.
fn zoom(q: &[[f64; 2]], r: &[[f64; 2]], inliers: &[usize], from: (u32, u32), to: (u32, u32)) -> f64 {
    let n = inliers.len();
    let apart = |p: &[[f64; 2]], i: usize, j: usize| (p[i][0] - p[j][0]).hypot(p[i][1] - p[j][1]);
    let mut ratios: Vec<f64> = (0..n)
        .flat_map(|k| [n / 3, 2 * n / 3].map(|step| (inliers[k], inliers[(k + step) % n])))
        .map(|(i, j)| (apart(q, i, j), apart(r, i, j)))
        // Points in one spot have no distance to compare.
        .filter(|(a, b)| *a > 10.0 && *b > 10.0)
        .map(|(a, b)| b / a)
        .collect();
    ratios.sort_by(f64::total_cmp);
    let of_images = f64::from(from.0.max(from.1)) / f64::from(to.0.max(to.1));
    ratios.get(ratios.len() / 2).map_or(1.0, |m| m * of_images)
}

fn params(config: &VerifyConfig) -> Result<UsacParams> {
    let mut p = UsacParams::default()?;
    p.threshold = config.threshold_px;
    p.max_iterations = config.max_iterations;
    p.confidence = 0.999;
    p.score = calib3d::ScoreMethod::SCORE_METHOD_MAGSAC;
    p.lo_method = calib3d::LocalOptimMethod::LOCAL_OPTIM_SIGMA;
    // Parallel estimation would depend on the number of threads.
    p.is_parallel = false;
    p.random_generator_state = (config.seed % i32::MAX as u64) as i32;
    Ok(p)
}

fn vector(of: impl Iterator<Item = [f64; 2]>) -> Vector<Point2f> {
    of.map(|p| Point2f::new(p[0] as f32, p[1] as f32)).collect()
}

fn nine(m: &Mat) -> Result<Option<[f64; 9]>> {
    if m.rows() < 3 || m.cols() != 3 {
        return Ok(None);
    }
    let values = m.data_typed::<f64>()?;
    Ok(values.get(..9).and_then(|v| <[f64; 9]>::try_from(v).ok()).filter(|v| v.iter().all(|x| x.is_finite())))
}

/// `h` with `reference ~ h query`.
fn homography(q: &[[f64; 2]], r: &[[f64; 2]], config: &VerifyConfig) -> Result<Option<[f64; 9]>> {
    let (from, to) = (vector(q.iter().copied()), vector(r.iter().copied()));
    nine(&calib3d::find_homography_1(&from, &to, &mut Mat::default(), params(config)?)?)
}

/// Distance of the reference's point from where `h` puts the query's.
fn transfer(h: &[f64; 9], q: [f64; 2], r: [f64; 2]) -> f64 {
    let [x, y, z] = [0, 3, 6].map(|k| h[k] * q[0] + h[k + 1] * q[1] + h[k + 2]);
    let d = (x / z - r[0]).hypot(y / z - r[1]);
    if d.is_finite() {
        d
    } else {
        f64::INFINITY
    }
}

/// Number of inliers that one homography explains.
fn explained_by_homography(points: &Points, inliers: &[usize], config: &VerifyConfig) -> Result<usize> {
    let pick = |p: &[[f64; 2]]| inliers.iter().map(|i| p[*i]).collect::<Vec<_>>();
    let (q, r) = (pick(&points.query), pick(&points.reference));
    // Only a homography that explains nearly all matters: two draws in three are then of such points alone.
    let config = &VerifyConfig { max_iterations: config.max_iterations.min(100), ..*config };
    let Some(h) = homography(&q, &r, config)? else { return Ok(0) };
    Ok(q.iter().zip(&r).filter(|(q, r)| transfer(&h, **q, **r) <= config.threshold_px).count())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nalgebra::{Rotation3, Vector3};

    const SIZE: (u32, u32) = (640, 480);

    /// Points of a scene seen from two places, `share` of the matches right and a little more similar, the others anywhere.
    fn pair(seed: u64, n: usize, share: f64, turn: f64, step: Vector3<f64>, plane: bool) -> (Features, Features, Vec<Match>) {
        let noise = |k: u64| f64::from(crate::test_noise(seed, k)) / 1.8;
        let rotation = Rotation3::from_euler_angles(0.02, turn, 0.01);
        let project = |p: Vector3<f64>| [500.0 * p.x / p.z + 320.0, 500.0 * p.y / p.z + 240.0];
        let inside = |p: &[f64; 2]| (0.0..640.0).contains(&p[0]) && (0.0..480.0).contains(&p[1]);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let mut k = 0u64;
        while a.len() < n {
            k += 10;
            let z = if plane { 10.0 } else { 9.0 + 6.0 * noise(k) };
            let p = Vector3::new(6.0 * noise(k + 1), 5.0 * noise(k + 2), z);
            let (u, mut v) = (project(p), project(rotation * p + step));
            if a.len() as f64 >= share * n as f64 {
                v = [320.0 + 310.0 * noise(k + 3), 240.0 + 230.0 * noise(k + 4)];
            }
            if inside(&u) && inside(&v) {
                a.push([(u[0] + 0.3 * noise(k + 5)) as f32, (u[1] + 0.3 * noise(k + 6)) as f32]);
                b.push([(v[0] + 0.3 * noise(k + 7)) as f32, (v[1] + 0.3 * noise(k + 8)) as f32]);
            }
        }
        let features = |points: Vec<[f32; 2]>| Features::new(SIZE.0, SIZE.1, points, vec![1.0; n], 1, vec![1.0; n]).unwrap();
        let similarity = |i: usize| 0.7 + 0.25 * noise(1_000_000 + i as u64) as f32 + if (i as f64) < share * n as f64 { 0.1 } else { 0.0 };
        let matches = (0..n).map(|i| Match { query: i, reference: i, similarity: similarity(i) }).collect();
        (features(a), features(b), matches)
    }

    fn run(p: &(Features, Features, Vec<Match>)) -> std::result::Result<Verification, Failure> {
        verify(&View::of(&p.0), &View::of(&p.1), &p.2, &VerifyConfig::default()).unwrap()
    }

    #[test]
    fn true_pairs_have_evidence_and_chance_has_none() {
        let step = Vector3::new(0.8, 0.1, 0.3);
        for seed in 0..10 {
            let good = pair(seed, 200, 0.4, 0.05, step, false);
            let v = run(&good).unwrap();
            let right = v.inliers.iter().filter(|i| good.0.points()[..80].contains(&i.0)).count();
            assert!(right >= 75 && v.inliers.len() <= 95, "{right} of {}", v.inliers.len());
            assert!(v.evidence > 15.0 && v.mean_error_px < 1.0 && v.coverage > 0.4 && v.degeneracy.is_none(), "{v:?}");
            assert_eq!(run(&good).unwrap(), v, "the same seed, the same answer");
            let chance = run(&pair(100 + seed, 200, 0.0, 0.05, step, false)).map_or(0.0, |v| v.evidence);
            assert!(chance < 1.0, "{chance}");
        }
    }

    #[test]
    fn the_order_of_the_matches_does_not_matter() {
        for seed in 0..5 {
            let p = pair(seed, 200, 0.4, 0.05, Vector3::new(0.8, 0.1, 0.3), false);
            let there = run(&p).unwrap().inliers;
            let mut back = run(&(p.0.clone(), p.1.clone(), p.2.iter().rev().copied().collect())).unwrap().inliers;
            back.reverse();
            assert_eq!(there, back);
        }
    }

    #[test]
    fn a_plane_and_a_turn_are_named() {
        let wall = run(&pair(1, 150, 0.8, 0.05, Vector3::new(0.8, 0.1, 0.3), true)).unwrap();
        let turn = run(&pair(2, 150, 0.8, 0.2, Vector3::zeros(), false)).unwrap();
        assert_eq!((wall.degeneracy, turn.degeneracy), (Some(Degeneracy::PlaneOrRotation), Some(Degeneracy::PlaneOrRotation)));
    }

    #[test]
    fn a_crowd_on_one_thing_counts_little() {
        let (a, b, matches) = pair(3, 120, 1.0, 0.05, Vector3::new(0.8, 0.1, 0.3), false);
        let spread = run(&(a.clone(), b.clone(), matches.clone())).unwrap();
        // The same points, drawn together in the query's corner and the reference's.
        let shrink = |f: &Features| {
            let points = f.points().iter().map(|p| [p[0] / 6.0, p[1] / 6.0]).collect();
            Features::new(SIZE.0, SIZE.1, points, vec![1.0; f.len()], 1, vec![1.0; f.len()]).unwrap()
        };
        let crowd = run(&(shrink(&a), shrink(&b), matches)).unwrap();
        assert!(crowd.evidence < spread.evidence / 4.0 && crowd.coverage < 0.1, "{} and {}", crowd.evidence, spread.evidence);
    }

    #[test]
    fn what_cannot_be_verified_has_a_name() {
        let p = pair(4, 30, 1.0, 0.05, Vector3::new(0.8, 0.1, 0.3), false);
        let said = |a: &Features, b: &Features, m: &[Match]| verify(&View::of(a), &View::of(b), m, &VerifyConfig::default()).unwrap().err();
        for few in [0, 1, 7] {
            assert_eq!(said(&p.0, &p.1, &p.2[..few]), Some(Failure::TooFewMatches));
        }
        let line = |slope: f32| {
            let points = (0..30).map(|i| [10.0 + 15.0 * i as f32, 50.0 + slope * i as f32]).collect();
            Features::new(SIZE.0, SIZE.1, points, vec![1.0; 30], 1, vec![1.0; 30]).unwrap()
        };
        for (a, b) in [(line(3.0), line(1.0)), (p.0.clone(), line(0.0)), (line(7.0), p.1.clone())] {
            assert_eq!(said(&a, &b, &p.2), Some(Failure::OnALine));
        }
    }

    const K: [f64; 9] = [500.0, 0.0, 320.0, 0.0, 500.0, 240.0, 0.0, 0.0, 1.0];

    fn calibration() -> Camera {
        Camera { width: SIZE.0, height: SIZE.1, k: K, d: Vec::new(), distortion_model: "plumb_bob".into() }
    }

    fn calibrated(p: &(Features, Features, Vec<Match>), camera: &Camera, method: Method) -> std::result::Result<Verification, Failure> {
        let view = |f| View { features: f, camera: Some(camera) };
        verify(&view(&p.0), &view(&p.1), &p.2, &VerifyConfig { method, ..VerifyConfig::default() }).unwrap()
    }

    fn turned(turn: f64) -> UnitQuaternion<f64> {
        UnitQuaternion::from_euler_angles(0.02, turn, 0.01)
    }

    #[test]
    fn with_calibration_the_pose_is_found_and_its_scale_is_not() {
        let step = Vector3::new(0.8, 0.1, 0.3);
        for seed in 0..10 {
            let p = pair(seed, 200, 0.4, 0.05, step, false);
            let v = calibrated(&p, &calibration(), Method::Auto).unwrap();
            let pose = v.pose.unwrap();
            assert_eq!((v.method, v.degeneracy, pose.scale_known), (Method::Essential, None, false));
            let (r, t) = (pose.reference_from_query.rotation, pose.reference_from_query.translation.vector);
            assert!(r.angle_to(&turned(0.05)).to_degrees() < 0.5 && t.angle(&step).to_degrees() < 5.0, "{seed}: {pose:?}");
            assert!((t.norm() - 1.0).abs() < 1e-9);
            assert_eq!(calibrated(&p, &calibration(), Method::Auto).unwrap(), v);
        }
    }

    #[test]
    fn what_leaves_the_pose_unsure_is_named() {
        let step = Vector3::new(0.8, 0.1, 0.3);
        let named = |p| calibrated(&p, &calibration(), Method::Essential).unwrap().degeneracy;
        assert_eq!(named(pair(1, 150, 0.8, 0.05, step, true)), Some(Degeneracy::Plane));
        assert_eq!(named(pair(2, 150, 0.8, 0.2, Vector3::zeros(), false)), Some(Degeneracy::PureRotation));
        assert_eq!(named(pair(3, 150, 0.8, 0.2, step, false)), None);
    }

    #[test]
    fn two_images_from_one_spot_agree() {
        let p = pair(7, 150, 1.0, 0.05, Vector3::new(0.8, 0.1, 0.3), false);
        let same = (p.0.clone(), p.0.clone(), p.2.clone());
        let v = run(&same).unwrap();
        assert_eq!((v.inliers.len(), v.degeneracy), (150, Some(Degeneracy::PlaneOrRotation)));
        let v = calibrated(&same, &calibration(), Method::Auto).unwrap();
        let pose = v.pose.unwrap();
        assert_eq!((v.inliers.len(), v.degeneracy), (150, Some(Degeneracy::PureRotation)));
        assert!(pose.reference_from_query.rotation.angle() < 1e-6 && !pose.scale_known && pose.covariance[(0, 0)] > 1e5, "{pose:?}");
        let deep = p.0.clone().with_depths(vec![8.0; 150]).unwrap();
        let v = calibrated(&(deep, p.0.clone(), p.2), &calibration(), Method::Auto).unwrap();
        let pose = v.pose.unwrap();
        assert!(pose.scale_known && pose.reference_from_query.translation.vector.norm() < 1e-3, "{pose:?}");
    }

    #[test]
    fn depth_of_either_image_gives_metres() {
        let step = Vector3::new(0.8, 0.1, 0.3);
        // Depths of the query's points, from where both rays meet.
        let p = pair(5, 200, 0.6, 0.05, step, false);
        let ray = |p: &[f32; 2]| Vector3::new((f64::from(p[0]) - 320.0) / 500.0, (f64::from(p[1]) - 240.0) / 500.0, 1.0);
        let depth = |q: &[f32; 2], r: &[f32; 2], back: bool| {
            let (a, b) = (turned(0.05) * ray(q), ray(r));
            // z_r b - z_q a = step
            let (aa, ab, bb) = (a.dot(&a), a.dot(&b), b.dot(&b));
            let det = aa * bb - ab * ab;
            let (zq, zr) = ((ab * step.dot(&b) - bb * step.dot(&a)) / det, (aa * step.dot(&b) - ab * step.dot(&a)) / det);
            if back {
                zr as f32
            } else {
                zq as f32
            }
        };
        let depths = |back| p.0.points().iter().zip(p.1.points()).map(|(q, r)| depth(q, r, back)).collect::<Vec<f32>>();
        let none = vec![0.0; 200];
        for (q, r) in [(depths(false), none.clone()), (none.clone(), depths(true))] {
            let with = (p.0.clone().with_depths(q).unwrap(), p.1.clone().with_depths(r).unwrap(), p.2.clone());
            let v = calibrated(&with, &calibration(), Method::Auto).unwrap();
            let pose = v.pose.unwrap();
            assert!(v.method == Method::Pnp && pose.scale_known);
            let miss = (pose.reference_from_query.translation.vector - step).norm();
            assert!(miss < 0.1, "{miss}");
        }
        let nothing = (p.0.clone().with_depths(none.clone()).unwrap(), p.1.clone().with_depths(none).unwrap(), p.2.clone());
        assert_eq!(calibrated(&nothing, &calibration(), Method::Pnp).unwrap_err(), Failure::NoDepth, "depth full of zeros");
        assert!(!calibrated(&nothing, &calibration(), Method::Auto).unwrap().pose.unwrap().scale_known);
    }

    #[test]
    fn calibration_that_is_none_is_named_or_done_without() {
        let p = pair(6, 150, 0.8, 0.05, Vector3::new(0.8, 0.1, 0.3), false);
        let zeros = Camera { k: [0.0; 9], ..calibration() };
        let other = Camera { width: 480, ..calibration() };
        assert_eq!(calibrated(&p, &zeros, Method::Essential).unwrap_err(), Failure::BadCalibration);
        assert_eq!(calibrated(&p, &zeros, Method::Auto).unwrap().method, Method::Fundamental);
        assert_eq!(calibrated(&p, &other, Method::Auto).unwrap_err(), Failure::BadCalibration);
        let config = VerifyConfig { method: Method::Pnp, ..VerifyConfig::default() };
        assert_eq!(verify(&View::of(&p.0), &View::of(&p.1), &p.2, &config).unwrap().unwrap_err(), Failure::NoCalibration);
    }

    #[test]
    fn a_homography_as_setting() {
        let config = VerifyConfig { method: Method::Homography, ..VerifyConfig::default() };
        let of = |p: &(Features, Features, Vec<Match>)| verify(&View::of(&p.0), &View::of(&p.1), &p.2, &config).unwrap();
        let wall = of(&pair(1, 150, 0.8, 0.05, Vector3::new(0.8, 0.1, 0.3), true)).unwrap();
        assert!(wall.method == Method::Homography && wall.inliers.len() >= 110 && wall.evidence > 50.0, "{wall:?}");
    }

    #[test]
    fn no_keypoints_and_one() {
        let empty = Features::new(640, 480, vec![], vec![], 4, vec![]).unwrap();
        let one = Features::new(640, 480, vec![[3.0, 4.0]], vec![1.0], 4, vec![1.0; 4]).unwrap();
        let config = VerifyConfig::default();
        assert_eq!(verify(&View::of(&empty), &View::of(&one), &[], &config).unwrap().unwrap_err(), Failure::NoKeypoints);
        let m = [Match { query: 0, reference: 0, similarity: 1.0 }];
        assert_eq!(verify(&View::of(&one), &View::of(&one), &m, &config).unwrap().unwrap_err(), Failure::TooFewMatches);
    }

    #[test]
    fn evidence_by_hand() {
        // 10 of 10: -log10(3 * 1 * C(10,7) * 0.01^3) = -log10(3 * 120 * 1e-6).
        assert!((evidence(10, 10, 0.01) - 3.4437).abs() < 1e-4);
        assert!(evidence(100, 20, 0.01) > evidence(200, 20, 0.01));
        assert!(evidence(100, 21, 0.01) > evidence(100, 20, 0.01));
        assert_eq!(evidence(100, 7, 0.01), 0.0);
        assert!(evidence(1000, 12, 0.01) < 0.0);
    }
}
