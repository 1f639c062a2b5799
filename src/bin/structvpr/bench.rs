//! `structvpr bench`: times on this machine; with --peers, ratios in the same run.
//!
//! A peer is a Python program that does one round for each line it reads and answers with the
//! seconds it took. Our rounds and the peer's take turns, so that both see the same machine.

use crate::common::{self, median, ComputeArg};
use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor};
use clap::builder::TypedValueParser;
use serde::Serialize;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::time::Instant;
use structvpr::descriptor::Descriptor;
use structvpr::eval::{write_npy, Matrix};
use structvpr::features::{CompactFeatures, Features};
use structvpr::geometry::{mutual_matches, verify, VerifyConfig, View};
use structvpr::image::{RawImage, RgbImage};
use structvpr::map::{Hit, Index, Keyframe, Map};
use structvpr::model::kernels::{Plan, Products};
use structvpr::model::{Architecture, ComputeDevice, LocalNet, LocalWeights, Model, Precision, MAX_SIDE, MIN_SIDE};
use structvpr::pipeline::{Frame, LoopDetector};
use structvpr::simd::Isa;

#[derive(clap::Args)]
pub struct Args {
    /// What to measure.
    #[arg(long, value_delimiter = ',', default_value = "descriptor,superpoint,matching,verification,search,pipeline", value_parser = ["descriptor", "superpoint", "matching", "verification", "search", "pipeline"])]
    only: Vec<String>,
    /// Measure faiss (search), ONNX Runtime, OpenVINO (descriptor), ncnn (superpoint) and OpenCV (matching) in the same run;
    /// scripts/bench_peers installs them. On CUDA the descriptor's peer is PyTorch; scripts/bench_cuda installs it.
    #[arg(long)]
    peers: bool,
    /// Python with the peers' packages.
    #[arg(long, default_value = ".venv/peers/bin/python")]
    python: PathBuf,
    /// Weight file of the descriptor; the shipped model if none is given.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Where the descriptor is measured: cpu, or cuda:N in a build with --features cuda, in f32 and f16, one image and batches, with
    /// the share of what the device can do at most.
    #[arg(long, default_value = "cpu", value_name = "cpu|cuda:N")]
    device: ComputeDevice,
    /// Sizes that the descriptor is measured at; empty: the model's own.
    #[arg(long, value_delimiter = ',', default_value = "480x640,240x320,224x224", value_name = "HxW,...", value_parser = size)]
    sizes: Vec<(usize, usize)>,
    /// Also draw the ratios to the peers: an SVG.
    #[arg(long, requires = "peers", value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Rounds of each measurement.
    #[arg(long, default_value_t = 40)]
    rounds: usize,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Sizes of the maps that are searched; a million take 3 GB, with --peers 5 GB more, of which 2 GB are a file in TMPDIR.
    #[arg(long, value_delimiter = ',', default_value = "10000,100000,1000000", value_parser = clap::value_parser!(u32).range(100..=10_000_000).map(|n| n as usize))]
    places: Vec<usize>,
    /// Also write the map that `pipeline` looks through: scripts/bench_node gives it to a node.
    #[arg(long, value_name = "FILE")]
    keep_map: Option<PathBuf>,
    #[arg(long)]
    json: bool,
}

/// One line of the table; times in milliseconds.
#[derive(Serialize)]
struct Row {
    what: String,
    median_ms: f64,
    p95_ms: f64,
    peer: Option<String>,
    peer_median_ms: Option<f64>,
    /// Ours to the peer's, of the medians.
    ratio: Option<f64>,
    /// What was checked between the two.
    check: Option<String>,
}

/// Neighbours per query [issue: exact top-20].
const TOP_K: usize = 20;
const DIM: usize = 448;

