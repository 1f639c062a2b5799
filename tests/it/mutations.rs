//! The fuzz targets' functions (fuzz/src/lib.rs) on their seeds, whole, cut, flipped and spliced.

use crate::support::root;
use std::path::Path;
use std::time::{Duration, Instant};
use structvpr::bag::messages::*;
use structvpr::bag::BagWriter;
use structvpr::descriptor::{Descriptor, ModelIdentity};
use structvpr::map::{Keyframe, Link, Map};

#[path = "../../fuzz/src/lib.rs"]
mod targets;

type Target = (&'static str, fn(&[u8]));

const TARGETS: [Target; 6] = [
    ("bag", targets::bag),
    ("cdr", targets::cdr),
    ("image", targets::image),
    ("map", targets::map),
    ("parameters", targets::parameters),
    ("weights", targets::weights),
];

/// Mutations of each target; `STRUCTVPR_MUTATIONS` for more.
fn rounds() -> usize {
    std::env::var("STRUCTVPR_MUTATIONS").ok().and_then(|v| v.parse().ok()).unwrap_or(600)
}

fn seeds(target: &str) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = std::fs::read_dir(root().join("fuzz/seeds").join(target)).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    all.iter().map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(p).unwrap())).collect()
}

/// Highest resident memory of this process so far, MiB; tests of nextest have a process each.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

fn mutate(seeds: &[(String, Vec<u8>)], random: &mut impl FnMut(usize) -> usize) -> Vec<u8> {
    let mut bytes = seeds[random(seeds.len())].1.clone();
    for _ in 0..1 + random(4) {
        let n = bytes.len().max(1);
        match random(7) {
            0 => bytes.truncate(random(n)),
            1 => (0..1 + random(8)).for_each(|_| {
                let at = random(n);
                if let Some(b) = bytes.get_mut(at) {
                    *b ^= 1 << random(8);
                }
            }),
            // Lengths and counts are what lies best.
            2 => {
                let (at, value) = (random(n), [0u64, 1, 0x7fff_ffff, 0xffff_ffff, u64::MAX, 1 << 40][random(6)]);
                let width = [1, 2, 4, 8][random(4)];
                let end = bytes.len().min(at + width);
                bytes.get_mut(at..end).into_iter().flatten().zip(value.to_le_bytes()).for_each(|(b, v)| *b = v);
            }
            3 => {
                let (at, len) = (random(n), random(200));
                let end = bytes.len().min(at + len);
                bytes.drain(at.min(end)..end);
            }
            4 => {
                let at = random(n).min(bytes.len());
                let more = (0..random(64)).map(|_| random(256) as u8).collect::<Vec<_>>();
                bytes.splice(at..at, more);
            }
            5 => {
                let other = &seeds[random(seeds.len())].1;
                let (at, from) = (random(n).min(bytes.len()), random(other.len().max(1)));
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from.min(other.len())..]);
            }
            _ => {
                let (at, len) = (random(n), random(4096));
                let end = bytes.len().min(at + len);
                if at < end {
                    bytes[at..end].fill([0, 0xff][random(2)]);
                }
            }
        }
    }
    bytes
}

fn run(name: &str) {
    let (_, target) = TARGETS.iter().find(|(n, _)| *n == name).unwrap();
    let seeds = seeds(name);
    assert!(!seeds.is_empty(), "no seeds of {name}");
    seeds.iter().for_each(|(_, bytes)| target(bytes));
    target(&[]);
    let mut seed = 0x5eed + name.len() as u64;
    let mut random = move |below: usize| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as usize % below
    };
    let (mut slowest, n) = (Duration::ZERO, rounds());
    for round in 0..n {
        let bytes = mutate(&seeds, &mut random);
        let clock = Instant::now();
        target(&bytes);
        slowest = slowest.max(clock.elapsed());
        assert!(clock.elapsed() < Duration::from_secs(5), "{name}, round {round}: {:?}", clock.elapsed());
    }
    let (largest, peak) = (crate::alloc::largest() >> 20, peak_mib());
    println!(
        "{name}: {n} mutations of {} seeds, slowest {slowest:?}, largest allocation {largest} MiB, peak memory {peak} MiB",
        seeds.len()
    );
    assert!(largest < 2048 && peak < 2048, "{name}: {largest} MiB at once, {peak} MiB in all");
}

