//! The commands that train: `stage1`, `partition`, `distill`.

use crate::checkpoint::write_whole;
use crate::data::{progress, Loader, Set};
use crate::learner::{Kind, Learner};
use crate::net::Gpu;
use crate::partition::{counts, group, Complementarity, Group, Select, GROUPS};
use crate::rank::{best_ranks, rank_among_wrong, similarities, Recall};
use crate::recipe::Recipe;
use crate::report;
use crate::train::{describe_set, evaluate, export, loader, Job, Misled, Summary, Teaching};
use anyhow::{bail, ensure, Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use structvpr::model::ComputeDevice;

#[derive(clap::Args)]
pub struct Common {
    /// The recipe, YAML.
    #[arg(long)]
    config: PathBuf,
    /// Seed of everything that is drawn.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Processor threads; 0: all.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Where the networks are computed: cpu, or cuda:N.
    #[arg(long, default_value_t)]
    device: ComputeDevice,
}

#[derive(clap::Args)]
pub struct Stage1 {
    #[command(flatten)]
    common: Common,
    /// rgb, seg, or a rival: concat-input, concat-feat, multi-task.
    #[arg(long)]
    branch: String,
    /// Folder of the training; one that holds a checkpoint goes on.
    #[arg(long)]
    out: PathBuf,
}

#[derive(clap::Args)]
pub struct Partition {
    #[command(flatten)]
    common: Common,
    /// Folders of the finished stage 1 of both branches.
    #[arg(long)]
    seg: PathBuf,
    #[arg(long)]
    rgb: PathBuf,
    /// Folder for pairs.csv, partition.json and report.html.
    #[arg(long)]
    out: PathBuf,
}

#[derive(clap::Args)]
pub struct Distill {
    #[command(flatten)]
    common: Common,
    /// Folder of the finished seg branch.
    #[arg(long)]
    seg: PathBuf,
    /// Folder that `training partition` wrote.
    #[arg(long)]
    partition: PathBuf,
    /// Folder of the training; one that holds a checkpoint goes on.
    #[arg(long)]
    out: PathBuf,
}

/// Sets the number of threads of everything.
pub fn set_threads(threads: usize) -> Result<()> {
    ensure!(threads <= 1024, "--threads {threads} is above 1024");
    if threads > 0 {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().context("cannot set the number of threads")?;
    }
    Ok(())
}

/// The sets of a recipe.
pub struct Sets {
    pub train: Set,
    pub validation: Set,
    /// With what its evaluation lacks, if that is so.
    pub tests: BTreeMap<String, Set>,
}

impl Sets {
    /// Opens them; `train_labels`: training needs label maps; `all_labels`: evaluation, too.
    pub fn open(recipe: &Recipe, train_labels: bool, all_labels: bool) -> Result<Self> {
        let open = |specs: &[String], labels| Set::open(specs, None, &recipe.data, labels);
        let train = Set::open(&recipe.train, Some(&recipe.near), &recipe.data, train_labels).context("train")?;
        for line in &train.left_out {
            eprintln!("training: left out {line}");
        }
        let tests = recipe.tests.iter().map(|(n, s)| Ok((n.clone(), open(s, all_labels).with_context(|| format!("tests.{n}"))?)));
        Ok(Self { train, validation: open(&recipe.validation, all_labels).context("validation")?, tests: tests.collect::<Result<_>>()? })
    }

    /// A loader that knows them all.
    pub fn loader(&self, recipe: &Recipe) -> Result<Loader> {
        let mut all = vec![&self.train, &self.validation];
        all.extend(self.tests.values());
        loader(recipe, &all)
    }
}

/// What a finished training leaves beside its checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    pub kind: Kind,
    pub validation_recall_5: f64,
    pub best_step: usize,
    pub steps: usize,
    pub skipped_steps: usize,
    pub tests: BTreeMap<String, Recall>,
}

/// Evaluates on the tests, writes result.json and, for what the node can load, model.safetensors.
pub fn finish(learner: &Learner, summary: &Summary, loader: &Loader, sets: &Sets, recipe: &Recipe, dir: &Path) -> Result<Finished> {
    let tests = sets.tests.iter().map(|(n, s)| Ok((n.clone(), evaluate(learner, loader, s)?))).collect::<Result<BTreeMap<_, _>>>()?;
    let finished = Finished {
        kind: learner.kind,
        validation_recall_5: summary.best,
        best_step: summary.best_step,
        steps: summary.steps,
        skipped_steps: summary.skipped,
        tests,
    };
    if matches!(learner.kind, Kind::Rgb | Kind::MultiTask) {
        export(
            learner,
            &dir.join("model.safetensors"),
            &format!("{}: {} steps on {}", recipe.name, summary.steps, recipe.train.join(" ")),
        )?;
    }
    write_whole(&dir.join("result.json"), serde_json::to_string_pretty(&finished)?.as_bytes())?;
    Ok(finished)
}