pub fn run(args: Args) -> Result<ExitCode> {
    ensure!((1..=1024).contains(&args.threads), "--threads {} is outside 1 to 1024", args.threads);
    ensure!((3..=100_000).contains(&args.rounds), "--rounds {} is outside 3 to 100000", args.rounds);
    let asked = |what: &str| args.only.iter().any(|o| o == what);
    ensure!(args.keep_map.is_none() || asked("pipeline"), "--keep-map keeps the map of pipeline, which --only leaves out");
    if args.peers {
        ensure!(args.python.is_file(), "{}: no such Python; run scripts/bench_peers first, or give --python", args.python.display());
    }
    rayon::ThreadPoolBuilder::new().num_threads(args.threads).build_global().context("cannot set the number of threads")?;
    let machine = format!("{} thread(s), {} rounds, {}, {}", args.threads, args.rounds, instructions(), processor());
    if !args.json {
        println!("{machine}");
    }
    let mut rows = Vec::new();
    // Line by line: who stops it keeps what was measured.
    let mut say = |new: Vec<Row>| {
        if !args.json {
            new.iter().for_each(Row::print);
        }
        rows.extend(new);
    };
    if asked("descriptor") {
        if args.device == ComputeDevice::Cpu {
            descriptors(&args, &mut say)?;
        } else {
            for precision in [Precision::F32, Precision::F16] {
                for (reference, model) in models(&args)?.into_iter().zip(models(&args)?) {
                    say(descriptor_on(&args, &reference, &model.on(args.device, precision)?)?);
                }
            }
        }
    }
    if asked("superpoint") {
        say(vec![superpoint(&args, Runtime::Onnx)?]);
        if args.peers {
            say(vec![superpoint(&args, Runtime::Ncnn)?]);
        }
    }
    if asked("matching") {
        say(vec![matching(&args)?]);
    }
    if asked("verification") {
        say(vec![verification(&args, true)?, verification(&args, false)?]);
    }
    if asked("search") {
        for n in &args.places {
            say(search(&args, *n)?);
        }
    }
    if asked("pipeline") {
        let model = common::load_model(args.model.as_deref(), ComputeArg { device: args.device, compute: Precision::F32 })?;
        if let Some(path) = &args.keep_map {
            places(&model)?.save(path)?;
        }
        for camera in CAMERAS {
            say(vec![pipeline(&args, &model, camera)?]);
        }
    }
    if let Some(path) = &args.plot {
        let title = format!("our time / the peer's, {} thread(s), {}, {}", args.threads, processor(), instructions());
        structvpr::error::write_file(path, plot(&rows, &title)?.as_bytes())?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    }
    Ok(ExitCode::SUCCESS)
}

impl Row {
    fn print(&self) {
        print!("{:36} median {:9.3} ms  p95 {:9.3} ms", self.what, self.median_ms, self.p95_ms);
        if let (Some(peer), Some(ms), Some(ratio)) = (&self.peer, self.peer_median_ms, self.ratio) {
            print!("   {peer} {ms:9.3} ms  ratio {ratio:.2}");
        }
        println!("{}", self.check.as_ref().map(|c| format!("   {c}")).unwrap_or_default());
    }
}

fn size(text: &str) -> Result<(usize, usize), String> {
    let side = |t: &str| t.parse().ok().filter(|n| (MIN_SIDE..=MAX_SIDE).contains(n));
    let both = text.split_once('x').and_then(|(h, w)| Some((side(h)?, side(w)?)));
    both.ok_or_else(|| format!("HEIGHTxWIDTH, {MIN_SIDE} to {MAX_SIDE} each"))
}

/// The ratios as bars; left of the line is faster than the peer. What is measured against our own descriptor is no peer.
fn plot(rows: &[Row], title: &str) -> Result<String> {
    use plotters::prelude::*;
    let all: Vec<(String, f64)> = rows
        .iter()
        .filter(|r| !r.peer.as_ref().is_some_and(|p| p.starts_with("descriptor")))
        .filter_map(|r| Some((format!("{} / {}", r.what.trim(), r.peer.as_ref()?), r.ratio?)))
        .collect();
    ensure!(!all.is_empty(), "--plot: nothing of --only has a peer");
    let most = all.iter().map(|(_, r)| *r).fold(1.0, f64::max) * 1.12;
    let (n, mut svg) = (all.len(), String::new());
    {
        let root = SVGBackend::with_string(&mut svg, (760, 70 + 24 * n as u32)).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 15))
            .margin(8)
            .x_label_area_size(24)
            .y_label_area_size(360)
            .build_cartesian_2d(0f64..most, (0..n).into_segmented())?;
        let label = |s: &SegmentValue<usize>| match s {
            SegmentValue::CenterOf(i) => (n - 1).checked_sub(*i).and_then(|i| all.get(i)).map(|r| r.0.clone()).unwrap_or_default(),
            _ => String::new(),
        };
        let mesh = &mut chart.configure_mesh();
        mesh.disable_y_mesh().light_line_style(TRANSPARENT).bold_line_style(BLACK.mix(0.15)).y_labels(n).y_label_formatter(&label);
        mesh.x_label_formatter(&|v| format!("{v:.1}")).draw()?;
        for (i, (_, ratio)) in all.iter().enumerate() {
            let slot = n - 1 - i;
            let fill = if *ratio <= 1.0 { RGBColor(46, 125, 50) } else { RGBColor(198, 40, 40) };
            let ends = [(0.0, SegmentValue::Exact(slot)), (*ratio, SegmentValue::Exact(slot + 1))];
            let mut bar = Rectangle::new(ends, fill.mix(0.85).filled());
            bar.set_margin(4, 4, 0, 0);
            chart.draw_series([bar])?;
            let at = (ratio + most * 0.008, SegmentValue::CenterOf(slot));
            chart.draw_series([Text::new(format!("{ratio:.2}"), at, ("sans-serif", 13))])?;
        }
        let line = vec![(1.0, SegmentValue::Exact(0)), (1.0, SegmentValue::Exact(n))];
        chart.draw_series([PathElement::new(line, BLACK.stroke_width(1))])?;
        root.present()?;
    }
    Ok(svg)
}

fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':').map(|(_, n)| n.trim().to_string()));
    name.unwrap_or_else(|| "processor unknown".into())
}

fn row(what: String, mut ours: Vec<f64>, peer: Option<(&str, Vec<f64>)>, check: Option<String>) -> Row {
    let median_ms = 1e3 * median(&mut ours);
    let p95_ms = 1e3 * ours[(ours.len() * 95 / 100).min(ours.len() - 1)];
    let peer = peer.map(|(name, mut times)| (name.to_string(), 1e3 * median(&mut times)));
    let ratio = peer.as_ref().map(|(_, ms)| median_ms / ms);
    let (peer, peer_median_ms) = peer.unzip();
    Row { what, median_ms, p95_ms, peer, peer_median_ms, ratio, check }
}

/// Rounds of each side's turn, the first of which does not count: it finds the other's data in the caches.
const TURN: usize = 5;
/// Between two turns: a peer's threads that spin for more work have given up by then, and ours sleep, as between a
/// camera's keyframes; so also without a peer.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(200);

/// Runs `ours` and the peer in turns of a few rounds.
fn rounds(count: usize, ours: impl FnMut() -> Result<()>, mut peer: Option<Peer>) -> Result<(Vec<f64>, Option<Vec<f64>>)> {
    turns(count, ours, peer.as_mut().map(|p| || p.round()))
}

/// The same of a peer's one round, which answers with its seconds.
fn turns(
    count: usize,
    mut ours: impl FnMut() -> Result<()>,
    mut peer: Option<impl FnMut() -> Result<f64>>,
) -> Result<(Vec<f64>, Option<Vec<f64>>)> {
    let (mut mine, mut theirs) = (Vec::new(), Vec::new());
    // A peer that has just begun spins, too.
    std::thread::sleep(PAUSE);
    while mine.len() < count {
        for i in 0..TURN {
            let began = Instant::now();
            ours()?;
            let took = began.elapsed().as_secs_f64();
            mine.extend((i > 0).then_some(took));
        }
        std::thread::sleep(PAUSE);
        if let Some(peer) = &mut peer {
            for i in 0..TURN {
                let took = peer()?;
                theirs.extend((i > 0).then_some(took));
            }
            std::thread::sleep(PAUSE);
        }
    }
    Ok((mine, peer.map(|_| theirs)))
}

/// Keyframes in the order of a drive: each is like the ones before, none like those from long before.
struct Drive {
    at: Vec<f32>,
    steps: usize,
}

impl Drive {
    fn next(&mut self) -> Result<Descriptor> {
        self.steps += 1;
        for (v, n) in self.at.iter_mut().zip(noise(self.steps, DIM)) {
            *v = 0.97 * *v + 0.25 * n;
        }
        Ok(Descriptor::new(self.at.clone())?)
    }
}

/// Little-endian f32, as the peers read them.
fn write_f32<'a>(path: &Path, rows: impl Iterator<Item = &'a [f32]>) -> Result<()> {
    let mut out = std::io::BufWriter::new(std::fs::File::create(path)?);
    for v in rows.flatten() {
        out.write_all(&v.to_le_bytes())?;
    }
    Ok(out.flush()?)
}

/// Queries that rounds take in turn, so that none finds its neighbours in the caches; a batch is all of them.
const QUERIES: usize = 256;
/// Rounds of batches, of which the peer's take seconds.
const BATCH_ROUNDS: usize = 8;

