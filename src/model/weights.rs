//! Weight files, parsed from bytes: ours, torchvision's (.pth and safetensors), TensorFlow-derived.
//!
//! All end as the same thing: a [`ModelSpec`] and one folded weight and bias per convolution, by
//! our names. Memory is bounded by the file's own size (times two where f16 becomes f32).

use super::mobilenet_v2::{conv_specs, Padding, MIN_SIDE};
use super::pooling::Pooling;
use crate::error::{Error, Result};
use crate::pickle::{Node, Pickle};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::io::Read;

/// The only architecture so far.
pub const ARCHITECTURE: &str = "structvpr_mobilenet_v2_448";
/// Version of our safetensors header.
pub const FORMAT: &str = "1";
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
}

impl ModelSpec {
    /// Checks ranges; errors name the field.
    pub fn validate(&self) -> Result<()> {
        let bad = |what: String| Err(Error::weights(format!("header: {what}")));
        let side = MIN_SIDE..=MAX_SIDE;
        if !side.contains(&self.input_width) || !side.contains(&self.input_height) {
            return bad(format!("input size {}x{} is outside {MIN_SIDE}..={MAX_SIDE}", self.input_width, self.input_height));
        }
        if self.std.iter().any(|s| !s.is_finite() || *s <= 0.0) || self.mean.iter().any(|m| !m.is_finite()) {
            return bad(format!("mean {:?} or std {:?} is not usable", self.mean, self.std));
        }
        if let Pooling::Gem { p } = self.pooling {
            if !(0.1..=100.0).contains(&p) {
                return bad(format!("GeM p {p} is outside 0.1..=100"));
            }
        }
        if self.similarity_threshold.is_some_and(|t| !(-1.0..=1.0).contains(&t)) {
            return bad(format!("similarity_threshold {:?} is outside -1..=1", self.similarity_threshold));
        }
        Ok(())
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

/// A spec and its folded tensors, f32, by our names.
#[derive(Clone, Debug)]
pub struct Weights {
    /// What the header says, or the layout's defaults.
    pub spec: ModelSpec,
    /// `NAME.weight` and `NAME.bias` of every convolution.
    pub tensors: BTreeMap<String, Tensor>,
    /// Which layout was recognised.
    pub layout: &'static str,
}

/// A tensor in a file, not yet decoded.
struct Raw {
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// The tensors of a file by the file's own names.
struct RawFile {
    tensors: HashMap<String, Raw>,
    metadata: HashMap<String, String>,
}

impl Weights {
    /// Recognises the container (safetensors or PyTorch zip) and the naming scheme.
    ///
    /// Errors: a container we do not read; a missing, extra or misshapen tensor by name; a header
    /// of another architecture or version.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut file = if bytes.starts_with(b"PK\x03\x04") {
            read_pth(bytes)?
        } else if bytes.starts_with(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46") {
            return Err(Error::weights(
                "this is PyTorch's old (before 1.6) checkpoint format; load and save it again with a newer PyTorch",
            ));
        } else if bytes.len() >= 9 && bytes[8] == b'{' {
            read_safetensors(bytes)?
        } else {
            return Err(Error::weights("neither safetensors nor a PyTorch zip checkpoint"));
        };
        let strip = ["module.", "model.", "backbone."];
        for prefix in strip {
            if !file.tensors.is_empty() && file.tensors.keys().all(|k| k.starts_with(prefix)) {
                file.tensors = file.tensors.into_iter().map(|(k, v)| (k[prefix.len()..].to_string(), v)).collect();
            }
        }
        if file.metadata.contains_key("structvpr.format") {
            ours(file)
        } else if file.tensors.contains_key("features.0.0.weight") {
            torchvision(file)
        } else if file.tensors.contains_key("conv00.weight") {
            tensorflow(file)
        } else {
            let mut names: Vec<_> = file.tensors.keys().take(200).cloned().collect();
            names.sort();
            names.truncate(4);
            Err(Error::weights(format!(
                "no known naming scheme: expected our header, torchvision's `features.0.0.weight` or TensorFlow's `conv00.weight`; the file has {}",
                if names.is_empty() { "no tensors".into() } else { names.join(", ") }
            )))
        }
    }

    /// Our safetensors, tensors in f16 or f32, sorted by name: the same weights give the same bytes.
    ///
    /// Errors: another `dtype`, or what the format's crate says.
    pub fn to_bytes(&self, dtype: DType) -> Result<Vec<u8>> {
        self.spec.validate()?;
        let mut data = Vec::with_capacity(self.tensors.len());
        for (name, tensor) in &self.tensors {
            let values = tensor.flatten_all()?.to_vec1::<f32>()?;
            let (kind, bytes) = match dtype {
                DType::F32 => (safetensors::Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()),
                DType::F16 => {
                    let halves: Vec<half::f16> = values.iter().map(|v| half::f16::from_f32(*v)).collect();
                    if let Some(i) = halves.iter().position(|h| !h.is_finite()) {
                        return Err(Error::weights(format!("`{name}` holds {}, which f16 cannot", values[i])));
                    }
                    (safetensors::Dtype::F16, halves.iter().flat_map(|h| h.to_le_bytes()).collect())
                }
                other => return Err(Error::weights(format!("dtype {other:?} (allowed: f16, f32)"))),
            };
            data.push((name.clone(), kind, tensor.dims().to_vec(), bytes));
        }
        let views = data
            .iter()
            .map(|(name, kind, shape, bytes)| Ok((name.clone(), safetensors::tensor::TensorView::new(*kind, shape.clone(), bytes)?)))
            .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
            .map_err(|e| Error::weights(e.to_string()))?;
        let spec = serde_json::to_string(&self.spec).map_err(|e| Error::weights(e.to_string()))?;
        // One key only: the crate keeps metadata in a hash map, whose order would vary.
        let header = format!("{{\"architecture\":\"{ARCHITECTURE}\",\"version\":\"{FORMAT}\",\"spec\":{spec}}}");
        let metadata = HashMap::from([("structvpr.format".to_string(), header)]);
        safetensors::serialize(views, Some(metadata)).map_err(|e| Error::weights(e.to_string()))
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
    if header.version != FORMAT {
        return Err(Error::weights(format!("header version {}; this version reads {FORMAT}", header.version)));
    }
    header.spec.validate()?;
    let mut tensors = BTreeMap::new();
    for spec in conv_specs() {
        for (kind, shape) in [("weight", spec.shape.to_vec()), ("bias", vec![spec.shape[0]])] {
            let name = format!("{}.{kind}", spec.name);
            let values = take(&mut file, &name, &shape, LAYOUT)?;
            tensors.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
        }
    }
    refuse_rest(&file, LAYOUT, |_| false)?;
    Ok(Weights { spec: header.spec, tensors, layout: LAYOUT })
}

/// PyTorch's default epsilon of `BatchNorm2d`.
const BN_EPS: f32 = 1e-5;

fn torchvision(mut file: RawFile) -> Result<Weights> {
    const LAYOUT: &str = "torchvision";
    let mut tensors = BTreeMap::new();
    for spec in conv_specs() {
        let out = spec.shape[0];
        let mut weight = take(&mut file, &format!("{}.weight", spec.torchvision), &spec.shape, LAYOUT)?;
        let mut norm = |kind: &str| take(&mut file, &format!("{}.{kind}", spec.torchvision_norm), &[out], LAYOUT);
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
    refuse_rest(&file, LAYOUT, |name| {
        name.ends_with(".num_batches_tracked") || name.starts_with("features.18.") || name.starts_with("classifier.")
    })?;
    Ok(Weights { spec: ModelSpec::torchvision(), tensors, layout: LAYOUT })
}

fn tensorflow(mut file: RawFile) -> Result<Weights> {
    const LAYOUT: &str = "tensorflow";
    let mut tensors = BTreeMap::new();
    for (i, spec) in conv_specs().into_iter().enumerate() {
        for (kind, shape) in [("weight", spec.shape.to_vec()), ("bias", vec![spec.shape[0]])] {
            let values = take(&mut file, &format!("conv{i:02}.{kind}"), &shape, LAYOUT)?;
            tensors.insert(format!("{}.{kind}", spec.name), Tensor::from_vec(values, shape, &Device::Cpu)?);
        }
    }
    refuse_rest(&file, LAYOUT, |name| name.starts_with("conv51.") || name.starts_with("conv52."))?;
    Ok(Weights { spec: ModelSpec::tensorflow(), tensors, layout: LAYOUT })
}

fn take(file: &mut RawFile, name: &str, shape: &[usize], layout: &'static str) -> Result<Vec<f32>> {
    let raw = file.tensors.remove(name).ok_or_else(|| Error::TensorMissing { name: name.into(), layout })?;
    if raw.shape != shape {
        return Err(Error::TensorShape { name: name.into(), expected: shape.to_vec(), found: raw.shape });
    }
    if let Some(v) = raw.values.iter().find(|v| !v.is_finite()) {
        return Err(Error::weights(format!("tensor `{name}` holds {v}")));
    }
    Ok(raw.values)
}

fn refuse_rest(file: &RawFile, layout: &'static str, known: impl Fn(&str) -> bool) -> Result<()> {
    let mut names: Vec<String> = file.tensors.keys().filter(|k| !known(k)).cloned().collect();
    if names.is_empty() {
        return Ok(());
    }
    names.sort();
    names.truncate(4);
    Err(Error::TensorUnexpected { names, layout })
}

fn read_safetensors(bytes: &[u8]) -> Result<RawFile> {
    let fail = |e: safetensors::SafeTensorError| Error::weights(format!("safetensors: {e}"));
    let (_, header) = safetensors::SafeTensors::read_metadata(bytes).map_err(fail)?;
    let file = safetensors::SafeTensors::deserialize(bytes).map_err(fail)?;
    let mut tensors = HashMap::new();
    for (name, view) in file.tensors() {
        use safetensors::Dtype;
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => floats(data),
            Dtype::F16 => data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::BF16 => data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::F64 => data.chunks_exact(8).filter_map(|b| b.try_into().ok()).map(|b| f64::from_le_bytes(b) as f32).collect(),
            // Counters such as `num_batches_tracked`: named, but never read.
            _ => Vec::new(),
        };
        tensors.insert(name, Raw { shape: view.shape().to_vec(), values });
    }
    Ok(RawFile { tensors, metadata: header.metadata().clone().unwrap_or_default() })
}

fn floats(data: &[u8]) -> Vec<f32> {
    data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Largest uncompressed entry of a checkpoint: a zip bomb ends here.
const MAX_ENTRY: u64 = 1 << 30;

/// A PyTorch zip checkpoint: `*/data.pkl` describes tensors over the storages `*/data/N`.
fn read_pth(bytes: &[u8]) -> Result<RawFile> {
    let fail = |e: zip::result::ZipError| Error::weights(format!("zip: {e}"));
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(bytes)).map_err(fail)?;
    let pkl = archive.file_names().flatten().find(|n| *n == "data.pkl" || n.ends_with("/data.pkl")).map(|n| n.into_owned());
    let pkl = pkl.ok_or_else(|| Error::weights("the zip has no data.pkl: not a PyTorch checkpoint"))?;
    let root = pkl[..pkl.len() - "data.pkl".len()].to_string();
    let mut read = |name: &str, limit: u64| -> Result<Vec<u8>> {
        let entry = archive.by_name(name).map_err(|e| Error::weights(format!("zip entry `{name}`: {e}")))?;
        let mut out = Vec::new();
        entry.take(limit + 1).read_to_end(&mut out).map_err(|e| Error::weights(format!("zip entry `{name}`: {e}")))?;
        if out.len() as u64 > limit {
            return Err(Error::weights(format!("zip entry `{name}` is larger than {limit} bytes")));
        }
        Ok(out)
    };
    let pickle = Pickle::parse(&read(&pkl, 64 << 20)?)?;
    let items = state_dict(&pickle).ok_or_else(|| Error::weights("the checkpoint holds no state dict (a dict of tensors)"))?;
    let mut storages: HashMap<String, Vec<u8>> = HashMap::new();
    let mut total = 0u64;
    let mut tensors = HashMap::new();
    for (key, value) in items {
        let Some(name) = pickle.str(*key) else { continue };
        let Some(t) = torch_tensor(&pickle, *value) else { continue };
        let t = t.map_err(|why| Error::weights(format!("tensor `{name}`: {why}")))?;
        if !storages.contains_key(&t.storage) {
            let data = read(&format!("{root}data/{}", t.storage), MAX_ENTRY)?;
            total += data.len() as u64;
            if total > MAX_ENTRY {
                return Err(Error::weights(format!("the checkpoint's storages are larger than {MAX_ENTRY} bytes")));
            }
            storages.insert(t.storage.clone(), data);
        }
        let data = storages.get(&t.storage).map(Vec::as_slice).unwrap_or(&[]);
        tensors.insert(name.to_string(), t.decode(data).map_err(|why| Error::weights(format!("tensor `{name}`: {why}")))?);
    }
    Ok(RawFile { tensors, metadata: HashMap::new() })
}

type Items<'a> = &'a [(usize, usize)];

/// The dict with tensors in it: the root, or what it holds under a usual name.
fn state_dict(pickle: &Pickle) -> Option<Items<'_>> {
    fn dict(node: &Node) -> Option<Items<'_>> {
        match node {
            Node::Dict(items) | Node::Call { items, .. } => Some(items),
            _ => None,
        }
    }
    let root = dict(pickle.root())?;
    if root.iter().any(|(_, v)| torch_tensor(pickle, *v).is_some()) {
        return Some(root);
    }
    let wanted = ["state_dict", "model", "model_state_dict", "net"];
    root.iter().find(|(k, _)| pickle.str(*k).is_some_and(|k| wanted.contains(&k))).and_then(|(_, v)| dict(pickle.get(*v)))
}

