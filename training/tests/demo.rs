//! The demo in small: render a drive of two laps, replay it, find the loops.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use structvpr::bag::Bag;
use structvpr::config::Config;
use structvpr::eval::score_run;
use structvpr::map::Map;
use structvpr::model::Model;
use structvpr::pipeline::LoopDetector;
use structvpr::replay::{self, RunOptions, SourceOptions};
use structvpr::rerank::Reranker;

fn training(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_training")).args(arguments).output().expect("the binary starts")
}

fn ok(arguments: &[&str]) {
    let out = training(arguments);
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn two_laps_of_a_street_close_and_nothing_false_does() {
    let dir = tempfile::tempdir().unwrap();
    let bag = dir.path().join("drive");
    ok(&["bag", "--out", bag.to_str().unwrap(), "--size", "320", "240"]);
    let sequence = replay::open(&[bag], &SourceOptions::default()).unwrap();
    let model = Model::shipped().unwrap();
    let detector = LoopDetector::new(Config::default(), Map::new(model.identity().clone()), model.spec().recommended()).unwrap();
    let options = RunOptions { undistort: false, odometry: true };
    let run = replay::run(&*sequence, &model, detector, None, options, &mut |_, _| Ok(())).unwrap();
    assert!(run.warnings.is_empty(), "{:?}", run.warnings);
    let scores = score_run(&run.keyframes(), 10.0, 0.8);
    assert_eq!(scores.false_closures, 0, "{scores:?}");
    assert!(scores.found_share >= 0.8, "{scores:?}");
}

#[test]
fn depth_in_a_bag_gives_metres() {
    let dir = tempfile::tempdir().unwrap();
    let bag = dir.path().join("deep");
    let size = ["--size", "320", "240", "--seconds", "30", "--conditions", "sun,sun", "--depth"];
    ok(&[&["bag", "--out", bag.to_str().unwrap()][..], &size].concat());
    let options = SourceOptions { depth_topic: Some("/camera/depth/image_raw".into()), ..SourceOptions::default() };
    let sequence = replay::open(std::slice::from_ref(&bag), &options).unwrap();
    let model = Model::shipped().unwrap();
    let mut config = Config::default();
    config.search.exclusion_s = 5.0;
    config.verification.enabled = true;
    let verifier = Reranker::from_settings(&config.verification).unwrap();
    let mut detector = LoopDetector::new(config, Map::new(model.identity().clone()), model.spec().recommended()).unwrap();
    detector.set_verifier(verifier.map(Arc::new));
    let run = replay::run(&*sequence, &model, detector, None, RunOptions { undistort: false, odometry: true }, &mut |_, _| Ok(())).unwrap();
    let (mut metric, mut right, mut unscaled) = (0, 0, 0);
    for d in &run.decisions {
        let Some(best) = d.reranked.first().filter(|r| r.lead >= 0.35) else { continue };
        let Some(pose) = best.verified().and_then(|v| v.pose) else { continue };
        if !pose.scale_known {
            unscaled += 1;
            continue;
        }
        metric += 1;
        let (q, m) = (run.truth[d.query].unwrap(), run.truth[best.hit.row].unwrap());
        let apart = (q.x - m.x).hypot(q.y - m.y);
        right += usize::from((pose.reference_from_query.translation.vector.norm() - apart).abs() <= 0.3);
    }
    println!("{metric} metric poses, {right} of the right length, {unscaled} without scale");
    assert!(metric >= 20 && right * 10 >= metric * 9, "{right} of {metric}");
    let e = replay::open(&[bag], &SourceOptions { depth_topic: Some("/nope".into()), ..SourceOptions::default() }).err().unwrap();
    assert!(e.to_string().contains("/nope") && e.to_string().contains("/camera/depth/image_raw"), "{e}");
}

#[test]
fn the_same_seed_renders_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let files = ["a", "b"].map(|n| {
        let bag = dir.path().join(n).join("drive");
        ok(&[
            "bag",
            "--out",
            bag.to_str().unwrap(),
            "--size",
            "64",
            "64",
            "--rate",
            "1",
            "--seconds",
            "4",
            "--conditions",
            "night,snow",
            "--seed",
            "3",
        ]);
        std::fs::read(bag.join("drive_0.mcap")).unwrap()
    });
    assert!(files[0] == files[1]);
}

#[test]
fn the_bag_holds_what_a_robot_would_record() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("drive");
    ok(&["bag", "--out", path.to_str().unwrap(), "--size", "64", "64", "--seconds", "2", "--raw"]);
    let bag = Bag::open(&path).unwrap();
    let topics: Vec<(&str, u64)> = bag.topics().iter().map(|(n, t)| (n.as_str(), t.messages)).collect();
    assert_eq!(topics, [("/camera/camera_info", 10), ("/camera/image_raw", 10), ("/ground_truth/pose", 41), ("/odom", 41)]);
}

#[test]
fn the_data_set_has_exact_labels_and_depth_beside_each_image() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    ok(&[
        "places",
        "--out",
        root.to_str().unwrap(),
        "--streets",
        "100",
        "1",
        "--spacing",
        "120",
        "--size",
        "128",
        "96",
        "--conditions",
        "sun,night",
    ]);
    let list = |d: &Path| structvpr::dataset::list_images(d).unwrap();
    for condition in ["sun", "night"] {
        let images = list(&root.join(condition).join("images"));
        assert!(images.len() >= 2);
        for image in &images {
            // A label map survives as it is; road, building and sky are in every view of a street.
            let png = std::fs::read(root.join(condition).join("labels").join(&image.name)).unwrap();
            let labels = structvpr::image::RgbImage::decode(&png).unwrap();
            let ids: std::collections::BTreeSet<u8> = labels.data().iter().copied().collect();
            assert!([0, 2, 10].iter().all(|id| ids.contains(id)) && ids.iter().all(|id| *id < 19), "{ids:?}");
            assert!(root.join(condition).join("depth").join(&image.name).is_file());
        }
    }
    // Every image is on one side of the mixed set, every query has its place on the other.
    let mixed = structvpr::dataset::open(&format!("manifest:{}/mixed.csv,radius=8", root.display())).unwrap();
    let names = |samples: &[structvpr::dataset::Sample]| samples.iter().map(|s| s.name.clone()).collect::<std::collections::BTreeSet<_>>();
    let (queries, references) = (names(&mixed.queries), names(&mixed.references));
    assert!(queries.is_disjoint(&references) && queries.len() == references.len() && queries.len() >= 2, "{queries:?} {references:?}");
    assert!(mixed.positives.iter().all(|p| p.len() == 1), "{:?}", mixed.positives);
    let spec = format!("folder:{0}/night/images:{0}/sun/images,radius=8", root.display());
    let data = structvpr::dataset::open(&spec).unwrap();
    assert!(data.positives.iter().enumerate().all(|(i, p)| p == &[i]), "{:?}", data.positives);
}

#[test]
fn bad_arguments_are_named() {
    for (arguments, want) in [
        (vec!["bag", "--out", "/nowhere/x", "--conditions", "fog"], "no condition `fog`; known: sun"),
        (vec!["bag", "--out", "/proc/x"], "/proc/x"),
        (vec!["bag", "--out", "/tmp/x", "--seconds", "0"], "--seconds 0"),
        (vec!["finetune", "--init", "/nowhere.pth", "--out", "/tmp/x"], "/nowhere.pth"),
    ] {
        let out = training(&arguments);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(1) && said.contains(want), "{arguments:?}: {said}");
    }
}
