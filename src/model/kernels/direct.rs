//! Convolution of any kernel and stride over pixels whose channels lie side by side: a matrix product over the patches.
//! Inference only.

use super::pointwise::{product, Packed};
use super::{channels_last, contiguous, Activation, FeatureMap, Isa};
use crate::error::{Error, Result};
use crate::simd::zeroed;
use crate::team::chunks_with;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use std::sync::Arc;

/// A convolution with `kernel / 2` zeros around.
#[derive(Clone, Debug)]
pub struct Conv {
    weights: Arc<Patches>,
}

#[derive(Debug)]
struct Patches {
    packed: Packed,
    kernel: usize,
    stride: usize,
    inputs: usize,
    outputs: usize,
    isa: Isa,
}

impl Conv {
    /// From `weight`, O x I x K x K, and `bias`, O.
    ///
    /// Errors: other shapes.
    pub fn new(weight: &Tensor, bias: &Tensor, stride: usize) -> Result<Self> {
        Self::on(weight, bias, stride, Isa::detect())
    }

    fn on(weight: &Tensor, bias: &Tensor, stride: usize, isa: Isa) -> Result<Self> {
        let (outputs, inputs, h, w) = weight.dims4()?;
        let bias = bias.flatten_all()?.to_vec1::<f32>()?;
        if h != w || bias.len() != outputs || inputs == 0 || outputs == 0 || stride == 0 || h % 2 == 0 {
            let reason = format!("a convolution of weights {:?}, {} biases and stride {stride}", weight.dims(), bias.len());
            return Err(Error::weights(reason));
        }
        // Channels of a pixel lie side by side in a patch, too.
        let flat = weight.permute((0, 2, 3, 1))?.flatten_all()?.to_vec1::<f32>()?;
        let packed = Packed::new(&flat, &bias, h * h * inputs, isa);
        Ok(Self { weights: Arc::new(Patches { packed, kernel: h, stride, inputs, outputs, isa }) })
    }

    /// `activation(conv(x) + bias)`: N x I x H x W f32 to N x O x H' x W', channels last in memory.
    pub fn forward(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let y = channels_last(x)?.apply_op1_no_bwd(&Op { weights: self.weights.clone(), activation })?;
        Ok(y.permute((0, 3, 1, 2))?)
    }

    /// [`Self::forward`] of one image, into memory that is there.
    ///
    /// Errors: another number of channels.
    pub fn run(&self, x: &FeatureMap, activation: Activation, out: &mut FeatureMap) -> Result<()> {
        let op = Op { weights: self.weights.clone(), activation };
        op.check(x.channels)?;
        let (height, width) = op.size(x.height, x.width);
        out.fit(height, width, self.weights.outputs);
        op.image(x.values(), (x.height, x.width), out.values_mut());
        Ok(())
    }
}

struct Op {
    weights: Arc<Patches>,
    activation: Activation,
}

/// One row's patches, and its output where channels are no whole units.
#[derive(Default)]
struct Scratch {
    patches: Vec<f32>,
    output: Vec<f32>,
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "conv"
    }

    /// N x H x W x I to N x H' x W' x O.
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (n, height, width, inputs) = layout.shape().dims4()?;
        self.check(inputs)?;
        let x = contiguous(self.name(), storage, layout)?;
        let ((h, w), outputs) = (self.size(height, width), self.weights.outputs);
        let mut out = zeroed(n * h * w * outputs);
        if !out.is_empty() {
            for (x, out) in x.chunks_exact(height * width * inputs).zip(out.chunks_exact_mut(h * w * outputs)) {
                self.image(x, (height, width), out);
            }
        }
        Ok((CpuStorage::F32(out), Shape::from((n, h, w, outputs))))
    }
}

impl Op {
    fn check(&self, inputs: usize) -> candle_core::Result<()> {
        if inputs != self.weights.inputs {
            candle_core::bail!("conv: {inputs} input channels, the weights have {}", self.weights.inputs);
        }
        Ok(())
    }

    /// Height and width of the output: an odd kernel with half of it around.
    fn size(&self, height: usize, width: usize) -> (usize, usize) {
        let along = |n: usize| if n == 0 { 0 } else { (n - 1) / self.weights.stride + 1 };
        (along(height), along(width))
    }

