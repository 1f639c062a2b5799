//! `training ablate`: a set of experiments, several seeds each, one table.

use crate::checkpoint::write_whole;
use crate::data::{Loader, Set};
use crate::learner::Kind;
use crate::net::Gpu;
use crate::partition::{Phi, Select};
use crate::rank::Recall;
use crate::recipe::{Feature, Recipe};
use crate::report::{escape, page};
use crate::train::Job;
use crate::work::{
    audit, fingerprint, finish, ranks, set_threads, stage1_job, summarise, teaching, write_partition, Finished, Ranked, Sets,
};
use anyhow::{bail, ensure, Context, Result};
use plotters::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use structvpr::model::ComputeDevice;

#[derive(clap::Args)]
pub struct Args {
    /// The experiments, YAML: `recipe`, `seeds`, `rows`, `order`.
    #[arg(long)]
    config: PathBuf,
    /// Folder of all trainings and of table.md, table.csv, table.html; finished rows are not run again.
    #[arg(long)]
    out: PathBuf,
    /// Processor threads; 0: all.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Where the networks are computed: cpu, or cuda:N.
    #[arg(long, default_value_t)]
    device: ComputeDevice,
    /// Run these seeds in place of the file's.
    #[arg(long, value_delimiter = ',')]
    seeds: Vec<u64>,
    /// Begin from these weights in place of the recipe's: a file, `shipped` or `random`.
    #[arg(long)]
    init: Option<String>,
    /// Spoil this share of the label maps (`data.wrong_labels`).
    #[arg(long)]
    wrong_labels: Option<f64>,
    /// Divide all steps by this: a quick look.
    #[arg(long, default_value_t = 1)]
    quick: usize,
}

/// An experiments file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiments<R = Row> {
    /// Title of the table.
    pub title: String,
    /// The recipe that all rows share, relative to this file.
    pub recipe: PathBuf,
    pub seeds: Vec<u64>,
    /// In the file a row, or the name of a file that holds one, relative to this file.
    pub rows: Vec<R>,
    /// Names of rows, best first: whether their means come out in this order is said below the table.
    #[serde(default)]
    pub order: Vec<String>,
    /// More such orders, each judged for itself.
    #[serde(default)]
    pub orders: Vec<Vec<String>>,
    /// A row and its negative control: what the first gains over `over` counts only as far as the second does not.
    #[serde(default)]
    pub control: Option<Control>,
}

/// See [`Experiments::control`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Control {
    pub row: String,
    pub control: String,
    pub over: String,
}

/// Which label maps the teacher of a row was trained and is used on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Teacher {
    /// Each image's own.
    #[default]
    True,
    /// Another place's: the negative control.
    Shuffled,
}

impl Teacher {
    /// Where a seed keeps its stage 1, and its partition.
    fn folders(self) -> (&'static str, &'static str) {
        match self {
            Self::True => ("seg", "partition"),
            Self::Shuffled => ("seg-shuffled", "partition-shuffled"),
        }
    }
}

/// One row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    pub name: String,
    /// `rgb` or a rival.
    #[serde(default)]
    pub kind: Kind,
    #[serde(default)]
    pub teacher: Teacher,
    #[serde(default)]
    pub select: Option<Select>,
    #[serde(default)]
    pub phi: Option<Phi>,
    #[serde(default)]
    pub lambda: Option<f64>,
    /// Whether weights are scaled to a mean of 1 (`distillation.weighting.normalise`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub normalise: Option<bool>,
    #[serde(default)]
    pub feature: Option<Feature>,
    /// Pairs that are taught from other places' label maps (`distillation.mislead`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mislead: Option<Select>,
    /// Largest learning rate, where it differs (the rivals' do).
    #[serde(default)]
    pub lr: Option<f64>,
}

