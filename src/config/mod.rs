//! Every setting: default, unit, range, meaning. `config/structvpr.yaml` is written from this table,
//! word for word (tested).

mod node;
mod setting;

pub use node::{InputConfig, MapConfig, ModelConfig, PublishConfig, QosConfig, TopicQos};
pub use setting::{Kind, Setting, Value};

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use setting::{section, Field, Section};
use std::sync::LazyLock;

/// All settings of the loop detector.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Config {
    /// Which images become keyframes.
    pub keyframe: KeyframeConfig,
    /// Which keyframes are compared.
    pub search: SearchConfig,
    /// Which comparisons are believed.
    pub decision: DecisionConfig,
    /// The second stage.
    pub verification: VerificationConfig,
}

section! {
    /// Which images become keyframes.
    KeyframeConfig {
        /// Shortest time between two keyframes, seconds.
        min_interval_s: f64 = 0.15, Kind::Real(0.0, 3600.0), live;
        /// With odometry: shortest way between two keyframes, metres.
        min_distance_m: f64 = 0.5, Kind::Real(0.0, 1000.0), live;
        /// With odometry: a turn of this many degrees makes a keyframe, however short the way.
        min_rotation_deg: f64 = 10.0, Kind::Real(0.0, 360.0), live;
        /// Without odometry: smallest change of the descriptor (1 - cosine) against the last keyframe. Below 0: what the
        /// model's header recommends (0.01 where it says nothing).
        min_descriptor_change: f64 = -1.0, Kind::Real(-1.0, 2.0), live;
        /// Without odometry: where more than this share of the picture's textured parts stands still, something passed
        /// and the robot did not move. 1: not asked.
        max_still_share: f64 = 0.6, Kind::Real(0.0, 1.0), live;
        /// Images whose luma varies less than this (standard deviation, 0 to 255) are left out.
        min_luma_std: f64 = 6.0, Kind::Real(0.0, 128.0), live;
        /// With registered depth: images whose median depth is nearer than this are left out, metres: a
        /// wall, a lorry. 0: none.
        min_depth_m: f64 = 0.0, Kind::Real(0.0, 100.0), live;
    }
}

section! {
    /// Which keyframes are compared.
    SearchConfig {
        /// Neighbours that are fetched per keyframe.
        top_k: usize = 20usize, Kind::Count(1, 1000), live;
        /// Keyframes of this session younger than this are no loop, seconds.
        exclusion_s: f64 = 20.0, Kind::Real(0.0, 86400.0), live;
        /// Nor are the last so many keyframes of this session.
        exclusion_keyframes: usize = 10usize, Kind::Count(0, 1_000_000), live;
    }
}

section! {
    /// Which comparisons are believed.
    DecisionConfig {
        /// Smallest cosine similarity, of the match itself and of the mean along the chain of matches that
        /// leads there. -1: the one that the model's header recommends.
        similarity_threshold: f64 = -1.0, Kind::Real(-1.0, 1.0), live;
        /// Smallest lead of the best place over the second best, cosine similarity. Below 0: what the model's header
        /// recommends (0.01 where it says nothing).
        min_margin: f64 = -1.0, Kind::Real(-1.0, 2.0), live;
        /// Hits at most this many keyframes apart are one place.
        place_radius: usize = 8usize, Kind::Count(0, 10_000), live;
        /// Consecutive keyframes that must point at the same stretch of the map, this one included.
        min_consistent: usize = 10usize, Kind::Count(1, 100), live;
        /// How far, in keyframes, the match may move between two consecutive keyframes.
        consistency_window: usize = 4usize, Kind::Count(0, 10_000), live;
        /// Places per keyframe that chains may run through; 1: only the best.
        consistency_places: usize = 2usize, Kind::Count(1, 100), live;
        /// Slowest advance of the match per keyframe, in keyframes, forwards or backwards: a match that
        /// stands still while the robot moves is a look-alike. Checked from min_consistent 3 on.
        min_pace: f64 = 0.5, Kind::Real(0.0, 100.0), live;
        /// Fastest advance of the match per keyframe, in keyframes; not below `min_pace`.
        max_pace: f64 = 2.0, Kind::Real(0.0, 100.0), live;
        /// How far, in keyframes, a match of the chain may lie off an even advance.
        max_pace_error: f64 = 2.0, Kind::Real(0.0, 1000.0), live;
        /// Shortest time between two closures, seconds; 0: no limit.
        min_closure_interval_s: f64 = 0.0, Kind::Real(0.0, 3600.0), live;
        /// With odometry: closures over a longer distance than this in the odometry frame are refused,
        /// metres; 0: no limit.
        max_odometry_distance_m: f64 = 0.0, Kind::Real(0.0, 1e6), live;
    }
}

