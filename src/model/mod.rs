//! The descriptor model: MobileNetV2 with three taps (method of StructVPR's rgb branch), its
//! weights and its preprocessing.

mod container;
mod device;
pub mod kernels;
mod layers;
pub mod leaves;
mod lightglue;
mod local;
mod mobilenet_v2;
mod onnx;
mod pooling;
mod superglue;
mod superpoint;
mod weights;
mod whitening;
mod xfeat;

pub use container::read_tensors;
pub use device::{ComputeDevice, Cost, Limits, Precision};
#[cfg(feature = "cuda")]
pub use kernels::gpu::cuda;
pub use kernels::{rounded_values, Rounded, Seen};
pub use lightglue::LightGlue;
pub use local::{Architecture, LearnedMatcher, LocalNet, LocalWeights};
#[cfg(feature = "cuda")]
use mobilenet_v2::TAP_CHANNELS;
pub use mobilenet_v2::{conv_specs, is_kept, ConvSpec, MobileNetV2, Padding, RoundedNetwork, DIM, MIN_SIDE, TAPS};
pub use pooling::{l2_normalize, Pooling, GEM_EPS};
#[cfg(feature = "cuda")]
use rayon::prelude::*;
pub use superglue::{Side, SuperGlue};
pub use superpoint::{Dense, SuperPoint, CELL};
pub use weights::{ModelSpec, Weights, ARCHITECTURE, MAX_SIDE};
pub use whitening::{Whitening, MIN_DESCRIPTORS};
pub use xfeat::XFeat;

use crate::descriptor::{Descriptor, ModelIdentity};
use crate::error::{Error, Result};
use crate::image::RgbImage;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use device::Network;
use kernels::Input;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use weights::hex;

/// The model in the repository: what the commands use when none is given.
const SHIPPED: &[u8] = include_bytes!("../../models/structvpr-street-v3.safetensors");

/// Its 1x1 convolutions in 8 bits, fitted to its descriptors by `training round`.
const SHIPPED_INT8: &[u8] = include_bytes!("../../models/structvpr-street-v3-int8.safetensors");

/// Pictures that a network in 8 bits is shown: more, or larger ones, teach it nothing more.
const PICTURES: u64 = 8;
/// Their columns and rows.
const PICTURE: (usize, usize) = (160, 120);

/// A loaded model: network, preprocessing and identity.
#[derive(Debug)]
pub struct Model {
    weights: Weights,
    identity: ModelIdentity,
    network: Network,
    device: ComputeDevice,
    precision: Precision,
}

fn network(weights: &Weights) -> Result<MobileNetV2> {
    MobileNetV2::new(weights.spec.padding, |name| {
        weights.tensors.get(name).cloned().ok_or_else(|| Error::TensorMissing { name: name.into(), layout: weights.layout })
    })
}

impl Model {
    /// Builds from parsed weights; computes on the processor in f32.
    pub fn new(weights: Weights) -> Result<Self> {
        weights.spec.validate()?;
        let (device, precision) = (ComputeDevice::Cpu, Precision::F32);
        let network = Network::new(&network(&weights)?, device, precision, None)?;
        let mut hash = Sha256::new();
        hash.update(serde_json::to_vec(&weights.spec).map_err(|e| Error::weights(e.to_string()))?);
        weights.add_network(&mut hash)?;
        if let Some(whitening) = &weights.whitening {
            hash.update("whitening");
            whitening.values().for_each(|v| hash.update(v.to_le_bytes()));
        }
        let identity = ModelIdentity { name: weights.spec.name.clone(), sha256: hex(hash) };
        Ok(Self { weights, identity, network, device, precision })
    }

    /// The same model, whose network computes on `device` in `precision`. Its identity stays: descriptors of all compare.
    ///
    /// Errors: a device that is not there, or does not compute so.
    pub fn on(mut self, device: ComputeDevice, precision: Precision) -> Result<Self> {
        if (device, precision) != (self.device, self.precision) {
            let int8 = if precision == Precision::Int8 { Some(self.rounded()?) } else { None };
            let network = match precision {
                Precision::Bf16 => network(&self.weights)?.fitted16(&self.pictures()?)?,
                _ => network(&self.weights)?,
            };
            self.network = Network::new(&network, device, precision, int8.as_deref())?;
            (self.device, self.precision) = (device, precision);
        }
        Ok(self)
    }

