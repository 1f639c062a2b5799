//! Codes of 1x1 convolutions, layer by layer: a weight is rounded so that what the rounding before it did to the layer's output is undone
//! as far as it can be, for inputs that go together as they do in pictures (OPTQ, Frantar et al., ICLR 2023). [ours: what the pixels'
//! mean makes of it is the bias's; a row's step is the best of a few]

use anyhow::{ensure, Context, Result};
use candle_core::Tensor;
use nalgebra::DMatrix;
use rayon::prelude::*;
use std::collections::BTreeMap;
use structvpr::model::{is_kept, MobileNetV2, Rounded, RoundedNetwork, Seen, Weights};

/// Pixels of a picture that a layer is shown, about.
const PIXELS: usize = 600;
/// Of the inputs' mean variance what is added to each.
const DAMPING: f64 = 0.01;
/// Steps that are tried, in that of the row's largest weight: a smaller one cuts off a few weights and is nearer to the others. [ours]
const TRIED: [f64; 4] = [1.0, 0.94, 0.88, 0.8];
const MOST: f64 = 127.0;

/// What a layer has been shown.
struct Inputs {
    pixels: usize,
    sums: Vec<f64>,
    largest: Vec<f32>,
    /// Sums of products of two channels each.
    products: DMatrix<f64>,
}

impl Inputs {
    fn add(&mut self, x: &Tensor) -> candle_core::Result<()> {
        let (_, channels, height, width) = x.dims4()?;
        let (all, x) = (height * width, x.flatten_all()?.to_vec1::<f32>()?);
        let step = (all / PIXELS).max(1);
        let shown = DMatrix::from_fn(channels, all.div_ceil(step), |c, p| f64::from(x[c * all + p * step]));
        self.pixels += shown.ncols();
        for (c, (sum, largest)) in self.sums.iter_mut().zip(&mut self.largest).enumerate() {
            *sum += shown.row(c).sum();
            *largest = x[c * all..(c + 1) * all].iter().fold(*largest, |m, v| m.max(v.abs()));
        }
        self.products += &shown * shown.transpose();
        Ok(())
    }

    fn seen(&self) -> Seen {
        let mean = |sum: &f64| (sum / self.pixels as f64) as f32;
        Seen { means: self.sums.iter().map(mean).collect(), largest: self.largest.clone() }
    }

    /// How inputs that are multiplied by `scales` go together.
    fn covariance(&self, scales: &[f32]) -> DMatrix<f64> {
        let n = self.pixels as f64;
        DMatrix::from_fn(scales.len(), scales.len(), |i, j| {
            (self.products[(i, j)] / n - self.sums[i] / n * (self.sums[j] / n)) * f64::from(scales[i]) * f64::from(scales[j])
        })
    }
}

/// Order in which weights are rounded, those of the most active inputs first, and the upper factor U of the inverse covariance, UᵀU.
struct Order {
    inputs: Vec<usize>,
    factor: DMatrix<f64>,
}

impl Order {
    /// Errors: a covariance that is not a number.
    fn new(covariance: &DMatrix<f64>) -> Result<Self> {
        let n = covariance.nrows();
        let mean = covariance.trace() / n.max(1) as f64;
        ensure!(mean.is_finite(), "a layer's inputs are not numbers");
        let mut inputs: Vec<usize> = (0..n).collect();
        inputs.sort_by(|a, b| covariance[(*b, *b)].total_cmp(&covariance[(*a, *a)]));
        // Backwards, the lower factor's inverse is the upper factor of the inverse.
        let at = |i: usize| inputs[n - 1 - i];
        let damped =
            |i: usize, j: usize| covariance[(at(i), at(j))] + if i == j { DAMPING * mean + f64::from(f32::MIN_POSITIVE) } else { 0.0 };
        let lower = DMatrix::from_fn(n, n, damped).cholesky().context("a layer's inputs have no covariance")?.unpack();
        let inverse = lower.solve_lower_triangular(&DMatrix::identity(n, n)).context("a layer's inputs have no covariance")?;
        Ok(Self { factor: DMatrix::from_fn(n, n, |i, j| inverse[(n - 1 - i, n - 1 - j)]), inputs })
    }

