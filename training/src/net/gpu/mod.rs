//! The trunks on a GPU, forward and backward, with maps in f32 or bf16 (mixed precision: weights, statistics, sums and
//! gradients of weights stay f32, and bf16's range is f32's, so no loss is scaled). What a GPU is stands behind [`Machine`]:
//! CUDA is one (`cuda.rs`), the processor that runs the same kernels as loops another, for tests where there is no GPU.
//!
//! Images and weights go up, taps come down; the gradient of the taps goes up, that of the weights comes down. Losses, poolings
//! and the optimiser stay where they are. Buffers go from step to step. [ours]

#[cfg(feature = "cuda")]
mod cuda;

use super::norm::{Norm, MOMENTUM};
use super::trunk::{Conv, Trunk};
use candle_core::{bail, Result};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use structvpr::model::ComputeDevice;

/// The kernels' text.
const SOURCE: &str = include_str!("training.cu");
/// Kernels of [`SOURCE`].
const KERNELS: [&str; 15] = [
    "narrow",
    "widen",
    "join",
    "patches",
    "moments_strip",
    "moments",
    "activate",
    "affine",
    "depthwise",
    "depthwise_back",
    "depthwise_weights_strip",
    "depthwise_weights",
    "slope_strip",
    "slope",
    "before",
];
/// Items that a sum over the channels of a map is spread over, about; more only where there are more channels.
const SPREAD: usize = 1 << 16;
/// Strips of a channel.
const STRIPS: std::ops::RangeInclusive<usize> = 32..=512;

/// What maps are kept in on a GPU. A processor computes in f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    #[default]
    F32,
    /// Mixed precision.
    Bf16,
}

/// What a kernel is called with: `Args` of training.cu, field by field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Args {
    x: u64,
    y: u64,
    z: u64,
    norm: u64,
    out: u64,
    channels: i32,
    columns: i32,
    strips: i32,
    images: i32,
    height: i32,
    width: i32,
    out_height: i32,
    out_width: i32,
    stride: i32,
    top: i32,
    left: i32,
    limit: f32,
}

/// A row-major matrix of a product, or its transpose.
#[derive(Clone, Copy, Debug)]
struct Matrix {
    address: u64,
    /// Length of a row as it lies there.
    row: usize,
    transposed: bool,
}

/// `c = a b`, or `c + a b` with `add`: row-major, `rows` x `inner` by `inner` x `columns`, summed in f32.
#[derive(Clone, Copy, Debug)]
struct Product {
    /// `a` and `b` are bf16.
    half: bool,
    /// `c` is f32 whatever `a` and `b` are.
    wide: bool,
    rows: usize,
    inner: usize,
    columns: usize,
    a: Matrix,
    b: Matrix,
    c: u64,
    add: bool,
}

/// A GPU, or what stands for one. Everything is done in the order of the calls.
trait Machine: Send {
    /// Address of `bytes` of memory of its own, 256-aligned.
    fn reserve(&mut self, bytes: usize) -> Result<u64>;
    /// Gives back what [`Self::reserve`] gave.
    fn free(&mut self, address: u64);
    /// Sets all bytes of what [`Self::reserve`] gave to 0.
    fn clear(&mut self, at: u64) -> Result<()>;
    /// Copies to the machine.
    fn upload(&mut self, to: u64, values: &[f32]) -> Result<()>;
    /// Runs a kernel of [`SOURCE`] over `items`.
    fn launch(&mut self, kernel: &'static str, half: bool, items: usize, args: &Args) -> Result<()>;
    /// A matrix product.
    fn product(&mut self, product: &Product) -> Result<()>;
    /// Waits for all that was asked for and copies back.
    fn download(&mut self, from: u64, values: &mut [f32]) -> Result<()>;
}

/// A GPU to train on, for any number of networks.
pub struct Gpu {
    half: bool,
    state: Mutex<State>,
}

struct State {
    machine: Box<dyn Machine>,
    /// Buffers without a use, by size.
    free: BTreeMap<usize, Vec<u64>>,
}

/// Memory of the machine.
#[derive(Debug)]
struct Block {
    address: u64,
    bytes: usize,
}

/// How much larger than asked for a buffer may be.
const SPARE: usize = 2;

impl State {
    fn take(&mut self, bytes: usize) -> Result<Block> {
        let bytes = bytes.max(4);
        let found = self.free.range(bytes..=SPARE * bytes).find(|(_, all)| !all.is_empty()).map(|(size, _)| *size);
        if let Some(bytes) = found {
            if let Some(address) = self.free.get_mut(&bytes).and_then(Vec::pop) {
                return Ok(Block { address, bytes });
            }
        }
        match self.machine.reserve(bytes) {
            Ok(address) => Ok(Block { address, bytes }),
            Err(_) => {
                // Sizes that are no longer asked for may hold what is missing.
                for address in std::mem::take(&mut self.free).into_values().flatten() {
                    self.machine.free(address);
                }
                Ok(Block { address: self.machine.reserve(bytes)?, bytes })
            }
        }
    }

