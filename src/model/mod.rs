//! The descriptor model: MobileNetV2 with three taps (method of StructVPR's rgb branch), its
//! weights and its preprocessing.

mod container;
pub mod kernels;
mod layers;
mod lightglue;
mod local;
mod mobilenet_v2;
mod onnx;
mod pooling;
mod superglue;
mod superpoint;
mod weights;
mod xfeat;

pub use lightglue::LightGlue;
pub use local::{Architecture, LearnedMatcher, LocalNet, LocalWeights};
pub use mobilenet_v2::{conv_specs, ConvSpec, MobileNetV2, Padding, DIM, MIN_SIDE, TAPS};
pub use pooling::{l2_normalize, Pooling, GEM_EPS};
pub use superglue::{Side, SuperGlue};
pub use superpoint::{Dense, SuperPoint, CELL};
pub use weights::{ModelSpec, Weights, ARCHITECTURE, MAX_SIDE};
pub use xfeat::XFeat;

use crate::descriptor::{Descriptor, ModelIdentity};
use crate::error::{Error, Result};
use crate::image::RgbImage;
use candle_core::{DType, Device, Tensor};
use kernels::Plan;
use sha2::{Digest, Sha256};

/// The model in the repository: what the commands use when none is given.
const SHIPPED: &[u8] = include_bytes!("../../models/structvpr-synthetic-v1.safetensors");

/// A loaded model: network, preprocessing and identity.
#[derive(Debug)]
pub struct Model {
    weights: Weights,
    identity: ModelIdentity,
    plan: Plan,
}

impl Model {
    /// Builds from parsed weights.
    pub fn new(weights: Weights) -> Result<Self> {
        weights.spec.validate()?;
        let net = MobileNetV2::new(weights.spec.padding, |name| {
            weights.tensors.get(name).cloned().ok_or_else(|| Error::TensorMissing { name: name.into(), layout: weights.layout })
        })?;
        let mut hash = Sha256::new();
        hash.update(serde_json::to_vec(&weights.spec).map_err(|e| Error::weights(e.to_string()))?);
        for (name, tensor) in &weights.tensors {
            hash.update(name.as_bytes());
            for v in tensor.flatten_all()?.to_vec1::<f32>()? {
                hash.update(v.to_le_bytes());
            }
        }
        let sha256 = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let identity = ModelIdentity { name: weights.spec.name.clone(), sha256 };
        Ok(Self { weights, identity, plan: net.plan()? })
    }

    /// Parses a weight file of any layout that [`Weights::parse`] knows.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::new(Weights::parse(bytes)?)
    }

    /// The model that the repository ships.
    pub fn shipped() -> Result<Self> {
        Self::from_bytes(SHIPPED)
    }

    /// Preprocessing, pooling and provenance.
    pub fn spec(&self) -> &ModelSpec {
        &self.weights.spec
    }

    /// The folded weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Name and hash.
    pub fn identity(&self) -> &ModelIdentity {
        &self.identity
    }

    /// Resizes by area to the model's input and normalises: 1 x 3 x H x W.
    pub fn preprocess(&self, image: &RgbImage) -> Result<Tensor> {
        let (w, h) = (self.spec().input_width, self.spec().input_height);
        let resized = image.resize_area(w as u32, h as u32)?;
        let mut planes = vec![0f32; 3 * w * h];
        for (c, plane) in planes.chunks_exact_mut(w * h).enumerate() {
            let scale = 1.0 / (255.0 * self.spec().std[c]);
            let shift = -self.spec().mean[c] / self.spec().std[c];
            for (out, pixel) in plane.iter_mut().zip(resized.data().chunks_exact(3)) {
                *out = f32::from(pixel[c]) * scale + shift;
            }
        }
        Ok(Tensor::from_vec(planes, (1, 3, h, w), &Device::Cpu)?)
    }

    /// The global descriptor of one image, 448-d.
    pub fn describe(&self, image: &RgbImage) -> Result<Descriptor> {
        self.describe_tensor(&self.preprocess(image)?)
    }

    /// The global descriptor of one preprocessed image (1 x 3 x H x W).
    pub fn describe_tensor(&self, x: &Tensor) -> Result<Descriptor> {
        let (_, _, height, width) = x.dims4()?;
        let image = x.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        let norm = |v: &[f32]| (v.iter().map(|x| x * x).sum::<f32>() + 1e-12).sqrt();
        let mut pooled = self.plan.pooled(&image, height, width, self.spec().pooling);
        if self.spec().tap_norm {
            for tap in &mut pooled {
                let n = norm(tap);
                tap.iter_mut().for_each(|v| *v /= n);
            }
        }
        let mut all = pooled.concat();
        let n = norm(&all);
        all.iter_mut().for_each(|v| *v /= n);
        Descriptor::new(all)
    }
}

#[cfg(test)]
mod local_tests;
#[cfg(test)]
mod tests;
