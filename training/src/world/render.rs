//! The camera: quads into a depth buffer, one shading per pixel, lens, exposure, sensor.

use super::condition::Condition;
use super::noise::{fractal, hash, unit, value};
use super::texture::{solid, surface, Surface};
use super::{label, Billboard, Quad, Traffic, World, ROAD_HALF, WALK_HALF};
use nalgebra::{Vector2, Vector3};
use rayon::prelude::*;
use structvpr::image::{Camera, RgbImage};

type Rgb = Vector3<f32>;

/// Nearest distance that is drawn, metres.
const NEAR: f64 = 0.15;
/// Beyond this nothing but ground and sky is drawn, metres.
const FAR: f64 = 170.0;

/// Where the camera is.
#[derive(Clone, Copy, Debug)]
pub struct CameraPose {
    /// Of the camera's centre, metres.
    pub position: Vector3<f64>,
    /// Heading, radians from x, counter-clockwise.
    pub yaw: f64,
    /// Nose up, radians.
    pub pitch: f64,
}

/// A lens: size, field of view, radial distortion.
#[derive(Clone, Copy, Debug)]
pub struct Lens {
    pub width: u32,
    pub height: u32,
    /// Horizontal field of view without distortion, radians.
    pub fov: f64,
    /// Brown-Conrady radial coefficients.
    pub k1: f64,
    pub k2: f64,
}

impl Lens {
    /// The lens of the demo: 84 degrees, mild barrel distortion.
    pub fn new(width: u32, height: u32) -> Self {
        Self { width, height, fov: 84f64.to_radians(), k1: -0.12, k2: 0.012 }
    }

    fn focal(&self) -> f64 {
        f64::from(self.width) / 2.0 / (self.fov / 2.0).tan()
    }

    /// As a calibration, for CameraInfo.
    pub fn camera(&self) -> Camera {
        let (f, cx, cy) = (self.focal(), f64::from(self.width) / 2.0 - 0.5, f64::from(self.height) / 2.0 - 0.5);
        Camera {
            width: self.width,
            height: self.height,
            k: [f, 0.0, cx, 0.0, f, cy, 0.0, 0.0, 1.0],
            d: vec![self.k1, self.k2, 0.0, 0.0, 0.0],
            distortion_model: "plumb_bob".into(),
        }
    }

    /// Pixel of normalised image coordinates.
    fn distort(&self, x: f64, y: f64) -> (f64, f64) {
        // Far outside the image the polynomial turns back; a clamp keeps the bounding boxes right.
        let r2 = (x * x + y * y).min(2.0);
        let scale = 1.0 + self.k1 * r2 + self.k2 * r2 * r2;
        let (f, cx, cy) = (self.focal(), f64::from(self.width) / 2.0 - 0.5, f64::from(self.height) / 2.0 - 0.5);
        (f * x * scale + cx, f * y * scale + cy)
    }

    /// Normalised coordinates of a pixel, by fixed-point iteration.
    fn undistort(&self, px: f64, py: f64) -> (f64, f64) {
        let (f, cx, cy) = (self.focal(), f64::from(self.width) / 2.0 - 0.5, f64::from(self.height) / 2.0 - 0.5);
        let (dx, dy) = ((px - cx) / f, (py - cy) / f);
        let (mut x, mut y) = (dx, dy);
        for _ in 0..12 {
            let r2 = x * x + y * y;
            let scale = 1.0 + self.k1 * r2 + self.k2 * r2 * r2;
            (x, y) = (dx / scale, dy / scale);
        }
        (x, y)
    }
}

/// What one exposure gives.
pub struct Frame {
    pub image: RgbImage,
    /// Cityscapes train ids, row-major.
    pub labels: Vec<u8>,
    /// Distance along the optical axis, metres; infinity is sky.
    pub depth: Vec<f32>,
}

/// A lens with the ray of every pixel.
pub struct Renderer {
    lens: Lens,
    rays: Vec<[f64; 2]>,
}

struct Hit {
    depth: f32,
    quad: u32,
    u: f32,
    v: f32,
}

struct View {
    position: Vector3<f64>,
    forward: Vector3<f64>,
    right: Vector3<f64>,
    down: Vector3<f64>,
}

