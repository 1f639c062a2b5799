//! 1x1 convolution on 8-bit numbers: sums of products are exact integers, the same on every instruction set; what is lost is lost
//! in rounding weights (each output channel has its own step) and values.

use super::aligned::Aligned;
use super::pointwise::{activate, padded, Panel, Tile, UNIT};
use super::rounding::{Rounded, MOST, MOST_UNSIGNED};
use super::vector::{Vector, MOST_LANES};
use super::{Activation, Isa};

/// Codes that one product takes: what an instruction sums up.
pub(super) const FOUR: usize = 4;
/// The code of zero where values have a sign.
const ZERO: i32 = 128;

/// Weights of a 1x1 convolution in 8 bits.
#[derive(Debug)]
pub(super) struct Packed8 {
    /// Padded to whole units; padding is zero.
    pub inputs: usize,
    /// Padded likewise.
    pub outputs: usize,
    panels: Vec<Panel>,
    /// Panel by panel: four input channels, output channel of the panel, each of the four.
    weights: Aligned<i8>,
    /// Of every output channel: value of the weights' code 1.
    steps: Vec<f32>,
    bias: Vec<f32>,
    /// Of every input channel: what its values are multiplied by before they are rounded, and its weights divided by; padding too.
    pub scales: Vec<f32>,
    /// Where sums begin: what takes the code of zero away.
    start: Vec<i32>,
}

impl Packed8 {
    /// For one instruction set. `signed`: inputs may be negative.
    pub fn new(rounded: &Rounded, signed: bool, isa: Isa) -> Self {
        let inputs = rounded.scales.len();
        let padded_inputs = padded(inputs);
        let units = rounded.bias.len().div_ceil(UNIT);
        let (panels, _) = Panel::of(units, padded_inputs, isa);
        let mut codes = Aligned::new(padded_inputs * units * UNIT);
        let mut start = vec![0; units * UNIT];
        for (o, row) in rounded.codes.chunks_exact(inputs.max(1)).enumerate() {
            let Some(panel) = panels.iter().find(|p| (p.unit..p.unit + p.units).contains(&(o / UNIT))) else { continue };
            for (i, code) in row.iter().enumerate() {
                let lane = o - panel.unit * UNIT;
                codes.values_mut()[panel.weights + (i / FOUR * panel.units * UNIT + lane) * FOUR + i % FOUR] = *code;
                if signed {
                    start[o] -= ZERO * i32::from(*code);
                }
            }
        }
        let wide = |v: &[f32], n: usize, rest: f32| {
            let mut v = v.to_vec();
            v.resize(n, rest);
            v
        };
        let (steps, bias) = (wide(&rounded.steps, units * UNIT, 0.0), wide(&rounded.bias, units * UNIT, 0.0));
        let scales = wide(&rounded.scales, padded_inputs, 1.0);
        Self { inputs: padded_inputs, outputs: units * UNIT, panels, weights: codes, steps, bias, scales, start }
    }

    /// Number of panels: each is one pass.
    pub fn panels(&self) -> usize {
        self.panels.len()
    }
}

