//! Inner products over rows of a matrix: the inner loop of the exact search.
//!
//! Reading is what costs: a map of 100 000 keyframes is 179 MB. So one sequential stream, each row
//! read once, which the hardware prefetches better than we could (measured: software prefetch cost
//! 5 to 15 % on 4 kB pages and won 4 % on huge ones); the query stays in the first-level cache. Huge
//! pages save a fifth of the time: see [`crate::simd::advise_huge_pages`].

use crate::simd::Isa;

/// `sum(a[i] * b[i])` over the shorter length.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let mut out = [0f32];
    scores_with(Isa::detect(), &a[..n], &b[..n], &mut out);
    out[0]
}

/// Inner products of `query` (D) with each row of `rows` (`out.len()` x D) into `out`.
pub fn scores(query: &[f32], rows: &[f32], out: &mut [f32]) {
    scores_with(Isa::detect(), query, rows, out);
}

/// [`scores`] on a given instruction set, which must be one of [`Isa::available`].
pub(crate) fn scores_with(isa: Isa, query: &[f32], rows: &[f32], out: &mut [f32]) {
    let dim = query.len();
    assert_eq!(rows.len(), dim * out.len(), "rows x dimensions");
    if dim == 0 {
        out.fill(0.0);
        return;
    }
    #[cfg(target_arch = "x86_64")]
    match isa.min(Isa::detect()) {
        // SAFETY: the processor has the features (`detect`), and the assertion above is the
        // function's contract on lengths.
        Isa::Avx512 => return unsafe { x86::scores_avx512(query, rows, out) },
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { x86::scores_avx2(query, rows, out) },
        Isa::Portable => {}
    }
    let _ = isa;
    for (row, out) in rows.chunks_exact(dim).zip(out) {
        *out = portable(query, row);
    }
}

fn portable(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let (ca, cb) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail: f32 = ca.remainder().iter().zip(cb.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in ca.zip(cb) {
        for l in 0..LANES {
            lanes[l] += a[l] * b[l];
        }
    }
    tail + lanes.iter().sum::<f32>()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// # Safety
    /// AVX-512 F must be there, and `rows.len() == query.len() * out.len()`.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn scores_avx512(query: &[f32], rows: &[f32], out: &mut [f32]) {
        let dim = query.len();
        let q = query.as_ptr();
        let (wide, tail) = (dim / 16 * 16, dim % 16);
        let mask: __mmask16 = ((1u32 << tail) - 1) as __mmask16;
        for (i, out) in out.iter_mut().enumerate() {
            // SAFETY: row i lies inside `rows` by the contract; the masked load reads only the
            // `tail` values that are left.
            unsafe {
                let r = rows.as_ptr().add(i * dim);
                let mut s = [_mm512_setzero_ps(); 4];
                let mut at = 0;
                while at + 64 <= wide {
                    for (k, s) in s.iter_mut().enumerate() {
                        let p = r.add(at + 16 * k);
                        *s = _mm512_fmadd_ps(_mm512_loadu_ps(q.add(at + 16 * k)), _mm512_loadu_ps(p), *s);
                    }
                    at += 64;
                }
                while at < wide {
                    s[0] = _mm512_fmadd_ps(_mm512_loadu_ps(q.add(at)), _mm512_loadu_ps(r.add(at)), s[0]);
                    at += 16;
                }
                if tail > 0 {
                    let a = _mm512_maskz_loadu_ps(mask, q.add(at));
                    let b = _mm512_maskz_loadu_ps(mask, r.add(at));
                    s[1] = _mm512_fmadd_ps(a, b, s[1]);
                }
                *out = _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])));
            }
        }
    }

    /// # Safety
    /// AVX2 and FMA must be there, and `rows.len() == query.len() * out.len()`.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn scores_avx2(query: &[f32], rows: &[f32], out: &mut [f32]) {
        let dim = query.len();
        let q = query.as_ptr();
        let wide = dim / 8 * 8;
        for (i, out) in out.iter_mut().enumerate() {
            // SAFETY: row i lies inside `rows` by the contract; `at` stays below `wide <= dim`.
            unsafe {
                let r = rows.as_ptr().add(i * dim);
                let mut s = [_mm256_setzero_ps(); 4];
                let mut at = 0;
                while at + 32 <= wide {
                    for (k, s) in s.iter_mut().enumerate() {
                        let p = r.add(at + 8 * k);
                        *s = _mm256_fmadd_ps(_mm256_loadu_ps(q.add(at + 8 * k)), _mm256_loadu_ps(p), *s);
                    }
                    at += 32;
                }
                while at < wide {
                    s[0] = _mm256_fmadd_ps(_mm256_loadu_ps(q.add(at)), _mm256_loadu_ps(r.add(at)), s[0]);
                    at += 8;
                }
                let sum = _mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3]));
                let mut lanes = [0f32; 8];
                _mm256_storeu_ps(lanes.as_mut_ptr(), sum);
                let tail: f32 = query[wide..].iter().zip(&rows[i * dim + wide..]).map(|(a, b)| a * b).sum();
                *out = lanes.iter().sum::<f32>() + tail;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_instruction_set_agrees_with_f64(dim in 1usize..200, rows in 1usize..9, seed in any::<u64>()) {
            let q: Vec<f32> = (0..dim as u64).map(|i| crate::test_noise(seed, i)).collect();
            let r: Vec<f32> = (0..(dim * rows) as u64).map(|i| crate::test_noise(!seed, i)).collect();
            for isa in Isa::available() {
                let mut out = vec![0f32; rows];
                scores_with(isa, &q, &r, &mut out);
                for (row, got) in r.chunks_exact(dim).zip(&out) {
                    let want: f64 = q.iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    prop_assert!((f64::from(*got) - want).abs() < 1e-4, "{isa:?}: {got} {want}");
                }
            }
        }
    }

    #[test]
    fn nan_and_infinity_are_not_hidden() {
        for isa in Isa::available() {
            for dim in [1, 7, 16, 33, 448] {
                let mut q = vec![1f32; dim];
                q[dim - 1] = f32::NAN;
                let mut out = [0f32];
                scores_with(isa, &q, &vec![1.0; dim], &mut out);
                assert!(out[0].is_nan(), "{isa:?} {dim}");
                q[dim - 1] = f32::INFINITY;
                scores_with(isa, &q, &vec![1.0; dim], &mut out);
                assert_eq!(out[0], f32::INFINITY, "{isa:?} {dim}");
            }
        }
    }
}
