//! The command line as a stranger meets it.

use crate::support::{fails, ok, picture, python, root, structvpr};
use std::path::{Path, PathBuf};
use std::process::Command;
use structvpr::model::{ComputeDevice, Model, Precision};

/// Two drives past 60 places, one after the other in `run/`, and apart in `day/` and `dusk/`.
fn drives(dir: &Path) -> PathBuf {
    for place in 0..60u64 {
        for (drive, name) in ["day", "dusk"].iter().enumerate() {
            let jpeg = picture(place, drive as u64).to_jpeg(90).unwrap();
            for file in [format!("{name}/{place:03}.jpg"), format!("run/{drive}_{place:03}.jpg")] {
                let path = dir.join(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, &jpeg).unwrap();
            }
        }
    }
    // Places lie 50 m apart.
    let mut truth = String::from("name,x,y\n");
    for drive in 0..2 {
        for place in 0..60 {
            truth += &format!("{drive}_{place:03}.jpg,{},0\n", place * 50);
        }
    }
    std::fs::write(dir.join("truth.csv"), truth).unwrap();
    dir.join("run")
}

const FILES: [&str; 5] = ["loop_closures.csv", "candidates.csv", "descriptors.npz", "report.json", "report.html"];

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn replay_finds_the_second_drive_and_writes_the_same_bytes_twice() {
    let dir = tempfile::tempdir().unwrap();
    let run = drives(dir.path());
    let (run, truth) = (run.to_str().unwrap(), dir.path().join("truth.csv"));
    let outs = ["a", "b"].map(|o| dir.path().join(o));
    for out in &outs {
        let said = ok(&["replay", run, "--ground-truth", truth.to_str().unwrap(), "--out", out.to_str().unwrap()]);
        assert!(said.contains("false closures: 0"), "{said}");
    }
    for f in FILES {
        assert!(std::fs::read(outs[0].join(f)).unwrap() == std::fs::read(outs[1].join(f)).unwrap(), "{f} differs");
    }
    let report = json(&outs[0].join("report.json"));
    assert!(report["loops"]["found_share"].as_f64().unwrap() >= 0.8, "{report}");
    assert_eq!(report["loops"]["possible"], 60);
    assert!(report["model"]["sha256"].as_str().unwrap().len() == 64);
    let closures = std::fs::read_to_string(outs[0].join("loop_closures.csv")).unwrap();
    let line = closures.lines().nth(1).unwrap();
    let similarity = line.split(',').nth(6).unwrap();
    // 17 significant digits: one, a point, sixteen.
    assert_eq!(similarity.split('e').next().unwrap().trim_start_matches('-').len(), 18, "{line}");
    let candidates = std::fs::read_to_string(outs[0].join("candidates.csv")).unwrap();
    assert_eq!(candidates.lines().count(), 121, "one line per keyframe");
    assert!(candidates.contains("TOO_RECENT") && candidates.contains(",ACCEPTED,NONE,"));
}

#[test]
fn a_map_goes_on_in_a_second_run_and_refuses_another_model() {
    let dir = tempfile::tempdir().unwrap();
    drives(dir.path());
    let p = |n: &str| dir.path().join(n).to_str().unwrap().to_string();
    ok(&["replay", &p("day"), "--map", &p("m.map"), "--out", &p("first")]);
    ok(&["replay", &p("dusk"), "--map", &p("m.map"), "--out", &p("second")]);
    let second = json(&dir.path().join("second/report.json"));
    assert_eq!(second["map_keyframes"], 120);
    assert!(second["closures"].as_u64().unwrap() >= 48, "{second}");
    let other = p("other.safetensors");
    ok(&[
        "convert",
        root().join("models/structvpr-street-v3.safetensors").to_str().unwrap(),
        "--out",
        &other,
        "--gem-p",
        "2",
        "--name",
        "other",
    ]);
    let before = std::fs::read(dir.path().join("m.map")).unwrap();
    let said = fails(&["replay", &p("day"), "--map", &p("m.map"), "--model", &other, "--out", &p("third")]);
    assert!(said.contains("m.map") && said.contains("`other`") && said.contains("do not compare"), "{said}");
    assert_eq!(before, std::fs::read(dir.path().join("m.map")).unwrap(), "the map is untouched");
}

