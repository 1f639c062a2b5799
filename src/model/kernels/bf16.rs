//! Convolutions on bfloat16: 8 bits of each value and weight, of f32's range, sums in f32. AMX's tiles multiply and add sixteen times as
//! much in a cycle as f32's vectors, AVX-512's own products (Zen 4, Cooper Lake) twice as much, and what they write and read is half
//! as large.
//!
//! Channels lie in lines of 32, which are a line of the cache. A 1x1 convolution takes and gives them in their order. A depthwise one
//! takes the line as 16 numbers of 32 bits, whose upper halves are the odd channels and whose lower halves are the even ones, and
//! gives the even ones first: the order that the weights of the projection behind it are packed in.

use super::aligned::Aligned;
use super::pointwise::{padded, UNIT};

/// Channels of a line.
pub(super) const LINE: usize = 2 * UNIT;
/// Pixels of a tile.
const TALL: usize = 16;
/// Pixels that vectors work on at once; a tile is whole blocks of them.
#[cfg(target_arch = "x86_64")]
const PIXELS: usize = TALL / 2;
/// What a depthwise convolution has of each channel: taps and bias.
const PARTS: usize = 10;

/// What multiplies bfloat16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// AMX.
    Tiles,
    /// AVX-512's dot products of two pairs.
    Vectors,
}

impl Products {
    /// The faster one that this processor has.
    pub fn detect() -> Option<Self> {
        match (tiles(), vectors()) {
            (true, _) => Some(Self::Tiles),
            (false, true) => Some(Self::Vectors),
            (false, false) => None,
        }
    }

    /// What a test can compute by.
    #[cfg(test)]
    pub(super) fn available() -> impl Iterator<Item = Self> {
        [(emulated_tiles(), Self::Tiles), (vectors(), Self::Vectors)].into_iter().filter_map(|(has, products)| has.then_some(products))
    }
}

/// Whether this processor has dot products of bfloat16 in vectors.
pub(super) fn vectors() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bf16") && std::arch::is_x86_feature_detected!("avx512bw");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether this processor has AMX for bfloat16, and the system lets us use it.
pub(super) fn tiles() -> bool {
    #[cfg(target_arch = "x86_64")]
    return x86::tiles();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether a test can use tiles, be they the processor's or not.
#[cfg(test)]
pub(super) fn emulated_tiles() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return super::emulated::install();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    tiles()
}

/// `channels` rounded up to whole lines.
pub(super) fn lined(channels: usize) -> usize {
    channels.next_multiple_of(LINE)
}

/// Codes that `pixels` pixels of `channels` channels take as what tiles read: whole tiles.
pub(super) fn codes16(pixels: usize, channels: usize) -> usize {
    pixels.next_multiple_of(TALL) * lined(channels)
}

/// The nearest bfloat16, the even one of two; what is no number stays so.
pub(super) fn rounded16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// `value` in bfloat16.
pub fn bf16(value: f32) -> f32 {
    f32::from_bits(u32::from(rounded16(value)) << 16)
}

/// Where in its line a depthwise convolution puts a channel.
fn place(channel: usize) -> usize {
    channel / LINE * LINE + channel % 2 * UNIT + channel % LINE / 2
}

/// Weights of a 1x1 convolution in bfloat16.
#[derive(Debug)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // nothing multiplies them elsewhere
pub(super) struct Packed16 {
    products: Products,
    /// Padded to whole units.
    pub inputs: usize,
    /// Padded likewise.
    pub outputs: usize,
    /// Unit by unit of output channels: two input channels of each of the unit's outputs, then the next two. Inputs are whole lines.
    weights: Aligned<u16>,
    bias: Aligned<f32>,
}

impl Packed16 {
    /// From `weights`, O x I, and `bias`, O, for outputs that are whole lines.
    pub fn expand(weights: &[f32], bias: &[f32], products: Products) -> Self {
        Self::new(weights, bias, lined(bias.len()), |i| i, products)
    }

    /// From `weights`, O x I, and `bias`, O, for inputs that come from a depthwise convolution.
    pub fn project(weights: &[f32], bias: &[f32], products: Products) -> Self {
        Self::new(weights, bias, padded(bias.len()), place, products)
    }

    fn new(weights: &[f32], bias: &[f32], outputs: usize, place: fn(usize) -> usize, products: Products) -> Self {
        let inputs = weights.len() / bias.len().max(1);
        let depth = lined(inputs);
        let mut packed =
            Self { products, inputs: padded(inputs), outputs, weights: Aligned::new(outputs * depth), bias: Aligned::new(outputs) };
        packed.bias.values_mut()[..bias.len()].copy_from_slice(bias);
        for (o, row) in weights.chunks_exact(inputs.max(1)).enumerate() {
            let to = &mut packed.weights.values_mut()[o / UNIT * UNIT * depth..][..UNIT * depth];
            for (i, w) in row.iter().enumerate() {
                let at = place(i);
                to[(at / 2 * UNIT + o % UNIT) * 2 + at % 2] = rounded16(*w);
            }
        }
        packed
    }
}

/// Weights of a depthwise 3x3 between the two, in f32.
#[derive(Debug)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // as above
pub(super) struct Depthwise16 {
    /// Whole lines.
    pub channels: usize,
    /// Line by line the even channels, then the odd: nine taps, then the bias, each over 16 channels.
    weights: Aligned<f32>,
}

