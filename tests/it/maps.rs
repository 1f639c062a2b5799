//! `structvpr map` and `structvpr calibrate`, as a user runs them.

use crate::support::{ok, root, structvpr};
use std::path::Path;
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
