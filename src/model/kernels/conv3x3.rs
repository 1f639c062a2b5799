//! 3x3 convolution at stride 1 and padding 1 with bias, activation and 2x2 maximum, on the kernel that suits the processor. Inference
//! only.
//!
//! Channels lie side by side. Where the input comes from a 3x3 over one plane, as in the first two layers of a network on grey images, the
//! map between the two, which is the network's largest, is never whole in memory: it is made part by part where it is read.

use super::aligned::Aligned;
#[cfg(target_arch = "x86_64")]
use super::halves::Halves;
use super::pointwise::{panel, Packed, Pixels, UNIT};
use super::vector::Vector;
use super::winograd::Winograd;
use super::{channels_last, contiguous, Activation, FeatureMap, Isa};
use crate::error::{Error, Result};
use crate::simd::zeroed;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// Weights, made ready once.
#[derive(Clone, Debug)]
pub struct Conv3x3 {
    kernel: Arc<Kernel>,
    inputs: usize,
    outputs: usize,
    /// A 3x3 over one plane with ReLU, whose output is this convolution's input and is never whole in memory.
    before: Option<Arc<Packed>>,
}

#[derive(Debug)]
enum Kernel {
    Winograd(Winograd),
    #[cfg(target_arch = "x86_64")]
    Halves(Halves),
}

impl Kernel {
    /// The fastest that this processor has.
    fn new(weight: &[f32], bias: &[f32]) -> Self {
        #[cfg(test)]
        if WITHOUT_TILES.get() {
            return Self::Winograd(Winograd::new(weight, bias, Isa::detect()));
        }
        #[cfg(target_arch = "x86_64")]
        if super::bf16::tiles() {
            return Self::Halves(Halves::new(weight, bias));
        }
        Self::Winograd(Winograd::new(weight, bias, Isa::detect()))
    }

    /// Whose vectors it works with.
    fn isa(&self) -> Isa {
        match self {
            Self::Winograd(kernel) => kernel.isa(),
            #[cfg(target_arch = "x86_64")]
            Self::Halves(_) => Isa::Avx512,
        }
    }
}

