//! Which rows of two sets of unit vectors are nearest to each other by their dot products, in fixed point: of numbers of 16 bits, whose
//! products and sums are exact, so that every processor finds the same. With AVX2 they take 0.7 of the time of f32.
//!
//! A block of rows meets a panel of the other set at a time: their products stay in the first-level cache, where the best of every row
//! and column is found, and are never whole in memory.

use super::aligned::Aligned;
use super::{dispatch, Isa};
use crate::team::{chunks, chunks_with};
use std::sync::atomic::{AtomicBool, Ordering};

/// What 1 is in fixed point: values of a row that is a little longer than 1, for it was rounded, still fit 16 bits, and no sum of
/// products of such rows, nor any part of one, leaves 32 bits. A multiple of 64: signs of 256 values are exact.
const ONE: f32 = 32704.0;
/// Square of the length that a row may have.
const LONGEST: f32 = 1.002;
/// Columns of a panel.
const UNIT: usize = 16;
/// Rows of a block: whole tiles of the kernels. Of 256 values they fill the first-level cache beside a panel.
const ROWS: usize = 48;
/// Values that are rounded side by side.
const LANES: usize = 16;

/// The largest dot product of a row with the rows of another set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nearest {
    /// The other row; the first of equals.
    pub row: usize,
    /// Its dot product, of values to the nearest 32704th.
    pub dot: f32,
    /// The largest of the others'; minus infinity: there is none.
    pub second: f32,
}

/// Of each row of `first` the nearest of `second`, and of each of `second` the nearest of `first`: whole rows of `dim` values each. Where
/// the other set is empty, `row` is `usize::MAX` and `dot` minus infinity.
///
/// `None`: `dim` is 0, or a row is longer than 1 or not finite.
pub fn nearest(first: &[f32], second: &[f32], dim: usize) -> Option<(Vec<Nearest>, Vec<Nearest>)> {
    on(first, second, dim, Isa::detect())
}

fn on(first: &[f32], second: &[f32], dim: usize, isa: Isa) -> Option<(Vec<Nearest>, Vec<Nearest>)> {
    if dim == 0 {
        return None;
    }
    let (rows, columns) = (first.len() / dim, second.len() / dim);
    let kernel = kernel(isa);
    let panels = Panels::new(second, dim, kernel.step, isa)?;
    let mut blocks: Vec<Option<Found>> = (0..rows.div_ceil(ROWS)).map(|_| None).collect();
    chunks(&mut blocks, 1, |at, found| {
        let block = Block { first: at * ROWS, rows: &first[at * ROWS * dim..rows.min((at + 1) * ROWS) * dim] };
        // SAFETY: `kernel` is of an instruction set that this processor has; the panels are packed with its step.
        found.iter_mut().for_each(|found| *found = unsafe { (kernel.block)(block, &panels) });
    });
    let mut of_rows = Vec::with_capacity(rows);
    let mut of_columns = vec![Best::NONE; columns];
    for found in blocks {
        let found = found?;
        of_rows.extend(found.rows.into_iter().map(Nearest::from));
        for (columns, found) in of_columns.chunks_mut(UNIT).zip(&found.panels) {
            columns.iter_mut().enumerate().for_each(|(l, column)| *column = column.with(found.lane(l)));
        }
    }
    Some((of_rows, of_columns.into_iter().map(Nearest::from).collect()))
}

/// [`Nearest`] in fixed point.
#[derive(Clone, Copy)]
struct Best {
    best: i32,
    second: i32,
    at: i32,
}

impl Best {
    const NONE: Self = Self { best: i32::MIN, second: i32::MIN, at: i32::MAX };

    /// Of what both met.
    fn with(self, other: Self) -> Self {
        let second = self.second.max(other.second).max(self.best.min(other.best));
        let others = other.best > self.best || other.best == self.best && other.at < self.at;
        Self { second, ..if others { other } else { self } }
    }
}

impl From<Best> for Nearest {
    fn from(found: Best) -> Self {
        let of = |sum: i32| if sum > i32::MIN { sum as f32 / (ONE * ONE) } else { f32::NEG_INFINITY };
        Self { row: if found.best > i32::MIN { found.at as usize } else { usize::MAX }, dot: of(found.best), second: of(found.second) }
    }
}

