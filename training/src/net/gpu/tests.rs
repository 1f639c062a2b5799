//! The kernels' own text, compiled as C++ and run as loops, under what drives CUDA, against the processor's engine: what differs on a
//! GPU is the launch, the products (cuBLAS) and the memory.

use super::super::tests::{branch, image, loss};
use super::super::{Arch, Branch};
use super::host::{compile, kernel, Memory};
use super::*;
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;
use std::sync::OnceLock;
use structvpr::model::Padding;

/// The processor as a GPU.
#[derive(Default)]
struct Host {
    memory: Memory,
    /// Blocks at most; more are refused as by a GPU that is full.
    most: Option<usize>,
}

fn bf16(bytes: &[u8]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16)
}

impl Host {
    fn numbers(&mut self, address: u64, len: usize, half: bool) -> Vec<f32> {
        let bytes = self.memory.bytes(address, len * if half { 2 } else { 4 });
        match half {
            true => bytes.chunks_exact(2).map(bf16).collect(),
            false => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }
}

impl Machine for Host {
    fn reserve(&mut self, bytes: usize) -> Result<u64> {
        if self.most.is_some_and(|most| self.memory.len() >= most) {
            bail!("{bytes} bytes: out of memory");
        }
        Ok(self.memory.reserve(bytes))
    }

    fn free(&mut self, address: u64) {
        self.memory.free(address);
    }

    fn clear(&mut self, at: u64) -> Result<()> {
        self.memory.clear(at);
        Ok(())
    }

    fn upload(&mut self, to: u64, values: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.memory.bytes(to, bytes.len()).copy_from_slice(&bytes);
        Ok(())
    }

    fn launch(&mut self, name: &'static str, half: bool, items: usize, args: &Args) -> Result<()> {
        static LIBRARY: OnceLock<usize> = OnceLock::new();
        let library = *LIBRARY.get_or_init(|| compile(SOURCE));
        assert!(KERNELS.contains(&name), "{name} would not be loaded");
        // SAFETY: `Args` as the library declares it; what the kernel writes outside its blocks the margins tell.
        unsafe { kernel::<Args>(library, &format!("{name}_{}", if half { "bf16" } else { "f32" }))(items as i64, args) };
        assert!(self.memory.intact(), "{name} wrote past its memory");
        Ok(())
    }

    fn product(&mut self, p: &Product) -> Result<()> {
        let mut matrix = |m: &Matrix, rows: usize, columns: usize| {
            let (lie, row) = if m.transposed { (columns, rows) } else { (rows, columns) };
            assert_eq!(m.row, row, "{p:?}");
            let values = self.numbers(m.address, lie * row, p.half);
            let at = |r: usize, c: usize| if m.transposed { values[c * row + r] } else { values[r * row + c] };
            (0..rows * columns).map(|i| at(i / columns, i % columns)).collect::<Vec<f32>>()
        };
        let (a, b) = (matrix(&p.a, p.rows, p.inner), matrix(&p.b, p.inner, p.columns));
        let half = p.half && !p.wide;
        let mut c = if p.add { self.numbers(p.c, p.rows * p.columns, half) } else { vec![0.0; p.rows * p.columns] };
        for (a, c) in a.chunks_exact(p.inner).zip(c.chunks_exact_mut(p.columns)) {
            for (a, b) in a.iter().zip(b.chunks_exact(p.columns)) {
                c.iter_mut().zip(b).for_each(|(c, b)| *c += a * b);
            }
        }
        let rounded = |v: f32| {
            let up = v.to_bits() + 0x7fff + (v.to_bits() >> 16 & 1);
            ((if v.is_nan() { v.to_bits() | 0x40_0000 } else { up }) >> 16) as u16
        };
        let bytes: Vec<u8> = match half {
            true => c.into_iter().flat_map(|v| rounded(v).to_le_bytes()).collect(),
            false => c.into_iter().flat_map(f32::to_le_bytes).collect(),
        };
        self.memory.bytes(p.c, bytes.len()).copy_from_slice(&bytes);
        Ok(())
    }

