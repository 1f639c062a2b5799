//! Precision and recall over the threshold on a score.

use serde::Serialize;

/// One query's best match.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Its score; higher is surer.
    pub score: f32,
    /// Whether it is right.
    pub correct: bool,
    /// Whether the query has a true match at all.
    pub possible: bool,
}

/// Precision and recall when all with at least `score` are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PrPoint {
    /// The threshold.
    pub score: f32,
    /// Right among accepted.
    pub precision: f64,
    /// Right and accepted among possible.
    pub recall: f64,
}

/// The curve, its area and its most useful point.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PrCurve {
    /// From the highest threshold to the lowest, one point per distinct score.
    pub points: Vec<PrPoint>,
    /// Average precision: the sum of precision times the gain in recall.
    pub average_precision: f64,
    /// Largest recall at which nothing accepted is wrong.
    pub recall_at_100_precision: f64,
    /// The threshold there; `None` if the best-scored match is wrong already.
    pub threshold_at_100_precision: Option<f32>,
}

impl PrCurve {
    /// Queries without a true match can only be wrong when accepted. Scores that are not numbers are
    /// never accepted.
    pub fn new(scored: &[Scored]) -> Self {
        let possible = scored.iter().filter(|s| s.possible).count();
        let mut sorted: Vec<&Scored> = scored.iter().filter(|s| !s.score.is_nan()).collect();
        sorted.sort_by(|a, b| b.score.total_cmp(&a.score));
        let mut curve = Self { points: Vec::new(), average_precision: 0.0, recall_at_100_precision: 0.0, threshold_at_100_precision: None };
        let (mut accepted, mut right, mut before) = (0usize, 0usize, 0.0);
        for tied in sorted.chunk_by(|a, b| a.score == b.score) {
            accepted += tied.len();
            right += tied.iter().filter(|s| s.correct).count();
            let precision = right as f64 / accepted as f64;
            let recall = if possible == 0 { 0.0 } else { right as f64 / possible as f64 };
            curve.average_precision += precision * (recall - before);
            before = recall;
            if right == accepted {
                curve.recall_at_100_precision = recall;
                curve.threshold_at_100_precision = Some(tied[0].score);
            }
            curve.points.push(PrPoint { score: tied[0].score, precision, recall });
        }
        curve
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn s(score: f32, correct: bool, possible: bool) -> Scored {
        Scored { score, correct, possible }
    }

    #[test]
    fn hand_checked() {
        // 0.9 right, 0.8 right, 0.7 wrong (no match exists), 0.6 right, 0.5 wrong; four possible.
        let c = PrCurve::new(&[s(0.6, true, true), s(0.9, true, true), s(0.7, false, false), s(0.8, true, true), s(0.5, false, true)]);
        let got: Vec<_> = c.points.iter().map(|p| (p.precision, p.recall)).collect();
        assert_eq!(got, [(1.0, 0.25), (1.0, 0.5), (2.0 / 3.0, 0.5), (0.75, 0.75), (0.6, 0.75)]);
        assert_eq!(c.average_precision, 0.25 + 0.25 + 0.75 * 0.25);
        assert_eq!((c.recall_at_100_precision, c.threshold_at_100_precision), (0.5, Some(0.8)));
    }

    #[test]
    fn ties_are_accepted_together_and_nan_never() {
        let c = PrCurve::new(&[s(0.5, true, true), s(0.5, false, true), s(f32::NAN, true, true)]);
        assert_eq!(c.points.len(), 1);
        assert_eq!((c.points[0].precision, c.recall_at_100_precision), (0.5, 0.0));
        assert_eq!(PrCurve::new(&[]).average_precision, 0.0);
    }

    proptest! {
        #[test]
        fn stays_in_range(v in proptest::collection::vec((0f32..1.0, any::<bool>()), 0..60)) {
            let scored: Vec<_> = v.iter().map(|(x, c)| s(*x, *c, true)).collect();
            let c = PrCurve::new(&scored);
            prop_assert!((0.0..=1.0 + 1e-12).contains(&c.average_precision));
            prop_assert!(c.points.windows(2).all(|w| w[0].recall <= w[1].recall && w[0].score > w[1].score));
            prop_assert!(c.recall_at_100_precision <= c.points.last().map_or(0.0, |p| p.recall));
        }
    }
}