/// Rows in fixed point, each followed by zeros up to whole steps of the kernels, and whether none is too long.
#[inline(always)]
fn round<const FUSED: bool>(rows: &[f32], dim: usize, to: &mut [i16], fit: &mut bool) {
    /// Added to a small number, leaves the nearest integer in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    for (row, to) in rows.chunks_exact(dim).zip(to.chunks_exact_mut(padded(dim))) {
        let mut squares = [0f32; LANES];
        let mut part = |row: &[f32], to: &mut [i16]| {
            for ((v, to), square) in row.iter().zip(to).zip(&mut squares) {
                *to = (v * ONE + SHIFT).to_bits() as i16;
                *square += v * v;
            }
        };
        // Whole ones by themselves, which the compiler makes vectors of.
        let ((row, row_rest), (to, to_rest)) = (row.as_chunks::<LANES>(), to[..dim].as_chunks_mut::<LANES>());
        for (row, to) in row.iter().zip(to) {
            part(row, to);
        }
        part(row_rest, to_rest);
        // NaN is not at most anything.
        *fit &= squares.iter().sum::<f32>() <= LONGEST;
    }
}

/// Values of a row in fixed point.
fn padded(dim: usize) -> usize {
    dim.next_multiple_of(2)
}

/// `step` values of each row of `width`, of which `to` has room for `of`, then the next of each, and so on.
#[inline(always)]
fn side_by_side(rows: &[i16], width: usize, of: usize, step: usize, to: &mut [i16]) {
    #[inline(always)]
    fn by<const STEP: usize>(rows: &[i16], width: usize, of: usize, to: &mut [i16]) {
        let to = to.as_chunks_mut::<STEP>().0;
        for (at, row) in rows.chunks_exact(width).enumerate() {
            for (values, to) in row.as_chunks::<STEP>().0.iter().zip(to[at..].iter_mut().step_by(of)) {
                *to = *values;
            }
        }
    }
    match step {
        2 => by::<2>(rows, width, of, to),
        _ => by::<1>(rows, width, of, to),
    }
}

/// The second set, [`UNIT`] rows at a time.
struct Panels {
    rows: usize,
    dim: usize,
    values: Aligned<i16>,
}

impl Panels {
    fn new(rows: &[f32], dim: usize, step: usize, isa: Isa) -> Option<Self> {
        let (n, width) = (rows.len() / dim, padded(dim));
        let mut values = Aligned::new(n.next_multiple_of(UNIT) * width);
        let fits = AtomicBool::new(true);
        chunks_with(
            values.values_mut(),
            UNIT * width,
            || vec![0i16; UNIT * width],
            |rounded, panel, to| {
                let rows = &rows[panel * UNIT * dim..n.min((panel + 1) * UNIT) * dim];
                let (mut all_fit, rounded) = (true, &mut rounded[..rows.len() / dim * width]);
                let (values, fit) = (&mut *rounded, &mut all_fit);
                dispatch!(isa, round(rows: &[f32], dim: usize, values: &mut [i16], fit: &mut bool));
                side_by_side(rounded, width, UNIT, step, to);
                fits.fetch_and(all_fit, Ordering::Relaxed);
            },
        );
        fits.into_inner().then_some(Self { rows: n, dim, values })
    }
}

/// Some rows of the first set, of which the first is row `first`.
#[derive(Clone, Copy)]
struct Block<'a> {
    first: usize,
    rows: &'a [f32],
}

/// Of a block's rows the nearest in all panels, and of the panels' columns the nearest of these rows.
struct Found {
    rows: Vec<Best>,
    panels: Vec<Lanes>,
}

/// [`Best`] of what [`UNIT`] lanes have met.
#[derive(Clone, Copy)]
struct Lanes {
    best: [i32; UNIT],
    second: [i32; UNIT],
    at: [i32; UNIT],
}

impl Lanes {
    const NONE: Self = Self { best: [Best::NONE.best; UNIT], second: [Best::NONE.second; UNIT], at: [Best::NONE.at; UNIT] };

    fn lane(&self, l: usize) -> Best {
        Best { best: self.best[l], second: self.second[l], at: self.at[l] }
    }
}

/// A kernel of one instruction set.
#[derive(Clone, Copy)]
struct Kernel {
    /// Values of a row that one instruction multiplies.
    step: usize,
    /// `None`: a row is too long.
    ///
    /// # Safety
    ///
    /// The processor has the instruction set, and the panels are packed with [`Self::step`].
    block: unsafe fn(Block, &Panels) -> Option<Found>,
}