#[test]
fn eval_describe_and_compare_agree_with_each_other() {
    let dir = tempfile::tempdir().unwrap();
    drives(dir.path());
    let p = |n: &str| dir.path().join(n).to_str().unwrap().to_string();
    let dataset = format!("traverse:{}:{},tolerance=0", p("dusk"), p("day"));
    let table = ok(&["eval", "--dataset", &dataset, "--out", &p("out")]);
    assert!(table.contains("R@1 ") && table.contains("60 queries"), "{table}");
    let report = json(&dir.path().join("out/report.json"));
    let r1 = report["recall"]["1"].as_f64().unwrap();
    assert!(r1 >= 0.8, "{report}");
    assert_eq!(report["settings"]["name"], report["model"]["name"]);
    // The written descriptors score the same, by eval and by compare.
    let npz = p("out/descriptors.npz");
    let again: serde_json::Value = serde_json::from_str(&ok(&["eval", "--dataset", &dataset, "--descriptors", &npz, "--json"])).unwrap();
    assert_eq!(again["recall"], report["recall"]);
    let rows: serde_json::Value =
        serde_json::from_str(&ok(&["compare", "--dataset", &dataset, "--method", "shipped", "--method", &format!("file={npz}"), "--json"]))
            .unwrap();
    assert_eq!(rows["shipped"]["recall"], rows["file"]["recall"]);
    assert_eq!((&rows["shipped"]["model"], &rows["file"]["descriptors"]), (&report["model"], &npz.clone().into()));
    assert!(rows["shipped"]["time"]["median_ms"].as_f64().unwrap() > 0.0 && rows["file"]["time"].is_null(), "{rows}");
    let table = ok(&["compare", "--dataset", &dataset, "--method", &format!("file={npz}")]);
    assert!(table.contains("R@20") && !table.contains("thread"), "{table}");
    let said = ok(&["describe", &p("day"), "--out", &p("d.npz")]);
    assert!(said.starts_with("60 descriptors of 448 dimensions"), "{said}");
    assert_eq!(std::fs::read_to_string(dir.path().join("d.csv")).unwrap().lines().count(), 61);
    let wrong = fails(&["eval", "--dataset", &format!("traverse:{}:{}", p("run"), p("day")), "--descriptors", &npz]);
    assert!(wrong.contains("60 query descriptors") && wrong.contains("120 query images"), "{wrong}");
    // Any other method's .npy is scored by the same code.
    if let Some(python) = python("eval_describe_and_compare") {
        let code = "import sys, numpy as np
d = np.load(sys.argv[1]); assert d['query'].shape == (60, 448) and d['query'].dtype == np.float32
np.save(sys.argv[2] + '/q.npy', d['query'].astype(np.float64) * 3); np.save(sys.argv[2] + '/r.npy', np.asfortranarray(d['reference']))";
        assert!(Command::new(python).args(["-c", code, &npz, &p("")]).status().unwrap().success());
        let npy: serde_json::Value = serde_json::from_str(&ok(&[
            "eval",
            "--dataset",
            &dataset,
            "--descriptors",
            &format!("{}:{}", p("q.npy"), p("r.npy")),
            "--json",
        ]))
        .unwrap();
        assert_eq!(npy["recall"], report["recall"]);
    }
}