/// Exact neighbours of one query at a time, and of a batch, in a map of `n` places.
fn search(args: &Args, n: usize) -> Result<Vec<Row>> {
    let mut drive = Drive { at: vec![0.0; DIM], steps: 0 };
    let mut index = Index::new();
    let mut inserting = std::time::Duration::ZERO;
    for _ in 0..n {
        let descriptor = drive.next()?;
        let began = Instant::now();
        index.push(&descriptor)?;
        inserting += began.elapsed();
    }
    // Places seen again, in another light.
    let again = |i: usize| {
        let row = index.row((i * 2_654_435_761 + 17) % n).iter();
        Ok(Descriptor::new(row.zip(noise(n + i + 1, DIM)).map(|(v, noise)| v + 0.05 * noise).collect())?)
    };
    let queries = (0..QUERIES).map(again).collect::<Result<Vec<_>>>()?;
    let dir = tempfile::tempdir()?;
    if args.peers {
        write_f32(&dir.path().join("rows.f32"), (0..n).map(|i| index.row(i)))?;
        write_f32(&dir.path().join("queries.f32"), queries.iter().map(Descriptor::as_slice))?;
    }
    let peer = |what: &str| args.peers.then(|| Peer::start(args, "search.py", &[dir.path(), Path::new(what)])).transpose();
    let compare = |found: &[Vec<Hit>]| -> Result<String> {
        let text = std::fs::read_to_string(dir.path().join("ids.txt")).context("the peer left no ids.txt")?;
        let theirs: Vec<Vec<usize>> = text.lines().map(|l| l.split_whitespace().filter_map(|w| w.parse().ok()).collect()).collect();
        let same =
            |(hits, ids): (&Vec<Hit>, &Vec<usize>)| hits.iter().take(10).filter(|h| ids[..10.min(ids.len())].contains(&h.row)).count();
        let recall = found.iter().zip(&theirs).map(same).sum::<usize>() as f64 / (10 * found.len()) as f64;
        ensure!(recall >= 0.999, "recall@10 against faiss is {recall:.4}");
        Ok(format!("recall@10 {recall:.4}"))
    };
    let mut rows = Vec::new();

    let mut found = vec![Vec::new(); QUERIES];
    let (whole, mut round) = (0..n, 0);
    let (ours, theirs) = rounds(
        args.rounds,
        || {
            found[round % QUERIES] = index.search(&queries[round % QUERIES], TOP_K, std::slice::from_ref(&whole));
            round += 1;
            Ok(())
        },
        peer("one")?,
    )?;
    found.truncate(round);
    let check = theirs.as_ref().map(|_| compare(&found)).transpose()?;
    let insert = format!("insert {:.1} us", 1e6 * inserting.as_secs_f64() / n as f64);
    let check = check.into_iter().chain([insert]).collect::<Vec<_>>().join(", ");
    rows.push(row(format!("search top {TOP_K} of {n} x {DIM}"), ours, theirs.map(|t| ("faiss IndexFlatIP", t)), Some(check)));

    let mut found = Vec::new();
    let (ours, theirs) = rounds(
        args.rounds.min(BATCH_ROUNDS),
        || {
            found = index.search_all(&queries, TOP_K);
            Ok(())
        },
        peer("batch")?,
    )?;
    let check = theirs.as_ref().map(|_| compare(&found)).transpose()?;
    rows.push(row(format!("  {QUERIES} queries at once"), ours, theirs.map(|t| ("faiss IndexFlatIP", t)), check));
    Ok(rows)
}

/// The descriptor at every size: in f32 against the peers' f32, in bf16 and in 8 bits against ONNX Runtime's f32 and OpenVINO's bf16,
/// which is what others have below f32.
fn descriptors(args: &Args, say: &mut impl FnMut(Vec<Row>)) -> Result<()> {
    for model in models(args)? {
        for peer in [Runtime::Onnx, Runtime::OpenVino] {
            if args.peers || peer == Runtime::Onnx {
                say(vec![descriptor(args, &model, peer)?]);
            }
        }
        let mut model = model;
        for precision in [Precision::Bf16, Precision::Int8] {
            model = model.on(ComputeDevice::Cpu, precision)?;
            for peer in [Runtime::Onnx, Runtime::OpenVinoBf16] {
                // Where nothing multiplies bfloat16 it is f32, which has been measured.
                if model.precision() == precision && (peer == Runtime::Onnx || args.peers && has_bf16()) {
                    say(vec![descriptor(args, &model, peer)?]);
                }
            }
        }
    }
    Ok(())
}

/// The model at every size of `--sizes`.
fn models(args: &Args) -> Result<Vec<Model>> {
    let loaded = common::load_model(args.model.as_deref(), ComputeArg::default())?;
    let own = (loaded.spec().input_height, loaded.spec().input_width);
    let sizes = if args.sizes.is_empty() { vec![own] } else { args.sizes.clone() };
    let of = |size| {
        let mut weights = loaded.weights().clone();
        (weights.spec.input_height, weights.spec.input_width) = size;
        Ok(Model::new(weights)?)
    };
    sizes.into_iter().map(of).collect()
}

