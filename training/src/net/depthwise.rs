//! 3x3 depthwise convolution, forward and backward, channels first. A channel is one task; a plane is copied once into a
//! zero-padded buffer, normalised and activated on the way and split into even and odd columns at stride 2, so that all
//! inner loops run over contiguous memory without a border case.

use super::norm::{mask_and_sum, Before, GradSums, Moments, Source};
use super::pointwise::Into;
use super::real::{fma, kernel, Real};
use rayon::prelude::*;
use structvpr::model::kernels::Pad;

/// Geometry of one layer.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub images: usize,
    pub height: usize,
    pub width: usize,
    pub out_height: usize,
    pub out_width: usize,
    pub stride: usize,
    pub pad: Pad,
}

impl Shape {
    fn plane(&self) -> usize {
        self.height * self.width
    }

    fn out_plane(&self) -> usize {
        self.out_height * self.out_width
    }

    /// Padded rows that the kernel reaches.
    fn rows(&self) -> usize {
        (self.out_height - 1) * self.stride + 3
    }

    /// Length of one half row (stride 2) or whole row (stride 1).
    fn half(&self) -> usize {
        self.out_width + 2
    }

    fn row(&self) -> usize {
        self.half() * self.stride
    }

    /// Values of a padded plane.
    fn padded(&self) -> usize {
        self.rows() * self.row()
    }

    /// Padded row `y`'s own row, if it has one.
    fn inner(&self, y: usize) -> Option<usize> {
        y.checked_sub(self.pad.top).filter(|y| *y < self.height)
    }

    /// Spreads a tight plane into a padded buffer whose border is zero already.
    fn spread<T: Real>(&self, plane: &[T], padded: &mut [T]) {
        let (row, half, left, w) = (self.row(), self.half(), self.pad.left, self.width);
        for y in 0..self.rows() {
            let Some(inner) = self.inner(y) else { continue };
            let (source, out) = (&plane[inner * w..][..w], &mut padded[y * row..][..row]);
            if self.stride == 1 {
                out[left..left + w].copy_from_slice(source);
            } else {
                // Padded column c = 2 i + parity lies at half parity, position i.
                let (even, odd) = out.split_at_mut(half);
                for (i, s) in source.iter().enumerate() {
                    let c = i + left;
                    let at = c / 2;
                    if at < half {
                        if c % 2 == 0 {
                            even[at] = *s;
                        } else {
                            odd[at] = *s;
                        }
                    }
                }
            }
        }
    }

    /// The reverse of [`Shape::spread`]: the padding is dropped.
    fn gather<T: Real>(&self, padded: &[T], plane: &mut [T]) {
        let (row, half, left, w) = (self.row(), self.half(), self.pad.left, self.width);
        plane.fill(T::ZERO);
        for y in 0..self.rows() {
            let Some(inner) = self.inner(y) else { continue };
            let (source, out) = (&padded[y * row..][..row], &mut plane[inner * w..][..w]);
            if self.stride == 1 {
                out.copy_from_slice(&source[left..left + w]);
            } else {
                for (i, o) in out.iter_mut().enumerate() {
                    let c = i + left;
                    if c / 2 < half {
                        *o = source[c % 2 * half + c / 2];
                    }
                }
            }
        }
    }

    /// Where kernel column `kx` begins in a padded row.
    fn column(&self, kx: usize) -> usize {
        if self.stride == 1 {
            kx
        } else {
            kx % 2 * self.half() + kx / 2
        }
    }
}

kernel! {
    /// `out[x] = sum of rows[k][x] * kernel[k]`.
    fn correlate<T>(rows: [&[T]; 9], kernel: &[T; 9], out: &mut [T]) {
        let n = out.len();
        let [a, b, c, d, e, f, g, h, i] = rows.map(|r| &r[..n]);
        for x in 0..n {
            let mut s = a[x] * kernel[0];
            s = fma::<T, FUSED>(b[x], kernel[1], s);
            s = fma::<T, FUSED>(c[x], kernel[2], s);
            s = fma::<T, FUSED>(d[x], kernel[3], s);
            s = fma::<T, FUSED>(e[x], kernel[4], s);
            s = fma::<T, FUSED>(f[x], kernel[5], s);
            s = fma::<T, FUSED>(g[x], kernel[6], s);
            s = fma::<T, FUSED>(h[x], kernel[7], s);
            s = fma::<T, FUSED>(i[x], kernel[8], s);
            out[x] = s;
        }
    }
}

const LANES: usize = 16;

kernel! {
    /// `lanes[k] += sum of rows[k][x] * grad[x]`, in lanes.
    fn weigh<T>(rows: [&[T]; 9], grad: &[T], lanes: &mut [[T; LANES]; 9]) {
        let n = grad.len();
        let whole = n / LANES * LANES;
        for (k, lanes) in lanes.iter_mut().enumerate() {
            let row = &rows[k][..n];
            let mut sum = *lanes;
            for (r, g) in row[..whole].chunks_exact(LANES).zip(grad[..whole].chunks_exact(LANES)) {
                for ((s, r), g) in sum.iter_mut().zip(r).zip(g) {
                    *s = fma::<T, FUSED>(*r, *g, *s);
                }
            }
            for ((s, r), g) in sum.iter_mut().zip(&row[whole..]).zip(&grad[whole..]) {
                *s = fma::<T, FUSED>(*r, *g, *s);
            }
            *lanes = sum;
        }
    }
}

