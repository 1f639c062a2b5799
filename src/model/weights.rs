//! Weight files, parsed from bytes: ours, torchvision's (.pth and safetensors), TensorFlow-derived.
//!
//! All end as the same thing: a [`ModelSpec`] and one folded weight and bias per convolution, by
//! our names. Memory is bounded by the file's own size (times two where f16 becomes f32).

use super::container::{write_safetensors, RawFile, Written};
use super::device::Precision;
use super::kernels::Rounded;
use super::mobilenet_v2::{conv_specs, ConvSpec, Padding, RoundedNetwork, MIN_SIDE};
use super::pooling::Pooling;
use super::whitening::Whitening;
use crate::config::Recommended;
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// The only architecture so far.
pub const ARCHITECTURE: &str = "structvpr_mobilenet_v2_448";
/// Version of our safetensors header.
pub const FORMAT: &str = "1";
/// The same of files whose 1x1 convolutions are in 8 bits, which programs before they were there do not read.
pub const FORMAT_INT8: &str = "2";
/// Largest input side; bounds what a lying header can make us allocate.
pub const MAX_SIDE: usize = 4096;

/// Everything about a model that is not a tensor. It lives in the safetensors header, never in a
/// caller's memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// Name that reports and maps show.
    pub name: String,
    /// How the network pads its 3x3 kernels.
    pub padding: Padding,
    /// Per channel (R, G, B), subtracted from `pixel / 255`.
    pub mean: [f32; 3],
    /// Per channel, divides what is left.
    pub std: [f32; 3],
    /// Width that images are resized to (by area), pixels.
    pub input_width: usize,
    /// Height that images are resized to (by area), pixels.
    pub input_height: usize,
    /// How taps become vectors.
    pub pooling: Pooling,
    /// Whether each tap's vector is L2-normalised before they are joined.
    pub tap_norm: bool,
    /// SPDX identifier or sentence.
    pub license: String,
    /// What it was trained on.
    pub training_data: String,
    /// Cosine similarity above which the detector considers a match, where the model's maker
    /// measured one. `similarity_threshold` in the configuration overrides it.
    #[serde(default)]
    pub similarity_threshold: Option<f32>,
    /// The same of `decision.min_margin`: models differ in how far apart their similarities lie. Not written where there is
    /// none, so that the identities of earlier models stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_margin: Option<f32>,
    /// The same of `keyframe.min_descriptor_change`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_descriptor_change: Option<f32>,
    /// Whose descriptors these weights, in 8 bits, were fitted to: [`Weights::network_sha256`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounded_from: Option<String>,
}

impl ModelSpec {
    /// Checks ranges; errors name the field.
    pub fn validate(&self) -> Result<()> {
        let bad = |what: String| Err(Error::weights(format!("header: {what}")));
        let side = MIN_SIDE..=MAX_SIDE;
        if !side.contains(&self.input_width) || !side.contains(&self.input_height) {
            return bad(format!("input size {}x{} is outside {MIN_SIDE}..={MAX_SIDE}", self.input_width, self.input_height));
        }
        // Black and white must become numbers: an infinity would be a descriptor of nothing, or 8-bit codes of one.
        let usable =
            |(m, s): (&f32, &f32)| s.is_finite() && *s > 0.0 && (m / s).is_finite() && ((1.0 - m) / s).is_finite() && (1.0 / s).is_finite();
        if !self.mean.iter().zip(&self.std).all(usable) {
            return bad(format!("mean {:?} or std {:?} is not usable", self.mean, self.std));
        }
        if let Pooling::Gem { p } = self.pooling {
            if !(0.1..=100.0).contains(&p) {
                return bad(format!("GeM p {p} is outside 0.1..=100"));
            }
        }
        for (name, value, low, high) in [
            ("similarity_threshold", self.similarity_threshold, -1.0, 1.0),
            ("min_margin", self.min_margin, 0.0, 2.0),
            ("min_descriptor_change", self.min_descriptor_change, 0.0, 2.0),
        ] {
            if value.is_some_and(|v| !(low..=high).contains(&v)) {
                return bad(format!("{name} {value:?} is outside {low}..={high}"));
            }
        }
        Ok(())
    }

    /// What it says for settings that are left to the model.
    pub fn recommended(&self) -> Recommended {
        let (similarity_threshold, min_margin) = (self.similarity_threshold, self.min_margin);
        Recommended { similarity_threshold, min_margin, min_descriptor_change: self.min_descriptor_change }
    }