section! {
    /// The second stage: local features and geometry.
    VerificationConfig {
        /// Verify the best places of each keyframe by their geometry; a closure then needs it.
        enabled: bool = false, Kind::Flag, restart;
        /// Local features: OpenCV's `sift`, `orb` and `akaze` need no weights; a network does (see `weights`).
        features: String = "sift", Kind::Choice(FEATURES), restart;
        /// Weight file of a network; `structvpr models` says where to get which, and under which licence.
        weights: String = "", Kind::Text, restart;
        /// Weight file of SuperGlue or LightGlue: it then matches instead of mutual nearest neighbours.
        matcher_weights: String = "", Kind::Text, restart;
        /// Keypoints per image, at most.
        keypoints: usize = 800usize, Kind::Count(16, 8192), restart;
        /// With a network: place keypoints between pixels, at the top of the parabola through their neighbours.
        subpixel: bool = false, Kind::Flag, restart;
        /// The model that matches must agree on. `auto`: PnP where depth is known, the essential matrix where
        /// `camera_info` is, else the fundamental matrix.
        method: String = "auto", Kind::Choice(&["auto", "fundamental", "essential", "homography", "pnp"]), restart;
        /// How far a point may be off the model, pixels of an image 640 wide.
        threshold_px: f64 = 2.0, Kind::Real(0.1, 50.0), restart;
        /// Of the robust estimation: the same seed gives the same result.
        seed: usize = 1usize, Kind::Count(0, 2_147_483_646), restart;
        /// Places per keyframe that are looked at, best first.
        candidates: usize = 10usize, Kind::Count(1, 1000), live;
        /// Time per keyframe after which no further place is looked at, milliseconds; 0: no limit. A limit makes
        /// the result depend on the machine's speed.
        budget_ms: f64 = 0.0, Kind::Real(0.0, 60_000.0), live;
        /// With so large a lead over a place that was looked at too, the rest is not; 0: always look at all.
        stop_lead: f64 = 1.0, Kind::Real(0.0, 10.0), live;
        /// Smallest lead of a closure: the logarithm of its inliers by those of the best other place (each plus 5;
        /// 20 at least stand for the other). 0.35 is 1.4 times.
        min_lead: f64 = 0.35, Kind::Real(-5.0, 10.0), live;
        /// Consecutive keyframes that must point at the same stretch of the map where the geometry agrees, in the
        /// place of `decision.min_consistent`; the margin is then not asked for.
        min_consistent: usize = 3usize, Kind::Count(1, 100), live;
    }
}

/// What `verification.features` may name.
const FEATURES: &[&str] = &["sift", "orb", "akaze", "superpoint", "superpoint_vgg", "superpoint_squeeze", "xfeat"];

/// What a model's maker measured for settings that hang on how far apart its similarities lie, and that settings may leave
/// to it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Recommended {
    /// `decision.similarity_threshold`; 0.85 where it is not known.
    pub similarity_threshold: Option<f32>,
    /// `decision.min_margin`; 0.01 where it is not known.
    pub min_margin: Option<f32>,
    /// `keyframe.min_descriptor_change`; 0.01 where it is not known.
    pub min_descriptor_change: Option<f32>,
}

