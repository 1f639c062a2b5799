//! Rows as 8-bit codes: what the search reads first, a quarter of the bytes. Each code comes with how far it is from its row, so
//! that a scan of the codes bounds every similarity from both sides, and nothing has to be believed about the data [ours].

use crate::simd::Isa;

/// Codes of a row are padded with zeros to a multiple of this, so that kernels need no tail.
const PAD: usize = 64;
/// Largest code of a row.
const ROW_MAX: f32 = 127.0;

/// Codes that a row of `dim` values takes.
pub fn stride(dim: usize) -> usize {
    dim.next_multiple_of(PAD)
}

/// What makes a row's codes numbers again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Value of the code 1.
    step: f32,
    /// Euclidean length of the row less its codes' values; never below the truth.
    error: f32,
    /// Sum of the codes.
    sum: i32,
}

/// Rounded up, by more than the arithmetic before can have lost.
fn upwards(v: f64) -> f32 {
    (v * (1.0 + 1e-6)) as f32 + f32::MIN_POSITIVE
}

/// Appends the codes of `row`.
pub fn encode(row: &[f32], codes: &mut Vec<i8>) -> Scale {
    let largest = row.iter().fold(0f32, |m, v| m.max(v.abs()));
    let step = if largest > 0.0 { largest / ROW_MAX } else { 1.0 };
    let (mut sum, mut error) = (0, 0f64);
    codes.extend(row.iter().map(|&v| {
        // To the nearest; without `round`, which is a function call on processors that the compiler may not suppose.
        let code = (v / step + 0.5f32.copysign(v)) as i8;
        let lost = f64::from(v) - f64::from(step) * f64::from(code);
        (sum, error) = (sum + i32::from(code), error + lost * lost);
        code
    }));
    codes.resize(codes.len() - row.len() + stride(row.len()), 0);
    Scale { step, error: upwards(error.sqrt()), sum }
}

/// A query in 16 bits, whose own error is far below the rows'.
#[derive(Clone, Debug)]
pub struct Query {
    /// Padded as the rows are.
    values: Vec<i16>,
    /// Upper and lower bytes of the values plus 32768: the products of VNNI take one factor without a sign.
    #[cfg(target_arch = "x86_64")]
    bytes: Vec<u8>,
    step: f32,
    /// What an error of 1 in a row moves a similarity by, at most.
    per_error: f32,
    /// What else moves it: the query's error, and the rounding of the exact similarity itself.
    slack: f32,
}

impl Query {
    /// For rows that are no longer than `longest`.
    pub fn new(query: &[f32], longest: f32) -> Self {
        let dim = query.len();
        // No sum of products may leave 32 bits.
        let most = ((i32::MAX as usize / (ROW_MAX as usize * dim.max(1))).min(i16::MAX as usize)) as f32;
        let largest = query.iter().fold(0f32, |m, v| m.max(v.abs()));
        let step = if largest > 0.0 { largest / most } else { 1.0 };
        let mut values: Vec<i16> = query.iter().map(|v| (v / step + 0.5f32.copysign(*v)) as i16).collect();
        let lost = |(v, c): (&f32, &i16)| (f64::from(*v) - f64::from(step) * f64::from(*c)).powi(2);
        let error = query.iter().zip(&values).map(lost).sum::<f64>().sqrt();
        let norm = query.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        values.resize(stride(dim), 0);
        #[cfg(target_arch = "x86_64")]
        let bytes = {
            let shifted = |v: &i16| (*v as u16) ^ 0x8000;
            values.iter().map(|v| (shifted(v) >> 8) as u8).chain(values.iter().map(|v| shifted(v) as u8)).collect()
        };
        // n roundings of products and sums, here and in the exact similarity.
        let rounding = (dim + 16) as f64 * f64::from(f32::EPSILON) * norm * f64::from(longest);
        let slack = upwards(error * f64::from(longest) + rounding);
        Self {
            values,
            #[cfg(target_arch = "x86_64")]
            bytes,
            step,
            per_error: upwards(norm + error),
            slack,
        }
    }

    /// Bounds of a row's similarity to the query, from the sum of the products of their codes.
    #[inline(always)]
    pub fn bounds(&self, products: i32, row: &Scale) -> (f32, f32) {
        let middle = products as f32 * (self.step * row.step);
        let slack = self.per_error * row.error + self.slack;
        (middle - slack, middle + slack)
    }

    /// Sums of the products of the query's codes with each row's, into `out`.
    pub fn products(&self, codes: &[i8], scales: &[Scale], out: &mut [i32]) {
        self.products_with(Isa::detect(), codes, scales, out);
    }

