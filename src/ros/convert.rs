//! Our types as messages.

use crate::bag::messages::Header;
use crate::config::PublishConfig;
use crate::descriptor::{Descriptor, ModelIdentity};
use crate::geometry::{transformed_covariance, Method};
use crate::image::RgbImage;
use crate::live::candidate::{Candidate, Relation, Standing, Why};
use crate::live::geometry::Checked;
use crate::live::stats::Timings;
use crate::live::{Keyed, Point, Scene};
use crate::pipeline::Reason;
use nalgebra::{Isometry3, Matrix6};
use r2r::builtin_interfaces::msg::Time;
use r2r::geometry_msgs::msg::{Pose, PoseWithCovariance, PoseWithCovarianceStamped};
use r2r::sensor_msgs::msg::Image;
use r2r::std_msgs::msg::{ColorRGBA, Float64MultiArray, Header as HeaderMsg};
use r2r::structvpr::msg::{GeometricVerification, KeyframeDescriptor, KeyframeId, LoopClosureCandidate as Msg, LoopClosureCandidates};
use r2r::visualization_msgs::msg::{Marker, MarkerArray};

/// Nanoseconds as a message; rounds nothing.
pub fn time(stamp_ns: i64) -> Time {
    Time { sec: stamp_ns.div_euclid(1_000_000_000) as i32, nanosec: stamp_ns.rem_euclid(1_000_000_000) as u32 }
}

/// A message's stamp in nanoseconds.
pub fn nanoseconds(time: &Time) -> i64 {
    i64::from(time.sec) * 1_000_000_000 + i64::from(time.nanosec)
}

/// Stamp and frame.
pub fn header(h: &Header) -> HeaderMsg {
    HeaderMsg { stamp: time(h.stamp_ns), frame_id: h.frame_id.clone() }
}

/// `id`: `None` where it is not in the map.
pub fn keyframe_id(robot: u32, session: u32, id: Option<u64>, stamp_ns: i64) -> KeyframeId {
    // NOT_IN_MAP is the largest number, which C's enums, and so r2r's constants, cannot hold.
    let keyframe_id = id.unwrap_or(u64::MAX);
    KeyframeId { robot_id: robot, session_id: session.into(), keyframe_id, stamp: time(stamp_ns) }
}

fn reject_reason(why: Why) -> u8 {
    match why {
        Why::Duplicate => Msg::DUPLICATE as u8,
        Why::Detector(Reason::TooRecent) => Msg::TOO_RECENT as u8,
        Why::Detector(Reason::LowSimilarity) => Msg::LOW_SIMILARITY as u8,
        Why::Detector(Reason::Ambiguous) => Msg::AMBIGUOUS as u8,
        Why::Detector(Reason::NotConsistent) => Msg::NOT_CONSISTENT as u8,
        Why::Detector(Reason::PoseGate) => Msg::POSE_GATE as u8,
        Why::Detector(Reason::Geometry) => Msg::GEOMETRY as u8,
        Why::Detector(Reason::RateLimit) => Msg::RATE_LIMIT as u8,
    }
}

fn candidate(query: &KeyframeId, c: &Candidate) -> Msg {
    let (decision, reject_reason) = match c.standing {
        Standing::Accepted => (Msg::ACCEPTED as u8, Msg::NONE as u8),
        Standing::Pending => (Msg::PENDING as u8, Msg::NOT_CONSISTENT as u8),
        Standing::Rejected(why) => (Msg::REJECTED as u8, reject_reason(why)),
    };
    let kind = match c.relation {
        Relation::IntraSession => Msg::INTRA_SESSION as u8,
        Relation::InterSession => Msg::INTER_SESSION as u8,
        Relation::InterRobot => Msg::INTER_ROBOT as u8,
        Relation::Relocalization => Msg::RELOCALIZATION as u8,
    };
    let short = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
    Msg {
        query: query.clone(),
        match_: keyframe_id(c.robot, c.session, Some(c.id), c.stamp_ns),
        kind,
        similarity: c.similarity,
        confidence: c.confidence.unwrap_or(f32::NAN),
        margin: c.margin.unwrap_or(f32::NAN),
        rank: short(c.rank),
        consistent_count: short(c.consistent_count),
        time_gap_s: c.time_gap_s as f32,
        decision,
        reject_reason,
        verification: c.checked.iter().map(verification).collect(),
    }
}

