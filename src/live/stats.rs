//! Counts and times of a running node.

use crate::pipeline::{Outcome, Skip, Step};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Samples that percentiles are taken over.
const WINDOW: usize = 512;
/// Time that rates are taken over.
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// The last times of one stage.
#[derive(Clone, Debug, Default)]
pub struct Stage(VecDeque<f32>);

impl Stage {
    /// Adds a time, milliseconds.
    pub fn add(&mut self, ms: f32) {
        if self.0.len() == WINDOW {
            self.0.pop_front();
        }
        self.0.push_back(ms);
    }

    /// The time that the share `q` (0 to 1) of the samples did not exceed, milliseconds.
    pub fn percentile(&self, q: f64) -> Option<f32> {
        let mut sorted: Vec<f32> = self.0.iter().copied().collect();
        sorted.sort_by(f32::total_cmp);
        let rank = ((sorted.len() as f64 * q).ceil() as usize).clamp(1, sorted.len().max(1));
        sorted.get(rank - 1).copied()
    }
}

/// Arrivals per second, lately.
#[derive(Clone, Debug, Default)]
pub struct Rate(VecDeque<Instant>);

impl Rate {
    /// Counts an arrival.
    pub fn add(&mut self, now: Instant) {
        self.0.push_back(now);
        self.forget(now);
    }

    fn forget(&mut self, now: Instant) {
        while self.0.front().is_some_and(|t| now.duration_since(*t) > RATE_WINDOW) {
            self.0.pop_front();
        }
    }

    /// Arrivals per second over the last five seconds.
    pub fn per_second(&mut self, now: Instant) -> f64 {
        self.forget(now);
        match (self.0.front(), self.0.len()) {
            (Some(first), n) if n > 1 => {
                let span = now.duration_since(*first).as_secs_f64();
                (n - 1) as f64 / span.max(1e-3)
            }
            _ => 0.0,
        }
    }
}

/// Times of one keyframe, milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// In the queue.
    pub queue: f32,
    /// From message to pixels, undistortion included.
    pub decode: f32,
    /// Preprocessing and network.
    pub describe: f32,
    /// Waiting for the pose after the image.
    pub odometry: f32,
    /// Search and decision.
    pub search: f32,
    /// Local features and geometry.
    pub verify: f32,
    /// From arrival to publication.
    pub total: f32,
}

impl Timings {
    /// What the node adds to the model's own time.
    pub fn added(&self) -> f32 {
        self.total - self.describe
    }
}

/// Everything that diagnostics tell about images.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Images that could not be used, in all and the last one in words.
    pub unusable: u64,
    /// What was wrong with the last of them.
    pub last_unusable: String,
    /// Images that came while paused.
    pub paused: u64,
    /// Keyframes.
    pub keyframes: u64,
    /// Closures.
    pub closures: u64,
    /// Sessions begun because the clock was set, or a relocalization was asked for.
    pub sessions: u64,
    /// Keyframes that went because the map was full (`map.max_keyframes`).
    pub thinned: u64,
    /// By reason: images that became no keyframe, and keyframes that closed no loop.
    pub reasons: BTreeMap<&'static str, u64>,
    stages: [Stage; 7],
}

/// Names of the stages, in order.
pub const STAGES: [&str; 7] = ["queue", "decode", "describe", "odometry", "search", "total", "added"];

impl Stats {
    /// Counts what became of an image.
    pub fn count(&mut self, step: &Step) {
        match step {
            Step::Skipped(skip) => self.skipped(*skip),
            Step::Keyframe(d) => {
                self.keyframes += 1;
                match d.outcome {
                    Outcome::Closure => self.closures += 1,
                    Outcome::Rejected(reason) => *self.reasons.entry(reason.name()).or_insert(0) += 1,
                }
            }
        }
    }

    /// Counts an image that became no keyframe.
    pub fn skipped(&mut self, skip: Skip) {
        *self.reasons.entry(skip.name()).or_insert(0) += 1;
    }

    /// Takes the times of a keyframe.
    pub fn time(&mut self, t: &Timings) {
        let all = [t.queue, t.decode, t.describe, t.odometry, t.search, t.total, t.added()];
        self.stages.iter_mut().zip(all).for_each(|(stage, ms)| stage.add(ms));
    }

    /// Stage, median and 95th percentile, milliseconds; nothing before the first keyframe.
    pub fn stages(&self) -> Vec<(&'static str, f32, f32)> {
        let of = |(name, s): (&&'static str, &Stage)| Some((*name, s.percentile(0.5)?, s.percentile(0.95)?));
        STAGES.iter().zip(&self.stages).filter_map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_last_samples() {
        let mut s = Stage::default();
        assert_eq!(s.percentile(0.5), None);
        (1..=100).for_each(|i| s.add(i as f32));
        assert_eq!(
            (s.percentile(0.5), s.percentile(0.95), s.percentile(0.0), s.percentile(1.0)),
            (Some(50.0), Some(95.0), Some(1.0), Some(100.0))
        );
        (0..WINDOW).for_each(|_| s.add(7.0));
        assert_eq!((s.percentile(0.0), s.0.len()), (Some(7.0), WINDOW));
    }

    #[test]
    fn a_rate_falls_when_nothing_comes() {
        let (mut r, t0) = (Rate::default(), Instant::now());
        let at = |ms: u64| t0 + Duration::from_millis(ms);
        (0..=300).for_each(|i| r.add(at(i * 100)));
        let now = r.per_second(at(30_000));
        assert!((now - 10.0).abs() < 0.3, "{now}");
        assert!(r.0.len() <= 52, "nothing old is kept");
        assert_eq!(r.per_second(at(60_000)), 0.0);
    }
}
