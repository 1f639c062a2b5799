//! Which point of one image is which of the other.

use crate::error::{Error, Result};
use crate::features::{dot, Features};
use crate::model::kernels::{nearest, Nearest};
use crate::model::{LearnedMatcher, Side};

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

/// Finds matches. The same features give the same matches.
pub trait Matcher: Send + Sync {
    /// Name as in settings and reports.
    fn name(&self) -> &str;

    /// Matches in order of the query's points.
    ///
    /// Errors: features that the matcher cannot compare.
    fn matches(&self, query: &Features, reference: &Features) -> Result<Vec<Match>>;
}

/// [`mutual_matches`] as a [`Matcher`].
#[derive(Clone, Copy, Debug)]
pub struct Mutual {
    /// Largest ratio of the distances to the nearest and the second nearest; 1: any.
    pub max_ratio: f32,
}

impl Default for Mutual {
    fn default() -> Self {
        Self { max_ratio: 1.0 }
    }
}

impl Matcher for Mutual {
    fn name(&self) -> &str {
        "mutual"
    }

    fn matches(&self, query: &Features, reference: &Features) -> Result<Vec<Match>> {
        mutual_matches(query, reference, self.max_ratio)
    }
}

fn side(f: &Features) -> Side<'_> {
    Side { size: f.size(), points: f.points(), scores: f.scores(), descriptors: f.descriptors() }
}

/// A network as a [`Matcher`]; the similarity of a match is its probability.
#[derive(Debug)]
pub struct Learned(pub LearnedMatcher);

impl Matcher for Learned {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn matches(&self, query: &Features, reference: &Features) -> Result<Vec<Match>> {
        if query.is_empty() || reference.is_empty() {
            return Ok(Vec::new());
        }
        let found = self.0.matches(&side(query), &side(reference))?;
        Ok(found.into_iter().map(|(query, reference, similarity)| Match { query, reference, similarity }).collect())
    }
}

/// Distance of unit vectors by their dot product.
fn distance(dot: f32) -> f32 {
    (2.0 - 2.0 * dot).max(0.0).sqrt()
}

/// Mutual nearest neighbours, in order of the query's points; what is nearest is found in fixed point of 16 bits. With `max_ratio` below 1
/// the distance must be below that share of the distance to the second nearest (Lowe, IJCV 2004).
///
/// Errors: descriptors of different dimensions, or not of unit length, which [`Features`] are.
pub fn mutual_matches(query: &Features, reference: &Features, max_ratio: f32) -> Result<Vec<Match>> {
    if query.is_empty() || reference.is_empty() {
        return Ok(Vec::new());
    }
    if query.dim() != reference.dim() {
        return Err(Error::Features { reason: format!("descriptors of {} and {} values do not compare", query.dim(), reference.dim()) });
    }
    let (of_query, of_reference) = nearest(query.descriptors(), reference.descriptors(), query.dim())
        .ok_or_else(|| Error::Features { reason: "descriptors that are not of unit length".into() })?;
    let clear = |n: &Nearest| max_ratio >= 1.0 || distance(n.dot) < max_ratio * distance(n.second);
    let mutual = |(query, n): &(usize, Nearest)| clear(n) && of_reference.get(n.row).is_some_and(|back| back.row == *query);
    let matched = |(q, n): (usize, Nearest)| {
        let similarity = dot(query.descriptor(q), reference.descriptor(n.row));
        Match { query: q, reference: n.row, similarity }
    };
    Ok(of_query.into_iter().enumerate().filter(mutual).map(matched).collect())
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
                // Up to what rounding to fixed point may hide.
                prop_assert!((0..m).all(|r| dot(x.query, r) <= dot(x.query, x.reference) + 5e-4));
                prop_assert!((0..n).all(|q| dot(q, x.reference) <= dot(x.query, x.reference) + 5e-4));
            }
            prop_assert!(found.windows(2).all(|w| w[0].query < w[1].query));
            if ratio >= 1.0 && n > 0 && m > 0 {
                // The best pair of all is always among them.
                let best = (0..n).flat_map(|q| (0..m).map(move |r| (q, r))).map(|(q, r)| dot(q, r)).fold(f64::MIN, f64::max);
                prop_assert!(found.iter().any(|x| (f64::from(x.similarity) - best).abs() < 5e-4));
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
