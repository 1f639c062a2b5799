//! Exact nearest neighbours by inner product, over rows that arrive one at a time.

use super::dot::scores;
use crate::descriptor::Descriptor;
use crate::error::{Error, Result};
use crate::simd::advise_huge_pages;
use std::ops::Range;

/// Rows that are scored before the best are picked: their scores fit the first-level cache.
const BLOCK: usize = 512;

/// Rows that the first allocation holds.
const FIRST_ROWS: usize = 256;

/// One neighbour.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// Row, in order of insertion.
    pub row: usize,
    /// Cosine similarity.
    pub similarity: f32,
}

/// Unit descriptors of one dimension, row-major.
#[derive(Clone, Debug, Default)]
pub struct Index {
    dim: usize,
    rows: Vec<f32>,
}

impl Index {
    /// An empty index; the first insertion decides the dimension.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows.len().checked_div(self.dim).unwrap_or(0)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Adds a row. Errors: another dimension than the rows before.
    pub fn push(&mut self, descriptor: &Descriptor) -> Result<()> {
        if self.dim == 0 {
            self.dim = descriptor.dim();
        }
        if descriptor.dim() != self.dim {
            return Err(Error::Descriptor { reason: format!("{} dimensions, the map has {}", descriptor.dim(), self.dim) });
        }
        self.reserve(self.dim);
        self.rows.extend_from_slice(descriptor.as_slice());
        Ok(())
    }

    /// Room for `more` values. Grows by doubling into fresh memory, so that all of it can be backed by
    /// huge pages: a reallocation would bring its small ones along.
    fn reserve(&mut self, more: usize) {
        if self.rows.capacity() - self.rows.len() >= more {
            return;
        }
        let mut grown = Vec::with_capacity((2 * self.rows.capacity()).max(FIRST_ROWS * self.dim));
        advise_huge_pages(grown.spare_capacity_mut());
        grown.extend_from_slice(&self.rows);
        self.rows = grown;
    }

    /// Keeps the rows for which `keep` says so, in order.
    pub fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) {
        let (n, dim) = (self.len(), self.dim);
        let mut to = 0;
        for from in 0..n {
            if keep(from) {
                self.rows.copy_within(from * dim..(from + 1) * dim, to * dim);
                to += 1;
            }
        }
        self.rows.truncate(to * dim);
    }

    /// Row `i` (D values).
    pub fn row(&self, i: usize) -> &[f32] {
        &self.rows[i * self.dim..][..self.dim]
    }

    /// The `k` best rows inside `ranges` (ascending, disjoint), best first; equal similarity: lower
    /// row first. Rows whose similarity is not a number are never returned.
    pub fn search(&self, query: &Descriptor, k: usize, ranges: &[Range<usize>]) -> Vec<Hit> {
        let mut best = Best { k, hits: Vec::with_capacity(k + 1) };
        if query.dim() != self.dim || k == 0 {
            return best.hits;
        }
        let mut buffer = [0f32; BLOCK];
        for range in ranges {
            let end = range.end.min(self.len());
            let mut at = range.start;
            while at < end {
                let n = (end - at).min(BLOCK);
                scores(query.as_slice(), &self.rows[at * self.dim..(at + n) * self.dim], &mut buffer[..n]);
                best.take(at, &buffer[..n]);
                at += n;
            }
        }
        best.hits
    }
}

struct Best {
    k: usize,
    hits: Vec<Hit>,
}

impl Best {
    fn take(&mut self, first: usize, scores: &[f32]) {
        for (i, &similarity) in scores.iter().enumerate() {
            let full = self.hits.len() == self.k;
            // Rows come in ascending order, so that a tie with the last one kept is never better.
            if similarity.is_nan() || (full && self.hits.last().is_some_and(|last| similarity <= last.similarity)) {
                continue;
            }
            let at = self.hits.partition_point(|h| h.similarity >= similarity);
            self.hits.insert(at, Hit { row: first + i, similarity });
            self.hits.truncate(self.k);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn equals_a_full_sort(n in 0usize..1500, dim in 1usize..20, k in 0usize..30, a in 0usize..1500, b in 0usize..1500, seed in any::<u64>()) {
            let vector = |i: u64| Descriptor::new((0..dim as u64).map(|d| crate::test_noise(seed, i * 64 + d)).collect());
            let mut index = Index::new();
            // A few rows are repeated, so that ties occur.
            for i in 0..n as u64 { index.push(&vector(i % 700)?)?; }
            let query = vector(9999)?;
            let ranges = [0..a.min(b), a.max(b)..n.max(a.max(b))];
            let got = index.search(&query, k, &ranges);
            let mut all: Vec<Hit> = (0..n).filter(|i| ranges.iter().any(|r| r.contains(i)))
                .map(|row| Hit { row, similarity: super::super::dot(query.as_slice(), index.row(row)) }).collect();
            all.sort_by(|a, b| b.similarity.total_cmp(&a.similarity).then(a.row.cmp(&b.row)));
            all.truncate(k);
            prop_assert_eq!(got, all);
        }
    }

    #[test]
    fn another_dimension_is_refused() -> Result<()> {
        let mut index = Index::new();
        index.push(&Descriptor::new(vec![1.0, 0.0])?)?;
        assert!(index.push(&Descriptor::new(vec![1.0])?).is_err());
        assert!(index.search(&Descriptor::new(vec![1.0])?, 3, &[0..1]).is_empty());
        Ok(())
    }
}
