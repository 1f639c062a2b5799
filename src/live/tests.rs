use super::*;
use crate::bag::messages::Header;
use crate::pipeline::Outcome;
use candidate::Relation;

fn settings(change: impl FnOnce(&mut Settings)) -> Settings {
    let mut s = Settings::default();
    s.decision.min_consistent = 1;
    s.decision.similarity_threshold = 0.5;
    // These pictures are as alike as noise is.
    (s.decision.min_margin, s.decision.place_radius, s.decision.consistency_window) = (0.0, 0, 100);
    (s.keyframe.min_descriptor_change, s.search.exclusion_keyframes) = (0.0, 0);
    s.input.odometry_wait_s = 0.0;
    change(&mut s);
    s
}

/// A picture that is its own place: blocks of colours drawn from `seed`.
fn pixels(seed: u64) -> Vec<u8> {
    let noise =
        |x: u64, y: u64, c: u64| (crate::test_noise(seed, (x / 20) * 1000 + (y / 20) * 10 + c) * 60.0 + 128.0).clamp(0.0, 255.0) as u8;
    (0..120u64).flat_map(|y| (0..160u64).flat_map(move |x| (0..3).map(move |c| noise(x, y, c)))).collect()
}

fn message(seconds: f64, seed: u64) -> Vec<u8> {
    let header = Header { stamp_ns: (seconds * 1e9) as i64, frame_id: "camera".into() };
    Image { header, height: 120, width: 160, encoding: "rgb8".into(), is_bigendian: false, step: 480, data: pixels(seed) }.encode()
}

fn odometry(seconds: f64, x: f64) -> Vec<u8> {
    let header = Header { stamp_ns: (seconds * 1e9) as i64, frame_id: "odom".into() };
    Odometry { header, child_frame_id: "base".into(), pose: Isometry3::translation(x, 0.0, 0.0) }.encode()
}

fn run(engine: &Engine, messages: impl IntoIterator<Item = (usize, Vec<u8>)>) -> Vec<Keyed> {
    let mut out = Vec::new();
    for (camera, bytes) in messages {
        let arrival = Arrival { at: Instant::now(), bytes };
        match engine.handle(camera, arrival) {
            Ok(Some(keyed)) => {
                engine.keep_thumbnail(&keyed);
                out.push(keyed);
            }
            Ok(None) => {}
            Err(e) => lock(&engine.stats).last_unusable = e.to_string(),
        }
    }
    out
}

#[test]
fn a_place_seen_again_is_a_candidate_with_its_account() {
    let engine = Engine::new(settings(|_| {})).unwrap();
    let lap = |t: f64| (0..12).map(move |i| (0, message(t + f64::from(i), i as u64)));
    let first = run(&engine, lap(0.0));
    assert_eq!(first.len(), 12);
    assert!(first[0].candidates.is_empty());
    let second = run(&engine, lap(100.0));
    for (i, k) in second.iter().enumerate() {
        let c = k.candidates[0];
        assert_eq!((c.row, c.rank, k.decision.query), (i, 0, 12 + i));
        assert_eq!((c.relation, c.standing), (Relation::IntraSession, Standing::Accepted), "{c:?}");
        assert!((c.time_gap_s - 100.0).abs() < 1e-6 && c.margin.unwrap() > 0.0);
        assert_eq!(k.candidates.len(), 5, "publish.max_candidates");
        assert!(k.candidates[1..].iter().all(|c| matches!(c.standing, Standing::Rejected(_))));
        let picture = engine.picture(k).unwrap();
        assert_eq!((picture.width(), picture.height()), (160 * 2 + 9, 120 + 25));
    }
    assert_eq!(engine.stats().closures, 12);
    // The same image again, asked for from outside.
    let jpeg = RgbImage::new(160, 120, pixels(5)).unwrap().to_png().unwrap();
    let (found, _, id, revision) = engine.query(&jpeg, 0, 3, false).unwrap();
    assert!(found.len() == 3 && [5, 17].contains(&found[0].row) && found[0].relation == Relation::InterSession);
    assert_eq!((id, revision), (engine.map_report().id, 36));
    assert!(engine.query(b"no image", 0, 3, false).is_err());
}