/// What of the processor's instructions kernels are chosen by.
fn instructions() -> String {
    let bf16 = match Plan::bf16_products() {
        Some(Products::Tiles) => " with AMX",
        Some(Products::Vectors) => " with BF16",
        None => "",
    };
    format!("{:?}{bf16}", Isa::detect())
}

/// OpenVINO falls back to f32 without these instructions.
fn has_bf16() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|info| info.contains("avx512_bf16"))
}

/// Who runs the peer's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Runtime {
    Onnx,
    OpenVino,
    OpenVinoBf16,
    Ncnn,
}

impl Runtime {
    /// As the peers' scripts know it, and as the table does.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Onnx => ("onnxruntime", "ONNX Runtime"),
            Self::OpenVino => ("openvino", "OpenVINO"),
            Self::OpenVinoBf16 => ("openvino-bf16", "OpenVINO bf16"),
            Self::Ncnn => ("ncnn", "ncnn"),
        }
    }
}

fn descriptor(args: &Args, model: &Model, runtime: Runtime) -> Result<Row> {
    let (w, h) = (model.spec().input_width, model.spec().input_height);
    let pixels = (0..3 * w * h).map(|i| ((i * 2_654_435_761) >> 13) as u8).collect();
    let x = model.preprocess(&RgbImage::new(w as u32, h as u32, pixels)?)?;
    let dir = tempfile::tempdir()?;
    let (script, name) = runtime.names();
    let peer = if args.peers {
        let data = x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
        std::fs::write(dir.path().join("input.npy"), write_npy(&Matrix { rows: 3 * h, cols: w, data }))?;
        std::fs::write(dir.path().join("model.safetensors"), model.weights().to_bytes(Precision::F32)?)?;
        Some(Peer::start(args, "descriptor.py", &[dir.path(), Path::new(script)])?)
    } else {
        None
    };
    let mut last = None;
    let (ours, theirs) = rounds(
        args.rounds,
        || {
            last = Some(model.describe_tensor(&x)?);
            Ok(())
        },
        peer,
    )?;
    let check = match (&theirs, last) {
        (Some(_), Some(d)) => {
            let path = dir.path().join("descriptor.npy");
            let m = structvpr::eval::read_matrix(&std::fs::read(&path).context("the peer left no descriptor.npy")?)?;
            let worst = m.data.iter().zip(d.as_slice()).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
            // Below f32 either side has its own.
            let exact = model.precision() == Precision::F32 && runtime != Runtime::OpenVinoBf16;
            ensure!(!exact || worst <= 1e-4, "the descriptor differs from {name}'s by {worst:.1e}");
            Some(format!("largest difference {worst:.1e}"))
        }
        _ => None,
    };
    Ok(row(format!("descriptor {h}x{w} {}", model.precision()), ours, theirs.map(|t| (name, t)), check))
}

/// Batches that are measured on a GPU.
const BATCHES: [usize; 4] = [1, 4, 16, 32];

/// On a GPU: pixels to descriptor, one image and batches, upload and download included; checked against the processor's (`reference`).
fn descriptor_on(args: &Args, reference: &Model, model: &Model) -> Result<Vec<Row>> {
    let precision = model.precision();
    let (w, h) = (model.spec().input_width, model.spec().input_height);
    let most = BATCHES[BATCHES.len() - 1];
    let image = |n: usize| {
        let pixels = (0..3 * w * h).map(|i| ((i / 24 * 2_654_435_761 + n * 97) >> 13) as u8).collect();
        RgbImage::new(w as u32, h as u32, pixels)
    };
    let images = (0..most).map(image).collect::<structvpr::error::Result<Vec<_>>>()?;
    let ours = model.describe_batch(&images)?;
    let mut worst = 0f32;
    for (a, image) in ours.iter().zip(&images) {
        let b = reference.describe(image)?;
        worst = a.as_slice().iter().zip(b.as_slice()).map(|(a, b)| (a - b).abs()).fold(worst, f32::max);
    }
    let allowed = if precision == Precision::F16 { 2e-3 } else { 1e-4 };
    ensure!(worst <= allowed, "the descriptor on {} in {precision} differs from the processor's by {worst:.1e}", args.device);
    let mut rows = Vec::new();
    let dir = tempfile::tempdir()?;
    let peer = args.peers.then(|| gpu_peer(args, model, &images, &ours, 2.0 * f64::from(allowed), dir.path())).transpose()?;
    let (mut peer, off) = peer.unzip();
    for n in BATCHES {
        let one = || model.describe_batch(&images[..n]).map(drop).map_err(anyhow::Error::from);
        let batch = n.to_string();
        let (mut times, theirs) = turns(args.rounds, one, peer.as_mut().map(|p| || p.round_of(&batch)))?;
        let each = median(&mut times) / n as f64;
        let shares = model.cost().map(|(cost, limits)| {
            let product = if precision == Precision::F16 { limits.f16 } else { limits.f32 };
            let arithmetic = cost.products / product + cost.others / limits.f32;
            format!(
                ", {:.0} % of its memory's, {:.0} % of its arithmetic's limit",
                100.0 * cost.bytes / limits.memory / each,
                100.0 * arithmetic / each
            )
        });
        let mut check = format!("{:.0} images/s{}", 1.0 / each, shares.unwrap_or_default());
        if n == 1 {
            check += &format!(", largest difference from cpu f32 {worst:.1e}, {}", model.device_name());
            check += &off.map(|off| format!(", from PyTorch {off:.1e}")).unwrap_or_default();
        }
        let what = format!("descriptor {h}x{w} {precision} {} x{n}", args.device);
        rows.push(row(what, times, theirs.map(|t| ("PyTorch", t)), Some(check)));
    }
    Ok(rows)
}

