//! Loops over all pixels of a camera's image, in forms that compilers make vectors of: every keyframe pays for them.

use crate::simd::{dispatch, Isa};

/// Rows that are summed in 16 bits, at most.
const MOST_ROWS: usize = 257;

/// A smaller image of RGB pixels row by row, each pixel the mean of the area that it covers, in a sixth (1920x1080 to 320x240) to a
/// half (1280x720 to 640x480) of the time of OpenCV's `INTER_AREA`.
///
/// Where whole blocks of pixels become one, it has OpenCV's bytes. Elsewhere it is nearer to the definition: sums are of whole
/// numbers (weights are pixels' shares in units of the largest that all are multiples of), so that they are exact while they fit f32's 24
/// bits, as at cameras' and networks' usual sizes, and halves go to the even number; OpenCV rounds several times before.
#[derive(Debug)]
pub(super) struct Area {
    isa: Isa,
    /// Columns of the image.
    width: usize,
    rows: Axis,
    columns: Axis,
    /// Of every column; none where blocks are whole.
    covered: Vec<Cover>,
}

/// What an [`Area`]'s rows are made in, kept from one to the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    sums: Vec<u16>,
    values: Vec<f32>,
    means: Vec<f32>,
}

/// A length in pixels and the shorter one that it becomes: `each` units become one pixel, where an old one has `unit`.
#[derive(Clone, Copy, Debug)]
struct Axis {
    each: usize,
    unit: usize,
}

impl Axis {
    /// `None`: it would grow.
    fn new(from: usize, to: usize) -> Option<Self> {
        let (mut a, mut b) = (from, to);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        (to > 0 && from >= to).then(|| Self { each: from / a, unit: to / a })
    }

    /// What the new pixel covers of the old ones.
    fn cover(self, at: usize) -> Cover {
        let (begin, end) = (at * self.each, (at + 1) * self.each);
        let (first, count) = (begin / self.unit, end.div_ceil(self.unit) - begin / self.unit);
        let head = ((first + 1) * self.unit - begin).min(self.each);
        let tail = if count > 1 { end - (first + count - 1) * self.unit } else { 0 };
        Cover { first, count, head: head as f32, tail: tail as f32 }
    }

    /// Old pixels that a new one covers, at most.
    fn most(self) -> usize {
        self.each.div_ceil(self.unit) + usize::from(self.unit > 1)
    }
}

/// Old pixels that a new one covers, and the units of the first and of the last; between them all units are.
#[derive(Clone, Copy, Debug)]
struct Cover {
    first: usize,
    count: usize,
    head: f32,
    /// 0 where the first is the last.
    tail: f32,
}

impl Area {
    /// `from` and `to`: columns and rows. `None`: it would grow, or a pixel would cover too many rows.
    pub fn new(from: (usize, usize), to: (usize, usize)) -> Option<Self> {
        let (columns, rows) = (Axis::new(from.0, to.0)?, Axis::new(from.1, to.1)?);
        if columns.most() > MOST_ROWS || rows.most() > MOST_ROWS {
            return None;
        }
        let whole = columns.unit == 1 && rows.unit == 1;
        let covered = if whole { Vec::new() } else { (0..to.0).map(|x| columns.cover(x)).collect() };
        Some(Self { isa: Isa::detect(), width: from.0, rows, columns, covered })
    }

    /// Row `y` of the new image into `out`. `data`: the old one.
    ///
    /// Panics: sizes are not those that it was made for.
    pub fn row(&self, data: &[u8], y: usize, scratch: &mut Scratch, out: &mut [u8]) {
        let (row, Cover { first, count, head, tail }) = (3 * self.width, self.rows.cover(y));
        let rows = &data[first * row..][..count * row];
        let sums = &mut scratch.sums;
        sums.resize(row, 0);
        if self.covered.is_empty() {
            self.add(rows, sums);
            let (sums, across, down) = (&sums[..], self.columns.each, self.rows.each);
            match (across, down) {
                (2, 2) => dispatch!(self.isa, pairs(sums: &[u16], out: &mut [u8])),
                _ => dispatch!(self.isa, means(sums: &[u16], across: usize, down: usize, out: &mut [u8])),
            }
            return;
        }
        let (top, rest) = rows.split_at(row);
        let (inner, bottom) = rest.split_at(rest.len().saturating_sub(row));
        // A row that covers one has no other; its weight is 0.
        let bottom = if bottom.is_empty() { top } else { bottom };
        self.add(inner, sums);
        // A vector of four holds a pixel and the red of the next.
        scratch.values.resize(row + 1, 0.0);
        scratch.means.resize(out.len() + 1, 0.0);
        let (sums, values, means) = (&sums[..], &mut scratch.values[..], &mut scratch.means[..]);
        let weights = [head, self.rows.unit as f32, tail];
        {
            let values = &mut values[..row];
            dispatch!(self.isa, weigh(top: &[u8], sums: &[u16], bottom: &[u8], weights: [f32; 3], values: &mut [f32]));
        }
        let (values, covered, unit) = (&values[..], &self.covered[..], self.columns.unit as f32);
        {
            let means = &mut means[..];
            dispatch!(self.isa, along(values: &[f32], covered: &[Cover], unit: f32, means: &mut [f32]));
        }
        let (means, units) = (&means[..], (self.rows.each * self.columns.each) as f32);
        dispatch!(self.isa, rounded(means: &[f32], units: f32, out: &mut [u8]));
    }