#[test]
fn mutated_bags_end() {
    run("bag");
}

#[test]
fn mutated_messages_end() {
    run("cdr");
}

#[test]
fn mutated_images_end() {
    run("image");
}

#[test]
fn mutated_maps_end() {
    run("map");
}

#[test]
fn mutated_parameters_end() {
    run("parameters");
}

#[test]
fn mutated_weights_end() {
    run("weights");
}

/// A database whose tables are endless views: what a hostile bag would be.
#[test]
fn a_bag_whose_messages_are_a_view_is_not_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.db3");
    let db = rusqlite::Connection::open(&path).unwrap();
    db.execute_batch(
        "CREATE TABLE topics (id INTEGER PRIMARY KEY, name TEXT, type TEXT, serialization_format TEXT);
         INSERT INTO topics VALUES (1, '/image', 'sensor_msgs/msg/Image', 'cdr');
         CREATE VIEW messages AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT 1 AS topic_id, i AS id, i AS timestamp,
         zeroblob(1000) AS data FROM n;",
    )
    .unwrap();
    drop(db);
    let clock = Instant::now();
    let opened = structvpr::replay::open(&[path], &Default::default());
    assert!(opened.is_err() && clock.elapsed() < Duration::from_secs(5));
}

/// Makes the seeds: `cargo test --test it make_seeds -- --ignored`.
#[test]
#[ignore = "writes fuzz/seeds"]
fn make_seeds() {
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let dir = root().join("fuzz/seeds").join(target);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(name), bytes).unwrap();
    };
    let header = |i: i64| Header { stamp_ns: i * 1_000_000_000, frame_id: "camera".into() };
    let raw = |encoding: &str, bytes: usize| Image {
        header: header(1),
        height: 6,
        width: 8,
        encoding: encoding.into(),
        is_bigendian: false,
        step: (8 * bytes) as u32,
        data: (0..8 * 6 * bytes).map(|i| (i * 5) as u8).collect(),
    };
    let picture = structvpr::image::RgbImage::new(8, 6, (0..144).map(|i| (i * 3) as u8).collect()).unwrap();
    let (png, jpeg) = (picture.to_png().unwrap(), picture.thumbnail(8).unwrap());
    let compressed = |data: &[u8], format: &str| CompressedImage { header: header(2), format: format.into(), data: data.to_vec() };
    let pose = nalgebra::Isometry3::translation(1.0, 2.0, 0.0);
    let odometry = |i: i64| Odometry { header: header(i), child_frame_id: "base".into(), pose };
    let k = [50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0];
    let camera =
        structvpr::image::Camera { width: 8, height: 6, k, d: vec![0.1, 0.0, 0.0, 0.0, 0.0], distortion_model: "plumb_bob".into() };
    let info = CameraInfo { header: header(1), camera };
    let truth = PoseStamped { header: header(1), pose };

    for encoding in ["rgb8", "bgra8", "mono8", "mono16", "bayer_rggb8", "yuv422", "nv12", "32FC1"] {
        let bytes = match encoding {
            "bgra8" | "32FC1" => 4,
            "rgb8" => 3,
            "mono16" | "yuv422" => 2,
            _ => 1,
        };
        let mut m = raw(encoding, bytes);
        m.data.resize(m.data.len() * 2, 7);
        write("image", encoding, &m.encode());
        write("cdr", &format!("image_{encoding}"), &m.encode());
    }
    write("image", "png", &png);
    write("image", "jpeg", &jpeg);
    write("cdr", "compressed", &compressed(&png, "png").encode());
    write("cdr", "odometry", &odometry(1).encode());
    write("cdr", "camera_info", &info.encode());
    write("cdr", "pose", &truth.encode());

    let dir = tempfile::tempdir().unwrap();
    let mut writer = BagWriter::create(&dir.path().join("bag")).unwrap();
    for i in 0..3 {
        writer.write("/image", i, &raw("rgb8", 3)).unwrap();
        writer.write("/odom", i, &odometry(i)).unwrap();
    }
    writer.write("/camera_info", 0, &info).unwrap();
    writer.write("/ground_truth", 0, &truth).unwrap();
    writer.finish().unwrap();
    let mcap =
        std::fs::read_dir(dir.path().join("bag")).unwrap().map(|e| e.unwrap().path()).find(|p| p.extension().is_some_and(|e| e == "mcap"));
    let mcap = std::fs::read(mcap.unwrap()).unwrap();
    let path = dir.path().join("x.db3");
    let db = rusqlite::Connection::open(&path).unwrap();
    db.execute_batch(
        "PRAGMA page_size = 1024;
         CREATE TABLE topics (id INTEGER PRIMARY KEY, name TEXT NOT NULL, type TEXT NOT NULL, serialization_format TEXT NOT NULL);
         CREATE TABLE messages (id INTEGER PRIMARY KEY, topic_id INTEGER NOT NULL, timestamp INTEGER NOT NULL, data BLOB NOT NULL);
         INSERT INTO topics VALUES (1, '/image', 'sensor_msgs/msg/CompressedImage', 'cdr'), (2, '/odom', 'nav_msgs/msg/Odometry', 'cdr');",
    )
    .unwrap();
    for i in 0..3i64 {
        let insert = "INSERT INTO messages (topic_id, timestamp, data) VALUES (?1, ?2, ?3)";
        db.execute(insert, rusqlite::params![1, i, compressed(&jpeg, "jpeg").encode()]).unwrap();
        db.execute(insert, rusqlite::params![2, i, odometry(i).encode()]).unwrap();
    }
    drop(db);
    let db3 = std::fs::read(&path).unwrap();
    let packed = |bytes: &[u8]| zstd::stream::encode_all(bytes, 3).unwrap();
    for (kind, name, bytes) in
        [(0u8, "mcap", mcap.clone()), (1, "db3", db3.clone()), (2, "mcap_zstd", packed(&mcap)), (3, "db3_zstd", packed(&db3))]
    {
        write("bag", name, &[&[kind], &bytes[..]].concat());
    }

    let mut map = Map::new(ModelIdentity { name: "m".into(), sha256: "ab".into() });
    for i in 0..6u8 {
        let d = Descriptor::new(vec![1.0, f32::from(i), 0.5]).unwrap();
        let odom_from_base = (i % 2 == 0).then(|| nalgebra::Isometry3::translation(f64::from(i), 0.0, 0.0));
        let k =
            Keyframe { robot: 1, session: (i / 3).into(), camera: String::new(), stamp_ns: i.into(), name: format!("{i}"), odom_from_base };
        let row = map.push(k, &d).unwrap();
        map.set_thumbnail(row, jpeg.clone());
    }
    map.link(Link { query: 4, matched: 1, similarity: 0.9 });
    map.set_calibration(0, "", &info.camera);
    let path = dir.path().join("m");
    map.save(&path).unwrap();
    write("map", "version_4", &std::fs::read(&path).unwrap());
    write("map", "not_a_map", &db3);

    let of = |file: &str| std::fs::read(root().join(file)).unwrap();
    write("weights", "zip.pth", &of("tests/golden/tensors.pth"));
    write("weights", "legacy.pth", &of("tests/golden/legacy.pth"));
    // The header and the first tensors: what lies is the header.
    let shipped = of("models/structvpr-street-v3.safetensors");
    write("weights", "safetensors", &shipped[..shipped.len().min(24_000)]);
    let int8 = of("models/structvpr-street-v3-int8.safetensors");
    write("weights", "int8.safetensors", &int8[..int8.len().min(40_000)]);
    let small = br#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"F16","shape":[1],"data_offsets":[16,18]}}"#;
    write("weights", "small.safetensors", &[&(small.len() as u64).to_le_bytes()[..], small, &[7; 18]].concat());
    // ONNX: graph (7) { initializer (5) { dims (1): 2, data_type (2): float, name (8): "a", raw_data (9): 8 bytes } }.
    let tensor: &[u8] = &[8, 2, 16, 1, 66, 1, b'a', 74, 8, 0, 0, 128, 63, 0, 0, 0, 64];
    let graph = [&[42, tensor.len() as u8], tensor].concat();
    write("weights", "small.onnx", &[&[8, 7, 58, graph.len() as u8], &graph[..]].concat());

    for file in ["structvpr.yaml", "jetson.yaml", "cpu_laptop.yaml", "bag_replay.yaml"] {
        write("parameters", file, &of(&format!("config/{file}")));
    }
    write("parameters", "detector.yaml", b"decision: {min_consistent: 3}\nsearch: {top_k: 5}\n");
    assert!(Path::new(&root().join("fuzz/seeds/weights")).exists());
}
