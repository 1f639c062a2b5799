//! The networks for local features against PyTorch and ONNX Runtime (tests/golden/local.py).

use super::superglue::tensors as superglue_tensors;
use super::superpoint::{squeeze_specs, vgg_specs};
use super::*;
use crate::eval::read_matrix;
use crate::features::{points, Detection};
use crate::image::RgbImage;
use crate::test_noise;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::PathBuf;

fn noise(seed: u64, n: usize, scale: f64) -> Vec<f32> {
    (0..n as u64).map(|i| test_noise(seed, i) * scale as f32).collect()
}

fn golden(bytes: &[u8]) -> Vec<f64> {
    read_matrix(bytes).unwrap().data
}

/// 97 values of each tensor, evenly through it, one after the other.
fn samples(all: &[Tensor]) -> Vec<f32> {
    let of = |t: &Tensor| {
        let flat = t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        (0..97).map(|i| flat[i * flat.len() / 97]).collect::<Vec<f32>>()
    };
    all.iter().flat_map(of).collect()
}

fn worst(ours: &[f32], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
}

type Named = Vec<(String, Vec<usize>, Vec<f32>)>;

fn file(tensors: &Named) -> Vec<u8> {
    super::tests::file(tensors)
}

/// SuperPoint's checkpoint with random weights.
fn superpoint_file() -> Named {
    let order = ["conv1a", "conv1b", "conv2a", "conv2b", "conv3a", "conv3b", "conv4a", "conv4b", "convPa", "convPb", "convDa", "convDb"];
    let mut out = Vec::new();
    for (name, shape) in vgg_specs() {
        let i = order.iter().position(|n| *n == name).unwrap() as u64;
        let fan_in: usize = shape[1..].iter().product();
        let scale = (6.0 / fan_in as f64).sqrt();
        out.push((format!("{name}.weight"), shape.to_vec(), noise(10 * i, shape.iter().product(), scale)));
        out.push((format!("{name}.bias"), vec![shape[0]], noise(10 * i + 1, shape[0], 0.1)));
    }
    out
}

fn small_input() -> Tensor {
    let values: Vec<f32> = noise(777, 48 * 72, 1.0).into_iter().map(|v| v * 0.5 + 0.5).collect();
    Tensor::from_vec(values, (1, 1, 48, 72), &Device::Cpu).unwrap()
}

