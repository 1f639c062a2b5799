//! 3x3 convolution at stride 1 and padding 1 by AMX's tiles, by its definition. Each f32 is taken for a sum of two bfloat16, which are
//! sixteen of its 24 bits, and of the four products of two such sums the three larger ones are summed, in f32. Tiles multiply bfloat16
//! sixteen times as fast as vectors multiply f32, so three products for one are five times as fast; Winograd's transforms would cost more
//! than they save, and more than two halves, for they lose digits. The error is 1.4 times that of Winograd's F(6x6) in f32, and 2.8 times
//! that of F(4x4) (the tests of `conv3x3.rs` print them).
//!
//! Channels lie side by side. A band of rows is worked on in runs of pixels, which are split into halves first: in lines of 32 channels,
//! the lines of one half side by side, so that a tile is sixteen lines that follow one another at any offset of the kernel.

use super::aligned::Aligned;
use super::bf16::{bf16, line, rounded16, Tiles, LINE};
use super::conv3x3::{Before, Image, Layer};
use super::pointwise::{activate, Packed, UNIT};
use super::vector::Vector;
use crate::team::chunks_with;
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Pixels of a run at most, whole tiles.
const RUN: usize = 160;
/// Pixels from one row of one half to the next: a run, a pixel on either side, and one so that rows do not begin in the same set of the
/// first-level cache.
const PITCH: usize = RUN + 3;
/// Rows of an image from which on bands are of eight.
const TALL: usize = 120;
/// Codes of a tile.
const TILE: usize = UNIT * LINE;

/// Weights in two halves, and biases.
#[derive(Debug)]
pub(super) struct Halves {
    inputs: usize,
    outputs: usize,
    /// Two units of outputs after two; of these, line by line of inputs, row by row and column by column of the kernel, the tiles of
    /// both units' lower and of their upper halves.
    weights: Aligned<u16>,
    bias: Aligned<f32>,
}

impl Halves {
    /// From `weights`, O x I x 3 x 3, and `bias`, O.
    pub fn new(weights: &[f32], bias: &[f32]) -> Self {
        let (outputs, inputs) = (bias.len(), weights.len() / (9 * bias.len().max(1)));
        let (pairs, lines) = (outputs.div_ceil(2 * UNIT), inputs.div_ceil(LINE));
        let mut packed =
            Self { inputs, outputs, weights: Aligned::new(pairs * lines * 9 * 4 * TILE), bias: Aligned::new(pairs * 2 * UNIT) };
        packed.bias.values_mut()[..outputs].copy_from_slice(bias);
        for (at, weight) in weights.iter().enumerate() {
            let (o, i, tap) = (at / 9 / inputs, at / 9 % inputs, at % 9);
            let tiles = ((o / LINE * lines + i / LINE) * 9 + tap) * 4 + o % LINE / UNIT;
            let within = (i % LINE / 2 * UNIT + o % UNIT) * 2 + i % 2;
            let upper = bf16(*weight);
            let lower = if upper.is_finite() { weight - upper } else { 0.0 };
            packed.weights.values_mut()[tiles * TILE + within] = rounded16(lower);
            packed.weights.values_mut()[(tiles + 2) * TILE + within] = rounded16(upper);
        }
        packed
    }

    fn lines(&self) -> usize {
        self.inputs.div_ceil(LINE)
    }

    /// `layer` of one image, every value of `out`. [`super::bf16::tiles`] has said that there are any.
    pub fn image(&self, layer: Layer, image: Image, out: &mut [f32]) {
        let scale = layer.scale();
        // Two rows of each band are split twice; few bands of a small image are an unequal share for some thread.
        let band = if image.height >= TALL { 8 } else { 4 };
        chunks_with(out, band / scale * (image.width / scale) * self.outputs, Scratch::default, |scratch, at, out| {
            let Scratch { codes, before } = scratch;
            codes.fit(self, band + 2);
            if layer.before.is_some() {
                before.fit(1, RUN + 2, self.inputs);
            }
            let y = at * band;
            // SAFETY: there are tiles, and vectors where there are tiles.
            unsafe {
                let _tiles = Tiles::new();
                for x in (0..image.width).step_by(RUN) {
                    let across = (image.width - x).min(RUN);
                    let columns = x.saturating_sub(1)..(x + across + 1).min(image.width);
                    let first = columns.start + 1 - x;
                    for row in 0..band + 2 {
                        let line = (y + row).wrapping_sub(1);
                        if line >= image.height {
                            encode(self, codes, row, across, first, &[]);
                            continue;
                        }
                        let source = match layer.before {
                            Some(packed) => part_avx512(before, packed, image, line, columns.clone()),
                            None => image,
                        };
                        let values = &source.at(line, columns.start)[..columns.len() * self.inputs];
                        encode(self, codes, row, across, first, values);
                    }
                    products(self, codes, Run { x, across, width: image.width, layer }, out);
                }
            }
        });
    }
}

