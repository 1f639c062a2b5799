//! 3x3 convolution at stride 1 and padding 1 with bias, ReLU and 2x2 maximum, NCHW, by Winograd's F(4x4, 3x3)
//! (Lavin and Gray, CVPR 2016): a quarter of the multiplications of the definition. Inference only.
//!
//! A task takes a few rows of 4x4 tiles. Their 6x6 neighbourhoods are transformed to 36 planes, in each of which the
//! convolution is a matrix product over channels; the products of eight output channels at a time are transformed
//! back while they are in the cache.

use super::{contiguous, dispatch, fma, Activation, Isa};
use crate::error::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Tiles per vector.
const LANES: usize = 16;
/// Output channels of one micro-kernel.
const BLOCK: usize = 8;
/// Transformed values of a tile.
const PLANES: usize = 36;
/// Tiles of a task at most: their transformed input stays in the second-level cache.
const TILES: usize = 96;

/// Weights, transformed once.
#[derive(Clone, Debug)]
pub struct Conv3x3 {
    packed: Arc<Packed>,
}

#[derive(Debug)]
struct Packed {
    /// Block of output channels, plane, input channel, output channel of the block.
    weights: Vec<f32>,
    bias: Vec<f32>,
    inputs: usize,
    outputs: usize,
}

impl Conv3x3 {
    /// From `weight`, O x I x 3 x 3, and `bias`, O.
    ///
    /// Errors: other shapes.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let (outputs, inputs, h, w) = weight.dims4()?;
        let (flat, bias) = (weight.flatten_all()?.to_vec1::<f32>()?, bias.flatten_all()?.to_vec1::<f32>()?);
        if (h, w) != (3, 3) || bias.len() != outputs || inputs == 0 || outputs == 0 {
            return Err(Error::weights(format!("a 3x3 convolution of weights {:?} and {} biases", weight.dims(), bias.len())));
        }
        let mut weights = vec![0f32; outputs.div_ceil(BLOCK) * PLANES * inputs * BLOCK];
        for (at, kernel) in flat.chunks_exact(9).enumerate() {
            let (o, i) = (at / inputs, at % inputs);
            for (plane, value) in transform_kernel(kernel).into_iter().enumerate() {
                weights[((o / BLOCK * PLANES + plane) * inputs + i) * BLOCK + o % BLOCK] = value;
            }
        }
        Ok(Self { packed: Arc::new(Packed { weights, bias, inputs, outputs }) })
    }

    /// `activation(conv(x) + bias)`, and of that the largest of each 2x2 with `pool` (an odd last row or column is
    /// dropped, as in PyTorch).
    ///
    /// `x`: N x I x H x W contiguous f32. Returns N x O x H x W, halved with `pool`.
    pub fn forward(&self, x: &Tensor, activation: Activation, pool: bool) -> Result<Tensor> {
        self.forward_on(x, activation, pool, Isa::detect())
    }

    fn forward_on(&self, x: &Tensor, activation: Activation, pool: bool, isa: Isa) -> Result<Tensor> {
        Ok(x.contiguous()?.apply_op1_no_bwd(&Op { packed: self.packed.clone(), activation, pool, isa })?)
    }
}

struct Op {
    packed: Arc<Packed>,
    activation: Activation,
    pool: bool,
    isa: Isa,
}

impl CustomOp1 for Op {
    fn name(&self) -> &'static str {
        "conv3x3"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (n, inputs, height, width) = layout.shape().dims4()?;
        if inputs != self.packed.inputs {
            candle_core::bail!("conv3x3: {inputs} input channels, the weights have {}", self.packed.inputs);
        }
        let x = contiguous(self.name(), storage, layout)?;
        let scale = if self.pool { 2 } else { 1 };
        let (h, w) = (height / scale, width / scale);
        let mut out = vec![0f32; n * self.packed.outputs * h * w];
        if !out.is_empty() {
            for (x, out) in x.chunks_exact(inputs * height * width).zip(out.chunks_exact_mut(self.packed.outputs * h * w)) {
                self.image(Planes { x, height, width }, out);
            }
        }
        Ok((CpuStorage::F32(out), Shape::from((n, self.packed.outputs, h, w))))
    }
}

