//! One row of output at a time, channels side by side: depthwise 3x3, and the stem's 3x3 over three planes.

use super::aligned::Aligned;
use super::pointwise::{activate, padded, UNIT};
use super::vector::Vector;
use super::Activation;

/// Weights of a depthwise 3x3, tap by tap.
#[derive(Debug)]
pub(super) struct Depthwise {
    /// Padded to whole units.
    pub channels: usize,
    /// Unit by unit: nine taps, then the bias, then the most that an output is, each over the unit's channels.
    weights: Aligned<f32>,
}

/// What a depthwise convolution has of each channel: taps, bias, most.
const PARTS: usize = 11;

impl Depthwise {
    /// From `weights`, C x 9, and `bias`, C. `scales`, above 0, are what each channel's output is multiplied by; empty: by nothing.
    pub fn new(weights: &[f32], bias: &[f32], scales: &[f32]) -> Self {
        let channels = padded(bias.len());
        let mut all = Aligned::new(PARTS * channels);
        for (c, (taps, bias)) in weights.chunks_exact(9).zip(bias).enumerate() {
            let scale = scales.get(c).copied().unwrap_or(1.0);
            for (t, w) in taps.iter().chain([bias, &6.0]).enumerate() {
                all.values_mut()[(c / UNIT * PARTS + t) * UNIT + c % UNIT] = w * scale;
            }
        }
        Self { channels, weights: all }
    }
}

/// Rows of output that are computed together where there are so many: rows of input between them are loaded once.
pub(super) const TOGETHER: usize = 2;

/// `relu6(depthwise(rows) + bias)`, scaled, for `out.len()` rows of `out_width` pixels, at most [`TOGETHER`], from the
/// `(out.len() - 1) * stride + 3` rows of `width` pixels that they see. Output pixel x sees the input pixels from
/// `x * stride - left` on; what is outside is zero.
///
/// # Safety
///
/// The processor has the instruction set of `V`.
#[inline(always)]
pub(super) unsafe fn depthwise_rows<V: Vector>(
    op: &Depthwise,
    stride: usize,
    left: usize,
    width: usize,
    rows: &[&[f32]],
    out_width: usize,
    out: &mut [f32],
) {
    let (channels, together) = (op.channels, out.len() / (out_width * op.channels));
    assert!(out_width > 0 && (1..=TOGETHER).contains(&together) && out.len() == together * out_width * channels, "depthwise: output");
    assert!(rows.len() == (together - 1) * stride + 3 && rows.iter().all(|r| r.len() >= width * channels), "depthwise: rows");
    assert!(width > 0 && left <= 1, "depthwise: width");
    // SAFETY: the assertions above.
    unsafe {
        match (stride, together) {
            (1, 1) => depthwise::<V, 1, 1, 6>(op, left, width, rows, out_width, out),
            (1, _) => depthwise::<V, 1, 2, 6>(op, left, width, rows, out_width, out),
            (2, 1) => depthwise::<V, 2, 1, 9>(op, left, width, rows, out_width, out),
            (2, _) => depthwise::<V, 2, 2, 9>(op, left, width, rows, out_width, out),
            _ => panic!("depthwise: stride {stride}"),
        }
    }
}

/// Pixels of a row of output that are computed together.
pub(super) const ACROSS: usize = 4;

/// # Safety
///
/// `rows` and `out` are as [`depthwise_rows`] asserts; `COLUMNS` is `(ACROSS - 1) * STRIDE + 3`.
#[inline(always)]
unsafe fn depthwise<V: Vector, const STRIDE: usize, const ROWS: usize, const COLUMNS: usize>(
    op: &Depthwise,
    left: usize,
    width: usize,
    rows: &[&[f32]],
    out_width: usize,
    out: &mut [f32],
) {
    let channels = op.channels;
    // Output pixels whose three columns are all inside.
    let first = left.div_ceil(STRIDE).min(out_width);
    let last = if width + left >= 3 { ((width + left - 3) / STRIDE + 1).min(out_width) } else { 0 };
    let last = last.max(first);
    let (weights, out) = (op.weights.values().as_ptr(), out.as_mut_ptr());
    // SAFETY: `channels` is whole units, so that a vector at c of any pixel within the asserted widths is within its slice;
    // the columns of `first..last` are inside by construction, the others are checked one by one.
    unsafe {
        if V::LANES == UNIT {
            // A vector is a line of the cache, and there are registers for its taps.
            for c in (0..channels).step_by(V::LANES) {
                let taps = Taps::load(weights, c);
                let mut x = 0;
                while x < out_width {
                    if x >= first && x + ACROSS <= last {
                        tile::<V, STRIDE, ROWS, COLUMNS>(&taps, (left, channels, c), rows, x, out_width, out);
                        x += ACROSS;
                    } else {
                        edge::<V, STRIDE, ROWS>(&taps, (left, width, channels, c), rows, x, out_width, out);
                        x += 1;
                    }
                }
            }
            return;
        }
        // Elsewhere all channels of some pixels: what a line holds is used while it is near, and lines that are as far from one
        // another as pixels of many channels would push each other out.
        let mut x = 0;
        while x < out_width {
            // The last of the pixels whose columns are inside are computed with some before them: sooner than one by one.
            if x > first && x < last && x + ACROSS > last && last - first >= ACROSS {
                x = last - ACROSS;
            }
            if x >= first && x + ACROSS <= last {
                for c in (0..channels).step_by(V::LANES) {
                    tile::<V, STRIDE, ROWS, COLUMNS>(&Taps::load(weights, c), (left, channels, c), rows, x, out_width, out);
                }
                x += ACROSS;
            } else {
                for c in (0..channels).step_by(V::LANES) {
                    edge::<V, STRIDE, ROWS>(&Taps::load(weights, c), (left, width, channels, c), rows, x, out_width, out);
                }
                x += 1;
            }
        }
    }
}

