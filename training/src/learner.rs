//! What is trained: a branch, or one of the supplement's rivals, behind one face.

use crate::data::{Input, Loader};
use crate::net::{l2_normalize, normal, Arch, Branch, Features, Gpu, Mode, Pool, Trunk};
use crate::recipe::{Pooling, Recipe};
use anyhow::{bail, ensure, Context, Result};
use candle_core::{Device, Tensor, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use structvpr::error::read_file;
use structvpr::model::{Model, ModelSpec, Padding, Pooling as CorePooling, Weights};

/// Which training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The student: rgb in, 448-d [paper].
    #[default]
    Rgb,
    /// The teacher: label maps in, 480-d [paper].
    Seg,
    /// Rival: image and label map as one input, 448-d [paper, supplement].
    ConcatInput,
    /// Rival: both branches, joined, 928-d [paper, supplement].
    ConcatFeat,
    /// Rival: the student with a decoder that segments, 448-d [paper, supplement].
    MultiTask,
}

impl Kind {
    /// Whether it needs label maps.
    pub fn needs_labels(self) -> bool {
        self != Self::Rgb
    }
}

/// Factor of the decoder's cross-entropy [paper, supplement: 0.1].
pub const SEGMENTATION: f64 = 0.1;
/// Powers of GeM that training may reach: from the mean to nearly the maximum. [ours]
const POWERS: std::ops::RangeInclusive<f32> = 1.0..=30.0;
/// Channels inside the decoder. [ours]
const DECODER: usize = 32;

/// A network in training.
pub struct Learner {
    pub kind: Kind,
    branches: Vec<(Branch, Input)>,
    decoder: Option<Decoder>,
    pooling: Pooling,
    spec: ModelSpec,
}

/// What a learner makes of a batch.
pub struct Output {
    pub descriptor: Tensor,
    /// Of the first branch.
    pub features: Features,
}

/// The spec and the folded weights that a recipe begins from.
fn init(recipe: &Recipe) -> Result<(ModelSpec, Option<Weights>)> {
    let weights = match (recipe.init.as_str(), recipe.init_file()) {
        ("random", _) => return Ok((Model::shipped()?.spec().clone(), None)),
        ("shipped", _) => Model::shipped()?.weights().clone(),
        (_, Some(path)) => Weights::parse(&read_file(&path)?).map_err(|e| e.at(&path))?,
        (other, None) => bail!("init: `{other}`"),
    };
    Ok((weights.spec.clone(), Some(weights)))
}

/// Mean and standard deviation that a recipe's images are normalised with: those of its initial weights.
pub fn preprocessing(recipe: &Recipe) -> Result<([f32; 3], [f32; 3])> {
    let (spec, _) = init(recipe)?;
    Ok((spec.mean, spec.std))
}

/// Inputs that the batch norms of folded weights are measured on.
pub const UNFOLD_IMAGES: usize = 48;

impl Learner {
    /// A new one. `sample` gives a batch of the training images in a branch's input: batch norms of initial weights that
    /// have theirs folded are measured on it.
    pub fn new(kind: Kind, recipe: &Recipe, loader: &Loader, seed: u64, sample: impl Fn(Input) -> Result<Tensor>) -> Result<Self> {
        let (mut spec, weights) = init(recipe)?;
        let mut branches = Vec::new();
        if kind != Kind::Seg {
            let input = if kind == Kind::ConcatInput { Input::Both } else { Input::Rgb };
            let trunk = Trunk::new(Arch::MobileNetV2, loader.channels(input), spec.padding);
            let branch = match &weights {
                Some(weights) => from_folded(trunk, weights, &sample(input)?, seed)?,
                None => Branch::random(trunk, seed)?,
            };
            branches.push((branch, input));
        }
        if matches!(kind, Kind::Seg | Kind::ConcatFeat) {
            let trunk = Trunk::new(Arch::MobileNetL, loader.channels(Input::Seg), Padding::Symmetric);
            branches.push((Branch::random(trunk, seed ^ 0x5e9)?, Input::Seg));
        }
        let decoder = match kind {
            Kind::MultiTask => Some(Decoder::new(&branches[0].0.trunk.tap_channels(), loader.encoder.planes(), seed)?),
            _ => None,
        };
        if recipe.pooling == Pooling::Average {
            for (b, _) in &branches {
                b.power.set(&Tensor::ones(1, candle_core::DType::F32, &Device::Cpu)?)?;
            }
        }
        let [w, h] = recipe.data.size;
        (spec.input_width, spec.input_height) = (w, h);
        spec.name = recipe.name.clone();
        spec.license = recipe.license.clone();
        spec.tap_norm = true;
        spec.forget_recommended();
        spec.rounded_from = None;
        Ok(Self { kind, branches, decoder, pooling: recipe.pooling, spec })
    }

