//! Descriptors of whole sets, and ranks of positives among references.

use crate::data::{Item, Loader};
use crate::learner::Learner;
use anyhow::{ensure, Result};
use candle_core::Tensor;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Images per evaluation pass.
const BATCH: usize = 32;

/// Descriptors as rows, f32.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    pub dim: usize,
    pub values: Vec<f32>,
}

impl Rows {
    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.dim..][..self.dim]
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.values.len() / self.dim.max(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// N x D.
    pub fn tensor(&self) -> Result<Tensor> {
        Ok(Tensor::from_slice(&self.values, (self.len(), self.dim), &candle_core::Device::Cpu)?)
    }
}

/// Descriptors of items, without augmentation; `each` hears of every batch.
///
/// Errors: a descriptor that is not finite, by the image's name.
pub fn describe(learner: &Learner, loader: &Loader, items: &[&Item], mut each: impl FnMut(usize)) -> Result<Rows> {
    let mut rows = Rows { dim: learner.dim(), values: Vec::with_capacity(items.len() * learner.dim()) };
    for batch in items.chunks(BATCH) {
        let pairs = batch.par_iter().map(|i| loader.get(i)).collect::<Result<Vec<_>>>()?;
        let images = learner.inputs().into_iter().map(|i| loader.tensor(&pairs, i)).collect::<Result<Vec<_>>>()?;
        let d = learner.forward(&images, false)?.descriptor.flatten_all()?.to_vec1::<f32>()?;
        for (row, item) in d.chunks_exact(rows.dim).zip(batch) {
            ensure!(row.iter().all(|v| v.is_finite()), "{}: its descriptor is not finite", item.path.display());
        }
        rows.values.extend(d);
        each(batch.len());
    }
    Ok(rows)
}

/// Similarities, queries x references.
pub fn similarities(queries: &Rows, references: &Rows) -> Result<Vec<f32>> {
    if queries.is_empty() || references.is_empty() {
        return Ok(Vec::new());
    }
    Ok(queries.tensor()?.matmul(&references.tensor()?.t()?)?.flatten_all()?.to_vec1::<f32>()?)
}

/// The rank of `r` in the list of a query with these similarities, from 1; ties go to the lower index.
pub fn rank(similarities: &[f32], r: usize) -> usize {
    let own = similarities[r];
    1 + similarities.iter().enumerate().filter(|(i, s)| **s > own || (**s == own && *i < r)).count()
}

/// The rank of `r` as if the query's other positives (sorted) were not there. [ours: where a place has many images, all of
/// them right, most would otherwise stand below rank N_t by each other's doing]
pub fn rank_among_wrong(similarities: &[f32], r: usize, positives: &[usize]) -> usize {
    let own = similarities[r];
    let above = |i: usize| similarities[i] > own || (similarities[i] == own && i < r);
    rank(similarities, r) - positives.iter().filter(|p| **p != r && above(**p)).count()
}

/// The rank of each query's best positive; `usize::MAX` where it has none.
pub fn best_ranks(queries: &Rows, references: &Rows, positives: &[Vec<usize>]) -> Result<Vec<usize>> {
    let all = similarities(queries, references)?;
    let n = references.len();
    Ok((0..queries.len())
        .into_par_iter()
        .map(|q| {
            let own = &all[q * n..][..n];
            positives[q].iter().map(|p| rank(own, *p)).min().unwrap_or(usize::MAX)
        })
        .collect())
}

/// Recall at some numbers of candidates.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Recall {
    /// Share of the queries with a positive whose best rank is at most N, by N.
    pub at: BTreeMap<usize, f64>,
    /// Queries with a positive.
    pub queries: usize,
    /// Queries without one: counted apart, never as misses.
    pub without: usize,
}

/// What is reported [paper: 1, 5, 10; with 15, 20].
pub const AT: [usize; 5] = [1, 5, 10, 15, 20];

impl Recall {
    /// From best ranks.
    pub fn of(ranks: &[usize]) -> Self {
        let with: Vec<usize> = ranks.iter().copied().filter(|r| *r != usize::MAX).collect();
        let at = AT.map(|n| (n, with.iter().filter(|r| **r <= n).count() as f64 / with.len().max(1) as f64)).into();
        Self { at, queries: with.len(), without: ranks.len() - with.len() }
    }

    /// Share at N.
    pub fn get(&self, n: usize) -> f64 {
        self.at.get(&n).copied().unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_and_recalls_count_from_one() {
        let rows = |v: &[f32]| Rows { dim: 2, values: v.to_vec() };
        let q = rows(&[1.0, 0.0, 0.0, 1.0, 1.0, 0.0]);
        let r = rows(&[0.6, 0.8, 1.0, 0.0, 1.0, 0.0]);
        let ranks = best_ranks(&q, &r, &[vec![2], vec![0], vec![]]).unwrap();
        assert_eq!(ranks, [2, 1, usize::MAX], "a tie goes to the lower index");
        let similar = [0.9, 0.5, 0.8, 0.7];
        assert_eq!((rank(&similar, 3), rank_among_wrong(&similar, 3, &[0, 3])), (3, 2));
        assert_eq!((rank(&similar, 1), rank_among_wrong(&similar, 1, &[1])), (4, 4));
        let recall = Recall::of(&ranks);
        assert_eq!((recall.get(1), recall.get(5), recall.queries, recall.without), (0.5, 1.0, 2, 1));
        assert_eq!(Recall::of(&[]).get(1), 0.0);
    }
}
