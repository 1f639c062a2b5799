//! Batch norm, kept apart from the maps it acts on: a layer stores what its convolution gave, and whoever reads it
//! applies scale, shift and activation on the way. The activated map is never in memory.

use super::real::{clamp, fma, kernel, Real};

/// PyTorch's default epsilon of `BatchNorm2d`.
pub const EPS: f64 = 1e-5;
/// PyTorch's default momentum of running statistics.
pub const MOMENTUM: f64 = 0.1;

/// Count, mean and sum of squared deviations of one channel.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    pub count: f64,
    pub mean: f64,
    pub m2: f64,
}

impl Moments {
    /// Of values that lie in the cache: two passes, so that a mean far from zero does no harm.
    pub fn of<T: Real>(values: &[T]) -> Self {
        let n = values.len();
        if n == 0 {
            return Self::default();
        }
        let mut sum = [T::ZERO; 1];
        total(values, &mut sum);
        let mean = sum[0] / T::of(n as f64);
        let mut m2 = [T::ZERO; 1];
        deviation(values, mean, &mut m2);
        Self { count: n as f64, mean: mean.wide(), m2: m2[0].wide() }
    }

    /// Both together (Chan's formula).
    pub fn join(self, other: Self) -> Self {
        let count = self.count + other.count;
        if self.count == 0.0 || other.count == 0.0 {
            return if self.count == 0.0 { other } else { self };
        }
        let d = other.mean - self.mean;
        Self { count, mean: self.mean + d * other.count / count, m2: self.m2 + other.m2 + d * d * self.count * other.count / count }
    }

    /// Biased variance, as the normalisation uses it.
    pub fn variance(self) -> f64 {
        self.m2 / self.count.max(1.0)
    }
}

/// Lanes that sums run in.
const LANES: usize = 32;

kernel! {
    fn total<T>(values: &[T], out: &mut [T; 1]) {
        let mut lanes = [T::ZERO; LANES];
        let chunks = values.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (l, v) in lanes.iter_mut().zip(chunk) {
                *l += *v;
            }
        }
        let mut sum = T::ZERO;
        for v in lanes.iter().chain(rest) {
            sum += *v;
        }
        out[0] = sum;
        let _ = FUSED;
    }
}

kernel! {
    fn deviation<T>(values: &[T], mean: T, out: &mut [T; 1]) {
        let mut lanes = [T::ZERO; LANES];
        let chunks = values.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (l, v) in lanes.iter_mut().zip(chunk) {
                let d = *v - mean;
                *l = fma::<T, FUSED>(d, d, *l);
            }
        }
        let mut sum = T::ZERO;
        for v in lanes {
            sum += v;
        }
        for v in rest {
            sum += (*v - mean) * (*v - mean);
        }
        out[0] = sum;
    }
}

/// One layer's normalisation: `y = x * scale + shift`, per channel.
#[derive(Clone, Debug, Default)]
pub struct Norm<T> {
    pub scale: Vec<T>,
    pub shift: Vec<T>,
    pub mean: Vec<T>,
    pub inverse: Vec<T>,
}

impl<T: Real> Norm<T> {
    /// From mean and variance per channel and the learnt scale and shift.
    pub fn new(statistics: impl Iterator<Item = (f64, f64)>, gamma: &[T], beta: &[T]) -> Self {
        let mut norm = Self::default();
        for (((mean, variance), gamma), beta) in statistics.zip(gamma).zip(beta) {
            let inverse = 1.0 / (variance + EPS).sqrt();
            let scale = gamma.wide() * inverse;
            norm.scale.push(T::of(scale));
            norm.shift.push(T::of(beta.wide() - mean * scale));
            norm.mean.push(T::of(mean));
            norm.inverse.push(T::of(inverse));
        }
        norm
    }
}

/// A map of `channels` rows as a convolution reads it.
#[derive(Clone, Copy)]
pub enum Source<'a, T> {
    /// As it is.
    Plain(&'a [T]),
    /// Normalised and clamped to 0..top on the way.
    Normed { raw: &'a [T], norm: &'a Norm<T>, top: T },
}

impl<'a, T: Real> Source<'a, T> {
    /// The values behind it.
    pub fn raw(&self) -> &'a [T] {
        match self {
            Self::Plain(raw) | Self::Normed { raw, .. } => raw,
        }
    }

    /// Values `at..at + out.len()` of `channel`, which begins at `channel * stride`.
    pub fn read(&self, channel: usize, stride: usize, at: usize, out: &mut [T]) {
        let first = channel * stride + at;
        match self {
            Self::Plain(raw) => out.copy_from_slice(&raw[first..first + out.len()]),
            Self::Normed { raw, norm, top } => {
                activate(&raw[first..first + out.len()], norm.scale[channel], norm.shift[channel], *top, out)
            }
        }
    }
}

kernel! {
    /// `out = clamp(x * scale + shift, 0, top)`.
    pub fn activate<T>(x: &[T], scale: T, shift: T, top: T, out: &mut [T]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o = clamp(fma::<T, FUSED>(*x, scale, shift), top);
        }
    }
}

kernel! {
    /// `out = x * scale + shift (+ add)`: a linear bottleneck's output.
    pub fn affine<T>(x: &[T], scale: T, shift: T, add: Option<&[T]>, out: &mut [T]) {
        match add {
            Some(add) => for ((o, x), a) in out.iter_mut().zip(x).zip(add) {
                *o = fma::<T, FUSED>(*x, scale, shift) + *a;
            },
            None => for (o, x) in out.iter_mut().zip(x) {
                *o = fma::<T, FUSED>(*x, scale, shift);
            },
        }
    }
}

