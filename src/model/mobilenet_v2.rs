//! MobileNetV2 1.0 (<https://arxiv.org/abs/1801.04381>), truncated after its 320-channel stage, with
//! three taps: the rgb branch of StructVPR (CVPR 2023, section 3; <https://arxiv.org/abs/2212.00937>).
//!
//! Batch norm is folded before the network is built, so each convolution is weight, bias and
//! activation. 1x1 convolutions are matrix products, depthwise ones our own op.

#[cfg(any(test, feature = "cuda"))]
use super::kernels::gpu::{GpuPlan, Machine};
use super::kernels::{bf16, bias_act, depthwise3x3, Activation, Pad, Plan, PlanBlock, Rounded, Seen};
use super::pooling::{l2_normalize, Pooling};
use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One stage: expansion factor, output channels, number of blocks, stride of the first.
type Stage = (usize, usize, usize, usize);

/// The stages of the MobileNetV2 paper's table 2, without the last 1x1 convolution.
const STAGES: [Stage; 7] = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)];

/// Channels after the stem.
const STEM: usize = 32;

/// Blocks (counting from 1, as torchvision's `features.N`) whose outputs are tapped: the ends of
/// the 32-channel (/8), 96-channel (/16) and 320-channel (/32) stages. [inferred: 32 + 96 + 320 is
/// the only subset of the stages that gives the paper's 448]
pub const TAPS: [usize; 3] = [6, 13, 17];

/// Channels of the taps.
#[cfg(any(test, feature = "cuda"))]
pub(super) const TAP_CHANNELS: [usize; 3] = [32, 96, 320];

/// Dimensions of the global descriptor [paper].
pub const DIM: usize = 448;

/// Smallest height and width that leave something at /32.
pub const MIN_SIDE: usize = 32;

/// How a 3x3 kernel's border is padded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Padding {
    /// One on each side (PyTorch).
    Symmetric,
    /// TensorFlow's SAME: at stride 2 the odd row and column are at the bottom and the right.
    Same,
}

impl Padding {
    fn of(self, height: usize, width: usize, stride: usize) -> Pad {
        match self {
            Self::Symmetric => Pad::ONE,
            Self::Same => Pad::same(height, width, stride),
        }
    }
}

/// What one convolution is, in network order.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvSpec {
    /// Our name, e.g. `blocks.3.expand`; `.weight` and `.bias` follow.
    pub name: String,
    /// torchvision's name of the convolution, e.g. `features.3.conv.0.0`.
    pub torchvision: String,
    /// torchvision's name of the batch norm behind it.
    pub torchvision_norm: String,
    /// Shape of the weight, O x I/groups x K x K.
    pub shape: [usize; 4],
}

impl ConvSpec {
    /// Whether it is a 1x1 convolution.
    pub fn is_pointwise(&self) -> bool {
        self.shape[2..] == [1, 1]
    }
}

/// All convolutions of the truncated network in order: 50 (stem, then expand, depthwise, project).
pub fn conv_specs() -> Vec<ConvSpec> {
    let spec = |name: String, conv: String, norm: String, shape| ConvSpec { name, torchvision: conv, torchvision_norm: norm, shape };
    let mut all = vec![spec("stem".into(), "features.0.0".into(), "features.0.1".into(), [STEM, 3, 3, 3])];
    for b in blocks() {
        let (n, hidden) = (b.number, b.hidden);
        let f = format!("features.{n}.conv");
        let mut at = 0;
        if b.expand {
            all.push(spec(format!("blocks.{n}.expand"), format!("{f}.0.0"), format!("{f}.0.1"), [hidden, b.input, 1, 1]));
            at = 1;
        }
        all.push(spec(format!("blocks.{n}.depthwise"), format!("{f}.{at}.0"), format!("{f}.{at}.1"), [hidden, 1, 3, 3]));
        all.push(spec(format!("blocks.{n}.project"), format!("{f}.{}", at + 1), format!("{f}.{}", at + 2), [b.output, hidden, 1, 1]));
    }
    all
}

struct BlockSpec {
    number: usize,
    expand: bool,
    input: usize,
    hidden: usize,
    output: usize,
    stride: usize,
}

fn blocks() -> Vec<BlockSpec> {
    let mut all = Vec::new();
    let mut input = STEM;
    for (t, c, n, s) in STAGES {
        for i in 0..n {
            let stride = if i == 0 { s } else { 1 };
            all.push(BlockSpec { number: all.len() + 1, expand: t != 1, input, hidden: input * t, output: c, stride });
            input = c;
        }
    }
    all
}

