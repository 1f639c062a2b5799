//! The synthetic street as a data set: images, exact label maps and depth, poses.

use crate::sampler::{renderer, View};
use crate::world::condition::NAMES;
use crate::world::World;
use anyhow::{ensure, Context, Result};
use opencv::core::{Mat, MatTraitConst, Vector};
use opencv::imgcodecs;
use rand::seq::SliceRandom;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use structvpr::error::write_file;

#[derive(clap::Args)]
pub struct Args {
    /// Folder to fill: a folder per condition with images/, labels/ (Cityscapes train ids), depth/
    /// (16 bit, millimetres, 0 is none) and poses.csv; and mixed.csv, a `manifest:` in which some of each place's
    /// conditions are references and the others queries.
    #[arg(long)]
    out: PathBuf,
    /// First street and how many; their places follow each other.
    #[arg(long, num_args = 2, default_values_t = [100, 2])]
    streets: Vec<u64>,
    /// Metres between places.
    #[arg(long, default_value_t = 8.0)]
    spacing: f64,
    /// Conditions to render.
    #[arg(long, value_delimiter = ',', default_values_t = NAMES.map(String::from))]
    conditions: Vec<String>,
    /// Width and height.
    #[arg(long, num_args = 2, default_values_t = [320, 240])]
    size: Vec<u32>,
}

/// Streets lie this far apart in the common frame, metres, so that no two places of different
/// streets are near.
const STREET_GAP: f64 = 10_000.0;

pub fn run(args: &Args) -> Result<()> {
    ensure!(args.spacing >= 1.0, "--spacing {} is below 1", args.spacing);
    ensure!(args.size.iter().all(|s| (64..=4096).contains(s)), "--size {:?} is outside 64 to 4096", args.size);
    let renderer = renderer(args.size[0], args.size[1]);
    let mut total = 0;
    let mut mixed: BTreeMap<(u64, u64), Vec<String>> = BTreeMap::new();
    for name in &args.conditions {
        let condition =
            NAMES.iter().position(|n| n == name).with_context(|| format!("no condition `{name}`; known: {}", NAMES.join(", ")))?;
        let dir = args.out.join(name);
        for sub in ["images", "labels", "depth"] {
            std::fs::create_dir_all(dir.join(sub)).with_context(|| format!("cannot make {}", dir.join(sub).display()))?;
        }
        let mut poses = String::from("name,x,y,heading_deg\n");
        for street in args.streets[0]..args.streets[0] + args.streets[1] {
            let world = World::new(street);
            let places = (world.route.length() / args.spacing) as u64;
            let one = |place: u64| -> Result<(String, String)> {
                let mut rng = ChaCha8Rng::seed_from_u64(street << 32 | place << 8 | condition as u64);
                let view = View::near(&mut rng, place as f64 * args.spacing, condition);
                let frame = view.render(&renderer, &world);
                let file = format!("{street:05}_{place:04}.png");
                write_file(&dir.join("images").join(&file), &frame.image.to_png()?)?;
                write_map(&dir.join("labels").join(&file), &frame.labels, args.size[1])?;
                let millimetres: Vec<u16> =
                    frame.depth.iter().map(|d| if *d * 1000.0 < 65535.0 { (d * 1000.0) as u16 } else { 0 }).collect();
                write_map(&dir.join("depth").join(&file), &millimetres, args.size[1])?;
                let (p, heading) = world.route.at(view.s, view.lateral);
                let at = format!("{:.3},{:.3},{:.3}", p.x + street as f64 * STREET_GAP, p.y, (heading + view.yaw).to_degrees());
                Ok((file, at))
            };
            // A view's light is its own seed's: in any order the same files.
            let made = (0..places).into_par_iter().map(one).collect::<Result<Vec<_>>>()?;
            for (place, (file, at)) in (0..places).zip(made) {
                let _ = writeln!(poses, "{file},{at}");
                mixed.entry((street, place)).or_default().push(format!("{name}/images/{file},SIDE,{at}"));
                total += 1;
            }
        }
        write_file(&dir.join("images").join("poses.csv"), poses.as_bytes())?;
    }
    write_file(&args.out.join("mixed.csv"), mixed_sides(mixed).as_bytes())?;
    println!("{}: {total} images, label maps and depth maps", args.out.display());
    Ok(())
}

/// A table of images in which half of each place's conditions, at least one, are references and the others queries: what a map
/// that was recorded on several days holds. Without places of the query's own condition among the references a training
/// never learns that two of them may differ. [ours]
fn mixed_sides(places: BTreeMap<(u64, u64), Vec<String>>) -> String {
    let mut table = String::from("image,side,x,y,heading_deg\n");
    for ((street, place), mut lines) in places {
        lines.shuffle(&mut ChaCha8Rng::seed_from_u64(street << 32 | place << 8 | 0xff));
        let references = (lines.len() / 2).max(1);
        for (i, line) in lines.iter().enumerate() {
            table += &line.replacen("SIDE", if i < references { "reference" } else { "query" }, 1);
            table.push('\n');
        }
    }
    table
}

/// A single-channel PNG of 8 or 16 bits.
fn write_map<T: opencv::core::DataType>(path: &Path, values: &[T], rows: u32) -> Result<()> {
    let flat = Mat::from_slice(values)?;
    let mut png = Vector::<u8>::new();
    imgcodecs::imencode(".png", &flat.reshape(1, rows as i32)?, &mut png, &Vector::new())?;
    Ok(write_file(path, png.as_slice())?)
}
