//! `training round`: a model whose 1x1 convolutions are in 8 bits, fitted so that its descriptors stay what they were.
//!
//! It begins with codes that are fitted layer by layer ([`crate::optq`]). Then the network is run with its weights and values rounded,
//! beside itself in f32; weights, their steps and biases follow the gradient of how far the two are apart, which goes through the rounding
//! as if there were none (Jacob et al., CVPR 2018; Esser et al., ICLR 2020: learnt steps). No labels, and no photographs needed: half of
//! the pictures are the synthetic street's, half dead leaves. [ours]

use crate::data::progress;
use crate::optq;
use crate::sampler::{renderer, View};
use crate::world::condition::NAMES;
use crate::world::World;
use anyhow::{ensure, Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use structvpr::dataset::list_images;
use structvpr::error::{read_file, write_file};
use structvpr::image::RgbImage;
use structvpr::model::{
    conv_specs, leaves, rounded_values, ComputeDevice, MobileNetV2, Model, Precision, Rounded, RoundedNetwork, Weights,
};

#[derive(clap::Args)]
pub struct Args {
    /// The model (any layout that `structvpr convert` reads).
    model: PathBuf,
    /// Where to write the rounded one.
    #[arg(long)]
    out: PathBuf,
    /// Name in its header; the model's own if none is given. Its identity is another in any case.
    #[arg(long)]
    name: Option<String>,
    /// Folders of your own images, searched in depth, that make up half of the pictures: without labels.
    #[arg(long, num_args = 1.., value_name = "FOLDER")]
    images: Vec<PathBuf>,
    /// Optimiser steps.
    #[arg(long, default_value_t = 600)]
    steps: usize,
    /// Pictures per step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Largest learning rate of the weights, in codes a step; falls to zero along a cosine. 0 leaves the nearest codes, and fits
    /// steps and biases alone.
    #[arg(long, default_value_t = 0.003)]
    lr: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Streets that pictures are of; those that the result is judged on lie above, the demo's below 1000.
const STREETS: std::ops::Range<u64> = 40_000..42_000;
const HELD_OUT: u64 = 42_000;
/// Seeds of dead leaves likewise; the pictures that a model in 8 bits makes for itself lie below.
const LEAVES: u64 = 1000;
/// Pictures that the result is judged on.
const JUDGED: usize = 24;
/// Learning rate of biases, in the values' unit. [ours]
const BIASES: f64 = 3e-4;
/// Learning rate of the steps' logarithm. [ours]
const STEPS: f64 = 5e-4;
/// How far in its code a weight begins at most: what is nearest to another code is soon there. [ours]
const WITHIN: f32 = 0.45;
/// Pictures that the first codes are fitted to.
const SHOWN: usize = 48;
/// Weight of the blocks' error, relative to what comes out of them, beside the descriptor's. [ours]
const BLOCKS: f64 = 1.0;

/// A 1x1 convolution that is being rounded.
struct Layer {
    outputs: usize,
    inputs: usize,
    /// In codes, O x I.
    weight: Var,
    bias: Var,
    /// Logarithm of what `base` is multiplied by, O x 1.
    log_step: Var,
    base: Tensor,
    /// 1 x I.
    scales: Tensor,
    shared: Arc<[f32]>,
    signed: bool,
}

/// Rounded, with the gradient as if it were not.
fn straight_through(x: &Tensor) -> candle_core::Result<Tensor> {
    x + (x.round()? - x)?.detach()
}

impl Layer {
    /// Begins with the codes of `rounded`, and the bias that goes with them: of `weight`, O x I, as near to what it was as these leave it.
    fn new(weight: &Tensor, rounded: &Rounded, signed: bool) -> Result<Self> {
        let (outputs, inputs) = (rounded.steps.len(), rounded.scales.len());
        let base = Tensor::from_slice(&rounded.steps, (outputs, 1), &Device::Cpu)?;
        let scales = Tensor::from_slice(&rounded.scales, (1, inputs), &Device::Cpu)?;
        let codes = Tensor::from_vec(rounded.codes.iter().map(|c| f32::from(*c)).collect::<Vec<_>>(), (outputs, inputs), &Device::Cpu)?;
        let exact = weight.reshape((outputs, inputs))?.broadcast_div(&base)?.broadcast_div(&scales)?;
        let within = (exact - &codes)?.clamp(-WITHIN, WITHIN)?;
        Ok(Self {
            outputs,
            inputs,
            weight: Var::from_tensor(&(codes + within)?)?,
            bias: Var::from_slice(&rounded.bias, outputs, &Device::Cpu)?,
            log_step: Var::zeros((outputs, 1), DType::F32, &Device::Cpu)?,
            base,
            scales,
            shared: rounded.scales.clone().into(),
            signed,
        })
    }

    fn steps(&self) -> candle_core::Result<Tensor> {
        &self.base * self.log_step.exp()?
    }

    /// What the codes stand for, O x I x 1 x 1.
    fn weights(&self) -> candle_core::Result<Tensor> {
        let codes = straight_through(&self.weight.clamp(-127f32, 127f32)?)?;
        codes.broadcast_mul(&self.steps()?)?.broadcast_mul(&self.scales)?.reshape((self.outputs, self.inputs, 1, 1))
    }

    fn rounded(&self) -> Result<Rounded> {
        let codes = self.weight.clamp(-127f32, 127f32)?.round()?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Rounded {
            codes: codes.into_iter().map(|c| c as i8).collect(),
            steps: self.steps()?.flatten_all()?.to_vec1()?,
            scales: self.shared.to_vec(),
            bias: self.bias.to_vec1()?,
        })
    }
}

type Layers = BTreeMap<String, Layer>;

/// Block outputs and the descriptor of images, N x 3 x H x W; in 8 bits where there are `layers`.
fn run(net: &MobileNetV2, weights: &Weights, layers: Option<&Layers>, x: &Tensor) -> Result<(Vec<Tensor>, Tensor)> {
    let mut blocks = Vec::new();
    let taps = net.taps_by(x, &mut |name, x| {
        // What is expanded is the block before's output.
        if name.ends_with("expand") {
            blocks.push(x.clone());
        }
        match layers.and_then(|l| l.get(name)) {
            Some(layer) => rounded_values(x, &layer.shared, layer.signed),
            None => Ok(x.clone()),
        }
    })?;
    blocks.extend(taps.last().cloned());
    let mut descriptor = MobileNetV2::pooled(&taps, weights.spec.pooling, weights.spec.tap_norm)?;
    if let Some(whitening) = &weights.whitening {
        descriptor = whitening.of(&descriptor)?;
    }
    Ok((blocks, descriptor))
}

/// How far a rounded network is from its own in f32: of descriptors the mean squared distance, and the mean over blocks of the squared
/// error of what comes out of them, relative to its square.
fn apart(rounded: &(Vec<Tensor>, Tensor), full: &(Vec<Tensor>, Tensor)) -> Result<(Tensor, Tensor)> {
    let descriptors = (&rounded.1 - &full.1)?.sqr()?.sum(1)?.mean_all()?;
    let mut blocks = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    for (a, b) in rounded.0.iter().zip(&full.0) {
        let size = b.sqr()?.mean_all()?.to_scalar::<f32>()?.max(f32::MIN_POSITIVE);
        blocks = (blocks + ((a - b)?.sqr()?.mean_all()? / f64::from(size))?)?;
    }
    Ok((descriptors, (blocks / full.0.len() as f64)?))
}

/// How far the rounded network is from `full` over a batch, both as [`apart`] has it, and the gradient of that.
///
/// Pictures are taken one by one, as many at once as there are threads: nothing but the weights is shared. Their gradients are added up
/// in order and go through the rounding of the weights once.
///
/// Errors: a distance that is not a number.
fn gradient(batch: &[RgbImage], full: &Model, net: &MobileNetV2, layers: &Layers) -> Result<(f64, f64, GradStore)> {
    let weights = full.weights();
    let mut coarse = BTreeMap::new();
    for (name, layer) in layers {
        coarse.insert(format!("{name}.weight"), Var::from_tensor(&layer.weights()?.detach())?);
        coarse.insert(format!("{name}.bias"), layer.bias.clone());
    }
    let rounded = network(weights, &coarse)?;
    let one = |image: &RgbImage| -> Result<(f64, f64, GradStore)> {
        let x = full.preprocess(image)?;
        let (descriptors, blocks) = apart(&run(&rounded, weights, Some(layers), &x)?, &run(net, weights, None, &x)?)?;
        let grads = (&descriptors + (&blocks * BLOCKS)?)?.backward()?;
        Ok((f64::from(descriptors.to_scalar::<f32>()?), f64::from(blocks.to_scalar::<f32>()?), grads))
    };
    let all = batch.par_iter().map(one).collect::<Result<Vec<_>>>()?;
    let n = batch.len() as f64;
    let mean = |of: fn(&(f64, f64, GradStore)) -> f64| all.iter().map(of).sum::<f64>() / n;
    let (descriptors, blocks) = (mean(|a| a.0), mean(|a| a.1));
    ensure!((descriptors + blocks).is_finite(), "the loss is not a number; try a lower --lr");
    let sum = |var: &Var| -> Result<Tensor> {
        let mut total = var.zeros_like()?;
        for (_, _, grads) in &all {
            if let Some(grad) = grads.get(var) {
                total = (total + grad)?;
            }
        }
        Ok((total / n)?)
    };
    let mut through = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    for (name, layer) in layers {
        through = (through + (layer.weights()? * sum(&coarse[&format!("{name}.weight")])?)?.sum_all()?)?;
    }
    let mut grads = through.backward()?;
    for layer in layers.values() {
        grads.insert(&layer.bias, sum(&layer.bias)?);
    }
    Ok((descriptors, blocks, grads))
}

/// Where pictures come from.
struct Pictures<'a> {
    model: &'a Model,
    images: &'a [PathBuf],
}

