//! 3x3 depthwise convolution with bias and activation, NCHW, forward and backward.
//!
//! Candle's grouped convolution is a chunk, a convolution per group and a cat: 17 to 27 times the
//! time of ONNX Runtime for this network. Here each plane is one task; rows are copied once into a
//! zero-padded buffer (split into even and odd columns at stride 2), so that the inner loops run
//! over contiguous memory without a border case and the compiler vectorises them.

use super::bias_act::masked_grad;
use super::{contiguous, dispatch, fma, Activation, Isa, Pad};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor, D};
use rayon::prelude::*;

#[derive(Clone, Copy, Debug)]
struct Depthwise {
    stride: usize,
    pad: Pad,
    activation: Activation,
    isa: Isa,
}

/// `activation(depthwise3x3(x, weight) + bias)`, with gradients for all three.
///
/// `x`: N x C x H x W contiguous f32; `weight`: C x 1 x 3 x 3; `bias`: C; `stride` 1 or 2.
/// Returns N x C x H' x W'. Errors: other strides, shapes that do not fit.
pub fn depthwise3x3(x: &Tensor, weight: &Tensor, bias: &Tensor, stride: usize, pad: Pad, activation: Activation) -> Result<Tensor> {
    x.apply_op3(weight, bias, Depthwise { stride, pad, activation, isa: Isa::detect() })
}

/// Geometry of one plane.
#[derive(Clone, Copy)]
struct Plane {
    height: usize,
    width: usize,
    out_height: usize,
    out_width: usize,
    stride: usize,
    pad: Pad,
}

impl Plane {
    fn new(op: &Depthwise, height: usize, width: usize) -> Result<Self> {
        if !(op.stride == 1 || op.stride == 2) {
            candle_core::bail!("depthwise3x3: stride {} (allowed: 1, 2)", op.stride);
        }
        match op.pad.output(height, width, op.stride) {
            Some((out_height, out_width)) if height > 0 && width > 0 => {
                Ok(Self { height, width, out_height, out_width, stride: op.stride, pad: op.pad })
            }
            _ => candle_core::bail!("depthwise3x3: input {height}x{width} is smaller than the kernel"),
        }
    }

    /// Length of one padded row buffer: two halves at stride 2 (even columns, odd columns).
    fn row_len(&self) -> usize {
        self.half() * self.stride
    }

    fn half(&self) -> usize {
        (self.out_width - 1) + 3
    }

    /// Copies padded row `y` (padding included in the count) of `x` into `row`.
    #[inline(always)]
    fn load(&self, x: &[f32], y: usize, row: &mut [f32]) {
        row.fill(0.0);
        if y < self.pad.top || y >= self.pad.top + self.height {
            return;
        }
        let source = &x[(y - self.pad.top) * self.width..][..self.width];
        if self.stride == 1 {
            let n = source.len().min(row.len() - self.pad.left);
            row[self.pad.left..][..n].copy_from_slice(&source[..n]);
        } else {
            let half = self.half();
            let (even, odd) = row.split_at_mut(half);
            // Padded column c holds source[c - left]; even c go to even[c / 2].
            let first_even = self.pad.left % 2;
            for (e, s) in even[self.pad.left.div_ceil(2)..].iter_mut().zip(source[first_even..].iter().step_by(2)) {
                *e = *s;
            }
            let first_odd = 1 - first_even;
            let odd_start = if first_odd == 0 { self.pad.left / 2 } else { self.pad.left.div_ceil(2) };
            if first_odd < source.len() {
                for (o, s) in odd[odd_start..].iter_mut().zip(source[first_odd..].iter().step_by(2)) {
                    *o = *s;
                }
            }
        }
    }

    /// The three shifted views of a loaded row: column `c` of the kernel at output `x` reads
    /// `views[c][x]`.
    #[inline(always)]
    fn views<'a>(&self, row: &'a [f32]) -> [&'a [f32]; 3] {
        let n = self.out_width;
        if self.stride == 1 {
            [&row[..n], &row[1..][..n], &row[2..][..n]]
        } else {
            let half = self.half();
            [&row[..n], &row[half..][..n], &row[1..][..n]]
        }
    }
}

