//! Relative poses: refined on all inliers, with a covariance from their Jacobian.
//!
//! A pose here is `T_reference_query` of the two cameras' optical frames (x right, y down, z ahead).

use nalgebra::{DMatrix, DVector, Isometry3, Matrix3, Matrix6, Rotation3, Translation3, UnitQuaternion, Vector3};

/// Pose of the query's camera in the reference's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RelativePose {
    /// `T_reference_query`; the translation has length 1 unless `scale_known`, or 0 where
    /// nothing is known of it.
    pub reference_from_query: Isometry3<f64>,
    /// Of x y z rx ry rz, turns about the reference's axes; metres (or shares of the unknown length) and radians.
    pub covariance: Matrix6<f64>,
    /// Whether the translation is in metres.
    pub scale_known: bool,
}

impl RelativePose {
    /// A turn on the spot, known to `sigma` radians; of the way nothing is known.
    pub(super) fn turn(rotation: UnitQuaternion<f64>, sigma: f64) -> Self {
        let mut covariance = Matrix6::identity() * UNKNOWN;
        covariance.fixed_view_mut::<3, 3>(3, 3).copy_from(&(Matrix3::identity() * sigma * sigma));
        Self { reference_from_query: Isometry3::from_parts(Translation3::identity(), rotation), covariance, scale_known: false }
    }

    /// A first guess that could not be refined: nothing is promised of it.
    pub(super) fn unsure(guess: Isometry3<f64>) -> Self {
        Self { reference_from_query: guess, covariance: Matrix6::identity() * UNKNOWN, scale_known: false }
    }
}

/// Variance of what nothing was measured of: the length of a translation without scale.
const UNKNOWN: f64 = 1e6;
/// Residuals well beyond this many pixels hardly count (Cauchy): matches of repeated facades lie near the right epipolar
/// line by chance, and all over the threshold's width.
const CAUCHY_PX: f64 = 0.5;
/// Pixels that points are off at least: what a perfect fit is not believed to be better than.
const LEAST_SIGMA_PX: f64 = 0.25;

/// Levenberg and Marquardt over `parameters` numbers. `step` moves the state; `residuals` are pixels. Returns the state and
/// the covariance of its parameters, or `None` where they are not determined.
fn fit<S: Clone>(
    mut state: S,
    parameters: usize,
    step: impl Fn(&S, &DVector<f64>) -> S,
    residuals: impl Fn(&S) -> DVector<f64>,
) -> Option<(S, DMatrix<f64>)> {
    const DELTA: f64 = 1e-6;
    let weight = |r: f64| 1.0 / (1.0 + (r / CAUCHY_PX).powi(2));
    let cost = |r: &DVector<f64>| r.iter().map(|r| CAUCHY_PX * CAUCHY_PX * (r / CAUCHY_PX).powi(2).ln_1p()).sum::<f64>();
    let normal = |state: &S, r: &DVector<f64>| {
        let mut jacobian = DMatrix::zeros(r.len(), parameters);
        for p in 0..parameters {
            let moved = |by: f64| {
                let mut d = DVector::zeros(parameters);
                d[p] = by;
                residuals(&step(state, &d))
            };
            jacobian.set_column(p, &((moved(DELTA) - moved(-DELTA)) / (2.0 * DELTA)));
        }
        let weights = DVector::from_iterator(r.len(), r.iter().map(|r| weight(*r)));
        let mut weighted = jacobian.clone();
        for (mut row, w) in weighted.row_iter_mut().zip(weights.iter()) {
            row *= *w;
        }
        (weighted.transpose() * &jacobian, weighted.transpose() * r)
    };
    let mut r = residuals(&state);
    let mut damping = 1e-3;
    for _ in 0..20 {
        let (h, g) = normal(&state, &r);
        let mut damped = h.clone();
        for i in 0..parameters {
            damped[(i, i)] += damping * h[(i, i)].max(1e-9);
        }
        let Some(delta) = damped.lu().solve(&(-g)) else { break };
        let next = step(&state, &delta);
        let after = residuals(&next);
        if cost(&after) < cost(&r) {
            (state, r) = (next, after);
            damping = (damping * 0.2).max(1e-12);
            if delta.norm() < 1e-9 {
                break;
            }
        } else {
            damping *= 10.0;
            if damping > 1e6 {
                break;
            }
        }
    }
    let (h, _) = normal(&state, &r);
    let freedom = (r.len() as f64 - parameters as f64).max(1.0);
    let variance = (cost(&r) / freedom).max(LEAST_SIGMA_PX * LEAST_SIGMA_PX);
    let covariance = h.try_inverse()? * variance;
    let sound = covariance.iter().all(|v| v.is_finite()) && (0..parameters).all(|i| covariance[(i, i)] >= 0.0);
    sound.then_some((state, covariance))
}

