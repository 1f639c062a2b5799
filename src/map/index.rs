//! Exact nearest neighbours by inner product, over rows that arrive one at a time.
//!
//! Reading is what costs: the rows of 100 000 keyframes are 179 MB. So a search reads their 8-bit codes, a quarter of that, which
//! bound every similarity ([`super::codes`]); the rows themselves are read only where the bounds leave open whether they are among
//! the best. What is found is what a scan of all rows would find, bit by bit, in whatever order rows came.

use super::codes::{encode, stride, Query, Scale};
use super::dot::dot;
use crate::descriptor::Descriptor;
use crate::error::{Error, Result};
use crate::simd::advise_huge_pages;
use crate::team::team;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Rows that are bounded before the best are picked. Their codes fit the second-level cache, so that a batch of queries reads them
/// from memory once.
const BLOCK: usize = 512;

/// Rows that are worth a thread: with fewer, waking one takes as long as it saves.
const SHARE: usize = 4 * BLOCK;

/// Rows that the first allocation holds.
const FIRST_ROWS: usize = 256;

/// Queries of a batch that take turns on a block.
const BATCH: usize = 64;

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
    /// Padded, see [`stride`].
    codes: Vec<i8>,
    scales: Vec<Scale>,
    /// No row is longer.
    longest: f32,
}

impl Index {
    /// An empty index; the first insertion decides the dimension.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.scales.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.scales.is_empty()
    }

    /// Adds a row. Errors: another dimension than the rows before.
    pub fn push(&mut self, descriptor: &Descriptor) -> Result<()> {
        let row = descriptor.as_slice();
        if self.dim == 0 {
            self.dim = row.len();
        }
        if row.len() != self.dim {
            return Err(Error::Descriptor { reason: format!("{} dimensions, the map has {}", row.len(), self.dim) });
        }
        reserve(&mut self.rows, self.dim);
        reserve(&mut self.codes, stride(self.dim));
        self.rows.extend_from_slice(row);
        self.scales.push(encode(row, &mut self.codes));
        let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        self.longest = self.longest.max((norm * (1.0 + 1e-6)) as f32);
        Ok(())
    }

    /// Keeps the rows for which `keep` says so, in order.
    pub fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) {
        let (n, dim, stride) = (self.len(), self.dim, stride(self.dim));
        let mut to = 0;
        for from in 0..n {
            if keep(from) {
                self.rows.copy_within(from * dim..(from + 1) * dim, to * dim);
                self.codes.copy_within(from * stride..(from + 1) * stride, to * stride);
                self.scales[to] = self.scales[from];
                to += 1;
            }
        }
        self.rows.truncate(to * dim);
        self.codes.truncate(to * stride);
        self.scales.truncate(to);
    }

    /// Row `i` (D values).
    pub fn row(&self, i: usize) -> &[f32] {
        &self.rows[i * self.dim..][..self.dim]
    }

    /// The `k` best rows inside `ranges` (ascending, disjoint), best first; equal similarity: lower
    /// row first. Rows whose similarity is not a number are never returned.
    pub fn search(&self, query: &Descriptor, k: usize, ranges: &[Range<usize>]) -> Vec<Hit> {
        let rows: usize = ranges.iter().map(|r| r.end.min(self.len()).saturating_sub(r.start)).sum();
        let threads = rayon::current_num_threads().min(rows / SHARE);
        if threads < 2 {
            let mut scans = [Scan::new(self, query, k)];
            ranges.iter().for_each(|range| self.scan(&mut scans, range));
            let [scan] = scans;
            return scan.finish();
        }
        self.search_with(threads, query, k, ranges)
    }

    /// By several threads, each of which takes the next part until none is left.
    fn search_with(&self, threads: usize, query: &Descriptor, k: usize, ranges: &[Range<usize>]) -> Vec<Hit> {
        let ends = ranges.iter().map(|r| (r.start, r.end.min(self.len())));
        let parts: Vec<Range<usize>> =
            ends.flat_map(|(start, end)| (start..end).step_by(BLOCK).map(move |at| at..end.min(at + BLOCK))).collect();
        let next = AtomicUsize::new(0);
        let mut scans: Vec<_> = (0..threads.min(parts.len()).max(1)).map(|_| [Scan::new(self, query, k)]).collect();
        team(&mut scans, &|| next.load(Ordering::Relaxed) < parts.len(), &|scan| {
            while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.scan(scan, part);
            }
        });
        let mut scans = scans.into_iter().map(|[scan]| scan);
        // There is at least one.
        let Some(first) = scans.next() else { return Vec::new() };
        scans.fold(first, Scan::with).finish()
    }

    /// [`Index::search`] in all rows for each query; parallel over queries, which share what is read from memory.
    pub fn search_all(&self, queries: &[Descriptor], k: usize) -> Vec<Vec<Hit>> {
        let batch = queries.len().div_ceil(rayon::current_num_threads()).clamp(1, BATCH);
        let found = queries.par_chunks(batch).flat_map_iter(|queries| {
            let mut scans: Vec<Scan> = queries.iter().map(|q| Scan::new(self, q, k)).collect();
            self.scan(&mut scans, &(0..self.len()));
            scans.into_iter().map(Scan::finish)
        });
        found.collect()
    }

    fn scan(&self, scans: &mut [Scan], range: &Range<usize>) {
        let (end, stride) = (range.end.min(self.len()), stride(self.dim));
        let mut products = [0i32; BLOCK];
        let mut at = range.start;
        while at < end {
            let n = (end - at).min(BLOCK);
            let (codes, scales) = (&self.codes[at * stride..(at + n) * stride], &self.scales[at..at + n]);
            for scan in scans.iter_mut() {
                let Some(query) = &scan.coded else { continue };
                query.products(codes, scales, &mut products[..n]);
                scan.take(at, &products[..n], scales);
            }
            at += n;
        }
    }
}

