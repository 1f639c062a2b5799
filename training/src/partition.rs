//! Group partition and sample weights [paper, sections 3.4 and 3.5 of CVPR 2023].

use anyhow::{ensure, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Up to which rank a retrieval is right [paper: 10].
pub const N_T: usize = 10;

/// The groups of the partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Group {
    /// The teacher is right, the student wrong.
    D1,
    /// Both are right, the teacher at least as well.
    D2,
    /// Both are right, the student better.
    D3,
    /// The teacher is wrong.
    D4,
}

/// All groups.
pub const GROUPS: [Group; 4] = [Group::D1, Group::D2, Group::D3, Group::D4];

/// The group of a pair whose positive has rank `x` by the seg branch and `y` by the rgb branch, both from 1 [paper].
///
/// The paper defines D3 as `y < x <= N_t`, D2 as `x <= y <= N_t`, D1 as `x <= N_t, y > N_t`, D4 as `x > N_t`.
pub fn group(x: usize, y: usize, n_t: usize) -> Group {
    if x > n_t {
        Group::D4
    } else if y > n_t {
        Group::D1
    } else if x <= y {
        Group::D2
    } else {
        Group::D3
    }
}

/// Which samples are distilled and how much each weighs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Weighting {
    /// See [`Select`].
    pub select: Select,
    /// See [`Phi`].
    pub phi: Phi,
    /// Up to which rank a retrieval is right [paper: 10].
    pub n_t: usize,
    /// Ranks by the rgb branch above this count as this [paper: N_m limits the range; its value is ours].
    pub n_m: usize,
    /// Largest weight. [ours]
    pub phi_max: f64,
    /// Whether the weights of all training pairs are scaled to a mean of 1 over the selected ones, so that rows differ in
    /// whom they teach and not in how loudly. [ours]
    pub normalise: bool,
    /// (a, b) of D1, D2 and D3 in `phi`'s log and ratio forms. [ours: the papers do not print theirs]
    #[serde(skip_serializing_if = "are_default")]
    pub slopes: [(f64, f64); 3],
}

/// Checkpoints of before they could be set are of these.
fn are_default(slopes: &[(f64, f64); 3]) -> bool {
    *slopes == SLOPES
}

impl Default for Weighting {
    fn default() -> Self {
        Self { select: Select::S1, phi: Phi::Log, n_t: N_T, n_m: 100, phi_max: 16.0, normalise: true, slopes: SLOPES }
    }
}

/// Selections of the paper's ablation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Select {
    /// No distillation.
    None,
    All,
    D1,
    D2,
    D3,
    D4,
    /// D1, D2 and D3 [paper].
    #[default]
    S1,
    /// D4 [paper].
    S2,
    /// `y <= N_t` [inferred from the sample ratios].
    R1,
    /// `y > N_t` [inferred].
    R2,
}

impl Select {
    /// Whether a pair is selected.
    pub fn holds(self, y: usize, group: Group, n_t: usize) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::D1 => group == Group::D1,
            Self::D2 => group == Group::D2,
            Self::D3 => group == Group::D3,
            Self::D4 | Self::S2 => group == Group::D4,
            Self::S1 => group != Group::D4,
            Self::R1 => y <= n_t,
            Self::R2 => y > n_t,
        }
    }
}

/// The weight of a selected pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phi {
    /// One for all.
    One,
    /// A constant per group, D1 to D4 [paper: 8-4-1-0 is best; 4-2-1-0, 1-2-4-0, 1-4-8-0].
    Constant([f64; 4]),
    /// `b + a (min(y, N_m) - x) / ln(x + 1)` with (a, b) per group, clamped [paper: this form of f/g; a and b ours].
    #[default]
    Log,
    /// The same over `x` in place of `ln(x + 1)` [paper: worse].
    Ratio,
}

/// (a, b) of D1, D2 and D3. [ours: chosen so that D1, D2, D3 have different slopes, the mean weights order as the best
/// constants 8-4-1, and the commonest pair, x = y = 1 in D2, weighs something]
const SLOPES: [(f64, f64); 3] = [(0.05, 6.0), (0.25, 3.0), (0.2, 1.0)];

impl Weighting {
    /// Checks ranges; the error names the field.
    pub fn validate(&self) -> Result<()> {
        ensure!((1..=1000).contains(&self.n_t), "distillation.weighting.n_t: {} is outside 1 to 1000", self.n_t);
        ensure!(self.n_m > self.n_t, "distillation.weighting.n_m: {} is not above n_t, {}", self.n_m, self.n_t);
        let max = self.phi_max;
        ensure!(max > 0.0 && max <= 1e6, "distillation.weighting.phi_max: {max} is outside 0 to 1e6");
        for (group, (a, b)) in GROUPS.iter().zip(self.slopes) {
            let fits = (0.0..=1e6).contains(&a) && b > 0.0 && b <= 1e6;
            ensure!(fits, "distillation.weighting.slopes: {group:?}'s [{a}, {b}] must be 0 or more, and above 0, up to 1e6");
        }
        if let Phi::Constant(c) = self.phi {
            ensure!(c.iter().all(|v| (0.0..=1e6).contains(v)), "distillation.weighting.phi: {c:?} holds a value outside 0 to 1e6");
        }
        Ok(())
    }

