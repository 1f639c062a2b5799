//! 3x3 depthwise convolution, forward and backward, channels first. A channel is one task. Its planes are copied into a zero-padded
//! buffer, normalised and activated on the way: as many of them one below the other as stay in the cache, at stride 2 split into even
//! and odd rows and columns. There each of the nine weights meets one run of memory, from the first output to the last, without rows or
//! borders; what that computes between rows and planes is dropped, or is zero.

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

/// Values of a padded buffer, where planes are small: the backward pass's five buffers stay in the second-level cache.
const TOGETHER: usize = 8192;

impl Shape {
    fn plane(&self) -> usize {
        self.height * self.width
    }

    fn out_plane(&self) -> usize {
        self.out_height * self.out_width
    }

    /// Columns of a padded plane that lie one stride apart.
    fn row(&self) -> usize {
        self.out_width + 2 / self.stride
    }

    /// Rows of a padded plane that lie one stride apart.
    fn rows(&self) -> usize {
        self.out_height + 2 / self.stride
    }

    /// Values of a plane's phase: its rows and columns that lie one stride apart.
    fn part(&self) -> usize {
        self.rows() * self.row()
    }

    /// Number of phases.
    fn phases(&self) -> usize {
        self.stride * self.stride
    }

    /// Images that are worked on together.
    fn group(&self) -> usize {
        (TOGETHER / (self.phases() * self.part())).clamp(1, self.images.max(1))
    }

    /// Values of one phase of a group.
    fn phase(&self) -> usize {
        self.group() * self.part()
    }

    /// The phase that weight `k` reads, and how far behind the output's place.
    fn tap(&self, k: usize) -> (usize, usize) {
        let (y, x, s) = (k / 3, k % 3, self.stride);
        (y % s * s + x % s, y / s * self.row() + x / s)
    }

    /// What each weight reads of a padded group for the first `n` places of a run.
    fn taps<'a, T>(&self, padded: &'a [T], n: usize) -> [&'a [T]; 9] {
        std::array::from_fn(|k| {
            let (phase, behind) = self.tap(k);
            &padded[phase * self.phase() + behind..][..n]
        })
    }

    /// How far the last weight reaches behind the first.
    fn reach(&self) -> usize {
        2 / self.stride * (self.row() + 1)
    }

    /// Places from the first output of `images` to the last.
    fn run(&self, images: usize) -> usize {
        images * self.part() - self.reach()
    }

    /// Calls `f` for every row of every image with where it lies among tight planes, and where its outputs do in a run.
    fn outputs(&self, images: usize, mut f: impl FnMut(usize, usize)) {
        for image in 0..images {
            for y in 0..self.out_height {
                f((image * self.out_height + y) * self.out_width, (image * self.rows() + y) * self.row());
            }
        }
    }

    /// Calls `f` for every row of every image that an output reads with where it lies among tight planes, and where its row of a padded
    /// group begins, that of even columns at stride 2.
    fn inputs(&self, images: usize, mut f: impl FnMut(usize, usize)) {
        let s = self.stride;
        for image in 0..images {
            for y in 0..self.height {
                let (within, down) = ((y + self.pad.top) % s, (y + self.pad.top) / s);
                if down < self.rows() {
                    let at = within * s * self.phase() + (image * self.rows() + down) * self.row();
                    f((image * self.height + y) * self.width, at);
                }
            }
        }
    }

    /// Spreads tight planes into a padded group whose borders are zero already.
    fn spread<T: Real>(&self, planes: &[T], padded: &mut [T], images: usize) {
        let (row, left) = (self.row(), self.pad.left);
        self.inputs(images, |from, at| {
            let source = &planes[from..][..self.width];
            if self.stride == 1 {
                let out = &mut padded[at + left..at + row];
                let n = out.len().min(source.len());
                out[..n].copy_from_slice(&source[..n]);
            } else {
                let (even, odd) = padded[at..].split_at_mut(self.phase());
                let (even, odd) = (&mut even[..row], &mut odd[..row]);
                // Where the first, third, fifth value of the row goes, and where those between.
                let (a, b) = if left % 2 == 0 { (even, odd) } else { (odd, even) };
                let (a, b) = (&mut a[left / 2..], &mut b[left.div_ceil(2)..]);
                for ((a, b), pair) in a.iter_mut().zip(b.iter_mut()).zip(source.chunks_exact(2)) {
                    (*a, *b) = (pair[0], pair[1]);
                }
                let pairs = b.len().min(source.len() / 2);
                if let (Some(a), Some(v)) = (a.get_mut(pairs), source.get(2 * pairs)) {
                    *a = *v;
                }
            }
        });
    }

    /// The reverse of [`Shape::spread`]: the padding is dropped, and what no output read is zero.
    fn gather<T: Real>(&self, padded: &[T], planes: &mut [T], images: usize) {
        let (row, left) = (self.row(), self.pad.left);
        let last = |size: usize, before: usize| (size - 1 + before) / self.stride;
        if last(self.height, self.pad.top) >= self.rows() || last(self.width, left) >= row {
            planes.fill(T::ZERO);
        }
        self.inputs(images, |to, at| {
            let out = &mut planes[to..][..self.width];
            if self.stride == 1 {
                let source = &padded[at + left..at + row];
                let n = out.len().min(source.len());
                out[..n].copy_from_slice(&source[..n]);
            } else {
                let (even, odd) = (&padded[at..][..row], &padded[at + self.phase()..][..row]);
                let (a, b) = if left % 2 == 0 { (even, odd) } else { (odd, even) };
                let (a, b) = (&a[left / 2..], &b[left.div_ceil(2)..]);
                for ((pair, a), b) in out.chunks_exact_mut(2).zip(a).zip(b) {
                    (pair[0], pair[1]) = (*a, *b);
                }
                let pairs = b.len().min(out.len() / 2);
                if let (Some(v), Some(o)) = (a.get(pairs), out.get_mut(2 * pairs)) {
                    *o = *v;
                }
            }
        });
    }
}

