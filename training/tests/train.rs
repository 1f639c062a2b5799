//! Training through the command line: killed and resumed, both stages, experiments, bad input.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use structvpr::image::RgbImage;
use structvpr::model::Model;

const BIN: &str = env!("CARGO_BIN_EXE_training");

fn training(arguments: &[&str]) -> Output {
    Command::new(BIN).args(arguments).output().expect("the binary starts")
}

fn ok(arguments: &[&str]) -> String {
    let out = training(arguments);
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

fn fails(arguments: &[&str]) -> String {
    let out = training(arguments);
    assert_eq!(out.status.code(), Some(1), "{arguments:?}: {}", String::from_utf8_lossy(&out.stdout));
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// A small world: streets under three conditions, with label maps.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("w").display().to_string();
        let size = ["--size", "96", "64", "--spacing", "14", "--conditions", "sun,dusk,night"];
        ok(&[&["places", "--out", &out, "--streets", "100", "2"][..], &size].concat());
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// A recipe that trains for a few seconds; `extra` goes to its end.
    fn recipe(&self, name: &str, extra: &str) -> String {
        let w = self.text("w");
        let labels: String =
            ["sun", "dusk", "night"].map(|c| format!("    - {{images: {w}/{c}/images, labels: {w}/{c}/labels}}\n")).concat();
        let schedule = "{steps: 12, triplets: 3, refresh: 3, pool: 20, hardest: 5, validate: 2, lr: 1.0e-4}";
        let text = format!(
            "name: small\ndata:\n  size: [96, 64]\n  labels:\n{labels}train: ['folder:{w}/dusk/images:{w}/sun/images']\n\
             near: {{radius_m: 6, angle_deg: 40, negative_m: 12}}\nvalidation: ['folder:{w}/dusk/images:{w}/sun/images,radius=6']\n\
             tests:\n  night: ['folder:{w}/night/images:{w}/sun/images,radius=6']\ninit: shipped\n\
             augment: {{photometric: 0.3, day_to_night: 0.2, weather: 0.2, occlusion: 0.3}}\n\
             rgb: {schedule}\nseg: {schedule}\ndistil: {schedule}\n{extra}"
        );
        std::fs::write(self.path(name), text).unwrap();
        self.text(name)
    }
}

#[test]
fn a_device_is_refused_before_any_data_is_read_and_bf16_on_the_processor_is_f32() {
    let world = World::new();
    let recipe = world.recipe("half.yaml", "precision: bf16\n");
    let stage1 = |device: &str, out: &str| {
        training(&["stage1", "--config", &recipe, "--branch", "rgb", "--out", &world.text(out), "--device", device])
    };
    let said = |o: &Output| String::from_utf8_lossy(&o.stderr).into_owned();
    // Without CUDA for want of it, with it for want of a card.
    let none = stage1("cuda:77", "none");
    assert!(none.status.code() == Some(1) && said(&none).contains("cuda:77") && !world.path("none").exists(), "{}", said(&none));
    assert_eq!(stage1("gpu", "none").status.code(), Some(2));
    let half = stage1("cpu", "half");
    assert!(half.status.success() && said(&half).contains("computes in f32"), "{}", said(&half));
    let plain = world.recipe("plain.yaml", "");
    ok(&["stage1", "--config", &plain, "--branch", "rgb", "--out", &world.text("plain")]);
    let model = |dir: &str| std::fs::read(world.path(dir).join("model.safetensors")).unwrap();
    assert!(model("half") == model("plain"));
}

/// Everything that a training leaves, by name.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| {
            let path = e.unwrap().path();
            (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap())
        })
        .collect();
    all.sort();
    all
}

/// Half-written files of a kill aside, both folders hold the same.
fn same(a: &Path, b: &Path) {
    let of = |dir: &Path| files(dir).into_iter().filter(|(n, _)| !n.ends_with(".tmp")).collect::<Vec<_>>();
    let (a, b) = (of(a), of(b));
    assert_eq!(a.iter().map(|f| &f.0).collect::<Vec<_>>(), b.iter().map(|f| &f.0).collect::<Vec<_>>());
    for ((name, a), (_, b)) in a.iter().zip(&b) {
        let at = a.iter().zip(b).position(|(a, b)| a != b);
        assert!(a.len() == b.len() && at.is_none(), "{name}: {} and {} bytes, first difference at {at:?}", a.len(), b.len());
    }
}

