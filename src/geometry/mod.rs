//! What the geometry of two images says of a match: which points correspond, how likely so many of them
//! would agree by chance, and how the camera moved between the two.

mod camera;
mod matching;
mod pose;
mod two_view;

pub use camera::{is_uncalibrated, rays};
pub use matching::{mutual_matches, Learned, Match, Matcher, Mutual};
pub use pose::{inverse_covariance, transformed_covariance, RelativePose};
pub use two_view::{agreement, evidence, verify, Degeneracy, Failure, Method, Verification, VerifyConfig, View, NO_SPREAD};