#[cfg(test)]
thread_local! {
    /// Whether this thread's convolutions are to be made for vectors alone.
    static WITHOUT_TILES: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// What `make` returns, where its convolutions are made as for a processor without AMX.
#[cfg(test)]
pub(in crate::model) fn by_winograd<T>(make: impl FnOnce() -> T) -> T {
    WITHOUT_TILES.set(true);
    let made = make();
    WITHOUT_TILES.set(false);
    made
}

impl Conv3x3 {
    /// Whether this is the kernel for so many input channels: they are whole vectors.
    pub fn suits(inputs: usize) -> bool {
        inputs > 0 && inputs.is_multiple_of(UNIT)
    }

    /// From `weight`, O x I x 3 x 3, and `bias`, O; I a multiple of 16.
    ///
    /// Errors: other shapes.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        Self::on(weight, bias, Kernel::new)
    }

    fn on(weight: &Tensor, bias: &Tensor, kernel: impl FnOnce(&[f32], &[f32]) -> Kernel) -> Result<Self> {
        let (outputs, inputs, h, w) = weight.dims4()?;
        let (flat, bias) = (weight.flatten_all()?.to_vec1::<f32>()?, bias.flatten_all()?.to_vec1::<f32>()?);
        if (h, w) != (3, 3) || bias.len() != outputs || !Self::suits(inputs) || outputs == 0 {
            return Err(Error::weights(format!("a 3x3 convolution of weights {:?} and {} biases", weight.dims(), bias.len())));
        }
        Ok(Self { kernel: Arc::new(kernel(&flat, &bias)), inputs, outputs, before: None })
    }

    /// This after `relu(conv(x) + bias)` of `weight`, I x 1 x 3 x 3, and `bias`, I: x then has one channel. The map between
    /// the two, the largest of a network on whole images, is made part by part.
    ///
    /// Errors: other shapes.
    pub fn after(&self, weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let bias = bias.flatten_all()?.to_vec1::<f32>()?;
        if weight.dims() != [self.inputs, 1, 3, 3] || bias.len() != self.inputs {
            return Err(Error::weights(format!("a first convolution of weights {:?} and {} biases", weight.dims(), bias.len())));
        }
        let packed = Packed::new(&weight.flatten_all()?.to_vec1::<f32>()?, &bias, 9, self.kernel.isa());
        Ok(Self { before: Some(Arc::new(packed)), ..self.clone() })
    }

    /// `activation(conv(x) + bias)`, and of that the largest of each 2x2 with `pool` (an odd last row or column is
    /// dropped, as in PyTorch).
    ///
    /// `x`: N x I x H x W f32. Returns N x O x H x W, halved with `pool`, channels last in memory.
    pub fn forward(&self, x: &Tensor, activation: Activation, pool: bool) -> Result<Tensor> {
        let op = Op { conv: self.clone(), activation, pool };
        Ok(channels_last(x)?.apply_op1_no_bwd(&op)?.permute((0, 3, 1, 2))?)
    }

    /// [`Self::forward`] of one image, into memory that is there.
    ///
    /// Errors: another number of channels.
    pub fn run(&self, x: &FeatureMap, activation: Activation, pool: bool, out: &mut FeatureMap) -> Result<()> {
        self.check(x.channels)?;
        let scale = if pool { 2 } else { 1 };
        out.fit(x.height / scale, x.width / scale, self.outputs);
        self.image(x.values(), (x.height, x.width), activation, pool, out.values_mut());
        Ok(())
    }

    fn check(&self, inputs: usize) -> candle_core::Result<()> {
        let wanted = if self.before.is_some() { 1 } else { self.inputs };
        if inputs != wanted {
            candle_core::bail!("conv3x3: {inputs} input channels, the weights have {wanted}");
        }
        Ok(())
    }

    /// Of one image, every value of `out`.
    fn image(&self, x: &[f32], (height, width): (usize, usize), activation: Activation, pool: bool, out: &mut [f32]) {
        if out.is_empty() {
            return;
        }
        let channels = if self.before.is_some() { 1 } else { self.inputs };
        let image = Image { x, height, width, channels, window: Window { y: 0, x: 0, pitch: width } };
        let layer = Layer { before: self.before.as_deref(), activation, pool };
        match &*self.kernel {
            Kernel::Winograd(kernel) => kernel.image(layer, image, out),
            #[cfg(target_arch = "x86_64")]
            Kernel::Halves(kernel) => kernel.image(layer, image, out),
        }
    }
}

/// What a kernel does beside its convolution.
#[derive(Clone, Copy)]
pub(super) struct Layer<'a> {
    pub before: Option<&'a Packed>,
    pub activation: Activation,
    pub pool: bool,
}

impl Layer<'_> {
    /// Rows and columns of the convolution for one of the output.
    pub fn scale(&self) -> usize {
        if self.pool {
            2
        } else {
            1
        }
    }
}

struct Op {
    conv: Conv3x3,
    activation: Activation,
    pool: bool,
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "conv3x3"
    }

    /// N x H x W x I to N x H x W x O.
    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (n, height, width, inputs) = layout.shape().dims4()?;
        self.conv.check(inputs)?;
        let x = contiguous(self.name(), storage, layout)?;
        let scale = if self.pool { 2 } else { 1 };
        let (h, w, outputs) = (height / scale, width / scale, self.conv.outputs);
        let mut out = zeroed(n * h * w * outputs);
        if !out.is_empty() {
            for (x, out) in x.chunks_exact(height * width * inputs).zip(out.chunks_exact_mut(h * w * outputs)) {
                self.conv.image(x, (height, width), self.activation, self.pool, out);
            }
        }
        Ok((CpuStorage::F32(out), Shape::from((n, h, w, outputs))))
    }
}

/// One image, channels side by side, or a window of it.
#[derive(Clone, Copy)]
pub(super) struct Image<'a> {
    pub x: &'a [f32],
    /// Of the whole.
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    window: Window,
}