/// One vector of channels of a depthwise convolution's weights.
#[derive(Clone, Copy)]
struct Taps<V> {
    taps: [V; 9],
    bias: V,
    most: V,
}

impl<V: Vector> Taps<V> {
    /// Of the channels from `c` on, of a [`Depthwise`]'s `weights`.
    ///
    /// # Safety
    ///
    /// The processor has the instruction set of `V`, and there are so many channels.
    #[inline(always)]
    unsafe fn load(weights: *const f32, c: usize) -> Self {
        // SAFETY: the caller's promise: a unit's vectors lie one after the other.
        unsafe {
            let from = weights.add(c / UNIT * PARTS * UNIT + c % UNIT);
            let mut taps = [V::splat(0.0); 9];
            for (t, w) in taps.iter_mut().enumerate() {
                *w = V::load(from.add(t * UNIT));
            }
            Self { taps, bias: V::load(from.add(9 * UNIT)), most: V::load(from.add(10 * UNIT)) }
        }
    }
}

/// `ROWS` x [`ACROSS`] pixels of output, one vector of channels.
///
/// # Safety
///
/// As [`depthwise`], of whose loop this is a part; all columns that the pixels see are inside.
#[inline(always)]
unsafe fn tile<V: Vector, const STRIDE: usize, const ROWS: usize, const COLUMNS: usize>(
    Taps { taps, bias, most }: &Taps<V>,
    (left, channels, c): (usize, usize, usize),
    rows: &[&[f32]],
    x: usize,
    out_width: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[*bias; ACROSS]; ROWS];
        for y in 0..(ROWS - 1) * STRIDE + 3 {
            let from = rows.get_unchecked(y).as_ptr().add((x * STRIDE - left) * channels + c);
            let mut values = [*bias; COLUMNS];
            for (k, v) in values.iter_mut().enumerate() {
                *v = V::load(from.add(k * channels));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let tap = y.wrapping_sub(r * STRIDE);
                if tap < 3 {
                    for (k, sum) in sums.iter_mut().enumerate() {
                        for t in 0..3 {
                            *sum = values[k * STRIDE + t].fma(taps[3 * tap + t], *sum);
                        }
                    }
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            for (k, sum) in sums.into_iter().enumerate() {
                let to = out.add((r * out_width + x + k) * channels + c);
                sum.at_least(V::splat(0.0)).at_most(*most).store(to);
            }
        }
    }
}

/// One column of output, some of whose input may be outside. No closures here or above: what a library function calls
/// is not compiled for the instruction set.
///
/// # Safety
///
/// As [`depthwise`], of whose loop this is a part.
#[inline(always)]
unsafe fn edge<V: Vector, const STRIDE: usize, const ROWS: usize>(
    Taps { taps, bias, most }: &Taps<V>,
    (left, width, channels, c): (usize, usize, usize, usize),
    rows: &[&[f32]],
    x: usize,
    out_width: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's promise; columns outside are not read.
    unsafe {
        for r in 0..ROWS {
            let mut sum = *bias;
            for y in 0..3 {
                let row = rows.get_unchecked(r * STRIDE + y).as_ptr();
                for t in 0..3 {
                    let at = (x * STRIDE + t).wrapping_sub(left);
                    if at < width {
                        sum = V::load(row.add(at * channels + c)).fma(taps[3 * y + t], sum);
                    }
                }
            }
            sum.at_least(V::splat(0.0)).at_most(*most).store(out.add((r * out_width + x) * channels + c));
        }
    }
}

/// Output channels of the stem.
pub(super) const STEM: usize = 2 * UNIT;

/// Weights of the stem: a 3x3 over three planes at stride 2.
#[derive(Debug)]
pub(super) struct Stem {
    /// 27 taps (plane, row, column), then the bias, each over all channels.
    weights: Vec<f32>,
}