#[derive(Clone, Debug)]
struct Conv {
    weight: Tensor,
    bias: Tensor,
}

impl Conv {
    /// 1x1: a matrix product over the pixels, then bias and activation in one pass.
    fn pointwise(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let (n, c, h, w) = x.dims4()?;
        let out = self.weight.dim(0)?;
        let weight = self.weight.reshape((out, c))?;
        let y = if n == 1 {
            weight.matmul(&x.reshape((c, h * w))?)?
        } else {
            weight.broadcast_left(n)?.matmul(&x.reshape((n, c, h * w))?)?
        };
        bias_act(&y.reshape((n, out, h, w))?, &self.bias, activation)
    }

    fn stem(&self, x: &Tensor, padding: Padding) -> Result<Tensor> {
        let (_, _, h, w) = x.dims4()?;
        let pad = padding.of(h, w, 2);
        let x = x.pad_with_zeros(2, pad.top, pad.bottom)?.pad_with_zeros(3, pad.left, pad.right)?;
        bias_act(&x.conv2d(&self.weight, 0, 2, 1, 1)?.contiguous()?, &self.bias, Activation::Relu6)
    }
}

#[derive(Clone, Debug)]
struct Block {
    expand: Option<Conv>,
    depthwise: Conv,
    project: Conv,
    stride: usize,
    residual: bool,
}

/// What the 1x1 convolutions see: its name (`blocks.3.expand`) and the values, N x C x H x W, of which it makes what they get.
pub type See<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<Tensor>;

impl Block {
    fn forward(&self, number: usize, x: &Tensor, padding: Padding, see: See) -> Result<Tensor> {
        let expanded = match &self.expand {
            Some(conv) => conv.pointwise(&see(&format!("blocks.{number}.expand"), x)?, Activation::Relu6)?,
            None => x.clone(),
        };
        let (_, _, h, w) = expanded.dims4()?;
        let pad = padding.of(h, w, self.stride);
        let Conv { weight, bias } = &self.depthwise;
        let y = depthwise3x3(&expanded, weight, bias, self.stride, pad, Activation::Relu6)?;
        let y = self.project.pointwise(&see(&format!("blocks.{number}.project"), &y)?, Activation::None)?;
        if self.residual {
            y + x
        } else {
            Ok(y)
        }
    }
}

/// The network.
#[derive(Clone, Debug)]
pub struct MobileNetV2 {
    stem: Conv,
    blocks: Vec<Block>,
    padding: Padding,
}

/// 1x1 convolutions that are not rounded to 8 bits. They see the largest maps, where a sky or a night is one value over many pixels,
/// whose rounding no mean takes away, and have few channels, so that rounding values takes them nearly the time that it saves. [ours: in
/// them was a third of what rounding all values does to a descriptor, as squares, of photographs of CamVid and of webcams]
const KEPT: [&str; 2] = ["blocks.1.project", "blocks.2.project"];

/// Whether a 1x1 convolution stays as it is in 8 bits, by its name.
pub fn is_kept(name: &str) -> bool {
    KEPT.contains(&name)
}

/// The 1x1 convolutions of a network in 8 bits, by name (`blocks.3.expand`); those that are not there stay as they are.
pub type RoundedNetwork = BTreeMap<String, Rounded>;

fn values(t: &Tensor) -> Result<Vec<f32>> {
    t.flatten_all()?.to_vec1::<f32>()
}

impl MobileNetV2 {
    /// The same network for inference alone: no gradients, batch of one, several times as fast. 1x1 convolutions that are in `int8`
    /// compute in 8 bits.
    ///
    /// Errors: Candle's.
    pub fn plan(&self, int8: Option<&RoundedNetwork>) -> Result<Plan> {
        self.folded(int8, Plan::new)
    }

    /// As [`Self::plan`], in bfloat16 behind the first block where the processor multiplies it, elsewhere in f32. See [`Self::fitted16`].
    pub fn plan16(&self) -> Result<Plan> {
        self.folded(None, Plan::bf16)
    }