/// PyTorch on the same device, after it has chosen its form at every batch; and by how much its descriptors differ, `most` at most.
fn gpu_peer(args: &Args, model: &Model, images: &[RgbImage], ours: &[Descriptor], most: f64, dir: &Path) -> Result<(Peer, f64)> {
    let (n, w, h) = (images.len(), model.spec().input_width, model.spec().input_height);
    let data = images.iter().flat_map(|i| i.data()).map(|v| f64::from(*v)).collect();
    std::fs::write(dir.join("input.npy"), write_npy(&Matrix { rows: n * h, cols: 3 * w, data }))?;
    std::fs::write(dir.join("shape.txt"), format!("{n} {h} {w}"))?;
    std::fs::write(dir.join("model.safetensors"), model.weights().to_bytes(Precision::F32)?)?;
    let (device, precision) = (args.device.to_string(), model.precision().to_string());
    let mut peer = Peer::start(args, "descriptor_torch.py", &[dir, Path::new(&device), Path::new(&precision)])?;
    BATCHES.iter().try_for_each(|n| peer.round_of(&n.to_string()).map(drop))?;
    let theirs = structvpr::eval::read_matrix(&std::fs::read(dir.join("descriptor.npy")).context("the peer left no descriptor.npy")?)?;
    let all = ours.iter().flat_map(|d| d.as_slice());
    let off = theirs.data.iter().zip(all).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
    ensure!(off <= most, "the descriptor differs from PyTorch's in {precision} by {off:.1e}");
    Ok((peer, off))
}

/// Keyframes of the map that [`pipeline`] looks through.
const PLACES: usize = 10_000;
/// Columns and rows of the cameras' images: twice the shipped model's, and of another shape, as most are.
const CAMERAS: [(u32, u32); 2] = [(640, 480), (1920, 1080)];

/// The map that [`pipeline`] looks through.
fn places(model: &Model) -> Result<Map> {
    let mut map = Map::new(model.identity().clone());
    let keyframe = |i: usize| Keyframe {
        robot: 0,
        session: 0,
        camera: String::new(),
        stamp_ns: i as i64 * 1_000_000_000,
        name: String::new(),
        odom_from_base: None,
    };
    map.set_preprocessing(&model.preprocessing());
    for i in 0..PLACES {
        map.push(keyframe(i), &Descriptor::new(noise(i, DIM).collect())?)?;
    }
    Ok(map)
}

