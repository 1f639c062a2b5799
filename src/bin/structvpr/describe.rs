//! `structvpr describe`.

use crate::common;
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;
use structvpr::error::write_file;
use structvpr::eval::write_npz;

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
    let common::Described { descriptors, shots, failed } = common::describe_input(&model, &args.input, args.topic.as_deref())?;
    let mut table = csv::Writer::from_writer(Vec::new());
    table.write_record(["name", "stamp_ns"])?;
    for (name, stamp_ns) in &shots {
        table.write_record([name.as_str(), &stamp_ns.to_string()])?;
    }
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
