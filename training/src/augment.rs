//! Augmentation: what changes the geometry changes image and label planes alike; what changes the light, only the image.

use anyhow::Result;
use opencv::core::{Mat, MatTraitConst, MatTraitConstManual, Point2f, Scalar, Size, Vector};
use opencv::{calib3d, imgproc};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// How often and how strongly; each probability is per image, 0 switches it off. [ours]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Brightness, contrast, saturation, gamma and white balance, each by up to this share.
    pub photometric: f64,
    /// Probability of turning day to night: dark, blue, noisy, with a few lamps.
    pub day_to_night: f64,
    /// Probability of fog, rain or snow.
    pub weather: f64,
    /// Smallest share of width and height that a crop keeps; 1 switches crops off.
    pub crop: f64,
    /// Corners move by up to this share of the sides (a homography); 0 switches it off.
    pub homography: f64,
    /// Probability of an occluder: a rectangle of noise, `dynamic` in the label map.
    pub occlusion: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { photometric: 0.3, day_to_night: 0.0, weather: 0.15, crop: 0.9, homography: 0.04, occlusion: 0.2 }
    }
}

impl Settings {
    /// None at all.
    pub fn off() -> Self {
        Self { photometric: 0.0, day_to_night: 0.0, weather: 0.0, crop: 1.0, homography: 0.0, occlusion: 0.0 }
    }

    /// Checks ranges; the error names the field.
    pub fn validate(&self) -> Result<()> {
        for (name, value, range) in [
            ("photometric", self.photometric, 0.0..=0.9),
            ("day_to_night", self.day_to_night, 0.0..=1.0),
            ("weather", self.weather, 0.0..=1.0),
            ("crop", self.crop, 0.3..=1.0),
            ("homography", self.homography, 0.0..=0.3),
            ("occlusion", self.occlusion, 0.0..=1.0),
        ] {
            anyhow::ensure!(range.contains(&value), "augment.{name}: {value} is outside {range:?}");
        }
        Ok(())
    }
}

/// An image with its label planes, of one size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    pub width: usize,
    pub height: usize,
    /// Height x width x RGB.
    pub rgb: Vec<u8>,
    /// Height x width, the plane of each pixel.
    pub planes: Option<Vec<u8>>,
}

/// Which plane `dynamic` is in, where there are six.
const DYNAMIC: u8 = 4;

/// A changed copy. The same numbers in `rng` give the same bytes.
pub fn augment(pair: &Pair, settings: &Settings, rng: &mut ChaCha8Rng, other: u8) -> Result<Pair> {
    let mut out = warp(pair, settings, rng, other)?;
    if rng.random_bool(settings.occlusion) {
        occlude(&mut out, rng, other);
    }
    let night = rng.random_bool(settings.day_to_night);
    if night {
        to_night(&mut out, rng);
    } else if rng.random_bool(settings.weather) {
        match rng.random_range(0..3) {
            0 => fog(&mut out, rng),
            1 => streaks(&mut out, rng),
            _ => flakes(&mut out, rng),
        }
    }
    photometric(&mut out.rgb, settings.photometric, rng);
    Ok(out)
}

/// Crop and homography as one warp: the image bilinear, the labels by the nearest pixel.
fn warp(pair: &Pair, settings: &Settings, rng: &mut ChaCha8Rng, other: u8) -> Result<Pair> {
    if settings.crop >= 1.0 && settings.homography <= 0.0 {
        return Ok(pair.clone());
    }
    let (w, h) = (pair.width as f64, pair.height as f64);
    let keep = rng.random_range(settings.crop..=1.0);
    let (x0, y0) = (rng.random_range(0.0..=1.0 - keep) * w, rng.random_range(0.0..=1.0 - keep) * h);
    let mut jitter = |side: f64| (rng.random::<f64>() * 2.0 - 1.0) * settings.homography * side;
    let corners = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)];
    let mut from = Vector::<Point2f>::new();
    let mut to = Vector::<Point2f>::new();
    for (u, v) in corners {
        from.push(Point2f::new((x0 + u * keep * w + jitter(w)) as f32, (y0 + v * keep * h + jitter(h)) as f32));
        to.push(Point2f::new((u * w) as f32, (v * h) as f32));
    }
    let turn = calib3d::find_homography_def(&from, &to, &mut Mat::default())?;
    let size = Size::new(pair.width as i32, pair.height as i32);
    let apply = |data: &[u8], channels: i32, flags: i32, border: i32, value: f64| -> Result<Vec<u8>> {
        let flat = Mat::from_slice(data)?;
        let mut out = Mat::default();
        let image = flat.reshape(channels, pair.height as i32)?;
        imgproc::warp_perspective(&image, &mut out, &turn, size, flags, border, Scalar::all(value))?;
        Ok(out.data_bytes()?.to_vec())
    };
    let rgb = apply(&pair.rgb, 3, imgproc::INTER_LINEAR, opencv::core::BORDER_REFLECT_101, 0.0)?;
    let planes = match &pair.planes {
        Some(planes) => Some(apply(planes, 1, imgproc::INTER_NEAREST, opencv::core::BORDER_REFLECT_101, f64::from(other))?),
        None => None,
    };
    Ok(Pair { rgb, planes, ..*pair })
}

