//! `structvpr compare`.

use crate::{common, eval};
use anyhow::{ensure, Context, Result};
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use structvpr::dataset::{self, Dataset};
use structvpr::model::{ComputeDevice, Model, Precision};

#[derive(clap::Args)]
pub struct Args {
    /// As for `eval`.
    #[arg(long)]
    dataset: String,
    /// NAME=WEIGHTS (a weight file), NAME=QUERY.npy:REFERENCE.npy or NAME=FILE.npz; `shipped` alone is the
    /// shipped model. May be given several times.
    #[arg(long = "method", required = true)]
    methods: Vec<String>,
    /// Where the networks run: cpu, or cuda:N in a build with --features cuda.
    #[arg(long, default_value = "cpu", value_name = "cpu|cuda:N")]
    device: ComputeDevice,
    /// What they compute in. Each model is scored and timed in each of several, such as f32,bf16,int8, and NAME is then NAME@bf16:
    /// what a reduced precision costs stands beside the time that it saves.
    #[arg(long, value_delimiter = ',', default_value = "f32", value_name = "f32|f16|bf16|int8,...")]
    compute: Vec<Precision>,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
}

/// What a method's descriptors come from.
enum Source {
    /// A file of them.
    Descriptors(String),
    Model(Box<Model>),
}

/// A method's scores and, of a model, its time.
#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    report: eval::Report,
    time: Option<Time>,
}

/// What one image takes, from pixels to its descriptor.
#[derive(Serialize)]
struct Time {
    /// What the network computed in; f32 where bf16 was asked for and the processor multiplies none.
    compute: String,
    device: String,
    threads: usize,
    median_ms: f64,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let data = dataset::open(&args.dataset)?;
    // All models are loaded before any describes: a wrong name is not found after minutes.
    let methods = methods(&args)?;
    let mut reports = Vec::new();
    for (name, source) in &methods {
        let (q, r) = match source {
            Source::Descriptors(files) => common::read_descriptor_pair(files).with_context(|| format!("method {name}"))?,
            Source::Model(model) => {
                (common::describe_all(model, &data.queries, "queries")?, common::describe_all(model, &data.references, "references")?)
            }
        };
        let mut report = eval::score(&data, &q, &r).with_context(|| format!("method {name}"))?;
        match source {
            Source::Descriptors(files) => report.descriptors = Some(files.clone()),
            Source::Model(model) => {
                (report.model, report.settings) = (Some(model.identity().clone()), Some(model.spec().clone()));
            }
        }
        reports.push(report);
    }
    let times = times(&data, &methods)?;
    let names = methods.into_iter().map(|(name, _)| name);
    let rows: Vec<(String, Row)> = names.zip(reports.into_iter().zip(times).map(|(report, time)| Row { report, time })).collect();
    if args.json {
        let all: serde_json::Map<String, serde_json::Value> =
            rows.into_iter().map(|(n, r)| Ok((n, serde_json::to_value(r)?))).collect::<Result<_>>()?;
        println!("{}", serde_json::to_string_pretty(&all)?);
    } else {
        print_table(&data, &rows);
    }
    Ok(ExitCode::SUCCESS)
}

/// All methods by the names of their rows, models in every precision.
fn methods(args: &Args) -> Result<Vec<(String, Source)>> {
    let mut all: Vec<(String, Source)> = Vec::new();
    for method in &args.methods {
        let (name, source) = method.split_once('=').unwrap_or((method, ""));
        ensure!(!source.is_empty() || name == "shipped", "--method {method}: wanted NAME=FILE, or `shipped`");
        if source.contains(':') || source.ends_with(".npz") {
            all.push((name.into(), Source::Descriptors(source.into())));
            continue;
        }
        let model = common::open_model(Some(source).filter(|s| !s.is_empty()).map(Path::new))?;
        for compute in &args.compute {
            let name = if args.compute.len() > 1 { format!("{name}@{compute}") } else { name.into() };
            let model = common::compute_on(Model::new(model.weights().clone())?, args.device, *compute)?;
            all.push((name, Source::Model(Box::new(model))));
        }
    }
    let mut seen = BTreeSet::new();
    for (name, _) in &all {
        ensure!(seen.insert(name), "two methods are named {name}; give each its own NAME=, and --compute each precision once");
    }
    Ok(all)
}

/// Images that are timed.
const IMAGES: usize = 8;
/// Turns of each model, in each of which every image is timed once.
const TURNS: usize = 5;

/// Of every model the median time of an image, one after the other on all threads, as on a robot. Models take turns: all see the same
/// machine.
fn times(data: &Dataset, methods: &[(String, Source)]) -> Result<Vec<Option<Time>>> {
    let mut times: Vec<Option<Vec<f64>>> = methods.iter().map(|(_, s)| matches!(s, Source::Model(_)).then(Vec::new)).collect();
    if times.iter().all(Option::is_none) {
        return Ok(times.iter().map(|_| None).collect());
    }
    let images = data.queries.iter().take(IMAGES).map(|s| common::load_image(&s.path)).collect::<structvpr::error::Result<Vec<_>>>()?;
    for _ in 0..TURNS {
        for ((_, source), times) in methods.iter().zip(&mut times) {
            let (Source::Model(model), Some(times)) = (source, times) else { continue };
            // The first finds another model's weights in the caches.
            if let Some(first) = images.first() {
                model.describe(first)?;
            }
            for image in &images {
                let began = Instant::now();
                model.describe(image)?;
                times.push(began.elapsed().as_secs_f64());
            }
        }
    }
    let of = |((_, source), times): (&(String, Source), Option<Vec<f64>>)| {
        let (Source::Model(model), Some(mut times)) = (source, times) else { return None };
        Some(Time {
            compute: model.precision().to_string(),
            device: model.device_name(),
            threads: rayon::current_num_threads(),
            median_ms: 1e3 * common::median(&mut times),
        })
    };
    Ok(methods.iter().zip(times).map(of).collect())
}

fn print_table(data: &Dataset, rows: &[(String, Row)]) {
    println!("{}: {} queries, {} references", data.name, data.queries.len(), data.references.len());
    let width = rows.iter().map(|(n, _)| n.len()).max().unwrap_or(6).max(6);
    let header: Vec<String> = structvpr::eval::RECALL_AT.iter().map(|n| format!("{:>6}", format!("R@{n}"))).collect();
    println!("{:width$} {}     AP  R@100P  ms/image", "method", header.join(" "));
    for (name, Row { report: r, time }) in rows {
        let shares: Vec<String> = r.recall.recall.values().map(|v| format!("{v:>6.3}")).collect();
        let time = time.as_ref().map_or_else(String::new, |t| format!("{:>8.2}  {}", t.median_ms, t.compute));
        println!("{name:width$} {}  {:.3}   {:.3}  {time}", shares.join(" "), r.average_precision, r.recall_at_100_precision);
    }
    if let Some(t) = rows.iter().find_map(|(_, r)| r.time.as_ref()) {
        println!("ms/image: one image from pixels to its descriptor, {}, {} thread(s); the median, models in turns", t.device, t.threads);
    }
}
