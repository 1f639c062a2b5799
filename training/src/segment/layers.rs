//! What segmenters are made of: any convolution (groups, dilation) without Candle's loop over groups, batch norm folded,
//! resizing as PyTorch does it. One image, C x H x W; inference only.

use crate::net::gemm::{product, View};
use anyhow::{ensure, Context, Result};
use candle_core::Tensor;
use rayon::prelude::*;
use std::collections::BTreeMap;

/// A map of one image.
#[derive(Clone, Debug, PartialEq)]
pub struct Map {
    pub channels: usize,
    pub height: usize,
    pub width: usize,
    pub data: Vec<f32>,
}

impl Map {
    /// Of zeros.
    pub fn zeros(channels: usize, height: usize, width: usize) -> Self {
        Self { channels, height, width, data: vec![0.0; channels * height * width] }
    }

    /// Values of a channel.
    pub fn plane(&self) -> usize {
        self.height * self.width
    }

    /// Changes each channel's plane.
    pub fn each(mut self, change: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let plane = self.plane();
        self.data.par_chunks_mut(plane).enumerate().for_each(|(c, p)| change(c, p));
        self
    }

    /// `self + other`.
    pub fn plus(self, other: &Self) -> Self {
        let plane = self.plane();
        self.each(|c, p| p.iter_mut().zip(&other.data[c * plane..]).for_each(|(a, b)| *a += b))
    }

    /// Channels of both, one behind the other.
    pub fn cat(all: &[&Self]) -> Self {
        let data = all.iter().flat_map(|m| m.data.iter().copied()).collect();
        Self { channels: all.iter().map(|m| m.channels).sum(), data, ..*all[0] }
    }

    /// max(x, 0).
    pub fn relu(self) -> Self {
        self.each(|_, p| p.iter_mut().for_each(|v| *v = if *v < 0.0 { 0.0 } else { *v }))
    }

    /// PReLU with a slope per channel.
    pub fn prelu(self, slopes: &[f32]) -> Self {
        self.each(|c, p| p.iter_mut().for_each(|v| *v = if *v < 0.0 { *v * slopes[c] } else { *v }))
    }

    /// `x * scale + shift`, per channel.
    pub fn affine(self, norm: &Norm) -> Self {
        self.each(|c, p| p.iter_mut().for_each(|v| *v = *v * norm.0[c] + norm.1[c]))
    }

    /// Bilinear resize; PyTorch's `interpolate` with `align_corners` or without.
    pub fn resize(&self, height: usize, width: usize, align: bool) -> Self {
        let axis = |from: usize, to: usize| -> Vec<(usize, usize, f32)> {
            (0..to)
                .map(|i| {
                    let at = if align {
                        if to > 1 {
                            i as f64 * (from - 1) as f64 / (to - 1) as f64
                        } else {
                            0.0
                        }
                    } else {
                        ((i as f64 + 0.5) * from as f64 / to as f64 - 0.5).max(0.0)
                    };
                    let low = (at as usize).min(from - 1);
                    (low, (low + 1).min(from - 1), (at - low as f64) as f32)
                })
                .collect()
        };
        let (rows, columns) = (axis(self.height, height), axis(self.width, width));
        let mut out = Self::zeros(self.channels, height, width);
        let plane = self.plane();
        out.data.par_chunks_mut(height * width).zip(self.data.par_chunks(plane)).for_each(|(out, x)| {
            for ((y0, y1, fy), out) in rows.iter().zip(out.chunks_mut(width)) {
                let (a, b) = (&x[y0 * self.width..][..self.width], &x[y1 * self.width..][..self.width]);
                for ((x0, x1, fx), o) in columns.iter().zip(out) {
                    let (top, bottom) = (a[*x0] + (a[*x1] - a[*x0]) * fx, b[*x0] + (b[*x1] - b[*x0]) * fx);
                    *o = top + (bottom - top) * fy;
                }
            }
        });
        out
    }

    /// PyTorch's `adaptive_avg_pool2d`.
    pub fn adaptive_mean(&self, height: usize, width: usize) -> Self {
        let range = |i: usize, from: usize, to: usize| i * from / to..((i + 1) * from).div_ceil(to);
        let mut out = Self::zeros(self.channels, height, width);
        out.data.par_chunks_mut(height * width).zip(self.data.par_chunks(self.plane())).for_each(|(out, x)| {
            for (i, o) in out.iter_mut().enumerate() {
                let (rows, columns) = (range(i / width, self.height, height), range(i % width, self.width, width));
                let n = (rows.len() * columns.len()) as f32;
                *o = rows.map(|y| x[y * self.width..][columns.clone()].iter().sum::<f32>()).sum::<f32>() / n;
            }
        });
        out
    }

