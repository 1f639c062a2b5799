//! The settings of a training, as one YAML file.

use crate::augment::Settings as Augment;
use crate::data::{Near, Settings as Data};
use crate::net::Precision;
use crate::partition::{Select, Weighting};
use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Everything that decides what a training gives; two trainings of one recipe and one seed give the same bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Name in the model's header and in reports.
    pub name: String,
    #[serde(default)]
    pub data: Data,
    /// Data set specifications to train on.
    pub train: Vec<String>,
    #[serde(default)]
    pub near: Near,
    /// Recall@5 on these decides which checkpoint is kept [paper].
    pub validation: Vec<String>,
    /// Named test sets of `training ablate` and of the reports; never looked at while training.
    #[serde(default)]
    pub tests: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    pub augment: Augment,
    /// Weights that the rgb branch begins from (any layout that `structvpr convert` reads); `shipped`; `random`.
    pub init: String,
    #[serde(default)]
    pub pooling: Pooling,
    /// Stage 1, the rgb branch [paper].
    #[serde(default = "Schedule::stage1")]
    pub rgb: Schedule,
    /// Stage 1, the seg branch [paper].
    #[serde(default = "Schedule::stage1")]
    pub seg: Schedule,
    /// Stage 2 and the rivals [paper].
    #[serde(default = "Schedule::stage2")]
    pub distil: Schedule,
    #[serde(default)]
    pub distillation: Distillation,
    #[serde(default)]
    pub on_nan: OnNan,
    /// What a GPU (`--device cuda:0`) keeps maps in; a processor computes in f32.
    #[serde(default, skip_serializing_if = "is_f32")]
    pub precision: Precision,
    /// Licence of the model that comes out.
    #[serde(default = "unknown")]
    pub license: String,
}

/// A checkpoint's identity has no `mix`: it is the same training.
fn all_trained(mix: &f64) -> bool {
    *mix == 1.0
}

/// Nor has that of a training in f32 a precision.
fn is_f32(precision: &Precision) -> bool {
    *precision == Precision::F32
}

fn unknown() -> String {
    "unknown".into()
}

/// How feature maps become vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// GeM whose power is learnt, beginning at 3. [ours]
    #[default]
    Gem,
    /// GeM with a power of 3.
    GemFixed,
    /// The mean.
    Average,
}

/// What to do about a loss that is not a number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnNan {
    /// End, naming step and images; the last checkpoint stays.
    #[default]
    Stop,
    /// Leave the step out, naming it.
    Skip,
}

/// One training's length and pace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// Optimiser steps.
    pub steps: usize,
    /// Triplets per pass.
    pub triplets: usize,
    /// Passes whose gradients make one step.
    pub accumulate: usize,
    /// Negatives per query.
    pub negatives: usize,
    /// Largest learning rate; falls to zero along a cosine [paper].
    pub lr: f64,
    /// [paper: 1e-4]
    pub weight_decay: f64,
    /// Steps between two refreshes of the descriptor cache that negatives are mined from; a checkpoint is written at each.
    pub refresh: usize,
    /// References that are described at a refresh beside the queries' positives.
    pub pool: usize,
    /// Negatives are drawn from this many of the hardest.
    pub hardest: usize,
    pub positives: Positives,
    /// Refreshes between two validations.
    pub validate: usize,
    /// Share of the trained weights in what is kept; the rest are those that the training began from. Below 1 it keeps more of what
    /// the start knew of images unlike the training's (WiSE-FT, CVPR 2022). [ours]
    #[serde(skip_serializing_if = "all_trained")]
    pub mix: f64,
}

/// Which positive a query is paired with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positives {
    /// Any.
    #[default]
    Random,
    /// The one that the network finds most alike: for sets that know positions but no directions (NetVLAD's) [paper: Pitts30k].
    Best,
}

impl Default for Schedule {
    fn default() -> Self {
        Self::stage1()
    }
}

impl Schedule {
    /// Stage 1: lr 1e-3 [paper].
    fn stage1() -> Self {
        Self {
            steps: 20_000,
            triplets: 12,
            accumulate: 1,
            negatives: 1,
            lr: 1e-3,
            weight_decay: 1e-4,
            refresh: 100,
            pool: 1000,
            hardest: 10,
            positives: Positives::Random,
            validate: 5,
            mix: 1.0,
        }
    }