macro_rules! correlate {
    ($name:ident, $n:literal: $($k:literal)*) => {
        kernel! {
            /// `out[x] = sum of rows[k][x] * weights[k]`, in their order.
            fn $name<T>(rows: [&[T]; $n], weights: [T; $n], out: &mut [T]) {
                let n = out.len();
                let rows = rows.map(|r| &r[..n]);
                for x in 0..n {
                    let s = rows[0][x] * weights[0];
                    $(let s = fma::<T, FUSED>(rows[$k][x], weights[$k], s);)*
                    out[x] = s;
                }
                let _ = FUSED;
            }
        }
    };
}
correlate!(correlate9, 9: 1 2 3 4 5 6 7 8);
correlate!(correlate4, 4: 1 2 3);
correlate!(correlate2, 2: 1);
correlate!(correlate1, 1:);

/// Lanes that a weight's gradient is summed in; runs are as many times as long, rounded up.
const LANES: usize = 32;

kernel! {
    /// `lanes[x % LANES] += row[x] * grad[x]`, of as many whole times `LANES` as there are. Nothing else is in here, so that the lanes
    /// stay in registers.
    fn weigh<T>(row: &[T], grad: &[T], lanes: &mut [T; LANES]) {
        let mut sums = [T::ZERO; LANES];
        for (row, grad) in row.chunks_exact(LANES).zip(grad.chunks_exact(LANES)) {
            for ((sum, v), g) in sums.iter_mut().zip(row).zip(grad) {
                *sum = fma::<T, FUSED>(*v, *g, *sum);
            }
        }
        for (lane, sum) in lanes.iter_mut().zip(sums) {
            *lane += sum;
        }
    }
}

