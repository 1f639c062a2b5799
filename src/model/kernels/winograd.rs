//! 3x3 convolution at stride 1 and padding 1 with bias, ReLU and 2x2 maximum, by Winograd's F(4x4, 3x3)
//! and F(6x6, 3x3) (Lavin and Gray, CVPR 2016): a quarter and a fifth of the multiplications of the definition.
//!
//! Channels lie side by side. A row of tiles is worked on in runs: their neighbourhoods, two pixels larger, are transformed to a
//! plane for each of their values, in each of which the convolution is a matrix product over channels; the products of a group of
//! output channels are transformed back while they are in the cache.
//!
//! Functions that know the tile are generic over it: `TILE` rows and columns of output, `SEEN` of input, which is `TILE + 2`.

use super::aligned::Aligned;
use super::conv3x3::{Before, Image, Layer};
use super::pointwise::{activate, panel, Packed, Pixels, UNIT};
use super::vector::Vector;
use super::{Activation, Isa};
use crate::team::chunks_with;

/// Units of output channels that are transformed back together.
const GROUP: usize = 4;
/// Columns of the input from which on tiles of 6x6 are used, and channels up to which. Measured with AVX2 and 64 channels: 0.90 to
/// 0.93 of the time of 4x4 at 480x640 and 240x320, nothing gained at 120x160, 1.1 to 1.4 at 60x80, where a row's last run is mostly
/// empty. With twice the channels a run and the weights of 64 planes leave the second-level cache.
const WIDE: usize = 240;
const NARROW: usize = 64;

/// Tiles of a run whose input is made together, where it is made.
const PART: usize = 6;

/// Tiles of a run at most: whole tiles of the matrix product's kernels, and few enough for the second-level cache.
const fn run_of(tile: usize) -> usize {
    [24, 18][(tile == 6) as usize]
}

/// Values from one plane of a run to the next: a cache line more than they take, or all planes of a tile would lie in the same few
/// sets of the first-level cache, which keeps eight lines of each.
const fn pitch(tile: usize, channels: usize) -> usize {
    run_of(tile) * channels + UNIT
}

/// Weights, transformed once.
#[derive(Debug)]
pub(super) struct Winograd {
    /// Of each group of output channels, the matrices of the planes of tiles of 4x4.
    four: Vec<Packed>,
    /// Of tiles of 6x6; none where they would not pay at any size.
    six: Vec<Packed>,
    /// Columns of the input from which on those are used.
    wide: usize,
    /// Padded to whole units.
    bias: Vec<f32>,
    inputs: usize,
    outputs: usize,
    isa: Isa,
}

impl Winograd {
    /// From `weight`, O x I x 3 x 3, and `bias`, O, for `isa`; I a multiple of 16.
    pub fn new(weight: &[f32], bias: &[f32], isa: Isa) -> Self {
        let narrow = bias.len() <= NARROW && weight.len() <= 9 * NARROW * bias.len();
        // With AVX-512 a product takes half as long and a transform, which waits for memory, does not: 1.03 to 1.15 of the time of 4x4
        // on an Intel, one thread.
        Self::on(weight, bias, isa, if narrow && isa != Isa::Avx512 { WIDE } else { usize::MAX })
    }

