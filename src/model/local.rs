//! Networks for local features and matching: which file is which, their weights by one naming, and the file of ours
//! that they are converted to.

use super::container::{write_safetensors, RawFile};
use super::lightglue::LightGlue;
use super::superglue::{Side, SuperGlue};
use super::superpoint::{squeeze_specs, vgg_specs, Dense, Spec, SuperPoint};
use super::xfeat::{self, XFeat};
use super::{lightglue, superglue, superpoint};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// Key of our header.
const HEADER: &str = "structvpr.local";
/// Version of our header.
const VERSION: &str = "1";
/// PyTorch's default epsilon of batch norm.
const BN_EPS: f32 = 1e-5;

/// The networks that we build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Architecture {
    /// SuperPoint with the VGG encoder of its paper.
    SuperpointVgg,
    /// SuperPoint's detector alone.
    MagicpointVgg,
    /// SuperPoint's interface on a squeeze-and-expand encoder.
    SuperpointSqueeze,
    /// XFeat.
    Xfeat,
    /// SuperGlue: matches features of SuperPoint.
    Superglue,
    /// LightGlue: matches features of SuperPoint.
    Lightglue,
    /// LighterGlue: matches features of XFeat.
    Lighterglue,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::SuperpointVgg,
        Self::MagicpointVgg,
        Self::SuperpointSqueeze,
        Self::Xfeat,
        Self::Superglue,
        Self::Lightglue,
        Self::Lighterglue,
    ];

    /// Name as in settings, files and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::SuperpointVgg => "superpoint_vgg",
            Self::MagicpointVgg => "magicpoint_vgg",
            Self::SuperpointSqueeze => "superpoint_squeeze",
            Self::Xfeat => "xfeat",
            Self::Superglue => "superglue",
            Self::Lightglue => "lightglue",
            Self::Lighterglue => "lighterglue",
        }
    }

    /// Name and shape of every tensor, batch norm folded.
    pub fn tensors(self) -> Vec<(String, Vec<usize>)> {
        let convs = |specs: Vec<Spec>| {
            let both = |(name, shape): Spec| [(format!("{name}.weight"), shape.to_vec()), (format!("{name}.bias"), vec![shape[0]])];
            specs.into_iter().flat_map(both).collect()
        };
        match self {
            Self::SuperpointVgg => convs(vgg_specs()),
            Self::MagicpointVgg => convs(vgg_specs().into_iter().filter(|(n, _)| !n.starts_with("convD")).collect()),
            Self::SuperpointSqueeze => convs(squeeze_specs()),
            Self::Xfeat => convs(xfeat::specs().into_iter().map(|(s, _)| s).collect()),
            Self::Superglue => superglue::tensors(),
            Self::Lightglue => lightglue::tensors(lightglue::LIGHTGLUE),
            Self::Lighterglue => lightglue::tensors(lightglue::LIGHTERGLUE),
        }
    }
}

/// The tensors of a network by our names, f32, batch norm folded.
#[derive(Clone, Debug)]
pub struct LocalWeights {
    /// Which network.
    pub architecture: Architecture,
    /// The naming scheme that was recognised.
    pub layout: &'static str,
    /// By our names.
    pub tensors: BTreeMap<String, Tensor>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    architecture: Architecture,
    version: String,
}