/// One image, channel by channel.
#[derive(Clone, Copy)]
struct Planes<'a> {
    x: &'a [f32],
    height: usize,
    width: usize,
}

/// A rectangle of tiles.
#[derive(Clone, Copy)]
struct Tiles {
    /// First row and column, in tiles.
    row: usize,
    column: usize,
    rows: usize,
    columns: usize,
}

impl Tiles {
    fn count(&self) -> usize {
        self.rows * self.columns
    }
}

/// What a thread needs beside its input and output.
#[derive(Default)]
struct Scratch {
    /// Plane, input channel, tile.
    input: Vec<f32>,
    /// Plane, output channel of the block, tile.
    product: Vec<f32>,
    /// Six rows of the image with their border, and those after the transform along columns.
    rows: Vec<f32>,
    mixed: Vec<f32>,
    /// Four rows of output for all tiles of the task, one after the other.
    output: Vec<f32>,
}

impl Op {
    fn image(&self, image: Planes, out: &mut [f32]) {
        let (tile_rows, tile_columns) = (image.height.div_ceil(4), image.width.div_ceil(4));
        let rows = rows_per_task(tile_rows, tile_columns);
        let scale = if self.pool { 2 } else { 1 };
        let (h, w) = (image.height / scale, image.width / scale);
        // Each task owns the same rows of every output channel.
        let mut tasks: Vec<Vec<&mut [f32]>> = (0..tile_rows.div_ceil(rows)).map(|_| Vec::with_capacity(self.packed.outputs)).collect();
        for plane in out.chunks_exact_mut(h * w) {
            for (task, part) in tasks.iter_mut().zip(plane.chunks_mut(4 / scale * rows * w)) {
                task.push(part);
            }
        }
        tasks.into_par_iter().enumerate().for_each_init(Scratch::default, |scratch, (task, mut out)| {
            // The last task has no output where pooling dropped its only row.
            if out.len() < self.packed.outputs {
                return;
            }
            let row = task * rows;
            let rows = rows.min(tile_rows - row);
            let step = if rows > 1 { tile_columns } else { TILES - LANES };
            for column in (0..tile_columns).step_by(step) {
                let tiles = Tiles { row, column, rows, columns: step.min(tile_columns - column) };
                self.tiles(image, tiles, scratch, &mut out);
            }
        });
    }

    fn tiles(&self, image: Planes, tiles: Tiles, scratch: &mut Scratch, out: &mut [&mut [f32]]) {
        let (isa, packed) = (self.isa, &*self.packed);
        let padded = tiles.count().div_ceil(LANES) * LANES;
        scratch.input.resize(PLANES * packed.inputs * padded, 0.0);
        scratch.product.resize(PLANES * BLOCK * padded, 0.0);
        scratch.output.resize(4 * 4 * padded, 0.0);
        let inputs = packed.inputs;
        dispatch!(isa, transform_input(image: Planes, tiles: Tiles, inputs: usize, scratch: &mut Scratch));
        let per_plane = packed.inputs * BLOCK;
        for (block, weights) in packed.weights.chunks_exact(PLANES * per_plane).enumerate() {
            for (plane, weights) in weights.chunks_exact(per_plane).enumerate() {
                let input = &scratch.input[plane * packed.inputs * padded..][..packed.inputs * padded];
                let product = &mut scratch.product[plane * BLOCK * padded..][..BLOCK * padded];
                matrix_product(isa, weights, input, product, padded);
            }
            for k in 0..BLOCK.min(packed.outputs - block * BLOCK) {
                let channel = block * BLOCK + k;
                let (product, bias, activation) = (&scratch.product[k * padded..], packed.bias[channel], self.activation);
                let output = &mut scratch.output[..];
                dispatch!(isa, transform_output(product: &[f32], padded: usize, bias: f32, activation: Activation, output: &mut [f32]));
                if self.pool {
                    store_pooled(&scratch.output, padded, tiles, image.width / 2, out[channel]);
                } else {
                    store(&scratch.output, padded, tiles, image.width, out[channel]);
                }
            }
        }
    }
}

