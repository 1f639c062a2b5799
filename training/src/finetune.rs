//! The first model: ImageNet weights, fine-tuned on the synthetic street with a plain triplet loss.
//!
//! Only as far as the demo needs; StructVPR's own training (teacher, partition, weighted
//! distillation) is `stage1`, `partition` and `distill`. Batch norm stays folded: the weights are tuned as they will run.

use crate::sampler::{renderer, View};
use crate::world::condition::NAMES;
use crate::world::World;
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var, D};
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::PathBuf;
use structvpr::descriptor::Descriptor;
use structvpr::error::{read_file, write_file};
use structvpr::eval::{rank_all, recall_at};
use structvpr::model::{MobileNetV2, Model, Precision, Weights};

/// Seeds of training worlds begin here; those of validation at [`VALIDATION_WORLDS`], the demo's
/// below 1000: no street is in two of them.
const TRAINING_WORLDS: u64 = 10_000;
const VALIDATION_WORLDS: u64 = 5_000;

#[derive(clap::Args)]
pub struct Args {
    /// Weights to begin from (any layout that `structvpr convert` reads).
    #[arg(long)]
    init: PathBuf,
    /// Where to write the tuned model (f16).
    #[arg(long)]
    out: PathBuf,
    /// Name in the model's header.
    #[arg(long, default_value = "structvpr-synthetic-v1")]
    name: String,
    /// Optimiser steps.
    #[arg(long, default_value_t = 400)]
    steps: usize,
    /// Places per step; each is seen twice, under two conditions.
    #[arg(long, default_value_t = 10)]
    places: usize,
    /// Largest learning rate; falls to zero along a cosine.
    #[arg(long, default_value_t = 3e-5)]
    lr: f64,
    /// Width and height of training images and of the model's input.
    #[arg(long, num_args = 2, default_values_t = [320, 240])]
    size: Vec<u32>,
    /// Share of the tuned weights in the result; the rest is the start's. Averaging keeps what the
    /// start knew of real images (WiSE-FT, CVPR 2022).
    #[arg(long, default_value_t = 0.5)]
    mix: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Margin of the triplet loss [paper].
const MARGIN: f64 = 0.1;

pub fn run(args: &Args) -> Result<()> {
    ensure!((0.0..=1.0).contains(&args.mix), "--mix {} is outside 0 to 1", args.mix);
    let mut weights = Weights::parse(&read_file(&args.init)?).map_err(|e| e.at(&args.init))?;
    (weights.spec.input_width, weights.spec.input_height) = (args.size[0] as usize, args.size[1] as usize);
    weights.spec.name = args.name.clone();
    // What was fitted to the descriptors before does not fit those after.
    weights.whitening = None;
    (weights.int8, weights.spec.rounded_from) = (None, None);
    weights.spec.forget_recommended();
    weights.spec.training_data = format!("ImageNet, then {} steps on the synthetic street of this project", args.steps);
    let start = weights.tensors.clone();

    let before = Model::new(weights.clone())?;
    println!("before: {}", validate(&before, args)?);
    let vars: BTreeMap<String, Var> = weights.tensors.iter().map(|(n, t)| Ok((n.clone(), Var::from_tensor(t)?))).collect::<Result<_>>()?;
    let net = MobileNetV2::new(weights.spec.padding, |name| {
        vars.get(name).map(|v| v.as_tensor().clone()).with_context(|| format!("no tensor {name}"))
    })?;
    // The stem and the first stages see edges and colours; a renderer has nothing to teach them.
    let tuned = vars.iter().filter(|(n, _)| !["stem", "blocks.1.", "blocks.2.", "blocks.3."].iter().any(|p| n.starts_with(p)));
    let mut optimiser =
        AdamW::new(tuned.map(|(_, v)| v.clone()).collect(), ParamsAdamW { lr: args.lr, weight_decay: 1e-4, ..ParamsAdamW::default() })?;
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let (mut losses, began) = (Vec::new(), std::time::Instant::now());
    for step in 0..args.steps {
        optimiser.set_learning_rate(args.lr * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / args.steps as f64).cos()));
        let x = batch(&mut rng, args, &before)?;
        let d = net.describe(&x, weights.spec.pooling, weights.spec.tap_norm)?;
        let loss = triplet(&d, args.places)?;
        let value = loss.to_scalar::<f32>()?;
        ensure!(value.is_finite(), "step {step}: the loss is {value}");
        optimiser.backward_step(&loss)?;
        losses.push(value);
        if (step + 1) % 20 == 0 {
            let mean = losses.iter().rev().take(20).sum::<f32>() / 20.0;
            println!(
                "step {:4}/{}: loss {mean:.4}, {:.2} s a step",
                step + 1,
                args.steps,
                began.elapsed().as_secs_f64() / (step + 1) as f64
            );
        }
    }
    for (name, tensor) in &mut weights.tensors {
        let new = vars[name].as_tensor().detach();
        *tensor = ((new * args.mix)? + (&start[name] * (1.0 - args.mix))?)?;
    }
    let model = Model::new(weights.clone())?;
    println!("after: {}", validate(&model, args)?);
    write_file(&args.out, &weights.to_bytes(Precision::F16)?)?;
    println!("written: {}", args.out.display());
    Ok(())
}