impl LocalWeights {
    /// Recognises the container (PyTorch, ONNX, safetensors) and the network.
    ///
    /// Errors: a file that is none of them; a missing, extra or misshapen tensor, or one with a value that is not
    /// finite, by name.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut file = RawFile::parse(bytes)?;
        file.strip_prefixes();
        let has = |name: &str| file.tensors.contains_key(name);
        if let Some(text) = file.metadata.get(HEADER) {
            let header: Header = serde_json::from_str(text).map_err(|e| Error::weights(format!("header `{HEADER}`: {e}")))?;
            if header.version != VERSION {
                return Err(Error::weights(format!("header version {}; this version reads {VERSION}", header.version)));
            }
            return plain(file, header.architecture, "structvpr local features");
        }
        if has("conv1a.weight") {
            plain(file, Architecture::SuperpointVgg, "SuperPoint")
        } else if has("encoder.block1.0.0.weight") {
            magicpoint(file)
        } else if has("block1.0.layer.0.weight") {
            xfeat_weights(file)
        } else if has("bin_score") {
            let (layout, tensors) = ("SuperGlue", superglue::fold(&mut file)?);
            file.refuse_rest(layout, |n| n.ends_with(".num_batches_tracked"))?;
            Ok(Self { architecture: Architecture::Superglue, layout, tensors })
        } else if lightglue::is(&file) {
            let (sizes, tensors) = lightglue::read(&mut file)?;
            let architecture = if sizes == lightglue::LIGHTGLUE { Architecture::Lightglue } else { Architecture::Lighterglue };
            Ok(Self { architecture, layout: "LightGlue", tensors })
        } else if file.nodes.iter().filter(|(op, _)| op == "Conv").count() == squeeze_specs().len() {
            squeeze(file)
        } else {
            Err(Error::weights(format!(
                "no known network for local features: expected SuperPoint's `conv1a.weight`, MagicPoint's `encoder.block1.0.0.weight`, \
                 XFeat's `block1.0.layer.0.weight`, SuperGlue's `bin_score`, LightGlue's `posenc.Wr.weight` or an ONNX graph of the squeeze network; the file has {}",
                file.some_names()
            )))
        }
    }

    /// A safetensors file of ours, tensors in f16 or f32: the same weights give the same bytes.
    pub fn to_bytes(&self, dtype: DType) -> Result<Vec<u8>> {
        let header = Header { architecture: self.architecture, version: VERSION.into() };
        let header = serde_json::to_string(&header).map_err(|e| Error::weights(e.to_string()))?;
        write_safetensors(&self.tensors, dtype, Vec::new(), HEADER, header)
    }

    /// Of names, shapes and values: the same weights in another container have the same.
    pub fn sha256(&self) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(self.architecture.name());
        for (name, tensor) in &self.tensors {
            hash.update(name.as_bytes());
            for v in tensor.flatten_all()?.to_vec1::<f32>()? {
                hash.update(v.to_le_bytes());
            }
        }
        Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
    }
}

/// A file that has our names already.
fn plain(mut file: RawFile, architecture: Architecture, layout: &'static str) -> Result<LocalWeights> {
    let mut tensors = BTreeMap::new();
    for (name, shape) in architecture.tensors() {
        let tensor = file.take_tensor(&name, &shape, layout)?;
        tensors.insert(name, tensor);
    }
    file.refuse_rest(layout, |_| false)?;
    Ok(LocalWeights { architecture, layout, tensors })
}

/// Scales `weight` (rows of outputs) and returns the bias that batch norm leaves. `affine`: its own scale and shift.
pub(super) fn fold_norm(
    weight: &mut [f32],
    bias: Option<Vec<f32>>,
    mean: &[f32],
    var: &[f32],
    affine: Option<(&[f32], &[f32])>,
) -> Vec<f32> {
    let outputs = mean.len();
    let each = weight.len() / outputs.max(1);
    (0..outputs)
        .map(|o| {
            let (gamma, beta) = affine.map_or((1.0, 0.0), |(g, b)| (g[o], b[o]));
            let scale = gamma / (var[o] + BN_EPS).sqrt();
            weight[o * each..(o + 1) * each].iter_mut().for_each(|w| *w *= scale);
            beta + (bias.as_ref().map_or(0.0, |b| b[o]) - mean[o]) * scale
        })
        .collect()
}

fn insert(tensors: &mut BTreeMap<String, Tensor>, name: &str, weight: Vec<f32>, shape: &[usize], bias: Vec<f32>) -> Result<()> {
    let n = bias.len();
    tensors.insert(format!("{name}.weight"), Tensor::from_vec(weight, shape, &Device::Cpu)?);
    tensors.insert(format!("{name}.bias"), Tensor::from_vec(bias, n, &Device::Cpu)?);
    Ok(())
}