#[inline(always)]
fn plane_forward<const FUSED: bool>(plane: Plane, x: &[f32], kernel: &[f32; 9], bias: f32, activation: Activation, out: &mut [f32]) {
    let len = plane.row_len();
    let mut rows = vec![0f32; 3 * len];
    // Padded row y lies in slot y % 3; `loaded` counts the rows read so far.
    let mut loaded = 0;
    for (oy, out) in out.chunks_exact_mut(plane.out_width).enumerate() {
        let first = oy * plane.stride;
        while loaded < first + 3 {
            plane.load(x, loaded, &mut rows[loaded % 3 * len..][..len]);
            loaded += 1;
        }
        let [a, b, c] = plane.views(&rows[(first % 3) * len..][..len]);
        let [d, e, f] = plane.views(&rows[((first + 1) % 3) * len..][..len]);
        let [g, h, i] = plane.views(&rows[((first + 2) % 3) * len..][..len]);
        let n = out.len();
        let (a, b, c, d, e, f, g, h, i) = (&a[..n], &b[..n], &c[..n], &d[..n], &e[..n], &f[..n], &g[..n], &h[..n], &i[..n]);
        for x in 0..n {
            let mut s = bias;
            s = fma::<FUSED>(a[x], kernel[0], s);
            s = fma::<FUSED>(b[x], kernel[1], s);
            s = fma::<FUSED>(c[x], kernel[2], s);
            s = fma::<FUSED>(d[x], kernel[3], s);
            s = fma::<FUSED>(e[x], kernel[4], s);
            s = fma::<FUSED>(f[x], kernel[5], s);
            s = fma::<FUSED>(g[x], kernel[6], s);
            s = fma::<FUSED>(h[x], kernel[7], s);
            s = fma::<FUSED>(i[x], kernel[8], s);
            out[x] = activation.apply(s);
        }
    }
}

/// Gradient of one plane's weights: correlates the input with the output's gradient.
#[inline(always)]
fn plane_weight_grad<const FUSED: bool>(plane: Plane, x: &[f32], grad: &[f32], out: &mut [f32; 9]) {
    const LANES: usize = 16;
    let mut row = vec![0f32; plane.row_len()];
    for y in 0..plane.height + plane.pad.top + plane.pad.bottom {
        plane.load(x, y, &mut row);
        let views = plane.views(&row);
        for ky in 0..3usize {
            let Some(shifted) = y.checked_sub(ky) else { continue };
            if shifted % plane.stride != 0 || shifted / plane.stride >= plane.out_height {
                continue;
            }
            let grad = &grad[shifted / plane.stride * plane.out_width..][..plane.out_width];
            for (kx, view) in views.iter().enumerate() {
                let mut lanes = [0f32; LANES];
                let (gc, vc) = (grad.chunks_exact(LANES), view.chunks_exact(LANES));
                let tail: f32 = gc.remainder().iter().zip(vc.remainder()).map(|(g, v)| g * v).sum();
                for (g, v) in gc.zip(vc) {
                    for l in 0..LANES {
                        lanes[l] = fma::<FUSED>(g[l], v[l], lanes[l]);
                    }
                }
                out[ky * 3 + kx] += tail + lanes.iter().sum::<f32>();
            }
        }
    }
}

