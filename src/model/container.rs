//! Weight files as containers: safetensors, PyTorch checkpoints old and new, ONNX. Tensors by the file's own names,
//! and nothing of what else such a file may hold.

use crate::error::{Error, Result};
use crate::pickle::{Node, Pickle};
use candle_core::{Device, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::io::Read;

/// A tensor of a file; types other than floats have no values.
pub(super) struct Raw {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// The tensors of a file by the file's own names.
pub(super) struct RawFile {
    pub tensors: HashMap<String, Raw>,
    pub metadata: HashMap<String, String>,
    /// Values of the tensors that are in 8 bits, which have none above.
    pub codes: HashMap<String, Vec<i8>>,
    /// ONNX only: each node's operator and the names of its inputs, in the file's order.
    pub nodes: Vec<(String, Vec<String>)>,
}

impl RawFile {
    pub fn of(tensors: HashMap<String, Raw>) -> Self {
        Self { tensors, metadata: HashMap::new(), codes: HashMap::new(), nodes: Vec::new() }
    }

    /// Recognises the container by its first bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.starts_with(b"PK\x03\x04") {
            read_pth(bytes)
        } else if bytes.starts_with(LEGACY) {
            read_legacy_pth(bytes)
        } else if bytes.len() >= 9 && bytes[8] == b'{' {
            read_safetensors(bytes)
        } else if bytes.first() == Some(&ONNX_IR_VERSION) {
            super::onnx::read(bytes)
        } else {
            Err(Error::weights("neither safetensors nor a PyTorch checkpoint nor ONNX"))
        }
    }

    /// Drops what wrappers put before every name.
    pub fn strip_prefixes(&mut self) {
        for prefix in ["module.", "model.", "backbone."] {
            if !self.tensors.is_empty() && self.tensors.keys().all(|k| k.starts_with(prefix)) {
                self.codes = std::mem::take(&mut self.codes).into_iter().map(|(k, v)| (k[prefix.len()..].to_string(), v)).collect();
                self.tensors = std::mem::take(&mut self.tensors).into_iter().map(|(k, v)| (k[prefix.len()..].to_string(), v)).collect();
            }
        }
    }

    /// Takes one tensor out.
    ///
    /// Errors: it is missing, has another shape, or holds a value that is not finite.
    pub fn take(&mut self, name: &str, shape: &[usize], layout: &'static str) -> Result<Vec<f32>> {
        let raw = self.tensors.remove(name).ok_or_else(|| Error::TensorMissing { name: name.into(), layout })?;
        if raw.shape != shape || raw.values.len() != shape.iter().product::<usize>() {
            return Err(Error::TensorShape { name: name.into(), expected: shape.to_vec(), found: raw.shape });
        }
        if let Some(v) = raw.values.iter().find(|v| !v.is_finite()) {
            return Err(Error::weights(format!("tensor `{name}` holds {v}")));
        }
        Ok(raw.values)
    }

    /// Takes one tensor in 8 bits out; `None` if it is not there, or not in 8 bits.
    ///
    /// Errors: another shape.
    pub fn take_codes(&mut self, name: &str, shape: &[usize]) -> Result<Option<Vec<i8>>> {
        let Some(codes) = self.codes.remove(name) else { return Ok(None) };
        let found = self.tensors.remove(name).map_or(Vec::new(), |raw| raw.shape);
        if found != shape || codes.len() != shape.iter().product::<usize>() {
            return Err(Error::TensorShape { name: name.into(), expected: shape.to_vec(), found });
        }
        Ok(Some(codes))
    }

    /// Takes one tensor out, whatever its shape, which must then be of the rank wanted.
    pub fn take_tensor(&mut self, name: &str, shape: &[usize], layout: &'static str) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.take(name, shape, layout)?, shape, &Device::Cpu)?)
    }

    /// Errors: tensors are left that `known` does not know.
    pub fn refuse_rest(&self, layout: &'static str, known: impl Fn(&str) -> bool) -> Result<()> {
        let mut names: Vec<String> = self.tensors.keys().filter(|k| !known(k)).cloned().collect();
        if names.is_empty() {
            return Ok(());
        }
        names.sort();
        names.truncate(4);
        Err(Error::TensorUnexpected { names, layout })
    }

    /// The first few names, for a message.
    pub fn some_names(&self) -> String {
        let mut names: Vec<_> = self.tensors.keys().cloned().collect();
        names.sort();
        names.truncate(4);
        if names.is_empty() {
            "no tensors".into()
        } else {
            names.join(", ")
        }
    }
}

