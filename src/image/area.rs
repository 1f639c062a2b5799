//! Loops over all pixels of a camera's image, in forms that compilers make vectors of: every keyframe pays for them.

use crate::simd::{dispatch, Isa};

/// Rows that are summed in 16 bits, at most.
const MOST_ROWS: usize = 257;

/// Of rows of `width` RGB pixels the means of `across` x `down` each; rounded as OpenCV's `INTER_AREA` rounds, which takes several
/// times as long. `None` where the blocks do not fill the image, or are too high.
pub(super) fn shrink(data: &[u8], width: usize, across: usize, down: usize) -> Option<Vec<u8>> {
    let row = 3 * width;
    let whole = |n: usize, by: usize| n > 0 && by > 0 && n.is_multiple_of(by);
    if !whole(width, across) || !whole(data.len(), down * row) || down > MOST_ROWS || across > MOST_ROWS {
        return None;
    }
    let isa = Isa::detect();
    let mut out = vec![0; data.len() / (across * down)];
    let mut sums = vec![0u16; row];
    for (rows, out) in data.chunks_exact(down * row).zip(out.chunks_exact_mut(row / across)) {
        {
            let sums = &mut sums[..];
            dispatch!(isa, add_rows(rows: &[u8], sums: &mut [u16]));
        }
        let sums = &sums[..];
        match (across, down) {
            (2, 2) => dispatch!(isa, pairs(sums: &[u16], out: &mut [u8])),
            _ => dispatch!(isa, means(sums: &[u16], across: usize, down: usize, out: &mut [u8])),
        }
    }
    Some(out)
}

/// `sums` of the rows, value by value.
#[inline(always)]
fn add_rows<const FUSED: bool>(rows: &[u8], sums: &mut [u16]) {
    sums.fill(0);
    for row in rows.chunks_exact(sums.len()) {
        sums.iter_mut().zip(row).for_each(|(s, v)| *s += u16::from(*v));
    }
}

/// Pixels of [`pairs`] that are in the first-level cache together.
const TOGETHER: usize = 64;

/// Of two rows' sums: OpenCV has a rounding of its own for blocks of two by two, halves upwards.
#[inline(always)]
fn pairs<const FUSED: bool>(sums: &[u16], out: &mut [u8]) {
    // Every value with the one a pixel on, in vectors; then every second pixel of that.
    let mut both = [0u8; 6 * TOGETHER];
    for (out, sums) in out.chunks_mut(3 * TOGETHER).zip(sums.chunks(6 * TOGETHER)) {
        for ((to, a), b) in both.iter_mut().zip(sums).zip(&sums[3..]) {
            *to = ((a + b + 2) >> 2) as u8;
        }
        for (to, from) in out.chunks_exact_mut(3).zip(both.chunks_exact(6)) {
            to.copy_from_slice(&from[..3]);
        }
    }
}

/// Of `down` rows' sums; halves to the even number.
#[inline(always)]
fn means<const FUSED: bool>(sums: &[u16], across: usize, down: usize, out: &mut [u8]) {
    let scale = 1.0 / (across * down) as f32;
    for (to, block) in out.chunks_exact_mut(3).zip(sums.chunks_exact(3 * across)) {
        let mut all = [0u32; 3];
        for pixel in block.chunks_exact(3) {
            all.iter_mut().zip(pixel).for_each(|(a, v)| *a += u32::from(*v));
        }
        to.iter_mut().zip(all).for_each(|(to, a)| *to = (a as f32 * scale).round_ties_even() as u8);
    }
}

/// Pixels of three bytes with the first and the third exchanged.
pub(super) fn reversed(from: &[u8], to: &mut [u8]) {
    #[inline(always)]
    fn body<const FUSED: bool>(from: &[u8], to: &mut [u8]) {
        for (to, p) in to.chunks_exact_mut(3).zip(from.chunks_exact(3)) {
            [to[0], to[1], to[2]] = [p[2], p[1], p[0]];
        }
    }
    dispatch!(Isa::detect(), body(from: &[u8], to: &mut [u8]));
}

