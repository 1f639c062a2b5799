//! 1x1 convolution over pixels whose channels lie side by side: a matrix product with packed weights, bias, residual and
//! activation in the same pass.

use super::aligned::Aligned;
use super::vector::Vector;
use super::{Activation, Isa};

/// Channels of a unit: buffers are padded to whole units.
pub(super) const UNIT: usize = 16;

/// `channels` rounded up to whole units.
pub(super) fn padded(channels: usize) -> usize {
    channels.next_multiple_of(UNIT)
}

/// Units that one pass over the pixels produces, and where their weights begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Panel {
    pub unit: usize,
    pub units: usize,
    pub weights: usize,
}

impl Panel {
    /// Cuts `units` units into panels for `inputs` input channels; also how many weights there are.
    pub fn of(units: usize, inputs: usize, isa: Isa) -> (Vec<Self>, usize) {
        let mut panels = Vec::new();
        let (mut unit, mut at) = (0, 0);
        while unit < units {
            let left = units - unit;
            // Three by eight pixels fill AVX-512's registers best; four by six are next.
            let of = match (isa, left) {
                (Isa::Avx512, 1 | 2) => left,
                (Isa::Avx512, _) if left == 4 || left.is_multiple_of(4) && !left.is_multiple_of(3) => 4,
                (Isa::Avx512, _) => 3,
                _ => 1,
            };
            panels.push(Self { unit, units: of, weights: at });
            at += inputs * of * UNIT;
            unit += of;
        }
        (panels, at)
    }
}

/// Weights of a 1x1 convolution, packed for one instruction set.
#[derive(Debug)]
pub(super) struct Packed {
    pub inputs: usize,
    /// Padded to whole units; padding is zero.
    pub outputs: usize,
    panels: Vec<Panel>,
    /// Panel by panel: input channel, output channel of the panel.
    weights: Aligned<f32>,
    bias: Vec<f32>,
    /// Whether at least half of the last panel's last unit is padding, which then is not multiplied.
    halved: bool,
}

impl Packed {
    /// From `weights`, O x I, and `bias`, O.
    pub fn new(weights: &[f32], bias: &[f32], inputs: usize, isa: Isa) -> Self {
        Self::several(&[weights], bias, inputs, isa)
    }

    /// Several matrices' panels, one matrix after the other: while one's last is at work, the first of the next is asked for.
    pub fn several(matrices: &[&[f32]], bias: &[f32], inputs: usize, isa: Isa) -> Self {
        let units = bias.len().div_ceil(UNIT);
        let (of_one, size) = Panel::of(units, inputs, isa);
        let mut packed = Aligned::new(matrices.len() * size);
        let mut panels = Vec::new();
        for (m, weights) in matrices.iter().enumerate() {
            for p in of_one.iter().map(|p| Panel { weights: m * size + p.weights, ..*p }) {
                let (across, first) = (p.units * UNIT, p.unit * UNIT);
                let to = &mut packed.values_mut()[p.weights..][..inputs * across];
                for (j, from) in weights.chunks_exact(inputs).skip(first).take(across).enumerate() {
                    for (value, to) in from.iter().zip(to[j..].iter_mut().step_by(across)) {
                        *to = *value;
                    }
                }
                panels.push(p);
            }
        }
        let mut wide = bias.to_vec();
        wide.resize(units * UNIT, 0.0);
        // Shorter vectors gain nothing, for with one of them every product wants a value of the input loaded; other panels are rare.
        let fits = |last: &Panel| isa == Isa::Avx512 && last.units == 2;
        let halved = matrices.len() == 1 && wide.len() - bias.len() >= UNIT / 2 && panels.last().is_some_and(fits);
        Self { inputs, outputs: units * UNIT, panels, weights: packed, bias: wide, halved }
    }

    /// Number of panels: each is one pass.
    pub fn panels(&self) -> usize {
        self.panels.len()
    }
}

/// Pixels of a matrix, which may be patches of a plane that nobody has gathered.
#[derive(Clone, Copy)]
pub(super) struct Pixels<'a> {
    pub data: &'a [f32],
    /// Values between one pixel and the next.
    pub stride: usize,
    /// If not all side by side: how many lines a pixel's values lie in, how many in each, and how many between one line and the next.
    pub lines: Option<[usize; 3]>,
}

