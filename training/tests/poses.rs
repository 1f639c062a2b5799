//! Relative poses against the exact geometry of the synthetic street.

use nalgebra::{Isometry3, Matrix3, Rotation3, UnitQuaternion, Vector3};
use structvpr::config::VerificationConfig;
use structvpr::features::Features;
use structvpr::geometry::{Method, View};
use structvpr::image::{depths_at, Camera, RawImage};
use structvpr::map::Hit;
use structvpr::rerank::{Budget, Reranker, SURE_LEAD};
use structvpr_training::sampler::CAMERA_HEIGHT;
use structvpr_training::world::condition::Condition;
use structvpr_training::world::render::{CameraPose, Lens, Renderer};
use structvpr_training::world::World;

const SIZE: (u32, u32) = (640, 480);

fn reranker(features: &str, weights: &str) -> Reranker {
    let settings =
        VerificationConfig { enabled: true, features: features.into(), weights: weights.into(), ..VerificationConfig::default() };
    Reranker::from_settings(&settings).unwrap().unwrap()
}

/// The features that need no weights, and the networks whose weights are beside the repository.
fn all_features() -> Vec<(&'static str, String)> {
    let mut all = vec![("sift", String::new())];
    for (name, file) in [("superpoint_squeeze", "sp_squeeze_b1.onnx"), ("xfeat", "xfeat_vga.onnx")] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/weights").join(file);
        match path.exists() {
            true => all.push((name, path.to_string_lossy().into_owned())),
            false => eprintln!("skipped: {name}, for {} is not here", path.display()),
        }
    }
    all
}

/// `T_world_optical`: x right, y down, z ahead.
fn optical(p: &CameraPose) -> Isometry3<f64> {
    let ahead = Vector3::new(p.yaw.cos(), p.yaw.sin(), 0.0);
    let right = Vector3::new(p.yaw.sin(), -p.yaw.cos(), 0.0);
    let m = Matrix3::from_columns(&[right, -Vector3::z(), ahead]);
    Isometry3::from_parts(p.position.into(), UnitQuaternion::from_rotation_matrix(&Rotation3::from_matrix_unchecked(m)))
}

struct Street {
    world: World,
    renderer: Renderer,
    reranker: Reranker,
}

impl Street {
    fn new(seed: u64, features: &str, weights: &str) -> Self {
        let renderer = Renderer::new(Lens::new(SIZE.0, SIZE.1));
        Self { world: World::new(seed), renderer, reranker: reranker(features, weights) }
    }

    /// Features with depth, and where they were taken from.
    fn visit(&self, s: f64, lateral: f64, turn: f64, lap: u64, condition: &str) -> (Features, CameraPose) {
        let (p, heading) = self.world.route.at(s, lateral);
        let pose = CameraPose { position: Vector3::new(p.x, p.y, CAMERA_HEIGHT), yaw: heading + turn, pitch: 0.0 };
        let condition = Condition::named(condition).unwrap();
        let frame = self.renderer.render(&self.world, &self.world.traffic(lap), &condition, &pose, s / 8.0, lap << 32 | s as u64);
        let features = self.reranker.extract(&frame.image).unwrap();
        let data: Vec<u8> = frame.depth.iter().flat_map(|d| (if *d < 65.0 { (d * 1000.0) as u16 } else { 0 }).to_le_bytes()).collect();
        let raw = RawImage { width: SIZE.0, height: SIZE.1, encoding: "16UC1", is_bigendian: false, step: 2 * SIZE.0, data: &data };
        let depths = depths_at(&raw, features.size(), features.points()).unwrap();
        (features.with_depths(depths).unwrap(), pose)
    }

    fn camera(&self) -> Camera {
        self.renderer.lens().camera()
    }
}

/// `n` places along the street, seen on two laps: 0.9 m to the side, up to two metres on, up to three degrees turned.
fn pairs(street: &Street, condition: &str, n: usize) -> Vec<((Features, CameraPose), (Features, CameraPose))> {
    (0..n)
        .map(|i| {
            let s = street.world.route.length() * i as f64 / n as f64;
            let wave = |k: f64| (k * i as f64).sin();
            let first = street.visit(s, -1.6 + 0.15 * wave(1.3), 0.02 * wave(0.7), 1, "sun");
            let second = street.visit(s + 2.0 * wave(2.1), -0.7 + 0.15 * wave(0.9), 0.05 * wave(1.7), 2, condition);
            (second, first)
        })
        .collect()
}

/// Of the loops of one light: how many are there, agree, have rotation and direction right, are metric, and metric within 0.3 m.
struct Score {
    loops: usize,
    agree: usize,
    right: usize,
    deep: usize,
    metric: usize,
}

