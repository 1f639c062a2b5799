//! Which point of one image is which of the other.

use crate::error::{Error, Result};
use crate::features::Features;
use candle_core::{Device, Tensor};

/// Two points that are each other's nearest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Match {
    /// Point of the query.
    pub query: usize,
    /// Point of the reference.
    pub reference: usize,
    /// Dot product of their descriptors, -1 to 1.
    pub similarity: f32,
}

/// Index and value of the largest, and the next value; the first of equals.
#[derive(Clone, Copy)]
struct Best {
    index: usize,
    first: f32,
    second: f32,
}

impl Best {
    const NONE: Self = Self { index: usize::MAX, first: f32::NEG_INFINITY, second: f32::NEG_INFINITY };

    fn see(&mut self, index: usize, value: f32) {
        if value > self.first {
            *self = Self { index, first: value, second: self.first };
        } else if value > self.second {
            self.second = value;
        }
    }
}

/// Distance of unit vectors by their dot product.
fn distance(dot: f32) -> f32 {
    (2.0 - 2.0 * dot).max(0.0).sqrt()
}

/// Mutual nearest neighbours, in order of the query's points. With `max_ratio` below 1 the distance must be below
/// that share of the distance to the second nearest (Lowe, IJCV 2004).
///
/// Errors: descriptors of different dimensions.
pub fn mutual_matches(query: &Features, reference: &Features, max_ratio: f32) -> Result<Vec<Match>> {
    if query.is_empty() || reference.is_empty() {
        return Ok(Vec::new());
    }
    if query.dim() != reference.dim() {
        return Err(Error::Features { reason: format!("descriptors of {} and {} values do not compare", query.dim(), reference.dim()) });
    }
    let tensor = |f: &Features| Tensor::from_slice(f.descriptors(), (f.len(), f.dim()), &Device::Cpu);
    let dots = tensor(query)?.matmul(&tensor(reference)?.t()?)?.flatten_all()?.to_vec1::<f32>()?;
    let mut by_query = vec![Best::NONE; query.len()];
    let mut by_reference = vec![Best::NONE; reference.len()];
    for (q, row) in dots.chunks_exact(reference.len()).enumerate() {
        for (r, dot) in row.iter().enumerate() {
            by_query[q].see(r, *dot);
            by_reference[r].see(q, *dot);
        }
    }
    let distinct = |b: &Best| max_ratio >= 1.0 || distance(b.first) < max_ratio * distance(b.second);
    let pairs = by_query.iter().enumerate().filter(|(q, b)| by_reference.get(b.index).is_some_and(|r| r.index == *q) && distinct(b));
    Ok(pairs.map(|(q, b)| Match { query: q, reference: b.index, similarity: b.first }).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn features(seed: u64, n: usize, dim: usize) -> Features {
        let values = (0..n * dim).map(|i| crate::test_noise(seed, i as u64)).collect();
        Features::new(100, 100, vec![[1.0, 1.0]; n], vec![1.0; n], dim, values).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// As by the definition, point by point.
        #[test]
        fn matches_are_mutual_nearest(seed in 0u64..1000, n in 0usize..40, m in 0usize..40, dim in 1usize..40, ratio in 0.5f32..1.2) {
            let (a, b) = (features(seed, n, dim), features(seed + 7777, m, dim));
            let dot = |q: usize, r: usize| -> f64 {
                let row = |f: &Features, i: usize| f.descriptors()[i * dim..(i + 1) * dim].to_vec();
                row(&a, q).iter().zip(row(&b, r)).map(|(x, y)| f64::from(*x) * f64::from(y)).sum()
            };
            let found = mutual_matches(&a, &b, ratio).unwrap();
            for x in &found {
                prop_assert!((f64::from(x.similarity) - dot(x.query, x.reference)).abs() < 1e-5);
                prop_assert!((0..m).all(|r| dot(x.query, r) <= dot(x.query, x.reference) + 1e-5));
                prop_assert!((0..n).all(|q| dot(q, x.reference) <= dot(x.query, x.reference) + 1e-5));
            }
            prop_assert!(found.windows(2).all(|w| w[0].query < w[1].query));
            if ratio >= 1.0 && n > 0 && m > 0 {
                // The best pair of all is always among them.
                let best = (0..n).flat_map(|q| (0..m).map(move |r| (q, r))).map(|(q, r)| dot(q, r)).fold(f64::MIN, f64::max);
                prop_assert!(found.iter().any(|x| (f64::from(x.similarity) - best).abs() < 1e-5));
            }
        }
    }

    #[test]
    fn an_ambiguous_point_fails_the_ratio_and_other_dimensions_are_an_error() {
        let of = |rows: &[[f32; 2]]| Features::new(9, 9, vec![[0.0, 0.0]; rows.len()], vec![1.0; rows.len()], 2, rows.concat()).unwrap();
        let (q, r) = (of(&[[1.0, 0.0]]), of(&[[1.0, 0.1], [1.0, 0.11]]));
        assert_eq!(mutual_matches(&q, &r, 1.0).unwrap().len(), 1);
        assert!(mutual_matches(&q, &r, 0.8).unwrap().is_empty());
        assert!(mutual_matches(&q, &features(1, 3, 5), 1.0).unwrap_err().to_string().contains("2 and 5"));
    }
}