impl<'a> Pixels<'a> {
    /// Whose values lie side by side.
    #[inline(always)]
    pub fn new(data: &'a [f32], stride: usize) -> Self {
        Self { data, stride, lines: None }
    }
}

/// One panel's channels of `pixels` pixels of `out`, `packed.outputs` values apart. `HALVED`: half a unit of padding is not multiplied;
/// the values are the same, and not all callers have such panels.
///
/// # Safety
///
/// The processor has the instruction set of `V`, which must be the one that `packed` was made for.
#[inline(always)]
pub(super) unsafe fn panel<V: Vector, const HALVED: bool>(
    packed: &Packed,
    panel: usize,
    pixels: usize,
    x: Pixels,
    residual: Option<Pixels>,
    activation: Activation,
    out: &mut [f32],
) {
    let Panel { unit, units, weights } = packed.panels[panel];
    let first = unit * UNIT;
    let [lines, across, pitch] = x.lines.unwrap_or([1, packed.inputs, 0]);
    assert!(lines > 0 && lines * across == packed.inputs, "pointwise: lines");
    assert!(pixels == 0 || x.data.len() >= (pixels - 1) * x.stride + (lines - 1) * pitch + across, "pointwise: input");
    assert!(out.len() >= pixels * packed.outputs, "pointwise: output");
    assert!(residual.is_none_or(|r| r.stride >= packed.outputs && r.data.len() >= pixels * r.stride), "pointwise: residual");
    // Of few pixels a panel's weights are soon through, and the next come from far: they are asked for while this panel is at work.
    let ahead = match packed.panels.get(panel + 1) {
        Some(next) if V::LANES < UNIT && packed.inputs <= AHEAD => {
            (packed.inputs * next.units / pixels.max(1), packed.weights.values()[next.weights..].as_ptr())
        }
        _ => (0, std::ptr::null()),
    };
    let weights = &packed.weights.values()[weights..][..packed.inputs * units * UNIT];
    let bias = &packed.bias[first..][..units * UNIT];
    let call = Call {
        across,
        x: x.data.as_ptr(),
        stride: x.stride,
        lines,
        pitch,
        weights: weights.as_ptr(),
        bias: bias.as_ptr(),
        residual: residual.map_or(std::ptr::null(), |r| r.data[first..].as_ptr()),
        residual_stride: residual.map_or(0, |r| r.stride),
        out: out.as_mut_ptr().wrapping_add(first),
        out_stride: packed.outputs,
        activation,
        ahead,
    };
    // SAFETY: the assertions above: every pixel's inputs, outputs and residuals of this panel are within their slices,
    // and the panel's weights and biases are whole.
    unsafe {
        match HALVED && V::LANES == UNIT && packed.halved && panel + 1 == packed.panels.len() {
            true => Halved(call).panel::<V>(units, pixels),
            false => call.panel::<V>(units, pixels),
        }
    }
}

/// Outer products of pixels and channels that registers hold; pointers to where the next begins.
pub(super) trait Tile: Copy {
    /// The same, `pixel` pixels on.
    ///
    /// # Safety
    ///
    /// There are so many.
    unsafe fn from(self, pixel: usize) -> Self;

    /// Outer products of `ROWS` pixels and `VECTORS` vectors of channels, summed in registers.
    ///
    /// # Safety
    ///
    /// The processor has the instruction set of `V`; so many pixels, and weights of so many vectors, are there.
    unsafe fn tile<V: Vector, const ROWS: usize, const VECTORS: usize>(self);

    /// [`Tile::pixels`] by two vectors of eight lanes: as many rows as sixteen registers leave room for.
    ///
    /// # Safety
    ///
    /// As [`Tile::tile`], for `pixels` pixels.
    unsafe fn by_eight<V: Vector>(self, pixels: usize);