/// Sum and sum of squares of the luma of RGB pixels, Rec. 601 in 1/256.
pub(super) fn luma_sums(data: &[u8]) -> (u64, u64) {
    #[inline(always)]
    fn body<const FUSED: bool>(part: &[u8], sums: &mut (u32, u32)) {
        // By themselves: what is written through a reference is no vector.
        let (mut a, mut b) = (0u32, 0u32);
        for p in part.chunks_exact(3) {
            let y = (77 * u32::from(p[0]) + 150 * u32::from(p[1]) + 29 * u32::from(p[2])) >> 8;
            a += y;
            b += y * y;
        }
        *sums = (a, b);
    }
    let (mut sum, mut squares) = (0u64, 0u64);
    // Sums of so many squares fit 32 bits.
    for part in data.chunks(3 * 16_384) {
        let mut of_part = (0, 0);
        let sums = &mut of_part;
        dispatch!(Isa::detect(), body(part: &[u8], sums: &mut (u32, u32)));
        sum += u64::from(of_part.0);
        squares += u64::from(of_part.1);
    }
    (sum, squares)
}

/// Three planes of `out`, of RGB pixels: each value times `scale` plus `shift` of its channel.
pub(super) fn planes(data: &[u8], scale: [f32; 3], shift: [f32; 3], out: &mut [f32]) {
    #[inline(always)]
    fn body<const FUSED: bool>(data: &[u8], scale: [f32; 3], shift: [f32; 3], out: &mut [f32]) {
        let (red, rest) = out.split_at_mut(out.len() / 3);
        let (green, blue) = rest.split_at_mut(red.len());
        for (((r, g), b), pixel) in red.iter_mut().zip(green).zip(blue).zip(data.chunks_exact(3)) {
            *r = f32::from(pixel[0]) * scale[0] + shift[0];
            *g = f32::from(pixel[1]) * scale[1] + shift[1];
            *b = f32::from(pixel[2]) * scale[2] + shift[2];
        }
    }
    dispatch!(Isa::detect(), body(data: &[u8], scale: [f32; 3], shift: [f32; 3], out: &mut [f32]));
}

#[cfg(test)]
mod tests {
    use super::super::{converted, RgbImage};
    use super::*;
    use opencv::core::{MatTraitConstManual, Size};
    use opencv::imgproc;
    use proptest::prelude::*;

    fn noise(seed: u64, n: usize) -> Vec<u8> {
        (0..n as u64).map(|i| (crate::test_noise(seed, i) * 127.9 + 128.0) as u8).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn shrinks_to_opencvs_bytes(seed: u64, columns in 1usize..150, rows in 1usize..12, across in 1usize..13, down in 1usize..13, two: bool) {
            let (across, down) = if two { (2, 2) } else { (across, down) };
            let (width, height) = (columns * across, rows * down);
            let data = noise(seed, 3 * width * height);
            let size = Size::new(columns as i32, rows as i32);
            let theirs = converted(height as u32, &data, 3, |x, out| imgproc::resize(x, out, size, 0.0, 0.0, imgproc::INTER_AREA)).unwrap();
            let ours = shrink(&data, width, across, down).unwrap();
            prop_assert!(ours == theirs.data_bytes().unwrap());
            prop_assert!(shrink(&data, width, across + width, down).is_none() && shrink(&data, width, across, down + height).is_none());
        }

        #[test]
        fn the_other_loops_are_the_definition(seed: u64, n in 0usize..400) {
            let data = noise(seed, 3 * n);
            let mut swapped = vec![0; 3 * n];
            reversed(&data, &mut swapped);
            prop_assert!(swapped.chunks_exact(3).zip(data.chunks_exact(3)).all(|(a, b)| (a[0], a[1], a[2]) == (b[2], b[1], b[0])));
            let luma = |p: &[u8]| (77 * u64::from(p[0]) + 150 * u64::from(p[1]) + 29 * u64::from(p[2])) >> 8;
            let want = data.chunks_exact(3).map(luma).fold((0, 0), |(a, b), y| (a + y, b + y * y));
            prop_assert_eq!(luma_sums(&data), want);
            let (scale, shift) = ([0.5, 0.25, 2.0], [1.0, -1.0, 0.125]);
            let mut out = vec![0f32; 3 * n];
            planes(&data, scale, shift, &mut out);
            prop_assert!(out.iter().enumerate().all(|(i, v)| *v == f32::from(data[3 * (i % n) + i / n]) * scale[i / n] + shift[i / n]));
        }
    }

    #[test]
    fn white_stays_white_and_the_sums_do_not_overflow() {
        let white = vec![255u8; 3 * 514 * 514];
        assert!(shrink(&white, 514, 257, 257).unwrap().iter().all(|v| *v == 255));
        assert!(shrink(&white, 514, 514, 257).is_none());
        assert_eq!(luma_sums(&white).0 / (514 * 514), 255);
        let image = RgbImage::new(514, 514, white).unwrap();
        assert!(image.resize_area(1, 1).unwrap().data().iter().all(|v| *v == 255));
    }
}