    /// Has its trunks computed by `gpu` from now on, or on the processor.
    pub fn compute_on(&mut self, gpu: Option<&Arc<Gpu>>) {
        for (branch, _) in &mut self.branches {
            branch.compute_on(gpu.cloned());
        }
    }

    /// Inputs that [`Learner::forward`] wants, in order.
    pub fn inputs(&self) -> Vec<Input> {
        self.branches.iter().map(|(_, i)| *i).collect()
    }

    /// Dimensions of the descriptor.
    pub fn dim(&self) -> usize {
        self.branches.iter().map(|(b, _)| b.trunk.dim()).sum()
    }

    /// The network on one tensor per input, C x N x H x W.
    pub fn forward(&self, images: &[Tensor], train: bool) -> Result<Output> {
        let mut all = Vec::new();
        for ((branch, _), image) in self.branches.iter().zip(images) {
            all.push(if self.pooling == Pooling::Average {
                average(branch.forward(image, train)?)?
            } else {
                branch.forward(image, train)?
            });
        }
        let descriptor = match all.as_slice() {
            [one] => one.descriptor.clone(),
            // Two unit vectors, joined and scaled to one [paper, supplement].
            many => l2_normalize(&Tensor::cat(&many.iter().map(|f| &f.descriptor).collect::<Vec<_>>(), 1)?)?,
        };
        let features = all.into_iter().next().context("a learner without a branch")?;
        Ok(Output { descriptor, features })
    }

    /// The decoder's cross-entropy, if there is one. `planes`: N label maps of the input's size.
    pub fn segmentation_loss(&self, features: &Features, planes: &[&[u8]], size: [usize; 2]) -> Result<Option<Tensor>> {
        let Some(decoder) = &self.decoder else { return Ok(None) };
        Ok(Some(decoder.loss(&features.taps, planes, size)?))
    }

    /// Variables with the ranges that decay, in a fixed order, and their names.
    pub fn vars(&self) -> Vec<(String, Var, Vec<std::ops::Range<usize>>)> {
        let mut out = Vec::new();
        for (i, (branch, _)) in self.branches.iter().enumerate() {
            out.push((format!("branch{i}.weights"), branch.weights.clone(), branch.decaying()));
            if self.pooling == Pooling::Gem {
                out.push((format!("branch{i}.power"), branch.power.clone(), vec![]));
            }
        }
        for (i, v) in self.decoder.iter().flat_map(|d| &d.vars).enumerate() {
            let n = v.elem_count();
            out.push((format!("decoder{i}"), v.clone(), vec![0..n]));
        }
        out
    }

    /// All numbers by name, running statistics too.
    pub fn state(&self) -> Result<Vec<(String, Vec<f32>)>> {
        let mut out = Vec::new();
        for (name, var, _) in self.vars() {
            out.push((name, var.flatten_all()?.to_vec1::<f32>()?));
        }
        for (i, (branch, _)) in self.branches.iter().enumerate() {
            out.push((format!("branch{i}.statistics"), branch.statistics()));
        }
        Ok(out)
    }

    /// Puts numbers back; `get` finds them by name.
    pub fn restore(&self, mut get: impl FnMut(&str) -> Result<Vec<f32>>) -> Result<()> {
        for (name, var, _) in self.vars() {
            let values = get(&name)?;
            ensure!(values.len() == var.elem_count(), "`{name}` has {} values, not {}", values.len(), var.elem_count());
            var.set(&Tensor::from_vec(values, var.shape(), &Device::Cpu)?)?;
        }
        for (i, (branch, _)) in self.branches.iter().enumerate() {
            let name = format!("branch{i}.statistics");
            let values = get(&name)?;
            ensure!(values.len() == branch.trunk.statistics, "`{name}` has {} values, not {}", values.len(), branch.trunk.statistics);
            branch.set_statistics(&values);
        }
        Ok(())
    }

