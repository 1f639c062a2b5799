//! Visual place recognition and loop closure for robots: StructVPR (CVPR 2023) in Rust on Candle.
//!
//! Images become global descriptors ([`model`]), descriptors become keyframes of a [`map`], and the
//! [`pipeline`] says of each keyframe which loop it closes, or why it closes none.
//!
//! ```
//! use structvpr::config::Config;
//! use structvpr::image::RgbImage;
//! use structvpr::map::Map;
//! use structvpr::model::Model;
//! use structvpr::pipeline::{Frame, LoopDetector, Outcome, Reason, Step};
//!
//! # fn main() -> structvpr::error::Result<()> {
//! let model = Model::shipped()?;
//! let map = Map::new(model.identity().clone());
//! let mut detector = LoopDetector::new(Config::default(), map, model.spec().recommended())?;
//!
//! // One image; a robot would send them one after the other.
//! let pixels = (0..320 * 240 * 3).map(|i| (i / 7 % 256) as u8).collect();
//! let image = RgbImage::new(320, 240, pixels)?;
//! let frame = Frame {
//!     camera: String::new(),
//!     stamp_ns: 0,
//!     name: "first".into(),
//!     descriptor: model.describe(&image)?,
//!     luma_std: image.luma_stats().1,
//!     median_depth_m: None,
//!     glance: Some(image.glance()?),
//!     odom_from_base: None,
//!     features: None,
//!     calibration: None,
//! };
//! match detector.process(frame)? {
//!     Step::Keyframe(decision) => assert_eq!(decision.outcome, Outcome::Rejected(Reason::TooRecent)),
//!     Step::Skipped(why) => panic!("not a keyframe: {why:?}"),
//! }
//! # Ok(())
//! # }
//! ```

pub mod bag;
pub mod confidence;
pub mod config;
pub mod dataset;
pub mod descriptor;
pub mod error;
pub mod eval;
pub mod features;
pub mod geometry;
pub mod image;
pub mod live;
pub mod map;
pub mod model;
pub mod odometry;
pub mod pickle;
pub mod pipeline;
pub mod replay;
pub mod rerank;
#[cfg(feature = "ros")]
pub mod ros;
pub mod simd;
pub mod sqlite;
mod team;

#[cfg(test)]
mod test_noise;
#[cfg(test)]
pub(crate) use test_noise::test_noise;
