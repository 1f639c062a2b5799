//! The few layers that networks for local features are made of, batch norm folded.

use super::kernels::{Activation, Conv, Conv3x3, FeatureMap};
use crate::error::{Error, Result};
use candle_core::{Tensor, D};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// A convolution with what follows it. Maps are N x C x H x W with channels last in memory: each layer takes what the one
/// before gives without a copy.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    conv: Kernel,
    activation: Activation,
    pool: bool,
}

#[derive(Clone, Debug)]
enum Kernel {
    /// 3x3 at stride 1 over whole vectors of channels.
    Three(Conv3x3),
    Any(Conv),
}

fn weight_and_bias(tensors: &BTreeMap<String, Tensor>, name: &str) -> Result<(Tensor, Tensor)> {
    let get = |kind: &str| {
        let name = format!("{name}.{kind}");
        tensors.get(&name).cloned().ok_or_else(|| Error::TensorMissing { name, layout: "structvpr local features" })
    };
    Ok((get("weight")?, get("bias")?))
}

impl Layer {
    /// Of `NAME.weight`, O x I x K x K, and `NAME.bias`.
    ///
    /// Errors: a tensor is missing.
    pub fn new(tensors: &BTreeMap<String, Tensor>, name: &str, activation: Activation, stride: usize, pool: bool) -> Result<Self> {
        let (weight, bias) = weight_and_bias(tensors, name)?;
        let (_, inputs, k, _) = weight.dims4()?;
        let conv = match (k, stride) {
            (3, 1) if Conv3x3::suits(inputs) => Kernel::Three(Conv3x3::new(&weight, &bias)?),
            _ => Kernel::Any(Conv::new(&weight, &bias, stride)?),
        };
        Ok(Self { conv, activation, pool })
    }

    /// This after `NAME`, a 3x3 over one plane with ReLU, in one pass; `None` where there is no kernel for that.
    ///
    /// Errors: a tensor is missing or of another shape.
    pub fn after(&self, tensors: &BTreeMap<String, Tensor>, name: &str) -> Result<Option<Self>> {
        let Kernel::Three(conv) = &self.conv else { return Ok(None) };
        let (weight, bias) = weight_and_bias(tensors, name)?;
        Ok(Some(Self { conv: Kernel::Three(conv.after(&weight, &bias)?), ..self.clone() }))
    }

    /// [`Self::forward`] of one image, into memory that is there.
    pub fn run(&self, x: &FeatureMap, out: &mut FeatureMap) -> Result<()> {
        match &self.conv {
            Kernel::Three(conv) => conv.run(x, self.activation, self.pool, out),
            Kernel::Any(conv) if !self.pool => conv.run(x, self.activation, out),
            Kernel::Any(conv) => {
                let mut whole = FeatureMap::default();
                conv.run(x, self.activation, &mut whole)?;
                out.fit(whole.height / 2, whole.width / 2, whole.channels);
                largest_of_four(whole.values(), [1, whole.channels, whole.height, whole.width], out.values_mut());
                Ok(())
            }
        }
    }

    /// 1 x I x H x W to 1 x O x H' x W'.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match &self.conv {
            Kernel::Three(conv) => conv.forward(x, self.activation, self.pool),
            Kernel::Any(conv) => {
                let y = conv.forward(x, self.activation)?;
                if self.pool {
                    max_pool2(&y)
                } else {
                    Ok(y)
                }
            }
        }
    }
}

/// The values of a map, pixel by pixel, and its N, C, H, W.
fn pixels(x: &Tensor) -> Result<(Vec<f32>, [usize; 4])> {
    let (n, c, h, w) = x.dims4()?;
    Ok((x.permute((0, 2, 3, 1))?.flatten_all()?.to_vec1::<f32>()?, [n, c, h, w]))
}

/// The largest of each 2x2, as PyTorch's `MaxPool2d(2)`: an odd last row or column is dropped.
pub(super) fn max_pool2(x: &Tensor) -> Result<Tensor> {
    let (data, [n, c, height, width]) = pixels(x)?;
    let (h, w) = (height / 2, width / 2);
    let mut out = vec![0f32; n * h * w * c];
    largest_of_four(&data, [n, c, height, width], &mut out);
    Ok(Tensor::from_vec(out, (n, h, w, c), x.device())?.permute((0, 3, 1, 2))?)
}

/// Of a map N x H x W x C of these N, C, H, W.
fn largest_of_four(data: &[f32], [_, c, height, width]: [usize; 4], out: &mut [f32]) {
    let (h, w) = (height / 2, width / 2);
    if !out.is_empty() {
        out.par_chunks_mut(w * c).enumerate().for_each(|(row, out)| {
            let top = (row / h * height + row % h * 2) * width * c;
            let (a, b) = (&data[top..][..width * c], &data[top + width * c..][..width * c]);
            for ((out, a), b) in out.chunks_exact_mut(c).zip(a.chunks_exact(2 * c)).zip(b.chunks_exact(2 * c)) {
                let ((a0, a1), (b0, b1)) = (a.split_at(c), b.split_at(c));
                for (at, out) in out.iter_mut().enumerate() {
                    // NaN stays, so that a broken input is seen downstream.
                    *out = [a1[at], b0[at], b1[at]].into_iter().fold(a0[at], |m, v| if v > m || v.is_nan() { v } else { m });
                }
            }
        });
    }
}

/// The channels of both, one after the other.
pub(super) fn join_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let ((left, [n, ca, h, w]), (right, [_, cb, ..])) = (pixels(a)?, pixels(b)?);
    let mut out = Vec::with_capacity(left.len() + right.len());
    for (a, b) in left.chunks_exact(ca.max(1)).zip(right.chunks_exact(cb.max(1))) {
        out.extend_from_slice(a);
        out.extend_from_slice(b);
    }
    Ok(Tensor::from_vec(out, (n, h, w, ca + cb), a.device())?.permute((0, 3, 1, 2))?)
}

/// `x W^T + b` of rows.
#[derive(Debug)]
pub(super) struct Rows {
    /// I x O.
    pub weight: Tensor,
    pub bias: Tensor,
}

impl Rows {
    /// Of a weight O x I and a bias O.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        Ok(Self { weight: weight.t()?.contiguous()?, bias: bias.clone() })
    }

    /// N x I to N x O.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.matmul(&self.weight)?.broadcast_add(&self.bias)?)
    }
}

/// Attention of the rows of `q` over those of `k` and `v` in `heads` contiguous parts, scaled by the root of their width.
pub(super) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let width = q.dim(1)? / heads;
    let split = |t: &Tensor| -> Result<Tensor> { Ok(t.reshape((t.dim(0)?, heads, width))?.transpose(0, 1)?.contiguous()?) };
    let scores = (split(q)?.matmul(&split(k)?.transpose(1, 2)?.contiguous()?)? / (width as f64).sqrt())?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    Ok(weights.matmul(&split(v)?)?.transpose(0, 1)?.reshape(q.dims())?.contiguous()?)
}
