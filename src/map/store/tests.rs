use super::super::check::salvage;
use super::super::{Keyframe, Link};
use super::*;
use crate::descriptor::Descriptor;
use crate::features::CompactFeatures;
use nalgebra::Isometry3;

fn sample() -> Map {
    let mut map = Map::new(ModelIdentity { name: "m".into(), sha256: "0123456789abcdef".into() });
    for i in 0..5u8 {
        let d = Descriptor::new(vec![1.0, f32::from(i), 0.5]).unwrap();
        let pose = (i % 2 == 0).then(|| Isometry3::translation(f64::from(i), 1.0, 2.0));
        let camera = ["front", "rear"][usize::from(i) % 2].to_string();
        let (stamp_ns, name) = (i64::from(i) * 7, format!("{i}.jpg"));
        map.push(Keyframe { robot: 3, session: 0, camera, stamp_ns, name, odom_from_base: pose }, &d).unwrap();
    }
    map.set_thumbnail(3, vec![0xff, 0xd8]);
    let features = crate::features::Features::new(64, 48, vec![[3.0, 4.5]], vec![0.5], 3, vec![1.0, -0.5, 0.2]).unwrap();
    map.set_features(2, "sift", CompactFeatures::new(&features));
    let k = [50.0, 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0];
    let camera =
        crate::image::Camera { width: 64, height: 48, k, d: vec![0.1, -0.05, 0.0, 0.0, 0.0], distortion_model: "plumb_bob".into() };
    map.set_calibration(0, "front", &camera);
    map.link(Link { query: 4, matched: 1, similarity: 0.75 });
    map
}

#[test]
fn what_is_saved_is_loaded_and_saving_again_gives_the_same_bytes() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.map"), dir.path().join("b.map"));
    let map = sample();
    map.save(&a)?;
    let back = Map::load(&a, map.model())?;
    assert_eq!((back.keyframes(), back.links()), (map.keyframes(), map.links()));
    assert_eq!((back.thumbnail(3), back.thumbnail(2)), (map.thumbnail(3), None));
    assert_eq!(back.place(4), map.place(4));
    assert_eq!(back.features(2, "sift"), map.features(2, "sift"));
    assert!(back.features(2, "sift").is_some() && back.features(2, "orb").is_none() && back.features(3, "sift").is_none());
    assert_eq!((back.calibration(2), back.calibration(1)), (map.calibration(2), None));
    assert!(back.calibration(2).is_some());
    back.save(&b)?;
    back.save(&b)?;
    assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
    Ok(())
}

#[test]
fn another_model_a_foreign_file_and_a_newer_version_are_refused_by_name() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.map");
    let map = sample();
    map.save(&path)?;
    let check = |model: &ModelIdentity, want: &str| {
        let said = Map::load(&path, model).map(|_| ()).unwrap_err().to_string();
        assert!(said.contains(want) && said.contains("x.map"), "{said}");
    };
    check(&ModelIdentity { name: "other".into(), sha256: String::new() }, "`other`");
    Connection::open(&path)?.pragma_update(None, "user_version", 99)?;
    check(map.model(), "version 99");
    assert!(open(&path).map(|_| ()).unwrap_err().to_string().contains("version 99"));
    Connection::open(&path)?.execute_batch("PRAGMA user_version = 4; CREATE VIEW extra AS SELECT 1")?;
    check(map.model(), "the view `extra`");
    std::fs::write(&path, b"hello").unwrap();
    check(map.model(), "not a StructVPR map");
    let said = map.save(&path).unwrap_err().to_string();
    assert!(said.contains("not overwritten") && std::fs::read(&path).unwrap() == b"hello", "{said}");
    std::fs::remove_file(&path).unwrap();
    check(map.model(), "no such file");
    Ok(())
}

fn open(path: &Path) -> Result<Opened> {
    Store::open(path, sample().model(), "{}", 1.0)
}

