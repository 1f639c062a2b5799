//! The trunk and GeM as Candle custom ops, so that all that is small (losses, projections) is written in Candle.

use super::gpu::{self, Gpu};
use super::real::Real;
use super::trunk::{Mode, Pool, Saved, Tap, Trunk};
use candle_core::{bail, CpuStorage, CustomOp2, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is kept inside is whole at every step: numbers and free buffers.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn slice<'a, T: Real>(op: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let data = storage.as_slice::<T>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("{op}: arguments must be contiguous"),
    }
}

/// Calls `f` with a tensor's values where they lie, which are copied only if they are not in order.
fn with_values<T: Real, R>(op: &str, t: &Tensor, f: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        Storage::Cpu(s) => f(slice::<T>(op, s, layout)?),
        _ => bail!("{op}: its values are on the processor"),
    }
}

/// A trunk's forward pass as an op over (image C x N x H x W, flat weights).
pub(super) struct TrunkOp<T: Real> {
    pub trunk: Arc<Trunk>,
    pub statistics: Arc<Mutex<Vec<T>>>,
    pub pool: Arc<Mutex<Pool<T>>>,
    /// Where it is computed, if not on the processor.
    pub gpu: Option<Arc<Gpu>>,
    pub train: bool,
    pub saved: Mutex<Option<Kept<T>>>,
}

/// What the backward pass needs, where it was made.
pub(super) enum Kept<T> {
    Here(Saved<T>),
    There(gpu::Saved),
}

impl<T: Real> TrunkOp<T> {
    fn recycle(&self, kept: Kept<T>) {
        match (kept, &self.gpu) {
            (Kept::Here(saved), _) => lock(&self.pool).recycle(saved),
            (Kept::There(saved), Some(gpu)) => gpu.recycle(saved),
            (Kept::There(_), None) => {}
        }
    }

    /// Taps on the GPU.
    fn away(&self, gpu: &Gpu, weights: &[f32], image: &[f32], shape: (usize, usize, usize)) -> Result<Vec<f32>> {
        let mut own = lock(&self.statistics);
        let mut statistics: Vec<f64> = own.iter().map(|v| v.wide()).collect();
        let (taps, saved) = gpu.forward(&self.trunk, weights, &mut statistics, self.train, image, shape)?;
        if self.train {
            own.iter_mut().zip(&statistics).for_each(|(to, v)| *to = T::of(*v));
        }
        *lock(&self.saved) = saved.map(Kept::There);
        Ok(taps)
    }
}

impl<T: Real> Drop for TrunkOp<T> {
    fn drop(&mut self) {
        if let Some(kept) = lock(&self.saved).take() {
            self.recycle(kept);
        }
    }
}

impl<T: Real> CustomOp2 for TrunkOp<T> {
    fn name(&self) -> &'static str {
        "trunk"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (channels, images, height, width) = l1.shape().dims4()?;
        let (image, weights) = (slice::<T>("trunk", s1, l1)?, slice::<T>("trunk", s2, l2)?);
        if channels != self.trunk.channels || weights.len() != self.trunk.weights {
            bail!(
                "trunk: {channels} channels and {} weights; this network has {} and {}",
                weights.len(),
                self.trunk.channels,
                self.trunk.weights
            );
        }
        if let Some(gpu) = &self.gpu {
            // Only f32 goes there: f64 is refused by these.
            let (image, weights) = (slice::<f32>("trunk", s1, l1)?, slice::<f32>("trunk", s2, l2)?);
            let taps = self.away(gpu, weights, image, (images, height, width))?;
            let n = taps.len();
            return Ok((CpuStorage::F32(taps), n.into()));
        }
        let mut statistics = lock(&self.statistics);
        let mode = if self.train { Mode::Train(&mut statistics) } else { Mode::Eval(&statistics) };
        let mut pool = lock(&self.pool);
        let (taps, saved) = self.trunk.forward(weights, mode, image, images, (height, width), &mut pool);
        if self.train {
            *lock(&self.saved) = Some(Kept::Here(saved));
        } else {
            pool.recycle(saved);
        }
        let n = taps.len();
        Ok((T::to_cpu_storage_owned(taps), n.into()))
    }

    fn bwd(&self, _image: &Tensor, weights: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(saved) = lock(&self.saved).take() else {
            bail!("trunk: a gradient was asked of a pass that was not one of training, or twice of one pass")
        };
        let n = self.trunk.weights;
        let out = match (&saved, &self.gpu) {
            (Kept::There(kept), Some(gpu)) => {
                let out = with_values("trunk", grad, |grad: &[f32]| gpu.backward(&self.trunk, kept, grad))?;
                Tensor::from_vec(out, n, weights.device())?
            }
            (Kept::Here(kept), _) => {
                let back = |weights: &[T], grad: &[T]| Ok(self.trunk.backward(weights, kept, grad, &mut lock(&self.pool)));
                let out = with_values("trunk", weights, |weights| with_values("trunk", grad, |grad| back(weights, grad)))?;
                Tensor::from_vec(out, n, weights.device())?
            }
            (Kept::There(_), None) => bail!("trunk: a pass on a GPU that is gone"),
        };
        self.recycle(saved);
        Ok((None, Some(out)))
    }
}

/// Smallest value that GeM raises to its power; taps are linear, so negative values occur.
const EPS: f64 = structvpr::model::GEM_EPS;

/// GeM over planes that lie one behind the other, in runs of one length.
struct Gem {
    runs: Vec<Run>,
}

