//! Our Candle custom ops: what Candle's own CPU paths do too slowly.
//!
//! The descriptor's ops have gradients, so that training runs the same code as inference; [`Conv3x3`], which only
//! the networks for local features use, has none.

mod aligned;
mod bf16;
mod bias_act;
mod conv3x3;
mod depthwise;
mod direct;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod emulated;
#[cfg(any(test, feature = "cuda"))]
pub(super) mod gpu;
#[cfg(target_arch = "x86_64")]
mod halves;
mod int8;
mod nearest;
mod plan;
mod pointwise;
mod powers;
mod rounding;
mod rows;
mod vector;
mod winograd;

pub use bf16::{bf16, Products};
pub use bias_act::bias_act;
#[cfg(test)]
pub(in crate::model) use conv3x3::by_winograd;
pub use conv3x3::Conv3x3;
pub use depthwise::depthwise3x3;
pub use direct::Conv;
pub use nearest::{nearest, Nearest};
pub use plan::{Input, Plan, PlanBlock};
pub use rounding::{rounded_values, Rounded, Seen};

pub(crate) use crate::simd::{dispatch, fma, Isa};

/// What follows a convolution's bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing (the linear bottleneck of an inverted residual).
    None,
    /// `max(x, 0)`.
    Relu,
    /// `min(max(x, 0), 6)`.
    Relu6,
}

impl Activation {
    #[inline(always)]
    fn apply(self, x: f32) -> f32 {
        match self {
            Self::None => x,
            Self::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            // `clamp` keeps NaN, so that a broken input is seen downstream.
            Self::Relu6 => x.clamp(0.0, 6.0),
        }
    }
}

/// Rows and columns of zeros around a plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pad {
    /// Rows above.
    pub top: usize,
    /// Rows below.
    pub bottom: usize,
    /// Columns to the left.
    pub left: usize,
    /// Columns to the right.
    pub right: usize,
}

impl Pad {
    /// One on every side: PyTorch's `padding=1` of a 3x3 kernel.
    pub const ONE: Pad = Pad { top: 1, bottom: 1, left: 1, right: 1 };

    /// TensorFlow's `SAME` for a 3x3 kernel over `height` x `width` at `stride`: the odd row or
    /// column goes to the bottom and the right.
    pub fn same(height: usize, width: usize, stride: usize) -> Self {
        let along = |n: usize| (n.div_ceil(stride).saturating_sub(1) * stride + 3).saturating_sub(n);
        let (v, h) = (along(height), along(width));
        Pad { top: v / 2, bottom: v - v / 2, left: h / 2, right: h - h / 2 }
    }

    /// Output height and width of a 3x3 kernel at `stride`; `None` if the padded input is smaller
    /// than the kernel.
    pub fn output(&self, height: usize, width: usize, stride: usize) -> Option<(usize, usize)> {
        let h = (height + self.top + self.bottom).checked_sub(3)? / stride + 1;
        let w = (width + self.left + self.right).checked_sub(3)? / stride + 1;
        Some((h, w))
    }
}

/// The contiguous f32 slice behind an op's argument.
pub(crate) fn contiguous<'a>(
    op: &'static str,
    storage: &'a candle_core::CpuStorage,
    layout: &candle_core::Layout,
) -> candle_core::Result<&'a [f32]> {
    let data = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => candle_core::bail!("{op}: argument must be contiguous"),
    }
}

/// A map, channels side by side, in memory that serves one image after the other: the maps of a large one are tens of megabytes, which
/// the system hands out page by page.
#[derive(Debug, Default)]
pub struct FeatureMap {
    /// H x W x C, and what larger maps have left behind.
    memory: aligned::Aligned<f32>,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Channels.
    pub channels: usize,
}

impl FeatureMap {
    /// Of `values`, H x W x C.
    ///
    /// Errors: there are more or fewer.
    pub fn new(values: Vec<f32>, height: usize, width: usize, channels: usize) -> crate::error::Result<Self> {
        if values.len() != height * width * channels {
            let reason = format!("{} values for {height} x {width} of {channels} channels", values.len());
            return Err(crate::error::Error::Image { reason });
        }
        Ok(Self { memory: values.into(), height, width, channels })
    }

    /// Of this size; what the values are is left open.
    pub(super) fn fit(&mut self, height: usize, width: usize, channels: usize) {
        let n = height * width * channels;
        if self.memory.len() < n {
            self.memory = aligned::Aligned::large(n);
        }
        (self.height, self.width, self.channels) = (height, width, channels);
    }

    /// H x W x C.
    pub fn values(&self) -> &[f32] {
        &self.memory.values()[..self.height * self.width * self.channels]
    }

    /// As [`Self::values`].
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.memory.values_mut()[..self.height * self.width * self.channels]
    }

    /// As [`Self::values`].
    pub fn into_values(self) -> Vec<f32> {
        let n = self.height * self.width * self.channels;
        let mut values = self.memory.into_vec();
        values.truncate(n);
        values
    }
}

/// N x C x H x W as contiguous N x H x W x C; no copy where it lies so already.
fn channels_last(x: &candle_core::Tensor) -> candle_core::Result<candle_core::Tensor> {
    x.permute((0, 2, 3, 1))?.contiguous()
}

/// A tensor of reproducible noise for the kernels' tests.
#[cfg(test)]
fn noise(seed: u64, shape: &[usize]) -> candle_core::Tensor {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n as u64).map(|i| crate::test_noise(seed, i)).collect();
    candle_core::Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap()
}