    fn give(&mut self, block: Block) {
        self.free.entry(block.bytes).or_default().push(block.address);
    }
}

/// One layer's output before its norm.
struct Layer {
    raw: Block,
    /// Address of its norm.
    norm: u64,
    height: usize,
    width: usize,
}

struct Pass {
    expand: Option<Layer>,
    depthwise: Layer,
    project: Layer,
    out: Block,
}

/// What a backward pass needs of a forward pass, on the machine.
pub(super) struct Saved {
    images: usize,
    size: (usize, usize),
    /// f32, and as products read them.
    weights: Block,
    narrow: Option<Block>,
    norms: Block,
    /// The stem's patches, or the image where there is no stem.
    image: Block,
    stem: Option<Layer>,
    passes: Vec<Pass>,
}

impl Saved {
    /// All of its memory.
    fn blocks(self) -> impl Iterator<Item = Block> {
        let passes = self.passes.into_iter().flat_map(|p| {
            let layers = [p.expand, Some(p.depthwise), Some(p.project)];
            layers.into_iter().flatten().map(|l| l.raw).chain([p.out])
        });
        [self.weights, self.norms, self.image].into_iter().chain(self.narrow).chain(self.stem.map(|l| l.raw)).chain(passes)
    }
}

/// A map as the next layer reads it.
#[derive(Clone, Copy)]
struct Source {
    raw: u64,
    /// 0: as it is.
    norm: u64,
}

/// One network's pass over a machine.
struct Run<'a> {
    state: &'a mut State,
    trunk: &'a Trunk,
    half: bool,
    images: usize,
    limit: f32,
}