fn say(finished: &Finished, dir: &Path) {
    println!("{}: validation R@5 {:.3} at step {} of {}", dir.display(), finished.validation_recall_5, finished.best_step, finished.steps);
    if finished.skipped_steps > 0 {
        println!("  {} steps left out, their loss was not a number", finished.skipped_steps);
    }
    for (name, r) in &finished.tests {
        println!(
            "  {name}: R@1 {:.3}  R@5 {:.3}  R@10 {:.3}  ({} queries, {} without a match)",
            r.get(1),
            r.get(5),
            r.get(10),
            r.queries,
            r.without
        );
    }
    if dir.join("model.safetensors").is_file() {
        println!("  the node's file: {}", dir.join("model.safetensors").display());
    }
}

pub fn stage1(args: &Stage1) -> Result<()> {
    set_threads(args.common.threads)?;
    let recipe = Recipe::open(&args.common.config)?;
    let kind = match args.branch.as_str() {
        "rgb" => Kind::Rgb,
        "seg" => Kind::Seg,
        "concat-input" => Kind::ConcatInput,
        "concat-feat" => Kind::ConcatFeat,
        "multi-task" => Kind::MultiTask,
        other => bail!("--branch {other} (allowed: rgb, seg, concat-input, concat-feat, multi-task)"),
    };
    let gpu = Gpu::open(args.common.device, recipe.precision)?;
    // Multi-task segments while it trains; to run, it wants images only.
    let sets = Sets::open(&recipe, kind.needs_labels(), kind.needs_labels() && kind != Kind::MultiTask)?;
    let loader = sets.loader(&recipe)?;
    let schedule = match kind {
        Kind::Rgb => &recipe.rgb,
        Kind::Seg => &recipe.seg,
        _ => &recipe.distil,
    };
    let job = Job {
        kind,
        recipe: &recipe,
        schedule,
        seed: args.common.seed,
        train: &sets.train,
        validation: &sets.validation,
        loader: &loader,
        gpu,
        teaching: None,
        title: format!("stage 1, {}", args.branch),
    };
    let (learner, summary) = job.run(&args.out)?;
    say(&finish(&learner, &summary, &loader, &sets, &recipe, &args.out)?, &args.out);
    Ok(())
}

/// One training pair and its ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairRow {
    pub query: String,
    pub reference: String,
    /// Rank of the reference by the seg branch, from 1.
    pub x: usize,
    /// Rank by the rgb branch.
    pub y: usize,
    pub group: Group,
}

/// A training pair, by its rows in the training set, and its ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranked {
    pub query: usize,
    pub reference: usize,
    /// By the seg branch, from 1.
    pub x: usize,
    /// By the rgb branch, from 1.
    pub y: usize,
}

/// The ranks of pairs, as the weighting wants them.
fn xy(pairs: &[Ranked]) -> Vec<(usize, usize)> {
    pairs.iter().map(|p| (p.x, p.y)).collect()
}

/// All training pairs with their ranks, and what the branches know of each query.
pub struct Ranks {
    pub pairs: Vec<Ranked>,
    /// At one candidate, and at N_t.
    pub first: Complementarity,
    pub within: Complementarity,
}

/// The ranks of every training pair by both branches, over all training references but the query's other positives
/// (see [`rank_among_wrong`]) [paper, but for that].
pub fn ranks(seg: &Learner, rgb: &Learner, loader: &Loader, set: &Set, n_t: usize) -> Result<Ranks> {
    let bar = progress(2 * (set.queries.len() + set.references.len()), "describing");
    let mut similar = Vec::new();
    let mut best = Vec::new();
    for learner in [seg, rgb] {
        let (q, r) = describe_set(learner, loader, set, |n| bar.inc(n as u64))?;
        similar.push(similarities(&q, &r)?);
        best.push(best_ranks(&q, &r, &set.positives)?);
    }
    bar.finish_and_clear();
    let n = set.references.len();
    let mut pairs = Vec::new();
    for (q, positives) in set.positives.iter().enumerate() {
        let of = |branch: usize, r: usize| rank_among_wrong(&similar[branch][q * n..][..n], r, positives);
        pairs.extend(positives.iter().map(|r| Ranked { query: q, reference: *r, x: of(0, *r), y: of(1, *r) }));
    }
    let with: Vec<usize> = (0..set.queries.len()).filter(|q| !set.positives[*q].is_empty()).collect();
    let of = |branch: usize| with.iter().map(|q| best[branch][*q]).collect::<Vec<_>>();
    let at = |n| Complementarity::of(&of(0), &of(1), n);
    Ok(Ranks { pairs, first: at(1), within: at(n_t) })
}

