//! `structvpr eval`.

use crate::common;
use anyhow::{ensure, Context, Result};
use rayon::prelude::*;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use structvpr::dataset::{self, Dataset, Sample};
use structvpr::descriptor::{Descriptor, ModelIdentity};
use structvpr::eval::{rank_all, recall_at, PrCurve, Recall, Scored, RECALL_AT};
use structvpr::features::{CompactFeatures, Features};
use structvpr::geometry::View;
use structvpr::map::Hit;
use structvpr::model::ModelSpec;
use structvpr::rerank::{Budget, Reranked, Reranker, SURE_LEAD};

#[derive(clap::Args)]
pub struct Args {
    /// KIND:PATH[:PATH][,key=value]..., e.g. traverse:DIR/day_right:DIR/day_left,tolerance=2; kinds: folder,
    /// traverse, vprbench, utm, msls, nordland, pitts30k.
    #[arg(long)]
    dataset: String,
    /// Weight file; the shipped model if none is given.
    #[arg(long, conflicts_with = "descriptors")]
    model: Option<PathBuf>,
    #[command(flatten)]
    compute: common::ComputeArg,
    /// Score these descriptors instead of a model's: QUERY.npy:REFERENCE.npy or one .npz.
    #[arg(long)]
    descriptors: Option<String>,
    #[command(flatten)]
    rerank: common::RerankArgs,
    /// References per query that are re-ranked; the paper's tables use 100.
    #[arg(long, default_value_t = 100, requires = "rerank")]
    top_k: usize,
    /// References at most so many apart in order are one place: rivals are looked for among the others.
    #[arg(long, default_value_t = 8, requires = "rerank")]
    place_radius: usize,
    /// Folder for report.json and descriptors.npz, and pairs.csv with --rerank.
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
    /// `None` without re-ranking; then the scores above are cosine similarities, else leads over the best rival.
    pub rerank: Option<RerankReport>,
}

