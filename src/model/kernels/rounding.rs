//! 1x1 convolutions rounded to 8 bits, as numbers: what [`super::int8`] packs, weight files hold, and training fits.
//!
//! Values get their step from the pixel's largest. Weights of one output channel span orders of magnitude, for some input channels are
//! hardly ever active: a part of that, on a logarithmic scale, is handed to the values, and of the values' own a part to the weights
//! (SmoothQuant's balance, <https://arxiv.org/abs/2211.10438>; the exponents are ours).
//!
//! What rounding does to a value differs from pixel to pixel and goes in the mean. What it does to a weight is there in every pixel: as
//! much of it as falls on the mean of what the weight sees is taken back with the bias (Nagel et al., ICCV 2019), which leaves a
//! sixteenth of the descriptor's error, as squares [ours: of photographs of CamVid, by means from made pictures].

use super::{contiguous, dispatch, Isa};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// The exponent of a channel's largest weight that is handed to its values.
const HANDED_OVER: f32 = 0.3;
/// The exponent of a channel's largest value that is handed to its weights.
const HANDED_BACK: f32 = 0.2;
/// The largest code of a weight, and of a value that has a sign.
pub(super) const MOST: f32 = 127.0;
/// The largest code of a value that has none.
pub(super) const MOST_UNSIGNED: f32 = 255.0;

/// What a 1x1 convolution sees, of every input channel; empty where it is not known.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// The mean.
    pub means: Vec<f32>,
    /// The largest absolute value.
    pub largest: Vec<f32>,
}

/// Weight and bias of a 1x1 convolution, the weight in 8 bits: `codes[o][i] * steps[o] * scales[i]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// O x I, each within -127 to 127.
    pub codes: Vec<i8>,
    /// Of every output channel: what code 1 is worth, before `scales`. Not a number where a weight was none.
    pub steps: Vec<f32>,
    /// Of every input channel: what its values are multiplied by before they are rounded, too.
    pub scales: Vec<f32>,
    /// Of every output channel.
    pub bias: Vec<f32>,
}

impl Rounded {
    /// The nearest codes to `weights`, O x I, and the `bias`, O, that goes with them where the inputs are as `seen`.
    /// Panics: lengths that do not fit.
    pub fn new(weights: &[f32], bias: &[f32], seen: &Seen) -> Self {
        Self::by(weights, bias, Self::scales_of(weights, bias.len(), seen), seen, |row| {
            let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
            // A code is always a number: what is none shows in the step.
            let step = match largest {
                _ if row.iter().any(|v| !v.is_finite()) => f32::NAN,
                0.0 => 1.0,
                largest => largest / MOST,
            };
            (row.iter().map(|w| (w / step).round() as i8).collect(), step)
        })
    }

    /// Of every input channel what its values are multiplied by before they are rounded. Panics: lengths that do not fit.
    pub fn scales_of(weights: &[f32], outputs: usize, seen: &Seen) -> Vec<f32> {
        let inputs = weights.len() / outputs.max(1);
        let fits = |v: &[f32]| v.is_empty() || v.len() == inputs;
        assert!(weights.len() == inputs * outputs && fits(&seen.means) && fits(&seen.largest), "weights to round");
        let part = |v: f32, exponent: f32| if v.is_normal() { v.powf(exponent) } else { 1.0 };
        let of = |i: usize| {
            let largest = weights.iter().skip(i).step_by(inputs).fold(0f32, |m, w| m.max(w.abs()));
            part(largest, HANDED_OVER) / part(seen.largest.get(i).copied().unwrap_or(1.0), HANDED_BACK)
        };
        (0..inputs).map(of).collect()
    }

