use super::*;
use crate::slme::LabelMap;
use crate::work::Sets;
use rand::Rng;
use std::path::PathBuf;
use structvpr::image::RgbImage;

/// Eight places of noise, seen twice, with label maps.
fn noise_world(dir: &Path) -> Recipe {
    let (w, h) = (64usize, 48usize);
    for side in ["q", "r"] {
        std::fs::create_dir_all(dir.join(side)).unwrap();
        std::fs::create_dir_all(dir.join(format!("{side}-labels"))).unwrap();
        let mut poses = String::from("name,x,y\n");
        for i in 0..8u64 {
            let mut rng = ChaCha8Rng::seed_from_u64(i);
            let rgb = (0..w * h * 3).map(|_| rng.random()).collect();
            let image = RgbImage::new(w as u32, h as u32, rgb).unwrap();
            std::fs::write(dir.join(side).join(format!("{i}.png")), image.to_png().unwrap()).unwrap();
            let ids = (0..w * h).map(|p| ((p % w / 8 + i as usize) % 20) as u8).collect();
            let map = LabelMap { width: w, height: h, ids }.to_png().unwrap();
            std::fs::write(dir.join(format!("{side}-labels")).join(format!("{i}.png")), map).unwrap();
            poses += &format!("{i}.png,{},0\n", i * 100);
        }
        std::fs::write(dir.join(side).join("poses.csv"), poses).unwrap();
    }
    let d = dir.display();
    let schedule = "{steps: 8, triplets: 2, refresh: 4, pool: 8, hardest: 3, validate: 1}";
    Recipe::parse(&format!(
        "name: noise\ndata:\n  size: [64, 48]\n  labels:\n    - {{images: {d}/q, labels: {d}/q-labels}}\n    - {{images: {d}/r, labels: {d}/r-labels}}\ntrain: ['folder:{d}/q:{d}/r']\nvalidation: ['folder:{d}/q:{d}/r']\ninit: shipped\nrgb: {schedule}\nseg: {schedule}\ndistil: {schedule}\n"
    ))
    .unwrap()
}

fn job<'a>(recipe: &'a Recipe, kind: Kind, sets: &'a Sets, loader: &'a Loader, teaching: Option<&'a Teaching>) -> Job<'a> {
    let schedule = &recipe.distil;
    let (train, validation) = (&sets.train, &sets.validation);
    Job { kind, recipe, schedule, seed: 1, train, validation, loader, gpu: None, teaching, title: String::new() }
}

/// A teacher whose weight for one query's pair is infinite.
fn infinite(recipe: &Recipe, sets: &Sets, loader: &Loader) -> Teaching {
    let teacher = job(recipe, Kind::Seg, sets, loader, None).learner().unwrap();
    let weights = (0..8).map(|i| ((i, i), if i == 5 { f32::INFINITY } else { 1.0 })).collect();
    Teaching { teacher, identity: "t".into(), weights, misled: None }
}

#[test]
fn a_loss_that_is_no_number_is_named_and_stops_or_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = noise_world(dir.path());
    let sets = Sets::open(&recipe, true, true).unwrap();
    let loader = sets.loader(&recipe).unwrap();
    let teaching = infinite(&recipe, &sets, &loader);
    let out = |n: &str| -> PathBuf { dir.path().join(n) };
    let said = format!("{:#}", job(&recipe, Kind::Rgb, &sets, &loader, Some(&teaching)).run(&out("a")).err().unwrap());
    assert!(said.contains("the loss is inf") && said.contains("5.png") && said.contains("step "), "{said}");
    recipe.on_nan = OnNan::Skip;
    let (learner, summary) = job(&recipe, Kind::Rgb, &sets, &loader, Some(&teaching)).run(&out("b")).unwrap();
    assert!(summary.skipped >= 1 && summary.steps == 8, "{summary:?}");
    assert!(learner.state().unwrap().iter().all(|(_, v)| v.iter().all(|v| v.is_finite())));
    // What it went through shows in the log, and the skipped steps do not.
    let log = Log::open(&out("b"), 8).unwrap();
    let losses = log.lines().iter().filter(|l| l.values.contains_key("loss")).count();
    assert_eq!(losses, 8 - summary.skipped);
}

#[test]
fn a_disk_that_fills_up_stops_a_training_that_goes_on_later() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = noise_world(dir.path());
    let sets = Sets::open(&recipe, false, false).unwrap();
    let loader = sets.loader(&recipe).unwrap();
    let whole = job(&recipe, Kind::Rgb, &sets, &loader, None).run(&dir.path().join("whole")).unwrap().0.state().unwrap();
    let out = dir.path().join("full");
    std::fs::create_dir_all(&out).unwrap();
    // Writing to /dev/full fails as a full disk does.
    std::os::unix::fs::symlink("/dev/full", out.join("checkpoint.safetensors.tmp")).unwrap();
    let said = format!("{:#}", job(&recipe, Kind::Rgb, &sets, &loader, None).run(&out).err().unwrap());
    assert!(said.contains("checkpoint.safetensors") && said.contains("No space left"), "{said}");
    let again = job(&recipe, Kind::Rgb, &sets, &loader, None).run(&out).unwrap().0.state().unwrap();
    assert!(again == whole);
}