/// Rows of tiles per task, so that few lanes stay empty.
fn rows_per_task(tile_rows: usize, tile_columns: usize) -> usize {
    let waste = |rows: usize| {
        let tiles = rows * tile_columns;
        (tiles.div_ceil(LANES) * LANES) as f64 / tiles as f64
    };
    let fits = (1..=tile_rows).take_while(|rows| *rows == 1 || rows * tile_columns <= TILES);
    // The fewest of equals: more tasks to share.
    fits.reduce(|best, rows| if waste(rows) < waste(best) - 1e-9 { rows } else { best }).unwrap_or(1)
}

/// `G g G^T` for the interpolation points 0, 1, -1, 2, -2 and infinity.
fn transform_kernel(kernel: &[f32]) -> [f32; PLANES] {
    const G: [[f64; 3]; 6] = [
        [1.0 / 4.0, 0.0, 0.0],
        [-1.0 / 6.0, -1.0 / 6.0, -1.0 / 6.0],
        [-1.0 / 6.0, 1.0 / 6.0, -1.0 / 6.0],
        [1.0 / 24.0, 1.0 / 12.0, 1.0 / 6.0],
        [1.0 / 24.0, -1.0 / 12.0, 1.0 / 6.0],
        [0.0, 0.0, 1.0],
    ];
    std::array::from_fn(|plane| {
        let (row, column) = (G[plane / 6], G[plane % 6]);
        let terms = (0..9).map(|i| row[i / 3] * column[i % 3] * f64::from(kernel[i]));
        terms.sum::<f64>() as f32
    })
}

/// `B^T d` along one axis.
#[inline(always)]
fn input_transform<const FUSED: bool>(d: [f32; 6]) -> [f32; 6] {
    let [a, b, c, d, e, f] = d;
    let (p, q, r, s) = (fma::<FUSED>(-4.0, c, e), fma::<FUSED>(-4.0, b, d), e - c, 2.0 * (d - b));
    [fma::<FUSED>(4.0, a, fma::<FUSED>(-5.0, c, e)), p + q, p - q, r + s, r - s, fma::<FUSED>(4.0, b, fma::<FUSED>(-5.0, d, f))]
}

/// `A^T m` along one axis.
#[inline(always)]
fn output_transform<const FUSED: bool>(m: [f32; 6]) -> [f32; 4] {
    let [a, b, c, d, e, f] = m;
    let (p, q, r, s) = (b + c, b - c, d + e, d - e);
    [a + p + r, fma::<FUSED>(2.0, s, q), fma::<FUSED>(4.0, r, p), fma::<FUSED>(8.0, s, q) + f]
}

/// Six equal parts.
#[inline(always)]
fn six(all: &[f32], each: usize) -> [&[f32]; 6] {
    let mut parts = all.chunks_exact(each);
    std::array::from_fn(|_| parts.next().unwrap_or(&[]))
}