impl Run<'_> {
    fn element(&self) -> usize {
        if self.half {
            2
        } else {
            4
        }
    }

    fn map(&mut self, values: usize) -> Result<Block> {
        let element = self.element();
        self.state.take(values * element)
    }

    fn launch(&mut self, kernel: &'static str, items: usize, args: Args) -> Result<()> {
        self.state.machine.launch(kernel, self.half, items, &args)
    }

    /// Strips of a channel's sum.
    fn strips(channels: usize, columns: usize) -> usize {
        (SPREAD / channels).clamp(*STRIPS.start(), *STRIPS.end()).min(columns)
    }

    /// Where a convolution's norm lies.
    fn norm(&self, conv: &Conv, norms: &Block) -> u64 {
        // Two statistics per channel, four numbers of a norm.
        norms.address + 4 * 2 * conv.mean.start as u64
    }

    /// Takes the batch's statistics of a convolution's output and makes its norm of them; `statistics`: where they are left.
    fn measure(&mut self, conv: &Conv, raw: u64, columns: usize, weights: u64, norm: u64, statistics: u64) -> Result<()> {
        let strips = Self::strips(conv.outputs, columns);
        let sums = self.state.take(conv.outputs * strips * 2 * 4)?;
        let common = Args { channels: conv.outputs as i32, columns: columns as i32, strips: strips as i32, ..Args::default() };
        self.launch("moments_strip", conv.outputs * strips, Args { x: raw, out: sums.address, ..common })?;
        let y = weights + 4 * conv.gamma.start as u64;
        let out = statistics + 4 * conv.mean.start as u64;
        self.launch("moments", conv.outputs, Args { x: sums.address, y, z: raw, norm, out, ..common })?;
        self.state.give(sums);
        Ok(())
    }

    /// The map behind a source, normalised and clamped: a new block, or none where it lies there as it is.
    fn activated(&mut self, source: Source, channels: usize, columns: usize) -> Result<(u64, Option<Block>)> {
        if source.norm == 0 {
            return Ok((source.raw, None));
        }
        let block = self.map(channels * columns)?;
        let args = Args {
            x: source.raw,
            norm: source.norm,
            out: block.address,
            channels: channels as i32,
            columns: columns as i32,
            limit: self.limit,
            ..Args::default()
        };
        self.launch("activate", channels * columns, args)?;
        Ok((block.address, Some(block)))
    }

    /// Address of a convolution's weights as products read them.
    fn matrix(&self, conv: &Conv, saved: &Saved) -> u64 {
        match &saved.narrow {
            Some(n) => n.address + 2 * conv.weight.start as u64,
            None => saved.weights.address + 4 * conv.weight.start as u64,
        }
    }

    /// A 1x1 convolution (or a product of patches): its output before the norm.
    fn pointwise(&mut self, conv: &Conv, saved: &Saved, input: u64, inputs: usize, columns: usize) -> Result<Block> {
        let out = self.map(conv.outputs * columns)?;
        let product = Product {
            half: self.half,
            wide: false,
            rows: conv.outputs,
            inner: inputs,
            columns,
            a: Matrix { address: self.matrix(conv, saved), row: inputs, transposed: false },
            b: Matrix { address: input, row: columns, transposed: false },
            c: out.address,
            add: false,
        };
        self.state.machine.product(&product)?;
        Ok(out)
    }

    /// Geometry of a 3x3 convolution as kernels want it, and its output's size.
    fn window(&self, (height, width): (usize, usize), stride: usize) -> (Args, (usize, usize)) {
        let pad = self.trunk.pad(height, width, stride);
        let (out_height, out_width) = self.trunk.reduced((height, width), stride);
        let args = Args {
            images: self.images as i32,
            height: height as i32,
            width: width as i32,
            out_height: out_height as i32,
            out_width: out_width as i32,
            stride: stride as i32,
            top: pad.top as i32,
            left: pad.left as i32,
            limit: self.limit,
            ..Args::default()
        };
        (args, (out_height, out_width))
    }

    /// A convolution's norm: measured on the batch, or there already.
    fn settle(&mut self, conv: &Conv, raw: &Block, columns: usize, saved: &Saved, statistics: Option<&Block>) -> Result<u64> {
        let norm = self.norm(conv, &saved.norms);
        if let Some(s) = statistics {
            self.measure(conv, raw.address, columns, saved.weights.address, norm, s.address)?;
        }
        Ok(norm)
    }

    /// Forward: the taps, each C x N x H x W in f32, one behind the other. With `statistics` the batch's are taken and left there, and
    /// all that the backward pass wants is kept.
    fn forward(&mut self, saved: &mut Saved, statistics: Option<&Block>) -> Result<Vec<f32>> {
        let (trunk, images) = (self.trunk, self.images);
        let mut at = saved.size;
        if let Some(conv) = &trunk.stem {
            at = trunk.reduced(at, 2);
            let columns = images * at.0 * at.1;
            let raw = self.pointwise(conv, saved, saved.image.address, 9 * trunk.channels, columns)?;
            let norm = self.settle(conv, &raw, columns, saved, statistics)?;
            saved.stem = Some(Layer { raw, norm, height: at.0, width: at.1 });
        }
        let mut taps = Vec::with_capacity(trunk.taps(saved.size).iter().map(|t| t.channels * images * t.height * t.width).sum());
        for block in &trunk.blocks {
            let input = match (saved.passes.last(), &saved.stem) {
                (Some(pass), _) => Source { raw: pass.out.address, norm: 0 },
                (None, Some(stem)) => Source { raw: stem.raw.address, norm: stem.norm },
                (None, None) => Source { raw: saved.image.address, norm: 0 },
            };
            let columns = images * at.0 * at.1;
            let mut expand = None;
            if let Some(conv) = &block.expand {
                let (x, own) = self.activated(input, conv.inputs, columns)?;
                let raw = self.pointwise(conv, saved, x, conv.inputs, columns)?;
                own.into_iter().for_each(|b| self.state.give(b));
                let norm = self.settle(conv, &raw, columns, saved, statistics)?;
                expand = Some(Layer { raw, norm, height: at.0, width: at.1 });
            }
            let conv = &block.depthwise;
            let source = expand.as_ref().map_or(input, |l| Source { raw: l.raw.address, norm: l.norm });
            let (window, out) = self.window(at, conv.stride);
            let out_columns = images * out.0 * out.1;
            let raw = self.map(conv.outputs * out_columns)?;
            let args = Args {
                x: source.raw,
                y: saved.weights.address + 4 * conv.weight.start as u64,
                norm: source.norm,
                out: raw.address,
                channels: conv.outputs as i32,
                columns: out_columns as i32,
                ..window
            };
            self.launch("depthwise", conv.outputs * out_columns, args)?;
            let norm = self.settle(conv, &raw, out_columns, saved, statistics)?;
            let depthwise = Layer { raw, norm, height: out.0, width: out.1 };

            let conv = &block.project;
            let source = Source { raw: depthwise.raw.address, norm: depthwise.norm };
            let (x, own) = self.activated(source, conv.inputs, out_columns)?;
            let raw = self.pointwise(conv, saved, x, conv.inputs, out_columns)?;
            own.into_iter().for_each(|b| self.state.give(b));
            let norm = self.settle(conv, &raw, out_columns, saved, statistics)?;
            let values = conv.outputs * out_columns;
            let sum = self.map(values)?;
            let args = Args {
                x: raw.address,
                y: if block.residual { input.raw } else { 0 },
                norm,
                out: sum.address,
                channels: conv.outputs as i32,
                columns: out_columns as i32,
                ..Args::default()
            };
            self.launch("affine", values, args)?;
            if block.tap {
                let wide = self.state.take(4 * values)?;
                self.launch("widen", values, Args { x: sum.address, out: wide.address, ..Args::default() })?;
                let first = taps.len();
                taps.resize(first + values, 0.0);
                self.state.machine.download(wide.address, &mut taps[first..])?;
                self.state.give(wide);
            }
            let project = Layer { raw, norm, height: out.0, width: out.1 };
            if statistics.is_none() {
                // Nothing of an evaluation is read again but a block's output; kernels run in the order of the calls, so memory may go on at
                // once.
                let old = saved.passes.pop().map(|p: Pass| p.out);
                let spent = [expand.map(|l| l.raw), Some(depthwise.raw), Some(project.raw), old, saved.stem.take().map(|l| l.raw)];
                spent.into_iter().flatten().for_each(|b| self.state.give(b));
                let none = || Layer { raw: Block { address: 0, bytes: 0 }, norm: 0, height: 0, width: 0 };
                saved.passes.push(Pass { expand: None, depthwise: none(), project: none(), out: sum });
            } else {
                saved.passes.push(Pass { expand, depthwise, project, out: sum });
            }
            at = out;
        }
        Ok(taps)
    }

    /// Masks a gradient where the activation after the norm is flat (`clamped`), leaves the gradients of gamma and beta, and makes the
    /// gradient before the norm: a new block.
    fn before(&mut self, conv: &Conv, layer: &Layer, grad: u64, columns: usize, clamped: bool, weights: u64) -> Result<Block> {
        let strips = Self::strips(conv.outputs, columns);
        let sums = self.state.take(conv.outputs * strips * 2 * 4)?;
        let common = Args {
            norm: layer.norm,
            channels: conv.outputs as i32,
            columns: columns as i32,
            strips: strips as i32,
            limit: if clamped { self.limit } else { 0.0 },
            ..Args::default()
        };
        self.launch("slope_strip", conv.outputs * strips, Args { x: grad, z: layer.raw.address, out: sums.address, ..common })?;
        let slope = weights + 4 * conv.gamma.start as u64;
        self.launch("slope", conv.outputs, Args { x: sums.address, out: slope, ..common })?;
        self.state.give(sums);
        let out = self.map(conv.outputs * columns)?;
        let args = Args { x: grad, y: slope, z: layer.raw.address, out: out.address, ..common };
        self.launch("before", conv.outputs * columns, args)?;
        Ok(out)
    }

    /// The gradient of a 1x1 convolution's weights.
    fn pointwise_weights(&mut self, conv: &Conv, grad: u64, input: u64, inputs: usize, columns: usize, weights: u64) -> Result<()> {
        self.state.machine.product(&Product {
            half: self.half,
            wide: true,
            rows: conv.outputs,
            inner: columns,
            columns: inputs,
            a: Matrix { address: grad, row: columns, transposed: false },
            b: Matrix { address: input, row: columns, transposed: true },
            c: weights + 4 * conv.weight.start as u64,
            add: false,
        })
    }

    /// The gradient of a 1x1 convolution's input, put to `to` or added to what is there.
    fn pointwise_back(&mut self, conv: &Conv, saved: &Saved, grad: u64, to: u64, columns: usize, add: bool) -> Result<()> {
        self.state.machine.product(&Product {
            half: self.half,
            wide: false,
            rows: conv.inputs,
            inner: conv.outputs,
            columns,
            a: Matrix { address: self.matrix(conv, saved), row: conv.inputs, transposed: true },
            b: Matrix { address: grad, row: columns, transposed: false },
            c: to,
            add,
        })
    }

    /// Backward: leaves the gradients of all weights at `weights`. `tap_grad`: f32, as the forward pass gave the taps.
    fn backward(&mut self, saved: &Saved, tap_grad: &[f32], weights: u64) -> Result<()> {
        let (trunk, images) = (self.trunk, self.images);
        let mut rest = tap_grad.len();
        let mut dout: Option<Block> = None;
        for (b, block) in trunk.blocks.iter().enumerate().rev() {
            let pass = &saved.passes[b];
            let columns = images * pass.project.height * pass.project.width;
            if block.tap {
                let n = block.project.outputs * columns;
                let own = &tap_grad[rest - n..rest];
                rest -= n;
                let wide = self.state.take(4 * n)?;
                self.state.machine.upload(wide.address, own)?;
                let (to, add) = match dout.take() {
                    Some(d) => (d, 1),
                    None => (self.map(n)?, 0),
                };
                self.launch("join", n, Args { x: wide.address, y: add, out: to.address, ..Args::default() })?;
                self.state.give(wide);
                dout = Some(to);
            }
            // Behind the last tap: nothing reaches it.
            let Some(after) = dout.take() else { continue };
            // The linear bottleneck.
            let before = self.before(&block.project, &pass.project, after.address, columns, false, weights)?;
            let source = Source { raw: pass.depthwise.raw.address, norm: pass.depthwise.norm };
            let (x, own) = self.activated(source, block.project.inputs, columns)?;
            self.pointwise_weights(&block.project, before.address, x, block.project.inputs, columns, weights)?;
            own.into_iter().for_each(|b| self.state.give(b));
            let hidden = self.map(block.project.inputs * columns)?;
            self.pointwise_back(&block.project, saved, before.address, hidden.address, columns, false)?;
            self.state.give(before);

            // The depthwise convolution.
            let conv = &block.depthwise;
            let before = self.before(conv, &pass.depthwise, hidden.address, columns, true, weights)?;
            self.state.give(hidden);
            let previous = b.checked_sub(1).map(|p| &saved.passes[p]);
            let (input, at) = match (previous, &saved.stem) {
                (Some(p), _) => (Source { raw: p.out.address, norm: 0 }, (p.project.height, p.project.width)),
                (None, Some(stem)) => (Source { raw: stem.raw.address, norm: stem.norm }, (stem.height, stem.width)),
                (None, None) => (Source { raw: saved.image.address, norm: 0 }, saved.size),
            };
            let source = pass.expand.as_ref().map_or(input, |l| Source { raw: l.raw.address, norm: l.norm });
            let (window, _) = self.window(at, conv.stride);
            let (in_columns, strips) = (images * at.0 * at.1, Self::strips(conv.outputs, columns));
            let sums = self.state.take(conv.outputs * strips * 9 * 4)?;
            let window = Args { channels: conv.outputs as i32, strips: strips as i32, ..window };
            let args = Args { x: source.raw, z: before.address, norm: source.norm, out: sums.address, columns: columns as i32, ..window };
            self.launch("depthwise_weights_strip", conv.outputs * strips, args)?;
            let to = weights + 4 * conv.weight.start as u64;
            self.launch("depthwise_weights", conv.outputs * 9, Args { x: sums.address, out: to, ..window })?;
            self.state.give(sums);
            // Behind the first block lies the image, which wants no gradient.
            let wanted = block.expand.is_some() || previous.is_some() || saved.stem.is_some();
            // A residual's way round the block.
            let add = block.residual && block.expand.is_none();
            let mut back = None;
            if wanted {
                let to = self.map(conv.inputs * in_columns)?;
                let args = Args {
                    x: before.address,
                    y: saved.weights.address + 4 * conv.weight.start as u64,
                    z: if add { after.address } else { 0 },
                    out: to.address,
                    columns: in_columns as i32,
                    ..window
                };
                self.launch("depthwise_back", conv.inputs * in_columns, args)?;
                back = Some(to);
            }
            self.state.give(before);

            // The expansion.
            dout = match (&block.expand, &pass.expand, back) {
                (Some(conv), Some(layer), Some(expanded)) => {
                    let before = self.before(conv, layer, expanded.address, in_columns, true, weights)?;
                    self.state.give(expanded);
                    let (x, own) = self.activated(input, conv.inputs, in_columns)?;
                    self.pointwise_weights(conv, before.address, x, conv.inputs, in_columns, weights)?;
                    own.into_iter().for_each(|b| self.state.give(b));
                    // With a residual the product adds itself to what went round the block.
                    let to = if block.residual {
                        after
                    } else {
                        self.state.give(after);
                        self.map(conv.inputs * in_columns)?
                    };
                    self.pointwise_back(conv, saved, before.address, to.address, in_columns, block.residual)?;
                    self.state.give(before);
                    Some(to)
                }
                (_, _, back) => {
                    self.state.give(after);
                    back
                }
            };
        }
        if let (Some(conv), Some(layer), Some(grad)) = (&trunk.stem, &saved.stem, dout.take()) {
            let columns = images * layer.height * layer.width;
            let before = self.before(conv, layer, grad.address, columns, true, weights)?;
            self.pointwise_weights(conv, before.address, saved.image.address, 9 * trunk.channels, columns, weights)?;
            self.state.give(before);
            self.state.give(grad);
        }
        dout.into_iter().for_each(|b| self.state.give(b));
        Ok(())
    }
}