impl Stem {
    /// From `weights`, [`STEM`] x 27, and `bias`.
    pub fn new(weights: &[f32], bias: &[f32]) -> Self {
        let mut all = vec![0f32; 28 * STEM];
        for (c, (taps, bias)) in weights.chunks_exact(27).zip(bias).take(STEM).enumerate() {
            for (t, w) in taps.iter().chain([bias]).enumerate() {
                all[t * STEM + c] = *w;
            }
        }
        Self { weights: all }
    }
}

/// `relu6(stem(rows) + bias)`: `rows` are three rows of each of three planes, `width` values each.
///
/// # Safety
///
/// The processor has the instruction set of `V`.
#[inline(always)]
pub(super) unsafe fn stem_row<V: Vector>(op: &Stem, left: usize, width: usize, rows: [&[f32]; 9], out_width: usize, out: &mut [f32]) {
    assert!(rows.iter().all(|r| r.len() >= width) && out.len() >= out_width * STEM && left <= 1, "stem: rows");
    let first = left.div_ceil(2).min(out_width);
    let last = if width + left >= 3 { ((width + left - 3) / 2 + 1).min(out_width) } else { 0 };
    let last = last.max(first);
    let rows = rows.map(|r| r.as_ptr());
    // SAFETY: pixels of `first..last` have all their columns within the asserted width; the others are checked. A tile
    // writes `ROWS` pixels of STEM channels below `out_width`.
    unsafe {
        let out = out.as_mut_ptr();
        let mut x = 0;
        while x < first {
            stem_edge::<V>(op, &rows, left, width, x, out);
            x += 1;
        }
        match V::LANES {
            16 => stem_tiles::<V, 12, 2>(op, &rows, left, &mut x, last, out),
            8 => stem_tiles::<V, 2, 4>(op, &rows, left, &mut x, last, out),
            _ => stem_tiles::<V, 1, 8>(op, &rows, left, &mut x, last, out),
        }
        while x < out_width {
            stem_edge::<V>(op, &rows, left, width, x, out);
            x += 1;
        }
    }
}

/// One pixel, some of whose columns may be outside.
///
/// # Safety
///
/// As [`stem_row`], of which this is a part.
#[inline(always)]
unsafe fn stem_edge<V: Vector>(op: &Stem, rows: &[*const f32; 9], left: usize, width: usize, x: usize, out: *mut f32) {
    // SAFETY: the caller's promise; columns outside are not read.
    unsafe {
        for c in (0..STEM).step_by(V::LANES) {
            let mut sum = V::load(op.weights.as_ptr().add(27 * STEM + c));
            for (r, row) in rows.iter().enumerate() {
                for t in 0..3 {
                    let at = (2 * x + t).wrapping_sub(left);
                    if at < width {
                        sum = V::splat(*row.add(at)).fma(V::load(op.weights.as_ptr().add((3 * r + t) * STEM + c)), sum);
                    }
                }
            }
            activate(sum, Activation::Relu6).store(out.add(x * STEM + c));
        }
    }
}

/// # Safety
///
/// All columns of the pixels from `x` to `last` are inside.
#[inline(always)]
unsafe fn stem_tiles<V: Vector, const ROWS: usize, const VECTORS: usize>(
    op: &Stem,
    rows: &[*const f32; 9],
    left: usize,
    x: &mut usize,
    last: usize,
    out: *mut f32,
) {
    let first = *x;
    // SAFETY: the caller's promise.
    unsafe {
        while *x < last && last - first >= ROWS {
            // The last tile computes some of the pixels again.
            *x = (*x).min(last - ROWS);
            stem_tile::<V, ROWS, VECTORS>(op.weights.as_ptr(), rows, 2 * *x - left, out.add(*x * STEM));
            *x += ROWS;
        }
    }
}

/// `ROWS` pixels of all channels, which `VECTORS` vectors hold, seen from `column` on.
///
/// # Safety
///
/// All of their columns are inside; weights and output are there.
#[inline(always)]
unsafe fn stem_tile<V: Vector, const ROWS: usize, const VECTORS: usize>(
    weights: *const f32,
    rows: &[*const f32; 9],
    column: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::splat(0.0); VECTORS]; ROWS];
        for v in 0..VECTORS {
            let bias = V::load(weights.add(27 * STEM + v * V::LANES));
            for row in &mut sums {
                row[v] = bias;
            }
        }
        for (r, row) in rows.iter().enumerate() {
            for t in 0..3 {
                let from = row.add(column + t);
                let mut w = [V::splat(0.0); VECTORS];
                for (v, w) in w.iter_mut().enumerate() {
                    *w = V::load(weights.add((3 * r + t) * STEM + v * V::LANES));
                }
                for (k, sums) in sums.iter_mut().enumerate() {
                    let value = V::splat(*from.add(2 * k));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = value.fma(w, *sum);
                    }
                }
            }
        }
        for (k, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                activate(sum, Activation::Relu6).store(out.add(k * STEM + v * V::LANES));
            }
        }
    }
}
