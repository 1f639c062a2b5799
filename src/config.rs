//! Every setting of the core: default, unit, range, meaning. `config/structvpr.yaml` is these
//! defaults, word for word (tested).

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// All settings of the loop detector.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Which images become keyframes.
    pub keyframe: KeyframeConfig,
    /// Which keyframes are compared.
    pub search: SearchConfig,
    /// Which comparisons are believed.
    pub decision: DecisionConfig,
}

/// Which images become keyframes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KeyframeConfig {
    /// Shortest time between two keyframes, seconds.
    pub min_interval_s: f64,
    /// With odometry: shortest way between two keyframes, metres.
    pub min_distance_m: f64,
    /// With odometry: a turn of this many degrees makes a keyframe, however short the way.
    pub min_rotation_deg: f64,
    /// Without odometry: smallest change of the descriptor (1 - cosine) against the last keyframe.
    pub min_descriptor_change: f64,
    /// Images whose luma varies less than this (standard deviation, 0 to 255) are left out.
    pub min_luma_std: f64,
}

impl Default for KeyframeConfig {
    fn default() -> Self {
        Self { min_interval_s: 0.15, min_distance_m: 0.5, min_rotation_deg: 10.0, min_descriptor_change: 0.01, min_luma_std: 6.0 }
    }
}

/// Which keyframes are compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SearchConfig {
    /// Neighbours that are fetched per keyframe.
    pub top_k: usize,
    /// Keyframes of this session younger than this are no loop, seconds.
    pub exclusion_s: f64,
    /// Nor are the last so many keyframes of this session.
    pub exclusion_keyframes: usize,
}

impl Default for SearchConfig {
    fn default() -> Self {
        Self { top_k: 20, exclusion_s: 20.0, exclusion_keyframes: 10 }
    }
}

/// Which comparisons are believed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DecisionConfig {
    /// Smallest cosine similarity, of the match itself and of the mean along the chain of matches that
    /// leads there. -1: the one that the model's header recommends.
    pub similarity_threshold: f64,
    /// Smallest lead of the best place over the second best, cosine similarity.
    pub min_margin: f64,
    /// Hits at most this many keyframes apart are one place.
    pub place_radius: usize,
    /// Consecutive keyframes that must point at the same stretch of the map, this one included.
    pub min_consistent: usize,
    /// How far, in keyframes, the match may move between two consecutive keyframes.
    pub consistency_window: usize,
    /// Places per keyframe that chains may run through; 1: only the best.
    pub consistency_places: usize,
    /// Slowest advance of the match per keyframe, in keyframes, forwards or backwards: a match that
    /// stands still while the robot moves is a look-alike.
    pub min_pace: f64,
    /// Fastest advance of the match per keyframe, in keyframes.
    pub max_pace: f64,
    /// How far, in keyframes, a match of the chain may lie off an even advance.
    pub max_pace_error: f64,
    /// Shortest time between two closures, seconds; 0: no limit.
    pub min_closure_interval_s: f64,
    /// With odometry: closures over a longer distance than this in the odometry frame are refused,
    /// metres; 0: no limit.
    pub max_odometry_distance_m: f64,
}

impl Default for DecisionConfig {
    fn default() -> Self {
        Self {
            similarity_threshold: -1.0,
            min_margin: 0.01,
            place_radius: 8,
            min_consistent: 10,
            consistency_window: 4,
            consistency_places: 2,
            min_pace: 0.5,
            max_pace: 2.0,
            max_pace_error: 2.0,
            min_closure_interval_s: 0.0,
            max_odometry_distance_m: 0.0,
        }
    }
}

/// Used where neither the settings nor the model's header name a threshold.
pub const FALLBACK_SIMILARITY_THRESHOLD: f64 = 0.85;

