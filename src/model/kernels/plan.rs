//! MobileNetV2's inference plan: batch norm folded, weights packed once, buffers kept from image to image, channels side
//! by side, each inverted residual in one pass or two.
//!
//! On large maps a block runs by rows: a row is expanded into a ring that stays in the second-level cache, three rows of
//! which make a row of the depthwise convolution, which is projected at once. On small maps, where the rows that two
//! threads would both expand weigh, the block is expanded as a whole first.
//!
//! Work is a list of strips in the order of the network. A thread takes the next strip and computes it some rows at a time, each
//! when the pixels that they read are done; so one wake-up serves a whole image, and no number of threads can wait for each other,
//! for a strip waits only for earlier ones, which are done or in some thread's hands. Every other strip is computed from its end:
//! what neighbours read of each other is then what both compute last, or first, and a thread may be ahead by a strip before it waits.

use super::aligned::Aligned;
use super::bf16::{codes16, Depthwise16, Packed16, Products};
#[cfg(target_arch = "x86_64")]
use super::bf16::{depthwise16, encode16, expand16, project16, Tiles};
use super::int8::{encode, panel8, Codes, Packed8};
use super::pointwise::{padded, panel, Packed, Pixels};
use super::powers::add_powers;
use super::rounding::Rounded;
use super::rows::{depthwise_rows, stem_row, Depthwise, Stem, TOGETHER};
use super::vector::Vector;
use super::{dispatch, Activation, Isa, Pad};
use crate::image::{RowScratch, Rows};
use crate::model::Pooling;
use crate::team::team;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// One inverted residual as the plan takes it, batch norm folded.
pub struct PlanBlock<'a> {
    /// Weight (O x I) and bias; none in the first block.
    pub expand: Option<(&'a [f32], &'a [f32])>,
    /// Weight (C x 9) and bias.
    pub depthwise: (&'a [f32], &'a [f32]),
    /// Weight (O x I) and bias.
    pub project: (&'a [f32], &'a [f32]),
    /// 1 or 2.
    pub stride: usize,
    /// Whether the input is added to the output.
    pub residual: bool,
    /// Whether the output is tapped.
    pub tap: bool,
    /// Expansion and projection in 8 bits, where they are to be; these then stand for `expand` and `project`.
    pub rounded: (Option<&'a Rounded>, Option<&'a Rounded>),
}

impl PlanBlock<'_> {
    /// Whether nothing of it is in 8 bits.
    fn is_full(&self) -> bool {
        self.rounded.0.is_none() && self.rounded.1.is_none()
    }
}

#[derive(Debug)]
enum Pointwise {
    F32(Packed),
    Int8(Packed8),
    Bf16(Packed16),
}

/// What a plan's 1x1 convolutions compute in, some of them perhaps in f32; as constants, for kernels are compiled for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum In {
    F32,
    Int8,
    Bf16,
}

const F32: u8 = In::F32 as u8;
const INT8: u8 = In::Int8 as u8;
const BF16: u8 = In::Bf16 as u8;

impl Pointwise {
    /// Padded.
    fn inputs(&self) -> usize {
        match self {
            Self::F32(p) => padded(p.inputs),
            Self::Int8(p) => p.inputs,
            Self::Bf16(p) => p.inputs,
        }
    }

    fn outputs(&self) -> usize {
        match self {
            Self::F32(p) => p.outputs,
            Self::Int8(p) => p.outputs,
            Self::Bf16(p) => p.outputs,
        }
    }
}

#[derive(Debug)]
enum Deepen {
    F32(Depthwise),
    /// From lines to lines.
    Bf16(Depthwise16),
}

impl Deepen {
    /// Values of f32 that a pixel takes.
    fn hidden(&self) -> usize {
        match self {
            Self::F32(d) => d.channels,
            Self::Bf16(d) => d.channels / 2,
        }
    }
}

#[derive(Debug)]
struct Block {
    expand: Option<Pointwise>,
    depthwise: Deepen,
    project: Pointwise,
    /// Channels of the output without padding.
    outputs: usize,
    stride: usize,
    residual: bool,
    tap: bool,
}

/// What a plan reads.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Three planes, one after the other.
    Planes(&'a [f32]),
    /// A picture, whose rows are resized and normalised where they are read.
    Picture(&'a Rows<'a>),
}

/// The network, packed for one instruction set.
#[derive(Debug)]
pub struct Plan {
    isa: Isa,
    computes: In,
    /// Whether products of bfloat16 are by tiles.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    tiles: bool,
    /// Whether 8-bit products are summed up by AVX-VNNI where vectors are AVX2's.
    avx_vnni: bool,
    stem: Stem,
    blocks: Vec<Block>,
    pads: fn(usize, usize, usize) -> Pad,
    /// Buffers of earlier images, of threads that describe at the same time.
    spaces: Mutex<Vec<Space>>,
}

/// Buffers kept at most: more threads than this do not describe at once.
const SPACES: usize = 16;
/// Hidden maps up to this many bytes are expanded as a whole: all threads' second-level caches hold them.
const WHOLE: usize = 3 << 19;
/// Pixels that are projected at once, about.
const GROUP: usize = 80;
/// Products take so many pixels at a time, or divisors of it: strips begin where one does.
const EIGHT: usize = 8;

impl Plan {
    /// From the stem's weight (32 x 27) and bias, and the blocks. `pads` gives the border of a 3x3 at height, width and stride; at most
    /// one row and column at the top and left.
    pub fn new(stem: (&[f32], &[f32]), blocks: &[PlanBlock], pads: fn(usize, usize, usize) -> Pad) -> Self {
        Self::on(Isa::detect(), None, stem, blocks, pads)
    }

    /// As [`Self::new`], with none in 8 bits, and all blocks but the first in bfloat16 where the processor multiplies it; elsewhere they
    /// stay in f32.
    pub fn bf16(stem: (&[f32], &[f32]), blocks: &[PlanBlock], pads: fn(usize, usize, usize) -> Pad) -> Self {
        Self::on(Isa::detect(), Self::bf16_products(), stem, blocks, pads)
    }

    fn on(isa: Isa, bf16: Option<Products>, stem: (&[f32], &[f32]), blocks: &[PlanBlock], pads: fn(usize, usize, usize) -> Pad) -> Self {
        let computes = if !blocks.iter().all(PlanBlock::is_full) {
            In::Int8
        } else if bf16.is_some() && isa == Isa::Avx512 {
            In::Bf16
        } else {
            In::F32
        };
        let bf16 = bf16.filter(|_| computes == In::Bf16);
        // Sums of 8-bit products on AVX-512 take VNNI; AVX2 has another way.
        let isa = if computes == In::Int8 && !vnni() { isa.min(Isa::Avx2) } else { isa };
        let pack = |(weight, bias): (&[f32], &[f32])| Pointwise::F32(Packed::new(weight, bias, weight.len() / bias.len().max(1), isa));
        let pack8 = |rounded: &Rounded, signed| Pointwise::Int8(Packed8::new(rounded, signed, isa));
        let block = |b: &PlanBlock| {
            let (weights, bias) = b.depthwise;
            let (expand, depthwise, project) = match (b.expand, bf16) {
                // The first block stays in f32: there a sky or a night is one value over many pixels, whose rounding no mean takes away.
                (Some(expand), Some(products)) => (
                    Some(Pointwise::Bf16(Packed16::expand(expand.0, expand.1, products))),
                    Deepen::Bf16(Depthwise16::new(weights, bias)),
                    Pointwise::Bf16(Packed16::project(b.project.0, b.project.1, products)),
                ),
                (expand, _) => (
                    expand.map(|e| b.rounded.0.map_or_else(|| pack(e), |rounded| pack8(rounded, true))),
                    Deepen::F32(Depthwise::new(weights, bias, b.rounded.1.map_or(&[], |rounded| &rounded.scales))),
                    b.rounded.1.map_or_else(|| pack(b.project), |rounded| pack8(rounded, false)),
                ),
            };
            Block { expand, depthwise, project, outputs: b.project.1.len(), stride: b.stride, residual: b.residual, tap: b.tap }
        };
        Self {
            isa,
            computes,
            tiles: bf16 == Some(Products::Tiles),
            avx_vnni: avx_vnni(),
            stem: Stem::new(stem.0, stem.1),
            blocks: blocks.iter().map(block).collect(),
            pads,
            spaces: Mutex::default(),
        }
    }

