//! A drive through the synthetic street, as a ROS 2 bag: two laps under different conditions.

use crate::sampler::CAMERA_HEIGHT;
use crate::world::condition::Condition;
use crate::world::noise::unit;
use crate::world::render::{CameraPose, Lens, Renderer};
use crate::world::World;
use anyhow::{ensure, Context, Result};
use nalgebra::{Isometry3, Translation3, UnitQuaternion, Vector2, Vector3};
use std::path::PathBuf;
use structvpr::bag::messages::{CameraInfo, CompressedImage, Header, Image, Odometry, PoseStamped};
use structvpr::bag::BagWriter;

#[derive(clap::Args)]
pub struct Args {
    /// Folder of the bag.
    #[arg(long)]
    out: PathBuf,
    /// Which street.
    #[arg(long, default_value_t = 7)]
    seed: u64,
    /// Length of the drive, seconds; each lap takes its share.
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// Images per second.
    #[arg(long, default_value_t = 5.0)]
    rate: f64,
    /// Condition of each lap: sun, dusk, night, snow, rain.
    #[arg(long, value_delimiter = ',', default_value = "sun,rain")]
    conditions: Vec<String>,
    /// How far each lap is driven to the left of the one before, metres.
    #[arg(long, default_value_t = 0.9)]
    lane_offset: f64,
    /// Width and height of the images.
    #[arg(long, num_args = 2, default_values_t = [640, 480])]
    size: Vec<u32>,
    /// Write sensor_msgs/Image instead of JPEG.
    #[arg(long)]
    raw: bool,
    /// Write registered depth too (16UC1, millimetres).
    #[arg(long)]
    depth: bool,
}

/// When the drive begins, nanoseconds since 1970.
const START_NS: i64 = 1_700_000_000_000_000_000;
/// Rate of odometry and ground truth, Hz.
const POSE_RATE: f64 = 20.0;

struct Drive<'a> {
    world: &'a World,
    seconds: f64,
    laps: usize,
    offset: f64,
}

impl Drive<'_> {
    fn lap(&self, t: f64) -> usize {
        ((t / self.seconds * self.laps as f64) as usize).min(self.laps - 1)
    }

    /// Metres along the street: a steady pace with some ease, another one on each lap.
    fn along(&self, t: f64) -> f64 {
        let lap = self.seconds / self.laps as f64;
        let (n, phase) = ((t / lap).floor(), (t / lap).fract());
        let ease = 0.06 * (std::f64::consts::TAU * phase + n).sin() - 0.06 * n.sin();
        self.world.route.length() * (n + phase + ease)
    }

    /// Where the robot's base is on the ground, and its heading.
    fn pose(&self, t: f64) -> (Vector2<f64>, f64) {
        // Lanes are changed over two seconds about the start of a lap.
        let lap = t / self.seconds * self.laps as f64;
        let change = (((lap.fract() - 0.5).abs() - 0.5) * self.seconds / self.laps as f64 + 1.0).clamp(0.0, 1.0) * 0.5;
        let number = if lap.fract() < 0.5 { lap.floor() - change.min(lap.floor()) } else { lap.floor() + change };
        let sway = 0.15 * (t * 0.7).sin();
        let (p, heading) = self.world.route.at(self.along(t), -1.6 + sway + self.offset * number);
        (p, heading + 0.02 * (t * 0.9).sin())
    }
}

fn isometry(p: Vector2<f64>, yaw: f64) -> Isometry3<f64> {
    Isometry3::from_parts(Translation3::new(p.x, p.y, 0.0), UnitQuaternion::from_euler_angles(0.0, 0.0, yaw))
}

