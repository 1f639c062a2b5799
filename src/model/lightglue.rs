//! LightGlue (Lindenberger et al., ICCV 2023): matches local features with a graph network whose attention is over
//! relative positions, and a double softmax in place of optimal transport. LighterGlue is the same, smaller, for XFeat.
//!
//! All layers are run: leaving early would make a match depend on every other of the image. Both weights are under
//! Apache-2.0; SuperPoint's, which the larger one matches, are not.

use super::container::RawFile;
use super::layers::{attention, Rows};
use super::superglue::{mutual_best, Side};
use crate::error::{Error, Result};
use candle_core::{Device, Tensor, D};
use std::collections::BTreeMap;

/// Of LayerNorm, as PyTorch's default.
const EPS: f32 = 1e-5;

/// Sizes of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    /// Values of the descriptors that it matches.
    input: usize,
    /// Values inside.
    dim: usize,
    layers: usize,
    heads: usize,
}

/// For SuperPoint.
pub(super) const LIGHTGLUE: Sizes = Sizes { input: 256, dim: 256, layers: 9, heads: 4 };
/// For XFeat.
pub(super) const LIGHTERGLUE: Sizes = Sizes { input: 64, dim: 96, layers: 6, heads: 1 };

/// Parts of a block and their outputs and inputs, in multiples of `dim`.
const SELF: [(&str, usize, usize); 4] = [("Wqkv", 3, 1), ("out_proj", 1, 1), ("ffn.0", 2, 2), ("ffn.3", 1, 2)];
const CROSS: [(&str, usize, usize); 5] = [("to_qk", 1, 1), ("to_v", 1, 1), ("to_out", 1, 1), ("ffn.0", 2, 2), ("ffn.3", 1, 2)];

/// Names and shapes of what is used, by the names of the released files.
pub(super) fn tensors(sizes: Sizes) -> Vec<(String, Vec<usize>)> {
    let d = sizes.dim;
    let mut all = vec![("posenc.Wr.weight".to_string(), vec![d / sizes.heads / 2, 2])];
    let mut linear = |name: String, outputs: usize, inputs: usize| {
        all.push((format!("{name}.weight"), vec![outputs, inputs]));
        all.push((format!("{name}.bias"), vec![outputs]));
    };
    if sizes.input != d {
        linear("input_proj".into(), d, sizes.input);
    }
    let mut norms = Vec::new();
    for at in 0..sizes.layers {
        for (block, parts) in [("self_attn", &SELF[..]), ("cross_attn", &CROSS[..])] {
            for (part, o, i) in parts {
                linear(format!("{block}.{at}.{part}"), o * d, i * d);
            }
            norms.push(format!("{block}.{at}.ffn.1"));
        }
    }
    let last = format!("log_assignment.{}", sizes.layers - 1);
    linear(format!("{last}.matchability"), 1, d);
    linear(format!("{last}.final_proj"), d, d);
    for norm in norms {
        all.push((format!("{norm}.weight"), vec![2 * d]));
        all.push((format!("{norm}.bias"), vec![2 * d]));
    }
    all
}

/// The name in a released file: newer ones are nested.
fn released(name: &str) -> String {
    let name = name.strip_prefix("matcher.").unwrap_or(name);
    match name.strip_prefix("transformers.").and_then(|n| n.split_once('.')) {
        // transformers.3.self_attn.ffn.0 is self_attn.3.ffn.0.
        Some((at, rest)) => match rest.split_once('.') {
            Some((block, part)) => format!("{block}.{at}.{part}"),
            None => name.to_string(),
        },
        None => name.to_string(),
    }
}

/// Whether a file's names are of this network.
pub(super) fn is(file: &RawFile) -> bool {
    file.tensors.keys().any(|k| released(k) == "posenc.Wr.weight")
}

/// A checkpoint's tensors and which of the two it is. What serves only early leaving and training is left out.
pub(super) fn read(file: &mut RawFile) -> Result<(Sizes, BTreeMap<String, Tensor>)> {
    const LAYOUT: &str = "LightGlue";
    file.tensors = std::mem::take(&mut file.tensors).into_iter().map(|(k, v)| (released(&k), v)).collect();
    let sizes = if file.tensors.contains_key("input_proj.weight") { LIGHTERGLUE } else { LIGHTGLUE };
    let mut out = BTreeMap::new();
    for (name, shape) in tensors(sizes) {
        let values = file.take_tensor(&name, &shape, LAYOUT)?;
        out.insert(name, values);
    }
    let unused = |n: &str| ["token_confidence.", "log_assignment.", "confidence_thresholds"].iter().any(|p| n.starts_with(p));
    // XFeat's file may hold its extractor too.
    file.refuse_rest(LAYOUT, |n| unused(n) || n.starts_with("extractor.") || n.starts_with("net."))?;
    Ok((sizes, out))
}