impl Gpu {
    /// Opens `device`, for maps in `precision`; `None` for the processor, which needs none and computes in f32.
    ///
    /// Errors: a device that is not there, or a program without CUDA.
    pub fn open(device: ComputeDevice, precision: Precision) -> anyhow::Result<Option<Arc<Self>>> {
        match device {
            ComputeDevice::Cpu => {
                if precision != Precision::F32 {
                    eprintln!("training: note: the recipe's precision is for a GPU (--device cuda:0); the processor computes in f32");
                }
                Ok(None)
            }
            #[cfg(feature = "cuda")]
            ComputeDevice::Cuda(n) => Ok(Some(Arc::new(Self::new(Box::new(cuda::open(n)?), precision)))),
            #[cfg(not(feature = "cuda"))]
            ComputeDevice::Cuda(n) => {
                anyhow::bail!(
                    "--device cuda:{n}: this program was built without CUDA (cargo build --release -p structvpr-training --features cuda; see README, CUDA)"
                )
            }
        }
    }

    /// On a machine.
    #[cfg(any(test, feature = "cuda"))]
    fn new(machine: Box<dyn Machine>, precision: Precision) -> Self {
        Self { half: precision == Precision::Bf16, state: Mutex::new(State { machine, free: BTreeMap::new() }) }
    }

