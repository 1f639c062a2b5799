//! What is published of a keyframe. Lives on the worker's thread.

use super::convert;
use crate::config::{QosConfig, TopicQos};
use crate::live::candidate::Standing;
use crate::live::{Engine, Keyed};
use r2r::geometry_msgs::msg::PoseWithCovarianceStamped;
use r2r::qos::{DurabilityPolicy, HistoryPolicy, ReliabilityPolicy};
use r2r::sensor_msgs::msg::Image;
use r2r::std_msgs::msg::Float64MultiArray;
use r2r::structvpr::msg::{KeyframeDescriptor, LoopClosureCandidates};
use r2r::{Node, Publisher, QosProfile};
use std::sync::Arc;

/// A topic's settings as r2r has them.
pub fn qos(topic: &TopicQos) -> QosProfile {
    let reliability = if topic.reliability == "reliable" { ReliabilityPolicy::Reliable } else { ReliabilityPolicy::BestEffort };
    let durability = if topic.durability == "transient_local" { DurabilityPolicy::TransientLocal } else { DurabilityPolicy::Volatile };
    QosProfile { history: HistoryPolicy::KeepLast, depth: topic.depth, reliability, durability, ..QosProfile::sensor_data() }
}

/// The publishers of keyframes.
pub struct Publishers {
    candidates: Publisher<LoopClosureCandidates>,
    descriptor: Publisher<KeyframeDescriptor>,
    stamps: Publisher<Float64MultiArray>,
    pose: Publisher<PoseWithCovarianceStamped>,
    image: Publisher<Image>,
    #[cfg(has_pose_graph_tools_msgs)]
    graph: Publisher<r2r::pose_graph_tools_msgs::msg::PoseGraph>,
    logger: String,
}

impl Publishers {
    /// Creates them.
    pub fn new(node: &mut Node, topics: &QosConfig) -> r2r::Result<Self> {
        Ok(Self {
            candidates: node.create_publisher("~/candidates", qos(&topics.candidates))?,
            descriptor: node.create_publisher("~/keyframe_descriptor", qos(&topics.keyframe_descriptor))?,
            stamps: node.create_publisher("~/match_stamps", qos(&topics.match_stamps))?,
            pose: node.create_publisher("~/match_pose", qos(&topics.match_pose))?,
            image: node.create_publisher("~/match_image", qos(&topics.match_image))?,
            #[cfg(has_pose_graph_tools_msgs)]
            graph: node.create_publisher("~/pose_graph", qos(&topics.pose_graph))?,
            logger: node.logger().to_string(),
        })
    }

    /// Publishes all that is to be said of a keyframe, the decision first, and notes its times.
    pub fn publish(&self, engine: &Arc<Engine>, keyed: &Keyed) {
        let settings = engine.settings().publish;
        let camera = &engine.cameras()[keyed.camera];
        let id = convert::query_id(engine.robot(), keyed);
        let hash = engine.config_hash();
        let map = convert::MapState { id: &keyed.map_id, revision: keyed.map_revision, config_hash: &hash };
        let mut timings = keyed.timings;
        timings.total = keyed.age_ms();
        let message = convert::candidates(convert::header(&keyed.header), id.clone(), camera, &map, &keyed.candidates, &timings);
        self.check("~/candidates", self.candidates.publish(&message));
        timings.total = keyed.age_ms();
        engine.published(&timings);
        self.closure(engine, keyed);
        if settings.descriptors {
            let message = convert::descriptor(&keyed.header, id, camera, engine.model().identity(), &keyed.descriptor);
            self.check("~/keyframe_descriptor", self.descriptor.publish(&message));
        }
        if self.image.get_inter_process_subscription_count().unwrap_or(0) > 0 {
            if let Some(picture) = engine.picture(keyed) {
                self.check("~/match_image", self.image.publish(&convert::image(&keyed.header, picture)));
            }
        }
    }

    fn closure(&self, engine: &Arc<Engine>, keyed: &Keyed) {
        let Some(c) = keyed.candidates.first().filter(|c| c.standing == Standing::Accepted) else { return };
        let settings = engine.settings().publish;
        let stamp_ns = keyed.header.stamp_ns;
        self.check("~/match_stamps", self.stamps.publish(&convert::match_stamps(stamp_ns, c.stamp_ns)));
        // An earlier session's odometry frame is not this one's, whatever its name.
        let same = c.session == keyed.decision.session && c.robot == engine.robot();
        let frame = if same { engine.odometry_frame() } else { settings.map_frame.clone() };
        if let Some(pose) = &keyed.match_pose {
            self.check("~/match_pose", self.pose.publish(&convert::match_pose(stamp_ns, frame.clone(), pose, c, &settings)));
        }
        #[cfg(has_pose_graph_tools_msgs)]
        if keyed.decision.added {
            let graph = convert::pose_graph(keyed, &frame, engine.robot(), c, &settings);
            self.check("~/pose_graph", self.graph.publish(&graph));
        }
        r2r::log_debug!(
            &self.logger,
            "loop closed: {} s onto {} s, similarity {:.3}",
            stamp_ns as f64 * 1e-9,
            c.stamp_ns as f64 * 1e-9,
            c.similarity
        );
    }

    fn check(&self, topic: &str, result: r2r::Result<()>) {
        if let Err(e) = result {
            r2r::log_error!(&self.logger, "{topic}: the message could not be published: {e}");
        }
    }
}