impl Row {
    /// The recipe with what this row sets otherwise.
    ///
    /// Errors name a field out of range.
    fn settings(&self, recipe: &Recipe) -> Result<Recipe> {
        let mut own = recipe.clone();
        let d = &mut own.distillation;
        let w = &mut d.weighting;
        (w.select, w.phi) = (self.select.unwrap_or(w.select), self.phi.unwrap_or(w.phi));
        w.normalise = self.normalise.unwrap_or(w.normalise);
        (d.lambda, d.feature) = (self.lambda.unwrap_or(d.lambda), self.feature.unwrap_or(d.feature));
        d.mislead = self.mislead.unwrap_or(d.mislead);
        own.distil.lr = self.lr.unwrap_or(own.distil.lr);
        own.validate()?;
        Ok(own)
    }
}

/// A row as an experiments file in `dir` has it: the row itself, or the name of a file that holds one.
///
/// Errors name the file, or the field.
fn row_of(entry: serde_yaml::Value, dir: &Path) -> Result<Row> {
    let serde_yaml::Value::String(file) = entry else { return Ok(serde_yaml::from_value(entry)?) };
    let path = dir.join(file);
    let said = || format!("a row's file, {}", path.display());
    let text = std::fs::read_to_string(&path).with_context(said)?;
    serde_yaml::from_str(&text).with_context(said)
}

impl Experiments {
    /// Reads an experiments file and the files of its rows.
    ///
    /// Errors name the file: no rows or seeds, a name twice, an order that names no row.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Self::parse(&text, path.parent().unwrap_or(Path::new(""))).with_context(|| path.display().to_string())
    }

    /// Parses an experiments file that lies in `dir`.
    fn parse(text: &str, dir: &Path) -> Result<Self> {
        let Experiments { title, recipe, seeds, rows, order, orders, control }: Experiments<serde_yaml::Value> =
            serde_yaml::from_str(text)?;
        let row = |(i, entry)| row_of(entry, dir).with_context(|| format!("`rows`, number {}", i + 1));
        let rows = rows.into_iter().enumerate().map(row).collect::<Result<_>>()?;
        let e = Self { title, recipe, seeds, rows, order, orders, control };
        ensure!(!e.rows.is_empty() && !e.seeds.is_empty(), "`rows` and `seeds` must not be empty");
        let names: Vec<&str> = e.rows.iter().map(|r| r.name.as_str()).collect();
        for (i, name) in names.iter().enumerate() {
            ensure!(!names[..i].contains(name), "two rows are called `{name}`");
            ensure!(!name.is_empty() && !STAGE1.contains(name), "a row cannot be called `{name}`");
        }
        let control = e.control.iter().flat_map(|c| [&c.row, &c.control, &c.over]);
        for name in e.order.iter().chain(e.orders.iter().flatten()).chain(control) {
            ensure!(names.contains(&name.as_str()), "`order`, `orders` or `control` names `{name}`; rows: {}", names.join(", "));
        }
        Ok(e)
    }
}

/// Rows that every table has: the two branches after stage 1.
const STAGE1: [&str; 3] = ["rgb, stage 1", "seg, stage 1", "seg, labels shuffled"];

/// A finished row of one seed.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Done {
    identity: String,
    finished: Finished,
}

/// Runs `job` unless `dir` holds its result already.
fn cached(dir: &Path, identity: &str, run: impl FnOnce() -> Result<Finished>) -> Result<Finished> {
    let path = dir.join("row.json");
    if let Ok(text) = std::fs::read_to_string(&path) {
        if let Ok(done) = serde_json::from_str::<Done>(&text) {
            if done.identity == identity {
                return Ok(done.finished);
            }
            bail!("{} is of another experiment: name another --out, or remove it", dir.display());
        }
    }
    let finished = run()?;
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    write_whole(&path, serde_json::to_string_pretty(&Done { identity: identity.into(), finished: finished.clone() })?.as_bytes())?;
    Ok(finished)
}

fn identity(of: &impl Serialize) -> Result<String> {
    Ok(Sha256::digest(serde_json::to_vec(of)?).iter().map(|b| format!("{b:02x}")).collect())
}

/// What a seed's rows share.
struct Seed<'a> {
    recipe: &'a Recipe,
    seed: u64,
    sets: &'a Sets,
    loader: &'a Loader,
    gpu: Option<&'a Arc<Gpu>>,
    dir: PathBuf,
}