    /// One panel of so many units.
    ///
    /// # Safety
    ///
    /// As [`Tile::tile`], for `pixels` pixels.
    #[inline(always)]
    unsafe fn panel<V: Vector>(self, units: usize, pixels: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            // The lanes by themselves: a match on a constant leaves one arm to compile.
            match V::LANES {
                16 => match units {
                    1 => self.pixels::<V, 16, 1>(pixels),
                    2 => self.pixels::<V, 12, 2>(pixels),
                    3 => self.pixels::<V, 8, 3>(pixels),
                    _ => self.pixels::<V, 6, 4>(pixels),
                },
                8 => self.by_eight::<V>(pixels),
                _ => self.pixels::<V, 2, 4>(pixels),
            }
        }
    }

    /// `ROWS` pixels at a time, then what is left.
    ///
    /// # Safety
    ///
    /// As [`Tile::tile`], for `pixels` pixels.
    #[inline(always)]
    unsafe fn pixels<V: Vector, const ROWS: usize, const VECTORS: usize>(self, pixels: usize) {
        let mut at = 0;
        // SAFETY: the caller's promise, for each pixel once.
        unsafe {
            while at + ROWS <= pixels {
                // A tile of one or two rows takes as long as one of four: its sums wait for one another.
                if ROWS == 6 && (pixels - at == 7 || pixels - at == 8) {
                    break;
                }
                self.from(at).tile::<V, ROWS, VECTORS>();
                at += ROWS;
            }
            while at < pixels {
                let left = (pixels - at).min(4);
                let rest = self.from(at);
                match left {
                    4 => rest.tile::<V, 4, VECTORS>(),
                    3 => rest.tile::<V, 3, VECTORS>(),
                    2 => rest.tile::<V, 2, VECTORS>(),
                    _ => rest.tile::<V, 1, VECTORS>(),
                }
                at += left;
            }
        }
    }
}

/// Input channels between two looks at whether there are more.
const UNROLL: usize = 4;
/// Input channels of panels that are asked for ahead: larger ones would push what is at work out of the first-level cache.
const AHEAD: usize = 256;

#[derive(Clone, Copy)]
struct Call {
    /// Inputs of a line.
    across: usize,
    x: *const f32,
    stride: usize,
    lines: usize,
    pitch: usize,
    weights: *const f32,
    bias: *const f32,
    residual: *const f32,
    residual_stride: usize,
    out: *mut f32,
    out_stride: usize,
    activation: Activation,
    /// Lines of the cache to ask for with each pixel, and the first of them.
    ahead: (usize, *const f32),
}

/// Some pixels' sums: of whole vectors, and where there is `HALF` a vector, of that.
#[derive(Clone, Copy)]
struct Sums<V: Vector, const ROWS: usize, const VECTORS: usize>([[V; VECTORS]; ROWS], [V::Half; ROWS]);