    fn add(&self, rows: &[u8], sums: &mut [u16]) {
        dispatch!(self.isa, add_rows(rows: &[u8], sums: &mut [u16]));
    }
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

/// The whole number that a value of 0 to 255 is nearest to; halves to the even one. There is no vector of the conversion that the
/// language knows, for it says what becomes of values out of range.
#[inline(always)]
fn nearest(value: f32) -> u8 {
    // So large a number has no fraction.
    const WHOLE: f32 = (1 << 23) as f32;
    (value + WHOLE).to_bits() as u8
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
        to.iter_mut().zip(all).for_each(|(to, a)| *to = nearest(a as f32 * scale));
    }
}

/// The first row, the sums of those between and the last row, each by its weight. No fused products: the same on every processor
/// also where the sum is not exact.
#[inline(always)]
fn weigh<const FUSED: bool>(top: &[u8], sums: &[u16], bottom: &[u8], weights: [f32; 3], out: &mut [f32]) {
    for (((out, a), b), c) in out.iter_mut().zip(top).zip(sums).zip(bottom) {
        *out = f32::from(*a) * weights[0] + f32::from(*b) * weights[1] + f32::from(*c) * weights[2];
    }
}

/// The same along a row, whose pixels between the first and the last weigh `unit` each. Both slices have a value more than pixels.
#[inline(always)]
fn along<const FUSED: bool>(values: &[f32], covered: &[Cover], unit: f32, out: &mut [f32]) {
    for (x, cover) in covered.iter().enumerate() {
        let pixels = &values[3 * cover.first..][..3 * cover.count + 1];
        let mut inner = [0f32; 4];
        for i in 1..cover.count.saturating_sub(1) {
            let pixel = &pixels[3 * i..][..4];
            for k in 0..4 {
                inner[k] += pixel[k];
            }
        }
        let (first, last) = (&pixels[..4], &pixels[pixels.len() - 4..]);
        let out = &mut out[3 * x..][..4];
        for k in 0..4 {
            out[k] = first[k] * cover.head + inner[k] * unit + last[k] * cover.tail;
        }
    }
}

/// The means of so many units; halves to the even number.
#[inline(always)]
fn rounded<const FUSED: bool>(sums: &[f32], units: f32, out: &mut [u8]) {
    // A quotient of two whole numbers that is a half is exactly one; a product with a reciprocal may miss it.
    out.iter_mut().zip(sums).for_each(|(to, sum)| *to = nearest(sum / units));
}

#[inline(always)]
fn exchange<const FUSED: bool>(from: &[u8], to: &mut [u8]) {
    for (to, p) in to.chunks_exact_mut(3).zip(from.chunks_exact(3)) {
        [to[0], to[1], to[2]] = [p[2], p[1], p[0]];
    }
}

/// Pixels of three bytes with the first and the third exchanged.
pub(super) fn reversed(from: &[u8], to: &mut [u8]) {
    dispatch!(Isa::detect(), exchange(from: &[u8], to: &mut [u8]));
}

