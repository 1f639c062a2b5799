//! 1x1 convolutions and the stem as matrix products over pixels, forward and backward, channels first: a map is C rows
//! of N * H * W values. Columns are worked on in blocks that stay in the second-level cache; what a neighbour layer's
//! batch norm and activation would make is made inside the block.

use super::gemm::{product, Shared, View};
use super::norm::{mask_and_sum, Before, GradSums, Moments, Norm, Source};
use super::real::Real;
use rayon::prelude::*;
use std::ops::Range;

/// Values of one operand's block.
const BLOCK: usize = 96 * 1024;
/// A weight's gradient is summed in this many parts, always the same ones: the sum does not depend on the threads.
const PARTS: usize = 8;

fn blocks(columns: usize, widest: usize) -> Vec<Range<usize>> {
    let step = (BLOCK / widest.max(1) / 32 * 32).clamp(64, 2048);
    (0..columns).step_by(step).map(|first| first..(first + step).min(columns)).collect()
}

/// Joins each block's numbers per channel, in order.
fn joined<S: Copy + Default>(all: &[Vec<S>], channels: usize, join: impl Fn(S, S) -> S) -> Vec<S> {
    (0..channels).map(|c| all.iter().fold(S::default(), |s, block| join(s, block[c]))).collect()
}

/// What a product reads: rows of a map, or patches of an image.
pub trait Columns<T>: Sync {
    /// Rows of the product's right side.
    fn rows(&self) -> usize;
    /// Columns `range` of all rows into `out`, row by row.
    fn fill(&self, range: Range<usize>, out: &mut [T]);
}

/// A map with `channels` rows of `columns` values.
pub struct Map<'a, T> {
    pub source: Source<'a, T>,
    pub channels: usize,
    pub columns: usize,
}

impl<T: Real> Columns<T> for Map<'_, T> {
    fn rows(&self) -> usize {
        self.channels
    }

    fn fill(&self, range: Range<usize>, out: &mut [T]) {
        for (c, out) in out.chunks_exact_mut(range.len()).enumerate() {
            self.source.read(c, self.columns, range.start, out);
        }
    }
}

/// `out = weight x`, with each output channel's moments. `weight`: O x I; `out`: O rows of `columns`.
pub fn forward<T: Real>(weight: &[T], x: &impl Columns<T>, columns: usize, out: &mut [T], moments: bool) -> Vec<Moments> {
    let inputs = x.rows();
    let outputs = weight.len() / inputs;
    assert_eq!(out.len(), outputs * columns);
    let shared = Shared::new(out, columns);
    let all: Vec<Vec<Moments>> = blocks(columns, inputs.max(outputs))
        .into_par_iter()
        .map_init(Vec::new, |buffer, range| {
            let n = range.len();
            buffer.resize(inputs * n, T::ZERO);
            x.fill(range.clone(), buffer);
            // SAFETY: blocks are disjoint ranges of columns, and `out` is borrowed until this function ends.
            unsafe { shared.product(outputs, n, inputs, range.start, View::rows(weight, inputs), View::rows(buffer, n)) };
            if !moments {
                return Vec::new();
            }
            // SAFETY: as above.
            (0..outputs).map(|o| Moments::of(unsafe { shared.row(o, range.start, n) })).collect()
        })
        .collect();
    if moments {
        joined(&all, outputs, Moments::join)
    } else {
        Vec::new()
    }
}

/// Where the gradient of a convolution's input goes.
pub enum Into<'a, T> {
    /// Nowhere: the input is an image.
    Nowhere,
    /// To a map that a batch norm and an activation made: masked, with the sums for that norm's own backward pass.
    Normed { grad: &'a mut [T], raw: &'a [T], norm: &'a Norm<T>, top: T },
    /// To a linear map; `add` is what reaches it another way (a residual).
    Plain { grad: &'a mut [T], add: Option<&'a [T]> },
}