fn occlude(pair: &mut Pair, rng: &mut ChaCha8Rng, other: u8) {
    let (w, h) = (pair.width, pair.height);
    let (bw, bh) = (rng.random_range(w / 8..=w / 3), rng.random_range(h / 8..=h / 3));
    let (x0, y0) = (rng.random_range(0..=w - bw), rng.random_range(0..=h - bh));
    let colour: [u8; 3] = rng.random();
    for y in y0..y0 + bh {
        for x in x0..x0 + bw {
            let grain = rng.random_range(-12i16..=12);
            for (o, c) in pair.rgb[(y * w + x) * 3..][..3].iter_mut().zip(colour) {
                *o = (i16::from(c) + grain).clamp(0, 255) as u8;
            }
        }
        if let Some(planes) = &mut pair.planes {
            planes[y * w + x0..][..bw].fill(DYNAMIC.min(other));
        }
    }
}

fn mix(value: u8, with: f64, share: f64) -> u8 {
    (f64::from(value) * (1.0 - share) + with * share).round().clamp(0.0, 255.0) as u8
}

fn to_night(pair: &mut Pair, rng: &mut ChaCha8Rng) {
    let (gain, gamma): (f64, f64) = (rng.random_range(0.25..0.6), rng.random_range(1.2..2.0));
    let tint = [rng.random_range(0.6..0.95), rng.random_range(0.7..0.95), 1.0];
    let tables = tint.map(|t: f64| -> Vec<f64> { (0..256).map(|v| 255.0 * gain * t * (f64::from(v) / 255.0).powf(gamma)).collect() });
    let (w, h) = (pair.width as f64, pair.height as f64);
    let lamps: Vec<(f64, f64, f64)> = (0..rng.random_range(0..5))
        .map(|_| (rng.random_range(0.0..w), rng.random_range(0.0..h * 0.7), rng.random_range(0.02..0.1) * w))
        .collect();
    for (i, pixel) in pair.rgb.chunks_exact_mut(3).enumerate() {
        let (x, y) = ((i % pair.width) as f64, (i / pair.width) as f64);
        let light: f64 = lamps.iter().map(|(lx, ly, r)| (-((x - lx).powi(2) + (y - ly).powi(2)) / (r * r)).exp()).sum();
        let grain = rng.random_range(-9.0..9.0);
        for ((v, table), warm) in pixel.iter_mut().zip(&tables).zip([230.0, 190.0, 110.0]) {
            *v = (table[usize::from(*v)] + light * warm + grain).round().clamp(0.0, 255.0) as u8;
        }
    }
}

/// Denser towards the upper half, where a street's far end is.
fn fog(pair: &mut Pair, rng: &mut ChaCha8Rng) {
    let (density, grey) = (rng.random_range(0.2..0.65), rng.random_range(150.0..225.0));
    let (w, h) = (pair.width, pair.height as f64);
    for (i, v) in pair.rgb.iter_mut().enumerate() {
        let y = (i / 3 / w) as f64 / h;
        *v = mix(*v, grey, density * (1.0 - 0.7 * y));
    }
}

fn streaks(pair: &mut Pair, rng: &mut ChaCha8Rng) {
    let (w, h) = (pair.width as i64, pair.height as i64);
    fogged(pair, rng.random_range(0.1..0.3), 120.0);
    let slant = rng.random_range(-0.3..0.3);
    for _ in 0..w * h / 150 {
        let (x, y, n) = (rng.random_range(0..w), rng.random_range(0..h), rng.random_range(3..9));
        for k in 0..n {
            dot(pair, x + (slant * k as f64) as i64, y + k, 205.0, 0.3);
        }
    }
}

fn flakes(pair: &mut Pair, rng: &mut ChaCha8Rng) {
    let (w, h) = (pair.width as i64, pair.height as i64);
    fogged(pair, rng.random_range(0.1..0.35), 210.0);
    for _ in 0..w * h / 120 {
        let (x, y, n) = (rng.random_range(0..w), rng.random_range(0..h), rng.random_range(1..3));
        for (dx, dy) in (0..n).flat_map(|i| (0..n).map(move |j| (i, j))) {
            dot(pair, x + dx, y + dy, 245.0, 0.8);
        }
    }
}

fn fogged(pair: &mut Pair, share: f64, grey: f64) {
    pair.rgb.iter_mut().for_each(|v| *v = mix(*v, grey, share));
}

