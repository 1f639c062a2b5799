//! Light and weather.

use nalgebra::Vector3;

type Rgb = Vector3<f32>;

/// How the street looks: linear light, 1 is a white wall in full sun.
#[derive(Clone, Debug)]
pub struct Condition {
    pub name: &'static str,
    /// Towards the sun (unit length).
    pub sun_direction: Vector3<f32>,
    pub sun: Rgb,
    pub ambient: Rgb,
    pub zenith: Rgb,
    pub horizon: Rgb,
    /// Cloud cover, 0 to 1.
    pub clouds: f32,
    /// Extinction per metre.
    pub fog: f32,
    /// Cover of snow, 0 to 1.
    pub snow: f32,
    /// Rain: wetness and streaks, 0 to 1.
    pub rain: f32,
    /// Lamps, windows and headlights are on.
    pub lights: bool,
    /// How much of the crowns' leaves is there, 0 to 1.
    pub leaves: f32,
    /// Sensor noise at mid grey (standard deviation of 0..1).
    pub noise: f32,
    /// Mean luma that the exposure aims at, 0 to 1.
    pub exposure_target: f32,
}

/// Names of all conditions.
pub const NAMES: [&str; 5] = ["sun", "dusk", "night", "snow", "rain"];

impl Condition {
    /// A condition by name; `None` if there is no such name.
    pub fn named(name: &str) -> Option<Self> {
        let rgb = Rgb::new;
        let direction = |x: f32, y: f32, z: f32| Vector3::new(x, y, z).normalize();
        let sun = Self {
            name: "sun",
            sun_direction: direction(0.5, -0.45, 0.75),
            sun: rgb(0.95, 0.88, 0.76),
            ambient: rgb(0.33, 0.37, 0.44),
            zenith: rgb(0.16, 0.34, 0.75),
            horizon: rgb(0.62, 0.74, 0.88),
            clouds: 0.35,
            fog: 0.001,
            snow: 0.0,
            rain: 0.0,
            lights: false,
            leaves: 1.0,
            noise: 0.006,
            exposure_target: 0.45,
        };
        Some(match name {
            "sun" => sun,
            "dusk" => Self {
                name: "dusk",
                sun_direction: direction(-0.8, 0.35, 0.18),
                sun: rgb(0.50, 0.26, 0.12),
                ambient: rgb(0.16, 0.16, 0.22),
                zenith: rgb(0.10, 0.14, 0.34),
                horizon: rgb(0.85, 0.48, 0.28),
                clouds: 0.6,
                fog: 0.003,
                lights: true,
                noise: 0.012,
                exposure_target: 0.36,
                ..sun
            },
            "night" => Self {
                name: "night",
                sun_direction: direction(0.3, 0.3, 0.9),
                sun: rgb(0.008, 0.009, 0.014),
                ambient: rgb(0.014, 0.016, 0.026),
                zenith: rgb(0.006, 0.008, 0.018),
                horizon: rgb(0.04, 0.035, 0.035),
                clouds: 0.2,
                fog: 0.002,
                lights: true,
                noise: 0.03,
                exposure_target: 0.24,
                ..sun
            },
            "snow" => Self {
                name: "snow",
                sun_direction: direction(0.2, -0.7, 0.4),
                sun: rgb(0.16, 0.16, 0.16),
                ambient: rgb(0.52, 0.55, 0.6),
                zenith: rgb(0.62, 0.66, 0.72),
                horizon: rgb(0.78, 0.80, 0.83),
                clouds: 0.9,
                fog: 0.010,
                snow: 0.85,
                leaves: 0.25,
                noise: 0.01,
                exposure_target: 0.55,
                ..sun
            },
            "rain" => Self {
                name: "rain",
                sun_direction: direction(-0.2, -0.3, 0.9),
                sun: rgb(0.06, 0.06, 0.06),
                ambient: rgb(0.30, 0.33, 0.37),
                zenith: rgb(0.34, 0.37, 0.42),
                horizon: rgb(0.52, 0.55, 0.58),
                clouds: 0.95,
                fog: 0.008,
                rain: 1.0,
                noise: 0.016,
                exposure_target: 0.38,
                ..sun
            },
            _ => return None,
        })
    }
}
