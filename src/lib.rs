//! Visual place recognition and loop closure: StructVPR on Candle. See the README.

pub mod bag;
pub mod config;
pub mod dataset;
pub mod descriptor;
pub mod error;
pub mod eval;
pub mod image;
pub mod map;
pub mod model;
pub mod pickle;
pub mod pipeline;
pub mod replay;
pub mod simd;

#[cfg(test)]
mod test_noise;
#[cfg(test)]
pub(crate) use test_noise::test_noise;