/// Room for `more` values. Grows by doubling into fresh memory, so that all of it can be backed by
/// huge pages: a reallocation would bring its small ones along.
fn reserve<T: Copy>(values: &mut Vec<T>, more: usize) {
    if values.capacity() - values.len() >= more {
        return;
    }
    let mut grown = Vec::with_capacity((2 * values.capacity()).max(FIRST_ROWS * more));
    advise_huge_pages(grown.spare_capacity_mut());
    grown.extend_from_slice(values);
    *values = grown;
}

/// One query on its way through the rows.
struct Scan<'a> {
    index: &'a Index,
    query: &'a [f32],
    /// `None`: nothing can be found.
    coded: Option<Query>,
    k: usize,
    /// The `k` highest lower bounds, descending: what is below the last is not among the `k` best.
    floors: Vec<f32>,
    /// Rows that may be among the best, ascending, and their upper bounds.
    open: Vec<(usize, f32)>,
    /// Length of `open` at which those are let go that have been shut out since.
    sweep: usize,
}

impl<'a> Scan<'a> {
    fn new(index: &'a Index, query: &'a Descriptor, k: usize) -> Self {
        let query = query.as_slice();
        let coded = (query.len() == index.dim && k > 0).then(|| Query::new(query, index.longest));
        Self { index, query, coded, k, floors: Vec::new(), open: Vec::new(), sweep: 4 * BLOCK }
    }

    fn floor(&self) -> f32 {
        if self.floors.len() < self.k {
            return f32::NEG_INFINITY;
        }
        self.floors.last().copied().unwrap_or(f32::NEG_INFINITY)
    }

    fn take(&mut self, first: usize, products: &[i32], scales: &[Scale]) {
        let Some(query) = &self.coded else { return };
        let mut floor = self.floor();
        for (i, (products, scale)) in products.iter().zip(scales).enumerate() {
            let (low, high) = query.bounds(*products, scale);
            // Also false where the bound is not a number.
            if high >= floor {
                self.open.push((first + i, high));
                if self.floors.len() < self.k || low > floor {
                    self.floors.insert(self.floors.partition_point(|f| *f >= low), low);
                    self.floors.truncate(self.k);
                    floor = match self.floors.last() {
                        Some(last) if self.floors.len() == self.k => *last,
                        _ => floor,
                    };
                }
            }
        }
        if self.open.len() > self.sweep {
            self.open.retain(|(_, high)| *high >= floor);
            self.sweep = (2 * self.open.len()).max(4 * BLOCK);
        }
    }

    /// What two have seen of different rows.
    fn with(mut self, other: Self) -> Self {
        self.floors.extend(other.floors);
        self.floors.sort_unstable_by(|a, b| b.total_cmp(a));
        self.floors.truncate(self.k);
        self.open.extend(other.open);
        self.open.sort_unstable_by_key(|(row, _)| *row);
        self
    }

    /// The exact similarities of what is left.
    fn finish(self) -> Vec<Hit> {
        let floor = self.floor();
        let mut best: Vec<Hit> = Vec::new();
        for (row, _) in self.open.iter().filter(|(_, high)| *high >= floor) {
            let similarity = dot(self.query, self.index.row(*row));
            let full = best.len() == self.k;
            // Rows come in ascending order, so that a tie with the last one kept is never better.
            if similarity.is_nan() || (full && best.last().is_some_and(|last| similarity <= last.similarity)) {
                continue;
            }
            best.insert(best.partition_point(|h| h.similarity >= similarity), Hit { row: *row, similarity });
            best.truncate(self.k);
        }
        best
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

        /// As keyframes come: each row near the one before, and places that look all but alike.
        #[test]
        fn equals_a_full_sort_in_the_order_of_a_drive(n in 1usize..3000, dim in 2usize..130, step in -4f32..0.5, k in 1usize..25, thin in any::<bool>(), seed in any::<u64>()) {
            let step = 10f32.powf(step);
            let noise = |i: usize| crate::test_noise(seed, i as u64);
            let mut at: Vec<f32> = (0..dim).map(noise).collect();
            let mut index = Index::new();
            for i in 0..n {
                for (d, v) in at.iter_mut().enumerate() { *v += step * noise((i + 1) * dim + d); }
                index.push(&Descriptor::new(at.clone())?)?;
            }
            if thin { index.retain(|row| row % 3 != 1); }
            let queries = [Descriptor::new(at)?, Descriptor::new(index.row(index.len() / 2).to_vec())?];
            let found = index.search_all(&queries, k);
            for (query, got) in queries.iter().zip(&found) {
                let mut all: Vec<Hit> = (0..index.len()).map(|row| Hit { row, similarity: dot(query.as_slice(), index.row(row)) }).collect();
                all.sort_by(|a, b| b.similarity.total_cmp(&a.similarity).then(a.row.cmp(&b.row)));
                all.truncate(k);
                prop_assert_eq!(got, &all);
                prop_assert_eq!(got, &index.search(query, k, std::slice::from_ref(&(0..index.len()))));
                // However the rows are shared, ranges that touch among them.
                let ranges = [0..index.len() / 3, index.len() / 3..index.len()];
                for threads in [1, 2, 5] { prop_assert_eq!(got, &index.search_with(threads, query, k, &ranges)); }
            }
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
