//! Segmentation, offline: label maps for the images of a folder. Never on the robot.

mod espnetv2;
mod layers;
mod pspnet;

pub use espnetv2::EspNetV2;
pub use layers::Map;
pub use pspnet::PspNet;

use crate::checkpoint::write_whole;
use crate::data::progress;
use crate::slme::LabelMap;
use crate::work::set_threads;
use anyhow::{bail, ensure, Context, Result};
use std::path::{Path, PathBuf};
use structvpr::dataset::{list_images, Sample};
use structvpr::error::read_file;
use structvpr::image::RgbImage;

/// A network that labels pixels. Others (HRNetV2-C1, UPerNet) implement this and join [`open`].
pub trait Segmenter: Sync {
    /// Number of classes; a label is below it.
    fn classes(&self) -> usize;
    /// Scores per class, at whatever size the network ends with. `x`: 3 x H x W, normalised with ImageNet's mean and
    /// standard deviation; sides are multiples of 32.
    fn logits(&self, x: &Map) -> Result<Map>;
    /// Whether its scores are enlarged with corners aligned.
    fn aligned(&self) -> bool;
}

/// The label of each pixel of an image of `size` (width, height), from the image resized to `input`.
pub fn label(segmenter: &dyn Segmenter, image: &RgbImage, input: (usize, usize)) -> Result<LabelMap> {
    const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
    const STD: [f32; 3] = [0.229, 0.224, 0.225];
    let (w, h) = input;
    // By area where it shrinks, bilinear where it grows.
    let (iw, ih) = (image.width().min(w as u32), image.height().min(h as u32));
    let shrunk = image.resize_area(iw, ih)?;
    let mut x = Map::zeros(3, ih as usize, iw as usize);
    for (c, plane) in x.data.chunks_exact_mut((iw * ih) as usize).enumerate() {
        for (o, p) in plane.iter_mut().zip(shrunk.data().chunks_exact(3)) {
            *o = (f32::from(p[c]) / 255.0 - MEAN[c]) / STD[c];
        }
    }
    if (iw as usize, ih as usize) != (w, h) {
        x = x.resize(h, w, false);
    }
    let scores = segmenter.logits(&x)?.resize(h, w, segmenter.aligned());
    ensure!(scores.data.iter().all(|v| v.is_finite()), "the network's scores are not finite");
    let plane = w * h;
    let mut ids = vec![0u8; plane];
    for (i, id) in ids.iter_mut().enumerate() {
        let mut best = f32::NEG_INFINITY;
        for c in 0..scores.channels {
            let v = scores.data[c * plane + i];
            if v > best {
                (best, *id) = (v, c as u8);
            }
        }
    }
    LabelMap { width: w, height: h, ids }.resize(image.width() as usize, image.height() as usize)
}

#[derive(clap::Args)]
pub struct Args {
    /// Folder of images; folders below it, too.
    #[arg(long)]
    images: PathBuf,
    /// Where label maps go: the same relative names, `.png`. Those that are there are not made again.
    #[arg(long)]
    out: PathBuf,
    /// pspnet (ADE20K's 150 classes) or espnetv2 (Cityscapes' 20).
    #[arg(long)]
    model: String,
    /// Weights; for pspnet two files, encoder then decoder.
    #[arg(long, num_args = 1..=2, required = true)]
    weights: Vec<PathBuf>,
    /// Width and height that images are resized to; multiples of 32. Default: 1024 512 for espnetv2, 640 480 for pspnet.
    #[arg(long, num_args = 2)]
    size: Option<Vec<usize>>,
    /// Name images that cannot be read and go on, in place of ending.
    #[arg(long)]
    skip_bad: bool,
    /// Processor threads; 0: all.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// A segmenter by name, with the input size it is used at.
///
/// Errors: an unknown name, the wrong number of files, weights that do not fit.
pub fn open(model: &str, weights: &[PathBuf]) -> Result<(Box<dyn Segmenter>, (usize, usize))> {
    let read = |p: &Path| read_file(p).map_err(anyhow::Error::from);
    match (model, weights) {
        ("espnetv2", [file]) => {
            let net = EspNetV2::new(&read(file)?).with_context(|| file.display().to_string())?;
            Ok((Box::new(net), (1024, 512)))
        }
        ("pspnet", [encoder, decoder]) => {
            let net = PspNet::new(&read(encoder)?, &read(decoder)?);
            let net = net.with_context(|| format!("{} and {}", encoder.display(), decoder.display()))?;
            Ok((Box::new(net), (640, 480)))
        }
        ("espnetv2" | "pspnet", files) => {
            bail!("--model {model} wants {} weight file(s), got {}", if model == "pspnet" { 2 } else { 1 }, files.len())
        }
        (other, _) => {
            bail!("--model {other} (known: pspnet, espnetv2; label maps of any other segmenter are read as PNG with a mapping file)")
        }
    }
}

pub fn run(args: &Args) -> Result<()> {
    set_threads(args.threads)?;
    let (segmenter, default) = open(&args.model, &args.weights)?;
    let size = args.size.as_ref().map_or(default, |s| (s[0], s[1]));
    ensure!(
        [size.0, size.1].iter().all(|s| s % 32 == 0 && (32..=4096).contains(s)),
        "--size {} {}: multiples of 32 up to 4096",
        size.0,
        size.1
    );
    let images = list_images(&args.images)?;
    ensure!(!images.is_empty(), "{} holds no JPEG or PNG", args.images.display());
    let target = |s: &Sample| args.out.join(&s.name).with_extension("png");
    let wanted: Vec<&Sample> = images.iter().filter(|s| !target(s).is_file()).collect();
    let bar = progress(images.len(), &args.model);
    bar.set_position((images.len() - wanted.len()) as u64);
    let (mut made, mut bad) = (0, 0);
    for sample in &wanted {
        let path = target(sample);
        let one = || -> Result<()> {
            let image = RgbImage::decode(&read_file(&sample.path)?).map_err(|e| e.at(&sample.path))?;
            let map = label(&*segmenter, &image, size).with_context(|| sample.path.display().to_string())?;
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
            }
            write_whole(&path, &map.to_png()?)
        };
        match one() {
            Ok(()) => made += 1,
            Err(e) if args.skip_bad && RgbImage::decode(&read_file(&sample.path).unwrap_or_default()).is_err() => {
                bar.suspend(|| eprintln!("training: left out {e:#}"));
                bad += 1;
            }
            Err(e) => return Err(e),
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    println!("{}: {made} label maps made, {} were there, {bad} images left out", args.out.display(), images.len() - wanted.len());
    Ok(())
}

#[cfg(test)]
mod tests;
