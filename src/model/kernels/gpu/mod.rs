//! MobileNetV2 on a GPU: which kernel when, over which memory. What a GPU is stands behind [`Machine`]: CUDA is one
//! (`cuda.rs`), the processor that runs the same kernels as loops another, for tests where there is no GPU.
//!
//! Channels lie side by side. 8-bit pixels go up, 448 numbers an image come down; between them one stream, without a wait.
//! Products leave f32. An expanded map is written by the product as it is, and gets its bias and ReLU6 while the depthwise convolution
//! reads it. Memory is laid out once for a batch and a size.

#[cfg(feature = "cuda")]
pub mod cuda;

#[cfg(feature = "cuda")]
pub(crate) use cuda::{Cuda, KERNELS};

use super::{Pad, PlanBlock};
use crate::error::{Error, Result};
use crate::model::device::Cost;
use crate::model::{Pooling, DIM};
use half::f16;
use std::sync::{Mutex, PoisonError};

/// The kernels' text.
pub(super) const SOURCE: &str = include_str!("mobilenet.cu");
/// Images of a batch, at most: offsets within a tensor of a batch stay far below 2^31.
pub const MAX_BATCH: usize = 64;
/// Parts of a tap that are summed on their own.
const STRIPS: usize = 32;
/// Pixels side by side of one item of the depthwise kernel; `R` there.
const RUN: usize = 4;
const STEM_CHANNELS: usize = 32;

/// What a kernel is called with: `Args` of mobilenet.cu, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Args {
    input: u64,
    weight: u64,
    bias: u64,
    before: u64,
    output: u64,
    wide: u64,
    height: i32,
    width: i32,
    channels: i32,
    out_height: i32,
    out_width: i32,
    stride: i32,
    top: i32,
    left: i32,
    strips: i32,
    at: i32,
    row: i32,
    scale: [f32; 3],
    shift: [f32; 3],
    power: f32,
}

/// `y = x w^T`: `pixels` x `inputs` by `outputs` x `inputs`, row-major, addresses on the machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    /// `x` and `w` are f16; `y` is f32.
    half: bool,
    pixels: usize,
    inputs: usize,
    outputs: usize,
    x: u64,
    w: u64,
    y: u64,
}

