//! Views of synthetic places: what training and validation draw from.

use crate::world::condition::{Condition, NAMES};
use crate::world::render::{CameraPose, Frame, Lens, Renderer};
use crate::world::World;
use nalgebra::Vector3;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Height of the camera above the road, metres.
pub const CAMERA_HEIGHT: f64 = 1.6;

/// Where a view was taken and under what.
#[derive(Clone, Debug)]
pub struct View {
    /// Metres along the street.
    pub s: f64,
    /// Metres to the left of its centre line.
    pub lateral: f64,
    /// Radians off the street's direction.
    pub yaw: f64,
    /// Radians nose up.
    pub pitch: f64,
    /// Index into [`NAMES`].
    pub condition: usize,
    /// Seeds traffic, noise, flakes.
    pub seed: u64,
}

impl View {
    /// A view near `s` in the right-hand lane, jittered as another drive would be.
    pub fn near(rng: &mut ChaCha8Rng, s: f64, condition: usize) -> Self {
        Self {
            s: s + rng.random_range(-1.5..1.5),
            lateral: -1.6 + rng.random_range(-1.3..1.3),
            yaw: rng.random_range(-0.09..0.09),
            pitch: rng.random_range(-0.02..0.02),
            condition,
            seed: rng.random(),
        }
    }

    /// Renders it.
    pub fn render(&self, renderer: &Renderer, world: &World) -> Frame {
        let (p, heading) = world.route.at(self.s, self.lateral);
        let pose = CameraPose { position: Vector3::new(p.x, p.y, CAMERA_HEIGHT), yaw: heading + self.yaw, pitch: self.pitch };
        let condition = condition(self.condition);
        renderer.render(world, &world.traffic(self.seed), &condition, &pose, (self.seed % 60) as f64, self.seed)
    }
}

/// Condition by index into [`NAMES`].
pub fn condition(index: usize) -> Condition {
    Condition::named(NAMES[index % NAMES.len()]).unwrap_or_else(|| unreachable!("every name in NAMES is a condition"))
}

/// A renderer for training images of this size.
pub fn renderer(width: u32, height: u32) -> Renderer {
    Renderer::new(Lens::new(width, height))
}