/// Runs a training of length `took`, killed `kills` times at moments over its whole length, to its end; every time that it
/// ends, `cut` must hold what `whole` holds.
fn killed(arguments: &[&str], took: std::time::Duration, kills: usize, cut: &Path, whole: &Path) {
    // Moments from a fixed sequence, so that a failure can be run again.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for _ in 0..kills {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let after = took.mul_f64((state >> 11) as f64 / (1u64 << 53) as f64);
        let mut child = Command::new(BIN).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(after);
        let finished = child.try_wait().unwrap().is_some_and(|s| s.success());
        // SIGKILL.
        let _ = child.kill();
        let _ = child.wait();
        // A finished training begins again from nothing, to be killed some more.
        if finished {
            same(cut, whole);
            std::fs::remove_dir_all(cut).unwrap();
        }
    }
    ok(arguments);
    same(cut, whole);
}

#[test]
fn killed_at_twenty_random_moments_a_training_reaches_the_same_bytes() {
    let world = World::new();
    // Gradients of two passes to a step, and a loading thread that runs ahead: both must not show.
    let recipe = world.recipe("r.yaml", "").to_string();
    let text = std::fs::read_to_string(&recipe).unwrap().replace("triplets: 3,", "triplets: 3, accumulate: 2,");
    std::fs::write(&recipe, text).unwrap();
    let whole = world.text("whole");
    let began = std::time::Instant::now();
    ok(&["stage1", "--config", &recipe, "--branch", "multi-task", "--out", &whole]);
    let took = began.elapsed();
    let cut = world.text("cut");
    let arguments = ["stage1", "--config", &recipe, "--branch", "multi-task", "--out", &cut];
    killed(&arguments, took, 20, Path::new(&cut), Path::new(&whole));
    let names: Vec<String> = files(Path::new(&whole)).into_iter().map(|f| f.0).collect();
    for want in ["checkpoint.safetensors", "events.out.tfevents.0.structvpr", "log.jsonl", "model.safetensors", "result.json"] {
        assert!(names.iter().any(|n| n == want), "{names:?}");
    }
    // And without any kill, twice the same.
    let again = world.text("again");
    ok(&["stage1", "--config", &recipe, "--branch", "multi-task", "--out", &again]);
    same(Path::new(&again), Path::new(&whole));
    // Another seed does not go on here.
    let said = fails(&["stage1", "--config", &recipe, "--branch", "multi-task", "--out", &again, "--seed", "2"]);
    assert!(said.contains("checkpoint.safetensors is of another training"), "{said}");
}

#[test]
fn both_stages_end_in_a_file_that_the_node_loads() {
    let world = World::new();
    let recipe = world.recipe("r.yaml", "");
    let [seg, rgb, parts, out] = ["seg", "rgb", "parts", "out"].map(|n| world.text(n));
    let said = ok(&["stage1", "--config", &recipe, "--branch", "seg", "--out", &seg]);
    assert!(said.contains("night: R@1"), "{said}");
    ok(&["stage1", "--config", &recipe, "--branch", "rgb", "--out", &rgb]);
    let said = ok(&["partition", "--config", &recipe, "--seg", &seg, "--rgb", &rgb, "--out", &parts]);
    assert!(said.contains("seg only") && said.contains("D1"), "{said}");
    let report = std::fs::read_to_string(world.path("parts/report.html")).unwrap();
    assert!(report.contains("data:image/jpeg;base64") && report.contains("teacher wrong"));
    let pairs = std::fs::read_to_string(world.path("parts/pairs.csv")).unwrap();
    assert!(pairs.starts_with("query,reference,x,y,group\n") && pairs.lines().count() > 20, "{pairs}");
    let began = std::time::Instant::now();
    ok(&["distill", "--config", &recipe, "--seg", &seg, "--partition", &parts, "--out", &out]);
    let took = began.elapsed();
    // The projections and their optimiser come back, too.
    let cut = world.text("cut");
    killed(
        &["distill", "--config", &recipe, "--seg", &seg, "--partition", &parts, "--out", &cut],
        took,
        4,
        Path::new(&cut),
        Path::new(&out),
    );
    let log = std::fs::read_to_string(world.path("out/log.jsonl")).unwrap();
    assert!(log.lines().any(|l| l.contains("\"distillation\":0.") && !l.contains("\"distillation\":0.0,")), "{log}");
    let model = Model::from_bytes(&std::fs::read(world.path("out/model.safetensors")).unwrap()).unwrap();
    assert_eq!((model.spec().input_width, model.spec().input_height, model.spec().name.as_str()), (96, 64, "small"));
    let image = structvpr::dataset::list_images(&world.path("w/sun/images")).unwrap()[0].path.clone();
    model.describe(&RgbImage::decode(&std::fs::read(image).unwrap()).unwrap()).unwrap();

    // The node's file gives the recall that training reported.
    let result: serde_json::Value = serde_json::from_slice(&std::fs::read(world.path("out/result.json")).unwrap()).unwrap();
    let w = world.text("w");
    let data = structvpr::dataset::open(&format!("folder:{w}/night/images:{w}/sun/images,radius=6")).unwrap();
    let describe = |s: &structvpr::dataset::Sample| model.describe(&RgbImage::decode(&std::fs::read(&s.path).unwrap()).unwrap()).unwrap();
    let (q, r): (Vec<_>, Vec<_>) = (data.queries.iter().map(describe).collect(), data.references.iter().map(describe).collect());
    let ranked = structvpr::eval::rank_all(&q, &r, 10).unwrap();
    let recall = structvpr::eval::recall_at(&ranked, &data.positives, &[1, 10]).recall;
    for n in [1usize, 10] {
        let want = result["tests"]["night"]["at"][n.to_string()].as_f64().unwrap();
        assert!((recall[&n] - want).abs() < 0.03, "R@{n}: {} in the core, {want} in training", recall[&n]);
    }

    // A student that nobody teaches is the rgb branch, to the last bit: `ablate` does not train it twice.
    let untaught = world.recipe("none.yaml", "distillation: {weighting: {select: None}}\n");
    ok(&["distill", "--config", &untaught, "--seg", &seg, "--partition", &parts, "--out", &world.text("none")]);
    assert!(std::fs::read(world.path("none/model.safetensors")).unwrap() == std::fs::read(world.path("rgb/model.safetensors")).unwrap());

    // A partition by another teacher is refused, and so is a folder that is not finished.
    let said = fails(&["distill", "--config", &recipe, "--seg", &rgb, "--partition", &parts, "--out", &world.text("no")]);
    assert!(said.contains("checkpoint.safetensors is of another training"), "{said}");
    let longer = world.recipe("longer.yaml", "").to_string();
    std::fs::write(&longer, std::fs::read_to_string(&longer).unwrap().replace("steps: 12", "steps: 15")).unwrap();
    let said = fails(&["partition", "--config", &longer, "--seg", &seg, "--rgb", &rgb, "--out", &world.text("no")]);
    assert!(said.contains("is of 12 of 15 steps"), "{said}");
}