    /// As [`Self::new`], where `codes` gives codes and step of each row of the weights divided by `scales`. Panics: lengths that do not fit.
    pub fn by(weights: &[f32], bias: &[f32], scales: Vec<f32>, seen: &Seen, mut codes: impl FnMut(&[f32]) -> (Vec<i8>, f32)) -> Self {
        let inputs = scales.len();
        assert!(weights.len() == inputs * bias.len(), "weights to round");
        let mut out = Self { codes: Vec::with_capacity(weights.len()), steps: Vec::with_capacity(bias.len()), scales, bias: bias.to_vec() };
        for (row, bias) in weights.chunks_exact(inputs.max(1)).zip(&mut out.bias) {
            let row: Vec<f32> = row.iter().zip(&out.scales).map(|(w, s)| w / s).collect();
            let (codes, step) = codes(&row);
            assert!(codes.len() == inputs, "codes of a row");
            for (i, mean) in seen.means.iter().enumerate() {
                *bias += (row[i] - f32::from(codes[i]) * step) * out.scales[i] * mean;
            }
            out.codes.extend(codes);
            out.steps.push(step);
        }
        out
    }

    /// What the codes stand for, O x I.
    pub fn weights(&self) -> Vec<f32> {
        let rows = self.codes.chunks_exact(self.scales.len().max(1)).zip(&self.steps);
        rows.flat_map(|(row, step)| row.iter().zip(&self.scales).map(move |(c, scale)| f32::from(*c) * step * scale)).collect()
    }
}

struct Values {
    scales: Arc<[f32]>,
    signed: bool,
}

/// `x` as a 1x1 convolution in 8 bits sees it: multiplied by `scales`, rounded to steps of the pixel's largest value, divided by `scales`.
/// The gradient goes through as if nothing had been rounded (Bengio et al. 2013, <https://arxiv.org/abs/1308.3432>), for training.
///
/// `x`: N x C x H x W, contiguous f32; where not `signed`, of no negative value. Errors: `scales` that are not C.
pub fn rounded_values(x: &Tensor, scales: &Arc<[f32]>, signed: bool) -> Result<Tensor> {
    x.apply_op1(Values { scales: scales.clone(), signed })
}

impl CustomOp1 for Values {
    fn name(&self) -> &'static str {
        "rounded_values"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, channels, height, width) = layout.shape().dims4()?;
        let x = contiguous(self.name(), storage, layout)?;
        if self.scales.len() != channels {
            candle_core::bail!("rounded_values: {channels} channels but {} scales", self.scales.len());
        }
        let mut out = vec![0f32; x.len()];
        let size = channels * height * width;
        if size > 0 {
            let (isa, scales, most) = (Isa::detect(), &self.scales[..], if self.signed { MOST } else { MOST_UNSIGNED });
            out.par_chunks_mut(size).zip(x.par_chunks(size)).for_each(|(out, x)| {
                dispatch!(isa, image(x: &[f32], scales: &[f32], most: f32, out: &mut [f32]));
            });
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.clone()))
    }
}

/// Pixels of an image that are rounded together: their values in all channels lie in the second-level cache.
const TOGETHER: usize = 256;