#[test]
fn broken_messages_are_counted_and_the_next_image_is_used() {
    let engine = Engine::new(settings(|_| {})).unwrap();
    let mut short = message(1.0, 1);
    short.truncate(500);
    let wrong = {
        let mut m = Image::decode(&message(2.0, 1)).unwrap();
        m.encoding = "mp3".into();
        m.encode()
    };
    for bytes in [Vec::new(), vec![0; 3], short, wrong, message(3.0, 1)] {
        engine.image(0, bytes);
    }
    // The queue holds four: the empty message went first.
    assert_eq!(engine.inbox.level(0), Level { waiting: 4, deepest: 4, dropped: 1 });
    let mut seen = 0;
    std::thread::scope(|s| {
        s.spawn(|| {
            while engine.inbox.level(0).waiting > 0 || engine.stats().keyframes == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
            engine.stop();
        });
        engine.work(&mut |_| seen += 1);
    });
    let stats = engine.stats();
    assert_eq!((seen, stats.unusable), (1, 3));
    assert!(stats.last_unusable.contains("camera: ") && stats.last_unusable.contains("mp3"), "{}", stats.last_unusable);
}

#[test]
fn a_device_that_cannot_be_is_named() {
    let said = |device: &str, compute: &str| {
        let settings = settings(|s| (s.model.device, s.model.compute) = (device.into(), compute.into()));
        Engine::new(settings).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert!(said("gpu", "f32").contains("`model.device`: gpu is not allowed; allowed: cpu, or cuda:N"), "{}", said("gpu", "f32"));
    assert!(said("cpu", "f16").contains("model.device"), "{}", said("cpu", "f16"));
    assert!(said("cuda:0", "int8").contains("int8 is for the cpu"));
    assert!(said("cuda:0", "bf16").contains("bf16 is for the cpu"));
    #[cfg(not(feature = "cuda"))]
    assert!(said("cuda:0", "f32").contains("built without CUDA"));
}

#[test]
fn parked_costs_no_network() {
    let engine = Engine::new(settings(|_| {})).unwrap();
    engine.odometry(&odometry(0.0, 0.0)).unwrap();
    assert_eq!(run(&engine, [(0, message(0.0, 0))]).len(), 1);
    // A header without an image: whoever decoded it would complain.
    let header = |t: f64| message(t, 0)[..60].to_vec();
    for i in 1..200 {
        let t = f64::from(i) * 0.2;
        engine.odometry(&odometry(t, 0.0)).unwrap();
        assert!(run(&engine, [(0, header(t)), (0, header(t + 0.01))]).is_empty());
    }
    let (stats, n) = (engine.stats(), |name: &str| engine.stats().reasons.get(name).copied().unwrap_or(0));
    assert_eq!(n("STATIONARY"), 199, "{:?}", stats.reasons);
    // Those between two poses are not known to stand still, and are looked at.
    assert!(stats.last_unusable.contains("CDR"), "{}", stats.last_unusable);
}

#[test]
fn an_image_too_soon_costs_no_network() {
    let engine = Engine::new(settings(|_| {})).unwrap();
    assert_eq!(run(&engine, [(0, message(0.0, 0))]).len(), 1);
    assert!(run(&engine, [(0, message(0.1, 0)[..60].to_vec())]).is_empty());
    let stats = engine.stats();
    assert_eq!((stats.reasons["TOO_SOON"], stats.last_unusable.as_str()), (1, ""));
}

#[test]
fn the_pose_is_that_of_the_stamp_and_a_silent_odometry_is_not_waited_for() {
    let engine = Engine::new(settings(|s| s.input.odometry_wait_s = 5.0)).unwrap();
    engine.odometry(&odometry(0.0, 0.0)).unwrap();
    let (image, at) = (message(0.5, 1), Instant::now());
    std::thread::scope(|s| {
        let worker = s.spawn(|| run(&engine, [(0, image)]));
        std::thread::sleep(Duration::from_millis(200));
        engine.odometry(&odometry(1.0, 10.0)).unwrap();
        let keyed = worker.join().unwrap();
        assert_eq!(keyed[0].odom_from_base.unwrap().translation.x, 5.0);
    });
    assert!(at.elapsed() < Duration::from_secs(4));
    assert_eq!(engine.odometry_frame(), "odom");
}

#[test]
fn maps_are_kept_loaded_merged_and_never_lost() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("site.svpr");
    let of = |file: &Path| settings(|s| s.map.file = file.to_string_lossy().into_owned());
    let engine = Engine::new(of(&file)).unwrap();
    let lap = |t: f64| (0..5).map(move |i| (0, message(t + f64::from(i), i as u64)));
    run(&engine, lap(0.0));
    assert!(!engine.map_report().saved);
    assert_eq!(engine.save_changes().unwrap(), Some((file.clone(), 5)));
    assert_eq!(engine.save_changes().unwrap(), None, "nothing changed");
    assert!(engine.map_report().saved);
    let said = Engine::new(of(&file)).unwrap_err().to_string();
    assert!(said.contains("is writing this map") && said.contains("site.svpr"), "{said}");
    assert_eq!(engine.close().unwrap(), Some((file.clone(), 5)));

    // A restart: the second run finds the first, with the pictures.
    let engine = Engine::new(of(&file)).unwrap();
    assert!(engine.notes().is_empty());
    let seen = run(&engine, lap(1000.0));
    assert_eq!(seen[0].candidates[0].relation, Relation::InterSession);
    assert!(seen.iter().all(|k| k.decision.outcome == Outcome::Closure) && engine.picture(&seen[0]).is_some());

    // Reset keeps what was there; the old rows get no new pictures.
    let said = engine.reset().unwrap();
    assert!(said.contains("site.svpr.before-1"), "{said}");
    assert_eq!(engine.map_report().keyframes, 0);
    engine.keep_thumbnail(&seen[0]);
    assert!(engine.picture(&seen[0]).is_none());
    let backup = dir.path().join("site.svpr.before-1");
    assert_eq!(Map::load(&backup, engine.model().identity()).unwrap().keyframes().len(), 10);
    assert!(file.exists(), "the empty map is written too");

    run(&engine, lap(2000.0));
    let (said, n) = engine.load(&backup, true).unwrap();
    assert!(n == 15 && said.contains("10 keyframes"), "{said}");
    let (said, n) = engine.load(&backup, false).unwrap();
    assert!(
        n == 10 && said.contains("the map before is in") && said.contains("site.svpr") && said.contains("new keyframes go to this file"),
        "{said}"
    );
    assert_eq!(engine.map_report().file.as_deref(), Some(backup.as_path()));
    assert_eq!(Map::load(&file, engine.model().identity()).unwrap().keyframes().len(), 15);
    run(&engine, lap(3000.0));
    // Its own file once more: what was added stays.
    let (said, n) = engine.load(&backup, false).unwrap();
    assert_eq!(n, 15, "{said}");

    // What is no map is neither read nor overwritten.
    let foreign = dir.path().join("notes.txt");
    std::fs::write(&foreign, "hello").unwrap();
    for e in [engine.load(&foreign, false).map(|_| ()).unwrap_err(), engine.save(Some(&foreign)).map(|_| ()).unwrap_err()] {
        assert!(e.to_string().contains("notes.txt"), "{e}");
    }
    assert_eq!(std::fs::read(&foreign).unwrap(), b"hello");
    let e = Engine::new(of(&dir.path().join("no/such/map"))).unwrap_err().to_string();
    assert!(e.contains("no/such") && e.contains("does not exist"), "{e}");
    let e = Engine::new(settings(|_| {})).unwrap().save(None).unwrap_err().to_string();
    assert!(e.contains("map.file"), "{e}");
}