impl Seed<'_> {
    fn stage1_job(&self, kind: Kind) -> Job<'_> {
        stage1_job(kind, self.recipe, self.seed, self.sets, self.loader, self.gpu)
    }

    /// Stage 1 of a branch.
    fn stage1(&self, kind: Kind, folder: &str) -> Result<Finished> {
        let dir = self.dir.join(folder);
        let id = identity(&(kind, self.recipe, self.seed, folder))?;
        cached(&dir, &id, || {
            let (learner, summary) = self.stage1_job(kind).run(&dir)?;
            finish(&learner, &summary, self.loader, self.sets, self.recipe, &dir)
        })
    }

    /// The pairs by the branches whose stage 1 is in folders `seg` and rgb.
    fn partition(&self, seg: &str, folder: &str) -> Result<Vec<Ranked>> {
        let (seg, rgb) = (self.stage1_job(Kind::Seg).load(&self.dir.join(seg))?, self.stage1_job(Kind::Rgb).load(&self.dir.join("rgb"))?);
        let ranks = ranks(&seg, &rgb, self.loader, &self.sets.train, self.recipe.distillation.weighting.n_t)?;
        let summary = summarise(&ranks, self.recipe, &fingerprint(&seg)?);
        write_partition(&ranks, &summary, self.recipe, self.sets, &self.dir.join(folder))?;
        print!("seed {}, {folder}:\n{}", self.seed, audit(&summary));
        Ok(ranks.pairs)
    }

    /// One row, by `recipe`, its own; `rgb` is what stage 1's rgb branch gave.
    fn row(&self, row: &Row, recipe: &Recipe, pairs: &[Ranked], rgb: &Finished, folder: &Path) -> Result<Finished> {
        let taught = row.kind == Kind::Rgb && recipe.distillation.weighting.select != Select::None && recipe.distillation.lambda > 0.0;
        let teaching = match taught {
            true => {
                let teacher = self.stage1_job(Kind::Seg).load(&self.dir.join(row.teacher.folders().0))?;
                Some(teaching(teacher, pairs, &self.sets.train, recipe, self.seed)?)
            }
            false => None,
        };
        let job = Job {
            kind: row.kind,
            recipe,
            schedule: &recipe.distil,
            seed: self.seed,
            train: &self.sets.train,
            validation: &self.sets.validation,
            loader: self.loader,
            gpu: self.gpu.cloned(),
            teaching: teaching.as_ref(),
            title: format!("seed {}, {}", self.seed, row.name),
        };
        // A student that nobody teaches, on stage 1's schedule, is the rgb branch once more, to the last bit.
        if !taught && job.identity()? == self.stage1_job(Kind::Rgb).identity()? {
            return Ok(rgb.clone());
        }
        let (learner, summary) = job.run(folder)?;
        finish(&learner, &summary, self.loader, self.sets, recipe, folder)
    }
}