#[test]
fn superpoint_agrees_with_pytorch_layer_by_layer() {
    let weights = LocalWeights::parse(&file(&superpoint_file())).unwrap();
    assert_eq!((weights.architecture, weights.layout), (Architecture::SuperpointVgg, "SuperPoint"));
    let net = SuperPoint::vgg(&weights.tensors).unwrap();
    let mut all = net.encode(&small_input()).unwrap();
    let dense = net.dense(&small_input()).unwrap();
    // Layer by layer and in kept memory, and in memory that has served another size before.
    let by_layers = net.detect(all.last().unwrap()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    net.dense(&Tensor::zeros((1, 1, 64, 40), DType::F32, &Device::Cpu).unwrap()).unwrap();
    for dense in [&dense, &net.dense(&small_input()).unwrap()] {
        assert!(dense.logits.flatten_all().unwrap().to_vec1::<f32>().unwrap() == by_layers);
    }
    all.extend([dense.logits.clone(), dense.descriptors.clone()]);
    let theirs = golden(include_bytes!("../../tests/golden/superpoint_vgg.npy"));
    assert!(worst(&samples(&all), &theirs) < 1e-4, "{}", worst(&samples(&all), &theirs));

    let config = Detection { max_points: 20, ..Detection::of(Architecture::SuperpointVgg, 20) };
    let (found, scores, descriptors) = points(&dense, Architecture::SuperpointVgg, &config).unwrap();
    let theirs = golden(include_bytes!("../../tests/golden/superpoint_points.npy"));
    assert_eq!(found.len(), 20);
    for (i, row) in theirs.chunks_exact(11).enumerate() {
        assert_eq!([f64::from(found[i][0]), f64::from(found[i][1])], [row[0], row[1]], "point {i}");
        assert!((f64::from(scores[i]) - row[2]).abs() < 1e-5);
        let d = &descriptors[256 * i..256 * (i + 1)];
        let norm = d.iter().map(|v| v * v).sum::<f32>().sqrt();
        assert!(d.iter().zip(&row[3..]).all(|(a, b)| (f64::from(a / norm) - b).abs() < 1e-4), "point {i}");
    }
    let moved = points(&dense, Architecture::SuperpointVgg, &Detection { subpixel: true, ..config }).unwrap().0;
    assert!(moved.iter().zip(&found).all(|(a, b)| (a[0] - b[0]).abs() <= 0.5 && (a[1] - b[1]).abs() <= 0.5) && moved != found);
}

#[test]
fn what_is_converted_is_the_same_network() {
    let weights = LocalWeights::parse(&file(&superpoint_file())).unwrap();
    let again = LocalWeights::parse(&weights.to_bytes(DType::F32).unwrap()).unwrap();
    assert_eq!((again.architecture, again.sha256().unwrap()), (weights.architecture, weights.sha256().unwrap()));
    let half = LocalWeights::parse(&weights.to_bytes(DType::F16).unwrap()).unwrap();
    let of = |w: &LocalWeights| samples(&[LocalNet::new(w).unwrap().dense(&small_input()).unwrap().descriptors]);
    let close = of(&half).iter().zip(of(&weights)).all(|(a, b)| (a - b).abs() < 0.02);
    assert!(close);
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let said = |change: &dyn Fn(&mut Named)| {
        let mut tensors = superpoint_file();
        change(&mut tensors);
        LocalWeights::parse(&file(&tensors)).unwrap_err().to_string()
    };
    let e = said(&|t| t.retain(|(n, ..)| n != "convPb.bias"));
    assert!(e.contains("`convPb.bias` is missing"), "{e}");
    let e = said(&|t| t[4].2[7] = f32::NAN);
    assert!(e.contains("`conv2a.weight` holds NaN"), "{e}");
    let e = said(&|t| t.push(("convXa.weight".into(), vec![1], vec![0.0])));
    assert!(e.contains("convXa.weight"), "{e}");
    let e = said(&|t| t[0].0 = "nonsense".into());
    assert!(e.contains("SuperGlue's `bin_score`"), "{e}");
    let e = said(&|t| (t[2].1, t[2].2) = (vec![64, 64, 1, 1], vec![0.0; 64 * 64]));
    assert!(e.contains("`conv1b.weight` has shape [64, 64, 1, 1], expected [64, 64, 3, 3]"), "{e}");
}

/// SuperGlue's checkpoint with the random weights of the script: one seed per tensor, one left out before each stage.
fn superglue_file() -> Named {
    let mut out: Named = Vec::new();
    let mut seed = 5000u64;
    let mut next = |n: usize, scale: f64| {
        let values = noise(seed, n, scale);
        seed += 1;
        values
    };
    let conv = |out: &mut Named, next: &mut dyn FnMut(usize, f64) -> Vec<f32>, name: &str, o: usize, i: usize, norm: Option<String>| {
        out.push((format!("{name}.weight"), vec![o, i, 1], next(o * i, (1.0 / i as f64).sqrt())));
        out.push((format!("{name}.bias"), vec![o], next(o, 0.1)));
        if let Some(norm) = norm {
            for (kind, scale, base) in [("weight", 0.2, 1.0), ("bias", 0.1, 0.0), ("running_mean", 0.1, 0.0), ("running_var", 0.3, 1.0)] {
                out.push((format!("{norm}.{kind}"), vec![o], next(o, scale).into_iter().map(|v| v + base).collect()));
            }
            out.push((format!("{norm}.num_batches_tracked"), vec![1], vec![1.0]));
        }
    };
    next(0, 0.0);
    let dims = [3, 32, 64, 128, 256, 256];
    for at in 0..5 {
        let norm = (at < 4).then(|| format!("kenc.encoder.{}", 3 * at + 1));
        conv(&mut out, &mut next, &format!("kenc.encoder.{}", 3 * at), dims[at + 1], dims[at], norm);
    }
    for layer in (0..18).map(|l| format!("gnn.layers.{l}")) {
        next(0, 0.0);
        for part in ["merge", "proj.0", "proj.1", "proj.2"] {
            conv(&mut out, &mut next, &format!("{layer}.attn.{part}"), 256, 256, None);
        }
        conv(&mut out, &mut next, &format!("{layer}.mlp.0"), 512, 512, Some(format!("{layer}.mlp.1")));
        conv(&mut out, &mut next, &format!("{layer}.mlp.3"), 256, 512, None);
    }
    next(0, 0.0);
    conv(&mut out, &mut next, "final_proj", 256, 256, None);
    out.push(("bin_score".into(), vec![], vec![1.3]));
    out
}

#[test]
fn superglue_agrees_with_pytorch() {
    let weights = LocalWeights::parse(&file(&superglue_file())).unwrap();
    assert_eq!(weights.architecture, Architecture::Superglue);
    assert_eq!(weights.tensors.len(), superglue_tensors().len());
    let net = SuperGlue::new(&weights.tensors).unwrap();
    let side = |seed: u64, n: usize| {
        let at = noise(seed, 2 * n, 1.0);
        let points: Vec<[f32; 2]> = at.chunks_exact(2).map(|p| [p[0] * 310.0 + 320.0, p[1] * 230.0 + 240.0]).collect();
        let scores: Vec<f32> = noise(seed + 1, n, 1.0).into_iter().map(|v| v * 0.5 + 0.5).collect();
        crate::features::Features::new(640, 480, points, scores, 256, noise(seed + 2, n * 256, 1.0)).unwrap()
    };
    let (a, b) = (side(4000, 23), side(4100, 31));
    let view = |f: &crate::features::Features| (f.size(), f.points().to_vec(), f.scores().to_vec(), f.descriptors().to_vec());
    let (va, vb) = (view(&a), view(&b));
    let sides = [&va, &vb].map(|v| Side { size: v.0, points: &v.1, scores: &v.2, descriptors: &v.3 });
    let ours = net.log_assignment(&sides[0], &sides[1]).unwrap();
    let theirs = golden(include_bytes!("../../tests/golden/superglue.npy"));
    assert!(worst(&ours, &theirs) < 2e-3, "{}", worst(&ours, &theirs));
    // Rows and columns are assigned in full.
    for row in ours.chunks_exact(32).take(23) {
        assert!((row.iter().map(|v| v.exp()).sum::<f32>() - 1.0).abs() < 0.02);
    }
    assert!(net.matches(&sides[0], &Side { points: &[], scores: &[], descriptors: &[], ..sides[1] }).unwrap().is_empty());
    let wrong = Side { descriptors: &va.3[..23 * 128], ..sides[0] };
    assert!(net.log_assignment(&wrong, &sides[1]).unwrap_err().to_string().contains("these have 128"));
    let e = LocalNet::new(&weights).unwrap_err().to_string();
    assert!(e.contains("superglue") && e.contains("find none"), "{e}");
}

/// The checkpoint of the script's `lightglue` by its module names, values by their rank in the sorted names.
fn lightglue_file(seed: u64, input: usize, d: usize, layers: usize, heads: usize) -> Named {
    let mut names: Vec<(String, Vec<usize>)> = vec![("posenc.Wr.weight".into(), vec![d / heads / 2, 2])];
    let mut linear = |name: String, o: usize, i: usize| {
        names.push((format!("{name}.weight"), if i == 0 { vec![o] } else { vec![o, i] }));
        names.push((format!("{name}.bias"), vec![o]));
    };
    if input != d {
        linear("input_proj".into(), d, input);
    }
    for at in 0..layers {
        let (own, cross) = (format!("transformers.{at}.self_attn"), format!("transformers.{at}.cross_attn"));
        linear(format!("{own}.Wqkv"), 3 * d, d);
        linear(format!("{own}.out_proj"), d, d);
        for part in ["to_qk", "to_v", "to_out"] {
            linear(format!("{cross}.{part}"), d, d);
        }
        for block in [own, cross] {
            linear(format!("{block}.ffn.0"), 2 * d, 2 * d);
            linear(format!("{block}.ffn.1"), 2 * d, 0);
            linear(format!("{block}.ffn.3"), d, 2 * d);
        }
        linear(format!("log_assignment.{at}.matchability"), 1, d);
        linear(format!("log_assignment.{at}.final_proj"), d, d);
    }
    names.sort();
    let value = |(at, (name, shape)): (usize, (String, Vec<usize>))| {
        let (norm, bias) = (name.contains(".ffn.1."), name.ends_with("bias"));
        let scale = if norm {
            0.2
        } else if bias {
            0.1
        } else {
            (1.0 / shape[1] as f64).sqrt()
        };
        let base = if norm && !bias { 1.0 } else { 0.0 };
        let values = noise(seed + at as u64, shape.iter().product(), scale).into_iter().map(|v| v + base).collect();
        (name, shape, values)
    };
    names.into_iter().enumerate().map(value).collect()
}

#[test]
fn lightglue_and_lighterglue_agree_with_kornia() {
    let cases: [(_, &[u8], _, usize); 2] = [
        (lightglue_file(20000, 256, 256, 9, 4), include_bytes!("../../tests/golden/lightglue.npy"), Architecture::Lightglue, 256),
        (lightglue_file(30000, 64, 96, 6, 1), include_bytes!("../../tests/golden/lighterglue.npy"), Architecture::Lighterglue, 64),
    ];
    for (nested, theirs, architecture, dim) in cases {
        // As the authors released it: blocks by kind, then number; XFeat's under `matcher.`, both with what we do not use.
        let mut older: Named = nested.clone();
        for (name, ..) in &mut older {
            let parts: Vec<&str> = name.split('.').collect();
            if let ["transformers", at, block, rest @ ..] = &parts[..] {
                *name = format!("matcher.{block}.{at}.{}", rest.join("."));
            } else {
                *name = format!("matcher.{name}");
            }
        }
        older.push(("matcher.token_confidence.0.token.0.bias".into(), vec![1], vec![0.0]));
        older.push(("matcher.confidence_thresholds".into(), vec![1], vec![0.0]));
        let weights = LocalWeights::parse(&file(&nested)).unwrap();
        assert_eq!(weights.architecture, architecture);
        assert_eq!(weights.sha256().unwrap(), LocalWeights::parse(&file(&older)).unwrap().sha256().unwrap());
        assert_eq!(weights.tensors.len(), architecture.tensors().len());
        let ours = LocalWeights::parse(&weights.to_bytes(DType::F32).unwrap()).unwrap();
        assert_eq!(ours.sha256().unwrap(), weights.sha256().unwrap());
        let LearnedMatcher::LightGlue(mut net) = LearnedMatcher::new(&weights).unwrap() else { panic!("not LightGlue") };
        let side = |seed: u64, n: usize| {
            let at = noise(seed, 2 * n, 1.0);
            let points: Vec<[f32; 2]> = at.chunks_exact(2).map(|p| [p[0] * 310.0 + 320.0, p[1] * 230.0 + 240.0]).collect();
            crate::features::Features::new(640, 480, points, vec![1.0; n], dim, noise(seed + 2, n * dim, 1.0)).unwrap()
        };
        let (a, b) = (side(4000, 23), side(4100, 31));
        fn view(f: &crate::features::Features) -> Side<'_> {
            Side { size: f.size(), points: f.points(), scores: f.scores(), descriptors: f.descriptors() }
        }
        let ours = net.log_assignment(&view(&a), &view(&b)).unwrap();
        let theirs = golden(theirs);
        assert!(worst(&ours, &theirs) < 2e-3, "{architecture:?}: {}", worst(&ours, &theirs));
        // Random weights are sure of nothing.
        net.threshold = 0.0;
        let matches = net.matches(&view(&a), &view(&b)).unwrap();
        assert!(!matches.is_empty() && matches.windows(2).all(|w| w[0].0 < w[1].0));
        for (q, r, p) in matches {
            let of_row = (0..31).map(|c| theirs[q * 31 + c]).fold(f64::MIN, f64::max);
            assert!((f64::from(p).ln() - of_row).abs() < 2e-3 && (theirs[q * 31 + r] - of_row).abs() < 4e-3);
        }
        let nothing = Side { points: &[], scores: &[], descriptors: &[], ..view(&a) };
        assert!(net.matches(&nothing, &view(&b)).unwrap().is_empty());
        let wrong = Side { descriptors: &b.descriptors()[..31 * 32], ..view(&b) };
        assert!(net.log_assignment(&view(&a), &wrong).unwrap_err().to_string().contains("these have 32"));
        assert!(LocalNet::new(&weights).unwrap_err().to_string().contains("match features but find none"));
    }
    let mut broken = lightglue_file(30000, 64, 96, 6, 1);
    broken.retain(|(n, ..)| n != "transformers.2.cross_attn.to_v.weight");
    let e = LocalWeights::parse(&file(&broken)).unwrap_err().to_string();
    assert!(e.contains("cross_attn.2.to_v.weight"), "{e}");
    let detector = LocalWeights::parse(&file(&superpoint_file())).unwrap();
    assert!(LearnedMatcher::new(&detector).unwrap_err().to_string().contains("SuperGlue and LightGlue match features"));
}