struct TorchTensor {
    storage: String,
    kind: String,
    offset: usize,
    shape: Vec<usize>,
    stride: Vec<usize>,
}

/// `None`: not a tensor. `Some(Err)`: a tensor that contradicts itself.
fn torch_tensor(pickle: &Pickle, id: usize) -> Option<std::result::Result<TorchTensor, String>> {
    let (module, name, args, ..) = pickle.call(id)?;
    match (module, name) {
        ("torch._utils", "_rebuild_tensor_v2") => {}
        ("torch._utils", "_rebuild_parameter") => {
            // One level only: a parameter holds a tensor, never another parameter.
            let inner = *args.first()?;
            return match pickle.call(inner)? {
                ("torch._utils", "_rebuild_tensor_v2", ..) => torch_tensor(pickle, inner),
                _ => None,
            };
        }
        _ => return None,
    }
    let parse = || -> Option<TorchTensor> {
        let Node::Persistent(pid) = pickle.get(*args.first()?) else { return None };
        let pid = pickle.seq(*pid)?;
        let Node::Global(_, kind) = pickle.get(*pid.get(1)?) else { return None };
        let sizes = |id: usize| -> Option<Vec<usize>> { pickle.seq(id)?.iter().map(|i| usize::try_from(pickle.int(*i)?).ok()).collect() };
        Some(TorchTensor {
            storage: pickle.str(*pid.get(2)?)?.to_string(),
            kind: kind.clone(),
            offset: usize::try_from(pickle.int(*args.get(1)?)?).ok()?,
            shape: sizes(*args.get(2)?)?,
            stride: sizes(*args.get(3)?)?,
        })
    };
    Some(parse().ok_or_else(|| "its description is malformed".to_string()))
}