/// Rows of a run, as tiles read them.
#[derive(Default)]
struct Codes {
    /// Line of channels, row, half, pixel: the run's first is at 1, for the kernel sees the one before it.
    codes: Aligned<u16>,
    rows: usize,
}

impl Codes {
    /// For `rows` rows of inputs of `op`.
    fn fit(&mut self, op: &Halves, rows: usize) {
        self.rows = rows;
        self.codes.fit(op.lines() * rows * ROW);
    }
}

/// Where the output of a run goes.
#[derive(Clone, Copy)]
struct Run<'a> {
    /// Its first pixel's column, and how many pixels there are.
    x: usize,
    across: usize,
    /// Columns of the image.
    width: usize,
    layer: Layer<'a>,
}

/// [`Before::part`] of one row.
///
/// # Safety
///
/// The processor has AVX-512, for which `packed` was packed.
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
unsafe fn part_avx512<'a>(before: &'a mut Before, packed: &Packed, plane: Image<'a>, row: usize, columns: Range<usize>) -> Image<'a> {
    // SAFETY: the caller's promise.
    unsafe { before.part::<__m512>(packed, plane, row..row + 1, columns) }
}

/// What a thread needs beside its input and output.
#[derive(Default)]
struct Scratch {
    codes: Codes,
    before: Before,
}

/// Codes of a row: both halves.
const ROW: usize = 2 * PITCH * LINE;
/// Weights of two units for a line of channels and a row of the kernel: three offsets, two halves.
const TAPS: usize = 3 * 4 * TILE;
/// Bytes of a line.
const WIDE: usize = 2 * LINE;

/// Two vectors of channels as a line of the upper half and one of the lower.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn halves(low: __m512, high: __m512) -> (__m512i, __m512i) {
    let upper = line(low, high);
    let (of_low, of_high) = (widened(_mm512_castsi512_si256(upper)), widened(_mm512_extracti64x4_epi64::<1>(upper)));
    (upper, line(_mm512_sub_ps(low, of_low), _mm512_sub_ps(high, of_high)))
}

/// Bfloat16 as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn widened(codes: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(codes)))
}

/// Row `row` of a run of `across` pixels, of which and of the pixels on either side those from `first` on are inside: `values`, each
/// with `op.inputs` channels, whole units. The others are zero.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn encode(op: &Halves, codes: &mut Codes, row: usize, across: usize, first: usize, values: &[f32]) {
    let (inputs, rows) = (op.inputs, codes.rows);
    let inside = values.len() / inputs;
    assert!(inputs.is_multiple_of(UNIT) && first + inside <= across + 2 && across <= RUN && row < rows, "halves: row");
    let (lines, between) = (op.lines(), rows * ROW);
    let to = &mut codes.codes.values_mut()[row * ROW..][..(lines - 1) * between + ROW];
    for line in 0..lines {
        for half in to[line * between..][..ROW].chunks_exact_mut(PITCH * LINE) {
            half[..first * LINE].fill(0);
            half[(first + inside) * LINE..(across + 2) * LINE].fill(0);
        }
    }
    let to = to[first * LINE..].as_mut_ptr();
    for (pixel, from) in values.chunks_exact(inputs).enumerate() {
        for (line, from) in from.chunks(LINE).enumerate() {
            // SAFETY: a chunk is one unit or two; both halves of the pixel's line are within `to`.
            unsafe {
                let low = _mm512_loadu_ps(from.as_ptr());
                let high = if from.len() == LINE { _mm512_loadu_ps(from.as_ptr().add(UNIT)) } else { _mm512_setzero_ps() };
                let (upper, lower) = halves(low, high);
                let to = to.add(line * between + pixel * LINE);
                _mm512_store_si512(to.cast(), upper);
                _mm512_store_si512(to.add(PITCH * LINE).cast(), lower);
            }
        }
    }
}