fn shared(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared").join(name);
    if !path.exists() {
        eprintln!("skipped: {} is not here", path.display());
    }
    path.exists().then_some(path)
}

/// The photograph of the script, wrapped to 640 x 480.
fn photograph() -> Option<Tensor> {
    let image = RgbImage::decode(&std::fs::read(shared("data/camvid/images/0001TP_006690.jpg")?).unwrap()).unwrap();
    let (w, h, luma) = (image.width() as usize, image.height() as usize, image.luma().unwrap());
    let at = |i: usize| f32::from(luma[i / 640 % h * w + i % 640 % w]) / 255.0;
    Some(Tensor::from_vec((0..640 * 480).map(at).collect::<Vec<f32>>(), (1, 1, 480, 640), &Device::Cpu).unwrap())
}

fn real(name: &str) -> Option<LocalWeights> {
    Some(LocalWeights::parse(&std::fs::read(shared(&format!("weights/{name}"))?).unwrap()).unwrap())
}

#[test]
fn the_squeeze_network_and_xfeat_agree_with_onnx_runtime_on_a_photograph() {
    let (Some(x), Some(squeeze), Some(xfeat)) = (photograph(), real("sp_squeeze_b1.onnx"), real("xfeat_vga.onnx")) else { return };
    assert_eq!((squeeze.architecture, squeeze.tensors.len()), (Architecture::SuperpointSqueeze, 2 * squeeze_specs().len()));
    let dense = LocalNet::new(&squeeze).unwrap().dense(&x).unwrap();
    let theirs = golden(include_bytes!("../../tests/golden/sp_squeeze.npy"));
    let off = worst(&samples(&[dense.logits, dense.descriptors]), &theirs);
    assert!(off < 1e-3, "{off}");
    let (features, logits, reliability) = XFeat::new(&xfeat.tensors).unwrap().raw(&x).unwrap();
    let theirs = golden(include_bytes!("../../tests/golden/xfeat.npy"));
    let off = worst(&samples(&[features, logits, reliability]), &theirs);
    assert!(off < 1e-3, "{off}");
}

