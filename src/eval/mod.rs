//! Scores: pure functions on arrays. No file is opened here but by [`report`]'s callers.

mod loops;
mod npy;
mod pr;
mod recall;
pub mod report;

pub use loops::{same_place, score_run, KeyframeTruth, LoopScores, RunKeyframe, Verdict};
pub use npy::{read_matrix, read_npz_matrices, write_npy, write_npy_i64, write_npz, zip_npy, Matrix};
pub use pr::{PrCurve, PrPoint, Scored};
pub use recall::{rank_all, recall_at, Recall, RECALL_AT};
