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

pub use container::read_tensors;
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
pub use kernels::Precision;
use sha2::{Digest, Sha256};

/// The model in the repository: what the commands use when none is given.
const SHIPPED: &[u8] = include_bytes!("../../models/structvpr-synthetic-v1.safetensors");

/// A loaded model: network, preprocessing and identity.
#[derive(Debug)]
pub struct Model {
    weights: Weights,
    identity: ModelIdentity,
    plan: Plan,
    precision: Precision,
}

fn network(weights: &Weights) -> Result<MobileNetV2> {
    MobileNetV2::new(weights.spec.padding, |name| {
        weights.tensors.get(name).cloned().ok_or_else(|| Error::TensorMissing { name: name.into(), layout: weights.layout })
    })
}

impl Model {
    /// Builds from parsed weights; computes in f32.
    pub fn new(weights: Weights) -> Result<Self> {
        weights.spec.validate()?;
        let plan = network(&weights)?.plan(Precision::F32)?;
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
        Ok(Self { weights, identity, plan, precision: Precision::F32 })
    }

    /// The same model, whose network computes in `precision`. Its identity stays: descriptors of both compare.
    pub fn with_precision(mut self, precision: Precision) -> Result<Self> {
        if precision != self.precision {
            self.plan = network(&self.weights)?.plan(precision)?;
            self.precision = precision;
        }
        Ok(self)
    }

    /// Parses a weight file of any layout that [`Weights::parse`] knows.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::new(Weights::parse(bytes)?)
    }

    /// The model that the repository ships.
    pub fn shipped() -> Result<Self> {
        Self::from_bytes(SHIPPED)
    }

    /// What its network computes in.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Preprocessing, pooling and provenance.
    pub fn spec(&self) -> &ModelSpec {
        &self.weights.spec
    }

    /// How it prepares images, JSON: what a map keeps, for people to read.
    pub fn preprocessing(&self) -> String {
        let s = self.spec();
        serde_json::json!({
            "input": [s.input_width, s.input_height], "mean": s.mean, "std": s.std, "padding": s.padding, "pooling": s.pooling, "tap_norm": s.tap_norm, "compute": self.precision.to_string(),
        })
        .to_string()
    }

    /// The folded weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Name and hash.
    pub fn identity(&self) -> &ModelIdentity {
        &self.identity
    }

    /// Resizes by area to the model's input and normalises: three planes.
    fn planes(&self, image: &RgbImage) -> Result<Vec<f32>> {
        let (w, h) = (self.spec().input_width, self.spec().input_height);
        let resized;
        let image = if (image.width() as usize, image.height() as usize) == (w, h) {
            image
        } else {
            resized = image.resize_area(w as u32, h as u32)?;
            &resized
        };
        let spec = self.spec();
        let scale: [f32; 3] = std::array::from_fn(|c| 1.0 / (255.0 * spec.std[c]));
        let shift: [f32; 3] = std::array::from_fn(|c| -spec.mean[c] / spec.std[c]);
        let mut planes = vec![0f32; 3 * w * h];
        let (red, rest) = planes.split_at_mut(w * h);
        let (green, blue) = rest.split_at_mut(w * h);
        for (((r, g), b), pixel) in red.iter_mut().zip(green).zip(blue).zip(image.data().chunks_exact(3)) {
            *r = f32::from(pixel[0]) * scale[0] + shift[0];
            *g = f32::from(pixel[1]) * scale[1] + shift[1];
            *b = f32::from(pixel[2]) * scale[2] + shift[2];
        }
        Ok(planes)
    }

    /// Resizes by area to the model's input and normalises: 1 x 3 x H x W.
    pub fn preprocess(&self, image: &RgbImage) -> Result<Tensor> {
        let (w, h) = (self.spec().input_width, self.spec().input_height);
        Ok(Tensor::from_vec(self.planes(image)?, (1, 3, h, w), &Device::Cpu)?)
    }

    /// The global descriptor of one image, 448-d.
    pub fn describe(&self, image: &RgbImage) -> Result<Descriptor> {
        self.describe_planes(&self.planes(image)?, self.spec().input_height, self.spec().input_width)
    }

    /// The global descriptor of one preprocessed image (1 x 3 x H x W).
    ///
    /// Errors: another shape, or sides below [`MIN_SIDE`].
    pub fn describe_tensor(&self, x: &Tensor) -> Result<Descriptor> {
        let (n, channels, height, width) = x.dims4()?;
        if (n, channels) != (1, 3) || height < MIN_SIDE || width < MIN_SIDE {
            return Err(Error::image(format!("a descriptor is of 1 x 3 x H x W, sides of {MIN_SIDE} and more, not of {:?}", x.dims())));
        }
        self.describe_planes(&x.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?, height, width)
    }

    fn describe_planes(&self, image: &[f32], height: usize, width: usize) -> Result<Descriptor> {
        // A code is always a number: what is none must not become one.
        if self.precision == Precision::Int8 && !image.iter().all(|v| v.is_finite()) {
            return Err(Error::image("a value of the image is not a number"));
        }
        let norm = |v: &[f32]| (v.iter().map(|x| x * x).sum::<f32>() + 1e-12).sqrt();
        let mut pooled = self.plan.pooled(image, height, width, self.spec().pooling);
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
