use super::*;
use crate::net::norm::{Before, GradSums, Norm, Source};
use crate::net::pointwise::Map;
use candle_core::DType;
use proptest::prelude::*;
use rand::Rng;
use structvpr::model::kernels::Pad;
use structvpr::model::Padding;

pub(super) fn numbers(seed: u64, n: usize) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| normal(&mut rng)).collect()
}

pub(super) fn image<T: Real>(seed: u64, c: usize, n: usize, h: usize, w: usize) -> Tensor {
    let values: Vec<T> = numbers(seed, c * n * h * w).into_iter().map(T::of).collect();
    Tensor::from_vec(values, (c, n, h, w), &Device::Cpu).unwrap()
}

/// Random scales and shifts, too, so that activations saturate on both sides.
pub(super) fn branch<T: Real>(arch: Arch, channels: usize, padding: Padding, seed: u64) -> Branch<T> {
    let trunk = Trunk::new(arch, channels, padding);
    let b = Branch::<T>::random(trunk, seed).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 99);
    let mut w = b.weights.to_vec1::<T>().unwrap();
    for conv in b.trunk.convs() {
        for g in conv.gamma.clone() {
            w[g] = T::of(rng.random_range(0.6..1.6));
        }
        for g in conv.beta.clone() {
            w[g] = T::of(rng.random_range(-0.5..1.0));
        }
    }
    b.weights.set(&Tensor::from_vec(w, b.trunk.weights, &Device::Cpu).unwrap()).unwrap();
    b
}

/// A loss that every tap's every value moves: a fixed random weight for each.
pub(super) fn loss(taps: &[Tensor], seed: u64) -> Result<Tensor> {
    let mut total: Option<Tensor> = None;
    for (i, tap) in taps.iter().enumerate() {
        let (c, n, h, w) = tap.dims4()?;
        let co = image::<f64>(seed + i as u64, c, n, h, w).to_dtype(tap.dtype())?;
        let part = (tap * co)?.sum_all()?;
        total = Some(match total {
            Some(t) => (t + part)?,
            None => part,
        });
    }
    Ok(total.unwrap())
}

#[test]
fn taps_and_gradients_equal_candles_own_in_f64() {
    for (arch, channels, padding, size) in [
        // Sizes whose every stride comes out even: for others Candle's gradient of a strided convolution fails.
        (Arch::MobileNetV2, 3, Padding::Same, (64, 96)),
        (Arch::MobileNetV2, 9, Padding::Symmetric, (33, 65)),
        (Arch::MobileNetL, 6, Padding::Symmetric, (65, 33)),
        (Arch::MobileNetL, 3, Padding::Same, (64, 32)),
    ] {
        let b = branch::<f64>(arch, channels, padding, 5);
        let x = image::<f64>(1, channels, 3, size.0, size.1);
        let ours = b.forward(&x, true).unwrap();
        let grad = loss(&ours.taps, 7).unwrap().backward().unwrap();
        let grad = grad.get(&b.weights).unwrap().to_vec1::<f64>().unwrap();

        let naive = b.trunk.naive(b.weights.as_tensor(), &x.transpose(0, 1).unwrap().contiguous().unwrap()).unwrap();
        let naive: Vec<Tensor> = naive.iter().map(|t| t.transpose(0, 1).unwrap().contiguous().unwrap()).collect();
        for (a, b) in ours.taps.iter().zip(&naive) {
            let d = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
            assert!(d < 1e-9, "{arch:?} tap {:?} differs by {d}", a.shape());
        }
        let want = loss(&naive, 7).unwrap().backward().unwrap();
        let want = want.get(&b.weights).unwrap().to_vec1::<f64>().unwrap();
        for conv in b.trunk.convs() {
            for (what, range) in [("weight", &conv.weight), ("gamma", &conv.gamma), ("beta", &conv.beta)] {
                let (mut worst, mut size) = (0f64, 0f64);
                for i in range.clone() {
                    worst = worst.max((grad[i] - want[i]).abs());
                    size = size.max(want[i].abs());
                }
                assert!(worst <= 1e-8 * size.max(1.0), "{arch:?} {} {what}: {worst} of {size}", conv.name);
            }
        }
    }
}

