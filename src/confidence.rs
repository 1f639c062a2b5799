//! From scores to a probability that a match is true, fitted on a drive whose truth is known. [ours]
//!
//! A logistic regression over the numbers that a decision rests on. Fitted by Newton's method with a small ridge on standardised
//! inputs, so that it exists and is unique even where the classes separate; its own probabilities are judged on data that it
//! did not see (contiguous blocks of the drive, or another drive), for neighbouring keyframes are alike.

use crate::descriptor::ModelIdentity;
use crate::error::{Error, Result};
use crate::pipeline::Evidence;
use nalgebra::{DMatrix, DVector};
use serde::{Deserialize, Serialize};

/// Of the file.
const FORMAT: &str = "structvpr-confidence-1";
/// Inputs.
const N: usize = 6;
/// Their names in the file.
const INPUTS: [&str; N] = ["similarity", "chain_similarity", "margin", "consistent_count", "advance_error", "lead"];
/// Weight of the squared (standardised) coefficients, against the sum of log losses.
const RIDGE: f64 = 1.0;
/// A margin where there is no other place, and the largest that counts.
const MARGIN: f64 = 0.1;
/// The longest chain that counts.
const CHAIN: f64 = 30.0;
/// The error of a chain that is too short to have one, and the largest that counts, keyframes.
const ERROR: f64 = 10.0;
/// The range of leads that counts; below: nothing was verified.
const LEAD: [f64; 2] = [-2.0, 3.0];
/// Blocks that a drive is cut into to judge a fit on what it did not see.
const BLOCKS: usize = 5;
/// Bins of the calibration error.
const BINS: usize = 10;

/// One match with its truth.
#[derive(Clone, Debug)]
pub struct Example {
    inputs: [f64; N],
    /// The similarity that thresholds are compared with: the lower of the match's and its chain's.
    pub similarity: f64,
    /// Whether it shows the same place.
    pub is_true: bool,
}

impl Example {
    /// From a decision's evidence.
    pub fn new(evidence: &Evidence, is_true: bool) -> Self {
        let similarity = f64::from(evidence.similarity.min(evidence.chain_similarity));
        Self { inputs: inputs(evidence), similarity, is_true }
    }
}

fn inputs(e: &Evidence) -> [f64; N] {
    [
        e.similarity.into(),
        e.chain_similarity.into(),
        e.margin.map_or(MARGIN, |m| f64::from(m).clamp(-MARGIN, MARGIN)),
        // The second keyframe of a chain says more than the twentieth.
        (e.consistent_count as f64).clamp(1.0, CHAIN).ln(),
        e.advance.map_or(ERROR, |a| a.error.min(ERROR)),
        e.lead.map_or(LEAD[0], |l| l.clamp(LEAD[0], LEAD[1])),
    ]
}

/// A fitted map from scores to probability.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confidence {
    format: String,
    /// Whose descriptors it is for.
    pub model: String,
    /// And that model's hash.
    pub model_sha256: String,
    /// The extractor of the second stage; empty where there was none.
    pub verification: String,
    /// What it was fitted on, for people.
    pub fitted_on: String,
    inputs: Vec<String>,
    mean: Vec<f64>,
    scale: Vec<f64>,
    weights: Vec<f64>,
    bias: f64,
}

/// How well probabilities fit the truth.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Calibration {
    /// Matches.
    pub matches: usize,
    /// True ones.
    pub true_matches: usize,
    /// Expected calibration error: mean over matches of |confidence - share of true ones| in ten bins of equal width.
    pub expected_calibration_error: f64,
    /// Mean squared difference of confidence and truth.
    pub brier: f64,
    /// Per bin with matches: how many, mean confidence, share that is true.
    pub bins: Vec<(usize, f64, f64)>,
}

/// A threshold and what it gives.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Threshold {
    /// The lowest value at which the wanted precision is reached.
    pub value: f64,
    /// Precision among the matches at or above it.
    pub precision: f64,
    /// Share of the true matches at or above it.
    pub recall: f64,
}