/// Summary of a partition, as partition.json.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PartitionSummary {
    pub pairs: usize,
    pub shares: BTreeMap<String, f64>,
    /// Mean weight of each group by the recipe's weighting.
    pub mean_weights: BTreeMap<String, f64>,
    pub at_1: Complementarity,
    pub at_n_t: Complementarity,
    pub teacher: String,
}

/// Sizes of the groups and mean weights.
pub fn summarise(ranks: &Ranks, recipe: &Recipe, teacher: &str) -> PartitionSummary {
    let w = &recipe.distillation.weighting;
    let xy = xy(&ranks.pairs);
    let weights = w.weights(&xy);
    let all = xy.len().max(1) as f64;
    let counts = counts(&xy, w.n_t);
    let mut shares: BTreeMap<String, f64> = counts.iter().map(|(g, n)| (format!("{g:?}"), *n as f64 / all)).collect();
    shares.insert("S1".into(), 1.0 - shares["D4"]);
    shares.insert("S2".into(), shares["D4"]);
    let r1 = xy.iter().filter(|(_, y)| *y <= w.n_t).count() as f64 / all;
    shares.insert("R1".into(), r1);
    shares.insert("R2".into(), 1.0 - r1);
    let mean = |g: Group| {
        let own: Vec<f64> = xy.iter().zip(&weights).filter(|((x, y), _)| group(*x, *y, w.n_t) == g).map(|(_, w)| *w).collect();
        own.iter().sum::<f64>() / own.len().max(1) as f64
    };
    PartitionSummary {
        pairs: xy.len(),
        shares,
        mean_weights: GROUPS.iter().map(|g| (format!("{g:?}"), mean(*g))).collect(),
        at_1: ranks.first,
        at_n_t: ranks.within,
        teacher: teacher.into(),
    }
}

/// The audit in words.
pub fn audit(s: &PartitionSummary) -> String {
    let line = |what: &str, c: &Complementarity| {
        let share = |n: usize| 100.0 * n as f64 / c.all().max(1) as f64;
        format!(
            "{what}: both {:.1} %, rgb only {:.1} %, seg only {:.1} %, neither {:.1} %; union {:.1} %",
            share(c.both),
            share(c.rgb_only),
            share(c.seg_only),
            share(c.neither),
            100.0 * c.union()
        )
    };
    let mut text = format!("{}\n{}\n", line("right at 1", &s.at_1), line("right within N_t", &s.at_n_t));
    let part = |k: &str| format!("{k} {:.2} %", 100.0 * s.shares[k]);
    text += &format!("{} pairs: {}\n", s.pairs, ["D1", "D2", "D3", "D4", "S1", "S2", "R1", "R2"].map(part).join(", "));
    if s.at_1.nothing_to_distil() {
        text += "NOTHING TO DISTIL: the seg branch is right where rgb is wrong in fewer than one query of a hundred. A stronger teacher, better label maps or harder pairs are needed before stage 2 can gain anything.\n";
    }
    text
}

/// Identity of a learner's numbers.
pub fn fingerprint(learner: &Learner) -> Result<String> {
    let mut hash = Sha256::new();
    for (name, values) in learner.state()? {
        hash.update(name);
        for v in values {
            hash.update(v.to_le_bytes());
        }
    }
    Ok(hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect())
}

/// The jobs whose results a partition reads.
pub fn stage1_job<'a>(kind: Kind, recipe: &'a Recipe, seed: u64, sets: &'a Sets, loader: &'a Loader, gpu: Option<&Arc<Gpu>>) -> Job<'a> {
    let schedule = if kind == Kind::Seg { &recipe.seg } else { &recipe.rgb };
    let title = format!("stage 1, {}", if kind == Kind::Seg { "seg" } else { "rgb" });
    let (train, validation) = (&sets.train, &sets.validation);
    Job { kind, recipe, schedule, seed, train, validation, loader, gpu: gpu.cloned(), teaching: None, title }
}

/// Writes pairs.csv, partition.json and report.html.
pub fn write_partition(ranks: &Ranks, summary: &PartitionSummary, recipe: &Recipe, sets: &Sets, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let mut csv = csv::Writer::from_writer(Vec::new());
    let n_t = recipe.distillation.weighting.n_t;
    for p in &ranks.pairs {
        let path = |item: &crate::data::Item| item.path.display().to_string();
        let (query, reference) = (path(&sets.train.queries[p.query]), path(&sets.train.references[p.reference]));
        csv.serialize(PairRow { query, reference, x: p.x, y: p.y, group: group(p.x, p.y, n_t) })?;
    }
    write_whole(&dir.join("pairs.csv"), &csv.into_inner().map_err(|e| anyhow::anyhow!("{e}"))?)?;
    write_whole(&dir.join("partition.json"), serde_json::to_string_pretty(summary)?.as_bytes())?;
    write_whole(&dir.join("report.html"), report::partition(ranks, summary, recipe, &sets.train)?.as_bytes())
}

