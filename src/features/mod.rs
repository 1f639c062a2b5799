//! Local features: points of an image that can be found again in another, one by one.
//!
//! Behind one trait, so that verification does not know who found them. OpenCV's need no weights.

mod opencv;

pub use self::opencv::{Classic, ClassicKind};

use crate::error::{Error, Result};
use crate::image::RgbImage;

/// Points of one image with a descriptor each.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    width: u32,
    height: u32,
    dim: usize,
    points: Vec<[f32; 2]>,
    scores: Vec<f32>,
    descriptors: Vec<f32>,
}

impl Features {
    /// From points (x, y in pixels of an image of `width` x `height`), their scores, and one descriptor row of
    /// `dim` values each, which is scaled to unit length.
    ///
    /// Errors: lengths that do not agree, a value that is not finite, a descriptor of length zero.
    pub fn new(width: u32, height: u32, points: Vec<[f32; 2]>, scores: Vec<f32>, dim: usize, mut descriptors: Vec<f32>) -> Result<Self> {
        let bad = |reason: String| Err(Error::Features { reason });
        let n = points.len();
        if scores.len() != n || descriptors.len() != n * dim || dim == 0 {
            return bad(format!("{n} points with {} scores and {} values of {dim}-d descriptors", scores.len(), descriptors.len()));
        }
        if let Some(p) = points.iter().find(|p| !p.iter().all(|v| v.is_finite())) {
            return bad(format!("a point at {p:?}"));
        }
        for (i, row) in descriptors.chunks_exact_mut(dim).enumerate() {
            let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            if !norm.is_finite() || norm < 1e-12 {
                return bad(format!("the descriptor of point {i} has length {norm}"));
            }
            row.iter_mut().for_each(|v| *v /= norm);
        }
        Ok(Self { width, height, dim, points, scores, descriptors })
    }

    /// Number of points.
    pub fn len(&self) -> usize {
        self.points.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    /// Columns and rows of the image that the points are in.
    pub fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// x and y, pixels.
    pub fn points(&self) -> &[[f32; 2]] {
        &self.points
    }

    /// How sure the detector was; comparable within one image only.
    pub fn scores(&self) -> &[f32] {
        &self.scores
    }

    /// Values per descriptor.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Row-major, one unit vector per point.
    pub fn descriptors(&self) -> &[f32] {
        &self.descriptors
    }
}

/// Finds features. The same image gives the same features.
pub trait LocalFeatures: Send + Sync {
    /// Name as in settings and reports.
    fn name(&self) -> &str;

    /// Features of an image, best first, not more than the extractor's limit. Points are in pixels of the
    /// image as the extractor scaled it, whose size [`Features::size`] gives.
    ///
    /// Errors: the extractor cannot use the image. No features is no error.
    fn extract(&self, image: &RgbImage) -> Result<Features>;
}

/// The extractor of a name: `sift`, `orb` or `akaze`.
///
/// Errors: an unknown name; the known ones are listed.
pub fn by_name(name: &str, max_points: usize) -> Result<Box<dyn LocalFeatures>> {
    let kind = ClassicKind::ALL.into_iter().find(|k| k.name() == name).ok_or_else(|| Error::Features {
        reason: format!("`{name}` is not known; known: {}", ClassicKind::ALL.map(ClassicKind::name).join(", ")),
    })?;
    Ok(Box::new(Classic::new(kind, max_points)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_of_unit_length_and_nonsense_is_named() {
        let f = Features::new(10, 10, vec![[1.0, 2.0]], vec![0.5], 2, vec![3.0, 4.0]).unwrap();
        assert_eq!(f.descriptors(), [0.6, 0.8]);
        let said = |points: Vec<[f32; 2]>, d: Vec<f32>| Features::new(10, 10, points, vec![1.0], 2, d).unwrap_err().to_string();
        assert!(said(vec![[1.0, f32::NAN]], vec![1.0, 0.0]).contains("NaN"));
        assert!(said(vec![[1.0, 1.0]], vec![0.0, 0.0]).contains("length 0"));
        assert!(said(vec![[1.0, 1.0]], vec![f32::NAN, 0.0]).contains("NaN"));
        assert!(said(vec![[1.0, 1.0]], vec![1.0]).contains("1 values of 2-d"));
        let e = by_name("surf", 10).err().unwrap().to_string();
        assert!(e.contains("`surf`") && e.contains("sift, orb, akaze"), "{e}");
    }
}
