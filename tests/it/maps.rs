//! `structvpr map` and `structvpr calibrate`, as a user runs them.

use crate::support::{ok, root, structvpr};
use std::path::Path;
use structvpr::bag::messages::Message;
use structvpr::descriptor::{Descriptor, ModelIdentity};
use structvpr::map::{Keyframe, Link, Map};

fn drive(session_names: &str, sessions: u32, poses: bool) -> Map {
    let mut map = Map::new(ModelIdentity { name: "m".into(), sha256: "0123456789abcdef".into() });
    for session in 0..sessions {
        for i in 0..20u32 {
            let angle = f64::from(i) * 0.2;
            let d = Descriptor::new(vec![angle.cos() as f32, angle.sin() as f32, session as f32 * 0.1]).unwrap();
            let odom_from_base = poses.then(|| nalgebra::Isometry3::translation(f64::from(i), 0.5, 0.0));
            let stamp_ns = i64::from(i) * 1_000_000_000 + i64::from(session) * 1_000_000_000_000;
            let k = Keyframe {
                robot: 2,
                session,
                camera: String::new(),
                stamp_ns,
                name: format!("{session_names}{session}/{i}"),
                odom_from_base,
            };
            let row = map.push(k, &d).unwrap();
            map.set_thumbnail(row, vec![1; 100]);
        }
    }
    if sessions > 1 {
        map.link(Link { query: 25, matched: 5, similarity: 0.98 });
    }
    map
}

fn fails(arguments: &[&str]) -> String {
    let out = structvpr(arguments);
    assert_eq!(out.status.code(), Some(1), "{}", String::from_utf8_lossy(&out.stdout));
    String::from_utf8(out.stderr).unwrap() + &String::from_utf8(out.stdout).unwrap()
}

#[test]
fn maps_are_looked_into_merged_pruned_and_exported() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    drive("a", 2, true).save(Path::new(&at("a"))).unwrap();
    drive("b", 1, false).save(Path::new(&at("b"))).unwrap();
    let said = ok(&["map", "info", &at("a")]);
    for words in [
        "`m` (0123456789ab)",
        "keyframes   40 of 3 values; 40 with a thumbnail",
        "closures    1, 1 of them between sessions",
        "session   1  robot 2, 20 keyframes in 19 s from 1000.000, 19 m by odometry",
    ] {
        assert!(said.contains(words), "{words}\n{said}");
    }
    let json: serde_json::Value = serde_json::from_str(&ok(&["map", "info", "--json", &at("b")])).unwrap();
    assert_eq!(
        (json["keyframes"].as_u64(), json["sessions"][0]["with_pose"].as_u64(), json["version"].as_i64()),
        (Some(20), Some(0), Some(4))
    );

    ok(&["map", "merge", &at("a"), &at("b"), "--out", &at("ab")]);
    let merged = Map::load_any(Path::new(&at("ab"))).unwrap();
    assert_eq!((merged.keyframes().len(), merged.next_session(), merged.links().len()), (60, 3, 1));

    ok(&["map", "prune", &at("ab"), "--out", &at("small"), "--max-keyframes", "30", "--sessions", "1,2", "--no-thumbnails"]);
    let small = Map::load_any(Path::new(&at("small"))).unwrap();
    assert_eq!((small.keyframes().len(), small.links().len(), small.thumbnail(0)), (30, 0, None));
    assert_eq!(small.keyframes()[0].name, "a1/0");
    assert_eq!(small.id_of(0), 20, "ids stay");
    assert!(fails(&["map", "prune", &at("ab"), "--out", &at("x")]).contains("nothing to prune"));
    assert!(fails(&["map", "prune", &at("ab"), "--out", &at("x"), "--sessions", "7"]).contains("no session 7"));

    let read = |name: &str| std::fs::read_to_string(at(name)).unwrap();
    assert!(fails(&["map", "export", &at("a"), "--format", "tum", "--out", &at("t")]).contains("--session: 0, 1"));
    ok(&["map", "export", &at("a"), "--format", "tum", "--session", "1", "--out", &at("t")]);
    assert_eq!(read("t").lines().nth(3).unwrap(), "1003.000000000 3 0.5 0 0 0 0 1");
    assert!(fails(&["map", "export", &at("b"), "--format", "g2o", "--out", &at("g")]).contains("without odometry"));
    ok(&["map", "export", &at("a"), "--format", "g2o", "--out", &at("g")]);
    let g2o = read("g");
    let count = |word: &str| g2o.lines().filter(|l| l.starts_with(word)).count();
    assert_eq!((count("VERTEX_SE3:QUAT"), count("EDGE_SE3:QUAT")), (40, 19 + 19 + 1));
    assert!(g2o.contains("EDGE_SE3:QUAT 0 1 1 0 0 0 0 0 1 ") && g2o.contains("EDGE_SE3:QUAT 5 25 0 0 0 0 0 0 1 0.04 "), "{g2o}");
    assert!(g2o.lines().all(|l| [9, 31].contains(&l.split(' ').count())), "vertices have 9 words, edges 31");
    ok(&["map", "export", &at("a"), "--format", "json", "--out", &at("j")]);
    let json: serde_json::Value = serde_json::from_str(&read("j")).unwrap();
    assert_eq!((json["keyframes"][25]["name"].as_str(), json["closures"][0]["match"].as_u64()), (Some("a1/5"), Some(5)));
    ok(&["map", "export", &at("a"), "--format", "npz", "--out", &at("n.npz")]);
    let npz = structvpr::eval::read_npz_matrices(&std::fs::read(at("n.npz")).unwrap()).unwrap();
    assert_eq!(
        (npz["descriptors"].rows, npz["descriptors"].cols, npz["sessions"].data[39], npz["closure_query"].data[0]),
        (40, 3, 1.0, 25.0)
    );
}

