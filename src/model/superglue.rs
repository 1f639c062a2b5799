//! SuperGlue (Sarlin et al., CVPR 2020): matches features of SuperPoint with a graph network and optimal transport.
//!
//! Magic Leap's own weights are for non-commercial use; we ship none.

use super::container::RawFile;
use super::layers::{attention, Rows};
use super::local::fold_norm;
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Values of a descriptor.
const DIM: usize = 256;
/// Heads of attention.
const HEADS: usize = 4;
/// Layers: self and cross in turn.
const LAYERS: usize = 18;
/// Channels of the keypoint encoder.
const ENCODER: [usize; 6] = [3, 32, 64, 128, 256, DIM];

/// A linear layer as the file has it: name, outputs, inputs, name of the batch norm that follows.
struct Linear {
    name: String,
    outputs: usize,
    inputs: usize,
    norm: Option<String>,
}

fn linears() -> Vec<Linear> {
    let of = |name: String, outputs, inputs, norm| Linear { name, outputs, inputs, norm };
    let mut all = Vec::new();
    for (at, pair) in ENCODER.windows(2).enumerate() {
        let norm = (at + 2 < ENCODER.len()).then(|| format!("kenc.encoder.{}", 3 * at + 1));
        all.push(of(format!("kenc.encoder.{}", 3 * at), pair[1], pair[0], norm));
    }
    for layer in (0..LAYERS).map(|l| format!("gnn.layers.{l}")) {
        for part in ["merge", "proj.0", "proj.1", "proj.2"] {
            all.push(of(format!("{layer}.attn.{part}"), DIM, DIM, None));
        }
        all.push(of(format!("{layer}.mlp.0"), 2 * DIM, 2 * DIM, Some(format!("{layer}.mlp.1"))));
        all.push(of(format!("{layer}.mlp.3"), DIM, 2 * DIM, None));
    }
    all.push(of("final_proj".into(), DIM, DIM, None));
    all
}

/// Names and shapes, batch norm folded.
pub(super) fn tensors() -> Vec<(String, Vec<usize>)> {
    let both = |l: Linear| [(format!("{}.weight", l.name), vec![l.outputs, l.inputs]), (format!("{}.bias", l.name), vec![l.outputs])];
    linears().into_iter().flat_map(both).chain([("bin_score".to_string(), vec![1])]).collect()
}

/// The original checkpoint's tensors, folded.
pub(super) fn fold(file: &mut RawFile) -> Result<BTreeMap<String, Tensor>> {
    const LAYOUT: &str = "SuperGlue";
    let mut out = BTreeMap::new();
    for Linear { name, outputs, inputs, norm } in linears() {
        let mut weight = file.take(&format!("{name}.weight"), &[outputs, inputs, 1], LAYOUT)?;
        let mut bias = file.take(&format!("{name}.bias"), &[outputs], LAYOUT)?;
        if let Some(norm) = norm {
            let mut get = |kind: &str| file.take(&format!("{norm}.{kind}"), &[outputs], LAYOUT);
            let (gamma, beta, mean, var) = (get("weight")?, get("bias")?, get("running_mean")?, get("running_var")?);
            bias = fold_norm(&mut weight, Some(bias), &mean, &var, Some((&gamma, &beta)));
        }
        out.insert(format!("{name}.weight"), Tensor::from_vec(weight, (outputs, inputs), &Device::Cpu)?);
        out.insert(format!("{name}.bias"), Tensor::from_vec(bias, outputs, &Device::Cpu)?);
    }
    out.insert("bin_score".into(), Tensor::from_vec(file.take("bin_score", &[], LAYOUT)?, 1, &Device::Cpu)?);
    Ok(out)
}

#[derive(Debug)]
struct Propagation {
    query: Rows,
    key: Rows,
    value: Rows,
    merge: Rows,
    hidden: Rows,
    out: Rows,
}

/// One image's side of the problem.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// Columns and rows of the image.
    pub size: (u32, u32),
    /// x and y, pixels.
    pub points: &'a [[f32; 2]],
    /// The detector's scores.
    pub scores: &'a [f32],
    /// N x 256, unit rows.
    pub descriptors: &'a [f32],
}

/// The network.
#[derive(Debug)]
pub struct SuperGlue {
    encoder: Vec<Rows>,
    layers: Vec<Propagation>,
    last: Rows,
    bin_score: f32,
    /// Iterations of Sinkhorn's algorithm.
    pub iterations: usize,
    /// Matches below this probability are none.
    pub threshold: f32,
}