fn score(street: &Street, condition: &str, loops: usize) -> Score {
    let camera = street.camera();
    let (mut found, mut right, mut deep, mut metric, mut short) = (0, 0, 0, 0, 0);
    let all = pairs(street, condition, loops);
    for ((query, at), (reference, from)) in &all {
        let truth = optical(from).inverse() * optical(at);
        let view = |f| View { features: f, camera: Some(&camera) };
        let with_depth = street.reranker.pair(&view(query), &view(reference)).unwrap();
        let flat = |f: &Features| f.clone().with_depths(vec![0.0; f.len()]).unwrap();
        let (q, r) = (flat(query), flat(reference));
        let Ok(v) = street.reranker.pair(&view(&q), &view(&r)).unwrap() else { continue };
        // What no closure would be made of needs no pose.
        if structvpr::rerank::lead(v.inliers.len(), 0) < SURE_LEAD {
            continue;
        }
        found += 1;
        let pose = v.pose.expect("a calibrated pair that agrees has a pose");
        assert!(v.method == Method::Essential && !pose.scale_known, "no depth, no metres");
        let turned = pose.reference_from_query.rotation.angle_to(&truth.rotation).to_degrees();
        let off = pose.reference_from_query.translation.vector.angle(&truth.translation.vector).to_degrees();
        right += usize::from(turned <= 2.0 && off <= 10.0);
        short += usize::from(v.degeneracy.is_some());
        if let Ok(v) = with_depth {
            if let Some(p) = v.pose.filter(|p| p.scale_known) {
                deep += 1;
                let miss = (p.reference_from_query.translation.vector - truth.translation.vector).norm();
                metric += usize::from(miss <= 0.3);
            }
        }
    }
    println!(
        "{}, {condition}: {} loops, {found} agree; rotation and direction right {right}, {short} named degenerate; with depth {deep}, within 0.3 m {metric}",
        street.reranker.identity(),
        all.len()
    );
    Score { loops, agree: found, right, deep, metric }
}

#[test]
fn rotation_direction_and_metres_are_those_of_the_street() {
    for (features, weights) in all_features() {
        let street = Street::new(13, features, &weights);
        // Networks take half a second an image here.
        let s = score(&street, "sun", if features == "sift" { 120 } else { 40 });
        assert!(s.agree * 100 >= s.loops * 95, "{features}: {}", s.agree);
        assert!(s.right * 10 >= s.loops * 9, "{features}: {} of {}", s.right, s.loops);
        assert!(s.deep * 10 >= s.loops * 9 && s.metric * 10 >= s.loops * 9, "{features}: {} of {} of {}", s.metric, s.deep, s.loops);
    }
}

/// Every other place of the street looks much like the query's own, which is not among the candidates: nothing but the
/// number of agreeing matches speaks against them.
#[test]
fn facades_that_repeat_are_no_closures() {
    for (features, weights) in all_features() {
        let street = Street::new(13, features, &weights);
        let (n, spacing) = (40usize, street.world.route.length() / 40.0);
        let map: Vec<Features> = (0..n).map(|i| street.visit(i as f64 * spacing, -1.6, 0.0, 1, "sun").0).collect();
        let (mut wrong, mut believed) = (0, [0; 2]);
        for i in 0..n {
            let query = street.visit(i as f64 * spacing + 1.0, -0.7, 0.0, 2, "sun").0;
            // On the ring the last place is beside the first.
            let far = |row: usize| row.abs_diff(i).min(n - row.abs_diff(i)) as f64 * spacing > 35.0;
            for (b, with_true) in believed.iter_mut().zip([true, false]) {
                // All places, as if the global descriptor could not tell them apart.
                let hits: Vec<Hit> = (0..n).filter(|r| with_true || far(*r)).map(|row| Hit { row, similarity: 0.9 }).collect();
                let give = |row: usize| Some((map[row].clone(), None));
                let budget = Budget::all_of(hits.len());
                let order = street.reranker.rerank(&View::of(&query), &hits, &budget, give, |a, b| a.abs_diff(b) <= 1).unwrap();
                *b += order.iter().filter(|c| far(c.hit.row) && c.lead >= SURE_LEAD).count();
            }
            wrong += (0..n).filter(|r| far(*r)).count();
        }
        println!(
            "{}: {wrong} wrong pairs; believed beside the true place {}, without it {}",
            street.reranker.identity(),
            believed[0],
            believed[1]
        );
        assert!(wrong > 1000 && believed.iter().all(|b| b * 100 <= wrong), "{features}: {believed:?} of {wrong}");
    }
}
