//! The kernels' own text, compiled as C++ and run as loops, under the plan that drives CUDA: what differs on a GPU is the
//! launch, the products (cuBLAS) and the memory.

use super::host::{compile, kernel, Memory};
use super::*;
use crate::model::{conv_specs, MobileNetV2, Padding};
use candle_core::{Device, Tensor};
use proptest::prelude::*;
use std::sync::OnceLock;

/// The processor as a GPU.
#[derive(Debug, Default)]
struct Host {
    memory: Memory,
    /// What was launched and multiplied, in this [`Machine::repeat`] and in the one before.
    calls: [Vec<String>; 2],
}

impl Host {
    fn numbers(&mut self, address: u64, len: usize, half: bool) -> Vec<f32> {
        let bytes = self.memory.bytes(address, len * if half { 2 } else { 4 });
        match half {
            true => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            false => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }
}

impl Machine for Host {
    fn reserve(&mut self, bytes: usize) -> Result<u64> {
        Ok(self.memory.reserve(bytes))
    }

    fn free(&mut self, address: u64) -> Result<()> {
        self.memory.free(address);
        Ok(())
    }

    fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<()> {
        self.memory.bytes(to, bytes.len()).copy_from_slice(bytes);
        Ok(())
    }

    fn upload_again(&mut self, to: u64, parts: &[&[u8]]) -> Result<()> {
        self.upload(to, &parts.concat())
    }

    fn launch(&mut self, name: &'static str, half: bool, items: usize, args: &Args) -> Result<()> {
        static LIBRARY: OnceLock<usize> = OnceLock::new();
        let library = *LIBRARY.get_or_init(|| compile(SOURCE));
        // SAFETY: `Args` as the library declares it; what the kernel writes outside its blocks the margins tell.
        unsafe { kernel::<Args>(library, &format!("{name}_{}", if half { "f16" } else { "f32" }))(items as i64, args) };
        assert!(self.memory.intact(), "{name} wrote past its memory");
        self.calls[0].push(format!("{name} {half} {items} {args:?}"));
        Ok(())
    }

    fn repeat(&mut self, same: bool, work: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        self.calls[0].clear();
        work(self)?;
        // A machine that keeps calls would have made the old ones.
        assert!(!same || self.calls[0] == self.calls[1], "{:?}", self.calls);
        self.calls.swap(0, 1);
        Ok(())
    }

    fn product(&mut self, p: &Product) -> Result<()> {
        self.calls[0].push(format!("{p:?}"));
        let (x, w) = (self.numbers(p.x, p.pixels * p.inputs, p.half), self.numbers(p.w, p.inputs * p.outputs, p.half));
        let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(a, b)| a * b).sum::<f32>();
        let y = x.chunks_exact(p.inputs).flat_map(|x| w.chunks_exact(p.inputs).map(move |w| dot(x, w)));
        let bytes: Vec<u8> = y.flat_map(f32::to_le_bytes).collect();
        self.upload(p.y, &bytes)
    }

    fn download(&mut self, from: u64, values: &mut [f32]) -> Result<()> {
        values.copy_from_slice(&self.numbers(from, values.len(), false));
        Ok(())
    }
}

fn network(padding: Padding) -> MobileNetV2 {
    let specs = conv_specs();
    let get = |name: &str| -> Result<Tensor> {
        let at = specs.iter().position(|s| name.starts_with(&format!("{}.", s.name))).unwrap();
        let s = &specs[at];
        let fan_in: usize = s.shape[1..].iter().product();
        let (shape, scale) =
            if name.ends_with("bias") { (vec![s.shape[0]], 0.3) } else { (s.shape.to_vec(), (6.0 / fan_in as f32).sqrt()) };
        let n: usize = shape.iter().product();
        let seed = 2 * at as u64 + u64::from(name.ends_with("bias"));
        let values: Vec<f32> = (0..n as u64).map(|i| scale * crate::test_noise(seed, i)).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    };
    MobileNetV2::new(padding, get).unwrap()
}

const NORMALISE: Normalise = Normalise { scale: [0.017, 0.018, 0.0174], shift: [-2.1, -2.0, -1.8] };