impl SuperGlue {
    /// From folded tensors by the original names.
    pub fn new(tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let get = |name: String| tensors.get(&name).cloned().ok_or_else(|| Error::TensorMissing { name, layout: "SuperGlue" });
        // The original keeps channel c in head c % HEADS; heads are contiguous here.
        let order: Vec<u32> = (0..DIM as u32).map(|at| at % (DIM / HEADS) as u32 * HEADS as u32 + at / (DIM / HEADS) as u32).collect();
        let order = Tensor::from_vec(order, DIM, &Device::Cpu)?;
        let plain = |name: &str| -> Result<Rows> { Rows::new(&get(format!("{name}.weight"))?, &get(format!("{name}.bias"))?) };
        let by_head = |name: &str| -> Result<Rows> {
            let rows = plain(name)?;
            Ok(Rows { weight: rows.weight.index_select(&order, 1)?, bias: rows.bias.index_select(&order, 0)? })
        };
        let layer = |at: usize| -> Result<Propagation> {
            let name = |part: &str| format!("gnn.layers.{at}.{part}");
            let merge = plain(&name("attn.merge"))?;
            Ok(Propagation {
                query: by_head(&name("attn.proj.0"))?,
                key: by_head(&name("attn.proj.1"))?,
                value: by_head(&name("attn.proj.2"))?,
                merge: Rows { weight: merge.weight.index_select(&order, 0)?, bias: merge.bias },
                hidden: plain(&name("mlp.0"))?,
                out: plain(&name("mlp.3"))?,
            })
        };
        let encoder = (0..ENCODER.len() - 1).map(|at| plain(&format!("kenc.encoder.{}", 3 * at)));
        let bin_score = get("bin_score".into())?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Self {
            encoder: encoder.collect::<Result<_>>()?,
            layers: (0..LAYERS).map(layer).collect::<Result<_>>()?,
            last: plain("final_proj")?,
            bin_score: bin_score.first().copied().unwrap_or(1.0),
            iterations: 100,
            threshold: 0.2,
        })
    }

    /// Descriptors with what their positions add.
    fn encode(&self, side: &Side) -> Result<Tensor> {
        let (w, h) = (side.size.0 as f32, side.size.1 as f32);
        let scale = 0.7 * w.max(h);
        let inputs = side.points.iter().zip(side.scores).flat_map(|(p, s)| [(p[0] - w / 2.0) / scale, (p[1] - h / 2.0) / scale, *s]);
        let mut x = Tensor::from_vec(inputs.collect::<Vec<f32>>(), (side.points.len(), 3), &Device::Cpu)?;
        for (at, layer) in self.encoder.iter().enumerate() {
            x = layer.forward(&x)?;
            if at + 1 < self.encoder.len() {
                x = x.relu()?;
            }
        }
        let descriptors = Tensor::from_slice(side.descriptors, (side.points.len(), DIM), &Device::Cpu)?;
        Ok((descriptors + x)?)
    }

    /// Log probabilities of every assignment, (N + 1) x (M + 1); the last row and column are for no match.
    ///
    /// Errors: descriptors of other than 256 values.
    pub fn log_assignment(&self, query: &Side, reference: &Side) -> Result<Vec<f32>> {
        for side in [query, reference] {
            if side.descriptors.len() != side.points.len() * DIM || side.scores.len() != side.points.len() {
                let dim = side.descriptors.len() / side.points.len().max(1);
                return Err(Error::Features { reason: format!("SuperGlue matches descriptors of {DIM} values, these have {dim}") });
            }
        }
        let (mut q, mut r) = (self.encode(query)?, self.encode(reference)?);
        for (at, layer) in self.layers.iter().enumerate() {
            let (source_q, source_r) = if at % 2 == 0 { (&q, &r) } else { (&r, &q) };
            let (dq, dr) = (layer.forward(&q, source_q)?, layer.forward(&r, source_r)?);
            (q, r) = ((q + dq)?, (r + dr)?);
        }
        let scores = (self.last.forward(&q)?.matmul(&self.last.forward(&r)?.t()?)? / (DIM as f64).sqrt())?;
        let (n, m) = (query.points.len(), reference.points.len());
        let scores = scores.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(log_optimal_transport(&scores, n, m, self.bin_score, self.iterations))
    }

    /// Query point, reference point and probability of every mutual best above the threshold, in order of the query.
    ///
    /// Errors: as [`Self::log_assignment`].
    pub fn matches(&self, query: &Side, reference: &Side) -> Result<Vec<(usize, usize, f32)>> {
        let (n, m) = (query.points.len(), reference.points.len());
        if n == 0 || m == 0 {
            return Ok(Vec::new());
        }
        Ok(mutual_best(&self.log_assignment(query, reference)?, m + 1, n, m, self.threshold))
    }
}