impl View {
    fn new(pose: &CameraPose) -> Self {
        let (sy, cy) = pose.yaw.sin_cos();
        let (sp, cp) = pose.pitch.sin_cos();
        let forward = Vector3::new(cy * cp, sy * cp, sp);
        let right = Vector3::new(sy, -cy, 0.0);
        Self { position: pose.position, forward, right, down: forward.cross(&right) }
    }

    /// To the optical frame: right, down, forward.
    fn camera(&self, p: &Vector3<f64>) -> Vector3<f64> {
        let d = p - self.position;
        Vector3::new(d.dot(&self.right), d.dot(&self.down), d.dot(&self.forward))
    }

    fn ray(&self, n: [f64; 2]) -> Vector3<f64> {
        self.forward + self.right * n[0] + self.down * n[1]
    }
}

impl Renderer {
    /// Precomputes the rays.
    pub fn new(lens: Lens) -> Self {
        let rays = (0..lens.height)
            .flat_map(|y| (0..lens.width).map(move |x| (x, y)))
            .map(|(x, y)| {
                let (x, y) = lens.undistort(x.into(), y.into());
                [x, y]
            })
            .collect();
        Self { lens, rays }
    }

    /// The lens.
    pub fn lens(&self) -> &Lens {
        &self.lens
    }

    /// One frame. `seconds` places what moves; `exposure_seed` seeds noise, flakes and streaks.
    pub fn render(
        &self,
        world: &World,
        traffic: &Traffic,
        condition: &Condition,
        pose: &CameraPose,
        seconds: f64,
        exposure_seed: u64,
    ) -> Frame {
        let view = View::new(pose);
        let (moving, people) = world.place_traffic(traffic, seconds);
        let mut quads: Vec<Quad> = world.quads.iter().chain(&moving).cloned().collect();
        quads.extend(world.billboards.iter().chain(&people).map(|b| facing(b, &view)));
        quads.retain(|q| view.camera(&(q.origin + q.across / 2.0)).norm() < FAR);
        let boxes: Vec<Option<[i64; 4]>> = quads.iter().map(|q| self.bounds(q, &view)).collect();

        let width = self.lens.width as usize;
        let mut hits: Vec<Hit> = (0..self.rays.len()).map(|_| Hit { depth: f32::INFINITY, quad: u32::MAX, u: 0.0, v: 0.0 }).collect();
        const BAND: usize = 16;
        hits.par_chunks_mut(width * BAND).enumerate().for_each(|(band, hits)| {
            for (index, (quad, bounds)) in quads.iter().zip(&boxes).enumerate() {
                if let Some(b) = bounds {
                    self.raster(hits, band * BAND, index as u32, quad, *b, &view, condition);
                }
            }
        });

        let scene = Scene { world, condition, view: &view, quads: &quads, pixel: (1.0 / self.lens.focal()) as f32 };
        let shaded: Vec<(Rgb, u8, f32)> =
            hits.par_iter().enumerate().with_min_len(1024).map(|(i, hit)| scene.shade(view.ray(self.rays[i]), hit)).collect();
        let labels = shaded.iter().map(|s| s.1).collect();
        let depth = shaded.iter().map(|s| s.2).collect();
        let linear: Vec<Rgb> = shaded.into_iter().map(|s| s.0).collect();
        Frame { image: self.expose(&linear, condition, exposure_seed), labels, depth }
    }