/// Half of the places of a batch are from one street (the hard negatives), each at least 15 m from
/// the others; the rest from streets of their own. `model` is asked for its preprocessing only. Rows: first all anchors, then all positives.
fn batch(rng: &mut ChaCha8Rng, args: &Args, model: &Model) -> Result<Tensor> {
    let street = TRAINING_WORLDS + rng.random_range(0..2000);
    let shared = World::new(street);
    let gap = shared.route.length() / args.places as f64;
    let offset = rng.random_range(0.0..gap);
    let mut views: Vec<(u64, View)> = Vec::new();
    for i in 0..args.places {
        let own = i % 2 == 1;
        let (seed, s) = if own {
            (TRAINING_WORLDS + rng.random_range(0..2000), rng.random_range(0.0..250.0))
        } else {
            (street, offset + gap * i as f64)
        };
        let a = rng.random_range(0..NAMES.len());
        let b = (a + rng.random_range(1..NAMES.len())) % NAMES.len();
        for condition in [a, b] {
            views.push((seed, View::near(rng, s, condition)));
        }
    }
    let (w, h) = (args.size[0], args.size[1]);
    let renderer = renderer(w, h);
    let images = views
        .par_iter()
        .map(|(seed, view)| {
            let frame = view.render(&renderer, &World::new(*seed));
            Ok(model.preprocess(&frame.image)?)
        })
        .collect::<Result<Vec<Tensor>>>()?;
    let order = (0..2).flat_map(|side| (0..args.places).map(move |i| 2 * i + side));
    Ok(Tensor::cat(&order.map(|i| images[i].clone()).collect::<Vec<_>>(), 0)?)
}

/// `mean(max(0, d(q, p) - d(q, n) + m))` over each anchor with its hardest negative in the batch
/// [paper, section 4: triplet margin loss, m = 0.1, L2 distance of unit vectors].
fn triplet(d: &Tensor, places: usize) -> Result<Tensor> {
    let (q, p) = (d.narrow(0, 0, places)?, d.narrow(0, places, places)?);
    let positive = distance(&(&q * &p)?.sum(D::Minus1)?)?;
    let mut total = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    for (anchors, others) in [(&q, &p), (&p, &q), (&q, &q)] {
        let similar = anchors.matmul(&others.t()?)?;
        // A place is no negative of itself.
        let hidden = (&similar - (Tensor::eye(places, DType::F32, &Device::Cpu)? * 10.0)?)?;
        let negative = distance(&hidden.max(D::Minus1)?)?;
        total = (total + ((&positive - negative)? + MARGIN)?.relu()?.mean_all()?)?;
    }
    Ok((total / 3.0)?)
}

/// L2 distance of two unit vectors from their inner product.
fn distance(dot: &Tensor) -> candle_core::Result<Tensor> {
    // The floor keeps the root's gradient finite where two descriptors are the same.
    ((2.0 - (dot * 2.0)?)?.maximum(1e-6)?).sqrt()
}

/// Recall@1 on streets that training never saw: by sun against each other condition.
fn validate(model: &Model, args: &Args) -> Result<String> {
    let renderer = renderer(args.size[0], args.size[1]);
    let worlds: Vec<World> = (0..3).map(|i| World::new(VALIDATION_WORLDS + i)).collect();
    let places: Vec<(usize, f64)> =
        worlds.iter().enumerate().flat_map(|(w, world)| (0..40).map(move |i| (w, world.route.length() * f64::from(i) / 40.0))).collect();
    let describe = |condition: usize| -> Result<Vec<Descriptor>> {
        places
            .par_iter()
            .enumerate()
            .map(|(i, (w, s))| {
                let mut rng = ChaCha8Rng::seed_from_u64((condition * 1000 + i) as u64);
                let frame = View::near(&mut rng, *s, condition).render(&renderer, &worlds[*w]);
                Ok(model.describe(&frame.image)?)
            })
            .collect()
    };
    let references = describe(0)?;
    let truth: Vec<Vec<usize>> = (0..places.len()).map(|i| vec![i]).collect();
    let mut text = String::new();
    for (c, name) in NAMES.iter().enumerate().skip(1) {
        let ranked = rank_all(&describe(c)?, &references, 1)?;
        text += &format!("{name} R@1 {:.3}  ", recall_at(&ranked, &truth, &[1]).recall[&1]);
    }
    Ok(text)
}
