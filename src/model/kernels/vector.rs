//! Vectors of f32 of one instruction set each, for kernels that the compiler does not vectorise well by itself.

/// Lanes of the longest vectors.
pub(super) const MOST_LANES: usize = 16;

/// A vector of [`Self::LANES`] values.
///
/// # Safety
///
/// Every method may be called only where the processor has the instruction set, and only from code compiled for it
/// (else each call stays a call). Pointers are read or written for `LANES` values and need no alignment.
pub(super) trait Vector: Copy {
    const LANES: usize;
    /// Of half as many lanes where [`Self::LANES`] are a unit; elsewhere what is at hand.
    type Half: Vector;
    /// Whether four products of 8-bit numbers are summed up in one instruction; else codes and weights are halved first, which takes
    /// registers.
    const DOT: bool;
    /// `LANES` sums of 32 bits.
    type Sums: Copy;
    /// Four codes, for each lane the same.
    type Four: Copy;
    /// Four weights for each lane.
    type Weights8: Copy;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    /// Asks for what will be loaded; where that is not said, nothing happens. `from` may be any address.
    unsafe fn prefetch(from: *const f32);
    /// As [`Self::prefetch`], no nearer than the second-level cache.
    unsafe fn prefetch_far(from: *const f32);
    /// `self * a + b`.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// The larger of the two; NaN where either is.
    unsafe fn largest(self, other: Self) -> Self;
    /// `self`, at least `low`; NaN stays.
    unsafe fn at_least(self, low: Self) -> Self;
    /// `self`, at most `high`; NaN stays.
    unsafe fn at_most(self, high: Self) -> Self;
    /// Without the sign.
    unsafe fn magnitude(self) -> Self;
    /// The highest lane of each of the first `LANES` of `rows`, none of which is NaN, side by side.
    unsafe fn highest(rows: &[Self; MOST_LANES]) -> Self;
    /// Values of 0 and more, to the nearest and at most 255, as `LANES` bytes.
    unsafe fn store_u8(self, to: *mut u8);
    unsafe fn sums(from: *const i32) -> Self::Sums;
    unsafe fn four(from: *const u8) -> Self::Four;
    unsafe fn weights8(from: *const i8) -> Self::Weights8;
    /// `sum` plus each lane's four products; exact.
    unsafe fn dot(sum: Self::Sums, x: Self::Four, w: Self::Weights8) -> Self::Sums;
    unsafe fn of_sums(sums: Self::Sums) -> Self;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Vector, MOST_LANES};
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

    /// The higher of two and two lanes, of `a` and `b` by turns.
    #[inline(always)]
    unsafe fn two512(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)) }
    }

    /// Of each part of 128 bits of four rows the highest lane.
    #[inline(always)]
    unsafe fn four512(rows: &[__m512; MOST_LANES], at: usize) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe {
            let a = _mm512_castps_pd(two512(rows[at], rows[at + 1]));
            let b = _mm512_castps_pd(two512(rows[at + 2], rows[at + 3]));
            _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)))
        }
    }

    /// The higher of the parts of 128 bits, pair by pair, of `a`, then of `b`.
    #[inline(always)]
    unsafe fn parts512(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_max_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b)) }
    }

    /// As [`two512`].
    #[inline(always)]
    unsafe fn two256(a: __m256, b: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)) }
    }

    /// As [`four512`].
    #[inline(always)]
    unsafe fn four256(rows: &[__m256; MOST_LANES], at: usize) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe {
            let a = _mm256_castps_pd(two256(rows[at], rows[at + 1]));
            let b = _mm256_castps_pd(two256(rows[at + 2], rows[at + 3]));
            _mm256_max_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)))
        }
    }

    macro_rules! vector {
        ($type:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $add:ident, $fma:ident, $max:ident, $min:ident, $keep:ident, { $($more:tt)* }) => {
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
                unsafe fn prefetch(from: *const f32) {
                    // SAFETY: the trait's contract.
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
                }
                #[inline(always)]
                unsafe fn prefetch_far(from: *const f32) {
                    // SAFETY: the trait's contract.
                    unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) }
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
                $($more)*
            }
        };
    }
    vector! {
        __m512,
        16,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_fmadd_ps,
        _mm512_max_ps,
        _mm512_min_ps,
        keep512, {
        type Half = __m256;
        const DOT: bool = true;
        type Sums = __m512i;
        type Four = __m512i;
        type Weights8 = __m512i;
        #[inline(always)]
        unsafe fn magnitude(self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { _mm512_abs_ps(self) }
        }
        #[inline(always)]
        unsafe fn highest(rows: &[Self; MOST_LANES]) -> Self {
            // SAFETY: the trait's contract.
            unsafe { parts512(parts512(four512(rows, 0), four512(rows, 4)), parts512(four512(rows, 8), four512(rows, 12))) }
        }
        #[inline(always)]
        unsafe fn store_u8(self, to: *mut u8) {
            // SAFETY: the trait's contract.
            unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(self))) }
        }
        #[inline(always)]
        unsafe fn sums(from: *const i32) -> __m512i {
            // SAFETY: the trait's contract.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn four(from: *const u8) -> __m512i {
            // SAFETY: the trait's contract.
            unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
        }
        #[inline(always)]
        unsafe fn weights8(from: *const i8) -> __m512i {
            // SAFETY: the trait's contract.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        /// Needs VNNI.
        #[inline(always)]
        unsafe fn dot(sum: __m512i, x: __m512i, w: __m512i) -> __m512i {
            // SAFETY: the trait's contract.
            unsafe { _mm512_dpbusd_epi32(sum, x, w) }
        }
        #[inline(always)]
        unsafe fn of_sums(sums: __m512i) -> Self {
            // SAFETY: the trait's contract.
            unsafe { _mm512_cvtepi32_ps(sums) }
        }
        }
    }
    vector! {
        __m256,
        8,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_fmadd_ps,
        _mm256_max_ps,
        _mm256_min_ps,
        keep256, {
        type Half = Self;
        const DOT: bool = false;
        type Sums = __m256i;
        // Codes and weights of even and of odd places, widened to 16 bits: the product of 8-bit numbers saturates.
        type Four = [__m256i; 2];
        type Weights8 = [__m256i; 2];
        #[inline(always)]
        unsafe fn magnitude(self) -> Self {
            // SAFETY: the trait's contract.
            unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), self) }
        }
        #[inline(always)]
        unsafe fn highest(rows: &[Self; MOST_LANES]) -> Self {
            // SAFETY: the trait's contract.
            unsafe {
                let (a, b) = (four256(rows, 0), four256(rows, 4));
                _mm256_max_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
            }
        }
        #[inline(always)]
        unsafe fn store_u8(self, to: *mut u8) {
            // SAFETY: the trait's contract.
            unsafe {
                let codes = _mm256_cvtps_epi32(_mm256_min_ps(self, _mm256_set1_ps(255.0)));
                let codes = _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
                _mm_storel_epi64(to.cast(), _mm_packus_epi16(codes, codes));
            }
        }
        #[inline(always)]
        unsafe fn sums(from: *const i32) -> __m256i {
            // SAFETY: the trait's contract.
            unsafe { _mm256_loadu_si256(from.cast()) }
        }
        #[inline(always)]
        unsafe fn four(from: *const u8) -> [__m256i; 2] {
            // SAFETY: the trait's contract.
            unsafe {
                let x = _mm256_set1_epi32(from.cast::<i32>().read_unaligned());
                [_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16::<8>(x)]
            }
        }
        #[inline(always)]
        unsafe fn weights8(from: *const i8) -> [__m256i; 2] {
            // SAFETY: the trait's contract.
            unsafe {
                let w = _mm256_loadu_si256(from.cast());
                [_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(w)), _mm256_srai_epi16::<8>(w)]
            }
        }
        #[inline(always)]
        unsafe fn dot(sum: __m256i, x: [__m256i; 2], w: [__m256i; 2]) -> __m256i {
            // SAFETY: the trait's contract.
            unsafe { _mm256_add_epi32(_mm256_add_epi32(sum, _mm256_madd_epi16(x[0], w[0])), _mm256_madd_epi16(x[1], w[1])) }
        }
        #[inline(always)]
        unsafe fn of_sums(sums: __m256i) -> Self {
            // SAFETY: the trait's contract.
            unsafe { _mm256_cvtepi32_ps(sums) }
        }
        }
    }
}