impl Pictures<'_> {
    /// The `at`th picture of a batch: every other one from the folders if there are any, the others of a street and of leaves by turns.
    fn one(&self, at: usize, mut rng: ChaCha8Rng, streets: &std::ops::Range<u64>) -> Result<RgbImage> {
        let (w, h) = (self.model.spec().input_width, self.model.spec().input_height);
        let made = if self.images.is_empty() { at } else { at / 2 };
        if !self.images.is_empty() && at.is_multiple_of(2) {
            let path = &self.images[rng.random_range(0..self.images.len())];
            return Ok(RgbImage::decode(&read_file(path)?).map_err(|e| e.at(path))?);
        }
        if made % 2 == 1 {
            return Ok(leaves::picture(LEAVES + rng.random_range(0..u64::from(u32::MAX)), (w, h))?);
        }
        let world = World::new(rng.random_range(streets.clone()));
        let s = rng.random_range(0.0..world.route.length());
        let condition = rng.random_range(0..NAMES.len());
        Ok(View::near(&mut rng, s, condition).render(&renderer(w as u32, h as u32), &world).image)
    }

    /// A batch by number: the same number, the same pictures.
    fn batch(&self, seed: u64, number: u64, n: usize, streets: &std::ops::Range<u64>) -> Result<Vec<RgbImage>> {
        let rng = |at: usize| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(number * n as u64 + at as u64);
            rng
        };
        (0..n).into_par_iter().map(|at| self.one(at, rng(at), streets)).collect()
    }
}

