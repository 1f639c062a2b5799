//! What several commands share: the model, progress, descriptors of many images.

use anyhow::{ensure, Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use structvpr::config::VerificationConfig;
use structvpr::dataset::Sample;
use structvpr::descriptor::Descriptor;
use structvpr::error::{read_file, write_file};
use structvpr::image::RgbImage;
use structvpr::model::{ComputeDevice, Model, Precision};
use structvpr::replay::{self, Shot, SourceOptions};
use structvpr::rerank::Reranker;

/// Loads `path`, or the shipped model, whose name is then printed.
pub fn load_model(path: Option<&Path>, on: ComputeArg) -> Result<Model> {
    let model = open_model(path)?;
    if path.is_none() {
        eprintln!("model: {} (shipped; choose another with --model)", model.identity().name);
    }
    compute_on(model, on.device, on.compute)
}

/// Reads `path`, or the shipped model.
pub fn open_model(path: Option<&Path>) -> Result<Model> {
    match path {
        Some(path) => Ok(Model::from_bytes(&read_file(path)?).map_err(|e| e.at(path))?),
        None => Model::shipped().context("the shipped model"),
    }
}

/// The model there, in that precision; says so if it is another.
pub fn compute_on(model: Model, device: ComputeDevice, compute: Precision) -> Result<Model> {
    let model = model.on(device, compute)?;
    if model.precision() != compute {
        eprintln!("--compute {compute}: this processor has neither AMX nor AVX-512 BF16; computing in {}", model.precision());
    }
    Ok(model)
}

/// The middle of the times; 0 of none.
pub fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Where a model runs and what it computes in, as several commands take it.
#[derive(clap::Args, Clone, Copy, Default)]
pub struct ComputeArg {
    /// Where the network runs: cpu, or cuda:N in a build with --features cuda.
    #[arg(long, default_value = "cpu", value_name = "cpu|cuda:N")]
    pub device: ComputeDevice,
    /// What the network computes in: f32; bf16 (cpu), where the processor has AMX or AVX-512 BF16; int8 (cpu), which is faster where it
    /// has VNNI; f16 (cuda). Descriptors of all compare.
    #[arg(long, default_value = "f32", value_name = "f32|f16|bf16|int8")]
    pub compute: Precision,
}

/// The second stage, as several commands take it.
#[derive(clap::Args, Clone)]
pub struct RerankArgs {
    /// Re-rank the best by matching local features and their geometry: sift, orb, akaze, or a network (superpoint_vgg,
    /// superpoint_squeeze, xfeat), which wants --rerank-weights.
    #[arg(long)]
    pub rerank: Option<String>,
    /// Weights of the network: PyTorch, ONNX, or converted with `structvpr models`.
    #[arg(long, requires = "rerank")]
    pub rerank_weights: Option<PathBuf>,
    /// Keypoints per image, at most.
    #[arg(long, default_value_t = 800, requires = "rerank")]
    pub keypoints: usize,
    /// Weights of SuperGlue or LightGlue, which then matches instead of mutual nearest neighbours.
    #[arg(long, alias = "superglue-weights", requires = "rerank")]
    pub matcher_weights: Option<PathBuf>,
    /// Of the robust estimation: the same seed gives the same bytes.
    #[arg(long, default_value_t = 1, requires = "rerank")]
    pub seed: u64,
}

impl RerankArgs {
    /// As settings; `None` if no second stage was asked for.
    pub fn settings(&self) -> Option<VerificationConfig> {
        let text = |p: &Option<PathBuf>| p.as_ref().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
        Some(VerificationConfig {
            enabled: true,
            features: self.rerank.clone()?,
            weights: text(&self.rerank_weights),
            matcher_weights: text(&self.matcher_weights),
            keypoints: self.keypoints,
            seed: self.seed as usize,
            ..VerificationConfig::default()
        })
    }

    /// The second stage; `None` if none was asked for.
    pub fn reranker(&self) -> Result<Option<Reranker>> {
        anyhow::ensure!(self.keypoints > 0, "--keypoints must be at least 1");
        match self.settings() {
            Some(settings) => Ok(Reranker::from_settings(&settings)?),
            None => Ok(None),
        }
    }
}

/// A bar on stderr; nothing where stderr is no terminal.
pub fn progress(total: u64, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}").unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total).with_style(style).with_message(what)
}

/// Decodes an image file; the error names it.
pub fn load_image(path: &Path) -> structvpr::error::Result<RgbImage> {
    RgbImage::decode(&read_file(path)?).map_err(|e| e.at(path))
}