/// Vectors of AVX2 on processors with AVX-VNNI, which sum up products of 8-bit numbers as AVX-512's do.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Vnni256(std::arch::x86_64::__m256);

#[cfg(target_arch = "x86_64")]
mod vnni {
    use super::{Vector, Vnni256, MOST_LANES};
    use std::arch::x86_64::*;

    /// What AVX2's vectors do.
    macro_rules! same {
        ($($name:ident($($arg:ident: $type:ty),*) -> $out:ty, $made:expr;)*) => {
            $(
                #[inline(always)]
                unsafe fn $name($($arg: $type),*) -> $out {
                    // SAFETY: the trait's contract, for what is in the vectors.
                    unsafe { $made }
                }
            )*
        };
    }

    impl Vector for Vnni256 {
        const LANES: usize = 8;
        type Half = Self;
        const DOT: bool = true;
        type Sums = __m256i;
        type Four = __m256i;
        type Weights8 = __m256i;
        same! {
            splat(value: f32) -> Self, Self(Vector::splat(value));
            load(from: *const f32) -> Self, Self(Vector::load(from));
            prefetch(from: *const f32) -> (), __m256::prefetch(from);
            prefetch_far(from: *const f32) -> (), __m256::prefetch_far(from);
            sums(from: *const i32) -> __m256i, __m256::sums(from);
            of_sums(sums: __m256i) -> Self, Self(Vector::of_sums(sums));
            four(from: *const u8) -> __m256i, _mm256_set1_epi32(from.cast::<i32>().read_unaligned());
            weights8(from: *const i8) -> __m256i, _mm256_loadu_si256(from.cast());
            dot(sum: __m256i, x: __m256i, w: __m256i) -> __m256i, _mm256_dpbusd_avx_epi32(sum, x, w);
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: the trait's contract.
            unsafe { self.0.store(to) }
        }
        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { self.0.add(other.0) })
        }
        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { self.0.fma(a.0, b.0) })
        }
        #[inline(always)]
        unsafe fn largest(self, other: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { self.0.largest(other.0) })
        }
        #[inline(always)]
        unsafe fn at_least(self, low: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { self.0.at_least(low.0) })
        }
        #[inline(always)]
        unsafe fn at_most(self, high: Self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { self.0.at_most(high.0) })
        }
        #[inline(always)]
        unsafe fn magnitude(self) -> Self {
            // SAFETY: the trait's contract.
            Self(unsafe { self.0.magnitude() })
        }
        #[inline(always)]
        unsafe fn highest(rows: &[Self; MOST_LANES]) -> Self {
            // SAFETY: the trait's contract; a `Vnni256` is nothing but an `__m256`.
            unsafe { Self(Vector::highest(&*std::ptr::from_ref(rows).cast::<[__m256; MOST_LANES]>())) }
        }
        #[inline(always)]
        unsafe fn store_u8(self, to: *mut u8) {
            // SAFETY: the trait's contract.
            unsafe { self.0.store_u8(to) }
        }
    }
}