/// One image, C x pixels; nothing here is fused.
#[inline(always)]
fn image<const FUSED: bool>(x: &[f32], scales: &[f32], most: f32, out: &mut [f32]) {
    let pixels = x.len() / scales.len();
    for first in (0..pixels).step_by(TOGETHER) {
        let n = TOGETHER.min(pixels - first);
        let mut largest = [f32::MIN_POSITIVE; TOGETHER];
        for (x, scale) in x.chunks_exact(pixels).zip(scales) {
            for (m, x) in largest.iter_mut().zip(&x[first..first + n]) {
                let size = (x * scale).abs();
                *m = if size > *m { size } else { *m };
            }
        }
        for ((x, out), scale) in x.chunks_exact(pixels).zip(out.chunks_exact_mut(pixels)).zip(scales) {
            for ((m, x), out) in largest.iter().zip(&x[first..first + n]).zip(&mut out[first..first + n]) {
                *out = (x * scale * (most / m)).round_ties_even() * (m / most) / scale;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(seed: u64, n: usize) -> Vec<f32> {
        (0..n as u64).map(|i| crate::test_noise(seed, i)).collect()
    }

    proptest! {
        /// Each weight is off by half a step at most, the largest of a row by nothing, and the mean of what comes out stays.
        #[test]
        fn weights_are_near_and_the_mean_stays(inputs in 1usize..80, outputs in 1usize..40, seed in any::<u64>(), spread in 0f32..3.0) {
            let factor = noise(seed ^ 3, inputs);
            let weights: Vec<f32> = noise(seed, inputs * outputs).iter().zip(factor.iter().cycle()).map(|(w, f)| w * (spread * f).exp()).collect();
            let (bias, means) = (noise(seed ^ 1, outputs), noise(seed ^ 2, inputs));
            let largest = noise(seed ^ 4, inputs).iter().map(|v| v.abs()).collect();
            let rounded = Rounded::new(&weights, &bias, &Seen { means: means.clone(), largest });
            let near = rounded.weights();
            for (o, (bias, corrected)) in bias.iter().zip(&rounded.bias).enumerate() {
                let row = o * inputs..(o + 1) * inputs;
                prop_assert!(rounded.codes[row.clone()].iter().any(|c| c.abs() == 127));
                let (mut before, mut after) = (f64::from(*bias), f64::from(*corrected));
                for (i, k) in row.enumerate() {
                    let step = rounded.steps[o] * rounded.scales[i];
                    prop_assert!((weights[k] - near[k]).abs() <= 0.5001 * step, "{} {} of {step}", weights[k], near[k]);
                    before += f64::from(weights[k] * means[i]);
                    after += f64::from(near[k] * means[i]);
                }
                prop_assert!((before - after).abs() < 1e-4 * (1.0 + before.abs()), "{before} {after}");
            }
            // With nothing known of the inputs the bias stays as it is.
            prop_assert_eq!(Rounded::new(&weights, &bias, &Seen::default()).bias, bias);
        }

        /// The definition, in f64; the gradient as if nothing had been rounded.
        #[test]
        fn values_are_near_and_the_gradient_goes_through(n in 1usize..3, c in 1usize..20, h in 1usize..20, w in 1usize..30, signed: bool, seed in any::<u64>()) {
            let shape = [n, c, h, w];
            let mut x = noise(seed, n * c * h * w);
            if !signed {
                x.iter_mut().for_each(|v| *v = v.abs());
            }
            let scales: Arc<[f32]> = noise(seed ^ 1, c).iter().map(|v| v.exp()).collect();
            let var = candle_core::Var::from_vec(x.clone(), &shape, &candle_core::Device::Cpu).unwrap();
            let y = rounded_values(&var, &scales, signed).unwrap();
            let got = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for (p, b) in (0..h * w).flat_map(|p| (0..n).map(move |b| (p, b))) {
                let at = |k: usize| (b * c + k) * h * w + p;
                let largest = (0..c).map(|k| f64::from(x[at(k)].abs() * scales[k])).fold(0.0, f64::max);
                for k in 0..c {
                    let step = largest / if signed { 127.0 } else { 255.0 } / f64::from(scales[k]);
                    prop_assert!((f64::from(got[at(k)]) - f64::from(x[at(k)])).abs() <= 0.5001 * step + 1e-9);
                    let codes = f64::from(got[at(k)]) / step.max(1e-30);
                    prop_assert!((codes - codes.round()).abs() < 1e-3, "{codes}");
                }
            }
            let weight = candle_core::Tensor::from_vec(noise(seed ^ 2, x.len()), &shape, &candle_core::Device::Cpu).unwrap();
            let grads = (&y * &weight).unwrap().sum_all().unwrap().backward().unwrap();
            let grad = grads.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            prop_assert_eq!(grad, weight.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        }
    }

    #[test]
    fn what_is_no_number_is_not_hidden() {
        let mut weights = vec![0.5f32; 20];
        weights[7] = f32::INFINITY;
        let rounded = Rounded::new(&weights, &[0.0, 1.0], &Seen::default());
        assert!(rounded.steps[0].is_nan() && rounded.steps[1].is_finite());
        let scales: Arc<[f32]> = [1f32; 2].into();
        let x = Tensor::new(&[[[[1f32]], [[f32::NAN]]]], &candle_core::Device::Cpu).unwrap();
        let y = rounded_values(&x, &scales, true).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(y[1].is_nan());
        let wrong =
            rounded_values(&Tensor::zeros((1, 3, 1, 1), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap(), &scales, true);
        assert!(wrong.unwrap_err().to_string().contains("3 channels but 2 scales"));
    }
}
