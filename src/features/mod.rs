//! Local features: points of an image that can be found again in another, one by one.
//!
//! Behind one trait, so that verification does not know who found them. OpenCV's need no weights.

mod compact;
mod keypoints;
mod learned;
mod opencv;

pub use self::compact::CompactFeatures;
pub use self::keypoints::{points, Detection, Points};
pub use self::learned::Learned;
pub use self::opencv::{Classic, ClassicKind};

use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::model::{Architecture, LocalWeights};

/// Images are scaled so that their longer side is at most this long: an even field of view for every camera, and what
/// the networks were trained on.
pub const LONGER_SIDE: u32 = 640;

/// Smaller images have no room for a pyramid, which OpenCV refuses to build, nor for a border.
const SMALLEST_SIDE: u32 = 32;

/// Columns and rows of `image` once its longer side is at most [`LONGER_SIDE`].
fn longer_side(image: &RgbImage) -> (u32, u32) {
    let longer = image.width().max(image.height()).max(LONGER_SIDE);
    let side = |n: u32| ((u64::from(n) * u64::from(LONGER_SIDE)).div_ceil(u64::from(longer)) as u32).max(1);
    (side(image.width()), side(image.height()))
}

/// Points of one image with a descriptor each.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    width: u32,
    height: u32,
    dim: usize,
    points: Vec<[f32; 2]>,
    scores: Vec<f32>,
    descriptors: Vec<f32>,
    depths: Vec<f32>,
}

/// Dot product of two rows of one length: lanes side by side, which the compiler makes vectors of.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
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
            let norm = dot(row, row).sqrt();
            if !norm.is_finite() || norm < 1e-12 {
                return bad(format!("the descriptor of point {i} has length {norm}"));
            }
            row.iter_mut().for_each(|v| *v /= norm);
        }
        Ok(Self { width, height, dim, points, scores, descriptors, depths: Vec::new() })
    }

    /// With the depth of every point along the optical axis, metres; what is not above 0 is unknown.
    ///
    /// Errors: another number than of points.
    pub fn with_depths(mut self, depths: Vec<f32>) -> Result<Self> {
        if depths.len() != self.points.len() {
            return Err(Error::Features { reason: format!("{} depths for {} points", depths.len(), self.points.len()) });
        }
        self.depths = depths;
        Ok(self)
    }

    /// Depth of every point, metres; empty where none is known.
    pub fn depths(&self) -> &[f32] {
        &self.depths
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

    /// The unit vector of one point, which there is.
    pub(crate) fn descriptor(&self, point: usize) -> &[f32] {
        &self.descriptors[point * self.dim..][..self.dim]
    }
}

/// Finds features. The same image gives the same features.
pub trait LocalFeatures: Send + Sync {
    /// Name as in settings and reports.
    fn name(&self) -> &str;

    /// Name and, where there are weights, the beginning of their hash: features of one identity compare with each
    /// other.
    fn identity(&self) -> String;

    /// Values per descriptor.
    fn dim(&self) -> usize;

    /// Features of an image, best first, not more than the extractor's limit. Points are in pixels of the
    /// image as the extractor scaled it, whose size [`Features::size`] gives.
    ///
    /// Errors: the extractor cannot use the image. No features is no error.
    fn extract(&self, image: &RgbImage) -> Result<Features>;
}

/// What a setting or flag may name: OpenCV's, which need no weights, then the networks.
pub fn names() -> Vec<&'static str> {
    let nets = [Architecture::SuperpointVgg, Architecture::SuperpointSqueeze, Architecture::Xfeat];
    ClassicKind::ALL.map(ClassicKind::name).into_iter().chain(nets.map(Architecture::name)).chain(["superpoint"]).collect()
}

/// The extractor of a name. A network wants its weights: `superpoint` takes those of any SuperPoint. `subpixel` matters to
/// networks only.
///
/// Errors: an unknown name; a network without weights, or with another's.
pub fn by_name(name: &str, weights: Option<&LocalWeights>, max_points: usize, subpixel: bool) -> Result<Box<dyn LocalFeatures>> {
    let bad = |reason: String| Err(Error::Features { reason });
    if let Some(kind) = ClassicKind::ALL.into_iter().find(|k| k.name() == name) {
        return match weights {
            Some(w) => bad(format!("`{name}` needs no weights, and these are of {}; name the network instead", w.architecture.name())),
            None => Ok(Box::new(Classic::new(kind, max_points))),
        };
    }
    if !names().contains(&name) {
        return bad(format!("`{name}` is not known; known: {}", names().join(", ")));
    }
    let Some(weights) = weights else {
        return bad(format!("`{name}` is a network and needs its weights; `structvpr models` says where to get them"));
    };
    let found = weights.architecture.name();
    let fits = found == name || (name == "superpoint" && found.starts_with("superpoint"));
    if !fits {
        return bad(format!("`{name}` is named, but the weights are of {found}"));
    }
    let mut learned = Learned::new(weights, max_points)?;
    learned.detection.subpixel = subpixel;
    Ok(Box::new(learned))
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
        let said = |name: &str| by_name(name, None, 10, false).err().unwrap().to_string();
        assert!(said("surf").contains("`surf`") && said("surf").contains("sift, orb, akaze, superpoint_vgg"), "{}", said("surf"));
        assert!(said("xfeat").contains("`structvpr models`"), "{}", said("xfeat"));
    }
}
