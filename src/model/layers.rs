//! The few layers that networks for local features are made of, batch norm folded.

use super::kernels::{bias_act, Activation, Conv3x3};
use crate::error::{Error, Result};
use candle_core::{Tensor, D};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// A convolution with what follows it.
#[derive(Clone, Debug)]
pub(super) enum Layer {
    /// 1x1: a matrix product over channels. `weight` is O x I.
    Point { weight: Tensor, bias: Tensor, activation: Activation },
    /// 3x3 at stride 1.
    Three { conv: Conv3x3, activation: Activation, pool: bool },
    /// 3x3 at stride 2, or another kernel.
    Other { weight: Tensor, bias: Tensor, activation: Activation, stride: usize },
}

impl Layer {
    /// Of `NAME.weight`, O x I x K x K, and `NAME.bias`.
    ///
    /// Errors: a tensor is missing.
    pub fn new(tensors: &BTreeMap<String, Tensor>, name: &str, activation: Activation, stride: usize, pool: bool) -> Result<Self> {
        let get = |kind: &str| {
            let name = format!("{name}.{kind}");
            tensors.get(&name).cloned().ok_or_else(|| Error::TensorMissing { name, layout: "structvpr local features" })
        };
        let (weight, bias) = (get("weight")?, get("bias")?);
        let (outputs, inputs, k, _) = weight.dims4()?;
        Ok(match (k, stride) {
            (1, 1) => Self::Point { weight: weight.reshape((outputs, inputs))?, bias, activation },
            (3, 1) => Self::Three { conv: Conv3x3::new(&weight, &bias)?, activation, pool },
            _ => Self::Other { weight, bias, activation, stride },
        })
    }

    /// 1 x I x H x W to 1 x O x H' x W'.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Point { weight, bias, activation } => {
                let (_, inputs, h, w) = x.dims4()?;
                let y = weight.matmul(&x.reshape((inputs, h * w))?)?;
                bias_act(&y.reshape((1, weight.dim(0)?, h, w))?, bias, *activation)?
            }
            Self::Three { conv, activation, pool } => conv.forward(x, *activation, *pool)?,
            Self::Other { weight, bias, activation, stride } => {
                bias_act(&x.conv2d(weight, weight.dim(2)? / 2, *stride, 1, 1)?.contiguous()?, bias, *activation)?
            }
        })
    }
}

/// The largest of each 2x2, as PyTorch's `MaxPool2d(2)`: an odd last row or column is dropped.
pub(super) fn max_pool2(x: &Tensor) -> Result<Tensor> {
    let (n, c, height, width) = x.dims4()?;
    let (h, w) = (height / 2, width / 2);
    let data = x.flatten_all()?.to_vec1::<f32>()?;
    let mut out = vec![0f32; n * c * h * w];
    if !out.is_empty() {
        out.par_chunks_mut(h * w).zip(data.par_chunks(height * width)).for_each(|(out, plane)| {
            for (out, rows) in out.chunks_exact_mut(w).zip(plane.chunks_exact(2 * width)) {
                let (a, b) = rows.split_at(width);
                for ((out, a), b) in out.iter_mut().zip(a.chunks_exact(2)).zip(b.chunks_exact(2)) {
                    // NaN stays, so that a broken input is seen downstream.
                    *out = [a[1], b[0], b[1]].into_iter().fold(a[0], |m, v| if v > m || v.is_nan() { v } else { m });
                }
            }
        });
    }
    Ok(Tensor::from_vec(out, (n, c, h, w), x.device())?)
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