    /// [`Query::products`] on an instruction set of [`Isa::available`]: the same numbers on each.
    pub(crate) fn products_with(&self, isa: Isa, codes: &[i8], scales: &[Scale], out: &mut [i32]) {
        let stride = self.values.len();
        assert!(codes.len() == stride * out.len() && scales.len() == out.len() && stride.is_multiple_of(PAD), "rows x padded dimensions");
        if stride == 0 {
            out.fill(0);
            return;
        }
        #[cfg(target_arch = "x86_64")]
        match isa.min(Isa::detect()) {
            Isa::Avx512 if std::arch::is_x86_feature_detected!("avx512vnni") => {
                // SAFETY: the processor has the features; the assertion above is the function's contract on lengths,
                // and `bytes` is twice as long as `values`.
                return unsafe { x86::products_vnni(&self.bytes, codes, scales, out) };
            }
            // SAFETY: AVX-512 comes with AVX2; lengths as above.
            Isa::Avx512 | Isa::Avx2 => return unsafe { x86::products_avx2(&self.values, codes, out) },
            Isa::Portable => {}
        }
        let _ = isa;
        for (row, out) in codes.chunks_exact(stride).zip(out) {
            *out = self.values.iter().zip(row).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum();
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Scale, PAD};
    use std::arch::x86_64::*;

    /// # Safety
    /// AVX-512 F and VNNI must be there; with `stride = bytes.len() / 2`, a multiple of 64: `codes.len() == stride * out.len()` and
    /// `scales.len() == out.len()`.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub unsafe fn products_vnni(bytes: &[u8], codes: &[i8], scales: &[Scale], out: &mut [i32]) {
        let stride = bytes.len() / 2;
        let (high, low) = bytes.split_at(stride);
        for (i, (out, scale)) in out.iter_mut().zip(scales).enumerate() {
            let mut sums = [_mm512_setzero_si512(); 2];
            for at in (0..stride).step_by(PAD) {
                // SAFETY: 64 bytes from `at` on lie inside the row and inside both halves by the contract.
                unsafe {
                    let row = _mm512_loadu_si512(codes.as_ptr().add(i * stride + at).cast());
                    sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_loadu_si512(high.as_ptr().add(at).cast()), row);
                    sums[1] = _mm512_dpbusd_epi32(sums[1], _mm512_loadu_si512(low.as_ptr().add(at).cast()), row);
                }
            }
            // Sums may wrap in between: what comes out fits 32 bits.
            let sum = _mm512_reduce_add_epi32(_mm512_add_epi32(_mm512_slli_epi32::<8>(sums[0]), sums[1]));
            *out = sum.wrapping_sub(scale.sum.wrapping_mul(1 << 15));
        }
    }

    /// # Safety
    /// AVX2 must be there; `values.len()` is a multiple of 16 and `codes.len() == values.len() * out.len()`.
    #[target_feature(enable = "avx2")]
    pub unsafe fn products_avx2(values: &[i16], codes: &[i8], out: &mut [i32]) {
        let stride = values.len();
        for (i, out) in out.iter_mut().enumerate() {
            let mut sum = _mm256_setzero_si256();
            for at in (0..stride).step_by(16) {
                // SAFETY: 16 values from `at` on lie inside the row and the query by the contract.
                unsafe {
                    let row = _mm256_cvtepi8_epi16(_mm_loadu_si128(codes.as_ptr().add(i * stride + at).cast()));
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_loadu_si256(values.as_ptr().add(at).cast()), row));
                }
            }
            let mut lanes = [0i32; 8];
            // SAFETY: eight numbers of 32 bits.
            unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum) };
            *out = lanes.iter().sum();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::dot;
    use proptest::prelude::*;

    proptest! {
        /// Rows of noise, and rows of which one value is far above the others: the codes of these lose the most.
        #[test]
        fn bounds_hold_on_every_instruction_set(dim in 1usize..300, n in 0usize..9, peak in 0f32..1e4, scale in 1e-3f32..1e3, seed in any::<u64>()) {
            let noise = |seed: u64, i: usize| crate::test_noise(seed, i as u64);
            let query: Vec<f32> = (0..dim).map(|i| scale * noise(seed, i)).collect();
            let mut rows: Vec<Vec<f32>> = (0..n).map(|r| (0..dim).map(|i| noise(!seed, r * dim + i)).collect()).collect();
            for row in rows.iter_mut().step_by(2) { row[dim / 2] *= peak; }
            rows.push(query.clone());
            rows.push(vec![0.0; dim]);
            let (mut codes, mut scales) = (Vec::new(), Vec::new());
            for row in &rows { scales.push(encode(row, &mut codes)); }
            let longest = rows.iter().map(|r| dot(r, r).sqrt()).fold(0.0, f32::max) * 1.0001;
            let coded = Query::new(&query, longest);
            let mut first = None;
            for isa in Isa::available() {
                let mut out = vec![0; rows.len()];
                coded.products_with(isa, &codes, &scales, &mut out);
                for ((row, products), scale) in rows.iter().zip(&out).zip(&scales) {
                    let (low, high) = coded.bounds(*products, scale);
                    let exact = dot(&query, row);
                    prop_assert!(low <= exact && exact <= high, "{isa:?}: {low} {exact} {high}");
                }
                prop_assert_eq!(first.get_or_insert_with(|| out.clone()), &out);
            }
        }
    }

    /// The largest sums that codes can have, in a dimension whose products just fit 32 bits.
    #[test]
    fn the_largest_products_fit() {
        for dim in [64, 448, 516, 517, 4096, 50_000] {
            for sign in [1.0, -1.0] {
                let (query, row) = (vec![1f32; dim], vec![sign; dim]);
                let mut codes = Vec::new();
                let scale = encode(&row, &mut codes);
                let coded = Query::new(&query, (dim as f32).sqrt() * 1.0001);
                for isa in Isa::available() {
                    let mut out = [0];
                    coded.products_with(isa, &codes, &[scale], &mut out);
                    let (low, high) = coded.bounds(out[0], &scale);
                    let exact = sign * dim as f32;
                    assert!(low <= exact && exact <= high && high - low < 0.05 * dim as f32, "{isa:?} {dim}: {low} {exact} {high}");
                }
            }
        }
    }
}