    /// Forgets what was measured with other descriptors than those it will make now.
    pub fn forget_recommended(&mut self) {
        (self.similarity_threshold, self.min_margin, self.min_descriptor_change) = (None, None, None);
    }

    fn torchvision() -> Self {
        Self {
            name: "mobilenet_v2_torchvision".into(),
            padding: Padding::Symmetric,
            mean: [0.485, 0.456, 0.406],
            std: [0.229, 0.224, 0.225],
            input_width: 640,
            input_height: 480,
            pooling: Pooling::Gem { p: 3.0 },
            tap_norm: true,
            license: "unknown".into(),
            training_data: "ImageNet (assumed from the torchvision layout)".into(),
            similarity_threshold: None,
            min_margin: None,
            min_descriptor_change: None,
            rounded_from: None,
        }
    }

    fn tensorflow() -> Self {
        Self {
            name: "mobilenet_v2_imagenet_tf".into(),
            padding: Padding::Same,
            // x / 127.5 - 1 = (x / 255 - 0.5) / 0.5
            mean: [0.5; 3],
            std: [0.5; 3],
            license: "Apache-2.0".into(),
            training_data: "ImageNet".into(),
            ..Self::torchvision()
        }
    }
}

/// The digest in hexadecimal digits.
pub(super) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// A spec and its folded tensors, f32, by our names.
#[derive(Clone, Debug)]
pub struct Weights {
    /// What the header says, or the layout's defaults.
    pub spec: ModelSpec,
    /// `NAME.weight` and `NAME.bias` of every convolution.
    pub tensors: BTreeMap<String, Tensor>,
    /// Of the 1x1 convolutions those that the file has in 8 bits: `tensors` hold what they stand for.
    pub int8: Option<RoundedNetwork>,
    /// What is done to the joined taps.
    pub whitening: Option<Whitening>,
    /// Which layout was recognised.
    pub layout: &'static str,
}