/// Points that one kernel of the convolutions finds and the other does not are ties: another point's score is as good, where only so many are
/// kept or where one of two neighbours is.
#[test]
fn kernels_find_the_same_points_but_for_ties() {
    if super::kernels::Plan::bf16_products() != Some(super::kernels::Products::Tiles) {
        eprintln!("skipped: kernels_find_the_same_points_but_for_ties: this processor has no AMX, and one kernel");
        return;
    }
    const TIE: f32 = 1e-3;
    let (Some(folder), Some(squeeze), Some(xfeat)) = (shared("data/camvid/images"), real("sp_squeeze_b1.onnx"), real("xfeat_vga.onnx"))
    else {
        return;
    };
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    for weights in [squeeze, xfeat] {
        let net = LocalNet::new(&weights).unwrap();
        let other = super::kernels::by_winograd(|| LocalNet::new(&weights)).unwrap();
        let detection = Detection::of(weights.architecture, 800);
        let (mut shared, mut ties) = (0, 0);
        for path in files.iter().step_by(80) {
            let image = RgbImage::decode(&std::fs::read(path).unwrap()).unwrap().resize_area(640, 480).unwrap();
            let luma = image.luma().unwrap().into_iter().map(|v| f32::from(v) / 255.0).collect::<Vec<f32>>();
            let x = Tensor::from_vec(luma, (1, 1, 480, 640), &Device::Cpu).unwrap();
            let find = |net: &LocalNet| points(&net.dense(&x).unwrap(), weights.architecture, &detection).unwrap();
            let (one, two) = (find(&net), find(&other));
            assert!(one.1 != two.1, "not two kernels");
            for (a, b) in [(&one, &two), (&two, &one)] {
                let last = b.1.last().copied().unwrap();
                for (i, (p, score)) in a.0.iter().zip(&a.1).enumerate() {
                    if let Some(j) = b.0.iter().position(|q| q == p) {
                        assert!((score - b.1[j]).abs() < TIE * score, "{p:?}: {score} and {}", b.1[j]);
                        let dim = net.dim();
                        let off = (0..dim).map(|k| (a.2[i * dim + k] - b.2[j * dim + k]).abs()).fold(0f32, f32::max);
                        assert!(off < 1e-4, "{p:?}: {off}");
                        shared += 1;
                        continue;
                    }
                    let reach = 2.0 * detection.radius as f32;
                    let near = |q: &[f32; 2]| (q[0] - p[0]).abs() <= reach && (q[1] - p[1]).abs() <= reach;
                    let rival = b.0.iter().zip(&b.1).any(|(q, s)| near(q) && (s - score).abs() < TIE * score);
                    assert!(rival || (score - last).abs() < TIE * score, "{p:?} of {score} is no tie; the last is {last}");
                    ties += 1;
                }
            }
        }
        println!("{:?}: {} points shared, {ties} ties", weights.architecture, shared / 2);
        assert!(shared > 100 * ties);
    }
}