#[test]
fn damage_is_listed_and_what_is_sound_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let map = drive("a", 2, true);
    map.save(Path::new(&at("m"))).unwrap();
    assert!(ok(&["map", "verify", &at("m")]).contains("sound, 40 keyframes and 1 closures"));
    let mut bytes = std::fs::read(at("m")).unwrap();
    // Pages that SQLite split keep copies that nothing reads.
    let names: Vec<usize> = (0..bytes.len() - 4).filter(|i| bytes[*i..].starts_with(b"a0/7")).collect();
    names.iter().for_each(|at| bytes[at + 3] = b'8');
    std::fs::write(at("m"), bytes).unwrap();
    let said = fails(&["map", "verify", &at("m")]);
    assert!(said.contains("DAMAGED, 39 keyframes") && said.contains("keyframe 7 is damaged"), "{said}");
    let said = fails(&["map", "info", &at("m")]);
    assert!(said.contains("keyframe 7 is damaged") && said.contains("prune --damaged"), "{said}");
    ok(&["map", "prune", &at("m"), "--damaged", "--out", &at("sound")]);
    let sound = Map::load_any(Path::new(&at("sound"))).unwrap();
    assert_eq!((sound.keyframes().len(), sound.row_of(7), sound.id_of(7)), (39, None, 8));
    assert!(fails(&["map", "verify", &root().join("README.md").display().to_string()]).contains("not a StructVPR map"));
    let said = fails(&["map", "info", "/no/such/map"]);
    assert!(said.contains("/no/such/map") && said.contains("no such file"), "{said}");
}

