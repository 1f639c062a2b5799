//! Training for StructVPR. Nothing imports this crate.

pub mod world;