/// Squared distances of the descriptors of `pictures` by `a` and `b`.
fn distances(a: &Model, b: &Model, pictures: &[RgbImage]) -> Result<Vec<f64>> {
    let of = |image: &RgbImage| -> Result<f64> {
        let (a, b) = (a.describe(image)?, b.describe(image)?);
        Ok(a.as_slice().iter().zip(b.as_slice()).map(|(a, b)| f64::from(a - b).powi(2)).sum())
    };
    pictures.iter().map(of).collect()
}

/// `weights` with their 1x1 convolutions rounded, computing in `precision`.
fn model(weights: &Weights, rounded: RoundedNetwork, precision: Precision) -> Result<Model> {
    let mut weights = weights.clone();
    weights.round(rounded)?;
    Ok(Model::from_bytes(&weights.to_bytes(Precision::Int8)?)?.on(ComputeDevice::Cpu, precision)?)
}

pub fn run_command(args: &Args) -> Result<()> {
    ensure!(args.steps > 0 && args.batch > 0, "--steps {} and --batch {} must be above 0", args.steps, args.batch);
    ensure!(args.lr.is_finite() && args.lr >= 0.0, "--lr {} is not a rate", args.lr);
    let mut weights = Weights::parse(&read_file(&args.model)?).map_err(|e| e.at(&args.model))?;
    ensure!(weights.int8.is_none(), "{} is in 8 bits already; round the model that it was made of", args.model.display());
    let images = own_images(&args.images)?;
    let full = Model::new(weights.clone())?;
    let nearest = full.nearest()?;
    let judged = Pictures { model: &full, images: &[] }.batch(args.seed, 0, JUDGED, &(HELD_OUT..HELD_OUT + 100))?;
    println!("nearest codes: {}", said(&full, &nearest, &judged)?);
    let shown = Pictures { model: &full, images: &images }.batch(args.seed, 1, SHOWN, &STREETS)?;
    let shown = shown.iter().map(|image| full.preprocess(image)).collect::<structvpr::error::Result<Vec<_>>>()?;
    let first = optq::rounded(&network(&weights, &BTreeMap::new())?, &weights, &shown)?;
    println!("layer by layer: {}", said(&full, &first, &judged)?);
    let rounded = fit(args, &full, &first, &images)?;
    println!("fitted codes: {}", said(&full, &rounded, &judged)?);
    weights.spec.rounded_from = Some(weights.network_sha256()?);
    weights.round(rounded)?;
    if let Some(name) = &args.name {
        weights.spec.name = name.clone();
    }
    let bytes = weights.to_bytes(Precision::Int8)?;
    // What is written must load.
    let written = Model::from_bytes(&bytes)?;
    write_file(&args.out, &bytes)?;
    println!("{}: {} bytes, sha256 {}", args.out.display(), bytes.len(), written.identity().sha256);
    Ok(())
}

