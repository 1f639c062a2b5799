//! `structvpr eval`.

use crate::common;
use anyhow::{ensure, Result};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use structvpr::dataset::{self, Dataset};
use structvpr::descriptor::{Descriptor, ModelIdentity};
use structvpr::eval::{rank_all, recall_at, PrCurve, Recall, Scored, RECALL_AT};
use structvpr::model::ModelSpec;

#[derive(clap::Args)]
pub struct Args {
    /// KIND:PATH[:PATH][,key=value]..., e.g. traverse:DIR/day_right:DIR/day_left,tolerance=2; kinds: folder,
    /// traverse, vprbench, utm, msls, nordland, pitts30k.
    #[arg(long)]
    dataset: String,
    /// Weight file; the shipped model if none is given.
    #[arg(long, conflicts_with = "descriptors")]
    model: Option<PathBuf>,
    /// Score these descriptors instead of a model's: QUERY.npy:REFERENCE.npy or one .npz.
    #[arg(long)]
    descriptors: Option<String>,
    /// Folder for report.json and descriptors.npz.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Print report.json instead of the table.
    #[arg(long)]
    json: bool,
}

/// report.json.
#[derive(Serialize)]
pub struct Report {
    pub dataset: String,
    pub protocol: String,
    #[serde(flatten)]
    pub recall: Recall,
    pub references: usize,
    pub average_precision: f64,
    pub recall_at_100_precision: f64,
    pub threshold_at_100_precision: Option<f32>,
    /// `None` when descriptors came from a file.
    pub model: Option<ModelIdentity>,
    pub settings: Option<ModelSpec>,
    pub descriptors: Option<String>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let dataset = dataset::open(&args.dataset)?;
    let (queries, references, model) = match &args.descriptors {
        Some(text) => {
            let (q, r) = common::read_descriptor_pair(text)?;
            (q, r, None)
        }
        None => {
            let model = common::load_model(args.model.as_deref())?;
            let q = common::describe_all(&model, &dataset.queries, "queries")?;
            let r = common::describe_all(&model, &dataset.references, "references")?;
            (q, r, Some(model))
        }
    };
    let mut report = score(&dataset, &queries, &references)?;
    report.model = model.as_ref().map(|m| m.identity().clone());
    report.settings = model.as_ref().map(|m| m.spec().clone());
    report.descriptors = args.descriptors.clone();
    if let Some(out) = &args.out {
        common::make_dir(out)?;
        let npz = structvpr::eval::write_npz(&[("query", &common::matrix(&queries)), ("reference", &common::matrix(&references))])?;
        structvpr::error::write_file(&out.join("descriptors.npz"), &npz)?;
        common::write_json(&out.join("report.json"), &report)?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print_table(&report, args.out.as_deref());
    }
    Ok(ExitCode::SUCCESS)
}

/// Recall and the precision-recall curve of given descriptors.
pub fn score(dataset: &Dataset, queries: &[Descriptor], references: &[Descriptor]) -> Result<Report> {
    for (what, have, want) in [("query", queries.len(), dataset.queries.len()), ("reference", references.len(), dataset.references.len())] {
        ensure!(have == want, "{have} {what} descriptors, but {} has {want} {what} images", dataset.name);
    }
    let deepest = RECALL_AT.iter().copied().max().unwrap_or(1);
    let ranked = rank_all(queries, references, deepest)?;
    let scored: Vec<Scored> = ranked
        .iter()
        .zip(&dataset.positives)
        .filter_map(|(hits, positives)| {
            let best = hits.first()?;
            Some(Scored { score: best.similarity, correct: positives.contains(&best.row), possible: !positives.is_empty() })
        })
        .collect();
    let curve = PrCurve::new(&scored);
    Ok(Report {
        dataset: dataset.name.clone(),
        protocol: dataset.protocol.clone(),
        recall: recall_at(&ranked, &dataset.positives, &RECALL_AT),
        references: references.len(),
        average_precision: curve.average_precision,
        recall_at_100_precision: curve.recall_at_100_precision,
        threshold_at_100_precision: curve.threshold_at_100_precision,
        model: None,
        settings: None,
        descriptors: None,
    })
}

fn print_table(r: &Report, out: Option<&std::path::Path>) {
    println!("{}", r.dataset);
    println!("{}", r.protocol);
    println!(
        "{} queries ({} more without a true match, not counted), {} references",
        r.recall.queries, r.recall.queries_without_match, r.references
    );
    for (n, share) in &r.recall.recall {
        println!("R@{n:<3} {share:.3}");
    }
    println!("AP {:.3}   recall at 100 % precision {:.3}", r.average_precision, r.recall_at_100_precision);
    if let Some(out) = out {
        println!("written: {}/report.json, descriptors.npz", out.display());
    }
}
