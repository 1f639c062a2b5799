//! Settings of the ROS 2 node that the offline tools do not need: topics, queues, files, what to publish.

use super::setting::{section, Kind, Section, Setting};
use crate::error::{Error, Result};
use nalgebra::{Isometry3, Translation3, UnitQuaternion, Vector3};
use serde::{Deserialize, Serialize};

section! {
    /// What the node listens to.
    InputConfig {
        /// Names of the cameras. With one, its topics are `image` and `camera_info`; with several,
        /// `NAME/image` and `NAME/camera_info`. Remap them to your driver's.
        cameras: Vec<String> = ["camera".to_string()], Kind::Names, restart;
        /// `raw` subscribes `image` (sensor_msgs/Image), `compressed` `image/compressed`
        /// (sensor_msgs/CompressedImage, JPEG or PNG).
        image_transport: String = "raw", Kind::Choice(&["raw", "compressed"]), restart;
        /// Remove lens distortion with `camera_info` before describing; images before the first
        /// `camera_info` are dropped.
        undistort: bool = false, Kind::Flag, restart;
        /// Listen to `odom` (nav_msgs/Odometry): gates by distance, nothing added while parked.
        odometry: bool = true, Kind::Flag, restart;
        /// Listen to `depth` (sensor_msgs/Image of the same view, 16UC1 in millimetres or 32FC1 in metres);
        /// with several cameras `NAME/depth`. Verified matches then have a pose in metres; see also
        /// `keyframe.min_depth_m`.
        depth: bool = false, Kind::Flag, restart;
        /// Where each camera sits on the robot, `x y z roll pitch yaw` (metres and degrees; zeros: at the base,
        /// looking ahead), separated by `;` in the order of `cameras`; empty: zeros. Poses between images are of
        /// the robot's base.
        camera_poses: String = "", Kind::Text, restart;
        /// Where odometry arrives: how long an image waits for the pose after it, seconds. The wait
        /// passes while the image is described.
        odometry_wait_s: f64 = 0.1, Kind::Real(0.0, 10.0), live;
        /// Images that wait per camera; when one more comes the oldest is dropped, and counted.
        queue_depth: usize = 4usize, Kind::Count(1, 1000), live;
        /// After so long without an image the log and the diagnostics say why, seconds.
        no_image_s: f64 = 3.0, Kind::Real(0.1, 3600.0), live;
    }
}

impl InputConfig {
    /// `T_base_optical` of a camera: its optical frame has x to the right, y down and z ahead (REP-103).
    ///
    /// Errors: `camera_poses` is not as it should be.
    pub fn camera_pose(&self, camera: usize) -> Result<Isometry3<f64>> {
        let optical = UnitQuaternion::from_euler_angles(-std::f64::consts::FRAC_PI_2, 0.0, -std::f64::consts::FRAC_PI_2);
        let ahead = Isometry3::from_parts(Translation3::identity(), optical);
        if self.camera_poses.trim().is_empty() {
            return Ok(ahead);
        }
        let bad = || Error::Config {
            field: "input.camera_poses".into(),
            value: format!("\"{}\"", self.camera_poses),
            allowed: format!("{} times six numbers `x y z roll pitch yaw`, separated by `;`", self.cameras.len()),
        };
        let all: Option<Vec<[f64; 6]>> = self
            .camera_poses
            .split(';')
            .map(|one| {
                let numbers: Option<Vec<f64>> = one.split_whitespace().map(|n| n.parse().ok().filter(|v: &f64| v.is_finite())).collect();
                numbers?.try_into().ok()
            })
            .collect();
        let all = all.filter(|all| all.len() == self.cameras.len()).ok_or_else(bad)?;
        let [x, y, z, roll, pitch, yaw] = *all.get(camera).ok_or_else(bad)?;
        let turn = UnitQuaternion::from_euler_angles(roll.to_radians(), pitch.to_radians(), yaw.to_radians());
        Ok(Isometry3::from_parts(Vector3::new(x, y, z).into(), turn) * ahead)
    }
}