/// Everything that a file keeps.
#[track_caller]
fn assert_same(a: &Map, b: &Map) {
    assert_eq!(a.keyframes, b.keyframes);
    // Tracks are numbered as they are met: not in a file.
    let positions = |m: &Map| m.places.iter().map(|p| p.position).collect::<Vec<_>>();
    assert_eq!((&a.ids, positions(a), a.id()), (&b.ids, positions(b), b.id()));
    assert!((0..a.keyframes.len()).all(|i| a.index.row(i) == b.index.row(i)));
    let links = |m: &Map| m.links.iter().map(|l| (l.query, l.matched, l.similarity.to_bits())).collect::<Vec<_>>();
    assert_eq!(links(a), links(b));
    assert_eq!((&a.thumbnails, &a.features, &a.calibrations), (&b.thumbnails, &b.features, &b.calibrations));
    assert!(a.features.is_empty() || a.features_identity == b.features_identity);
    assert!(a.keyframes.is_empty() || a.next_id == b.next_id);
}

/// A file as the version wrote it.
fn of_version(path: &Path, version: i64) -> Result<()> {
    let map = sample();
    let db = Connection::open(path)?;
    db.execute_batch(&format!("PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {version};"))?;
    db.execute_batch(
        "CREATE TABLE model (name TEXT NOT NULL, sha256 TEXT NOT NULL);
         CREATE TABLE closure (query INTEGER NOT NULL, matched INTEGER NOT NULL);
         INSERT INTO closure VALUES (4, 1);",
    )?;
    db.execute("INSERT INTO model VALUES (?1, ?2)", params![map.model.name, map.model.sha256])?;
    let more = ["", ", robot INTEGER NOT NULL, camera TEXT NOT NULL, thumbnail BLOB", ", features BLOB"];
    let more = more[..version as usize].concat();
    db.execute_batch(&format!(
        "CREATE TABLE keyframe (id INTEGER PRIMARY KEY, session INTEGER NOT NULL, stamp_ns INTEGER NOT NULL, name TEXT NOT NULL, x REAL, y REAL, \
         z REAL, qx REAL, qy REAL, qz REAL, qw REAL, descriptor BLOB NOT NULL{more})"
    ))?;
    for (id, k) in map.keyframes.iter().enumerate() {
        let blob: Vec<u8> = map.index.row(id).iter().flat_map(|v| v.to_le_bytes()).collect();
        db.execute(
            if version == 1 {
                "INSERT INTO keyframe VALUES (?1, ?2, ?3, ?4, 1, 2, 3, 0, 0, 0, 1, ?5)"
            } else {
                "INSERT INTO keyframe (id, session, stamp_ns, name, x, y, z, qx, qy, qz, qw, descriptor, robot, camera)
                 VALUES (?1, ?2, ?3, ?4, 1, 2, 3, 0, 0, 0, 1, ?5, 3, 'c')"
            },
            params![id as i64, k.session, k.stamp_ns, k.name, blob],
        )?;
    }
    if version >= 3 {
        db.execute_batch(
            "CREATE TABLE features (identity TEXT NOT NULL); INSERT INTO features VALUES ('sift');
             CREATE TABLE calibration (session INTEGER NOT NULL, camera TEXT NOT NULL, json TEXT NOT NULL);",
        )?;
        db.execute("UPDATE keyframe SET features = ?1 WHERE id = 2", [map.features[&2].as_bytes()])?;
    }
    Ok(())
}

#[test]
fn older_versions_are_read_and_migrated_with_a_backup() -> Result<()> {
    for version in 1..=3 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("old.map");
        of_version(&path, version)?;
        let (before, model) = (std::fs::read(&path).unwrap(), sample().model().clone());
        let read = Map::load(&path, &model)?;
        let camera = if version == 1 { "" } else { "c" };
        assert_eq!((read.keyframes.len(), read.keyframes[3].camera.as_str(), read.links.len()), (5, camera, 1));
        assert_eq!(read.features.len(), usize::from(version == 3));
        assert_eq!(std::fs::read(&path).unwrap(), before, "reading changes nothing");
        let Opened { store, map, notes } = open(&path)?;
        assert!(notes.len() == 1 && notes[0].contains(&format!("old.map.version-{version}")), "{notes:?}");
        store.close()?;
        assert_same(&map, &read);
        assert_same(&Map::load(&path, &model)?, &read);
        assert_eq!(std::fs::read(dir.path().join(format!("old.map.version-{version}"))).unwrap(), before);
        assert!(open(&path)?.notes.is_empty(), "once");
    }
    Ok(())
}

