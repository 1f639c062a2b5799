//! `structvpr calibrate`.

use crate::replay::{execute, Finished, RunArgs};
use anyhow::{ensure, Context, Result};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use structvpr::confidence::{calibration, threshold, Calibration, Confidence, Example, Threshold};
use structvpr::error::write_file;
use structvpr::eval::same_place;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// The calibration to write: `publish.calibration` of the node.
    #[arg(long)]
    out: PathBuf,
    /// Precision that the printed thresholds are to give.
    #[arg(long, default_value_t = 0.99)]
    precision: f64,
    /// Another bag, with ground truth of the same kind, that the calibration is judged on.
    #[arg(long)]
    check: Option<PathBuf>,
    /// Ground truth of that bag, if it is not in it (as --ground-truth).
    #[arg(long, requires = "check")]
    check_ground_truth: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The best match of each keyframe with its truth, in the order of the drive.
fn examples(done: &Finished, radius: f64, degrees: f64) -> Vec<Example> {
    let truth = |row: usize| done.run.truth.get(row).and_then(|t| t.as_ref());
    let one = |d: &structvpr::pipeline::Decision| {
        let e = d.evidence?;
        Some(Example::new(&e, same_place(truth(d.query)?, truth(e.matched)?, radius, degrees.to_radians())))
    };
    done.run.decisions.iter().filter_map(one).collect()
}

pub fn run(args: Args) -> Result<ExitCode> {
    ensure!(args.precision > 0.0 && args.precision <= 1.0, "--precision {} is outside 0 to 1", args.precision);
    ensure!(!args.run.has_map(), "--map is not for calibrating: a drive is judged by itself");
    let done = execute(&args.run)?;
    let (radius, degrees) = args.run.truth_limits();
    let found = examples(&done, radius, degrees);
    ensure!(
        !found.is_empty(),
        "{}: no keyframe has both a match and a ground truth; a topic of poses with `ground_truth` in its name, NavSatFix, or --ground-truth is needed",
        done.title
    );
    let verification = done.run.detector.verifier().map(|_| done.run.detector.config().verification.features.clone()).unwrap_or_default();
    let model = done.model.identity();
    let fit = Confidence::fit(&found, model, &verification, &done.title).with_context(|| done.title.clone())?;
    let unseen = Confidence::unseen(&found, model);
    let own = unseen.as_ref().map(|p| calibration(p, &found));
    let similarities: Vec<f64> = found.iter().map(|e| e.similarity).collect();
    let by_similarity = threshold(&similarities, &found, args.precision);
    let by_confidence = threshold(unseen.as_ref().unwrap_or(&fit.of_all(&found)), &found, args.precision);
    let check = match &args.check {
        Some(path) => {
            let other = execute(&args.run.over(path, args.check_ground_truth.as_deref()))?;
            let seen = examples(&other, radius, degrees);
            ensure!(!seen.is_empty(), "{}: no keyframe has both a match and a ground truth", other.title);
            Some((
                other.title,
                calibration(&fit.of_all(&seen), &seen),
                calibration(&seen.iter().map(|e| e.similarity.clamp(0.0, 1.0)).collect::<Vec<_>>(), &seen),
            ))
        }
        None => None,
    };
    write_file(&args.out, fit.to_json().as_bytes())?;
    if args.json {
        let check = check.as_ref().map(|(title, c, raw)| json!({"on": title, "confidence": c, "similarity_taken_as_probability": raw}));
        let all = json!({
            "file": args.out, "fitted_on": done.title, "own_drive_in_blocks": own, "check": check, "precision": args.precision,
            "similarity_threshold": by_similarity, "confidence_threshold": by_confidence,
        });
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}: {} matches, {} of them true", done.title, found.len(), found.iter().filter(|e| e.is_true).count());
    match &own {
        Some(c) => print("on parts of this drive that the fit did not see", c),
        None => println!("too few true or wrong matches to judge the fit on a part of this drive that it did not see"),
    }
    match &check {
        Some((title, c, raw)) => {
            print(&format!("on {title}"), c);
            println!("  (a similarity taken as a probability: expected calibration error {:.3})", raw.expected_calibration_error);
        }
        None => println!("judge it on another drive with --check BAG"),
    }
    let told = |what: &str, t: Option<Threshold>| match t {
        Some(t) => println!(
            "for a precision of {}: {what} {:.4} (precision {:.3}, {:.1} % of the true matches)",
            args.precision,
            t.value,
            t.precision,
            100.0 * t.recall
        ),
        None => println!("no threshold of {what} gives a precision of {} on this drive", args.precision),
    };
    told("decision.similarity_threshold", by_similarity);
    told("confidence", by_confidence);
    println!("calibration: {} (publish.calibration)", args.out.display());
    Ok(ExitCode::SUCCESS)
}

fn print(on: &str, c: &Calibration) {
    println!(
        "{on}: {} matches, {} true; expected calibration error {:.3}, Brier score {:.3}",
        c.matches, c.true_matches, c.expected_calibration_error, c.brier
    );
    println!("  {:>8}  {:>10}  {:>10}", "matches", "confidence", "true share");
    for (n, confidence, share) in &c.bins {
        println!("  {n:>8}  {confidence:>10.3}  {share:>10.3}");
    }
}