#[test]
fn steering_changes_what_it_says() {
    let engine = Engine::new(settings(|s| s.input.cameras = vec!["front".into(), "rear".into()])).unwrap();
    run(&engine, (0..4).flat_map(|i| [(0, message(f64::from(i), i as u64)), (1, message(f64::from(i), 50 + i as u64))]));
    assert_eq!(engine.map_report().keyframes, 8);
    engine.pause(true);
    engine.image(0, message(50.0, 1));
    assert_eq!((engine.stats().paused, engine.inbox.level(0).waiting), (1, 0));
    engine.pause(false);
    let mut s = engine.settings();
    s.map.localization_only = true;
    s.publish.max_candidates = 1;
    engine.apply(s.clone()).unwrap();
    assert_eq!(engine.relocalize(), 8);
    let seen = run(&engine, [(1, message(60.0, 52))]);
    assert_eq!((seen[0].decision.added, seen[0].candidates.len(), engine.map_report().keyframes), (false, 1, 8));
    assert_eq!((seen[0].candidates[0].relation, seen[0].candidates[0].row), (Relation::Relocalization, 5));
    assert!(!engine.map_report().relocalizing);
    s.search.top_k = 0;
    assert!(engine.apply(s).unwrap_err().to_string().contains("search.top_k"));
    let hash = engine.config_hash();
    let mut s = engine.settings();
    s.decision.min_margin = 0.5;
    engine.apply(s).unwrap();
    assert_ne!(engine.config_hash(), hash);
}

