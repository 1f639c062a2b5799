//! Odometry between its messages: the pose at an image's stamp.

use nalgebra::Isometry3;

/// Poses over time, `T_odom_base`.
#[derive(Clone, Debug, Default)]
pub struct Track(Vec<(i64, Isometry3<f64>)>);

/// Odometry further away in time than this is not used.
pub const ODOMETRY_SLACK_NS: i64 = 500_000_000;

impl Track {
    /// From poses with their stamps, in any order.
    pub fn new(mut poses: Vec<(i64, Isometry3<f64>)>) -> Self {
        poses.sort_by_key(|(t, _)| *t);
        Self(poses)
    }

    /// Adds a pose as it comes. A stamp further back than the slack begins anew: the clock was set.
    /// Of poses older than `keep_ns` before it, one is kept.
    pub fn push(&mut self, stamp_ns: i64, pose: Isometry3<f64>, keep_ns: i64) {
        if self.0.last().is_some_and(|(t, _)| stamp_ns.saturating_add(ODOMETRY_SLACK_NS) < *t) {
            self.0.clear();
        }
        let at = self.0.partition_point(|(t, _)| *t <= stamp_ns);
        self.0.insert(at, (stamp_ns, pose));
        let old = self.0.partition_point(|(t, _)| *t < stamp_ns.saturating_sub(keep_ns));
        // Removing from the front moves all that stays: so, many at a time.
        if old > 64 {
            self.0.drain(..old - 1);
        }
    }

    /// Whether a pose at or after `stamp_ns` is known, so that [`Self::at`] will not change its answer.
    pub fn reaches(&self, stamp_ns: i64) -> bool {
        self.0.last().is_some_and(|(t, _)| *t >= stamp_ns)
    }

    /// Whether there is no pose.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The pose at `stamp_ns`, interpolated; `None` outside the track.
    pub fn at(&self, stamp_ns: i64) -> Option<Isometry3<f64>> {
        let after = self.0.partition_point(|(t, _)| *t < stamp_ns);
        let near = |i: usize| self.0.get(i).filter(|(t, _)| t.abs_diff(stamp_ns) <= ODOMETRY_SLACK_NS as u64);
        match (after.checked_sub(1).and_then(near), near(after)) {
            (Some((ta, a)), Some((tb, b))) if tb > ta => {
                let t = (stamp_ns - ta) as f64 / (tb - ta) as f64;
                // Opposite rotations have no shortest way between them; the nearer pose serves.
                Some(a.try_lerp_slerp(b, t, 1e-9).unwrap_or(if t < 0.5 { *a } else { *b }))
            }
            (Some((_, p)), _) | (None, Some((_, p))) => Some(*p),
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const S: i64 = 1_000_000_000;

    fn pose(x: f64) -> Isometry3<f64> {
        Isometry3::translation(x, 0.0, 0.0)
    }

    #[test]
    fn poses_are_interpolated_and_not_guessed_far_from_any() {
        let t = Track::new(vec![(2 * S, pose(2.0)), (S, pose(1.0)), (10 * S, pose(10.0))]);
        let x = |s: f64| t.at((s * 1e9) as i64).map(|p| p.translation.x);
        assert_eq!((x(1.0), x(1.5), x(2.4), x(2.6), x(0.6), x(0.4)), (Some(1.0), Some(1.5), Some(2.0), None, Some(1.0), None));
        assert!(t.reaches(10 * S) && !t.reaches(10 * S + 1));
    }

    #[test]
    fn a_clock_set_back_begins_anew_and_a_late_message_is_sorted_in() {
        let mut t = Track::default();
        for s in [1, 2, 3] {
            t.push(s * S, pose(s as f64), 60 * S);
        }
        t.push(3 * S - S / 4, pose(2.75), 60 * S);
        assert_eq!(t.at(3 * S - S / 4).unwrap().translation.x, 2.75);
        t.push(S, pose(100.0), 60 * S);
        assert_eq!((t.at(S).unwrap().translation.x, t.at(3 * S)), (100.0, None));
    }

    proptest! {
        /// Live, a pose that is reached is the same as offline, however much was forgotten since.
        #[test]
        fn live_equals_offline(steps in proptest::collection::vec(1i64..400_000_000, 2..400), back in 0i64..4_000_000_000) {
            let (mut live, mut all, mut t) = (Track::default(), Vec::new(), 0);
            for (i, dt) in steps.iter().enumerate() {
                t += dt;
                all.push((t, pose(i as f64)));
                live.push(t, pose(i as f64), 5_000_000_000);
            }
            let asked = (t - back).max(0);
            prop_assert!(live.reaches(asked));
            prop_assert_eq!(live.at(asked), Track::new(all).at(asked));
            prop_assert!(live.0.len() <= 5_000 && live.0.len() < 70 + live.0.iter().filter(|(s, _)| *s >= t - 5_000_000_000).count());
        }
    }
}