/// Codes of pixels, and each pixel's step. `codes` and `steps` are as long as there are values and pixels. Values that are not `SIGNED`
/// have been multiplied by `packed.scales` where they come from; the others are here.
///
/// # Safety
///
/// The processor has the instruction set of `V`.
#[inline(always)]
pub(super) unsafe fn encode<V: Vector, const SIGNED: bool>(values: &[f32], packed: &Packed8, codes: &mut [u8], steps: &mut [f32]) {
    let (channels, scales) = (packed.inputs, &packed.scales[..packed.inputs]);
    assert!(channels.is_multiple_of(UNIT) && values.len() == channels * steps.len() && codes.len() == values.len(), "int8: pixels");
    let (most, zero) = if SIGNED { (MOST, ZERO as f32) } else { (MOST_UNSIGNED, 0.0) };
    let mut scale = [0f32; MOST_LANES];
    let scale = &mut scale[..V::LANES];
    let (mut from, mut to, scales) = (values.as_ptr(), codes.as_mut_ptr(), scales.as_ptr());
    // As many pixels at a time as there are lanes: their largest values are found side by side.
    for steps in steps.chunks_mut(V::LANES) {
        // SAFETY: vectors at multiples of the lanes below `channels`, itself a multiple, of a pixel within the asserted lengths.
        unsafe {
            let mut rows = [V::splat(f32::MIN_POSITIVE); MOST_LANES];
            for (pixel, largest) in rows.iter_mut().enumerate().take(steps.len()) {
                let from = from.add(pixel * channels);
                for c in (0..channels).step_by(V::LANES) {
                    let value = V::load(from.add(c));
                    let size = if SIGNED { value.fma(V::load(scales.add(c)), V::splat(0.0)).magnitude() } else { value };
                    *largest = largest.at_least(size);
                }
            }
            V::highest(&rows).store(scale.as_mut_ptr());
            for (step, scale) in steps.iter_mut().zip(&mut *scale) {
                (*step, *scale) = (*scale / most, most / *scale);
            }
            for scale in &scale[..steps.len()] {
                let (scale, zero) = (V::splat(*scale), V::splat(zero));
                for c in (0..channels).step_by(V::LANES) {
                    let scale = if SIGNED { scale.fma(V::load(scales.add(c)), V::splat(0.0)) } else { scale };
                    V::load(from.add(c)).fma(scale, zero).store_u8(to.add(c));
                }
                (from, to) = (from.add(channels), to.add(channels));
            }
        }
    }
}

/// What a pass reads and writes.
#[derive(Clone, Copy)]
pub(super) struct Codes<'a> {
    /// Pixels x padded inputs.
    pub codes: &'a [u8],
    /// Of each pixel.
    pub steps: &'a [f32],
}

/// One panel's channels of `pixels` pixels of `out`, `packed.outputs` values apart.
///
/// # Safety
///
/// The processor has the instruction set of `V`, which must be the one that `packed` was made for.
#[inline(always)]
pub(super) unsafe fn panel8<V: Vector>(
    packed: &Packed8,
    panel: usize,
    pixels: usize,
    x: Codes,
    residual: Option<&[f32]>,
    activation: Activation,
    out: &mut [f32],
) {
    let Panel { unit, units, weights } = packed.panels[panel];
    let first = unit * UNIT;
    assert!(x.codes.len() >= pixels * packed.inputs && x.steps.len() >= pixels, "int8: input");
    assert!(out.len() >= pixels * packed.outputs, "int8: output");
    assert!(residual.is_none_or(|r| r.len() >= pixels * packed.outputs), "int8: residual");
    let weights = &packed.weights.values()[weights..][..packed.inputs * units * UNIT];
    let (steps, bias, start) = (&packed.steps[first..], &packed.bias[first..], &packed.start[first..]);
    assert!(steps.len() >= units * UNIT && bias.len() >= units * UNIT && start.len() >= units * UNIT, "int8: weights");
    let call = Call {
        groups: packed.inputs / FOUR,
        x: x.codes.as_ptr(),
        x_stride: packed.inputs,
        x_steps: x.steps.as_ptr(),
        weights: weights.as_ptr(),
        steps: steps.as_ptr(),
        bias: bias.as_ptr(),
        start: start.as_ptr(),
        residual: residual.map_or(std::ptr::null(), |r| r.as_ptr().wrapping_add(first)),
        out: out.as_mut_ptr().wrapping_add(first),
        out_stride: packed.outputs,
        activation,
    };
    // SAFETY: the assertions above: every pixel's inputs, outputs and residuals of this panel are within their slices,
    // and the panel's weights, steps and biases are whole.
    unsafe { call.panel::<V>(units, pixels) }
}

