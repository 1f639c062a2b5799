//! A decision as a list of candidates, each with what became of it.

use super::geometry::Checked;
use crate::map::{Around, Hit, Map};
use crate::pipeline::{Decision, LoopDetector, Outcome, Reason};

/// How query and match are related.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// Of one run.
    IntraSession,
    /// Of two runs of one robot.
    InterSession,
    /// Of two robots.
    InterRobot,
    /// The first closure after a relocalization was asked for.
    Relocalization,
}

/// Why a candidate is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The detector's reason.
    Detector(Reason),
    /// The same place as a better candidate.
    Duplicate,
}

/// What became of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// A closure.
    Accepted,
    /// More keyframes in a row must point there.
    Pending,
    /// No closure.
    Rejected(Why),
}

impl Standing {
    /// In tables and pictures.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accepted => "ACCEPTED",
            Self::Pending => "PENDING",
            Self::Rejected(Why::Duplicate) => "DUPLICATE",
            Self::Rejected(Why::Detector(reason)) => reason.name(),
        }
    }
}

/// One earlier place that a keyframe may show.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Row of the match, until the next keyframe.
    pub row: usize,
    /// Its id.
    pub id: u64,
    /// Which robot saw it.
    pub robot: u32,
    /// In which run.
    pub session: u32,
    /// Its stamp, nanoseconds.
    pub stamp_ns: i64,
    /// How it is related to the query.
    pub relation: Relation,
    /// Cosine similarity.
    pub similarity: f32,
    /// Lead of the best place over the second; of the first candidate only.
    pub margin: Option<f32>,
    /// Probability that it is true; of the first candidate of a keyframe, with `publish.calibration` only.
    pub confidence: Option<f32>,
    /// 0 is the best.
    pub rank: usize,
    /// Keyframes in a row that point there; 0 for all but the first candidate.
    pub consistent_count: usize,
    /// Stamp of the query less its own, seconds.
    pub time_gap_s: f64,
    /// What became of it.
    pub standing: Standing,
    /// What its geometry says; `None` where it was not looked at.
    pub checked: Option<Checked>,
}

/// Who asks: robot, session and stamp of the query.
#[derive(Clone, Copy, Debug)]
pub struct Asking {
    /// Number of the robot.
    pub robot: u32,
    /// Number of its run.
    pub session: u32,
    /// Nanoseconds.
    pub stamp_ns: i64,
}

fn candidate(map: &Map, asking: Asking, rank: usize, hit: Hit, standing: Standing) -> Candidate {
    let k = &map.keyframes()[hit.row];
    let relation = match (k.robot == asking.robot, k.session == asking.session) {
        (false, _) => Relation::InterRobot,
        (true, true) => Relation::IntraSession,
        (true, false) => Relation::InterSession,
    };
    Candidate {
        row: hit.row,
        id: map.id_of(hit.row),
        robot: k.robot,
        session: k.session,
        stamp_ns: k.stamp_ns,
        relation,
        similarity: hit.similarity,
        margin: None,
        confidence: None,
        rank,
        consistent_count: 0,
        time_gap_s: asking.stamp_ns.saturating_sub(k.stamp_ns) as f64 * 1e-9,
        standing,
        checked: None,
    }
}

/// What keeps any but the first hit from being the closure.
fn also_ran(detector: &LoopDetector, best: &Around, hit: Hit) -> Why {
    if hit.similarity < detector.threshold() {
        Why::Detector(Reason::LowSimilarity)
    } else if best.holds(detector.map().place(hit.row)) {
        Why::Duplicate
    } else {
        Why::Detector(Reason::Ambiguous)
    }
}

fn list(detector: &LoopDetector, asking: Asking, hits: &[Hit], first: Standing, limit: usize) -> Vec<Candidate> {
    let Some(best) = hits.first() else { return Vec::new() };
    let best = detector.map().around(best.row, detector.config().decision.place_radius);
    let standing = |rank: usize, hit: Hit| if rank == 0 { first } else { Standing::Rejected(also_ran(detector, &best, hit)) };
    hits.iter().take(limit).enumerate().map(|(rank, hit)| candidate(detector.map(), asking, rank, *hit, standing(rank, *hit))).collect()
}

/// The candidates of a keyframe, `limit` at most.
pub fn of_decision(detector: &LoopDetector, asking: Asking, decision: &Decision, limit: usize) -> Vec<Candidate> {
    let waits = decision.evidence.is_some_and(|e| e.consistent_count < detector.config().decision.min_consistent);
    let first = match decision.outcome {
        Outcome::Closure => Standing::Accepted,
        Outcome::Rejected(Reason::NotConsistent) if waits => Standing::Pending,
        Outcome::Rejected(reason) => Standing::Rejected(Why::Detector(reason)),
    };
    let mut all = list(detector, asking, &decision.hits, first, limit);
    if let (Some(c), Some(e)) = (all.first_mut(), decision.evidence) {
        (c.margin, c.consistent_count) = (e.margin, e.consistent_count);
        if decision.relocalized {
            c.relation = Relation::Relocalization;
        }
    }
    all
}

/// The candidates of an image that was only asked about: similarity and margin decide.
pub fn of_query(detector: &LoopDetector, asking: Asking, hits: &[Hit], second: Option<Hit>) -> Vec<Candidate> {
    let Some(best) = hits.first() else { return Vec::new() };
    let margin = second.map(|s| best.similarity - s.similarity);
    let first = if best.similarity < detector.threshold() {
        Standing::Rejected(Why::Detector(Reason::LowSimilarity))
    } else if margin.is_some_and(|m| f64::from(m) < detector.min_margin()) {
        Standing::Rejected(Why::Detector(Reason::Ambiguous))
    } else {
        Standing::Accepted
    };
    let mut all = list(detector, asking, hits, first, hits.len());
    all[0].margin = margin;
    all
}