#[test]
fn gradients_equal_finite_differences_in_f64() {
    for arch in [Arch::MobileNetV2, Arch::MobileNetL] {
        let b = branch::<f64>(arch, 3, Padding::Same, 11);
        let x = image::<f64>(2, 3, 2, 64, 64);
        let run = |weights: &[f64], power: f64| -> f64 {
            let stats = b.statistics();
            let c = Branch::new((*b.trunk).clone(), weights.to_vec(), stats, power).unwrap();
            let f = c.forward(&x, true).unwrap();
            let d = f.descriptor.dims2().unwrap().1;
            (f.descriptor * Tensor::from_vec(numbers(8, 2 * d), (2, d), &Device::Cpu).unwrap())
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar()
                .unwrap()
        };
        let f = b.forward(&x, true).unwrap();
        let d = f.descriptor.dims2().unwrap().1;
        let total = (f.descriptor * Tensor::from_vec(numbers(8, 2 * d), (2, d), &Device::Cpu).unwrap()).unwrap().sum_all().unwrap();
        let grads = total.backward().unwrap();
        let got = grads.get(&b.weights).unwrap().to_vec1::<f64>().unwrap();
        let start = b.weights.to_vec1::<f64>().unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let (mut agree, mut all) = (0, 0);
        for conv in b.trunk.convs() {
            for range in [&conv.weight, &conv.gamma, &conv.beta] {
                let i = rng.random_range(range.clone());
                let h = 1e-6;
                let mut moved = start.clone();
                moved[i] += h;
                let up = run(&moved, 3.0);
                moved[i] -= 2.0 * h;
                let want = (up - run(&moved, 3.0)) / (2.0 * h);
                all += 1;
                // A kink of an activation or GeM's floor inside the step spoils a difference now and then.
                agree += usize::from((got[i] - want).abs() <= 1e-4 * want.abs().max(0.1));
            }
        }
        assert!(agree * 100 >= all * 97, "{arch:?}: {agree} of {all}");
        let want = (run(&start, 3.0 + 1e-6) - run(&start, 3.0 - 1e-6)) / 2e-6;
        let got = grads.get(&b.power).unwrap().to_vec1::<f64>().unwrap()[0];
        assert!((got - want).abs() < 1e-6 * want.abs().max(1.0), "power: {got} against {want}");
    }
}

#[test]
fn gem_with_any_power_equals_finite_differences() {
    let x = Var::from_tensor(&image::<f64>(4, 3, 2, 4, 5)).unwrap();
    for power in [1.0, 2.4, 3.0, 5.0] {
        let p = Var::from_vec(vec![power], 1, &Device::Cpu).unwrap();
        let co = Tensor::from_vec(numbers(6, 6), (2, 3), &Device::Cpu).unwrap();
        let run = |x: &Tensor| (gem(x, &p).unwrap() * &co).unwrap().sum_all().unwrap();
        let grads = run(x.as_tensor()).backward().unwrap();
        let got = grads.get(&x).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let start = x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        for i in 0..start.len() {
            let at = |h: f64| {
                let mut v = start.clone();
                v[i] += h;
                run(&Tensor::from_vec(v, (3, 2, 4, 5), &Device::Cpu).unwrap()).to_scalar::<f64>().unwrap()
            };
            let want = (at(1e-6) - at(-1e-6)) / 2e-6;
            assert!((got[i] - want).abs() < 1e-6, "p {power}, {i}: {} against {want}", got[i]);
        }
    }
}

#[test]
fn f32_equals_f64_and_does_not_depend_on_the_number_of_threads() {
    let run = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let b = branch::<f32>(Arch::MobileNetV2, 3, Padding::Same, 5);
            let f = b.forward(&image::<f32>(1, 3, 4, 64, 96), true).unwrap();
            let grads = loss(&f.taps, 7).unwrap().backward().unwrap();
            (f.descriptor.to_vec2::<f32>().unwrap(), grads.get(&b.weights).unwrap().to_vec1::<f32>().unwrap(), b.statistics())
        })
    };
    let one = run(1);
    for threads in [2, 3, 5] {
        assert!(one == run(threads), "{threads} threads");
    }
    let b = branch::<f64>(Arch::MobileNetV2, 3, Padding::Same, 5);
    let w32: Vec<f64> =
        branch::<f32>(Arch::MobileNetV2, 3, Padding::Same, 5).weights.to_vec1::<f32>().unwrap().into_iter().map(f64::from).collect();
    b.weights.set(&Tensor::from_vec(w32, b.trunk.weights, &Device::Cpu).unwrap()).unwrap();
    let x = image::<f32>(1, 3, 4, 64, 96).to_dtype(DType::F64).unwrap();
    let wide = b.forward(&x, true).unwrap().descriptor.to_vec2::<f64>().unwrap();
    for (a, b) in one.0.iter().flatten().zip(wide.iter().flatten()) {
        assert!((f64::from(*a) - b).abs() < 1e-4, "{a} {b}");
    }
}

