//! Two images of one place: the fundamental matrix that their matches agree on, and how surprising that is.

use super::Match;
use crate::error::Result;
use crate::features::Features;
use opencv::calib3d::{self, UsacParams};
use opencv::core::{Mat, MatTraitConst, MatTraitConstManual, Point2f, Vector};

/// Settings of a verification.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct VerifyConfig {
    /// Largest distance of a point from its epipolar line, pixels (Sampson).
    pub threshold_px: f64,
    /// Iterations of the robust estimation at most.
    pub max_iterations: i32,
    /// Of its random numbers: the same seed gives the same bytes.
    pub seed: u64,
}

impl Default for VerifyConfig {
    fn default() -> Self {
        Self { threshold_px: 2.0, max_iterations: 2000, seed: 1 }
    }
}

/// Why there is no verification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Fewer matches than a fundamental matrix needs.
    TooFewMatches,
    /// All matched points of one image lie on a line, or in one spot.
    OnALine,
    /// No model was found.
    NoModel,
}

impl Failure {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::TooFewMatches => "TOO_FEW_MATCHES",
            Self::OnALine => "ON_A_LINE",
            Self::NoModel => "NO_MODEL",
        }
    }
}

/// What makes a relative pose unsure although the images agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Degeneracy {
    /// A homography explains the inliers as well: a plane, or a camera that only turned.
    PlaneOrRotation,
}

/// What the matches agree on.
#[derive(Clone, Debug, PartialEq)]
pub struct Verification {
    /// Row-major F with `p_reference^T F p_query = 0`, pixels.
    pub fundamental: [f64; 9],
    /// Positions in the list of matches.
    pub inliers: Vec<usize>,
    /// Inliers by matches.
    pub inlier_ratio: f64,
    /// Share of the cells of an 8 x 6 grid over the query that hold an inlier.
    pub coverage: f64,
    /// How much larger things are in the reference than in the query, by the distances between inliers: 1 at the
    /// same distance, more when the reference was taken further ahead.
    pub zoom: f64,
    /// Mean Sampson distance of the inliers, pixels.
    pub mean_error_px: f64,
    /// Decades by which so many inliers are less likely than one accident; see [`evidence`].
    pub evidence: f64,
    /// What makes a pose unsure.
    pub degeneracy: Option<Degeneracy>,
}

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
/// A homography that explains this share of the inliers explains them.
const EXPLAINED: f64 = 0.9;

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

