//! `structvpr doctor`.

use crate::replay::{execute, print_summary, Finished, RunArgs};
use anyhow::Result;
use std::process::ExitCode;
use structvpr::eval::Verdict;
use structvpr::pipeline::{Evidence, Outcome, Reason, Skip};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,
    /// Print the findings as JSON.
    #[arg(long)]
    json: bool,
}

/// Exit code when something should be changed.
const FINDINGS: u8 = 3;

/// Share of the possible loops from which on nothing is suggested.
const GOOD_SHARE: f64 = 0.8;

/// One thing to know, and what to do about it.
#[derive(serde::Serialize)]
struct Finding {
    what: String,
    /// `None`: nothing to change.
    change: Option<String>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let done = execute(&args.run)?;
    let findings = examine(&done);
    let something = findings.iter().any(|f| f.change.is_some());
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        print_summary(&done);
        for f in &findings {
            println!("\n- {}", f.what);
            if let Some(change) = &f.change {
                println!("  -> {change}");
            }
        }
    }
    Ok(ExitCode::from(if something { FINDINGS } else { 0 }))
}

fn percentile(values: &mut [f64], share: f64) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    Some(values[(last as f64 * share).round() as usize])
}

fn examine(done: &Finished) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut say = |what: String, change: Option<String>| findings.push(Finding { what, change });
    for w in &done.run.warnings {
        say(w.clone(), Some("repair the recording, or choose the topic by hand".into()));
    }
    skipped(done, &mut say);
    if let Some(s) = &done.scores {
        if s.possible == 0 {
            say("The ground truth says that no place was seen twice outside the exclusion window: there was no loop to find.".into(), None);
        }
        if s.false_closures > 0 {
            false_closures(done, s.false_closures, &mut say);
        }
    } else {
        say(
            "No ground truth: what follows cannot tell a missed loop from a place seen for the first time. Give one with --ground-truth."
                .into(),
            None,
        );
    }
    // Where most loops were found, the rest is the start of each chain: nothing to tune.
    let well = done.scores.as_ref().is_some_and(|s| s.possible > 0 && s.found_share >= GOOD_SHARE);
    rejected(done, &mut |what, change| say(what, change.filter(|_| !well)));
    if findings.iter().all(|f| f.change.is_none()) {
        findings.push(Finding { what: "Nothing to change.".into(), change: None });
    }
    findings
}

type Say<'a> = &'a mut dyn FnMut(String, Option<String>);

fn skipped(done: &Finished, say: Say) {
    let config = done.run.detector.config();
    for (skip, n) in &done.run.skipped {
        let share = 100.0 * *n as f64 / done.run.images as f64;
        // A few skipped images are as it should be.
        if share < 50.0 && *skip != Skip::TimeJump {
            continue;
        }
        let (why, change) = match skip {
            Skip::LowQuality => (
                "are dark, white or constant",
                format!("check lens and exposure; or lower keyframe.min_luma_std (now {})", config.keyframe.min_luma_std),
            ),
            Skip::TooSoon => ("come sooner than the keyframe interval", format!("lower keyframe.min_interval_s (now {}) if the robot is fast", config.keyframe.min_interval_s)),
            Skip::Stationary => (
                "show no movement since the last keyframe",
                format!(
                    "if the robot did move: is the odometry right (try --no-odometry)? Else lower keyframe.min_distance_m (now {}) or keyframe.min_descriptor_change (now {}); if most of the picture is the robot itself, raise keyframe.max_still_share (now {})",
                    config.keyframe.min_distance_m, done.run.detector.min_descriptor_change(), config.keyframe.max_still_share
                ),
            ),
            Skip::TimeJump => ("have a stamp before the last keyframe's", "the clock jumped back, or the bag was looped: replay each part alone with --map".to_string()),
        };
        say(format!("{n} of {} images ({share:.0} %) {why}.", done.run.images), Some(change));
    }
}

fn false_closures(done: &Finished, n: usize, say: Say) {
    let wrong: Vec<Evidence> = evidence_where(done, |outcome, verdict| outcome == Outcome::Closure && verdict == Some(Verdict::False));
    let similarity = wrong.iter().map(|e| f64::from(e.similarity.min(e.chain_similarity))).fold(f64::MIN, f64::max);
    let longest = wrong.iter().map(|e| e.consistent_count).max().unwrap_or(0);
    say(
        format!("{n} closure(s) are false; the surest has a similarity of {similarity:.4}, the longest chain is {longest}."),
        Some(format!(
            "raise decision.similarity_threshold above {similarity:.4} (now {:.4}), or decision.min_consistent above {longest}",
            done.run.detector.threshold()
        )),
    );
}