fn dot(pair: &mut Pair, x: i64, y: i64, grey: f64, share: f64) {
    if x >= 0 && y >= 0 && x < pair.width as i64 && y < pair.height as i64 {
        let at = (y as usize * pair.width + x as usize) * 3;
        pair.rgb[at..at + 3].iter_mut().for_each(|v| *v = mix(*v, grey, share));
    }
}

fn photometric(rgb: &mut [u8], strength: f64, rng: &mut ChaCha8Rng) {
    if strength <= 0.0 {
        return;
    }
    let mut about_one = || 1.0 + strength * (rng.random::<f64>() * 2.0 - 1.0);
    let (contrast, brightness, saturation, gamma) = (about_one(), about_one(), about_one(), about_one());
    let balance = [about_one(), 1.0, about_one()].map(|b| b.sqrt());
    let curve = |v: u8, b: f64| ((f64::from(v) / 255.0).powf(gamma) * brightness * b - 0.5) * contrast + 0.5;
    let tables = balance.map(|b| (0..=255u8).map(|v| curve(v, b)).collect::<Vec<f64>>());
    for pixel in rgb.chunks_exact_mut(3) {
        let v: [f64; 3] = std::array::from_fn(|c| tables[c][usize::from(pixel[c])]);
        let grey = 0.299 * v[0] + 0.587 * v[1] + 0.114 * v[2];
        for (o, v) in pixel.iter_mut().zip(v) {
            *o = ((grey + (v - grey) * saturation) * 255.0).round().clamp(0.0, 255.0) as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    /// An image whose colours are its labels, so that what moves one must move the other.
    fn pair() -> Pair {
        let (w, h) = (64, 48);
        let planes: Vec<u8> = (0..w * h).map(|i| ((i % w / 16 + i / w / 12) % 6) as u8).collect();
        let rgb = planes.iter().flat_map(|p| [p * 40, 255 - p * 40, p * 20]).collect();
        Pair { width: w, height: h, rgb, planes: Some(planes) }
    }

    #[test]
    fn geometry_moves_image_and_labels_alike() {
        let p = pair();
        let settings = Settings { photometric: 0.0, weather: 0.0, crop: 0.6, homography: 0.1, occlusion: 0.0, ..Settings::off() };
        let mut moved = 0;
        for seed in 0..20 {
            let out = augment(&p, &settings, &mut ChaCha8Rng::seed_from_u64(seed), 5).unwrap();
            let planes = out.planes.unwrap();
            let agree = planes.iter().zip(out.rgb.chunks_exact(3)).filter(|(p, c)| c[0].abs_diff(*p * 40) <= 20).count();
            // On borders between labels the image blends and the labels do not.
            assert!(agree * 100 >= planes.len() * 90, "seed {seed}: {agree} of {}", planes.len());
            moved += usize::from(Some(&planes) != p.planes.as_ref());
        }
        assert_eq!(moved, 20);
    }

    #[test]
    fn light_leaves_labels_alone_and_the_same_numbers_give_the_same_bytes() {
        let p = pair();
        let settings = Settings { photometric: 0.5, day_to_night: 0.5, weather: 1.0, ..Settings::off() };
        for seed in 0..20 {
            let run = || augment(&p, &settings, &mut ChaCha8Rng::seed_from_u64(seed), 5).unwrap();
            let out = run();
            assert!(out.planes == p.planes && out.rgb != p.rgb && out == run());
        }
        assert_eq!(augment(&p, &Settings::off(), &mut ChaCha8Rng::seed_from_u64(1), 5).unwrap(), p);
    }

    #[test]
    fn night_is_darker_and_an_occluder_is_dynamic() {
        let p = pair();
        let mean = |rgb: &[u8]| rgb.iter().map(|v| f64::from(*v)).sum::<f64>() / rgb.len() as f64;
        let night = Settings { day_to_night: 1.0, ..Settings::off() };
        let dark = augment(&p, &night, &mut ChaCha8Rng::seed_from_u64(2), 5).unwrap();
        assert!(mean(&dark.rgb) < 0.8 * mean(&p.rgb));
        let hidden = augment(&p, &Settings { occlusion: 1.0, ..Settings::off() }, &mut ChaCha8Rng::seed_from_u64(2), 5).unwrap();
        let changed: Vec<usize> = (0..64 * 48).filter(|i| hidden.rgb[i * 3..i * 3 + 3] != p.rgb[i * 3..i * 3 + 3]).collect();
        assert!(!changed.is_empty() && changed.iter().all(|i| hidden.planes.as_ref().unwrap()[*i] == 4));
        assert!(Settings { crop: 0.1, ..Settings::off() }.validate().unwrap_err().to_string().contains("augment.crop"));
    }
}