    /// With tiles of 6x6 for images of `wide` columns and more.
    pub fn on(weight: &[f32], bias: &[f32], isa: Isa, wide: usize) -> Self {
        let (outputs, inputs) = (bias.len(), weight.len() / (9 * bias.len().max(1)));
        let groups = |points: &[[f64; 3]]| -> Vec<Packed> {
            let mut planes = vec![vec![0f32; outputs * inputs]; points.len() * points.len()];
            for (at, kernel) in weight.chunks_exact(9).enumerate() {
                for (plane, value) in planes.iter_mut().zip(transform_kernel(points, kernel)) {
                    plane[at] = value;
                }
            }
            let group = |first: usize| -> Packed {
                let of = first..(first + GROUP * UNIT).min(outputs);
                let matrices: Vec<_> = planes.iter().map(|p| &p[of.start * inputs..of.end * inputs]).collect();
                Packed::several(&matrices, &vec![0f32; of.len()], inputs, isa)
            };
            (0..outputs).step_by(GROUP * UNIT).map(group).collect()
        };
        let (four, six) = (groups(&FOUR), if wide < usize::MAX { groups(&SIX) } else { Vec::new() });
        let mut bias = bias.to_vec();
        bias.resize(outputs.next_multiple_of(UNIT), 0.0);
        Self { four, six, wide, bias, inputs, outputs, isa }
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// `layer` of one image, every value of `out`.
    pub fn image(&self, layer: Layer, image: Image, out: &mut [f32]) {
        let scale = layer.scale();
        let six = image.width >= self.wide;
        let tile = if six { 6 } else { 4 };
        let op = Op { packed: self, layer };
        chunks_with(out, tile / scale * (image.width / scale) * self.outputs, Scratch::default, |scratch, row, out| {
            scratch.fit(op, tile);
            match (self.isa, six) {
                // SAFETY: the weights were packed for what `Isa::detect` found on this processor, or for less.
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512, false) => unsafe { tile_row_avx512::<4, 6>(op, image, row, scratch, out) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512, true) => unsafe { tile_row_avx512::<6, 8>(op, image, row, scratch, out) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, false) => unsafe { tile_row_avx2::<4, 6>(op, image, row, scratch, out) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, true) => unsafe { tile_row_avx2::<6, 8>(op, image, row, scratch, out) },
                // SAFETY: plain arrays need no instruction set.
                (_, false) => unsafe { tile_row::<[f32; 4], 4, 6>(op, image, row, scratch, out) },
                // SAFETY: as above.
                (_, true) => unsafe { tile_row::<[f32; 4], 6, 8>(op, image, row, scratch, out) },
            }
        });
    }
}

/// What a row of tiles is made with.
#[derive(Clone, Copy)]
struct Op<'a> {
    packed: &'a Winograd,
    layer: Layer<'a>,
}

/// `G` of tiles of 4x4, of the points 0, 1, -1, 2, -2 and infinity.
const FOUR: [[f64; 3]; 6] = [
    [1.0 / 4.0, 0.0, 0.0],
    [-1.0 / 6.0, -1.0 / 6.0, -1.0 / 6.0],
    [-1.0 / 6.0, 1.0 / 6.0, -1.0 / 6.0],
    [1.0 / 24.0, 1.0 / 12.0, 1.0 / 6.0],
    [1.0 / 24.0, -1.0 / 12.0, 1.0 / 6.0],
    [0.0, 0.0, 1.0],
];

/// `G` of tiles of 6x6, of the points 0, 1, -1, 2, -2, 1/2, -1/2 and infinity.
const SIX: [[f64; 3]; 8] = [
    [1.0, 0.0, 0.0],
    [-2.0 / 9.0, -2.0 / 9.0, -2.0 / 9.0],
    [-2.0 / 9.0, 2.0 / 9.0, -2.0 / 9.0],
    [1.0 / 90.0, 1.0 / 45.0, 2.0 / 45.0],
    [1.0 / 90.0, -1.0 / 45.0, 2.0 / 45.0],
    [1.0 / 45.0, 1.0 / 90.0, 1.0 / 180.0],
    [1.0 / 45.0, -1.0 / 90.0, 1.0 / 180.0],
    [0.0, 0.0, 1.0],
];

/// `G g G^T` of a kernel, in f64, row by row.
fn transform_kernel<'a>(points: &'a [[f64; 3]], kernel: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
    let rows = points.iter().map(|g| [0, 1, 2].map(|c| (0..3).map(|r| g[r] * f64::from(kernel[3 * r + c])).sum::<f64>()));
    rows.flat_map(|row| points.iter().map(move |g| (0..3).map(|c| row[c] * g[c]).sum::<f64>() as f32))
}