impl Depthwise16 {
    /// From `weights`, C x 9, and `bias`, C.
    pub fn new(weights: &[f32], bias: &[f32]) -> Self {
        let channels = lined(bias.len());
        let mut all = Aligned::new(PARTS * channels);
        for (c, (taps, bias)) in weights.chunks_exact(9).zip(bias).enumerate() {
            let at = place(c);
            for (t, w) in taps.iter().chain([bias]).enumerate() {
                all.values_mut()[(at / UNIT * PARTS + t) * UNIT + at % UNIT] = *w;
            }
        }
        Self { channels, weights: all }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{depthwise16, encode16, expand16, line, project16, Tiles};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use crate::model::kernels::rows::{ACROSS, TOGETHER};
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::sync::OnceLock;

    /// Whether there are tiles for bfloat16, and the system lets us use them: it wants to be asked once, for a thread's state grows
    /// by 8 kB.
    pub(super) fn tiles() -> bool {
        static TILES: OnceLock<bool> = OnceLock::new();
        *TILES.get_or_init(|| {
            const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
            vectors() && __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & BF16_AND_TILES == BF16_AND_TILES && allowed()
        })
    }

    #[cfg(target_os = "linux")]
    fn allowed() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: asks for leave to use registers; a kernel that does not know the question says no.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }

    #[cfg(not(target_os = "linux"))]
    fn allowed() -> bool {
        false
    }

    /// While this lives, the thread's tiles are sixteen rows of a line each.
    pub(in super::super) struct Tiles(std::marker::PhantomData<*const ()>);