fn kernel(isa: Isa) -> Kernel {
    match isa.min(Isa::detect()) {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 if std::arch::is_x86_feature_detected!("avx512vnni") => {
            Kernel { step: <std::arch::x86_64::__m512i as Sums>::STEP, block: block_vnni }
        }
        // AVX-512 has AVX2, too.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx2 => Kernel { step: <std::arch::x86_64::__m256i as Sums>::STEP, block: block_avx2 },
        _ => Kernel { step: <[i32; 4] as Sums>::STEP, block: block_on::<[i32; 4], 2, 4> },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni,avx2")]
unsafe fn block_vnni(block: Block, panels: &Panels) -> Option<Found> {
    // SAFETY: the features of this function, and the caller's promise.
    unsafe { block_on::<std::arch::x86_64::__m512i, 12, 1>(block, panels) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn block_avx2(block: Block, panels: &Panels) -> Option<Found> {
    // SAFETY: the features of this function, and the caller's promise.
    unsafe { block_on::<std::arch::x86_64::__m256i, 6, 2>(block, panels) }
}

/// A vector of [`Self::LANES`] sums of 32 bits.
///
/// # Safety
///
/// As of [`super::vector::Vector`]: every method may be called only where the processor has the instruction set, and only from code
/// compiled for it. Pointers are read or written for as many values as are said and need no alignment.
trait Sums: Copy {
    const LANES: usize;
    /// Values of a row that one instruction multiplies.
    const STEP: usize;
    /// `STEP` values, for each lane the same.
    type Row: Copy;
    /// `STEP` values of each lane.
    type Columns: Copy;
    unsafe fn splat(value: i32) -> Self;
    unsafe fn load(from: *const i32) -> Self;
    unsafe fn store(self, to: *mut i32);
    unsafe fn row(from: *const i16) -> Self::Row;
    unsafe fn columns(from: *const i16) -> Self::Columns;
    /// `self` and the products of each lane.
    unsafe fn add_products(self, row: Self::Row, columns: Self::Columns) -> Self;
    unsafe fn largest(self, other: Self) -> Self;
    unsafe fn smallest(self, other: Self) -> Self;
    /// `then` in lanes where `self` is larger than `other`, else `otherwise`.
    unsafe fn where_above(self, other: Self, then: Self, otherwise: Self) -> Self;
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Sums;
    use std::arch::x86_64::*;

    macro_rules! sums {
        ($type:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $max:ident, $min:ident,
         |$sums:ident, $row:ident, $columns:ident| $add_products:expr, |$a:ident, $b:ident, $then:ident, $otherwise:ident| $where_above:expr) => {
            impl Sums for $type {
                const LANES: usize = $lanes;
                const STEP: usize = 2;
                type Row = $type;
                type Columns = $type;
                #[inline(always)]
                unsafe fn splat(value: i32) -> Self {
                    // SAFETY: the trait's contract.
                    unsafe { $splat(value) }
                }
                #[inline(always)]
                unsafe fn load(from: *const i32) -> Self {
                    // SAFETY: the trait's contract: a value of each lane is there.
                    unsafe { $load(from.cast()) }
                }
                #[inline(always)]
                unsafe fn store(self, to: *mut i32) {
                    // SAFETY: the trait's contract: a value of each lane may be written.
                    unsafe { $store(to.cast(), self) }
                }
                #[inline(always)]
                unsafe fn row(from: *const i16) -> $type {
                    // SAFETY: the trait's contract: two values are there.
                    unsafe { $splat(from.cast::<i32>().read_unaligned()) }
                }
                #[inline(always)]
                unsafe fn columns(from: *const i16) -> $type {
                    // SAFETY: the trait's contract: two values of each lane are there.
                    unsafe { $load(from.cast()) }
                }
                #[inline(always)]
                unsafe fn add_products(self, $row: $type, $columns: $type) -> Self {
                    let $sums = self;
                    // SAFETY: the trait's contract.
                    unsafe { $add_products }
                }
                #[inline(always)]
                unsafe fn largest(self, other: Self) -> Self {
                    // SAFETY: the trait's contract.
                    unsafe { $max(self, other) }
                }
                #[inline(always)]
                unsafe fn smallest(self, other: Self) -> Self {
                    // SAFETY: the trait's contract.
                    unsafe { $min(self, other) }
                }
                #[inline(always)]
                unsafe fn where_above(self, $b: Self, $then: Self, $otherwise: Self) -> Self {
                    let $a = self;
                    // SAFETY: the trait's contract.
                    unsafe { $where_above }
                }
            }
        };
    }
    // With VNNI.
    sums!(
        __m512i,
        16,
        _mm512_set1_epi32,
        _mm512_loadu_si512,
        _mm512_storeu_si512,
        _mm512_max_epi32,
        _mm512_min_epi32,
        |sums, row, columns| _mm512_dpwssd_epi32(sums, row, columns),
        |a, b, then, otherwise| _mm512_mask_mov_epi32(otherwise, _mm512_cmpgt_epi32_mask(a, b), then)
    );
    sums!(
        __m256i,
        8,
        _mm256_set1_epi32,
        _mm256_loadu_si256,
        _mm256_storeu_si256,
        _mm256_max_epi32,
        _mm256_min_epi32,
        |sums, row, columns| _mm256_add_epi32(sums, _mm256_madd_epi16(row, columns)),
        |a, b, then, otherwise| _mm256_blendv_epi8(otherwise, then, _mm256_cmpgt_epi32(a, b))
    );
}

/// Four sums in a form that every compiler vectorises: SSE2, NEON.
impl Sums for [i32; 4] {
    const LANES: usize = 4;
    const STEP: usize = 1;
    type Row = i16;
    type Columns = [i16; 4];
    #[inline(always)]
    unsafe fn splat(value: i32) -> Self {
        [value; 4]
    }
    #[inline(always)]
    unsafe fn load(from: *const i32) -> Self {
        // SAFETY: the trait's contract: four values are there.
        unsafe { from.cast::<[i32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut i32) {
        // SAFETY: the trait's contract: four values may be written.
        unsafe { to.cast::<[i32; 4]>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn row(from: *const i16) -> i16 {
        // SAFETY: the trait's contract: a value is there.
        unsafe { *from }
    }
    #[inline(always)]
    unsafe fn columns(from: *const i16) -> [i16; 4] {
        // SAFETY: the trait's contract: a value of four lanes is there.
        unsafe { from.cast::<[i16; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn add_products(self, row: i16, columns: [i16; 4]) -> Self {
        std::array::from_fn(|l| self[l].wrapping_add(i32::from(row) * i32::from(columns[l])))
    }
    #[inline(always)]
    unsafe fn largest(self, other: Self) -> Self {
        std::array::from_fn(|l| self[l].max(other[l]))
    }
    #[inline(always)]
    unsafe fn smallest(self, other: Self) -> Self {
        std::array::from_fn(|l| self[l].min(other[l]))
    }
    #[inline(always)]
    unsafe fn where_above(self, other: Self, then: Self, otherwise: Self) -> Self {
        std::array::from_fn(|l| if self[l] > other[l] { then[l] } else { otherwise[l] })
    }
}

/// Those of [`Lanes`] that one vector holds.
#[derive(Clone, Copy)]
struct Bests<V> {
    best: V,
    second: V,
    at: V,
}

impl<V: Sums> Bests<V> {
    /// From lane `l` on.
    ///
    /// # Safety
    ///
    /// As of [`Sums`]; `l` and the lanes after it are lanes.
    #[inline(always)]
    unsafe fn load(from: &Lanes, l: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let (best, second, at) = (from.best.as_ptr().add(l), from.second.as_ptr().add(l), from.at.as_ptr().add(l));
            Self { best: V::load(best), second: V::load(second), at: V::load(at) }
        }
    }

    /// # Safety
    ///
    /// As of [`Self::load`].
    #[inline(always)]
    unsafe fn store(self, to: &mut Lanes, l: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            self.best.store(to.best.as_mut_ptr().add(l));
            self.second.store(to.second.as_mut_ptr().add(l));
            self.at.store(to.at.as_mut_ptr().add(l));
        }
    }

    /// After `sums`, which are at `at`.
    ///
    /// # Safety
    ///
    /// As of [`Sums`].
    #[inline(always)]
    unsafe fn after(self, sums: V, at: V) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            Self {
                best: self.best.largest(sums),
                second: self.second.largest(self.best.smallest(sums)),
                at: sums.where_above(self.best, at, self.at),
            }
        }
    }
}

/// [`Kernel::block`] by tiles of `SIDE` rows and `VECTORS` vectors of columns.
///
/// # Safety
///
/// The processor has the instruction set of `V`, and the panels are packed with its step.
#[inline(always)]
unsafe fn block_on<V: Sums, const SIDE: usize, const VECTORS: usize>(block: Block, panels: &Panels) -> Option<Found> {
    let width = padded(panels.dim);
    let n = block.rows.len() / panels.dim;
    assert!(VECTORS * V::LANES == UNIT && width.is_multiple_of(V::STEP), "nearest: panels");
    let (mut rounded, mut fit) = (vec![0i16; n * width], true);
    round::<true>(block.rows, panels.dim, &mut rounded, &mut fit);
    if !fit {
        return None;
    }
    // The rows of a tile side by side: where they are is then known without reckoning, which would take as long as half of the products.
    let mut tiles = Aligned::<i16>::new(n.next_multiple_of(SIDE) * width);
    for (rows, to) in rounded.chunks(SIDE * width).zip(tiles.values_mut().chunks_exact_mut(SIDE * width)) {
        side_by_side(rows, width, SIDE, V::STEP, to);
    }
    let mut sums = vec![[0i32; UNIT]; n.next_multiple_of(SIDE)];
    let (mut of_rows, mut of_columns) = (vec![Lanes::NONE; n], vec![Lanes::NONE; panels.rows.div_ceil(UNIT)]);
    for ((p, panel), columns) in panels.values.values().chunks_exact(UNIT * width).enumerate().zip(&mut of_columns) {
        let first = p * UNIT;
        let numbers: [i32; UNIT] = std::array::from_fn(|l| (first + l) as i32);
        for (rows, sums) in tiles.values().chunks_exact(SIDE * width).zip(sums.chunks_exact_mut(SIDE)) {
            // SAFETY: the instruction set and the packing by the caller's promise; tile and panel are whole, and a unit of sums is
            // so many vectors by the assertion.
            unsafe {
                let found = tile::<V, SIDE, VECTORS>(rows.as_ptr(), panel.as_ptr(), width / V::STEP);
                for (found, sums) in found.into_iter().zip(sums) {
                    for (v, found) in found.into_iter().enumerate() {
                        found.store(sums.as_mut_ptr().add(v * V::LANES));
                    }
                }
            }
        }
        // What pads the last panel is nobody's nearest.
        let inside = UNIT.min(panels.rows - first);
        if inside < UNIT {
            sums.iter_mut().for_each(|row| row[inside..].fill(i32::MIN));
        }
        // SAFETY: as above.
        unsafe {
            let mut column = [Bests::<V>::load(columns, 0); VECTORS];
            let mut number = [V::splat(0); VECTORS];
            for v in 0..VECTORS {
                column[v] = Bests::load(columns, v * V::LANES);
                number[v] = V::load(numbers.as_ptr().add(v * V::LANES));
            }
            for ((at, sums), row) in sums.iter().enumerate().zip(&mut of_rows) {
                let at = V::splat((block.first + at) as i32);
                let mut best = Bests::<V>::load(row, 0);
                for v in 0..VECTORS {
                    let sums = V::load(sums.as_ptr().add(v * V::LANES));
                    column[v] = column[v].after(sums, at);
                    best = best.after(sums, number[v]);
                }
                best.store(row, 0);
            }
            for (v, column) in column.into_iter().enumerate() {
                column.store(columns, v * V::LANES);
            }
        }
    }
    let of_row = |lanes: &Lanes| (0..UNIT).map(|l| lanes.lane(l)).fold(Best::NONE, Best::with);
    Some(Found { rows: of_rows.iter().map(of_row).collect(), panels: of_columns })
}

/// The sums of products of a tile's rows with a panel's columns.
///
/// # Safety
///
/// The processor has the instruction set of `V`; so many steps of both are there.
#[inline(always)]
unsafe fn tile<V: Sums, const SIDE: usize, const VECTORS: usize>(
    rows: *const i16,
    panel: *const i16,
    steps: usize,
) -> [[V; VECTORS]; SIDE] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[V::splat(0); VECTORS]; SIDE];
        // Step by step: of several the compiler would add the products first, and run out of registers.
        for k in 0..steps {
            let (rows, panel) = (rows.add(k * SIDE * V::STEP), panel.add(k * UNIT * V::STEP));
            let mut columns = [V::columns(panel); VECTORS];
            for (v, column) in columns.iter_mut().enumerate() {
                *column = V::columns(panel.add(v * V::LANES * V::STEP));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let x = V::row(rows.add(r * V::STEP));
                for (sum, column) in row.iter_mut().zip(columns) {
                    *sum = sum.add_products(x, column);
                }
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Rows of unit length: of noise, of few different values, of one magnitude.
    fn rows(seed: u64, n: usize, dim: usize, kind: usize) -> Vec<f32> {
        let mut rows: Vec<f32> = (0..(n * dim) as u64).map(|i| crate::test_noise(seed, i)).collect();
        for row in rows.chunks_exact_mut(dim) {
            match kind {
                0 => {}
                1 => row.iter_mut().for_each(|v| *v = (*v * 2.0).round() + 0.25),
                _ => row.iter_mut().for_each(|v| *v = v.signum()),
            }
            let length = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            row.iter_mut().for_each(|v| *v /= length.max(1e-6));
        }
        rows
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]
        /// By the definition but for rounding, with blocks, tiles, panels and steps that are not whole; the same on every instruction
        /// set; and of products that are equal, for all values have one magnitude, the first is taken.
        #[test]
        fn nearest_are_by_the_definition(
            seed in 0u64..1000,
            n in prop_oneof![0usize..20, 45usize..110],
            m in prop_oneof![0usize..40, 60usize..70],
            dim in prop_oneof![1usize..40, Just(64usize), Just(256)],
            kind in 0usize..3,
        ) {
            let (a, b) = (rows(seed, n, dim, kind), rows(seed + 7777, m, dim, kind));
            let row = |set: &'_ [f32], i: usize| set[i * dim..][..dim].to_vec();
            let signs = |row: Vec<f32>| -> Vec<f32> { row.into_iter().map(|v| if kind == 2 { v.signum() } else { v }).collect() };
            let all = |from: Vec<f32>, others: &[f32]| -> Vec<f64> {
                others.chunks_exact(dim).map(|other| dot(&signs(from.clone()), &signs(other.to_vec()))).collect()
            };
            let scale = if kind == 2 { dim as f64 } else { 1.0 };
            let want = on(&a, &b, dim, Isa::Portable).unwrap();
            prop_assert_eq!((want.0.len(), want.1.len()), (n, m));
            let rows = (0..n).map(|i| (want.0[i], all(row(&a, i), &b)));
            for (found, dots) in rows.chain((0..m).map(|j| (want.1[j], all(row(&b, j), &a)))) {
                let Some(best) = dots.iter().copied().reduce(f64::max) else {
                    prop_assert_eq!(found.row, usize::MAX);
                    continue;
                };
                let at = dots.iter().position(|d| *d == best).unwrap();
                let second = (0..dots.len()).filter(|i| *i != at).map(|i| dots[i]).reduce(f64::max);
                prop_assert!((f64::from(found.dot) - best / scale).abs() < 3e-4, "{found:?}, not {best}");
                prop_assert!((dots[found.row] - best) / scale > -6e-4 && (kind != 2 || found.row == at), "{found:?}, not {at}: {dots:?}");
                prop_assert!(second.map_or(found.second == f32::NEG_INFINITY, |s| (f64::from(found.second) - s / scale).abs() < 3e-4), "{found:?}, not {second:?}");
            }
            for isa in Isa::available() {
                prop_assert_eq!(&on(&a, &b, dim, isa).unwrap(), &want, "{:?}", isa);
            }
        }

        /// Sums do not overflow: nothing is nearer to a row than itself, wherever its length lies.
        #[test]
        fn a_row_is_nearest_to_itself(seed in 0u64..1000, dim in prop::sample::select(vec![1usize, 2, 3, 255, 256, 4096]), at in any::<prop::sample::Index>()) {
            let mut all = rows(seed, 4, dim, 0);
            all[..dim].fill(0.0);
            all[at.index(dim)] = -1.0;
            for isa in Isa::available() {
                let (of_rows, of_columns) = on(&all, &all, dim, isa).unwrap();
                for (i, found) in of_rows.iter().chain(&of_columns).enumerate() {
                    let (own, other) = (&all[i % 4 * dim..][..dim], &all[found.row * dim..][..dim]);
                    prop_assert!((found.dot - 1.0).abs() < 3e-4 && dot(own, other) > 1.0 - 6e-4, "{isa:?} {i}: {found:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_unit_vector_is_refused_and_an_empty_set_has_none() {
        for isa in Isa::available() {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.01, -1.01] {
                // Also where a longer row comes after.
                assert!(on(&[1.0, 0.0], &[0.0, bad, 0.0, 1.0], 2, isa).is_none(), "{isa:?} {bad}");
                assert!(on(&[bad, 0.0, 1.0, 0.0], &[0.0, 1.0], 2, isa).is_none(), "{isa:?} {bad}");
            }
            let (none, of_one) = on(&[], &[0.0, 1.0], 2, isa).unwrap();
            assert!(none.is_empty() && of_one.len() == 1 && of_one[0].row == usize::MAX, "{isa:?}");
        }
        assert!(nearest(&[], &[], 0).is_none());
    }
}