impl Weights {
    /// Recognises the container (safetensors or PyTorch zip) and the naming scheme.
    ///
    /// Errors: a container we do not read; a missing, extra or misshapen tensor by name; a header
    /// of another architecture or version.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut file = RawFile::parse(bytes)?;
        file.strip_prefixes();
        if file.metadata.contains_key("structvpr.format") {
            ours(file)
        } else if file.tensors.contains_key("features.0.0.weight") {
            torchvision(file)
        } else if file.tensors.contains_key("conv00.weight") {
            tensorflow(file)
        } else {
            Err(Error::weights(format!(
                "no known naming scheme: expected our header, torchvision's `features.0.0.weight` or TensorFlow's `conv00.weight`; the file has {}",
                file.some_names()
            )))
        }
    }

    /// SHA-256 over its convolutions, whatever the header says and whatever is done to the joined taps.
    ///
    /// Errors: Candle's.
    pub fn network_sha256(&self) -> Result<String> {
        let mut hash = Sha256::new();
        self.add_network(&mut hash)?;
        Ok(hex(hash))
    }

    /// Names and values of the convolutions.
    pub(super) fn add_network(&self, hash: &mut Sha256) -> Result<()> {
        for (name, tensor) in &self.tensors {
            hash.update(name.as_bytes());
            for v in tensor.flatten_all()?.to_vec1::<f32>()? {
                hash.update(v.to_le_bytes());
            }
        }
        Ok(())
    }

    /// Has these of its 1x1 convolutions be in 8 bits from now on, whatever it computes in.
    ///
    /// Errors: none at all, one that is no 1x1 convolution, of another shape, or too large for f32.
    pub fn round(&mut self, int8: RoundedNetwork) -> Result<()> {
        if int8.is_empty() {
            return Err(Error::weights("no 1x1 convolution is in 8 bits"));
        }
        let specs = conv_specs();
        for (name, rounded) in &int8 {
            let fits = |s: &&ConvSpec| {
                s.name == *name
                    && s.is_pointwise()
                    && [rounded.bias.len(), rounded.scales.len()] == s.shape[..2]
                    && rounded.steps.len() == rounded.bias.len()
                    && rounded.codes.len() == rounded.bias.len() * rounded.scales.len()
            };
            let wrong = || Error::weights(format!("`{name}` is no 1x1 convolution, or of another shape"));
            let spec = specs.iter().find(fits).ok_or_else(wrong)?;
            let (name, weights) = (format!("{name}.weight"), rounded.weights());
            if let Some(v) = weights.iter().find(|v| !v.is_finite()) {
                return Err(Error::weights(format!("tensor `{name}` stands for {v}")));
            }
            self.tensors.insert(name, Tensor::from_vec(weights, spec.shape.to_vec(), &Device::Cpu)?);
            self.tensors.insert(format!("{}.bias", spec.name), Tensor::from_slice(&rounded.bias, spec.shape[0], &Device::Cpu)?);
        }
        self.int8 = Some(int8);
        Ok(())
    }

    /// Our safetensors, sorted by name: the same weights give the same bytes. `int8` is that of the 1x1 convolutions that were rounded;
    /// what else there is is f16 then.
    ///
    /// Errors: bf16, which no file is in; 8 bits of weights that have none ([`Weights::round`]); or what the format's crate says.
    pub fn to_bytes(&self, precision: Precision) -> Result<Vec<u8>> {
        self.spec.validate()?;
        if precision == Precision::Bf16 {
            return Err(Error::weights("weight files are in f32, f16 or int8; bf16 is only computed in"));
        }
        let spec = serde_json::to_string(&self.spec).map_err(|e| Error::weights(e.to_string()))?;
        let mut tensors = self.tensors.clone();
        let (mut more, mut version) = (Vec::<Written>::new(), FORMAT);
        if precision == Precision::Int8 {
            version = FORMAT_INT8;
            let int8 = self.int8.as_ref().ok_or_else(|| Error::weights("these weights have not been rounded to 8 bits"))?;
            let floats = |v: &[f32]| v.iter().flat_map(|v| v.to_le_bytes()).collect();
            for (name, Rounded { codes, steps, scales, .. }) in int8 {
                tensors.remove(&format!("{name}.weight"));
                let codes = codes.iter().flat_map(|c| c.to_le_bytes()).collect();
                more.push((format!("{name}.weight"), Dtype::I8, vec![steps.len(), scales.len(), 1, 1], codes));
                more.push((format!("{name}.steps"), Dtype::F32, vec![steps.len()], floats(steps)));
                more.push((format!("{name}.scales"), Dtype::F32, vec![scales.len()], floats(scales)));
            }
        }
        let header = format!("{{\"architecture\":\"{ARCHITECTURE}\",\"version\":\"{version}\",\"spec\":{spec}}}");
        if let Some(whitening) = &self.whitening {
            whitening.put(&mut tensors)?;
        }
        let dtype = if precision == Precision::F32 { DType::F32 } else { DType::F16 };
        write_safetensors(&tensors, dtype, more, "structvpr.format", header)
    }
}

#[derive(Deserialize)]
struct Header {
    architecture: String,
    version: String,
    spec: ModelSpec,
}

fn ours(mut file: RawFile) -> Result<Weights> {
    const LAYOUT: &str = "structvpr";
    let text = file.metadata.get("structvpr.format").map(String::as_str).unwrap_or("");
    let header: Header = serde_json::from_str(text).map_err(|e| Error::weights(format!("header `structvpr.format`: {e}")))?;
    if header.architecture != ARCHITECTURE {
        return Err(Error::weights(format!("architecture `{}`; this version reads `{ARCHITECTURE}`", header.architecture)));
    }
    if ![FORMAT, FORMAT_INT8].contains(&header.version.as_str()) {
        return Err(Error::weights(format!("header version {}; this version reads {FORMAT} and {FORMAT_INT8}", header.version)));
    }
    header.spec.validate()?;
    let mut tensors = BTreeMap::new();
    let mut int8 = RoundedNetwork::new();
    for spec in conv_specs() {
        let (weight, bias) = (format!("{}.weight", spec.name), format!("{}.bias", spec.name));
        let values = file.take(&bias, &spec.shape[..1], LAYOUT)?;
        tensors.insert(bias, Tensor::from_slice(&values, spec.shape[0], &Device::Cpu)?);
        let in_8_bits = || ["steps", "scales"].iter().any(|kind| file.tensors.contains_key(&format!("{}.{kind}", spec.name)));
        if header.version == FORMAT_INT8 && spec.is_pointwise() && in_8_bits() {
            int8.insert(spec.name.clone(), rounded(&mut file, &spec, values, LAYOUT)?);
        } else {
            let values = file.take(&weight, &spec.shape, LAYOUT)?;
            tensors.insert(weight, Tensor::from_vec(values, spec.shape.to_vec(), &Device::Cpu)?);
        }
    }
    let whitening = Whitening::take(&mut file, LAYOUT)?;
    file.refuse_rest(LAYOUT, |_| false)?;
    let mut weights = Weights { spec: header.spec, tensors, int8: None, whitening, layout: LAYOUT };
    if header.version == FORMAT_INT8 {
        weights.round(int8)?;
    }
    Ok(weights)
}