fn rotate(rotation: &Rotation3<f64>, by: Vector3<f64>) -> Rotation3<f64> {
    let mut turned = Rotation3::new(by) * rotation;
    turned.renormalize();
    turned
}

fn homogeneous(ray: [f64; 2]) -> Vector3<f64> {
    Vector3::new(ray[0], ray[1], 1.0)
}

fn isometry(rotation: &Rotation3<f64>, translation: Vector3<f64>) -> Isometry3<f64> {
    Isometry3::from_parts(Translation3::from(translation), UnitQuaternion::from_rotation_matrix(rotation))
}

/// Two unit vectors across `direction`.
fn across(direction: &Vector3<f64>) -> (Vector3<f64>, Vector3<f64>) {
    let axis = if direction.x.abs() < 0.8 { Vector3::x() } else { Vector3::y() };
    let a = direction.cross(&axis).normalize();
    (a, direction.cross(&a))
}

/// Sampson distance of a pair of rays from `E = [t] R`, in units of the rays.
fn sampson(e: &Matrix3<f64>, q: &Vector3<f64>, r: &Vector3<f64>) -> f64 {
    let (line, back) = (e * q, e.transpose() * r);
    r.dot(&line) / (line.x * line.x + line.y * line.y + back.x * back.x + back.y * back.y).sqrt().max(1e-12)
}

/// `[t] R`.
fn essential(pose: &Isometry3<f64>) -> Matrix3<f64> {
    let t = pose.translation.vector.normalize();
    t.cross_matrix() * pose.rotation.to_rotation_matrix().matrix()
}

/// Distance of each pair from its epipolar line, pixels.
pub fn epipolar_errors(pose: &Isometry3<f64>, query: &[[f64; 2]], reference: &[[f64; 2]], focal: f64) -> Vec<f64> {
    let e = essential(pose);
    query.iter().zip(reference).map(|(q, r)| (focal * sampson(&e, &homogeneous(*q), &homogeneous(*r))).abs()).collect()
}

/// Rotation and direction of translation that fit the rays of the inliers best, from a first guess. `focal` turns rays into
/// pixels. `None`: the rays do not determine them.
pub fn refine_direction(first: &Isometry3<f64>, query: &[[f64; 2]], reference: &[[f64; 2]], focal: f64) -> Option<RelativePose> {
    let pairs: Vec<_> = query.iter().zip(reference).map(|(q, r)| (homogeneous(*q), homogeneous(*r))).collect();
    let start = (first.rotation.to_rotation_matrix(), first.translation.vector.try_normalize(1e-12)?);
    let step = |(rotation, t): &(Rotation3<f64>, Vector3<f64>), d: &DVector<f64>| {
        let (a, b) = across(t);
        (rotate(rotation, Vector3::new(d[0], d[1], d[2])), (t + a * d[3] + b * d[4]).normalize())
    };
    let residuals = |(rotation, t): &(Rotation3<f64>, Vector3<f64>)| {
        let e = t.cross_matrix() * rotation.matrix();
        DVector::from_iterator(pairs.len(), pairs.iter().map(|(q, r)| focal * sampson(&e, q, r)))
    };
    let ((rotation, t), c) = fit(start, 5, step, residuals)?;
    let (a, b) = across(&t);
    let mut covariance = Matrix6::zeros();
    // From (rx ry rz, along a, along b) to (x y z rx ry rz).
    let basis = DMatrix::from_fn(6, 5, |i, j| match (i, j) {
        (0..3, 3) => a[i],
        (0..3, 4) => b[i],
        (3.., 0..3) if i - 3 == j => 1.0,
        _ => 0.0,
    });
    covariance.copy_from(&(&basis * c * basis.transpose()));
    let along = t * t.transpose() * UNKNOWN;
    let mut corner = covariance.fixed_view_mut::<3, 3>(0, 0);
    corner += along;
    Some(RelativePose { reference_from_query: isometry(&rotation, t), covariance, scale_known: false })
}

/// Pixels by which each point, given in one camera, misses its ray in the other.
pub fn reprojection_errors(pose: &Isometry3<f64>, points: &[[f64; 3]], rays: &[[f64; 2]], focal: f64) -> Vec<f64> {
    let miss = |(p, ray): (&[f64; 3], &[f64; 2])| {
        let p = pose * nalgebra::Point3::from(*p);
        if p.z > 1e-6 {
            focal * (p.x / p.z - ray[0]).hypot(p.y / p.z - ray[1])
        } else {
            f64::INFINITY
        }
    };
    points.iter().zip(rays).map(miss).collect()
}