#[test]
fn trained_weights_are_mixed_with_the_starts() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = noise_world(dir.path());
    let sets = Sets::open(&recipe, false, false).unwrap();
    let loader = sets.loader(&recipe).unwrap();
    let start = job(&recipe, Kind::Rgb, &sets, &loader, None).learner().unwrap().state().unwrap();
    let mut of = |mix: f64| {
        recipe.distil.mix = mix;
        // One training, whatever is done with its weights.
        let job = job(&recipe, Kind::Rgb, &sets, &loader, None);
        let state = job.run(&dir.path().join("t")).unwrap().0.state().unwrap();
        assert!(job.load(&dir.path().join("t")).unwrap().state().unwrap() == state);
        state
    };
    let (trained, half, none) = (of(1.0), of(0.5), of(0.0));
    assert!(none == start && trained != start);
    for ((name, half), ((_, a), (_, b))) in half.iter().zip(start.iter().zip(&trained)) {
        let worst = half.iter().zip(a.iter().zip(b)).map(|(h, (a, b))| (h - (a + b) / 2.0).abs() / (1.0 + h.abs())).fold(0.0, f32::max);
        assert!(worst < 1e-6, "{name}: {worst}");
    }
}

#[test]
fn an_exported_model_describes_as_the_learner_does() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = noise_world(dir.path());
    let sets = Sets::open(&recipe, false, false).unwrap();
    let loader = sets.loader(&recipe).unwrap();
    let (learner, _) = job(&recipe, Kind::Rgb, &sets, &loader, None).run(&dir.path().join("t")).unwrap();
    let model = structvpr::model::Model::new(learner.export("noise").unwrap()).unwrap();
    let items: Vec<&Item> = sets.train.queries.iter().collect();
    let rows = describe(&learner, &loader, &items, |_| ()).unwrap();
    for (i, item) in items.iter().enumerate() {
        let image = RgbImage::decode(&std::fs::read(&item.path).unwrap()).unwrap();
        let d = model.describe(&image).unwrap();
        let worst = d.as_slice().iter().zip(rows.row(i)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-4, "{}: {worst}", item.name);
    }
}

#[test]
fn negatives_are_far_and_positives_near_by_the_papers_rule() {
    let near = crate::data::Near::default();
    let at = |x: f64, heading: f64| structvpr::dataset::Located {
        area: 0,
        pose: structvpr::dataset::Pose2 { x, y: 0.0, heading_deg: Some(heading) },
    };
    assert!(near.positive(&at(0.0, 0.0), &at(12.0, 20.0)) && !near.positive(&at(0.0, 0.0), &at(12.6, 20.0)));
    assert!(near.positive(&at(0.0, 355.0), &at(10.0, 10.0)), "angles wrap");
    assert!(!near.positive(&at(0.0, 0.0), &at(0.0, 40.0)));
    let other = structvpr::dataset::Located { area: 1, ..at(0.0, 0.0) };
    assert!(!near.positive(&at(0.0, 0.0), &other), "cities never match");

    let dir = tempfile::tempdir().unwrap();
    let recipe = noise_world(dir.path());
    let sets = Sets::open(&recipe, false, false).unwrap();
    let loader = sets.loader(&recipe).unwrap();
    let job = job(&recipe, Kind::Rgb, &sets, &loader, None);
    let triplets = job.mine(&job.learner().unwrap(), 0).unwrap();
    assert_eq!(triplets.len(), 8);
    let mut queries: Vec<usize> = triplets.iter().map(|t| t.query).collect();
    queries.sort_unstable();
    assert_eq!(queries, (0..8).collect::<Vec<_>>(), "an epoch sees each query once");
    for t in &triplets {
        assert!(sets.train.positives[t.query].contains(&t.positive));
        assert!(t.negatives.iter().all(|n| !sets.train.near[t.query].contains(n)));
    }
}

#[test]
fn a_power_that_a_step_throws_out_of_range_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = noise_world(dir.path());
    // AdamW's first step moves every value by the learning rate: from 3 to below 0, or far up.
    recipe.distil.lr = 50.0;
    recipe.distil.steps = 1;
    let sets = Sets::open(&recipe, false, false).unwrap();
    let loader = sets.loader(&recipe).unwrap();
    let job = job(&recipe, Kind::Rgb, &sets, &loader, None);
    let (learner, projections) = (job.learner().unwrap(), Vec::new());
    let vars: Vec<_> = learner.vars().into_iter().map(|(_, v, d)| (v, d)).collect();
    let mut optimisers = (AdamW::new(Adam::default(), vars), AdamW::new(Adam::default(), vec![]));
    let triplets = job.mine(&learner, 0).unwrap();
    let (mut header, mut log) = (Header::default(), Log::open(dir.path(), 0).unwrap());
    let bar = indicatif::ProgressBar::hidden();
    job.interval(&learner, &projections, &mut [&mut optimisers.0, &mut optimisers.1], &triplets, &mut header, &mut log, &bar).unwrap();
    let power = learner.state().unwrap().into_iter().find(|(n, _)| n == "branch0.power").unwrap().1[0];
    assert!(power == 1.0 || power == 30.0, "{power}");
}