/// A 1x1 convolution of a file in 8 bits.
///
/// Errors: what is missing or misshapen, steps that are not above zero, -128.
fn rounded(file: &mut RawFile, spec: &ConvSpec, bias: Vec<f32>, layout: &'static str) -> Result<Rounded> {
    let name = format!("{}.weight", spec.name);
    let codes = match file.take_codes(&name, &spec.shape)? {
        Some(codes) if codes.contains(&i8::MIN) => return Err(Error::weights(format!("tensor `{name}` holds -128, which is no code"))),
        Some(codes) => codes,
        None if file.tensors.contains_key(&name) => return Err(Error::weights(format!("tensor `{name}` is not in 8 bits (I8)"))),
        None => return Err(Error::TensorMissing { name, layout }),
    };
    let mut above_zero = |kind: &str, n: usize| -> Result<Vec<f32>> {
        let name = format!("{}.{kind}", spec.name);
        let values = file.take(&name, &[n], layout)?;
        match values.iter().find(|v| **v <= 0.0) {
            Some(v) => Err(Error::weights(format!("tensor `{name}` holds {v}, which is not above zero"))),
            None => Ok(values),
        }
    };
    Ok(Rounded { codes, steps: above_zero("steps", spec.shape[0])?, scales: above_zero("scales", spec.shape[1])?, bias })
}

/// PyTorch's default epsilon of `BatchNorm2d`.
const BN_EPS: f32 = 1e-5;

fn torchvision(mut file: RawFile) -> Result<Weights> {
    const LAYOUT: &str = "torchvision";
    let mut tensors = BTreeMap::new();
    for spec in conv_specs() {
        let out = spec.shape[0];
        let mut weight = file.take(&format!("{}.weight", spec.torchvision), &spec.shape, LAYOUT)?;
        let mut norm = |kind: &str| file.take(&format!("{}.{kind}", spec.torchvision_norm), &[out], LAYOUT);
        let (gamma, beta, mean, var) = (norm("weight")?, norm("bias")?, norm("running_mean")?, norm("running_var")?);
        let mut bias = Vec::with_capacity(out);
        for (c, weights) in weight.chunks_exact_mut(spec.shape[1..].iter().product()).enumerate() {
            let scale = gamma[c] / (var[c] + BN_EPS).sqrt();
            weights.iter_mut().for_each(|w| *w *= scale);
            bias.push(beta[c] - mean[c] * scale);
        }
        tensors.insert(format!("{}.weight", spec.name), Tensor::from_vec(weight, spec.shape.to_vec(), &Device::Cpu)?);
        tensors.insert(format!("{}.bias", spec.name), Tensor::from_vec(bias, out, &Device::Cpu)?);
    }
    file.refuse_rest(LAYOUT, |name| {
        name.ends_with(".num_batches_tracked") || name.starts_with("features.18.") || name.starts_with("classifier.")
    })?;
    Ok(Weights { spec: ModelSpec::torchvision(), tensors, int8: None, whitening: None, layout: LAYOUT })
}

fn tensorflow(mut file: RawFile) -> Result<Weights> {
    const LAYOUT: &str = "tensorflow";
    let mut tensors = BTreeMap::new();
    for (i, spec) in conv_specs().into_iter().enumerate() {
        for (kind, shape) in [("weight", spec.shape.to_vec()), ("bias", vec![spec.shape[0]])] {
            let values = file.take(&format!("conv{i:02}.{kind}"), &shape, LAYOUT)?;
            tensors.insert(format!("{}.{kind}", spec.name), Tensor::from_vec(values, shape, &Device::Cpu)?);
        }
    }
    file.refuse_rest(LAYOUT, |name| name.starts_with("conv51.") || name.starts_with("conv52."))?;
    Ok(Weights { spec: ModelSpec::tensorflow(), tensors, int8: None, whitening: None, layout: LAYOUT })
}
