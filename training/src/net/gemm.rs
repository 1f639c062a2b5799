//! Matrix products over strided views, by the `gemm` crate that Candle itself multiplies with.

use super::real::Real;

/// A matrix inside a slice: element (i, j) is `data[i * row + j * column]`.
#[derive(Clone, Copy)]
pub struct View<'a, T> {
    data: &'a [T],
    row: usize,
    column: usize,
}

impl<'a, T> View<'a, T> {
    /// Rows `stride` apart, columns side by side.
    pub fn rows(data: &'a [T], stride: usize) -> Self {
        Self { data, row: stride, column: 1 }
    }

    /// The same matrix with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
    }

    fn reach(&self, rows: usize, columns: usize) -> usize {
        rows.saturating_sub(1) * self.row + columns.saturating_sub(1) * self.column + 1
    }
}

/// Columns `first..first + n` of a row-major matrix that several threads fill, each its own columns.
pub struct Shared<T> {
    start: *mut T,
    len: usize,
    stride: usize,
}

// SAFETY: the pointer comes from a `&mut [T]` that outlives the `Shared` (its only maker borrows it for as long), and
// `panel` hands out columns that its callers promise not to share.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Over rows of `stride` values.
    pub fn new(data: &mut [T], stride: usize) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), stride }
    }

    /// Row `row`, columns `first..first + n`.
    ///
    /// # Safety
    /// No other thread may use these columns meanwhile, and the slice that this was made of must live.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, row: usize, first: usize, n: usize) -> &mut [T] {
        let at = row * self.stride + first;
        assert!(first + n <= self.stride && at + n <= self.len, "columns {first}..{} of {}", first + n, self.stride);
        // SAFETY: inside the slice by the assertion; alone by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), n) }
    }

    /// `out[.., first..first + n] = a b`, a of `m` x `k`, b of `k` x `n`.
    ///
    /// # Safety
    /// As for [`Shared::row`], for the first `m` rows.
    pub unsafe fn product(&self, m: usize, n: usize, k: usize, first: usize, a: View<T>, b: View<T>)
    where
        T: Real,
    {
        if m == 0 || n == 0 {
            return;
        }
        assert!(first + n <= self.stride && (m - 1) * self.stride + first + n <= self.len, "product leaves its matrix");
        // SAFETY: inside the slice by the assertion; alone by the caller's promise.
        unsafe { raw(m, n, k, self.start.add(first), self.stride, false, a, b) }
    }
}

/// `out (+)= a b`: `m` x `n`, row-major and tight; a of `m` x `k`, b of `k` x `n`.
#[allow(clippy::too_many_arguments)]
pub fn product<T: Real>(m: usize, n: usize, k: usize, out: &mut [T], add: bool, a: View<T>, b: View<T>) {
    assert!(out.len() >= m * n, "product of {m} x {n} into {}", out.len());
    if m > 0 && n > 0 {
        // SAFETY: `out` is exclusive and large enough.
        unsafe { raw(m, n, k, out.as_mut_ptr(), n, add, a, b) }
    }
}

/// # Safety
/// `out` must be valid for writes of `m` rows of `n` values, `stride` apart, and nobody else may use them.
#[allow(clippy::too_many_arguments)]
unsafe fn raw<T: Real>(m: usize, n: usize, k: usize, out: *mut T, stride: usize, add: bool, a: View<T>, b: View<T>) {
    assert!(k == 0 || (a.reach(m, k) <= a.data.len() && b.reach(k, n) <= b.data.len()), "product reads outside its matrices");
    // SAFETY: both operands lie inside their slices by the assertion; `out` by the caller's promise. One thread: the
    // callers share out columns themselves.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            stride as isize,
            add,
            a.data.as_ptr(),
            a.column as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.column as isize,
            b.row as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
