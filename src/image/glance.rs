//! What of two images stands still.

use super::RgbImage;
use crate::error::Result;

/// Cells across and down.
const CELLS: (usize, usize) = (64, 48);
/// Cells along a side of a block.
const BLOCK: usize = 8;
/// Standard deviation of the luma above which a block has something to compare: sky, asphalt and night noise have less.
const TEXTURE: f32 = 4.0;
/// Correlation of two blocks that show the same. A shift by half a cell costs more than this leaves.
const SAME: f32 = 0.95;
/// Fewer blocks than this say nothing of the whole.
const FEWEST: usize = 6;

/// The luma of an image in 64 x 48 cells: tells whether the camera moved or only something before it did. [ours]
///
/// The descriptor cannot: a lorry before a parked robot changes it as much as a few metres of way do. But the lorry leaves
/// the rest of the picture where it was, and a robot that moves moves all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glance {
    cells: Vec<u8>,
}

impl Glance {
    pub(super) fn new(image: &RgbImage) -> Result<Self> {
        let small = image.resize_area(CELLS.0 as u32, CELLS.1 as u32)?;
        Ok(Self { cells: small.luma()? })
    }

    /// Share, 0 to 1, of the blocks with texture in either image that show the same in both, whatever the exposure. `None`
    /// where too few have any.
    pub fn unmoved(&self, other: &Self) -> Option<f32> {
        let (mut all, mut same) = (0usize, 0usize);
        for top in (0..CELLS.1).step_by(BLOCK) {
            for left in (0..CELLS.0).step_by(BLOCK) {
                let (a, b) = (self.block(top, left), other.block(top, left));
                let (norm_a, norm_b) = (norm(&a), norm(&b));
                let floor = TEXTURE * BLOCK as f32;
                if norm_a < floor && norm_b < floor {
                    continue;
                }
                all += 1;
                let product: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
                same += usize::from(product >= SAME * norm_a * norm_b && norm_a > 0.0 && norm_b > 0.0);
            }
        }
        (all >= FEWEST).then(|| same as f32 / all as f32)
    }

    /// A block's luma less its mean.
    fn block(&self, top: usize, left: usize) -> [f32; BLOCK * BLOCK] {
        let mut values: [f32; BLOCK * BLOCK] =
            std::array::from_fn(|i| f32::from(self.cells[(top + i / BLOCK) * CELLS.0 + left + i % BLOCK]));
        let mean = values.iter().sum::<f32>() / (BLOCK * BLOCK) as f32;
        values.iter_mut().for_each(|v| *v -= mean);
        values
    }
}

fn norm(v: &[f32]) -> f32 {
    v.iter().map(|x| x * x).sum::<f32>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Facades of windows, `shift` pixels along; a grey lorry before `covered` of the columns; exposure `gain`.
    fn street(shift: i64, covered: f64, gain: f64) -> RgbImage {
        let (w, h) = (320i64, 240i64);
        let pixel = |x: i64, y: i64| {
            if (x as f64) < covered * w as f64 {
                return 90.0 + if y % 60 < 30 { 20.0 } else { 0.0 };
            }
            let (i, j) = ((x + shift).div_euclid(14), y.div_euclid(18));
            40.0 + 160.0 * f64::from(crate::test_noise(i as u64, j as u64).abs())
        };
        let data = (0..h).flat_map(|y| (0..w).map(move |x| (x, y))).flat_map(|(x, y)| [(gain * pixel(x, y)).clamp(0.0, 255.0) as u8; 3]);
        RgbImage::new(w as u32, h as u32, data.collect()).unwrap()
    }

    fn unmoved(a: &RgbImage, b: &RgbImage) -> f32 {
        a.glance().unwrap().unmoved(&b.glance().unwrap()).unwrap()
    }

    #[test]
    fn a_lorry_leaves_the_rest_and_exposure_all_of_it() {
        let still = street(0, 0.0, 1.0);
        assert_eq!(unmoved(&still, &still), 1.0);
        assert_eq!(unmoved(&still, &street(0, 0.0, 0.6)), 1.0);
        let passed = unmoved(&still, &street(0, 0.375, 0.9));
        assert!((0.55..0.65).contains(&passed), "{passed}");
    }

    #[test]
    fn a_shift_moves_all() {
        let moved = unmoved(&street(0, 0.0, 1.0), &street(6, 0.0, 1.0));
        assert!(moved < 0.1, "{moved}");
    }

    #[test]
    fn nothing_is_said_of_a_picture_without_texture() {
        let grey = RgbImage::new(320, 240, vec![90; 3 * 320 * 240]).unwrap().glance().unwrap();
        assert_eq!(grey.unmoved(&grey), None);
        let tiny = RgbImage::new(1, 1, vec![90; 3]).unwrap().glance().unwrap();
        assert_eq!(tiny.unmoved(&grey), None);
    }
}
