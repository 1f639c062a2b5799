//! What a vehicle does to a node: kills, power cuts, full disks, cameras that lie, more images than it can take.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use structvpr::bag::messages::{CompressedImage, Header, Image, Message, Odometry};
use structvpr::config::Settings;
use structvpr::descriptor::Descriptor;
use structvpr::image::RgbImage;
use structvpr::live::inbox::Level;
use structvpr::live::Engine;
use structvpr::map::{Keyframe, Map, Store};
use structvpr::model::Model;

fn random(seed: &mut u64, below: u64) -> u64 {
    *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*seed >> 33) % below
}

/// A picture of blocks that `seed` colours.
fn pixels(width: u32, height: u32, seed: u64) -> Vec<u8> {
    let value = |x: u32, y: u32, c: u32| {
        let mut s = seed ^ (u64::from(x / 20) << 40 | u64::from(y / 20) << 20 | u64::from(c));
        random(&mut s, 7);
        random(&mut s, 200) as u8
    };
    (0..height).flat_map(|y| (0..width).flat_map(move |x| (0..3).map(move |c| value(x, y, c)))).collect()
}

fn raw(stamp_ns: i64, width: u32, height: u32, data: Vec<u8>) -> Vec<u8> {
    let header = Header { stamp_ns, frame_id: "camera".into() };
    Image { header, height, width, encoding: "rgb8".into(), is_bigendian: false, step: width * 3, data }.encode()
}

fn settings(change: impl FnOnce(&mut Settings)) -> Settings {
    let mut s = Settings::default();
    (s.keyframe.min_interval_s, s.keyframe.min_descriptor_change, s.input.odometry_wait_s) = (0.0, 0.0, 0.0);
    change(&mut s);
    s
}

/// Hands images over one at a time, so that none is dropped, and ends.
fn feed(engine: &Engine, images: impl IntoIterator<Item = Vec<u8>>, each: &mut (dyn FnMut(&structvpr::live::Keyed) + Send)) {
    std::thread::scope(|s| {
        s.spawn(|| engine.work(&mut |keyed| each(keyed)));
        for image in images {
            engine.image(0, image);
            while engine.inbox.level(0).waiting > 0 {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        engine.stop();
    });
}

const CHILD: &str = "STRUCTVPR_MAPPING_CHILD";
/// What the child promises, seconds.
const BOUND: f64 = 0.25;

/// Maps until it is killed, and says what is on the disk. Not a test of its own.
#[test]
#[ignore = "the process that killed_while_mapping kills"]
fn mapping_child() {
    let Ok(file) = std::env::var(CHILD) else { return };
    let engine = Engine::new(settings(|s| (s.map.file, s.map.durable_s) = (file, BOUND))).unwrap();
    let start = engine.map_report().keyframes;
    println!("OPEN {start}");
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_secs_f64(BOUND / 2.0));
                let n = engine.map_report().keyframes;
                engine.save_changes().unwrap();
                println!("SAVED {n}");
            }
        });
        let images = (0..1_000_000u64).map(|i| raw((i * 100_000_000) as i64, 160, 120, pixels(160, 120, i)));
        feed(&engine, images, &mut |keyed| println!("ADDED {}", keyed.id.unwrap() + 1));
    });
}

struct Kills {
    kills: usize,
    keyframes: usize,
    acknowledged: usize,
    /// Longest that a keyframe that was lost had been in the map, seconds.
    oldest_lost: f64,
    notes: usize,
}

fn kill_while_mapping(map: &Path, kills: usize, seed: &mut u64, model: &Model) -> Kills {
    let mut out = Kills { kills, keyframes: 0, acknowledged: 0, oldest_lost: 0.0, notes: 0 };
    for kill in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["faults::mapping_child", "--exact", "--ignored", "--nocapture"])
            .env(CHILD, map)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let reader = std::thread::spawn(move || {
            let (mut saved, mut added) = (0usize, Vec::new());
            for line in lines.map_while(Result::ok) {
                // The test harness's own words come in between.
                let word = |name: &str| line.rsplit_once(name).and_then(|(_, n)| n.trim().parse::<usize>().ok());
                if let Some(n) = word("SAVED ").or(word("OPEN ")) {
                    saved = saved.max(n);
                } else if let Some(n) = word("ADDED ") {
                    added.push((n, Instant::now()));
                }
            }
            (saved, added)
        });
        // From before the map is open to well into the drive.
        std::thread::sleep(Duration::from_millis(random(seed, 1500)));
        let killed = Instant::now();
        child.kill().unwrap();
        child.wait().unwrap();
        let (saved, added) = reader.join().unwrap();
        if !map.exists() {
            assert_eq!(saved, 0, "kill {kill}");
            continue;
        }
        let opened = Store::open(map, model.identity(), "", 1.0).unwrap_or_else(|e| panic!("kill {kill}: {e}"));
        let n = opened.map.keyframes().len();
        assert!(n >= saved, "kill {kill}: {saved} keyframes were acknowledged, {n} are there");
        out.notes += opened.notes.len();
        opened.store.close().unwrap();
        let verdict = Map::verify(map).unwrap();
        assert!(verdict.damage.is_empty(), "kill {kill}: {:?}", verdict.damage);
        (out.keyframes, out.acknowledged) = (n, out.acknowledged.max(saved));
        if let Some((_, at)) = added.iter().find(|(id, _)| *id > n) {
            out.oldest_lost = out.oldest_lost.max(killed.duration_since(*at).as_secs_f64());
        }
    }
    out
}