    /// The weight of a pair, before [`Weighting::normalise`]; 0 outside the selection. `x`: rank by the seg branch, `y`: by
    /// the rgb branch, from 1.
    pub fn phi(&self, x: usize, y: usize) -> f64 {
        let g = group(x, y, self.n_t);
        if !self.select.holds(y, g, self.n_t) {
            return 0.0;
        }
        let over = |denominator: f64| match g {
            Group::D4 => 0.0,
            _ => {
                let (a, b) = self.slopes[g as usize];
                let gain = y.min(self.n_m) as f64 - x as f64;
                (b + a * gain / denominator).clamp(0.0, self.phi_max)
            }
        };
        match self.phi {
            Phi::One => 1.0,
            Phi::Constant(c) => c[g as usize],
            Phi::Log => over((x as f64 + 1.0).ln()),
            Phi::Ratio => over(x as f64),
        }
    }

    /// The weights of all pairs by their ranks (x, y), scaled if so set.
    pub fn weights(&self, ranks: &[(usize, usize)]) -> Vec<f64> {
        let mut all: Vec<f64> = ranks.iter().map(|(x, y)| self.phi(*x, *y)).collect();
        let chosen = all.iter().filter(|w| **w > 0.0).count();
        let mean = all.iter().sum::<f64>() / chosen.max(1) as f64;
        if self.normalise && mean > 0.0 {
            all.iter_mut().for_each(|w| *w /= mean);
        }
        all
    }
}

/// How many pairs each group has.
pub fn counts(ranks: &[(usize, usize)], n_t: usize) -> BTreeMap<Group, usize> {
    let mut counts: BTreeMap<Group, usize> = GROUPS.iter().map(|g| (*g, 0)).collect();
    for (x, y) in ranks {
        *counts.entry(group(*x, *y, n_t)).or_default() += 1;
    }
    counts
}

/// Which queries each branch gets right within the first N: the supplement's first figure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Complementarity {
    pub both: usize,
    pub rgb_only: usize,
    pub seg_only: usize,
    pub neither: usize,
}

impl Complementarity {
    /// From the rank of each query's best positive by either branch.
    pub fn of(seg: &[usize], rgb: &[usize], n: usize) -> Self {
        let mut c = Self::default();
        for (x, y) in seg.iter().zip(rgb) {
            *match (*x <= n, *y <= n) {
                (true, true) => &mut c.both,
                (false, true) => &mut c.rgb_only,
                (true, false) => &mut c.seg_only,
                (false, false) => &mut c.neither,
            } += 1;
        }
        c
    }

    /// Queries.
    pub fn all(&self) -> usize {
        self.both + self.rgb_only + self.seg_only + self.neither
    }

    /// Share of the queries that at least one branch gets right.
    pub fn union(&self) -> f64 {
        (self.both + self.rgb_only + self.seg_only) as f64 / self.all().max(1) as f64
    }