pub fn run(args: &Args) -> Result<()> {
    set_threads(args.threads)?;
    ensure!(args.quick >= 1, "--quick is 1 or more");
    let mut experiments = Experiments::open(&args.config)?;
    if !args.seeds.is_empty() {
        experiments.seeds.clone_from(&args.seeds);
    }
    let mut recipe = Recipe::open(&args.config.parent().unwrap_or(Path::new("")).join(&experiments.recipe))?;
    recipe.data.wrong_labels = args.wrong_labels.unwrap_or(recipe.data.wrong_labels);
    recipe.init = args.init.clone().unwrap_or(recipe.init);
    for s in [&mut recipe.rgb, &mut recipe.seg, &mut recipe.distil] {
        s.steps = (s.steps / args.quick).max(1);
    }
    recipe.validate()?;
    let gpu = Gpu::open(args.device, recipe.precision)?;
    let sets = Sets::open(&recipe, true, true)?;
    let loader = sets.loader(&recipe)?;
    let shuffled_wanted = experiments.rows.iter().any(|r| r.teacher == Teacher::Shuffled);
    let began = std::time::Instant::now();
    let mut table: BTreeMap<String, Vec<Finished>> = BTreeMap::new();
    for seed in &experiments.seeds {
        let dir = args.out.join(format!("seed-{seed}"));
        let own = Seed { recipe: &recipe, seed: *seed, sets: &sets, loader: &loader, gpu: gpu.as_ref(), dir: dir.clone() };
        let rgb = own.stage1(Kind::Rgb, "rgb")?;
        table.entry(STAGE1[0].into()).or_default().push(rgb.clone());
        table.entry(STAGE1[1].into()).or_default().push(own.stage1(Kind::Seg, "seg")?);
        // The control's teacher sees another place's label map for every image, in training and in use.
        let mut shuffled = None;
        if shuffled_wanted {
            let shuffle = |set: &Set| {
                let mut set = set.clone();
                set.shuffle_labels(*seed);
                set
            };
            let sets = Sets {
                train: shuffle(&sets.train),
                validation: shuffle(&sets.validation),
                tests: sets.tests.iter().map(|(n, s)| (n.clone(), shuffle(s))).collect(),
            };
            let loader = sets.loader(&recipe)?;
            let own = Seed { sets: &sets, loader: &loader, dir: dir.clone(), ..own };
            table.entry(STAGE1[2].into()).or_default().push(own.stage1(Kind::Seg, "seg-shuffled")?);
            shuffled = Some((sets, loader));
        }
        // Ranked when a row asks for them: where all rows are finished, none does.
        let mut pairs: BTreeMap<Teacher, Vec<Ranked>> = BTreeMap::new();
        for row in &experiments.rows {
            let folder = dir.join("rows").join(row.name.replace(|c: char| !c.is_ascii_alphanumeric(), "-"));
            let settings = row.settings(&recipe)?;
            let id = identity(&(row, &settings, seed))?;
            let own = match (row.teacher, &shuffled) {
                (Teacher::Shuffled, Some((sets, loader))) => Seed { sets, loader, dir: dir.clone(), ..own },
                _ => Seed { dir: dir.clone(), ..own },
            };
            let finished = cached(&folder, &id, || {
                let (seg, partition) = row.teacher.folders();
                let pairs = match pairs.entry(row.teacher) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(new) => new.insert(own.partition(seg, partition)?),
                };
                own.row(row, &settings, pairs, &rgb, &folder)
            })
            .with_context(|| format!("row `{}`, seed {seed}", row.name))?;
            let said: Vec<String> = finished.tests.iter().map(|(n, r)| format!("{n} R@1 {:.3}", r.get(1))).collect();
            println!("seed {seed}, {}: {}   ({:.0} min so far)", row.name, said.join("  "), began.elapsed().as_secs_f64() / 60.0);
            table.entry(row.name.clone()).or_default().push(finished);
        }
        write(&experiments, &recipe, &table, &args.out)?;
    }
    println!("{}", std::fs::read_to_string(args.out.join("table.md"))?);
    println!("{}", args.out.join("table.html").display());
    Ok(())
}

/// Mean and standard deviation over seeds (n - 1).
fn mean_and_spread(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n.max(1.0);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, if n > 1.0 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}

/// A row's figures: mean over the tests of one seed, then over seeds.
fn over_tests(row: &[Finished], n: usize) -> Vec<f64> {
    let mean = |f: &Finished| f.tests.values().map(|r| r.get(n)).sum::<f64>() / f.tests.len().max(1) as f64;
    row.iter().map(mean).collect()
}

