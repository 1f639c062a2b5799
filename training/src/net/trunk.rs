//! The trunks of both branches as one engine: inverted residuals with batch norm in training mode, forward and backward.
//!
//! Maps are channels first over the whole batch (C x N x H x W), so that a 1x1 convolution of the batch is one matrix
//! product and a channel's batch norm one run of memory. All weights are one flat vector, and so is their gradient; the
//! running statistics are another.

use super::depthwise::{self, Shape};
use super::norm::{affine, mask_and_sum, Before, GradSums, Moments, Norm, Source, MOMENTUM};
use super::pointwise::{self, Map, Patches};
use super::real::Real;
use rayon::prelude::*;
use std::ops::Range;
use structvpr::model::kernels::Pad;
use structvpr::model::Padding;

/// Which network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arch {
    /// The rgb branch [paper]: MobileNetV2 1.0 to its 320-channel stage, taps of 32, 96 and 320 channels [inferred].
    MobileNetV2,
    /// The seg branch [paper]: the depth stream of MobileSal, taps of 64, 96 and 320 channels [inferred].
    MobileNetL,
}

/// Expansion, output channels, blocks, stride of the first.
type Stage = (usize, usize, usize, usize);
/// MobileNetV2 paper, table 2, without the last 1x1 convolution.
const V2: [Stage; 7] = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)];
/// MobileSal's depth stream [paper].
const L: [Stage; 5] = [(1, 16, 2, 2), (4, 32, 2, 2), (4, 64, 2, 2), (4, 96, 2, 2), (4, 320, 2, 2)];
/// Channels of MobileNetV2's stem.
const STEM: usize = 32;

/// A convolution and its batch norm: where its numbers lie.
#[derive(Clone, Debug)]
pub struct Conv {
    pub name: String,
    pub inputs: usize,
    pub outputs: usize,
    pub stride: usize,
    /// In the flat weights.
    pub weight: Range<usize>,
    pub gamma: Range<usize>,
    pub beta: Range<usize>,
    /// In the running statistics; the variances follow the means.
    pub mean: Range<usize>,
}

impl Conv {
    fn variance(&self) -> Range<usize> {
        self.mean.end..self.mean.end + self.outputs
    }
}

/// An inverted residual.
#[derive(Clone, Debug)]
pub struct Block {
    pub expand: Option<Conv>,
    pub depthwise: Conv,
    pub project: Conv,
    pub residual: bool,
    pub tap: bool,
}

/// A network's shape; its numbers are the caller's.
#[derive(Clone, Debug)]
pub struct Trunk {
    pub arch: Arch,
    /// Channels of the image.
    pub channels: usize,
    pub padding: Padding,
    pub stem: Option<Conv>,
    pub blocks: Vec<Block>,
    /// Length of the flat weights.
    pub weights: usize,
    /// Length of the running statistics.
    pub statistics: usize,
    /// Where activations saturate.
    top: f64,
}

/// Channels, height and width of a tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tap {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
}

