//! A seeded street: geometry, what stands along it, and who moves on it.
//!
//! One closed street, a rounded rectangle driven counter-clockwise. A place on it is (s, l): metres
//! along the centre line, metres to the left of it. World frame: x east, y north, z up, metres.

pub mod condition;
pub mod noise;
pub mod render;
pub mod texture;

use nalgebra::{Vector2, Vector3};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::f64::consts::FRAC_PI_2;

/// Cityscapes train ids: what the label maps hold.
pub mod label {
    pub const ROAD: u8 = 0;
    pub const SIDEWALK: u8 = 1;
    pub const BUILDING: u8 = 2;
    pub const FENCE: u8 = 4;
    pub const POLE: u8 = 5;
    pub const SIGN: u8 = 7;
    pub const VEGETATION: u8 = 8;
    pub const TERRAIN: u8 = 9;
    pub const SKY: u8 = 10;
    pub const PERSON: u8 = 11;
    pub const CAR: u8 = 13;
}

/// Half width of the carriageway, metres.
pub const ROAD_HALF: f64 = 4.5;
/// Where the pavement ends and plots begin, metres from the centre line.
pub const WALK_HALF: f64 = 7.2;

/// The centre line: a rectangle of half sizes `half` with corners of `radius`.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    half: Vector2<f64>,
    radius: f64,
}

impl Route {
    fn sides(&self) -> [f64; 2] {
        [2.0 * (self.half.x - self.radius), 2.0 * (self.half.y - self.radius)]
    }

    /// Length of one lap, metres.
    pub fn length(&self) -> f64 {
        let [a, b] = self.sides();
        2.0 * (a + b) + 4.0 * FRAC_PI_2 * self.radius
    }

    /// Position of (s, l) and the heading of the street there, radians from x.
    pub fn at(&self, s: f64, l: f64) -> (Vector2<f64>, f64) {
        let [a, b] = self.sides();
        let arc = FRAC_PI_2 * self.radius;
        let mut rest = s.rem_euclid(self.length());
        let (hx, hy, r) = (self.half.x, self.half.y, self.radius);
        let starts = [(-hx + r, -hy, a), (hx, -hy + r, b), (hx - r, hy, a), (-hx, hy - r, b)];
        for (i, (x, y, side)) in starts.into_iter().enumerate() {
            let heading = FRAC_PI_2 * i as f64;
            let (dir, left) = (unit(heading), unit(heading + FRAC_PI_2));
            if rest <= side {
                return (Vector2::new(x, y) + dir * rest + left * l, heading);
            }
            rest -= side;
            if rest <= arc {
                let turned = heading + rest / r;
                let centre = Vector2::new(x, y) + dir * side + left * r;
                return (centre - unit(turned + FRAC_PI_2) * (r - l), turned);
            }
            rest -= arc;
        }
        // Rounding left a sliver past the last corner: it is the start.
        (Vector2::new(starts[0].0, starts[0].1) + unit(FRAC_PI_2) * l, 0.0)
    }

    /// Metres to the left of the centre line (negative: right, outside).
    pub fn lateral(&self, p: Vector2<f64>) -> f64 {
        let q = p.abs() - self.half + Vector2::repeat(self.radius);
        let outside = Vector2::new(q.x.max(0.0), q.y.max(0.0)).norm();
        -(outside + q.x.max(q.y).min(0.0) - self.radius)
    }
}

fn unit(angle: f64) -> Vector2<f64> {
    Vector2::new(angle.cos(), angle.sin())
}

/// What a quad is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Material {
    /// A facade `width` x `height` metres.
    Facade {
        seed: u64,
        width: f32,
        height: f32,
    },
    /// A plain wall (a building's side).
    Wall {
        seed: u64,
    },
    /// A tree's crown, seen from anywhere.
    Crown {
        seed: u64,
    },
    Trunk,
    Hedge {
        seed: u64,
    },
    Fence {
        seed: u64,
    },
    Pole,
    /// The glowing head of a street lamp.
    Lamp,
    Sign {
        seed: u64,
    },
    /// A car's lower body or cabin; `face` 0 end, 1 side, 2 top.
    Body {
        seed: u64,
        face: u8,
    },
    Cabin {
        seed: u64,
        face: u8,
    },
    Person {
        seed: u64,
    },
}

