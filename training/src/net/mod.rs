//! The networks as they are trained: batch norm in training mode, own kernels with gradients, Candle around them.

pub mod depthwise;
pub mod gemm;
// Without CUDA there is no machine to run it on but that of its tests.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub mod gpu;
pub mod naive;
pub mod norm;
mod op;
pub mod pointwise;
pub mod real;
pub mod trunk;

pub use gpu::{Gpu, Precision};
pub use op::gem;
pub use real::Real;
pub use structvpr::model::l2_normalize;
pub use trunk::{Arch, Conv, Mode, Pool, Tap, Trunk};

use candle_core::{Device, Result, Tensor, Var};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::sync::{Arc, Mutex};

/// A branch of StructVPR in training: a trunk, its numbers and the pooling's power.
pub struct Branch<T: Real = f32> {
    pub trunk: Arc<Trunk>,
    /// All weights of the trunk, flat.
    pub weights: Var,
    /// The power of GeM, one value.
    pub power: Var,
    statistics: Arc<Mutex<Vec<T>>>,
    pool: Arc<Mutex<Pool<T>>>,
    gpu: Option<Arc<Gpu>>,
}

/// What a branch makes of a batch.
pub struct Features {
    /// The taps, each C x N x H x W.
    pub taps: Vec<Tensor>,
    /// The taps pooled and each L2-normalised: N x C.
    pub pooled: Vec<Tensor>,
    /// The descriptor: the pooled taps joined and L2-normalised: N x D.
    pub descriptor: Tensor,
}

impl<T: Real> Branch<T> {
    /// Random weights (He's normal initialisation by fan-out, as torchvision's MobileNetV2), scales 1, shifts 0.
    pub fn random(trunk: Trunk, seed: u64) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut weights = vec![T::ZERO; trunk.weights];
        for conv in trunk.convs() {
            // Depthwise kernels have one input per output.
            let kernel = if conv.name.ends_with("depthwise") || conv.name == "stem" { 9 } else { 1 };
            let fan_out = if conv.name.ends_with("depthwise") { kernel } else { kernel * conv.outputs };
            let std = (2.0 / fan_out as f64).sqrt();
            for w in &mut weights[conv.weight.clone()] {
                *w = T::of(std * normal(&mut rng));
            }
            weights[conv.gamma.clone()].fill(T::ONE);
        }
        let mut statistics = vec![T::ZERO; trunk.statistics];
        for conv in trunk.convs() {
            statistics[conv.mean.end..conv.mean.end + conv.outputs].fill(T::ONE);
        }
        Self::new(trunk, weights, statistics, 3.0)
    }

    /// From numbers.
    ///
    /// Errors: lengths that are not this trunk's.
    pub fn new(trunk: Trunk, weights: Vec<T>, statistics: Vec<T>, power: f64) -> Result<Self> {
        if (weights.len(), statistics.len()) != (trunk.weights, trunk.statistics) {
            candle_core::bail!(
                "{:?} has {} weights and {} statistics, not {} and {}",
                trunk.arch,
                trunk.weights,
                trunk.statistics,
                weights.len(),
                statistics.len()
            );
        }
        let n = weights.len();
        Ok(Self {
            weights: Var::from_vec(weights, n, &Device::Cpu)?,
            power: Var::from_vec(vec![T::of(power)], 1, &Device::Cpu)?,
            statistics: Arc::new(Mutex::new(statistics)),
            pool: Arc::default(),
            gpu: None,
            trunk: Arc::new(trunk),
        })
    }

    /// Has its trunk computed by `gpu` from now on; a branch of f32 only.
    pub fn compute_on(&mut self, gpu: Option<Arc<Gpu>>) {
        self.gpu = gpu;
    }

    /// The ranges of the weights that decay: convolutions, not scales and shifts. [ours]
    pub fn decaying(&self) -> Vec<std::ops::Range<usize>> {
        self.trunk.convs().map(|c| c.weight.clone()).collect()
    }

    /// The running statistics.
    pub fn statistics(&self) -> Vec<T> {
        op::lock(&self.statistics).clone()
    }

    /// Replaces the running statistics.
    pub fn set_statistics(&self, values: &[T]) {
        op::lock(&self.statistics).copy_from_slice(values);
    }

    /// The branch on `image`, C x N x H x W; `train`: batch norms by the batch's statistics, gradients kept.
    pub fn forward(&self, image: &Tensor, train: bool) -> Result<Features> {
        let (_, images, height, width) = image.dims4()?;
        let op = op::TrunkOp {
            trunk: self.trunk.clone(),
            statistics: self.statistics.clone(),
            pool: self.pool.clone(),
            gpu: self.gpu.clone(),
            train,
            saved: Mutex::new(None),
        };
        let weights = if train { self.weights.as_tensor().clone() } else { self.weights.as_detached_tensor() };
        let power = if train { self.power.as_tensor().clone() } else { self.power.as_detached_tensor() };
        let flat = image.apply_op2(&weights, op)?;
        let sizes = self.trunk.taps((height, width));
        let (mut taps, mut at) = (Vec::new(), 0);
        for tap in &sizes {
            let n = tap.channels * images * tap.height * tap.width;
            taps.push(flat.narrow(0, at, n)?.reshape((tap.channels, images, tap.height, tap.width))?);
            at += n;
        }
        let pooled = op::gem_taps(&flat, &power, &sizes, images)?.iter().map(l2_normalize).collect::<Result<Vec<_>>>()?;
        let descriptor = l2_normalize(&Tensor::cat(&pooled, 1)?)?;
        Ok(Features { taps, pooled, descriptor })
    }
}

/// A standard normal number (Box and Muller).
pub fn normal(rng: &mut ChaCha8Rng) -> f64 {
    use rand::Rng;
    let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests;