    /// Pixel bounds x0, y0, x1, y1 (exclusive) of a quad; `None` if it is not in view.
    fn bounds(&self, quad: &Quad, view: &View) -> Option<[i64; 4]> {
        const STEPS: usize = 6;
        let corners = [quad.origin, quad.origin + quad.across, quad.origin + quad.across + quad.up, quad.origin + quad.up];
        let (mut x0, mut y0, mut x1, mut y1) = (f64::MAX, f64::MAX, f64::MIN, f64::MIN);
        let mut add = |p: Vector3<f64>| {
            let (x, y) = self.lens.distort(p.x / p.z, p.y / p.z);
            (x0, y0, x1, y1) = (x0.min(x), y0.min(y), x1.max(x), y1.max(y));
        };
        for i in 0..4 {
            // Edges are sampled: distortion bends them beyond their ends.
            let (mut a, mut b) = (view.camera(&corners[i]), view.camera(&corners[(i + 1) % 4]));
            if a.z < NEAR && b.z < NEAR {
                continue;
            }
            if a.z < NEAR {
                a += (b - a) * ((NEAR - a.z) / (b.z - a.z));
            } else if b.z < NEAR {
                b += (a - b) * ((NEAR - b.z) / (a.z - b.z));
            }
            for k in 0..=STEPS {
                add(a + (b - a) * (k as f64 / STEPS as f64));
            }
        }
        let (w, h) = (f64::from(self.lens.width), f64::from(self.lens.height));
        if x1 < 0.0 || y1 < 0.0 || x0 > w || y0 > h || x0 > x1 {
            return None;
        }
        let clamp = |v: f64, hi: f64| v.clamp(0.0, hi) as i64;
        Some([clamp(x0 - 3.0, w), clamp(y0 - 3.0, h), clamp(x1 + 4.0, w), clamp(y1 + 4.0, h)])
    }

    #[allow(clippy::too_many_arguments)]
    fn raster(&self, hits: &mut [Hit], first_row: usize, index: u32, quad: &Quad, b: [i64; 4], view: &View, condition: &Condition) {
        let width = self.lens.width as usize;
        let rows = hits.len() / width;
        let y0 = (b[1] as usize).max(first_row);
        let y1 = (b[3] as usize).min(first_row + rows);
        let offset = quad.origin - view.position;
        let normal = quad.across.cross(&quad.up);
        let height = offset.dot(&normal);
        let (across, up) = (quad.across / quad.across.norm_squared(), quad.up / quad.up.norm_squared());
        for y in y0..y1 {
            for x in b[0] as usize..b[2] as usize {
                let ray = view.ray(self.rays[y * width + x]);
                // `ray` has length 1 along the optical axis, so t is the depth.
                let t = height / ray.dot(&normal);
                let hit = &mut hits[(y - first_row) * width + x];
                if !(t > NEAR && (t as f32) < hit.depth) {
                    continue;
                }
                let p = ray * t - offset;
                let (u, v) = (p.dot(&across) as f32, p.dot(&up) as f32);
                if (0.0..1.0).contains(&u) && (0.0..1.0).contains(&v) && solid(&quad.material, u, v, condition) {
                    *hit = Hit { depth: t as f32, quad: index, u, v };
                }
            }
        }
    }

    /// Weather in front of the lens, exposure, vignette, gamma, noise.
    fn expose(&self, linear: &[Rgb], condition: &Condition, seed: u64) -> RgbImage {
        let luma = |c: &Rgb| 0.299 * c.x + 0.587 * c.y + 0.114 * c.z;
        let bright = |part: &[Rgb]| part.iter().map(|c| f64::from(luma(c).min(1.5).powf(1.0 / 2.2))).sum::<f64>();
        // Parts of one size, summed in their order: the same image whatever else the threads do.
        let mean = linear.par_chunks(4096).map(bright).collect::<Vec<_>>().iter().sum::<f64>() / linear.len() as f64;
        let gain = (condition.exposure_target / mean.max(1e-3) as f32).powf(2.2).clamp(0.3, 12.0);
        let (w, h) = (self.lens.width as usize, self.lens.height as usize);
        let mut data = vec![0u8; linear.len() * 3];
        data.par_chunks_mut(3 * w).enumerate().for_each(|(y, row)| {
            for (x, out) in row.chunks_exact_mut(3).enumerate() {
                let mut c = linear[y * w + x] * gain;
                let scale = 640.0 / w as f32;
                let (fx, fy) = (x as f32 * scale, y as f32 * scale);
                if condition.snow > 0.0 {
                    let flake = value(fx * 0.35, fy * 0.35, seed ^ 91);
                    c += Rgb::repeat(((flake - 0.93) * 9.0).max(0.0));
                }
                if condition.rain > 0.0 {
                    let streak = value(fx * 0.6 + fy * 0.08, fy * 0.03, seed ^ 92);
                    c += Rgb::repeat(((streak - 0.86) * 1.1).max(0.0));
                }
                let (dx, dy) = (x as f32 / w as f32 - 0.5, y as f32 / h as f32 - 0.5);
                let vignette = 1.0 - 0.45 * (dx * dx + dy * dy);
                for k in 0..3 {
                    let n = hash(x as i64, y as i64, seed ^ (k as u64) << 40);
                    // Sum of four bytes: near enough to a normal distribution, standard deviation 1.
                    let gauss = ((n & 255) + (n >> 8 & 255) + (n >> 16 & 255) + (n >> 24)) as f32 / 147.8 - 3.45;
                    let v = (c[k] * vignette).max(0.0).powf(1.0 / 2.2) + gauss * condition.noise;
                    out[k] = (v.clamp(0.0, 1.0) * 255.0 + 0.5) as u8;
                }
            }
        });
        RgbImage::new(self.lens.width, self.lens.height, data).unwrap_or_else(|e| unreachable!("three bytes per pixel of the lens: {e}"))
    }
}