/// Descriptors of all samples, in order, in parallel.
pub fn describe_all(model: &Model, samples: &[Sample], what: &'static str) -> Result<Vec<Descriptor>> {
    let bar = progress(samples.len() as u64, what);
    let parts = samples
        .par_chunks(model.batch())
        .map(|part| {
            let images = part.iter().map(|s| load_image(&s.path)).collect::<structvpr::error::Result<Vec<_>>>()?;
            let all = model.describe_batch(&images).map_err(|e| e.at(&part[0].path));
            bar.inc(part.len() as u64);
            all
        })
        .collect::<structvpr::error::Result<Vec<_>>>()?;
    bar.finish_and_clear();
    Ok(parts.concat())
}

/// Makes the folder and says which one if that fails.
pub fn make_dir(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot make the folder {}", path.display()))
}

/// Writes pretty JSON, whole or not at all.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    Ok(write_file(path, text.as_bytes())?)
}

/// Descriptors as an f32 matrix.
pub fn matrix(descriptors: &[Descriptor]) -> structvpr::eval::Matrix {
    structvpr::eval::Matrix {
        rows: descriptors.len(),
        cols: descriptors.first().map_or(0, Descriptor::dim),
        data: descriptors.iter().flat_map(|d| d.as_slice().iter().map(|v| f64::from(*v))).collect(),
    }
}

/// Rows of a matrix as descriptors; the error names the file and the row.
pub fn descriptors(matrix: &structvpr::eval::Matrix, path: &Path) -> Result<Vec<Descriptor>> {
    anyhow::ensure!(matrix.cols > 0, "{}: no columns", path.display());
    let row = |(i, r): (usize, &[f64])| {
        Descriptor::new(r.iter().map(|v| *v as f32).collect()).with_context(|| format!("{}: row {i}", path.display()))
    };
    matrix.data.chunks_exact(matrix.cols).enumerate().map(row).collect()
}

/// `QUERY.npy:REFERENCE.npy`, or one .npz with arrays `query` and `reference`.
pub fn read_descriptor_pair(text: &str) -> Result<(Vec<Descriptor>, Vec<Descriptor>)> {
    let load = |p: &Path| -> Result<Vec<Descriptor>> {
        let m = structvpr::eval::read_matrix(&read_file(p)?).map_err(|e| e.at(p))?;
        descriptors(&m, p)
    };
    if let Some((q, r)) = text.split_once(':') {
        return Ok((load(Path::new(q))?, load(Path::new(r))?));
    }
    let path = PathBuf::from(text);
    let arrays = structvpr::eval::read_npz_matrices(&read_file(&path)?).map_err(|e| e.at(&path))?;
    let part = |name: &str| {
        let m = arrays.get(name).with_context(|| format!("{}: no array `{name}`; wanted `query` and `reference`", path.display()))?;
        descriptors(m, &path)
    };
    Ok((part("query")?, part("reference")?))
}

/// Descriptors of the images of an input, in its order.
pub struct Described {
    pub descriptors: Vec<Descriptor>,
    /// Name and stamp of each, nanoseconds.
    pub shots: Vec<(String, i64)>,
    /// Images that could not be used; each was told on stderr.
    pub failed: usize,
}

/// Describes a bag, or folders of images one after the other.
///
/// Errors: no image of it can be used.
pub fn describe_input(model: &Model, input: &[PathBuf], topic: Option<&str>) -> Result<Described> {
    let sequence = replay::open(input, &SourceOptions { topic: topic.map(Into::into), ..SourceOptions::default() })?;
    let bar = progress(sequence.len_hint(), "images");
    let mut done = Described { descriptors: Vec::new(), shots: Vec::new(), failed: 0 };
    let mut batch: Vec<Shot> = Vec::new();
    let mut flush = |batch: &mut Vec<Shot>| {
        let described: Vec<_> = batch.par_iter().map(|s| s.decode().and_then(|i| model.describe(&i))).collect();
        for (shot, d) in batch.drain(..).zip(described) {
            bar.inc(1);
            match d {
                Ok(d) => {
                    done.descriptors.push(d);
                    done.shots.push((shot.name, shot.stamp_ns));
                }
                Err(e) => {
                    done.failed += 1;
                    eprintln!("warning: {}: {e}", shot.name);
                }
            }
        }
    };
    let warnings = sequence.visit(&mut |shot| {
        batch.push(shot);
        if batch.len() == 16 {
            flush(&mut batch);
        }
        Ok(())
    })?;
    flush(&mut batch);
    bar.finish_and_clear();
    for w in sequence.warnings().iter().chain(&warnings) {
        eprintln!("warning: {w}");
    }
    ensure!(!done.descriptors.is_empty(), "no usable image");
    Ok(done)
}
