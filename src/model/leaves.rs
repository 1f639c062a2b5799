//! Pictures that need no camera, to learn from them what a layer's values are like.
//!
//! Dead leaves (Lee, Mumford and Huang, IJCV 2001): discs and boxes of one colour each that cover one another, their sizes by a power
//! law. Their edges, areas and correlations are much like photographs', whatever the scale they are seen at. [ours]

use crate::error::Result;
use crate::image::RgbImage;

/// Pixels for each leaf.
const PIXELS: usize = 32;

/// Splitmix64.
struct Random(u64);

impl Random {
    /// 0 to 1, neither of them.
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 41) as f32 / (1u32 << 23) as f32 + 0.5 / (1u32 << 23) as f32
    }

    /// Mean 0, deviation 1: a sum of twelve.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}

/// The `n`th picture of so many columns and rows; always the same.
///
/// Errors: a size of no pixels.
pub fn picture(n: u64, (width, height): (usize, usize)) -> Result<RgbImage> {
    let mut random = Random(n.wrapping_mul(0x2545_f491_4f6c_dd1d));
    let mut values = vec![128f32; 3 * width * height];
    for _ in 0..width * height / PIXELS {
        let radius = (4.0 * random.uniform().powf(-0.6)).min(90.0);
        let (x, y) = (random.uniform() * width as f32, random.uniform() * height as f32);
        let grey = 120.0 + 50.0 * random.normal();
        let colour = [0; 3].map(|_| grey + 15.0 * random.normal());
        let round = random.uniform() < 0.5;
        let (across, down) = if round { (radius, radius) } else { (radius * (0.3 + random.uniform()), radius * (0.3 + random.uniform())) };
        let range =
            |centre: f32, reach: f32, end: usize| (centre - reach).max(0.0) as usize..((centre + reach).max(0.0) as usize + 1).min(end);
        for row in range(y, down, height) {
            for column in range(x, across, width) {
                let (dx, dy) = (column as f32 - x, row as f32 - y);
                if !round || dx * dx + dy * dy < radius * radius {
                    values[3 * (row * width + column)..][..3].copy_from_slice(&colour);
                }
            }
        }
    }
    // A camera's noise.
    let data = values.iter().map(|v| (v + 4.0 * random.normal()).clamp(0.0, 255.0) as u8).collect();
    RgbImage::new(width as u32, height as u32, data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_differ_and_are_the_same_again() {
        let [a, b, again] = [0, 1, 0].map(|n| picture(n, (160, 120)).unwrap());
        assert!(a.data() == again.data() && a.data() != b.data());
        for image in [a, b] {
            let (mean, deviation) = image.luma_stats();
            assert!((90.0..150.0).contains(&mean) && (35.0..75.0).contains(&deviation), "{mean} {deviation}");
        }
    }
}