impl Recommended {
    /// The threshold in use, with `setting` in the settings.
    pub fn similarity_threshold(&self, setting: f64) -> f32 {
        if setting > -1.0 {
            return setting as f32;
        }
        self.similarity_threshold.unwrap_or(0.85)
    }

    /// The margin in use.
    pub fn min_margin(&self, setting: f64) -> f64 {
        Self::or(setting, self.min_margin)
    }

    /// The change of the descriptor in use.
    pub fn min_descriptor_change(&self, setting: f64) -> f64 {
        Self::or(setting, self.min_descriptor_change)
    }

    fn or(setting: f64, recommended: Option<f32>) -> f64 {
        if setting >= 0.0 {
            return setting;
        }
        recommended.map_or(0.01, f64::from)
    }
}

impl Config {
    /// Checks every range; the error names the setting and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let Self { keyframe, search, decision, verification } = self.clone();
        Settings { keyframe, search, decision, verification, ..Settings::default() }.validate()
    }

    /// The detector's part of [`Settings::from_yaml`].
    pub fn from_yaml(text: &str) -> Result<Self> {
        Settings::from_yaml(text).map(|s| s.detector())
    }
}

/// Everything that a settings file holds: the detector's settings, and those of the node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Which images become keyframes.
    pub keyframe: KeyframeConfig,
    /// Which keyframes are compared.
    pub search: SearchConfig,
    /// Which comparisons are believed.
    pub decision: DecisionConfig,
    /// The second stage: local features and geometry.
    pub verification: VerificationConfig,
    /// What the node listens to.
    pub input: InputConfig,
    /// The descriptor model.
    pub model: ModelConfig,
    /// The map and its file.
    pub map: MapConfig,
    /// What the node says.
    pub publish: PublishConfig,
    /// Quality of service per topic.
    pub qos: QosConfig,
}

static TABLE: LazyLock<Vec<Setting>> = LazyLock::new(|| {
    let mut all = Vec::new();
    let mut add = |prefix: &str, table: Vec<Setting>| {
        all.extend(table.into_iter().map(|s| Setting { name: format!("{prefix}.{}", s.name), ..s }));
    };
    add("keyframe", KeyframeConfig::table());
    add("search", SearchConfig::table());
    add("decision", DecisionConfig::table());
    add("verification", VerificationConfig::table());
    add("input", InputConfig::table());
    add("model", ModelConfig::table());
    add("map", MapConfig::table());
    add("publish", PublishConfig::table());
    for topic in QosConfig::TOPICS {
        add(&format!("qos.{topic}"), TopicQos::table());
    }
    all
});