#[test]
fn one_process_writes_others_read_and_a_crash_is_told() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("site.svpr");
    let Opened { mut store, mut map, notes } = open(&path)?;
    assert!(notes.is_empty() && map.keyframes.is_empty());
    map.merge(&sample(), 0)?;
    assert!(!map.is_saved());
    assert_eq!(store.write_all(&mut map)?, 5);
    assert!(map.is_saved());
    let said = open(&path).map(|_| ()).unwrap_err().to_string();
    assert!(said.contains("site.svpr") && said.contains(&format!("process {}", std::process::id())), "{said}");
    assert!(map.save(&path).unwrap_err().to_string().contains("is writing this map"));
    assert_same(&Map::load(&path, map.model())?, &map);
    // Ended without a word: what a kill leaves, but for the lock, which the system takes back.
    drop(store);
    let Opened { store, map: again, notes } = open(&path)?;
    assert!(notes.len() == 1 && notes[0].contains("did not end in order; its last keyframe is 4, of 0.000000028"), "{notes:?}");
    assert_same(&again, &map);
    store.close()?;
    assert!(open(&path)?.notes.is_empty());
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["site.svpr"], "one file");
    Ok(())
}

#[test]
fn a_full_disk_loses_nothing_and_the_next_try_writes_all() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let Opened { mut store, mut map, .. } = open(&path)?;
    map.merge(&sample(), 0)?;
    store.write_all(&mut map)?;
    store.db.pragma_update(None, "max_page_count", 12)?;
    for i in 0..40u8 {
        let d = Descriptor::new(vec![1.0, f32::from(i), 0.5]).unwrap();
        let k = Keyframe { robot: 3, session: 9, camera: String::new(), stamp_ns: i.into(), name: "n".repeat(2000), odom_from_base: None };
        let row = map.push(k, &d)?;
        map.link(Link { query: row, matched: 0, similarity: 0.5 });
    }
    let said = store.write_all(&mut map).unwrap_err().to_string();
    assert!(said.contains("full") && said.contains("/m"), "{said}");
    assert!(!map.is_saved());
    assert_eq!(Map::load(&path, map.model())?.keyframes.len(), 5, "what was there is there");
    store.db.pragma_update(None, "max_page_count", 100_000)?;
    store.write_all(&mut map)?;
    assert_same(&Map::load(&path, map.model())?, &map);
    store.close()?;
    assert!(Map::verify(&path)?.damage.is_empty());
    Ok(())
}

/// What happens to a map while it is written.
#[derive(Clone, Debug)]
enum Step {
    Push(u8),
    Thumbnail(usize),
    Features(usize, bool),
    Link(usize, usize),
    Calibrate(u8),
    Thin(usize),
    Merge,
    /// Takes the changes out, lets the given number of steps pass, writes them.
    Write(usize, usize),
    Reopen,
}

fn steps() -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
    use proptest::prelude::*;
    let step = prop_oneof![
        8 => any::<u8>().prop_map(Step::Push),
        3 => (0usize..40).prop_map(Step::Thumbnail),
        2 => ((0usize..40), any::<bool>()).prop_map(|(r, o)| Step::Features(r, o)),
        3 => ((0usize..40), (0usize..40)).prop_map(|(a, b)| Step::Link(a, b)),
        1 => any::<u8>().prop_map(Step::Calibrate),
        1 => (2usize..30).prop_map(Step::Thin),
        1 => Just(Step::Merge),
        4 => ((0usize..4), (1usize..20)).prop_map(|(d, l)| Step::Write(d, l)),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..60)
}

