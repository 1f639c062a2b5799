use super::container::NamedTensor;
use super::*;
use crate::eval::read_matrix;
use crate::test_noise;
use proptest::prelude::*;
use std::collections::HashMap;

fn noise(seed: usize, n: usize) -> Vec<f32> {
    (0..n as u64).map(|i| test_noise(seed as u64, i)).collect()
}

/// A safetensors file of f32 tensors.
pub(super) fn file(tensors: &[NamedTensor]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, _, v)| v.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((n, s, _), b)| (n.clone(), safetensors::tensor::TensorView::new(safetensors::Dtype::F32, s.clone(), b).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// The random weights of tests/golden/make.py under torchvision's names, batch norm apart.
fn torchvision_tensors() -> Vec<NamedTensor> {
    let mut out = Vec::new();
    for (i, spec) in conv_specs().into_iter().enumerate() {
        let c = spec.shape[0];
        let scale = (6.0 / spec.shape[1..].iter().product::<usize>() as f64).sqrt() as f32;
        let weight = noise(10 * i, spec.shape.iter().product()).into_iter().map(|v| v * scale).collect();
        out.push((format!("{}.weight", spec.torchvision), spec.shape.to_vec(), weight));
        let mut norm = |kind: &str, k: usize, base: f32, spread: f32| {
            let v = noise(10 * i + k, c).into_iter().map(|v| base + spread * v).collect();
            out.push((format!("{}.{kind}", spec.torchvision_norm), vec![c], v));
        };
        norm("weight", 1, 1.0, 0.2);
        norm("bias", 2, 0.0, 0.1);
        norm("running_mean", 3, 0.0, 0.1);
        norm("running_var", 4, 1.0, 0.3);
    }
    out.push(("classifier.1.weight".into(), vec![2, 2], vec![0.0; 4]));
    out.push(("features.18.0.weight".into(), vec![1], vec![0.0]));
    out
}

fn tensorflow_tensors() -> Vec<NamedTensor> {
    let mut out = Vec::new();
    for (i, spec) in conv_specs().into_iter().enumerate() {
        let scale = (6.0 / spec.shape[1..].iter().product::<usize>() as f64).sqrt() as f32;
        let weight = noise(10 * i, spec.shape.iter().product()).into_iter().map(|v| v * scale).collect();
        out.push((format!("conv{i:02}.weight"), spec.shape.to_vec(), weight));
        out.push((
            format!("conv{i:02}.bias"),
            vec![spec.shape[0]],
            noise(10 * i + 1, spec.shape[0]).into_iter().map(|v| 0.1 * v).collect(),
        ));
    }
    out
}

fn worst(descriptor: &Descriptor, golden: &[u8]) -> f64 {
    let golden = read_matrix(golden).unwrap();
    assert_eq!(golden.data.len(), descriptor.dim());
    golden.data.iter().zip(descriptor.as_slice()).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max)
}

#[test]
fn torchvision_weights_agree_with_onnx_runtime() {
    let model = Model::from_bytes(&file(&torchvision_tensors())).unwrap();
    let x = Tensor::from_vec(noise(999, 3 * 96 * 128), (1, 3, 96, 128), &Device::Cpu).unwrap();
    let worst = worst(&model.describe_tensor(&x).unwrap(), include_bytes!("../../tests/golden/torchvision_symmetric.npy"));
    assert!(worst <= 1e-4, "{worst:e}");
}

#[test]
fn tensorflow_weights_agree_with_onnx_runtime_at_odd_sizes() {
    let model = Model::from_bytes(&file(&tensorflow_tensors())).unwrap();
    let x = Tensor::from_vec(noise(998, 3 * 97 * 131), (1, 3, 97, 131), &Device::Cpu).unwrap();
    let worst = worst(&model.describe_tensor(&x).unwrap(), include_bytes!("../../tests/golden/tensorflow_same.npy"));
    assert!(worst <= 1e-4, "{worst:e}");
}