/// Row, column and probability of every mutual best of the n x m log probabilities in rows of `width`.
pub(super) fn mutual_best(log: &[f32], width: usize, n: usize, m: usize, threshold: f32) -> Vec<(usize, usize, f32)> {
    let at = |q: usize, r: usize| log[q * width + r];
    let best = |n: usize, value: &dyn Fn(usize) -> f32| (1..n).fold(0, |b, i| if value(i) > value(b) { i } else { b });
    let of_query: Vec<usize> = (0..n).map(|q| best(m, &|r| at(q, r))).collect();
    let of_reference: Vec<usize> = (0..m).map(|r| best(n, &|q| at(q, r))).collect();
    let mutual = of_query.iter().enumerate().filter(|(q, r)| of_reference[**r] == *q);
    mutual.map(|(q, r)| (q, *r, at(q, *r).exp())).filter(|(_, _, p)| *p > threshold).collect()
}

impl Propagation {
    /// What attention over `source` adds to `x`, rows of 256.
    fn forward(&self, x: &Tensor, source: &Tensor) -> Result<Tensor> {
        let message = attention(&self.query.forward(x)?, &self.key.forward(source)?, &self.value.forward(source)?, HEADS)?;
        let joined = Tensor::cat(&[x, &self.merge.forward(&message)?], 1)?;
        self.out.forward(&self.hidden.forward(&joined)?.relu()?)
    }
}

/// Sinkhorn's algorithm in log space over `scores` (n x m) with a bin of score `bin` for every point without a match.
fn log_optimal_transport(scores: &[f32], n: usize, m: usize, bin: f32, iterations: usize) -> Vec<f32> {
    let width = m + 1;
    let mut z = vec![bin; (n + 1) * width];
    for (row, scores) in z.chunks_exact_mut(width).zip(scores.chunks_exact(m.max(1))) {
        row[..m].copy_from_slice(scores);
    }
    let norm = -((n + m) as f32).ln();
    let mu = |i: usize| if i < n { norm } else { (m as f32).ln() + norm };
    let nu = |j: usize| if j < m { norm } else { (n as f32).ln() + norm };
    let (mut u, mut v) = (vec![0f32; n + 1], vec![0f32; width]);
    for _ in 0..iterations {
        u.par_iter_mut().zip(z.par_chunks_exact(width)).enumerate().for_each(|(i, (u, row))| {
            let top = row.iter().zip(&v).fold(f32::NEG_INFINITY, |m, (z, v)| m.max(z + v));
            let sum: f32 = row.iter().zip(&v).map(|(z, v)| (z + v - top).exp()).sum();
            *u = mu(i) - top - sum.ln();
        });
        // Blocks of columns, so that each thread reads whole cache lines, in the order of the rows.
        v.par_chunks_mut(64).enumerate().for_each(|(block, v)| {
            let from = 64 * block;
            let mut top = [f32::NEG_INFINITY; 64];
            let mut sum = [0f32; 64];
            for (row, u) in z.chunks_exact(width).zip(&u) {
                for (t, z) in top.iter_mut().zip(&row[from..from + v.len()]) {
                    *t = t.max(z + u);
                }
            }
            for (row, u) in z.chunks_exact(width).zip(&u) {
                for ((s, t), z) in sum.iter_mut().zip(&top).zip(&row[from..from + v.len()]) {
                    *s += (z + u - t).exp();
                }
            }
            for (j, v) in v.iter_mut().enumerate() {
                *v = nu(from + j) - top[j] - sum[j].ln();
            }
        });
    }
    for (row, u) in z.chunks_exact_mut(width).zip(&u) {
        for (z, v) in row.iter_mut().zip(&v) {
            *z += u + v - norm;
        }
    }
    z
}