/// What batch norms do in a forward pass.
pub enum Mode<'a, T> {
    /// The batch's statistics; the running ones move towards them.
    Train(&'a mut [T]),
    /// The running statistics.
    Eval(&'a [T]),
    /// Sets scale and shift to what makes this batch come out as if each convolution had no norm but the bias in its
    /// `beta`: turns weights with folded batch norms into weights with batch norms, to be trained. [ours]
    Unfold { weights: &'a mut [T], statistics: &'a mut [T] },
}

/// One layer's output before its norm.
struct Layer<T> {
    raw: Vec<T>,
    norm: Norm<T>,
    height: usize,
    width: usize,
}

struct Pass<T> {
    expand: Option<Layer<T>>,
    depthwise: Layer<T>,
    project: Layer<T>,
    out: Vec<T>,
}

/// What the backward pass needs of a forward pass.
pub struct Saved<T> {
    image: Vec<T>,
    images: usize,
    size: (usize, usize),
    stem: Option<Layer<T>>,
    passes: Vec<Pass<T>>,
}

/// Buffers that go from step to step: fresh pages for each map would cost as much as the arithmetic.
#[derive(Default)]
pub struct Pool<T> {
    free: Vec<Vec<T>>,
}

impl<T: Real> Pool<T> {
    /// A vector of `n` values of any content: the smallest that has room and is not far too large, so that batches of many
    /// sizes share their buffers.
    fn take(&mut self, n: usize) -> Vec<T> {
        let fits = |v: &Vec<T>| (n..=SPARE * n.max(1)).contains(&v.capacity());
        let best = (0..self.free.len()).filter(|i| fits(&self.free[*i])).min_by_key(|i| self.free[*i].capacity());
        match best {
            Some(at) => {
                let mut v = self.free.swap_remove(at);
                v.resize(n, T::ZERO);
                v
            }
            None => vec![T::ZERO; n],
        }
    }

    /// Values that the free buffers have room for.
    pub fn room(&self) -> usize {
        self.free.iter().map(Vec::capacity).sum()
    }

    fn give(&mut self, v: Vec<T>) {
        if !v.is_empty() {
            self.free.push(v);
        }
    }

    /// Takes back what a step kept.
    pub fn recycle(&mut self, saved: Saved<T>) {
        self.give(saved.image);
        saved.stem.into_iter().for_each(|l| self.give(l.raw));
        for pass in saved.passes {
            pass.expand.into_iter().for_each(|l| self.give(l.raw));
            [pass.depthwise.raw, pass.project.raw, pass.out].into_iter().for_each(|v| self.give(v));
        }
    }
}

/// How much larger than asked for a buffer may be.
const SPARE: usize = 8;

struct Maker {
    weights: usize,
    statistics: usize,
}

impl Maker {
    fn conv(&mut self, name: String, inputs: usize, outputs: usize, per_output: usize, stride: usize) -> Conv {
        let mut take = |n: usize| {
            self.weights += n;
            self.weights - n..self.weights
        };
        let (weight, gamma, beta) = (take(outputs * per_output), take(outputs), take(outputs));
        self.statistics += 2 * outputs;
        let first = self.statistics - 2 * outputs;
        Conv { name, inputs, outputs, stride, weight, gamma, beta, mean: first..first + outputs }
    }
}

impl Trunk {
    /// The network for images of `channels` channels.
    ///
    /// MobileSal's stream has biases before its batch norms; they change nothing that the norm does not take away again,
    /// so there are none here. [ours]
    pub fn new(arch: Arch, channels: usize, padding: Padding) -> Self {
        let (stages, taps, top): (&[Stage], [usize; 3], f64) = match arch {
            Arch::MobileNetV2 => (&V2, [6, 13, 17], 6.0),
            Arch::MobileNetL => (&L, [6, 8, 10], f64::INFINITY),
        };
        let mut maker = Maker { weights: 0, statistics: 0 };
        let stem = (arch == Arch::MobileNetV2).then(|| maker.conv("stem".into(), channels, STEM, 9 * channels, 2));
        let mut input = if stem.is_some() { STEM } else { channels };
        let mut blocks = Vec::new();
        for (t, c, n, s) in stages.iter().copied() {
            for i in 0..n {
                let (number, stride, hidden) = (blocks.len() + 1, if i == 0 { s } else { 1 }, input * t);
                let name = |part: &str| format!("blocks.{number}.{part}");
                let expand = (t != 1).then(|| maker.conv(name("expand"), input, hidden, input, 1));
                let depthwise = maker.conv(name("depthwise"), hidden, hidden, 9, stride);
                let project = maker.conv(name("project"), hidden, c, hidden, 1);
                let residual = stride == 1 && input == c;
                blocks.push(Block { expand, depthwise, project, residual, tap: taps.contains(&number) });
                input = c;
            }
        }
        Self { arch, channels, padding, stem, blocks, weights: maker.weights, statistics: maker.statistics, top }
    }

    /// All convolutions in network order.
    pub fn convs(&self) -> impl Iterator<Item = &Conv> {
        self.stem.iter().chain(self.blocks.iter().flat_map(|b| b.expand.iter().chain([&b.depthwise, &b.project])))
    }

    /// Channels of the taps.
    pub fn tap_channels(&self) -> Vec<usize> {
        self.blocks.iter().filter(|b| b.tap).map(|b| b.project.outputs).collect()
    }

    /// Dimensions of the descriptor: the taps' channels joined.
    pub fn dim(&self) -> usize {
        self.tap_channels().iter().sum()
    }

    /// Where activations saturate.
    pub(super) fn top(&self) -> f64 {
        self.top
    }

    /// Values of the largest map that an image of this height and width makes.
    pub(super) fn largest(&self, size: (usize, usize)) -> usize {
        let mut at = size;
        let mut most = self.channels * at.0 * at.1;
        if let Some(conv) = &self.stem {
            at = self.reduced(at, 2);
            // Its patches, too.
            most = most.max(conv.outputs.max(9 * self.channels) * at.0 * at.1);
        }
        for block in &self.blocks {
            most = most.max(block.depthwise.inputs * at.0 * at.1);
            at = self.reduced(at, block.depthwise.stride);
        }
        most
    }

    pub(super) fn pad(&self, height: usize, width: usize, stride: usize) -> Pad {
        match self.padding {
            Padding::Symmetric => Pad::ONE,
            Padding::Same => Pad::same(height, width, stride),
        }
    }

    /// Height and width after a 3x3 at `stride`.
    pub(super) fn reduced(&self, (h, w): (usize, usize), stride: usize) -> (usize, usize) {
        // Neither padding lets a plane of one pixel or more vanish.
        self.pad(h, w, stride).output(h, w, stride).unwrap_or((1, 1))
    }

    /// Shapes of the taps of an image of this height and width.
    pub fn taps(&self, size: (usize, usize)) -> Vec<Tap> {
        let mut size = if self.stem.is_some() { self.reduced(size, 2) } else { size };
        let mut taps = Vec::new();
        for block in &self.blocks {
            size = self.reduced(size, block.depthwise.stride);
            if block.tap {
                taps.push(Tap { channels: block.project.outputs, height: size.0, width: size.1 });
            }
        }
        taps
    }

    /// The network on `image`, C x N x H x W: its taps, each C x N x H' x W', one behind the other; and what
    /// [`Trunk::backward`] wants.
    ///
    /// Panics: lengths that do not fit (a caller's error).
    pub fn forward<T: Real>(
        &self,
        weights: &[T],
        mut mode: Mode<T>,
        image: &[T],
        images: usize,
        size: (usize, usize),
        pool: &mut Pool<T>,
    ) -> (Vec<T>, Saved<T>) {
        assert_eq!((weights.len(), image.len()), (self.weights, self.channels * images * size.0 * size.1));
        let top = T::of(self.top);
        let train = !matches!(mode, Mode::Eval(_));
        // All that is given back to the pool was taken from it.
        let mut kept = pool.take(image.len());
        kept.copy_from_slice(image);
        let mut saved = Saved { image: kept, images, size, stem: None, passes: Vec::new() };
        let mut at = size;
        if let Some(conv) = &self.stem {
            let pad = self.pad(at.0, at.1, 2);
            let out = self.reduced(at, 2);
            let columns = images * out.0 * out.1;
            let patches = Patches { image: &saved.image, channels: self.channels, images, size: at, out, top: pad.top, left: pad.left };
            let mut raw = pool.take(conv.outputs * columns);
            let moments = pointwise::forward(&weights[conv.weight.clone()], &patches, columns, &mut raw, train);
            saved.stem = Some(Layer { raw, norm: norm(conv, weights, &moments, &mut mode), height: out.0, width: out.1 });
            at = out;
        }
        let mut taps = Vec::with_capacity(self.taps(size).iter().map(|t| t.channels * images * t.height * t.width).sum());
        for block in &self.blocks {
            let input = self.input(&saved, top);
            let inputs = block.expand.as_ref().map_or(block.depthwise.inputs, |c| c.inputs);
            let columns = images * at.0 * at.1;
            let expand = block.expand.as_ref().map(|conv| {
                let mut raw = pool.take(conv.outputs * columns);
                let map = Map { source: input, channels: inputs, columns };
                let moments = pointwise::forward(&weights[conv.weight.clone()], &map, columns, &mut raw, train);
                Layer { raw, norm: norm(conv, weights, &moments, &mut mode), height: at.0, width: at.1 }
            });
            let conv = &block.depthwise;
            let shape = self.shape(images, at, conv.stride);
            let source = expand.as_ref().map_or(input, |l| Source::Normed { raw: &l.raw, norm: &l.norm, top });
            let (out, out_columns) = ((shape.out_height, shape.out_width), images * shape.out_height * shape.out_width);
            let mut raw = pool.take(conv.outputs * out_columns);
            let moments = depthwise::forward(&weights[conv.weight.clone()], source, &shape, &mut raw, train);
            let depthwise = Layer { raw, norm: norm(conv, weights, &moments, &mut mode), height: out.0, width: out.1 };

            let conv = &block.project;
            let source = Source::Normed { raw: &depthwise.raw, norm: &depthwise.norm, top };
            let mut raw = pool.take(conv.outputs * out_columns);
            let map = Map { source, channels: conv.inputs, columns: out_columns };
            let moments = pointwise::forward(&weights[conv.weight.clone()], &map, out_columns, &mut raw, train);
            let project = Layer { raw, norm: norm(conv, weights, &moments, &mut mode), height: out.0, width: out.1 };

            let mut sum = pool.take(conv.outputs * out_columns);
            sum.par_chunks_mut(out_columns).enumerate().for_each(|(c, sum)| {
                let range = c * out_columns..(c + 1) * out_columns;
                let add = block.residual.then(|| &input.raw()[range.clone()]);
                affine(&project.raw[range.clone()], project.norm.scale[c], project.norm.shift[c], add, sum);
            });
            if block.tap {
                taps.extend_from_slice(&sum);
            }
            let mut pass = Pass { expand, depthwise, project, out: sum };
            if !train {
                // Nothing of an evaluation is read again but a block's output.
                if let Some(l) = &mut pass.expand {
                    pool.give(std::mem::take(&mut l.raw));
                }
                pool.give(std::mem::take(&mut pass.depthwise.raw));
                pool.give(std::mem::take(&mut pass.project.raw));
            }
            saved.passes.push(pass);
            at = out;
        }
        (taps, saved)
    }

    fn shape(&self, images: usize, (height, width): (usize, usize), stride: usize) -> Shape {
        let (out_height, out_width) = self.reduced((height, width), stride);
        Shape { images, height, width, out_height, out_width, stride, pad: self.pad(height, width, stride) }
    }

    /// What the next block reads.
    fn input<'a, T: Real>(&self, saved: &'a Saved<T>, top: T) -> Source<'a, T> {
        match (saved.passes.last(), &saved.stem) {
            (Some(pass), _) => Source::Plain(&pass.out),
            (None, Some(stem)) => Source::Normed { raw: &stem.raw, norm: &stem.norm, top },
            (None, None) => Source::Plain(&saved.image),
        }
    }

    /// The gradient of the flat weights, from that of the taps (laid out as [`Trunk::forward`] gives them).
    ///
    /// After a forward pass in `Mode::Train` only. Gradients pass through the batch's statistics.
    pub fn backward<T: Real>(&self, weights: &[T], saved: &Saved<T>, tap_grad: &[T], pool: &mut Pool<T>) -> Vec<T> {
        let mut grad = vec![T::ZERO; self.weights];
        let top = T::of(self.top);
        let images = saved.images;
        let mut rest = tap_grad.len();
        let mut dout: Vec<T> = Vec::new();
        let mut stem_grad: Option<(Vec<T>, Vec<GradSums>)> = None;
        for (b, block) in self.blocks.iter().enumerate().rev() {
            let pass = &saved.passes[b];
            let columns = images * pass.project.height * pass.project.width;
            if block.tap {
                let n = pass.out.len();
                let own = &tap_grad[rest - n..rest];
                rest -= n;
                if dout.is_empty() {
                    dout = pool.take(n);
                    dout.copy_from_slice(own);
                } else {
                    dout.par_iter_mut().zip(own).for_each(|(d, o)| *d += *o);
                }
            } else if dout.is_empty() {
                // Behind the last tap: nothing reaches it.
                continue;
            }
            // The linear bottleneck's norm.
            let sums: Vec<GradSums> = dout
                .par_chunks_mut(columns)
                .enumerate()
                .map(|(c, d)| mask_and_sum(d, &pass.project.raw[c * columns..][..columns], &pass.project.norm, c, None))
                .collect();
            norm_grad(&block.project, &sums, &mut grad);
            let before = Before::new(&dout, &pass.project.raw, &pass.project.norm, &sums, columns);
            let mut hidden = pool.take(pass.depthwise.raw.len());
            let source = Source::Normed { raw: &pass.depthwise.raw, norm: &pass.depthwise.norm, top };
            let sums = pointwise::backward(
                &weights[block.project.weight.clone()],
                &mut grad[block.project.weight.clone()],
                &before,
                &Map { source, channels: block.project.inputs, columns },
                columns,
                pointwise::Into::Normed { grad: &mut hidden, raw: &pass.depthwise.raw, norm: &pass.depthwise.norm, top },
            );
            norm_grad(&block.depthwise, &sums, &mut grad);
            let before = Before::new(&hidden, &pass.depthwise.raw, &pass.depthwise.norm, &sums, columns);

            let input = match (b.checked_sub(1), &saved.stem) {
                (Some(p), _) => Source::Plain(&saved.passes[p].out[..]),
                (None, Some(stem)) => Source::Normed { raw: &stem.raw[..], norm: &stem.norm, top },
                (None, None) => Source::Plain(&saved.image[..]),
            };
            let at = match (&pass.expand, b.checked_sub(1), &saved.stem) {
                (Some(l), ..) => (l.height, l.width),
                (None, Some(p), _) => (saved.passes[p].project.height, saved.passes[p].project.width),
                (None, None, Some(stem)) => (stem.height, stem.width),
                (None, None, None) => saved.size,
            };
            let shape = self.shape(images, at, block.depthwise.stride);
            let in_columns = images * at.0 * at.1;
            let conv = &block.depthwise;
            let add = block.residual.then_some(&dout[..]);
            let last = b == 0;
            let mut into = if last && saved.stem.is_none() { Vec::new() } else { pool.take(input.raw().len()) };
            let mut into_sums = Vec::new();
            match (&block.expand, &pass.expand) {
                (Some(expand), Some(layer)) => {
                    let mut expanded = pool.take(layer.raw.len());
                    let source = Source::Normed { raw: &layer.raw, norm: &layer.norm, top };
                    let target = pointwise::Into::Normed { grad: &mut expanded, raw: &layer.raw, norm: &layer.norm, top };
                    let w = conv.weight.clone();
                    let sums = depthwise::backward(&weights[w.clone()], &mut grad[w], &before, source, &shape, target);
                    norm_grad(expand, &sums, &mut grad);
                    let before = Before::new(&expanded, &layer.raw, &layer.norm, &sums, in_columns);
                    let w = expand.weight.clone();
                    let map = Map { source: input, channels: expand.inputs, columns: in_columns };
                    let target = match input {
                        Source::Plain(_) if last => pointwise::Into::Nowhere,
                        Source::Plain(_) => pointwise::Into::Plain { grad: &mut into, add },
                        Source::Normed { raw, norm, top } => pointwise::Into::Normed { grad: &mut into, raw, norm, top },
                    };
                    into_sums = pointwise::backward(&weights[w.clone()], &mut grad[w], &before, &map, in_columns, target);
                    pool.give(expanded);
                }
                _ => {
                    let w = conv.weight.clone();
                    let target = match input {
                        Source::Plain(_) if last => pointwise::Into::Nowhere,
                        Source::Plain(_) => pointwise::Into::Plain { grad: &mut into, add },
                        Source::Normed { raw, norm, top } => pointwise::Into::Normed { grad: &mut into, raw, norm, top },
                    };
                    let sums = depthwise::backward(&weights[w.clone()], &mut grad[w], &before, input, &shape, target);
                    if matches!(input, Source::Normed { .. }) {
                        into_sums = sums;
                    }
                }
            }
            pool.give(hidden);
            pool.give(std::mem::replace(&mut dout, into));
            if last && saved.stem.is_some() {
                stem_grad = Some((std::mem::take(&mut dout), into_sums));
            }
        }
        if let (Some(conv), Some(layer), Some((d, sums))) = (&self.stem, &saved.stem, stem_grad) {
            norm_grad(conv, &sums, &mut grad);
            let out = (layer.height, layer.width);
            let columns = images * out.0 * out.1;
            let before = Before::new(&d, &layer.raw, &layer.norm, &sums, columns);
            let pad = self.pad(saved.size.0, saved.size.1, 2);
            let patches =
                Patches { image: &saved.image, channels: self.channels, images, size: saved.size, out, top: pad.top, left: pad.left };
            let w = conv.weight.clone();
            pointwise::backward(&weights[w.clone()], &mut grad[w], &before, &patches, columns, pointwise::Into::Nowhere);
            pool.give(d);
        }
        grad
    }
}

