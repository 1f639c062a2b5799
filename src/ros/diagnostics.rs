//! `/diagnostics` and warnings: how the node fares, and why nothing comes.

use super::convert;
use super::names::Names;
use crate::config::TopicQos;
use crate::live::qos::{why_silent, Endpoint};
use crate::live::{CameraReport, Engine};
use r2r::diagnostic_msgs::msg::{DiagnosticArray, DiagnosticStatus, KeyValue};
use r2r::qos::{DurabilityPolicy, ReliabilityPolicy};
use r2r::visualization_msgs::msg::MarkerArray;
use r2r::{Node, Publisher, QosProfile};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A warning is repeated after so long.
const AGAIN: Duration = Duration::from_secs(30);

/// One input topic.
#[derive(Clone, Debug)]
pub struct Input {
    /// As subscribed to.
    pub name: String,
    /// `package/msg/Name`.
    pub type_name: &'static str,
    /// What we ask for.
    pub qos: TopicQos,
}

/// Publishes diagnostics and markers from the thread that spins.
pub struct Diagnostics {
    engine: Arc<Engine>,
    publisher: Publisher<DiagnosticArray>,
    markers: Publisher<MarkerArray>,
    logger: String,
    node: String,
    /// Resolved image topics.
    topics: Vec<String>,
    inputs: Vec<Input>,
    /// When the silence of each camera was last logged.
    warned: Vec<Option<Instant>>,
    dropped: Vec<u64>,
    unusable: u64,
    sessions: u64,
    save_error: Option<String>,
    shown: Option<(u64, u64, usize)>,
}

fn status(level: u8, name: String, message: String, values: Vec<(&str, String)>) -> DiagnosticStatus {
    let values = values.into_iter().map(|(key, value)| KeyValue { key: key.into(), value }).collect();
    DiagnosticStatus { level, name, message, hardware_id: "structvpr".into(), values }
}

const OK: u8 = 0;
const WARN: u8 = 1;
const ERROR: u8 = 2;

/// Resident memory of this process, MiB.
fn memory_mib() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|l| l.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse::<f64>().ok().map(|kb| kb / 1024.0)
}

/// For a node whose name the middleware does not know, yet or at all.
const UNNAMED: &str = "(name unknown)";
/// Seconds that a warning waits for that name.
const PATIENCE: f64 = 2.0;

impl Diagnostics {
    /// Creates the publishers.
    pub fn new(node: &mut Node, engine: &Arc<Engine>, names: &Names, inputs: Vec<Input>) -> r2r::Result<Self> {
        let n = inputs.len();
        Ok(Self {
            engine: engine.clone(),
            publisher: node.create_publisher("/diagnostics", QosProfile::default())?,
            markers: node.create_publisher("~/markers", super::publish::qos(&engine.settings().qos.markers))?,
            logger: node.logger().to_string(),
            node: node.name()?,
            topics: inputs.iter().map(|i| names.topic(&i.name)).collect(),
            inputs,
            warned: vec![None; n],
            dropped: vec![0; n],
            unusable: 0,
            sessions: 0,
            save_error: None,
            shown: None,
        })
    }

    /// Resolved image topics.
    pub fn topics(&self) -> &[String] {
        &self.topics
    }

    /// Looks around, says what it sees.
    pub fn tick(&mut self, node: &Node) {
        let mut all: Vec<DiagnosticStatus> = Vec::new();
        for (i, report) in self.engine.camera_reports().into_iter().enumerate() {
            all.push(self.camera(node, i, &report));
        }
        all.push(self.pipeline());
        all.push(self.map());
        let now = node.get_ros_clock().lock().map(|mut c| c.get_now().unwrap_or_default()).unwrap_or_default();
        let stamp = r2r::Clock::to_builtin_time(&now);
        let array = DiagnosticArray { header: r2r::std_msgs::msg::Header { stamp, ..Default::default() }, status: all };
        if let Err(e) = self.publisher.publish(&array) {
            r2r::log_error!(&self.logger, "/diagnostics: {e}");
        }
        self.scene();
    }

    fn camera(&mut self, node: &Node, i: usize, report: &CameraReport) -> DiagnosticStatus {
        let limit = self.engine.settings().input.no_image_s;
        let silent = report.silent.unwrap_or_else(|| self.engine.age()).as_secs_f64();
        let new_drops = report.level.dropped - self.dropped[i];
        self.dropped[i] = report.level.dropped;
        let topic = &self.topics[i];
        let (level, message) = if silent > limit {
            let why = self.why_silent(node, i);
            let message = format!("no image received on {topic} for {silent:.1} s: {why}");
            // A publisher is found before its node's name is: the next look knows it.
            let named = !message.contains(UNNAMED) || silent > limit + PATIENCE;
            if named && self.warned[i].is_none_or(|at| at.elapsed() > AGAIN) {
                r2r::log_warn!(&self.logger, "{message}");
                self.warned[i] = Some(Instant::now());
            }
            (ERROR, message)
        } else {
            if self.warned[i].take().is_some() {
                r2r::log_info!(&self.logger, "images arrive on {topic}");
            }
            match new_drops {
                0 => (OK, format!("{:.1} Hz", report.rate_hz)),
                n => (WARN, format!("{:.1} Hz, {n} dropped since the last report: the model does not keep up", report.rate_hz)),
            }
        };
        let values = vec![
            ("topic", topic.clone()),
            ("rate_hz", format!("{:.2}", report.rate_hz)),
            ("received", report.received.to_string()),
            ("dropped", report.level.dropped.to_string()),
            ("queue", report.level.waiting.to_string()),
            ("queue_max", report.level.deepest.to_string()),
            ("camera_info", report.calibrated.to_string()),
            ("median_depth_m", report.depth_m.map_or("none".into(), |d| format!("{d:.2}"))),
        ];
        status(level, format!("{}: images of {}", self.node, report.name), message, values)
    }