    /// Keeps each power of GeM where it is a mean: a step too long would make it zero or negative, and everything after it NaN.
    pub fn keep_powers_usable(&self) -> Result<()> {
        for (branch, _) in &self.branches {
            let p = branch.power.to_vec1::<f32>()?[0];
            // NaN stays: the next loss names it.
            if !(POWERS.contains(&p) || p.is_nan()) {
                branch.power.set(&Tensor::new(&[p.clamp(*POWERS.start(), *POWERS.end())], &Device::Cpu)?)?;
            }
        }
        Ok(())
    }

    /// The running statistics, to be put back after a step that is left out.
    pub fn statistics(&self) -> Vec<Vec<f32>> {
        self.branches.iter().map(|(b, _)| b.statistics()).collect()
    }

    /// See [`Learner::statistics`].
    pub fn set_statistics(&self, all: &[Vec<f32>]) {
        for ((b, _), s) in self.branches.iter().zip(all) {
            b.set_statistics(s);
        }
    }

    /// The model that the node loads: batch norms folded.
    ///
    /// Errors: a learner whose network the node does not have (only the student and Multi-task's student have it).
    pub fn export(&self, trained_on: &str) -> Result<Weights> {
        ensure!(matches!(self.kind, Kind::Rgb | Kind::MultiTask), "{:?}: the node has no such network", self.kind);
        let branch = &self.branches[0].0;
        let weights = branch.weights.to_vec1::<f32>()?;
        let statistics = branch.statistics();
        let mut tensors = std::collections::BTreeMap::new();
        for (conv, spec) in branch.trunk.convs().zip(structvpr::model::conv_specs()) {
            ensure!(conv.name == spec.name, "the student's {} is the node's {}", conv.name, spec.name);
            let mut folded = weights[conv.weight.clone()].to_vec();
            let mut bias = Vec::with_capacity(conv.outputs);
            let each = folded.len() / conv.outputs;
            for (c, w) in folded.chunks_exact_mut(each).enumerate() {
                let (mean, variance) = (statistics[conv.mean.start + c], statistics[conv.mean.end + c]);
                let scale = f64::from(weights[conv.gamma.start + c]) / (f64::from(variance) + crate::net::norm::EPS).sqrt();
                w.iter_mut().for_each(|w| *w = (f64::from(*w) * scale) as f32);
                bias.push((f64::from(weights[conv.beta.start + c]) - f64::from(mean) * scale) as f32);
            }
            tensors.insert(format!("{}.weight", spec.name), Tensor::from_vec(folded, spec.shape.to_vec(), &Device::Cpu)?);
            tensors.insert(format!("{}.bias", spec.name), Tensor::from_vec(bias, conv.outputs, &Device::Cpu)?);
        }
        let mut spec = self.spec.clone();
        spec.pooling = match self.pooling {
            Pooling::Average => CorePooling::Average,
            _ => CorePooling::Gem { p: f64::from(branch.power.to_vec1::<f32>()?[0]) },
        };
        spec.training_data = trained_on.to_string();
        Ok(Weights { spec, tensors, int8: None, whitening: None, layout: "structvpr" })
    }
}

/// Mean pooling in place of GeM.
fn average(features: Features) -> Result<Features> {
    let mean = |t: &Tensor| -> candle_core::Result<Tensor> { l2_normalize(&t.mean(3)?.mean(2)?.t()?.contiguous()?) };
    let pooled = features.taps.iter().map(mean).collect::<candle_core::Result<Vec<_>>>()?;
    let descriptor = l2_normalize(&Tensor::cat(&pooled, 1)?)?;
    Ok(Features { taps: features.taps, pooled, descriptor })
}

