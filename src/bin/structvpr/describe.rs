//! `structvpr describe`.

use crate::common;
use anyhow::{ensure, Result};
use rayon::prelude::*;
use std::path::PathBuf;
use std::process::ExitCode;
use structvpr::error::write_file;
use structvpr::eval::write_npz;
use structvpr::replay::{self, Shot, SourceOptions};

#[derive(clap::Args)]
pub struct Args {
    /// A bag (folder, .mcap, .db3), or one or more folders of images.
    #[arg(required = true)]
    input: Vec<PathBuf>,
    /// Weight file; the shipped model if none is given.
    #[arg(long)]
    model: Option<PathBuf>,
    #[command(flatten)]
    compute: common::ComputeArg,
    /// Where to write: array `descriptors` (N x 448, f32); names and stamps go to OUT with .csv.
    #[arg(long)]
    out: PathBuf,
    /// Image topic; needed only where a bag has several cameras.
    #[arg(long)]
    topic: Option<String>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let model = common::load_model(args.model.as_deref(), args.compute)?;
    let sequence = replay::open(&args.input, &SourceOptions { topic: args.topic.clone(), ..SourceOptions::default() })?;
    let bar = common::progress(sequence.len_hint(), "images");
    let (mut descriptors, mut table, mut failed) = (Vec::new(), csv::Writer::from_writer(Vec::new()), 0usize);
    table.write_record(["name", "stamp_ns"])?;
    let mut batch: Vec<Shot> = Vec::new();
    let mut flush = |batch: &mut Vec<Shot>| -> structvpr::error::Result<()> {
        let described: Vec<_> = batch.par_iter().map(|s| s.decode().and_then(|i| model.describe(&i))).collect();
        for (shot, d) in batch.drain(..).zip(described) {
            bar.inc(1);
            match d {
                Ok(d) => {
                    descriptors.push(d);
                    let record = [shot.name.as_str(), &shot.stamp_ns.to_string()];
                    table.write_record(record).map_err(|e| structvpr::error::Error::dataset(e.to_string()))?;
                }
                Err(e) => {
                    failed += 1;
                    eprintln!("warning: {}: {e}", shot.name);
                }
            }
        }
        Ok(())
    };
    let warnings = sequence.visit(&mut |shot| {
        batch.push(shot);
        if batch.len() == 16 {
            flush(&mut batch)?;
        }
        Ok(())
    })?;
    flush(&mut batch)?;
    bar.finish_and_clear();
    for w in sequence.warnings().iter().chain(&warnings) {
        eprintln!("warning: {w}");
    }
    ensure!(!descriptors.is_empty(), "no usable image");
    write_file(&args.out, &write_npz(&[("descriptors", &common::matrix(&descriptors))])?)?;
    let names = args.out.with_extension("csv");
    write_file(&names, &table.into_inner()?)?;
    println!(
        "{} descriptors of {} dimensions ({failed} images left out) -> {}, {}",
        descriptors.len(),
        descriptors[0].dim(),
        args.out.display(),
        names.display()
    );
    Ok(ExitCode::SUCCESS)
}