#[derive(Debug)]
struct FeedForward {
    hidden: Rows,
    norm: (Tensor, Tensor),
    out: Rows,
}

impl FeedForward {
    /// `x` and what it makes of `x` beside `message`.
    fn add(&self, x: &Tensor, message: &Tensor) -> Result<Tensor> {
        let hidden = self.hidden.forward(&Tensor::cat(&[x, message], D::Minus1)?)?;
        let hidden = candle_nn::ops::layer_norm(&hidden, &self.norm.0, &self.norm.1, EPS)?.gelu_erf()?;
        Ok((x + self.out.forward(&hidden)?)?)
    }
}

#[derive(Debug)]
struct SelfBlock {
    query: Rows,
    key: Rows,
    value: Rows,
    out: Rows,
    ffn: FeedForward,
}

#[derive(Debug)]
struct CrossBlock {
    both: Rows,
    value: Rows,
    out: Rows,
    ffn: FeedForward,
}

/// The network.
#[derive(Debug)]
pub struct LightGlue {
    sizes: Sizes,
    /// 2 x head / 2.
    frequencies: Tensor,
    input: Option<Rows>,
    layers: Vec<(SelfBlock, CrossBlock)>,
    matchability: Rows,
    last: Rows,
    /// Matches below this probability are none.
    pub threshold: f32,
}

impl LightGlue {
    /// From tensors by the released names.
    pub(super) fn new(sizes: Sizes, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let get = |name: String| tensors.get(&name).cloned().ok_or_else(|| Error::TensorMissing { name, layout: "LightGlue" });
        let rows = |name: String| Rows::new(&get(format!("{name}.weight"))?, &get(format!("{name}.bias"))?);
        let ffn = |block: &str| -> Result<FeedForward> {
            Ok(FeedForward {
                hidden: rows(format!("{block}.ffn.0"))?,
                norm: (get(format!("{block}.ffn.1.weight"))?, get(format!("{block}.ffn.1.bias"))?),
                out: rows(format!("{block}.ffn.3"))?,
            })
        };
        let layer = |at: usize| -> Result<(SelfBlock, CrossBlock)> {
            let (own, other) = (format!("self_attn.{at}"), format!("cross_attn.{at}"));
            // The file has query, key and value of each channel side by side.
            let (weight, bias) = (get(format!("{own}.Wqkv.weight"))?, get(format!("{own}.Wqkv.bias"))?);
            let third = |k: usize| -> Result<Rows> {
                let of: Vec<u32> = (0..sizes.dim).map(|c| (3 * c + k) as u32).collect();
                let of = Tensor::from_vec(of, sizes.dim, &Device::Cpu)?;
                Rows::new(&weight.index_select(&of, 0)?, &bias.index_select(&of, 0)?)
            };
            let own =
                SelfBlock { query: third(0)?, key: third(1)?, value: third(2)?, out: rows(format!("{own}.out_proj"))?, ffn: ffn(&own)? };
            let cross = CrossBlock {
                both: rows(format!("{other}.to_qk"))?,
                value: rows(format!("{other}.to_v"))?,
                out: rows(format!("{other}.to_out"))?,
                ffn: ffn(&other)?,
            };
            Ok((own, cross))
        };
        let last = format!("log_assignment.{}", sizes.layers - 1);
        Ok(Self {
            sizes,
            frequencies: get("posenc.Wr.weight".into())?.t()?.contiguous()?,
            input: if sizes.input == sizes.dim { None } else { Some(rows("input_proj".into())?) },
            layers: (0..sizes.layers).map(layer).collect::<Result<_>>()?,
            matchability: rows(format!("{last}.matchability"))?,
            last: rows(format!("{last}.final_proj"))?,
            threshold: 0.1,
        })
    }

    /// Cosines and sines, N x head / 2, of a side's positions.
    fn positions(&self, side: &Side) -> Result<(Vec<f32>, Vec<f32>)> {
        let (w, h) = (side.size.0 as f32, side.size.1 as f32);
        let scale = w.max(h) / 2.0;
        let at: Vec<f32> = side.points.iter().flat_map(|p| [(p[0] - w / 2.0) / scale, (p[1] - h / 2.0) / scale]).collect();
        let angles = Tensor::from_vec(at, (side.points.len(), 2), &Device::Cpu)?.matmul(&self.frequencies)?;
        Ok((angles.cos()?.flatten_all()?.to_vec1()?, angles.sin()?.flatten_all()?.to_vec1()?))
    }