/// `B^T d B` of every tile and input channel.
#[inline(always)]
fn transform_input<const FUSED: bool>(image: Planes, tiles: Tiles, inputs: usize, scratch: &mut Scratch) {
    let padded = tiles.count().div_ceil(LANES) * LANES;
    let wide = 4 * tiles.columns + 2;
    scratch.rows.resize(6 * wide, 0.0);
    scratch.mixed.resize(6 * wide, 0.0);
    for channel in 0..inputs {
        let plane = &image.x[channel * image.height * image.width..][..image.height * image.width];
        for row in 0..tiles.rows {
            for (k, out) in scratch.rows.chunks_exact_mut(wide).enumerate() {
                // One row and one column of zeros lie around the image.
                let y = (4 * (tiles.row + row) + k).checked_sub(1).filter(|y| *y < image.height);
                let Some(y) = y else {
                    out.fill(0.0);
                    continue;
                };
                let first = 4 * tiles.column;
                let lead = usize::from(first == 0);
                let from = first + lead - 1;
                let n = (wide - lead).min(image.width.saturating_sub(from));
                out[..lead].fill(0.0);
                out[lead..lead + n].copy_from_slice(&plane[y * image.width + from..][..n]);
                out[lead + n..].fill(0.0);
            }
            let [a, b, c, d, e, f] = six(&scratch.rows, wide);
            for x in 0..wide {
                let mixed = input_transform::<FUSED>([a[x], b[x], c[x], d[x], e[x], f[x]]);
                for (k, v) in mixed.into_iter().enumerate() {
                    scratch.mixed[k * wide + x] = v;
                }
            }
            for (k, mixed) in scratch.mixed.chunks_exact(wide).enumerate() {
                let mut at = 0;
                while at < tiles.columns {
                    let n = LANES.min(tiles.columns - at);
                    let mut out = [[0f32; LANES]; 6];
                    if let (true, Ok(d)) = (n == LANES, <&[f32; 4 * LANES + 2]>::try_from(&mixed[4 * at..][..(4 * n + 2)])) {
                        for l in 0..LANES {
                            let d = [d[4 * l], d[4 * l + 1], d[4 * l + 2], d[4 * l + 3], d[4 * l + 4], d[4 * l + 5]];
                            let values = input_transform::<FUSED>(d);
                            for j in 0..6 {
                                out[j][l] = values[j];
                            }
                        }
                    } else {
                        for l in 0..n {
                            let d = &mixed[4 * (at + l)..][..6];
                            let values = input_transform::<FUSED>([d[0], d[1], d[2], d[3], d[4], d[5]]);
                            for j in 0..6 {
                                out[j][l] = values[j];
                            }
                        }
                    }
                    for (j, values) in out.iter().enumerate() {
                        let to = &mut scratch.input[((6 * k + j) * inputs + channel) * padded + row * tiles.columns + at..];
                        match to.first_chunk_mut::<LANES>() {
                            Some(to) if n == LANES => *to = *values,
                            _ => to[..n].copy_from_slice(&values[..n]),
                        }
                    }
                    at += n;
                }
            }
        }
    }
}

/// `A^T m A + bias` of every tile for one output channel, as four rows that run through all tiles.
#[inline(always)]
fn transform_output<const FUSED: bool>(product: &[f32], padded: usize, bias: f32, activation: Activation, output: &mut [f32]) {
    for at in (0..padded).step_by(LANES) {
        let mut columns = [[[0f32; LANES]; 6]; 4];
        for c in 0..6 {
            let m: [&[f32]; 6] = std::array::from_fn(|r| &product[(6 * r + c) * BLOCK * padded + at..][..LANES]);
            for l in 0..LANES {
                let values = output_transform::<FUSED>([m[0][l], m[1][l], m[2][l], m[3][l], m[4][l], m[5][l]]);
                for y in 0..4 {
                    columns[y][c][l] = values[y];
                }
            }
        }
        for (y, m) in columns.iter().enumerate() {
            let out = &mut output[4 * (y * padded + at)..][..4 * LANES];
            for l in 0..LANES {
                let values = output_transform::<FUSED>([m[0][l], m[1][l], m[2][l], m[3][l], m[4][l], m[5][l]]);
                for j in 0..4 {
                    out[4 * l + j] = activation.apply(values[j] + bias);
                }
            }
        }
    }
}

/// Copies the four rows of each row of tiles to one output channel's rows of this task.
fn store(rows: &[f32], padded: usize, tiles: Tiles, width: usize, out: &mut [f32]) {
    let first = 4 * tiles.column;
    let n = (4 * tiles.columns).min(width - first);
    for (y, out) in out.chunks_exact_mut(width).take(4 * tiles.rows).enumerate() {
        out[first..first + n].copy_from_slice(&rows[4 * (y % 4 * padded + y / 4 * tiles.columns)..][..n]);
    }
}