pub fn partition(args: &Partition) -> Result<()> {
    set_threads(args.common.threads)?;
    let recipe = Recipe::open(&args.common.config)?;
    let gpu = Gpu::open(args.common.device, recipe.precision)?;
    let sets = Sets::open(&recipe, true, false)?;
    let loader = sets.loader(&recipe)?;
    let seg = stage1_job(Kind::Seg, &recipe, args.common.seed, &sets, &loader, gpu.as_ref()).load(&args.seg)?;
    let rgb = stage1_job(Kind::Rgb, &recipe, args.common.seed, &sets, &loader, gpu.as_ref()).load(&args.rgb)?;
    let ranks = ranks(&seg, &rgb, &loader, &sets.train, recipe.distillation.weighting.n_t)?;
    let summary = summarise(&ranks, &recipe, &fingerprint(&seg)?);
    write_partition(&ranks, &summary, &recipe, &sets, &args.out)?;
    print!("{}", audit(&summary));
    println!("report: {}", args.out.join("report.html").display());
    Ok(())
}

/// The weights of the training pairs of `set`, by the recipe's weighting; `seed` draws the label maps of those that are misled.
pub fn teaching(teacher: Learner, pairs: &[Ranked], set: &Set, recipe: &Recipe, seed: u64) -> Result<Teaching> {
    let d = &recipe.distillation;
    let weights = d.weighting.weights(&xy(pairs));
    let mut hash = Sha256::new();
    hash.update(fingerprint(&teacher)?);
    for (p, w) in pairs.iter().zip(&weights) {
        hash.update(format!("{p:?} {w}\n"));
    }
    // Who is misled, and by what, follows from the pairs, the seed and the recipe, which are part of a training's identity.
    let identity = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    let weights = pairs.iter().zip(weights).map(|(p, w)| ((p.query, p.reference), w as f32)).collect();
    let n_t = d.weighting.n_t;
    let misled = pairs.iter().filter(|p| d.mislead.holds(p.y, group(p.x, p.y, n_t), n_t)).map(|p| (p.query, p.reference));
    let misled = (d.mislead != Select::None).then(|| Misled::new(misled.collect(), set, seed));
    Ok(Teaching { teacher, identity, weights, misled })
}

fn read_pairs(path: &Path, set: &Set) -> Result<Vec<Ranked>> {
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    let rows = |items: &[crate::data::Item]| -> std::collections::HashMap<String, usize> {
        items.iter().enumerate().map(|(i, item)| (item.path.display().to_string(), i)).collect()
    };
    let (queries, references) = (rows(&set.queries), rows(&set.references));
    let mut out = Vec::new();
    for (i, row) in csv::Reader::from_reader(&text[..]).deserialize::<PairRow>().enumerate() {
        let row = row.with_context(|| format!("{}, record {}", path.display(), i + 1))?;
        let find = |of: &std::collections::HashMap<String, usize>, name: &String| {
            of.get(name).copied().with_context(|| format!("{}: {name} is not in the recipe's training set", path.display()))
        };
        let (query, reference) = (find(&queries, &row.query)?, find(&references, &row.reference)?);
        out.push(Ranked { query, reference, x: row.x, y: row.y });
    }
    ensure!(!out.is_empty(), "{} holds no pair", path.display());
    Ok(out)
}

pub fn distill(args: &Distill) -> Result<()> {
    set_threads(args.common.threads)?;
    let recipe = Recipe::open(&args.common.config)?;
    let gpu = Gpu::open(args.common.device, recipe.precision)?;
    let sets = Sets::open(&recipe, true, false)?;
    let loader = sets.loader(&recipe)?;
    let teacher = stage1_job(Kind::Seg, &recipe, args.common.seed, &sets, &loader, gpu.as_ref()).load(&args.seg)?;
    let path = args.partition.join("partition.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let summary: PartitionSummary = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    ensure!(summary.teacher == fingerprint(&teacher)?, "{} was made with another teacher than {}", path.display(), args.seg.display());
    let pairs = read_pairs(&args.partition.join("pairs.csv"), &sets.train)?;
    let teaching = teaching(teacher, &pairs, &sets.train, &recipe, args.common.seed)?;
    let job = Job {
        kind: Kind::Rgb,
        recipe: &recipe,
        schedule: &recipe.distil,
        seed: args.common.seed,
        train: &sets.train,
        validation: &sets.validation,
        loader: &loader,
        gpu,
        teaching: Some(&teaching),
        title: "stage 2".into(),
    };
    let (learner, summary) = job.run(&args.out)?;
    say(&finish(&learner, &summary, &loader, &sets, &recipe, &args.out)?, &args.out);
    Ok(())
}
