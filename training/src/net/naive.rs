//! The same trunks from Candle's own operations: the reference of the tests, and what the bench prints beside ours.

use super::norm::EPS;
use super::trunk::{Conv, Trunk};
use candle_core::{Result, Tensor};
use structvpr::model::kernels::Pad;
use structvpr::model::Padding;

fn pad(x: &Tensor, padding: Padding, stride: usize) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    let p = match padding {
        Padding::Symmetric => Pad::ONE,
        Padding::Same => Pad::same(h, w, stride),
    };
    x.pad_with_zeros(2, p.top, p.bottom)?.pad_with_zeros(3, p.left, p.right)
}

/// Batch norm by the batch's statistics.
fn norm(x: &Tensor, conv: &Conv, weights: &Tensor) -> Result<Tensor> {
    let part = |r: &std::ops::Range<usize>| weights.narrow(0, r.start, r.len())?.reshape((1, conv.outputs, 1, 1));
    let mean = x.mean_keepdim((0, 2, 3))?;
    let centred = x.broadcast_sub(&mean)?;
    let variance = centred.sqr()?.mean_keepdim((0, 2, 3))?;
    centred.broadcast_div(&(variance + EPS)?.sqrt()?)?.broadcast_mul(&part(&conv.gamma)?)?.broadcast_add(&part(&conv.beta)?)
}

impl Trunk {
    /// The taps of `x`, N x C x H x W, in training mode; `weights` is the flat vector.
    pub fn naive(&self, weights: &Tensor, x: &Tensor) -> Result<Vec<Tensor>> {
        let activate = |x: Tensor| match self.arch {
            super::Arch::MobileNetV2 => x.clamp(0.0, 6.0),
            super::Arch::MobileNetL => x.relu(),
        };
        let conv = |x: &Tensor, conv: &Conv, k: usize, groups: usize| -> Result<Tensor> {
            let w = weights.narrow(0, conv.weight.start, conv.weight.len())?;
            let w = w.reshape((conv.outputs, conv.inputs / groups, k, k))?;
            let x = if k == 3 { pad(x, self.padding, conv.stride)? } else { x.clone() };
            norm(&x.conv2d(&w, 0, conv.stride, 1, groups)?, conv, weights)
        };
        let mut x = x.clone();
        if let Some(stem) = &self.stem {
            x = activate(conv(&x, stem, 3, 1)?)?;
        }
        let mut taps = Vec::new();
        for block in &self.blocks {
            let mut y = x.clone();
            if let Some(expand) = &block.expand {
                y = activate(conv(&y, expand, 1, 1)?)?;
            }
            y = activate(conv(&y, &block.depthwise, 3, block.depthwise.inputs)?)?;
            y = conv(&y, &block.project, 1, 1)?;
            x = if block.residual { (y + x)? } else { y };
            if block.tap {
                taps.push(x.clone());
            }
        }
        Ok(taps)
    }
}