#[test]
fn experiments_write_one_table_and_go_on_where_they_were() {
    let world = World::new();
    world.recipe("r.yaml", "");
    let rows = "title: Small\nrecipe: r.yaml\nseeds: [1, 2]\nrows:\n  - {name: None, select: None}\n  - slower.yaml\n  - {name: S1, select: S1, phi: one}\n  - {name: weighted S1, feature: taps}\n  - {name: groups, phi: !constant [8, 4, 1, 0]}\n  - {name: relations, select: All, phi: one, feature: relations}\n  - {name: control, teacher: shuffled}\n  - {name: concat-input, kind: concat_input, lr: 5.0e-5}\n  - {name: concat-feat, kind: concat_feat, lr: 5.0e-5}\n  - {name: multi-task, kind: multi_task}\norder: [weighted S1, S1, None]\ncontrol: {row: weighted S1, control: control, over: None}\n";
    std::fs::write(world.path("e.yaml"), rows).unwrap();
    std::fs::write(world.path("slower.yaml"), "name: slower\nselect: None\nlr: 5.0e-5\n").unwrap();
    let (config, out) = (world.text("e.yaml"), world.text("exp"));
    let said = ok(&["ablate", "--config", &config, "--out", &out, "--quick", "4"]);
    assert!(said.contains("| weighted S1 |") && said.contains("expected order") && said.contains("Gain over None"), "{said}");
    for file in ["table.md", "table.csv", "table.html"] {
        assert!(world.path("exp").join(file).is_file(), "{file}");
    }
    assert!(std::fs::read_to_string(world.path("exp/table.html")).unwrap().contains("<svg"));
    let row = |name: &str| world.path("exp/seed-1/rows").join(name);
    assert!(row("None/row.json").is_file() && !row("None/checkpoint.safetensors").exists());
    assert!(row("slower/checkpoint.safetensors").is_file());
    // Everything is there: the second run trains nothing and writes the same.
    let before = std::fs::read(world.path("exp/table.csv")).unwrap();
    let began = std::time::Instant::now();
    ok(&["ablate", "--config", &config, "--out", &out, "--quick", "4"]);
    assert!(std::fs::read(world.path("exp/table.csv")).unwrap() == before);
    println!("again: {:.1} s", began.elapsed().as_secs_f64());
    let said = fails(&["ablate", "--config", &config, "--out", &out]);
    assert!(said.contains("is of another experiment"), "{said}");
    std::fs::write(world.path("e.yaml"), rows.replace("order: [weighted S1", "order: [weighted S2")).unwrap();
    assert!(fails(&["ablate", "--config", &config, "--out", &out]).contains("names `weighted S2`"));
}