    /// Turns each pair of channels by its point's angle.
    fn rotate(&self, x: &Tensor, (cos, sin): &(Vec<f32>, Vec<f32>)) -> Result<Tensor> {
        let head = self.sizes.dim / self.sizes.heads;
        let mut values = x.flatten_all()?.to_vec1::<f32>()?;
        let angles = cos.chunks_exact(head / 2).zip(sin.chunks_exact(head / 2));
        for (row, (cos, sin)) in values.chunks_exact_mut(self.sizes.dim).zip(angles) {
            for channels in row.chunks_exact_mut(head) {
                for ((pair, c), s) in channels.chunks_exact_mut(2).zip(cos).zip(sin) {
                    (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s);
                }
            }
        }
        Ok(Tensor::from_vec(values, x.dims(), x.device())?)
    }

    /// Log probabilities of every assignment, N x M.
    ///
    /// Errors: descriptors of another size than the network's.
    pub fn log_assignment(&self, query: &Side, reference: &Side) -> Result<Vec<f32>> {
        let heads = self.sizes.heads;
        let start = |side: &Side| -> Result<Tensor> {
            let n = side.points.len();
            if side.descriptors.len() != n * self.sizes.input {
                let dim = side.descriptors.len() / n.max(1);
                return Err(Error::Features {
                    reason: format!("LightGlue matches descriptors of {} values, these have {dim}", self.sizes.input),
                });
            }
            let x = Tensor::from_slice(side.descriptors, (n, self.sizes.input), &Device::Cpu)?;
            self.input.as_ref().map_or(Ok(x.clone()), |rows| rows.forward(&x))
        };
        let (mut q, mut r) = (start(query)?, start(reference)?);
        let (at_q, at_r) = (self.positions(query)?, self.positions(reference)?);
        for (own, cross) in &self.layers {
            let alone = |x: &Tensor, at| -> Result<Tensor> {
                let (query, key) = (self.rotate(&own.query.forward(x)?, at)?, self.rotate(&own.key.forward(x)?, at)?);
                own.ffn.add(x, &own.out.forward(&attention(&query, &key, &own.value.forward(x)?, heads)?)?)
            };
            (q, r) = (alone(&q, &at_q)?, alone(&r, &at_r)?);
            let (of_q, of_r) = (cross.both.forward(&q)?, cross.both.forward(&r)?);
            let to_q = attention(&of_q, &of_r, &cross.value.forward(&r)?, heads)?;
            let to_r = attention(&of_r, &of_q, &cross.value.forward(&q)?, heads)?;
            (q, r) = (cross.ffn.add(&q, &cross.out.forward(&to_q)?)?, cross.ffn.add(&r, &cross.out.forward(&to_r)?)?);
        }
        let scores = (self.last.forward(&q)?.matmul(&self.last.forward(&r)?.t()?)? / (self.sizes.dim as f64).sqrt())?;
        let sure = |x: &Tensor| -> Result<Vec<f32>> {
            let logits = self.matchability.forward(x)?.flatten_all()?.to_vec1::<f32>()?;
            // log of the logistic function, without overflow.
            Ok(logits.into_iter().map(|z| z.min(0.0) - (-z.abs()).exp().ln_1p()).collect())
        };
        let (sure_q, sure_r) = (sure(&q)?, sure(&r)?);
        let both = (candle_nn::ops::log_softmax(&scores, 1)? + candle_nn::ops::log_softmax(&scores, 0)?)?;
        let mut both = both.flatten_all()?.to_vec1::<f32>()?;
        for (row, q) in both.chunks_exact_mut(reference.points.len().max(1)).zip(&sure_q) {
            for (value, r) in row.iter_mut().zip(&sure_r) {
                *value += q + r;
            }
        }
        Ok(both)
    }

    /// Query point, reference point and probability of every mutual best above the threshold, in order of the query.
    ///
    /// Errors: as [`Self::log_assignment`].
    pub fn matches(&self, query: &Side, reference: &Side) -> Result<Vec<(usize, usize, f32)>> {
        let (n, m) = (query.points.len(), reference.points.len());
        if n == 0 || m == 0 {
            return Ok(Vec::new());
        }
        Ok(mutual_best(&self.log_assignment(query, reference)?, m, n, m, self.threshold))
    }
}