/// The gradients of scale and shift.
fn norm_grad<T: Real>(conv: &Conv, sums: &[GradSums], grad: &mut [T]) {
    for (c, s) in sums.iter().enumerate() {
        grad[conv.gamma.start + c] += T::of(s.grad_x);
        grad[conv.beta.start + c] += T::of(s.grad);
    }
}

fn norm<T: Real>(conv: &Conv, weights: &[T], moments: &[Moments], mode: &mut Mode<T>) -> Norm<T> {
    let batch = || moments.iter().map(|m| (m.mean, m.variance()));
    match mode {
        Mode::Eval(s) => {
            let running = s[conv.mean.clone()].iter().zip(&s[conv.variance()]).map(|(m, v)| (m.wide(), v.wide()));
            Norm::new(running, &weights[conv.gamma.clone()], &weights[conv.beta.clone()])
        }
        Mode::Train(s) => {
            for (c, m) in moments.iter().enumerate() {
                // As PyTorch: the running variance is the unbiased one.
                let unbiased = m.m2 / (m.count - 1.0).max(1.0);
                for (at, new) in [(conv.mean.start + c, m.mean), (conv.variance().start + c, unbiased)] {
                    s[at] = T::of(s[at].wide() * (1.0 - MOMENTUM) + new * MOMENTUM);
                }
            }
            Norm::new(batch(), &weights[conv.gamma.clone()], &weights[conv.beta.clone()])
        }
        Mode::Unfold { weights: w, statistics } => {
            for (c, m) in moments.iter().enumerate() {
                let gamma = (m.variance() + super::norm::EPS).sqrt();
                w[conv.gamma.start + c] = T::of(gamma);
                let beta = &mut w[conv.beta.start + c];
                *beta = T::of(beta.wide() + m.mean);
                statistics[conv.mean.start + c] = T::of(m.mean);
                statistics[conv.variance().start + c] = T::of(m.variance());
            }
            Norm::new(batch(), &w[conv.gamma.clone()], &w[conv.beta.clone()])
        }
    }
}