#[test]
fn compare_sets_what_a_reduced_precision_costs_beside_the_time_it_saves() {
    let dir = tempfile::tempdir().unwrap();
    drives(dir.path());
    let p = |n: &str| dir.path().join(n).to_str().unwrap().to_string();
    let dataset = format!("traverse:{}:{},tolerance=0", p("dusk"), p("day"));
    let compare = ["compare", "--dataset", &dataset, "--method", "shipped", "--compute"];
    let with = |more: &[&'static str]| [&compare, more].concat();
    let rows: serde_json::Value = serde_json::from_str(&ok(&with(&["f32,bf16,int8", "--json"]))).unwrap();
    let bf16 = structvpr::model::kernels::Plan::bf16_products().is_some();
    for (name, computes) in [("f32", "f32"), ("bf16", if bf16 { "bf16" } else { "f32" }), ("int8", "int8")] {
        let row = &rows[format!("shipped@{name}")];
        // What was asked for is the name, what was done is beside it.
        assert_eq!(row["time"]["compute"], computes);
        assert!(row["time"]["median_ms"].as_f64().unwrap() > 0.0, "{row}");
        // Each is scored by its own descriptors.
        let alone = ok(&["eval", "--dataset", &dataset, "--compute", name, "--json"]);
        assert_eq!(row["recall"], serde_json::from_str::<serde_json::Value>(&alone).unwrap()["recall"]);
    }
    let table = ok(&with(&["f32,int8"]));
    let line = |name: &str| table.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{table}")).to_string();
    assert!(line("shipped@f32").ends_with(" f32") && line("shipped@int8").ends_with(" int8"), "{table}");
    // A row would hide another.
    for twice in [with(&["f32,f32"]), with(&["f32", "--method", "shipped"])] {
        let said = fails(&twice);
        assert!(said.contains("two methods are named shipped"), "{said}");
    }
    let said = fails(&with(&["f32,f16"]));
    assert!(said.contains("f16 wants --device cuda:0"), "{said}");
}

#[test]
fn the_shipped_model_is_named_when_none_is_given() {
    let dir = tempfile::tempdir().unwrap();
    drives(dir.path());
    let out = structvpr(&["describe", dir.path().join("day").to_str().unwrap(), "--out", dir.path().join("d.npz").to_str().unwrap()]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("model: structvpr-street-v3 (shipped"), "{said}");
}

#[test]
fn doctor_names_the_setting_to_change() {
    let dir = tempfile::tempdir().unwrap();
    let run = drives(dir.path());
    let (run, truth) = (run.to_str().unwrap(), dir.path().join("truth.csv"));
    let config = dir.path().join("c.yaml");
    let doctor = |yaml: &str| {
        std::fs::write(&config, yaml).unwrap();
        let out = structvpr(&["doctor", run, "--config", config.to_str().unwrap(), "--ground-truth", truth.to_str().unwrap()]);
        (out.status.code(), String::from_utf8_lossy(&out.stdout).into_owned())
    };
    let (code, said) = doctor("decision: {similarity_threshold: 0.9999}");
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("60 missed loops are LOW_SIMILARITY") && said.contains("lower decision.similarity_threshold to 0."), "{said}");
    let (code, said) = doctor("decision: {min_margin: 1.5}");
    assert_eq!(code, Some(3));
    assert!(said.contains("AMBIGUOUS") && said.contains("lower decision.min_margin"), "{said}");
    let (_, said) = doctor("search: {exclusion_s: 9999}");
    assert!(said.contains("lower search.exclusion_s (now 9999)"), "{said}");
    let (_, said) = doctor("keyframe: {min_interval_s: 20}");
    assert!(said.contains("keyframe.min_interval_s (now 20)"), "{said}");
    let (code, said) = doctor("{}");
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("Nothing to change"), "{said}");
}