/// As [`store`], the largest of each 2x2.
fn store_pooled(rows: &[f32], padded: usize, tiles: Tiles, width: usize, out: &mut [f32]) {
    let first = 2 * tiles.column;
    let n = (2 * tiles.columns).min(width.saturating_sub(first));
    for (y, out) in out.chunks_exact_mut(width.max(1)).take(2 * tiles.rows).enumerate() {
        let row = |k: usize| &rows[4 * ((2 * y + k) % 4 * padded + y / 2 * tiles.columns)..][..2 * n];
        for ((out, a), b) in out[first..first + n].iter_mut().zip(row(0).chunks_exact(2)).zip(row(1).chunks_exact(2)) {
            // NaN stays, so that a broken input is seen downstream.
            *out = [a[1], b[0], b[1]].into_iter().fold(a[0], |m, v| if v > m || v.is_nan() { v } else { m });
        }
    }
}

/// `product = weights^T input`: `weights` is input channel x [`BLOCK`], `input` is input channel x `padded`,
/// `product` is [`BLOCK`] x `padded`.
fn matrix_product(isa: Isa, weights: &[f32], input: &[f32], product: &mut [f32], padded: usize) {
    let mut at = 0;
    while at < padded {
        let left = (padded - at) / LANES;
        // Three vectors by eight channels fill the registers; 2 + 2 beats 3 + 1.
        let vectors = if left == 4 { 2 } else { left.min(3) };
        let (input, product) = (&input[at..], &mut product[at..]);
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                // SAFETY: `Isa::detect` found the features on this processor.
                unsafe {
                    match vectors {
                        3 => x86::avx512::<3>(weights, input, product, padded),
                        2 => x86::avx512::<2>(weights, input, product, padded),
                        _ => x86::avx512::<1>(weights, input, product, padded),
                    }
                }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                for half in 0..2 * vectors {
                    let (input, product) = (&input[half * LANES / 2..], &mut product[half * LANES / 2..]);
                    // SAFETY: as above.
                    unsafe { x86::avx2(weights, input, product, padded) }
                }
            }
            _ => portable(weights, input, product, padded, vectors),
        }
        at += vectors * LANES;
    }
}