impl Confidence {
    /// Fits on matches with truth.
    ///
    /// Errors: too few matches, or all of them true, or none.
    pub fn fit(examples: &[Example], model: &ModelIdentity, verification: &str, fitted_on: &str) -> Result<Self> {
        let right = examples.iter().filter(|e| e.is_true).count();
        let wrong = examples.len() - right;
        if right < 10 || wrong < 10 {
            return Err(Error::dataset(format!(
                "{right} true and {wrong} wrong matches; at least 10 of each are needed: take a drive with loops and with places that are seen once"
            )));
        }
        let n = examples.len() as f64;
        let mut mean = [0.0; N];
        let mut scale = [0.0; N];
        for i in 0..N {
            mean[i] = examples.iter().map(|e| e.inputs[i]).sum::<f64>() / n;
            let variance = examples.iter().map(|e| (e.inputs[i] - mean[i]).powi(2)).sum::<f64>() / n;
            // A constant input (no second stage) has no say.
            scale[i] = if variance > 1e-18 { variance.sqrt() } else { f64::INFINITY };
        }
        let x = DMatrix::from_fn(examples.len(), N + 1, |r, c| if c == N { 1.0 } else { (examples[r].inputs[c] - mean[c]) / scale[c] });
        let y = DVector::from_iterator(examples.len(), examples.iter().map(|e| f64::from(u8::from(e.is_true))));
        let w = newton(&x, &y)?;
        Ok(Self {
            format: FORMAT.into(),
            model: model.name.clone(),
            model_sha256: model.sha256.clone(),
            verification: verification.into(),
            fitted_on: fitted_on.into(),
            inputs: INPUTS.map(String::from).to_vec(),
            mean: mean.to_vec(),
            scale: scale.map(|s| if s.is_finite() { s } else { 0.0 }).to_vec(),
            weights: w.as_slice()[..N].to_vec(),
            bias: w[N],
        })
    }

    /// The probability that a match is true, 0 to 1.
    pub fn of(&self, evidence: &Evidence) -> f32 {
        self.probability(&inputs(evidence)) as f32
    }

    fn probability(&self, inputs: &[f64; N]) -> f64 {
        let scaled = |i: usize| if self.scale[i] > 0.0 { (inputs[i] - self.mean[i]) / self.scale[i] } else { 0.0 };
        sigmoid(self.bias + (0..N).map(|i| self.weights[i] * scaled(i)).sum::<f64>())
    }

    /// Probabilities of all examples.
    pub fn of_all(&self, examples: &[Example]) -> Vec<f64> {
        examples.iter().map(|e| self.probability(&e.inputs)).collect()
    }

    /// Probabilities of each block of a drive by a fit on its other blocks; `None` where those hold too few of a kind.
    pub fn unseen(examples: &[Example], model: &ModelIdentity) -> Option<Vec<f64>> {
        let n = examples.len();
        let mut out = Vec::with_capacity(n);
        for block in 0..BLOCKS {
            let (start, end) = (block * n / BLOCKS, (block + 1) * n / BLOCKS);
            let others = [&examples[..start], &examples[end..]].concat();
            out.extend(Self::fit(&others, model, "", "").ok()?.of_all(&examples[start..end]));
        }
        Some(out)
    }