#[test]
fn bad_arguments_and_files_are_one_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let run = drives(dir.path());
    let p = |n: &str| dir.path().join(n).to_str().unwrap().to_string();
    let (run, out) = (run.to_str().unwrap(), p("out"));
    for (arguments, want) in [
        (vec!["replay", "/nowhere", "--out", &out], "/nowhere"),
        (vec!["replay", run, "--out", &out, "--model", "/nowhere.pth"], "/nowhere.pth"),
        (vec!["replay", run, "--out", &out, "--model", &p("truth.csv")], "neither safetensors nor"),
        (vec!["replay", run, "--out", &out, "--ground-truth", &p("none.csv")], "none.csv"),
        (vec!["replay", run, "--out", &out, "--config", &p("truth.csv")], "truth.csv"),
        (vec!["replay", run, "--out", &out, "--rate", "0"], "--rate 0"),
        (vec!["replay", run, "--out", &out, "--undistort"], "camera_info"),
        (vec!["eval", "--dataset", "foo:bar"], "unknown kind `foo`"),
        (vec!["replay", run, "--out", &out, "--compute", "f16"], "f16 wants --device cuda:0"),
        (vec!["replay", run, "--out", &out, "--device", "cuda:0", "--compute", "int8"], "cuda:0 computes in f32 or f16"),
        (vec!["bench", "--rounds", "1"], "--rounds 1"),
        (vec!["bench", "--only", "search", "--keep-map", "/nowhere"], "--keep-map"),
        (vec!["bench", "--peers", "--python", "/nowhere"], "scripts/bench_peers"),
    ] {
        let said = fails(&arguments);
        assert!(said.contains(want), "{arguments:?}: {said}");
        assert_eq!(said.trim().lines().filter(|l| l.starts_with("structvpr: ")).count(), 1, "{said}");
        assert_eq!(said.matches(want).count(), 1, "nothing is said twice: {said}");
    }
    assert_eq!(structvpr(&["replay"]).status.code(), Some(2));
    assert_eq!(structvpr(&["nonsense"]).status.code(), Some(2));
    // A truth that fits nothing.
    std::fs::write(dir.path().join("alien.csv"), "name,x,y\nother,1,2\n").unwrap();
    assert!(fails(&["replay", run, "--out", &out, "--ground-truth", &p("alien.csv")]).contains("no pose fits any keyframe"));
    // One damaged image among good ones is left out and named.
    std::fs::write(dir.path().join("day/007.jpg"), b"\xff\xd8\xff\xe0 broken").unwrap();
    let o = structvpr(&["replay", &p("day"), "--out", &out]);
    let said = String::from_utf8_lossy(&o.stderr);
    assert!(o.status.success() && said.contains("1 image(s) could not be used") && said.contains("007.jpg"), "{said}");
}

#[test]
fn convert_writes_what_every_command_loads() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("m.safetensors");
    let v3 = root().join("models/structvpr-street-v3.safetensors");
    let (shipped, out) = (v3.to_str().unwrap(), out.to_str().unwrap());
    let said = ok(&["convert", shipped, "--out", out, "--dtype", "f16", "--input-size", "96x64", "--pooling", "avg", "--license", "MIT"]);
    assert!(said.contains("\"input_width\": 96") && said.contains("\"kind\": \"average\"") && said.contains("sha256"), "{said}");
    assert!(ok(&["convert", out, "--out", out]).contains("structvpr layout"));
    // What was measured with another pooling is not passed on.
    assert!(said.contains("\"similarity_threshold\": null"), "{said}");
    // In 8 bits half of f16's bytes, whose descriptors in int8 and bf16 are nearly those in f32.
    let half = std::fs::metadata(out).unwrap().len();
    ok(&["convert", shipped, "--out", out, "--dtype", "int8", "--name", "eight"]);
    assert!(std::fs::metadata(out).unwrap().len() < half * 6 / 10);
    drives(dir.path());
    let described = |compute: &str| {
        let (day, npz) = (dir.path().join("day"), dir.path().join(format!("{compute}.npz")));
        ok(&["describe", day.to_str().unwrap(), "--model", out, "--compute", compute, "--out", npz.to_str().unwrap()]);
        structvpr::eval::read_npz_matrices(&std::fs::read(npz).unwrap()).unwrap().remove("descriptors").unwrap()
    };
    let full = described("f32");
    for compute in ["int8", "bf16"] {
        for (a, b) in full.data.chunks(full.cols).zip(described(compute).data.chunks(full.cols)) {
            let cosine: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
            assert!(cosine > 0.998, "{compute}: {cosine}");
        }
    }
    // What the processor cannot do is said.
    let has = Model::shipped().unwrap().on(ComputeDevice::Cpu, Precision::Bf16).unwrap().precision() == Precision::Bf16;
    let day = dir.path().join("day");
    let said = fails(&["describe", day.to_str().unwrap(), "--compute", "bf16", "--out", "/nowhere/d.npz"]);
    assert_eq!(said.contains("neither AMX nor AVX-512 BF16; computing in f32"), !has, "{said}");
    assert!(fails(&["convert", shipped, "--out", out, "--input-size", "5x5"]).contains("5x5"));
    assert!(fails(&["convert", shipped, "--out", out, "--input-size", "big"]).contains("WxH"));
    assert!(fails(&["convert", shipped, "--out", "/nowhere/m.safetensors"]).contains("/nowhere"));
}