/// The same in a form that every compiler vectorises.
fn portable(weights: &[f32], input: &[f32], product: &mut [f32], padded: usize, vectors: usize) {
    for k in 0..BLOCK {
        for v in 0..vectors {
            let mut sum = [0f32; LANES];
            for (w, x) in weights.chunks_exact(BLOCK).zip(input.chunks(padded)) {
                for (s, x) in sum.iter_mut().zip(&x[v * LANES..][..LANES]) {
                    *s = fma::<{ cfg!(target_arch = "aarch64") }>(w[k], *x, *s);
                }
            }
            product[k * padded + v * LANES..][..LANES].copy_from_slice(&sum);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{BLOCK, LANES};
    use std::arch::x86_64::*;

    /// `VECTORS` vectors of 16 tiles by [`BLOCK`] channels.
    #[target_feature(enable = "avx512f")]
    pub fn avx512<const VECTORS: usize>(weights: &[f32], input: &[f32], product: &mut [f32], padded: usize) {
        let inputs = weights.len() / BLOCK;
        assert!(
            inputs > 0 && input.len() >= (inputs - 1) * padded + VECTORS * LANES && product.len() >= (BLOCK - 1) * padded + VECTORS * LANES
        );
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; BLOCK];
        for i in 0..inputs {
            // SAFETY: the assertion above keeps `i * padded + VECTORS * LANES` within `input`, and `weights` holds
            // `inputs * BLOCK` values.
            unsafe {
                let row = input.as_ptr().add(i * padded);
                let x: [__m512; VECTORS] = std::array::from_fn(|v| _mm512_loadu_ps(row.add(v * LANES)));
                for (k, sums) in sums.iter_mut().enumerate() {
                    let w = _mm512_set1_ps(*weights.as_ptr().add(i * BLOCK + k));
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum = _mm512_fmadd_ps(w, x, *sum);
                    }
                }
            }
        }
        for (k, sums) in sums.into_iter().enumerate() {
            for (v, sum) in sums.into_iter().enumerate() {
                // SAFETY: the assertion above.
                unsafe { _mm512_storeu_ps(product.as_mut_ptr().add(k * padded + v * LANES), sum) };
            }
        }
    }

    /// One vector of 8 tiles by [`BLOCK`] channels: half of the registers are left for the weights.
    #[target_feature(enable = "avx2,fma")]
    pub fn avx2(weights: &[f32], input: &[f32], product: &mut [f32], padded: usize) {
        let inputs = weights.len() / BLOCK;
        assert!(inputs > 0 && input.len() >= (inputs - 1) * padded + LANES / 2 && product.len() >= (BLOCK - 1) * padded + LANES / 2);
        let mut sums = [_mm256_setzero_ps(); BLOCK];
        for i in 0..inputs {
            // SAFETY: the assertion above keeps `i * padded + LANES / 2` within `input`, and `weights` holds
            // `inputs * BLOCK` values.
            unsafe {
                let x = _mm256_loadu_ps(input.as_ptr().add(i * padded));
                for (k, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm256_fmadd_ps(_mm256_set1_ps(*weights.as_ptr().add(i * BLOCK + k)), x, *sum);
                }
            }
        }
        for (k, sum) in sums.into_iter().enumerate() {
            // SAFETY: the assertion above.
            unsafe { _mm256_storeu_ps(product.as_mut_ptr().add(k * padded), sum) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use proptest::prelude::*;

    fn noise(seed: u64, shape: &[usize]) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::from_vec((0..n as u64).map(|i| crate::test_noise(seed, i)).collect::<Vec<f32>>(), shape, &Device::Cpu).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Equal to Candle's own convolution, on every instruction set, at every size.
        #[test]
        fn equals_the_definition(seed in 0u64..1000, n in 1usize..3, i in 1usize..20, o in 1usize..20, h in 1usize..40, w in 1usize..150, pool: bool) {
            let (x, k, b) = (noise(seed, &[n, i, h, w]), noise(seed + 1, &[o, i, 3, 3]), noise(seed + 2, &[o]));
            let mut want = x.conv2d(&k, 1, 1, 1, 1).unwrap().broadcast_add(&b.reshape((1, o, 1, 1)).unwrap()).unwrap().relu().unwrap();
            if pool && h > 1 && w > 1 {
                want = want.max_pool2d(2).unwrap();
            }
            let conv = Conv3x3::new(&k, &b).unwrap();
            for isa in Isa::available() {
                let got = conv.forward_on(&x, Activation::Relu, pool, isa).unwrap();
                if pool && (h == 1 || w == 1) {
                    prop_assert_eq!(got.elem_count(), 0);
                    continue;
                }
                prop_assert_eq!(got.dims(), want.dims());
                let worst = (got - &want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                prop_assert!(worst < 1e-4 * (i as f32).sqrt(), "{isa:?}: {worst}");
            }
        }
    }

    #[test]
    fn a_wide_image_and_nan_are_kept() {
        let (x, k, b) = (noise(1, &[1, 2, 9, 700]), noise(2, &[3, 2, 3, 3]), noise(3, &[3]));
        let want = x.conv2d(&k, 1, 1, 1, 1).unwrap().broadcast_add(&b.reshape((1, 3, 1, 1)).unwrap()).unwrap();
        let got = Conv3x3::new(&k, &b).unwrap().forward(&x, Activation::None, false).unwrap();
        assert!((got - want).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-4);
        let bad = Tensor::full(f32::NAN, (1, 2, 8, 8), &Device::Cpu).unwrap();
        let out = Conv3x3::new(&k, &b).unwrap().forward(&bad, Activation::Relu, true).unwrap();
        assert!(out.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| v.is_nan()));
        let e = Conv3x3::new(&k, &noise(1, &[2])).unwrap_err().to_string();
        assert!(e.contains("[3, 2, 3, 3]") && e.contains("2 biases"), "{e}");
        assert!(Conv3x3::new(&k, &b).unwrap().forward(&noise(1, &[1, 5, 8, 8]), Activation::None, false).is_err());
    }
}