/// What the geometry of a pair says.
pub fn verification(c: &Checked) -> GeometricVerification {
    let short = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let mut pose = PoseWithCovariance::default();
    // No pose is known to be the identity: a quaternion of zeros cannot be taken for one.
    pose.pose.orientation.w = 0.0;
    if let Some((p, covariance)) = &c.pose {
        pose.pose = self::pose(p);
        pose.covariance = row_major(covariance);
    }
    GeometricVerification {
        method: match c.method {
            Method::Auto | Method::Fundamental => GeometricVerification::FUNDAMENTAL as u8,
            Method::Essential => GeometricVerification::ESSENTIAL as u8,
            Method::Homography => GeometricVerification::HOMOGRAPHY as u8,
            Method::Pnp => GeometricVerification::PNP as u8,
        },
        success: c.success,
        scale_known: c.scale_known,
        keypoints_query: short(c.keypoints[0]),
        keypoints_match: short(c.keypoints[1]),
        matches: short(c.matches),
        inliers: short(c.inliers),
        inlier_ratio: if c.matches > 0 { c.inliers as f32 / c.matches as f32 } else { 0.0 },
        coverage: c.coverage as f32,
        mean_error_px: c.mean_error_px as f32,
        t_match_query: pose,
        seed: c.seed,
    }
}

/// What names a map and its state.
#[derive(Clone, Debug)]
pub struct MapState<'a> {
    /// Of the map.
    pub id: &'a str,
    /// Grows.
    pub revision: u64,
    /// Of the detector's settings.
    pub config_hash: &'a str,
}

/// All candidates of one query.
pub fn candidates(
    header: HeaderMsg,
    query: KeyframeId,
    camera: &str,
    map: &MapState,
    found: &[Candidate],
    timings: &Timings,
) -> LoopClosureCandidates {
    LoopClosureCandidates {
        header,
        candidates: found.iter().map(|c| candidate(&query, c)).collect(),
        query,
        camera: camera.into(),
        map_id: map.id.into(),
        config_hash: map.config_hash.into(),
        map_revision: map.revision,
        descriptor_ms: timings.describe,
        search_ms: timings.search,
        verify_ms: timings.verify,
        total_ms: timings.total,
    }
}

/// The id of a keyframe.
pub fn query_id(robot: u32, keyed: &Keyed) -> KeyframeId {
    keyframe_id(robot, keyed.decision.session, keyed.id, keyed.header.stamp_ns)
}

/// The descriptor, f32 little-endian.
pub fn descriptor(h: &Header, id: KeyframeId, camera: &str, model: &ModelIdentity, d: &Descriptor) -> KeyframeDescriptor {
    KeyframeDescriptor {
        header: header(h),
        id,
        camera: camera.into(),
        model_id: model.name.clone(),
        model_sha256: model.sha256.clone(),
        encoding: KeyframeDescriptor::F32 as u8,
        dim: d.dim() as u32,
        scale: 1.0,
        data: d.as_slice().iter().flat_map(|v| v.to_le_bytes()).collect(),
        l2_normalized: true,
    }
}

/// Stamps of query and match, seconds: what LIO-SAM and LVI-SAM listen for.
pub fn match_stamps(query_ns: i64, match_ns: i64) -> Float64MultiArray {
    let seconds = |ns: i64| ns as f64 * 1e-9;
    Float64MultiArray { data: vec![seconds(query_ns), seconds(match_ns)], ..Default::default() }
}

/// A pose as a message.
pub fn pose(p: &Isometry3<f64>) -> Pose {
    let (t, q) = (p.translation.vector, p.rotation.coords);
    let mut m = Pose::default();
    (m.position.x, m.position.y, m.position.z) = (t.x, t.y, t.z);
    (m.orientation.x, m.orientation.y, m.orientation.z, m.orientation.w) = (q.x, q.y, q.z, q.w);
    m
}

/// Row-major 6 x 6, x y z rx ry rz: a recognised place says where the robot is to some metres.
pub fn place_covariance(settings: &PublishConfig) -> Vec<f64> {
    let (position, angle) = (settings.place_sigma_m.powi(2), settings.place_sigma_deg.to_radians().powi(2));
    let mut c = vec![0.0; 36];
    (0..6).for_each(|i| c[7 * i] = if i < 3 { position } else { angle });
    c
}

/// `T_match_query` in metres with its covariance: measured, or that of a place that was recognised and no more. An
/// unscaled translation is no pose in metres.
fn relative(c: &Candidate, settings: &PublishConfig) -> (Isometry3<f64>, Vec<f64>) {
    match c.checked.filter(|c| c.success && c.scale_known).and_then(|c| c.pose) {
        Some((pose, covariance)) => (pose, row_major(&covariance)),
        None => (Isometry3::identity(), place_covariance(settings)),
    }
}

fn row_major(covariance: &Matrix6<f64>) -> Vec<f64> {
    (0..36).map(|i| covariance[(i / 6, i % 6)]).collect()
}