#[test]
fn the_shipped_model_agrees_with_onnx_runtime_and_is_small() {
    assert!(SHIPPED.len() <= 5 << 20, "{} bytes", SHIPPED.len());
    let model = Model::shipped().unwrap();
    let (w, h) = (model.spec().input_width, model.spec().input_height);
    let pixels = (0..h).flat_map(|v| (0..w).flat_map(move |u| (1..4).map(move |c| ((u * 3 + v * c * 2) % 256) as u8))).collect();
    let image = RgbImage::new(w as u32, h as u32, pixels).unwrap();
    let worst = worst(&model.describe(&image).unwrap(), include_bytes!("../../tests/golden/shipped.npy"));
    assert!(worst <= 1e-4, "{worst:e}");
}

#[test]
fn a_batch_or_a_crumb_is_an_error_not_a_panic() {
    let model = Model::shipped().unwrap();
    for shape in [(2, 3, 64, 64), (1, 1, 64, 64), (1, 3, 31, 64), (1, 3, 64, 0)] {
        let e = model.describe_tensor(&Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()).unwrap_err().to_string();
        assert!(e.contains("1 x 3 x H x W"), "{e}");
    }
    assert!(model.describe_tensor(&Tensor::zeros((1, 3, 32, 33), DType::F32, &Device::Cpu).unwrap()).is_ok());
}

/// A tensor is read where it lies; also a part of another, one whose axes were exchanged, and one of other numbers.
#[test]
fn a_tensor_is_described_whatever_it_is_a_view_of() {
    let model = Model::shipped().unwrap();
    let x = Tensor::from_vec(noise(7, 3 * 40 * 56), (1, 3, 40, 56), &Device::Cpu).unwrap();
    let want = model.describe_tensor(&x).unwrap();
    let part = Tensor::cat(&[&x.ones_like().unwrap(), &x], 0).unwrap().narrow(0, 1, 1).unwrap();
    let exchanged = x.transpose(2, 3).unwrap().contiguous().unwrap().transpose(2, 3).unwrap();
    assert!(!exchanged.is_contiguous());
    for view in [part, exchanged, x.to_dtype(DType::F64).unwrap()] {
        assert_eq!(model.describe_tensor(&view).unwrap().as_slice(), want.as_slice());
    }
}

proptest! {
    #[test]
    fn a_value_that_is_not_finite_is_seen_wherever_it_is(n in 0usize..70, at in 0usize..70, bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY])) {
        let mut values: Vec<f32> = noise(n, n).into_iter().map(|v| v * f32::MAX).collect();
        prop_assert!(all_finite(&values));
        if let Some(value) = values.get_mut(at) {
            *value = bad;
            prop_assert!(!all_finite(&values));
        }
    }
}

#[test]
fn what_is_written_is_read_again_with_its_header() {
    for (dtype, tolerance) in [(Precision::F32, 0.0), (Precision::F16, 2e-3)] {
        let mut weights = Weights::parse(&file(&tensorflow_tensors())).unwrap();
        weights.spec.name = "mine".into();
        weights.spec.similarity_threshold = Some(0.5);
        let bytes = weights.to_bytes(dtype).unwrap();
        assert_eq!(bytes, weights.to_bytes(dtype).unwrap(), "the same weights give the same bytes");
        let back = Weights::parse(&bytes).unwrap();
        assert_eq!((back.layout, &back.spec), ("structvpr", &weights.spec));
        for (name, t) in &weights.tensors {
            let d = (t - &back.tensors[name]).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(d <= tolerance, "{name}: {d}");
        }
    }
}

#[test]
fn missing_extra_and_misshapen_tensors_are_named() {
    let said = |change: &dyn Fn(&mut Vec<NamedTensor>)| {
        let mut t = torchvision_tensors();
        change(&mut t);
        Weights::parse(&file(&t)).map(|_| ()).unwrap_err().to_string()
    };
    let s = said(&|t| t.retain(|t| t.0 != "features.3.conv.1.0.weight"));
    assert!(s.contains("`features.3.conv.1.0.weight` is missing") && s.contains("torchvision"), "{s}");
    let s = said(&|t| t.push(("features.99.weight".into(), vec![1], vec![0.0])));
    assert!(s.contains("unexpected") && s.contains("features.99.weight"), "{s}");
    let s = said(&|t| t[0].1 = vec![32, 27]);
    assert!(s.contains("[32, 27]") && s.contains("[32, 3, 3, 3]"), "{s}");
    let s = said(&|t| t[0].2[5] = f32::NAN);
    assert!(s.contains("features.0.0.weight") && s.contains("NaN"), "{s}");
    let s = said(&|t| t.iter_mut().for_each(|t| t.0 = format!("other.{}", t.0)));
    assert!(s.contains("no known naming scheme"), "{s}");
    // What trainers prepend is taken off.
    let mut t = torchvision_tensors();
    t.iter_mut().for_each(|t| t.0 = format!("module.{}", t.0));
    assert_eq!(Weights::parse(&file(&t)).unwrap().layout, "torchvision");
    assert!(Weights::parse(b"hello").unwrap_err().to_string().contains("neither safetensors nor"));
}