/// How near `full` the model with these codes is, in words.
fn said(full: &Model, rounded: &RoundedNetwork, pictures: &[RgbImage]) -> Result<String> {
    let of = |precision| -> Result<String> {
        let all = distances(full, &model(full.weights(), rounded.clone(), precision)?, pictures)?;
        let (mean, most) = (all.iter().sum::<f64>() / all.len() as f64, all.iter().fold(0f64, |m, d| m.max(*d)));
        Ok(format!("{:.5} ({:.5})", 1.0 - mean / 2.0, 1.0 - most / 2.0))
    };
    let n = pictures.len();
    Ok(format!(
        "cosine to the model's descriptors, mean (least) of {n} held out: in f32 {}, in int8 {}",
        of(Precision::F32)?,
        of(Precision::Int8)?
    ))
}

/// The layers of a network whose first codes these are.
fn layers(weights: &Weights, first: &RoundedNetwork) -> Result<Layers> {
    let mut out = Layers::new();
    for spec in conv_specs().into_iter().filter(|s| s.is_pointwise()) {
        // What is kept as it is follows no gradient.
        let Some(rounded) = first.get(&spec.name) else { continue };
        let layer = Layer::new(&weights.tensors[&format!("{}.weight", spec.name)], rounded, spec.name.ends_with("expand"))?;
        out.insert(spec.name, layer);
    }
    Ok(out)
}

/// The network of `weights`, with some of its tensors in their places.
fn network(weights: &Weights, others: &BTreeMap<String, Var>) -> Result<MobileNetV2> {
    MobileNetV2::new(weights.spec.padding, |name| {
        let other = others.get(name).map(|v| v.as_tensor().clone());
        other.or_else(|| weights.tensors.get(name).cloned()).with_context(|| format!("no tensor {name}"))
    })
}