    /// Codes of a row by `step`, and what is left of the output's error, as a square.
    fn codes(&self, row: &[f32], step: f64) -> (Vec<i8>, f64) {
        let mut left: Vec<f64> = self.inputs.iter().map(|i| f64::from(row[*i])).collect();
        let (mut codes, mut error) = (vec![0i8; row.len()], 0.0);
        for (at, input) in self.inputs.iter().enumerate() {
            let code = (left[at] / step).round().clamp(-MOST, MOST);
            codes[*input] = code as i8;
            let off = (left[at] - code * step) / self.factor[(at, at)];
            error += off * off;
            for (later, left) in left.iter_mut().enumerate().skip(at + 1) {
                *left -= off * self.factor[(at, later)];
            }
        }
        (codes, error)
    }

    /// Codes of a row by the best of the steps tried, and that step.
    fn row(&self, row: &[f32]) -> (Vec<i8>, f32) {
        let largest = row.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
        if largest == 0.0 {
            return (vec![0; row.len()], 1.0);
        }
        let mut best = (Vec::new(), 0f32, f64::INFINITY);
        for part in TRIED {
            // What is reckoned with is what the file holds.
            let step = (part * largest / MOST) as f32;
            let (codes, error) = self.codes(row, f64::from(step));
            if best.0.is_empty() || error < best.2 {
                best = (codes, step, error);
            }
        }
        (best.0, best.1)
    }
}

/// One layer's codes: `weights` are O x I, `bias` O.
fn layer(weights: &[f32], bias: &[f32], inputs: &Inputs) -> Result<Rounded> {
    let seen = inputs.seen();
    let scales = Rounded::scales_of(weights, bias.len(), &seen);
    let order = Order::new(&inputs.covariance(&scales))?;
    let mut codes = weights
        .par_chunks_exact(scales.len())
        .map(|row| order.row(&row.iter().zip(&scales).map(|(w, s)| w / s).collect::<Vec<_>>()))
        .collect::<Vec<_>>()
        .into_iter();
    Ok(Rounded::by(weights, bias, scales, &seen, |row| codes.next().unwrap_or_else(|| (vec![0; row.len()], 1.0))))
}