impl Call {
    /// Adds the products of one input channel, of which the first pixel's value is at `x`.
    ///
    /// # Safety
    ///
    /// As [`Tile::tile`]; the values and weights are there.
    #[inline(always)]
    unsafe fn products<V: Vector, const ROWS: usize, const VECTORS: usize, const HALF: bool>(
        self,
        sums: &mut Sums<V, ROWS, VECTORS>,
        x: *const f32,
        weights: *const f32,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut w = [V::splat(0.0); VECTORS];
            for (v, w) in w.iter_mut().enumerate() {
                *w = V::load(weights.add(v * V::LANES));
            }
            let half = if HALF { V::Half::load(weights.add(VECTORS * V::LANES)) } else { V::Half::splat(0.0) };
            for (r, row) in sums.0.iter_mut().enumerate() {
                let value = *x.add(r * self.stride);
                let x = V::splat(value);
                for (sum, w) in row.iter_mut().zip(w) {
                    *sum = x.fma(w, *sum);
                }
                if HALF {
                    sums.1[r] = V::Half::splat(value).fma(half, sums.1[r]);
                }
            }
        }
    }

    /// [`Tile::tile`]; where `HALF`, with half a vector more, behind which outputs and weights are padding.
    ///
    /// # Safety
    ///
    /// As [`Tile::tile`].
    #[inline(always)]
    unsafe fn sum<V: Vector, const ROWS: usize, const VECTORS: usize, const HALF: bool>(self) {
        let across = VECTORS * V::LANES;
        let pitch = if HALF { across + V::LANES } else { across };
        // SAFETY: the caller's promise.
        unsafe {
            if V::LANES < UNIT {
                for line in 0..ROWS * self.ahead.0 {
                    V::prefetch(self.ahead.1.wrapping_add(line * UNIT));
                }
            }
            let mut sums = Sums([[V::splat(0.0); VECTORS]; ROWS], [V::Half::splat(0.0); ROWS]);
            for v in 0..VECTORS {
                let bias = V::load(self.bias.add(v * V::LANES));
                for row in &mut sums.0 {
                    row[v] = bias;
                }
            }
            if HALF {
                sums.1 = [V::Half::load(self.bias.add(across)); ROWS];
            }
            let mut weights = self.weights;
            for line in 0..self.lines {
                let x = self.x.add(line * self.pitch);
                let mut i = 0;
                // With sixteen registers the products of an input channel are few, and what counts them would be a fifth of the
                // instructions: seen where another thread shares the core.
                while V::LANES == 8 && i + UNROLL <= self.across {
                    for step in 0..UNROLL {
                        self.products::<V, ROWS, VECTORS, HALF>(&mut sums, x.add(i + step), weights.add(step * pitch));
                    }
                    weights = weights.add(UNROLL * pitch);
                    i += UNROLL;
                }
                while i < self.across {
                    self.products::<V, ROWS, VECTORS, HALF>(&mut sums, x.add(i), weights);
                    weights = weights.add(pitch);
                    i += 1;
                }
            }
            if !self.residual.is_null() {
                for r in 0..ROWS {
                    let from = self.residual.add(r * self.residual_stride);
                    for (v, sum) in sums.0[r].iter_mut().enumerate() {
                        *sum = sum.add(V::load(from.add(v * V::LANES)));
                    }
                    if HALF {
                        sums.1[r] = sums.1[r].add(V::Half::load(from.add(across)));
                    }
                }
            }
            for r in 0..ROWS {
                let to = self.out.add(r * self.out_stride);
                for (v, sum) in sums.0[r].into_iter().enumerate() {
                    activate(sum, self.activation).store(to.add(v * V::LANES));
                }
                if HALF {
                    activate(sums.1[r], self.activation).store(to.add(across));
                    V::Half::splat(0.0).store(to.add(across + V::Half::LANES));
                }
            }
        }
    }
}

impl Tile for Call {
    #[inline(always)]
    unsafe fn from(self, pixel: usize) -> Self {
        // SAFETY: the pixel is within the slices.
        unsafe {
            Self {
                x: self.x.add(pixel * self.stride),
                out: self.out.add(pixel * self.out_stride),
                residual: if self.residual.is_null() { self.residual } else { self.residual.add(pixel * self.residual_stride) },
                ahead: (self.ahead.0, self.ahead.1.wrapping_add(pixel * self.ahead.0 * UNIT)),
                ..self
            }
        }
    }

    #[inline(always)]
    unsafe fn by_eight<V: Vector>(self, pixels: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.pixels::<V, 6, 2>(pixels) }
    }

    #[inline(always)]
    unsafe fn tile<V: Vector, const ROWS: usize, const VECTORS: usize>(self) {
        // SAFETY: the caller's promise.
        unsafe { self.sum::<V, ROWS, VECTORS, false>() }
    }
}

/// A panel of two units of which the last half is padding, where a vector is a unit: a vector and a half.
#[derive(Clone, Copy)]
struct Halved(Call);

impl Tile for Halved {
    #[inline(always)]
    unsafe fn from(self, pixel: usize) -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { self.0.from(pixel) })
    }

    #[inline(always)]
    unsafe fn by_eight<V: Vector>(self, pixels: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.0.by_eight::<V>(pixels) }
    }

    #[inline(always)]
    unsafe fn panel<V: Vector>(self, units: usize, pixels: usize) {
        // SAFETY: the caller's promise; nothing is halved but for such vectors.
        unsafe {
            match V::LANES {
                UNIT => self.pixels::<V, 12, 1>(pixels),
                _ => self.0.panel::<V>(units, pixels),
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<V: Vector, const ROWS: usize, const VECTORS: usize>(self) {
        // SAFETY: the caller's promise.
        unsafe { self.0.sum::<V, ROWS, VECTORS, true>() }
    }
}

/// # Safety
///
/// The processor has the instruction set of `V`.
#[inline(always)]
pub(super) unsafe fn activate<V: Vector>(x: V, activation: Activation) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        match activation {
            Activation::None => x,
            Activation::Relu => x.at_least(V::splat(0.0)),
            Activation::Relu6 => x.at_least(V::splat(0.0)).at_most(V::splat(6.0)),
        }
    }
}

