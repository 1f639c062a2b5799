//! Inner products of descriptors.

use crate::simd::Isa;

/// `sum(a[i] * b[i])` over the shorter length.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    dot_with(Isa::detect(), &a[..n], &b[..n])
}

/// [`dot`] on a given instruction set, which must be one of [`Isa::available`].
pub(crate) fn dot_with(isa: Isa, a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "dimensions");
    #[cfg(target_arch = "x86_64")]
    match isa.min(Isa::detect()) {
        // SAFETY: the processor has the features (`detect`), and the assertion above is the
        // function's contract on lengths.
        Isa::Avx512 => return unsafe { x86::dot_avx512(a, b) },
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { x86::dot_avx2(a, b) },
        Isa::Portable => {}
    }
    let _ = isa;
    portable(a, b)
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
    /// AVX-512 F must be there, and `a.len() == b.len()`.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn dot_avx512(a: &[f32], b: &[f32]) -> f32 {
        let dim = a.len();
        let (wide, tail) = (dim / 16 * 16, dim % 16);
        let (a, b) = (a.as_ptr(), b.as_ptr());
        // SAFETY: `at` stays below the length of both; the masked loads read only the `tail` values that are left.
        unsafe {
            let mut s = [_mm512_setzero_ps(); 4];
            let mut at = 0;
            while at + 64 <= wide {
                for (k, s) in s.iter_mut().enumerate() {
                    *s = _mm512_fmadd_ps(_mm512_loadu_ps(a.add(at + 16 * k)), _mm512_loadu_ps(b.add(at + 16 * k)), *s);
                }
                at += 64;
            }
            while at < wide {
                s[0] = _mm512_fmadd_ps(_mm512_loadu_ps(a.add(at)), _mm512_loadu_ps(b.add(at)), s[0]);
                at += 16;
            }
            if tail > 0 {
                let mask: __mmask16 = ((1u32 << tail) - 1) as __mmask16;
                s[1] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, a.add(at)), _mm512_maskz_loadu_ps(mask, b.add(at)), s[1]);
            }
            _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s[0], s[1]), _mm512_add_ps(s[2], s[3])))
        }
    }

    /// # Safety
    /// AVX2 and FMA must be there, and `a.len() == b.len()`.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn dot_avx2(a: &[f32], b: &[f32]) -> f32 {
        let wide = a.len() / 8 * 8;
        let (pa, pb) = (a.as_ptr(), b.as_ptr());
        // SAFETY: `at` stays below `wide`, which is no more than the length of both.
        unsafe {
            let mut s = [_mm256_setzero_ps(); 4];
            let mut at = 0;
            while at + 32 <= wide {
                for (k, s) in s.iter_mut().enumerate() {
                    *s = _mm256_fmadd_ps(_mm256_loadu_ps(pa.add(at + 8 * k)), _mm256_loadu_ps(pb.add(at + 8 * k)), *s);
                }
                at += 32;
            }
            while at < wide {
                s[0] = _mm256_fmadd_ps(_mm256_loadu_ps(pa.add(at)), _mm256_loadu_ps(pb.add(at)), s[0]);
                at += 8;
            }
            let sum = _mm256_add_ps(_mm256_add_ps(s[0], s[1]), _mm256_add_ps(s[2], s[3]));
            let mut lanes = [0f32; 8];
            _mm256_storeu_ps(lanes.as_mut_ptr(), sum);
            lanes.iter().sum::<f32>() + a[wide..].iter().zip(&b[wide..]).map(|(a, b)| a * b).sum::<f32>()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_instruction_set_agrees_with_f64(dim in 0usize..200, seed in any::<u64>()) {
            let a: Vec<f32> = (0..dim as u64).map(|i| crate::test_noise(seed, i)).collect();
            let b: Vec<f32> = (0..dim as u64).map(|i| crate::test_noise(!seed, i)).collect();
            let want: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            for isa in Isa::available() {
                let got = dot_with(isa, &a, &b);
                prop_assert!((f64::from(got) - want).abs() < 1e-4, "{isa:?}: {got} {want}");
            }
        }
    }

    #[test]
    fn nan_and_infinity_are_not_hidden() {
        for isa in Isa::available() {
            for dim in [1, 7, 16, 33, 448] {
                let mut q = vec![1f32; dim];
                q[dim - 1] = f32::NAN;
                assert!(dot_with(isa, &q, &vec![1.0; dim]).is_nan(), "{isa:?} {dim}");
                q[dim - 1] = f32::INFINITY;
                assert_eq!(dot_with(isa, &q, &vec![1.0; dim]), f32::INFINITY, "{isa:?} {dim}");
            }
        }
    }
}