fn evidence_where(done: &Finished, keep: impl Fn(Outcome, Option<Verdict>) -> bool) -> Vec<Evidence> {
    let verdict = |row: usize| done.scores.as_ref().map(|s| s.verdicts[row]);
    done.run.decisions.iter().filter(|r| keep(r.outcome, verdict(r.query))).filter_map(|r| r.evidence).collect()
}

fn rejected(done: &Finished, say: Say) {
    let config = done.run.detector.config();
    let (d, threshold) = (&config.decision, done.run.detector.threshold());
    let known = done.scores.is_some();
    let total = done.run.decisions.len();
    let missed = done.scores.as_ref().map_or(total, |s| s.possible - s.true_closures.min(s.possible));
    for reason in Reason::ALL {
        // With a truth only missed loops are a fault; without one every rejection may be.
        let outcome = Outcome::Rejected(reason);
        let evidence = evidence_where(done, |o, v| o == outcome && (!known || v == Some(Verdict::Missed)));
        let n =
            if reason == Reason::TooRecent { done.run.decisions.iter().filter(|r| r.outcome == outcome).count() } else { evidence.len() };
        if reason == Reason::TooRecent {
            if n == total && total > 0 {
                say(
                    format!("All {n} keyframes lie within the exclusion window of each other: nothing could be compared."),
                    Some(format!(
                        "lower search.exclusion_s (now {}) or search.exclusion_keyframes (now {}); or load an earlier map with --map",
                        config.search.exclusion_s, config.search.exclusion_keyframes
                    )),
                );
            }
            continue;
        }
        // Below a twentieth of what was missed no setting is worth touching.
        if n == 0 || n * 20 < missed {
            continue;
        }
        let what = if known { "missed loops" } else { "keyframes" };
        let of = |f: &dyn Fn(&Evidence) -> f64| evidence.iter().map(f).collect::<Vec<f64>>();
        let (why, change) = match reason {
            Reason::LowSimilarity => {
                let mut v = of(&|e| e.similarity.min(e.chain_similarity).into());
                let (half, tenth) = (percentile(&mut v, 0.5).unwrap_or(0.0), percentile(&mut v, 0.9).unwrap_or(0.0));
                (
                    format!("their similarity, or its mean along the chain of matches, is below the threshold of {threshold:.4} (median {half:.4}, best tenth above {tenth:.4})"),
                    format!("lower decision.similarity_threshold to {half:.4} for half of them, and watch for false closures; a model trained for the site does more"),
                )
            }
            Reason::Ambiguous => {
                let half = percentile(&mut of(&|e| e.margin.map_or(0.0, f64::from)), 0.5).unwrap_or(0.0);
                (
                    format!("another place is nearly as alike (median lead {half:.4}, wanted {:.4})", done.run.detector.min_margin()),
                    format!("lower decision.min_margin to {half:.4}; if the second best is the same place seen from further on, raise decision.place_radius (now {})", d.place_radius),
                )
            }
            Reason::NotConsistent => {
                let half = percentile(&mut of(&|e| e.consistent_count as f64), 0.5).unwrap_or(0.0);
                let uneven = evidence.iter().filter(|e| e.consistent_count >= d.min_consistent).count();
                (
                    format!(
                        "fewer than {} keyframes in a row point at one stretch (median {half:.0}), or the match does not advance evenly with the robot ({uneven} of them)",
                        d.min_consistent
                    ),
                    format!(
                        "lower decision.min_consistent; if the two drives differ much in speed, widen decision.min_pace (now {}), max_pace ({}), max_pace_error ({}) and consistency_window ({})",
                        d.min_pace, d.max_pace, d.max_pace_error, d.consistency_window
                    ),
                )
            }
            Reason::PoseGate => {
                let far = percentile(&mut of(&|e| e.odometry_distance_m.unwrap_or(0.0)), 0.9).unwrap_or(0.0);
                (
                    format!("the odometry says that the places are more than {} m apart", d.max_odometry_distance_m),
                    format!("raise decision.max_odometry_distance_m to {far:.0}, or 0 to switch the gate off"),
                )
            }
            Reason::Geometry => {
                let leads: f64 = percentile(&mut of(&|e| e.lead.unwrap_or(0.0)), 0.9).unwrap_or(0.0);
                (
                    format!("the geometry does not agree, or agrees with another place nearly as well (a tenth reach a lead of {leads:.2}; wanted {})", config.verification.min_lead),
                    "a network finds more than verification.features: sift does (see `structvpr models`); or lower verification.min_lead".to_string(),
                )
            }
            Reason::RateLimit => (
                format!("a closure came less than {} s before", d.min_closure_interval_s),
                "lower decision.min_closure_interval_s; 0 is no limit".to_string(),
            ),
            Reason::TooRecent => continue,
        };
        say(format!("{n} {what} are {}: {why}.", reason.name()), Some(change));
    }
}