impl TorchTensor {
    fn decode(&self, data: &[u8]) -> std::result::Result<Raw, String> {
        let raw = |values| Raw { shape: self.shape.clone(), values };
        let width = match self.kind.as_str() {
            "FloatStorage" => 4,
            "HalfStorage" | "BFloat16Storage" => 2,
            "DoubleStorage" => 8,
            // Counters: named, but never read.
            _ => return Ok(raw(Vec::new())),
        };
        if self.shape.len() > 8 || self.stride.len() != self.shape.len() {
            return Err(format!("shape {:?} with strides {:?}", self.shape, self.stride));
        }
        let count = self.shape.iter().try_fold(1usize, |a, b| a.checked_mul(*b)).ok_or("its size overflows")?;
        // Expanded tensors (stride 0) could claim any size over a small storage.
        if count > data.len() / width {
            return Err(format!("shape {:?} wants {count} values, its storage holds {}", self.shape, data.len() / width));
        }
        let value = |index: usize| -> Option<f32> {
            let b = data.get(index.checked_mul(width)?..index.checked_add(1)?.checked_mul(width)?)?;
            Some(match self.kind.as_str() {
                "FloatStorage" => f32::from_le_bytes(b.try_into().ok()?),
                "HalfStorage" => half::f16::from_le_bytes(b.try_into().ok()?).to_f32(),
                "BFloat16Storage" => half::bf16::from_le_bytes(b.try_into().ok()?).to_f32(),
                _ => f64::from_le_bytes(b.try_into().ok()?) as f32,
            })
        };
        let mut values = Vec::with_capacity(count);
        for flat in 0..count {
            let (mut rest, mut at) = (flat, self.offset);
            for (n, s) in self.shape.iter().zip(&self.stride).rev() {
                at = (rest % n).checked_mul(*s).and_then(|d| at.checked_add(d)).ok_or("an index overflows")?;
                rest /= n;
            }
            values.push(value(at).ok_or_else(|| format!("value {flat} lies outside its storage"))?);
        }
        Ok(raw(values))
    }
}

/// Name, shape and values.
#[cfg(test)]
pub(super) type NamedTensor = (String, Vec<usize>, Vec<f32>);

/// The tensors of a checkpoint.
#[cfg(test)]
pub(super) fn read_pth_for_tests(bytes: &[u8]) -> Result<Vec<NamedTensor>> {
    Ok(read_pth(bytes)?.tensors.into_iter().map(|(n, r)| (n, r.shape, r.values)).collect())
}
