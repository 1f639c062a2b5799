//! Bias and activation in one pass over N x C x H x W: Candle would make three.

use super::{contiguous, Activation};
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, D};
use rayon::prelude::*;

struct BiasAct(Activation);

/// `activation(x + bias)`, with gradients.
///
/// `x`: N x C x H x W, contiguous f32. `bias`: C. Returns the shape of `x`.
pub fn bias_act(x: &Tensor, bias: &Tensor, activation: Activation) -> Result<Tensor> {
    x.apply_op2(bias, BiasAct(activation))
}

impl CustomOp2 for BiasAct {
    fn name(&self) -> &'static str {
        "bias_act"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, channels, height, width) = l1.shape().dims4()?;
        let x = contiguous(self.name(), s1, l1)?;
        let bias = contiguous(self.name(), s2, l2)?;
        if bias.len() != channels {
            candle_core::bail!("bias_act: {channels} channels but {} biases", bias.len());
        }
        let activation = self.0;
        let mut out = vec![0f32; x.len()];
        if height * width > 0 {
            out.par_chunks_mut(height * width).zip(x.par_chunks(height * width)).enumerate().for_each(|(plane, (out, x))| {
                let b = bias[plane % channels];
                for (o, x) in out.iter_mut().zip(x) {
                    *o = activation.apply(x + b);
                }
            });
        }
        Ok((CpuStorage::F32(out), l1.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, bias: &Tensor, res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = masked_grad(self.0, res, grad)?;
        let grad_bias = grad.sum(D::Minus1)?.sum(D::Minus1)?.sum(0)?.reshape(bias.shape())?;
        Ok((Some(grad), Some(grad_bias)))
    }
}

struct ClampGrad(f32);

/// The gradient before the activation: that after it where the activation has slope 1, else 0.
/// `res` is the activation's output.
pub(super) fn masked_grad(activation: Activation, res: &Tensor, grad: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::None => grad.contiguous(),
        Activation::Relu => res.contiguous()?.apply_op2_no_bwd(&grad.contiguous()?, &ClampGrad(f32::INFINITY)),
        Activation::Relu6 => res.contiguous()?.apply_op2_no_bwd(&grad.contiguous()?, &ClampGrad(6.0)),
    }
}

impl CustomOp2 for ClampGrad {
    fn name(&self) -> &'static str {
        "clamp_grad"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let res = contiguous(self.name(), s1, l1)?;
        let grad = contiguous(self.name(), s2, l2)?;
        let out = res.par_iter().with_min_len(1 << 14).zip(grad).map(|(r, g)| if *r > 0.0 && *r < self.0 { *g } else { 0.0 }).collect();
        Ok((CpuStorage::F32(out), l2.shape().clone()))
    }
}