/// The 1x1 convolutions of `net`, whose weights these are, in 8 bits but for those that are kept, for what they see in `pictures`,
/// 1 x 3 x H x W each.
///
/// Errors: weights or inputs that are not numbers.
pub fn rounded(net: &MobileNetV2, weights: &Weights, pictures: &[Tensor]) -> Result<RoundedNetwork> {
    let mut all = BTreeMap::<String, Inputs>::new();
    for picture in pictures {
        net.taps_by(picture, &mut |name, x| {
            if !is_kept(name) {
                let n = x.dim(1)?;
                let none = || Inputs { pixels: 0, sums: vec![0.0; n], largest: vec![0.0; n], products: DMatrix::zeros(n, n) };
                all.entry(name.into()).or_insert_with(none).add(x)?;
            }
            Ok(x.clone())
        })?;
    }
    let mut out = RoundedNetwork::new();
    for (name, inputs) in &all {
        let values = |kind: &str| -> Result<Vec<f32>> {
            let tensor = weights.tensors.get(&format!("{name}.{kind}")).with_context(|| format!("no tensor {name}.{kind}"))?;
            Ok(tensor.flatten_all()?.to_vec1::<f32>()?)
        };
        let (weights, bias) = (values("weight")?, values("bias")?);
        ensure!(weights.iter().all(|w| w.is_finite()), "{name}.weight holds what is no number");
        out.insert(name.clone(), layer(&weights, &bias, inputs).context(name.clone())?);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Inputs of a layer, C x pixels, that go together: a few causes each, above a floor.
    fn inputs(rng: &mut ChaCha8Rng, channels: usize, pixels: usize) -> (Tensor, Vec<f32>) {
        let causes = 1 + channels / 4;
        let mix: Vec<f32> = (0..channels * causes).map(|_| rng.random_range(-1.0..1.0)).collect();
        let mut x = vec![0f32; channels * pixels];
        for p in 0..pixels {
            let now: Vec<f32> = (0..causes).map(|_| rng.random_range(-1.0..1.0)).collect();
            for c in 0..channels {
                let sum: f32 = (0..causes).map(|k| mix[c * causes + k] * now[k]).sum();
                x[c * pixels + p] = (sum + 0.5).max(0.0) + rng.random_range(0.0..0.05);
            }
        }
        (Tensor::from_slice(&x, (1, channels, 1, pixels), &candle_core::Device::Cpu).unwrap(), x)
    }

    fn shown(x: &Tensor) -> Inputs {
        let n = x.dim(1).unwrap();
        let mut out = Inputs { pixels: 0, sums: vec![0.0; n], largest: vec![0.0; n], products: DMatrix::zeros(n, n) };
        out.add(x).unwrap();
        out
    }

    /// Mean squared error of the outputs over pixels.
    fn error(weights: &[f32], bias: &[f32], rounded: &Rounded, x: &[f32]) -> f64 {
        let (inputs, near) = (weights.len() / bias.len(), rounded.weights());
        let pixels = x.len() / inputs;
        let mut sum = 0.0;
        for (o, p) in (0..bias.len()).flat_map(|o| (0..pixels).map(move |p| (o, p))) {
            let mut off = f64::from(rounded.bias[o]) - f64::from(bias[o]);
            for i in 0..inputs {
                off += (f64::from(near[o * inputs + i]) - f64::from(weights[o * inputs + i])) * f64::from(x[i * pixels + p]);
            }
            sum += off * off;
        }
        sum / (bias.len() * pixels) as f64
    }

    proptest! {
        /// What a row's rounding leaves is what the covariance makes of how far its weights are off.
        #[test]
        fn what_is_left_is_the_outputs_variance(channels in 1usize..40, seed: u64) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let covariance = shown(&inputs(&mut rng, channels, 300).0).covariance(&vec![1.5; channels]);
            let row: Vec<f32> = (0..channels).map(|_| rng.random_range(-1.0..1.0)).collect();
            let (codes, left) = Order::new(&covariance).unwrap().codes(&row, 0.01);
            let damp = DAMPING * covariance.trace() / channels as f64;
            let off: Vec<f64> = row.iter().zip(&codes).map(|(w, c)| f64::from(*w) - 0.01 * f64::from(*c)).collect();
            let mut want = 0.0;
            for (i, j) in (0..channels).flat_map(|i| (0..channels).map(move |j| (i, j))) {
                want += off[i] * off[j] * (covariance[(i, j)] + if i == j { damp } else { 0.0 });
            }
            prop_assert!((left - want).abs() <= 1e-6 * want.abs() + 1e-12, "{left} {want}");
        }

        /// Inputs that have nothing to do with each other leave nothing to undo: the nearest codes.
        #[test]
        fn inputs_by_themselves_give_the_nearest_codes(variances in prop::collection::vec(0.01f64..5.0, 1..40), seed: u64) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let row: Vec<f32> = variances.iter().map(|_| rng.random_range(-1.0..1.0)).collect();
            let order = Order::new(&DMatrix::from_diagonal(&variances.into())).unwrap();
            let nearest: Vec<i8> = row.iter().map(|w| (f64::from(*w) / 0.01).round() as i8).collect();
            prop_assert_eq!(order.codes(&row, 0.01).0, nearest);
        }
    }

    #[test]
    fn outputs_are_nearer_than_by_the_nearest_codes_in_pixels_that_were_not_shown() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let (channels, outputs) = (64, 24);
        let (_, x) = inputs(&mut rng, channels, 1200);
        let half = |from: usize| -> Vec<f32> { (0..channels * 600).map(|k| x[k / 600 * 1200 + from + k % 600]).collect() };
        let (first, second) = (half(0), half(600));
        let seen = shown(&Tensor::from_slice(&first, (1, channels, 1, 600), &candle_core::Device::Cpu).unwrap());
        let weights: Vec<f32> = (0..channels * outputs).map(|_| rng.random_range(-1.0..1.0)).collect();
        let bias = vec![0.1; outputs];
        let near = error(&weights, &bias, &Rounded::new(&weights, &bias, &seen.seen()), &second);
        let nearer = error(&weights, &bias, &layer(&weights, &bias, &seen).unwrap(), &second);
        assert!(nearer < 0.6 * near, "{nearer} {near}");
    }

    #[test]
    fn a_row_of_zeros_and_inputs_that_are_none_are_no_harm() {
        let seen = shown(&Tensor::zeros((1, 5, 2, 3), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap());
        let mut weights = vec![0f32; 10];
        weights[7] = 0.5;
        let rounded = layer(&weights, &[0.25, 0.5], &seen).unwrap();
        assert_eq!((rounded.codes[7], &rounded.bias[..], rounded.steps[0]), (127, &[0.25, 0.5][..], 1.0));
        assert_eq!(rounded.codes.iter().filter(|c| **c != 0).count(), 1);
        let bad = Tensor::new(&[[[[f32::NAN]], [[1f32]]]], &candle_core::Device::Cpu).unwrap();
        let e = layer(&[1.0, 2.0], &[0.0], &shown(&bad)).unwrap_err().to_string();
        assert!(e.contains("not numbers"), "{e}");
    }
}
