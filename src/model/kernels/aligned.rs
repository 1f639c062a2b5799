//! Memory that begins at a cache line: half of AVX2's loads and all of AVX-512's from elsewhere take two lines each.

use crate::simd::zeroed;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Values that begin at a cache line.
#[derive(Debug)]
pub(super) struct Aligned<T> {
    data: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + Default> Aligned<T> {
    /// So many zeros.
    pub fn new(len: usize) -> Self {
        let spare = LINE / size_of::<T>();
        let data = vec![T::default(); len + spare];
        let start = data.as_ptr().align_offset(LINE).min(spare);
        Self { data, start, len }
    }

    /// At least `len` values; what they were is lost where there were fewer.
    pub fn fit(&mut self, len: usize) {
        if self.len < len {
            *self = Self::new(len);
        }
    }

    /// The values, moved to the front of their memory.
    pub fn into_vec(self) -> Vec<T> {
        let Self { mut data, start, len } = self;
        data.truncate(start + len);
        data.drain(..start);
        data
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn values(&self) -> &[T] {
        &self.data[self.start..][..self.len]
    }

    pub fn values_mut(&mut self) -> &mut [T] {
        &mut self.data[self.start..][..self.len]
    }
}

impl Aligned<f32> {
    /// [`Self::new`] on huge pages, if the values are many.
    pub fn large(len: usize) -> Self {
        let spare = LINE / size_of::<f32>();
        let data = zeroed(len + spare);
        let start = data.as_ptr().align_offset(LINE).min(spare);
        Self { data, start, len }
    }
}

/// These, wherever they begin.
impl<T> From<Vec<T>> for Aligned<T> {
    fn from(data: Vec<T>) -> Self {
        Self { start: 0, len: data.len(), data }
    }
}

impl<T: Copy + Default> Default for Aligned<T> {
    fn default() -> Self {
        Self::new(0)
    }
}
