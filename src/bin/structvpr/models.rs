//! `structvpr models`: weights for local features and matching. None are shipped: what they are, where they come from,
//! under which licence, and whether a file is one of them.

use anyhow::{Context, Result};
use candle_core::DType;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use structvpr::error::{read_file, write_file};
use structvpr::model::{Architecture, LearnedMatcher, LocalNet, LocalWeights};

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(clap::Subcommand)]
enum Action {
    /// The networks that we build, and where their weights are to be had (the default).
    List,
    /// Say which network a file is of, whether it is whole, its sha256, and its licence if the file is known.
    Check {
        /// PyTorch (.pth, .pt), ONNX or safetensors.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Write a file's tensors, batch norm folded, as our safetensors: smaller, and quicker to load.
    Convert {
        /// PyTorch (.pth, .pt), ONNX or safetensors.
        input: PathBuf,
        /// Where to write.
        #[arg(long)]
        out: PathBuf,
        /// Storage of the weights.
        #[arg(long, value_parser = ["f16", "f32"], default_value = "f32")]
        dtype: String,
    },
}

/// Weights that are known to exist.
struct Known {
    file: &'static str,
    architecture: Architecture,
    licence: &'static str,
    from: &'static str,
    note: &'static str,
    /// Of the file, where we have held it in our hands.
    sha256: Option<&'static str>,
}

const KNOWN: [Known; 8] = [
    Known {
        file: "sp_squeeze_b1.onnx",
        architecture: Architecture::SuperpointSqueeze,
        licence: "MIT",
        from: "its authors' release; look for the file's name and check the sha256",
        note: "SuperPoint's interface on a smaller encoder, retrained; best on streets in our figures",
        sha256: Some("d428dcd29dccc1ce77891f156a44e19984fc36c9cdcd3284866347c027891fe1"),
    },
    Known {
        file: "xfeat_vga.onnx",
        architecture: Architecture::Xfeat,
        licence: "Apache-2.0",
        from: "an ONNX export of XFeat's weights with the original tensor names",
        note: "XFeat: fastest",
        sha256: Some("6753d291c2e27ef25f5aeba0c0146a42bfe661a879c1c0a9ad9395521a4a802b"),
    },
    Known {
        file: "xfeat.pt",
        architecture: Architecture::Xfeat,
        licence: "Apache-2.0",
        from: "https://github.com/verlab/accelerated_features (weights/)",
        note: "XFeat as its authors give it",
        sha256: None,
    },
    Known {
        file: "superpoint_v1.pth",
        architecture: Architecture::SuperpointVgg,
        licence: "Magic Leap, non-commercial research only",
        from: "https://github.com/magicleap/SuperPointPretrainedNetwork",
        note: "SuperPoint as published; read its licence first",
        sha256: None,
    },
    Known {
        file: "superglue_outdoor.pth",
        architecture: Architecture::Superglue,
        licence: "Magic Leap, non-commercial research only",
        from: "https://github.com/magicleap/SuperGluePretrainedNetwork (models/weights/)",
        note: "matches SuperPoint's features; read its licence first",
        sha256: None,
    },
    Known {
        file: "superpoint_lightglue.pth",
        architecture: Architecture::Lightglue,
        licence: "Apache-2.0",
        from: "https://github.com/cvg/LightGlue (releases)",
        note: "matches SuperPoint's features, whose own weights are another matter",
        sha256: None,
    },
    Known {
        file: "xfeat-lighterglue.pt",
        architecture: Architecture::Lighterglue,
        licence: "Apache-2.0",
        from: "https://github.com/verlab/accelerated_features (weights/)",
        note: "matches XFeat's features",
        sha256: None,
    },
    Known {
        file: "magicpoint_vgg.pth",
        architecture: Architecture::MagicpointVgg,
        licence: "MIT",
        from: "a retrained detector; look for the file's name and check the sha256",
        note: "detects but does not describe: no use for verification",
        sha256: Some("d51ead4962685a247b60c9ccf34f14194fb9ce2cb8b308c3e705767c59c3b758"),
    },
];

pub fn run(args: Args) -> Result<ExitCode> {
    match args.action.unwrap_or(Action::List) {
        Action::List => list(),
        Action::Check { files } => check(&files),
        Action::Convert { input, out, dtype } => convert(&input, &out, if dtype == "f16" { DType::F16 } else { DType::F32 }),
    }
}

fn list() -> Result<ExitCode> {
    println!("No weights: sift, orb, akaze (OpenCV). They need no file and no licence of their own.\n");
    println!("Networks. None of these weights is part of StructVPR; each has its own licence.");
    for k in &KNOWN {
        println!("\n{:<20} {}", k.architecture.name(), k.file);
        println!("  {}", k.note);
        println!("  licence  {}", k.licence);
        println!("  from     {}", k.from);
        println!("  sha256   {}", k.sha256.unwrap_or("not known to us: `structvpr models check FILE` prints yours"));
    }
    println!(
        "\nUse: --rerank NAME --rerank-weights FILE (eval, replay, doctor), or verification.features and verification.weights (node)."
    );
    Ok(ExitCode::SUCCESS)
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn read(path: &Path) -> Result<(LocalWeights, String)> {
    let bytes = read_file(path)?;
    let weights = LocalWeights::parse(&bytes).map_err(|e| e.at(path))?;
    Ok((weights, hex(&bytes)))
}

/// What is loaded must build.
fn build(weights: &LocalWeights) -> structvpr::error::Result<()> {
    match weights.architecture {
        Architecture::Superglue | Architecture::Lightglue | Architecture::Lighterglue => LearnedMatcher::new(weights).map(drop),
        // A detector alone builds, but describes nothing: that is said in the list.
        Architecture::MagicpointVgg => Ok(()),
        _ => LocalNet::new(weights).map(drop),
    }
}

fn check(files: &[PathBuf]) -> Result<ExitCode> {
    let mut failed = false;
    for path in files {
        let result = read(path).and_then(|(w, sha)| build(&w).map_err(|e| e.at(path)).map(|()| (w, sha)).map_err(Into::into));
        let (weights, sha) = match result {
            Ok(r) => r,
            Err(e) => {
                failed = true;
                eprintln!("structvpr: {e:#}");
                continue;
            }
        };
        let values: usize = weights.tensors.values().map(|t| t.elem_count()).sum();
        println!(
            "{}: {} ({} layout), {} tensors, {values} values",
            path.display(),
            weights.architecture.name(),
            weights.layout,
            weights.tensors.len()
        );
        println!("  sha256 of the file     {sha}");
        println!("  sha256 of the weights  {}", weights.sha256()?);
        match KNOWN.iter().find(|k| k.sha256 == Some(sha.as_str())) {
            Some(k) => println!("  known as {}, licence {}", k.file, k.licence),
            None => println!("  not a file that we know: its licence is yours to find out"),
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn convert(input: &Path, out: &Path, dtype: DType) -> Result<ExitCode> {
    let (weights, _) = read(input)?;
    let bytes = weights.to_bytes(dtype)?;
    build(&LocalWeights::parse(&bytes)?).context("what was written does not load")?;
    write_file(out, &bytes)?;
    println!(
        "{} ({}, {} layout) -> {}: {} bytes",
        input.display(),
        weights.architecture.name(),
        weights.layout,
        out.display(),
        bytes.len()
    );
    println!("the licence of the weights stays what it was");
    Ok(ExitCode::SUCCESS)
}