/// `activation(x w^T + bias)` of `n` rows of `x`, to rows of `packed.outputs` values.
pub(super) fn product(packed: &Packed, isa: Isa, activation: Activation, x: &[f32], n: usize, out: &mut [f32]) {
    assert!(isa <= Isa::detect(), "weights for {isa:?}, which this processor does not have");
    match isa {
        // SAFETY: the assertion: the processor has the instruction set.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { product_avx512(packed, activation, x, n, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { product_avx2(packed, activation, x, n, out) },
        // SAFETY: plain arrays need no instruction set.
        _ => unsafe { product_on::<[f32; 4]>(packed, activation, x, n, out) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
unsafe fn product_avx512(packed: &Packed, activation: Activation, x: &[f32], n: usize, out: &mut [f32]) {
    // SAFETY: the features of this function.
    unsafe { product_on::<std::arch::x86_64::__m512>(packed, activation, x, n, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn product_avx2(packed: &Packed, activation: Activation, x: &[f32], n: usize, out: &mut [f32]) {
    // SAFETY: the features of this function.
    unsafe { product_on::<std::arch::x86_64::__m256>(packed, activation, x, n, out) }
}

/// # Safety
///
/// The processor has the instruction set of `V`, for which the weights were packed.
#[inline(always)]
unsafe fn product_on<V: Vector>(packed: &Packed, activation: Activation, x: &[f32], n: usize, out: &mut [f32]) {
    let x = Pixels::new(x, packed.inputs);
    for at in 0..packed.panels() {
        // SAFETY: the caller's promise.
        unsafe { panel::<V, true>(packed, at, n, x, None, activation, out) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The products of every row of `x` with every row of `w`, and how many values lie between one row of products and the next.
    fn products(x: &[f32], w: &[f32], dim: usize, isa: Isa) -> (Vec<f32>, usize) {
        let packed = Packed::new(w, &vec![0.0; w.len() / dim], dim, isa);
        let mut out = vec![0.0; x.len() / dim * packed.outputs];
        product(&packed, isa, Activation::None, x, x.len() / dim, &mut out);
        (out, packed.outputs)
    }

    proptest! {
        #[test]
        fn products_are_by_the_definition(seed in any::<u64>(), n in 0usize..20, m in 1usize..90, dim in 1usize..70) {
            let of = |seed: u64, n: usize| (0..n as u64).map(|i| crate::test_noise(seed, i)).collect::<Vec<_>>();
            let (x, w) = (of(seed, n * dim), of(!seed, m * dim));
            for isa in Isa::available() {
                let (got, stride) = products(&x, &w, dim, isa);
                prop_assert_eq!(got.len(), n * stride);
                for (i, row) in got.chunks_exact(stride).enumerate() {
                    for (j, v) in row.iter().enumerate() {
                        let pair = x[i * dim..][..dim].iter().zip(w.get(j * dim..(j + 1) * dim).unwrap_or_default());
                        let want: f64 = pair.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        prop_assert!((f64::from(*v) - want).abs() < 1e-4, "{isa:?} {i} {j}: {v} {want}");
                    }
                }
            }
        }
    }

    #[test]
    fn nan_and_infinity_are_not_hidden() {
        for isa in Isa::available() {
            let (got, stride) = products(&[f32::NAN, 1.0, 1.0, 1.0], &[1.0, 2.0, 0.0, 1.0, f32::INFINITY, 1.0], 2, isa);
            assert!(got[..3].iter().all(|v| v.is_nan()), "{isa:?}");
            assert_eq!(got[stride..][..3], [3.0, 1.0, f32::INFINITY], "{isa:?}");
        }
    }
}