#[test]
fn unfolding_changes_nothing_on_the_batch_it_saw() {
    // Convolutions with biases and no norm, as folded ImageNet weights are.
    let trunk = Trunk::new(Arch::MobileNetV2, 3, Padding::Same);
    let b = Branch::<f64>::random(trunk.clone(), 3).unwrap();
    let mut weights = b.weights.to_vec1::<f64>().unwrap();
    for (i, conv) in trunk.convs().enumerate() {
        weights[conv.gamma.clone()].fill(1.0);
        weights[conv.beta.clone()].copy_from_slice(&numbers(i as u64, conv.outputs).iter().map(|v| v * 0.1).collect::<Vec<_>>());
    }
    // Statistics of mean 0 and variance 1 - eps: the norm adds beta and does nothing else.
    let mut statistics = vec![0.0; trunk.statistics];
    for conv in trunk.convs() {
        statistics[conv.mean.end..conv.mean.end + conv.outputs].fill(1.0 - norm::EPS);
    }
    let x = image::<f64>(5, 3, 3, 64, 64).flatten_all().unwrap().to_vec1::<f64>().unwrap();
    let mut pool = Pool::default();
    let (want, _) = trunk.forward(&weights, Mode::Eval(&statistics), &x, 3, (64, 64), &mut pool);
    let mut unfolded = weights.clone();
    let mut moved = statistics.clone();
    let mode = Mode::Unfold { weights: &mut unfolded, statistics: &mut moved };
    trunk.forward(&weights, mode, &x, 3, (64, 64), &mut pool);
    let (eval, _) = trunk.forward(&unfolded, Mode::Eval(&moved), &x, 3, (64, 64), &mut pool);
    let (train, _) = trunk.forward(&unfolded, Mode::Train(&mut moved), &x, 3, (64, 64), &mut pool);
    for got in [eval, train] {
        let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-9, "{worst}");
    }
}

#[test]
fn a_gradient_of_an_evaluation_is_refused() {
    let b = branch::<f32>(Arch::MobileNetL, 3, Padding::Symmetric, 1);
    let wrong = b.forward(&image::<f32>(1, 4, 1, 64, 64), false).err().unwrap().to_string();
    assert!(wrong.contains("4 channels") && wrong.contains("has 3"), "{wrong}");
    let f = b.forward(&image::<f32>(1, 3, 1, 64, 64), false).unwrap();
    assert!(f.descriptor.sum_all().unwrap().backward().unwrap().get(&b.weights).is_none());
}

#[test]
fn nan_in_an_image_reaches_the_descriptor() {
    let b = branch::<f32>(Arch::MobileNetV2, 3, Padding::Same, 1);
    let mut v = image::<f32>(1, 3, 2, 64, 64).flatten_all().unwrap().to_vec1::<f32>().unwrap();
    v[100] = f32::NAN;
    let f = b.forward(&Tensor::from_vec(v, (3, 2, 64, 64), &Device::Cpu).unwrap(), false).unwrap();
    let d = f.descriptor.to_vec2::<f32>().unwrap();
    assert!(d[0].iter().any(|v| v.is_nan()) && d[1].iter().all(|v| v.is_finite()));
}