/// MagicPoint as trained in PyTorch: each convolution of the encoder is followed by batch norm.
fn magicpoint(mut file: RawFile) -> Result<LocalWeights> {
    const LAYOUT: &str = "MagicPoint";
    let mut tensors = BTreeMap::new();
    for (at, (name, shape)) in vgg_specs().into_iter().filter(|(n, _)| !n.starts_with("convD")).enumerate() {
        let theirs = match name.as_str() {
            "convPa" => "detector.conv".to_string(),
            "convPb" => "detector.out".to_string(),
            _ => format!("encoder.block{}.{}.0", at / 2 + 1, at % 2),
        };
        let mut weight = file.take(&format!("{theirs}.weight"), &shape, LAYOUT)?;
        let mut bias = file.take(&format!("{theirs}.bias"), &shape[..1], LAYOUT)?;
        if let Some(block) = theirs.strip_suffix(".0") {
            let mut norm = |kind: &str| file.take(&format!("{block}.1.{kind}"), &shape[..1], LAYOUT);
            let (gamma, beta, mean, var) = (norm("weight")?, norm("bias")?, norm("running_mean")?, norm("running_var")?);
            bias = fold_norm(&mut weight, Some(bias), &mean, &var, Some((&gamma, &beta)));
        }
        insert(&mut tensors, &name, weight, &shape, bias)?;
    }
    file.refuse_rest(LAYOUT, |n| n.ends_with(".num_batches_tracked"))?;
    Ok(LocalWeights { architecture: Architecture::MagicpointVgg, layout: LAYOUT, tensors })
}

fn xfeat_weights(mut file: RawFile) -> Result<LocalWeights> {
    const LAYOUT: &str = "XFeat";
    let mut tensors = BTreeMap::new();
    for ((name, shape), norm) in xfeat::specs() {
        if norm {
            let mut weight = file.take(&format!("{name}.layer.0.weight"), &shape, LAYOUT)?;
            let mean = file.take(&format!("{name}.layer.1.running_mean"), &shape[..1], LAYOUT)?;
            let var = file.take(&format!("{name}.layer.1.running_var"), &shape[..1], LAYOUT)?;
            let bias = fold_norm(&mut weight, None, &mean, &var, None);
            insert(&mut tensors, &name, weight, &shape, bias)?;
        } else {
            let weight = file.take(&format!("{name}.weight"), &shape, LAYOUT)?;
            let bias = file.take(&format!("{name}.bias"), &shape[..1], LAYOUT)?;
            insert(&mut tensors, &name, weight, &shape, bias)?;
        }
    }
    file.refuse_rest(LAYOUT, |n| n.ends_with(".num_batches_tracked") || n.starts_with("fine_matcher.") || n.starts_with("_"))?;
    Ok(LocalWeights { architecture: Architecture::Xfeat, layout: LAYOUT, tensors })
}

/// An ONNX graph whose tensors have numbers for names: the convolutions in the order of its nodes.
fn squeeze(mut file: RawFile) -> Result<LocalWeights> {
    const LAYOUT: &str = "ONNX graph of the squeeze network";
    let mut tensors = BTreeMap::new();
    let nodes: Vec<Vec<String>> = file.nodes.iter().filter(|(op, _)| op == "Conv").map(|(_, i)| i.clone()).collect();
    for ((name, shape), inputs) in squeeze_specs().into_iter().zip(nodes) {
        let [_, weight, bias] = inputs.as_slice() else {
            return Err(Error::weights(format!("ONNX: the convolution for `{name}` has {} inputs, expected 3", inputs.len())));
        };
        let (weight, bias) = (file.take(weight, &shape, LAYOUT)?, file.take(bias, &shape[..1], LAYOUT)?);
        insert(&mut tensors, &name, weight, &shape, bias)?;
    }
    Ok(LocalWeights { architecture: Architecture::SuperpointSqueeze, layout: LAYOUT, tensors })
}