#[test]
fn magicpoints_real_weights_agree_with_pytorch_layer_by_layer() {
    let (Some(x), Some(weights)) = (photograph(), real("magicpoint_vgg.pth")) else { return };
    assert_eq!(weights.architecture, Architecture::MagicpointVgg);
    let net = SuperPoint::vgg(&weights.tensors).unwrap();
    let mut all = net.encode(&x).unwrap();
    all.push(net.detect(all.last().unwrap()).unwrap());
    let theirs = golden(include_bytes!("../../tests/golden/magicpoint.npy"));
    let off = worst(&samples(&all), &theirs);
    assert!(off < 1e-3 && !net.describes(), "{off}");
    let e = LocalNet::new(&weights).unwrap_err().to_string();
    assert!(e.contains("do not describe"), "{e}");
}

#[test]
fn a_checkpoint_of_old_pytorch_is_read() {
    let bytes = include_bytes!("../../tests/golden/legacy.pth");
    let tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> =
        super::container::read_for_tests(bytes).unwrap().into_iter().map(|(n, s, v)| (n, (s, v))).collect();
    assert_eq!(tensors["first.weight"], (vec![2, 3], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]));
    assert_eq!(tensors["first.bias"], (vec![2], vec![0.5, -1.5]));
    assert_eq!((&tensors["view"], &tensors["half"]), (&(vec![2], vec![1.0, 4.0]), &(vec![2], vec![1.5, 2.5])));
    assert_eq!(tensors["count"], (vec![], vec![]), "counters are named, not read");
    let e = LocalWeights::parse(&bytes[..bytes.len() - 3]).unwrap_err().to_string();
    assert!(e.contains("ends within storage"), "{e}");
    // A real one, of another network.
    let Some(path) = shared("weights/espnetv2_cityscapes.pth") else { return };
    let tensors = super::container::read_for_tests(&std::fs::read(path).unwrap()).unwrap();
    assert!(tensors.len() > 100, "{}", tensors.len());
    assert!(tensors.iter().all(|(_, shape, values)| values.is_empty() || values.len() == shape.iter().product::<usize>()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    /// Neither panics nor hangs; tests/it/loaders.rs watches what it allocates.
    #[test]
    fn damaged_files_are_errors(old: bool, at in 0usize..4000, byte: u8, cut in 0usize..4000) {
        let mut bad = if old { include_bytes!("../../tests/golden/legacy.pth").to_vec() } else { tiny_onnx() };
        let n = bad.len();
        bad[at % n] = byte;
        bad.truncate(n - cut % n);
        let _ = LocalWeights::parse(&bad);
    }
}

/// A graph of one convolution, written by hand: onnx.proto3 with tags 1 (IR version), 7 (graph), 1 (node), 5 (tensor).
fn tiny_onnx() -> Vec<u8> {
    let field = |tag: u8, body: &[u8]| [&[tag << 3 | 2, body.len() as u8][..], body].concat();
    let node = [field(1, b"x"), field(1, b"w"), field(1, b"b"), field(4, b"Conv")].concat();
    let tensor = [vec![1 << 3, 1], vec![2 << 3, 1], field(8, b"w"), field(9, &1f32.to_le_bytes())].concat();
    let graph = [field(1, &node), field(5, &tensor)].concat();
    [vec![1 << 3, 8], field(7, &graph)].concat()
}

#[test]
fn the_onnx_written_by_hand_is_read() {
    let e = LocalWeights::parse(&tiny_onnx()).unwrap_err().to_string();
    assert!(e.contains("the file has w"), "{e}");
}

#[test]
fn networks_take_their_own_sizes_only() {
    let weights = LocalWeights::parse(&file(&superpoint_file())).unwrap();
    let net = LocalNet::new(&weights).unwrap();
    assert_eq!((net.multiple(), net.dim(), net.architecture().name()), (8, 256, "superpoint_vgg"));
    let mut again: BTreeMap<String, Tensor> = weights.tensors.clone();
    again.remove("conv4b.bias");
    assert!(SuperPoint::vgg(&again).unwrap_err().to_string().contains("conv4b.bias"));
}
