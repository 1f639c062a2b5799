//! Reproducible noise for tests.

/// A number in [-1, 1) from a seed and an index: splitmix64. The golden-value scripts make the
/// same numbers in Python, so that no weight file needs to be in the repository.
pub(crate) fn test_noise(seed: u64, index: u64) -> f32 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    ((z >> 40) as f32) / ((1u64 << 23) as f32) - 1.0
}