/// A drive past places of coloured blocks, 20 m apart, one a second: `places` in order.
fn bag(dir: &Path, name: &str, places: &[u64]) -> String {
    use structvpr::bag::messages::{Header, Image, PoseStamped};
    let path = dir.join(name);
    let mut writer = structvpr::bag::BagWriter::create(&path).unwrap();
    for (i, place) in places.iter().enumerate() {
        let stamp_ns = i as i64 * 1_000_000_000;
        let header = Header { stamp_ns, frame_id: "camera".into() };
        writer.write("/image", stamp_ns, &Image::decode(&message(stamp_ns, *place, i as u64)).unwrap()).unwrap();
        let pose = nalgebra::Isometry3::translation(*place as f64 * 20.0, 0.0, 0.0);
        writer.write("/ground_truth", stamp_ns, &PoseStamped { header, pose }).unwrap();
    }
    writer.finish().unwrap();
    path.display().to_string()
}

fn message(stamp_ns: i64, place: u64, noise: u64) -> Vec<u8> {
    use structvpr::bag::messages::{Header, Image};
    let hash = |v: u64| v.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33;
    let value = |x: u64, y: u64, c: u64| {
        let block = hash(hash(place * 1_000_003 + (x / 16) * 1009 + (y / 16) * 31 + c) + 7) % 200;
        (block + hash(noise * 65_537 + x * 241 + y * 3 + c) % 56) as u8
    };
    let data = (0..120).flat_map(|y| (0..160).flat_map(move |x| (0..3).map(move |c| value(x, y, c)))).collect();
    let header = Header { stamp_ns, frame_id: "camera".into() };
    Image { header, height: 120, width: 160, encoding: "rgb8".into(), is_bigendian: false, step: 480, data }.encode()
}

#[test]
fn calibrated_on_a_bag_the_node_says_how_sure_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    // Sixty places, then half of them once more, and thirty new ones.
    let drive = |first: u64| (first..first + 60).chain(first..first + 30).chain(first + 200..first + 230).collect::<Vec<_>>();
    let (a, b) = (bag(dir.path(), "a", &drive(0)), bag(dir.path(), "b", &drive(1000)));
    std::fs::write(at("config.yaml"), "keyframe: {min_descriptor_change: 0.0}\n").unwrap();
    let run =
        |more: &[&str]| structvpr(&[&["calibrate", &a, "--out", &at("site.json"), "--config", &at("config.yaml")][..], more].concat());
    let out = run(&["--check", &b, "--json", "--precision", "0.9"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let check = &json["check"]["confidence"];
    assert!(check["expected_calibration_error"].as_f64().unwrap() < 0.15, "{json}");
    assert_eq!(check["true_matches"].as_u64(), Some(30), "{json}");
    assert!(json["similarity_threshold"]["precision"].as_f64().unwrap() >= 0.9, "{json}");
    assert!(String::from_utf8(run(&[]).stdout).unwrap().contains("judge it on another drive"));
    assert!(fails(&["calibrate", &a, "--out", &at("x"), "--map", &at("m")]).contains("--map"));

    let mut settings = structvpr::config::Settings::default();
    settings.publish.calibration = at("site.json");
    (settings.keyframe.min_descriptor_change, settings.input.odometry_wait_s) = (0.0, 0.0);
    let engine = structvpr::live::Engine::new(settings.clone()).unwrap();
    let mut sure = Vec::new();
    std::thread::scope(|s| {
        s.spawn(|| engine.work(&mut |k| sure.push(k.candidates.first().and_then(|c| c.confidence))));
        for (i, place) in drive(2000).into_iter().enumerate() {
            engine.image(0, message(i as i64 * 1_000_000_000, place, i as u64));
            while engine.inbox.level(0).waiting > 0 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        engine.stop();
    });
    let mean = |r: std::ops::Range<usize>| sure[r.clone()].iter().map(|c| c.unwrap()).sum::<f32>() / r.len() as f32;
    assert_eq!((sure.len(), sure[0]), (120, None));
    assert!(mean(60..90) > 0.8 && mean(90..120) < 0.2, "{} {}", mean(60..90), mean(90..120));
    settings.verification.enabled = true;
    let said = structvpr::live::Engine::new(settings).unwrap_err().to_string();
    assert!(said.contains("site.json") && said.contains("verification by sift"), "{said}");
}