/// The pose that brings `points` (metres, in one camera) onto `rays` of the other. `None`: they do not determine it.
pub fn refine_metric(first: &Isometry3<f64>, points: &[[f64; 3]], rays: &[[f64; 2]], focal: f64) -> Option<(Isometry3<f64>, Matrix6<f64>)> {
    let start = (first.rotation.to_rotation_matrix(), first.translation.vector);
    let step = |(rotation, t): &(Rotation3<f64>, Vector3<f64>), d: &DVector<f64>| {
        (rotate(rotation, Vector3::new(d[3], d[4], d[5])), t + Vector3::new(d[0], d[1], d[2]))
    };
    let residuals = |(rotation, t): &(Rotation3<f64>, Vector3<f64>)| {
        let miss = points.iter().zip(rays).flat_map(|(p, ray)| {
            let p = rotation * Vector3::from(*p) + t;
            let z = p.z.max(1e-3);
            [focal * (p.x / z - ray[0]), focal * (p.y / z - ray[1])]
        });
        DVector::from_iterator(2 * points.len(), miss)
    };
    let ((rotation, t), c) = fit(start, 6, step, residuals)?;
    let mut covariance = Matrix6::zeros();
    covariance.copy_from(&c);
    Some((isometry(&rotation, t), covariance))
}

/// Covariance of the inverse of a pose, turns about the fixed axes of each pose's parent.
pub fn inverse_covariance(pose: &Isometry3<f64>, covariance: &Matrix6<f64>) -> Matrix6<f64> {
    // inverse: t' = -R^T t; with R <- exp(w) R, t <- t + d: dt' = -R^T (d - w x t), w' = -R^T w.
    let back = pose.rotation.inverse().to_rotation_matrix();
    let mut jacobian = Matrix6::zeros();
    jacobian.fixed_view_mut::<3, 3>(0, 0).copy_from(&-back.matrix());
    jacobian.fixed_view_mut::<3, 3>(0, 3).copy_from(&(-(back.matrix() * pose.translation.vector.cross_matrix())));
    jacobian.fixed_view_mut::<3, 3>(3, 3).copy_from(&-back.matrix());
    jacobian * covariance * jacobian.transpose()
}

/// Covariance of `left * pose * right` where both are exact.
pub fn transformed_covariance(
    left: &Isometry3<f64>,
    covariance: &Matrix6<f64>,
    pose: &Isometry3<f64>,
    right: &Isometry3<f64>,
) -> Matrix6<f64> {
    // t' = L (R r + t) + l: dt' = L d - L [R r] w about the parent's axes, w' = L w.
    let turn = left.rotation.to_rotation_matrix();
    let lever = pose.rotation * right.translation.vector;
    let mut jacobian = Matrix6::zeros();
    jacobian.fixed_view_mut::<3, 3>(0, 0).copy_from(turn.matrix());
    jacobian.fixed_view_mut::<3, 3>(0, 3).copy_from(&(-(turn.matrix() * lever.cross_matrix())));
    jacobian.fixed_view_mut::<3, 3>(3, 3).copy_from(turn.matrix());
    jacobian * covariance * jacobian.transpose()
}