    /// What [`Self::bf16`] computes by on this processor; `None`: it computes in f32.
    pub fn bf16_products() -> Option<Products> {
        Products::detect().filter(|_| Isa::detect() == Isa::Avx512)
    }

    /// Whether it computes in bfloat16.
    pub fn is_bf16(&self) -> bool {
        self.computes == In::Bf16
    }

    /// Of every tap the pooled channels, one tap after the other. `image` is of `height` x `width`.
    ///
    /// Deterministic whatever the number of threads. Panics: `image` is of another size.
    pub fn pooled(&self, image: Input, height: usize, width: usize, pooling: Pooling) -> Vec<Vec<f32>> {
        self.run(image, height, width, |space| {
            let of = |tap: &Tap| pool(self.isa, &space.buffers[tap.buffer].values()[..tap.pixels * tap.stride], tap, pooling);
            space.layout.taps.iter().map(of).collect()
        })
    }

    /// Of every tap the map, C x H x W, with its height and width.
    #[cfg(test)]
    pub fn taps(&self, image: &[f32], height: usize, width: usize) -> Vec<Vec<f32>> {
        self.run(Input::Planes(image), height, width, |space| {
            let of = |tap: &Tap| {
                let values = space.buffers[tap.buffer].values();
                (0..tap.channels).flat_map(|c| (0..tap.pixels).map(move |p| values[p * tap.stride + c])).collect()
            };
            space.layout.taps.iter().map(of).collect()
        })
    }

    fn run<T>(&self, image: Input, height: usize, width: usize, then: impl FnOnce(&Space) -> T) -> T {
        let fits = match image {
            Input::Planes(values) => values.len() == 3 * height * width,
            Input::Picture(rows) => rows.size() == (width, height),
        };
        assert!(fits, "the image is not of {height} x {width}");
        let threads = rayon::current_num_threads();
        let kept = {
            let mut spaces = self.spaces.lock().unwrap_or_else(PoisonError::into_inner);
            let at = spaces.iter().position(|s| (s.layout.height, s.layout.width, s.layout.threads) == (height, width, threads));
            at.map(|at| spaces.swap_remove(at))
        };
        let mut space = kept.unwrap_or_else(|| Space::new(Layout::new(self, height, width, threads)));
        self.execute(image, &mut space);
        let out = then(&space);
        let mut spaces = self.spaces.lock().unwrap_or_else(PoisonError::into_inner);
        if spaces.len() == SPACES {
            spaces.remove(0);
        }
        spaces.push(space);
        out
    }

    fn execute(&self, image: Input, space: &mut Space) {
        let Space { layout, buffers, own, zeros } = space;
        let shared = Shared {
            plan: self,
            layout,
            image,
            zeros,
            buffers: buffers.iter_mut().map(|b| Raw { len: b.len(), at: b.values_mut().as_mut_ptr() }).collect(),
            next: AtomicUsize::new(0),
            done: layout.tasks.iter().map(|_| AtomicUsize::new(0)).collect(),
            left: layout.stages.iter().map(|s| AtomicUsize::new(s.strips.len())).collect(),
            failed: AtomicBool::new(false),
        };
        let work = |own: &mut Own| match (self.isa, self.computes) {
            // SAFETY: the plan was packed for what `Isa::detect` found on this processor, or for less.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, In::F32) => unsafe { work_avx512(&shared, own) },
            // SAFETY: as above; a plan in 8 bits is packed for AVX-512 only where VNNI is.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, In::Int8) => unsafe { work_vnni(&shared, own) },
            // SAFETY: as above; a plan in bfloat16 is made only where the products are that it is packed for.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, In::Bf16) => unsafe { work_bf16(&shared, own) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, In::F32) => unsafe { work_avx2::<F32>(&shared, own) },
            // SAFETY: as above, and the processor has it.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, In::Int8) if self.avx_vnni => unsafe { work_avx_vnni(&shared, own) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, In::Int8) => unsafe { work_avx2::<INT8>(&shared, own) },
            (_, In::Int8) => work_portable::<INT8>(&shared, own),
            (_, In::F32 | In::Bf16) => work_portable::<F32>(&shared, own),
        };
        let more = || shared.next.load(Ordering::Relaxed) < layout.tasks.len();
        team(own, &more, &|own| work(own));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// A block by rows.
    Fused,
    /// The first half of a block.
    Expand,
    /// The second half.
    Reduce,
}

/// A pass over one block; what it writes is cut into strips.
#[derive(Debug)]
struct Stage {
    work: Work,
    block: usize,
    /// Height and width of the block's input.
    height: usize,
    width: usize,
    pad: Pad,
    /// Columns of what this stage writes.
    out_width: usize,
    /// Buffers; the first stage reads the image.
    input: Option<usize>,
    hidden: usize,
    output: usize,
    /// Pixels of the output, row after row; of [`Work::Fused`] whole rows.
    strips: Vec<Range<usize>>,
    /// Rows of output between two projections.
    step: usize,
}

/// Whether a strip is computed from its end. Not of the first stage, to which an image's rows come in their order.
fn is_from_end(stage: usize, strip: usize) -> bool {
    stage > 0 && strip % 2 == 1
}

impl Stage {
    /// Takes off `left`, what there is to do of a strip, what is done next: whole rows, but where the strip begins or ends within one.
    fn next(&self, left: &mut Range<usize>, from_end: bool) -> Option<Range<usize>> {
        if left.start >= left.end {
            return None;
        }
        let row = self.out_width;
        Some(match self.work {
            // Weights are read once for all pixels.
            Work::Expand => std::mem::replace(left, left.end..left.end),
            _ if from_end => {
                let from = (left.end.div_ceil(row).saturating_sub(self.step) * row).max(left.start);
                from..std::mem::replace(&mut left.end, from)
            }
            _ => {
                let to = ((left.start / row + self.step) * row).min(left.end);
                std::mem::replace(&mut left.start, to)..to
            }
        })
    }

    /// Pixels of the stage before that pixels `out` read.
    fn reads(&self, stride: usize, out: &Range<usize>) -> Range<usize> {
        match self.work {
            Work::Expand => out.clone(),
            _ => {
                let rows = self.reads_rows(stride, &(out.start / self.out_width..out.end.div_ceil(self.out_width)));
                rows.start * self.width..rows.end * self.width
            }
        }
    }