section! {
    /// The descriptor model.
    ModelConfig {
        /// Weight file; empty: the shipped one.
        file: String = "", Kind::Text, restart;
        /// Where the model runs: `cpu`, or `cuda:N` in a build with the feature `cuda`.
        device: String = "cpu", Kind::Text, restart;
        /// What the model computes in. `bf16` (cpu) is faster where the processor has AMX or AVX-512 BF16 (since Zen 4), and f32 elsewhere; `int8`
        /// (cpu) is faster where it has VNNI, and may be slower where it has not even AVX2; `f16` is for CUDA. Descriptors of all compare,
        /// so that a map of one serves the others.
        compute: String = "f32", Kind::Choice(&["f32", "f16", "bf16", "int8"]), restart;
        /// Threads of the model; 0: all cores.
        threads: usize = 0usize, Kind::Count(0, 1024), restart;
    }
}

section! {
    /// The map and its file.
    MapConfig {
        /// Loaded at start if it is there, and written as the map grows; empty: the map
        /// lives in memory only, unless `~/save_map` is called.
        file: String = "", Kind::Text, restart;
        /// A keyframe is on the disk so long after it was added, at the latest, seconds: what a power cut may cost.
        durable_s: f64 = 1.0, Kind::Real(0.05, 3600.0), live;
        /// Keyframes that the map holds at most; 0: no limit. When it is full, those go that are most alike to their
        /// neighbours along the drive, so that every place stays covered; ids stay.
        max_keyframes: usize = 0usize, Kind::Count(0, 100_000_000), live;
        /// Width of the small JPEG kept of each keyframe for `~/match_image`, pixels; 0: none.
        thumbnail_width: usize = 240usize, Kind::Count(0, 4096), live;
        /// Look places up without adding any.
        localization_only: bool = false, Kind::Flag, live;
        /// Number of this robot, in every message and in the map.
        robot_id: usize = 0usize, Kind::Count(0, 4_294_967_295), restart;
    }
}

section! {
    /// What the node says.
    PublishConfig {
        /// Matches per keyframe in `~/candidates`, best first.
        max_candidates: usize = 5usize, Kind::Count(1, 1000), live;
        /// File of `structvpr calibrate`: candidates then carry a confidence, the probability that they are true; empty: NaN.
        calibration: String = "", Kind::Text, restart;
        /// Publish `~/keyframe_descriptor`.
        descriptors: bool = false, Kind::Flag, live;
        /// Publish `~/markers`, which need odometry.
        markers: bool = true, Kind::Flag, live;
        /// Frame of poses of earlier sessions, whose odometry frame is not this one's.
        map_frame: String = "map", Kind::Text, live;
        /// How far from the match a recognised place may be, standard deviation, metres: the
        /// covariance of `~/match_pose`.
        place_sigma_m: f64 = 5.0, Kind::Real(0.001, 10000.0), live;
        /// And how far it may be turned, degrees.
        place_sigma_deg: f64 = 20.0, Kind::Real(0.001, 360.0), live;
        /// Time between two messages on `/diagnostics`, seconds.
        diagnostics_period_s: f64 = 1.0, Kind::Real(0.1, 3600.0), restart;
    }
}

/// Quality of service of one topic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopicQos {
    /// `reliable` or `best_effort`.
    pub reliability: String,
    /// Messages kept.
    pub depth: usize,
    /// `volatile` or `transient_local`.
    pub durability: String,
}

impl Section for TopicQos {
    fn table() -> Vec<Setting> {
        let row = |name: &str, kind, doc: &str| Setting { name: name.into(), kind, doc: doc.into(), live: false };
        vec![
            row(
                "reliability",
                Kind::Choice(&["reliable", "best_effort"]),
                "A best-effort publisher is not heard by a reliable subscriber.",
            ),
            row("depth", Kind::Count(1, 10_000), "Messages that the middleware keeps."),
            row(
                "durability",
                Kind::Choice(&["volatile", "transient_local"]),
                "A volatile publisher is not heard by a transient-local subscriber.",
            ),
        ]
    }