fn unit_norm(channels: usize, seed: u64) -> Norm<f64> {
    let v = numbers(seed, channels);
    Norm::new(v.iter().map(|m| (*m, 0.5 + m.abs())), &vec![1.2; channels], &vec![0.4; channels])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Against loops over single values; any size, stride, padding, also planes smaller than a vector, and more of them than are worked
    /// on together.
    #[test]
    fn depthwise_equals_plain_loops(
        c in 1usize..4, n in 1usize..8, h in 1usize..13, w in 1usize..21, large in any::<bool>(), stride in 1usize..3, same in any::<bool>(), seed in any::<u64>(),
    ) {
        let (h, w) = if large { (h + 30, w + 60) } else { (h, w) };
        let pad = if same { Pad::same(h, w, stride) } else { Pad::ONE };
        let (oh, ow) = pad.output(h, w, stride).unwrap();
        let shape = depthwise::Shape { images: n, height: h, width: w, out_height: oh, out_width: ow, stride, pad };
        let (x, k) = (numbers(seed, c * n * h * w), numbers(seed ^ 1, c * 9));
        let norm = unit_norm(c, seed ^ 2);
        let source = Source::Normed { raw: &x, norm: &norm, top: 6.0 };
        let mut out = vec![f64::NAN; c * n * oh * ow];
        let moments = depthwise::forward(&k, source, &shape, &mut out, true);
        let read = |ch: usize, i: usize, y: isize, xx: isize| {
            if y < 0 || xx < 0 || y >= h as isize || xx >= w as isize { return 0.0 }
            let v = x[((ch * n + i) * h + y as usize) * w + xx as usize];
            (v * norm.scale[ch] + norm.shift[ch]).clamp(0.0, 6.0)
        };
        let g = numbers(seed ^ 3, out.len());
        let (raw, unit) = (numbers(seed ^ 4, out.len()), unit_norm(c, seed ^ 5));
        let sums: Vec<GradSums> = (0..c).map(|i| GradSums { grad: 0.3 * i as f64, grad_x: 0.7 }).collect();
        let before = Before::new(&g, &raw, &unit, &sums, n * oh * ow);
        let mut dx = vec![f64::NAN; x.len()];
        let mut dk = vec![0.0; c * 9];
        depthwise::backward(&k, &mut dk, &before, source, &shape, pointwise::Into::Normed { grad: &mut dx, raw: &x, norm: &norm, top: 6.0 });
        let (mut want_dx, mut want_dk) = (vec![0.0; x.len()], vec![0.0; c * 9]);
        for ch in 0..c {
            let mut all = Vec::new();
            let count = (n * oh * ow) as f64;
            for i in 0..n { for oy in 0..oh { for ox in 0..ow {
                let at = ((ch * n + i) * oh + oy) * ow + ox;
                let xhat = (raw[at] - unit.mean[ch]) * unit.inverse[ch];
                let dy = unit.scale[ch] * (g[at] - sums[ch].grad / count - xhat * sums[ch].grad_x / count);
                let mut s = 0.0;
                for ky in 0..3usize { for kx in 0..3usize {
                    let (y, xx) = ((oy * stride + ky) as isize - pad.top as isize, (ox * stride + kx) as isize - pad.left as isize);
                    s += read(ch, i, y, xx) * k[ch * 9 + ky * 3 + kx];
                    want_dk[ch * 9 + ky * 3 + kx] += read(ch, i, y, xx) * dy;
                    if y >= 0 && xx >= 0 && y < h as isize && xx < w as isize {
                        let xi = ((ch * n + i) * h + y as usize) * w + xx as usize;
                        let z = x[xi] * norm.scale[ch] + norm.shift[ch];
                        if z > 0.0 && z < 6.0 { want_dx[xi] += dy * k[ch * 9 + ky * 3 + kx]; }
                    }
                }}
                prop_assert!((s - out[at]).abs() < 1e-9);
                all.push(s);
            }}}
            let mean = all.iter().sum::<f64>() / count;
            prop_assert!((moments[ch].mean - mean).abs() < 1e-9);
            let m2: f64 = all.iter().map(|v| (v - mean).powi(2)).sum();
            prop_assert!((moments[ch].m2 - m2).abs() < 1e-7 * m2.max(1.0));
        }
        for (a, b) in dx.iter().zip(&want_dx).chain(dk.iter().zip(&want_dk)) {
            prop_assert!((a - b).abs() < 1e-8 * b.abs().max(1.0), "{} {}", a, b);
        }
    }

    #[test]
    fn pointwise_equals_plain_loops(o in 1usize..40, i in 1usize..40, columns in 1usize..700, seed in any::<u64>()) {
        let (x, k) = (numbers(seed, i * columns), numbers(seed ^ 1, o * i));
        let norm = unit_norm(i, seed ^ 2);
        let map = Map { source: Source::Normed { raw: &x, norm: &norm, top: 6.0 }, channels: i, columns };
        let mut out = vec![f64::NAN; o * columns];
        let moments = pointwise::forward(&k, &map, columns, &mut out, true);
        let read = |c: usize, at: usize| (x[c * columns + at] * norm.scale[c] + norm.shift[c]).clamp(0.0, 6.0);
        for a in 0..o {
            let want: Vec<f64> = (0..columns).map(|at| (0..i).map(|c| k[a * i + c] * read(c, at)).sum()).collect();
            let mean = want.iter().sum::<f64>() / columns as f64;
            prop_assert!((moments[a].mean - mean).abs() < 1e-9);
            for (g, w) in out[a * columns..].iter().zip(&want) {
                prop_assert!((g - w).abs() < 1e-9);
            }
        }
        let (g, raw, unit) = (numbers(seed ^ 3, o * columns), numbers(seed ^ 4, o * columns), unit_norm(o, seed ^ 5));
        let sums = vec![GradSums { grad: 0.2, grad_x: -0.4 }; o];
        let before = Before::new(&g, &raw, &unit, &sums, columns);
        let add = numbers(seed ^ 6, i * columns);
        let (mut dx, mut dk) = (vec![f64::NAN; i * columns], vec![0.0; o * i]);
        pointwise::backward(&k, &mut dk, &before, &map, columns, pointwise::Into::Plain { grad: &mut dx, add: Some(&add) });
        let dy = |a: usize, at: usize| {
            let xhat = (raw[a * columns + at] - unit.mean[a]) * unit.inverse[a];
            unit.scale[a] * (g[a * columns + at] - 0.2 / columns as f64 + xhat * 0.4 / columns as f64)
        };
        for c in 0..i {
            for at in (0..columns).step_by(7) {
                let want: f64 = (0..o).map(|a| k[a * i + c] * dy(a, at)).sum::<f64>() + add[c * columns + at];
                prop_assert!((dx[c * columns + at] - want).abs() < 1e-9);
            }
            for a in 0..o {
                let want: f64 = (0..columns).map(|at| dy(a, at) * read(c, at)).sum();
                prop_assert!((dk[a * i + c] - want).abs() < 1e-8 * want.abs().max(1.0));
            }
        }
    }
}

