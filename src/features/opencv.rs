//! SIFT, ORB and AKAZE of OpenCV: no weights, free to use (SIFT's patent ended in 2020).

use super::{longer_side, Features, LocalFeatures, SMALLEST_SIDE};
use crate::error::Result;
use crate::image::RgbImage;
use opencv::core::{no_array, KeyPoint, KeyPointTraitConst, Mat, MatTraitConstManual, Vector, VectorToVec};
use opencv::features2d::{Feature2DTrait, AKAZE, ORB, SIFT};

/// Which of OpenCV's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClassicKind {
    /// Difference of Gaussians, 128 values, as root-SIFT (Arandjelovic and Zisserman, CVPR 2012).
    Sift,
    /// FAST corners, 256 bits: fastest.
    Orb,
    /// Nonlinear scale space, 486 bits.
    Akaze,
}

impl ClassicKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Sift, Self::Orb, Self::Akaze];

    /// Name as in settings and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sift => "sift",
            Self::Orb => "orb",
            Self::Akaze => "akaze",
        }
    }
}

/// An extractor of OpenCV's.
#[derive(Clone, Debug)]
pub struct Classic {
    kind: ClassicKind,
    max_points: usize,
}

impl Classic {
    /// `max_points` of the strongest are kept.
    pub fn new(kind: ClassicKind, max_points: usize) -> Self {
        Self { kind, max_points: max_points.max(1) }
    }

    fn detect(&self, grey: &Mat) -> Result<(Vector<KeyPoint>, Mat)> {
        let (mut points, mut descriptors, none) = (Vector::new(), Mat::default(), no_array());
        match self.kind {
            ClassicKind::Sift => SIFT::create_def()?.detect_and_compute_def(grey, &none, &mut points, &mut descriptors)?,
            ClassicKind::Orb => {
                let mut orb = ORB::create_def()?;
                opencv::features2d::ORBTrait::set_max_features(&mut orb, self.max_points as i32)?;
                orb.detect_and_compute_def(grey, &none, &mut points, &mut descriptors)?;
            }
            ClassicKind::Akaze => AKAZE::create_def()?.detect_and_compute_def(grey, &none, &mut points, &mut descriptors)?,
        }
        Ok((points, descriptors))
    }

    /// One descriptor as a vector whose dot product orders as the method's own distance does.
    fn row(&self, descriptors: &Mat, row: i32) -> Result<Vec<f32>> {
        Ok(match self.kind {
            // Hellinger's kernel: the root of the L1-normalised histogram.
            ClassicKind::Sift => {
                let values = descriptors.at_row::<f32>(row)?;
                let sum = values.iter().sum::<f32>().max(1e-12);
                values.iter().map(|v| (v / sum).sqrt()).collect()
            }
            // Bits as -1 and 1: the dot product is the number of bits less twice Hamming's distance.
            ClassicKind::Orb | ClassicKind::Akaze => {
                let bytes = descriptors.at_row::<u8>(row)?;
                bytes.iter().flat_map(|b| (0..8).map(move |bit| if b >> bit & 1 == 1 { 1.0 } else { -1.0 })).collect()
            }
        })
    }
}

impl LocalFeatures for Classic {
    fn name(&self) -> &str {
        self.kind.name()
    }

    fn identity(&self) -> String {
        self.name().to_string()
    }

    fn dim(&self) -> usize {
        match self.kind {
            ClassicKind::Sift => 128,
            ClassicKind::Orb => 256,
            // 486 bits in 61 bytes.
            ClassicKind::Akaze => 488,
        }
    }

    fn extract(&self, image: &RgbImage) -> Result<Features> {
        if image.width().min(image.height()) < SMALLEST_SIDE {
            return Features::new(image.width(), image.height(), Vec::new(), Vec::new(), self.dim(), Vec::new());
        }
        let (w, h) = longer_side(image);
        let scaled = if (w, h) == (image.width(), image.height()) { image.clone() } else { image.resize_area(w, h)? };
        let (keypoints, descriptors) = self.detect(&scaled.grey()?)?;
        let keypoints: Vec<KeyPoint> = keypoints.to_vec();
        // The strongest first; ties in order of place, so that the same image gives the same list.
        let mut order: Vec<usize> = (0..keypoints.len()).collect();
        let place = |k: &KeyPoint| (k.pt().y, k.pt().x, k.angle());
        order.sort_by(|a, b| {
            let (a, b) = (&keypoints[*a], &keypoints[*b]);
            let by_place = || place(a).partial_cmp(&place(b)).unwrap_or(std::cmp::Ordering::Equal);
            b.response().total_cmp(&a.response()).then_with(by_place)
        });
        order.truncate(self.max_points);
        let (mut points, mut scores, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        for i in order {
            let row = self.row(&descriptors, i as i32)?;
            // A flat patch has no histogram, and nothing to be recognised by.
            if row.iter().any(|v| *v != 0.0) {
                points.push([keypoints[i].pt().x, keypoints[i].pt().y]);
                scores.push(keypoints[i].response());
                rows.extend(row);
            }
        }
        Features::new(scaled.width(), scaled.height(), points, scores, self.dim(), rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(width: u32, height: u32, shift: i64) -> RgbImage {
        let block = |x: i64, y: i64| (crate::test_noise(9, ((x / 12) * 977 + y / 12) as u64) * 90.0 + 128.0).clamp(0.0, 255.0) as u8;
        let data = (0..i64::from(height)).flat_map(|y| (0..i64::from(width)).flat_map(move |x| [block(x + shift, y); 3])).collect();
        RgbImage::new(width, height, data).unwrap()
    }

    #[test]
    fn every_kind_finds_points_again_where_they_moved() {
        for kind in ClassicKind::ALL {
            let extractor = Classic::new(kind, 300);
            let (a, b) = (extractor.extract(&pattern(320, 240, 0)).unwrap(), extractor.extract(&pattern(320, 240, 24)).unwrap());
            assert_eq!(a, extractor.extract(&pattern(320, 240, 0)).unwrap(), "{kind:?} is not the same twice");
            assert!(a.len() > 100 && a.len() <= 300, "{kind:?}: {}", a.len());
            assert!(a.scores().windows(2).all(|w| w[0] >= w[1]));
            let matches = crate::geometry::mutual_matches(&a, &b, 1.0).unwrap();
            let moved = |m: &&crate::geometry::Match| {
                let (p, q) = (a.points()[m.query], b.points()[m.reference]);
                (p[0] - q[0] - 24.0).abs() < 2.0 && (p[1] - q[1]).abs() < 2.0
            };
            let right = matches.iter().filter(moved).count();
            assert!(right > 50, "{kind:?}: {right} of {}", matches.len());
        }
    }

    #[test]
    fn nothing_to_see_is_no_features_and_a_large_image_is_scaled() {
        for kind in ClassicKind::ALL {
            let flat = RgbImage::new(64, 48, vec![90; 64 * 48 * 3]).unwrap();
            assert!(Classic::new(kind, 100).extract(&flat).unwrap().is_empty());
            let dot = RgbImage::new(1, 1, vec![1, 2, 3]).unwrap();
            assert!(Classic::new(kind, 100).extract(&dot).unwrap().is_empty());
            assert_eq!(Classic::new(kind, 100).extract(&pattern(1280, 720, 0)).unwrap().size(), (640, 360));
        }
    }
}
