//! `structvpr replay`.

use crate::common;
use anyhow::{ensure, Context, Result};
use serde_json::json;
use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use structvpr::config::{Config, VerificationConfig};
use structvpr::dataset::PoseTable;
use structvpr::error::write_file;
use structvpr::eval::report::{html, DrawnClosure, Pair, ReportData};
use structvpr::eval::{score_run, write_npz, LoopScores, Matrix, PrCurve, Scored, Verdict};
use structvpr::map::{Map, Store};
use structvpr::model::Model;
use structvpr::pipeline::{Evidence, LoopDetector, Outcome, Reason};
use structvpr::replay::{self, Run, Sequence, SourceOptions};
use structvpr::rerank::Reranker;

/// What to run over and how: shared with `doctor` and `calibrate`.
#[derive(clap::Args, Clone)]
pub struct RunArgs {
    /// A bag (folder, .mcap, .db3), or one or more folders of images, run one after the other.
    #[arg(required = true)]
    input: Vec<PathBuf>,
    /// Weight file; the shipped model if none is given.
    #[arg(long)]
    model: Option<PathBuf>,
    #[command(flatten)]
    compute: common::ComputeArg,
    /// Settings (YAML, as config/structvpr.yaml).
    #[arg(long)]
    config: Option<PathBuf>,
    /// Image topic; needed only where a bag has several cameras.
    #[arg(long)]
    topic: Option<String>,
    /// nav_msgs/Odometry topic; needed only where a bag has several.
    #[arg(long)]
    odom_topic: Option<String>,
    /// Registered depth in the bag (16UC1, 32FC1): verified matches then have a pose in metres.
    #[arg(long)]
    depth_topic: Option<String>,
    /// Ground truth in the bag: geometry_msgs/PoseStamped or sensor_msgs/NavSatFix.
    #[arg(long)]
    truth_topic: Option<String>,
    /// Do not use the bag's odometry (as a robot without wheels would run).
    #[arg(long)]
    no_odometry: bool,
    /// Map to begin with; written back with the run added. A new one is made if it is not there.
    #[arg(long)]
    map: Option<PathBuf>,
    /// Poses as CSV (x, y and one of name, stamp, stamp_ns; perhaps heading_deg) or TUM.
    #[arg(long)]
    ground_truth: Option<PathBuf>,
    /// Keyframes this near show one place, metres (or the unit of the ground truth).
    #[arg(long, default_value_t = 10.0)]
    truth_radius: f64,
    /// And turned no more than this, degrees, where headings are known.
    #[arg(long, default_value_t = 45.0)]
    truth_angle: f64,
    /// Images per second that a folder is taken to have been recorded at.
    #[arg(long, default_value_t = 1.0)]
    rate: f64,
    /// Remove lens distortion with the bag's camera_info before describing.
    #[arg(long)]
    undistort: bool,
    #[command(flatten)]
    rerank: common::RerankArgs,
    /// Places per keyframe that are re-ranked; the settings' `verification.candidates` if none is given.
    #[arg(long, requires = "rerank")]
    top_k: Option<usize>,
}

impl RunArgs {
    /// Radius (metres, or the truth's unit) and angle (degrees) within which two keyframes show one place.
    pub fn truth_limits(&self) -> (f64, f64) {
        (self.truth_radius, self.truth_angle)
    }

    /// Whether a map is begun with.
    pub fn has_map(&self) -> bool {
        self.map.is_some()
    }

    /// The same over another input.
    pub fn over(&self, input: &Path, ground_truth: Option<&Path>) -> Self {
        Self { input: vec![input.into()], ground_truth: ground_truth.map(Path::to_path_buf), ..self.clone() }
    }
}

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// Folder for loop_closures.csv, candidates.csv, descriptors.npz, report.json, report.html.
    #[arg(long)]
    out: PathBuf,
    /// Print report.json instead of the summary.
    #[arg(long)]
    json: bool,
}

/// A long run is written to its map so often, seconds.
const DURABLE_S: u32 = 5;

/// A run with its scores.
pub struct Finished {
    pub run: Run,
    pub scores: Option<LoopScores>,
    pub curve: Option<PrCurve>,
    pub sequence: Box<dyn Sequence>,
    pub model: Model,
    pub title: String,
}