    /// Whether the teacher knows nothing that the student does not: below one query in a hundred. [ours]
    pub fn nothing_to_distil(&self) -> bool {
        self.seg_only * 100 < self.all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn log() -> Weighting {
        Weighting::default()
    }

    #[test]
    fn groups_are_the_papers() {
        for ((x, y), want) in [
            ((1, 11), Group::D1),
            ((10, 11), Group::D1),
            ((1, 1), Group::D2),
            ((3, 10), Group::D2),
            ((4, 3), Group::D3),
            ((10, 1), Group::D3),
            ((11, 1), Group::D4),
            ((11, 50), Group::D4),
        ] {
            assert_eq!(group(x, y, N_T), want, "{x} {y}");
        }
    }

    #[test]
    fn constants_and_selections_are_the_papers() {
        let w = |select, phi| Weighting { select, phi, normalise: false, ..log() };
        let c = w(Select::All, Phi::Constant([8.0, 4.0, 1.0, 0.0]));
        assert_eq!([(1, 20), (1, 2), (2, 1), (30, 1)].map(|(x, y)| c.phi(x, y)), [8.0, 4.0, 1.0, 0.0]);
        for (select, want) in [
            (Select::None, [0.0, 0.0, 0.0, 0.0]),
            (Select::All, [1.0, 1.0, 1.0, 1.0]),
            (Select::S1, [1.0, 1.0, 1.0, 0.0]),
            (Select::S2, [0.0, 0.0, 0.0, 1.0]),
            (Select::R1, [0.0, 1.0, 1.0, 1.0]),
            (Select::R2, [1.0, 0.0, 0.0, 0.0]),
            (Select::D1, [1.0, 0.0, 0.0, 0.0]),
        ] {
            assert_eq!([(1, 20), (1, 2), (2, 1), (30, 1)].map(|(x, y)| w(select, Phi::One).phi(x, y)), want, "{select:?}");
        }
    }

    #[test]
    fn mean_weights_order_as_the_best_constants() {
        // The mean over each group's own ranks, as they come: small ranks are commoner.
        let mean = |g: Group| {
            let (mut sum, mut all) = (0.0, 0.0);
            for x in 1..=10usize {
                for y in 1..=100usize {
                    if group(x, y, N_T) == g {
                        let often = 1.0 / (x * y) as f64;
                        sum += log().phi(x, y) * often;
                        all += often;
                    }
                }
            }
            sum / all
        };
        let [d1, d2, d3] = [mean(Group::D1), mean(Group::D2), mean(Group::D3)];
        println!("mean weights D1 {d1:.2}, D2 {d2:.2}, D3 {d3:.2}");
        assert!(d1 > 1.5 * d2 && d2 > 2.0 * d3 && d3 > 0.0, "{d1} {d2} {d3}");
        assert!(log().phi(1, 1) > 0.0, "the commonest pair weighs something");
    }

    #[test]
    fn slopes_are_a_setting_and_old_files_have_the_default() {
        let text = "{select: S1, phi: log, normalise: false, slopes: [[0.02, 3], [0.1, 1.8], [0, 1]]}";
        let w: Weighting = serde_yaml::from_str(text).unwrap();
        assert_eq!((w.phi(1, 1), w.phi(5, 2), w.phi(20, 1)), (1.8, 1.0, 0.0));
        assert!((w.phi(2, 22) - (3.0 + 0.02 * 20.0 / 3f64.ln())).abs() < 1e-12);
        assert_eq!(serde_yaml::from_str::<Weighting>(&serde_yaml::to_string(&w).unwrap()).unwrap(), w);
        assert!(!serde_json::to_string(&log()).unwrap().contains("slopes"));
        for (slopes, said) in [([(-0.1, 1.0), (0.0, 1.0), (0.0, 1.0)], "D1's"), ([(0.1, 1.0), (0.0, 1.0), (0.0, f64::NAN)], "D3's")] {
            let e = Weighting { slopes, ..log() }.validate().unwrap_err().to_string();
            assert!(e.contains("slopes") && e.contains(said), "{e}");
        }
    }

    #[test]
    fn a_normalised_selection_has_a_mean_of_one() {
        let ranks = [(1, 1), (1, 30), (2, 1), (40, 2), (3, 9)];
        let w = log().weights(&ranks);
        assert_eq!(w[3], 0.0);
        assert!((w.iter().sum::<f64>() / 4.0 - 1.0).abs() < 1e-12);
        assert!(Weighting { select: Select::None, ..log() }.weights(&ranks).iter().all(|w| *w == 0.0));
    }

    #[test]
    fn complementarity_counts_queries() {
        let c = Complementarity::of(&[1, 20, 3, 40], &[1, 1, 30, 50], 5);
        assert_eq!(c, Complementarity { both: 1, rgb_only: 1, seg_only: 1, neither: 1 });
        assert!((c.union() - 0.75).abs() < 1e-12 && !c.nothing_to_distil());
        assert!(Complementarity::of(&[9; 200], &[1; 200], 5).nothing_to_distil());
    }

    proptest! {
        /// The constraints of the paper's section 3.5 (method.md, section 6).
        #[test]
        fn phi_keeps_its_constraints(x in 1usize..200, y in 1usize..400, dx in 1usize..5, dy in 1usize..20) {
            for phi in [Phi::Log, Phi::Ratio] {
                let w = Weighting { phi, select: Select::All, normalise: false, ..log() };
                let v = w.phi(x, y);
                prop_assert!(v >= 0.0 && v <= w.phi_max, "bounded");
                prop_assert_eq!(v == 0.0, x > N_T, "zero on D4 and nowhere else");
                if group(x, y, N_T) == group(x, y + dy, N_T) && x <= N_T {
                    prop_assert!(w.phi(x, y + dy) >= v, "grows with y - x");
                    if y + dy <= w.n_m && w.phi(x, y + dy) < w.phi_max {
                        prop_assert!(w.phi(x, y + dy) > v);
                    }
                }
                if x + dx <= N_T && group(x, y, N_T) == group(x + dx, y, N_T) {
                    prop_assert!(w.phi(x + dx, y) <= v, "falls with x at the same y");
                    prop_assert!(w.phi(x + dx, y + dx) <= v || group(x + dx, y + dx, N_T) != group(x, y, N_T) || y < x, "falls with x at the same y - x");
                }
                prop_assert_eq!(w.phi(x, y.max(w.n_m)), w.phi(x, w.n_m + 1000), "y is capped");
            }
        }
    }

    #[test]
    fn slopes_differ_between_the_groups() {
        let w = Weighting { normalise: false, ..log() };
        let slope = |x: usize, y: usize| w.phi(x, y + 1) - w.phi(x, y);
        let (d1, d2, d3) = (slope(2, 20), slope(2, 5), slope(8, 3));
        assert!((d1 - d2).abs() > 1e-3 && (d2 - d3).abs() > 1e-3 && (d1 - d3).abs() > 1e-3, "{d1} {d2} {d3}");
    }
}