#[test]
fn a_checkpoint_that_pytorch_wrote_is_read() {
    // tests/golden/torch_checkpoint.py wrote it with PyTorch: every storage type we read, a view with
    // an offset and other strides, a parameter, a counter.
    let tensors = super::container::read_for_tests(include_bytes!("../../tests/golden/tensors.pth")).unwrap();
    let want: HashMap<&str, (Vec<usize>, Vec<f32>)> = HashMap::from([
        ("f32", (vec![2, 3], vec![0.0, 0.5, 1.0, 1.5, 2.0, 2.5])),
        ("f64", (vec![2], vec![0.25, -4.0])),
        ("f16", (vec![2], vec![0.5, -2.0])),
        ("bf16", (vec![2], vec![3.0, -0.125])),
        ("view", (vec![3, 1], vec![0.5, 1.0, 1.5])),
        ("transposed", (vec![3, 2], vec![0.0, 1.5, 0.5, 2.0, 1.0, 2.5])),
        ("parameter", (vec![1], vec![7.0])),
        ("counter", (vec![], vec![])),
    ]);
    let got: HashMap<&str, (Vec<usize>, Vec<f32>)> = tensors.iter().map(|(n, s, v)| (n.as_str(), (s.clone(), v.clone()))).collect();
    assert_eq!(got, want);
}