    /// Its 1x1 convolutions in 8 bits: those of its file; those that were fitted to the model of the repository, if it has its network
    /// (whitened otherwise, perhaps, or of another name); or else the nearest.
    ///
    /// Errors: Candle's.
    pub fn rounded(&self) -> Result<Cow<'_, RoundedNetwork>> {
        if let Some(rounded) = &self.weights.int8 {
            return Ok(Cow::Borrowed(rounded));
        }
        let fitted = Weights::parse(SHIPPED_INT8)?;
        match fitted.int8 {
            Some(codes) if fitted.spec.rounded_from.as_ref() == Some(&self.weights.network_sha256()?) => Ok(Cow::Owned(codes)),
            _ => Ok(Cow::Owned(self.nearest()?)),
        }
    }

    /// The codes nearest to its 1x1 convolutions' weights, with biases fitted to made pictures.
    ///
    /// Errors: Candle's.
    pub fn nearest(&self) -> Result<RoundedNetwork> {
        Ok(network(&self.weights)?.rounded(&self.pictures()?)?)
    }

    /// Made pictures: what its layers see in them says what rounding does.
    fn pictures(&self) -> Result<Vec<Tensor>> {
        (0..PICTURES).map(|n| self.picture(n)).collect()
    }

    /// A picture that shows the network what its values are like, 1 x 3 x H x W.
    fn picture(&self, n: u64) -> Result<Tensor> {
        let image = leaves::picture(n, PICTURE)?;
        let (w, h) = (image.width() as usize, image.height() as usize);
        Ok(Tensor::from_vec(self.normalised(&image), (1, 3, h, w), &Device::Cpu)?)
    }

    /// Parses a weight file of any layout that [`Weights::parse`] knows.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::new(Weights::parse(bytes)?)
    }

    /// The model that the repository ships.
    pub fn shipped() -> Result<Self> {
        Self::from_bytes(SHIPPED)
    }

    /// Where its network runs.
    pub fn device(&self) -> ComputeDevice {
        self.device
    }

    /// What that is, for people: `cpu`, or the GPU's own name.
    pub fn device_name(&self) -> String {
        match &self.network {
            Network::Cpu(_) => self.device.to_string(),
            #[cfg(feature = "cuda")]
            Network::Cuda(plan) => format!("{} ({})", self.device, plan.on_machine(kernels::gpu::Cuda::name)),
        }
    }

    /// How many images [`Self::describe_batch`] takes best at once.
    pub fn batch(&self) -> usize {
        match self.device {
            ComputeDevice::Cpu => 1,
            ComputeDevice::Cuda(_) => 32,
        }
    }

    /// What an image of the model's size costs, and what the device can do at most; `None` where either is not known.
    pub fn cost(&self) -> Option<(Cost, Limits)> {
        match &self.network {
            Network::Cpu(_) => None,
            #[cfg(feature = "cuda")]
            Network::Cuda(plan) => {
                Some((plan.cost(self.spec().input_height, self.spec().input_width).ok()?, plan.on_machine(kernels::gpu::Cuda::limits)?))
            }
        }
    }

    /// What its network computes in: what was asked for, but f32 in place of bf16 where the processor multiplies none.
    pub fn precision(&self) -> Precision {
        match &self.network {
            Network::Cpu(plan) if self.precision == Precision::Bf16 && !plan.is_bf16() => Precision::F32,
            _ => self.precision,
        }
    }

    /// Preprocessing, pooling and provenance.
    pub fn spec(&self) -> &ModelSpec {
        &self.weights.spec
    }

    /// How it prepares images, JSON: what a map keeps, for people to read.
    pub fn preprocessing(&self) -> String {
        let s = self.spec();
        let mut all = serde_json::json!({
            "input": [s.input_width, s.input_height], "mean": s.mean, "std": s.std, "padding": s.padding, "pooling": s.pooling, "tap_norm": s.tap_norm, "compute": self.precision.to_string(),
        });
        if self.weights.whitening.is_some() {
            all["whitened"] = true.into();
        }
        all.to_string()
    }

    /// The folded weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Name and hash.
    pub fn identity(&self) -> &ModelIdentity {
        &self.identity
    }

    /// `image` at the model's size, resized by area.
    fn resized<'a>(&self, image: &'a RgbImage) -> Result<Cow<'a, RgbImage>> {
        let (w, h) = (self.spec().input_width, self.spec().input_height);
        if (image.width() as usize, image.height() as usize) == (w, h) {
            return Ok(Cow::Borrowed(image));
        }
        Ok(Cow::Owned(image.resize_area(w as u32, h as u32)?))
    }

    /// Pixel to value, per channel: times the first, plus the second.
    fn normalisation(&self) -> ([f32; 3], [f32; 3]) {
        let spec = self.spec();
        (std::array::from_fn(|c| 1.0 / (255.0 * spec.std[c])), std::array::from_fn(|c| -spec.mean[c] / spec.std[c]))
    }

    /// Three planes.
    fn normalised(&self, image: &RgbImage) -> Vec<f32> {
        let (scale, shift) = self.normalisation();
        image.planes(scale, shift)
    }

    /// Resizes by area to the model's input and normalises: 1 x 3 x H x W.
    pub fn preprocess(&self, image: &RgbImage) -> Result<Tensor> {
        let (w, h) = (self.spec().input_width, self.spec().input_height);
        Ok(Tensor::from_vec(self.normalised(self.resized(image)?.as_ref()), (1, 3, h, w), &Device::Cpu)?)
    }

    /// The global descriptor of one image, 448-d.
    ///
    /// Errors: the device's.
    pub fn describe(&self, image: &RgbImage) -> Result<Descriptor> {
        match &self.network {
            Network::Cpu(plan) => {
                let (w, h) = (self.spec().input_width, self.spec().input_height);
                let (scale, shift) = self.normalisation();
                let rows = image.rows(w as u32, h as u32, scale, shift)?;
                self.joined(plan.pooled(Input::Picture(&rows), h, w, self.spec().pooling))
            }
            #[cfg(feature = "cuda")]
            Network::Cuda(_) => {
                let mut all = self.describe_batch(std::slice::from_ref(image))?;
                all.pop().ok_or_else(|| Error::Device { reason: "no descriptor came back".into() })
            }
        }
    }

    /// The descriptors of several images, in order: on a GPU in batches, which is what it is fast at.
    ///
    /// Errors: the device's.
    pub fn describe_batch(&self, images: &[RgbImage]) -> Result<Vec<Descriptor>> {
        match &self.network {
            Network::Cpu(_) => images.iter().map(|i| self.describe(i)).collect(),
            #[cfg(feature = "cuda")]
            Network::Cuda(plan) => {
                let (w, h) = (self.spec().input_width, self.spec().input_height);
                let (scale, shift) = self.normalisation();
                let normalise = kernels::gpu::Normalise { scale, shift };
                let mut out = Vec::with_capacity(images.len());
                for batch in images.chunks(kernels::gpu::MAX_BATCH) {
                    let resized = batch.par_iter().map(|i| self.resized(i)).collect::<Result<Vec<_>>>()?;
                    let pixels: Vec<&[u8]> = resized.iter().map(|i| i.data()).collect();
                    let pooled = plan.pooled(&pixels, (h, w), &normalise, self.spec().pooling)?;
                    let joined = |row: &[f32]| {
                        let mut at = 0;
                        let taps = TAP_CHANNELS.map(|c| {
                            at += c;
                            row[at - c..at].to_vec()
                        });
                        self.joined(taps.into())
                    };
                    out.extend(pooled.par_chunks_exact(DIM).map(joined).collect::<Result<Vec<_>>>()?);
                }
                Ok(out)
            }
        }
    }

    /// The global descriptor of one preprocessed image (1 x 3 x H x W).
    ///
    /// Errors: another shape, sides below [`MIN_SIDE`], or a model that runs on a GPU, which takes pixels.
    pub fn describe_tensor(&self, x: &Tensor) -> Result<Descriptor> {
        let (n, channels, height, width) = x.dims4()?;
        if (n, channels) != (1, 3) || height < MIN_SIDE || width < MIN_SIDE {
            return Err(Error::image(format!("a descriptor is of 1 x 3 x H x W, sides of {MIN_SIDE} and more, not of {:?}", x.dims())));
        }
        match &self.network {
            Network::Cpu(plan) => {
                let x = x.to_dtype(DType::F32)?.contiguous()?;
                let (storage, layout) = x.storage_and_layout();
                let copy;
                // Where the values are; they are megabytes.
                let values = match (&*storage, layout.contiguous_offsets()) {
                    (Storage::Cpu(CpuStorage::F32(all)), Some((from, to))) => &all[from..to],
                    _ => {
                        copy = x.flatten_all()?.to_vec1::<f32>()?;
                        &copy[..]
                    }
                };
                // A code is always a number: what is none must not become one.
                if self.precision == Precision::Int8 && !all_finite(values) {
                    return Err(Error::image("a value of the image is not a number"));
                }
                self.joined(plan.pooled(Input::Planes(values), height, width, self.spec().pooling))
            }
            #[cfg(feature = "cuda")]
            Network::Cuda(_) => Err(Error::Device { reason: format!("{} takes images, not tensors", self.device) }),
        }
    }

    /// The descriptor of pooled taps.
    fn joined(&self, mut pooled: Vec<Vec<f32>>) -> Result<Descriptor> {
        let norm = |v: &[f32]| (v.iter().map(|x| x * x).sum::<f32>() + 1e-12).sqrt();
        if self.spec().tap_norm {
            for tap in &mut pooled {
                let n = norm(tap);
                tap.iter_mut().for_each(|v| *v /= n);
            }
        }
        let mut all = pooled.concat();
        let n = norm(&all);
        all.iter_mut().for_each(|v| *v /= n);
        Descriptor::new(match &self.weights.whitening {
            Some(whitening) => whitening.apply(&all),
            None => all,
        })
    }
}

/// Whether none is NaN or infinite. In lanes, for they may be a million.
fn all_finite(values: &[f32]) -> bool {
    const LANES: usize = 16;
    let (whole, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0f32; LANES];
    for values in whole {
        // Zero times what is not finite is NaN, and stays so.
        lanes.iter_mut().zip(values).for_each(|(lane, v)| *lane += v * 0.0);
    }
    lanes.iter().chain(rest).all(|v| v.is_finite())
}

#[cfg(test)]
mod local_tests;
#[cfg(test)]
mod tests;
