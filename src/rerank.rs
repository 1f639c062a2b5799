//! The second stage (method section 8): the best by global descriptor, ordered anew by what their geometry says, and how far
//! the best is ahead of any other place.

use crate::config::VerificationConfig;
use crate::error::{read_file, Result};
use crate::features::{by_name, Features, LocalFeatures};
use crate::geometry::{agreement, verify, Failure, Learned, Matcher, Method, Mutual, Verification, VerifyConfig, View};
use crate::image::{Camera, RgbImage};
use crate::map::Hit;
use crate::model::{LearnedMatcher, LocalWeights};
use std::path::Path;
use std::time::{Duration, Instant};

/// What cosine similarity weighs against [`agreement`]: 0.017 more counts as e times the inliers. Chosen on synthetic
/// streets (seeds 5001 to 5006) for two models and three kinds of features; half and twice of it differ little.
const SIMILARITY: f64 = 60.0;

/// Inliers that wrong places reach without any likeness: what stands for a rival where there is none [ours].
pub const CHANCE_INLIERS: usize = 20;

/// The lead at which a pair is believed: 1.4 times the inliers of any other place. On the synthetic streets (seeds 5001 to
/// 5004, the true place among the candidates) no wrong pair of 6800 reached it with either network, one with SIFT; without
/// the true place the chain of keyframes must help.
pub const SURE_LEAD: f64 = 0.35;

/// How much work a keyframe is worth, and when it is done early.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Candidates that are verified, at most.
    pub candidates: usize,
    /// Time after which no further candidate is begun; `None`: all of them.
    pub time: Option<Duration>,
    /// With a lead of this over the best other place among those verified, the rest is not looked at; `None`: all.
    pub sure: Option<f64>,
}

impl Budget {
    /// All of `candidates`, however long it takes: what a figure that can be repeated needs.
    pub fn all_of(candidates: usize) -> Self {
        Self { candidates, time: None, sure: None }
    }
}

/// One hit after re-ranking.
#[derive(Clone, Debug, PartialEq)]
pub struct Reranked {
    /// The hit as the global descriptor gave it.
    pub hit: Hit,
    /// Agreement and similarity; larger is better; comparable within one query only.
    pub score: f64,
    /// Logarithm of the inliers by those of the best other place, or by chance where that is more; see [`lead`].
    pub lead: f64,
    /// What the images agree on; `None`: the budget was spent before.
    pub verification: Option<std::result::Result<Verification, Failure>>,
}

impl Reranked {
    /// The verification, where the images agree.
    pub fn verified(&self) -> Option<&Verification> {
        self.verification.as_ref().and_then(|v| v.as_ref().ok())
    }
}

/// How far `inliers` are ahead of a rival place's: Lowe's ratio test, for places. Repeated facades agree with many places;
/// the true one is ahead of them [ours].
pub fn lead(inliers: usize, rival: usize) -> f64 {
    let ln = |n: usize| ((n + 5) as f64).ln();
    ln(inliers) - ln(rival.max(CHANCE_INLIERS))
}

/// Orders hits by local features and two-view geometry.
pub struct Reranker {
    features: Box<dyn LocalFeatures>,
    matcher: Box<dyn Matcher>,
    /// Of the estimation.
    pub verify: VerifyConfig,
}

impl std::fmt::Debug for Reranker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reranker").field("features", &self.features.identity()).field("matcher", &self.matcher.name()).finish()
    }
}

impl Reranker {
    /// As the settings want it, weights read from their files; `None` where verification is off.
    ///
    /// Errors: a weight file that cannot be read, or is not the named network's.
    pub fn from_settings(settings: &VerificationConfig) -> Result<Option<Self>> {
        if !settings.enabled {
            return Ok(None);
        }
        let read = |file: &str| -> Result<LocalWeights> {
            let path = Path::new(file);
            LocalWeights::parse(&read_file(path)?).map_err(|e| e.at(path))
        };
        let weights = (!settings.weights.is_empty()).then(|| read(&settings.weights)).transpose()?;
        let features = by_name(&settings.features, weights.as_ref(), settings.keypoints, settings.subpixel).map_err(|e| match settings
            .weights
            .as_str()
        {
            "" => e,
            file => e.at(Path::new(file)),
        })?;
        let matcher: Box<dyn Matcher> = match settings.matcher_weights.as_str() {
            "" => Box::new(Mutual::default()),
            file => Box::new(Learned(LearnedMatcher::new(&read(file)?).map_err(|e| e.at(Path::new(file)))?)),
        };
        let method = Method::ALL.into_iter().find(|m| m.name() == settings.method).unwrap_or_default();
        let verify = VerifyConfig { method, threshold_px: settings.threshold_px, seed: settings.seed as u64, ..VerifyConfig::default() };
        Ok(Some(Self::new(features, matcher, verify)))
    }