/// The pose at the query's stamp: the match's, `p`, with the way from there where it was measured.
pub fn match_pose(
    stamp_ns: i64,
    frame_id: String,
    p: &Isometry3<f64>,
    c: &Candidate,
    settings: &PublishConfig,
) -> PoseWithCovarianceStamped {
    let (way, own) = relative(c, settings);
    let covariance = match c.checked.filter(|c| c.success && c.scale_known).and_then(|c| c.pose) {
        Some((way, measured)) => row_major(&transformed_covariance(p, &measured, &way, &Isometry3::identity())),
        None => own,
    };
    PoseWithCovarianceStamped {
        header: HeaderMsg { stamp: time(stamp_ns), frame_id },
        pose: PoseWithCovariance { pose: pose(&(p * way)), covariance },
    }
}

/// `rgb8`.
pub fn image(h: &Header, image: RgbImage) -> Image {
    let (width, height) = (image.width(), image.height());
    Image { header: header(h), height, width, encoding: "rgb8".into(), is_bigendian: 0, step: 3 * width, data: image.data().to_vec() }
}

/// Nodes, accepted edges in green, refused ones in red.
pub fn markers(scene: &Scene, stamp: Time, frame_id: &str) -> MarkerArray {
    let at = |p: &Point| r2r::geometry_msgs::msg::Point { x: p[0], y: p[1], z: p[2] };
    let marker = |ns: &str, id: i32, type_: i32, width: f64, rgb: [f32; 3], points: Vec<r2r::geometry_msgs::msg::Point>| {
        let mut m = Marker {
            header: HeaderMsg { stamp: stamp.clone(), frame_id: frame_id.into() },
            ns: ns.into(),
            id,
            type_,
            // A marker without points is an error in viewers; it is deleted instead.
            action: if points.is_empty() { Marker::DELETE as i32 } else { Marker::ADD as i32 },
            color: ColorRGBA { r: rgb[0], g: rgb[1], b: rgb[2], a: 1.0 },
            points,
            ..Default::default()
        };
        (m.scale.x, m.scale.y, m.scale.z) = (width, width, width);
        m.pose.orientation.w = 1.0;
        m
    };
    let ends = |edges: &[(Point, Point)]| edges.iter().flat_map(|(a, b)| [at(a), at(b)]).collect();
    let (spheres, lines) = (Marker::SPHERE_LIST as i32, Marker::LINE_LIST as i32);
    MarkerArray {
        markers: vec![
            marker("loop_nodes", 0, spheres, 0.3, [0.2, 0.4, 0.9], scene.nodes.iter().map(at).collect()),
            marker("loop_edges", 0, lines, 0.15, [0.1, 0.7, 0.2], ends(&scene.accepted)),
            marker("loop_edges", 1, lines, 0.05, [0.8, 0.1, 0.1], ends(&scene.refused)),
        ],
    }
}

/// Two nodes and an edge that says: the same place, as far as place recognition can tell. The relative
/// pose is not measured, so it is the identity with the covariance of a place.
// Versions of these messages differ in fields that we do not fill.
#[allow(clippy::needless_update)]
#[cfg(has_pose_graph_tools_msgs)]
pub fn pose_graph(
    keyed: &Keyed,
    frame_id: &str,
    robot: u32,
    c: &Candidate,
    settings: &PublishConfig,
) -> r2r::pose_graph_tools_msgs::msg::PoseGraph {
    use r2r::pose_graph_tools_msgs::msg::{PoseGraph, PoseGraphEdge, PoseGraphNode};
    let at = |stamp_ns: i64| HeaderMsg { stamp: time(stamp_ns), frame_id: frame_id.into() };
    let node = |robot: u32, id: u64, stamp_ns: i64, p: Option<Isometry3<f64>>| {
        Some(PoseGraphNode { header: at(stamp_ns), robot_id: robot as i32, key: id, pose: pose(&p?), ..Default::default() })
    };
    let (query, stamp_ns) = (keyed.id.unwrap_or(u64::MAX), keyed.header.stamp_ns);
    let (way, covariance) = relative(c, settings);
    let edge = PoseGraphEdge {
        header: at(stamp_ns),
        key_from: c.id,
        key_to: query,
        robot_from: c.robot as i32,
        robot_to: robot as i32,
        type_: PoseGraphEdge::LOOPCLOSE as i32,
        pose: pose(&way),
        covariance,
        ..Default::default()
    };
    let ends = [node(c.robot, c.id, c.stamp_ns, keyed.match_pose), node(robot, query, stamp_ns, keyed.odom_from_base)];
    PoseGraph { header: at(stamp_ns), nodes: ends.into_iter().flatten().collect(), edges: vec![edge], ..Default::default() }
}
