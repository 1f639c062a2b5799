//! Features of a network: SuperPoint, its squeezed kin, XFeat.

use super::keypoints::{points, Detection};
use super::{longer_side, Features, LocalFeatures};
use crate::error::Result;
use crate::image::RgbImage;
use crate::model::{LocalNet, LocalWeights};
use candle_core::{Device, Tensor};

/// A network with the settings of its detection.
#[derive(Debug)]
pub struct Learned {
    net: LocalNet,
    /// How points are chosen.
    pub detection: Detection,
}

impl Learned {
    /// With the settings of the network's authors. `max_points` of the strongest are kept.
    ///
    /// Errors: weights of a network that does not describe points.
    pub fn new(weights: &LocalWeights, max_points: usize) -> Result<Self> {
        let net = LocalNet::new(weights)?;
        let detection = Detection::of(net.architecture(), max_points.max(1));
        Ok(Self { net, detection })
    }

    /// The network.
    pub fn net(&self) -> &LocalNet {
        &self.net
    }

    /// The image as the network takes it: luma 0 to 1, 1 x 1 x H x W, sides at most 640 pixels and multiples of what
    /// the network needs. `None`: too small for that.
    pub fn input(&self, image: &RgbImage) -> Result<Option<Tensor>> {
        let multiple = self.net.multiple() as u32;
        let (w, h) = longer_side(image);
        let (w, h) = (w / multiple * multiple, h / multiple * multiple);
        if w < multiple || h < multiple || w.min(h) < super::SMALLEST_SIDE {
            return Ok(None);
        }
        let scaled = if (w, h) == (image.width(), image.height()) { image.clone() } else { image.resize_area(w, h)? };
        let luma = scaled.luma()?.into_iter().map(|v| f32::from(v) / 255.0).collect::<Vec<f32>>();
        Ok(Some(Tensor::from_vec(luma, (1, 1, h as usize, w as usize), &Device::Cpu)?))
    }
}

impl LocalFeatures for Learned {
    fn name(&self) -> &str {
        self.net.architecture().name()
    }

    fn identity(&self) -> String {
        format!("{} {}", self.name(), &self.net.sha256()[..16])
    }

    fn dim(&self) -> usize {
        self.net.dim()
    }

    fn extract(&self, image: &RgbImage) -> Result<Features> {
        let Some(input) = self.input(image)? else {
            return Features::new(image.width(), image.height(), Vec::new(), Vec::new(), self.net.dim(), Vec::new());
        };
        let (_, _, h, w) = input.dims4()?;
        let (points, scores, descriptors) = points(&self.net.dense(&input)?, self.net.architecture(), &self.detection)?;
        Features::new(w as u32, h as u32, points, scores, self.net.dim(), descriptors)
    }
}