fn facing(b: &Billboard, view: &View) -> Quad {
    let away = b.foot - view.position;
    let across = Vector3::new(away.y, -away.x, 0.0).try_normalize(1e-9).unwrap_or(view.right) * b.width;
    Quad { origin: b.foot - across / 2.0, across, up: Vector3::z() * b.height, material: b.material }
}

struct Scene<'a> {
    world: &'a World,
    condition: &'a Condition,
    view: &'a View,
    quads: &'a [Quad],
    pixel: f32,
}

impl Scene<'_> {
    fn shade(&self, ray: Vector3<f64>, hit: &Hit) -> (Rgb, u8, f32) {
        if hit.quad != u32::MAX {
            let quad = &self.quads[hit.quad as usize];
            let s = surface(&quad.material, hit.u, hit.v, hit.depth * self.pixel, self.condition);
            let mut normal = quad.across.cross(&quad.up).normalize();
            if normal.dot(&ray) > 0.0 {
                normal = -normal;
            }
            let point = self.view.position + ray * f64::from(hit.depth);
            let lit = self.light(&s, point, normal, ray, hit.depth);
            return (self.fog(lit, hit.depth), quad.material.label(), hit.depth);
        }
        if ray.z < -1e-4 {
            let depth = -self.view.position.z / ray.z;
            if depth < 600.0 {
                let point = self.view.position + ray * depth;
                let (s, kind) = self.ground(point, depth as f32, ray);
                let lit = self.light(&s, point, Vector3::z(), ray, depth as f32);
                return (self.fog(lit, depth as f32), kind, depth as f32);
            }
        }
        (self.sky(ray), label::SKY, f32::INFINITY)
    }

    fn ground(&self, point: Vector3<f64>, depth: f32, ray: Vector3<f64>) -> (Surface, u8) {
        let c = self.condition;
        let lateral = self.world.route.lateral(Vector2::new(point.x, point.y));
        let (x, y) = (point.x as f32, point.y as f32);
        // Grazing rays: a pixel covers more ground along the view than across it.
        let footprint = depth * self.pixel * (1.0 + 0.3 * depth / self.view.position.z as f32).min(8.0);
        let rough = fractal(x * 0.7, y * 0.7, footprint, self.world.seed ^ 31);
        let patch = value(x * 0.11, y * 0.11, self.world.seed ^ 32);
        let fade = (1.0 - footprint * 2.5).clamp(0.0, 1.0);
        let a = lateral.abs();
        let (mut colour, kind) = if a < ROAD_HALF {
            let mut asphalt = Rgb::repeat(0.10 + 0.06 * rough + 0.05 * (patch - 0.5));
            // On a straight x + y runs along it; in a bend the dashes stretch.
            let middle = a < 0.08 && ((x + y) * 0.22).rem_euclid(1.0) < 0.55;
            let edge = (a - (ROAD_HALF - 2.05)).abs() < 0.05;
            if middle || edge {
                asphalt = asphalt.lerp(&Rgb::repeat(0.6), 0.25 + 0.75 * fade);
            }
            (asphalt, label::ROAD)
        } else if a < WALK_HALF {
            let slab = unit((x / 0.9).floor() as i64, (y / 0.9).floor() as i64, self.world.seed ^ 33);
            let kerb = if a < ROAD_HALF + 0.18 { 0.12 } else { 0.0 };
            (Rgb::new(0.33, 0.32, 0.30) * (0.8 + 0.3 * rough + fade * 0.25 * (slab - 0.5)) + Rgb::repeat(kerb), label::SIDEWALK)
        } else {
            (Rgb::new(0.13, 0.17, 0.07) * (0.6 + 0.8 * rough) + Rgb::new(0.06, 0.03, 0.0) * patch, label::TERRAIN)
        };
        let mut emission = Rgb::zeros();
        if c.snow > 0.0 {
            // Tyres clear two tracks a lane.
            let track = a < ROAD_HALF - 1.2 && ((a - 1.6).abs() - 0.75).abs() < 0.3;
            let cover = c.snow * if track { 0.35 } else { 1.0 } * (0.75 + 0.5 * rough).min(1.0);
            colour = colour.lerp(&Rgb::new(0.86, 0.88, 0.92), cover);
        }
        if c.rain > 0.0 && a < WALK_HALF {
            let puddle = ((value(x * 0.35, y * 0.35, self.world.seed ^ 34) - 0.45) * 4.0).clamp(0.0, 1.0);
            let grazing = (1.0 + ray.z as f32 / ray.norm() as f32).powi(4);
            colour *= 0.6;
            emission = c.horizon * (0.10 + 0.5 * puddle) * grazing * 0.6;
        }
        (Surface { albedo: colour, emission }, kind)
    }

    fn light(&self, s: &Surface, point: Vector3<f64>, normal: Vector3<f64>, ray: Vector3<f64>, depth: f32) -> Rgb {
        let c = self.condition;
        let n = normal.cast::<f32>();
        let sun = c.sun * n.dot(&c.sun_direction).max(0.0);
        // Walls see half the sky and some of the street.
        let sky = c.ambient * (0.75 + 0.25 * n.z);
        let mut total = sun + sky;
        if c.lights {
            for lamp in &self.world.lamps {
                let to = (lamp - point).cast::<f32>();
                let d2 = to.norm_squared();
                if d2 < 500.0 {
                    let facing = (n.dot(&to) / d2.sqrt()).max(0.0);
                    total += Rgb::new(1.0, 0.74, 0.42) * (3.2 * (0.25 + 0.75 * facing) / (4.0 + d2)) * (to.z / d2.sqrt()).clamp(0.1, 1.0);
                }
            }
            let beam = self.view.camera(&point);
            let (bx, by) = ((beam.x / beam.z) as f32, (beam.y / beam.z) as f32 - 0.06);
            let spot = (-(bx * bx) * 5.0 - by * by * 14.0).exp();
            let facing = (-normal.dot(&ray) / ray.norm()).max(0.0) as f32;
            total += Rgb::new(1.0, 0.96, 0.88) * (spot * (0.2 + 0.8 * facing) * 10.0 / (12.0 + depth * depth));
        }
        s.albedo.component_mul(&total) + s.emission
    }

    fn fog(&self, colour: Rgb, depth: f32) -> Rgb {
        colour.lerp(&self.condition.horizon, 1.0 - (-depth * self.condition.fog).exp())
    }

    fn sky(&self, ray: Vector3<f64>) -> Rgb {
        let c = self.condition;
        let d = ray.normalize().cast::<f32>();
        let up = d.z.max(0.0);
        let blue = c.horizon.lerp(&c.zenith, (up * 1.6).min(1.0).sqrt());
        let (x, y) = (d.x / (up + 0.18), d.y / (up + 0.18));
        let cloud = ((fractal(x * 1.4 + 7.0, y * 1.4, 0.0, self.world.seed ^ 55) - (0.75 - 0.5 * c.clouds)) * 3.0).clamp(0.0, 1.0);
        let white = c.horizon * 0.75 + (c.sun + c.ambient) * 0.25;
        blue.lerp(&white, cloud * (0.3 + 0.7 * c.clouds))
    }
}