/// The float tensors of a weight file of any container, by the file's own names without the prefixes of wrappers.
///
/// Errors: a container that is not read; a tensor whose values do not fit its shape or are not finite.
pub fn read_tensors(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>> {
    let mut file = RawFile::parse(bytes)?;
    file.strip_prefixes();
    // Counters and the like are no floats, and have no values here.
    let named: Vec<(String, Vec<usize>)> =
        file.tensors.iter().filter(|(_, r)| !r.values.is_empty()).map(|(n, r)| (n.clone(), r.shape.clone())).collect();
    named.into_iter().map(|(n, shape)| Ok((n.clone(), file.take_tensor(&n, &shape, "any")?))).collect()
}

/// Name, type, shape and bytes of a tensor that is written as it is.
pub(super) type Written = (String, safetensors::Dtype, Vec<usize>, Vec<u8>);

/// Our safetensors, sorted by name, with one string of metadata: the same tensors give the same bytes. `more` are not among `tensors`.
pub(super) fn write_safetensors(
    tensors: &BTreeMap<String, Tensor>,
    dtype: candle_core::DType,
    more: Vec<Written>,
    key: &str,
    header: String,
) -> Result<Vec<u8>> {
    use candle_core::DType;
    let mut data = more;
    for (name, tensor) in tensors {
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
    // One key only: the crate keeps metadata in a hash map, whose order would vary.
    safetensors::serialize(views, Some(HashMap::from([(key.to_string(), header)]))).map_err(|e| Error::weights(e.to_string()))
}

/// Tag of `ModelProto.ir_version`, which every ONNX writer puts first.
const ONNX_IR_VERSION: u8 = 0x08;

fn read_safetensors(bytes: &[u8]) -> Result<RawFile> {
    let fail = |e: safetensors::SafeTensorError| Error::weights(format!("safetensors: {e}"));
    let (_, header) = safetensors::SafeTensors::read_metadata(bytes).map_err(fail)?;
    let file = safetensors::SafeTensors::deserialize(bytes).map_err(fail)?;
    let (mut tensors, mut codes) = (HashMap::new(), HashMap::new());
    for (name, view) in file.tensors() {
        use safetensors::Dtype;
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => floats(data),
            Dtype::F16 => data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::BF16 => data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::F64 => data.chunks_exact(8).filter_map(|b| b.try_into().ok()).map(|b| f64::from_le_bytes(b) as f32).collect(),
            Dtype::I8 => {
                codes.insert(name.clone(), data.iter().map(|b| i8::from_le_bytes([*b])).collect());
                Vec::new()
            }
            // Counters such as `num_batches_tracked`: named, but never read.
            _ => Vec::new(),
        };
        tensors.insert(name, Raw { shape: view.shape().to_vec(), values });
    }
    Ok(RawFile { metadata: header.metadata().clone().unwrap_or_default(), codes, ..RawFile::of(tensors) })
}

pub(super) fn floats(data: &[u8]) -> Vec<f32> {
    data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Largest uncompressed entry of a checkpoint: a zip bomb ends here.
const MAX_ENTRY: u64 = 1 << 30;

/// A PyTorch checkpoint of version 1.6 or later, a zip archive: `*/data.pkl` describes tensors over the storages
/// `*/data/N`.
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
    let tensors = torch_tensors(&pickle)?;
    let mut storages: HashMap<String, Vec<u8>> = HashMap::new();
    let mut total = 0u64;
    for (_, t) in &tensors {
        if !storages.contains_key(&t.storage) {
            let data = read(&format!("{root}data/{}", t.storage), MAX_ENTRY)?;
            total += data.len() as u64;
            if total > MAX_ENTRY {
                return Err(Error::weights(format!("the checkpoint's storages are larger than {MAX_ENTRY} bytes")));
            }
            storages.insert(t.storage.clone(), data);
        }
    }
    decode_all(&tensors, |storage| storages.get(storage).map(Vec::as_slice))
}

/// Pickle of the number that begins a checkpoint of PyTorch before 1.6.
const LEGACY: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e";

/// A checkpoint of PyTorch before 1.6: pickles of a magic number, the version, the machine, the state dict and the
/// storages' keys, then each storage as a count and its raw values.
fn read_legacy_pth(bytes: &[u8]) -> Result<RawFile> {
    let mut at = LEGACY.len();
    let mut next = || -> Result<Pickle> {
        let (pickle, used) = Pickle::parse_prefix(bytes.get(at..).unwrap_or(&[]))?;
        at += used;
        Ok(pickle)
    };
    if *next()?.root() != Node::Int(1001) {
        return Err(Error::weights("PyTorch checkpoint of an unknown version: load and save it again with a newer PyTorch"));
    }
    let machine = next()?;
    let little = |(k, v): &(usize, usize)| machine.str(*k) == Some("little_endian") && *machine.get(*v) == Node::Bool(true);
    if !matches!(machine.root(), Node::Dict(items) if items.iter().any(little)) {
        return Err(Error::weights("PyTorch checkpoint that was not saved on a little-endian machine"));
    }
    let (pickle, keys) = (next()?, next()?);
    let tensors = torch_tensors(&pickle)?;
    let Node::List(ids) = keys.root() else { return Err(Error::weights("the checkpoint lists no storages")) };
    let mut storages: HashMap<&str, &[u8]> = HashMap::new();
    for key in ids.iter().filter_map(|id| keys.str(*id)) {
        let cut = || Error::weights(format!("the checkpoint ends within storage `{key}`"));
        let count = bytes.get(at..at.saturating_add(8)).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes).ok_or_else(cut)?;
        let width = tensors.iter().find(|(_, t)| t.storage == key).and_then(|(_, t)| t.width());
        let width = width.ok_or_else(|| Error::weights(format!("storage `{key}` has no tensor, or one of an unknown type")))?;
        let from = at + 8;
        let length = usize::try_from(count).ok().and_then(|n| n.checked_mul(width)).ok_or_else(cut)?;
        storages.insert(key, bytes.get(from..from.saturating_add(length)).ok_or_else(cut)?);
        at = from + length;
    }
    decode_all(&tensors, |storage| storages.get(storage).copied())
}