/// What a thread needs beside its input and output.
#[derive(Default)]
struct Scratch {
    /// Plane, tile, input channel.
    input: Aligned<f32>,
    /// Plane, tile, output channel of the group.
    product: Aligned<f32>,
    zeros: Vec<f32>,
    /// The neighbourhood of a tile at the image's edge.
    edge: Vec<f32>,
    /// For what the convolution before gives for a part of a run.
    before: Before,
}

impl Scratch {
    fn fit(&mut self, op: Op, tile: usize) {
        let (inputs, seen) = (op.packed.inputs, tile + 2);
        if op.layer.before.is_some() {
            self.before.fit(seen, tile * PART + 2, inputs);
        }
        self.input.fit(seen * seen * pitch(tile, inputs));
        self.product.fit(seen * seen * pitch(tile, GROUP * UNIT));
        self.zeros.resize(seen * inputs, 0.0);
        self.edge.resize(seen * seen * inputs, 0.0);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
unsafe fn tile_row_avx512<const TILE: usize, const SEEN: usize>(op: Op, image: Image, row: usize, scratch: &mut Scratch, out: &mut [f32]) {
    // SAFETY: the features of this function.
    unsafe { tile_row::<std::arch::x86_64::__m512, TILE, SEEN>(op, image, row, scratch, out) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_row_avx2<const TILE: usize, const SEEN: usize>(op: Op, image: Image, row: usize, scratch: &mut Scratch, out: &mut [f32]) {
    // SAFETY: the features of this function.
    unsafe { tile_row::<std::arch::x86_64::__m256, TILE, SEEN>(op, image, row, scratch, out) }
}

/// The tiles of one row: `TILE` rows of output, half as many if pooled, or what there is of them.
///
/// # Safety
///
/// The processor has the instruction set of `V`, for which the weights were packed; `scratch` fits.
#[inline(always)]
unsafe fn tile_row<V: Vector, const TILE: usize, const SEEN: usize>(
    op: Op,
    image: Image,
    row: usize,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let inputs = op.packed.inputs;
    let (tiles, run, count) = (image.width.div_ceil(TILE), run_of(TILE), SEEN * SEEN);
    let groups = if TILE == 4 { &op.packed.four } else { &op.packed.six };
    let Scratch { input, product, zeros, edge, before: window } = scratch;
    let (input, product) = (input.values_mut(), product.values_mut());
    let mut first = 0;
    while first < tiles {
        let n = (tiles - first).min(run);
        // SAFETY: the instruction set by the caller's promise.
        unsafe {
            for from in (0..n).step_by(PART) {
                let to = (from + PART).min(n);
                let source = match op.layer.before {
                    Some(before) => {
                        let (y, x) = (TILE * row, TILE * (first + from));
                        let rows = y.saturating_sub(1)..(y + TILE + 1).min(image.height);
                        let columns = x.saturating_sub(1)..(x + TILE * (to - from) + 1).min(image.width);
                        window.part::<V>(before, image, rows, columns)
                    }
                    None => image,
                };
                for t in from..to {
                    let rows = neighbourhood(source, TILE * row, TILE * (first + t), zeros, edge);
                    match inputs {
                        64 => transform_input::<V, TILE, SEEN, 64>(rows, inputs, t, input),
                        128 => transform_input::<V, TILE, SEEN, 128>(rows, inputs, t, input),
                        _ => transform_input::<V, TILE, SEEN, 0>(rows, inputs, t, input),
                    }
                }
            }
            let side = if op.layer.pool { TILE / 2 } else { TILE };
            let width = image.width / (TILE / side);
            // Of the next run that this thread may well have: of this row, or the first of one that no other thread has yet.
            let (next, after) = if first + n < tiles { (first + n, row) } else { (0, row + rayon::current_num_threads()) };
            for (g, planes) in groups.iter().enumerate() {
                let (channels, last) = (planes.outputs, g + 1 == groups.len());
                let panels = planes.panels() / count;
                for at in 0..planes.panels() {
                    let p = at / panels;
                    if V::LANES < UNIT {
                        // While there is much to do with little of it, memory is asked for what comes next: the pixels of the next run,
                        let (y, x) = ((TILE * after + p / SEEN).wrapping_sub(1), TILE * next);
                        if last && op.layer.before.is_none() && x < image.width && y < image.height {
                            let part = (at % (SEEN * panels), SEEN * panels);
                            ask::<V>(image.at(y, x).as_ptr(), (inputs, inputs), (TILE * run).min(image.width - x), part);
                        }
                        // and those that this one's output is written to.
                        let parts = planes.panels().div_ceil(side);
                        let to = (at / parts * width + side * first) * op.packed.outputs + g * GROUP * UNIT;
                        let across = (side * n).min(width.saturating_sub(side * first));
                        ask::<V>(out.as_ptr().wrapping_add(to), (op.packed.outputs, channels), across, (at % parts, parts));
                    }
                    let x = Pixels::new(&input[p * pitch(TILE, inputs)..][..run * inputs], inputs);
                    let y = &mut product[p * pitch(TILE, channels)..][..n * channels];
                    panel::<V, false>(planes, at, n, x, None, Activation::None, y);
                }
                for t in 0..n {
                    let place = Place { tile: first + t, t, width, first: g * GROUP * UNIT, channels };
                    match (channels == GROUP * UNIT, op.layer.pool) {
                        (true, true) => transform_output::<V, TILE, SEEN, { GROUP * UNIT }, true>(op, place, product, out),
                        (true, false) => transform_output::<V, TILE, SEEN, { GROUP * UNIT }, false>(op, place, product, out),
                        (false, true) => transform_output::<V, TILE, SEEN, 0, true>(op, place, product, out),
                        (false, false) => transform_output::<V, TILE, SEEN, 0, false>(op, place, product, out),
                    }
                }
            }
        }
        first += n;
    }
}

/// The body once for each number, which it then knows.
macro_rules! unrolled {
    ($i:ident in $($n:literal)* $body:block) => {$({
        const $i: usize = $n;
        $body
    })*};
}

/// `a - b`.
///
/// # Safety
///
/// The processor has the instruction set of `V`.
#[inline(always)]
unsafe fn minus<V: Vector>(a: V, b: V) -> V {
    // SAFETY: the caller's promise.
    unsafe { b.fma(V::splat(-1.0), a) }
}

/// `B^T d`.
///
/// # Safety
///
/// The processor has the instruction set of `V`.
#[inline(always)]
unsafe fn forwards<V: Vector, const SEEN: usize>(d: [V; SEEN]) -> [V; SEEN] {
    let mut out = d;
    // Of each pair of points, what their rows have alike, and what of opposite sign.
    //
    // SAFETY: the caller's promise.
    unsafe {
        if SEEN == 6 {
            let (four, five) = (V::splat(4.0), V::splat(-5.0));
            let (a, b) = (d[2].fma(V::splat(-4.0), d[4]), d[1].fma(V::splat(-4.0), d[3]));
            let (c, e) = (minus(d[4], d[2]), minus(d[3], d[1]));
            out[0] = d[0].fma(four, d[2].fma(five, d[4]));
            (out[1], out[2]) = (a.add(b), minus(a, b));
            (out[3], out[4]) = (e.fma(V::splat(2.0), c), e.fma(V::splat(-2.0), c));
            out[5] = d[1].fma(four, d[3].fma(five, d[5]));
        } else {
            let (half, less) = (V::splat(0.5), V::splat(-2.5));
            let (a, b) = (d[4].fma(V::splat(-4.25), d[2].add(d[6])), d[3].fma(V::splat(-4.25), d[1].add(d[5])));
            let c = d[4].fma(V::splat(-1.25), d[2].fma(V::splat(0.25), d[6]));
            let e = d[3].fma(less, d[1].fma(half, d[5].add(d[5])));
            let f = d[4].fma(V::splat(-5.0), d[2].fma(V::splat(4.0), d[6]));
            let g = d[3].fma(less, d[5].fma(half, d[1].add(d[1])));
            out[0] = minus(d[4], d[2]).fma(V::splat(5.25), minus(d[0], d[6]));
            (out[1], out[2]) = (a.add(b), minus(a, b));
            (out[3], out[4]) = (c.add(e), minus(c, e));
            (out[5], out[6]) = (f.add(g), minus(f, g));
            out[7] = minus(d[3], d[5]).fma(V::splat(5.25), minus(d[7], d[1]));
        }
    }
    out
}

/// `A^T m`.
///
/// # Safety
///
/// The processor has the instruction set of `V`.
#[inline(always)]
unsafe fn backwards<V: Vector, const TILE: usize, const SEEN: usize>(m: [V; SEEN]) -> [V; TILE] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut out = [V::splat(0.0); TILE];
        let (a, b) = (m[1].add(m[2]), minus(m[1], m[2]));
        let (c, d) = (m[3].add(m[4]), minus(m[3], m[4]));
        if TILE == 4 {
            out[0] = m[0].add(a).add(c);
            out[1] = d.fma(V::splat(2.0), b);
            out[2] = c.fma(V::splat(4.0), a);
            out[3] = d.fma(V::splat(8.0), b).add(m[5]);
        } else {
            let (e, f) = (m[5].add(m[6]), minus(m[5], m[6]));
            out[0] = e.fma(V::splat(32.0), m[0].add(a).add(c));
            out[1] = f.fma(V::splat(16.0), d.fma(V::splat(2.0), b));
            out[2] = e.fma(V::splat(8.0), c.fma(V::splat(4.0), a));
            out[3] = f.fma(V::splat(4.0), d.fma(V::splat(8.0), b));
            out[4] = e.fma(V::splat(2.0), c.fma(V::splat(16.0), a));
            out[5] = d.fma(V::splat(32.0), m[7].add(b).add(f));
        }
        out
    }
}

/// Asks for part `part` of `parts` of so many pixels' `channels` values, `stride` values from one to the next.
///
/// # Safety
///
/// The processor has the instruction set of `V`; nothing is read.
#[inline(always)]
unsafe fn ask<V: Vector>(first: *const f32, (stride, channels): (usize, usize), pixels: usize, (part, parts): (usize, usize)) {
    for pixel in pixels * part / parts..pixels * (part + 1) / parts {
        for line in (0..channels).step_by(UNIT) {
            // SAFETY: the caller's promise.
            unsafe { V::prefetch_far(first.wrapping_add(pixel * stride + line)) };
        }
    }
}

/// The pixels that the tile sees whose output begins at `y`, `x`: `SEEN` rows of as many, zeros outside the image.
#[inline(always)]
fn neighbourhood<'a, const SEEN: usize>(image: Image<'a>, y: usize, x: usize, zeros: &'a [f32], edge: &'a mut [f32]) -> [&'a [f32]; SEEN] {
    let row = SEEN * image.channels;
    let zeros = &zeros[..row];
    let line = |k: usize| Some((y + k).wrapping_sub(1)).filter(|sy| *sy < image.height);
    if x > 0 && x + SEEN <= image.width + 1 {
        return std::array::from_fn(|k| line(k).map_or(zeros, |sy| &image.at(sy, x - 1)[..row]));
    }
    let (from, to) = (x.saturating_sub(1), (x + SEEN - 1).min(image.width));
    for (k, edge) in edge.chunks_exact_mut(row).take(SEEN).enumerate() {
        edge.fill(0.0);
        if let Some(sy) = line(k) {
            let inside = (to - from) * image.channels;
            edge[(from + 1 - x) * image.channels..][..inside].copy_from_slice(&image.at(sy, from)[..inside]);
        }
    }
    std::array::from_fn(|k| &edge[k * row..][..row])
}

/// Value `i` of each column.
#[inline(always)]
fn across<V: Vector, const N: usize, const SEEN: usize>(columns: &[[V; N]; SEEN], i: usize) -> [V; SEEN] {
    let mut row = [columns[0][i]; SEEN];
    unrolled!(J in 1 2 3 4 5 6 7 {
        if J < SEEN {
            row[J] = columns[J][i];
        }
    });
    row
}

/// `B^T d B` of a tile's neighbourhood, as tile `t` of the run. `CHANNELS` are `inputs`, or 0: where they are known, no address is
/// looked up.
///
/// # Safety
///
/// The processor has the instruction set of `V`.
#[inline(always)]
unsafe fn transform_input<V: Vector, const TILE: usize, const SEEN: usize, const CHANNELS: usize>(
    rows: [&[f32]; SEEN],
    inputs: usize,
    t: usize,
    out: &mut [f32],
) {
    // Pixels from what is loaded to what is asked for: maps of large images come from memory.
    let ahead = 2 * TILE;
    let inputs = if CHANNELS > 0 { CHANNELS } else { inputs };
    let plane = pitch(TILE, inputs);
    assert!(rows.iter().all(|r| r.len() >= SEEN * inputs), "conv3x3: input");
    assert!(inputs.is_multiple_of(V::LANES) && t < run_of(TILE) && out.len() >= SEEN * SEEN * plane, "conv3x3: scratch");
    let rows = rows.map(<[f32]>::as_ptr);
    for c in (0..inputs).step_by(V::LANES) {
        // The pixels of the tile after the next; one that is not there costs nothing.
        if c.is_multiple_of(UNIT) {
            for row in rows {
                for pixel in 2..SEEN {
                    // SAFETY: nothing is read.
                    unsafe { V::prefetch(row.wrapping_add((pixel + ahead) * inputs + c)) };
                }
            }
        }
        // SAFETY: `SEEN` pixels of `inputs` values, a multiple of the lanes, are in each row; the planes of tile `t` are
        // within `out` by the assertion.
        unsafe {
            let mut columns = [[V::splat(0.0); SEEN]; SEEN];
            // Numbers that the compiler knows: a loop that it does not unroll keeps the columns in memory.
            unrolled!(J in 0 1 2 3 4 5 6 7 {
                if J < SEEN {
                    let mut column = [V::splat(0.0); SEEN];
                    unrolled!(I in 0 1 2 3 4 5 6 7 {
                        if I < SEEN {
                            column[I] = V::load(rows[I].add(J * inputs + c));
                        }
                    });
                    columns[J] = forwards(column);
                }
            });
            let to = out.as_mut_ptr().add(t * inputs + c);
            unrolled!(I in 0 1 2 3 4 5 6 7 {
                if I < SEEN {
                    let row = forwards(across(&columns, I));
                    unrolled!(J in 0 1 2 3 4 5 6 7 {
                        if J < SEEN {
                            row[J].store(to.add((SEEN * I + J) * plane));
                        }
                    });
                }
            });
        }
    }
}

/// Where a tile's output goes.
#[derive(Clone, Copy)]
struct Place {
    /// Of the image's tiles.
    tile: usize,
    /// Of the run's.
    t: usize,
    /// Columns of the output.
    width: usize,
    /// The group's first channel.
    first: usize,
    /// The group's channels in `product`.
    channels: usize,
}

/// `A^T m A + bias` of one tile for the channels of a group, activated, pooled, and stored as far as it is inside. `CHANNELS` are
/// the group's, or 0, as in [`transform_input`].
///
/// # Safety
///
/// The processor has the instruction set of `V`.
#[inline(always)]
unsafe fn transform_output<V: Vector, const TILE: usize, const SEEN: usize, const CHANNELS: usize, const POOL: bool>(
    op: Op,
    Place { tile, t, width, first, channels }: Place,
    product: &[f32],
    out: &mut [f32],
) {
    let channels = if CHANNELS > 0 { CHANNELS } else { channels };
    let (outputs, plane) = (op.packed.outputs, pitch(TILE, channels));
    let side = if POOL { TILE / 2 } else { TILE };
    // What of the tile is inside, in pixels of the output.
    let rows = (out.len() / (width * outputs).max(1)).min(side);
    let x = side * tile;
    let inside = width.saturating_sub(x).min(side);
    assert!(t < run_of(TILE) && product.len() >= SEEN * SEEN * plane, "conv3x3: product");
    assert!(op.packed.bias.len() >= first + channels, "conv3x3: bias");
    if rows == 0 || inside == 0 {
        return;
    }
    // Up to the last pixel's last channel.
    let out = &mut out[x * outputs..][..((rows - 1) * width + inside) * outputs];
    for c in (0..channels).step_by(V::LANES) {
        let left = outputs.saturating_sub(first + c).min(V::LANES);
        if left == 0 {
            break;
        }
        // SAFETY: the planes of tile `t` are within `product` and the biases are there by the assertions; stores of whole
        // vectors are made where the output has so many channels left, others go through an array.
        unsafe {
            let bias = V::load(op.packed.bias.as_ptr().add(first + c));
            let mut columns = [[V::splat(0.0); TILE]; SEEN];
            let from = product.as_ptr().add(t * channels + c);
            unrolled!(J in 0 1 2 3 4 5 6 7 {
                if J < SEEN {
                    let mut column = [V::splat(0.0); SEEN];
                    unrolled!(I in 0 1 2 3 4 5 6 7 {
                        if I < SEEN {
                            column[I] = V::load(from.add((SEEN * I + J) * plane));
                        }
                    });
                    columns[J] = backwards(column);
                }
            });
            let whole = left == V::LANES && rows == side && inside == side;
            let to = out.as_mut_ptr().add(first + c);
            unrolled!(I in 0 1 2 3 4 5 {
                if I < side {
                    let mut line = [V::splat(0.0); TILE];
                    if POOL {
                        let top: [V; TILE] = backwards(across(&columns, 2 * I));
                        let bottom: [V; TILE] = backwards(across(&columns, 2 * I + 1));
                        // Bias and activation keep the order, so the largest is found first.
                        unrolled!(J in 0 1 2 {
                            if J < side {
                                let (l, r) = (top[2 * J].largest(bottom[2 * J]), top[2 * J + 1].largest(bottom[2 * J + 1]));
                                line[J] = activate(l.largest(r).add(bias), op.layer.activation);
                            }
                        });
                    } else {
                        line = backwards(across(&columns, I));
                        unrolled!(J in 0 1 2 3 4 5 {
                            if J < TILE {
                                line[J] = activate(line[J].add(bias), op.layer.activation);
                            }
                        });
                    }
                    if whole {
                        unrolled!(J in 0 1 2 3 4 5 {
                            if J < side {
                                line[J].store(to.add((I * width + J) * outputs));
                            }
                        });
                    } else if I < rows {
                        for (j, v) in line.into_iter().enumerate().take(inside) {
                            let to = &mut out[(I * width + j) * outputs + first + c..][..left];
                            if left == V::LANES {
                                v.store(to.as_mut_ptr());
                            } else {
                                let mut spilled = [0f32; 16];
                                v.store(spilled.as_mut_ptr());
                                to.copy_from_slice(&spilled[..left]);
                            }
                        }
                    }
                }
            });
        }
    }
}
