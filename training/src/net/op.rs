//! The trunk and GeM as Candle custom ops, so that all that is small (losses, projections) is written in Candle.

use super::gpu::{self, Gpu};
use super::real::Real;
use super::trunk::{Mode, Pool, Saved, Trunk};
use candle_core::{bail, CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
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
        let grad = grad.contiguous()?;
        let out = match (&saved, &self.gpu) {
            (Kept::There(kept), Some(gpu)) => Tensor::new(gpu.backward(&self.trunk, kept, &grad.to_vec1::<f32>()?)?, weights.device())?,
            (Kept::Here(kept), _) => {
                let out = self.trunk.backward(&weights.to_vec1::<T>()?, kept, &grad.to_vec1::<T>()?, &mut lock(&self.pool));
                Tensor::new(out, weights.device())?
            }
            (Kept::There(_), None) => bail!("trunk: a pass on a GPU that is gone"),
        };
        self.recycle(saved);
        Ok((None, Some(out)))
    }
}

/// Smallest value that GeM raises to its power; taps are linear, so negative values occur.
const EPS: f64 = structvpr::model::GEM_EPS;

struct Gem;

/// Generalised mean over each plane of C x N x H x W, with gradients for the map and the power `p` (one value): N x C.
pub fn gem(x: &Tensor, p: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2(p, Gem)?.t()?.contiguous()
}

/// `mean(max(x, eps)^p)` of a plane.
fn power_mean<T: Real>(plane: &[T], p: T) -> T {
    let (eps, three) = (T::of(EPS), p == T::of(3.0));
    let mut sum = T::ZERO;
    for x in plane {
        let x = if *x < eps { eps } else { *x };
        sum += if three { x * x * x } else { x.power(p) };
    }
    sum / T::of(plane.len() as f64)
}

fn gem_forward<T: Real>(x: &[T], p: T, plane: usize) -> Vec<T> {
    x.par_chunks(plane).map(|plane| power_mean(plane, p).power(T::ONE / p)).collect()
}

/// Gradients of the map and of `p`.
fn gem_backward<T: Real>(x: &[T], p: T, grad: &[T], plane: usize) -> (Vec<T>, T) {
    let (eps, three) = (T::of(EPS), p == T::of(3.0));
    let mut dx = vec![T::ZERO; x.len()];
    let dp: Vec<T> = dx
        .par_chunks_mut(plane)
        .zip(x.par_chunks(plane))
        .zip(grad)
        .map(|((dx, x), g)| {
            let n = T::of(x.len() as f64);
            let mean = power_mean(x, p);
            let y = mean.power(T::ONE / p);
            // dy/dx = y^(1 - p) x^(p - 1) / n
            let scale = *g * y / (mean * n);
            let mut weighted = T::ZERO;
            for (d, x) in dx.iter_mut().zip(x) {
                let (floor, v) = (*x < eps, if *x < eps { eps } else { *x });
                let powered = if three { v * v * v } else { v.power(p) };
                weighted += powered * v.log();
                *d = if floor { T::ZERO } else { scale * powered / v };
            }
            *g * y * (weighted / (n * mean * p) - mean.log() / (p * p))
        })
        .collect();
    (dx, dp.into_iter().fold(T::ZERO, |s, v| s + v))
}

impl CustomOp2 for Gem {
    fn name(&self) -> &'static str {
        "gem"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (c, n, h, w) = l1.shape().dims4()?;
        let out = match s1 {
            CpuStorage::F64(_) => {
                CpuStorage::F64(gem_forward(slice::<f64>("gem", s1, l1)?, slice::<f64>("gem", s2, l2)?[0], (h * w).max(1)))
            }
            _ => CpuStorage::F32(gem_forward(slice::<f32>("gem", s1, l1)?, slice::<f32>("gem", s2, l2)?[0], (h * w).max(1))),
        };
        Ok((out, (c, n).into()))
    }

    fn bwd(&self, x: &Tensor, p: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        fn both<T: Real>(x: &Tensor, p: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
            let (_, _, h, w) = x.dims4()?;
            let values = x.flatten_all()?.to_vec1::<T>()?;
            let (dx, dp) = gem_backward(&values, p.to_vec1::<T>()?[0], &grad.contiguous()?.flatten_all()?.to_vec1::<T>()?, (h * w).max(1));
            Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), Some(Tensor::from_vec(vec![dp], 1, x.device())?)))
        }
        match x.dtype() {
            candle_core::DType::F64 => both::<f64>(x, p, grad),
            _ => both::<f32>(x, p, grad),
        }
    }
}