/// `out = depthwise(x, weight)` with each channel's moments. `weight`: C x 9.
pub fn forward<T: Real>(weight: &[T], x: Source<T>, shape: &Shape, out: &mut [T], moments: bool) -> Vec<Moments> {
    let (plane, out_plane, group) = (shape.plane(), shape.out_plane(), shape.group());
    let buffers = || (vec![T::ZERO; group * plane], vec![T::ZERO; shape.phases() * shape.phase()], vec![T::ZERO; shape.run(group)]);
    out.par_chunks_mut(shape.images * out_plane)
        .zip(weight.par_chunks(9))
        .enumerate()
        .map_init(buffers, |(tight, padded, wide), (c, (out, kernel))| {
            let mut all = Moments::default();
            for (at, out) in out.chunks_mut(group * out_plane).enumerate() {
                let images = out.len() / out_plane;
                let tight = &mut tight[..images * plane];
                x.read(c, shape.images * plane, at * group * plane, tight);
                shape.spread(tight, padded, images);
                let wide = &mut wide[..shape.run(images)];
                correlate9(shape.taps(padded, wide.len()), std::array::from_fn(|k| kernel[k]), wide);
                shape.outputs(images, |to, from| out[to..][..shape.out_width].copy_from_slice(&wide[from..][..shape.out_width]));
                if moments {
                    all = out.chunks_exact(out_plane).fold(all, |all, plane| all.join(Moments::of(plane)));
                }
            }
            all
        })
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
    let (plane, out_plane, group, phase, reach) = (shape.plane(), shape.out_plane(), shape.group(), shape.phase(), shape.reach());
    let (target, normed, add) = match into {
        Into::Nowhere => (None, None, None),
        Into::Normed { grad, raw, norm, top } => (Some(grad), Some((raw, norm, top)), None),
        Into::Plain { grad, add } => (Some(grad), None, add),
    };
    let planes: Vec<Option<&mut [T]>> = match target {
        Some(grad) => grad.chunks_mut(shape.images * plane).map(Some).collect(),
        None => (0..weight.len() / 9).map(|_| None).collect(),
    };
    struct Buffers<T> {
        tight: Vec<T>,
        padded: Vec<T>,
        dy: Vec<T>,
        /// The outputs' gradient as a run, zero between rows, behind as many zeros as the weights reach.
        run: Vec<T>,
        back: Vec<T>,
    }
    let buffers = || Buffers {
        tight: vec![T::ZERO; group * plane],
        padded: vec![T::ZERO; shape.phases() * phase + LANES],
        dy: vec![T::ZERO; group * out_plane],
        run: vec![T::ZERO; reach + phase + LANES],
        back: vec![T::ZERO; shape.phases() * phase],
    };
    planes
        .into_par_iter()
        .zip(weight_grad.par_chunks_mut(9))
        .enumerate()
        .map_init(buffers, |Buffers { tight, padded, dy, run, back }, (c, (mut into, weight_grad))| {
            let kernel = &weight[c * 9..][..9];
            let mut total = [0f64; 9];
            let mut sums = GradSums::default();
            for first in (0..shape.images).step_by(group) {
                let images = group.min(shape.images - first);
                let (tight, dy) = (&mut tight[..images * plane], &mut dy[..images * out_plane]);
                grad.read(c, shape.images * out_plane, first * out_plane, dy);
                shape.outputs(images, |from, to| run[reach + to..][..shape.out_width].copy_from_slice(&dy[from..][..shape.out_width]));
                x.read(c, shape.images * plane, first * plane, tight);
                shape.spread(tight, padded, images);
                // Behind the last output of a group that is not whole there is another's.
                let n = shape.run(images);
                let whole = n.next_multiple_of(LANES);
                run[reach + n..reach + whole].fill(T::ZERO);
                for (row, total) in shape.taps(padded, whole).into_iter().zip(&mut total) {
                    let mut lanes = [T::ZERO; LANES];
                    weigh(row, &run[reach..][..whole], &mut lanes);
                    *total += lanes.iter().map(|v| v.wide()).sum::<f64>();
                }
                let Some(into) = into.as_mut() else { continue };
                // What a weight read from a place for an output comes back to it from there.
                let n = images * shape.part();
                let rows: [&[T]; 9] = std::array::from_fn(|k| &run[reach - shape.tap(k).1..][..n]);
                for (at, back) in back.chunks_exact_mut(phase).enumerate() {
                    let back = &mut back[..n];
                    fn of<U: Copy, const N: usize>(all: &[U], which: [usize; N]) -> [U; N] {
                        which.map(|k| all[k])
                    }
                    match (shape.stride, at) {
                        (1, _) => correlate9(rows, of(kernel, [0, 1, 2, 3, 4, 5, 6, 7, 8]), back),
                        (_, 0) => correlate4(of(&rows, [0, 2, 6, 8]), of(kernel, [0, 2, 6, 8]), back),
                        (_, 1) => correlate2(of(&rows, [1, 7]), of(kernel, [1, 7]), back),
                        (_, 2) => correlate2(of(&rows, [3, 5]), of(kernel, [3, 5]), back),
                        _ => correlate1([rows[4]], [kernel[4]], back),
                    }
                }
                let out = &mut into[first * plane..][..images * plane];
                shape.gather(back, out, images);
                let first = (c * shape.images + first) * plane;
                if let Some((raw, norm, top)) = normed {
                    sums = sums.join(mask_and_sum(out, &raw[first..][..out.len()], norm, c, Some(top)));
                } else if let Some(add) = add {
                    for (g, a) in out.iter_mut().zip(&add[first..]) {
                        *g += *a;
                    }
                }
            }
            weight_grad.iter_mut().zip(total).for_each(|(g, t)| *g += T::of(t));
            sums
        })
        .collect()
}
