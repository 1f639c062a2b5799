//! `structvpr`: the command line.
//!
//! Exit codes: 0 done; 1 the command failed (one line on stderr says why and what to do);
//! 2 the arguments are wrong; 3 `doctor` found something to change.

mod bench;
mod calibrate;
mod common;
mod compare;
mod convert;
mod describe;
mod doctor;
mod eval;
mod map;
mod models;
mod replay;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Visual place recognition and loop closure.
///
/// Exit codes: 0 done, 1 failed (stderr says why), 2 wrong arguments, 3 `doctor` found something to
/// change.
#[derive(Parser)]
#[command(version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write the global descriptors of images, a folder or a bag to an .npz file.
    Describe(describe::Args),
    /// Recall@N and the precision-recall curve on a data set.
    Eval(eval::Args),
    /// Run the loop detector over a bag or folders of images and write a report.
    Replay(replay::Args),
    /// Score several methods (models or descriptor files) on one data set, side by side.
    Compare(compare::Args),
    /// Turn a weight file (ours, torchvision, TensorFlow-derived) into our safetensors.
    Convert(convert::Args),
    /// List, check and convert weights for local features and matching; say where each is to be had.
    Models(models::Args),
    /// Look into map files: info, verify, merge, prune, export.
    Map(map::Args),
    /// Fit scores to probabilities on a bag with ground truth, so that the node publishes a confidence.
    Calibrate(calibrate::Args),
    /// Say in words why few or no loops were found, and which setting to change.
    Doctor(doctor::Args),
    /// Measure descriptor, search, SuperPoint, matching and verification on this machine, with --peers against their peers.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    // Our own threads run over images; OpenCV's would only get in their way.
    let _ = opencv::core::set_num_threads(1);
    let result = match Cli::parse().command {
        Command::Describe(args) => describe::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Replay(args) => replay::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Models(args) => models::run(args),
        Command::Map(args) => map::run(args),
        Command::Calibrate(args) => calibrate::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Bench(args) => bench::run(args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("structvpr: {error:#}");
        ExitCode::FAILURE
    })
}