impl Config {
    /// Checks every range; the error names the setting and what is allowed.
    pub fn validate(&self) -> Result<()> {
        let (k, s, d) = (&self.keyframe, &self.search, &self.decision);
        let reals = [
            ("keyframe.min_interval_s", k.min_interval_s, 0.0, 3600.0),
            ("keyframe.min_distance_m", k.min_distance_m, 0.0, 1000.0),
            ("keyframe.min_rotation_deg", k.min_rotation_deg, 0.0, 360.0),
            ("keyframe.min_descriptor_change", k.min_descriptor_change, 0.0, 2.0),
            ("keyframe.min_luma_std", k.min_luma_std, 0.0, 128.0),
            ("search.exclusion_s", s.exclusion_s, 0.0, 86400.0),
            ("decision.similarity_threshold", d.similarity_threshold, -1.0, 1.0),
            ("decision.min_margin", d.min_margin, 0.0, 2.0),
            ("decision.min_pace", d.min_pace, 0.0, 100.0),
            ("decision.max_pace", d.max_pace, d.min_pace, 100.0),
            ("decision.max_pace_error", d.max_pace_error, 0.0, 1000.0),
            ("decision.min_closure_interval_s", d.min_closure_interval_s, 0.0, 3600.0),
            ("decision.max_odometry_distance_m", d.max_odometry_distance_m, 0.0, 1e6),
        ];
        for (field, value, low, high) in reals {
            if !(low..=high).contains(&value) {
                return Err(Error::Config { field: field.into(), value: value.to_string(), allowed: format!("{low} to {high}") });
            }
        }
        let counts = [
            ("search.top_k", s.top_k, 1, 1000),
            ("search.exclusion_keyframes", s.exclusion_keyframes, 0, 1_000_000),
            ("decision.place_radius", d.place_radius, 0, 10_000),
            ("decision.min_consistent", d.min_consistent, 1, 100),
            ("decision.consistency_window", d.consistency_window, 0, 10_000),
            ("decision.consistency_places", d.consistency_places, 1, 100),
        ];
        for (field, value, low, high) in counts {
            if !(low..=high).contains(&value) {
                return Err(Error::Config { field: field.into(), value: value.to_string(), allowed: format!("{low} to {high}") });
            }
        }
        Ok(())
    }

    /// From YAML: plain, or below `/**: ros__parameters:` as ROS writes it. What is not named keeps
    /// its default; what is not known is an error that lists the known names.
    pub fn from_yaml(text: &str) -> Result<Self> {
        let bad = |e: serde_yaml::Error| Error::Config {
            field: "(file)".into(),
            value: e.to_string(),
            allowed: "the settings of config/structvpr.yaml".into(),
        };
        let mut value: serde_yaml::Value = serde_yaml::from_str(text).map_err(bad)?;
        if let Some(inner) = value.get("/**").and_then(|v| v.get("ros__parameters")) {
            value = inner.clone();
        }
        if value.is_null() {
            return Ok(Self::default());
        }
        let config: Self = serde_path_to_error::deserialize(value).map_err(|e| Error::Config {
            field: e.path().to_string(),
            value: e.inner().to_string(),
            allowed: "see config/structvpr.yaml".into(),
        })?;
        config.validate()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_is_the_defaults_and_names_them_all() {
        let text = include_str!("../config/structvpr.yaml");
        assert_eq!(Config::from_yaml(text).unwrap(), Config::default());
        let value: serde_yaml::Value = serde_yaml::from_str(text).unwrap();
        let shipped = &value["/**"]["ros__parameters"];
        let all = serde_yaml::to_value(Config::default()).unwrap();
        assert_eq!(shipped, &all, "every setting stands in the file");
    }

    #[test]
    fn errors_name_the_setting_and_the_range() {
        let said = |text: &str| Config::from_yaml(text).unwrap_err().to_string();
        let s = said("decision: {min_margin: -0.5}");
        assert!(s.contains("decision.min_margin") && s.contains("-0.5") && s.contains("0 to 2"), "{s}");
        let s = said("decision: {min_margn: 0.5}");
        assert!(s.contains("min_margn") && s.contains("min_margin"), "{s}");
        let s = said("search: {top_k: many}");
        assert!(s.contains("top_k"), "{s}");
        assert!(said("search: {top_k: 0}").contains("1 to 1000"));
        assert!(said("decision: {similarity_threshold: .nan}").contains("similarity_threshold"));
        assert_eq!(Config::from_yaml("").unwrap(), Config::default());
    }
}
