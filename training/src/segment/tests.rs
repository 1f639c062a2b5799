//! The segmenters against PyTorch (tests/golden/segment.py), and on real weights where they are.

use super::*;
use std::borrow::Cow;
use structvpr::eval::read_matrix;

/// splitmix64, as the golden script has it.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    (0..n as u64)
        .map(|i| {
            let mut z = seed.wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            (z >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

struct Raw(Vec<usize>, Vec<u8>);

impl safetensors::View for Raw {
    fn dtype(&self) -> safetensors::Dtype {
        safetensors::Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.0
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.1)
    }
    fn data_len(&self) -> usize {
        self.1.len()
    }
}

/// The weight file that a list of seeds, names and shapes describes.
fn file(list: &str) -> Vec<u8> {
    let tensors = list.lines().map(|line| {
        let mut words = line.split(' ');
        let seed = words.next().unwrap().parse().unwrap();
        let name = words.next().unwrap().to_string();
        let shape: Vec<usize> = words.map(|w| w.parse().unwrap()).collect();
        let mut v = noise(seed, shape.iter().product());
        let (scale, shift) = if shape.len() == 4 {
            ((4.5 / shape[1..].iter().product::<usize>() as f64).sqrt() as f32, 0.0)
        } else if name.ends_with("running_var") {
            (0.5, 1.0)
        } else if name.ends_with("running_mean") || name.ends_with("bias") {
            (0.1, 0.0)
        } else {
            (0.25, 0.5)
        };
        v.iter_mut().for_each(|v| *v = *v * scale + shift);
        (name, Raw(shape, v.iter().flat_map(|v| v.to_le_bytes()).collect()))
    });
    safetensors::serialize(tensors.collect::<Vec<_>>(), None).unwrap()
}

fn compare(net: &dyn Segmenter, golden: &[u8]) {
    let x = Map { channels: 3, height: 64, width: 96, data: noise(777, 3 * 64 * 96) };
    let got = net.logits(&x).unwrap().resize(64, 96, net.aligned());
    let want = read_matrix(golden).unwrap().data;
    let size = want.iter().map(|v| v.abs()).fold(0.0, f64::max);
    for (i, want) in want.iter().enumerate() {
        let ours = f64::from(got.data[i * got.data.len() / want_len(golden)]);
        assert!((ours - want).abs() < 2e-4 * size, "value {i}: {ours} against {want} (largest {size})");
    }
}

fn want_len(golden: &[u8]) -> usize {
    read_matrix(golden).unwrap().data.len()
}

const ENCODER: &str = include_str!("../../tests/golden/pspnet_encoder.txt");
const DECODER: &str = include_str!("../../tests/golden/pspnet_decoder.txt");
const ESPNET: &str = include_str!("../../tests/golden/espnetv2.txt");

#[test]
fn pspnet_equals_pytorch() {
    let net = PspNet::new(&file(ENCODER), &file(DECODER)).unwrap();
    assert_eq!(net.classes(), 150);
    compare(&net, include_bytes!("../../tests/golden/pspnet.npy"));
}

#[test]
fn espnetv2_equals_pytorch() {
    let net = EspNetV2::new(&file(ESPNET)).unwrap();
    assert_eq!(net.classes(), 20);
    compare(&net, include_bytes!("../../tests/golden/espnetv2.npy"));
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let without = |list: &str, name: &str| file(&list.lines().filter(|l| !l.contains(name)).map(|l| format!("{l}\n")).collect::<String>());
    let said = |r: Result<PspNet>| format!("{:#}", r.err().unwrap());
    assert!(said(PspNet::new(&without(ENCODER, "layer3.2.conv2.weight"), &file(DECODER))).contains("`layer3.2.conv2.weight` is missing"));
    assert!(said(PspNet::new(&file(DECODER), &file(DECODER))).contains("`conv1.weight` is missing"));
    let more = format!("{ENCODER}1 layer9.0.conv1.weight 2 2 1 1\n");
    assert!(said(PspNet::new(&file(&more), &file(DECODER))).contains("unexpected tensor(s) layer9.0.conv1.weight"));
    let wrong = ENCODER.replace("layer1.0.conv2.weight 8 8 3 3", "layer1.0.conv2.weight 8 5 3 3");
    assert!(said(PspNet::new(&file(&wrong), &file(DECODER))).contains("layer1.0.conv2.weight"));
    assert!(format!("{:#}", open("deeplab", &[]).err().unwrap()).contains("known: pspnet, espnetv2"));
    assert!(format!("{:#}", open("pspnet", &["a".into()]).err().unwrap()).contains("wants 2 weight file(s), got 1"));
}

/// Real weights on real streets with true labels: pixels of the classes that Cityscapes and CamVid share.
#[test]
fn espnetv2_labels_camvid_as_measured() {
    let shared = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared"));
    let (weights, data) = (shared.join("weights/espnetv2_cityscapes.pth"), shared.join("data/camvid"));
    if !weights.is_file() || !data.is_dir() {
        println!("SKIPPED espnetv2_labels_camvid_as_measured: no {}", weights.display());
        return;
    }
    let share = camvid_accuracy(&weights, &data, 12);
    println!("pixel accuracy on every 12th frame of CamVid's test split: {share:.4}");
    assert!(share > 0.83, "{share}");
}

/// Share of right pixels over every `every`th test frame, Cityscapes ids mapped to CamVid's.
fn camvid_accuracy(weights: &Path, data: &Path, every: usize) -> f64 {
    let (net, size) = open("espnetv2", &[weights.to_path_buf()]).unwrap();
    // Cityscapes train ids 0 to 19 as CamVid's.
    const TO: [u8; 20] = [3, 4, 1, 1, 7, 2, 6, 6, 5, 5, 0, 9, 10, 8, 8, 8, 8, 10, 10, 11];
    let (mut right, mut all) = (0u64, 0u64);
    for name in std::fs::read_to_string(data.join("test.txt")).unwrap().lines().step_by(every) {
        let stem = Path::new(name.split_whitespace().next().unwrap()).file_stem().unwrap().to_string_lossy().into_owned();
        let find =
            |dir: &str| ["png", "jpg"].map(|e| data.join(dir).join(format!("{stem}.{e}"))).into_iter().find(|p| p.is_file()).unwrap();
        let image = RgbImage::decode(&std::fs::read(find("images")).unwrap()).unwrap();
        let truth = LabelMap::decode(&std::fs::read(find("labels")).unwrap()).unwrap();
        let got = label(&*net, &image, size).unwrap();
        for (g, t) in got.ids.iter().zip(&truth.ids).filter(|(_, t)| **t != 11) {
            all += 1;
            right += u64::from(TO[usize::from(*g)] == *t);
        }
    }
    right as f64 / all as f64
}