kernel! {
    /// `out[x] += grad[x] * weight`.
    fn scatter<T>(grad: &[T], weight: T, out: &mut [T]) {
        for (o, g) in out.iter_mut().zip(grad) {
            *o = fma::<T, FUSED>(*g, weight, *o);
        }
    }
}

/// The nine rows that output row `y` reads of a padded plane.
fn rows<'a, T: Real>(shape: &Shape, padded: &'a [T], y: usize) -> [&'a [T]; 9] {
    std::array::from_fn(|k| &padded[(y * shape.stride + k / 3) * shape.row() + shape.column(k % 3)..][..shape.out_width])
}

/// `out = depthwise(x, weight)` with each channel's moments. `weight`: C x 9.
pub fn forward<T: Real>(weight: &[T], x: Source<T>, shape: &Shape, out: &mut [T], moments: bool) -> Vec<Moments> {
    let (plane, out_plane) = (shape.plane(), shape.out_plane());
    out.par_chunks_mut(shape.images * out_plane)
        .enumerate()
        .map_init(
            || (vec![T::ZERO; plane], vec![T::ZERO; shape.padded()]),
            |(tight, padded), (c, out)| {
                let kernel: &[T; 9] = &std::array::from_fn(|k| weight[c * 9 + k]);
                let mut all = Moments::default();
                for (image, out) in out.chunks_exact_mut(out_plane).enumerate() {
                    x.read(c, shape.images * plane, image * plane, tight);
                    shape.spread(tight, padded);
                    for (y, out) in out.chunks_exact_mut(shape.out_width).enumerate() {
                        correlate(rows(shape, padded, y), kernel, out);
                    }
                    if moments {
                        all = all.join(Moments::of(out));
                    }
                }
                all
            },
        )
        .collect()
}

/// Backward of [`forward`]: adds to `weight_grad`, fills `into`; sums per channel where that is a normed map.
pub fn backward<T: Real>(
    weight: &[T],
    weight_grad: &mut [T],
    grad: &Before<T>,
    x: Source<T>,
    shape: &Shape,
    into: Into<T>,
) -> Vec<GradSums> {
    let (plane, out_plane) = (shape.plane(), shape.out_plane());
    let (target, normed, add) = match into {
        Into::Nowhere => (None, None, None),
        Into::Normed { grad, raw, norm, top } => (Some(grad), Some((raw, norm, top)), None),
        Into::Plain { grad, add } => (Some(grad), None, add),
    };
    let planes: Vec<Option<&mut [T]>> = match target {
        Some(grad) => grad.chunks_mut(shape.images * plane).map(Some).collect(),
        None => (0..weight.len() / 9).map(|_| None).collect(),
    };
    // The gradient of the input is the output's, correlated with the turned kernel over a plane with a border of its own.
    let buffers = || (vec![T::ZERO; plane], vec![T::ZERO; shape.padded()], vec![T::ZERO; out_plane], vec![T::ZERO; shape.padded()]);
    planes
        .into_par_iter()
        .zip(weight_grad.par_chunks_mut(9))
        .enumerate()
        .map_init(buffers, |(tight, padded, dy, back), (c, (mut into, weight_grad))| {
            let kernel: &[T; 9] = &std::array::from_fn(|k| weight[c * 9 + k]);
            let mut lanes = [[T::ZERO; LANES]; 9];
            let mut sums = GradSums::default();
            for image in 0..shape.images {
                grad.read(c, shape.images * out_plane, image * out_plane, dy);
                x.read(c, shape.images * plane, image * plane, tight);
                shape.spread(tight, padded);
                for (y, dy) in dy.chunks_exact(shape.out_width).enumerate() {
                    weigh(rows(shape, padded, y), dy, &mut lanes);
                }
                let Some(into) = into.as_mut() else { continue };
                back.fill(T::ZERO);
                for (y, dy) in dy.chunks_exact(shape.out_width).enumerate() {
                    for (k, w) in kernel.iter().enumerate() {
                        let first = (y * shape.stride + k / 3) * shape.row() + shape.column(k % 3);
                        scatter(dy, *w, &mut back[first..][..shape.out_width]);
                    }
                }
                let out = &mut into[image * plane..][..plane];
                shape.gather(back, out);
                let first = (c * shape.images + image) * plane;
                if let Some((raw, norm, top)) = normed {
                    sums = sums.join(mask_and_sum(out, &raw[first..][..plane], norm, c, Some(top)));
                } else if let Some(add) = add {
                    for (g, a) in out.iter_mut().zip(&add[first..][..plane]) {
                        *g += *a;
                    }
                }
            }
            for (g, lanes) in weight_grad.iter_mut().zip(lanes) {
                *g += lanes.iter().fold(T::ZERO, |s, v| s + *v);
            }
            sums
        })
        .collect()
}
