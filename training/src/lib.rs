//! Training for StructVPR. Nothing imports this crate.

pub mod ablate;
pub mod augment;
pub mod bench;
pub mod cameras;
pub mod checkpoint;
pub mod data;
pub mod drive;
pub mod finetune;
pub mod learner;
pub mod loss;
pub mod net;
pub mod optim;
pub mod optq;
pub mod partition;
pub mod places;
pub mod rank;
pub mod recipe;
pub mod report;
pub mod round;
pub mod sampler;
pub mod segment;
pub mod slme;
pub mod train;
pub mod work;
pub mod world;