/// Bytes of a camera's image to the decision, beside the descriptor's own time in turns with it.
fn pipeline(args: &Args, model: &Model, (columns, rows): (u32, u32)) -> Result<Row> {
    let (w, h) = (model.spec().input_width, model.spec().input_height);
    let sized = RgbImage::new(w as u32, h as u32, vec![90; 3 * w * h])?;
    let x = model.preprocess(&sized)?;
    let describe = || match model.device() {
        ComputeDevice::Cpu => model.describe_tensor(&x),
        // Pixels are what a GPU takes.
        ComputeDevice::Cuda(_) => model.describe(&sized),
    };
    let map = places(model)?;
    let mut detector = LoopDetector::new(structvpr::config::Config::default(), map, model.spec().recommended())?;
    let (mut whole, mut alone) = (Vec::new(), Vec::new());
    let mut stamp_ns = 2 * PLACES as i64 * 1_000_000_000;
    while whole.len() < args.rounds {
        for i in 0..TURN {
            let began = Instant::now();
            describe()?;
            alone.extend((i > 0).then_some(began.elapsed().as_secs_f64()));
        }
        for i in 0..TURN {
            stamp_ns += 1_000_000_000;
            let bytes = 3 * columns as usize * rows as usize;
            let data: Vec<u8> = (0..bytes).map(|p| ((p * 2_654_435_761 + stamp_ns as usize) >> 13) as u8).collect();
            let began = Instant::now();
            let form = RawImage { width: columns, height: rows, encoding: "bgr8", is_bigendian: false, step: 3 * columns, data: &[] };
            let ((), image) = RgbImage::from_message(data, |data| Ok(((), RawImage { data, ..form })))?;
            let frame = Frame {
                camera: String::new(),
                stamp_ns,
                name: String::new(),
                descriptor: model.describe(&image)?,
                luma_std: image.luma_stats().1,
                median_depth_m: None,
                glance: Some(image.glance()?),
                odom_from_base: None,
                features: None,
                calibration: None,
            };
            detector.process(frame)?;
            whole.extend((i > 0).then_some(began.elapsed().as_secs_f64()));
        }
    }
    let what = format!("{columns}x{rows} image to decision, {PLACES} places");
    let row = row(what, whole, Some((&format!("descriptor {h}x{w} alone"), alone)), None);
    ensure!(detector.map().keyframes().len() > PLACES, "no image became a keyframe");
    Ok(row)
}