/// A network that finds and describes points.
#[derive(Debug)]
pub struct LocalNet {
    architecture: Architecture,
    sha256: String,
    net: Net,
}

#[derive(Debug)]
enum Net {
    SuperPoint(Box<SuperPoint>),
    XFeat(XFeat),
}

impl LocalNet {
    /// Builds from parsed weights.
    ///
    /// Errors: weights of a network that describes no points.
    pub fn new(weights: &LocalWeights) -> Result<Self> {
        let net = match weights.architecture {
            Architecture::SuperpointVgg => Net::SuperPoint(Box::new(SuperPoint::vgg(&weights.tensors)?)),
            Architecture::SuperpointSqueeze => Net::SuperPoint(Box::new(SuperPoint::squeeze(&weights.tensors)?)),
            Architecture::Xfeat => Net::XFeat(XFeat::new(&weights.tensors)?),
            Architecture::MagicpointVgg => {
                return Err(Error::weights("these are MagicPoint's weights: they detect points but do not describe them"))
            }
            matcher @ (Architecture::Superglue | Architecture::Lightglue | Architecture::Lighterglue) => {
                return Err(Error::weights(format!("these are weights of {}: they match features but find none", matcher.name())))
            }
        };
        Ok(Self { architecture: weights.architecture, sha256: weights.sha256()?, net })
    }

    /// Which network.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Hash of its weights.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Height and width must be multiples of this.
    pub fn multiple(&self) -> usize {
        match self.net {
            Net::SuperPoint(_) => superpoint::CELL,
            Net::XFeat(_) => xfeat::MULTIPLE,
        }
    }

    /// Values of a descriptor.
    pub fn dim(&self) -> usize {
        match self.net {
            Net::SuperPoint(_) => superpoint::DESCRIPTOR,
            Net::XFeat(_) => xfeat::DESCRIPTOR,
        }
    }

    /// What the network says of every cell. `luma`: 1 x 1 x H x W, 0 to 1.
    pub fn dense(&self, luma: &Tensor) -> Result<Dense> {
        match &self.net {
            Net::SuperPoint(net) => net.dense(luma),
            Net::XFeat(net) => net.dense(luma),
        }
    }
}

/// A network that matches features.
#[derive(Debug)]
pub enum LearnedMatcher {
    /// With optimal transport.
    SuperGlue(SuperGlue),
    /// With a double softmax.
    LightGlue(LightGlue),
}

impl LearnedMatcher {
    /// From parsed weights.
    ///
    /// Errors: weights of a network that matches nothing.
    pub fn new(weights: &LocalWeights) -> Result<Self> {
        Ok(match weights.architecture {
            Architecture::Superglue => Self::SuperGlue(SuperGlue::new(&weights.tensors)?),
            Architecture::Lightglue => Self::LightGlue(LightGlue::new(lightglue::LIGHTGLUE, &weights.tensors)?),
            Architecture::Lighterglue => Self::LightGlue(LightGlue::new(lightglue::LIGHTERGLUE, &weights.tensors)?),
            other => {
                let reason = format!("these are weights of {}; SuperGlue and LightGlue match features", other.name());
                return Err(Error::weights(reason));
            }
        })
    }

    /// Name as in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::SuperGlue(_) => "superglue",
            Self::LightGlue(_) => "lightglue",
        }
    }

    /// Query point, reference point and probability of every match, in order of the query.
    ///
    /// Errors: descriptors of another size than the network's.
    pub fn matches(&self, query: &Side, reference: &Side) -> Result<Vec<(usize, usize, f32)>> {
        match self {
            Self::SuperGlue(net) => net.matches(query, reference),
            Self::LightGlue(net) => net.matches(query, reference),
        }
    }
}
