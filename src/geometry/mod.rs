//! What the geometry of two images says of a match: which points correspond, and how likely so many of them
//! would agree by chance.

mod matching;
mod two_view;

pub use matching::{mutual_matches, Match};
pub use two_view::{evidence, verify, Degeneracy, Failure, Verification, VerifyConfig};