    /// Rows of the block's hidden map that rows `out` of its output see.
    fn reads_rows(&self, stride: usize, out: &Range<usize>) -> Range<usize> {
        let from = (out.start * stride).saturating_sub(self.pad.top);
        let to = ((out.end - 1) * stride + 3).saturating_sub(self.pad.top).min(self.height);
        from.min(to)..to
    }
}

#[derive(Debug)]
struct Tap {
    buffer: usize,
    pixels: usize,
    channels: usize,
    stride: usize,
}

/// What an image of one size needs on one number of threads.
#[derive(Debug)]
struct Layout {
    height: usize,
    width: usize,
    threads: usize,
    stages: Vec<Stage>,
    /// Stage and strip, in order.
    tasks: Vec<(usize, usize)>,
    /// First task of each stage.
    first: Vec<usize>,
    taps: Vec<Tap>,
    /// Lengths.
    buffers: Vec<usize>,
    scratch: usize,
    zeros: usize,
}

/// Values of scratch that the codes of `pixels` pixels of a convolution's input take, with their steps.
fn codes(op: Option<&Pointwise>, pixels: usize) -> usize {
    match op {
        Some(Pointwise::Int8(packed)) => pixels * (packed.inputs / 4 + 1),
        Some(Pointwise::Bf16(packed)) => codes16(pixels, packed.inputs) / 2,
        _ => 0,
    }
}

/// Scratch as bytes.
fn as_bytes(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: the same memory; bytes need no alignment, and whatever they hold is a value again.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// Lines of bfloat16, which lie in f32's memory.
#[cfg(target_arch = "x86_64")]
fn halves(values: &[f32]) -> &[u16] {
    // SAFETY: the same memory; halves need less alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), 2 * values.len()) }
}

/// As [`halves`].
#[cfg(target_arch = "x86_64")]
fn as_halves(values: &mut [f32]) -> &mut [u16] {
    // SAFETY: the same memory; halves need less alignment, and whatever they hold is a value again.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), 2 * values.len()) }
}

/// Expands pixels, which lie channels by channels, into `out`. `scratch` has room for what [`codes`] says.
///
/// # Safety
///
/// The processor has the instruction set of `V`.
#[inline(always)]
unsafe fn widen<V: Vector, const IN: u8>(op: &Pointwise, x: &[f32], scratch: &mut [f32], out: &mut [f32]) {
    let pixels = x.len() / op.inputs();
    // SAFETY: the caller's promise.
    unsafe {
        match (op, IN) {
            (Pointwise::F32(packed), F32 | INT8) => {
                let x = Pixels::new(x, op.inputs());
                for p in 0..packed.panels() {
                    panel::<V, false>(packed, p, pixels, x, None, Activation::Relu6, out);
                }
            }
            (Pointwise::Int8(packed), INT8) => {
                let (steps, codes) = scratch.split_at_mut(pixels);
                let codes = &mut as_bytes(codes)[..pixels * packed.inputs];
                encode::<V, true>(&x[..pixels * packed.inputs], packed, codes, steps);
                for p in 0..packed.panels() {
                    panel8::<V>(packed, p, pixels, Codes { codes, steps }, None, Activation::Relu6, out);
                }
            }
            #[cfg(target_arch = "x86_64")]
            (Pointwise::Bf16(packed), BF16) => {
                let codes = as_halves(scratch);
                encode16(&x[..pixels * packed.inputs], packed.inputs, codes);
                expand16(packed, pixels, codes, as_halves(out));
            }
            // No plan mixes them.
            _ => {}
        }
    }
}

/// Pixels of whole rows.
fn strips_of_rows(rows: usize, width: usize, threads: usize) -> Vec<Range<usize>> {
    // More strips than threads even out what else the machine does; each costs two rows.
    let n = if threads == 1 {
        1
    } else if rows >= 32 * threads {
        2 * threads
    } else {
        threads
    };
    let n = n.min(rows).max(1);
    (0..n).map(|i| rows * i / n * width..rows * (i + 1) / n * width).collect()
}

/// As many pixels for each thread: rows are few where this is asked for, and one more of them is much.
fn strips_of_pixels(pixels: usize, threads: usize) -> Vec<Range<usize>> {
    let n = threads.min(pixels.div_ceil(EIGHT)).max(1);
    let at = |i: usize| (pixels * i / n).next_multiple_of(EIGHT).min(pixels);
    (0..n).map(|i| at(i)..at(i + 1)).filter(|s| !s.is_empty()).collect()
}

impl Layout {
    /// Blocks write in turn to three buffers, taps to their own; whole hidden maps lie in two. A stage may write what the
    /// stage before the last read, for that is over when it begins.
    fn new(plan: &Plan, height: usize, width: usize, threads: usize) -> Self {
        let mut out = Self {
            height,
            width,
            threads,
            stages: Vec::new(),
            tasks: Vec::new(),
            first: Vec::new(),
            taps: Vec::new(),
            buffers: vec![0; 5],
            scratch: 0,
            zeros: 0,
        };
        let stem = (plan.pads)(height, width, 2).output(height, width, 2).unwrap_or((0, 0));
        let (mut h, mut w, mut input) = (stem.0, stem.1, None);
        for (at, block) in plan.blocks.iter().enumerate() {
            let hidden = block.depthwise.hidden();
            let pad = (plan.pads)(h, w, block.stride);
            let (oh, ow) = pad.output(h, w, block.stride).unwrap_or((0, 0));
            let outputs = block.project.outputs();
            let len = oh * ow * outputs;
            let output = if block.tap {
                out.buffers.push(len);
                out.taps.push(Tap { buffer: out.buffers.len() - 1, pixels: oh * ow, channels: block.outputs, stride: outputs });
                out.buffers.len() - 1
            } else {
                let turn = at % 3;
                out.buffers[turn] = out.buffers[turn].max(len);
                turn
            };
            let step = (GROUP / ow.max(1)).clamp(TOGETHER, 8).min(oh.max(1));
            let whole = block.expand.is_some() && 4 * h * w * hidden <= WHOLE;
            let stage = |work, out_width, strips| Stage {
                work,
                block: at,
                height: h,
                width: w,
                pad,
                out_width,
                input,
                hidden: 3 + at % 2,
                output,
                strips,
                step,
            };
            let narrowed = match &block.depthwise {
                Deepen::F32(_) => step * ow * hidden + codes(Some(&block.project), step * ow),
                Deepen::Bf16(_) => codes(Some(&block.project), step * ow),
            };
            if whole {
                out.buffers[3 + at % 2] = out.buffers[3 + at % 2].max(h * w * hidden);
                let strips = strips_of_pixels(h * w, threads);
                let longest = strips.iter().map(Range::len).max().unwrap_or(0);
                out.stages.push(stage(Work::Expand, w, strips));
                out.stages.push(stage(Work::Reduce, ow, strips_of_pixels(oh * ow, threads)));
                out.scratch = out.scratch.max(narrowed).max(codes(block.expand.as_ref(), longest));
            } else {
                let slots = (step - 1) * block.stride + 3;
                out.stages.push(stage(Work::Fused, ow, strips_of_rows(oh, ow, threads)));
                out.scratch = out.scratch.max(slots * w * hidden + narrowed.max(codes(block.expand.as_ref(), w)));
            }
            out.zeros = out.zeros.max(w * hidden);
            (h, w, input) = (oh, ow, Some(output));
        }
        for (s, stage) in out.stages.iter().enumerate() {
            out.first.push(out.tasks.len());
            out.tasks.extend((0..stage.strips.len()).map(|i| (s, i)));
        }
        out.zeros = out.zeros.max(width);
        out
    }
}

#[derive(Debug)]
struct Space {
    layout: Layout,
    buffers: Vec<Aligned<f32>>,
    /// One per thread.
    own: Vec<Own>,
    zeros: Vec<f32>,
}

/// What a thread works in.
#[derive(Debug)]
struct Own {
    scratch: Aligned<f32>,
    lines: Lines,
}

/// The last rows of a picture, each as three rows of f32.
#[derive(Debug, Default)]
struct Lines {
    ring: Vec<f32>,
    scratch: RowScratch,
}

/// Rows of the ring: those that a row of the stem sees, and one more, so that a row's place is found without a division.
const LINES: usize = 4;

impl Space {
    fn new(layout: Layout) -> Self {
        Self {
            buffers: layout.buffers.iter().map(|n| Aligned::new(*n)).collect(),
            own: (0..layout.threads).map(|_| Own { scratch: Aligned::new(layout.scratch), lines: Lines::default() }).collect(),
            zeros: vec![0.0; layout.zeros],
            layout,
        }
    }
}

#[derive(Clone, Copy)]
struct Raw {
    at: *mut f32,
    len: usize,
}

/// What all threads see of one image's run.
struct Shared<'a> {
    plan: &'a Plan,
    layout: &'a Layout,
    image: Input<'a>,
    zeros: &'a [f32],
    buffers: Vec<Raw>,
    next: AtomicUsize,
    /// Of every task how many pixels are done, from where it begins.
    done: Vec<AtomicUsize>,
    /// Of every stage the strips that are not.
    left: Vec<AtomicUsize>,
    failed: AtomicBool,
}

// SAFETY: the buffers behind the pointers outlive the run, and `pixels` and `pixels_mut` hand out pixels only by the rules that
// they state.
unsafe impl Sync for Shared<'_> {}

impl Shared<'_> {
    /// Values of some pixels of a buffer, `each` of one.
    ///
    /// # Safety
    ///
    /// No thread writes these pixels before the caller's strip is finished.
    #[inline(always)]
    unsafe fn pixels(&self, buffer: usize, each: usize, pixels: &Range<usize>) -> &[f32] {
        let Raw { at, len } = self.buffers[buffer];
        assert!(pixels.start <= pixels.end && pixels.end * each <= len, "plan: pixels");
        // SAFETY: within the buffer by the assertion, not written by the caller's promise.
        unsafe { std::slice::from_raw_parts(at.add(pixels.start * each), pixels.len() * each) }
    }

