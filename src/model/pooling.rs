//! Pooling of a feature map to one value per channel, and the joining of taps.

use candle_core::{Result, Tensor, D};
use serde::{Deserialize, Serialize};

/// Smallest value that GeM raises to its power; taps are linear, so negative values occur.
pub const GEM_EPS: f64 = 1e-6;

/// How a feature map becomes one value per channel. [ours: the papers do not say which]
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum Pooling {
    /// Generalised mean: `mean(max(x, eps)^p)^(1/p)`.
    Gem {
        /// The power; 1 is the mean, infinity the maximum.
        p: f64,
    },
    /// Arithmetic mean.
    Average,
}

impl Pooling {
    /// N x C x H x W to N x C.
    pub fn pool(&self, x: &Tensor) -> Result<Tensor> {
        let flat = x.flatten_from(2)?;
        match self {
            Self::Average => flat.mean(D::Minus1),
            Self::Gem { p } => {
                let clamped = flat.maximum(GEM_EPS)?;
                let powered = if *p == 3.0 { (clamped.sqr()? * clamped)? } else { clamped.powf(*p)? };
                powered.mean(D::Minus1)?.powf(1.0 / p)
            }
        }
    }
}

/// `x / |x|` along the last dimension.
pub fn l2_normalize(x: &Tensor) -> Result<Tensor> {
    let norm = (x.sqr()?.sum_keepdim(D::Minus1)? + 1e-12)?.sqrt()?;
    x.broadcast_div(&norm)
}