#[test]
fn bad_input_is_named_and_nothing_is_lost() {
    let world = World::new();
    let recipe = world.recipe("r.yaml", "");
    let train = |config: &str, branch: &str, out: &str| {
        let out = world.text(out);
        training(&["stage1", "--config", config, "--branch", branch, "--out", &out])
    };
    let said = |o: &Output| String::from_utf8_lossy(&o.stderr).into_owned();
    let labels = structvpr::dataset::list_images(&world.path("w/dusk/labels")).unwrap();
    let lost = std::fs::read(&labels[3].path).unwrap();

    // An image without its label map: the seg branch ends, rgb does not care; with skip the rest trains.
    std::fs::remove_file(&labels[3].path).unwrap();
    let o = train(&recipe, "seg", "a");
    assert!(o.status.code() == Some(1) && said(&o).contains("no label map") && said(&o).contains(&labels[3].name), "{}", said(&o));
    assert!(train(&recipe, "rgb", "b").status.success());
    let data = std::fs::read_to_string(&recipe).unwrap();
    let skip = |text: &str| {
        let path = world.text("skip.yaml");
        std::fs::write(&path, text.replace("  size: [96, 64]\n", "  size: [96, 64]\n  bad_input: skip\n")).unwrap();
        path
    };
    let o = train(&skip(&data), "seg", "c");
    assert!(o.status.success() && said(&o).contains("left out") && said(&o).contains(&labels[3].name), "{}", said(&o));

    // Label ids outside the mapping.
    let map = structvpr_training::slme::LabelMap { width: 96, height: 64, ids: vec![77; 96 * 64] };
    std::fs::write(&labels[3].path, map.to_png().unwrap()).unwrap();
    let o = train(&recipe, "seg", "d");
    assert!(o.status.code() == Some(1) && said(&o).contains("label 77") && said(&o).contains(&labels[3].name), "{}", said(&o));
    let lenient = world.text("lenient.yaml");
    std::fs::write(&lenient, data.replace("  size: [96, 64]\n", "  size: [96, 64]\n  unknown_labels: other\n")).unwrap();
    assert!(train(&lenient, "seg", "e").status.success());
    std::fs::write(&labels[3].path, lost).unwrap();

    // A damaged image in the middle of a training: named; mended, the training goes on from its checkpoint.
    let images = structvpr::dataset::list_images(&world.path("w/sun/images")).unwrap();
    let whole = std::fs::read(&images[2].path).unwrap();
    std::fs::write(&images[2].path, &whole[..whole.len() / 3]).unwrap();
    let o = train(&recipe, "rgb", "f");
    assert!(o.status.code() == Some(1) && said(&o).contains(&images[2].name), "{}", said(&o));
    std::fs::write(&images[2].path, whole).unwrap();
    assert!(train(&recipe, "rgb", "f").status.success());

    // A set without positives; settings out of range or unknown.
    for (from, to, want) in [
        ("radius_m: 6", "radius_m: 0.001", "none of the"),
        ("lr: 1.0e-4", "lr: 7", "rgb.lr: 7"),
        ("steps: 12", "step: 12", "step"),
        ("init: shipped", "init: /nowhere.pth", "/nowhere.pth"),
        ("name: small", "name: small\nmapping: x", "mapping"),
        ("size: [96, 64]", "size: [96, 64]\n  mapping: kitti", "`kitti`"),
    ] {
        let path = world.text("bad.yaml");
        std::fs::write(&path, data.replace(from, to)).unwrap();
        let o = train(&path, "rgb", "g");
        assert!(o.status.code() == Some(1) && said(&o).contains(want), "{to}: {}", said(&o));
    }
}

