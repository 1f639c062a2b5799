//! One training, of any kind: mine, step, validate, keep the best; goes on after a kill and gives the same bytes.

use crate::checkpoint::{Checkpoint, Header, Log, VERSION};
use crate::data::{progress, Input, Item, Loader, Set};
use crate::learner::{preprocessing, Kind, Learner, SEGMENTATION, UNFOLD_IMAGES};
use crate::loss::{distance, triplet, MARGIN};
use crate::net::{Gpu, Precision};
use crate::optim::{cosine, AdamW, Settings as Adam};
use crate::rank::{best_ranks, describe, similarities, Recall, Rows};
use crate::recipe::{Feature, OnNan, Positives, Recipe, Schedule};
use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use nalgebra::DMatrix;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::sync::Arc;

/// A teacher and what it teaches: the weight of each training pair (query, reference).
pub struct Teaching {
    pub teacher: Learner,
    /// Hash of teacher and weights.
    pub identity: String,
    pub weights: HashMap<(usize, usize), f32>,
    pub misled: Option<Misled>,
}

/// Training pairs (query, reference) that the teacher is shown other places' label maps for, see
/// [`mislead`](crate::recipe::Distillation::mislead).
pub struct Misled {
    pub pairs: HashSet<(usize, usize)>,
    /// Of each query, the query whose label map stands in.
    pub queries: Vec<usize>,
    /// The same for references.
    pub references: Vec<usize>,
}

impl Misled {
    /// `pairs` misled, by stand-ins that `seed` draws among all of the set.
    pub fn new(pairs: HashSet<(usize, usize)>, set: &Set, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x0031_51ed);
        let mut drawn = |n: usize| {
            let mut all: Vec<usize> = (0..n).collect();
            all.shuffle(&mut rng);
            all
        };
        Self { pairs, queries: drawn(set.queries.len()), references: drawn(set.references.len()) }
    }
}

/// What a training needs.
pub struct Job<'a> {
    pub kind: Kind,
    pub recipe: &'a Recipe,
    pub schedule: &'a Schedule,
    pub seed: u64,
    pub train: &'a Set,
    pub validation: &'a Set,
    pub loader: &'a Loader,
    /// Where the networks are computed; none: on the processor.
    pub gpu: Option<Arc<Gpu>>,
    pub teaching: Option<&'a Teaching>,
    /// What the progress bar is called.
    pub title: String,
}

/// How it went.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Validation recall@5 of what is kept, and the step it was reached at.
    pub best: f64,
    pub best_step: usize,
    pub steps: usize,
    pub skipped: usize,
}

/// A query, its positive and its negatives.
struct Triplet {
    query: usize,
    positive: usize,
    negatives: Vec<usize>,
}

/// A batch as the step wants it: queries, positives, then each query's negatives.
struct Batch {
    images: Vec<Tensor>,
    teacher: Option<Vec<Tensor>>,
    planes: Vec<Arc<crate::augment::Pair>>,
    /// Names, for what is not a number.
    names: Vec<String>,
    weights: Vec<f32>,
}

