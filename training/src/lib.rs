//! Training for StructVPR. Nothing imports this crate.

pub mod drive;
pub mod finetune;
pub mod places;
pub mod sampler;
pub mod world;
