//! Recall@N: the share of queries with a true match among the N best.

use crate::descriptor::Descriptor;
use crate::error::Result;
use crate::map::{Hit, Index};
use serde::Serialize;
use std::collections::BTreeMap;

/// The N that reports give [paper].
pub const RECALL_AT: [usize; 5] = [1, 5, 10, 15, 20];

/// Recall over a set of queries.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recall {
    /// N to the share of queries with a true match among the N best, 0 to 1.
    pub recall: BTreeMap<usize, f64>,
    /// Queries that have a true match: what the shares refer to.
    pub queries: usize,
    /// Queries without one; counted apart, never as misses.
    pub queries_without_match: usize,
}

/// For each query the `k` nearest references, best first. Exact; parallel over queries.
///
/// Errors: descriptors of different dimensions.
pub fn rank_all(queries: &[Descriptor], references: &[Descriptor], k: usize) -> Result<Vec<Vec<Hit>>> {
    let mut index = Index::new();
    for r in references {
        index.push(r)?;
    }
    if let Some(q) = queries.iter().find(|q| references.first().is_some_and(|r| r.dim() != q.dim())) {
        return Err(crate::error::Error::Descriptor {
            reason: format!("a query has {} dimensions, the references have {}", q.dim(), references[0].dim()),
        });
    }
    Ok(index.search_all(queries, k))
}

/// Recall at each of `at`, from ranked hits and the true references of each query.
pub fn recall_at(ranked: &[Vec<Hit>], positives: &[Vec<usize>], at: &[usize]) -> Recall {
    let mut found: BTreeMap<usize, usize> = at.iter().map(|n| (*n, 0)).collect();
    let mut queries = 0;
    for (hits, positives) in ranked.iter().zip(positives) {
        if positives.is_empty() {
            continue;
        }
        queries += 1;
        if let Some(first) = hits.iter().position(|h| positives.contains(&h.row)) {
            found.iter_mut().filter(|(n, _)| first < **n).for_each(|(_, count)| *count += 1);
        }
    }
    let share = |count: usize| if queries == 0 { 0.0 } else { count as f64 / queries as f64 };
    Recall {
        recall: found.into_iter().map(|(n, count)| (n, share(count))).collect(),
        queries,
        queries_without_match: positives.iter().filter(|p| p.is_empty()).count(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hand_checked() {
        let hits = |rows: &[usize]| rows.iter().map(|r| Hit { row: *r, similarity: 0.0 }).collect::<Vec<_>>();
        // Right at once; right at rank 2; never right; no true match at all.
        let ranked = [hits(&[3, 1]), hits(&[0, 5]), hits(&[1, 2]), hits(&[0, 1])];
        let positives = [vec![3], vec![5, 6], vec![9], vec![]];
        let r = recall_at(&ranked, &positives, &[1, 2]);
        assert_eq!((r.queries, r.queries_without_match), (3, 1));
        assert_eq!(r.recall, BTreeMap::from([(1, 1.0 / 3.0), (2, 2.0 / 3.0)]));
        let none = recall_at(&[], &[], &[1]);
        assert_eq!(none.recall[&1], 0.0);
    }
}
