//! Training for StructVPR. Nothing imports this crate.

pub mod bench;
pub mod drive;
pub mod finetune;
pub mod loss;
pub mod net;
pub mod optim;
pub mod places;
pub mod sampler;
pub mod world;
