//! Long simulated drives, faster than real time: what grows, and what must not. `STRUCTVPR_DRIVE_S` sets the simulated seconds
//! (scripts/soak: 7200); the tests' own are short.

use nalgebra::{Isometry3, Translation3, UnitQuaternion, Vector3};
use structvpr::bag::messages::{Header, Image, Message, Odometry};
use structvpr::config::Settings;
use structvpr::live::Engine;
use structvpr::map::Map;
use structvpr_training::sampler::CAMERA_HEIGHT;
use structvpr_training::world::condition::Condition;
use structvpr_training::world::render::{CameraPose, Lens, Renderer};
use structvpr_training::world::World;

/// Images per second.
const RATE: f64 = 5.0;
/// Metres per second.
const SPEED: f64 = 8.0;
/// Laps of a street before the next.
const LAPS: f64 = 4.0;

fn seconds() -> f64 {
    std::env::var("STRUCTVPR_DRIVE_S").ok().and_then(|v| v.parse().ok()).unwrap_or(200.0)
}

fn rss_mib() -> f64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 4096.0 / f64::from(1 << 20)
}

/// Least-squares slope of `y` over `x`.
fn slope(points: &[(f64, f64)]) -> f64 {
    let n = points.len() as f64;
    let (mx, my) = (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
    points.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum::<f64>() / points.iter().map(|p| (p.0 - mx).powi(2)).sum::<f64>()
}

fn odometry(t_ns: i64, pose: Isometry3<f64>) -> Vec<u8> {
    Odometry { header: Header { stamp_ns: t_ns, frame_id: "odom".into() }, child_frame_id: "base".into(), pose }.encode()
}

fn message(t_ns: i64, image: &structvpr::image::RgbImage) -> Vec<u8> {
    let (width, height) = (image.width(), image.height());
    let header = Header { stamp_ns: t_ns, frame_id: "camera".into() };
    Image { header, height, width, encoding: "rgb8".into(), is_bigendian: false, step: 3 * width, data: image.data().to_vec() }.encode()
}

struct Streets {
    renderer: Renderer,
    world: World,
    condition: Condition,
    street: u64,
}

impl Streets {
    fn new() -> Self {
        let condition = Condition::named("sun").unwrap();
        Self { renderer: Renderer::new(Lens::new(160, 120)), world: World::new(60_000), condition, street: 0 }
    }

    /// The image at `t` seconds of a drive at constant speed, and the odometry pose: one street after the other, some laps each, and
    /// another light on each lap.
    fn at(&mut self, t: f64) -> (structvpr::image::RgbImage, Isometry3<f64>) {
        // Every street counts as 350 m of the drive, so that the street is known from the time.
        let (along, lap_m) = (t * SPEED, 350.0);
        let street = (along / (LAPS * lap_m)) as u64;
        if street != self.street {
            (self.street, self.world) = (street, World::new(60_000 + street));
        }
        let laps = along / lap_m;
        let names = ["sun", "dusk", "rain", "sun"];
        self.condition = Condition::named(names[laps as usize % names.len()]).unwrap();
        let (p, yaw) = self.world.route.at(laps.fract() * self.world.route.length(), -1.6 + 0.15 * (t * 0.7).sin());
        let camera = CameraPose { position: Vector3::new(p.x, p.y, CAMERA_HEIGHT), yaw, pitch: 0.0 };
        let frame = self.renderer.render(&self.world, &self.world.traffic(laps as u64), &self.condition, &camera, t, (t * RATE) as u64);
        // Odometry goes on from street to street, ever further away.
        let pose = Isometry3::from_parts(
            Translation3::new(p.x + 1000.0 * street as f64, p.y, 0.0),
            UnitQuaternion::from_euler_angles(0.0, 0.0, yaw),
        );
        (frame.image, pose)
    }
}

struct Driven {
    km: f64,
    keyframes: usize,
    closures: usize,
    file_mb: f64,
    memory: Vec<(f64, f64)>,
    /// What memory grew by, for each keyframe.
    per_keyframe_kib: f64,
}

fn drive(max_keyframes: usize) -> Driven {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m");
    let mut settings = Settings::default();
    (settings.map.file, settings.map.max_keyframes) = (file.display().to_string(), max_keyframes);
    settings.input.odometry_wait_s = 0.0;
    let engine = Engine::new(settings).unwrap();
    let (mut streets, mut memory) = (Streets::new(), Vec::new());
    let frames = (seconds() * RATE) as u64;
    let start = rss_mib();
    std::thread::scope(|s| {
        s.spawn(|| engine.work(&mut |_| {}));
        for i in 0..frames {
            let t = i as f64 / RATE;
            let t_ns = (t * 1e9) as i64;
            let (image, pose) = streets.at(t);
            engine.odometry(&odometry(t_ns, pose)).unwrap();
            engine.image(0, message(t_ns, &image));
            while engine.inbox.level(0).waiting > 0 {
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            // As often as the node does, in the drive's time.
            if i % 3 == 0 {
                engine.save_changes().unwrap();
            }
            if i % (frames / 40).max(1) == 0 {
                memory.push((t * SPEED / 1000.0, rss_mib()));
            }
        }
        engine.stop();
    });
    let end = rss_mib();
    let keyframes = engine.map_report().keyframes;
    engine.close().unwrap();
    let damage = Map::verify(&file).unwrap().damage;
    assert!(damage.is_empty(), "{damage:?}");
    Driven {
        km: seconds() * SPEED / 1000.0,
        keyframes,
        closures: engine.stats().closures as usize,
        file_mb: std::fs::metadata(&file).unwrap().len() as f64 / 1e6,
        memory,
        per_keyframe_kib: (end - start) * 1024.0 / keyframes as f64,
    }
}

#[test]
fn memory_of_a_capped_map_is_flat() {
    // A tenth of what the drive would add.
    let cap = (seconds() * RATE / 10.0) as usize;
    let d = drive(cap);
    let (half, first) = (d.memory.len() / 2, d.memory[d.memory.len() / 4].1);
    let slope = slope(&d.memory[half..]);
    println!(
        "{:.1} km with at most {cap} keyframes: {} keyframes, {} closures, {:.1} MB; memory {first:.0} MiB after a quarter, {:.0} MiB at the end, \
         slope over the second half {slope:.3} MiB per km",
        d.km,
        d.keyframes,
        d.closures,
        d.file_mb,
        d.memory.last().unwrap().1
    );
    assert!(d.keyframes <= cap);
    // What an uncapped map would add is some 5 MiB per km; allocators breathe.
    if d.km > 10.0 {
        assert!(slope < 0.5, "{slope} MiB per km");
    }
}

#[test]
fn a_map_grows_with_the_way_and_closes_its_loops() {
    let d = drive(0);
    println!(
        "{:.1} km without a cap: {} keyframes ({:.0} per km), {} closures, {:.1} MB ({:.2} MB per km); memory {:.2} MiB per km, {:.1} KiB per keyframe",
        d.km,
        d.keyframes,
        d.keyframes as f64 / d.km,
        d.closures,
        d.file_mb,
        d.file_mb / d.km,
        slope(&d.memory[d.memory.len() / 4..]),
        d.per_keyframe_kib
    );
    assert!(d.keyframes > 0 && d.closures > 0);
}

/// Parked: traffic passes, the light is steady, the odometry stands still.
#[test]
fn parked_for_an_hour_nothing_is_added() {
    let hour = if seconds() > 1000.0 { 3600.0 } else { 60.0 };
    let run = |with_odometry: bool| {
        let mut settings = Settings::default();
        settings.input.odometry_wait_s = 0.0;
        let engine = Engine::new(settings).unwrap();
        let (world, condition) = (World::new(60_000), Condition::named("sun").unwrap());
        let (renderer, traffic) = (Renderer::new(Lens::new(160, 120)), world.traffic(3));
        let (p, yaw) = world.route.at(40.0, -1.6);
        let camera = CameraPose { position: Vector3::new(p.x, p.y, CAMERA_HEIGHT), yaw, pitch: 0.0 };
        std::thread::scope(|s| {
            s.spawn(|| engine.work(&mut |_| {}));
            for i in 0..(hour * RATE) as u64 {
                let t = i as f64 / RATE;
                if with_odometry {
                    engine.odometry(&odometry((t * 1e9) as i64, Isometry3::translation(1.0, 2.0, 0.0))).unwrap();
                }
                let frame = renderer.render(&world, &traffic, &condition, &camera, t, i);
                engine.image(0, message((t * 1e9) as i64, &frame.image));
                while engine.inbox.level(0).waiting > 0 {
                    std::thread::sleep(std::time::Duration::from_micros(100));
                }
            }
            engine.stop();
        });
        engine.map_report().keyframes - 1
    };
    let (with, without) = (run(true), run(false));
    println!("parked for {hour:.0} s: {with} keyframes added with odometry, {without} without, while traffic passes");
    assert_eq!((with, without), (0, 0));
}

/// Without odometry the picture alone tells a moving robot from one before which something passes.
#[test]
fn a_slow_robot_without_odometry_is_not_taken_for_parked() {
    let run = |speed: f64, max_still_share: f64| {
        let mut settings = Settings::default();
        settings.keyframe.max_still_share = max_still_share;
        let engine = Engine::new(settings).unwrap();
        let (world, condition) = (World::new(60_001), Condition::named("sun").unwrap());
        let (renderer, traffic) = (Renderer::new(Lens::new(160, 120)), world.traffic(3));
        std::thread::scope(|s| {
            s.spawn(|| engine.work(&mut |_| {}));
            for i in 0..(40.0 * RATE) as u64 {
                let t = i as f64 / RATE;
                let (p, yaw) = world.route.at(10.0 + speed * t, -1.6);
                let camera = CameraPose { position: Vector3::new(p.x, p.y, CAMERA_HEIGHT), yaw, pitch: 0.0 };
                let frame = renderer.render(&world, &traffic, &condition, &camera, t, i);
                engine.image(0, message((t * 1e9) as i64, &frame.image));
                while engine.inbox.level(0).waiting > 0 {
                    std::thread::sleep(std::time::Duration::from_micros(100));
                }
            }
            engine.stop();
        });
        engine.map_report().keyframes
    };
    for speed in [0.5, 2.0, 8.0] {
        let (with, without) = (run(speed, Settings::default().keyframe.max_still_share), run(speed, 1.0));
        println!("{speed} m/s for 40 s without odometry: {with} keyframes, {without} where the picture is not asked what stands still");
        // Slowly, a keyframe waits for some more centimetres, which a descriptor that tells 13 cm apart would not; with odometry it would
        // wait for half a metre, and no longer does it wait here.
        let odometrys = (speed * 40.0 / Settings::default().keyframe.min_distance_m) as usize;
        assert!(with * 5 >= without * 4 || with >= odometrys, "{with} of {without}, {odometrys} with odometry");
    }
}