/// How the best were re-ranked, and what came of it.
#[derive(Serialize)]
pub struct RerankReport {
    pub features: String,
    pub matcher: String,
    pub keypoints: usize,
    pub top_k: usize,
    pub place_radius: usize,
    pub recall_before: Recall,
    /// Pairs that were verified.
    pub pairs: usize,
    /// Mean time of one, matching and verification, milliseconds.
    #[serde(skip)]
    pub pair_ms: f64,
    /// The lead over the best rival at which a pair is believed.
    pub lead: f64,
    /// Pairs of a query and a true reference, and how many are believed.
    pub true_pairs: usize,
    pub true_believed: usize,
    /// Pairs of a query and a reference with no true one within the place radius, and how many are believed.
    pub wrong_pairs: usize,
    pub wrong_believed: usize,
    /// Most inliers of such a pair.
    pub wrong_inliers: usize,
    #[serde(skip)]
    rows: Vec<Vec<String>>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let dataset = dataset::open(&args.dataset)?;
    let (queries, references, model) = match &args.descriptors {
        Some(text) => {
            let (q, r) = common::read_descriptor_pair(text)?;
            (q, r, None)
        }
        None => {
            let model = common::load_model(args.model.as_deref(), args.compute)?;
            let q = common::describe_all(&model, &dataset.queries, "queries")?;
            let r = common::describe_all(&model, &dataset.references, "references")?;
            (q, r, Some(model))
        }
    };
    let mut report = match args.rerank.reranker()? {
        None => score(&dataset, &queries, &references)?,
        Some(reranker) => {
            ensure!(args.top_k > 0, "--top-k must be at least 1");
            rerank(&dataset, &queries, &references, &reranker, &args)?
        }
    };
    report.model = model.as_ref().map(|m| m.identity().clone());
    report.settings = model.as_ref().map(|m| m.spec().clone());
    report.descriptors = args.descriptors.clone();
    if let Some(out) = &args.out {
        common::make_dir(out)?;
        let npz = structvpr::eval::write_npz(&[("query", &common::matrix(&queries)), ("reference", &common::matrix(&references))])?;
        structvpr::error::write_file(&out.join("descriptors.npz"), &npz)?;
        common::write_json(&out.join("report.json"), &report)?;
        if let Some(r) = &report.rerank {
            let mut csv = csv::Writer::from_writer(Vec::new());
            csv.write_record(PAIR_COLUMNS)?;
            r.rows.iter().try_for_each(|row| csv.write_record(row))?;
            structvpr::error::write_file(&out.join("pairs.csv"), &csv.into_inner()?)?;
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print_table(&report, args.out.as_deref());
    }
    Ok(ExitCode::SUCCESS)
}

fn check_counts(dataset: &Dataset, queries: &[Descriptor], references: &[Descriptor]) -> Result<()> {
    for (what, have, want) in [("query", queries.len(), dataset.queries.len()), ("reference", references.len(), dataset.references.len())] {
        ensure!(have == want, "{have} {what} descriptors, but {} has {want} {what} images", dataset.name);
    }
    Ok(())
}

fn deepest() -> usize {
    RECALL_AT.iter().copied().max().unwrap_or(1)
}

/// Recall and the precision-recall curve of given descriptors.
pub fn score(dataset: &Dataset, queries: &[Descriptor], references: &[Descriptor]) -> Result<Report> {
    check_counts(dataset, queries, references)?;
    Ok(report(dataset, &rank_all(queries, references, deepest())?, None))
}

/// Of ranked hits; `similarity` of a hit is what the precision-recall curve goes along.
fn report(dataset: &Dataset, ranked: &[Vec<Hit>], rerank: Option<RerankReport>) -> Report {
    let scored: Vec<Scored> = ranked
        .iter()
        .zip(&dataset.positives)
        .filter_map(|(hits, positives)| {
            let best = hits.first()?;
            Some(Scored { score: best.similarity, correct: positives.contains(&best.row), possible: !positives.is_empty() })
        })
        .collect();
    let curve = PrCurve::new(&scored);
    Report {
        dataset: dataset.name.clone(),
        protocol: dataset.protocol.clone(),
        recall: recall_at(ranked, &dataset.positives, &RECALL_AT),
        references: dataset.references.len(),
        average_precision: curve.average_precision,
        recall_at_100_precision: curve.recall_at_100_precision,
        threshold_at_100_precision: curve.threshold_at_100_precision,
        model: None,
        settings: None,
        descriptors: None,
        rerank,
    }
}

fn extract_all(
    reranker: &Reranker,
    samples: &[Sample],
    wanted: impl Fn(usize) -> bool + Sync,
    what: &'static str,
) -> Result<Vec<Option<CompactFeatures>>> {
    let bar = common::progress((0..samples.len()).filter(|i| wanted(*i)).count() as u64, what);
    let one = |(i, s): (usize, &Sample)| -> Result<Option<CompactFeatures>> {
        if !wanted(i) {
            return Ok(None);
        }
        let features = reranker.extract(&common::load_image(&s.path)?).with_context(|| s.path.display().to_string())?;
        bar.inc(1);
        Ok(Some(CompactFeatures::new(&features)))
    };
    let all = samples.par_iter().enumerate().map(one).collect::<Result<Vec<_>>>()?;
    bar.finish_and_clear();
    Ok(all)
}

const PAIR_COLUMNS: [&str; 16] = [
    "query",
    "reference",
    "true",
    "rank",
    "global_rank",
    "similarity",
    "outcome",
    "matches",
    "inliers",
    "inlier_ratio",
    "coverage",
    "spread",
    "mean_error_px",
    "evidence",
    "lead",
    "score",
];

/// As [`score`], the best of each query ordered anew. Features are packed as a map packs them.
fn rerank(dataset: &Dataset, queries: &[Descriptor], references: &[Descriptor], reranker: &Reranker, args: &Args) -> Result<Report> {
    check_counts(dataset, queries, references)?;
    let before = rank_all(queries, references, args.top_k.max(deepest()))?;
    let mut wanted = vec![false; references.len()];
    before.iter().flat_map(|hits| hits.iter().take(args.top_k)).for_each(|h| wanted[h.row] = true);
    let packed = extract_all(reranker, &dataset.references, |i| wanted[i], "reference features")?;
    let asked = extract_all(reranker, &dataset.queries, |_| true, "query features")?;
    let bar = common::progress(queries.len() as u64, "re-ranking");
    let clock = std::time::Instant::now();
    let unpack = |f: &Option<CompactFeatures>| f.as_ref().and_then(|f| f.unpack().ok());
    let one = |(hits, query): (&Vec<Hit>, &Option<CompactFeatures>)| -> Result<Vec<Reranked>> {
        let query: Features = unpack(query).context("features of a query")?;
        let near = |a: usize, b: usize| a.abs_diff(b) <= args.place_radius;
        let reference = |row: usize| unpack(&packed[row]).map(|f| (f, None));
        let out = reranker.rerank(&View::of(&query), hits, &Budget::all_of(args.top_k), reference, near)?;
        bar.inc(1);
        Ok(out)
    };
    let ranked = before.par_iter().zip(&asked).map(one).collect::<Result<Vec<_>>>()?;
    bar.finish_and_clear();
    let pairs: usize = before.iter().map(|h| h.len().min(args.top_k)).sum();
    let mut r = RerankReport {
        features: reranker.identity(),
        matcher: reranker.matcher().into(),
        keypoints: args.rerank.keypoints,
        top_k: args.top_k,
        place_radius: args.place_radius,
        recall_before: recall_at(&before, &dataset.positives, &RECALL_AT),
        pairs,
        pair_ms: clock.elapsed().as_secs_f64() * 1e3 * rayon::current_num_threads() as f64 / pairs.max(1) as f64,
        lead: SURE_LEAD,
        true_pairs: 0,
        true_believed: 0,
        wrong_pairs: 0,
        wrong_believed: 0,
        wrong_inliers: 0,
        rows: Vec::new(),
    };
    for (q, (order, hits)) in ranked.iter().zip(&before).enumerate() {
        for (rank, c) in order.iter().enumerate().filter(|(_, c)| c.verification.is_some()) {
            let positives = &dataset.positives[q];
            let (right, believed) = (positives.contains(&c.hit.row), c.lead >= SURE_LEAD);
            let near = positives.iter().any(|p| p.abs_diff(c.hit.row) <= args.place_radius);
            let inliers = c.verified().map_or(0, |v| v.inliers.len());
            if right {
                (r.true_pairs, r.true_believed) = (r.true_pairs + 1, r.true_believed + usize::from(believed));
            } else if !near {
                (r.wrong_pairs, r.wrong_believed) = (r.wrong_pairs + 1, r.wrong_believed + usize::from(believed));
                r.wrong_inliers = r.wrong_inliers.max(inliers);
            }
            let global = hits.iter().position(|h| h.row == c.hit.row).unwrap_or(rank);
            r.rows.push(pair_row(dataset, q, c, right, rank, global));
        }
    }
    let order: Vec<Vec<Hit>> =
        ranked.iter().map(|r| r.iter().map(|c| Hit { row: c.hit.row, similarity: c.lead as f32 }).collect()).collect();
    Ok(report(dataset, &order, Some(r)))
}

fn pair_row(dataset: &Dataset, q: usize, c: &Reranked, right: bool, rank: usize, global: usize) -> Vec<String> {
    let outcome = match &c.verification {
        Some(Ok(_)) => "AGREES",
        Some(Err(failure)) => failure.name(),
        None => "",
    };
    let number = |f: &dyn Fn(&structvpr::geometry::Verification) -> f64| c.verified().map(|v| format!("{:.4}", f(v))).unwrap_or_default();
    vec![
        dataset.queries[q].name.clone(),
        dataset.references[c.hit.row].name.clone(),
        right.to_string(),
        rank.to_string(),
        global.to_string(),
        format!("{:.5}", c.hit.similarity),
        outcome.into(),
        c.verified().map(|v| v.matches.to_string()).unwrap_or_default(),
        c.verified().map(|v| v.inliers.len().to_string()).unwrap_or_default(),
        number(&|v| v.inlier_ratio),
        number(&|v| v.coverage),
        number(&|v| v.spread),
        number(&|v| v.mean_error_px),
        number(&|v| v.evidence),
        format!("{:.4}", c.lead),
        format!("{:.4}", c.score),
    ]
}

fn print_table(r: &Report, out: Option<&Path>) {
    println!("{}", r.dataset);
    println!("{}", r.protocol);
    println!(
        "{} queries ({} more without a true match, not counted), {} references",
        r.recall.queries, r.recall.queries_without_match, r.references
    );
    for (n, share) in &r.recall.recall {
        let before = r.rerank.as_ref().and_then(|r| r.recall_before.recall.get(n));
        println!("R@{n:<3} {share:.3}{}", before.map(|b| format!("   by the global descriptor {b:.3}")).unwrap_or_default());
    }
    if let Some(x) = &r.rerank {
        println!(
            "top {} re-ranked by {}, {} keypoints, {} matches: {:.1} ms a pair and thread",
            x.top_k, x.features, x.keypoints, x.matcher, x.pair_ms
        );
        println!(
            "with a lead of {:.2} over any other place: {} of {} true pairs, {} of {} wrong ones (which have {} inliers at most)",
            x.lead, x.true_believed, x.true_pairs, x.wrong_believed, x.wrong_pairs, x.wrong_inliers
        );
    }
    println!("AP {:.3}   recall at 100 % precision {:.3}", r.average_precision, r.recall_at_100_precision);
    if let Some(out) = out {
        let pairs = if r.rerank.is_some() { ", pairs.csv" } else { "" };
        println!("written: {}/report.json, descriptors.npz{pairs}", out.display());
    }
}
