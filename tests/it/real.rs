//! Real images, where the evaluation data lies beside the repository.

use crate::support::{ok, shared};
use std::path::Path;

const WEIGHTS: &str = "weights/mobilenetv2_imagenet_tf.safetensors";

/// Recall of the ImageNet weights against an independent implementation's (GeM 3, taps normalised,
/// 640x480 by area), within 0.01.
fn agrees(test: &str, dataset: impl Fn(&Path) -> String, want: [f64; 3]) {
    let (Some(data), Some(weights)) = (shared(test, "data"), shared(test, WEIGHTS)) else { return };
    let text = ok(&["eval", "--dataset", &dataset(&data), "--model", weights.to_str().unwrap(), "--json"]);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (n, want) in ["1", "5", "10"].iter().zip(want) {
        let got = report["recall"][n].as_f64().unwrap();
        assert!((got - want).abs() <= 0.01, "R@{n} {got}, independent {want}");
    }
}

#[test]
fn gardens_point_right_to_left_agrees_with_the_independent_baseline() {
    agrees(
        "gardens_point",
        |d| format!("traverse:{0}/day_right:{0}/day_left,tolerance=2", d.join("gardens_point_day").display()),
        [0.875, 0.985, 0.995],
    );
}

#[test]
fn corridor_agrees_with_the_independent_baseline() {
    agrees("corridor", |d| format!("vprbench:{}", d.join("vprbench_corridor/datasets/corridor").display()), [0.613, 0.901, 0.964]);
}

#[test]
fn essex_agrees_with_the_independent_baseline() {
    agrees("essex", |d| format!("folder:{0}/query:{0}/reference,match=name", d.join("essex_tiny").display()), [0.386, 0.571, 0.643]);
}

#[test]
fn gardens_point_as_one_run_closes_loops_and_no_false_one() {
    let test = "gardens_point_as_one_run";
    let Some(dir) = shared(test, "data/gardens_point_day") else { return };
    let out = tempfile::tempdir().unwrap();
    let mut truth = String::from("name,x,y\n");
    for side in ["day_left", "day_right"] {
        for i in 0..200 {
            truth += &format!("{side}/Image{i:03}.jpg,{i},0\n");
        }
    }
    let table = out.path().join("truth.csv");
    std::fs::write(&table, truth).unwrap();
    let (left, right) = (dir.join("day_left"), dir.join("day_right"));
    let run = |name: &str| {
        let to = out.path().join(name);
        ok(&[
            "replay",
            left.to_str().unwrap(),
            right.to_str().unwrap(),
            "--ground-truth",
            table.to_str().unwrap(),
            "--truth-radius",
            "5",
            "--out",
            to.to_str().unwrap(),
        ]);
        to
    };
    let (a, b) = (run("a"), run("b"));
    for f in ["loop_closures.csv", "candidates.csv", "descriptors.npz", "report.json", "report.html"] {
        assert!(std::fs::read(a.join(f)).unwrap() == std::fs::read(b.join(f)).unwrap(), "{f} differs");
    }
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(a.join("report.json")).unwrap()).unwrap();
    let loops = &report["loops"];
    assert_eq!(loops["false_closures"], 0, "{loops}");
    assert!(loops["true_closures"].as_u64().unwrap() >= 40, "{loops}");
    // They lie along the whole second half, not in one corner.
    let closures = std::fs::read_to_string(a.join("loop_closures.csv")).unwrap();
    let quarter = |line: &str| line.split("day_right/Image").nth(1).and_then(|t| t[..3].parse::<usize>().ok()).map(|i| i / 50);
    let quarters: std::collections::BTreeSet<_> = closures.lines().filter_map(quarter).collect();
    assert!(quarters.len() >= 3, "{quarters:?}");
}