/// Names and descriptions of the tensors in a checkpoint's state dict.
fn torch_tensors(pickle: &Pickle) -> Result<Vec<(String, TorchTensor)>> {
    let items = state_dict(pickle).ok_or_else(|| Error::weights("the checkpoint holds no state dict (a dict of tensors)"))?;
    let mut tensors = Vec::new();
    for (key, value) in items {
        let Some(name) = pickle.str(*key) else { continue };
        let Some(t) = torch_tensor(pickle, *value) else { continue };
        tensors.push((name.to_string(), t.map_err(|why| Error::weights(format!("tensor `{name}`: {why}")))?));
    }
    Ok(tensors)
}

fn decode_all<'a>(tensors: &[(String, TorchTensor)], storage: impl Fn(&str) -> Option<&'a [u8]>) -> Result<RawFile> {
    let decode = |(name, t): &(String, TorchTensor)| {
        let raw = t.decode(storage(&t.storage).unwrap_or(&[])).map_err(|why| Error::weights(format!("tensor `{name}`: {why}")))?;
        Ok((name.clone(), raw))
    };
    Ok(RawFile::of(tensors.iter().map(decode).collect::<Result<_>>()?))
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
    /// Bytes per value.
    fn width(&self) -> Option<usize> {
        Some(match self.kind.as_str() {
            "DoubleStorage" | "LongStorage" => 8,
            "FloatStorage" | "IntStorage" => 4,
            "HalfStorage" | "BFloat16Storage" | "ShortStorage" => 2,
            "ByteStorage" | "CharStorage" | "BoolStorage" => 1,
            _ => return None,
        })
    }

    fn decode(&self, data: &[u8]) -> std::result::Result<Raw, String> {
        let raw = |values| Raw { shape: self.shape.clone(), values };
        let width = match self.kind.as_str() {
            "FloatStorage" | "HalfStorage" | "BFloat16Storage" | "DoubleStorage" => self.width().unwrap_or(4),
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
pub(super) fn read_for_tests(bytes: &[u8]) -> Result<Vec<NamedTensor>> {
    Ok(RawFile::parse(bytes)?.tensors.into_iter().map(|(n, r)| (n, r.shape, r.values)).collect())
}