/// Runs; writes nothing but the map.
pub fn execute(args: &RunArgs) -> Result<Finished> {
    ensure!(args.rate > 0.0 && args.rate <= 1000.0, "--rate {} is outside 0 to 1000", args.rate);
    ensure!(args.truth_radius > 0.0 && args.truth_radius.is_finite(), "--truth-radius {} is not above 0", args.truth_radius);
    let mut config = match &args.config {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            Config::from_yaml(&text).with_context(|| path.display().to_string())?
        }
        None => Config::default(),
    };
    if let Some(asked) = args.rerank.settings() {
        let given = config.verification;
        config.verification = VerificationConfig {
            candidates: args.top_k.unwrap_or(given.candidates),
            method: given.method,
            threshold_px: given.threshold_px,
            budget_ms: given.budget_ms,
            stop_lead: given.stop_lead,
            min_lead: given.min_lead,
            min_consistent: given.min_consistent,
            ..asked
        };
    }
    let truth = match &args.ground_truth {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            Some(PoseTable::parse(&text).map_err(|e| e.at(path))?)
        }
        None => None,
    };
    let model = common::load_model(args.model.as_deref(), args.compute)?;
    let (mut store, map) = match &args.map {
        Some(path) => {
            let opened = Store::open(path, model.identity(), &model.preprocessing(), f64::from(DURABLE_S))?;
            opened.notes.iter().for_each(|n| eprintln!("structvpr: {}: {n}", path.display()));
            (Some(opened.store), opened.map)
        }
        None => (None, Map::new(model.identity().clone())),
    };
    let options = SourceOptions {
        topic: args.topic.clone(),
        odom_topic: args.odom_topic.clone(),
        depth_topic: args.depth_topic.clone(),
        truth_topic: args.truth_topic.clone(),
        folder_rate_hz: args.rate,
    };
    let sequence = replay::open(&args.input, &options)?;
    let verifier = Reranker::from_settings(&config.verification)?;
    let mut detector = LoopDetector::new(config, map, model.spec().recommended())?;
    detector.set_verifier(verifier.map(Arc::new));
    let bar = common::progress(sequence.len_hint(), "images");
    let run_options = replay::RunOptions { undistort: args.undistort, odometry: !args.no_odometry };
    let mut written = Instant::now();
    let mut run = replay::run(&*sequence, &model, detector, truth.as_ref(), run_options, &mut |n, detector| {
        bar.set_position(n);
        match &mut store {
            Some(store) if written.elapsed() >= Duration::from_secs(DURABLE_S.into()) => {
                written = Instant::now();
                detector.write(store).map(drop)
            }
            _ => Ok(()),
        }
    })?;
    bar.finish_and_clear();
    if let Some(mut store) = store {
        run.detector.write(&mut store)?;
        store.close()?;
    }
    let known = run.truth.iter().any(Option::is_some);
    if args.ground_truth.is_some() {
        ensure!(
            known,
            "{}: no pose fits any keyframe, neither by name nor by stamp",
            args.ground_truth.as_deref().unwrap_or(Path::new("")).display()
        );
    }
    let scores = known.then(|| score_run(&run.keyframes(), args.truth_radius, args.truth_angle.to_radians()));
    let curve = known.then(|| similarity_curve(&run, args));
    let title = args.input.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" + ");
    Ok(Finished { run, scores, curve, sequence, model, title })
}

/// The best match of every keyframe by similarity alone.
fn similarity_curve(run: &Run, args: &RunArgs) -> PrCurve {
    let mut keyframes = run.keyframes();
    for k in &mut keyframes {
        k.closed_to = None;
    }
    for r in &run.decisions {
        keyframes[r.query].closed_to = r.evidence.map(|e| e.matched);
    }
    let forced = score_run(&keyframes, args.truth_radius, args.truth_angle.to_radians());
    let nothing = score_run(
        &keyframes
            .into_iter()
            .map(|mut k| {
                k.closed_to = None;
                k
            })
            .collect::<Vec<_>>(),
        args.truth_radius,
        args.truth_angle.to_radians(),
    );
    let scored: Vec<Scored> = run
        .decisions
        .iter()
        .filter_map(|r| {
            let (e, q) = (r.evidence?, r.query);
            let known = forced.verdicts[q] != Verdict::Unknown;
            known.then(|| Scored {
                score: e.similarity,
                correct: forced.verdicts[q] == Verdict::True,
                possible: nothing.verdicts[q] == Verdict::Missed,
            })
        })
        .collect();
    PrCurve::new(&scored)
}

/// 17 significant digits: every f64 survives.
fn digits(v: f64) -> String {
    format!("{v:.16e}")
}

fn optional(v: Option<f64>) -> String {
    v.map(digits).unwrap_or_default()
}

fn stamp(ns: i64) -> String {
    format!("{}.{:09}", ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000))
}