/// What Candle's layers make of the same images.
fn reference(net: &MobileNetV2, images: &[u8], (n, h, w): (usize, usize, usize), pooling: Pooling) -> Vec<f32> {
    let value = |(i, p): (usize, &u8)| f32::from(*p) * NORMALISE.scale[i % 3] + NORMALISE.shift[i % 3];
    let x = Tensor::from_vec(images.iter().enumerate().map(value).collect::<Vec<_>>(), (n, h, w, 3), &Device::Cpu).unwrap();
    let taps = net.taps(&x.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap()).unwrap();
    let pooled: Vec<Tensor> = taps.iter().map(|t| pooling.pool(t).unwrap()).collect();
    Tensor::cat(&pooled, 1).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn pixels(seed: u64, n: usize) -> Vec<u8> {
    // Blocks of colour: noise alone averages to nothing after a few layers.
    (0..n as u64).map(|i| (128.0 + 127.0 * crate::test_noise(seed, i / 24)) as u8).collect()
}

/// A batch of images of one size, one behind the other.
fn split(images: &[u8], (h, w): (usize, usize)) -> Vec<&[u8]> {
    images.chunks(h * w * 3).collect()
}

/// Largest difference of descriptors of unit length.
fn worst(a: &[f32], b: &[f32]) -> f32 {
    let unit = |v: &[f32]| {
        let n = v.iter().map(|x| x * x).sum::<f32>().sqrt();
        v.iter().map(|x| x / n).collect::<Vec<_>>()
    };
    let rows = a.chunks_exact(DIM).zip(b.chunks_exact(DIM));
    assert_eq!(a.len(), b.len());
    rows.flat_map(|(a, b)| unit(a).into_iter().zip(unit(b)).map(|(a, b)| (a - b).abs()).collect::<Vec<_>>()).fold(0.0, f32::max)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn the_gpus_network_is_candles(n in 1usize..3, h in 32usize..70, w in 32usize..70, same in any::<bool>(), p in 0usize..3, seed in any::<u64>()) {
        is_candles(Host::default, (n, h, w), same, p, seed);
    }
}

fn is_candles<M: Machine>(machine: impl Fn() -> M, (n, h, w): (usize, usize, usize), same: bool, pooling: usize, seed: u64) {
    let net = network(if same { Padding::Same } else { Padding::Symmetric });
    let pooling = [Pooling::Gem { p: 3.0 }, Pooling::Gem { p: 2.5 }, Pooling::Average][pooling];
    let images = pixels(seed, n * h * w * 3);
    let want = reference(&net, &images, (n, h, w), pooling);
    for (half, most) in [(false, 2e-5), (true, 2e-3)] {
        let plan = net.gpu_plan(machine(), half).unwrap();
        let got = plan.pooled(&split(&images, (h, w)), (h, w), &NORMALISE, pooling).unwrap();
        let worst = worst(&got, &want);
        assert!(worst < most, "{worst} with half {half}, {n} images {w}x{h}");
    }
}

#[test]
fn another_size_another_layout_and_back_the_same_bytes() {
    let plan = network(Padding::Same).gpu_plan(Host::default(), true).unwrap();
    let (alone, in_a_batch) = sizes_and_places(&plan);
    // An image's place in a batch changes nothing.
    assert_eq!(in_a_batch, alone);
    let run = |n: usize, h: usize, w: usize| {
        plan.pooled(&split(&pixels(7, n * h * w * 3), (h, w)), (h, w), &NORMALISE, Pooling::Average).unwrap()
    };
    run(1, 40, 56);
    let blocks = plan.state.lock().unwrap().machine.memory.len();
    run(2, 33, 47);
    // What a size no longer needs is given back.
    assert_eq!(plan.state.lock().unwrap().machine.memory.len(), blocks);
}

/// Sizes, poolings and normalisations in any order: the same bytes. An image by itself, and as the last of a batch.
fn sizes_and_places<M: Machine>(plan: &GpuPlan<M>) -> (Vec<f32>, Vec<f32>) {
    let run = |n: usize, h: usize, w: usize| {
        plan.pooled(&split(&pixels(7, n * h * w * 3), (h, w)), (h, w), &NORMALISE, Pooling::Average).unwrap()
    };
    let first = run(1, 40, 56);
    assert_eq!(run(2, 33, 47).len(), 2 * DIM);
    for _ in 0..4 {
        assert_eq!(run(1, 40, 56), first);
    }
    // What is done again and again may be kept by the machine: not so what another pooling or another normalisation wants.
    let brighter = Normalise { shift: [-1.0; 3], ..NORMALISE };
    let with = |normalise: &Normalise, pooling| plan.pooled(&[&pixels(7, 40 * 56 * 3)], (40, 56), normalise, pooling).unwrap();
    let others = [(NORMALISE, Pooling::Gem { p: 3.0 }), (brighter, Pooling::Average), (brighter, Pooling::Gem { p: 2.0 })];
    let alone: Vec<_> = others.iter().map(|(n, p)| with(n, *p)).collect();
    assert!(alone.iter().all(|a| *a != first));
    for _ in 0..3 {
        for ((n, p), alone) in others.iter().zip(&alone) {
            assert_eq!((&with(n, *p), &with(n, *p), &with(n, *p)), (alone, alone, alone));
        }
    }
    let (one, three) = (pixels(3, 40 * 56 * 3), [pixels(1, 40 * 56 * 3), pixels(2, 40 * 56 * 3), pixels(3, 40 * 56 * 3)].concat());
    let alone = plan.pooled(&[&one], (40, 56), &NORMALISE, Pooling::Average).unwrap();
    let mut all = plan.pooled(&split(&three, (40, 56)), (40, 56), &NORMALISE, Pooling::Average).unwrap();
    (alone, all.split_off(2 * DIM))
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let plan = network(Padding::Same).gpu_plan(Host::default(), false).unwrap();
    let run = |images: &[&[u8]], h, w| plan.pooled(images, (h, w), &NORMALISE, Pooling::Average).unwrap_err().to_string();
    let image = vec![0; 3 * 40 * 40];
    assert!(run(&[&image], 40, 41).contains("4800 bytes are no image 41x40"));
    assert!(run(&[&image, &image[1..]], 40, 40).contains("4799 bytes are no image"));
    assert!(run(&[], 40, 40).contains("a batch of 0 images"));
    assert!(run(&vec![&image[..]; MAX_BATCH + 1], 40, 40).contains("65 images; 1 to 64"));
}

#[test]
fn the_cost_is_mobilenets() {
    let plan = network(Padding::Symmetric).gpu_plan(Host::default(), true).unwrap();
    let cost = plan.cost(224, 224).unwrap();
    // The paper's 300 million, less the last 1x1 (320 x 1280 on 7 x 7) and the classifier (1280 x 1000).
    let all = cost.products + cost.others;
    assert!((all - (300.8e6 - 20.07e6 - 1.28e6)).abs() < 1e6, "{all}");
    assert!(cost.bytes > 2.0 * 1e7);
}

/// Every f16 there is, to f32 and back, and what lies between two of them, as the `half` crate has it.
#[test]
fn the_hosts_f16_is_ieee() {
    let mut host = Host::default();
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let n = all.len();
    let wide: Vec<f32> = all.iter().map(|b| f16::from_bits(*b).to_f32()).collect();
    let added = [-0.0f32, 1e-8, 3e-8, 0.1, 1.0 / 3.0, 1000.1, -65519.0, 6.1e-5];
    let mut put = |bytes: &[u8]| {
        let at = host.reserve(bytes.len()).unwrap();
        host.upload(at, bytes).unwrap();
        at
    };
    let narrow = put(&all.iter().flat_map(|b| b.to_le_bytes()).collect::<Vec<_>>());
    let (input, bias) = (put(&bytes_of(&wide)), put(&bytes_of(&added)));
    let (output, sums) = (host.reserve(2 * n).unwrap(), host.reserve(4 * n).unwrap());

    // One pixel's sum over it is what was read.
    let args = Args { input: narrow, output: sums, height: 1, width: 1, channels: n as i32, strips: 1, ..Args::default() };
    host.launch("pool_strip", true, n, &args).unwrap();
    for (got, want) in host.numbers(sums, n, false).iter().zip(&wide) {
        assert!(got == want || got.is_nan() && want.is_nan(), "{got} {want}");
    }

    host.launch("finish", true, n / 8, &Args { input, bias, output, channels: 8, ..Args::default() }).unwrap();
    let got = host.memory.bytes(output, 2 * n).to_vec();
    for (i, got) in got.chunks_exact(2).enumerate() {
        let want = f16::from_f32(wide[i] + added[i % 8]);
        let got = f16::from_bits(u16::from_le_bytes([got[0], got[1]]));
        assert!(got == want && got.is_sign_negative() == want.is_sign_negative() || got.is_nan() && want.is_nan(), "{i}: {got} {want}");
    }
}

/// A weight that is no number shows.
#[test]
fn nan_stays_nan() {
    nan_stays(Host::default());
}

fn nan_stays(mut host: impl Machine) {
    let (at, bias) = (host.reserve(4 * 16).unwrap(), host.reserve(16).unwrap());
    host.upload(at, &bytes_of(&[1.0; 16])).unwrap();
    host.upload(bias, &bytes_of(&[0.0, f32::NAN, f32::INFINITY, 0.0])).unwrap();
    let weight = host.reserve(4 * 9 * 4).unwrap();
    host.upload(weight, &bytes_of(&[1.0; 36])).unwrap();
    let out = host.reserve(4 * 16).unwrap();
    let args = Args {
        input: at,
        weight,
        bias,
        output: out,
        height: 2,
        width: 2,
        channels: 4,
        out_height: 2,
        out_width: 2,
        stride: 1,
        top: 1,
        left: 1,
        ..Args::default()
    };
    host.launch("depthwise", false, 2, &args).unwrap();
    let mut got = [0.0; 16];
    host.download(out, &mut got).unwrap();
    for pixel in got.chunks_exact(4) {
        assert_eq!((pixel[0], pixel[2], pixel[3]), (4.0, 6.0, 4.0), "{got:?}");
        assert!(pixel[1].is_nan());
    }
}

/// The same on a GPU, in a build with the feature.
#[cfg(feature = "cuda")]
mod on_a_card {
    use super::*;

    /// The first CUDA device; where there is none the test is skipped, by name.
    fn card(test: &str) -> bool {
        let found = Cuda::new(0, &KERNELS);
        if let Err(e) = &found {
            eprintln!("SKIPPED {test}: {e}");
        }
        found.is_ok()
    }

    fn open() -> Cuda {
        Cuda::new(0, &KERNELS).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn the_cards_network_is_candles(n in 1usize..5, h in 32usize..200, w in 32usize..200, same in any::<bool>(), p in 0usize..3, seed in any::<u64>()) {
            if card("the_cards_network_is_candles") {
                is_candles(open, (n, h, w), same, p, seed);
            }
        }
    }

    #[test]
    fn a_card_makes_the_same_bytes_in_any_order() {
        if !card("a_card_makes_the_same_bytes_in_any_order") {
            return;
        }
        for half in [false, true] {
            let plan = network(Padding::Same).gpu_plan(open(), half).unwrap();
            let (alone, in_a_batch) = sizes_and_places(&plan);
            // cuBLAS sums in another order at another size.
            let off = worst(&in_a_batch, &alone);
            assert!(off <= if half { 1e-3 } else { 1e-6 }, "{off}");
            assert!(plan.on_machine(|m| !m.recorded()), "the last size was asked for once");
            for _ in 0..3 {
                plan.pooled(&[&pixels(7, 40 * 56 * 3)], (40, 56), &NORMALISE, Pooling::Average).unwrap();
            }
            assert!(plan.on_machine(Cuda::recorded), "three times the same are one call");
        }
    }

    #[test]
    fn nan_stays_nan_on_a_card() {
        if card("nan_stays_nan_on_a_card") {
            nan_stays(open());
        }
    }
}