/// Sums of two rows' tiles for two units of outputs: row by row, unit by unit.
#[repr(align(64))]
struct Sums([f32; 4 * UNIT * UNIT]);

/// Where some sums go.
#[derive(Clone, Copy)]
struct Place {
    /// Of the first pixel's first channel, in the output.
    at: usize,
    /// Rows, and pixels of each.
    rows: usize,
    across: usize,
    /// The first channel.
    output: usize,
}

impl Place {
    /// Part `part` of `parts` of its pixels.
    fn pixels(&self, part: usize, parts: usize) -> Range<usize> {
        let all = self.rows * self.across;
        all * part / parts..all * (part + 1) / parts
    }
}

/// `activation(conv(x) + bias)` of a run, its largest of each 2x2 where it pools: of as many rows as there are in `out`, which has
/// the image's columns, or half of them.
///
/// # Safety
///
/// [`Tiles`] lives on this thread.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn products(op: &Halves, codes: &Codes, run: Run, out: &mut [f32]) {
    let scale = run.layer.scale();
    let pitch = run.width / scale * op.outputs;
    let rows = out.len() / pitch.max(1) * scale;
    let parts = 3 * op.lines();
    // An odd last row is computed with the one after it, which may be what an earlier run has left.
    let seen = rows.next_multiple_of(2) + 2;
    assert!(codes.rows >= seen && codes.codes.len() >= op.lines() * codes.rows * ROW && run.across <= RUN, "halves: codes");
    assert!(op.weights.len() >= op.outputs.div_ceil(LINE) * parts * TAPS && op.bias.len() >= op.outputs, "halves: weights");
    let mut sums = [const { Sums([0.0; 4 * UNIT * UNIT]) }; 2];
    let (mut before, mut turn) = (None, 0);
    for output in (0..op.outputs).step_by(LINE) {
        for row in (0..rows).step_by(2) {
            for pixel in (0..run.across).step_by(UNIT) {
                let place = Place {
                    at: row / scale * pitch + (run.x + pixel) / scale * op.outputs + output,
                    rows: (rows - row).min(2) / scale,
                    across: (run.across - pixel).min(UNIT) / scale,
                    output,
                };
                // SAFETY: the caller's promise; `seen` rows of each line, whole tiles of the run and two pixels more, all taps' weights
                // and biases of two units are there by the assertions.
                unsafe {
                    let x = codes.codes.values().as_ptr().add(row * ROW + pixel * LINE);
                    let weights = op.weights.values().as_ptr().add(output / LINE * parts * TAPS);
                    begin(op.bias.values().as_ptr().add(output));
                    for part in 0..parts {
                        add(x.add((part / 3 * codes.rows + part % 3) * ROW), weights.add(part * TAPS));
                        // While these are on the way, those before are written, and memory is asked for their own.
                        if let Some(before) = before {
                            write(op, before, before.pixels(part, parts), run.layer, pitch, &sums[1 - turn], out);
                        }
                        ask(op, place, place.pixels(part, parts), pitch, out);
                    }
                    end(&mut sums[turn]);
                }
                (before, turn) = (Some(place), 1 - turn);
            }
        }
    }
    if let Some(before) = before {
        write(op, before, before.pixels(0, 1), run.layer, pitch, &sums[1 - turn], out);
    }
}