/// `STRUCTVPR_KILLS` for more.
#[test]
fn killed_while_mapping_nothing_acknowledged_is_lost() {
    let kills: usize = std::env::var("STRUCTVPR_KILLS").ok().and_then(|v| v.parse().ok()).unwrap_or(12);
    let (mut seed, model) = (11u64, Model::shipped().unwrap());
    let (mut done, mut keyframes, mut acknowledged, mut oldest, mut notes) = (0, 0, 0, 0f64, 0);
    while done < kills {
        let dir = tempfile::tempdir().unwrap();
        // A map is killed over and over, then a new one is begun: creation is a moment too.
        let out = kill_while_mapping(&dir.path().join("m"), (kills - done).min(25), &mut seed, &model);
        done += out.kills;
        (keyframes, acknowledged, oldest, notes) =
            (keyframes + out.keyframes, acknowledged + out.acknowledged, oldest.max(out.oldest_lost), notes + out.notes);
    }
    println!(
        "{done} kills: 0 of {acknowledged} acknowledged keyframes lost ({keyframes} there), every map opened; {notes} times it was told that a run had \
         not ended in order; the oldest keyframe that was lost had been added {oldest:.2} s before the kill (promised: {BOUND} s)"
    );
    assert!(acknowledged > 0 && notes > 0);
}