/// Backward of [`forward`]: adds to `weight_grad`, fills `into`; sums per input channel where that is a normed map.
pub fn backward<T: Real>(
    weight: &[T],
    weight_grad: &mut [T],
    grad: &Before<T>,
    x: &impl Columns<T>,
    columns: usize,
    into: Into<T>,
) -> Vec<GradSums> {
    let inputs = x.rows();
    let outputs = weight.len() / inputs;
    enum Target<'a, T> {
        Nowhere,
        Normed(Shared<T>, &'a [T], &'a Norm<T>, T),
        Plain(Shared<T>, Option<&'a [T]>),
    }
    let target = match into {
        Into::Nowhere => Target::Nowhere,
        Into::Normed { grad, raw, norm, top } => {
            assert_eq!(grad.len(), inputs * columns);
            Target::Normed(Shared::new(grad, columns), raw, norm, top)
        }
        Into::Plain { grad, add } => {
            assert_eq!(grad.len(), inputs * columns);
            Target::Plain(Shared::new(grad, columns), add)
        }
    };
    let all = blocks(columns, inputs.max(outputs));
    let per_part = all.len().div_ceil(PARTS).max(1);
    let parts: Vec<(Vec<T>, Vec<GradSums>)> = all
        .par_chunks(per_part)
        .map(|blocks| {
            let mut weight_grad = vec![T::ZERO; weight.len()];
            let mut sums = vec![GradSums::default(); inputs];
            let (mut dy, mut read) = (Vec::new(), Vec::new());
            for range in blocks {
                let n = range.len();
                dy.resize(outputs * n, T::ZERO);
                read.resize(inputs * n, T::ZERO);
                for (o, row) in dy.chunks_exact_mut(n).enumerate() {
                    grad.read(o, columns, range.start, row);
                }
                x.fill(range.clone(), &mut read);
                product(outputs, inputs, n, &mut weight_grad, true, View::rows(&dy, n), View::rows(&read, n).transposed());
                let back = |shared: &Shared<T>| {
                    let transposed = View::rows(weight, inputs).transposed();
                    // SAFETY: blocks are disjoint ranges of columns, and the map is borrowed until this function ends.
                    unsafe { shared.product(inputs, n, outputs, range.start, transposed, View::rows(&dy, n)) };
                };
                match &target {
                    Target::Nowhere => {}
                    Target::Normed(shared, raw, norm, top) => {
                        back(shared);
                        for (c, sums) in sums.iter_mut().enumerate() {
                            // SAFETY: as above.
                            let row = unsafe { shared.row(c, range.start, n) };
                            *sums = sums.join(mask_and_sum(row, &raw[c * columns + range.start..][..n], norm, c, Some(*top)));
                        }
                    }
                    Target::Plain(shared, add) => {
                        back(shared);
                        if let Some(add) = add {
                            for c in 0..inputs {
                                // SAFETY: as above.
                                let row = unsafe { shared.row(c, range.start, n) };
                                for (g, a) in row.iter_mut().zip(&add[c * columns + range.start..][..n]) {
                                    *g += *a;
                                }
                            }
                        }
                    }
                }
            }
            (weight_grad, sums)
        })
        .collect();
    for (part, _) in &parts {
        for (g, p) in weight_grad.iter_mut().zip(part) {
            *g += *p;
        }
    }
    match target {
        Target::Normed(..) => joined(&parts.into_iter().map(|(_, s)| s).collect::<Vec<_>>(), inputs, GradSums::join),
        _ => Vec::new(),
    }
}

/// The 3x3 patches of an image of `channels` x N x H x W at stride 2: what turns the stem into a product.
pub struct Patches<'a, T> {
    pub image: &'a [T],
    pub channels: usize,
    pub images: usize,
    pub size: (usize, usize),
    pub out: (usize, usize),
    pub top: usize,
    pub left: usize,
}

impl<T: Real> Columns<T> for Patches<'_, T> {
    fn rows(&self) -> usize {
        self.channels * 9
    }

    fn fill(&self, range: Range<usize>, out: &mut [T]) {
        let ((h, w), (oh, ow)) = (self.size, self.out);
        let n = range.len();
        for (row, out) in out.chunks_exact_mut(n).enumerate() {
            let (c, ky, kx) = (row / 9, row % 9 / 3, row % 3);
            let mut at = range.start;
            while at < range.end {
                // The rest of one output row.
                let (image, y, x) = (at / (oh * ow), at / ow % oh, at % ow);
                let len = (ow - x).min(range.end - at);
                let out = &mut out[at - range.start..][..len];
                at += len;
                let Some(iy) = (2 * y + ky).checked_sub(self.top).filter(|iy| *iy < h) else {
                    out.fill(T::ZERO);
                    continue;
                };
                let source = &self.image[((c * self.images + image) * h + iy) * w..][..w];
                for (i, o) in out.iter_mut().enumerate() {
                    *o = match (2 * (x + i) + kx).checked_sub(self.left) {
                        Some(ix) if ix < w => source[ix],
                        _ => T::ZERO,
                    };
                }
            }
        }
    }
}