    fn why_silent(&self, node: &Node, i: usize) -> String {
        let input = &self.inputs[i];
        let ours = Endpoint {
            type_name: input.type_name.into(),
            node: String::new(),
            reliable: input.qos.reliability == "reliable",
            transient_local: input.qos.durability == "transient_local",
        };
        let publishers = match node.get_publishers_info_by_topic(&self.topics[i], false) {
            Ok(found) => found,
            Err(e) => return format!("the graph does not say who publishes it ({e})"),
        };
        let publishers: Vec<Endpoint> = publishers
            .into_iter()
            .map(|p| Endpoint {
                type_name: p.topic_type,
                node: match p.node_name.contains("_UNKNOWN_") {
                    true => UNNAMED.into(),
                    false => format!("{}/{}", p.node_namespace.trim_end_matches('/'), p.node_name),
                },
                reliable: p.qos_profile.reliability == ReliabilityPolicy::Reliable,
                transient_local: p.qos_profile.durability == DurabilityPolicy::TransientLocal,
            })
            .collect();
        why_silent(&self.topics[i], "image", &ours, &publishers)
    }

    fn pipeline(&mut self) -> DiagnosticStatus {
        let stats = self.engine.stats();
        let new = stats.unusable - self.unusable;
        self.unusable = stats.unusable;
        let (level, message) = match (new, self.engine.is_paused()) {
            (_, true) => (WARN, "paused".to_string()),
            (0, _) => (OK, format!("{} keyframes, {} closures", stats.keyframes, stats.closures)),
            (n, _) => (WARN, format!("{n} unusable images since the last report; the last: {}", stats.last_unusable)),
        };
        if new > 0 {
            r2r::log_warn!(&self.logger, "{message}");
        }
        if stats.sessions != self.sessions {
            self.sessions = stats.sessions;
            let session = self.engine.map_report().session;
            r2r::log_warn!(&self.logger, "session {session} begins: stamps jumped, or a relocalization was asked for");
        }
        let mut values = vec![
            ("keyframes".to_string(), stats.keyframes.to_string()),
            ("closures".into(), stats.closures.to_string()),
            ("unusable".into(), stats.unusable.to_string()),
            ("paused".into(), stats.paused.to_string()),
            ("sessions_begun".into(), stats.sessions.to_string()),
            ("config_hash".into(), self.engine.config_hash()),
            ("model".into(), self.engine.model().identity().to_string()),
        ];
        let odometry = self.engine.odometry_silent().map_or("none".into(), |s| format!("{:.1} s ago", s.as_secs_f64()));
        values.push(("odometry".into(), odometry));
        for (stage, p50, p95) in stats.stages() {
            values.push((format!("{stage}_ms_p50"), format!("{p50:.2}")));
            values.push((format!("{stage}_ms_p95"), format!("{p95:.2}")));
        }
        for (reason, n) in &stats.reasons {
            values.push((format!("reason_{reason}"), n.to_string()));
        }
        let values = values.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        status(level, format!("{}: pipeline", self.node), message, values)
    }

    fn map(&mut self) -> DiagnosticStatus {
        let map = self.engine.map_report();
        let (level, message) = match &map.error {
            Some(e) => (ERROR, format!("the map could not be saved: {e}")),
            None if map.relocalizing => (WARN, format!("relocalizing among {} keyframes", map.keyframes)),
            None => (OK, format!("{} keyframes", map.keyframes)),
        };
        if map.error.is_some() && map.error != self.save_error {
            r2r::log_error!(&self.logger, "{message}");
        }
        self.save_error = map.error.clone();
        let values = vec![
            ("id", map.id),
            ("revision", map.revision.to_string()),
            ("keyframes", map.keyframes.to_string()),
            ("closures", map.closures.to_string()),
            ("session", map.session.to_string()),
            ("saved", if map.file.is_some() { map.saved.to_string() } else { "memory only".into() }),
            ("file", map.file.map_or(String::new(), |f| f.display().to_string())),
            ("thinned", self.engine.stats().thinned.to_string()),
            ("localization_only", map.localization_only.to_string()),
            ("memory_mib", memory_mib().map_or("unknown".into(), |m| format!("{m:.1}"))),
        ];
        status(level, format!("{}: map", self.node), message, values)
    }

    /// Markers, when something changed or somebody new looks.
    fn scene(&mut self) {
        if !self.engine.settings().publish.markers {
            return;
        }
        let viewers = self.markers.get_inter_process_subscription_count().unwrap_or(0);
        let (revision, keyframes) = (self.engine.map_report().revision, self.engine.stats().keyframes);
        let frame = self.engine.odometry_frame();
        if viewers == 0 || frame.is_empty() || self.shown == Some((revision, keyframes, viewers)) {
            return;
        }
        self.shown = Some((revision, keyframes, viewers));
        // Time zero: the latest transform serves, for the positions are the frame's own.
        if let Err(e) = self.markers.publish(&convert::markers(&self.engine.scene(), convert::time(0), &frame)) {
            r2r::log_error!(&self.logger, "~/markers: {e}");
        }
    }
}