    /// 3x3 windows at stride 2 with a border of one: the mean (of nine, border included) or the largest.
    pub fn pool3(&self, largest: bool) -> Self {
        let (h, w) = (self.height.div_ceil(2), self.width.div_ceil(2));
        let mut out = Self::zeros(self.channels, h, w);
        out.data.par_chunks_mut(h * w).zip(self.data.par_chunks(self.plane())).for_each(|(out, x)| {
            for (i, o) in out.iter_mut().enumerate() {
                let (mut sum, mut max) = (0f32, f32::NEG_INFINITY);
                for y in (2 * (i / w)).saturating_sub(1)..(2 * (i / w) + 2).min(self.height) {
                    for v in &x[y * self.width..][(2 * (i % w)).saturating_sub(1)..(2 * (i % w) + 2).min(self.width)] {
                        sum += v;
                        max = max.max(*v);
                    }
                }
                *o = if largest { max } else { sum / 9.0 };
            }
        });
        out
    }
}

/// Scale and shift per channel.
pub type Norm = (Vec<f32>, Vec<f32>);

/// A convolution with its bias, whose batch norm is folded.
#[derive(Clone, Debug)]
pub struct Conv {
    weight: Vec<f32>,
    bias: Vec<f32>,
    outputs: usize,
    per_group: usize,
    kernel: usize,
    pub stride: usize,
    pub dilation: usize,
    groups: usize,
}

/// Pixels of one block of patches.
const BLOCK: usize = 512;

impl Conv {
    /// C x H x W to O x H' x W', padded so that at stride 1 the size stays.
    ///
    /// Errors: another number of channels.
    pub fn forward(&self, x: &Map) -> Result<Map> {
        ensure!(
            x.channels == self.per_group * self.groups,
            "a convolution of {} channels got {}",
            self.per_group * self.groups,
            x.channels
        );
        let (k, s, d) = (self.kernel, self.stride, self.dilation);
        let pad = d * (k - 1) / 2;
        let size = |n: usize| (n + 2 * pad - d * (k - 1) - 1) / s + 1;
        let (h, w) = (size(x.height), size(x.width));
        let mut out = Map::zeros(self.outputs, h, w);
        let per = self.outputs / self.groups;
        let inputs = self.per_group * k * k;
        // Columns lo..hi of an output row whose source column lies inside.
        let inside = |kx: usize| {
            let lo = pad.saturating_sub(kx * d).div_ceil(s);
            let hi = if x.width + pad > kx * d { ((x.width + pad - kx * d - 1) / s + 1).min(w) } else { 0 };
            (lo.min(hi), hi)
        };
        if per * self.per_group <= 16 && k > 1 {
            // Few channels to a group: rows are added up, shifted.
            out.data.par_chunks_mut(h * w).enumerate().for_each(|(o, out)| {
                out.fill(self.bias[o]);
                let first = o / per * self.per_group;
                for i in 0..self.per_group {
                    let plane = &x.data[(first + i) * x.plane()..][..x.plane()];
                    for (ky, kx) in (0..k).flat_map(|a| (0..k).map(move |b| (a, b))) {
                        let weight = self.weight[o * inputs + (i * k + ky) * k + kx];
                        let (lo, hi) = inside(kx);
                        for (y, out) in out.chunks_mut(w).enumerate() {
                            let Some(iy) = (y * s + ky * d).checked_sub(pad).filter(|iy| *iy < x.height) else { continue };
                            if lo < hi {
                                let source = &plane[iy * x.width..][..x.width][lo * s + kx * d - pad..];
                                out[lo..hi].iter_mut().zip(source.iter().step_by(s)).for_each(|(o, v)| *o += weight * v);
                            }
                        }
                    }
                }
            });
            return Ok(out);
        }
        let columns = h * w;
        let blocks: Vec<usize> = (0..columns).step_by(BLOCK).collect();
        let parts: Vec<Vec<f32>> = blocks
            .par_iter()
            .map(|first| {
                let n = BLOCK.min(columns - first);
                let mut patches = vec![0f32; inputs * n];
                let mut result = vec![0f32; self.outputs * n];
                for g in 0..self.groups {
                    for (row, out) in patches.chunks_exact_mut(n).enumerate() {
                        let (i, ky, kx) = (row / (k * k), row % (k * k) / k, row % k);
                        let plane = &x.data[(g * self.per_group + i) * x.plane()..][..x.plane()];
                        for (j, o) in out.iter_mut().enumerate() {
                            let (y, xx) = ((first + j) / w * s + ky * d, (first + j) % w * s + kx * d);
                            *o = match (y.checked_sub(pad), xx.checked_sub(pad)) {
                                (Some(y), Some(xx)) if y < x.height && xx < x.width => plane[y * x.width + xx],
                                _ => 0.0,
                            };
                        }
                    }
                    let weight = &self.weight[g * per * inputs..][..per * inputs];
                    product(
                        per,
                        n,
                        inputs,
                        &mut result[g * per * n..][..per * n],
                        false,
                        View::rows(weight, inputs),
                        View::rows(&patches, n),
                    );
                }
                result
            })
            .collect();
        for (first, part) in blocks.iter().zip(&parts) {
            let n = part.len() / self.outputs;
            for o in 0..self.outputs {
                for (to, v) in out.data[o * columns + first..][..n].iter_mut().zip(&part[o * n..]) {
                    *to = v + self.bias[o];
                }
            }
        }
        Ok(out)
    }
}

