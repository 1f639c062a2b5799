//! Hash-based randomness: textures need the same value for the same place, in any order.

/// A hash of three integers, uniform over u32.
pub fn hash(a: i64, b: i64, c: u64) -> u32 {
    let mut z = (a as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (b as u64).wrapping_mul(0xc2b2_ae3d_27d4_eb4f) ^ c;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z >> 32) as u32
}

/// Uniform in [0, 1).
pub fn unit(a: i64, b: i64, c: u64) -> f32 {
    (hash(a, b, c) >> 8) as f32 / (1 << 24) as f32
}

/// Smooth value noise in [0, 1) with a period of one unit.
pub fn value(x: f32, y: f32, seed: u64) -> f32 {
    let (xi, yi) = (x.floor(), y.floor());
    let smooth = |t: f32| t * t * (3.0 - 2.0 * t);
    let (u, v) = (smooth(x - xi), smooth(y - yi));
    let (xi, yi) = (xi as i64, yi as i64);
    let at = |dx, dy| unit(xi + dx, yi + dy, seed);
    let top = at(0, 0) + (at(1, 0) - at(0, 0)) * u;
    let bottom = at(0, 1) + (at(1, 1) - at(0, 1)) * u;
    top + (bottom - top) * v
}

/// Three octaves of [`value`], mean 0.5; octaves finer than `footprint` (units per pixel) fade, so
/// that far surfaces do not shimmer.
pub fn fractal(x: f32, y: f32, footprint: f32, seed: u64) -> f32 {
    let (mut sum, mut weight, mut scale) = (0.5, 0.5, 1.0);
    for octave in 0..3 {
        let fade = (1.0 - footprint * scale * 1.5).clamp(0.0, 1.0);
        sum += (value(x * scale, y * scale, seed ^ octave) - 0.5) * weight * fade;
        weight *= 0.5;
        scale *= 2.1;
    }
    sum
}