/// Median angle by which the rays of the pairs differ once the rotation is undone, radians.
pub fn parallax(rotation: &UnitQuaternion<f64>, query: &[[f64; 2]], reference: &[[f64; 2]]) -> f64 {
    let mut angles: Vec<f64> = query.iter().zip(reference).map(|(q, r)| (rotation * homogeneous(*q)).angle(&homogeneous(*r))).collect();
    angles.sort_by(f64::total_cmp);
    angles.get(angles.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOCAL: f64 = 500.0;

    /// Points before the query camera, and their rays in both.
    type Scene = (Vec<[f64; 3]>, Vec<[f64; 2]>, Vec<[f64; 2]>);

    /// With noise in pixels.
    fn scene(seed: u64, pose: &Isometry3<f64>, noise_px: f64) -> Scene {
        let noise = |k: usize| f64::from(crate::test_noise(seed, k as u64)) / 1.8;
        let mut out = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..150 {
            let p = [5.0 * noise(7 * i), 3.0 * noise(7 * i + 1), 9.0 + 5.0 * noise(7 * i + 2)];
            let r = pose * nalgebra::Point3::from(p);
            let off = |k: usize| noise_px * noise(7 * i + k) / FOCAL;
            out.0.push(p);
            out.1.push([p[0] / p[2] + off(3), p[1] / p[2] + off(4)]);
            out.2.push([r.x / r.z + off(5), r.y / r.z + off(6)]);
        }
        out
    }

    fn pose(t: [f64; 3], r: [f64; 3]) -> Isometry3<f64> {
        Isometry3::new(Vector3::from(t), Vector3::from(r))
    }

    #[test]
    fn a_rough_guess_becomes_the_pose_and_the_covariance_says_how_well() {
        let truth = pose([0.8, 0.1, 0.4], [0.02, 0.15, -0.03]);
        let mut spread: Vec<(f64, f64)> = Vec::new();
        for seed in 0..20 {
            let (points, q, r) = scene(seed, &truth, 1.0);
            let guess = pose([0.7, 0.2, 0.5], [0.0, 0.13, 0.0]);
            let found = refine_direction(&guess, &q, &r, FOCAL).unwrap();
            let turned = found.reference_from_query.rotation.angle_to(&truth.rotation);
            let off = found.reference_from_query.translation.vector.angle(&truth.translation.vector);
            assert!(turned.to_degrees() < 0.6 && off.to_degrees() < 3.0, "{} {}", turned.to_degrees(), off.to_degrees());
            assert!(!found.scale_known && found.covariance.trace() > UNKNOWN / 2.0);
            let (metric, c) = refine_metric(&guess, &points, &r, FOCAL).unwrap();
            let miss = (metric.translation.vector - truth.translation.vector).norm();
            assert!(miss < 0.03, "{miss}");
            spread.push((miss * miss, c[(0, 0)] + c[(1, 1)] + c[(2, 2)]));
        }
        // Over many scenes the squared error is what the covariance said, within a factor.
        let mean = |f: &dyn Fn(&(f64, f64)) -> f64| spread.iter().map(f).sum::<f64>() / spread.len() as f64;
        let ratio = mean(&|s| s.0) / mean(&|s| s.1);
        assert!((0.2..3.0).contains(&ratio), "{ratio}");
    }

    #[test]
    fn covariances_follow_a_pose_through_inversion_and_frames() {
        let t = pose([1.0, -2.0, 0.5], [0.3, -0.2, 0.4]);
        let (left, right) = (pose([0.4, 0.1, -0.3], [-0.5, 0.2, 0.1]), pose([-0.2, 0.7, 0.3], [0.1, 0.6, -0.4]));
        let c = Matrix6::from_fn(|i, j| if i == j { 1e-8 * (1.0 + i as f64) } else { 2e-9 / (1.0 + (i + j) as f64) });
        // The same by finite differences.
        let numeric = |f: &dyn Fn(&Isometry3<f64>) -> Isometry3<f64>| {
            let base = f(&t);
            let mut j = Matrix6::zeros();
            for k in 0..6 {
                let h = 1e-6;
                let mut w = Vector3::zeros();
                let mut moved = t;
                if k < 3 {
                    moved.translation.vector[k] += h;
                } else {
                    w[k - 3] = h;
                    moved.rotation = UnitQuaternion::new(w) * t.rotation;
                }
                let out = f(&moved);
                let dt = (out.translation.vector - base.translation.vector) / h;
                let dw = (out.rotation * base.rotation.inverse()).scaled_axis() / h;
                j.fixed_view_mut::<3, 1>(0, k).copy_from(&dt);
                j.fixed_view_mut::<3, 1>(3, k).copy_from(&dw);
            }
            j * c * j.transpose()
        };
        let near = |a: Matrix6<f64>, b: Matrix6<f64>| (a - b).abs().max() < 3e-12;
        assert!(near(inverse_covariance(&t, &c), numeric(&|t| t.inverse())));
        assert!(near(transformed_covariance(&left, &c, &t, &right), numeric(&|t| left * t * right)));
    }

    #[test]
    fn parallax_is_what_is_left_after_the_turn() {
        let turn = pose([0.0; 3], [0.0, 0.2, 0.0]);
        let (_, q, r) = scene(1, &turn, 0.0);
        assert!(parallax(&turn.rotation, &q, &r) < 1e-9);
        let (_, q, r) = scene(1, &pose([1.0, 0.0, 0.0], [0.0, 0.2, 0.0]), 0.0);
        assert!(parallax(&turn.rotation, &q, &r) > 0.05);
        assert_eq!(parallax(&turn.rotation, &[], &[]), 0.0);
    }
}
