//! The map: keyframes, their descriptors, and the closures accepted so far.
//!
//! Knows nothing of images, models or ROS: descriptors come in, neighbours go out.

mod dot;
mod index;
mod store;

pub use dot::{dot, scores};
pub use index::{Hit, Index};

use crate::descriptor::{Descriptor, ModelIdentity};
use crate::error::Result;
use nalgebra::Isometry3;
use std::ops::Range;

/// One remembered place.
#[derive(Clone, Debug, PartialEq)]
pub struct Keyframe {
    /// Which run added it, counting from 0.
    pub session: u32,
    /// Header stamp, nanoseconds.
    pub stamp_ns: i64,
    /// File name or topic, for reports.
    pub name: String,
    /// `T_odom_base` at the stamp, metres; of its own session only.
    pub odom_from_base: Option<Isometry3<f64>>,
}

/// An accepted closure between two rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Row of the query.
    pub query: usize,
    /// Row of the match.
    pub matched: usize,
}

/// Keyframes in order of insertion; a keyframe's id is its row.
#[derive(Clone, Debug, Default)]
pub struct Map {
    model: ModelIdentity,
    keyframes: Vec<Keyframe>,
    index: Index,
    links: Vec<Link>,
}

impl Map {
    /// An empty map for descriptors of `model`.
    pub fn new(model: ModelIdentity) -> Self {
        Self { model, ..Self::default() }
    }

    /// Which model its descriptors are from.
    pub fn model(&self) -> &ModelIdentity {
        &self.model
    }

    /// All keyframes; the position is the id.
    pub fn keyframes(&self) -> &[Keyframe] {
        &self.keyframes
    }

    /// Their descriptors.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Accepted closures in order of acceptance.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// The session number that a new run takes.
    pub fn next_session(&self) -> u32 {
        self.keyframes.iter().map(|k| k.session + 1).max().unwrap_or(0)
    }

    /// Adds a keyframe; returns its id.
    ///
    /// Errors: a descriptor of another dimension; then nothing is added.
    pub fn push(&mut self, keyframe: Keyframe, descriptor: &Descriptor) -> Result<usize> {
        self.index.push(descriptor)?;
        self.keyframes.push(keyframe);
        Ok(self.keyframes.len() - 1)
    }

    /// Remembers an accepted closure.
    pub fn link(&mut self, link: Link) {
        self.links.push(link);
    }

    /// The rows that a query of `session` at `stamp_ns` may match: every other session, and of its
    /// own all but the last `keyframes` rows and those younger than `seconds`.
    pub fn outside_window(&self, session: u32, stamp_ns: i64, seconds: f64, keyframes: usize) -> Vec<Range<usize>> {
        let window = (seconds * 1e9) as i64;
        let own_end = self.keyframes.len().saturating_sub(keyframes);
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for (row, keyframe) in self.keyframes.iter().enumerate() {
            let open = keyframe.session != session || (row < own_end && stamp_ns.saturating_sub(keyframe.stamp_ns) >= window);
            if open {
                match ranges.last_mut() {
                    Some(last) if last.end == row => last.end += 1,
                    _ => ranges.push(row..row + 1),
                }
            }
        }
        ranges
    }

    /// Whether rows `a` and `b` show one place: at most `radius` rows apart in one session, or
    /// joined by an accepted closure whose ends are that near to them.
    pub fn same_place(&self, a: usize, b: usize, radius: usize) -> bool {
        let near = |a: usize, b: usize| a.abs_diff(b) <= radius && self.keyframes[a].session == self.keyframes[b].session;
        near(a, b) || self.links.iter().any(|l| (near(a, l.query) && near(b, l.matched)) || (near(b, l.query) && near(a, l.matched)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyframe(session: u32, seconds: i64) -> Keyframe {
        Keyframe { session, stamp_ns: seconds * 1_000_000_000, name: String::new(), odom_from_base: None }
    }

    fn map(keyframes: &[(u32, i64)]) -> Map {
        let mut map = Map::new(ModelIdentity::default());
        let d = Descriptor::new(vec![1.0, 0.0]).unwrap();
        for (session, seconds) in keyframes {
            map.push(keyframe(*session, *seconds), &d).unwrap();
        }
        map
    }

    #[test]
    fn the_exclusion_window_is_time_and_count_and_own_session_only() {
        let m = map(&[(0, 0), (0, 1), (1, 0), (1, 10), (1, 50), (1, 51), (1, 52)]);
        let at = |seconds: i64, s: f64, n| m.outside_window(1, seconds * 1_000_000_000, s, n);
        assert_eq!(at(53, 20.0, 0), [0..4], "by time");
        assert_eq!(at(53, 0.0, 2), [0..5], "by count");
        assert_eq!(at(53, 20.0, 5), [0..2], "the stricter of both");
        assert_eq!(at(53, 1e9, 100), [0..2], "other sessions are never excluded");
        // A stamp from before the map: everything of this session is in the future.
        assert_eq!(at(-100, 20.0, 0), [0..2]);
    }

    #[test]
    fn closures_join_places_so_that_a_third_lap_is_not_ambiguous() {
        let mut m = map(&(0..60).map(|i| (0, i)).collect::<Vec<_>>());
        assert!(m.same_place(10, 14, 5) && !m.same_place(10, 40, 5));
        m.link(Link { query: 41, matched: 11 });
        assert!(m.same_place(10, 40, 5) && m.same_place(40, 10, 5));
        assert!(!m.same_place(10, 50, 5));
    }
}