/// Planes of one length.
#[derive(Clone, Copy)]
struct Run {
    planes: usize,
    length: usize,
}

impl Gem {
    /// Of each run: a plane's length, where its values lie, and where its planes' means do.
    fn places(&self) -> impl Iterator<Item = (usize, Range<usize>, Range<usize>)> + '_ {
        let (mut values, mut planes) = (0, 0);
        self.runs.iter().map(move |run| {
            (values, planes) = (values + run.planes * run.length, planes + run.planes);
            (run.length, values - run.planes * run.length..values, planes - run.planes..planes)
        })
    }
}

/// Generalised mean over each plane of C x N x H x W, with gradients for the map and the power `p` (one value): N x C.
pub fn gem(x: &Tensor, p: &Tensor) -> Result<Tensor> {
    let (c, n, h, w) = x.dims4()?;
    let op = Gem { runs: vec![Run { planes: c * n, length: h * w }] };
    x.contiguous()?.flatten_all()?.apply_op2(p, op)?.reshape((c, n))?.t()?.contiguous()
}

/// The same of each tap of a trunk's flat output for `images` images. One op, so that their gradient is written once.
pub(super) fn gem_taps(flat: &Tensor, p: &Tensor, taps: &[Tap], images: usize) -> Result<Vec<Tensor>> {
    let runs = taps.iter().map(|t| Run { planes: t.channels * images, length: t.height * t.width }).collect();
    let means = flat.apply_op2(p, Gem { runs })?;
    let mut at = 0;
    let one = |tap: &Tap| {
        let n = tap.channels * images;
        at += n;
        means.narrow(0, at - n, n)?.reshape((tap.channels, images))?.t()?.contiguous()
    };
    taps.iter().map(one).collect()
}

/// `max(x, eps)^p`.
fn powered<T: Real>(x: T, p: T) -> T {
    let x = if x < T::of(EPS) { T::of(EPS) } else { x };
    if p == T::of(3.0) {
        x * x * x
    } else {
        x.power(p)
    }
}

fn gem_forward<T: Real>(x: &[T], p: T, plane: usize) -> Vec<T> {
    let mean = |plane: &[T]| plane.iter().fold(T::ZERO, |sum, x| sum + powered(*x, p)) / T::of(plane.len() as f64);
    x.par_chunks(plane.max(1)).map(|plane| mean(plane).power(T::ONE / p)).collect()
}

/// Gradients of the map, put to `dx`, and of `p`.
fn gem_backward<T: Real>(x: &[T], p: T, grad: &[T], plane: usize, dx: &mut [T]) -> T {
    let eps = T::of(EPS);
    let dp: Vec<T> = dx
        .par_chunks_mut(plane.max(1))
        .zip(x.par_chunks(plane.max(1)))
        .zip(grad)
        .map(|((dx, x), g)| {
            let n = T::of(x.len() as f64);
            let mut sum = T::ZERO;
            for (d, x) in dx.iter_mut().zip(x) {
                *d = powered(*x, p);
                sum += *d;
            }
            let mean = sum / n;
            let y = mean.power(T::ONE / p);
            // dy/dx = y^(1 - p) x^(p - 1) / n
            let scale = *g * y / (mean * n);
            let mut weighted = T::ZERO;
            for (d, x) in dx.iter_mut().zip(x) {
                let (floor, v) = (*x < eps, if *x < eps { eps } else { *x });
                weighted += *d * v.log();
                *d = if floor { T::ZERO } else { scale * *d / v };
            }
            *g * y * (weighted / (n * mean * p) - mean.log() / (p * p))
        })
        .collect();
    dp.into_iter().fold(T::ZERO, |s, v| s + v)
}

impl CustomOp2 for Gem {
    fn name(&self) -> &'static str {
        "gem"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        fn all<T: Real>(op: &Gem, x: &[T], p: T) -> Vec<T> {
            op.places().flat_map(|(length, values, _)| gem_forward(&x[values], p, length)).collect()
        }
        let out = match s1 {
            CpuStorage::F64(_) => CpuStorage::F64(all(self, slice::<f64>("gem", s1, l1)?, slice::<f64>("gem", s2, l2)?[0])),
            _ => CpuStorage::F32(all(self, slice::<f32>("gem", s1, l1)?, slice::<f32>("gem", s2, l2)?[0])),
        };
        let planes: usize = self.runs.iter().map(|r| r.planes).sum();
        Ok((out, planes.into()))
    }

    fn bwd(&self, x: &Tensor, p: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        fn both<T: Real>(op: &Gem, x: &Tensor, p: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
            let power = p.to_vec1::<T>()?[0];
            let mut dx = vec![T::ZERO; x.elem_count()];
            let mut all = |x: &[T], grad: &[T]| {
                let one = |(length, values, planes): (usize, Range<usize>, Range<usize>)| {
                    gem_backward(&x[values.clone()], power, &grad[planes], length, &mut dx[values])
                };
                Ok(op.places().map(one).fold(T::ZERO, |s, v| s + v))
            };
            let dp = with_values("gem", x, |x| with_values("gem", grad, |grad| all(x, grad)))?;
            Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), Some(Tensor::from_vec(vec![dp], 1, x.device())?)))
        }
        match x.dtype() {
            candle_core::DType::F64 => both::<f64>(self, x, p, grad),
            _ => both::<f32>(self, x, p, grad),
        }
    }
}