#[test]
fn a_process_whose_files_may_not_grow_keeps_what_it_has_and_goes_on() {
    // The disk is full for a child only: a limit on the size of its files, whose signal is ignored.
    let dir = tempfile::tempdir().unwrap();
    let map = dir.path().join("m");
    let script = format!(
        "trap '' XFSZ; ulimit -f 400; exec env {CHILD}_FULL='{}' '{}' faults::full_disk_child --exact --ignored --nocapture",
        map.display(),
        std::env::current_exe().unwrap().display()
    );
    let out = Command::new("bash").args(["-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
    let saved: usize = said.lines().find_map(|l| l.rsplit_once("SAVED ")).and_then(|(_, n)| n.trim().parse().ok()).unwrap();
    let back = Map::load(&map, Model::shipped().unwrap().identity()).unwrap();
    assert!(saved > 0 && back.keyframes().len() >= saved, "{saved} of {}", back.keyframes().len());
    assert!(Map::verify(&map).unwrap().damage.is_empty());
}

#[test]
#[ignore = "the process of a_process_whose_files_may_not_grow"]
fn full_disk_child() {
    let Ok(file) = std::env::var(format!("{CHILD}_FULL")) else { return };
    let engine = Engine::new(settings(|s| s.map.file = file)).unwrap();
    let (mut saved, mut failed) = (0, None);
    // Saved between the images, until the file may grow no more, and then some.
    std::thread::scope(|s| {
        s.spawn(|| engine.work(&mut |_| {}));
        for i in 0..120u64 {
            engine.image(0, raw((i * 100_000_000) as i64, 160, 120, pixels(160, 120, i)));
            while engine.inbox.level(0).waiting > 0 {
                std::thread::sleep(Duration::from_micros(200));
            }
            let n = engine.map_report().keyframes;
            match engine.save_changes() {
                Ok(_) if failed.is_none() => saved = n,
                Ok(_) => {}
                Err(e) => failed = Some(e.to_string()),
            }
        }
        engine.stop();
    });
    let failed = failed.expect("the disk was full");
    assert!(engine.map_report().error.is_some() && engine.map_report().keyframes == 120, "{failed}");
    println!("\nSAVED {saved}");
}

/// Images that no camera should send, among those that it should.
#[test]
fn lying_cameras_cost_an_image_each_and_nothing_else() {
    let engine = Engine::new(settings(|s| s.input.queue_depth = 1000)).unwrap();
    let jpeg_bomb = {
        // A PNG header of 20 000 x 20 000: 1.2 GB of pixels from a few bytes.
        let mut png = RgbImage::new(8, 6, pixels(8, 6, 1)).unwrap().to_png().unwrap();
        png[16..20].copy_from_slice(&20_000u32.to_be_bytes());
        png[20..24].copy_from_slice(&20_000u32.to_be_bytes());
        let crc = crc32fast::hash(&png[12..29]);
        png[29..33].copy_from_slice(&crc.to_be_bytes());
        png
    };
    assert!(RgbImage::decode(&jpeg_bomb).unwrap_err().to_string().contains("limit"));
    let claims = |width: u32, height: u32| {
        let mut m = Image::decode(&raw(2_500_000_000, 8, 6, pixels(8, 6, 1))).unwrap();
        (m.width, m.height, m.step) = (width, height, width.saturating_mul(3));
        m.encode()
    };
    // Depth that is not a number, and depth of nothing, gate nothing.
    let depth = |stamp_ns: i64, value: f32| {
        let header = Header { stamp_ns, frame_id: String::new() };
        let data = value.to_le_bytes().repeat(48);
        Image { header, height: 6, width: 8, encoding: "32FC1".into(), is_bigendian: false, step: 32, data }.encode()
    };
    engine.depth(0, &depth(1_000_000_000, f32::NAN)).unwrap();
    engine.depth(0, &depth(5_000_000_000, f32::INFINITY)).unwrap();
    let mut seen = Vec::new();
    let images = vec![
        raw(1_000_000_000, 160, 120, pixels(160, 120, 1)),
        raw(2_000_000_000, 1, 1, vec![9; 3]),
        claims(20_000, 20_000),
        claims(u32::MAX, u32::MAX),
        claims(0, 0),
        // Black, white.
        raw(3_000_000_000, 160, 120, vec![0; 57_600]),
        raw(4_000_000_000, 160, 120, vec![255; 57_600]),
        // Another resolution, another shape.
        raw(5_000_000_000, 640, 480, pixels(640, 480, 2)),
        raw(6_000_000_000, 48, 640, pixels(48, 640, 3)),
        // Not an image.
        CompressedImage { header: Header { stamp_ns: 7_000_000_000, frame_id: String::new() }, format: "jpeg".into(), data: jpeg_bomb }
            .encode(),
        raw(8_000_000_000, 160, 120, pixels(160, 120, 4)),
    ];
    feed(&engine, images, &mut |k| seen.push(k.header.stamp_ns / 1_000_000_000));
    assert_eq!(seen, [1, 5, 6, 8]);
    let stats = engine.stats();
    assert_eq!((stats.unusable, stats.reasons["LOW_QUALITY"]), (4, 3), "{} {:?}", stats.last_unusable, stats.reasons);
}

/// 200 images a second, with odometry, then without it, then again: only keyframes are described.
#[test]
fn a_fast_camera_and_odometry_that_drops_out() {
    let engine = Engine::new(Settings { ..settings(|s| (s.keyframe.min_interval_s, s.input.queue_depth) = (0.15, 1000)) }).unwrap();
    let mut count = 0;
    let images = (0..2000u64).map(|i| {
        let ns = (i * 5_000_000) as i64;
        if !(800..1400).contains(&i) {
            let header = Header { stamp_ns: ns, frame_id: "odom".into() };
            let pose = nalgebra::Isometry3::translation(i as f64 * 0.05, 0.0, 0.0);
            engine.odometry(&Odometry { header, child_frame_id: "base".into(), pose }.encode()).unwrap();
        }
        raw(ns, 160, 120, pixels(160, 120, i / 20))
    });
    feed(&engine, images, &mut |_| count += 1);
    // Ten seconds; at most one in 0.15 s.
    assert!((40..=67).contains(&count), "{count} keyframes in ten seconds");
    let stats = engine.stats();
    assert_eq!(stats.unusable, 0, "{}", stats.last_unusable);
    assert_eq!(stats.reasons.values().sum::<u64>() + stats.closures, 2000, "every image is accounted for: {:?}", stats.reasons);
}

/// Twice what the machine can do: the queue stays as deep as it may be, and every image is accounted for.
#[test]
fn twice_the_load_drops_and_counts_and_nothing_grows() {
    let engine = Engine::new(settings(|_| {})).unwrap();
    let picture: Vec<Vec<u8>> = (0..20).map(|i| pixels(640, 480, i)).collect();
    let model = Model::shipped().unwrap();
    let image = RgbImage::new(640, 480, picture[0].clone()).unwrap();
    let clock = Instant::now();
    (0..10).for_each(|_| drop(model.describe(&image)));
    let each = clock.elapsed() / 20;
    let (resident, mut handled, mut sent) = (|| rss_mib(), 0u64, 0u64);
    let mut warm = 0;
    std::thread::scope(|s| {
        let worker = s.spawn(|| engine.work(&mut |_| handled += 1));
        let clock = Instant::now();
        // By number, not by time: a slow machine must get as far as `warm`, too.
        while sent < 300 {
            engine.image(0, raw((sent * 50_000_000) as i64, 640, 480, picture[sent as usize % 20].clone()));
            sent += 1;
            if sent == 100 {
                warm = resident();
            }
            let due = each * sent as u32;
            std::thread::sleep(due.saturating_sub(clock.elapsed()));
        }
        engine.stop();
        worker.join().unwrap();
    });
    let Level { waiting, deepest, dropped } = engine.inbox.level(0);
    println!("{sent} images, one in {each:?}: {handled} keyframes, {dropped} dropped and counted, queue {deepest} at most, memory {warm} -> {} MiB", resident());
    assert!(deepest <= Settings::default().input.queue_depth && dropped > sent / 10, "{deepest} deep, {dropped} of {sent} dropped");
    assert_eq!(engine.stats().reasons.values().sum::<u64>() + engine.stats().closures + dropped + waiting as u64, sent);
    // A keyframe is two kilobytes; the pictures in flight are a few.
    assert!(resident() < warm + 60, "memory {warm} -> {} MiB", resident());
}

fn rss_mib() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096 / (1 << 20)
}

/// The command line writes a map as it goes: killed, the map has what was seen.
#[test]
fn a_killed_replay_leaves_its_map() {
    let dir = tempfile::tempdir().unwrap();
    let images: PathBuf = dir.path().join("images");
    std::fs::create_dir(&images).unwrap();
    for i in 0..30u64 {
        let png = RgbImage::new(160, 120, pixels(160, 120, i)).unwrap().to_png().unwrap();
        std::fs::write(images.join(format!("{i:04}.png")), png).unwrap();
    }
    let (map, out) = (dir.path().join("m"), dir.path().join("out"));
    let of = |p: &Path| p.display().to_string();
    let arguments = ["replay", &of(&images), "--out", &of(&out), "--map", &of(&map)];
    let keyframes = |map: &Path| Map::load_any(map).unwrap().keyframes().len();
    crate::support::ok(&arguments);
    let first = keyframes(&map);
    assert!(first > 0);
    let mut child =
        Command::new(env!("CARGO_BIN_EXE_structvpr")).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !beside(&map, ".lock").exists() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!((first..=2 * first).contains(&keyframes(&map)));
    crate::support::ok(&["map", "verify", &of(&map)]);
    crate::support::ok(&arguments);
    assert!(keyframes(&map) >= 2 * first);
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// What a large map costs to open; printed, not judged. `scripts/soak` runs it.
#[test]
#[ignore = "writes half a gigabyte"]
fn load_time_of_100_000_keyframes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let model = Model::shipped().unwrap();
    let mut map = Map::new(model.identity().clone());
    let mut seed = 5;
    for i in 0..100_000i64 {
        let d = Descriptor::new((0..448).map(|_| random(&mut seed, 2000) as f32 - 1000.0).collect()).unwrap();
        let odom_from_base = Some(nalgebra::Isometry3::translation(i as f64, 0.0, 0.0));
        let k = Keyframe { robot: 0, session: 0, camera: String::new(), stamp_ns: i, name: format!("{i}"), odom_from_base };
        let row = map.push(k, &d).unwrap();
        map.set_thumbnail(row, vec![7; 5000]);
    }
    map.save(&path).unwrap();
    drop(map);
    let clock = Instant::now();
    let opened = Store::open(&path, model.identity(), "", 1.0).unwrap();
    let took = clock.elapsed();
    assert_eq!(opened.map.keyframes().len(), 100_000);
    let clock = Instant::now();
    opened.store.close().unwrap();
    println!(
        "100 000 keyframes with thumbnails of 5 kB: {:.0} MB on disk, opened in {took:.2?}, closed in {:.2?}",
        std::fs::metadata(&path).unwrap().len() as f64 / 1e6,
        clock.elapsed()
    );
}