    fn download(&mut self, from: u64, values: &mut [f32]) -> Result<()> {
        values.copy_from_slice(&self.numbers(from, values.len(), false));
        Ok(())
    }
}

/// A GPU that is the processor.
pub(crate) fn host(precision: Precision) -> Arc<Gpu> {
    Arc::new(Gpu::new(Box::new(Host::default()), precision))
}

/// Descriptors of a pass of training, its gradient of weights and power, the running statistics after it, and descriptors of an evaluation.
struct Passed([Vec<f32>; 4]);

impl Passed {
    /// Length of each difference over the length of `want`'s.
    fn off(&self, want: &Self) -> [f64; 4] {
        let length = |v: &mut dyn Iterator<Item = f32>| v.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        std::array::from_fn(|i| {
            let (got, want) = (&self.0[i], &want.0[i]);
            assert_eq!(got.len(), want.len());
            length(&mut got.iter().zip(want).map(|(g, w)| g - w)) / length(&mut want.iter().copied())
        })
    }
}

fn pass(b: &Branch<f32>, x: &Tensor) -> Passed {
    let f = b.forward(x, true).unwrap();
    // Of the taps and of the descriptor, so that every way back is gone.
    let all = (loss(&f.taps, 7).unwrap() + f.descriptor.sum_all().unwrap()).unwrap();
    let grads = all.backward().unwrap();
    let mut grad = grads.get(&b.weights).unwrap().to_vec1::<f32>().unwrap();
    // What follows takes the shift of a linear bottleneck away again: what it gets is noise, but for a tap's.
    for conv in b.trunk.convs().filter(|c| c.name.ends_with("project")) {
        grad[conv.beta.clone()].fill(0.0);
    }
    grad.extend(grads.get(&b.power).unwrap().to_vec1::<f32>().unwrap());
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    Passed([flat(&f.descriptor), grad, b.statistics(), flat(&b.forward(x, false).unwrap().descriptor)])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    /// Any size, both networks and paddings, a label map's channels. In f32 it is the processor's but for the order of sums; in bf16 it
    /// is off by a few times what rounding the image alone does to the processor's.
    #[test]
    fn the_gpus_pass_is_the_processors(n in 3usize..5, h in 64usize..90, w in 64usize..90, seg in any::<bool>(), same in any::<bool>(), seed in 0u64..1000) {
        is_the_processors(host, (n, h, w), seg, same, seed);
    }
}

fn is_the_processors(machine: impl Fn(Precision) -> Arc<Gpu>, (n, h, w): (usize, usize, usize), seg: bool, same: bool, seed: u64) {
    let (arch, channels) = if seg { (Arch::MobileNetL, 7) } else { (Arch::MobileNetV2, 3) };
    let padding = if same { Padding::Same } else { Padding::Symmetric };
    let make = || branch::<f32>(arch, channels, padding, seed);
    let on = |precision| {
        let mut b = make();
        b.compute_on(Some(machine(precision)));
        b
    };
    let x = image::<f32>(seed, channels, n, h, w);
    let want = pass(&make(), &x);
    let rounded = x.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    let least = pass(&make(), &rounded).off(&want);
    let wide = pass(&on(Precision::F32), &x).off(&want);
    let half = pass(&on(Precision::Bf16), &x).off(&want);
    let parts = ["descriptor", "gradient", "statistics", "evaluation"];
    // A value beside a kink of an activation may fall on its other side, which moves the gradient more than rounding does.
    for ((what, off), most) in parts.into_iter().zip(wide).zip([1e-4, 3e-2, 1e-5, 1e-4]) {
        assert!(off < most, "{arch:?} {what}: {off}");
    }
    for ((what, off), least) in parts.into_iter().zip(half).zip(least) {
        assert!(off > 0.0 && off < 8.0 * least + 2e-2, "{arch:?} {what} in bf16: {off}, {least} for the image alone");
    }
    assert!(half[1] < 3.0 * least[1], "{arch:?} gradient in bf16: {}, {} for the image alone", half[1], least[1]);
}

/// Every bf16 there is, and what lies between two, rounded as Candle rounds.
#[test]
fn the_kernels_bf16_is_candles() {
    let mut host = Host::default();
    let values: Vec<f32> = (0..=u16::MAX)
        .flat_map(|b| [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(u32::from(b) << 16 | low)))
        .collect();
    let n = values.len();
    let (x, out) = (host.reserve(4 * n).unwrap(), host.reserve(2 * n).unwrap());
    host.upload(x, &values).unwrap();
    host.launch("narrow", true, n, &Args { x, out, ..Args::default() }).unwrap();
    let got = host.numbers(out, n, true);
    let want = Tensor::new(&values[..], &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    for ((got, want), v) in got.iter().zip(want.to_vec1::<f32>().unwrap()).zip(&values) {
        assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{v}: {got} {want}");
    }
    host.launch("widen", true, n, &Args { x: out, out: x, ..Args::default() }).unwrap();
    assert!(host.numbers(x, n, false).iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits()));
}

/// Buffers go from step to step, and a machine that is full gives back those of sizes that are no longer asked for.
#[test]
fn steps_share_their_memory_and_another_size_takes_its_place() {
    let make = |most| Arc::new(Gpu::new(Box::new(Host { memory: Memory::default(), most }), Precision::Bf16));
    let mut b = branch::<f32>(Arch::MobileNetL, 3, Padding::Same, 1);
    let step = |b: &Branch<f32>, side: usize| {
        let f = b.forward(&image::<f32>(1, 3, 2, side, side), true)?;
        f.descriptor.sum_all()?.backward().map(drop)
    };
    let gpu = make(None);
    b.compute_on(Some(gpu.clone()));
    let reserved = || super::super::op::lock(&gpu.state).free.values().map(Vec::len).sum::<usize>();
    step(&b, 48).unwrap();
    let first = reserved();
    (0..3).for_each(|_| step(&b, 48).unwrap());
    assert_eq!(reserved(), first, "a step that was there before reserves nothing");
    // Room for one size only.
    let gpu = make(Some(first + 2));
    b.compute_on(Some(gpu.clone()));
    (0..2).for_each(|i| step(&b, [48, 112][i]).unwrap());
    // And for none: the machine's own words.
    b.compute_on(Some(make(Some(5))));
    let said = step(&b, 48).unwrap_err().to_string();
    assert!(said.contains("out of memory"), "{said}");
}

#[test]
fn nan_in_an_image_reaches_the_descriptor_on_a_gpu_too() {
    for precision in [Precision::F32, Precision::Bf16] {
        let mut b = branch::<f32>(Arch::MobileNetV2, 3, Padding::Same, 1);
        b.compute_on(Some(host(precision)));
        let mut v = image::<f32>(1, 3, 2, 64, 64).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        v[100] = f32::NAN;
        let f = b.forward(&Tensor::from_vec(v, (3, 2, 64, 64), &Device::Cpu).unwrap(), false).unwrap();
        let d = f.descriptor.to_vec2::<f32>().unwrap();
        assert!(d[0].iter().any(|v| v.is_nan()) && d[1].iter().all(|v| v.is_finite()));
    }
}

#[test]
fn a_batch_that_cannot_be_counted_and_a_gradient_of_an_evaluation_are_refused() {
    let trunk = Trunk::new(Arch::MobileNetV2, 3, Padding::Same);
    // 96 channels at half the size.
    assert_eq!(trunk.largest((240, 320)), 96 * 120 * 160);
    let gpu = host(Precision::F32);
    let forward = |shape| gpu.forward(&trunk, &[], &mut [], false, &[], shape).map(drop).unwrap_err().to_string();
    let said = forward((2000, 240, 320));
    assert!(said.contains("2000 images of 320x240"), "{said}");
    let mut b = branch::<f32>(Arch::MobileNetV2, 3, Padding::Same, 1);
    b.compute_on(Some(gpu.clone()));
    let f = b.forward(&image::<f32>(1, 3, 1, 64, 64), false).unwrap();
    assert!(f.descriptor.sum_all().unwrap().backward().unwrap().get(&b.weights).is_none());
}

/// The same on a GPU, in a build with the feature.
#[cfg(feature = "cuda")]
mod on_a_card {
    use super::*;
    use structvpr::model::ComputeDevice;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]

        #[test]
        fn the_cards_pass_is_the_processors(n in 3usize..7, h in 64usize..140, w in 64usize..140, seg in any::<bool>(), same in any::<bool>(), seed in 0u64..1000) {
            let open = |precision| Gpu::open(ComputeDevice::Cuda(0), precision);
            match open(Precision::F32) {
                Err(e) => eprintln!("SKIPPED the_cards_pass_is_the_processors: {e}"),
                Ok(_) => is_the_processors(|precision| open(precision).unwrap().unwrap(), (n, h, w), seg, same, seed),
            }
        }
    }
}