#[derive(Clone, Copy)]
struct Call {
    groups: usize,
    x: *const u8,
    x_stride: usize,
    x_steps: *const f32,
    weights: *const i8,
    steps: *const f32,
    bias: *const f32,
    start: *const i32,
    residual: *const f32,
    out: *mut f32,
    out_stride: usize,
    activation: Activation,
}

impl Tile for Call {
    #[inline(always)]
    unsafe fn from(self, pixel: usize) -> Self {
        // SAFETY: the pixel is within the slices.
        unsafe {
            Self {
                x: self.x.add(pixel * self.x_stride),
                x_steps: self.x_steps.add(pixel),
                out: self.out.add(pixel * self.out_stride),
                residual: if self.residual.is_null() { self.residual } else { self.residual.add(pixel * self.out_stride) },
                ..self
            }
        }
    }

    #[inline(always)]
    unsafe fn by_eight<V: Vector>(self, pixels: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match V::DOT {
                true => self.pixels::<V, 6, 2>(pixels),
                false => self.pixels::<V, 4, 2>(pixels),
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<V: Vector, const ROWS: usize, const VECTORS: usize>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[V::sums(self.start); VECTORS]; ROWS];
            for v in 1..VECTORS {
                let start = V::sums(self.start.add(v * V::LANES));
                for row in &mut sums {
                    row[v] = start;
                }
            }
            let mut weights = self.weights;
            for i in 0..self.groups {
                let mut w = [V::weights8(weights); VECTORS];
                for (v, w) in w.iter_mut().enumerate().skip(1) {
                    *w = V::weights8(weights.add(v * V::LANES * FOUR));
                }
                for (r, row) in sums.iter_mut().enumerate() {
                    let x = V::four(self.x.add(r * self.x_stride + i * FOUR));
                    for (sum, w) in row.iter_mut().zip(w) {
                        *sum = V::dot(*sum, x, w);
                    }
                }
                weights = weights.add(VECTORS * V::LANES * FOUR);
            }
            for v in 0..VECTORS {
                let steps = V::load(self.steps.add(v * V::LANES));
                let bias = V::load(self.bias.add(v * V::LANES));
                for (r, row) in sums.iter().enumerate() {
                    let x_steps = V::splat(*self.x_steps.add(r));
                    let mut y = V::of_sums(row[v]).fma(steps.fma(x_steps, V::splat(0.0)), bias);
                    if !self.residual.is_null() {
                        y = y.add(V::load(self.residual.add(r * self.out_stride + v * V::LANES)));
                    }
                    activate(y, self.activation).store(self.out.add(r * self.out_stride + v * V::LANES));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{rounded_values, Seen};
    use super::*;
    use proptest::prelude::*;

    /// One layer, by vectors of an instruction set.
    ///
    /// # Safety
    ///
    /// The processor has it.
    #[inline(always)]
    unsafe fn layer<V: Vector>(packed: &Packed8, values: &[f32], signed: bool, residual: &[f32], relu: bool) -> Vec<f32> {
        let pixels = values.len() / packed.inputs;
        let (mut codes, mut steps) = (vec![0u8; values.len()], vec![0f32; pixels]);
        let mut out = vec![f32::NAN; pixels * packed.outputs];
        let activation = if relu { Activation::Relu6 } else { Activation::None };
        // SAFETY: the caller's promise.
        unsafe {
            if signed {
                encode::<V, true>(values, packed, &mut codes, &mut steps);
            } else {
                let scaled: Vec<f32> = values.iter().zip(packed.scales.iter().cycle()).map(|(v, s)| v * s).collect();
                encode::<V, false>(&scaled, packed, &mut codes, &mut steps);
            }
            for p in 0..packed.panels() {
                let x = Codes { codes: &codes, steps: &steps };
                panel8::<V>(packed, p, pixels, x, (!residual.is_empty()).then_some(residual), activation, &mut out);
            }
        }
        out
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl,avx512vnni,avx2,fma")]
    unsafe fn layer512(packed: &Packed8, values: &[f32], signed: bool, residual: &[f32], relu: bool) -> Vec<f32> {
        // SAFETY: the features of this function.
        unsafe { layer::<std::arch::x86_64::__m512>(packed, values, signed, residual, relu) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn layer256(packed: &Packed8, values: &[f32], signed: bool, residual: &[f32], relu: bool) -> Vec<f32> {
        // SAFETY: the features of this function.
        unsafe { layer::<std::arch::x86_64::__m256>(packed, values, signed, residual, relu) }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avxvnni,avx2,fma")]
    unsafe fn layer_vnni(packed: &Packed8, values: &[f32], signed: bool, residual: &[f32], relu: bool) -> Vec<f32> {
        // SAFETY: the features of this function.
        unsafe { layer::<super::super::vector::Vnni256>(packed, values, signed, residual, relu) }
    }

    proptest! {
        /// Against the definition on the rounded numbers, in f64: nothing is lost but what rounding to 8 bits loses.
        #[test]
        fn every_instruction_set_equals_the_definition(
            inputs in 1usize..200, outputs in 1usize..150, pixels in 0usize..40,
            signed: bool, residual: bool, relu: bool, known: bool, large in -3f32..3.0, seed in any::<u64>(),
        ) {
            let noise = |seed: u64, n: usize| -> Vec<f32> { (0..n as u64).map(|i| crate::test_noise(seed, i)).collect() };
            let weights = noise(seed, inputs * outputs);
            let bias = noise(seed ^ 1, outputs);
            let means = if known { noise(seed ^ 4, inputs) } else { Vec::new() };
            let wide = padded(inputs);
            let of = |p: usize, c: usize| {
                let v = if c < inputs { 10f32.powf(large) * crate::test_noise(seed ^ 2, (p * inputs + c) as u64) } else { 0.0 };
                if signed { v } else { v.abs() }
            };
            let values: Vec<f32> = (0..pixels * wide).map(|i| of(i / wide, i % wide)).collect();
            let added = if residual { noise(seed ^ 3, pixels * padded(outputs)) } else { Vec::new() };
            for isa in Isa::available() {
                let packed = Packed8::new(&Rounded::new(&weights, &bias, &Seen { means: means.clone(), ..Seen::default() }), signed, isa);
                let got = match isa {
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 if std::arch::is_x86_feature_detected!("avx512vnni") => {
                        // SAFETY: the processor has it.
                        unsafe { layer512(&packed, &values, signed, &added, relu) }
                    }
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => {
                        // SAFETY: the processor has it.
                        unsafe { layer256(&packed, &values, signed, &added, relu) }
                    }
                    Isa::Avx512 => continue,
                    // SAFETY: plain arrays need no instruction set.
                    _ => unsafe { layer::<[f32; 4]>(&packed, &values, signed, &added, relu) },
                };
                #[cfg(target_arch = "x86_64")]
                if isa == Isa::Avx2 && std::arch::is_x86_feature_detected!("avxvnni") {
                    // SAFETY: the processor has it.
                    let direct = unsafe { layer_vnni(&packed, &values, signed, &added, relu) };
                    prop_assert!(direct == got);
                }
                for p in 0..pixels {
                    let largest = (0..inputs).map(|c| (of(p, c) * packed.scales[c]).abs()).fold(f32::MIN_POSITIVE, f32::max);
                    for o in 0..outputs {
                        let row: Vec<f32> = weights[o * inputs..][..inputs].iter().zip(&packed.scales).map(|(w, s)| w / s).collect();
                        let step = row.iter().fold(0f32, |m, w| m.max(w.abs())) / 127.0;
                        let mut sum = 0f64;
                        for (c, w) in row.iter().enumerate() {
                            let (most, zero) = if signed { (127.0, 128.0) } else { (255.0, 0.0) };
                            let code = of(p, c).mul_add(most / largest * packed.scales[c], zero).round_ties_even();
                            let x = f64::from(code - zero) * f64::from(largest / most);
                            let rounded = (w / step).round() * step;
                            sum += x * f64::from(rounded);
                            if let Some(mean) = means.get(c) {
                                sum += f64::from((w - rounded) * packed.scales[c] * mean);
                            }
                        }
                        sum += f64::from(bias[o]) + if residual { f64::from(added[p * padded(outputs) + o]) } else { 0.0 };
                        if relu { sum = sum.clamp(0.0, 6.0); }
                        let got = f64::from(got[p * packed.outputs + o]);
                        // A code at a tie may fall either way where products are not fused.
                        let tie = f64::from(largest / if signed { 127.0 } else { 255.0 }) * 1.01 * f64::from(row.iter().fold(0f32, |m, w| m.max(w.abs())));
                        prop_assert!((got - sum).abs() <= 1e-4 * (1.0 + f64::from(largest) * inputs as f64 / 50.0) + tie, "{isa:?}: {got} {sum}");
                    }
                }
            }
        }
    }

    proptest! {
        /// A layer is the plain one of [`rounded_values`] and [`Rounded::weights`], which is what training fits.
        #[test]
        fn a_layer_is_what_training_fits(inputs in 1usize..80, outputs in 1usize..60, pixels in 1usize..20, signed: bool, seed in any::<u64>()) {
            let noise = |seed: u64, n: usize| -> Vec<f32> { (0..n as u64).map(|i| crate::test_noise(seed, i)).collect() };
            let rounded = Rounded::new(&noise(seed, inputs * outputs), &noise(seed ^ 1, outputs), &Seen { means: noise(seed ^ 2, inputs), ..Seen::default() });
            let wide = padded(inputs);
            let x: Vec<f32> = noise(seed ^ 3, inputs * pixels).into_iter().map(|v| if signed { v } else { v.abs() }).collect();
            let values: Vec<f32> = (0..pixels * wide).map(|i| if i % wide < inputs { x[i % wide * pixels + i / wide] } else { 0.0 }).collect();
            // SAFETY: plain arrays need no instruction set.
            let got = unsafe { layer::<[f32; 4]>(&Packed8::new(&rounded, signed, Isa::Portable), &values, signed, &[], false) };
            let x = candle_core::Tensor::from_vec(x, (1, inputs, 1, pixels), &candle_core::Device::Cpu).unwrap();
            let x = rounded_values(&x, &rounded.scales.clone().into(), signed).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let weights = rounded.weights();
            for (p, o) in (0..pixels).flat_map(|p| (0..outputs).map(move |o| (p, o))) {
                let terms = (0..inputs).map(|i| f64::from(weights[o * inputs + i]) * f64::from(x[i * pixels + p]));
                let want = terms.sum::<f64>() + f64::from(rounded.bias[o]);
                // A value at a tie may fall either way.
                let tie = weights[o * inputs..][..inputs].iter().fold(0f32, |m, w| m.max(w.abs())) / 60.0;
                prop_assert!((f64::from(got[p * padded(outputs) + o]) - want).abs() < 1e-3 + f64::from(tie), "{} {want}", got[p * padded(outputs) + o]);
            }
        }
    }

    #[test]
    fn a_weight_that_is_no_number_is_not_hidden() {
        let mut weights = vec![0.5f32; 20];
        weights[7] = f32::NAN;
        let packed = Packed8::new(&Rounded::new(&weights, &[0.0], &Seen::default()), false, Isa::Portable);
        // SAFETY: plain arrays need no instruction set.
        let out = unsafe { layer::<[f32; 4]>(&packed, &[9.0; 32], false, &[], true) };
        assert!(out[0].is_nan());
    }
}