#[test]
fn pooling_is_what_it_says() {
    let x = Tensor::from_vec(vec![1f32, 2.0, -3.0, 4.0, 0.0, 0.0, 0.0, 0.0], (1, 2, 2, 2), &Device::Cpu).unwrap();
    let pool = |p: Pooling| p.pool(&x).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(pool(Pooling::Average), [1.0, 0.0]);
    let gem = pool(Pooling::Gem { p: 3.0 });
    assert!((gem[0] - (73f32 / 4.0).cbrt()).abs() < 1e-5, "{gem:?}");
    assert!((gem[0] - pool(Pooling::Gem { p: 3.0001 })[0]).abs() < 1e-3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    /// Headers and pickles are where lies cost most: mutate there.
    #[test]
    fn mutated_weight_files_are_errors_and_never_panics(at in 0usize..4000, flip in 1u8..=255, cut in 0usize..6000, long in any::<bool>()) {
        let pth = include_bytes!("../../tests/golden/tensors.pth");
        let mut bytes = pth.to_vec();
        let n = bytes.len();
        bytes[at % n] ^= flip;
        let _ = Weights::parse(&bytes);
        let _ = Weights::parse(&pth[..cut % n]);
        let mut bytes = SHIPPED[..if long { 9000 } else { cut.max(9) }].to_vec();
        let n = bytes.len();
        bytes[at % n] ^= flip;
        let _ = Weights::parse(&bytes);
    }
}

/// The shipped model in 8 bits: the same descriptor but for rounding, whatever the number of threads, and the same identity.
#[test]
fn int8_describes_as_f32_does() {
    let (full, coarse) = (Model::shipped().unwrap(), Model::shipped().unwrap().on(ComputeDevice::Cpu, Precision::Int8).unwrap());
    assert_eq!(full.identity(), coarse.identity());
    for seed in 0..4u64 {
        let smooth = |x: f32, y: f32, c: f32| 127.0 + 120.0 * ((x * (0.02 + 0.01 * seed as f32) + c).sin() * (y * 0.03 - c).cos());
        let data = (0..320 * 240).flat_map(|p| [0.0, 1.0, 2.0].map(|c| smooth((p % 320) as f32, (p / 320) as f32, c) as u8)).collect();
        let image = RgbImage::new(320, 240, data).unwrap();
        let (a, b) = (full.describe(&image).unwrap(), coarse.describe(&image).unwrap());
        let cosine = crate::map::dot(a.as_slice(), b.as_slice());
        assert!(cosine > 0.97, "{cosine}");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(pool.install(|| coarse.describe(&image)).unwrap().as_slice(), b.as_slice());
    }
    let (h, w) = (full.spec().input_height, full.spec().input_width);
    let nan = Tensor::full(f32::NAN, (1, 3, h, w), &Device::Cpu).unwrap();
    assert!(coarse.describe_tensor(&nan).unwrap_err().to_string().contains("not a number"));
}

/// 1 - the cosine of what `model` says of `image` to `want`.
fn off(want: &Descriptor, model: &Model, image: &RgbImage) -> f64 {
    1.0 - f64::from(crate::map::dot(want.as_slice(), model.describe(image).unwrap().as_slice()))
}

/// In bfloat16 the same descriptor but for rounding, nearer than in 8 bits; where nothing multiplies bfloat16, to the last bit.
#[test]
fn bf16_describes_as_f32_does() {
    let on = |p| Model::shipped().unwrap().on(ComputeDevice::Cpu, p).unwrap();
    let (full, coarse, coarser) = (on(Precision::F32), on(Precision::Bf16), on(Precision::Int8));
    assert_eq!((full.identity(), full.precision()), (coarse.identity(), Precision::F32));
    let (mut off16, mut off8) = (0.0, 0.0);
    for n in 0..4 {
        let image = leaves::picture(700 + n, (320, 240)).unwrap();
        let want = full.describe(&image).unwrap();
        off16 += off(&want, &coarse, &image);
        off8 += off(&want, &coarser, &image);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(pool.install(|| coarse.describe(&image)).unwrap().as_slice(), coarse.describe(&image).unwrap().as_slice());
        if coarse.precision() == Precision::F32 {
            assert_eq!(coarse.describe(&image).unwrap().as_slice(), want.as_slice());
        }
    }
    assert!(off16 < 0.7 * off8, "{off16} {off8}");
}

#[test]
fn a_normalisation_that_makes_no_numbers_is_refused() {
    let with = |mean: f32, std: f32| {
        let mut weights = Model::shipped().unwrap().weights().clone();
        (weights.spec.mean[1], weights.spec.std[1]) = (mean, std);
        Model::new(weights).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(with(0.5, 1e-30), Ok(()));
    for (mean, std) in [(f32::NAN, 1.0), (f32::INFINITY, 1.0), (0.5, 0.0), (0.5, -1.0), (0.5, f32::NAN), (0.5, 1e-40), (3e38, 1e-3)] {
        let said = with(mean, std).unwrap_err();
        assert!(said.contains("is not usable"), "{mean} {std}: {said}");
    }
}

/// Rows that are resized and normalised where the network reads them give what a tensor of the whole picture gives, to the last bit: at any
/// size, kept, smaller in whole blocks or not, or larger; with either border; on any number of threads.
#[test]
fn a_picture_is_described_as_its_tensor() {
    let pools = [1, 2, 5].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap());
    for (padding, precision) in [
        (Padding::Symmetric, Precision::F32),
        (Padding::Same, Precision::F32),
        (Padding::Same, Precision::Bf16),
        (Padding::Symmetric, Precision::Int8),
    ] {
        // Odd and even sides, some of few rows: strips of one row, and rings of more rows than there are.
        for (w, h) in [(64, 48), (47, 33), (MIN_SIDE, 70), (161, 130)] {
            let mut weights = Model::shipped().unwrap().weights().clone();
            (weights.spec.input_width, weights.spec.input_height, weights.spec.padding) = (w, h, padding);
            let model = Model::new(weights).unwrap().on(ComputeDevice::Cpu, precision).unwrap();
            let mut before: Option<Descriptor> = None;
            for (n, (width, height)) in
                [(w, h), (2 * w, 2 * h), (3 * w, h), (w + 31, 2 * h - 1), (w / 2, 3 * h), (5, 4)].into_iter().enumerate()
            {
                let image = leaves::picture(800 + n as u64, (width, height)).unwrap();
                let want = model.describe_tensor(&model.preprocess(&image).unwrap()).unwrap();
                for pool in &pools {
                    let got = pool.install(|| model.describe(&image)).unwrap();
                    let threads = pool.current_num_threads();
                    assert_eq!(got.as_slice(), want.as_slice(), "{width}x{height} at {w}x{h}, {padding:?}, {precision}, {threads} threads");
                }
                assert!(before.is_none_or(|b| b.as_slice() != want.as_slice()), "all pictures look alike");
                before = Some(want);
            }
        }
    }
}

/// What rounding does to weights is there in every pixel: most of it is taken back with the bias, in pictures that the network was not
/// fitted to.
#[test]
fn int8_is_fitted_to_what_layers_see() {
    let full = nudged();
    let fitted = nudged().on(ComputeDevice::Cpu, Precision::Int8).unwrap();
    let mut blind = nudged();
    let net = network(&blind.weights).unwrap();
    blind.network = Network::new(&net, ComputeDevice::Cpu, Precision::Int8, Some(&net.rounded(&[]).unwrap())).unwrap();
    let (mut with, mut without) = (0.0, 0.0);
    for n in 0..6 {
        let image = leaves::picture(PICTURES + 100 + n, PICTURE).unwrap();
        let want = full.describe(&image).unwrap();
        let (error, blindly) = (off(&want, &fitted, &image), off(&want, &blind, &image));
        assert!(error < 0.004, "{n}: {error}");
        with += error;
        without += blindly;
    }
    assert!(with < without / 4.0, "{with} {without}");
}

/// The model of the repository but for one bias, so that what was fitted to its network is not for this one.
fn nudged() -> Model {
    let mut weights = Model::shipped().unwrap().weights().clone();
    let bias = (&weights.tensors["stem.bias"] + 1e-5).unwrap();
    weights.tensors.insert("stem.bias".into(), bias);
    Model::new(weights).unwrap()
}

#[test]
fn the_shipped_model_has_codes_fitted_to_it() {
    let (shipped, nudged) = (Model::shipped().unwrap(), nudged());
    let fitted = Weights::parse(SHIPPED_INT8).unwrap();
    assert!(SHIPPED_INT8.len() < SHIPPED.len() * 6 / 10 && fitted.whitening == shipped.weights().whitening);
    let fitted = fitted.int8.unwrap();
    assert!(*shipped.rounded().unwrap() == fitted && *nudged.rounded().unwrap() == nudged.nearest().unwrap());
    // Another name, threshold or whitening leaves the network, and so what was fitted to it.
    let mut weights = shipped.weights().clone();
    (weights.spec.name, weights.whitening) = ("renamed".into(), None);
    let renamed = Model::new(weights).unwrap();
    assert!(renamed.identity() != shipped.identity() && *renamed.rounded().unwrap() == fitted);
    let int8 = |m: Model| m.on(ComputeDevice::Cpu, Precision::Int8).unwrap();
    let (full, fitted, nearest) = (shipped, int8(Model::shipped().unwrap()), int8(nudged));
    let (mut near, mut nearest_off) = (0.0, 0.0);
    for n in 0..6 {
        let image = leaves::picture(500 + n, (320, 240)).unwrap();
        let want = full.describe(&image).unwrap();
        near += off(&want, &fitted, &image);
        nearest_off += off(&want, &nearest, &image);
    }
    assert!(near < 0.5 * nearest_off, "{near} {nearest_off}");
}

#[test]
fn a_file_in_8_bits_is_what_int8_computes_with_and_half_as_large() {
    let mut weights = nudged().weights().clone();
    assert!(weights.to_bytes(Precision::Int8).unwrap_err().to_string().contains("have not been rounded"));
    assert!(weights.to_bytes(Precision::Bf16).unwrap_err().to_string().contains("f32, f16 or int8"));
    let before = nudged().on(ComputeDevice::Cpu, Precision::Int8).unwrap();
    weights.round(before.rounded().unwrap().into_owned()).unwrap();
    let bytes = weights.to_bytes(Precision::Int8).unwrap();
    assert_eq!(bytes, weights.to_bytes(Precision::Int8).unwrap(), "the same weights give the same bytes");
    assert!(bytes.len() < weights.to_bytes(Precision::F16).unwrap().len() * 6 / 10, "{}", bytes.len());
    let full = Model::from_bytes(&bytes).unwrap();
    let int8 = Model::from_bytes(&bytes).unwrap().on(ComputeDevice::Cpu, Precision::Int8).unwrap();
    let again = Weights::parse(&full.weights().to_bytes(Precision::Int8).unwrap()).unwrap();
    assert_eq!(again.int8, full.weights().int8, "read and written again");
    // Converted to f32 it stays the same model; its maps stay.
    let wide = Model::from_bytes(&full.weights().to_bytes(Precision::F32).unwrap()).unwrap();
    assert_eq!(wide.identity(), full.identity());
    for n in 0..4 {
        let image = leaves::picture(n, (320, 240)).unwrap();
        let [full, int8, before, wide] = [&full, &int8, &before, &wide].map(|m| m.describe(&image).unwrap());
        let apart = |a: &Descriptor, b: &Descriptor| 1.0 - f64::from(crate::map::dot(a.as_slice(), b.as_slice()));
        // Depthwise convolutions and biases are rounded to f16 in the file alone; weights of the 1x1 are the same.
        assert!(apart(&int8, &before) < 1e-3, "{}", apart(&int8, &before));
        assert!(apart(&int8, &full) < 2e-3, "{}", apart(&int8, &full));
        assert_eq!(full, wide);
    }
}

/// Files say themselves what of them is in 8 bits: all of it, as older ones have it, or but a part.
#[test]
fn a_file_may_have_any_of_its_convolutions_in_8_bits() {
    let (full, image) = (nudged(), leaves::picture(3, (320, 240)).unwrap());
    let mut all = full.rounded().unwrap().into_owned();
    for name in ["blocks.1.project", "blocks.2.project"] {
        let values = |kind: &str| full.weights().tensors[&format!("{name}.{kind}")].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(all.insert(name.into(), Rounded::new(&values("weight"), &values("bias"), &Seen::default())).is_none(), "{name}");
    }
    let mut some = full.rounded().unwrap().into_owned();
    assert!(some.remove("blocks.3.project").is_some() && some.remove("blocks.9.expand").is_some());
    for codes in [all, some] {
        let mut weights = full.weights().clone();
        weights.round(codes.clone()).unwrap();
        let read = Weights::parse(&weights.to_bytes(Precision::Int8).unwrap()).unwrap();
        // Biases are rounded to f16 in the file.
        let only = |n: &RoundedNetwork| n.iter().map(|(name, r)| (name.clone(), r.codes.clone())).collect::<Vec<_>>();
        assert!(read.int8.as_ref().map(only) == Some(only(&codes)), "{} in 8 bits", codes.len());
        let int8 = Model::new(read).unwrap().on(ComputeDevice::Cpu, Precision::Int8).unwrap();
        let error = off(&full.describe(&image).unwrap(), &int8, &image);
        assert!(error < 0.004, "{} in 8 bits: {error}", codes.len());
    }
}

#[test]
fn what_is_wrong_in_a_file_in_8_bits_is_named() {
    let mut weights = nudged().weights().clone();
    weights.round(nudged().rounded().unwrap().into_owned()).unwrap();
    let said = |change: &dyn Fn(&mut RoundedNetwork)| {
        let mut weights = weights.clone();
        change(weights.int8.as_mut().unwrap());
        Weights::parse(&weights.to_bytes(Precision::Int8).unwrap()).map(|_| ()).unwrap_err().to_string()
    };
    let s = said(&|n| n.get_mut("blocks.3.expand").unwrap().steps[5] = 0.0);
    assert!(s.contains("`blocks.3.expand.steps` holds 0"), "{s}");
    let s = said(&|n| n.get_mut("blocks.3.expand").unwrap().scales[0] = f32::NAN);
    assert!(s.contains("`blocks.3.expand.scales` holds NaN"), "{s}");
    let s = said(&|n| n.get_mut("blocks.3.expand").unwrap().steps.fill(3e38));
    assert!(s.contains("`blocks.3.expand.weight` stands for"), "{s}");
    let s = said(&|n| n.get_mut("blocks.3.project").unwrap().codes[7] = -128);
    assert!(s.contains("`blocks.3.project.weight` holds -128"), "{s}");
    let s = said(&|n| drop(n.insert("blocks.3.project".into(), n["blocks.4.project"].clone())));
    assert!(s.contains("blocks.3.project") && s.contains("[24, 144, 1, 1]") && s.contains("[32, 144, 1, 1]"), "{s}");
    let s = said(&|n| n.clear());
    assert!(s.contains("no 1x1 convolution is in 8 bits"), "{s}");
    let e = weights.round(RoundedNetwork::new()).unwrap_err().to_string();
    assert!(e.contains("no 1x1 convolution is in 8 bits"), "{e}");
    let e = weights.round([("blocks.3.depthwise".into(), weights.int8.as_ref().unwrap()["blocks.3.expand"].clone())].into()).unwrap_err();
    assert!(e.to_string().contains("`blocks.3.depthwise` is no 1x1 convolution"), "{e}");
    let mut short = nudged().rounded().unwrap().into_owned();
    short.get_mut("blocks.2.expand").unwrap().steps.pop();
    let e = weights.round(short).unwrap_err().to_string();
    assert!(e.contains("blocks.2.expand"), "{e}");
}

/// Maps hang on it: what a header may say more since then, and the whitening that others have, must leave it.
#[test]
fn the_identity_of_a_model_without_whitening_is_what_it_was() {
    let v1 = Model::from_bytes(include_bytes!("../../models/structvpr-synthetic-v1.safetensors")).unwrap();
    assert_eq!(v1.identity().sha256, "fcb300f5b11ba887c1cdde7e2bac401ece81afb774030d6312aca32f36504dde");
}

#[test]
fn whitening_is_applied_kept_in_the_file_and_part_of_the_identity() {
    let plain = Model::from_bytes(&file(&tensorflow_tensors())).unwrap();
    let descriptors: Vec<Descriptor> = (0..MIN_DESCRIPTORS)
        .map(|i| plain.describe_tensor(&Tensor::from_vec(noise(3000 + i, 3 * 32 * 32), (1, 3, 32, 32), &Device::Cpu).unwrap()).unwrap())
        .collect();
    let mut weights = plain.weights().clone();
    weights.whitening = Some(Whitening::fit(&descriptors).unwrap());
    weights.spec.min_margin = Some(0.05);
    let white = Model::new(weights.clone()).unwrap();
    assert_ne!(plain.identity().sha256, white.identity().sha256);
    assert!(white.preprocessing().contains("\"whitened\":true") && !plain.preprocessing().contains("whitened"));
    let x = Tensor::from_vec(noise(5, 3 * 33 * 47), (1, 3, 33, 47), &Device::Cpu).unwrap();
    let want = {
        let y = weights.whitening.as_ref().unwrap().apply(plain.describe_tensor(&x).unwrap().as_slice());
        let norm = y.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        y.into_iter().map(|v| (f64::from(v) / norm) as f32).collect::<Vec<f32>>()
    };
    let got = white.describe_tensor(&x).unwrap();
    assert!(got.as_slice().iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-6));
    // Other places are no longer all alike.
    let mean_similarity = |m: &Model| {
        let all: Vec<Descriptor> = (0..8)
            .map(|i| m.describe_tensor(&Tensor::from_vec(noise(9000 + i, 3 * 32 * 32), (1, 3, 32, 32), &Device::Cpu).unwrap()).unwrap())
            .collect();
        (0..8).flat_map(|i| (0..i).map(move |j| (i, j))).map(|(i, j)| all[i].similarity(&all[j])).sum::<f32>() / 28.0
    };
    let (before, after) = (mean_similarity(&plain), mean_similarity(&white));
    assert!(before > 0.9 && after < 0.3, "{before} -> {after}");
    for (dtype, tolerance) in [(Precision::F32, 0.0), (Precision::F16, 5e-3)] {
        let back = Model::from_bytes(&weights.to_bytes(dtype).unwrap()).unwrap();
        assert_eq!(back.spec().min_margin, Some(0.05));
        let again = back.describe_tensor(&x).unwrap();
        let worst = again.as_slice().iter().zip(got.as_slice()).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(worst <= tolerance, "{dtype:?}: {worst}");
    }
}