impl Material {
    /// Its label.
    pub fn label(&self) -> u8 {
        match self {
            Self::Facade { .. } | Self::Wall { .. } => label::BUILDING,
            Self::Crown { .. } | Self::Trunk | Self::Hedge { .. } => label::VEGETATION,
            Self::Fence { .. } => label::FENCE,
            Self::Pole | Self::Lamp => label::POLE,
            Self::Sign { .. } => label::SIGN,
            Self::Body { .. } | Self::Cabin { .. } => label::CAR,
            Self::Person { .. } => label::PERSON,
        }
    }
}

/// A rectangle in space: `origin + u * across + v * up`, u and v in [0, 1].
#[derive(Clone, Debug)]
pub struct Quad {
    pub origin: Vector3<f64>,
    pub across: Vector3<f64>,
    pub up: Vector3<f64>,
    pub material: Material,
}

/// A thing that always faces the camera: a crown, a trunk, a person, a pole.
#[derive(Clone, Debug)]
pub struct Billboard {
    /// Centre of the lower edge.
    pub foot: Vector3<f64>,
    pub width: f64,
    pub height: f64,
    pub material: Material,
}

/// The street without what moves.
#[derive(Clone, Debug)]
pub struct World {
    pub seed: u64,
    pub route: Route,
    pub quads: Vec<Quad>,
    pub billboards: Vec<Billboard>,
    /// Heads of the street lamps.
    pub lamps: Vec<Vector3<f64>>,
}

/// Who is on the street during one traverse.
#[derive(Clone, Debug)]
pub struct Traffic {
    parked: Vec<(f64, f64, u64)>,
    /// (start s, lateral, metres per second along s, seed)
    moving: Vec<(f64, f64, f64, u64)>,
    walking: Vec<(f64, f64, f64, u64)>,
}