fn write(e: &Experiments, recipe: &Recipe, table: &BTreeMap<String, Vec<Finished>>, out: &Path) -> Result<()> {
    let names: Vec<&str> = STAGE1.into_iter().chain(e.rows.iter().map(|r| r.name.as_str())).filter(|n| table.contains_key(*n)).collect();
    let tests: Vec<&String> = recipe.tests.keys().collect();
    let figures = |row: &[Finished], of: &dyn Fn(&Finished) -> f64| mean_and_spread(&row.iter().map(of).collect::<Vec<_>>());
    let recall = |f: &Finished, test: &str, n: usize| f.tests.get(test).map_or(0.0, |r: &Recall| r.get(n));
    let seeds = table.values().map(Vec::len).max().unwrap_or(0);

    let mut md = format!("# {}\n\nMean and standard deviation over {seeds} seed(s), per cent.\n\n| |", e.title);
    let mut csv = csv::Writer::from_writer(Vec::new());
    csv.write_record(["row", "test", "metric", "mean", "std", "seeds"])?;
    for t in &tests {
        let _ = write!(md, " {t} R@1 | {t} R@5 | {t} R@10 |");
    }
    md += " mean R@1 | validation R@5 |\n|---|";
    md += &"---|".repeat(3 * tests.len() + 2);
    md.push('\n');
    for name in &names {
        let row = &table[*name];
        let _ = write!(md, "| {name} |");
        let mut cell = |test: &str, metric: &str, (mean, std): (f64, f64)| -> Result<()> {
            let _ = write!(md, " {:.1} ± {:.1} |", 100.0 * mean, 100.0 * std);
            let record = [name.to_string(), test.into(), metric.into(), format!("{mean:.5}"), format!("{std:.5}"), row.len().to_string()];
            Ok(csv.write_record(record)?)
        };
        for t in &tests {
            for n in [1, 5, 10] {
                cell(t, &format!("recall@{n}"), figures(row, &|f| recall(f, t, n)))?;
            }
        }
        cell("mean of the tests", "recall@1", mean_and_spread(&over_tests(row, 1)))?;
        cell("validation", "recall@5", figures(row, &|f| f.validation_recall_5))?;
        md.push('\n');
    }
    let said = verdict(e, table);
    md += &format!("\n{}\n", said.join("\n\n"));
    write_whole(&out.join("table.md"), md.as_bytes())?;
    write_whole(&out.join("table.csv"), &csv.into_inner().map_err(|e| anyhow::anyhow!("{e}"))?)?;
    let plot = plot(&names, table)?;
    let mut body = plot + "<table>";
    for (i, line) in md.lines().filter(|l| l.starts_with('|') && !l.starts_with("|---")).enumerate() {
        let tag = if i == 0 { "th" } else { "td" };
        let cells: Vec<String> = line.trim_matches('|').split('|').map(|c| format!("<{tag}>{}</{tag}>", escape(c.trim()))).collect();
        let _ = write!(body, "<tr>{}</tr>", cells.concat());
    }
    body += "</table>";
    for line in &said {
        let _ = write!(body, "<p>{}</p>", escape(line));
    }
    write_whole(&out.join("table.html"), page(&e.title, &body).as_bytes())
}

/// For each test, and for their mean if there are several: whether the order came out, and whether the gain beats its control.
fn verdict(e: &Experiments, table: &BTreeMap<String, Vec<Finished>>) -> Vec<String> {
    let tests: BTreeSet<&String> = table.values().flatten().flat_map(|f| f.tests.keys()).collect();
    let mut scopes: Vec<Option<&str>> = tests.iter().map(|t| Some(t.as_str())).collect();
    if scopes.len() != 1 {
        scopes.push(None);
    }
    let said = |test: Option<&str>| Some(format!("{}: {}", test.unwrap_or("mean of the tests"), verdict_of(e, table, test)?));
    scopes.into_iter().filter_map(said).collect()
}

/// R@1 of a row by one test, or the mean over its tests, seed by seed.
fn recalls_at_1(row: &[Finished], test: Option<&str>) -> Vec<f64> {
    match test {
        Some(test) => row.iter().map(|f| f.tests.get(test).map_or(0.0, |r| r.get(1))).collect(),
        None => over_tests(row, 1),
    }
}