/// The pixel that is first in memory, and how many lie between two rows.
#[derive(Clone, Copy)]
pub(super) struct Window {
    y: usize,
    x: usize,
    pitch: usize,
}

impl<'a> Image<'a> {
    /// From pixel (y, x) on, which is inside.
    #[inline(always)]
    pub fn at(&self, y: usize, x: usize) -> &'a [f32] {
        &self.x[((y - self.window.y) * self.window.pitch + x - self.window.x) * self.channels..]
    }
}

/// Memory for parts of the map that the convolution before gives.
#[derive(Default)]
pub(super) struct Before {
    window: Aligned<f32>,
    /// What of the plane those see.
    seen: Vec<f32>,
}

impl Before {
    /// For parts of so many rows and columns.
    pub fn fit(&mut self, rows: usize, across: usize, channels: usize) {
        self.window.fit(rows * across * channels);
        self.seen.resize((rows + 2) * (across + 2), 0.0);
    }

    /// These rows and columns of the map, which are inside, from the plane before.
    ///
    /// # Safety
    ///
    /// The processor has the instruction set of `V`, for which `packed` was packed.
    #[inline(always)]
    pub unsafe fn part<V: Vector>(&mut self, packed: &Packed, plane: Image, rows: Range<usize>, columns: Range<usize>) -> Image<'_> {
        let (channels, pitch) = (packed.outputs, columns.len());
        let Self { window, seen } = self;
        let window = window.values_mut();
        // What of the plane is seen, with zeros around it.
        let row = pitch + 2;
        for (at, line) in seen.chunks_exact_mut(row).take(rows.len() + 2).enumerate() {
            line.fill(0.0);
            let sy = (rows.start + at).wrapping_sub(1);
            if sy < plane.height {
                let (from, to) = (columns.start.saturating_sub(1), (columns.end + 1).min(plane.width));
                line[from + 1 - columns.start..][..to - from].copy_from_slice(&plane.at(sy, from)[..to - from]);
            }
        }
        for at in 0..rows.len() {
            let (seen, out) = (&seen[at * row..][..3 * row], &mut window[at * pitch * channels..][..pitch * channels]);
            // A patch is three values of each of three rows.
            let patches = Pixels { data: seen, stride: 1, lines: Some([3, 3, row]) };
            for p in 0..packed.panels() {
                // SAFETY: the caller's promise.
                unsafe { panel::<V, false>(packed, p, pitch, patches, None, Activation::Relu, out) }
            }
        }
        let window_at = Window { y: rows.start, x: columns.start, pitch };
        Image { x: window, height: plane.height, width: plane.width, channels, window: window_at }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::kernels::noise;
    use candle_core::Device;
    use proptest::prelude::*;

    type Make = Box<dyn Fn(&[f32], &[f32]) -> Kernel>;