    /// The same network for [`Self::plan16`]: what rounding weights to bfloat16 does in the mean of `pictures`, 1 x 3 x H x W each, is
    /// taken back with the biases. Where the processor multiplies no bfloat16 nothing is rounded, and nothing changes.
    pub fn fitted16(&self, pictures: &[Tensor]) -> Result<Self> {
        let mut net = self.clone();
        if Plan::bf16_products().is_none() {
            return Ok(net);
        }
        let seen = self.seen(pictures)?;
        for (at, block) in net.blocks.iter_mut().enumerate() {
            // A block that expands nothing, the first, stays in f32 in a plan, too.
            let Some(expand) = block.expand.as_mut() else { continue };
            for (kind, conv) in [("expand", expand), ("project", &mut block.project)] {
                let means = seen.get(&format!("blocks.{}.{kind}", at + 1)).map_or(&[][..], |s| &s.means);
                let mut bias = values(&conv.bias)?;
                for (bias, row) in bias.iter_mut().zip(values(&conv.weight)?.chunks_exact(means.len().max(1))) {
                    *bias += row.iter().zip(means).map(|(w, mean)| (w - bf16(*w)) * mean).sum::<f32>();
                }
                conv.bias = Tensor::from_vec(bias, conv.bias.shape(), conv.bias.device())?;
            }
        }
        Ok(net)
    }

    /// What each of the 1x1 convolutions sees in `pictures`, 1 x 3 x H x W each.
    fn seen(&self, pictures: &[Tensor]) -> Result<BTreeMap<String, Seen>> {
        let mut all = BTreeMap::<String, Seen>::new();
        for picture in pictures {
            self.taps_by(picture, &mut |name, x| {
                let (mean, largest) = (x.mean((0, 2, 3))?.to_vec1::<f32>()?, x.abs()?.flatten_from(2)?.max(2)?.max(0)?.to_vec1::<f32>()?);
                let none = || Seen { means: vec![0.0; mean.len()], largest: vec![0.0; mean.len()] };
                let seen = all.entry(name.into()).or_insert_with(none);
                seen.means.iter_mut().zip(mean).for_each(|(s, m)| *s += m / pictures.len() as f32);
                seen.largest.iter_mut().zip(largest).for_each(|(s, l)| *s = s.max(l));
                Ok(x.clone())
            })?;
        }
        // Coarse, so that processors whose sums differ in the last bits get the same network.
        let coarse = |v: &mut f32| *v = (*v * 1024.0).round() / 1024.0;
        all.values_mut().for_each(|s| s.means.iter_mut().chain(&mut s.largest).for_each(coarse));
        Ok(all)
    }

    /// The 1x1 convolutions rounded to 8 bits, but those that [`is_kept`] names, fitted to what they see in `pictures`, 1 x 3 x H x W
    /// each.
    pub fn rounded(&self, pictures: &[Tensor]) -> Result<RoundedNetwork> {
        let (seen, none) = (self.seen(pictures)?, Seen::default());
        let mut out = BTreeMap::new();
        for (at, block) in self.blocks.iter().enumerate() {
            for (kind, conv) in [("expand", block.expand.as_ref()), ("project", Some(&block.project))] {
                let name = format!("blocks.{}.{kind}", at + 1);
                if let Some(conv) = conv.filter(|_| !is_kept(&name)) {
                    let seen = seen.get(&name).unwrap_or(&none);
                    out.insert(name, Rounded::new(&values(&conv.weight)?, &values(&conv.bias)?, seen));
                }
            }
        }
        Ok(out)
    }

    /// The same for a GPU, in f32 or f16.
    #[cfg(any(test, feature = "cuda"))]
    pub(super) fn gpu_plan<M: Machine>(&self, machine: M, half: bool) -> crate::error::Result<GpuPlan<M>> {
        self.folded(None, |stem, blocks, pads| GpuPlan::new(machine, half, stem, blocks, pads))?
    }

    /// Calls `f` with the stem's weight and bias, the blocks, and the border of a 3x3 at height, width and stride.
    fn folded<T>(
        &self,
        int8: Option<&RoundedNetwork>,
        f: impl FnOnce((&[f32], &[f32]), &[PlanBlock], fn(usize, usize, usize) -> Pad) -> T,
    ) -> Result<T> {
        let pads = match self.padding {
            Padding::Symmetric => |h, w, s| Padding::Symmetric.of(h, w, s),
            Padding::Same => |h, w, s| Padding::Same.of(h, w, s),
        };
        type Weights = (Vec<f32>, Vec<f32>);
        let both = |conv: &Conv| -> Result<Weights> { Ok((values(&conv.weight)?, values(&conv.bias)?)) };
        let of = |b: &Block| -> Result<(Option<Weights>, Weights, Weights)> {
            Ok((b.expand.as_ref().map(both).transpose()?, both(&b.depthwise)?, both(&b.project)?))
        };
        let all = self.blocks.iter().map(of).collect::<Result<Vec<_>>>()?;
        fn slices(w: &Weights) -> (&[f32], &[f32]) {
            (&w.0, &w.1)
        }
        let find = |at: usize, kind: &str| int8?.get(&format!("blocks.{}.{kind}", at + 1));
        let mut blocks = Vec::with_capacity(all.len());
        for (at, (block, (expand, depthwise, project))) in self.blocks.iter().zip(&all).enumerate() {
            blocks.push(PlanBlock {
                expand: expand.as_ref().map(slices),
                depthwise: slices(depthwise),
                project: slices(project),
                stride: block.stride,
                residual: block.residual,
                tap: TAPS.contains(&(at + 1)),
                rounded: (find(at, "expand"), find(at, "project")),
            });
        }
        Ok(f(slices(&both(&self.stem)?), &blocks, pads))
    }

