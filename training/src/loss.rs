//! Losses of both stages.

use candle_core::{Result, Tensor, D};

/// Margin of the triplet loss [paper].
pub const MARGIN: f64 = 0.1;

/// L2 distance of rows, N x D and N x D to N.
pub fn distance(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    // The floor keeps the root's gradient finite where two rows are the same.
    (a - b)?.sqr()?.sum(D::Minus1)?.maximum(1e-8)?.sqrt()
}

/// `max(0, d(q, p) - d(q, n) + m)` on L2 distances of unit rows, mean over queries and their negatives [paper].
///
/// `q`, `p`: N x D. `n`: (N * K) x D, the K negatives of a query one behind the other.
pub fn triplet(q: &Tensor, p: &Tensor, n: &Tensor, margin: f64) -> Result<Tensor> {
    let (queries, dim) = q.dims2()?;
    let k = n.dim(0)? / queries;
    let q_of_n = q.unsqueeze(1)?.broadcast_as((queries, k, dim))?;
    let negative = distance(&q_of_n.contiguous()?, &n.reshape((queries, k, dim))?)?;
    let positive = distance(q, p)?.unsqueeze(1)?.broadcast_as((queries, k))?;
    ((positive - negative)? + margin)?.relu()?.mean_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn triplet_is_the_formula_and_equal_rows_have_a_gradient() {
        let t = |v: &[f32], n: usize| Tensor::from_slice(v, (n, 2), &Device::Cpu).unwrap();
        let q = Var::from_tensor(&t(&[1.0, 0.0, 0.0, 1.0], 2)).unwrap();
        let p = t(&[1.0, 0.0, 0.6, 0.8], 2);
        let n = t(&[0.0, 1.0, 0.8, 0.6, 0.0, 1.0, -1.0, 0.0], 4);
        let d = |a: [f64; 2], b: [f64; 2]| ((a[0] - b[0]).powi(2) + (a[1] - b[1]).powi(2)).max(1e-8).sqrt();
        let one = |q, p, n| (d(q, p) - d(q, n) + MARGIN).max(0.0);
        let want = (one([1., 0.], [1., 0.], [0., 1.])
            + one([1., 0.], [1., 0.], [0.8, 0.6])
            + one([0., 1.], [0.6, 0.8], [0., 1.])
            + one([0., 1.], [0.6, 0.8], [-1., 0.]))
            / 4.0;
        let loss = triplet(q.as_tensor(), &p, &n, MARGIN).unwrap();
        assert!((f64::from(loss.to_scalar::<f32>().unwrap()) - want).abs() < 1e-6);
        let g = loss.backward().unwrap().get(&q).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(g.iter().all(|v| v.is_finite()), "{g:?}");
    }
}
