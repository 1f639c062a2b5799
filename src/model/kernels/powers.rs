//! Sums over pixels of what a pooling makes of their values.

use super::fma;
use crate::model::{Pooling, GEM_EPS};

/// Adds what `pooling` makes of each pixel's values, as many as there are `sums`, to those.
#[inline(always)]
pub(super) fn add_powers<const FUSED: bool>(pixels: &[f32], sums: &mut [f32], pooling: Pooling) {
    for pixel in pixels.chunks_exact(sums.len()) {
        let pairs = sums.iter_mut().zip(pixel);
        match pooling {
            Pooling::Average => pairs.for_each(|(s, v)| *s += v),
            Pooling::Gem { p: 3.0 } => pairs.for_each(|(s, v)| *s += floored(*v) * floored(*v) * floored(*v)),
            Pooling::Gem { p } => {
                let rest = (p - p.round()) as f32;
                // The number of factors known to the compiler: else there are no vectors.
                match p.round() as i64 {
                    1 => pairs.for_each(|(s, v)| *s += power::<FUSED, 1>(floored(*v), rest)),
                    2 => pairs.for_each(|(s, v)| *s += power::<FUSED, 2>(floored(*v), rest)),
                    3 => pairs.for_each(|(s, v)| *s += power::<FUSED, 3>(floored(*v), rest)),
                    4 => pairs.for_each(|(s, v)| *s += power::<FUSED, 4>(floored(*v), rest)),
                    5 => pairs.for_each(|(s, v)| *s += power::<FUSED, 5>(floored(*v), rest)),
                    // In f64: what f32 rounds off so large an exponent, times the logarithm, is more than the rest is wrong by.
                    _ => pairs.for_each(|(s, v)| *s += f64::from(floored(*v)).powf(p) as f32),
                }
            }
        }
    }
}

#[inline(always)]
fn floored(v: f32) -> f32 {
    if v < GEM_EPS as f32 {
        GEM_EPS as f32
    } else {
        v
    }
}

/// `x`, above 0 and normal, to the power of `WHOLE`, at least 1, and `rest`, -0.5 to 0.5. NaN and infinity stay. In a form that
/// compilers make vectors of, which `powf` is not: a trained exponent is no whole number, and cost a twentieth of the network's time.
/// What is no whole power is near 1, and so its error is small.
#[inline(always)]
fn power<const FUSED: bool, const WHOLE: usize>(x: f32, rest: f32) -> f32 {
    let mut product = x;
    for _ in 1..WHOLE {
        product *= x;
    }
    // The binary logarithm: the exponent, and by the series of (m - 1) / (m + 1) that of the mantissa, which is between the roots of
    // 1/2 and 2.
    const ROOT_OF_HALF: u32 = 0x3f35_04f3;
    let bits = x.to_bits().wrapping_sub(ROOT_OF_HALF);
    let exponent = (bits as i32 >> 23) as f32;
    let mantissa = f32::from_bits((bits & 0x007f_ffff) + ROOT_OF_HALF);
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let mut series = 0.320_598_9;
    for c in [0.412_198_6, 0.577_078, 0.961_796_7, 2.885_39] {
        series = fma::<FUSED>(series, t * t, c);
    }
    let y = rest * fma::<FUSED>(series, t, exponent);
    // Two to the power of y: the nearest whole number is what the mantissa's last bits say after this sum; the series of 2^x the rest.
    const ROUND: f32 = 12_582_912.0;
    let rounded = y + ROUND;
    let left = y - (rounded - ROUND);
    let mut root = 1.525_273_4e-5;
    for c in [1.540_353e-4, 1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 0.240_226_5, std::f32::consts::LN_2, 1.0] {
        root = fma::<FUSED>(root, left, c);
    }
    let whole_power = f32::from_bits(rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    product * (root * whole_power)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{dispatch, Isa};
    use proptest::prelude::*;

    fn sums(isa: Isa, pixels: &[f32], channels: usize, pooling: Pooling) -> Vec<f32> {
        let mut sums = vec![0f32; channels];
        let all = &mut sums[..];
        dispatch!(isa, add_powers(pixels: &[f32], all: &mut [f32], pooling: Pooling));
        sums
    }

    proptest! {
        #[test]
        fn equals_the_definition_in_f64(seed in any::<u64>(), channels in 1usize..70, pixels in 0usize..30, p in 1f64..9.0, whole: bool, scale in -3f32..4.0) {
            let p = if whole { p.round() } else { p };
            let values: Vec<f32> = (0..(channels * pixels) as u64).map(|i| 10f32.powf(scale) * crate::test_noise(seed, i)).collect();
            for isa in Isa::available() {
                for pooling in [Pooling::Average, Pooling::Gem { p }] {
                    let got = sums(isa, &values, channels, pooling);
                    for c in 0..channels {
                        let of = |v: f32| match pooling {
                            Pooling::Average => f64::from(v),
                            // The floor is a number of f32.
                            Pooling::Gem { p } => f64::from(v.max(GEM_EPS as f32)).powf(p),
                        };
                        let all = (0..pixels).map(|i| of(values[i * channels + c]));
                        let (want, size) = all.fold((0f64, 0f64), |(sum, size), v| (sum + v, size + v.abs()));
                        prop_assert!((f64::from(got[c]) - want).abs() <= 4e-6 * size + f64::from(f32::MIN_POSITIVE), "{isa:?} {pooling:?}: {} {want}", got[c]);
                    }
                }
            }
        }
    }

    #[test]
    fn one_power_is_exact_to_a_few_last_bits() {
        for i in 0..200_000u32 {
            let x = 1e-6f32 * (1.0001f32).powi(i as i32 + 1);
            let want = f64::from(x).powf(3.0 + f64::from(0.011_363_745f32));
            let got = f64::from(power::<false, 3>(x, 0.011_363_745));
            assert!(!(want < 1e30 && want > 1e-30) || (got - want).abs() <= 4e-7 * want, "{x}: {got} {want}");
        }
    }

    #[test]
    fn a_large_exponent_is_not_rounded_to_f32() {
        for isa in Isa::available() {
            for (p, x) in [(8.267_342_074_377_346, 7_000f32), (11.3, 300.0), (15.700_000_3, 40.0), (6.1, 1e-5)] {
                let (got, want) = (f64::from(sums(isa, &[x], 1, Pooling::Gem { p })[0]), f64::from(x).powf(p));
                assert!((got - want).abs() <= 1.2e-7 * want, "{isa:?} {x} to the power of {p}: {got} {want}");
            }
        }
    }

    #[test]
    fn nan_and_infinity_stay() {
        for isa in Isa::available() {
            for p in [1.0, 1.4, 3.0, 3.0113, 2.6, 11.0] {
                let mut values = [0.5f32; 20];
                (values[3], values[7]) = (f32::NAN, f32::INFINITY);
                let got = sums(isa, &values, 20, Pooling::Gem { p });
                assert!(got[3].is_nan() && got[7] == f32::INFINITY, "{isa:?} {p}: {got:?}");
                assert!(got.iter().enumerate().all(|(i, v)| i == 3 || i == 7 || (*v - 0.5f32.powf(p as f32)).abs() < 1e-6));
            }
        }
    }
}
