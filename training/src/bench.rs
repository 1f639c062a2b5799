//! `training bench`: one training step on this machine, beside PyTorch and beside Candle's own operations.

use crate::loss::{triplet, MARGIN};
use crate::net::{gem, l2_normalize, normal, Arch, Branch, Gpu, Precision, Trunk};
use crate::optim::{AdamW, Settings};
use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;
use structvpr::eval::{write_npy, Matrix};
use structvpr::model::{ComputeDevice, Padding};

#[derive(clap::Args)]
pub struct Args {
    /// Measure PyTorch in the same run, on --device too if one is given (scripts/bench_training and scripts/bench_cuda install it).
    #[arg(long)]
    peers: bool,
    /// Also a step from Candle's own operations, on this many triplets (memory for twelve is more than 20 GB).
    #[arg(long)]
    naive: Option<usize>,
    /// Python of the peers.
    #[arg(long, default_value = ".venv/torch/bin/python")]
    python: PathBuf,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Triplets per step.
    #[arg(long, default_value_t = 12)]
    triplets: usize,
    /// Height and width of the images.
    #[arg(long, num_args = 2, default_values_t = [240, 320])]
    size: Vec<usize>,
    /// Also on this device: cuda:N.
    #[arg(long, default_value_t)]
    device: ComputeDevice,
    /// What that device keeps maps in: f32 or bf16.
    #[arg(long, default_value = "f32", value_parser = precision)]
    precision: Precision,
    /// Steps that count of each side.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
}

fn precision(name: &str) -> Result<Precision, String> {
    match name {
        "f32" => Ok(Precision::F32),
        "bf16" => Ok(Precision::Bf16),
        _ => Err("f32 or bf16".into()),
    }
}

const LR: f64 = 1e-4;

struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    fn start(args: &Args, dir: &std::path::Path, device: &str) -> Result<Self> {
        let script = std::path::Path::new("scripts/peers/train_step.py");
        ensure!(script.is_file(), "{}: not here; --peers runs from the repository's root", script.display());
        let threads = args.threads.to_string();
        let mut child = Command::new(&args.python)
            .arg(script)
            .arg(dir)
            .arg(&threads)
            .arg(device)
            .arg(if args.precision == Precision::Bf16 { "bf16" } else { "f32" })
            .env("OMP_NUM_THREADS", &threads)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", args.python.display()))?;
        let input = child.stdin.take().context("no stdin")?;
        let output = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Self { child, input, output })
    }

    /// One step; seconds and the loss before it.
    fn step(&mut self) -> Result<(f64, f64)> {
        writeln!(self.input, "run")?;
        self.input.flush()?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        let mut words = line.split_whitespace().map(str::parse::<f64>);
        match (words.next(), words.next()) {
            (Some(Ok(seconds)), Some(Ok(loss))) => Ok((seconds, loss)),
            _ => anyhow::bail!("the peer said `{}`", line.trim()),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

pub fn run(args: &Args) -> Result<()> {
    ensure!(args.rounds >= 1 && args.triplets >= 1 && args.threads >= 1, "--rounds, --triplets and --threads are 1 or more");
    ensure!(args.size.iter().all(|s| (32..=4096).contains(s)), "--size {:?} is outside 32 to 4096", args.size);
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global().context("cannot set the number of threads")?;
    let (b, h, w) = (args.triplets, args.size[0], args.size[1]);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let image: Vec<f32> = (0..3 * 3 * b * h * w).map(|_| normal(&mut rng) as f32).collect();
    let x = Tensor::from_vec(image, (3, 3 * b, h, w), &Device::Cpu)?;
    let branch = Branch::<f32>::random(Trunk::new(Arch::MobileNetV2, 3, Padding::Symmetric), 2)?;
    let optimiser = |b: &Branch| AdamW::new(Settings::default(), vec![(b.weights.clone(), b.decaying()), (b.power.clone(), vec![])]);
    let gpu = Gpu::open(args.device, args.precision)?;
    let mut away = match &gpu {
        Some(_) => {
            let mut b = Branch::<f32>::random(Trunk::new(Arch::MobileNetV2, 3, Padding::Symmetric), 2)?;
            b.compute_on(gpu);
            let own = optimiser(&b);
            Some((b, own, Vec::new(), f64::NAN))
        }
        None => None,
    };
    let mut optimiser = optimiser(&branch);

    let dir = tempfile::tempdir()?;
    let mut peer = None;
    if args.peers {
        let write = |name: &str, t: &Tensor| -> Result<()> {
            let data: Vec<f64> = t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
            Ok(std::fs::write(dir.path().join(name), write_npy(&Matrix { rows: 1, cols: data.len(), data }))?)
        };
        write("weights.npy", branch.weights.as_tensor())?;
        write("image.npy", &x.transpose(0, 1)?.contiguous()?)?;
        std::fs::write(dir.path().join("shape.txt"), format!("{} {h} {w}", 3 * b))?;
        peer = Some(Peer::start(args, dir.path(), &args.device.to_string())?);
    }
    let split = |d: &Tensor| -> Result<Tensor> { Ok(triplet(&d.narrow(0, 0, b)?, &d.narrow(0, b, b)?, &d.narrow(0, 2 * b, b)?, MARGIN)?) };
    let (mut ours, mut theirs, mut losses) = (Vec::new(), Vec::new(), Vec::new());
    // The first step of each side finds cold memory and does not count.
    for round in 0..=args.rounds {
        let began = Instant::now();
        let loss = split(&branch.forward(&x, true)?.descriptor)?;
        optimiser.step(&loss.backward()?, LR)?;
        let seconds = began.elapsed().as_secs_f64();
        let loss = f64::from(loss.to_scalar::<f32>()?);
        if let Some((b, optimiser, times, first)) = &mut away {
            let began = Instant::now();
            let loss = split(&b.forward(&x, true)?.descriptor)?;
            optimiser.step(&loss.backward()?, LR)?;
            let seconds = began.elapsed().as_secs_f64();
            match round {
                0 => *first = f64::from(loss.to_scalar::<f32>()?),
                _ => times.push(seconds),
            }
        }
        let peer = peer.as_mut().map(|p| p.step()).transpose()?;
        losses.push((loss, peer.map(|p| p.1)));
        if round > 0 {
            ours.push(seconds);
            theirs.extend(peer.map(|p| p.0));
        }
    }
    drop(peer);
    let ours = median(ours);
    println!("one step of {b} triplets at {h}x{w}, forward, backward, AdamW, {} thread(s), median of {}", args.threads, args.rounds);
    println!("ours             {:8.0} ms", 1e3 * ours);
    // Where the peer is, and what it is compared with.
    let (mut compared, mut most) = ((ours, losses[0].0), 1e-4);
    if let Some((.., times, first)) = away {
        let there = median(times);
        println!("on {}, {:?} {:8.1} ms   ratio {:.3} to the processor's", args.device, args.precision, 1e3 * there, there / ours);
        println!("loss of the first step there {first:.6}, here {:.6}", losses[0].0);
        compared = (there, first);
        // A loss is a mean of differences of distances of about one, which bf16 knows to three digits.
        if args.precision == Precision::Bf16 {
            most = 1e-2;
        }
    }
    if !theirs.is_empty() {
        let theirs = median(theirs);
        println!("PyTorch, {} {:8.1} ms   ratio {:.2}", args.device, 1e3 * theirs, compared.0 / theirs);
        let (a, t) = (compared.1, losses[0].1.unwrap_or(f64::NAN));
        println!(
            "loss of the first step: ours {a:.6}, PyTorch {t:.6}; of the last: {:.6} (processor), {:.6}",
            losses[losses.len() - 1].0,
            losses[losses.len() - 1].1.unwrap_or(f64::NAN)
        );
        ensure!((a - t).abs() < most, "the first losses differ: {a} and {t}");
    }
    if let Some(few) = args.naive {
        ensure!((1..=b).contains(&few), "--naive {few} is outside 1 to {b}");
        // Its own padding at stride 2, for with PyTorch's Candle's gradient fails on these sizes.
        let branch = Branch::<f32>::random(Trunk::new(Arch::MobileNetV2, 3, Padding::Same), 2)?;
        let mut optimiser = AdamW::new(Settings::default(), vec![(branch.weights.clone(), branch.decaying())]);
        let x = x.narrow(1, 0, 3 * few)?.contiguous()?;
        let split = |d: &Tensor| triplet(&d.narrow(0, 0, few)?, &d.narrow(0, few, few)?, &d.narrow(0, 2 * few, few)?, MARGIN);
        let mut own = Vec::new();
        for _ in 0..4 {
            let began = Instant::now();
            optimiser.step(&split(&branch.forward(&x, true)?.descriptor)?.backward()?, LR)?;
            own.push(began.elapsed().as_secs_f64());
        }
        let ours = median(own.split_off(1));
        let x = x.transpose(0, 1)?.contiguous()?;
        let began = Instant::now();
        let pooled = branch.trunk.naive(branch.weights.as_tensor(), &x)?;
        let pooled = pooled
            .iter()
            .map(|t| l2_normalize(&gem(&t.transpose(0, 1)?.contiguous()?, branch.power.as_tensor())?))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let loss = split(&l2_normalize(&Tensor::cat(&pooled, 1)?)?)?;
        optimiser.step(&loss.backward()?, LR)?;
        let naive = began.elapsed().as_secs_f64();
        println!("of {few} triplets  {:8.0} ms, Candle's own operations {:.0} ms   ratio {:.3}", 1e3 * ours, 1e3 * naive, ours / naive);
    }
    Ok(())
}
