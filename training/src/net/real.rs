//! The numbers that training computes with, and how its loops are compiled.

use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

/// f32, in which training runs, or f64, in which gradients are checked against finite differences.
pub trait Real:
    candle_core::WithDType
    + Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Rounds.
    fn of(value: f64) -> Self;
    /// Widens.
    fn wide(self) -> f64;
    /// `self * b + c`, rounded once.
    fn fused(self, b: Self, c: Self) -> Self;
    /// `self ^ p` for positive `self`.
    fn power(self, p: Self) -> Self;
    /// Natural logarithm.
    fn log(self) -> Self;
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            #[inline(always)]
            fn of(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn wide(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn fused(self, b: Self, c: Self) -> Self {
                self.mul_add(b, c)
            }
            #[inline(always)]
            fn power(self, p: Self) -> Self {
                self.powf(p)
            }
            #[inline(always)]
            fn log(self) -> Self {
                self.ln()
            }
        }
    };
}
real!(f32);
real!(f64);

/// `a * b + c`, fused where the instruction set has it (the libm fallback is far too slow).
#[inline(always)]
pub fn fma<T: Real, const FUSED: bool>(a: T, b: T, c: T) -> T {
    if FUSED {
        a.fused(b, c)
    } else {
        a * b + c
    }
}

/// `min(max(x, 0), top)`; NaN stays, so that a broken input is seen downstream.
#[inline(always)]
pub fn clamp<T: Real>(x: T, top: T) -> T {
    let x = if x < T::ZERO { T::ZERO } else { x };
    if x > top {
        top
    } else {
        x
    }
}

/// A function over slices whose one safe body is compiled for each instruction set and chosen at run time. The body may
/// use the constant `FUSED`.
macro_rules! kernel {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$T:ident>($($arg:ident : $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis fn $name<$T: $crate::net::real::Real>($($arg: $ty),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<$T: $crate::net::real::Real, const FUSED: bool>($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2<$T: $crate::net::real::Real>($($arg: $ty),*) { body::<$T, true>($($arg),*) }
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512<$T: $crate::net::real::Real>($($arg: $ty),*) { body::<$T, true>($($arg),*) }
                if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("fma") {
                    // SAFETY: the processor has these features.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body::<$T, { cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}
pub(crate) use kernel;