/// Fits the codes, from the `first` on.
///
/// Errors: an image that cannot be read; a loss that is not a number.
fn fit(args: &Args, full: &Model, first: &RoundedNetwork, images: &[PathBuf]) -> Result<RoundedNetwork> {
    let (net, layers) = (network(full.weights(), &BTreeMap::new())?, layers(full.weights(), first)?);
    let pictures = Pictures { model: full, images };
    let group = |of: fn(&Layer) -> &Var, lr: f64| -> Result<(AdamW, f64)> {
        let vars = layers.values().map(|l| of(l).clone()).collect();
        Ok((AdamW::new(vars, ParamsAdamW { lr, beta2: 0.99, weight_decay: 0.0, ..ParamsAdamW::default() })?, lr))
    };
    let mut optimisers = [group(|l| &l.weight, args.lr)?, group(|l| &l.bias, BIASES)?, group(|l| &l.log_step, STEPS)?];
    let (bar, mut sums, began) = (progress(args.steps, "rounding"), (0.0, 0.0), std::time::Instant::now());
    for step in 0..args.steps {
        let fall = 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / args.steps as f64).cos());
        optimisers.iter_mut().for_each(|(o, lr)| o.set_learning_rate(*lr * fall));
        let batch = pictures.batch(args.seed, 1 + step as u64, args.batch, &STREETS)?;
        let (descriptors, blocks, grads) = gradient(&batch, full, &net, &layers).with_context(|| format!("step {step}"))?;
        for (optimiser, _) in &mut optimisers {
            optimiser.step(&grads)?;
        }
        sums = (sums.0 + descriptors, sums.1 + blocks);
        bar.inc(1);
        if (step + 1) % 50 == 0 || step + 1 == args.steps {
            let n = (step % 50 + 1) as f64;
            let seconds = began.elapsed().as_secs_f64() / (step + 1) as f64;
            bar.suspend(|| {
                println!(
                    "step {:4}/{}: descriptors {:.6}, blocks {:.6}, {seconds:.2} s a step",
                    step + 1,
                    args.steps,
                    sums.0 / n,
                    sums.1 / n
                );
            });
            sums = (0.0, 0.0);
        }
    }
    bar.finish_and_clear();
    layers.iter().map(|(name, layer)| Ok((name.clone(), layer.rounded()?))).collect()
}