fn advance(map: &mut Map, step: &Step, i: usize) -> Result<()> {
    let n = map.keyframes.len();
    match *step {
        Step::Push(v) => {
            let d = Descriptor::new(vec![1.0, f32::from(v), i as f32])?;
            let (session, camera) = (u32::from(v % 3), ["a", "b"][usize::from(v / 3 % 2)].to_string());
            // Turned to the left and to the right: components of both signs, zeros too.
            let turn = nalgebra::UnitQuaternion::from_euler_angles(0.0, 0.0, f64::from(v) - 128.0);
            let odom_from_base = (v % 5 > 1).then(|| Isometry3::from_parts([f64::from(v), -0.0, 0.0].into(), turn));
            map.push(Keyframe { robot: 1, session, camera, stamp_ns: i as i64, name: format!("{i}"), odom_from_base }, &d)?;
        }
        Step::Thumbnail(r) => map.set_thumbnail(r, vec![i as u8; 3]),
        Step::Features(r, other) => {
            let f = crate::features::Features::new(64, 48, vec![[3.0, i as f32 % 40.0]], vec![0.5], 3, vec![1.0, -0.5, 0.2])?;
            map.set_features(r, if other { "orb" } else { "sift" }, CompactFeatures::new(&f));
        }
        Step::Link(a, b) if a < n && b < n => map.link(Link { query: a, matched: b, similarity: i as f32 * 0.01 }),
        Step::Calibrate(v) => {
            let k = [f64::from(v), 0.0, 32.0, 0.0, 50.0, 24.0, 0.0, 0.0, 1.0];
            let c = crate::image::Camera { width: 64, height: 48, k, d: Vec::new(), distortion_model: "plumb_bob".into() };
            map.set_calibration(u32::from(v % 2), "a", &c);
        }
        Step::Thin(n) => drop(map.thin(n)),
        Step::Merge if n < 30 => {
            let mut other = sample();
            other.thin(4);
            map.merge(&other, 0)?;
        }
        _ => {}
    }
    Ok(())
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 60, ..Default::default() })]
    /// Whatever changes between taking the changes and writing them, the file is the map in the end.
    #[test]
    fn written_step_by_step_the_file_is_the_map(all in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        let Opened { mut store, mut map, .. } = open(&path)?;
        store.db.pragma_update(None, "synchronous", "OFF")?;
        let mut late: Option<(usize, Changes)> = None;
        for (i, step) in all.iter().enumerate() {
            if let Some((_, changes)) = late.take_if(|(due, _)| *due <= i) {
                store.apply(&changes)?;
                map.saved(&changes);
            }
            match step {
                Step::Write(delay, limit) if late.is_none() => late = Some((i + delay, map.changes(*limit))),
                Step::Reopen if late.is_none() => {
                    store.write_all(&mut map)?;
                    drop(store);
                    let opened = open(&path)?;
                    assert_same(&opened.map, &map);
                    proptest::prop_assert!(map.is_saved() && map.clone().resume(&opened.map));
                    (store, map) = (opened.store, opened.map);
                    store.db.pragma_update(None, "synchronous", "OFF")?;
                }
                step => advance(&mut map, step, i)?,
            }
        }
        if let Some((_, changes)) = late {
            store.apply(&changes)?;
            map.saved(&changes);
        }
        store.write_all(&mut map)?;
        assert_same(&Map::load(&path, map.model())?, &map);
        store.close()?;
        let verdict = Map::verify(&path)?;
        proptest::prop_assert!(verdict.damage.is_empty(), "{:?}", verdict.damage);
        // And as a copy.
        let copy = dir.path().join("copy");
        map.save(&copy)?;
        assert_same(&Map::load(&copy, map.model())?, &map);
    }
}

/// A longer map, with everything in it.
fn filled(n: u8) -> Map {
    let mut map = Map::new(sample().model().clone());
    for i in 0..n {
        let step = [
            Step::Push(i),
            Step::Thumbnail(i.into()),
            Step::Features(i.into(), false),
            Step::Link(i.into(), usize::from(i) / 2),
            Step::Calibrate(i),
        ];
        step.iter().for_each(|s| advance(&mut map, s, i.into()).unwrap());
    }
    map
}

/// A number below the one given, from a sequence of its own.
fn dice(mut seed: u64) -> impl FnMut(usize) -> usize {
    move |below| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as usize % below
    }
}