impl Settings {
    /// Every setting, in the order of the shipped file.
    pub fn table() -> &'static [Setting] {
        &TABLE
    }

    /// The detector's part.
    pub fn detector(&self) -> Config {
        Config {
            keyframe: self.keyframe.clone(),
            search: self.search.clone(),
            decision: self.decision.clone(),
            verification: self.verification.clone(),
        }
    }

    fn field(&mut self, name: &str) -> Option<&mut dyn Field> {
        let (section, name) = name.split_once('.')?;
        match section {
            "keyframe" => self.keyframe.field(name),
            "search" => self.search.field(name),
            "decision" => self.decision.field(name),
            "verification" => self.verification.field(name),
            "input" => self.input.field(name),
            "model" => self.model.field(name),
            "map" => self.map.field(name),
            "publish" => self.publish.field(name),
            "qos" => {
                let (topic, name) = name.split_once('.')?;
                self.qos.topic(topic)?.field(name)
            }
            _ => None,
        }
    }

    /// A setting's value by its dotted name.
    pub fn get(&self, name: &str) -> Option<Value> {
        // `field` hands out mutable references; a copy serves both directions.
        self.clone().field(name).map(|f| f.get())
    }

    /// Sets one setting by its dotted name.
    ///
    /// Errors: no such setting (the nearest name is given), wrong type, out of range; then nothing changes.
    pub fn set(&mut self, name: &str, value: &Value) -> Result<()> {
        let Some(setting) = Self::table().iter().find(|s| s.name == name) else {
            let allowed = nearest(name).map_or("see config/structvpr.yaml".into(), |n| format!("did you mean `{n}`?"));
            return Err(Error::Config { field: name.into(), value: "an unknown name".into(), allowed });
        };
        let mut changed = self.clone();
        let fits = setting.kind.admits(value) && changed.field(name).is_some_and(|f| f.set(value));
        if !fits {
            return Err(Error::Config {
                field: name.into(),
                value: format!("{} {value}", value.type_name()),
                allowed: setting.kind.allowed(),
            });
        }
        changed.validate()?;
        *self = changed;
        Ok(())
    }

    /// Checks every range; the error names the setting and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let mut copy = self.clone();
        for setting in Self::table() {
            let Some(value) = copy.field(&setting.name).map(|f| f.get()) else { continue };
            if !setting.kind.admits(&value) {
                return Err(Error::Config { field: setting.name.clone(), value: value.to_string(), allowed: setting.kind.allowed() });
            }
        }
        let d = &self.decision;
        if d.max_pace < d.min_pace {
            let allowed = format!("{} (decision.min_pace) to 100", d.min_pace);
            return Err(Error::Config { field: "decision.max_pace".into(), value: d.max_pace.to_string(), allowed });
        }
        self.input.camera_pose(0)?;
        Ok(())
    }

    /// From YAML: plain, or below `/**: ros__parameters:` as ROS writes it. What is not named keeps
    /// its default; what is not known is an error that lists the known names.
    pub fn from_yaml(text: &str) -> Result<Self> {
        let bad = |value: String| Error::Config { field: "(file)".into(), value, allowed: "the settings of config/structvpr.yaml".into() };
        let mut given: serde_yaml::Value = serde_yaml::from_str(text).map_err(|e| bad(e.to_string()))?;
        if let Some(inner) = given.get("/**").and_then(|v| v.get("ros__parameters")) {
            given = inner.clone();
        }
        if let serde_yaml::Value::Mapping(map) = &mut given {
            // Every ROS node has it; offline, stamps are the images' own anyway.
            map.remove("use_sim_time");
        }
        let mut whole = serde_yaml::to_value(Self::default()).map_err(|e| bad(e.to_string()))?;
        overlay(&mut whole, given);
        let settings: Self = serde_path_to_error::deserialize(whole).map_err(|e| {
            let field = e.path().to_string();
            let kind = Self::table().iter().find(|s| s.name == field).map(|s| s.kind.allowed());
            Error::Config { field, value: e.inner().to_string(), allowed: kind.unwrap_or("see config/structvpr.yaml".into()) }
        })?;
        settings.validate()?;
        Ok(settings)
    }

    /// As a table for people.
    pub fn to_markdown(&self) -> String {
        let mut text = "| parameter | default | allowed | while running | meaning |\n|---|---|---|---|---|\n".to_string();
        for setting in Self::table().iter().filter(|s| !s.name.starts_with("qos.")) {
            let value = self.get(&setting.name).map(|v| v.to_string()).unwrap_or_default();
            let (live, doc) = (if setting.live { "yes" } else { "restart" }, setting.doc.replace('\n', " "));
            let allowed = setting.kind.allowed().replace("an integer, ", "").replace("a double, ", "");
            text += &format!("| `{}` | {value} | {allowed} | {live} | {doc} |\n", setting.name);
        }
        for topic in QosConfig::TOPICS {
            let value = |field: &str| self.get(&format!("qos.{topic}.{field}")).map(|v| v.to_string()).unwrap_or_default();
            text += &format!(
                "| `qos.{topic}.reliability`, `.depth`, `.durability` | {}, {}, {} | \"reliable\" or \"best_effort\"; 1 to 10000; \"volatile\" or \"transient_local\" | restart | |\n",
                value("reliability"),
                value("depth"),
                value("durability")
            );
        }
        text
    }

    /// As the shipped file has it: every setting with its meaning and range.
    pub fn to_yaml(&self) -> String {
        let mut text = YAML_HEAD.to_string();
        let mut open: Vec<&str> = Vec::new();
        for setting in Self::table() {
            let parts: Vec<&str> = setting.name.split('.').collect();
            let (sections, name) = parts.split_at(parts.len() - 1);
            let indent = |depth: usize| "  ".repeat(depth + 2);
            let common = open.iter().zip(sections).take_while(|(a, b)| a == b).count();
            for (depth, section) in sections.iter().enumerate().skip(common) {
                text += &format!("{}{section}:\n", indent(depth));
            }
            open = sections.to_vec();
            let pad = indent(sections.len());
            if open.first() != Some(&"qos") {
                let restart = if setting.live || !["verification", "input", "model", "map", "publish"].contains(&open[0]) {
                    ""
                } else {
                    " Needs a restart."
                };
                let range = match setting.kind {
                    Kind::Real(low, high) => format!(" [{low} to {high}]"),
                    Kind::Count(low, high) => format!(" [{low} to {high}]"),
                    _ => String::new(),
                };
                text += &format!("{pad}# {}{restart}{range}\n", setting.doc.replace('\n', &format!("\n{pad}# ")));
            }
            let value = self.get(&setting.name).map(|v| v.to_string()).unwrap_or_default();
            text += &format!("{pad}{}: {value}\n", name[0]);
        }
        text
    }
}