/// The verdict by one figure; `None` where nothing was expected.
fn verdict_of(e: &Experiments, table: &BTreeMap<String, Vec<Finished>>, test: Option<&str>) -> Option<String> {
    let r1 = |row: &[Finished]| recalls_at_1(row, test);
    // A seed's rows share teacher and ranks, so that differences may scatter less than the means.
    let gains = |a: &[Finished], b: &[Finished]| -> (f64, f64) {
        mean_and_spread(&r1(a).iter().zip(r1(b)).map(|(a, b)| 100.0 * (a - b)).collect::<Vec<_>>())
    };
    let mut out = Vec::new();
    for names in std::iter::once(&e.order).chain(&e.orders) {
        let order: Vec<(&String, &[Finished])> = names.iter().filter_map(|n| Some((n, table.get(n)?.as_slice()))).collect();
        if order.len() < 2 {
            continue;
        }
        let means: Vec<(f64, f64)> = order.iter().map(|(_, row)| mean_and_spread(&r1(row))).collect();
        let text: Vec<String> =
            order.iter().zip(&means).map(|((n, _), (m, s))| format!("{n} {:.1} ± {:.1}", 100.0 * m, 100.0 * s)).collect();
        let pairs = || order.windows(2).zip(means.windows(2));
        let broken: Vec<String> =
            pairs().filter(|(_, m)| m[0].0 < m[1].0).map(|(w, _)| format!("{} is below {}", w[0].0, w[1].0)).collect();
        let equal: Vec<String> =
            pairs().filter(|(_, m)| m[0].0 == m[1].0).map(|(w, _)| format!("{} is no better than {}", w[0].0, w[1].0)).collect();
        let how = match (broken.is_empty(), equal.is_empty()) {
            (false, _) => format!("does not come out: {}", broken.join(", ")),
            (true, false) => format!("is not broken, but {}", equal.join(", ")),
            (true, true) => "comes out".to_string(),
        };
        let expected = if out.is_empty() { "expected" } else { "Expected" };
        out.push(format!("{expected} order (R@1) {}. It {how}.", text.join(" >= ")));
        // One seed has no spread.
        let steps: Vec<String> = order
            .windows(2)
            .filter(|w| w[0].1.len() > 1)
            .map(|w| {
                let (mean, std) = gains(w[0].1, w[1].1);
                let unclear = if mean.abs() <= std { " (within the spread)" } else { "" };
                format!("{} over {} {mean:+.1} ± {std:.1}{unclear}", w[0].0, w[1].0)
            })
            .collect();
        if !steps.is_empty() {
            out.push(format!("Seed by seed, points: {}.", steps.join(", ")));
        }
    }
    let rows = e.control.as_ref().and_then(|c| Some((c, table.get(&c.row)?, table.get(&c.control)?, table.get(&c.over)?)));
    if let Some((c, row, control, base)) = rows {
        let ((m, s), (cm, cs)) = (gains(row, base), gains(control, base));
        let counts = match row.len() {
            0 | 1 => "of one seed says nothing of the spread",
            _ if m > cm + s.max(cs) => "counts as distilled structure",
            _ => "is not beyond the control",
        };
        out.push(format!(
            "Gain over {}, seed by seed: {} {m:+.1} ± {s:.1}, control ({}) {cm:+.1} ± {cs:.1} points: the gain {counts}.",
            c.over, c.row, c.control
        ));
        // The rule above asks of every seed; whether the mean is beyond chance is another question, which more seeds answer.
        if row.len() > 1 {
            let (d, ds) = gains(row, control);
            let error = ds / (row.len() as f64).sqrt();
            out.push(format!("{} over its control, seed by seed: {d:+.1} ± {ds:.1}, standard error of the mean {error:.1}.", c.row));
        }
    }
    (!out.is_empty()).then(|| out.join(" "))
}