/// A branch from weights whose batch norms are folded: norms are put in so that `sample` comes out as before.
fn from_folded(trunk: Trunk, weights: &Weights, sample: &Tensor, seed: u64) -> Result<Branch> {
    let mut flat = vec![0f32; trunk.weights];
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x57e);
    for conv in trunk.convs() {
        let get = |kind: &str| -> Result<Vec<f32>> {
            let name = format!("{}.{kind}", conv.name);
            let t = weights.tensors.get(&name).with_context(|| format!("initial weights: no tensor {name}"))?;
            Ok(t.flatten_all()?.to_vec1::<f32>()?)
        };
        let values = get("weight")?;
        let own = &mut flat[conv.weight.clone()];
        if own.len() == values.len() {
            own.copy_from_slice(&values);
        } else {
            // Concat-input: the label planes' kernels are new, and small beside the image's.
            let (to, from) = (own.len() / conv.outputs, values.len() / conv.outputs);
            for (own, values) in own.chunks_exact_mut(to).zip(values.chunks_exact(from)) {
                own[..from].copy_from_slice(values);
                own[from..].iter_mut().for_each(|w| *w = 0.05 * normal(&mut rng) as f32);
            }
        }
        flat[conv.beta.clone()].copy_from_slice(&get("bias")?);
        flat[conv.gamma.clone()].fill(1.0);
    }
    let (_, images, h, w) = sample.dims4()?;
    let mut statistics = vec![0f32; trunk.statistics];
    let mut unfolded = flat.clone();
    let mode = Mode::Unfold { weights: &mut unfolded, statistics: &mut statistics };
    trunk.forward(&flat, mode, &sample.flatten_all()?.to_vec1::<f32>()?, images, (h, w), &mut Pool::default());
    let power = match weights.spec.pooling {
        CorePooling::Gem { p } => p,
        CorePooling::Average => 3.0,
    };
    Ok(Branch::new(trunk, unfolded, statistics, power)?)
}

/// Multi-task's decoder: U-Net's way up over the three taps, 1x1 convolutions. [ours: the supplement names a U-Net decoder]
struct Decoder {
    /// Weight and bias of each 1x1 convolution: deepest tap, middle, shallowest, classes.
    vars: Vec<Var>,
}

impl Decoder {
    fn new(taps: &[usize], classes: usize, seed: u64) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0xdec);
        let mut vars = Vec::new();
        let shapes = [(DECODER, taps[2]), (DECODER, taps[1] + DECODER), (DECODER, taps[0] + DECODER), (classes, DECODER)];
        for (o, i) in shapes {
            let std = (2.0 / i as f64).sqrt();
            let values: Vec<f32> = (0..o * i).map(|_| (std * normal(&mut rng)) as f32).collect();
            vars.push(Var::from_vec(values, (o, i), &Device::Cpu)?);
            vars.push(Var::zeros((o, 1), candle_core::DType::F32, &Device::Cpu)?);
        }
        Ok(Self { vars })
    }

    /// Mean cross-entropy at the shallowest tap's size; each of its pixels has the label under its centre.
    fn loss(&self, taps: &[Tensor], planes: &[&[u8]], [width, height]: [usize; 2]) -> Result<Tensor> {
        let conv = |x: &Tensor, k: usize| -> Result<Tensor> {
            let (c, n, h, w) = x.dims4()?;
            let (weight, bias) = (self.vars[2 * k].as_tensor(), self.vars[2 * k + 1].as_tensor());
            let y = weight.matmul(&x.contiguous()?.reshape((c, n * h * w))?)?.broadcast_add(bias)?;
            Ok(y.reshape((weight.dim(0)?, n, h, w))?)
        };
        let up = |x: &Tensor, like: &Tensor| -> Result<Tensor> {
            let (_, _, h, w) = like.dims4()?;
            Ok(x.upsample_nearest2d(h, w)?)
        };
        let mut x = conv(&taps[2], 0)?.relu()?;
        x = conv(&Tensor::cat(&[&taps[1], &up(&x, &taps[1])?], 0)?, 1)?.relu()?;
        x = conv(&Tensor::cat(&[&taps[0], &up(&x, &taps[0])?], 0)?, 2)?.relu()?;
        let logits = conv(&x, 3)?;
        let (classes, n, h, w) = logits.dims4()?;
        let mut target = Vec::with_capacity(n * h * w);
        for map in planes {
            for y in 0..h {
                for x in 0..w {
                    target.push(u32::from(map[(2 * y + 1) * height / (2 * h) * width + (2 * x + 1) * width / (2 * w)]));
                }
            }
        }
        let rows = logits.reshape((classes, n * h * w))?.t()?.contiguous()?;
        Ok(candle_nn::loss::cross_entropy(&rows, &Tensor::from_vec(target, n * h * w, &Device::Cpu)?)?)
    }
}