    /// # Safety
    ///
    /// No other thread reads or writes these pixels before the caller's strip is finished, nor does the caller elsewhere.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // the pixels of one buffer are shared out among strips
    unsafe fn pixels_mut(&self, buffer: usize, each: usize, pixels: &Range<usize>) -> &mut [f32] {
        let Raw { at, len } = self.buffers[buffer];
        assert!(pixels.start <= pixels.end && pixels.end * each <= len, "plan: pixels");
        // SAFETY: within the buffer by the assertion, the caller's alone by its promise.
        unsafe { std::slice::from_raw_parts_mut(at.add(pixels.start * each), pixels.len() * each) }
    }

    /// Waits until what pixels `out` of a stage read is there. False: another thread failed.
    fn ready(&self, stage: usize, out: &Range<usize>) -> bool {
        let Some(before) = stage.checked_sub(1) else { return true };
        let now = &self.layout.stages[stage];
        let reads = now.reads(self.plan.blocks[now.block].stride, out);
        for (i, strip) in self.layout.stages[before].strips.iter().enumerate() {
            let (from, to) = (reads.start.max(strip.start), reads.end.min(strip.end));
            if from < to {
                let enough = if is_from_end(before, i) { strip.end - from } else { to - strip.start };
                let done = &self.done[self.layout.first[before] + i];
                if !self.until(&|| done.load(Ordering::Acquire) >= enough) {
                    return false;
                }
            }
        }
        true
    }

    /// Waits until what a stage writes is not read any more: with three buffers, it was by the stage before the last at the latest.
    /// False: another thread failed.
    fn free(&self, stage: usize) -> bool {
        stage < 2 || self.until(&|| self.left[stage - 2].load(Ordering::Acquire) == 0)
    }

    fn until(&self, done: &dyn Fn() -> bool) -> bool {
        let mut spins = 0u32;
        while !done() {
            if self.failed.load(Ordering::Relaxed) {
                return false;
            }
            spins += 1;
            if spins.is_multiple_of(1024) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        true
    }
}

/// Tells the others when a strip panics, so that none waits for it for ever.
struct Watch<'a>(&'a AtomicBool);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