#[test]
fn bench_prints_medians() {
    let rows: serde_json::Value = serde_json::from_str(&ok(&["bench", "--only", "descriptor", "--rounds", "3", "--json"])).unwrap();
    assert!(rows[0]["median_ms"].as_f64().unwrap() > 0.0 && rows[0]["ratio"].is_null());
}

#[test]
fn convert_whitens_for_the_images_it_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let run = drives(dir.path());
    let p = |n: &str| dir.path().join(n).to_str().unwrap().to_string();
    let (run, white) = (run.to_str().unwrap(), p("white.safetensors"));
    let shipped = root().join("models/structvpr-street-v3.safetensors");
    let shipped = shipped.to_str().unwrap();
    let whiten = || {
        ok(&[
            "convert",
            shipped,
            "--out",
            &white,
            "--dtype",
            "f16",
            "--name",
            "white",
            "--whiten",
            &p("day"),
            &p("dusk"),
            "--min-margin",
            "0.05",
        ])
    };
    let said = whiten();
    assert!(said.contains("\"similarity_threshold\": null") && said.contains("\"min_margin\": 0.05"), "{said}");
    // The same images give the same bytes.
    let first = std::fs::read(&white).unwrap();
    whiten();
    assert!(std::fs::read(&white).unwrap() == first);
    std::fs::write(p("c.yaml"), "decision: {similarity_threshold: 0.3}\n").unwrap();
    let said = ok(&["replay", run, "--model", &white, "--config", &p("c.yaml"), "--ground-truth", &p("truth.csv"), "--out", &p("out")]);
    assert!(said.contains("false closures: 0"), "{said}");
    let report = json(&dir.path().join("out/report.json"));
    assert!(report["loops"]["found_share"].as_f64().unwrap() >= 0.8 && report["min_margin"].as_f64().unwrap() > 0.04, "{report}");
    // It goes with another pooling, which is said, and on demand.
    let o = structvpr(&["convert", &white, "--out", &p("avg.safetensors"), "--pooling", "avg"]);
    assert!(o.status.success() && String::from_utf8_lossy(&o.stderr).contains("whitening of"), "{o:?}");
    ok(&["convert", &white, "--out", &p("plain.safetensors"), "--dtype", "f16", "--no-whitening"]);
    let size = |f: &str| std::fs::metadata(dir.path().join(f)).unwrap().len();
    assert!(size("white.safetensors") > size("plain.safetensors") + 400_000);
    assert!(fails(&["convert", shipped, "--out", &white, "--whiten", &p("day")]).contains("60 images; it takes 100"));
    assert!(fails(&["convert", shipped, "--out", &white, "--whiten", "/nowhere"]).contains("/nowhere"));
    assert!(std::fs::read(&white).unwrap() == first, "what was there stays where nothing could be fitted");
}
