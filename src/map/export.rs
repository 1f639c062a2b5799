//! A map as other tools read it. Text only; who calls writes the files.

use super::store::seconds;
use super::{Keyframe, Map};
use crate::error::{Error, Result};
use nalgebra::{Isometry3, Matrix6};
use serde_json::{json, Value};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// How sure the edges of a graph are, standard deviations.
#[derive(Clone, Copy, Debug)]
pub struct Edges {
    /// Of odometry, metres for each metre.
    pub odometry_m: f64,
    /// Of odometry, degrees for each metre.
    pub odometry_deg: f64,
    /// Of a closure, metres: a place that was recognised, not a pose that was measured.
    pub place_m: f64,
    /// Of a closure, degrees.
    pub place_deg: f64,
}

impl Default for Edges {
    fn default() -> Self {
        Self { odometry_m: 0.05, odometry_deg: 0.5, place_m: 5.0, place_deg: 20.0 }
    }
}

/// Poses of a session, one per stamp (several cameras sit on one base), in order of time: row and pose.
fn trajectory(map: &Map, session: u32) -> Result<Vec<(usize, Isometry3<f64>)>> {
    let of_session = |k: &Keyframe| k.session == session;
    if !map.keyframes.iter().any(of_session) {
        let all: std::collections::BTreeSet<u32> = map.keyframes.iter().map(|k| k.session).collect();
        let all: Vec<String> = all.iter().map(u32::to_string).collect();
        return Err(Error::map(format!("no session {session}; there are {}", if all.is_empty() { "none".into() } else { all.join(", ") })));
    }
    let mut at: BTreeMap<i64, (usize, Isometry3<f64>)> = BTreeMap::new();
    for (row, k) in map.keyframes.iter().enumerate().filter(|(_, k)| of_session(k)) {
        if let Some(pose) = k.odom_from_base {
            at.entry(k.stamp_ns).or_insert((row, pose));
        }
    }
    if at.is_empty() {
        return Err(Error::map(format!("session {session} was recorded without odometry: it has no poses to export")));
    }
    Ok(at.into_values().collect())
}

/// `stamp x y z qx qy qz qw` per line (the TUM format), `T_odom_base` of one session.
///
/// Errors: no such session, or one without poses.
pub fn tum(map: &Map, session: u32) -> Result<String> {
    let mut out = String::new();
    for (row, pose) in trajectory(map, session)? {
        let (t, q) = (pose.translation.vector, pose.rotation.coords);
        let stamp = seconds(map.keyframes[row].stamp_ns);
        // Writing to a string does not fail.
        let _ = writeln!(out, "{stamp} {} {} {} {} {} {} {}", t.x, t.y, t.z, q.x, q.y, q.z, q.w);
    }
    Ok(out)
}

fn edge(out: &mut String, from: u64, to: u64, pose: &Isometry3<f64>, metres: f64, degrees: f64) {
    let (t, q) = (pose.translation.vector, pose.rotation.coords);
    let _ = write!(out, "EDGE_SE3:QUAT {from} {to} {} {} {} {} {} {} {}", t.x, t.y, t.z, q.x, q.y, q.z, q.w);
    let (t, r) = (metres.max(1e-6).powi(-2), degrees.to_radians().max(1e-9).powi(-2));
    let information = Matrix6::from_diagonal(&[t, t, t, r, r, r].into());
    for i in 0..6 {
        for j in i..6 {
            let _ = write!(out, " {}", information[(i, j)]);
        }
    }
    out.push('\n');
}

/// A pose graph for g2o: a vertex per keyframe with a pose (its id), odometry edges along each session, and closures as edges at
/// the identity with a place's covariance. Earlier sessions hang on closures only: their odometry frames are their own.
///
/// Errors: no keyframe has a pose.
pub fn g2o(map: &Map, edges: &Edges) -> Result<String> {
    let (mut vertices, mut out) = (String::new(), String::new());
    // Keyframes of one stamp are one vertex.
    let mut vertex: BTreeMap<(u32, i64), u64> = BTreeMap::new();
    for session in map.keyframes.iter().map(|k| k.session).collect::<std::collections::BTreeSet<_>>() {
        let Ok(poses) = trajectory(map, session) else { continue };
        for (row, pose) in &poses {
            let (t, q, id) = (pose.translation.vector, pose.rotation.coords, map.id_of(*row));
            vertex.insert((session, map.keyframes[*row].stamp_ns), id);
            let _ = writeln!(vertices, "VERTEX_SE3:QUAT {id} {} {} {} {} {} {} {}", t.x, t.y, t.z, q.x, q.y, q.z, q.w);
        }
        for pair in poses.windows(2) {
            let step = pair[0].1.inv_mul(&pair[1].1);
            let length = step.translation.vector.norm().max(0.1);
            let (a, b) = (map.id_of(pair[0].0), map.id_of(pair[1].0));
            edge(&mut out, a, b, &step, edges.odometry_m * length, edges.odometry_deg * length);
        }
    }
    if vertices.is_empty() {
        return Err(Error::map("no keyframe has a pose: the map was made without odometry"));
    }
    let of = |row: usize| vertex.get(&(map.keyframes[row].session, map.keyframes[row].stamp_ns));
    for l in &map.links {
        if let (Some(matched), Some(query)) = (of(l.matched), of(l.query)) {
            edge(&mut out, *matched, *query, &Isometry3::identity(), edges.place_m, edges.place_deg);
        }
    }
    Ok(vertices + &out)
}

/// All but descriptors, pictures and features.
pub fn json(map: &Map) -> Value {
    let pose = |p: &Isometry3<f64>| {
        let (t, q) = (p.translation.vector, p.rotation.coords);
        json!({"xyz": [t.x, t.y, t.z], "xyzw": [q.x, q.y, q.z, q.w]})
    };
    let keyframe = |(row, k): (usize, &Keyframe)| {
        json!({
            "id": map.id_of(row), "robot": k.robot, "session": k.session, "camera": k.camera, "stamp_ns": k.stamp_ns, "name": k.name,
            "position": map.places[row].position, "odom_from_base": k.odom_from_base.as_ref().map(pose),
        })
    };
    let link = |l: &super::Link| {
        let similarity = Some(l.similarity).filter(|s| s.is_finite());
        json!({"query": map.id_of(l.query), "match": map.id_of(l.matched), "similarity": similarity})
    };
    let calibration =
        |((session, camera), c): (&(u32, String), &crate::image::Camera)| json!({"session": session, "camera": camera, "calibration": c});
    json!({
        "id": map.id(),
        "model": map.model,
        "preprocessing": serde_json::from_str::<Value>(&map.preprocessing).unwrap_or(Value::Null),
        "keyframes": map.keyframes.iter().enumerate().map(keyframe).collect::<Vec<_>>(),
        "closures": map.links.iter().map(link).collect::<Vec<_>>(),
        "calibrations": map.calibrations.iter().map(calibration).collect::<Vec<_>>(),
    })
}