/// The products of one offset of the kernel along a row: the lower halves of the weights by the upper of the pixels, upper by
/// upper, upper by lower. What was loaded last is used first in the next.
macro_rules! step {
    ($x:literal, $w:literal) => {
        concat!(
            "tileloadd tmm6, [{w} + {wide} + ",
            $w,
            "]\n",
            "tileloadd tmm4, [{x} + {wide} + ",
            $x,
            "]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tileloadd tmm7, [{w} + {wide} + ",
            $w,
            " + 1024]\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            "tileloadd tmm5, [{x} + {wide} + {row} + ",
            $x,
            "]\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            "tdpbf16ps tmm3, tmm5, tmm7\n",
            "tileloadd tmm6, [{w} + {wide} + ",
            $w,
            " + 2048]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tileloadd tmm7, [{w} + {wide} + ",
            $w,
            " + 3072]\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            "tdpbf16ps tmm3, tmm5, tmm7\n",
            "tileloadd tmm4, [{x} + {wide} + {half} + ",
            $x,
            "]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            "tileloadd tmm5, [{x} + {wide} + {row} + {half} + ",
            $x,
            "]\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            "tdpbf16ps tmm3, tmm5, tmm7",
        )
    };
}

/// Sums of two rows of 16 pixels and two units of outputs begin with the bias. In assembly, for the compiler has no types for tiles
/// yet, and uses none: they stay as they are until [`end`].
///
/// # Safety
///
/// Tiles are configured as sixteen rows of a line; the biases are there.
#[inline(always)]
unsafe fn begin(bias: *const f32) {
    // SAFETY: the caller's promise: the same line of biases for each of the rows.
    unsafe {
        asm!(
            "tileloadd tmm0, [{bias} + {zero}]",
            "tileloadd tmm1, [{bias} + {zero} + 64]",
            "tileloadd tmm2, [{bias} + {zero}]",
            "tileloadd tmm3, [{bias} + {zero} + 64]",
            bias = in(reg) bias, zero = in(reg) 0usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nostack, preserves_flags, readonly)
        );
    }
}

/// Adds the products of one row of the kernel and one line of channels.
///
/// # Safety
///
/// As [`begin`], which was before; at `x` are the codes of the upper row's pixels and of two more, a row below those of the lower; three
/// offsets' weights are there.
#[inline(always)]
unsafe fn add(x: *const u16, weights: *const u16) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            step!(0, 0), step!(64, 4096), step!(128, 8192),
            x = in(reg) x, w = in(reg) weights, wide = in(reg) WIDE, row = const 2 * ROW, half = const ROW,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, readonly)
        );
    }
}

/// Stores the sums.
///
/// # Safety
///
/// As [`begin`], which was before.
#[inline(always)]
unsafe fn end(sums: &mut Sums) {
    // SAFETY: the sums hold four tiles.
    unsafe {
        asm!(
            "tilestored [{sums} + {wide}], tmm0",
            "tilestored [{sums} + {wide} + 1024], tmm1",
            "tilestored [{sums} + {wide} + 2048], tmm2",
            "tilestored [{sums} + {wide} + 3072], tmm3",
            wide = in(reg) WIDE, sums = in(reg) sums.0.as_mut_ptr(), options(nostack, preserves_flags)
        );
    }
}

/// Asks for the lines that these pixels of a place are written to.
#[inline]
#[target_feature(enable = "avx512f")]
fn ask(op: &Halves, place: Place, pixels: Range<usize>, pitch: usize, out: &[f32]) {
    for pixel in pixels {
        let to = place.at + pixel / place.across * pitch + pixel % place.across * op.outputs;
        for unit in 0..(op.outputs - place.output).div_ceil(UNIT).min(2) {
            #[allow(unused_unsafe)] // older compilers ask for it
            // SAFETY: nothing is read.
            unsafe {
                _mm_prefetch::<_MM_HINT_ET0>(out.as_ptr().wrapping_add(to + unit * UNIT).cast())
            };
        }
    }
}

/// Writes these pixels of sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn write(op: &Halves, place: Place, pixels: Range<usize>, layer: Layer, pitch: usize, sums: &Sums, out: &mut [f32]) {
    let channels = (op.outputs - place.output).min(LINE);
    for pixel in pixels {
        let (row, pixel) = (pixel / place.across, pixel % place.across);
        let to = &mut out[place.at + row * pitch + pixel * op.outputs..][..channels];
        for (unit, to) in to.chunks_mut(UNIT).enumerate() {
            let mask = u16::MAX >> (UNIT - to.len());
            // SAFETY: sums hold two rows of two units of 16 pixels, and two rows and pixels where there is a largest of four; so many
            // values as the mask says are in `to`.
            unsafe {
                let from = sums.0.as_ptr().add(unit * UNIT * UNIT);
                let value = if layer.pool {
                    let top = from.add(2 * pixel * UNIT);
                    let bottom = top.add(2 * UNIT * UNIT);
                    let (a, b) = (_mm512_load_ps(top), _mm512_load_ps(top.add(UNIT)));
                    let (c, d) = (_mm512_load_ps(bottom), _mm512_load_ps(bottom.add(UNIT)));
                    a.largest(b).largest(c.largest(d))
                } else {
                    _mm512_load_ps(from.add((2 * row * UNIT + pixel) * UNIT))
                };
                _mm512_mask_storeu_ps(to.as_mut_ptr(), mask, activate(value, layer.activation));
            }
        }
    }
}