/// Gradient of one plane's input: scatters each output's gradient through the kernel.
#[inline(always)]
fn plane_input_grad<const FUSED: bool>(plane: Plane, grad: &[f32], kernel: &[f32; 9], out: &mut [f32]) {
    let padded = plane.width + plane.pad.left + plane.pad.right;
    // Wide enough for every column that a kernel position touches.
    let mut row = vec![0f32; padded.max((plane.out_width - 1) * plane.stride + 3)];
    let mut phases = vec![0f32; 3 * (plane.out_width + 2)];
    for (y, out) in out.chunks_exact_mut(plane.width).enumerate() {
        row.fill(0.0);
        phases.fill(0.0);
        let y = y + plane.pad.top;
        for ky in 0..3usize {
            let Some(shifted) = y.checked_sub(ky) else { continue };
            if shifted % plane.stride != 0 || shifted / plane.stride >= plane.out_height {
                continue;
            }
            let grad = &grad[shifted / plane.stride * plane.out_width..][..plane.out_width];
            for kx in 0..3 {
                let k = kernel[ky * 3 + kx];
                if plane.stride == 1 {
                    for (r, g) in row[kx..].iter_mut().zip(grad) {
                        *r = fma::<FUSED>(*g, k, *r);
                    }
                } else {
                    let phase = &mut phases[kx * (plane.out_width + 2)..][..plane.out_width];
                    for (p, g) in phase.iter_mut().zip(grad) {
                        *p = fma::<FUSED>(*g, k, *p);
                    }
                }
            }
        }
        if plane.stride == 2 {
            for kx in 0..3 {
                let phase = &phases[kx * (plane.out_width + 2)..][..plane.out_width];
                for (r, p) in row[kx..].iter_mut().step_by(2).zip(phase) {
                    *r += *p;
                }
            }
        }
        out.copy_from_slice(&row[plane.pad.left..][..plane.width]);
    }
}

/// The 3x3 kernel of `channel`.
fn kernel_of(weight: &[f32], channel: usize) -> &[f32; 9] {
    // A chunk of exactly nine always converts; `Depthwise::check` proved the length.
    weight[channel * 9..][..9].try_into().unwrap_or(&[0.0; 9])
}

impl Depthwise {
    fn check(&self, x: &Layout, weight: &Layout) -> Result<(usize, usize, Plane)> {
        let (n, c, h, w) = x.shape().dims4()?;
        if weight.shape().dims() != [c, 1, 3, 3] {
            candle_core::bail!("depthwise3x3: weight {:?} for {c} channels", weight.shape().dims());
        }
        Ok((n, c, Plane::new(self, h, w)?))
    }
}

impl CustomOp3 for Depthwise {
    fn name(&self) -> &'static str {
        "depthwise3x3"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, channels, plane) = self.check(l1, l2)?;
        let x = contiguous(self.name(), s1, l1)?;
        let weight = contiguous(self.name(), s2, l2)?;
        let bias = contiguous(self.name(), s3, l3)?;
        if bias.len() != channels {
            candle_core::bail!("depthwise3x3: {channels} channels but {} biases", bias.len());
        }
        let size = plane.out_height * plane.out_width;
        let mut out = vec![0f32; n * channels * size];
        let (isa, activation) = (self.isa, self.activation);
        out.par_chunks_mut(size).zip(x.par_chunks(plane.height * plane.width)).enumerate().for_each(|(i, (out, x))| {
            let channel = i % channels;
            let (kernel, b) = (kernel_of(weight, channel), bias[channel]);
            dispatch!(isa, plane_forward(plane: Plane, x: &[f32], kernel: &[f32; 9], b: f32, activation: Activation, out: &mut [f32]));
        });
        Ok((CpuStorage::F32(out), (n, channels, plane.out_height, plane.out_width).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = masked_grad(self.activation, res, grad)?;
        let (_, _, h, w) = x.dims4()?;
        let grad_x = grad.apply_op2_no_bwd(&weight.contiguous()?, &InputGrad { op: *self, height: h, width: w })?;
        let grad_w = x.contiguous()?.apply_op2_no_bwd(&grad, &WeightGrad(*self))?;
        let grad_b = grad.sum(D::Minus1)?.sum(D::Minus1)?.sum(0)?.reshape(bias.shape())?;
        Ok((Some(grad_x), Some(grad_w), Some(grad_b)))
    }
}

struct InputGrad {
    op: Depthwise,
    height: usize,
    width: usize,
}

