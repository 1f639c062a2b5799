//! `structvpr convert`.

use crate::common;
use anyhow::{bail, Context, Result};
use clap::builder::TypedValueParser;
use std::path::PathBuf;
use std::process::ExitCode;
use structvpr::error::{read_file, write_file};
use structvpr::model::{Model, Pooling, Precision, Weights, Whitening};

#[derive(clap::Args)]
pub struct Args {
    /// .pth or .safetensors: ours, torchvision's names, or conv00..conv52.
    input: PathBuf,
    /// Where to write our safetensors.
    #[arg(long)]
    out: PathBuf,
    /// Storage of the weights: f32, f16, or int8, which rounds the 1x1 convolutions to what `--compute int8` computes with, so
    /// that its descriptors and f32's hardly differ (`training round` rounds better); about half the bytes of f16.
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(["int8", "f16", "f32"]).try_map(|s| s.parse::<Precision>()), default_value = "f32")]
    dtype: Precision,
    /// Name that reports and maps show.
    #[arg(long)]
    name: Option<String>,
    /// Size that images are resized to, WxH.
    #[arg(long)]
    input_size: Option<String>,
    /// Pooling of the taps.
    #[arg(long, value_parser = ["gem", "avg"])]
    pooling: Option<String>,
    /// Power of GeM.
    #[arg(long)]
    gem_p: Option<f64>,
    /// L2-normalise each tap before they are joined.
    #[arg(long)]
    tap_norm: Option<bool>,
    /// SPDX identifier of the weights' licence.
    #[arg(long)]
    license: Option<String>,
    /// What the weights were trained on.
    #[arg(long)]
    training_data: Option<String>,
    /// Similarity threshold that the header recommends to the loop detector.
    #[arg(long)]
    similarity_threshold: Option<f32>,
    /// The smallest lead of the best place that it recommends.
    #[arg(long)]
    min_margin: Option<f32>,
    /// The smallest change of the descriptor that makes a keyframe (without odometry) that it recommends.
    #[arg(long)]
    min_descriptor_change: Option<f32>,
    /// Fit a whitening of the descriptors to these images (a folder, searched in depth, or a bag; several one after the
    /// other): a hundred at least, of different places, no labels needed. It replaces the one in the file.
    #[arg(long, num_args = 1.., value_name = "INPUT")]
    whiten: Vec<PathBuf>,
    /// Leave out the whitening in the file.
    #[arg(long, conflicts_with = "whiten")]
    no_whitening: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let mut weights = Weights::parse(&read_file(&args.input)?).map_err(|e| e.at(&args.input))?;
    let spec = &mut weights.spec;
    let pooled = (spec.pooling, spec.tap_norm);
    if let Some(size) = &args.input_size {
        let parsed = size.split_once('x').and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
        (spec.input_width, spec.input_height) = parsed.with_context(|| format!("--input-size {size}: wanted WxH, e.g. 640x480"))?;
    }
    let p = match (spec.pooling, args.gem_p) {
        (_, Some(p)) => p,
        (Pooling::Gem { p }, None) => p,
        (Pooling::Average, None) => 3.0,
    };
    match args.pooling.as_deref() {
        Some("avg") if args.gem_p.is_some() => bail!("--gem-p has no meaning with --pooling avg"),
        Some("avg") => spec.pooling = Pooling::Average,
        Some(_) => spec.pooling = Pooling::Gem { p },
        None if args.gem_p.is_some() => spec.pooling = Pooling::Gem { p },
        None => {}
    }
    spec.tap_norm = args.tap_norm.unwrap_or(spec.tap_norm);
    spec.name = args.name.unwrap_or(std::mem::take(&mut spec.name));
    spec.license = args.license.unwrap_or(std::mem::take(&mut spec.license));
    spec.training_data = args.training_data.unwrap_or(std::mem::take(&mut spec.training_data));
    let repooled = pooled != (spec.pooling, spec.tap_norm);
    if weights.whitening.is_some() && repooled && args.whiten.is_empty() && !args.no_whitening {
        eprintln!("note: the whitening of {} was fitted to another pooling and is left out; --whiten fits a new one", args.input.display());
    }
    if repooled || args.no_whitening || !args.whiten.is_empty() {
        weights.whitening = None;
        weights.spec.forget_recommended();
    }
    if !args.whiten.is_empty() {
        let common::Described { descriptors, failed, .. } = common::describe_input(&Model::new(weights.clone())?, &args.whiten, None)?;
        weights.whitening = Some(Whitening::fit(&descriptors)?);
        eprintln!("whitening fitted to {} images ({failed} left out)", descriptors.len());
    }
    let spec = &mut weights.spec;
    spec.similarity_threshold = args.similarity_threshold.or(spec.similarity_threshold);
    spec.min_margin = args.min_margin.or(spec.min_margin);
    spec.min_descriptor_change = args.min_descriptor_change.or(spec.min_descriptor_change);
    if args.dtype == Precision::Int8 && weights.int8.is_none() {
        let rounded = Model::new(weights.clone())?.rounded()?.into_owned();
        weights.round(rounded)?;
    }
    let bytes = weights.to_bytes(args.dtype)?;
    // What is written must load.
    let model = Model::from_bytes(&bytes)?;
    write_file(&args.out, &bytes)?;
    println!("{} ({} layout) -> {}: {} bytes", args.input.display(), weights.layout, args.out.display(), bytes.len());
    println!("{}", serde_json::to_string_pretty(model.spec())?);
    println!("sha256 {}", model.identity().sha256);
    Ok(ExitCode::SUCCESS)
}