/// Numbers in -1..1 that need no file.
fn noise(seed: usize, n: usize) -> impl Iterator<Item = f32> {
    (0..n).map(move |i| {
        let mut z = ((seed << 40) + i) as u64;
        z = (z + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((z ^ (z >> 27)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    })
}

/// SuperPoint with random weights: its speed does not depend on them.
fn superpoint(args: &Args, runtime: Runtime) -> Result<Row> {
    let (script, peers_name) = runtime.names();
    let mut tensors = std::collections::BTreeMap::new();
    for (at, (name, shape)) in Architecture::SuperpointVgg.tensors().into_iter().enumerate() {
        let fan_in: usize = shape.iter().skip(1).product();
        let scale = if shape.len() > 1 { (6.0 / fan_in as f32).sqrt() } else { 0.1 };
        let n = shape.iter().product();
        let values: Vec<f32> = noise(at, n).map(|v| v * scale).collect();
        tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
    }
    let weights = LocalWeights { architecture: Architecture::SuperpointVgg, layout: "random", tensors };
    let net = LocalNet::new(&weights)?;
    let (h, w) = (480, 640);
    let pixels: Vec<f32> = noise(99, h * w).map(|v| v * 0.5 + 0.5).collect();
    let dir = tempfile::tempdir()?;
    let peer = if args.peers {
        let data = pixels.iter().map(|v| f64::from(*v)).collect();
        std::fs::write(dir.path().join("input.npy"), write_npy(&Matrix { rows: h, cols: w, data }))?;
        std::fs::write(dir.path().join("model.safetensors"), weights.to_bytes(candle_core::DType::F32)?)?;
        Some(Peer::start(args, "superpoint.py", &[dir.path(), Path::new(script)])?)
    } else {
        None
    };
    let x = Tensor::from_vec(pixels, (1, 1, h, w), &Device::Cpu)?;
    let mut last = None;
    let (ours, theirs) = rounds(
        args.rounds,
        || {
            last = Some(net.dense(&x)?);
            Ok(())
        },
        peer,
    )?;
    let check = match (&theirs, last) {
        (Some(_), Some(dense)) => {
            let path = dir.path().join("logits.npy");
            let m = structvpr::eval::read_matrix(&std::fs::read(&path).context("the peer left no logits.npy")?)?;
            let mine = dense.logits.flatten_all()?.to_vec1::<f32>()?;
            let worst = m.data.iter().zip(&mine).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
            let range = m.data.iter().fold(0f64, |m, v| m.max(v.abs()));
            ensure!(worst <= 1e-3 * range.max(1.0), "the logits differ from {peers_name}'s by {worst:.1e} of {range:.1}");
            Some(format!("largest difference {worst:.1e} of {range:.1}"))
        }
        _ => None,
    };
    Ok(row(format!("SuperPoint VGG {h}x{w} f32"), ours, theirs.map(|t| (peers_name, t)), check))
}

/// Features whose descriptors are noise, the first `shared` of them those of any other `image`, seen from further to the side: what
/// is near has moved more.
fn random_features(image: usize, n: usize, dim: usize, shared: usize) -> Result<Features> {
    let same = noise(1, shared * dim).zip(noise(50 + image, shared * dim)).map(|(a, b)| a + 0.3 * b);
    let values = same.chain(noise(100 + image, (n - shared) * dim)).collect();
    let (at, near) = (noise(3, 2 * n).collect::<Vec<_>>(), noise(4, n));
    let moved = |(p, near): (&[f32], f32)| [300.0 + 280.0 * p[0] + image as f32 * (12.0 + 8.0 * near), 240.0 + 230.0 * p[1]];
    let points = at.chunks_exact(2).zip(near).map(moved).collect();
    Ok(Features::new(640, 480, points, vec![1.0; n], dim, values)?)
}

fn matching(args: &Args) -> Result<Row> {
    let (n, dim) = (1000, 256);
    let (query, reference) = (random_features(1, n, dim, n / 2)?, random_features(2, n, dim, n / 2)?);
    let dir = tempfile::tempdir()?;
    let peer = if args.peers {
        for (name, f) in [("query.npy", &query), ("reference.npy", &reference)] {
            let data = f.descriptors().iter().map(|v| f64::from(*v)).collect();
            std::fs::write(dir.path().join(name), write_npy(&Matrix { rows: n, cols: dim, data }))?;
        }
        Some(Peer::start(args, "matching.py", &[dir.path()])?)
    } else {
        None
    };
    let mut found = Vec::new();
    let (ours, theirs) = rounds(
        args.rounds,
        || {
            found = mutual_matches(&query, &reference, 1.0)?;
            Ok(())
        },
        peer,
    )?;
    let check = match &theirs {
        Some(_) => {
            let text = std::fs::read_to_string(dir.path().join("matches.txt")).context("the peer left no matches.txt")?;
            let same = found.iter().filter(|m| text.lines().any(|l| l == format!("{} {}", m.query, m.reference))).count();
            let total = text.lines().count();
            ensure!(same + 2 >= total.max(found.len()), "{same} matches agree of our {} and OpenCV's {total}", found.len());
            Some(format!("{same} of {total} matches the same"))
        }
        None => None,
    };
    Ok(row(format!("matching {n} x {n} x {dim}"), ours, theirs.map(|t| ("BFMatcher crossCheck", t)), check))
}

/// One pair as a keyframe's candidate costs it: unpacking, matching, robust estimation. `agrees`: half of the points are of one
/// scene; else none, and the estimation goes on to its last iteration.
fn verification(args: &Args, agrees: bool) -> Result<Row> {
    let (n, dim) = (800, 256);
    let shared = if agrees { n / 2 } else { 0 };
    let (query, packed) = (random_features(1, n, dim, shared)?, CompactFeatures::new(&random_features(2, n, dim, shared)?));
    let (mut tried, mut evidence) = (0, f64::NEG_INFINITY);
    let (ours, _) = rounds(
        args.rounds,
        || {
            let reference = packed.unpack()?;
            let matches = mutual_matches(&query, &reference, 1.0)?;
            let found = verify(&View::of(&query), &View::of(&reference), &matches, &VerifyConfig::default())?;
            (tried, evidence) = (matches.len(), found.map_or(f64::NEG_INFINITY, |v| v.evidence));
            Ok(())
        },
        None,
    )?;
    // Not the time of something else.
    ensure!(agrees == (evidence > 3.0), "of {tried} matches an evidence of {evidence}, where agreement is {agrees}");
    let which = if agrees { "that agrees" } else { "that does not" };
    Ok(row(format!("verification of a pair {which}, {n} keypoints"), ours, None, Some(format!("{tried} matches"))))
}

struct Peer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    fn start(args: &Args, script: &str, arguments: &[&Path]) -> Result<Self> {
        let script = Path::new("scripts/peers").join(script);
        ensure!(script.is_file(), "{}: not here; --peers runs from the repository's root", script.display());
        let threads = args.threads.to_string();
        let mut child = Command::new(&args.python)
            .arg(&script)
            .args(arguments)
            .arg(&threads)
            .env("OMP_NUM_THREADS", &threads)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", args.python.display()))?;
        let input = child.stdin.take().context("no stdin")?;
        let output = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut peer = Self { child, input, output };
        let ready = peer.line()?;
        ensure!(ready == "ready", "{} said `{ready}`, not `ready`", script.display());
        Ok(peer)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the peer ended; its message is above");
        Ok(line.trim().to_string())
    }

    /// One round; seconds.
    fn round(&mut self) -> Result<f64> {
        self.round_of("run")
    }

    /// One round of what the peer's script calls `what`; seconds.
    fn round_of(&mut self, what: &str) -> Result<f64> {
        writeln!(self.input, "{what}")?;
        self.input.flush()?;
        let line = self.line()?;
        line.parse().with_context(|| format!("the peer said `{line}`"))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