/// Losses and recalls of a training, step by step, and what it leaves.
fn history(recipe: &Recipe, sets: &Sets, loader: &Loader, gpu: Option<Arc<Gpu>>, dir: &Path) -> (Vec<f64>, Vec<(String, Vec<f32>)>) {
    let mut job = job(recipe, Kind::Rgb, sets, loader, None);
    job.gpu = gpu;
    let state = job.run(dir).unwrap().0.state().unwrap();
    let losses = Log::open(dir, recipe.distil.steps).unwrap().lines().iter().filter_map(|l| l.values.get("loss").copied()).collect();
    (losses, state)
}

#[test]
fn a_training_on_a_gpu_is_the_processors_and_bf16_follows_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = noise_world(dir.path());
    // Which images of noise are the nearest hangs on last bits, and another negative is another training: drawn from all.
    recipe.distil.hardest = 8;
    let sets = Sets::open(&recipe, false, false).unwrap();
    let loader = sets.loader(&recipe).unwrap();
    let run = |name: &str, gpu| history(&recipe, &sets, &loader, gpu, &dir.path().join(name));
    let (want, cpu) = run("cpu", None);
    let length = |v: &mut dyn Iterator<Item = f32>| v.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    // What bf16 rounds off grows from step to step on images of noise: after a few, another training as good.
    for (precision, steps, loss, weights) in [(Precision::F32, 8, 0.02, 1e-3), (Precision::Bf16, 4, 0.06, 1e-2)] {
        let name = format!("{precision:?}");
        let (losses, state) = run(&name, Some(crate::net::gpu::host(precision)));
        let worst = losses.iter().zip(&want).take(steps).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(losses.len() == 8 && worst < loss && losses.iter().all(|l| l.is_finite()), "{name}: {losses:?} against {want:?}");
        for ((what, a), (_, b)) in state.iter().zip(&cpu) {
            let off = length(&mut a.iter().zip(b).map(|(a, b)| a - b)) / length(&mut b.iter().copied());
            assert!(off < weights, "{name}, {what}: {off}");
        }
        // The same machine, the same bytes.
        let again = run(&format!("{name} again"), Some(crate::net::gpu::host(precision)));
        assert!(again == (losses, state), "{name}");
    }
}

/// A recipe in bf16 is another training: its checkpoint is not gone on with in f32.
#[test]
fn the_precision_is_part_of_a_trainings_identity_and_f32_is_as_before() {
    let dir = tempfile::tempdir().unwrap();
    let mut recipe = noise_world(dir.path());
    let sets = Sets::open(&recipe, false, false).unwrap();
    let loader = sets.loader(&recipe).unwrap();
    let id = |recipe: &Recipe| job(recipe, Kind::Rgb, &sets, &loader, None).identity().unwrap();
    let before = id(&recipe);
    assert!(!serde_yaml::to_string(&recipe).unwrap().contains("precision"));
    recipe.precision = Precision::Bf16;
    assert_ne!(id(&recipe), before);
    assert!(serde_yaml::to_string(&recipe).unwrap().contains("precision: bf16"));
}

#[test]
fn a_misled_pair_is_taught_from_other_maps_and_nothing_else_changes() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = noise_world(dir.path());
    let sets = Sets::open(&recipe, true, true).unwrap();
    let loader = sets.loader(&recipe).unwrap();
    let mut teaching = infinite(&recipe, &sets, &loader);
    let triplets: Vec<Triplet> = (0..3).map(|i| Triplet { query: i, positive: i, negatives: vec![i + 4] }).collect();
    let batch = |teaching: &Teaching, triplets: &[Triplet]| {
        let batch = job(&recipe, Kind::Rgb, &sets, &loader, Some(teaching)).batch(triplets, &[Input::Rgb], 7).unwrap();
        let rows = |t: &Tensor| t.transpose(0, 1).unwrap().flatten_from(1).unwrap().to_vec2::<f32>().unwrap();
        (rows(&batch.images[0]), rows(&batch.teacher.unwrap()[0]))
    };
    let own = batch(&teaching, &triplets);
    let mut misled = Misled::new([(1, 1)].into(), &sets.train, 1);
    let mut sorted = misled.queries.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (0..8).collect::<Vec<_>>(), "each query's map stands in once");
    // Whatever was drawn: not its own.
    (misled.queries[1], misled.references[1]) = (3, 6);
    teaching.misled = Some(misled);
    let other = batch(&teaching, &triplets);
    assert_eq!(own.0, other.0, "the student sees what it saw");
    let changed: Vec<usize> = (0..6).filter(|i| own.1[*i] != other.1[*i]).collect();
    assert_eq!(changed, [1, 4], "query and positive of the second pair");
    let mut elsewhere = triplets;
    elsewhere[1] = Triplet { query: 3, positive: 6, negatives: vec![5] };
    teaching.misled = None;
    assert_eq!(other.1, batch(&teaching, &elsewhere).1, "as that query and that reference would be");
}