/// [`reversed`], in its place.
pub(super) fn reverse(pixels: &mut [u8]) {
    #[inline(always)]
    fn body<const FUSED: bool>(pixels: &mut [u8]) {
        // Compilers make no vectors of what is read and written in the same memory.
        let mut block = [0u8; 3 * TOGETHER];
        for pixels in pixels.chunks_mut(block.len()) {
            let block = &mut block[..pixels.len()];
            exchange::<FUSED>(pixels, block);
            pixels.copy_from_slice(block);
        }
    }
    dispatch!(Isa::detect(), body(pixels: &mut [u8]));
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

    fn shrunk(data: &[u8], from: (usize, usize), to: (usize, usize)) -> Option<Vec<u8>> {
        let by = |isa| {
            let mut area = Area::new(from, to)?;
            area.isa = isa;
            let (mut out, mut scratch) = (vec![0; 3 * to.0 * to.1], Scratch::default());
            // From below: a row owes nothing to another.
            (0..to.1).rev().for_each(|y| area.row(data, y, &mut scratch, &mut out[3 * to.0 * y..][..3 * to.0]));
            Some(out)
        };
        let all: Option<Vec<_>> = Isa::available().into_iter().map(by).collect();
        let all = all?;
        assert!(all.iter().all(|a| *a == all[0]), "{from:?} to {to:?} depends on the processor");
        all.into_iter().next()
    }

    fn opencvs(data: &[u8], from: (usize, usize), to: (usize, usize)) -> Vec<u8> {
        let size = Size::new(to.0 as i32, to.1 as i32);
        let out = converted(from.1 as u32, data, 3, |x, out| imgproc::resize(x, out, size, 0.0, 0.0, imgproc::INTER_AREA)).unwrap();
        out.data_bytes().unwrap().to_vec()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn whole_blocks_are_opencvs_bytes(seed: u64, columns in 1usize..150, rows in 1usize..12, across in 1usize..13, down in 1usize..13, two: bool) {
            let (across, down) = if two { (2, 2) } else { (across, down) };
            let from = (columns * across, rows * down);
            let data = noise(seed, 3 * from.0 * from.1);
            prop_assert!(shrunk(&data, from, (columns, rows)).unwrap() == opencvs(&data, from, (columns, rows)));
            prop_assert!(Area::new(from, (from.0 + 1, rows)).is_none() && Area::new(from, (columns, from.1 + 1)).is_none());
        }

        /// Whatever the sizes: halves to the even number on every processor, and OpenCV's byte but where OpenCV rounds a half.
        #[test]
        fn any_size_is_the_definition(seed: u64, from in (1usize..90, 1usize..60), to in (1usize..90, 1usize..60), coarse: bool) {
            let to = (to.0.min(from.0), to.1.min(from.1));
            // Few levels make halves.
            let data: Vec<u8> = noise(seed, 3 * from.0 * from.1).into_iter().map(|v| if coarse { v / 32 } else { v }).collect();
            let got = shrunk(&data, from, to).unwrap();
            let theirs = opencvs(&data, from, to);
            let blocks = from.0.is_multiple_of(to.0) && from.1.is_multiple_of(to.1);
            for (i, got) in got.iter().enumerate() {
                let (x, y, c) = (i / 3 % to.0, i / 3 / to.0, i % 3);
                // In whole numbers: every old pixel is to.0 x to.1 units, every new one from.0 x from.1.
                let share = |at: usize, old: usize, from: usize, to: usize| ((at + 1) * from).min((old + 1) * to).saturating_sub((at * from).max(old * to));
                let mut sum = 0;
                for v in 0..from.1 {
                    for u in 0..from.0 {
                        sum += share(y, v, from.1, to.1) * share(x, u, from.0, to.0) * usize::from(data[3 * (v * from.0 + u) + c]);
                    }
                }
                let (whole, rest) = (sum / (from.0 * from.1), sum % (from.0 * from.1));
                let half = 2 * rest == from.0 * from.1;
                let even = whole + usize::from(2 * rest > from.0 * from.1 || half && whole % 2 == 1);
                prop_assert!(usize::from(*got) == even || blocks && half && usize::from(*got) == whole + 1, "{got} for {sum}");
                prop_assert!(*got == theirs[i] || !blocks && half, "{got}, OpenCV {}, of {sum}", theirs[i]);
            }
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
        for to in [(2, 2), (3, 3), (513, 511), (257, 5)] {
            assert!(shrunk(&white, (514, 514), to).unwrap().iter().all(|v| *v == 255), "{to:?}");
        }
        assert!(Area::new((514, 514), (1, 2)).is_none() && Area::new((514, 514), (2, 1)).is_none());
        assert_eq!(luma_sums(&white).0 / (514 * 514), 255);
        let image = RgbImage::new(514, 514, white).unwrap();
        assert!(image.resize_area(1, 1).unwrap().data().iter().all(|v| *v == 255));
    }
}