    /// Of one image, every value of `out`.
    fn image(&self, x: &[f32], (height, width): (usize, usize), out: &mut [f32]) {
        let Patches { kernel, stride, inputs, outputs, .. } = *self.weights;
        let (_, w) = self.size(height, width);
        if out.is_empty() {
            return;
        }
        chunks_with(out, w * outputs, Scratch::default, |scratch, y, out| {
            let Scratch { patches, output } = scratch;
            let pixels = if kernel == 1 && stride == 1 {
                &x[y * width * inputs..][..width * inputs]
            } else {
                patches.resize(w * self.weights.packed.inputs, 0.0);
                self.gather(x, (height, width), y, patches);
                &patches[..]
            };
            if outputs == self.weights.packed.outputs {
                product(&self.weights.packed, self.weights.isa, self.activation, pixels, w, out);
            } else {
                output.resize(w * self.weights.packed.outputs, 0.0);
                product(&self.weights.packed, self.weights.isa, self.activation, pixels, w, output);
                for (to, from) in out.chunks_exact_mut(outputs).zip(output.chunks_exact(self.weights.packed.outputs)) {
                    to.copy_from_slice(&from[..outputs]);
                }
            }
        });
    }

    /// The patches of output row `y`.
    fn gather(&self, x: &[f32], (height, width): (usize, usize), y: usize, patches: &mut [f32]) {
        let Patches { kernel, stride, inputs, .. } = *self.weights;
        let half = kernel / 2;
        for (at, patch) in patches.chunks_exact_mut(kernel * kernel * inputs).enumerate() {
            for (k, part) in patch.chunks_exact_mut(kernel * inputs).enumerate() {
                let sy = (y * stride + k).wrapping_sub(half);
                if sy >= height {
                    part.fill(0.0);
                    continue;
                }
                // Columns of the patch that are inside.
                let left = half.saturating_sub(at * stride).min(kernel);
                let from = at * stride + left - half.min(at * stride + left);
                let inside = width.saturating_sub(from).min(kernel - left);
                part[..left * inputs].fill(0.0);
                part[left * inputs..][..inside * inputs].copy_from_slice(&x[(sy * width + from) * inputs..][..inside * inputs]);
                part[(left + inside) * inputs..].fill(0.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::kernels::noise;
    use candle_core::Device;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        /// Equal to Candle's own convolution, on every instruction set, whatever lies last in memory.
        #[test]
        fn equals_the_definition(
            seed in 0u64..1000, n in 1usize..3, i in 1usize..40, o in 1usize..70, h in 1usize..20, w in 1usize..40,
            half in 0usize..3, stride in 1usize..4, last: bool,
        ) {
            let kernel = 2 * half + 1;
            let (x, k, b) = (noise(seed, &[n, i, h, w]), noise(seed + 1, &[o, i, kernel, kernel]), noise(seed + 2, &[o]));
            let want = x.conv2d(&k, half, stride, 1, 1).unwrap().broadcast_add(&b.reshape((1, o, 1, 1)).unwrap()).unwrap().relu().unwrap();
            let x = if last { x.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap().permute((0, 3, 1, 2)).unwrap() } else { x };
            for isa in Isa::available() {
                let got = Conv::on(&k, &b, stride, isa).unwrap().forward(&x, Activation::Relu).unwrap();
                prop_assert_eq!(got.dims(), want.dims());
                let worst = (got - &want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                prop_assert!(worst < 2e-6 * (i * kernel * kernel) as f32, "{isa:?}: {worst}");
            }
        }
    }

    #[test]
    fn nan_and_infinity_pass_and_shapes_that_do_not_fit_are_errors() {
        let (k, b) = (noise(2, &[3, 2, 3, 3]), noise(3, &[3]));
        let bad = Tensor::full(f32::NAN, (1, 2, 8, 8), &Device::Cpu).unwrap();
        for isa in Isa::available() {
            let out = Conv::on(&k, &b, 1, isa).unwrap().forward(&bad, Activation::Relu6).unwrap();
            assert!(out.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| v.is_nan()), "{isa:?}");
        }
        let e = Conv::new(&k, &noise(1, &[2]), 1).unwrap_err().to_string();
        assert!(e.contains("[3, 2, 3, 3]") && e.contains("2 biases"), "{e}");
        assert!(Conv::new(&k, &b, 0).is_err() && Conv::new(&noise(1, &[3, 2, 2, 2]), &b, 1).is_err());
        assert!(Conv::new(&k, &b, 1).unwrap().forward(&noise(1, &[1, 5, 8, 8]), Activation::None).is_err());
    }
}