/// Mean R@1 of each row with its seeds as dots.
fn plot(names: &[&str], table: &BTreeMap<String, Vec<Finished>>) -> Result<String> {
    let mut svg = String::new();
    {
        let height = 60 + 34 * names.len() as u32;
        let root = SVGBackend::with_string(&mut svg, (1000, height)).into_drawing_area();
        let fail = |e: &dyn std::fmt::Display| anyhow::anyhow!("plot: {e}");
        root.fill(&WHITE).map_err(|e| fail(&e))?;
        let most = names.iter().flat_map(|n| over_tests(&table[*n], 1)).fold(0.05, f64::max) * 1.1;
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .x_label_area_size(36)
            .y_label_area_size(190)
            .build_cartesian_2d(0.0..100.0 * most, 0.0..names.len() as f64)
            .map_err(|e| fail(&e))?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .x_desc("mean R@1 over the tests, per cent")
            .draw()
            .map_err(|e| fail(&e))?;
        for (i, name) in names.iter().enumerate() {
            let y = (names.len() - i) as f64 - 0.5;
            let values = over_tests(&table[*name], 1);
            let (mean, _) = mean_and_spread(&values);
            let bar = Rectangle::new([(0.0, y - 0.32), (100.0 * mean, y + 0.32)], RGBColor(120, 160, 210).filled());
            let dots = values.iter().map(|v| Circle::new((100.0 * v, y), 4, BLACK.filled()));
            chart.draw_series([bar]).map_err(|e| fail(&e))?;
            chart.draw_series(dots).map_err(|e| fail(&e))?;
            let at = (12, 10 + (i as f64 * (f64::from(height) - 56.0) / names.len() as f64 + 12.0) as i32);
            root.draw_text(name, &("sans-serif", 15).into_text_style(&root), at).map_err(|e| fail(&e))?;
        }
        root.present().map_err(|e| fail(&e))?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_experiments_of_the_repository_are_valid() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments");
        let mut seen = 0;
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.to_string_lossy().ends_with("_recipe.yaml") {
                Recipe::open(&path).unwrap();
                continue;
            }
            if path.is_dir() {
                continue;
            }
            let e = Experiments::open(&path).unwrap();
            assert!(e.seeds.len() >= 3 && dir.join(&e.recipe).is_file(), "{}", path.display());
            seen += 1;
        }
        assert!(seen >= 2);
        let files = std::fs::read_dir(dir.join("rows")).unwrap().count();
        assert_eq!(Experiments::open(&dir.join("ablation.yaml")).unwrap().rows.len(), files, "a row's file that no table has");
    }

    #[test]
    fn what_is_wrong_with_an_experiments_file_is_named() {
        let good = "title: t\nrecipe: r\nseeds: [1]\nrows:\n  - {name: a}\n  - {name: b}\n";
        let parse = |text: &str| Experiments::parse(text, Path::new("/nowhere"));
        assert!(parse(good).is_ok());
        for (text, want) in [
            (good.replace("name: b", "name: a"), "two rows are called `a`"),
            (format!("{good}order: [c]\n"), "names `c`; rows: a, b"),
            (format!("{good}orders: [[a, b], [b, d]]\n"), "names `d`; rows: a, b"),
            (good.replace("seeds: [1]", "seeds: []"), "must not be empty"),
            (good.replace("name: b", "name: 'rgb, stage 1'"), "cannot be called"),
            (good.replace("name: b", "nom: b"), "`rows`, number 2: unknown field `nom`"),
            (good.replace("{name: b}", "b.yaml"), "`rows`, number 2: a row's file, /nowhere/b.yaml: No such file"),
        ] {
            let said = format!("{:#}", parse(&text).unwrap_err());
            assert!(said.contains(want), "{text}: {said}");
        }
    }

    #[test]
    fn a_row_changes_what_it_names_and_nothing_else() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments");
        let recipe = Recipe::open(&dir.join("synthetic_recipe.yaml")).unwrap();
        let row = |text: &str| serde_yaml::from_str::<Row>(text).unwrap();
        assert_eq!(row("name: a").settings(&recipe).unwrap(), recipe);
        let own = row("{name: a, select: S2, phi: ratio, normalise: false, lambda: 2, feature: taps, mislead: D4, lr: 2.0e-5}")
            .settings(&recipe)
            .unwrap();
        let w = &own.distillation.weighting;
        assert_eq!((w.select, w.phi, w.normalise, own.distillation.mislead), (Select::S2, Phi::Ratio, false, Select::D4));
        assert_eq!((own.distillation.lambda, own.distillation.feature, own.distil.lr), (2.0, Feature::Taps, 2e-5));
        let back = Recipe { distillation: recipe.distillation.clone(), distil: recipe.distil.clone(), ..own };
        assert_eq!(back, recipe);
        let said = format!("{:#}", row("{name: a, lr: -1}").settings(&recipe).unwrap_err());
        assert!(said.contains("distil.lr"), "{said}");
        // Files written before rows had it are of the same experiments.
        let text = serde_json::to_string(&(row("name: a"), &recipe)).unwrap();
        assert!(!text.contains("normalise\":null") && !text.contains("mislead"), "{text}");
    }

    fn row(recalls: &[f64]) -> Vec<Finished> {
        let recall = |r: f64| Recall { at: [(1, r)].into(), queries: 100, without: 0 };
        let finished = |r: &f64| Finished {
            kind: Kind::Rgb,
            validation_recall_5: 0.0,
            best_step: 0,
            steps: 0,
            skipped_steps: 0,
            tests: [("a".to_string(), recall(*r)), ("b".to_string(), recall(*r + 0.1))].into(),
        };
        recalls.iter().map(finished).collect()
    }

    #[test]
    fn order_and_control_are_judged_over_seeds() {
        let (mean, std) = mean_and_spread(&over_tests(&row(&[0.2, 0.4]), 1));
        assert!((mean - 0.35).abs() < 1e-12 && (std - 0.02f64.sqrt()).abs() < 1e-12);
        let file = "title: t\nrecipe: r\nseeds: [1]\nrows: [{name: w}, {name: n}, {name: c}]\norder: [w, n]\ncontrol: {row: w, control: c, over: n}\n";
        let e = Experiments::parse(file, Path::new("")).unwrap();
        let table = |w: &[f64], n: &[f64], c: &[f64]| BTreeMap::from([("w".into(), row(w)), ("n".into(), row(n)), ("c".into(), row(c))]);
        let said = verdict(&e, &table(&[0.5, 0.52], &[0.3, 0.31], &[0.3, 0.32]));
        assert!(said.len() == 3 && said[0].starts_with("a: ") && said[2].starts_with("mean of the tests: "), "{said:?}");
        for said in &said {
            assert!(said.contains("It comes out.") && said.contains("counts as distilled structure"), "{said}");
            assert!(said.contains("Seed by seed, points: w over n +20.5 ± 0.7."), "{said}");
            assert!(said.contains("w over its control, seed by seed: +20.0 ± 0.0, standard error of the mean 0.0."), "{said}");
        }
        assert!(said[1].contains("w 61.0 ± 1.4 >= n 40.5 ± 0.7."), "{said:?}");
        // A spread of zero from one seed once passed for certainty.
        let said = verdict(&e, &table(&[0.5], &[0.3], &[0.31]));
        assert!(
            said[2].contains("of one seed says nothing") && !said[2].contains("points: w over n") && !said[2].contains("standard error"),
            "{said:?}"
        );
        let said = verdict(&e, &table(&[0.3, 0.31], &[0.35, 0.31], &[0.36, 0.35]));
        assert!(said[0].contains("does not come out: w is below n") && said[0].contains("is not beyond the control"), "{said:?}");
        assert!(said[0].contains("w over n -2.5 ± 3.5 (within the spread)"), "{said:?}");
        // Seed by seed -6 and -4.
        assert!(said[0].contains("w over its control, seed by seed: -5.0 ± 1.4, standard error of the mean 1.0."), "{said:?}");
        // Rows that are equal show no order: a test that every row gets right once passed for the papers' order.
        let said = verdict(&e, &table(&[0.5, 0.52], &[0.5, 0.52], &[0.5, 0.52]));
        assert!(said[0].contains("It is not broken, but w is no better than n."), "{said:?}");
        // Each further order has a sentence of its own.
        let e = Experiments { orders: vec![vec!["n".into(), "w".into()]], ..e };
        let said = verdict(&e, &table(&[0.3, 0.31], &[0.2, 0.21], &[0.2, 0.2]));
        assert!(said[0].contains("It comes out.") && said[0].contains("It does not come out: n is below w."), "{said:?}");
        let nothing = Experiments { order: Vec::new(), orders: Vec::new(), control: None, ..e };
        assert!(verdict(&nothing, &table(&[0.3], &[0.3], &[0.3])).is_empty());
    }
}