    /// From its parts.
    pub fn new(features: Box<dyn LocalFeatures>, matcher: Box<dyn Matcher>, verify: VerifyConfig) -> Self {
        Self { features, matcher, verify }
    }

    /// Which features and matcher; features of other than this identity do not compare.
    pub fn identity(&self) -> String {
        self.features.identity()
    }

    /// Name of the matcher.
    pub fn matcher(&self) -> &str {
        self.matcher.name()
    }

    /// Local features of an image.
    pub fn extract(&self, image: &RgbImage) -> Result<Features> {
        self.features.extract(image)
    }

    /// What the geometry says of one pair.
    pub fn pair(&self, query: &View, reference: &View) -> Result<std::result::Result<Verification, Failure>> {
        let matches = self.matcher.matches(query.features, reference.features)?;
        verify(query, reference, &matches, &self.verify)
    }

    /// `hits` (best first) in a new order. Looks at them best first within `budget`; `reference` gives features and
    /// calibration of a row, or `None` where the map has none; `same_place` says whether two rows show one place.
    ///
    /// Errors: features that the matcher cannot compare.
    pub fn rerank(
        &self,
        query: &View,
        hits: &[Hit],
        budget: &Budget,
        mut reference: impl FnMut(usize) -> Option<(Features, Option<Camera>)>,
        same_place: impl Fn(usize, usize) -> bool,
    ) -> Result<Vec<Reranked>> {
        let begun = Instant::now();
        let first = hits.first().map_or(0.0, |h| h.similarity);
        let mut all: Vec<Reranked> = Vec::with_capacity(hits.len());
        for (at, hit) in hits.iter().enumerate() {
            let spent = at >= budget.candidates
                || budget.time.is_some_and(|limit| at > 0 && begun.elapsed() >= limit)
                || budget.sure.is_some_and(|enough| is_sure(&all, enough, &same_place));
            let verification = match (!spent).then(|| reference(hit.row)).flatten() {
                Some((features, camera)) => Some(self.pair(query, &View { features: &features, camera: camera.as_ref() })?),
                None => None,
            };
            let agree = agreement(verification.as_ref().and_then(|v| v.as_ref().ok()));
            let score = agree + SIMILARITY * f64::from(hit.similarity - first);
            all.push(Reranked { hit: *hit, score, lead: 0.0, verification });
        }
        for at in 0..all.len() {
            all[at].lead = lead(inliers(&all[at]), rival(&all, at, &same_place));
        }
        // Stable: equals keep the order of the global descriptor. What was not looked at stays behind.
        all.sort_by(|a, b| b.verification.is_some().cmp(&a.verification.is_some()).then(b.score.total_cmp(&a.score)));
        Ok(all)
    }
}

fn inliers(r: &Reranked) -> usize {
    r.verified().map_or(0, |v| v.inliers.len())
}

/// Most inliers of any place other than `at`'s.
fn rival(all: &[Reranked], at: usize, same_place: &impl Fn(usize, usize) -> bool) -> usize {
    let own = all[at].hit.row;
    all.iter().filter(|o| o.hit.row != own && !same_place(own, o.hit.row)).map(inliers).max().unwrap_or(0)
}