/// A power cut: of what was written after the last fsync any part may be there, in any order. What was applied is there.
#[test]
fn a_torn_journal_opens_with_all_that_was_applied() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let Opened { mut store, mut map, .. } = open(&path)?;
    let journal = beside(&path, "-wal");
    let (mut random, mut looked) = (dice(1), 0);
    for round in 0..120usize {
        (0..3).for_each(|i| advance(&mut map, &Step::Push((round * 3 + i) as u8), round).unwrap());
        let applied = map.clone();
        let length = |p: &Path| std::fs::metadata(p).map_or(0, |m| m.len());
        store.write_all(&mut map)?;
        let whole = length(&journal);
        // More that was not asked to last: written without fsync, torn at random.
        let mut later = map.clone();
        (0..4).for_each(|i| advance(&mut later, &Step::Push(i), 1000 + round).unwrap());
        store.write_all(&mut later)?;
        if length(&journal) <= whole {
            // The journal was taken in and began again.
            map = later;
            continue;
        }
        let other = dir.path().join(format!("copy-{round}"));
        std::fs::copy(&path, &other).unwrap();
        let mut bytes = std::fs::read(&journal).unwrap();
        let tail = bytes.len() as u64 - whole;
        bytes.truncate((whole + random(tail as usize) as u64) as usize);
        for at in (whole as usize..bytes.len()).step_by(64).filter(|_| random(3) == 0).collect::<Vec<_>>() {
            bytes[at] ^= 1 << random(8);
        }
        std::fs::write(beside(&other, "-wal"), bytes).unwrap();
        let Opened { map: back, notes, store: s } = open(&other)?;
        assert_eq!(notes.len(), 1);
        drop(s);
        assert!(back.keyframes.len() >= applied.keyframes.len(), "round {round}: lost {}", applied.keyframes.len() - back.keyframes.len());
        assert_eq!(back.keyframes[..applied.keyframes.len()], applied.keyframes[..]);
        map = later;
        looked += 1;
    }
    assert!(looked > 60, "{looked} rounds had a torn tail");
    Ok(())
}

/// Damage is never taken for data: what opens is what was saved.
#[test]
fn a_flipped_bit_or_a_cut_is_noticed_and_the_rest_is_saved() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let map = filled(60);
    map.save(&path)?;
    let bytes = std::fs::read(&path).unwrap();
    let other = dir.path().join("damaged");
    let (mut random, mut opened, mut refused, mut salvaged, mut lost) = (dice(7), 0, 0, 0, 0);
    let rounds: usize = std::env::var("STRUCTVPR_MUTATIONS").ok().and_then(|v| v.parse().ok()).unwrap_or(400);
    for round in 0..rounds {
        let mut damaged = bytes.clone();
        match round % 4 {
            0 => damaged.truncate(random(bytes.len())),
            1 => {
                let at = random(bytes.len());
                let end = bytes.len().min(at + 1 + random(5000));
                damaged[at..end].fill(0);
            }
            n => (0..n * n).for_each(|_| damaged[random(bytes.len())] ^= 1 << random(8)),
        }
        std::fs::write(&other, &damaged).unwrap();
        let clock = std::time::Instant::now();
        match Map::load(&other, map.model()) {
            // The damage lies where nothing is kept, or in what the file says of the run before.
            Ok(back) => {
                opened += 1;
                assert_same(&back, &map);
            }
            Err(e) => {
                refused += 1;
                assert!(e.to_string().contains("damaged"), "{e}");
                if let Ok((back, damage)) = salvage(&other) {
                    assert!(!damage.is_empty(), "{e}");
                    salvaged += 1;
                    lost += map.keyframes.len() - back.keyframes.len();
                    let known = |k: &Keyframe| map.keyframes.contains(k);
                    assert!(back.keyframes.iter().all(known), "a keyframe that never was");
                }
            }
        }
        assert!(clock.elapsed() < std::time::Duration::from_secs(5), "round {round}");
    }
    println!("{rounds} damaged maps: {opened} open as they were, {refused} refused; of {salvaged} salvaged ones {lost} keyframes of {} were lost", salvaged * map.keyframes.len());
    assert!(refused > rounds / 3);
    Ok(())
}

