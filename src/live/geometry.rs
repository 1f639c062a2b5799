//! What the geometry of a pair says, in the terms of the robot: poses of its base, not of its cameras.

use crate::geometry::{transformed_covariance, Failure, Method, Verification};
use nalgebra::{Isometry3, Matrix6};

/// The account of one verified pair, agreeing or not.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Checked {
    /// The model that was found, or was sought.
    pub method: Method,
    /// Why the images do not agree; `None`: they do.
    pub failure: Option<Failure>,
    /// Whether the geometry is believed.
    pub success: bool,
    /// Keypoints of query and match.
    pub keypoints: [usize; 2],
    /// Matches that were tried.
    pub matches: usize,
    /// Matches that agree.
    pub inliers: usize,
    /// Share of the query's image that they cover.
    pub coverage: f64,
    /// Mean distance from the model, pixels.
    pub mean_error_px: f64,
    /// Whether the translation is in metres.
    pub scale_known: bool,
    /// `T_match_query` of the robot's base and its covariance (x y z rx ry rz); of length 1 without scale.
    pub pose: Option<(Isometry3<f64>, Matrix6<f64>)>,
    /// Of the random numbers.
    pub seed: u64,
}

/// A pair's result; `base_from` are `T_base_optical` of the query's camera and of the match's.
pub fn checked(
    result: &std::result::Result<Verification, Failure>,
    success: bool,
    sought: Method,
    keypoints: [usize; 2],
    base_from: [Isometry3<f64>; 2],
    seed: u64,
) -> Checked {
    let [query, matched] = base_from;
    let none = Checked {
        method: sought,
        failure: None,
        success: false,
        keypoints,
        matches: 0,
        inliers: 0,
        coverage: 0.0,
        mean_error_px: 0.0,
        scale_known: false,
        pose: None,
        seed,
    };
    match result {
        Err(failure) => Checked { failure: Some(*failure), ..none },
        Ok(v) => Checked {
            method: v.method,
            success,
            matches: v.matches,
            inliers: v.inliers.len(),
            coverage: v.coverage,
            mean_error_px: v.mean_error_px,
            scale_known: v.pose.is_some_and(|p| p.scale_known),
            pose: v.pose.map(|p| {
                // Without scale the levers from base to camera cannot be added: only directions are turned.
                let turn = |camera: Isometry3<f64>| {
                    let levers = if p.scale_known { camera.translation } else { nalgebra::Translation3::identity() };
                    Isometry3::from_parts(levers, camera.rotation)
                };
                let (left, right) = (turn(matched), turn(query.inverse()));
                let covariance = transformed_covariance(&left, &p.covariance, &p.reference_from_query, &right);
                (left * p.reference_from_query * right, covariance)
            }),
            ..none
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::RelativePose;
    use nalgebra::Vector3;

    fn verification(pose: Isometry3<f64>, scale_known: bool) -> Verification {
        Verification {
            method: Method::Essential,
            matches: 90,
            inliers: vec![([1.0, 2.0], [3.0, 4.0]); 60],
            sizes: [(640, 480); 2],
            inlier_ratio: 2.0 / 3.0,
            coverage: 0.5,
            zoom: 1.0,
            spread: 0.01,
            mean_error_px: 0.5,
            evidence: 30.0,
            degeneracy: None,
            pose: Some(RelativePose { reference_from_query: pose, covariance: Matrix6::identity(), scale_known }),
        }
    }

    #[test]
    fn a_step_ahead_of_the_camera_is_a_step_ahead_of_the_robot() {
        let camera = crate::config::InputConfig::default().camera_pose(0).unwrap();
        // The query was taken two metres further ahead: in the match's optical frame its z is 2.
        let ahead = Isometry3::translation(0.0, 0.0, 2.0);
        let of = |levers: [Isometry3<f64>; 2], scale| {
            checked(&Ok(verification(ahead, scale)), true, Method::Auto, [9, 9], levers, 1).pose.unwrap().0
        };
        let near = |p: Isometry3<f64>, t: [f64; 3]| assert!((p.translation.vector - Vector3::from(t)).norm() < 1e-9, "{p}");
        near(of([camera, camera], true), [2.0, 0.0, 0.0]);
        // A camera one metre before the base, the other at it.
        let before = Isometry3::translation(1.0, 0.0, 0.0) * camera;
        near(of([before, camera], true), [1.0, 0.0, 0.0]);
        near(of([before, before], true), [2.0, 0.0, 0.0]);
        // Without scale only the direction is told.
        near(of([before, camera], false), [2.0, 0.0, 0.0]);
    }

    #[test]
    fn what_failed_says_why_and_has_no_pose() {
        let c = checked(&Err(Failure::NoDepth), false, Method::Pnp, [5, 0], [Isometry3::identity(); 2], 7);
        assert_eq!((c.failure, c.success, c.pose, c.scale_known, c.seed), (Some(Failure::NoDepth), false, None, false, 7));
    }
}