/// Whether the best so far is ahead of another place that was looked at too.
fn is_sure(all: &[Reranked], enough: f64, same_place: &impl Fn(usize, usize) -> bool) -> bool {
    let Some(best) = (0..all.len()).max_by(|a, b| inliers(&all[*a]).cmp(&inliers(&all[*b])).then(b.cmp(a))) else { return false };
    let row = all[best].hit.row;
    let compared = all.iter().any(|o| o.verification.is_some() && !same_place(row, o.hit.row));
    compared && lead(inliers(&all[best]), rival(all, best, same_place)) >= enough
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::{Classic, ClassicKind};

    /// Blocks of grey that `shift` moves: one scene.
    fn scene(seed: u64, shift: i64) -> RgbImage {
        let block = |x: i64, y: i64| (crate::test_noise(seed, ((x / 14) * 977 + y / 14) as u64) * 90.0 + 128.0).clamp(0.0, 255.0) as u8;
        let data = (0..240i64).flat_map(|y| (0..320i64).flat_map(move |x| [block(x + shift, y); 3])).collect();
        RgbImage::new(320, 240, data).unwrap()
    }

    fn reranker() -> Reranker {
        Reranker::new(Box::new(Classic::new(ClassicKind::Sift, 400)), Box::new(Mutual::default()), VerifyConfig::default())
    }

    fn hits(rows: &[usize]) -> Vec<Hit> {
        rows.iter().enumerate().map(|(i, row)| Hit { row: *row, similarity: 0.9 - 0.001 * i as f32 }).collect()
    }

    #[test]
    fn the_true_place_rises_and_without_agreement_nothing_moves() {
        let r = reranker();
        let of = |seed, shift| r.extract(&scene(seed, shift)).unwrap();
        let references: Vec<Features> = (0..5).map(|seed| of(seed, 0)).collect();
        let run = |query: &Features, budget: Budget| {
            let give = |row: usize| Some((references[row].clone(), None));
            r.rerank(&View::of(query), &hits(&[4, 0, 3, 2, 1]), &budget, give, |a, b| a == b).unwrap()
        };
        let rows = |order: &[Reranked]| order.iter().map(|o| o.hit.row).collect::<Vec<_>>();
        let query = of(2, 20);
        let order = run(&query, Budget::all_of(20));
        assert_eq!(rows(&order)[0], 2);
        assert!(order[0].lead > 1.0 && order[1..].iter().all(|o| o.lead < 0.0), "{} {}", order[0].lead, order[1].lead);
        let blank = Features::new(320, 240, vec![], vec![], 128, vec![]).unwrap();
        let order = run(&blank, Budget::all_of(20));
        assert!(order.iter().all(|o| matches!(o.verification, Some(Err(Failure::NoKeypoints)))));
        assert_eq!(rows(&order), [4, 0, 3, 2, 1]);
        // Only so many are looked at; the rest follows as it was.
        let order = run(&query, Budget::all_of(2));
        assert_eq!((rows(&order).split_off(2), order.iter().filter(|o| o.verification.is_some()).count()), (vec![3, 2, 1], 2));
        let none = run(&query, Budget { candidates: 9, time: Some(Duration::ZERO), sure: None });
        assert_eq!(none.iter().filter(|o| o.verification.is_some()).count(), 1, "one is always looked at");
    }

    #[test]
    fn it_stops_once_it_is_sure() {
        let r = reranker();
        let references: Vec<Features> = (0..6).map(|seed| r.extract(&scene(seed, 0)).unwrap()).collect();
        let mut seen = Vec::new();
        let give = |row: usize| {
            seen.push(row);
            Some((references[row].clone(), None))
        };
        let query = r.extract(&scene(3, 10)).unwrap();
        let budget = Budget { candidates: 6, time: None, sure: Some(0.5) };
        let order = r.rerank(&View::of(&query), &hits(&[3, 1, 2, 0, 4, 5]), &budget, give, |a, b| a == b).unwrap();
        assert_eq!(order[0].hit.row, 3);
        assert_eq!(order.iter().filter(|o| o.verification.is_some()).count(), 2, "one rival was seen, then it was sure");
    }

    #[test]
    fn a_rival_as_good_leaves_no_lead() {
        assert!(lead(200, 0) > 2.0 && lead(200, 190) < 0.1 && lead(10, 0) < 0.0 && lead(0, 0) < 0.0);
    }
}