/// Four values in a form that every compiler vectorises: SSE2, NEON.
impl Vector for [f32; 4] {
    const LANES: usize = 4;
    type Half = Self;
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
    unsafe fn prefetch(_: *const f32) {}
    #[inline(always)]
    unsafe fn prefetch_far(_: *const f32) {}
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
    const DOT: bool = false;
    type Sums = [i32; 4];
    type Four = [u8; 4];
    type Weights8 = [i8; 16];
    #[inline(always)]
    unsafe fn magnitude(self) -> Self {
        self.map(f32::abs)
    }
    #[inline(always)]
    unsafe fn highest(rows: &[Self; MOST_LANES]) -> Self {
        std::array::from_fn(|at| rows[at].into_iter().fold(f32::NEG_INFINITY, f32::max))
    }
    #[inline(always)]
    unsafe fn store_u8(self, to: *mut u8) {
        // SAFETY: the trait's contract: four bytes may be written.
        unsafe { to.cast::<[u8; 4]>().write_unaligned(self.map(|v| v.round_ties_even() as u8)) }
    }
    #[inline(always)]
    unsafe fn sums(from: *const i32) -> [i32; 4] {
        // SAFETY: the trait's contract: four values are there.
        unsafe { from.cast::<[i32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn four(from: *const u8) -> [u8; 4] {
        // SAFETY: the trait's contract: four codes are there.
        unsafe { from.cast::<[u8; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn weights8(from: *const i8) -> [i8; 16] {
        // SAFETY: the trait's contract: four weights for each lane are there.
        unsafe { from.cast::<[i8; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn dot(sum: [i32; 4], x: [u8; 4], w: [i8; 16]) -> [i32; 4] {
        std::array::from_fn(|l| sum[l] + (0..4).map(|i| i32::from(x[i]) * i32::from(w[4 * l + i])).sum::<i32>())
    }
    #[inline(always)]
    unsafe fn of_sums(sums: [i32; 4]) -> Self {
        sums.map(|s| s as f32)
    }
}