    /// As [`Trunk::forward`]; what is kept of a pass of training must come back by [`Gpu::recycle`].
    ///
    /// Errors: the machine's; a batch that is too large to be counted.
    pub(super) fn forward(
        &self,
        trunk: &Trunk,
        weights: &[f32],
        statistics: &mut [f64],
        train: bool,
        image: &[f32],
        (images, height, width): (usize, usize, usize),
    ) -> Result<(Vec<f32>, Option<Saved>)> {
        let size = (height, width);
        let largest = trunk.largest(size) * images;
        if largest > i32::MAX as usize {
            bail!("a batch of {images} images of {}x{} has maps of {largest} values: too many for one pass", size.1, size.0);
        }
        let mut state = super::op::lock(&self.state);
        let mut run = Run { state: &mut state, trunk, half: self.half, images, limit: trunk.top() as f32 };
        let up = run.state.take(4 * weights.len())?;
        run.state.machine.upload(up.address, weights)?;
        let narrow = if self.half {
            let to = run.map(weights.len())?;
            run.launch("narrow", weights.len(), Args { x: up.address, out: to.address, ..Args::default() })?;
            Some(to)
        } else {
            None
        };
        let norms = run.state.take(4 * 2 * trunk.statistics)?;
        let wide = run.state.take(4 * image.len())?;
        run.state.machine.upload(wide.address, image)?;
        let values = match &trunk.stem {
            Some(_) => {
                let (window, (h, w)) = run.window(size, 2);
                let columns = images * h * w;
                let values = 9 * trunk.channels * columns;
                let to = run.map(values)?;
                let args = Args { x: wide.address, out: to.address, columns: columns as i32, ..window };
                run.launch("patches", values, args)?;
                to
            }
            None => {
                let to = run.map(image.len())?;
                run.launch("narrow", image.len(), Args { x: wide.address, out: to.address, ..Args::default() })?;
                to
            }
        };
        run.state.give(wide);
        let mut saved = Saved { images, size, weights: up, narrow, norms, image: values, stem: None, passes: Vec::new() };
        let measured = if train {
            Some(run.state.take(4 * trunk.statistics)?)
        } else {
            run.state.machine.upload(saved.norms.address, &norms_of(trunk, weights, statistics))?;
            None
        };
        let taps = run.forward(&mut saved, measured.as_ref())?;
        if let Some(block) = measured {
            let mut batch = vec![0f32; trunk.statistics];
            run.state.machine.download(block.address, &mut batch)?;
            run.state.give(block);
            follow(trunk, &saved, &batch, statistics);
            return Ok((taps, Some(saved)));
        }
        recycle(&mut state, saved);
        Ok((taps, None))
    }