    /// As a file.
    pub fn to_json(&self) -> String {
        // Finite numbers and strings always have a JSON form.
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// From a file, for descriptors of `model`, verified by `verification` (empty: not verified).
    ///
    /// Errors: not such a file, another model, another second stage: each by name.
    pub fn parse(text: &str, model: &ModelIdentity, verification: &str) -> Result<Self> {
        let bad = |what: String| Error::dataset(format!("calibration: {what}"));
        let read: Self = serde_json::from_str(text).map_err(|e| bad(format!("not a file of `structvpr calibrate` ({e})")))?;
        if read.format != FORMAT {
            return Err(bad(format!("format `{}`; this program reads `{FORMAT}`", read.format)));
        }
        let lengths = [read.inputs.len(), read.mean.len(), read.scale.len(), read.weights.len()];
        if lengths != [N; 4] || read.inputs != INPUTS {
            return Err(bad(format!("its inputs are {:?}, wanted {INPUTS:?}", read.inputs)));
        }
        let numbers = read.mean.iter().chain(&read.scale).chain(&read.weights).chain([&read.bias]);
        if numbers.copied().any(|v| !v.is_finite()) || read.scale.iter().any(|s| *s < 0.0) {
            return Err(bad("a number in it is not finite".into()));
        }
        if read.model_sha256 != model.sha256 {
            return Err(bad(format!(
                "made with model `{}`, but the model in use is {model}; run `structvpr calibrate` with this one",
                read.model
            )));
        }
        if read.verification != verification {
            let name = |v: &str| if v.is_empty() { "no verification".to_string() } else { format!("verification by {v}") };
            return Err(bad(format!("made with {}, but in use is {}", name(&read.verification), name(verification))));
        }
        Ok(read)
    }
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

fn newton(x: &DMatrix<f64>, y: &DVector<f64>) -> Result<DVector<f64>> {
    let columns = x.ncols();
    let mut w = DVector::zeros(columns);
    // The bias is not drawn to zero.
    let ridge = DVector::from_fn(columns, |i, _| if i + 1 == columns { 1e-9 } else { RIDGE });
    let loss = |w: &DVector<f64>| {
        let z = x * w;
        let fit: f64 = z.iter().zip(y.iter()).map(|(z, y)| z.max(0.0) - z * y + (-z.abs()).exp().ln_1p()).sum();
        fit + 0.5 * w.component_mul(w).dot(&ridge)
    };
    let mut current = loss(&w);
    for _ in 0..100 {
        let p = (x * &w).map(sigmoid);
        let gradient = x.transpose() * (&p - y) + ridge.component_mul(&w);
        let weighted = DMatrix::from_fn(x.nrows(), columns, |r, c| x[(r, c)] * p[r] * (1.0 - p[r]));
        let hessian = x.transpose() * weighted + DMatrix::from_diagonal(&ridge);
        let step = hessian.cholesky().ok_or_else(|| Error::dataset("calibration: the matches do not determine a fit"))?.solve(&gradient);
        // Halved until it helps: a full step may overshoot far from the optimum.
        let next = (0..30).map(|k| &w - &step * 0.5f64.powi(k)).map(|w| (loss(&w), w)).find(|(l, _)| *l <= current);
        let Some((lower, next)) = next else { break };
        let gain = current - lower;
        (w, current) = (next, lower);
        if gain < 1e-10 {
            break;
        }
    }
    Ok(w)
}

/// How well `confidences` fit the truth of `examples`.
pub fn calibration(confidences: &[f64], examples: &[Example]) -> Calibration {
    let mut bins = [(0usize, 0.0, 0.0); BINS];
    let mut brier = 0.0;
    for (c, e) in confidences.iter().zip(examples) {
        let y = f64::from(u8::from(e.is_true));
        let bin = &mut bins[((c * BINS as f64) as usize).min(BINS - 1)];
        (bin.0, bin.1, bin.2) = (bin.0 + 1, bin.1 + c, bin.2 + y);
        brier += (c - y).powi(2);
    }
    let n = examples.len().max(1) as f64;
    let error = bins.iter().map(|(_, c, y)| (c - y).abs()).sum::<f64>() / n;
    let bins = bins.iter().filter(|b| b.0 > 0).map(|(k, c, y)| (*k, c / *k as f64, y / *k as f64)).collect();
    let true_matches = examples.iter().filter(|e| e.is_true).count();
    Calibration { matches: examples.len(), true_matches, expected_calibration_error: error, brier: brier / n, bins }
}

/// The lowest threshold on `scores` at which precision reaches `wanted`; `None` if there is none.
pub fn threshold(scores: &[f64], examples: &[Example], wanted: f64) -> Option<Threshold> {
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let all = examples.iter().filter(|e| e.is_true).count();
    let (mut right, mut best) = (0usize, None);
    for (i, at) in order.iter().enumerate() {
        right += usize::from(examples[*at].is_true);
        // Equal scores stand or fall together.
        if order.get(i + 1).is_some_and(|next| scores[*next] == scores[*at]) {
            continue;
        }
        let precision = right as f64 / (i + 1) as f64;
        if precision >= wanted {
            best = Some(Threshold { value: scores[*at], precision, recall: right as f64 / all.max(1) as f64 });
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Advance;

    fn evidence(similarity: f32, margin: Option<f32>, chain: usize) -> Evidence {
        Evidence {
            matched: 0,
            similarity,
            second: None,
            margin,
            consistent_count: chain,
            chain_similarity: similarity - 0.01,
            advance: (chain > 2).then_some(Advance { pace: 1.0, error: 0.5 }),
            time_gap_s: 100.0,
            odometry_distance_m: None,
            lead: None,
        }
    }

    /// Matches whose truth is drawn with the probability that their similarity gives.
    fn drawn(n: u64, seed: u64) -> Vec<Example> {
        let uniform = |i: u64| (crate::test_noise(seed, i) * 0.5 + 0.5).clamp(0.0, 1.0);
        (0..n)
            .map(|i| {
                let s = 0.8 + 0.2 * uniform(3 * i);
                let e = evidence(s, (i % 3 > 0).then(|| 0.05 * uniform(3 * i + 1)), 1 + (i % 12) as usize);
                let p = sigmoid((f64::from(s) - 0.9) * 60.0);
                Example::new(&e, f64::from(uniform(3 * i + 2)) < p)
            })
            .collect()
    }

    #[test]
    fn probabilities_fit_a_drive_that_was_not_seen() {
        let model = ModelIdentity { name: "m".into(), sha256: "ab".into() };
        let (train, test) = (drawn(3000, 1), drawn(3000, 2));
        let fit = Confidence::fit(&train, &model, "", "x").unwrap();
        let seen = calibration(&fit.of_all(&test), &test);
        assert!(seen.expected_calibration_error < 0.03, "{seen:?}");
        assert_eq!((seen.matches, seen.bins.iter().map(|b| b.0).sum::<usize>()), (3000, 3000));
        // Knowing nothing but the share of true ones is worse.
        let share = seen.true_matches as f64 / 3000.0;
        assert!(seen.brier < 0.8 * share * (1.0 - share), "{seen:?}");
        let of = |s| fit.of(&evidence(s, None, 5));
        assert!(of(0.99) > 0.95 && of(0.81) < 0.05 && of(0.95) > of(0.9));
        let unseen = calibration(&Confidence::unseen(&train, &model).unwrap(), &train);
        assert!(unseen.expected_calibration_error < 0.04, "{unseen:?}");
        let back = Confidence::parse(&fit.to_json(), &model, "").unwrap();
        assert_eq!(back, fit);
        let other = ModelIdentity { name: "other".into(), sha256: "cd".into() };
        for (text, model, verification, want) in [
            (fit.to_json(), &other, "", "`other`"),
            (fit.to_json(), &model, "sift", "verification by sift"),
            ("{}".into(), &model, "", "not a file"),
        ] {
            let said = Confidence::parse(&text, model, verification).unwrap_err().to_string();
            assert!(said.contains(want), "{said}");
        }
    }

    #[test]
    fn classes_that_separate_still_have_a_fit_and_one_class_has_none() {
        let model = ModelIdentity::default();
        let examples: Vec<Example> = (0..60).map(|i| Example::new(&evidence(0.8 + 0.003 * i as f32, None, 3), i >= 30)).collect();
        let fit = Confidence::fit(&examples, &model, "", "").unwrap();
        let p = fit.of_all(&examples);
        assert!(p.iter().all(|p| p.is_finite()) && p[0] < 0.05 && p[59] > 0.95, "{p:?}");
        let said = Confidence::fit(&examples[30..], &model, "", "").unwrap_err().to_string();
        assert!(said.contains("30 true and 0 wrong"), "{said}");
    }

    #[test]
    fn a_threshold_gives_the_precision_that_was_wanted() {
        let truth = [true, true, false, true, true, false, false];
        let examples: Vec<Example> = truth.iter().map(|t| Example::new(&evidence(0.9, None, 1), *t)).collect();
        let scores = [0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.4];
        let at = |wanted| threshold(&scores, &examples, wanted);
        assert_eq!(at(0.8), Some(Threshold { value: 0.6, precision: 0.8, recall: 1.0 }));
        assert_eq!(at(1.0), Some(Threshold { value: 0.8, precision: 1.0, recall: 0.5 }));
        assert_eq!(threshold(&[0.9, 0.1], &examples[2..4], 1.0), None);
    }
}