impl Finished {
    fn verdict(&self, row: usize) -> Option<Verdict> {
        self.scores.as_ref().map(|s| s.verdicts[row]).filter(|v| *v != Verdict::Unknown)
    }

    fn closures(&self) -> impl Iterator<Item = (usize, Evidence)> + '_ {
        self.run.decisions.iter().filter(|r| r.outcome == Outcome::Closure).filter_map(|r| Some((r.query, r.evidence?)))
    }

    /// Outcome or reason, and how often.
    pub fn reasons(&self) -> Vec<(String, u64)> {
        let mut counts = vec![("CLOSURE".to_string(), 0)];
        counts.extend(Reason::ALL.map(|r| (r.name().to_string(), 0)));
        for r in &self.run.decisions {
            let name = match r.outcome {
                Outcome::Closure => "CLOSURE",
                Outcome::Rejected(reason) => reason.name(),
            };
            counts.iter_mut().filter(|c| c.0 == name).for_each(|c| c.1 += 1);
        }
        counts.extend(self.run.skipped.iter().map(|(skip, n)| (skip.name().to_string(), *n)));
        counts.retain(|c| c.1 > 0 || c.0 == "CLOSURE");
        counts
    }

    fn closures_csv(&self) -> Result<Vec<u8>> {
        let mut out = csv::Writer::from_writer(Vec::new());
        out.write_record([
            "query_id",
            "query_stamp",
            "query_name",
            "match_id",
            "match_stamp",
            "match_name",
            "similarity",
            "margin",
            "consistent_count",
            "time_gap_s",
            "verdict",
        ])?;
        let map = self.run.detector.map();
        let keyframes = map.keyframes();
        for (q, e) in self.closures() {
            let (a, b) = (&keyframes[q], &keyframes[e.matched]);
            out.write_record([
                map.id_of(q).to_string(),
                stamp(a.stamp_ns),
                a.name.clone(),
                map.id_of(e.matched).to_string(),
                stamp(b.stamp_ns),
                b.name.clone(),
                digits(e.similarity.into()),
                optional(e.margin.map(f64::from)),
                e.consistent_count.to_string(),
                digits(e.time_gap_s),
                self.verdict(q).map(verdict_name).unwrap_or_default().to_string(),
            ])?;
        }
        Ok(out.into_inner()?)
    }

    fn candidates_csv(&self) -> Result<Vec<u8>> {
        let mut out = csv::Writer::from_writer(Vec::new());
        out.write_record([
            "query_id",
            "query_stamp",
            "query_name",
            "decision",
            "reject_reason",
            "match_id",
            "match_stamp",
            "match_name",
            "similarity",
            "second_id",
            "second_similarity",
            "margin",
            "consistent_count",
            "chain_similarity",
            "pace",
            "pace_error",
            "time_gap_s",
            "odometry_distance_m",
            "verdict",
            "geometry",
            "inliers",
            "lead",
            "translation_m",
        ])?;
        let keyframes = self.run.detector.map().keyframes();
        for r in &self.run.decisions {
            let (q, e) = (r.query, r.evidence);
            let (decision, reason) = match r.outcome {
                Outcome::Closure => ("ACCEPTED", "NONE"),
                Outcome::Rejected(reason) => ("REJECTED", reason.name()),
            };
            let id = |row: usize| self.run.detector.map().id_of(row).to_string();
            let matched = e.map(|e| &keyframes[e.matched]);
            let second = e.and_then(|e| e.second);
            out.write_record([
                id(q),
                stamp(keyframes[q].stamp_ns),
                keyframes[q].name.clone(),
                decision.into(),
                reason.into(),
                e.map(|e| id(e.matched)).unwrap_or_default(),
                matched.map(|m| stamp(m.stamp_ns)).unwrap_or_default(),
                matched.map(|m| m.name.clone()).unwrap_or_default(),
                optional(e.map(|e| e.similarity.into())),
                second.map(|s| id(s.row)).unwrap_or_default(),
                optional(second.map(|s| s.similarity.into())),
                optional(e.and_then(|e| e.margin).map(f64::from)),
                e.map(|e| e.consistent_count.to_string()).unwrap_or_default(),
                optional(e.map(|e| e.chain_similarity.into())),
                optional(e.and_then(|e| e.advance).map(|a| a.pace)),
                optional(e.and_then(|e| e.advance).map(|a| a.error)),
                optional(e.map(|e| e.time_gap_s)),
                optional(e.and_then(|e| e.odometry_distance_m)),
                self.verdict(q).map(verdict_name).unwrap_or_default().to_string(),
                geometry_name(r.reranked.first()),
                r.reranked.first().and_then(|r| r.verified()).map(|v| v.inliers.len().to_string()).unwrap_or_default(),
                optional(e.and_then(|e| e.lead)),
                optional(r.reranked.first().and_then(|r| metres(r.verified()?))),
            ])?;
        }
        Ok(out.into_inner()?)
    }

    fn report_json(&self) -> serde_json::Value {
        let (run, map) = (&self.run, self.run.detector.map());
        json!({
            "input": self.title,
            "model": self.model.identity(),
            "model_settings": self.model.spec(),
            "settings": run.detector.config(),
            "similarity_threshold": run.detector.threshold(),
            "min_margin": run.detector.min_margin(),
            "min_descriptor_change": run.detector.min_descriptor_change(),
            "images": run.images,
            "keyframes": run.decisions.len(),
            "map_keyframes": map.keyframes().len(),
            "closures": self.closures().count(),
            "outcomes": self.reasons().into_iter().collect::<BTreeMap<_, _>>(),
            "loops": self.scores,
            "average_precision": self.curve.as_ref().map(|c| c.average_precision),
            "recall_at_100_precision": self.curve.as_ref().map(|c| c.recall_at_100_precision),
            "threshold_at_100_precision": self.curve.as_ref().and_then(|c| c.threshold_at_100_precision),
            "warnings": run.warnings,
        })
    }

    fn positions(&self) -> (Vec<Option<(f64, f64)>>, &'static str) {
        if self.scores.is_some() {
            return (self.run.truth.iter().map(|t| t.map(|t| (t.x, t.y))).collect(), "the ground truth");
        }
        let odom = |k: &structvpr::map::Keyframe| k.odom_from_base.map(|p| (p.translation.x, p.translation.y));
        (self.run.detector.map().keyframes().iter().map(odom).collect(), "odometry")
    }

    fn report_html(&self) -> Result<String> {
        let drawn = |(query, e): (usize, Evidence)| DrawnClosure {
            query,
            matched: e.matched,
            verdict: self.verdict(query).unwrap_or(Verdict::None),
        };
        let (positions, positions_from) = self.positions();
        let (best, worst) = self.pairs()?;
        let run = &self.run;
        let summary = [
            ("model", format!("{} ({})", self.model.identity().name, &self.model.identity().sha256[..12])),
            ("similarity threshold", format!("{:.4}", run.detector.threshold())),
            ("images", run.images.to_string()),
            ("keyframes", run.decisions.len().to_string()),
            ("settings", serde_json::to_string(run.detector.config())?),
        ];
        Ok(html(&ReportData {
            title: &format!("StructVPR replay: {}", self.title),
            summary: summary.into_iter().map(|(k, v)| (k.to_string(), v)).collect(),
            positions,
            positions_from,
            closures: self.closures().map(drawn).collect(),
            index: run.detector.map().index(),
            curve: self.curve.clone(),
            threshold: run.detector.threshold(),
            scores: self.scores.clone(),
            reasons: self.reasons(),
            best,
            worst,
            warnings: run.warnings.clone(),
        })?)
    }

    /// The surest right closures, and the worst: false ones, then missed loops, then the least sure.
    fn pairs(&self) -> Result<(Vec<Pair>, Vec<Pair>)> {
        const SHOWN: usize = 6;
        let keyframes = self.run.detector.map().keyframes();
        let all: Vec<(usize, Evidence, bool)> =
            self.run.decisions.iter().filter_map(|r| Some((r.query, r.evidence?, r.outcome == Outcome::Closure))).collect();
        let rank = |(q, e, closed): &(usize, Evidence, bool)| {
            let group = match (self.verdict(*q), closed) {
                (Some(Verdict::False), true) => 0,
                (Some(Verdict::Missed), _) => 1,
                (_, true) => 2,
                _ => 3,
            };
            (group, e.similarity)
        };
        let mut sorted = all.clone();
        sorted.sort_by(|a, b| {
            let ((ga, sa), (gb, sb)) = (rank(a), rank(b));
            // Missed loops: those nearest to being found teach most.
            ga.cmp(&gb).then(if ga == 1 { sb.total_cmp(&sa) } else { sa.total_cmp(&sb) })
        });
        // Frames beside each other look alike: show one of each stretch.
        let spread = |list: Vec<(usize, Evidence, bool)>| -> Vec<(usize, Evidence, bool)> {
            let mut shown: Vec<(usize, Evidence, bool)> = Vec::new();
            for item in list {
                if shown.len() < SHOWN && shown.iter().all(|s| s.0.abs_diff(item.0) > 4) {
                    shown.push(item);
                }
            }
            shown
        };
        let worst = spread(sorted.into_iter().filter(|i| rank(i).0 < 3).collect());
        let mut good: Vec<_> = all.into_iter().filter(|(q, _, closed)| *closed && self.verdict(*q) != Some(Verdict::False)).collect();
        good.sort_by(|a, b| b.1.similarity.total_cmp(&a.1.similarity));
        let best = spread(good);
        let names: HashSet<&str> =
            best.iter().chain(&worst).flat_map(|(q, e, _)| [keyframes[*q].name.as_str(), keyframes[e.matched].name.as_str()]).collect();
        let images = self.run.fetch(&*self.sequence, &names)?;
        let pair = |(q, e, closed): &(usize, Evidence, bool)| {
            let mut caption = format!("{} / {}: similarity {:.3}", keyframes[*q].name, keyframes[e.matched].name, e.similarity);
            if let Some(m) = e.margin {
                let _ = write!(caption, ", margin {m:.3}");
            }
            let _ = write!(caption, ", {} in a row", e.consistent_count);
            let outcome = self.run.decisions.iter().find(|r| r.query == *q).map(|r| r.outcome);
            if let Some(Outcome::Rejected(reason)) = outcome {
                let _ = write!(caption, "; rejected: {}", reason.name());
            }
            if let Some(v) = self.verdict(*q) {
                let _ = write!(caption, "; truth: {}", verdict_name(v));
            }
            let image = |name: &str| images.get(name).cloned();
            let good = *closed && self.verdict(*q) != Some(Verdict::False);
            Pair { caption, good, query: image(&keyframes[*q].name), matched: image(&keyframes[e.matched].name) }
        };
        Ok((best.iter().map(pair).collect(), worst.iter().map(pair).collect()))
    }
}

