//! `training`: the synthetic street and what is trained on it.

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use structvpr_training::{ablate, bench, cameras, drive, finetune, places, round, segment, work};

/// The synthetic street and what is trained on it. Exit codes: 0 done, 1 failed, 2 wrong arguments.
#[derive(Parser)]
#[command(version, about, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Render a drive of two laps as a ROS 2 bag.
    Bag(drive::Args),
    /// Render places under each condition as a data set with exact labels and depth.
    Places(places::Args),
    /// Fine-tune ImageNet weights on the synthetic street.
    Finetune(finetune::Args),
    /// Fixed cameras, a folder each, as a data set of day against night.
    Cameras(cameras::Args),
    /// Label maps for the images of a folder, by PSPNet or ESPNetv2.
    Segment(segment::Args),
    /// Stage 1: train one branch (or a rival) with the triplet loss.
    Stage1(work::Stage1),
    /// Ranks of all training pairs by both branches: groups, weights, audit, report.
    Partition(work::Partition),
    /// Stage 2: train the student with weighted distillation.
    Distill(work::Distill),
    /// Round a model's 1x1 convolutions to 8 bits so that its descriptors stay: about half the file, and what `--compute int8` computes with.
    Round(round::Args),
    /// Run a set of experiments with several seeds and write one table.
    Ablate(ablate::Args),
    /// Time one training step on this machine, with ratios in the same run.
    Bench(bench::Args),
}

fn main() -> ExitCode {
    // Before any other thread is there. Candle's helpers spin when they have nothing to do, on the processors that our own work on:
    // `round` took half as long again.
    std::env::set_var("CANDLE_BARRIER_POOL_SPIN_LIMIT", "0");
    let _ = opencv::core::set_num_threads(1);
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes numbers, before any other thread is there. Tensors of megabytes come and go with each step: memory that is
    // given back to the system in between costs as much in page faults as the arithmetic. Larger ones go back, for the heap
    // would grow around them.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
    let result = match Cli::parse().command {
        Command::Bag(args) => drive::run(&args),
        Command::Places(args) => places::run(&args),
        Command::Finetune(args) => finetune::run(&args),
        Command::Cameras(args) => cameras::run(&args),
        Command::Segment(args) => segment::run(&args),
        Command::Stage1(args) => work::stage1(&args),
        Command::Partition(args) => work::partition(&args),
        Command::Distill(args) => work::distill(&args),
        Command::Round(args) => round::run_command(&args),
        Command::Ablate(args) => ablate::run(&args),
        Command::Bench(args) => bench::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("training: {error:#}");
            ExitCode::FAILURE
        }
    }
}