/// What a batch norm's backward pass needs of one channel: the sums of the gradient, and of the gradient times the
/// normalised value.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GradSums {
    pub grad: f64,
    pub grad_x: f64,
}

impl GradSums {
    /// Both together.
    pub fn join(self, other: Self) -> Self {
        Self { grad: self.grad + other.grad, grad_x: self.grad_x + other.grad_x }
    }
}

/// Sets `grad` to zero where the activation is flat, and sums it up.
pub fn mask_and_sum<T: Real>(grad: &mut [T], raw: &[T], norm: &Norm<T>, channel: usize, top: Option<T>) -> GradSums {
    let mut sums = [T::ZERO; 2];
    let c = channel;
    match top {
        Some(top) => masked_sums(grad, raw, [norm.scale[c], norm.shift[c], norm.mean[c], norm.inverse[c], top], &mut sums),
        None => plain_sums(grad, raw, [norm.mean[c], norm.inverse[c]], &mut sums),
    }
    GradSums { grad: sums[0].wide(), grad_x: sums[1].wide() }
}

/// Lanes that two sums at once run in.
const PAIR: usize = 16;

/// Sums of gradients that are left over behind whole lanes, and of lanes.
#[inline(always)]
fn both<T: Real>(a: [T; PAIR], b: [T; PAIR], rest: [T; 2]) -> [T; 2] {
    let sum = |lanes: [T; PAIR], rest: T| lanes.iter().fold(rest, |s, v| s + *v);
    [sum(a, rest[0]), sum(b, rest[1])]
}

// Lanes of a length that is known, one loop for each thing that is done with them: so they stay in registers.
kernel! {
    fn masked_sums<T>(grad: &mut [T], raw: &[T], of: [T; 5], out: &mut [T; 2]) {
        let [scale, shift, mean, inverse, top] = of;
        let kept = |g: T, x: T| {
            let y = fma::<T, FUSED>(x, scale, shift);
            if y > T::ZERO && y < top { g } else { T::ZERO }
        };
        let (mut a, mut b) = ([T::ZERO; PAIR], [T::ZERO; PAIR]);
        let mut chunks = grad.chunks_exact_mut(PAIR);
        let raw = raw.chunks_exact(PAIR);
        let last = raw.remainder();
        for (g, x) in (&mut chunks).zip(raw) {
            for i in 0..PAIR {
                g[i] = kept(g[i], x[i]);
            }
            for i in 0..PAIR {
                a[i] += g[i];
            }
            for i in 0..PAIR {
                b[i] = fma::<T, FUSED>(g[i], (x[i] - mean) * inverse, b[i]);
            }
        }
        let mut rest = [T::ZERO; 2];
        for (g, x) in chunks.into_remainder().iter_mut().zip(last) {
            *g = kept(*g, *x);
            rest = [rest[0] + *g, fma::<T, FUSED>(*g, (*x - mean) * inverse, rest[1])];
        }
        *out = both(a, b, rest);
    }
}

kernel! {
    fn plain_sums<T>(grad: &[T], raw: &[T], of: [T; 2], out: &mut [T; 2]) {
        let [mean, inverse] = of;
        let (mut a, mut b) = ([T::ZERO; PAIR], [T::ZERO; PAIR]);
        let (grad, raw) = (grad.chunks_exact(PAIR), raw.chunks_exact(PAIR));
        let (last, last_raw) = (grad.remainder(), raw.remainder());
        for (g, x) in grad.zip(raw) {
            for i in 0..PAIR {
                a[i] += g[i];
            }
            for i in 0..PAIR {
                b[i] = fma::<T, FUSED>(g[i], (x[i] - mean) * inverse, b[i]);
            }
        }
        let mut rest = [T::ZERO; 2];
        for (g, x) in last.iter().zip(last_raw) {
            rest = [rest[0] + *g, fma::<T, FUSED>(*g, (*x - mean) * inverse, rest[1])];
        }
        *out = both(a, b, rest);
    }
}

/// The gradient before a batch norm, made on the way from the one after it: `a * grad + b * raw + c`, per channel.
pub struct Before<'a, T> {
    grad: &'a [T],
    raw: &'a [T],
    a: Vec<T>,
    b: Vec<T>,
    c: Vec<T>,
}

impl<'a, T: Real> Before<'a, T> {
    /// `count` values per channel made the statistics.
    pub fn new(grad: &'a [T], raw: &'a [T], norm: &Norm<T>, sums: &[GradSums], count: usize) -> Self {
        let n = count as f64;
        let (mut va, mut vb, mut vc) = (Vec::new(), Vec::new(), Vec::new());
        for (c, s) in sums.iter().enumerate() {
            let (a, mean, inverse) = (norm.scale[c].wide(), norm.mean[c].wide(), norm.inverse[c].wide());
            let b = -a * inverse * s.grad_x / n;
            va.push(T::of(a));
            vb.push(T::of(b));
            vc.push(T::of(-a * s.grad / n - b * mean));
        }
        Self { grad, raw, a: va, b: vb, c: vc }
    }

    /// Values `at..at + out.len()` of `channel`, which begins at `channel * stride`.
    pub fn read(&self, channel: usize, stride: usize, at: usize, out: &mut [T]) {
        let first = channel * stride + at;
        let range = first..first + out.len();
        before(&self.grad[range.clone()], &self.raw[range], [self.a[channel], self.b[channel], self.c[channel]], out);
    }
}

kernel! {
    fn before<T>(grad: &[T], raw: &[T], of: [T; 3], out: &mut [T]) {
        let [a, b, c] = of;
        for ((o, g), x) in out.iter_mut().zip(grad).zip(raw) {
            *o = fma::<T, FUSED>(*g, a, fma::<T, FUSED>(*x, b, c));
        }
    }
}
