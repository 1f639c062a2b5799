//! Fixed cameras, a folder each, as a data set of day against night: every image of a camera shows one place.

use crate::checkpoint::write_whole;
use crate::slme::LabelMap;
use anyhow::{ensure, Context, Result};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use structvpr::dataset::list_images;
use structvpr::error::read_file;
use structvpr::image::RgbImage;

#[derive(clap::Args)]
pub struct Args {
    /// Folder with a folder of images per camera, at any depth.
    #[arg(long)]
    images: PathBuf,
    /// Folder for train.csv, validation.csv and test.csv (`manifest:` data sets: night queries, day references) and labels/.
    #[arg(long)]
    out: PathBuf,
    /// Label maps of the images, same relative names, `.png`. The vote of a camera's day maps, pixel by pixel, becomes the
    /// label map of all its images: a camera does not move, and a segmenter sees little at night.
    #[arg(long)]
    labels: Option<PathBuf>,
    /// Cameras (folder names) that only the test may show.
    #[arg(long, value_delimiter = ',', required = true)]
    test: Vec<String>,
    /// Cameras that only the validation may show.
    #[arg(long, value_delimiter = ',', required = true)]
    validation: Vec<String>,
    /// Most day images of a camera in validation.csv and test.csv: fewer make it harder.
    #[arg(long, default_value_t = 3)]
    references: usize,
}

/// Where a camera's brightness parts day from night: the threshold with the largest variance between both (Otsu).
fn threshold(luma: &[f32]) -> f32 {
    let mut sorted = luma.to_vec();
    sorted.sort_by(f32::total_cmp);
    let n = sorted.len();
    let total: f64 = sorted.iter().map(|v| f64::from(*v)).sum();
    let (mut sum, mut best) = (0.0, (f64::MIN, 0.0));
    for i in 0..n.saturating_sub(1) {
        sum += f64::from(sorted[i]);
        let (a, b) = ((i + 1) as f64, (n - i - 1) as f64);
        let between = a * b * (sum / a - (total - sum) / b).powi(2);
        if between > best.0 {
            best = (between, f64::from(sorted[i] + sorted[i + 1]) / 2.0);
        }
    }
    best.1 as f32
}

/// The commonest label of each pixel; maps of another size than the first do not vote.
fn vote(maps: &[LabelMap]) -> Option<LabelMap> {
    let first = maps.first()?;
    let mut ids = Vec::with_capacity(first.ids.len());
    for at in 0..first.ids.len() {
        let mut counts = [0u32; 256];
        for map in maps.iter().filter(|m| (m.width, m.height) == (first.width, first.height)) {
            counts[usize::from(map.ids[at])] += 1;
        }
        // The lower id wins a tie.
        let best = (0..256).rev().max_by_key(|i| counts[*i]).unwrap_or(0);
        ids.push(best as u8);
    }
    Some(LabelMap { ids, ..*first })
}

pub fn run(args: &Args) -> Result<()> {
    ensure!(args.references >= 1, "--references is 1 or more");
    let images = list_images(&args.images)?;
    let camera = |name: &str| Path::new(name).parent().and_then(|p| p.file_name()).map(|f| f.to_string_lossy().into_owned());
    let mut cameras: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (i, image) in images.iter().enumerate() {
        let name = camera(&image.name).with_context(|| format!("{} is in no camera's folder", image.path.display()))?;
        cameras.entry(name).or_default().push(i);
    }
    for name in args.test.iter().chain(&args.validation) {
        let known = cameras.keys().cloned().collect::<Vec<_>>().join(", ");
        ensure!(cameras.contains_key(name), "no camera `{name}` in {}; there are: {known}", args.images.display());
    }
    ensure!(args.test.iter().all(|t| !args.validation.contains(t)), "a camera is in --test and in --validation");
    let luma = images
        .par_iter()
        .map(|s| Ok(RgbImage::decode(&read_file(&s.path)?).map_err(|e| e.at(&s.path))?.luma_stats().0))
        .collect::<Result<Vec<f32>>>()?;
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let mut files: BTreeMap<&str, csv::Writer<Vec<u8>>> = BTreeMap::new();
    let mut said: BTreeMap<&str, (usize, usize, BTreeSet<&String>)> = BTreeMap::new();
    for (name, rows) in &cameras {
        let split = if args.test.contains(name) {
            "test"
        } else if args.validation.contains(name) {
            "validation"
        } else {
            "train"
        };
        let cut = threshold(&rows.iter().map(|i| luma[*i]).collect::<Vec<_>>());
        let (day, night): (Vec<usize>, Vec<usize>) = rows.iter().partition(|i| luma[**i] > cut);
        let writer = files.entry(split).or_insert_with(|| csv::Writer::from_writer(Vec::new()));
        let counts = said.entry(split).or_default();
        if counts.2.is_empty() {
            writer.write_record(["image", "side", "place"])?;
        }
        // Evenly over the day, so that its light differs.
        let most = if split == "train" { day.len() } else { args.references.min(day.len()) };
        let references = (0..most).map(|k| (day[k * day.len() / most.max(1)], "reference"));
        for (i, side) in night.iter().map(|i| (*i, "query")).chain(references) {
            let path = std::fs::canonicalize(&images[i].path).with_context(|| images[i].path.display().to_string())?;
            writer.write_record([&path.display().to_string(), side, name])?;
            *(if side == "query" { &mut counts.0 } else { &mut counts.1 }) += 1;
        }
        counts.2.insert(name);
        let Some(labels) = &args.labels else { continue };
        let maps = day
            .par_iter()
            .map(|i| {
                let path = labels.join(&images[*i].name).with_extension("png");
                LabelMap::decode(&read_file(&path)?).with_context(|| path.display().to_string())
            })
            .collect::<Result<Vec<_>>>()?;
        let map = vote(&maps).with_context(|| format!("camera {name} has no image by day"))?.to_png()?;
        for i in rows {
            let path = args.out.join("labels").join(&images[*i].name).with_extension("png");
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
            }
            write_whole(&path, &map)?;
        }
    }
    for (split, writer) in files {
        write_whole(&args.out.join(format!("{split}.csv")), &writer.into_inner().map_err(|e| anyhow::anyhow!("{e}"))?)?;
        let (queries, references, names) = &said[split];
        let names = names.iter().map(|n| n.as_str()).collect::<Vec<_>>().join(", ");
        println!("{split}: {queries} night queries, {references} day references, cameras {names}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brightness_parts_day_from_night_and_labels_are_voted() {
        let cut = threshold(&[10.0, 120.0, 14.0, 110.0, 9.0, 130.0, 125.0]);
        assert!((14.0..110.0).contains(&cut), "{cut}");
        let map = |ids: [u8; 3]| LabelMap { width: 3, height: 1, ids: ids.to_vec() };
        let voted = vote(&[map([1, 2, 3]), map([1, 5, 3]), map([9, 5, 4])]).unwrap();
        assert_eq!(voted.ids, [1, 5, 3]);
        assert_eq!(vote(&[map([4, 0, 0]), map([2, 0, 0])]).unwrap().ids[0], 2, "a tie goes to the lower id");
        assert!(vote(&[]).is_none());
    }
}