    /// As [`Trunk::backward`].
    pub(super) fn backward(&self, trunk: &Trunk, saved: &Saved, tap_grad: &[f32]) -> Result<Vec<f32>> {
        let mut state = super::op::lock(&self.state);
        let mut run = Run { state: &mut state, trunk, half: self.half, images: saved.images, limit: trunk.top() as f32 };
        let grads = run.state.take(4 * trunk.weights)?;
        // Blocks behind the last tap get no gradient.
        run.state.machine.clear(grads.address)?;
        run.backward(saved, tap_grad, grads.address)?;
        let mut out = vec![0f32; trunk.weights];
        run.state.machine.download(grads.address, &mut out)?;
        run.state.give(grads);
        Ok(out)
    }

    /// Takes back what a pass kept.
    pub(super) fn recycle(&self, saved: Saved) {
        recycle(&mut super::op::lock(&self.state), saved);
    }
}

fn recycle(state: &mut State, saved: Saved) {
    // What an evaluation gave back at once has no bytes.
    saved.blocks().filter(|b| b.bytes > 0).for_each(|b| state.give(b));
}

/// The norms of running statistics, as kernels read them.
fn norms_of(trunk: &Trunk, weights: &[f32], statistics: &[f64]) -> Vec<f32> {
    let mut all = vec![0f32; 2 * trunk.statistics];
    for conv in trunk.convs() {
        let running = statistics[conv.mean.clone()].iter().zip(&statistics[conv.mean.end..]).map(|(m, v)| (*m, *v));
        let norm = Norm::new(running, &weights[conv.gamma.clone()], &weights[conv.beta.clone()]);
        let to = &mut all[2 * conv.mean.start..];
        for (k, values) in [&norm.scale, &norm.shift, &norm.mean, &norm.inverse].into_iter().enumerate() {
            to[k * conv.outputs..][..conv.outputs].copy_from_slice(values);
        }
    }
    all
}

/// Moves running statistics towards the batch's, as the processor's (`norm` of trunk.rs).
fn follow(trunk: &Trunk, saved: &Saved, batch: &[f32], statistics: &mut [f64]) {
    let layers = saved.stem.iter().chain(saved.passes.iter().flat_map(|p| p.expand.iter().chain([&p.depthwise, &p.project])));
    for (conv, layer) in trunk.convs().zip(layers) {
        let count = (saved.images * layer.height * layer.width) as f64;
        let unbiased = count / (count - 1.0).max(1.0);
        for c in 0..conv.outputs {
            for (at, factor) in [(conv.mean.start + c, 1.0), (conv.mean.end + c, unbiased)] {
                statistics[at] = statistics[at] * (1.0 - MOMENTUM) + f64::from(batch[at]) * factor * MOMENTUM;
            }
        }
    }
}

#[cfg(test)]
#[path = "../../../../src/model/kernels/gpu/host.rs"]
mod host;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::host;