/// The images below `folders`.
fn own_images(folders: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let of = |folder: &Path| -> Result<Vec<PathBuf>> {
        let found: Vec<PathBuf> = list_images(folder)?.into_iter().map(|s| s.path).collect();
        ensure!(!found.is_empty(), "--images: {} has no image (JPEG or PNG)", folder.display());
        Ok(found)
    };
    let all = folders.iter().map(|f| of(f)).collect::<Result<Vec<_>>>()?;
    Ok(all.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Model {
        let mut weights = Weights::parse(&std::fs::read("../models/structvpr-street-v3.safetensors").unwrap()).unwrap();
        (weights.spec.input_width, weights.spec.input_height) = (96, 64);
        Model::new(weights).unwrap()
    }

    fn batch(model: &Model, number: u64, n: usize) -> Vec<RgbImage> {
        Pictures { model, images: &[] }.batch(5, number, n, &STREETS).unwrap()
    }

    /// What is fitted errs as much as the kernels do. (Not alike: a last bit decides how a value falls, and layers behind it make of
    /// that another sample of the same noise. That each layer is the kernels', the core's tests show.)
    #[test]
    fn a_network_is_rounded_as_int8_rounds_it() {
        let full = small();
        let nearest = full.nearest().unwrap();
        let layers = layers(full.weights(), &nearest).unwrap();
        let int8 = model(full.weights(), nearest.clone(), Precision::Int8).unwrap();
        let mut rounded = full.weights().clone();
        rounded.round(nearest).unwrap();
        let net = network(&rounded, &BTreeMap::new()).unwrap();
        let images = batch(&full, 3, 16);
        let kernels: f64 = distances(&full, &int8, &images).unwrap().iter().sum();
        let mut fitted = 0.0;
        for image in &images {
            let (_, d) = run(&net, full.weights(), Some(&layers), &full.preprocess(image).unwrap()).unwrap();
            let d = d.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let want = full.describe(image).unwrap();
            fitted += d.iter().zip(want.as_slice()).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        }
        assert!((0.75..1.33).contains(&(fitted / kernels)), "{fitted} {kernels}");
    }

    /// The gradient of the sum over pictures is the one that Candle finds for all of them at once.
    #[test]
    fn the_gradient_is_that_of_the_mean() {
        let full = small();
        let layers = layers(full.weights(), &full.nearest().unwrap()).unwrap();
        let net = network(full.weights(), &BTreeMap::new()).unwrap();
        let images = batch(&full, 0, 3);
        let (descriptors, blocks, grads) = gradient(&images, &full, &net, &layers).unwrap();
        let coarse = MobileNetV2::new(full.spec().padding, |name| -> Result<Tensor> {
            match name.rsplit_once('.').and_then(|(layer, kind)| Some((layers.get(layer)?, kind))) {
                Some((layer, "weight")) => Ok(layer.weights()?),
                Some((layer, _)) => Ok(layer.bias.as_tensor().clone()),
                None => Ok(full.weights().tensors[name].clone()),
            }
        })
        .unwrap();
        let (mut want, mut sums) = (Tensor::zeros((), DType::F32, &Device::Cpu).unwrap(), (0.0, 0.0));
        for image in &images {
            let x = full.preprocess(image).unwrap();
            let both = (run(&coarse, full.weights(), Some(&layers), &x).unwrap(), run(&net, full.weights(), None, &x).unwrap());
            let (d, b) = apart(&both.0, &both.1).unwrap();
            sums = (sums.0 + f64::from(d.to_scalar::<f32>().unwrap()) / 3.0, sums.1 + f64::from(b.to_scalar::<f32>().unwrap()) / 3.0);
            want = (want + ((d + b).unwrap() / 3.0).unwrap()).unwrap();
        }
        assert!((sums.0 - descriptors).abs() < 1e-6 && (sums.1 - blocks).abs() < 1e-6);
        let want = want.backward().unwrap();
        for (name, layer) in &layers {
            for var in [&layer.weight, &layer.bias, &layer.log_step] {
                let of = |g: &GradStore| g.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let (a, b) = (of(&grads), of(&want));
                let size = b.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
                let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(worst < 1e-3 * size, "{name}: {worst} of {size}");
            }
        }
    }

    #[test]
    fn what_is_fitted_is_nearer_for_ones_own_images_and_comes_out_the_same_again() {
        let (full, dir) = (small(), tempfile::tempdir().unwrap());
        let own: Vec<RgbImage> = (7..9).map(|n| leaves::picture(n, (96, 64)).unwrap()).collect();
        for (n, image) in own.iter().enumerate() {
            write_file(&dir.path().join(format!("{n}.png")), &image.to_png().unwrap()).unwrap();
        }
        let images = own_images(&[dir.path().to_path_buf()]).unwrap();
        let nearest = full.nearest().unwrap();
        let args =
            Args { model: PathBuf::new(), out: PathBuf::new(), name: None, images: Vec::new(), steps: 25, batch: 4, lr: 0.0, seed: 2 };
        let fitted = fit(&args, &full, &nearest, &images).unwrap();
        let error = |rounded: &RoundedNetwork| -> f64 {
            distances(&full, &model(full.weights(), rounded.clone(), Precision::F32).unwrap(), &own).unwrap().iter().sum()
        };
        let (before, after) = (error(&nearest), error(&fitted));
        assert!(after < 0.7 * before, "{before} -> {after}");
        assert!(fitted.iter().all(|(name, layer)| layer.codes == nearest[name].codes));
        let short = Args { steps: 2, lr: 0.5, ..args };
        assert!(fit(&short, &full, &nearest, &images).unwrap().iter().all(|(name, layer)| layer.codes != nearest[name].codes));
        assert!(fit(&short, &full, &nearest, &images).unwrap() == fit(&short, &full, &nearest, &images).unwrap());
        assert!(own_images(&[dir.path().join("none")]).is_err());
        std::fs::create_dir(dir.path().join("empty")).unwrap();
        let e = own_images(&[dir.path().join("empty")]).unwrap_err().to_string();
        assert!(e.contains("empty has no image"), "{e}");
    }
}