    /// Stage 2: lr 1e-4 [paper].
    fn stage2() -> Self {
        Self { lr: 1e-4, ..Self::stage1() }
    }

    fn validate(&self, what: &str) -> Result<()> {
        for (name, value, range) in [
            ("steps", self.steps, 1..=10_000_000),
            ("triplets", self.triplets, 1..=4096),
            ("accumulate", self.accumulate, 1..=1024),
            ("negatives", self.negatives, 1..=64),
            ("refresh", self.refresh, 1..=1_000_000),
            ("pool", self.pool, 1..=10_000_000),
            ("hardest", self.hardest, 1..=100_000),
            ("validate", self.validate, 1..=1_000_000),
        ] {
            ensure!(range.contains(&value), "{what}.{name}: {value} is outside {range:?}");
        }
        ensure!(self.lr.is_finite() && self.lr > 0.0 && self.lr <= 1.0, "{what}.lr: {} is outside 0 to 1", self.lr);
        ensure!((0.0..=1.0).contains(&self.weight_decay), "{what}.weight_decay: {} is outside 0 to 1", self.weight_decay);
        ensure!((0.0..=1.0).contains(&self.mix), "{what}.mix: {} is outside 0 to 1", self.mix);
        ensure!(self.hardest >= self.negatives, "{what}.hardest: {} is below {what}.negatives, {}", self.hardest, self.negatives);
        Ok(())
    }
}

/// How the teacher's knowledge reaches the student (stage 2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Distillation {
    /// Factor of the distillation loss [the seeds do not print it; ours].
    pub lambda: f64,
    pub feature: Feature,
    /// Which samples, and how much.
    pub weighting: Weighting,
    /// Learning rate of the projection over the student's. [ours]
    pub projection_lr: f64,
    /// Pairs that are taught from label maps of other places, for experiments: whether what the teacher knows of them helps, or
    /// being taught at all. [ours]
    #[serde(skip_serializing_if = "nobody")]
    pub mislead: Select,
}

/// Checkpoints of before one could be misled are of this.
fn nobody(select: &Select) -> bool {
    *select == Select::None
}

impl Default for Distillation {
    fn default() -> Self {
        Self { lambda: 1.0, feature: Feature::Global, weighting: Weighting::default(), projection_lr: 10.0, mislead: Select::None }
    }
}

/// What the student imitates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    /// The descriptor, through a linear projection of 448 to 480 that exists in training only [inferred].
    #[default]
    Global,
    /// The three pooled taps, each through a projection of its own.
    Taps,
    /// Differences of distances, query to positive and query to negative: no projection. [ours]
    Relations,
}

impl Recipe {
    /// Parses and checks a recipe; paths in it are relative to the working directory.
    ///
    /// Errors name the field.
    pub fn parse(text: &str) -> Result<Self> {
        let recipe: Self = serde_yaml::from_str(text)?;
        recipe.validate()?;
        Ok(recipe)
    }

    /// Reads a recipe.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    /// Checks ranges.
    pub fn validate(&self) -> Result<()> {
        for side in self.data.size {
            ensure!((32..=4096).contains(&side), "data.size: {side} is outside 32 to 4096");
        }
        ensure!((0.0..=1.0).contains(&self.data.wrong_labels), "data.wrong_labels: {} is outside 0 to 1", self.data.wrong_labels);
        ensure!(self.near.radius_m > 0.0 && self.near.angle_deg > 0.0, "near: radius_m and angle_deg are above 0");
        ensure!(
            self.near.negative_m >= self.near.radius_m,
            "near.negative_m: {} is below near.radius_m, {}: a positive would be a negative",
            self.near.negative_m,
            self.near.radius_m
        );
        self.augment.validate()?;
        self.rgb.validate("rgb")?;
        self.seg.validate("seg")?;
        self.distil.validate("distil")?;
        let d = &self.distillation;
        ensure!((0.0..=1e6).contains(&d.lambda), "distillation.lambda: {} is outside 0 to 1e6", d.lambda);
        ensure!((0.0..=1e4).contains(&d.projection_lr), "distillation.projection_lr: {} is outside 0 to 1e4", d.projection_lr);
        d.weighting.validate()
    }

    /// The file behind `init`, if it is one.
    pub fn init_file(&self) -> Option<PathBuf> {
        (!["shipped", "random"].contains(&self.init.as_str())).then(|| PathBuf::from(&self.init))
    }
}