impl World {
    /// A street of about 270 to 420 m. The same seed gives the same street on any machine.
    pub fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let half = Vector2::new(rng.random_range(55.0..75.0), rng.random_range(34.0..50.0));
        let route = Route { half, radius: rng.random_range(15.0..20.0) };
        let mut world = Self { seed, route, quads: Vec::new(), billboards: Vec::new(), lamps: Vec::new() };
        for side in [-1.0, 1.0] {
            world.build_side(&mut rng, side);
        }
        world
    }

    fn point(&self, s: f64, l: f64, z: f64) -> Vector3<f64> {
        let (p, _) = self.route.at(s, l);
        Vector3::new(p.x, p.y, z)
    }

    fn wall(&mut self, a: Vector3<f64>, b: Vector3<f64>, height: f64, material: Material) {
        self.quads.push(Quad { origin: a, across: b - a, up: Vector3::z() * height, material });
    }

    fn build_side(&mut self, rng: &mut ChaCha8Rng, side: f64) {
        let length = self.route.length();
        let mut s = rng.random_range(0.0..3.0);
        while s < length - 6.0 {
            let width = rng.random_range(6.0..17.0f64).min(length - s);
            let seed: u64 = rng.random();
            let setback = WALK_HALF + rng.random_range(0.2..2.2);
            if rng.random_bool(0.82) {
                let height = rng.random_range(5.0..19.0);
                let (mut a, mut b) = (self.point(s, side * setback, 0.0), self.point(s + width, side * setback, 0.0));
                if side > 0.0 {
                    // u runs from left to right as seen from the street.
                    std::mem::swap(&mut a, &mut b);
                }
                let metres = (b - a).norm() as f32;
                self.wall(a, b, height, Material::Facade { seed, width: metres, height: height as f32 });
                for (t, front) in [(s, a), (s + width, b)] {
                    let t = if side > 0.0 { 2.0 * s + width - t } else { t };
                    let back = self.point(t, side * (setback + 9.0).min(if side > 0.0 { 14.0 } else { 99.0 }), 0.0);
                    self.wall(front, back, height, Material::Wall { seed });
                }
            } else {
                let height = rng.random_range(0.8..2.4);
                let material = if rng.random_bool(0.5) { Material::Hedge { seed } } else { Material::Fence { seed } };
                let (a, b) = (self.point(s, side * setback, 0.0), self.point(s + width, side * setback, 0.0));
                self.wall(a, b, height, material);
                for _ in 0..rng.random_range(0..4) {
                    let at = (s + rng.random_range(0.0..width), side * (setback + rng.random_range(1.5..5.0)));
                    self.tree(rng, at);
                }
            }
            s += width + if rng.random_bool(0.3) { rng.random_range(0.5..4.0) } else { 0.0 };
        }
        let mut s = rng.random_range(0.0..12.0);
        while s < length {
            if rng.random_bool(0.55) {
                let at = (s, side * rng.random_range(5.2..6.4));
                self.tree(rng, at);
            }
            s += rng.random_range(7.0..24.0);
        }
        let mut s = if side > 0.0 { 4.0 } else { 17.0 };
        while s < length {
            let foot = self.point(s, side * 4.9, 0.0);
            self.billboards.push(Billboard { foot, width: 0.16, height: 5.6, material: Material::Pole });
            let head = self.point(s, side * 3.9, 5.6);
            self.billboards.push(Billboard { foot: head, width: 0.7, height: 0.16, material: Material::Lamp });
            self.lamps.push(head);
            s += 26.0;
        }
        let mut s = rng.random_range(5.0..40.0);
        while s < length {
            let (seed, l) = (rng.random(), side * 4.8);
            let foot = self.point(s, l, 0.0);
            self.billboards.push(Billboard { foot, width: 0.09, height: 2.3, material: Material::Pole });
            let plate = Vector3::new(foot.x, foot.y, 2.1);
            self.billboards.push(Billboard { foot: plate, width: 0.75, height: 0.75, material: Material::Sign { seed } });
            s += rng.random_range(15.0..60.0);
        }
    }

    fn tree(&mut self, rng: &mut ChaCha8Rng, (s, l): (f64, f64)) {
        let (height, width) = (rng.random_range(3.0..7.5), rng.random_range(2.4..5.5));
        let trunk = rng.random_range(1.6..2.8);
        let (foot, seed) = (self.point(s, l, 0.0), rng.random());
        self.billboards.push(Billboard { foot, width: rng.random_range(0.2..0.45), height: trunk + 0.6, material: Material::Trunk });
        let crown = Vector3::new(foot.x, foot.y, trunk);
        self.billboards.push(Billboard { foot: crown, width, height, material: Material::Crown { seed } });
    }

    /// Parked cars, moving cars and pedestrians of one traverse.
    pub fn traffic(&self, seed: u64) -> Traffic {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ seed.wrapping_mul(0x5851_f42d_4c95_7f2d));
        let length = self.route.length();
        let mut parked = Vec::new();
        for side in [-1.0, 1.0] {
            let mut s = rng.random_range(0.0..20.0);
            while s < length - 6.0 {
                if rng.random_bool(0.4) {
                    parked.push((s, side * 3.55, rng.random()));
                }
                s += rng.random_range(5.6..16.0);
            }
        }
        let moving = (0..4).map(|_| (rng.random_range(0.0..length), 1.6, -rng.random_range(6.0..11.0), rng.random())).collect();
        let walking = (0..14)
            .map(|_| {
                let side = if rng.random_bool(0.5) { 1.0 } else { -1.0 };
                let speed = rng.random_range(0.8..1.6) * if rng.random_bool(0.5) { 1.0 } else { -1.0 };
                (rng.random_range(0.0..length), side * rng.random_range(5.4..6.8), speed, rng.random())
            })
            .collect();
        Traffic { parked, moving, walking }
    }

    /// The quads and billboards of `traffic` at `seconds`.
    pub fn place_traffic(&self, traffic: &Traffic, seconds: f64) -> (Vec<Quad>, Vec<Billboard>) {
        let mut quads = Vec::new();
        for (s, l, seed) in &traffic.parked {
            self.car(&mut quads, *s, *l, *seed);
        }
        for (s, l, v, seed) in &traffic.moving {
            self.car(&mut quads, s + v * seconds, *l, *seed);
        }
        let people = traffic
            .walking
            .iter()
            .map(|(s, l, v, seed)| Billboard {
                foot: self.point(s + v * seconds, *l, 0.0),
                width: 0.62,
                height: 1.55 + 0.35 * f64::from(noise::unit(1, 2, *seed)),
                material: Material::Person { seed: *seed },
            })
            .collect();
        (quads, people)
    }

    fn car(&self, quads: &mut Vec<Quad>, s: f64, l: f64, seed: u64) {
        let size = |k: i64, a: f64, b: f64| a + (b - a) * f64::from(noise::unit(k, 7, seed));
        let (p, heading) = self.route.at(s, l);
        let (dir, left) = (unit(heading), unit(heading + FRAC_PI_2));
        let mut block = |length: f64, width: f64, bottom: f64, top: f64, shift: f64, cabin: bool| {
            let centre = p + dir * shift;
            let corner = |i: f64, j: f64| {
                let q = centre + dir * (i * length / 2.0) + left * (j * width / 2.0);
                Vector3::new(q.x, q.y, bottom)
            };
            let up = Vector3::z() * (top - bottom);
            let material = |face| if cabin { Material::Cabin { seed, face } } else { Material::Body { seed, face } };
            let mut side = |a: Vector3<f64>, b: Vector3<f64>, face| {
                quads.push(Quad { origin: a, across: b - a, up, material: material(face) });
            };
            side(corner(-1.0, -1.0), corner(1.0, -1.0), 1);
            side(corner(1.0, 1.0), corner(-1.0, 1.0), 1);
            side(corner(1.0, -1.0), corner(1.0, 1.0), 0);
            side(corner(-1.0, 1.0), corner(-1.0, -1.0), 0);
            let roof = corner(-1.0, -1.0) + up;
            let (across, deep) = (corner(1.0, -1.0) - corner(-1.0, -1.0), corner(-1.0, 1.0) - corner(-1.0, -1.0));
            quads.push(Quad { origin: roof, across, up: deep, material: material(2) });
        };
        let (length, waist, top) = (size(1, 3.7, 4.9), size(2, 0.8, 1.0), size(3, 1.35, 1.9));
        block(length, 1.75, 0.22, waist, 0.0, false);
        block(length * size(4, 0.45, 0.75), 1.6, waist, top, -0.15, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_route_is_closed_and_lateral_is_its_inverse() {
        for seed in 0..20 {
            let route = World::new(seed).route;
            let n = 500;
            for i in 0..n {
                let s = route.length() * f64::from(i) / f64::from(n);
                for l in [-8.0, -1.5, 0.0, 3.0, 9.0] {
                    let (p, _) = route.at(s, l);
                    assert!((route.lateral(p) - l).abs() < 1e-9, "seed {seed} s {s} l {l}: {}", route.lateral(p));
                }
                let (a, heading) = route.at(s, 0.0);
                let (b, _) = route.at(s + 1e-4, 0.0);
                assert!((b - a - unit(heading) * 1e-4).norm() < 1e-8, "seed {seed} s {s}");
            }
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_street_and_another_seed_another() {
        let print = |seed| format!("{:?}", World::new(seed));
        assert_eq!(print(3), print(3));
        assert_ne!(print(3), print(4));
    }
}