/// Random weights of the layout are enough to see files come and go.
#[test]
fn segment_makes_what_is_missing_and_names_what_it_cannot_read() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let text = |n: &str| d.join(n).display().to_string();
    std::fs::create_dir_all(d.join("images/street")).unwrap();
    for i in 0..3u8 {
        let rgb = (0..64 * 48 * 3).map(|p| (p as u8).wrapping_mul(i + 3)).collect();
        std::fs::write(d.join(format!("images/street/{i}.png")), RgbImage::new(64, 48, rgb).unwrap().to_png().unwrap()).unwrap();
    }
    // The layout's names and shapes, with small numbers.
    struct Raw(Vec<usize>, Vec<u8>);
    impl safetensors::View for Raw {
        fn dtype(&self) -> safetensors::Dtype {
            safetensors::Dtype::F32
        }
        fn shape(&self) -> &[usize] {
            &self.0
        }
        fn data(&self) -> std::borrow::Cow<'_, [u8]> {
            std::borrow::Cow::Borrowed(&self.1)
        }
        fn data_len(&self) -> usize {
            self.1.len()
        }
    }
    let tensors = include_str!("golden/espnetv2.txt").lines().map(|line| {
        let mut words = line.split(' ').skip(1);
        let name = words.next().unwrap().to_string();
        let shape: Vec<usize> = words.map(|w| w.parse().unwrap()).collect();
        let n: usize = shape.iter().product();
        (name, Raw(shape, (0..n).flat_map(|i| (0.1 + 0.01 * (i % 7) as f32).to_le_bytes()).collect()))
    });
    std::fs::write(d.join("w.safetensors"), safetensors::serialize(tensors.collect::<Vec<_>>(), None).unwrap()).unwrap();
    let (images, out, weights) = (text("images"), text("labels"), text("w.safetensors"));
    let size = ["--size", "64", "64"];
    let base = [&["segment", "--images", &images, "--out", &out, "--model", "espnetv2", "--weights", &weights][..], &size].concat();
    assert!(ok(&base).contains("3 label maps made, 0 were there"));
    let map = structvpr_training::slme::LabelMap::decode(&std::fs::read(d.join("labels/street/1.png")).unwrap()).unwrap();
    assert_eq!((map.width, map.height), (64, 48), "of the image's size");
    std::fs::remove_file(d.join("labels/street/1.png")).unwrap();
    std::fs::write(d.join("images/street/9.png"), b"\x89PNG nonsense").unwrap();
    let said = fails(&base);
    assert!(said.contains("9.png"), "{said}");
    assert!(d.join("labels/street/1.png").is_file(), "what came before is kept");
    assert!(ok(&[&base[..], &["--skip-bad"]].concat()).contains("0 label maps made, 3 were there, 1 images left out"));
    assert!(fails(&["segment", "--images", &images, "--out", &out, "--model", "espnetv2", "--weights", "/nowhere.pth"])
        .contains("/nowhere.pth"));
    assert!(fails(&[&base[..base.len() - 3], &["--size", "100", "64"]].concat()).contains("multiples of 32"));
}

#[test]
fn a_model_is_rounded_to_8_bits_and_what_is_wrong_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let small = {
        let mut weights = Model::shipped().unwrap().weights().clone();
        (weights.spec.input_width, weights.spec.input_height) = (96, 64);
        weights.to_bytes(structvpr::model::Precision::F16).unwrap()
    };
    let (model, out, empty) = (path("small.safetensors"), path("out.safetensors"), path("empty"));
    std::fs::write(&model, &small).unwrap();
    std::fs::create_dir(&empty).unwrap();
    let said = ok(&["round", &model, "--out", &out, "--steps", "2", "--batch", "2", "--name", "eight"]);
    assert!(said.contains("nearest codes: cosine") && said.contains("fitted codes: cosine") && said.contains("sha256"), "{said}");
    let bytes = std::fs::read(&out).unwrap();
    assert!(bytes.len() < small.len() * 6 / 10);
    let rounded = Model::from_bytes(&bytes).unwrap();
    let parent = Model::from_bytes(&small).unwrap();
    assert_eq!(rounded.spec().name, "eight");
    assert_eq!(rounded.spec().rounded_from, Some(parent.weights().network_sha256().unwrap()));
    assert!(rounded.weights().int8.is_some() && rounded.weights().whitening == parent.weights().whitening);
    let again = path("again.safetensors");
    assert!(fails(&["round", &out, "--out", &again]).contains("is in 8 bits already"));
    assert!(fails(&["round", &path("none"), "--out", &again]).contains("none"));
    assert!(fails(&["round", &model, "--out", &again, "--images", &empty]).contains("empty has no image"));
    assert!(fails(&["round", &model, "--out", &again, "--steps", "0"]).contains("--steps 0"));
    assert!(fails(&["round", &model, "--out", &again, "--lr", "nan"]).contains("--lr"));
    // An image that cannot be read ends it, by name.
    std::fs::write(dir.path().join("empty/bad.png"), b"no image").unwrap();
    assert!(fails(&["round", &model, "--out", &again, "--images", &empty, "--steps", "1", "--batch", "1"]).contains("bad.png"));
    assert!(!Path::new(&again).exists());
}