#[test]
fn a_journal_without_its_file_is_not_taken_by_a_new_one() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let Opened { mut store, mut map, .. } = open(&path)?;
    map.merge(&filled(20), 0)?;
    store.write_all(&mut map)?;
    // The process dies, then somebody deletes the map, but not the journal beside it.
    let journal = std::fs::read(beside(&path, "-wal")).unwrap();
    drop(store);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(beside(&path, "-wal"), journal).unwrap();
    let Opened { map, store, .. } = open(&path)?;
    assert!(map.keyframes.is_empty());
    store.close()?;
    assert!(Map::verify(&path)?.damage.is_empty());
    Ok(())
}

#[test]
fn a_file_that_comes_back_is_gone_on_with_and_another_is_not() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let Opened { mut store, mut map, .. } = open(&path)?;
    map.merge(&filled(20), 0)?;
    store.write_all(&mut map)?;
    store.close()?;
    // Meanwhile the map went on: thinned, linked, with another picture.
    map.nothing_saved();
    map.thin(12);
    (0..5).for_each(|i| advance(&mut map, &Step::Push(i), 50 + usize::from(i)).unwrap());
    map.link(Link { query: 3, matched: 1, similarity: 0.5 });
    map.set_thumbnail(2, vec![9; 9]);
    let mut other = map.clone();
    let Opened { mut store, map: file, .. } = open(&path)?;
    assert!(map.resume(&file));
    store.write_all(&mut map)?;
    assert_same(&Map::load(&path, map.model())?, &map);
    // One who went another way from here on.
    advance(&mut map, &Step::Push(1), 70)?;
    advance(&mut other, &Step::Push(2), 71)?;
    let before = other.changes(1000).keyframes();
    assert!(!other.resume(&map));
    assert_eq!(other.changes(1000).keyframes(), before, "nothing changes");
    Ok(())
}

/// SQLite keeps no sign of a zero, and a robot that turns left has some: every such keyframe was taken for damaged.
#[test]
fn a_pose_with_negative_zeros_is_sound() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let mut map = Map::new(sample().model().clone());
    let turn = nalgebra::UnitQuaternion::new_unchecked(nalgebra::Quaternion::new(0.6, -0.0, -0.0, -0.8));
    let pose = Isometry3::from_parts([-0.0, 1.0, -0.0].into(), turn);
    let k = Keyframe { robot: 0, session: 0, camera: String::new(), stamp_ns: 1, name: String::new(), odom_from_base: Some(pose) };
    map.push(k, &Descriptor::new(vec![1.0, -0.0])?)?;
    map.save(&path)?;
    assert!(Map::verify(&path)?.damage.is_empty());
    assert_same(&Map::load(&path, map.model())?, &map);
    Ok(())
}

/// A kill while the kind of journal changes leaves a rollback journal, which a read-only connection cannot roll back.
#[test]
fn a_map_with_a_hot_rollback_journal_is_read() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let map = filled(20);
    map.save(&path)?;
    let copy = dir.path().join("killed");
    {
        // In the middle of a transaction whose pages have reached the file.
        let db = Connection::open(&path)?;
        db.execute_batch("PRAGMA journal_mode = DELETE; PRAGMA cache_size = 1; PRAGMA cache_spill = 1; BEGIN; DELETE FROM keyframe;")?;
        db.execute_batch("UPDATE closure SET query = query + 1; INSERT INTO calibration VALUES (1, 'x', zeroblob(300000), 0);")?;
        std::fs::copy(&path, &copy).unwrap();
        std::fs::copy(beside(&path, "-journal"), beside(&copy, "-journal")).unwrap();
    }
    let plain = Connection::open_with_flags(&copy, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    assert!(plain.query_row("SELECT count(*) FROM keyframe", [], |_| Ok(())).is_err(), "the journal is hot");
    assert_same(&Map::load(&copy, map.model())?, &map);
    Ok(())
}