#[test]
fn a_map_file_that_is_removed_under_the_node_is_written_again_whole() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("stick");
    std::fs::create_dir(&folder).unwrap();
    let file = folder.join("m");
    let engine = Engine::new(settings(|s| s.map.file = file.to_string_lossy().into_owned())).unwrap();
    run(&engine, (0..5).map(|i| (0, message(f64::from(i), i as u64))));
    engine.save_changes().unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    run(&engine, [(0, message(10.0, 7))]);
    let said = engine.save_changes().unwrap_err().to_string();
    assert!(said.contains("stick") && engine.map_report().error.is_some(), "{said}");
    std::fs::create_dir(&folder).unwrap();
    assert_eq!(engine.save_changes().unwrap(), Some((file.clone(), 6)));
    // Pulled out and put back as it was: gone on with.
    let away = dir.path().join("away");
    std::fs::rename(&folder, &away).unwrap();
    run(&engine, [(0, message(11.0, 8))]);
    assert!(engine.save_changes().is_err());
    std::fs::rename(&away, &folder).unwrap();
    run(&engine, [(0, message(12.0, 9))]);
    assert_eq!(engine.close().unwrap(), Some((file.clone(), 8)));
    let map = Map::load(&file, engine.model().identity()).unwrap();
    assert!(map.keyframes().len() == 8 && (0..8).all(|row| map.thumbnail(row).is_some()));
}

#[test]
fn many_look_places_up_in_one_map_and_none_of_them_writes_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m");
    let of = |only: bool| settings(|s| (s.map.file, s.map.localization_only) = (file.to_string_lossy().into_owned(), only));
    let lap = |t: f64| (0..5).map(move |i| (0, message(t + f64::from(i), i as u64)));
    let mapper = Engine::new(of(false)).unwrap();
    run(&mapper, lap(0.0));
    mapper.save_changes().unwrap();
    let readers = [Engine::new(of(true)).unwrap(), Engine::new(of(true)).unwrap()];
    for reader in &readers {
        let seen = run(reader, lap(100.0));
        assert!(seen.iter().all(|k| k.decision.outcome == Outcome::Closure && !k.decision.added && k.id.is_none()));
        assert_eq!((reader.save_changes().unwrap(), reader.close().unwrap()), (None, None));
    }
    // One of them begins to map: not while the mapper does, and not on top of what it has not read.
    let begin = |reader: &Engine| {
        let mut s = reader.settings();
        s.map.localization_only = false;
        reader.apply(s).unwrap();
        run(reader, lap(200.0));
        reader.save_changes()
    };
    let said = begin(&readers[0]).unwrap_err().to_string();
    assert!(said.contains("is writing this map"), "{said}");
    run(&mapper, [(0, message(50.0, 9))]);
    mapper.close().unwrap();
    let said = begin(&readers[1]).unwrap_err().to_string();
    assert!(said.contains("holds more than was read"), "{said}");
    // What it mapped is not lost: it can be saved elsewhere.
    let other = dir.path().join("other");
    assert_eq!(readers[1].save(Some(&other)).unwrap().1, 10);
    assert_eq!(Map::load(&file, mapper.model().identity()).unwrap().keyframes().len(), 6);
}

#[test]
fn a_full_map_stays_at_its_size_and_ids_stay() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m");
    let engine = Engine::new(settings(|s| (s.map.file, s.map.max_keyframes) = (file.to_string_lossy().into_owned(), 20))).unwrap();
    let seen = run(&engine, (0..60).map(|i| (0, message(f64::from(i), i as u64))));
    assert_eq!(seen.iter().map(|k| k.id.unwrap()).collect::<Vec<_>>(), (0..60).collect::<Vec<_>>());
    let report = engine.map_report();
    assert!(report.keyframes <= 20 && engine.stats().thinned >= 40, "{}", report.keyframes);
    engine.close().unwrap();
    let map = Map::load(&file, engine.model().identity()).unwrap();
    assert_eq!((map.keyframes().len(), map.id_of(map.keyframes().len() - 1)), (report.keyframes, 59));
    assert!(Map::verify(&file).unwrap().damage.is_empty());
    // A kept place is found under its id, and what is removed is answered as such.
    let id = map.id_of(10);
    let again = run(&engine, [(0, message(1000.0, id))]);
    assert_eq!((again[0].candidates[0].id, again[0].candidates[0].row), (id, engine_row(&engine, id)));
}

fn engine_row(engine: &Engine, id: u64) -> usize {
    lock(&engine.detector).map().row_of(id).unwrap()
}