impl CustomOp2 for InputGrad {
    fn name(&self) -> &'static str {
        "depthwise3x3_input_grad"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, channels, ..) = l1.shape().dims4()?;
        let grad = contiguous(self.name(), s1, l1)?;
        let weight = contiguous(self.name(), s2, l2)?;
        let plane = Plane::new(&self.op, self.height, self.width)?;
        let mut out = vec![0f32; n * channels * self.height * self.width];
        let isa = self.op.isa;
        out.par_chunks_mut(self.height * self.width).zip(grad.par_chunks(plane.out_height * plane.out_width)).enumerate().for_each(
            |(i, (out, grad))| {
                let kernel = kernel_of(weight, i % channels);
                dispatch!(isa, plane_input_grad(plane: Plane, grad: &[f32], kernel: &[f32; 9], out: &mut [f32]));
            },
        );
        Ok((CpuStorage::F32(out), (n, channels, self.height, self.width).into()))
    }
}

struct WeightGrad(Depthwise);

impl CustomOp2 for WeightGrad {
    fn name(&self) -> &'static str {
        "depthwise3x3_weight_grad"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, channels, h, w) = l1.shape().dims4()?;
        let x = contiguous(self.name(), s1, l1)?;
        let grad = contiguous(self.name(), s2, l2)?;
        let plane = Plane::new(&self.0, h, w)?;
        let (in_size, out_size) = (h * w, plane.out_height * plane.out_width);
        let isa = self.0.isa;
        let mut out = vec![0f32; channels * 9];
        out.par_chunks_mut(9).enumerate().for_each(|(channel, out)| {
            let mut sum = [0f32; 9];
            let sum = &mut sum;
            for image in 0..n {
                let x = &x[(image * channels + channel) * in_size..][..in_size];
                let grad = &grad[(image * channels + channel) * out_size..][..out_size];
                dispatch!(isa, plane_weight_grad(plane: Plane, x: &[f32], grad: &[f32], sum: &mut [f32; 9]));
            }
            out.copy_from_slice(sum);
        });
        Ok((CpuStorage::F32(out), (channels, 1, 3, 3).into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    /// The definition, in f64.
    fn reference(x: &[f32], w: &[f32], b: &[f32], (n, c, h, wd): (usize, usize, usize, usize), s: usize, p: Pad) -> Vec<f64> {
        let (oh, ow) = p.output(h, wd, s).unwrap();
        let mut out = Vec::new();
        for i in 0..n * c {
            for oy in 0..oh {
                for ox in 0..ow {
                    let mut sum = f64::from(b[i % c]);
                    for ky in 0..3 {
                        for kx in 0..3 {
                            let (y, xx) = ((oy * s + ky).wrapping_sub(p.top), (ox * s + kx).wrapping_sub(p.left));
                            if y < h && xx < wd {
                                sum += f64::from(x[(i * h + y) * wd + xx]) * f64::from(w[(i % c) * 9 + ky * 3 + kx]);
                            }
                        }
                    }
                    out.push(sum);
                }
            }
        }
        out
    }

    fn numbers(seed: u64, n: usize) -> Vec<f32> {
        (0..n as u64).map(|i| crate::test_noise(seed, i)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn matches_the_definition_on_every_instruction_set(
            n in 1usize..3, c in 1usize..5, h in 1usize..40, w in 1usize..40,
            stride in 1usize..3, same in any::<bool>(), seed in any::<u64>(),
        ) {
            let pad = if same { Pad::same(h, w, stride) } else { Pad::ONE };
            let (x, k, b) = (numbers(seed, n * c * h * w), numbers(seed ^ 1, c * 9), numbers(seed ^ 2, c));
            let want = reference(&x, &k, &b, (n, c, h, w), stride, pad);
            let d = &Device::Cpu;
            let (x, k, b) = (Tensor::from_vec(x, (n, c, h, w), d)?, Tensor::from_vec(k, (c, 1, 3, 3), d)?, Tensor::from_vec(b, c, d)?);
            for isa in Isa::available() {
                let op = Depthwise { stride, pad, activation: Activation::None, isa };
                let got = x.apply_op3(&k, &b, op)?.flatten_all()?.to_vec1::<f32>()?;
                prop_assert_eq!(got.len(), want.len());
                for (g, w) in got.iter().zip(&want) {
                    prop_assert!((f64::from(*g) - w).abs() < 1e-4, "{isa:?}: {g} against {w}");
                }
            }
        }

        /// The loss is linear in each argument, so a finite difference is exact but for rounding.
        #[test]
        fn gradients_match_finite_differences(
            c in 1usize..4, h in 2usize..12, w in 2usize..12, stride in 1usize..3, same in any::<bool>(), seed in any::<u64>(),
        ) {
            let pad = if same { Pad::same(h, w, stride) } else { Pad::ONE };
            let d = &Device::Cpu;
            let args = [(numbers(seed, 2 * c * h * w), vec![2, c, h, w]), (numbers(seed ^ 1, c * 9), vec![c, 1, 3, 3]), (numbers(seed ^ 2, c), vec![c])];
            let (oh, ow) = pad.output(h, w, stride).unwrap();
            let co = numbers(seed ^ 3, 2 * c * oh * ow);
            let loss = |x: &[f32], k: &[f32], b: &[f32]| -> f64 {
                reference(x, k, b, (2, c, h, w), stride, pad).iter().zip(&co).map(|(o, g)| o * f64::from(*g)).sum()
            };
            let vars = args.iter().map(|(v, s)| Var::from_vec(v.clone(), s.as_slice(), d)).collect::<candle_core::Result<Vec<_>>>()?;
            for isa in Isa::available() {
                let op = Depthwise { stride, pad, activation: Activation::None, isa };
                let out = vars[0].apply_op3(vars[1].as_tensor(), vars[2].as_tensor(), op)?;
                let total = (out * Tensor::from_vec(co.clone(), (2, c, oh, ow), d)?)?.sum_all()?;
                let grads = total.backward()?;
                for (a, var) in vars.iter().enumerate() {
                    let got = grads.get(var).unwrap().flatten_all()?.to_vec1::<f32>()?;
                    for i in (0..got.len()).step_by(7) {
                        let mut moved = [args[0].0.clone(), args[1].0.clone(), args[2].0.clone()];
                        moved[a][i] += 0.5;
                        let up = loss(&moved[0], &moved[1], &moved[2]);
                        moved[a][i] -= 1.0;
                        let want = up - loss(&moved[0], &moved[1], &moved[2]);
                        prop_assert!((f64::from(got[i]) - want).abs() < 2e-3 * want.abs().max(1.0), "{isa:?} argument {a}: {} against {want}", got[i]);
                    }
                }
            }
        }
    }

    #[test]
    fn relu6_clamps_keeps_nan_and_masks_the_gradient() -> Result<()> {
        let d = &Device::Cpu;
        let x = Var::from_vec(vec![-1f32, 3.0, 9.0, f32::NAN], (1, 4, 1, 1), d)?;
        let (w, b) = (
            Tensor::from_vec([0f32, 0., 0., 0., 1., 0., 0., 0., 0.].repeat(4), (4, 1, 3, 3), d)?,
            Tensor::zeros(4, candle_core::DType::F32, d)?,
        );
        let y = depthwise3x3(&x, &w, &b, 1, Pad::ONE, Activation::Relu6)?;
        let v = y.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(&v[..3], &[0.0, 3.0, 6.0]);
        assert!(v[3].is_nan());
        let grads = y.narrow(1, 0, 3)?.sum_all()?.backward()?;
        let g = grads.get(&x).map(|g| g.flatten_all()?.to_vec1::<f32>()).transpose()?;
        assert_eq!(g.map(|g| g[..3].to_vec()), Some(vec![0.0, 1.0, 0.0]));
        Ok(())
    }
}