/// Each size of batch had buffers of its own: memory grew with every refresh of the descriptor cache.
#[test]
fn buffers_of_batches_of_many_sizes_are_shared() {
    let trunk = Trunk::new(Arch::MobileNetV2, 3, Padding::Same);
    let b = Branch::<f32>::random(trunk.clone(), 1).unwrap();
    let (weights, statistics) = (b.weights.to_vec1::<f32>().unwrap(), b.statistics());
    let mut pool = Pool::default();
    let mut run = |n: usize| {
        let (_, saved) = trunk.forward(&weights, Mode::Eval(&statistics), &vec![0.1; 3 * n * 64 * 64], n, (64, 64), &mut pool);
        pool.recycle(saved);
        pool.room()
    };
    let first = run(8);
    let mut last = first;
    for n in (1..=8).chain([8, 3, 8, 5, 7, 8]) {
        last = run(n);
    }
    assert!(last <= 2 * first, "{first} values at first, {last} at the end");
}

/// A pass gave its copy of the images to the pool, which had not come from there: 5 to 25 MB a step, 16 GB in twenty minutes.
#[test]
fn no_step_leaves_more_free_buffers_than_the_one_before() {
    let trunk = Trunk::new(Arch::MobileNetV2, 3, Padding::Same);
    let b = Branch::<f32>::random(trunk.clone(), 1).unwrap();
    let (weights, mut statistics) = (b.weights.to_vec1::<f32>().unwrap(), b.statistics());
    let (image, mut pool) = (vec![0.1; 3 * 4 * 64 * 64], Pool::default());
    let mut rooms = Vec::new();
    for step in 0..12 {
        let mode = if step % 2 == 0 { Mode::Train(&mut statistics) } else { Mode::Eval(&statistics) };
        let (taps, saved) = trunk.forward(&weights, mode, &image, 4, (64, 64), &mut pool);
        if step % 2 == 0 {
            trunk.backward(&weights, &saved, &vec![1e-3; taps.len()], &mut pool);
        }
        pool.recycle(saved);
        rooms.push(pool.room());
    }
    assert!(rooms[2..].iter().all(|r| *r == rooms[1]), "{rooms:?}");
}