impl Job<'_> {
    /// SHA-256 of everything that decides the result.
    pub fn identity(&self) -> Result<String> {
        let mut hash = Sha256::new();
        let r = self.recipe;
        // What is done with the weights in the end does not change how they are trained.
        let schedule = Schedule { mix: 1.0, ..self.schedule.clone() };
        hash.update(serde_json::to_vec(&(self.kind, schedule, self.seed, &r.data, &r.augment, &r.init, r.pooling, r.on_nan))?);
        hash.update(serde_json::to_vec(&(&r.near, &r.train, &r.validation))?);
        if r.precision != Precision::F32 {
            hash.update(serde_json::to_vec(&r.precision)?);
        }
        if self.teaching.is_some() {
            hash.update(serde_json::to_vec(&r.distillation)?);
        }
        if let Some(path) = self.recipe.init_file() {
            hash.update(std::fs::read(&path).with_context(|| path.display().to_string())?);
        }
        for item in self.train.queries.iter().chain(&self.train.references) {
            // Label maps that it does not look at may be anywhere.
            let labels = item.labels.as_ref().filter(|_| self.kind.needs_labels() || self.teaching.is_some());
            hash.update(format!("{}|{labels:?}\n", item.path.display()));
        }
        hash.update(self.teaching.map_or("", |t| &t.identity));
        Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }

    /// Trains in `dir`, from its checkpoint if it has one, and leaves the best weights there. Returns the learner with them.
    ///
    /// Errors: a checkpoint of another training; bad input by name; a loss that is not a number (see [`OnNan`]); a file that
    /// cannot be written. The last checkpoint stays whole in each case.
    pub fn run(&self, dir: &Path) -> Result<(Learner, Summary)> {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let learner = self.learner()?;
        let path = dir.join("checkpoint.safetensors");
        // Those of a checkpoint replace these.
        let projections = if path.is_file() { self.projections(None)? } else { self.projections(Some(&learner))? };
        let mut vars = learner.vars();
        let student = vars.len();
        vars.extend(projections.iter().enumerate().map(|(i, v)| (format!("projection{i}"), v.clone(), vec![])));
        let settings = Adam { weight_decay: self.schedule.weight_decay, ..Adam::default() };
        let slots = |range: &[(String, Var, Vec<std::ops::Range<usize>>)]| range.iter().map(|(_, v, d)| (v.clone(), d.clone())).collect();
        // The projections are new and have a learning rate of their own.
        let mut optimiser = AdamW::new(settings, slots(&vars[..student]));
        let mut second = AdamW::new(settings, slots(&vars[student..]));

        let mut header = Header { version: VERSION, identity: self.identity()?, ..Header::default() };
        let mut best: Vec<(String, Vec<f32>)> = Vec::new();
        if path.is_file() {
            let mut c = Checkpoint::read(&path)?;
            self.own(&c, &path)?;
            learner.restore(|n| c.take(n))?;
            for (i, v) in projections.iter().enumerate() {
                v.set(&Tensor::from_vec(c.take(&format!("projection{i}"))?, v.shape(), &Device::Cpu)?)?;
            }
            let taken = c.header.optimiser_steps;
            for (opt, names) in [(&mut optimiser, &vars[..student]), (&mut second, &vars[student..])] {
                let of = |(n, ..): &(String, Var, _)| Ok((c.take(&format!("{n}.first"))?, c.take(&format!("{n}.second"))?));
                opt.restore(taken, names.iter().map(of).collect::<Result<_>>()?)?;
            }
            header = c.header.clone();
            for (name, _) in learner.state()? {
                if let Ok(values) = c.take(&format!("best.{name}")) {
                    best.push((name, values));
                }
            }
        }
        let mut log = Log::open(dir, header.step)?;
        let steps = self.schedule.steps;
        let bar = progress(steps, &self.title);
        bar.set_position(header.step as u64);
        while header.step < steps {
            let triplets = self.mine(&learner, header.step / self.schedule.refresh)?;
            self.interval(&learner, &projections, &mut [&mut optimiser, &mut second], &triplets, &mut header, &mut log, &bar)?;
            if header.step == steps || (header.step / self.schedule.refresh).is_multiple_of(self.schedule.validate) {
                self.keep_best(&learner, &mut header, &mut best, &mut log)?;
            }
            log.write()?;
            self.checkpoint(&learner, &vars, [&optimiser, &second], &header, &best)?.write(&path)?;
        }
        bar.finish_and_clear();
        let map: HashMap<String, Vec<f32>> = best.into_iter().collect();
        learner.restore(|n| map.get(n).cloned().with_context(|| format!("no best `{n}`")))?;
        self.mix(&learner)?;
        let (best, best_step) = header.best.unwrap_or_default();
        Ok((learner, Summary { best, best_step, steps: header.step, skipped: header.skipped }))
    }

    /// A learner as this training begins it, or as it was left (see [`Job::load`]).
    fn learner(&self) -> Result<Learner> {
        let items: Vec<&Item> = self.train.queries.iter().chain(&self.train.references).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let chosen: Vec<&Item> = items.choose_multiple(&mut rng, UNFOLD_IMAGES).copied().collect();
        let sample = |input: Input| {
            let pairs = chosen.iter().map(|i| self.loader.get(i)).collect::<Result<Vec<_>>>()?;
            self.loader.tensor(&pairs, input)
        };
        let mut learner = Learner::new(self.kind, self.recipe, self.loader, self.seed, sample)?;
        learner.compute_on(self.gpu.as_ref());
        Ok(learner)
    }

    /// The learner with the best weights of a finished training in `dir`.
    pub fn load(&self, dir: &Path) -> Result<Learner> {
        let path = dir.join("checkpoint.safetensors");
        let mut c = Checkpoint::read(&path)?;
        ensure!(c.header.step >= self.schedule.steps, "{} is of {} of {} steps", path.display(), c.header.step, self.schedule.steps);
        self.own(&c, &path)?;
        let learner = self.learner()?;
        learner.restore(|n| c.take(&format!("best.{n}"))).with_context(|| path.display().to_string())?;
        self.mix(&learner)?;
        Ok(learner)
    }

    /// Draws trained weights and running statistics back towards the start's, by `schedule.mix`.
    fn mix(&self, learner: &Learner) -> Result<()> {
        let share = self.schedule.mix;
        if share == 1.0 {
            return Ok(());
        }
        let start: HashMap<String, Vec<f32>> = self.learner()?.state()?.into_iter().collect();
        let mut trained: HashMap<String, Vec<f32>> = learner.state()?.into_iter().collect();
        learner.restore(|name| {
            let (mut own, start) = trained.remove(name).zip(start.get(name)).with_context(|| format!("no `{name}`"))?;
            for (own, start) in own.iter_mut().zip(start) {
                *own = (share * f64::from(*own) + (1.0 - share) * f64::from(*start)) as f32;
            }
            Ok(own)
        })
    }

    /// Errors: the checkpoint is of another training.
    fn own(&self, c: &Checkpoint, path: &Path) -> Result<()> {
        ensure!(
            c.header.identity == self.identity()?,
            "{} is of another training (other settings, data, weights or seed): name another folder, or remove this one",
            path.display()
        );
        Ok(())
    }

    fn checkpoint(
        &self,
        learner: &Learner,
        vars: &[(String, Var, Vec<std::ops::Range<usize>>)],
        optimisers: [&AdamW; 2],
        header: &Header,
        best: &[(String, Vec<f32>)],
    ) -> Result<Checkpoint> {
        let mut c = Checkpoint { header: Header { optimiser_steps: optimisers[0].state().0, ..header.clone() }, ..Checkpoint::default() };
        c.tensors.extend(learner.state()?);
        for (name, var, _) in vars.iter().filter(|(n, ..)| n.starts_with("projection")) {
            c.tensors.insert(name.clone(), var.flatten_all()?.to_vec1::<f32>()?);
        }
        let moments = optimisers.iter().flat_map(|o| o.state().1);
        for ((name, ..), (first, second)) in vars.iter().zip(moments) {
            c.tensors.insert(format!("{name}.first"), first.to_vec());
            c.tensors.insert(format!("{name}.second"), second.to_vec());
        }
        c.tensors.extend(best.iter().map(|(n, v)| (format!("best.{n}"), v.clone())));
        Ok(c)
    }

    /// Recall@5 on the validation set; the best weights so far are kept [paper].
    fn keep_best(&self, learner: &Learner, header: &mut Header, best: &mut Vec<(String, Vec<f32>)>, log: &mut Log) -> Result<()> {
        let recall = evaluate(learner, self.loader, self.validation)?;
        log.add(header.step, [("validation_recall_1", recall.get(1)), ("validation_recall_5", recall.get(5))]);
        if header.best.is_none_or(|(b, _)| recall.get(5) > b) {
            header.best = Some((recall.get(5), header.step));
            *best = learner.state()?;
        }
        Ok(())
    }

    fn rng(&self, stream: u64, at: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stream);
        rng.set_stream(at);
        rng
    }

    /// The triplets of one interval between refreshes: queries in an order that each epoch draws anew, hard negatives by the
    /// descriptors of now.
    fn mine(&self, learner: &Learner, interval: usize) -> Result<Vec<Triplet>> {
        let s = self.schedule;
        let usable: Vec<usize> = (0..self.train.queries.len()).filter(|q| !self.train.positives[*q].is_empty()).collect();
        ensure!(!usable.is_empty(), "no training query has a positive");
        let wanted = s.refresh.min(s.steps - interval * s.refresh) * s.triplets * s.accumulate;
        let first = interval * s.refresh * s.triplets * s.accumulate;
        let mut queries = Vec::with_capacity(wanted);
        let mut order: (usize, Vec<usize>) = (usize::MAX, Vec::new());
        for at in first..first + wanted {
            let epoch = at / usable.len();
            if order.0 != epoch {
                order = (epoch, usable.clone());
                order.1.shuffle(&mut self.rng(1, epoch as u64));
            }
            queries.push(order.1[at % usable.len()]);
        }
        let mut rng = self.rng(2, interval as u64);
        // Positives: a few of each query; the pool: those, and some references of the whole set.
        let few = if s.positives == Positives::Best { 4 } else { 1 };
        let choices: Vec<Vec<usize>> =
            queries.iter().map(|q| self.train.positives[*q].choose_multiple(&mut rng, few).copied().collect()).collect();
        let mut pool: BTreeSet<usize> = choices.iter().flatten().copied().collect();
        let all: Vec<usize> = (0..self.train.references.len()).collect();
        pool.extend(all.choose_multiple(&mut rng, s.pool));
        let pool: Vec<usize> = pool.into_iter().collect();
        let row_of: HashMap<usize, usize> = pool.iter().enumerate().map(|(i, r)| (*r, i)).collect();
        let distinct: Vec<usize> = queries.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
        let query_row: HashMap<usize, usize> = distinct.iter().enumerate().map(|(i, q)| (*q, i)).collect();
        let items = |rows: &[usize], of: &'_ [Item]| rows.iter().map(|i| of[*i].clone()).collect::<Vec<_>>();
        let cache = |items: &[Item]| describe(learner, self.loader, &items.iter().collect::<Vec<_>>(), |_| ());
        let q: Rows = cache(&items(&distinct, &self.train.queries))?;
        let r: Rows = cache(&items(&pool, &self.train.references))?;
        let similar = similarities(&q, &r)?;
        let mut triplets = Vec::with_capacity(queries.len());
        for (query, choices) in queries.iter().zip(choices) {
            let own = &similar[query_row[query] * pool.len()..][..pool.len()];
            let positive = match s.positives {
                Positives::Random => choices.first(),
                Positives::Best => choices.iter().max_by(|a, b| own[row_of[a]].total_cmp(&own[row_of[b]]).then(b.cmp(a))),
            };
            let positive = *positive.context("a query without a positive")?;
            let mut far: Vec<usize> = (0..pool.len()).filter(|i| self.train.near[*query].binary_search(&pool[*i]).is_err()).collect();
            ensure!(far.len() >= s.negatives, "{}: fewer than {} references are far from it", self.train.queries[*query].name, s.negatives);
            let hard = s.hardest.min(far.len());
            far.select_nth_unstable_by(hard - 1, |a, b| own[*b].total_cmp(&own[*a]).then(a.cmp(b)));
            far.truncate(hard);
            far.sort_unstable();
            let negatives = far.choose_multiple(&mut rng, s.negatives).map(|i| pool[*i]).collect();
            triplets.push(Triplet { query: *query, positive, negatives });
        }
        Ok(triplets)
    }

    /// What the teacher is shown in place of `items` (queries, positives and what follows), if any of these pairs is misled.
    fn stand_ins<'a>(&'a self, triplets: &[Triplet], items: &[&'a Item]) -> Option<Vec<&'a Item>> {
        let misled = self.teaching?.misled.as_ref()?;
        let own: Vec<usize> = (0..triplets.len()).filter(|i| misled.pairs.contains(&(triplets[*i].query, triplets[*i].positive))).collect();
        let mut shown = items.to_vec();
        for i in &own {
            shown[*i] = &self.train.queries[misled.queries[triplets[*i].query]];
            shown[triplets.len() + i] = &self.train.references[misled.references[triplets[*i].positive]];
        }
        (!own.is_empty()).then_some(shown)
    }

    /// Loads and augments one pass's images.
    fn batch(&self, triplets: &[Triplet], inputs: &[Input], at: u64) -> Result<Batch> {
        let (queries, references) = (&self.train.queries, &self.train.references);
        let mut items: Vec<&Item> = triplets.iter().map(|t| &queries[t.query]).collect();
        items.extend(triplets.iter().map(|t| &references[t.positive]));
        items.extend(triplets.iter().flat_map(|t| t.negatives.iter().map(|n| &references[*n])));
        let seed = self.seed.wrapping_mul(0xd134_2543_de82_ef95) ^ at;
        let pairs = self.loader.augmented(&items, &self.recipe.augment, seed)?;
        let images = inputs.iter().map(|i| self.loader.tensor(&pairs, *i)).collect::<Result<_>>()?;
        let taught = if self.recipe.distillation.feature == Feature::Relations { items.len() } else { 2 * triplets.len() };
        let teacher = match self.teaching {
            Some(t) => {
                let stand_ins = self.stand_ins(triplets, &items[..taught]);
                let own = stand_ins.map(|s| self.loader.augmented(&s, &self.recipe.augment, seed)).transpose()?;
                let shown = own.as_deref().unwrap_or(&pairs[..taught]);
                Some(t.teacher.inputs().into_iter().map(|i| self.loader.tensor(shown, i)).collect::<Result<_>>()?)
            }
            None => None,
        };
        let weight = |t: &Triplet| self.teaching.and_then(|w| w.weights.get(&(t.query, t.positive))).copied().unwrap_or(0.0);
        Ok(Batch {
            images,
            teacher,
            names: items.iter().map(|i| i.name.clone()).collect(),
            weights: triplets.iter().map(weight).collect(),
            planes: pairs,
        })
    }

    /// The steps of one interval. Batches are made on a thread of their own, two ahead.
    #[allow(clippy::too_many_arguments)]
    fn interval(
        &self,
        learner: &Learner,
        projections: &[Var],
        optimisers: &mut [&mut AdamW; 2],
        triplets: &[Triplet],
        header: &mut Header,
        log: &mut Log,
        bar: &indicatif::ProgressBar,
    ) -> Result<()> {
        let s = self.schedule;
        let first = header.step;
        let inputs = learner.inputs();
        std::thread::scope(|scope| -> Result<()> {
            let (send, receive) = sync_channel::<Result<Batch>>(2);
            scope.spawn(move || {
                for (i, triplets) in triplets.chunks(s.triplets).enumerate() {
                    let batch = self.batch(triplets, &inputs, (first * s.accumulate + i) as u64);
                    let failed = batch.is_err();
                    if send.send(batch).is_err() || failed {
                        break;
                    }
                }
            });
            let steps = triplets.len() / (s.triplets * s.accumulate);
            for _ in 0..steps {
                let lr = cosine(s.lr, header.step, s.steps);
                let statistics = learner.statistics();
                let mut sums: Vec<Option<Vec<f32>>> = Vec::new();
                let (mut losses, mut taught, mut bad) = (0.0, 0.0, None);
                for _ in 0..s.accumulate {
                    let batch = receive.recv().context("the loading thread ended")??;
                    let (loss, kd) = self.losses(learner, projections, &batch)?;
                    let value = f64::from(loss.to_scalar::<f32>()?);
                    losses += value / s.accumulate as f64;
                    taught += kd / s.accumulate as f64;
                    if !value.is_finite() {
                        bad = Some((value, batch.names));
                        continue;
                    }
                    let grads = (loss / s.accumulate as f64)?.backward()?;
                    let vars = optimisers[0].vars().chain(optimisers[1].vars());
                    let each = vars.map(|v| grads.get(v).map(|g| g.contiguous()?.flatten_all()?.to_vec1::<f32>()).transpose());
                    let own = each.collect::<candle_core::Result<Vec<_>>>()?;
                    if sums.is_empty() {
                        sums = own;
                    } else {
                        for (sum, own) in sums.iter_mut().zip(own) {
                            match (sum.as_mut(), own) {
                                (Some(sum), Some(own)) => sum.iter_mut().zip(own).for_each(|(s, o)| *s += o),
                                (None, own) => *sum = own,
                                (Some(_), None) => {}
                            }
                        }
                    }
                }
                header.step += 1;
                if bad.is_none() && sums.iter().flatten().flatten().any(|g| !g.is_finite()) {
                    bad = Some((f64::NAN, vec!["its gradient".into()]));
                }
                if let Some((value, names)) = bad {
                    let said = format!("step {}: the loss is {value}; images: {}", header.step, names.join(", "));
                    if self.recipe.on_nan == OnNan::Stop {
                        bail!("{said} (`on_nan: skip` leaves such steps out)");
                    }
                    bar.suspend(|| eprintln!("training: left out {said}"));
                    learner.set_statistics(&statistics);
                    header.skipped += 1;
                } else {
                    let own = sums.split_off(optimisers[0].vars().count());
                    optimisers[0].apply(&sums, lr)?;
                    optimisers[1].apply(&own, lr * self.recipe.distillation.projection_lr)?;
                    learner.keep_powers_usable()?;
                    log.add(header.step, [("loss", losses), ("distillation", taught), ("lr", lr)]);
                }
                bar.set_message(format!("{} loss {losses:.4}", self.title));
                bar.inc(1);
            }
            Ok(())
        })
    }

    /// The whole loss of a pass, and the distillation's share of it.
    fn losses(&self, learner: &Learner, projections: &[Var], batch: &Batch) -> Result<(Tensor, f64)> {
        let out = learner.forward(&batch.images, true)?;
        let d = &out.descriptor;
        let n = batch.weights.len();
        let (q, p, rest) = (d.narrow(0, 0, n)?, d.narrow(0, n, n)?, d.dim(0)? - 2 * n);
        let negatives = d.narrow(0, 2 * n, rest)?;
        let mut loss = triplet(&q, &p, &negatives, MARGIN)?;
        let planes: Vec<&[u8]> = batch.planes.iter().filter_map(|p| p.planes.as_deref()).collect();
        if let Some(own) = learner.segmentation_loss(&out.features, &planes, self.recipe.data.size)? {
            loss = (loss + (own * SEGMENTATION)?)?;
        }
        let mut share = 0.0;
        if let (Some(teaching), Some(images)) = (self.teaching, &batch.teacher) {
            if batch.weights.iter().any(|w| *w > 0.0) {
                let taught = teaching.teacher.forward(images, false)?;
                let each = self.imitation(projections, &out, &taught, n)?;
                let weights = Tensor::from_slice(&batch.weights, n, &Device::Cpu)?;
                let kd = ((each * weights)?.mean_all()? * self.recipe.distillation.lambda)?;
                share = f64::from(kd.to_scalar::<f32>()?);
                loss = (loss + kd)?;
            }
        }
        Ok((loss, share))
    }

    /// How far the student is from the teacher, per pair [paper: L2 distance of features].
    fn imitation(
        &self,
        projections: &[Var],
        student: &crate::learner::Output,
        teacher: &crate::learner::Output,
        n: usize,
    ) -> Result<Tensor> {
        let of_pair = |d: Tensor| -> Result<Tensor> { Ok(((d.narrow(0, 0, n)? + d.narrow(0, n, n)?)? / 2.0)?) };
        match self.recipe.distillation.feature {
            Feature::Global => {
                let own = student.descriptor.narrow(0, 0, 2 * n)?.matmul(&projections[0].t()?)?;
                of_pair(distance(&own, &teacher.descriptor.detach())?)
            }
            Feature::Taps => {
                let mut sum: Option<Tensor> = None;
                for ((own, theirs), projection) in student.features.pooled.iter().zip(&teacher.features.pooled).zip(projections) {
                    let d = distance(&own.narrow(0, 0, 2 * n)?.matmul(&projection.t()?)?, &theirs.detach())?;
                    sum = Some(match sum {
                        Some(s) => (s + d)?,
                        None => d,
                    });
                }
                of_pair((sum.context("no taps")? / 3.0)?)
            }
            Feature::Relations => {
                let margin = |d: &Tensor| -> Result<Tensor> {
                    let (rows, dim) = d.dims2()?;
                    let k = rows / n - 2;
                    let negatives = d.narrow(0, 2 * n, n * k)?;
                    let q = d.narrow(0, 0, n)?.unsqueeze(1)?.broadcast_as((n, k, dim))?.contiguous()?;
                    let far = distance(&q, &negatives.reshape((n, k, dim))?)?;
                    let near = distance(&d.narrow(0, 0, n)?, &d.narrow(0, n, n)?)?.unsqueeze(1)?.broadcast_as((n, k))?;
                    Ok((far - near)?)
                };
                Ok((margin(&student.descriptor)? - margin(&teacher.descriptor.detach())?)?.abs()?.mean(1)?)
            }
        }
    }

    /// Linear maps from the student's features to the teacher's, for training only [inferred]. They begin where they map the
    /// student as it is to the teacher best (ridge regression over some training images): a random map would spend
    /// the first of the training on itself. [ours]
    fn projections(&self, learner: Option<&Learner>) -> Result<Vec<Var>> {
        let Some(teaching) = self.teaching else { return Ok(Vec::new()) };
        let shapes: Vec<(usize, usize)> = match self.recipe.distillation.feature {
            Feature::Global => vec![(teaching.teacher.dim(), 448)],
            Feature::Taps => vec![(64, 32), (96, 96), (320, 320)],
            Feature::Relations => vec![],
        };
        let Some(learner) = learner.filter(|_| !shapes.is_empty()) else {
            return shapes.into_iter().map(|s| Ok(Var::zeros(s, DType::F32, &Device::Cpu)?)).collect();
        };
        let items: Vec<&Item> = self.train.queries.iter().chain(&self.train.references).collect();
        let chosen: Vec<&Item> = items.choose_multiple(&mut self.rng(3, 0), REGRESSION_IMAGES).copied().collect();
        let mut rows: Vec<(Vec<f32>, Vec<f32>)> = vec![Default::default(); shapes.len()];
        for batch in chosen.chunks(32) {
            let pairs = batch.iter().map(|i| self.loader.get(i)).collect::<Result<Vec<_>>>()?;
            let forward = |learner: &Learner| {
                let images = learner.inputs().into_iter().map(|i| self.loader.tensor(&pairs, i)).collect::<Result<Vec<_>>>()?;
                learner.forward(&images, false)
            };
            let (own, theirs) = (forward(learner)?, forward(&teaching.teacher)?);
            let of = |out: &crate::learner::Output, i: usize| -> Result<Vec<f32>> {
                let t = if self.recipe.distillation.feature == Feature::Global { &out.descriptor } else { &out.features.pooled[i] };
                Ok(t.flatten_all()?.to_vec1::<f32>()?)
            };
            for (i, (x, y)) in rows.iter_mut().enumerate() {
                x.extend(of(&own, i)?);
                y.extend(of(&theirs, i)?);
            }
        }
        shapes
            .into_iter()
            .zip(rows)
            .map(|((o, i), (x, y))| {
                let matrix =
                    |v: &[f32], columns: usize| DMatrix::from_row_iterator(v.len() / columns, columns, v.iter().map(|v| f64::from(*v)));
                let (x, y) = (matrix(&x, i), matrix(&y, o));
                let mut gram = x.transpose() * &x;
                let ridge = RIDGE * gram.trace() / i as f64;
                (0..i).for_each(|k| gram[(k, k)] += ridge);
                let solved = gram.cholesky().context("the student's features are not finite")?.solve(&(x.transpose() * y));
                // Column-major i x o is row-major o x i.
                Ok(Var::from_vec(solved.iter().map(|v| *v as f32).collect::<Vec<f32>>(), (o, i), &Device::Cpu)?)
            })
            .collect()
    }
}