pub fn run(args: &Args) -> Result<()> {
    ensure!((1.0..=7200.0).contains(&args.seconds), "--seconds {} is outside 1 to 7200", args.seconds);
    ensure!((0.1..=60.0).contains(&args.rate), "--rate {} is outside 0.1 to 60", args.rate);
    ensure!(args.size.iter().all(|s| (64..=4096).contains(s)), "--size {:?} is outside 64 to 4096", args.size);
    let conditions = args
        .conditions
        .iter()
        .map(|n| Condition::named(n).with_context(|| format!("no condition `{n}`; known: {}", crate::world::condition::NAMES.join(", "))))
        .collect::<Result<Vec<_>>>()?;
    let world = World::new(args.seed);
    let drive = Drive { world: &world, seconds: args.seconds, laps: conditions.len(), offset: args.lane_offset };
    let renderer = Renderer::new(Lens::new(args.size[0], args.size[1]));
    let traffic: Vec<_> = (0..conditions.len()).map(|lap| world.traffic(args.seed.wrapping_mul(31) + lap as u64)).collect();
    let mut bag = BagWriter::create(&args.out)?;
    write_poses(&mut bag, &drive, args)?;

    let frames = (args.seconds * args.rate) as u64;
    let bar = indicatif::ProgressBar::new(frames);
    for i in 0..frames {
        let t = i as f64 / args.rate;
        let lap = drive.lap(t);
        let (p, yaw) = drive.pose(t);
        let pose = CameraPose { position: Vector3::new(p.x, p.y, CAMERA_HEIGHT), yaw, pitch: 0.008 * (t * 3.0).sin() };
        let frame = renderer.render(&world, &traffic[lap], &conditions[lap], &pose, t, args.seed ^ i << 20);
        let stamp_ns = START_NS + (t * 1e9).round() as i64;
        let header = Header { stamp_ns, frame_id: "camera_optical".into() };
        if args.raw {
            let (width, height) = (frame.image.width(), frame.image.height());
            let data = frame.image.data().to_vec();
            let image =
                Image { header: header.clone(), height, width, encoding: "rgb8".into(), is_bigendian: false, step: 3 * width, data };
            bag.write("/camera/image_raw", stamp_ns, &image)?;
        } else {
            let image =
                CompressedImage { header: header.clone(), format: "rgb8; jpeg compressed bgr8".into(), data: frame.image.to_jpeg(90)? };
            bag.write("/camera/image_raw/compressed", stamp_ns, &image)?;
        }
        if args.depth {
            let data = frame.depth.iter().flat_map(|d| (if *d < 65.0 { (d * 1000.0) as u16 } else { 0 }).to_le_bytes()).collect();
            let (width, height) = (frame.image.width(), frame.image.height());
            let depth =
                Image { header: header.clone(), height, width, encoding: "16UC1".into(), is_bigendian: false, step: 2 * width, data };
            bag.write("/camera/depth/image_raw", stamp_ns, &depth)?;
        }
        bag.write("/camera/camera_info", stamp_ns, &CameraInfo { header, camera: renderer.lens().camera() })?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    bag.finish()?;
    println!(
        "{}: {frames} images of {} laps ({}), {:.0} m a lap, street {}",
        args.out.display(),
        conditions.len(),
        args.conditions.join(", "),
        world.route.length(),
        args.seed
    );
    Ok(())
}

/// Ground truth, and odometry that drifts: its scale is 1 % off, its heading wanders.
fn write_poses(bag: &mut BagWriter, drive: &Drive, args: &Args) -> Result<()> {
    let (mut odom, mut yaw_error) = (drive.pose(0.0), 0.0);
    let mut before = drive.pose(0.0);
    for i in 0..=(args.seconds * POSE_RATE) as u64 {
        let t = i as f64 / POSE_RATE;
        let stamp_ns = START_NS + (t * 1e9).round() as i64;
        let now = drive.pose(t);
        let step = now.0 - before.0;
        yaw_error += 0.0006 * f64::from(unit(i as i64, 1, args.seed) - 0.35);
        let (sin, cos) = f64::sin_cos(yaw_error);
        odom.0 += Vector2::new(cos * step.x - sin * step.y, sin * step.x + cos * step.y) * 1.01;
        odom.1 = now.1 + yaw_error;
        before = now;
        let header = |frame: &str| Header { stamp_ns, frame_id: frame.into() };
        bag.write(
            "/odom",
            stamp_ns,
            &Odometry { header: header("odom"), child_frame_id: "base_link".into(), pose: isometry(odom.0, odom.1) },
        )?;
        bag.write("/ground_truth/pose", stamp_ns, &PoseStamped { header: header("map"), pose: isometry(now.0, now.1) })?;
    }
    Ok(())
}
