//! `structvpr compare`.

use crate::{common, eval};
use anyhow::{ensure, Context, Result};
use std::path::Path;
use std::process::ExitCode;
use structvpr::dataset;

#[derive(clap::Args)]
pub struct Args {
    /// As for `eval`.
    #[arg(long)]
    dataset: String,
    /// NAME=WEIGHTS (a weight file), NAME=QUERY.npy:REFERENCE.npy or NAME=FILE.npz; `shipped` alone is the
    /// shipped model. May be given several times.
    #[arg(long = "method", required = true)]
    methods: Vec<String>,
    #[command(flatten)]
    compute: common::ComputeArg,
    /// Print JSON instead of the table.
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let data = dataset::open(&args.dataset)?;
    let mut rows = Vec::new();
    for method in &args.methods {
        let (name, source) = method.split_once('=').unwrap_or((method, ""));
        ensure!(!source.is_empty() || name == "shipped", "--method {method}: wanted NAME=FILE, or `shipped`");
        let is_descriptors = source.contains(':') || source.ends_with(".npz");
        let (q, r) = if is_descriptors {
            common::read_descriptor_pair(source).with_context(|| format!("method {name}"))?
        } else {
            let model = common::load_model(Some(source).filter(|s| !s.is_empty()).map(Path::new), args.compute)?;
            (common::describe_all(&model, &data.queries, "queries")?, common::describe_all(&model, &data.references, "references")?)
        };
        rows.push((name.to_string(), eval::score(&data, &q, &r).with_context(|| format!("method {name}"))?));
    }
    if args.json {
        let all: serde_json::Map<String, serde_json::Value> =
            rows.into_iter().map(|(n, r)| Ok((n, serde_json::to_value(r)?))).collect::<Result<_>>()?;
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}: {} queries, {} references", data.name, data.queries.len(), data.references.len());
    let width = rows.iter().map(|(n, _)| n.len()).max().unwrap_or(6).max(6);
    let header: Vec<String> = structvpr::eval::RECALL_AT.iter().map(|n| format!("{:>6}", format!("R@{n}"))).collect();
    println!("{:width$} {}     AP  R@100P", "method", header.join(" "));
    for (name, r) in rows {
        let shares: Vec<String> = r.recall.recall.values().map(|v| format!("{v:>6.3}")).collect();
        println!("{name:width$} {}  {:.3}   {:.3}", shares.join(" "), r.average_precision, r.recall_at_100_precision);
    }
    Ok(ExitCode::SUCCESS)
}
