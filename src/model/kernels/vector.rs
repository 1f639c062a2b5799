//! Vectors of f32 of one instruction set each, for kernels that the compiler does not vectorise well by itself.

/// A vector of [`Self::LANES`] values.
///
/// # Safety
///
/// Every method may be called only where the processor has the instruction set, and only from code compiled for it
/// (else each call stays a call). Pointers are read or written for `LANES` values and need no alignment.
pub(super) trait Vector: Copy {
    const LANES: usize;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    /// `self * a + b`.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// The larger of the two; NaN where either is.
    unsafe fn largest(self, other: Self) -> Self;
    /// `self`, at least `low`; NaN stays.
    unsafe fn at_least(self, low: Self) -> Self;
    /// `self`, at most `high`; NaN stays.
    unsafe fn at_most(self, high: Self) -> Self;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Vector;
    use std::arch::x86_64::*;

    /// `of`, but `a` where `a` is NaN.
    #[inline(always)]
    unsafe fn keep512(a: __m512, of: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_mask_mov_ps(of, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a), a) }
    }

    #[inline(always)]
    unsafe fn keep256(a: __m256, of: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_blendv_ps(of, a, _mm256_cmp_ps::<_CMP_UNORD_Q>(a, a)) }
    }

    macro_rules! vector {
        ($type:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $add:ident, $fma:ident, $max:ident, $min:ident, $keep:ident) => {
            impl Vector for $type {
                const LANES: usize = $lanes;
                #[inline(always)]
                unsafe fn splat(value: f32) -> Self {
                    // SAFETY: the trait's contract.
                    unsafe { $splat(value) }
                }
                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    // SAFETY: the trait's contract.
                    unsafe { $load(from) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    // SAFETY: the trait's contract.
                    unsafe { $store(to, self) }
                }
                #[inline(always)]
                unsafe fn add(self, other: Self) -> Self {
                    // SAFETY: the trait's contract.
                    unsafe { $add(self, other) }
                }
                #[inline(always)]
                unsafe fn fma(self, a: Self, b: Self) -> Self {
                    // SAFETY: the trait's contract.
                    unsafe { $fma(self, a, b) }
                }
                #[inline(always)]
                unsafe fn largest(self, other: Self) -> Self {
                    // SAFETY: the trait's contract.
                    unsafe { $keep(self, $max(self, other)) }
                }
                // The instructions give their second operand where either is NaN.
                #[inline(always)]
                unsafe fn at_least(self, low: Self) -> Self {
                    // SAFETY: the trait's contract.
                    unsafe { $max(low, self) }
                }
                #[inline(always)]
                unsafe fn at_most(self, high: Self) -> Self {
                    // SAFETY: the trait's contract.
                    unsafe { $min(high, self) }
                }
            }
        };
    }
    vector!(
        __m512,
        16,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_fmadd_ps,
        _mm512_max_ps,
        _mm512_min_ps,
        keep512
    );
    vector!(
        __m256,
        8,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_fmadd_ps,
        _mm256_max_ps,
        _mm256_min_ps,
        keep256
    );
}

/// Four values in a form that every compiler vectorises: SSE2, NEON.
impl Vector for [f32; 4] {
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; 4]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the trait's contract: four values are there.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the trait's contract: four values may be written.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        std::array::from_fn(|l| self[l] + other[l])
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|l| crate::simd::fma::<{ cfg!(target_arch = "aarch64") }>(self[l], a[l], b[l]))
    }
    #[inline(always)]
    unsafe fn largest(self, other: Self) -> Self {
        std::array::from_fn(|l| if self[l] > other[l] || self[l].is_nan() { self[l] } else { other[l] })
    }
    #[inline(always)]
    unsafe fn at_least(self, low: Self) -> Self {
        std::array::from_fn(|l| if self[l] < low[l] { low[l] } else { self[l] })
    }
    #[inline(always)]
    unsafe fn at_most(self, high: Self) -> Self {
        std::array::from_fn(|l| if self[l] > high[l] { high[l] } else { self[l] })
    }
}