    impl Tiles {
        /// # Safety
        ///
        /// [`tiles`] has said that there are any.
        pub unsafe fn new() -> Self {
            #[repr(align(64))]
            struct Shapes([u8; 64]);
            let mut shapes = Shapes([0; 64]);
            // Palette 1; bytes of a row, two bytes each, from 16 on; rows from 48 on.
            shapes.0[0] = 1;
            for tile in 0..8 {
                shapes.0[16 + 2 * tile] = 64;
                shapes.0[48 + tile] = TALL as u8;
            }
            // SAFETY: the caller's promise; the shapes are valid.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) shapes.0.as_ptr(), out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nostack, preserves_flags));
            }
            Self(std::marker::PhantomData)
        }
    }

    impl Drop for Tiles {
        fn drop(&mut self) {
            // SAFETY: there are tiles, for `new` was promised so.
            unsafe {
                asm!("tilerelease", out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
                    out("tmm6") _, out("tmm7") _, options(nostack, preserves_flags));
            }
        }
    }

    /// `min(max(x, 0), 6)`; NaN stays.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn relu6(x: __m512) -> __m512 {
        // The instructions give their second operand where either is NaN.
        _mm512_min_ps(_mm512_set1_ps(6.0), _mm512_max_ps(_mm512_setzero_ps(), x))
    }

    /// As pairs of bfloat16.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn bits(pairs: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits.
        unsafe { std::mem::transmute(pairs) }
    }

    /// A line of two vectors.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(in super::super) fn line(low: __m512, high: __m512) -> __m512i {
        // SAFETY: both are 512 bits.
        unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
    }

    /// Codes of pixels, whose `channels` values lie side by side, as lines.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(in super::super) fn encode16(values: &[f32], channels: usize, codes: &mut [u16]) {
        let depth = lined(channels);
        assert!(channels > 0 && channels.is_multiple_of(UNIT) && codes.len() >= values.len() / channels * depth, "bf16: pixels");
        for (from, to) in values.chunks_exact(channels).zip(codes.chunks_exact_mut(depth)) {
            for (from, to) in from.chunks(LINE).zip(to.chunks_exact_mut(LINE)) {
                // SAFETY: a chunk is one unit or two.
                unsafe {
                    let low = _mm512_loadu_ps(from.as_ptr());
                    let high = if from.len() == LINE { _mm512_loadu_ps(from.as_ptr().add(UNIT)) } else { _mm512_setzero_ps() };
                    _mm512_storeu_si512(to.as_mut_ptr().cast(), line(low, high));
                }
            }
        }
    }

    /// `relu6(x w^T + bias)` of `pixels` pixels, whose codes are whole tiles, as lines to `out`.
    ///
    /// # Safety
    ///
    /// The processor has the products of `packed`; where they are tiles, [`Tiles`] lives on this thread.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(in super::super) unsafe fn expand16(packed: &Packed16, pixels: usize, codes: &[u16], out: &mut [u16]) {
        assert!(packed.outputs.is_multiple_of(LINE) && out.len() >= pixels * packed.outputs, "bf16: lines");
        let call = Call::new(packed, pixels, codes);
        // SAFETY: the caller's promise; the assertion: outputs of every pixel are there, whole lines.
        unsafe { call.by::<true>(packed.products, std::ptr::null(), out.as_mut_ptr().cast()) }
    }

    /// `x w^T + bias + residual` of `pixels` pixels, whose codes are whole tiles, to `out`, `packed.outputs` values each.
    ///
    /// # Safety
    ///
    /// As [`expand16`].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(in super::super) unsafe fn project16(packed: &Packed16, pixels: usize, codes: &[u16], residual: Option<&[f32]>, out: &mut [f32]) {
        assert!(out.len() >= pixels * packed.outputs, "bf16: output");
        assert!(residual.is_none_or(|r| r.len() >= pixels * packed.outputs), "bf16: residual");
        let call = Call::new(packed, pixels, codes);
        // SAFETY: the caller's promise; the assertions: outputs and residuals of every pixel are there.
        unsafe { call.by::<false>(packed.products, residual.map_or(std::ptr::null(), <[f32]>::as_ptr), out.as_mut_ptr()) }
    }

    /// A product: codes of whole tiles, and whole units of weights.
    #[derive(Clone, Copy)]
    struct Call {
        depth: usize,
        x: *const u16,
        weights: *const u16,
        bias: *const f32,
        units: usize,
        pixels: usize,
    }

    /// Sums of two tiles' pixels and two units of channels, tile by tile.
    #[repr(align(64))]
    struct Sums([f32; 4 * TALL * UNIT]);

    /// The first pixel of some sums, the first unit, and how many units: one or two.
    #[derive(Clone, Copy)]
    struct Place {
        pixel: usize,
        unit: usize,
        units: usize,
    }

    impl Call {
        fn new(packed: &Packed16, pixels: usize, codes: &[u16]) -> Self {
            // Tiles are loaded before it is asked whether there are more.
            assert!(packed.inputs > 0 && codes.len() >= codes16(pixels, packed.inputs), "bf16: input");
            Self {
                depth: lined(packed.inputs),
                x: codes.as_ptr(),
                weights: packed.weights.values().as_ptr(),
                bias: packed.bias.values().as_ptr(),
                units: packed.outputs / UNIT,
                pixels,
            }
        }

        /// Writes lines after a ReLU6, or f32 after adding the residual, if there is one.
        ///
        /// # Safety
        ///
        /// The processor has the products, and [`Tiles`] lives on this thread where they are tiles; `out`, and `residual` if not null, hold
        /// the outputs of every pixel, which are whole lines if `LINES`.
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        unsafe fn by<const LINES: bool>(self, products: Products, residual: *const f32, out: *mut f32) {
            // SAFETY: the caller's promise.
            unsafe {
                match products {
                    Products::Tiles => self.tiles::<LINES>(residual, out),
                    Products::Vectors => self.vectors::<LINES>(residual, out),
                }
            }
        }

        /// # Safety
        ///
        /// As [`Self::by`], of vectors.
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        unsafe fn vectors<const LINES: bool>(self, residual: *const f32, out: *mut f32) {
            // Two units' weights stay in the first-level cache while pixels pass.
            for unit in (0..self.units).step_by(2) {
                for pixel in (0..self.pixels).step_by(PIXELS) {
                    // SAFETY: the caller's promise; whole tiles of pixels have codes, so blocks of them have, too.
                    unsafe {
                        if self.units - unit > 1 {
                            self.block::<LINES, 2>(pixel, unit, residual, out);
                        } else {
                            self.block::<LINES, 1>(pixel, unit, residual, out);
                        }
                    }
                }
            }
        }

        /// [`PIXELS`] pixels from `pixel` on, of whose codes two follow one another in 32 bits, and `UNITS` units of channels from `unit` on.
        ///
        /// # Safety
        ///
        /// As [`Self::vectors`], of whose loops this is a part; units are two if `LINES`.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        unsafe fn block<const LINES: bool, const UNITS: usize>(self, pixel: usize, unit: usize, residual: *const f32, out: *mut f32) {
            let (wide, rows) = (self.units * UNIT, (self.pixels - pixel).min(PIXELS));
            // SAFETY: the caller's promise: codes of whole tiles are there, weights and biases of whole units; of the outputs those of the
            // pixels that there are.
            unsafe {
                let mut sums = [[_mm512_setzero_ps(); UNITS]; PIXELS];
                for u in 0..UNITS {
                    let bias = _mm512_loadu_ps(self.bias.add((unit + u) * UNIT));
                    sums.iter_mut().for_each(|of_pixel| of_pixel[u] = bias);
                }
                let (x, weights) = (self.x.add(pixel * self.depth), self.weights.add(unit * UNIT * self.depth));
                for at in (0..self.depth).step_by(2) {
                    let mut pairs = [_mm512_setzero_si512(); UNITS];
                    for (u, pairs) in pairs.iter_mut().enumerate() {
                        *pairs = _mm512_loadu_si512(weights.add((u * self.depth + at) * UNIT).cast());
                    }
                    for (p, sums) in sums.iter_mut().enumerate() {
                        let pair = _mm512_set1_epi32(x.add(p * self.depth + at).cast::<i32>().read_unaligned());
                        for (sum, pairs) in sums.iter_mut().zip(pairs) {
                            *sum = _mm512_dpbf16_ps(*sum, bits(pair), bits(pairs));
                        }
                    }
                }
                for (p, sums) in sums.into_iter().enumerate().take(rows) {
                    let at = (pixel + p) * wide + unit * UNIT;
                    if LINES {
                        _mm512_storeu_si512(out.cast::<u16>().add(at).cast(), line(relu6(sums[0]), relu6(sums[UNITS - 1])));
                    } else {
                        for (u, mut sum) in sums.into_iter().enumerate() {
                            if !residual.is_null() {
                                sum = _mm512_add_ps(sum, _mm512_loadu_ps(residual.add(at + u * UNIT)));
                            }
                            _mm512_storeu_ps(out.add(at + u * UNIT), sum);
                        }
                    }
                }
            }
        }

        /// # Safety
        ///
        /// As [`Self::by`], of tiles.
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        unsafe fn tiles<const LINES: bool>(self, residual: *const f32, out: *mut f32) {
            let mut sums = [const { Sums([0.0; 4 * TALL * UNIT]) }; 2];
            let (mut before, mut turn) = (None, 0);
            for pixel in (0..self.pixels).step_by(2 * TALL) {
                for unit in (0..self.units).step_by(2) {
                    let place = Place { pixel, unit, units: (self.units - unit).min(2) };
                    // SAFETY: the caller's promise; pixels up to whole tiles have codes, and each shape is what is left.
                    unsafe {
                        match (self.pixels - pixel > TALL, place.units) {
                            (true, 2) => self.two_by_two(place, &mut sums[turn]),
                            (false, 2) => self.one_by_two(place, &mut sums[turn]),
                            (true, _) => self.two_by_one(place, &mut sums[turn]),
                            (false, _) => self.one_by_one(place, &mut sums[turn]),
                        }
                        // While these are on the way, those before are written.
                        if let Some(before) = before {
                            self.write::<LINES>(before, &sums[1 - turn], residual, out);
                        }
                    }
                    (before, turn) = (Some(place), 1 - turn);
                }
            }
            if let Some(before) = before {
                // SAFETY: as above.
                unsafe { self.write::<LINES>(before, &sums[1 - turn], residual, out) };
            }
        }

        /// # Safety
        ///
        /// As [`Self::tiles`]; the sums are those of `place`.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        unsafe fn write<const LINES: bool>(self, place: Place, sums: &Sums, residual: *const f32, out: *mut f32) {
            // SAFETY: the caller's promise.
            unsafe {
                match place.units {
                    2 => self.write_units::<LINES, 2>(place, sums, residual, out),
                    _ => self.write_units::<LINES, 1>(place, sums, residual, out),
                }
            }
        }

        /// # Safety
        ///
        /// As [`Self::write`].
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        unsafe fn write_units<const LINES: bool, const UNITS: usize>(
            self,
            Place { pixel, unit, .. }: Place,
            sums: &Sums,
            residual: *const f32,
            out: *mut f32,
        ) {
            let wide = self.units * UNIT;
            let left = (self.pixels - pixel).min(2 * TALL);
            let mut at = pixel * wide + unit * UNIT;
            for (first, rows) in [(0, left.min(TALL)), (2 * TALL, left.saturating_sub(TALL))] {
                // SAFETY: the rows are pixels', of whose outputs the units are; sums hold four tiles.
                unsafe {
                    let mut from = sums.0.as_ptr().add(first * UNIT);
                    for _ in 0..rows {
                        if LINES {
                            let (low, high) = (_mm512_load_ps(from), _mm512_load_ps(from.add(TALL * UNIT)));
                            _mm512_storeu_si512(out.cast::<u16>().add(at).cast(), line(relu6(low), relu6(high)));
                        } else {
                            for u in 0..UNITS {
                                let mut sum = _mm512_load_ps(from.add(u * TALL * UNIT));
                                if !residual.is_null() {
                                    sum = _mm512_add_ps(sum, _mm512_loadu_ps(residual.add(at + u * UNIT)));
                                }
                                _mm512_storeu_ps(out.add(at + u * UNIT), sum);
                            }
                        }
                        from = from.add(UNIT);
                        at += wide;
                    }
                }
            }
        }
    }

    /// One shape of tiles: what loads, multiplies and stores them. In assembly, for the compiler has no types for tiles yet; each block
    /// loads all that it reads, so that nothing but the tiles' shapes has to stay from one to the next.
    macro_rules! shape {
        ($name:ident, { $($begin:literal)* }, { $($step:literal)* }, { $($end:literal)* }) => {
            impl Call {
                /// # Safety
                ///
                /// As [`Call::tiles`]; the codes and weights of this shape are there.
                #[inline(always)]
                unsafe fn $name(self, place: Place, sums: &mut Sums) {
                    let line = self.depth * 2;
                    // SAFETY: tiles are configured, and what is loaded is there: of `x` whole tiles of pixels, of weights and biases whole
                    // units. The sums hold four tiles. Tiles are neither read before nor after.
                    unsafe {
                        let weights = self.weights.add(place.unit * UNIT * self.depth);
                        let bias = self.bias.add(place.unit * UNIT);
                        let x = self.x.add(place.pixel * self.depth);
                        asm!(
                            // The bias in each of the rows.
                            $($begin,)*
                            "2:",
                            $($step,)*
                            "add {x}, 64",
                            "add {x2}, 64",
                            "add {w}, 1024",
                            "add {w2}, 1024",
                            "dec {n}",
                            "jnz 2b",
                            $($end,)*
                            x = inout(reg) x => _, x2 = inout(reg) x.wrapping_add(TALL * self.depth) => _, line = in(reg) line,
                            w = inout(reg) weights => _, w2 = inout(reg) weights.wrapping_add(UNIT * self.depth) => _, row = in(reg) 64usize,
                            bias = in(reg) bias, zero = in(reg) 0usize,
                            n = inout(reg) self.depth / LINE => _, sums = in(reg) sums.0.as_mut_ptr(),
                            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                            out("tmm7") _, options(nostack)
                        );
                    }
                }
            }
        };
    }
    shape!(two_by_two, {
        "tileloadd tmm0, [{bias} + {zero}]"
        "tileloadd tmm1, [{bias} + {zero} + 64]"
        "tileloadd tmm2, [{bias} + {zero}]"
        "tileloadd tmm3, [{bias} + {zero} + 64]"
    }, {
        "tileloadd tmm4, [{x} + {line}]"
        "tileloadd tmm6, [{w} + {row}]"
        "tdpbf16ps tmm0, tmm4, tmm6"
        "tileloadd tmm7, [{w2} + {row}]"
        "tdpbf16ps tmm1, tmm4, tmm7"
        "tileloadd tmm5, [{x2} + {line}]"
        "tdpbf16ps tmm2, tmm5, tmm6"
        "tdpbf16ps tmm3, tmm5, tmm7"
    }, {
        "tilestored [{sums} + {row}], tmm0"
        "tilestored [{sums} + {row} + 1024], tmm1"
        "tilestored [{sums} + {row} + 2048], tmm2"
        "tilestored [{sums} + {row} + 3072], tmm3"
    });
    shape!(one_by_two, {
        "tileloadd tmm0, [{bias} + {zero}]"
        "tileloadd tmm1, [{bias} + {zero} + 64]"
    }, {
        "tileloadd tmm4, [{x} + {line}]"
        "tileloadd tmm6, [{w} + {row}]"
        "tdpbf16ps tmm0, tmm4, tmm6"
        "tileloadd tmm7, [{w2} + {row}]"
        "tdpbf16ps tmm1, tmm4, tmm7"
    }, {
        "tilestored [{sums} + {row}], tmm0"
        "tilestored [{sums} + {row} + 1024], tmm1"
    });
    shape!(two_by_one, {
        "tileloadd tmm0, [{bias} + {zero}]"
        "tileloadd tmm2, [{bias} + {zero}]"
    }, {
        "tileloadd tmm4, [{x} + {line}]"
        "tileloadd tmm6, [{w} + {row}]"
        "tdpbf16ps tmm0, tmm4, tmm6"
        "tileloadd tmm5, [{x2} + {line}]"
        "tdpbf16ps tmm2, tmm5, tmm6"
    }, {
        "tilestored [{sums} + {row}], tmm0"
        "tilestored [{sums} + {row} + 2048], tmm2"
    });
    shape!(one_by_one, {
        "tileloadd tmm0, [{bias} + {zero}]"
    }, {
        "tileloadd tmm4, [{x} + {line}]"
        "tileloadd tmm6, [{w} + {row}]"
        "tdpbf16ps tmm0, tmm4, tmm6"
    }, {
        "tilestored [{sums} + {row}], tmm0"
    });

    /// `relu6(depthwise(rows) + bias)` as lines for `out.len()` codes: rows of output of `out_width` pixels, at most [`TOGETHER`], from
    /// the `(rows of output - 1) * stride + 3` rows of `width` pixels that they see. Output pixel x sees the input pixels from
    /// `x * stride - left` on; what is outside is zero.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(in super::super) fn depthwise16(
        op: &Depthwise16,
        stride: usize,
        left: usize,
        width: usize,
        rows: &[&[u16]],
        out_width: usize,
        out: &mut [u16],
    ) {
        let (channels, together) = (op.channels, out.len() / (out_width * op.channels));
        assert!(out_width > 0 && (1..=TOGETHER).contains(&together) && out.len() == together * out_width * channels, "depthwise: output");
        assert!(rows.len() == (together - 1) * stride + 3 && rows.iter().all(|r| r.len() >= width * channels), "depthwise: rows");
        assert!(width > 0 && left <= 1, "depthwise: width");
        let call = Rows { weights: op.weights.values().as_ptr(), channels, left, width, rows, out_width, out: out.as_mut_ptr() };
        // SAFETY: the assertions above.
        unsafe {
            match (stride, together) {
                (1, 1) => call.all::<1, 1, 6>(),
                (1, _) => call.all::<1, 2, 6>(),
                (2, 1) => call.all::<2, 1, 9>(),
                (2, _) => call.all::<2, 2, 9>(),
                _ => panic!("depthwise: stride {stride}"),
            }
        }
    }

    /// Arguments of [`depthwise16`], as it asserts.
    struct Rows<'a> {
        weights: *const f32,
        channels: usize,
        left: usize,
        width: usize,
        rows: &'a [&'a [u16]],
        out_width: usize,
        out: *mut u16,
    }

    /// The even or the odd channels of a line.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn half<const ODD: bool>(from: *const u16) -> __m512 {
        // SAFETY: the caller has a line there.
        let line = unsafe { _mm512_loadu_si512(from.cast()) };
        _mm512_castsi512_ps(if ODD { _mm512_and_si512(line, _mm512_set1_epi32(!0xffff)) } else { _mm512_slli_epi32::<16>(line) })
    }

    impl Rows<'_> {
        /// # Safety
        ///
        /// The arguments are as [`depthwise16`] asserts, of so many rows; `COLUMNS` is `(ACROSS - 1) * STRIDE + 3`.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        unsafe fn all<const STRIDE: usize, const ROWS: usize, const COLUMNS: usize>(&self) {
            // Output pixels whose three columns are all inside.
            let first = self.left.div_ceil(STRIDE).min(self.out_width);
            let inside = self.width + self.left;
            let last = if inside >= 3 { ((inside - 3) / STRIDE + 1).min(self.out_width) } else { 0 };
            let mut x = 0;
            while x < self.out_width {
                let whole = x >= first && x + ACROSS <= last;
                // All channels of some pixels: lines one after the other.
                for c in (0..self.channels).step_by(LINE) {
                    // SAFETY: the caller's promise; a line at c of any pixel within the widths is within its slice; the columns of
                    // `first..last` are inside by construction, the others are checked one by one.
                    unsafe {
                        if whole {
                            self.tile::<STRIDE, ROWS, COLUMNS, false>(x, c);
                            self.tile::<STRIDE, ROWS, COLUMNS, true>(x, c);
                        } else {
                            self.edge::<STRIDE, ROWS, false>(x, c);
                            self.edge::<STRIDE, ROWS, true>(x, c);
                        }
                    }
                }
                x += if whole { ACROSS } else { 1 };
            }
        }

        /// Nine taps and the bias of half a line.
        ///
        /// # Safety
        ///
        /// There is such a line.
        #[inline]
        #[target_feature(enable = "avx512f")]
        unsafe fn taps<const ODD: bool>(&self, c: usize) -> ([__m512; 9], __m512) {
            // SAFETY: the caller's promise.
            unsafe {
                let from = self.weights.add((c / UNIT + usize::from(ODD)) * PARTS * UNIT);
                let mut taps = [_mm512_setzero_ps(); 9];
                for (t, tap) in taps.iter_mut().enumerate() {
                    *tap = _mm512_loadu_ps(from.add(t * UNIT));
                }
                (taps, _mm512_loadu_ps(from.add(9 * UNIT)))
            }
        }

        /// # Safety
        ///
        /// The output pixel is within the width.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        unsafe fn put<const ODD: bool>(&self, row: usize, x: usize, c: usize, sum: __m512) {
            // SAFETY: the caller's promise; half of a line.
            unsafe {
                let to = self.out.add((row * self.out_width + x) * self.channels + c + if ODD { UNIT } else { 0 });
                _mm256_storeu_si256(to.cast(), std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(relu6(sum))));
            }
        }

        /// `ROWS` x [`ACROSS`] pixels of output, half a line of each.
        ///
        /// # Safety
        ///
        /// As [`Self::all`], of whose loop this is a part; all columns that the pixels see are inside.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        unsafe fn tile<const STRIDE: usize, const ROWS: usize, const COLUMNS: usize, const ODD: bool>(&self, x: usize, c: usize) {
            // SAFETY: the caller's promise.
            unsafe {
                let (taps, bias) = self.taps::<ODD>(c);
                let mut sums = [[bias; ACROSS]; ROWS];
                for y in 0..(ROWS - 1) * STRIDE + 3 {
                    let from = self.rows.get_unchecked(y).as_ptr().add((x * STRIDE - self.left) * self.channels + c);
                    let mut values = [bias; COLUMNS];
                    for (k, v) in values.iter_mut().enumerate() {
                        *v = half::<ODD>(from.add(k * self.channels));
                    }
                    for (r, sums) in sums.iter_mut().enumerate() {
                        let tap = y.wrapping_sub(r * STRIDE);
                        if tap < 3 {
                            for (k, sum) in sums.iter_mut().enumerate() {
                                for t in 0..3 {
                                    *sum = _mm512_fmadd_ps(values[k * STRIDE + t], taps[3 * tap + t], *sum);
                                }
                            }
                        }
                    }
                }
                for (r, sums) in sums.into_iter().enumerate() {
                    for (k, sum) in sums.into_iter().enumerate() {
                        self.put::<ODD>(r, x + k, c, sum);
                    }
                }
            }
        }

        /// One column of output, some of whose input may be outside.
        ///
        /// # Safety
        ///
        /// As [`Self::all`], of whose loop this is a part.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        unsafe fn edge<const STRIDE: usize, const ROWS: usize, const ODD: bool>(&self, x: usize, c: usize) {
            // SAFETY: the caller's promise; columns outside are not read.
            unsafe {
                let (taps, bias) = self.taps::<ODD>(c);
                for r in 0..ROWS {
                    let mut sum = bias;
                    for y in 0..3 {
                        let row = self.rows.get_unchecked(r * STRIDE + y).as_ptr();
                        for t in 0..3 {
                            let at = (x * STRIDE + t).wrapping_sub(self.left);
                            if at < self.width {
                                sum = _mm512_fmadd_ps(half::<ODD>(row.add(at * self.channels + c)), taps[3 * y + t], sum);
                            }
                        }
                    }
                    self.put::<ODD>(r, x, c, sum);
                }
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(seed: u64, n: usize) -> Vec<f32> {
        (0..n as u64).map(|i| crate::test_noise(seed, i)).collect()
    }

    fn value(code: u16) -> f32 {
        f32::from_bits(u32::from(code) << 16)
    }

    /// What `test` can be run by; if by nothing, says so once.
    fn products_for(test: &str, said: &std::sync::Once) -> Vec<Products> {
        let all: Vec<_> = Products::available().collect();
        if all.is_empty() {
            said.call_once(|| eprintln!("skipped {test}: this processor multiplies no bfloat16"));
        }
        all
    }

    /// `f` with tiles, where `products` are.
    fn with(products: Products, f: impl FnOnce()) {
        // SAFETY: the processor has these products.
        let _tiles = (products == Products::Tiles).then(|| unsafe { Tiles::new() });
        f();
    }

    /// What a depthwise convolution's order puts where.
    fn unplace(codes: &[u16], channels: usize) -> Vec<f32> {
        codes.chunks_exact(lined(channels)).flat_map(|pixel| (0..channels).map(|c| value(pixel[place(c)]))).collect()
    }

    /// Whether `got`, a bfloat16, is `want` but for rounding and `loss`.
    fn near(got: f32, want: f64, loss: f64) -> bool {
        (f64::from(got) - want).abs() <= loss + want.abs() / 256.0
    }

    proptest! {
        /// Against the definition on the rounded numbers, in f64: nothing is lost but what rounding to 8 bits and sums in f32 lose.
        #[test]
        fn products_are_by_the_definition(
            inputs in 1usize..200, outputs in 1usize..150, pixels in 0usize..80,
            residual: bool, large in -3f32..3.0, seed in any::<u64>(),
        ) {
            static SAID: std::sync::Once = std::sync::Once::new();
            for products in products_for("products_are_by_the_definition", &SAID) {
                let (weights, bias) = (noise(seed, inputs * outputs), noise(seed ^ 1, outputs));
                let wide = padded(inputs);
                let of = |p: usize, i: usize| 10f32.powf(large) * crate::test_noise(seed ^ 2, (p * inputs + i) as u64);
                let values: Vec<f32> = (0..pixels * wide).map(|i| if i % wide < inputs { of(i / wide, i % wide) } else { 0.0 }).collect();
                let (expand, project) = (Packed16::expand(&weights, &bias, products), Packed16::project(&weights, &bias, products));
                let added = if residual { noise(seed ^ 3, pixels * project.outputs) } else { Vec::new() };
                let mut codes = vec![0u16; codes16(pixels, inputs)];
                let mut lines = vec![0u16; pixels * expand.outputs];
                let mut out = vec![f32::NAN; pixels * project.outputs];
                // SAFETY: the processor has these products.
                with(products, || unsafe {
                    encode16(&values, wide, &mut codes);
                    expand16(&expand, pixels, &codes, &mut lines);
                    let mut placed = vec![0u16; codes.len()];
                    for (from, to) in codes.chunks_exact(lined(inputs)).zip(placed.chunks_exact_mut(lined(inputs))) {
                        from.iter().enumerate().for_each(|(c, code)| to[place(c)] = *code);
                    }
                    project16(&project, pixels, &placed, residual.then_some(&added[..]), &mut out);
                });
                for p in 0..pixels {
                    for o in 0..expand.outputs {
                        let (mut sum, mut size) = (f64::from(bias.get(o).copied().unwrap_or(0.0)), 1.0);
                        for i in 0..inputs {
                            let product = f64::from(bf16(of(p, i))) * weights.get(o * inputs + i).map_or(0.0, |w| f64::from(bf16(*w)));
                            (sum, size) = (sum + product, size + product.abs());
                        }
                        let line = value(lines[p * expand.outputs + o]);
                        prop_assert!(near(line, sum.clamp(0.0, 6.0), 2e-6 * size), "{p} {o}: {line} {sum}");
                        if o < project.outputs {
                            let sum = sum + if residual { f64::from(added[p * project.outputs + o]) } else { 0.0 };
                            let got = f64::from(out[p * project.outputs + o]);
                            prop_assert!((got - sum).abs() <= 2e-6 * size, "{p} {o}: {got} {sum}");
                        }
                    }
                }
            }
        }

        /// Against the definition, with borders on every side, both strides, one row and two.
        #[test]
        fn depthwise_is_by_the_definition(
            channels in 1usize..100, width in 1usize..30, stride in 1usize..3, left in 0usize..2, right in 0usize..2,
            together in 1usize..=2, seed in any::<u64>(),
        ) {
            static SAID: std::sync::Once = std::sync::Once::new();
            if products_for("depthwise_is_by_the_definition", &SAID).is_empty() || width + left + right < 3 {
                return Ok(());
            }
            let (taps, bias) = (noise(seed, channels * 9), noise(seed ^ 1, channels));
            let wide = lined(channels);
            let out_width = (width + left + right - 3) / stride + 1;
            let of = |y: usize, x: usize, c: usize| 6.0 * crate::test_noise(seed ^ 2, ((y * width + x) * channels + c) as u64);
            let rows: Vec<Vec<u16>> = (0..(together - 1) * stride + 3)
                .map(|y| (0..width * wide).map(|i| if i % wide < channels { rounded16(of(y, i / wide, i % wide)) } else { 0 }).collect())
                .collect();
            let rows: Vec<&[u16]> = rows.iter().map(Vec::as_slice).collect();
            let mut out = vec![0xffffu16; together * out_width * wide];
            let op = Depthwise16::new(&taps, &bias);
            // SAFETY: there are such vectors where there are such products.
            unsafe { depthwise16(&op, stride, left, width, &rows, out_width, &mut out) };
            for (at, got) in unplace(&out, channels).into_iter().enumerate() {
                let (c, x, y) = (at % channels, at / channels % out_width, at / channels / out_width);
                let mut sum = f64::from(bias[c]);
                for t in 0..9 {
                    let column = (x * stride + t % 3).wrapping_sub(left);
                    if column < width {
                        sum += f64::from(taps[c * 9 + t]) * f64::from(bf16(of(y * stride + t / 3, column, c)));
                    }
                }
                prop_assert!(near(got, sum.clamp(0.0, 6.0), 1e-4), "{y} {x} {c}: {got} {sum}");
            }
            // What pads a line stays nothing, so that the next product may read it.
            prop_assert!(out.chunks_exact(wide).all(|pixel| (channels..wide).all(|c| pixel[place(c)] == 0)));
        }

        #[test]
        fn a_code_is_the_nearest(bits in any::<u32>()) {
            let value32 = f32::from_bits(bits);
            let code = rounded16(value32);
            if value32.is_nan() {
                prop_assert!(value(code).is_nan());
            } else {
                let off = |code: u16| (f64::from(value(code)) - f64::from(value32)).abs();
                for other in [code.wrapping_sub(1), code.wrapping_add(1)] {
                    prop_assert!(!value(other).is_finite() || !value(code).is_finite() || off(code) <= off(other));
                }
            }
            // What encodes pixels rounds the same way, but for numbers too small to be normal, which it takes for nothing.
            if Products::detect().is_some() && (value32 == 0.0 || !value32.is_subnormal()) {
                let mut codes = [7u16; LINE];
                // SAFETY: there are such vectors where there are such products.
                unsafe { encode16(&[value32; UNIT], UNIT, &mut codes) };
                let same = |c: &u16| *c == code || value(*c).is_nan() && value(code).is_nan();
                prop_assert!(codes[..UNIT].iter().all(same) && codes[UNIT..].iter().all(|c| *c == 0), "{value32} {codes:?} {code}");
            }
        }
    }

    #[test]
    fn nan_and_infinity_are_not_hidden_and_stay_with_their_pixel() {
        static SAID: std::sync::Once = std::sync::Once::new();
        let all = products_for("nan_and_infinity_are_not_hidden_and_stay_with_their_pixel", &SAID);
        if all.is_empty() {
            return;
        }
        for (products, pixels) in all.into_iter().flat_map(|p| [(p, 1), (p, 17), (p, 40)]) {
            let (inputs, at) = (2 * LINE, pixels / 2);
            let product = |weights: &[f32], values: &[f32]| {
                let (expand, project) = (Packed16::expand(weights, &[0.0; 20], products), Packed16::project(weights, &[0.0; 20], products));
                let mut codes = vec![0u16; codes16(pixels, inputs)];
                let mut lines = vec![0u16; pixels * expand.outputs];
                let mut out = vec![0f32; pixels * project.outputs];
                // SAFETY: the processor has these products.
                with(products, || unsafe {
                    encode16(values, inputs, &mut codes);
                    expand16(&expand, pixels, &codes, &mut lines);
                    // Values are the same in any order, and so are weights but for what is no number.
                    project16(&project, pixels, &codes, None, &mut out);
                });
                let rows = |p: usize| (value(lines[p * expand.outputs + 3]), out[p * project.outputs + 3], out[p * project.outputs + 2]);
                (0..pixels).map(rows).collect::<Vec<_>>()
            };
            for bad in [f32::NAN, f32::INFINITY] {
                let mut values = vec![1.0; pixels * inputs];
                values[at * inputs + 33] = bad;
                for (p, (line, out, _)) in product(&vec![1.0; 20 * inputs], &values).into_iter().enumerate() {
                    match p == at {
                        true if bad.is_nan() => assert!(line.is_nan() && out.is_nan()),
                        true => assert_eq!((line, out), (6.0, f32::INFINITY)),
                        false => assert_eq!((line, out), (6.0, 64.0)),
                    }
                }
            }
            let mut weights = vec![0.5f32; 20 * inputs];
            weights[3 * inputs + 7] = f32::NAN;
            assert!(product(&weights, &vec![1.0; pixels * inputs])
                .iter()
                .all(|(line, out, other)| line.is_nan() && out.is_nan() && *other == 32.0));
        }
        // A row that is not there is zeros, and a value that is no number is seen by its neighbours alone.
        let (width, op) = (9, Depthwise16::new(&[1.0; 9 * LINE], &[0.0; LINE]));
        let mut row = vec![rounded16(0.25); width * LINE];
        row[4 * LINE + 5] = rounded16(f32::NAN);
        let mut out = vec![0u16; width * LINE];
        // SAFETY: as above.
        unsafe { depthwise16(&op, 1, 1, width, &[&[0; 9 * LINE], &row, &row], width, &mut out) };
        for (at, v) in unplace(&out, LINE).into_iter().enumerate() {
            let (x, c) = (at / LINE, at % LINE);
            let seen = if x == 0 || x + 1 == width { 1.0 } else { 1.5 };
            assert!(if c == 5 && (3..6).contains(&x) { v.is_nan() } else { v == seen }, "{x} {c}: {v}");
        }
    }
}