/// Distance between the two cameras, where depth tells it.
fn metres(v: &structvpr::geometry::Verification) -> Option<f64> {
    v.pose.filter(|p| p.scale_known).map(|p| p.reference_from_query.translation.vector.norm())
}

/// What the geometry of the first candidate says: the model that agrees, or why none does.
fn geometry_name(first: Option<&structvpr::rerank::Reranked>) -> String {
    match first.and_then(|r| r.verification.as_ref()) {
        Some(Ok(v)) => v.method.name().to_uppercase(),
        Some(Err(failure)) => failure.name().into(),
        None => String::new(),
    }
}

fn verdict_name(v: Verdict) -> &'static str {
    match v {
        Verdict::True => "true",
        Verdict::False => "false",
        Verdict::Missed => "missed",
        Verdict::None => "none",
        Verdict::Unknown => "unknown",
    }
}

pub fn run(args: Args) -> Result<ExitCode> {
    common::make_dir(&args.out)?;
    let done = execute(&args.run)?;
    let write = |name: &str, bytes: &[u8]| write_file(&args.out.join(name), bytes);
    write("loop_closures.csv", &done.closures_csv()?)?;
    write("candidates.csv", &done.candidates_csv()?)?;
    let index = done.run.detector.map().index();
    let rows = index.len();
    let cols = if rows == 0 { 0 } else { index.row(0).len() };
    let data = (0..rows).flat_map(|i| index.row(i).iter().map(|v| f64::from(*v))).collect();
    write("descriptors.npz", &write_npz(&[("descriptors", &Matrix { rows, cols, data })])?)?;
    let report = done.report_json();
    common::write_json(&args.out.join("report.json"), &report)?;
    write("report.html", done.report_html()?.as_bytes())?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(ExitCode::SUCCESS);
    }
    for w in &done.run.warnings {
        eprintln!("warning: {w}");
    }
    print_summary(&done);
    println!("report: {}", args.out.join("report.html").display());
    Ok(ExitCode::SUCCESS)
}

/// The run in a few lines.
pub fn print_summary(done: &Finished) {
    let run = &done.run;
    println!(
        "{} images, {} keyframes, {} closures (threshold {:.3})",
        run.images,
        run.decisions.len(),
        done.closures().count(),
        run.detector.threshold()
    );
    if let Some(s) = &done.scores {
        println!(
            "loops found: {} of {} possible ({:.1} %), false closures: {}, path {:.2} km",
            s.true_closures,
            s.possible,
            100.0 * s.found_share,
            s.false_closures,
            s.path_km
        );
    }
    let reasons: Vec<String> = done.reasons().iter().map(|(n, c)| format!("{n} {c}")).collect();
    println!("{}", reasons.join(", "));
}