const YAML_HEAD: &str = "\
# Every setting, at its default: of the loop detector (keyframe, search, decision, verification), and of the
# node (the rest). `structvpr_node --ros-args --params-file FILE` and `structvpr replay --config FILE` both read
# it; `structvpr doctor` says which one to change. What a file does not name keeps its default.
/**:
  ros__parameters:
";

/// The known name that is most like `name`, unless none is.
pub fn nearest(name: &str) -> Option<&'static str> {
    let last = |n: &str| n.rsplit('.').next().unwrap_or_default().to_string();
    let cost = |known: &str| match known.contains(name) {
        true => 1,
        false => edits(name, known).min(edits(&last(name), &last(known)) + 1),
    };
    let (best, cost) = Settings::table().iter().map(|s| (s.name.as_str(), cost(&s.name))).min_by_key(|(_, c)| *c)?;
    (cost <= name.len() / 4 + 1).then_some(best)
}

/// Levenshtein's distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, cb) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Lays `over` onto `base`, mapping by mapping.
fn overlay(base: &mut serde_yaml::Value, over: serde_yaml::Value) {
    match (base, over) {
        (serde_yaml::Value::Mapping(base), serde_yaml::Value::Mapping(over)) => {
            for (key, value) in over {
                match base.get_mut(&key) {
                    Some(slot) => overlay(slot, value),
                    None => {
                        base.insert(key, value);
                    }
                }
            }
        }
        (_, serde_yaml::Value::Null) => {}
        (base, over) => *base = over,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_is_the_defaults_and_names_them_all() {
        let text = include_str!("../../config/structvpr.yaml");
        let want = Settings::default().to_yaml();
        if text != want {
            let new = std::env::temp_dir().join("structvpr.yaml");
            std::fs::write(&new, want).unwrap();
            panic!("config/structvpr.yaml is not what the table says; what it says is in {}", new.display());
        }
        assert_eq!(Settings::from_yaml(text).unwrap(), Settings::default());
        let value: serde_yaml::Value = serde_yaml::from_str(text).unwrap();
        let shipped = &value["/**"]["ros__parameters"];
        let all = serde_yaml::to_value(Settings::default()).unwrap();
        assert_eq!(shipped, &all, "every setting stands in the file");
    }

    #[test]
    fn the_table_of_the_documentation_is_the_table() {
        let (text, want) = (include_str!("../../docs/parameters.md"), Settings::default().to_markdown());
        if !text.ends_with(&want) {
            let new = std::env::temp_dir().join("parameters.md");
            std::fs::write(&new, want).unwrap();
            panic!("docs/parameters.md does not end with the table; it is in {}", new.display());
        }
    }

    #[test]
    fn presets_are_settings() {
        for (name, text) in [
            ("jetson", include_str!("../../config/jetson.yaml")),
            ("cpu_laptop", include_str!("../../config/cpu_laptop.yaml")),
            ("bag_replay", include_str!("../../config/bag_replay.yaml")),
        ] {
            let preset = Settings::from_yaml(text).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_ne!(preset, Settings::default(), "{name} changes something");
        }
    }

    #[test]
    fn settings_are_set_by_name_type_and_range() {
        let mut s = Settings::default();
        let mut said = |name: &str, value: Value| s.set(name, &value).map_err(|e| e.to_string());
        said("decision.min_margin", Value::Real(0.5)).unwrap();
        said("qos.image.reliability", Value::Text("reliable".into())).unwrap();
        let e = said("decision.min_margin", Value::Integer(1)).unwrap_err();
        assert!(e.contains("decision.min_margin") && e.contains("integer 1") && e.contains("a double, -1 to 2"), "{e}");
        let e = said("search.top_k", Value::Integer(-3)).unwrap_err();
        assert!(e.contains("-3") && e.contains("1 to 1000"), "{e}");
        let e = said("decision.min_margn", Value::Real(0.1)).unwrap_err();
        assert!(e.contains("did you mean `decision.min_margin`"), "{e}");
        let e = said("decision.max_pace", Value::Real(0.1)).unwrap_err();
        assert!(e.contains("0.5 (decision.min_pace)"), "{e}");
        let e = said("qos.odom.durability", Value::Text("forever".into())).unwrap_err();
        assert!(e.contains("\"volatile\" or \"transient_local\""), "{e}");
        for bad in [vec![], vec!["a".to_string(), "a".into()], vec!["a/b".into()]] {
            assert!(said("input.cameras", Value::Names(bad)).is_err());
        }
        assert_eq!(s.get("decision.min_margin"), Some(Value::Real(0.5)));
        assert_eq!(s.get("no.such"), None);
    }

    #[test]
    fn every_setting_of_the_table_can_be_reached_and_keeps_its_value() {
        let mut s = Settings::default();
        for setting in Settings::table() {
            let value = s.get(&setting.name).unwrap_or_else(|| panic!("{}", setting.name));
            s.set(&setting.name, &value).unwrap();
            assert!(!setting.doc.is_empty());
        }
        assert_eq!(s, Settings::default());
        assert_eq!(nearest("margin"), Some("decision.min_margin"));
        assert_eq!(nearest("colour_of_the_sky"), None);
    }

    #[test]
    fn a_file_may_name_one_field_of_a_topic() {
        let s = Settings::from_yaml("qos: {candidates: {depth: 7}}").unwrap();
        assert_eq!(s.qos.candidates, TopicQos { reliability: "reliable".into(), depth: 7, durability: "volatile".into() });
    }

    #[test]
    fn errors_name_the_setting_and_the_range() {
        let said = |text: &str| Config::from_yaml(text).unwrap_err().to_string();
        let s = said("decision: {min_margin: -1.5}");
        assert!(s.contains("decision.min_margin") && s.contains("-1.5") && s.contains("-1 to 2"), "{s}");
        let s = said("decision: {min_margn: 0.5}");
        assert!(s.contains("min_margn") && s.contains("min_margin"), "{s}");
        let s = said("search: {top_k: many}");
        assert!(s.contains("top_k"), "{s}");
        assert!(said("search: {top_k: 0}").contains("1 to 1000"));
        assert!(said("decision: {similarity_threshold: .nan}").contains("similarity_threshold"));
        assert_eq!(Config::from_yaml("").unwrap(), Config::default());
    }
}