/// Finds what `matches` agree on with MAGSAC++ (OpenCV), and weighs it.
///
/// Errors: OpenCV refuses; that the images do not agree is a [`Failure`], not an error.
pub fn verify(
    query: &Features,
    reference: &Features,
    matches: &[Match],
    config: &VerifyConfig,
) -> Result<std::result::Result<Verification, Failure>> {
    if matches.len() < FEWEST {
        return Ok(Err(Failure::TooFewMatches));
    }
    let wide = |p: [f32; 2]| [f64::from(p[0]), f64::from(p[1])];
    let q: Vec<[f64; 2]> = matches.iter().map(|m| wide(query.points()[m.query])).collect();
    let r: Vec<[f64; 2]> = matches.iter().map(|m| wide(reference.points()[m.reference])).collect();
    if on_a_line(&q) || on_a_line(&r) {
        return Ok(Err(Failure::OnALine));
    }
    let Some(fundamental) = estimate(&q, &r, config)? else { return Ok(Err(Failure::NoModel)) };
    let errors: Vec<f64> = q.iter().zip(&r).map(|(q, r)| sampson(&fundamental, *q, *r)).collect();
    let inliers: Vec<usize> = (0..matches.len()).filter(|i| errors[*i] <= config.threshold_px).collect();
    if inliers.len() < FEWEST {
        return Ok(Err(Failure::NoModel));
    }
    let mut cells = [0usize; GRID.0 * GRID.1];
    inliers.iter().for_each(|i| cells[cell(q[*i], query.size())] += 1);
    let counted: usize = cells.iter().map(|n| (*n).min(CROWD)).sum();
    // Inliers of a crowd are taken out of the matches too: they are neither for nor against.
    let of = matches.len() - (inliers.len() - counted);
    let (w, h) = (f64::from(reference.size().0), f64::from(reference.size().1));
    // The band around an epipolar line, at its longest, by the image.
    let chance = 2.0 * config.threshold_px * w.hypot(h) / (w * h);
    let explained = by_homography(&q, &r, &inliers, config)?;
    Ok(Ok(Verification {
        fundamental,
        inlier_ratio: inliers.len() as f64 / matches.len() as f64,
        coverage: cells.iter().filter(|n| **n > 0).count() as f64 / cells.len() as f64,
        zoom: zoom(&q, &r, &inliers, query.size(), reference.size()),
        mean_error_px: inliers.iter().map(|i| errors[*i]).sum::<f64>() / inliers.len() as f64,
        evidence: evidence(of, counted, chance),
        degeneracy: (explained as f64 >= EXPLAINED * inliers.len() as f64).then_some(Degeneracy::PlaneOrRotation),
        inliers,
    }))
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

fn points(of: impl Iterator<Item = [f64; 2]>) -> Vector<Point2f> {
    of.map(|p| Point2f::new(p[0] as f32, p[1] as f32)).collect()
}

fn nine(m: &Mat) -> Result<Option<[f64; 9]>> {
    if m.rows() < 3 || m.cols() != 3 {
        return Ok(None);
    }
    let values = m.data_typed::<f64>()?;
    Ok(values.get(..9).and_then(|v| <[f64; 9]>::try_from(v).ok()).filter(|v| v.iter().all(|x| x.is_finite())))
}

fn estimate(q: &[[f64; 2]], r: &[[f64; 2]], config: &VerifyConfig) -> Result<Option<[f64; 9]>> {
    let (q, r) = (points(q.iter().copied()), points(r.iter().copied()));
    let mut mask = Mat::default();
    nine(&calib3d::find_fundamental_mat_2(&q, &r, &mut mask, params(config)?)?)
}

/// Number of inliers that one homography explains.
fn by_homography(q: &[[f64; 2]], r: &[[f64; 2]], inliers: &[usize], config: &VerifyConfig) -> Result<usize> {
    let (from, to) = (points(inliers.iter().map(|i| q[*i])), points(inliers.iter().map(|i| r[*i])));
    let mut mask = Mat::default();
    let Some(h) = nine(&calib3d::find_homography_1(&from, &to, &mut mask, params(config)?)?)? else { return Ok(0) };
    let fits = |i: &&usize| {
        let (p, want) = (q[**i], r[**i]);
        let [x, y, z] = [0, 3, 6].map(|k| h[k] * p[0] + h[k + 1] * p[1] + h[k + 2]);
        (x / z - want[0]).hypot(y / z - want[1]) <= config.threshold_px
    };
    Ok(inliers.iter().filter(fits).count())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nalgebra::{Rotation3, Vector3};

    const SIZE: (u32, u32) = (640, 480);

    /// Points of a scene seen from two places, `share` of the matches right, the others anywhere.
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
        let matches = (0..n).map(|i| Match { query: i, reference: i, similarity: 1.0 }).collect();
        (features(a), features(b), matches)
    }

    fn run(p: &(Features, Features, Vec<Match>)) -> std::result::Result<Verification, Failure> {
        verify(&p.0, &p.1, &p.2, &VerifyConfig::default()).unwrap()
    }

    #[test]
    fn true_pairs_have_evidence_and_chance_has_none() {
        let step = Vector3::new(0.8, 0.1, 0.3);
        for seed in 0..10 {
            let good = pair(seed, 200, 0.4, 0.05, step, false);
            let v = run(&good).unwrap();
            let right = v.inliers.iter().filter(|i| **i < 80).count();
            assert!(right >= 75 && v.inliers.len() <= 95, "{right} of {}", v.inliers.len());
            assert!(v.evidence > 15.0 && v.mean_error_px < 1.0 && v.coverage > 0.4 && v.degeneracy.is_none(), "{v:?}");
            assert_eq!(run(&good).unwrap(), v, "the same seed, the same answer");
            let chance = run(&pair(100 + seed, 200, 0.0, 0.05, step, false)).map_or(0.0, |v| v.evidence);
            assert!(chance < 1.0, "{chance}");
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
        let said = |m: &[Match]| verify(&p.0, &p.1, m, &VerifyConfig::default()).unwrap().err();
        for few in [0, 1, 7] {
            assert_eq!(said(&p.2[..few]), Some(Failure::TooFewMatches));
        }
        let line = |slope: f32| {
            let points = (0..30).map(|i| [10.0 + 15.0 * i as f32, 50.0 + slope * i as f32]).collect();
            Features::new(SIZE.0, SIZE.1, points, vec![1.0; 30], 1, vec![1.0; 30]).unwrap()
        };
        for (a, b) in [(line(3.0), line(1.0)), (p.0.clone(), line(0.0)), (line(7.0), p.1.clone())] {
            assert_eq!(verify(&a, &b, &p.2, &VerifyConfig::default()).unwrap().err(), Some(Failure::OnALine));
        }
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