/// Tensors of a weight file, taken by name; what is left over is an error.
pub struct Reader {
    tensors: BTreeMap<String, Tensor>,
    layout: &'static str,
}

/// PyTorch's default epsilon of `BatchNorm2d`.
const EPS: f32 = 1e-5;

impl Reader {
    /// Of a file's bytes.
    pub fn new(bytes: &[u8], layout: &'static str) -> Result<Self> {
        Ok(Self { tensors: structvpr::model::read_tensors(bytes)?, layout })
    }

    /// One tensor's values; `shape` 0 stands for any size.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<(Vec<usize>, Vec<f32>)> {
        let t = self.tensors.remove(name).with_context(|| format!("weights: tensor `{name}` is missing (layout: {})", self.layout))?;
        let found = t.dims().to_vec();
        let fits = found.len() == shape.len() && found.iter().zip(shape).all(|(f, s)| *s == 0 || f == s);
        ensure!(fits, "weights: tensor `{name}` has shape {found:?}, expected {shape:?} (0: any)");
        Ok((found, t.flatten_all()?.to_vec1::<f32>()?))
    }

    /// Whether the file has a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Scale and shift of a batch norm.
    pub fn norm(&mut self, name: &str, n: usize) -> Result<Norm> {
        let mut get = |part: &str| Ok::<_, anyhow::Error>(self.take(&format!("{name}.{part}"), &[n])?.1);
        let (gamma, beta, mean, var) = (get("weight")?, get("bias")?, get("running_mean")?, get("running_var")?);
        let scale: Vec<f32> = gamma.iter().zip(&var).map(|(g, v)| g / (v + EPS).sqrt()).collect();
        let shift = beta.iter().zip(&mean).zip(&scale).map(|((b, m), s)| b - m * s).collect();
        self.tensors.remove(&format!("{name}.num_batches_tracked"));
        Ok((scale, shift))
    }

    /// A convolution over `inputs` channels, with its own bias if it has one, and a batch norm folded in if one is named.
    pub fn conv(&mut self, name: &str, norm: Option<&str>, inputs: usize, stride: usize, dilation: usize) -> Result<Conv> {
        let (shape, mut weight) = self.take(&format!("{name}.weight"), &[0, 0, 0, 0])?;
        let (outputs, per_group, kernel) = (shape[0], shape[1], shape[2]);
        let divides = per_group > 0 && inputs.is_multiple_of(per_group) && outputs > 0 && outputs.is_multiple_of(inputs / per_group);
        ensure!(
            divides && kernel == shape[3] && kernel % 2 == 1,
            "weights: `{name}.weight` of shape {shape:?} does not fit {inputs} channels"
        );
        let mut bias = vec![0.0; outputs];
        if self.has(&format!("{name}.bias")) {
            bias = self.take(&format!("{name}.bias"), &[outputs])?.1;
        }
        if let Some(norm) = norm {
            let (scale, shift) = self.norm(norm, outputs)?;
            for (o, w) in weight.chunks_exact_mut(per_group * kernel * kernel).enumerate() {
                w.iter_mut().for_each(|w| *w *= scale[o]);
                bias[o] = bias[o] * scale[o] + shift[o];
            }
        }
        Ok(Conv { weight, bias, outputs, per_group, kernel, stride, dilation, groups: inputs / per_group })
    }

    /// Errors: tensors are left that have no place in the architecture.
    pub fn finish(self, known: impl Fn(&str) -> bool) -> Result<()> {
        let rest: Vec<&str> =
            self.tensors.keys().map(String::as_str).filter(|k| !known(k) && !k.ends_with("num_batches_tracked")).take(4).collect();
        ensure!(rest.is_empty(), "weights: unexpected tensor(s) {} (layout: {})", rest.join(", "), self.layout);
        Ok(())
    }
}

impl Conv {
    /// Output channels.
    pub fn outputs(&self) -> usize {
        self.outputs
    }
}
