//! Scores of a whole run: which loops were there, which were found, what was made up.

use serde::Serialize;

/// Where the robot truly was at a keyframe.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KeyframeTruth {
    /// Metres (or frames, for image sequences), in one frame for all sessions.
    pub x: f64,
    /// As `x`.
    pub y: f64,
    /// Direction of view, radians; `None`: not known.
    pub heading: Option<f64>,
}

/// One keyframe of a run as the scores need it.
#[derive(Clone, Debug)]
pub struct RunKeyframe {
    /// Where it truly was; `None`: no truth for it, so it is not scored.
    pub truth: Option<KeyframeTruth>,
    /// Earlier keyframes it was allowed to match, as half-open ranges of ids.
    pub allowed: Vec<std::ops::Range<usize>>,
    /// The id it was closed to.
    pub closed_to: Option<usize>,
}

/// What the truth says of a keyframe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Closed to a true earlier place.
    True,
    /// Closed to another place.
    False,
    /// Not closed, though an earlier keyframe of this place was there.
    Missed,
    /// Not closed, and rightly so.
    None,
    /// No truth for it.
    Unknown,
}

/// Loop-closure scores of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LoopScores {
    /// Keyframes that have a truth.
    pub keyframes: usize,
    /// Keyframes with an earlier keyframe of the same place outside the exclusion window.
    pub possible: usize,
    /// Closures to such a keyframe.
    pub true_closures: usize,
    /// Closures to anything else.
    pub false_closures: usize,
    /// `true_closures / possible`; 0 when nothing was possible.
    pub found_share: f64,
    /// Length of the true path, km (thousands of frames for image sequences).
    pub path_km: f64,
    /// True closures per km.
    pub true_per_km: f64,
    /// False closures per km.
    pub false_per_km: f64,
    /// True closures per 100 keyframes.
    pub true_per_100_keyframes: f64,
    /// False closures per 100 keyframes.
    pub false_per_100_keyframes: f64,
    /// One entry per keyframe.
    #[serde(skip)]
    pub verdicts: Vec<Verdict>,
}

/// Whether two keyframes are within `radius` and, where both headings are known, turned by no more than `heading` (radians).
pub fn same_place(a: &KeyframeTruth, b: &KeyframeTruth, radius: f64, heading: f64) -> bool {
    let turned = |a: f64, b: f64| {
        let d = (a - b).rem_euclid(std::f64::consts::TAU);
        d.min(std::f64::consts::TAU - d)
    };
    let near = (a.x - b.x).hypot(a.y - b.y) <= radius;
    near && !a.heading.zip(b.heading).is_some_and(|(a, b)| turned(a, b) > heading)
}

/// Scores a run: two keyframes show one place if they are within `radius` metres and, where both
/// headings are known, `heading` radians.
pub fn score_run(run: &[RunKeyframe], radius: f64, heading: f64) -> LoopScores {
    let mut scores = LoopScores::default();
    let mut before: Option<KeyframeTruth> = None;
    for keyframe in run {
        let Some(truth) = keyframe.truth else {
            scores.verdicts.push(Verdict::Unknown);
            continue;
        };
        scores.keyframes += 1;
        if let Some(b) = before {
            scores.path_km += (truth.x - b.x).hypot(truth.y - b.y) / 1000.0;
        }
        before = Some(truth);
        let is_match = |row: usize| run.get(row).and_then(|k| k.truth).is_some_and(|t| same_place(&truth, &t, radius, heading));
        let possible = keyframe.allowed.iter().cloned().flatten().any(is_match);
        scores.possible += usize::from(possible);
        let verdict = match keyframe.closed_to {
            Some(row) if is_match(row) => Verdict::True,
            Some(_) => Verdict::False,
            None if possible => Verdict::Missed,
            None => Verdict::None,
        };
        scores.true_closures += usize::from(verdict == Verdict::True);
        scores.false_closures += usize::from(verdict == Verdict::False);
        scores.verdicts.push(verdict);
    }
    let over = |n: usize, d: f64| if d > 0.0 { n as f64 / d } else { 0.0 };
    scores.found_share = over(scores.true_closures, scores.possible as f64);
    scores.true_per_km = over(scores.true_closures, scores.path_km);
    scores.false_per_km = over(scores.false_closures, scores.path_km);
    scores.true_per_100_keyframes = over(100 * scores.true_closures, scores.keyframes as f64);
    scores.false_per_100_keyframes = over(100 * scores.false_closures, scores.keyframes as f64);
    scores
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(x: f64, heading: f64, allowed: std::ops::Range<usize>, closed_to: Option<usize>) -> RunKeyframe {
        let truth = Some(KeyframeTruth { x, y: 0.0, heading: Some(heading) });
        RunKeyframe { truth, allowed: if allowed.is_empty() { vec![] } else { vec![allowed] }, closed_to }
    }

    #[test]
    fn hand_checked() {
        let run = [
            at(0.0, 0.0, 0..0, None),
            at(100.0, 0.0, 0..0, None),
            at(1.0, 0.1, 0..2, Some(0)),  // found
            at(99.0, 0.0, 0..2, Some(0)), // closed to the wrong place
            at(98.0, 0.0, 0..2, None),    // missed
            at(500.0, 0.0, 0..2, None),   // rightly silent
            at(0.0, 3.1, 0..2, Some(0)),  // same spot, looking back: another place
            RunKeyframe { truth: None, allowed: vec![0..2], closed_to: Some(0) },
        ];
        let s = score_run(&run, 5.0, 0.7);
        use Verdict::{False, Missed, True, Unknown};
        assert_eq!(s.verdicts, [Verdict::None, Verdict::None, True, False, Missed, Verdict::None, False, Unknown]);
        assert_eq!((s.keyframes, s.possible, s.true_closures, s.false_closures), (7, 3, 1, 2));
        assert!((s.path_km - (100.0 + 99.0 + 98.0 + 1.0 + 402.0 + 500.0) / 1000.0).abs() < 1e-12);
        assert_eq!(s.found_share, 1.0 / 3.0);
        assert!((s.false_per_100_keyframes - 200.0 / 7.0).abs() < 1e-12);
        // Headings wrap.
        assert!(same_place(
            &KeyframeTruth { x: 0., y: 0., heading: Some(3.1) },
            &KeyframeTruth { x: 0., y: 0., heading: Some(-3.1) },
            1.0,
            0.2
        ));
    }
}