/// Images that projections are fitted on, and the ridge over the mean variance.
const REGRESSION_IMAGES: usize = 768;
const RIDGE: f64 = 0.1;

/// Recall of a learner on a set.
pub fn evaluate(learner: &Learner, loader: &Loader, set: &Set) -> Result<Recall> {
    let (queries, references) = describe_set(learner, loader, set, |_| ())?;
    Ok(Recall::of(&best_ranks(&queries, &references, &set.positives)?))
}

/// Descriptors of a set's queries and references.
pub fn describe_set(learner: &Learner, loader: &Loader, set: &Set, mut each: impl FnMut(usize)) -> Result<(Rows, Rows)> {
    let queries = describe(learner, loader, &set.queries.iter().collect::<Vec<_>>(), &mut each)?;
    Ok((queries, describe(learner, loader, &set.references.iter().collect::<Vec<_>>(), &mut each)?))
}

/// A loader for a recipe's sets.
pub fn loader(recipe: &Recipe, sets: &[&Set]) -> Result<Loader> {
    let (mean, std) = preprocessing(recipe)?;
    Loader::new(&recipe.data, sets, mean, std)
}

/// Writes the model that the node loads.
pub fn export(learner: &Learner, path: &Path, trained_on: &str) -> Result<()> {
    crate::checkpoint::write_whole(path, &learner.export(trained_on)?.to_bytes(structvpr::model::Precision::F32)?)
}

#[cfg(test)]
mod tests;