/// Whether this processor sums 8-bit products.
fn vnni() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512vnni");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Whether it does so in vectors of AVX2's length, too.
fn avx_vnni() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avxvnni");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512vnni,avx2,fma")]
unsafe fn work_vnni(shared: &Shared, own: &mut Own) {
    // SAFETY: the features of this function.
    unsafe { work::<std::arch::x86_64::__m512, INT8>(shared, own) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
unsafe fn work_avx512(shared: &Shared, own: &mut Own) {
    // SAFETY: the features of this function.
    unsafe { work::<std::arch::x86_64::__m512, F32>(shared, own) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512bf16,avx2,fma")]
unsafe fn work_bf16(shared: &Shared, own: &mut Own) {
    // SAFETY: the features of this function, and tiles by the caller's promise.
    unsafe {
        let _tiles = shared.plan.tiles.then(|| Tiles::new());
        work::<std::arch::x86_64::__m512, BF16>(shared, own);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn work_avx2<const IN: u8>(shared: &Shared, own: &mut Own) {
    // SAFETY: the features of this function.
    unsafe { work::<std::arch::x86_64::__m256, IN>(shared, own) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avxvnni,avx2,fma")]
unsafe fn work_avx_vnni(shared: &Shared, own: &mut Own) {
    // SAFETY: the features of this function.
    unsafe { work::<super::vector::Vnni256, INT8>(shared, own) }
}

// By itself, as the others are: inlined into both of its callers it is half of what the compiler makes of this file.
#[inline(never)]
fn work_portable<const IN: u8>(shared: &Shared, own: &mut Own) {
    // SAFETY: plain arrays need no instruction set.
    unsafe { work::<[f32; 4], IN>(shared, own) }
}

/// Takes strips until there are none.
///
/// # Safety
///
/// The processor has the instruction set of `V`.
#[inline(always)]
unsafe fn work<V: Vector, const IN: u8>(shared: &Shared, own: &mut Own) {
    let _watch = Watch(&shared.failed);
    let (scratch, lines) = (own.scratch.values_mut(), &mut own.lines);
    loop {
        let task = shared.next.fetch_add(1, Ordering::Relaxed);
        let Some((stage, strip)) = shared.layout.tasks.get(task).copied() else { return };
        let now = &shared.layout.stages[stage];
        let from_end = is_from_end(stage, strip);
        let mut left = now.strips[strip].clone();
        let mut ring = Ring::new(from_end);
        if !shared.free(stage) {
            return;
        }
        while let Some(pixels) = now.next(&mut left, from_end) {
            if !shared.ready(stage, &pixels) {
                return;
            }
            // SAFETY: the instruction set by the caller's promise; `ready` has seen that the pixels read are done, `free` that nobody
            // reads what is written, and each strip writes its own pixels.
            unsafe {
                match now.work {
                    Work::Fused => fused::<V, IN>(shared, now, &pixels, &mut ring, scratch, lines),
                    Work::Expand => expand::<V, IN>(shared, now, &pixels, scratch),
                    Work::Reduce => reduce::<V, IN>(shared, now, &pixels, scratch),
                }
            }
            shared.done[task].fetch_add(pixels.len(), Ordering::Release);
        }
        shared.left[stage].fetch_sub(1, Ordering::AcqRel);
    }
}

/// # Safety
///
/// As [`work`], and what the pixels read is ready.
#[inline(always)]
unsafe fn expand<V: Vector, const IN: u8>(shared: &Shared, stage: &Stage, pixels: &Range<usize>, scratch: &mut [f32]) {
    let block = &shared.plan.blocks[stage.block];
    let (Some(op), Some(input)) = (&block.expand, stage.input) else { return };
    // SAFETY: the caller's promise.
    unsafe {
        let x = shared.pixels(input, op.inputs(), pixels);
        let out = shared.pixels_mut(stage.hidden, block.depthwise.hidden(), pixels);
        widen::<V, IN>(op, x, scratch, out);
    }
}

/// # Safety
///
/// As [`work`], and what the pixels read is ready.
#[inline(always)]
unsafe fn reduce<V: Vector, const IN: u8>(shared: &Shared, stage: &Stage, pixels: &Range<usize>, scratch: &mut [f32]) {
    let block = &shared.plan.blocks[stage.block];
    let row = stage.width * block.depthwise.hidden();
    let read = stage.reads(block.stride, pixels);
    // SAFETY: the caller's promise.
    unsafe {
        let hidden = shared.pixels(stage.hidden, block.depthwise.hidden(), &read);
        let of = |y: usize| &hidden[y * row - read.start / stage.width * row..][..row];
        narrow::<V, IN>(shared, stage, block, pixels.clone(), &of, scratch);
    }
}

/// What is in a strip's ring.
struct Ring {
    /// Hidden rows.
    rows: Range<usize>,
    from_end: bool,
    /// Row of the image that the stem has not seen.
    line: usize,
}

impl Ring {
    fn new(from_end: bool) -> Self {
        let at = if from_end { usize::MAX } else { 0 };
        Self { rows: at..at, from_end, line: 0 }
    }

    /// Those of the rows that are needed now that are not in it; they are from now on.
    fn fresh(&mut self, need: Range<usize>) -> Range<usize> {
        let had = std::mem::replace(&mut self.rows, need.clone());
        if self.from_end {
            need.start..need.end.min(had.start)
        } else {
            need.start.max(had.end)..need.end
        }
    }
}

/// # Safety
///
/// As [`work`], and what the pixels read is ready.
#[inline(always)]
unsafe fn fused<V: Vector, const IN: u8>(
    shared: &Shared,
    stage: &Stage,
    pixels: &Range<usize>,
    ring: &mut Ring,
    scratch: &mut [f32],
    lines: &mut Lines,
) {
    let block = &shared.plan.blocks[stage.block];
    let row = stage.width * block.depthwise.hidden();
    let slots = (stage.step - 1) * block.stride + 3;
    let (rows, scratch) = scratch.split_at_mut(slots * row);
    let fresh = ring.fresh(stage.reads_rows(block.stride, &(pixels.start / stage.out_width..pixels.end / stage.out_width)));
    // SAFETY: the caller's promise.
    unsafe {
        match (&block.expand, stage.input) {
            (Some(op @ Pointwise::F32(packed)), Some(input)) if IN != BF16 => {
                // One panel's weights for all rows.
                for p in 0..packed.panels() {
                    for y in fresh.clone() {
                        let x = shared.pixels(input, op.inputs(), &(y * stage.width..(y + 1) * stage.width));
                        let x = Pixels::new(x, op.inputs());
                        panel::<V, false>(packed, p, stage.width, x, None, Activation::Relu6, &mut rows[y % slots * row..][..row]);
                    }
                }
            }
            (Some(op), Some(input)) => {
                for y in fresh {
                    let x = shared.pixels(input, op.inputs(), &(y * stage.width..(y + 1) * stage.width));
                    widen::<V, IN>(op, x, scratch, &mut rows[y % slots * row..][..row]);
                }
            }
            _ => {
                for y in fresh {
                    stem::<V>(shared, stage, y, (lines, &mut ring.line), &mut rows[y % slots * row..][..row]);
                }
            }
        }
        let of = |y: usize| &rows[y % slots * row..][..row];
        narrow::<V, IN>(shared, stage, block, pixels.clone(), &of, scratch);
    }
}

/// Row `y` of the stem. Of a picture, the rows before `next` are in `lines` where `y` sees them.
///
/// # Safety
///
/// As [`work`].
#[inline(always)]
unsafe fn stem<V: Vector>(shared: &Shared, stage: &Stage, y: usize, (lines, next): (&mut Lines, &mut usize), out: &mut [f32]) {
    let (height, width) = (shared.layout.height, shared.layout.width);
    let pad = (shared.plan.pads)(height, width, 2);
    if let Input::Picture(picture) = shared.image {
        lines.ring.resize(LINES * 3 * width, 0.0);
        let seen = (2 * y).saturating_sub(pad.top)..(2 * y + 3).saturating_sub(pad.top).min(height);
        for at in seen.start.max(*next)..seen.end {
            picture.row(at, &mut lines.scratch, &mut lines.ring[at % LINES * 3 * width..][..3 * width]);
        }
        *next = seen.end;
    }
    let row = |k: usize| {
        let (plane, at) = (k / 3, (2 * y + k % 3).wrapping_sub(pad.top));
        if at >= height {
            return &shared.zeros[..width];
        }
        match shared.image {
            Input::Planes(values) => &values[(plane * height + at) * width..][..width],
            Input::Picture(_) => &lines.ring[(at % LINES * 3 + plane) * width..][..width],
        }
    };
    // SAFETY: the caller's promise.
    unsafe { stem_row::<V>(&shared.plan.stem, pad.left, width, std::array::from_fn(row), stage.width, out) }
}

/// Depthwise convolution and projection of output pixels, at most [`Stage::step`] rows of them, from hidden rows that `of` returns.
///
/// # Safety
///
/// As [`work`], and the pixels are of the caller's strip.
#[inline(always)]
unsafe fn narrow<'a, V: Vector, const IN: u8>(
    shared: &'a Shared,
    stage: &Stage,
    block: &Block,
    at: Range<usize>,
    of: &dyn Fn(usize) -> &'a [f32],
    scratch: &mut [f32],
) {
    let (pixels, channels, hidden) = (at.len(), block.project.outputs(), block.depthwise.hidden());
    // SAFETY: the caller's promise; the input's pixels are read, the output's written by this strip alone.
    unsafe {
        let residual = match stage.input {
            Some(input) if block.residual => Some(shared.pixels(input, channels, &at)),
            _ => None,
        };
        let out = shared.pixels_mut(stage.output, channels, &at);
        #[cfg(target_arch = "x86_64")]
        if let (Pointwise::Bf16(packed), BF16) = (&block.project, IN) {
            deepen::<V, IN>(shared, stage, block, at, of, &mut scratch[..pixels * hidden]);
            project16(packed, pixels, as_halves(scratch), residual, out);
            return;
        }
        let (x, rest) = scratch.split_at_mut(pixels * hidden);
        deepen::<V, IN>(shared, stage, block, at, of, x);
        match (&block.project, IN) {
            (Pointwise::F32(packed), _) => {
                let residual = residual.map(|data| Pixels::new(data, channels));
                for p in 0..packed.panels() {
                    panel::<V, true>(packed, p, pixels, Pixels::new(x, hidden), residual, Activation::None, out);
                }
            }
            (Pointwise::Int8(packed), INT8) => {
                let (steps, codes) = rest.split_at_mut(pixels);
                let codes = &mut as_bytes(codes)[..pixels * hidden];
                encode::<V, false>(x, packed, codes, steps);
                for p in 0..packed.panels() {
                    panel8::<V>(packed, p, pixels, Codes { codes, steps }, residual, Activation::None, out);
                }
            }
            // No plan mixes them.
            _ => {}
        }
    }
}

/// Depthwise convolution of output pixels into `out`.
///
/// # Safety
///
/// As [`narrow`].
#[inline(always)]
unsafe fn deepen<'a, V: Vector, const IN: u8>(
    shared: &'a Shared,
    stage: &Stage,
    block: &Block,
    mut pixels: Range<usize>,
    of: &dyn Fn(usize) -> &'a [f32],
    mut out: &mut [f32],
) {
    let (hidden, stride) = (block.depthwise.hidden(), block.stride);
    while !pixels.is_empty() {
        let (y, x) = (pixels.start / stage.out_width, pixels.start % stage.out_width);
        // Whole rows together, or what there is of one.
        let (together, across) = match pixels.len() / stage.out_width {
            rows @ 1.. if x == 0 => (rows.min(TOGETHER), stage.out_width),
            _ => (1, (stage.out_width - x).min(pixels.len())),
        };
        // The input's first column, and how many are missing to the left of it.
        let column = (x * stride).saturating_sub(stage.pad.left);
        let left = (column + stage.pad.left) - x * stride;
        let mut seen: [&[f32]; 2 * (TOGETHER - 1) + 3] = Default::default();
        let seen = &mut seen[..(together - 1) * stride + 3];
        for (k, row) in seen.iter_mut().enumerate() {
            let at = (y * stride + k).wrapping_sub(stage.pad.top);
            let whole = if at < stage.height { of(at) } else { &shared.zeros[..stage.width * hidden] };
            *row = &whole[column * hidden..];
        }
        let (now, rest) = out.split_at_mut(together * across * hidden);
        // SAFETY: the caller's promise.
        unsafe {
            match &block.depthwise {
                Deepen::F32(op) => depthwise_rows::<V>(op, stride, left, stage.width - column, seen, across, now),
                #[cfg(target_arch = "x86_64")]
                Deepen::Bf16(op) if IN == BF16 => {
                    let mut lines: [&[u16]; 2 * (TOGETHER - 1) + 3] = Default::default();
                    lines.iter_mut().zip(&*seen).for_each(|(to, row)| *to = halves(row));
                    depthwise16(op, stride, left, stage.width - column, &lines[..seen.len()], across, as_halves(now));
                }
                // No plan mixes them.
                Deepen::Bf16(_) => {}
            }
        }
        pixels.start += together * across;
        out = rest;
    }
}

/// One value per channel. Sums of 64 pixels are added up, so that f32 suffices.
fn pool(isa: Isa, values: &[f32], tap: &Tap, pooling: Pooling) -> Vec<f32> {
    let mut sums = vec![0f32; tap.stride];
    let mut part = vec![0f32; tap.stride];
    for pixels in values.chunks(64 * tap.stride) {
        part.fill(0.0);
        {
            let part = &mut part[..];
            dispatch!(isa, add_powers(pixels: &[f32], part: &mut [f32], pooling: Pooling));
        }
        sums.iter_mut().zip(&part).for_each(|(s, p)| *s += p);
    }
    let mean = |s: &f32| s / tap.pixels as f32;
    let of = |s: &f32| match pooling {
        Pooling::Average => mean(s),
        Pooling::Gem { p } => mean(s).powf(1.0 / p as f32),
    };
    sums[..tap.channels].iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Seen;
    use super::*;
    use proptest::prelude::*;

    fn noise(seed: u64, n: usize, scale: f32) -> Vec<f32> {
        (0..n as u64).map(|i| crate::test_noise(seed, i) * scale).collect()
    }

    fn same(h: usize, w: usize, s: usize) -> Pad {
        Pad::same(h, w, s)
    }

    fn one(_: usize, _: usize, _: usize) -> Pad {
        Pad::ONE
    }

    /// C x H x W.
    #[derive(Clone)]
    struct Map {
        c: usize,
        h: usize,
        w: usize,
        data: Vec<f64>,
    }

    fn relu6(v: f64) -> f64 {
        v.clamp(0.0, 6.0)
    }

    /// The definition: every output channel sees `per` input channels through a k x k kernel.
    fn convolve(x: &Map, weight: &[f32], bias: &[f32], k: usize, stride: usize, pad: Pad, per: usize) -> Map {
        let (h, w) = if k == 1 { (x.h, x.w) } else { pad.output(x.h, x.w, stride).unwrap() };
        let (top, left) = if k == 1 { (0, 0) } else { (pad.top, pad.left) };
        let mut data = Vec::with_capacity(bias.len() * h * w);
        for (o, b) in bias.iter().enumerate() {
            for y in 0..h {
                for z in 0..w {
                    let mut sum = f64::from(*b);
                    for i in 0..per {
                        let c = if per == x.c { i } else { o };
                        for (t, (ky, kx)) in (0..k * k).map(|t| (t, (t / k, t % k))) {
                            let (sy, sx) = ((y * stride + ky).wrapping_sub(top), (z * stride + kx).wrapping_sub(left));
                            if sy < x.h && sx < x.w {
                                sum += f64::from(weight[(o * per + i) * k * k + t]) * x.data[(c * x.h + sy) * x.w + sx];
                            }
                        }
                    }
                    data.push(sum);
                }
            }
        }
        Map { c: bias.len(), h, w, data }
    }

    struct Net {
        stem: (Vec<f32>, Vec<f32>),
        /// Expansion, depthwise, projection, stride.
        blocks: Vec<[(Vec<f32>, Vec<f32>); 3]>,
        strides: Vec<usize>,
    }

    impl Net {
        /// Blocks of these hidden channels, output channels and strides.
        fn new(seed: u64, shape: &[(usize, usize, usize)]) -> Self {
            let layer = |seed: u64, o: usize, per: usize| (noise(seed, o * per, (2.0 / per as f32).sqrt()), noise(seed + 1, o, 0.3));
            let mut inputs = 32;
            let mut blocks = Vec::new();
            for (at, (hidden, outputs, _)) in shape.iter().enumerate() {
                let s = seed + 10 * at as u64 + 10;
                let hidden = if at == 0 { 32 } else { *hidden };
                blocks.push([layer(s, hidden, inputs), layer(s + 2, hidden, 9), layer(s + 4, *outputs, hidden)]);
                inputs = *outputs;
            }
            Self { stem: layer(seed, 32, 27), blocks, strides: shape.iter().map(|s| s.2).collect() }
        }

        fn residual(&self, at: usize) -> bool {
            at > 0 && self.strides[at] == 1 && self.blocks[at][2].1.len() == self.blocks[at - 1][2].1.len()
        }

        fn plan(&self, isa: Isa, pads: fn(usize, usize, usize) -> Pad) -> Plan {
            self.plan_in(In::F32, isa, pads)
        }

        fn plan_in(&self, computes: In, isa: Isa, pads: fn(usize, usize, usize) -> Pad) -> Plan {
            self.plan_by(Products::detect(), computes, isa, pads)
        }

        fn plan_by(&self, products: Option<Products>, computes: In, isa: Isa, pads: fn(usize, usize, usize) -> Pad) -> Plan {
            self.plan_of(products.filter(|_| computes == In::Bf16), &|_, _| computes == In::Int8, isa, pads)
        }

        /// `in_8_bits`: whether a block's expansion (0) or projection (1) is.
        fn plan_of(
            &self,
            products: Option<Products>,
            in_8_bits: &dyn Fn(usize, usize) -> bool,
            isa: Isa,
            pads: fn(usize, usize, usize) -> Pad,
        ) -> Plan {
            fn slices(w: &(Vec<f32>, Vec<f32>)) -> (&[f32], &[f32]) {
                (&w.0, &w.1)
            }
            let of = |w: &(Vec<f32>, Vec<f32>)| Rounded::new(&w.0, &w.1, &Seen::default());
            let rounded: Vec<_> = self.blocks.iter().map(|[expand, _, project]| (of(expand), of(project))).collect();
            let mut blocks = Vec::new();
            for (at, [expand, depthwise, project]) in self.blocks.iter().enumerate() {
                blocks.push(PlanBlock {
                    expand: (at > 0).then(|| slices(expand)),
                    depthwise: slices(depthwise),
                    project: slices(project),
                    stride: self.strides[at],
                    residual: self.residual(at),
                    tap: at % 2 == 1 || at + 1 == self.blocks.len(),
                    rounded: ((at > 0 && in_8_bits(at, 0)).then_some(&rounded[at].0), in_8_bits(at, 1).then_some(&rounded[at].1)),
                });
            }
            Plan::on(isa, products, slices(&self.stem), &blocks, pads)
        }

        fn taps(&self, image: &[f32], h: usize, w: usize, pads: fn(usize, usize, usize) -> Pad) -> Vec<Map> {
            let image = Map { c: 3, h, w, data: image.iter().map(|v| f64::from(*v)).collect() };
            let active = |mut m: Map| {
                m.data.iter_mut().for_each(|v| *v = relu6(*v));
                m
            };
            let mut x = active(convolve(&image, &self.stem.0, &self.stem.1, 3, 2, pads(h, w, 2), 3));
            let mut out = Vec::new();
            for (at, [expand, depthwise, project]) in self.blocks.iter().enumerate() {
                let wide = if at > 0 { active(convolve(&x, &expand.0, &expand.1, 1, 1, Pad::ONE, x.c)) } else { x.clone() };
                let pad = pads(wide.h, wide.w, self.strides[at]);
                let deep = active(convolve(&wide, &depthwise.0, &depthwise.1, 3, self.strides[at], pad, 1));
                let mut y = convolve(&deep, &project.0, &project.1, 1, 1, Pad::ONE, deep.c);
                if self.residual(at) {
                    y.data.iter_mut().zip(&x.data).for_each(|(y, x)| *y += x);
                }
                if at % 2 == 1 || at + 1 == self.blocks.len() {
                    out.push(y.clone());
                }
                x = y;
            }
            out
        }
    }

    fn distance(got: &[f32], want: &Map) -> f64 {
        got.iter().zip(&want.data).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>().sqrt()
    }

    fn length(map: &Map) -> f64 {
        map.data.iter().map(|v| v * v).sum::<f64>().sqrt()
    }

    fn on_threads<T: Send>(n: usize, f: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(f)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Equal to the definition on every instruction set, and to itself on every number of threads, at any size and
        /// channel count, with both kinds of border. Channels of 16 to 64 rows and more make both kinds of stages.
        #[test]
        fn equals_the_definition(
            seed in 0u64..1000,
            h in 3usize..70, w in 3usize..70,
            shape in prop::collection::vec((1usize..70, 1usize..70, 1usize..3), 1..5),
            copies in prop::collection::vec(any::<bool>(), 5),
            tf: bool,
        ) {
            // Residuals come of equal channels.
            let mut shape = shape;
            for at in 1..shape.len() {
                if copies[at] {
                    shape[at].1 = shape[at - 1].1;
                }
            }
            let pads = if tf { same } else { one };
            let net = Net::new(seed, &shape);
            let image = noise(seed + 7, 3 * h * w, 1.0);
            let want = net.taps(&image, h, w, pads);
            for isa in Isa::available() {
                let plan = net.plan(isa, pads);
                let got = on_threads(1, || plan.taps(&image, h, w));
                prop_assert_eq!(got.len(), want.len());
                for (got, want) in got.iter().zip(&want) {
                    prop_assert_eq!(got.len(), want.data.len());
                    let top = want.data.iter().fold(1.0f64, |m, v| m.max(v.abs()));
                    let worst = got.iter().zip(&want.data).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                    prop_assert!(worst < 2e-5 * top, "{isa:?}: {worst} of {top}");
                }
                for threads in [2, 3, 5] {
                    let again = on_threads(threads, || [plan.taps(&image, h, w), plan.taps(&image, h, w)]);
                    prop_assert!(again.iter().all(|a| *a == got), "{isa:?} on {threads} threads");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// In 8 bits near the definition (noise of 8 bits in each of the few layers), the same on every number of threads, and
        /// on every instruction set but for the rounding of the depthwise convolutions between them.
        #[test]
        fn int8_is_near_the_definition(
            seed in 0u64..1000,
            h in 3usize..70, w in 3usize..70,
            shape in prop::collection::vec((1usize..70, 1usize..70, 1usize..3), 1..4),
            tf: bool,
        ) {
            let pads = if tf { same } else { one };
            let net = Net::new(seed, &shape);
            let image = noise(seed + 7, 3 * h * w, 1.0);
            let want = net.taps(&image, h, w, pads);
            let mut first: Option<Vec<Vec<f32>>> = None;
            for isa in Isa::available() {
                let mut plan = net.plan_in(In::Int8, isa, pads);
                let got = on_threads(1, || plan.taps(&image, h, w));
                // With AVX-VNNI the same sums sooner.
                plan.avx_vnni = false;
                prop_assert!(on_threads(1, || plan.taps(&image, h, w)) == got, "{isa:?} without AVX-VNNI");
                for (at, (got, want)) in got.iter().zip(&want).enumerate() {
                    prop_assert_eq!(got.len(), want.data.len());
                    let error = |other: &dyn Fn(usize) -> f64| got.iter().enumerate().map(|(i, a)| (f64::from(*a) - other(i)).powi(2)).sum::<f64>().sqrt();
                    let length = length(want);
                    prop_assert!(error(&|i| want.data[i]) < 0.05 * length + 0.05, "{isa:?}: {} of {length}", error(&|i| want.data[i]));
                    if let Some(first) = &first {
                        prop_assert!(error(&|i| f64::from(first[at][i])) < 0.02 * length + 0.02, "{isa:?}");
                    }
                }
                for threads in [2, 3] {
                    prop_assert!(on_threads(threads, || plan.taps(&image, h, w)) == got, "{isa:?} on {threads} threads");
                }
                first.get_or_insert(got);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// Where some convolutions are in 8 bits, and the others in f32: near the definition, and the same on every number of threads.
        #[test]
        fn some_in_8_bits_and_some_not_is_near_the_definition(
            seed in 0u64..1000,
            h in 3usize..70, w in 3usize..70,
            shape in prop::collection::vec((1usize..70, 1usize..70, 1usize..3), 1..5),
            in_8_bits in prop::collection::vec(any::<[bool; 2]>(), 5),
            tf: bool,
        ) {
            let pads = if tf { same } else { one };
            let net = Net::new(seed, &shape);
            let image = noise(seed + 7, 3 * h * w, 1.0);
            let want = net.taps(&image, h, w, pads);
            for isa in Isa::available() {
                let plan = net.plan_of(None, &|at, kind| in_8_bits[at][kind], isa, pads);
                let got = on_threads(1, || plan.taps(&image, h, w));
                for (got, want) in got.iter().zip(&want) {
                    prop_assert_eq!(got.len(), want.data.len());
                    let (error, length) = (distance(got, want), length(want));
                    prop_assert!(error < 0.05 * length + 0.05, "{isa:?}: {error} of {length}");
                }
                for threads in [2, 3] {
                    prop_assert!(on_threads(threads, || plan.taps(&image, h, w)) == got, "{isa:?} on {threads} threads");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// In bfloat16 near the definition, by tiles and by vectors, and the same on every number of threads; without either it is f32 to
        /// the last bit.
        #[test]
        fn bf16_is_near_the_definition(
            seed in 0u64..1000,
            h in 3usize..70, w in 3usize..70,
            shape in prop::collection::vec((1usize..70, 1usize..70, 1usize..3), 1..4),
            tf: bool,
        ) {
            let pads = if tf { same } else { one };
            let net = Net::new(seed, &shape);
            let image = noise(seed + 7, 3 * h * w, 1.0);
            let want = net.taps(&image, h, w, pads);
            let products: Vec<_> = Products::available().map(Some).chain([None]).collect();
            for (isa, products) in Isa::available().into_iter().flat_map(|isa| products.iter().map(move |p| (isa, *p))) {
                let plan = net.plan_by(products, In::Bf16, isa, pads);
                prop_assert_eq!(plan.is_bf16(), isa == Isa::Avx512 && products.is_some());
                let got = on_threads(1, || plan.taps(&image, h, w));
                if !plan.is_bf16() {
                    prop_assert!(got == on_threads(1, || net.plan(isa, pads).taps(&image, h, w)));
                    continue;
                }
                for (got, want) in got.iter().zip(&want) {
                    prop_assert_eq!(got.len(), want.data.len());
                    let (error, length) = (distance(got, want), length(want));
                    prop_assert!(error < 0.01 * length + 0.01, "{error} of {length}");
                }
                for threads in [2, 3, 5] {
                    let again = on_threads(threads, || [plan.taps(&image, h, w), plan.taps(&image, h, w)]);
                    prop_assert!(again.iter().all(|a| *a == got), "on {threads} threads");
                }
            }
        }
    }

    /// Large enough for rings and several strips a thread.
    #[test]
    fn large_maps_by_rows_equal_the_definition_on_any_number_of_threads() {
        let net = Net::new(3, &[(32, 16, 1), (96, 24, 2), (144, 24, 1), (144, 32, 2), (192, 32, 1)]);
        let (h, w) = (300, 420);
        let image = noise(9, 3 * h * w, 1.0);
        let want = net.taps(&image, h, w, one);
        for isa in Isa::available() {
            let plan = net.plan(isa, one);
            let got = on_threads(1, || plan.taps(&image, h, w));
            for (got, want) in got.iter().zip(&want) {
                let top = want.data.iter().fold(1.0f64, |m, v| m.max(v.abs()));
                let worst = got.iter().zip(&want.data).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                assert!(worst < 2e-5 * top, "{isa:?}: {worst} of {top}");
            }
            for threads in [2, 4] {
                assert!(on_threads(threads, || plan.taps(&image, h, w)) == got);
            }
        }
        let plan = net.plan_in(In::Bf16, Isa::detect(), one);
        let got = on_threads(1, || plan.taps(&image, h, w));
        for (got, want) in got.iter().zip(&want) {
            assert!(distance(got, want) < 0.01 * length(want), "{} of {}", distance(got, want), length(want));
        }
        for threads in [2, 4] {
            assert!(on_threads(threads, || plan.taps(&image, h, w)) == got);
        }
    }

    #[test]
    fn nan_and_infinity_reach_the_taps_that_they_should() {
        let net = Net::new(5, &[(32, 16, 1), (40, 24, 2), (48, 24, 1)]);
        let (h, w) = (33, 47);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut image = noise(1, 3 * h * w, 1.0);
            image[(h / 2) * w + w / 2] = bad;
            let want = net.taps(&image, h, w, one);
            for isa in Isa::available() {
                let got = net.plan(isa, one).taps(&image, h, w);
                for (got, want) in got.iter().zip(&want) {
                    let pairs = got.iter().zip(&want.data);
                    assert!(pairs.clone().all(|(a, b)| a.is_nan() == b.is_nan()), "{isa:?}");
                    assert!(pairs.filter(|(a, _)| !a.is_nan()).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-3), "{isa:?}");
                }
                let coarse = net.plan_in(In::Bf16, isa, one).taps(&image, h, w);
                assert!(coarse.iter().flatten().zip(got.iter().flatten()).all(|(a, b)| a.is_nan() == b.is_nan()), "{isa:?} in bf16");
                assert_eq!(got[0].iter().any(|v| v.is_nan()), bad.is_nan());
            }
        }
    }

    #[test]
    fn images_described_at_once_and_sizes_in_turn_do_not_mix() {
        use rayon::prelude::*;
        let net = Net::new(6, &[(32, 16, 1), (40, 24, 2), (48, 24, 1)]);
        let plan = net.plan(Isa::detect(), same);
        let sizes = [(40, 56), (33, 20), (64, 64)];
        let gem = Pooling::Gem { p: 3.0 };
        let image = |i: u64, (h, w): (usize, usize)| noise(i, 3 * h * w, 1.0);
        let alone: Vec<_> = (0..24u64)
            .map(|i| sizes[i as usize % 3])
            .enumerate()
            .map(|(i, s)| plan.pooled(Input::Planes(&image(i as u64, s)), s.0, s.1, gem))
            .collect();
        let together: Vec<_> = on_threads(4, || {
            (0..24u64)
                .into_par_iter()
                .map(|i| {
                    plan.pooled(Input::Planes(&image(i, sizes[i as usize % 3])), sizes[i as usize % 3].0, sizes[i as usize % 3].1, gem)
                })
                .collect()
        });
        assert!(alone == together);
    }

    #[test]
    fn pooling_is_the_layers() {
        let values = noise(4, 48 * 150, 1.0);
        let tap = Tap { buffer: 0, pixels: 150, channels: 33, stride: 48 };
        let map: Vec<f32> = (0..33).flat_map(|c| (0..150).map(|p| values[p * 48 + c]).collect::<Vec<_>>()).collect();
        let map = candle_core::Tensor::from_vec(map, (1, 33, 10, 15), &candle_core::Device::Cpu).unwrap();
        for pooling in [Pooling::Average, Pooling::Gem { p: 3.0 }, Pooling::Gem { p: 1.0 }, Pooling::Gem { p: 4.5 }] {
            let want = pooling.pool(&map).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let got = pool(Isa::detect(), &values, &tap, pooling);
            assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 2e-5), "{pooling:?}");
        }
    }
}