    fn field(&mut self, name: &str) -> Option<&mut dyn super::setting::Field> {
        match name {
            "reliability" => Some(&mut self.reliability),
            "depth" => Some(&mut self.depth),
            "durability" => Some(&mut self.durability),
            _ => None,
        }
    }
}

macro_rules! topics {
    ($( $(#[doc = $doc:literal])+ $topic:ident = $reliability:literal, $depth:literal, $durability:literal; )+) => {
        /// Quality of service per topic.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct QosConfig {
            $( $(#[doc = $doc])+ pub $topic: TopicQos, )+
        }

        impl Default for QosConfig {
            fn default() -> Self {
                Self { $( $topic: TopicQos { reliability: $reliability.into(), depth: $depth, durability: $durability.into() }, )+ }
            }
        }

        impl QosConfig {
            /// Names of the topics, in order.
            pub const TOPICS: &'static [&'static str] = &[$( stringify!($topic) ),+];

            /// One topic's, by name.
            pub fn topic(&mut self, name: &str) -> Option<&mut TopicQos> {
                match name {
                    $( stringify!($topic) => Some(&mut self.$topic), )+
                    _ => None,
                }
            }
        }
    };
}

topics! {
    /// In: `image`, `image/compressed`; REP-2003's sensor data.
    image = "best_effort", 5, "volatile";
    /// In: `camera_info`.
    camera_info = "best_effort", 5, "volatile";
    /// In: `odom`.
    odom = "best_effort", 200, "volatile";
    /// In: `depth`.
    depth = "best_effort", 5, "volatile";
    /// Out.
    candidates = "reliable", 100, "volatile";
    /// Out.
    keyframe_descriptor = "reliable", 100, "volatile";
    /// Out.
    match_stamps = "reliable", 100, "volatile";
    /// Out.
    match_pose = "reliable", 100, "volatile";
    /// Out, where `pose_graph_tools_msgs` was there when the node was built.
    pose_graph = "reliable", 100, "volatile";
    /// Out; a viewer that starts late sees the last.
    markers = "reliable", 1, "transient_local";
    /// Out.
    match_image = "best_effort", 5, "volatile";
}

#[cfg(test)]
mod tests {
    use super::*;
    use nalgebra::Point3;

    #[test]
    fn a_camera_looks_where_its_pose_says() {
        let of = |cameras: usize, text: &str| InputConfig {
            cameras: (0..cameras).map(|i| format!("c{i}")).collect(),
            camera_poses: text.into(),
            ..InputConfig::default()
        };
        let ahead = |c: &InputConfig, i| c.camera_pose(i).unwrap() * Point3::new(0.0, 0.0, 2.0);
        let near = |p: Point3<f64>, q: [f64; 3]| assert!((p - Point3::from(q)).norm() < 1e-12, "{p}");
        near(ahead(&of(1, ""), 0), [2.0, 0.0, 0.0]);
        // Down in the image is down.
        near(of(1, "").camera_pose(0).unwrap() * Point3::new(0.0, 1.0, 0.0), [0.0, 0.0, -1.0]);
        let two = of(2, "1 0 0.5 0 0 0; -1 0 0.5 0 0 180");
        near(ahead(&two, 0), [3.0, 0.0, 0.5]);
        near(ahead(&two, 1), [-3.0, 0.0, 0.5]);
        for (n, text) in [(1, "1 2 3"), (2, "0 0 0 0 0 0"), (1, "0 0 0 0 0 x"), (1, "0 0 0 0 0 nan")] {
            let e = of(n, text).camera_pose(0).unwrap_err().to_string();
            assert!(e.contains("input.camera_poses") && e.contains("x y z roll pitch yaw"), "{e}");
        }
    }
}