    /// Winograd on each instruction set with tiles of 4x4 and of 6x6, and AMX's tiles where there are any.
    fn kernels() -> Vec<(String, Make)> {
        let mut all: Vec<(String, Make)> = Vec::new();
        for (isa, wide) in Isa::available().into_iter().flat_map(|isa| [(isa, usize::MAX), (isa, 1)]) {
            let make = move |weight: &[f32], bias: &[f32]| Kernel::Winograd(Winograd::on(weight, bias, isa, wide));
            all.push((format!("{isa:?}, {wide}"), Box::new(make)));
        }
        #[cfg(target_arch = "x86_64")]
        if crate::model::kernels::bf16::emulated_tiles() {
            all.push(("halves".into(), Box::new(|weight: &[f32], bias: &[f32]| Kernel::Halves(Halves::new(weight, bias)))));
        }
        static SAID: std::sync::Once = std::sync::Once::new();
        if all.iter().all(|(name, _)| name != "halves") {
            SAID.call_once(|| eprintln!("skipped: this processor has no AVX-512 with BF16, so halves.rs is not tested"));
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Equal to Candle's own convolution, on every instruction set, at every size.
        #[test]
        fn equals_the_definition(
            seed in 0u64..1000,
            n in 1usize..3,
            i in prop::sample::select(vec![16usize, 32, 48, 64, 128]),
            o in prop_oneof![1usize..20, 60usize..140],
            h in 1usize..40,
            w in prop_oneof![4 => 1usize..150, 1 => 150usize..340],
            pool: bool,
        ) {
            let (x, k, b) = (noise(seed, &[n, i, h, w]), noise(seed + 1, &[o, i, 3, 3]), noise(seed + 2, &[o]));
            let mut want = x.conv2d(&k, 1, 1, 1, 1).unwrap().broadcast_add(&b.reshape((1, o, 1, 1)).unwrap()).unwrap().relu().unwrap();
            if pool && h > 1 && w > 1 {
                want = want.max_pool2d(2).unwrap();
            }
            for (name, make) in kernels() {
                let got = Conv3x3::on(&k, &b, make).unwrap().forward(&x, Activation::Relu, pool).unwrap();
                if pool && (h == 1 || w == 1) {
                    prop_assert_eq!(got.elem_count(), 0);
                    continue;
                }
                prop_assert_eq!(got.dims(), want.dims());
                let worst = (got - &want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                prop_assert!(worst < 1e-4 * (i as f32).sqrt(), "{name}: {worst}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]
        /// Two convolutions in one are the two.
        #[test]
        fn after_another_equals_one_after_the_other(seed in 0u64..1000, h in 1usize..30, w in 1usize..220, o in 1usize..20, pool: bool) {
            let (x, k1, b1) = (noise(seed, &[1, 1, h, w]), noise(seed + 1, &[32, 1, 3, 3]), noise(seed + 2, &[32]));
            let (k2, b2) = (noise(seed + 3, &[o, 32, 3, 3]), noise(seed + 4, &[o]));
            let middle = x.conv2d(&k1, 1, 1, 1, 1).unwrap().broadcast_add(&b1.reshape((1, 32, 1, 1)).unwrap()).unwrap().relu().unwrap();
            for (name, make) in kernels() {
                let second = Conv3x3::on(&k2, &b2, make).unwrap();
                let want = second.forward(&middle, Activation::Relu, pool).unwrap();
                let got = second.after(&k1, &b1).unwrap().forward(&x, Activation::Relu, pool).unwrap();
                prop_assert_eq!(got.dims(), want.dims());
                if want.elem_count() > 0 {
                    let worst = (got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                    prop_assert!(worst < 1e-3, "{name}: {worst}");
                }
            }
        }
    }

    /// The largest difference to another, of its largest value; not a number where either has one.
    fn off(got: &Tensor, want: &Tensor) -> f32 {
        let largest = |t: Tensor| {
            t.abs().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().fold(0f32, |m, v| {
                if v > m || v.is_nan() {
                    v
                } else {
                    m
                }
            })
        };
        largest((got - want).unwrap()) / largest(want.clone())
    }

    #[test]
    fn bands_runs_and_rows_of_tiles_meet() {
        let (x, k1, b1) = (noise(1, &[1, 1, 131, 331]), noise(2, &[16, 1, 3, 3]), noise(3, &[16]));
        let (k, b) = (noise(4, &[20, 16, 3, 3]), noise(5, &[20]));
        let middle = x.conv2d(&k1, 1, 1, 1, 1).unwrap().broadcast_add(&b1.reshape((1, 16, 1, 1)).unwrap()).unwrap().relu().unwrap();
        let whole = middle.conv2d(&k, 1, 1, 1, 1).unwrap().broadcast_add(&b.reshape((1, 20, 1, 1)).unwrap()).unwrap();
        for (name, make) in kernels() {
            let conv = Conv3x3::on(&k, &b, make).unwrap();
            for (pool, want) in [(false, whole.clone()), (true, whole.max_pool2d(2).unwrap())] {
                let got = conv.forward(&middle, Activation::None, pool).unwrap();
                assert!(off(&got, &want) < 1e-5, "{name}: {}", off(&got, &want));
                let got = conv.after(&k1, &b1).unwrap().forward(&x, Activation::None, pool).unwrap();
                assert!(off(&got, &want) < 1e-5, "{name}, after: {}", off(&got, &want));
            }
        }
    }

    /// What each kernel errs by, in the mean of squares and of what the convolution gives, in f64: on layers as networks have them.
    #[test]
    fn kernels_err_by_millionths() {
        let (i, o, h, w) = (64usize, 32usize, 24usize, 40usize);
        let (x, k, b) = (noise(1, &[1, i, h, w]).relu().unwrap(), noise(2, &[o, i, 3, 3]), noise(3, &[o]));
        let doubles = |t: &Tensor| t.to_dtype(candle_core::DType::F64).unwrap();
        let want =
            doubles(&x).conv2d(&doubles(&k), 1, 1, 1, 1).unwrap().broadcast_add(&doubles(&b).reshape((1, o, 1, 1)).unwrap()).unwrap();
        let mean = |t: &Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
        for (name, make) in kernels() {
            let got = Conv3x3::on(&k, &b, make).unwrap().forward(&x, Activation::None, false).unwrap();
            let off = mean(&(doubles(&got) - &want).unwrap()) / mean(&want);
            assert!(off < 5e-6, "{name}: {off:e}");
            println!("{name}: {off:.1e}");
        }
    }

    /// Where a tile is larger than what a value reaches, so is the harm: a tile of 6x6 is the largest.
    #[test]
    fn what_is_no_number_stays_near() {
        let (k, b) = (noise(4, &[20, 32, 3, 3]), noise(5, &[20]));
        for bad in [f32::NAN, f32::INFINITY] {
            let (h, w, y, x) = (140usize, 350usize, 70usize, 159usize);
            let mut values = vec![0.5f32; h * w * 32];
            values[(y * w + x) * 32 + 7] = bad;
            let image = FeatureMap::new(values, h, w, 32).unwrap();
            for (name, make) in kernels() {
                let mut out = FeatureMap::default();
                Conv3x3::on(&k, &b, make).unwrap().run(&image, Activation::Relu, false, &mut out).unwrap();
                for (at, pixel) in out.values().chunks_exact(20).enumerate() {
                    let far = |a: usize, b: usize| a.abs_diff(b);
                    let (dy, dx) = (far(at / w, y), far(at % w, x));
                    let hurt = pixel.iter().any(|v| !v.is_finite());
                    assert!(hurt || dy > 1 || dx > 1, "{name}: hidden at {dy} {dx}");
                    assert!(!hurt || dy <= 7 && dx <= 7, "{name}: seen at {dy} {dx}");
                    assert!(!hurt || name != "halves" || dy <= 1 && dx <= 1, "halves: seen at {dy} {dx}");
                }
            }
        }
    }

    #[test]
    fn a_wide_image_and_nan_are_kept() {
        let (x, k, b) = (noise(1, &[1, 16, 9, 700]), noise(2, &[3, 16, 3, 3]), noise(3, &[3]));
        let want = x.conv2d(&k, 1, 1, 1, 1).unwrap().broadcast_add(&b.reshape((1, 3, 1, 1)).unwrap()).unwrap();
        let got = Conv3x3::new(&k, &b).unwrap().forward(&x, Activation::None, false).unwrap();
        assert!((got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-4);
        let bad = Tensor::full(f32::NAN, (1, 16, 8, 8), &Device::Cpu).unwrap();
        for (name, make) in kernels() {
            let out = Conv3x3::on(&k, &b, make).unwrap().forward(&bad, Activation::Relu, true).unwrap();
            assert!(out.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| v.is_nan()), "{name}");
        }
        let e = Conv3x3::new(&k, &noise(1, &[2])).unwrap_err().to_string();
        assert!(e.contains("[3, 16, 3, 3]") && e.contains("2 biases"), "{e}");
        assert!(Conv3x3::new(&k, &b).unwrap().forward(&noise(1, &[1, 5, 8, 8]), Activation::None, false).is_err());
    }
}