/// A GPU, or what stands for one. Everything is done in the order of the calls.
pub(crate) trait Machine {
    /// Address of `bytes` of memory of its own, 256-aligned; freed with the machine, or by [`Self::free`].
    fn reserve(&mut self, bytes: usize) -> Result<u64>;
    /// Gives back what [`Self::reserve`] gave.
    fn free(&mut self, address: u64) -> Result<()>;
    /// Copies to the machine.
    fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<()>;
    /// The same of parts of one length, one behind the other, for what comes in one size again and again.
    fn upload_again(&mut self, to: u64, parts: &[&[u8]]) -> Result<()>;
    /// Runs a kernel of [`SOURCE`] over `items`.
    fn launch(&mut self, kernel: &'static str, half: bool, items: usize, args: &Args) -> Result<()>;
    /// A matrix product, summed in f32.
    fn product(&mut self, product: &Product) -> Result<()>;
    /// Does `work`, which launches and multiplies and no more. `same`: its calls are, one by one, those of the last time, so
    /// that a machine may have kept them.
    fn repeat(&mut self, same: bool, work: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()>;
    /// Waits for all that was asked for and copies back.
    fn download(&mut self, from: u64, values: &mut [f32]) -> Result<()>;
}

#[derive(Clone, Copy, Debug)]
struct Layer {
    weight: u64,
    bias: u64,
    inputs: usize,
    outputs: usize,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    /// Whether its products are f16's.
    half: bool,
    expand: Option<Layer>,
    depthwise: Layer,
    project: Layer,
    stride: usize,
    residual: bool,
    tap: bool,
}

/// Where a batch of one size lies.
#[derive(Clone, Copy, Debug, Default)]
struct Space {
    batch: usize,
    height: usize,
    width: usize,
    image: u64,
    /// Blocks' inputs and outputs, in turns, in f32: of what goes round blocks every rounding would stay.
    maps: [u64; 2],
    /// A block's input as products read it, where that is another type.
    narrow: u64,
    expanded: u64,
    filtered: u64,
    strips: u64,
    pooled: u64,
}

#[derive(Debug)]
struct State<M> {
    machine: M,
    space: Space,
    /// What the last run in this space did besides.
    last: Option<(Normalise, Pooling)>,
}

impl Block {
    /// Bytes of a number that its products read.
    fn element(&self) -> usize {
        if self.half {
            2
        } else {
            4
        }
    }
}

/// The network on one machine.
#[derive(Debug)]
pub(crate) struct GpuPlan<M> {
    half: bool,
    stem: Layer,
    blocks: Vec<Block>,
    pads: fn(usize, usize, usize) -> Pad,
    state: Mutex<State<M>>,
}

/// How an image becomes numbers: value = pixel * scale + shift, per channel.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Normalise {
    /// 1 / (255 std).
    pub scale: [f32; 3],
    /// -mean / std.
    pub shift: [f32; 3],
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

impl<M: Machine> GpuPlan<M> {
    /// Uploads the weights: those of matrix products in f16 with `half`, the others in f32. Arguments as `Plan::new`'s.
    ///
    /// The block behind the stem stays f32: there a sky or a night is one value over many pixels, whose rounding no mean takes away
    /// (with it in f16 the shipped model's descriptors were off four times as much). [ours]
    pub fn new(
        mut machine: M,
        half: bool,
        stem: (&[f32], &[f32]),
        blocks: &[PlanBlock],
        pads: fn(usize, usize, usize) -> Pad,
    ) -> Result<Self> {
        let mut put = |bytes: Vec<u8>| -> Result<u64> {
            let address = machine.reserve(bytes.len())?;
            machine.upload(address, &bytes)?;
            Ok(address)
        };
        // O x I to I x O: neighbouring channels lie side by side, as in the maps.
        let turned = |w: &[f32], outputs: usize| -> Vec<f32> {
            let inputs = w.len() / outputs;
            (0..inputs).flat_map(|i| (0..outputs).map(move |o| w[o * inputs + i])).collect()
        };
        let mut direct = |(w, b): (&[f32], &[f32])| -> Result<Layer> {
            let weight = put(bytes_of(&turned(w, b.len())))?;
            Ok(Layer { weight, bias: put(bytes_of(b))?, inputs: b.len(), outputs: b.len() })
        };
        let stem = direct(stem)?;
        let filters = blocks.iter().map(|b| direct(b.depthwise)).collect::<Result<Vec<_>>>()?;
        let mut product = |half: bool, (w, b): (&[f32], &[f32])| -> Result<Layer> {
            let bytes = if half { w.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect() } else { bytes_of(w) };
            Ok(Layer { weight: put(bytes)?, bias: put(bytes_of(b))?, inputs: w.len() / b.len(), outputs: b.len() })
        };
        let mut all = Vec::with_capacity(blocks.len());
        for (b, depthwise) in blocks.iter().zip(filters) {
            let half = half && b.expand.is_some();
            all.push(Block {
                half,
                expand: b.expand.map(|e| product(half, e)).transpose()?,
                depthwise,
                project: product(half, b.project)?,
                stride: b.stride,
                residual: b.residual,
                tap: b.tap,
            });
        }
        Ok(Self { half, stem, blocks: all, pads, state: Mutex::new(State { machine, space: Space::default(), last: None }) })
    }

    /// Output size and border of a 3x3 convolution.
    fn step(&self, height: usize, width: usize, stride: usize) -> Result<(usize, usize, Pad)> {
        let pad = (self.pads)(height, width, stride);
        let (h, w) =
            pad.output(height, width, stride).ok_or_else(|| Error::image(format!("{height}x{width} is too small for the network")))?;
        Ok((h, w, pad))
    }

    fn lay_out(&self, machine: &mut M, batch: usize, height: usize, width: usize) -> Result<Space> {
        let (mut h, mut w, _) = self.step(height, width, 2)?;
        let (mut map, mut expanded, mut filtered) = (h * w * STEM_CHANNELS, 0, 0);
        for b in &self.blocks {
            expanded = expanded.max(b.expand.map_or(0, |e| h * w * e.outputs));
            (h, w, _) = self.step(h, w, b.stride)?;
            filtered = filtered.max(h * w * b.depthwise.outputs * b.element());
            map = map.max(h * w * b.project.outputs);
        }
        let mut bytes = |bytes: usize| machine.reserve((batch * bytes).max(1));
        let (maps, narrow) = ([bytes(4 * map)?, bytes(4 * map)?], if self.half { bytes(2 * map)? } else { 0 });
        let (expanded, filtered) = (bytes(4 * expanded)?, bytes(filtered)?);
        Ok(Space {
            batch,
            height,
            width,
            image: machine.reserve(batch * height * width * 3)?,
            maps,
            narrow,
            expanded,
            filtered,
            strips: machine.reserve(batch * STRIPS * DIM * 4)?,
            pooled: machine.reserve(batch * DIM * 4)?,
        })
    }

    fn release(machine: &mut M, space: &mut Space) -> Result<()> {
        let s = std::mem::take(space);
        let all = [s.image, s.maps[0], s.maps[1], s.narrow, s.expanded, s.filtered, s.strips, s.pooled];
        all.into_iter().filter(|a| *a != 0).try_for_each(|a| machine.free(a))
    }

    /// The pooled taps of every image, 448 numbers each. `images`: RGB, `height` x `width` x 3 each.
    ///
    /// Deterministic. Errors: the machine's, a size that is too small, a batch above [`MAX_BATCH`], or none.
    pub fn pooled(&self, images: &[&[u8]], (height, width): (usize, usize), normalise: &Normalise, pooling: Pooling) -> Result<Vec<f32>> {
        let batch = images.len();
        if !(1..=MAX_BATCH).contains(&batch) {
            return Err(Error::image(format!("a batch of {batch} images; 1 to {MAX_BATCH} go at once")));
        }
        if let Some(odd) = images.iter().find(|i| i.len() != height * width * 3) {
            return Err(Error::image(format!("{} bytes are no image {width}x{height}", odd.len())));
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { machine, space, last } = &mut *state;
        if (space.batch, space.height, space.width) != (batch, height, width) {
            *last = None;
            Self::release(machine, space)?;
            *space = self.lay_out(machine, batch, height, width)?;
        }
        machine.upload_again(space.image, images)?;
        let now = Some((*normalise, pooling));
        // Taken until it is done: a run that failed is not what the next one repeats.
        let same = last.take() == now;
        machine.repeat(same, &mut |machine| self.run(machine, space, normalise, pooling))?;
        *last = now;
        let mut pooled = vec![0f32; batch * DIM];
        machine.download(space.pooled, &mut pooled)?;
        Ok(pooled)
    }

    fn run(&self, machine: &mut M, space: &Space, normalise: &Normalise, pooling: Pooling) -> Result<()> {
        let batch = space.batch;
        let (h, w, pad) = self.step(space.height, space.width, 2)?;
        let of = |layer: &Layer| Args { weight: layer.weight, bias: layer.bias, channels: layer.outputs as i32, ..Args::default() };
        let args = Args {
            input: space.image,
            output: space.maps[0],
            height: space.height as i32,
            width: space.width as i32,
            out_height: h as i32,
            out_width: w as i32,
            stride: 2,
            top: pad.top as i32,
            left: pad.left as i32,
            scale: normalise.scale,
            shift: normalise.shift,
            ..of(&self.stem)
        };
        machine.launch("stem", false, batch * h * w * STEM_CHANNELS / 8, &args)?;
        let (mut h, mut w, [mut x, mut y], mut tapped) = (h, w, space.maps, 0);
        for (k, b) in self.blocks.iter().enumerate() {
            let (half, vector) = (b.half, 16 / b.element());
            let mut input = x;
            if let Some(e) = &b.expand {
                let x = if half { space.narrow } else { x };
                let (pixels, y) = (batch * h * w, space.expanded);
                let (inputs, outputs, w) = (e.inputs, e.outputs, e.weight);
                machine.product(&Product { half, pixels, inputs, outputs, x, w, y })?;
                input = y;
            }
            let (out_h, out_w, pad) = self.step(h, w, b.stride)?;
            let c = b.depthwise.outputs;
            let args = Args {
                input,
                before: b.expand.map_or(0, |e| e.bias),
                output: space.filtered,
                height: h as i32,
                width: w as i32,
                out_height: out_h as i32,
                out_width: out_w as i32,
                stride: b.stride as i32,
                top: pad.top as i32,
                left: pad.left as i32,
                ..of(&b.depthwise)
            };
            machine.launch("depthwise", half, batch * out_h * out_w.div_ceil(RUN) * c / vector, &args)?;
            (h, w) = (out_h, out_w);
            let (pixels, p) = (batch * h * w, &b.project);
            let (inputs, outputs) = (p.inputs, p.outputs);
            machine.product(&Product { half, pixels, inputs, outputs, x: space.filtered, w: p.weight, y })?;
            // In its place, and as the next block's product reads it.
            let next = self.blocks.get(k + 1).is_some_and(|b| b.half);
            let (output, wide) = if next { (space.narrow, y) } else { (y, 0) };
            let args = Args { input: y, before: if b.residual { x } else { 0 }, wide, output, ..of(p) };
            machine.launch("finish", next, pixels * p.outputs / if next { 8 } else { 4 }, &args)?;
            if b.tap {
                self.pool(machine, space, pooling, (y, h, w, p.outputs), tapped)?;
                tapped += p.outputs;
            }
            std::mem::swap(&mut x, &mut y);
        }
        Ok(())
    }

    fn pool(
        &self,
        machine: &mut M,
        space: &Space,
        pooling: Pooling,
        (map, h, w, channels): (u64, usize, usize, usize),
        at: usize,
    ) -> Result<()> {
        let power = match pooling {
            Pooling::Gem { p } => p as f32,
            Pooling::Average => 0.0,
        };
        let strips = Args {
            input: map,
            output: space.strips,
            height: h as i32,
            width: w as i32,
            channels: channels as i32,
            strips: STRIPS as i32,
            power,
            ..Args::default()
        };
        // Of the maps in f32, whatever the others are.
        machine.launch("pool_strip", false, space.batch * STRIPS * channels, &strips)?;
        let whole = Args { input: space.strips, output: space.pooled, at: at as i32, row: DIM as i32, ..strips };
        machine.launch("pool", false, space.batch * channels, &whole)
    }

    /// Of the machine.
    #[cfg(feature = "cuda")]
    pub fn on_machine<T>(&self, f: impl FnOnce(&M) -> T) -> T {
        f(&self.state.lock().unwrap_or_else(PoisonError::into_inner).machine)
    }

    /// What one image of `height` x `width` costs.
    ///
    /// Errors: a size that is too small.
    pub fn cost(&self, height: usize, width: usize) -> Result<Cost> {
        let (mut h, mut w, _) = self.step(height, width, 2)?;
        let first = (h * w * STEM_CHANNELS) as f64;
        let mut cost = Cost { products: 0.0, others: first * 27.0, bytes: (height * width * 3) as f64 + first * 4.0 };
        for (k, b) in self.blocks.iter().enumerate() {
            let element = b.element() as f64;
            let mut product = |pixels: usize, layer: &Layer| {
                cost.products += (pixels * layer.inputs * layer.outputs) as f64;
                cost.bytes += ((pixels + layer.outputs) * layer.inputs) as f64 * element + (pixels * layer.outputs * 4) as f64;
            };
            if let Some(e) = &b.expand {
                product(h * w, e);
            }
            let before = h * w;
            (h, w, _) = self.step(h, w, b.stride)?;
            product(h * w, &b.project);
            cost.others += (h * w * b.depthwise.outputs * 9) as f64;
            cost.bytes += b.depthwise.outputs as f64 * (before as f64 * 4.0 + (h * w) as f64 * element);
            // What the block's end reads and writes, and the pooling reads.
            let wide = 2 + usize::from(b.residual) + usize::from(b.tap);
            let narrow = if self.blocks.get(k + 1).is_some_and(|b| b.half) { 2.0 } else { 0.0 };
            cost.bytes += (h * w * b.project.outputs) as f64 * (4.0 * wide as f64 + narrow);
        }
        Ok(cost)
    }
}

#[cfg(test)]
mod host;
#[cfg(test)]
mod tests;