    /// Builds from folded tensors that `get` returns by our names (`blocks.3.expand.weight`).
    ///
    /// Errors: whatever `get` says.
    pub fn new<E>(padding: Padding, mut get: impl FnMut(&str) -> std::result::Result<Tensor, E>) -> std::result::Result<Self, E> {
        let mut conv = |name: String| -> std::result::Result<Conv, E> {
            Ok(Conv { weight: get(&format!("{name}.weight"))?, bias: get(&format!("{name}.bias"))? })
        };
        let stem = conv("stem".into())?;
        let blocks = blocks()
            .into_iter()
            .map(|b| {
                let n = b.number;
                Ok(Block {
                    expand: if b.expand { Some(conv(format!("blocks.{n}.expand"))?) } else { None },
                    depthwise: conv(format!("blocks.{n}.depthwise"))?,
                    project: conv(format!("blocks.{n}.project"))?,
                    stride: b.stride,
                    residual: b.stride == 1 && b.input == b.output,
                })
            })
            .collect::<std::result::Result<_, E>>()?;
        Ok(Self { stem, blocks, padding })
    }

    /// The three taps of `x` (N x 3 x H x W, normalised): N x 32 x H/8 x W/8, N x 96 x H/16 x W/16,
    /// N x 320 x H/32 x W/32.
    pub fn taps(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        self.taps_by(x, &mut |_, x| Ok(x.clone()))
    }

    /// The same, where `see` makes what the 1x1 convolutions get of what they would.
    pub fn taps_by(&self, x: &Tensor, see: See) -> Result<[Tensor; 3]> {
        let mut x = self.stem.stem(x, self.padding)?;
        let mut taps = Vec::with_capacity(3);
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(i + 1, &x, self.padding, see)?;
            if TAPS.contains(&(i + 1)) {
                taps.push(x.clone());
            }
        }
        taps.try_into().map_err(|_| candle_core::Error::Msg("a tap is missing".into()))
    }

    /// The global descriptor of taps, N x 448, rows of unit length.
    pub fn pooled(taps: &[Tensor], pooling: Pooling, tap_norm: bool) -> Result<Tensor> {
        let pooled = taps
            .iter()
            .map(|tap| {
                let v = pooling.pool(tap)?;
                if tap_norm {
                    l2_normalize(&v)
                } else {
                    Ok(v)
                }
            })
            .collect::<Result<Vec<_>>>()?;
        l2_normalize(&Tensor::cat(&pooled, 1)?)
    }

    /// The global descriptor of images, N x 448, rows of unit length.
    pub fn describe(&self, x: &Tensor, pooling: Pooling, tap_norm: bool) -> Result<Tensor> {
        Self::pooled(&self.taps(x)?, pooling, tap_norm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_convolutions_is_the_papers() {
        let specs = conv_specs();
        assert_eq!(specs.len(), 50 + 1);
        assert_eq!(TAP_CHANNELS.iter().sum::<usize>(), DIM);
        assert_eq!(specs[1].name, "blocks.1.depthwise");
        assert_eq!(specs[3].torchvision, "features.2.conv.0.0");
        assert_eq!(specs.last().map(|s| s.shape), Some([320, 960, 1, 1]));
        let weights: usize = specs.iter().map(|s| s.shape.iter().product::<usize>() + s.shape[0]).sum();
        // torchvision's 3 504 872 parameters less the classifier (1 281 000), the last convolution
        // (1280 * 320 + 2 * 1280) and one of each folded batch norm's two vectors.
        let norms: usize = specs.iter().map(|s| s.shape[0]).sum();
        assert_eq!(weights, 3_504_872 - 1_281_000 - 1280 * 320 - 2 * 1280 - norms);
    }
}
