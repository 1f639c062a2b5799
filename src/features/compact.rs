//! Features as a map keeps them: a quarter of the size, and the same bytes for the same features.

use super::Features;
use crate::error::{Error, Result};
use half::f16;

/// Steps per pixel of a stored coordinate.
const STEPS: f32 = 16.0;
/// Points at most, sides and descriptor values at most: bounds what lying bytes can make us allocate.
const MAX_POINTS: usize = 1 << 16;
const MAX_DIM: usize = 4096;

/// How descriptors are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// One byte per value and an f16 scale per row.
    Int8,
    /// One bit per value: all have the same magnitude (ORB, AKAZE).
    Bits,
}

/// Features in few bytes: coordinates to a sixteenth of a pixel, scores and depths in f16, descriptors in int8 or bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompactFeatures {
    bytes: Vec<u8>,
}

/// Width, height, points, values per descriptor, encoding, whether depths follow.
const HEADER: usize = 4 + 4 + 4 + 4 + 1 + 1;

impl CompactFeatures {
    /// Packs features.
    pub fn new(features: &Features) -> Self {
        let (n, dim) = (features.len().min(MAX_POINTS), features.dim());
        let rows = || features.descriptors().chunks_exact(dim).take(n);
        let alike = |row: &[f32]| row.iter().all(|v| (v.abs() - row[0].abs()).abs() < 1e-6);
        let encoding = if n > 0 && rows().all(alike) { Encoding::Bits } else { Encoding::Int8 };
        let (w, h) = features.size();
        let mut bytes = Vec::with_capacity(HEADER + n * (8 + dim));
        for v in [w, h, n as u32, dim as u32] {
            bytes.extend(v.to_le_bytes());
        }
        bytes.push(encoding as u8);
        let depths = features.depths();
        bytes.push(u8::from(!depths.is_empty()));
        for p in &features.points()[..n] {
            for v in p {
                bytes.extend(((v * STEPS).round().clamp(0.0, 65535.0) as u16).to_le_bytes());
            }
        }
        for s in &features.scores()[..n] {
            bytes.extend(f16::from_f32(*s).to_le_bytes());
        }
        for d in depths.iter().take(n) {
            bytes.extend(f16::from_f32(if d.is_finite() { *d } else { 0.0 }).to_le_bytes());
        }
        for row in rows() {
            match encoding {
                Encoding::Bits => {
                    bytes.extend(row.chunks(8).map(|c| c.iter().enumerate().fold(0, |b, (i, v)| b | u8::from(*v > 0.0) << i)));
                }
                Encoding::Int8 => {
                    let top = row.iter().fold(0f32, |m, v| m.max(v.abs())).max(1e-12);
                    bytes.extend(row.iter().map(|v| (v / top * 127.0).round() as i8 as u8));
                }
            }
        }
        Self { bytes }
    }

    /// As stored.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Number of points.
    pub fn len(&self) -> usize {
        self.bytes.get(8..12).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// From stored bytes.
    ///
    /// Errors: bytes whose length is not what their header says.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        let packed = Self { bytes };
        packed.layout()?;
        Ok(packed)
    }

    fn layout(&self) -> Result<Layout> {
        let bad = |why: String| Error::Features { reason: format!("stored features: {why}") };
        let header = self.bytes.first_chunk::<HEADER>().ok_or_else(|| bad("they end within the header".into()))?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (n, dim) = (word(8) as usize, word(12) as usize);
        if n > MAX_POINTS || dim == 0 || dim > MAX_DIM {
            return Err(bad(format!("{n} points of {dim} values")));
        }
        let bits = match header[16] {
            0 => false,
            1 => true,
            other => return Err(bad(format!("encoding {other}"))),
        };
        let layout = Layout { size: (word(0), word(4)), n, dim, bits, deep: header[17] != 0 };
        if self.bytes.len() != HEADER + n * (4 + 2 + if layout.deep { 2 } else { 0 } + layout.row()) {
            return Err(bad(format!("{} bytes for {n} points of {dim} values", self.bytes.len())));
        }
        Ok(layout)
    }

    /// The features again, descriptors at unit length.
    ///
    /// Errors: bytes that are no features; nothing is allocated beyond a few times their own size.
    pub fn unpack(&self) -> Result<Features> {
        let layout = self.layout()?;
        let Layout { size: (w, h), n, dim, bits, deep } = layout;
        let (points, rest) = self.bytes[HEADER..].split_at(4 * n);
        let (scores, rest) = rest.split_at(2 * n);
        let (depths, rows) = rest.split_at(if deep { 2 * n } else { 0 });
        let coordinate = |b: &[u8]| f32::from(u16::from_le_bytes([b[0], b[1]])) / STEPS;
        let points = points.chunks_exact(4).map(|b| [coordinate(&b[..2]), coordinate(&b[2..])]).collect();
        let halves = |b: &[u8]| b.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect::<Vec<f32>>();
        let (scores, depths) = (halves(scores), halves(depths));
        let mut descriptors = Vec::with_capacity(n * dim);
        for row in rows.chunks_exact(layout.row()) {
            if bits {
                descriptors.extend((0..dim).map(|i| if row[i / 8] >> (i % 8) & 1 == 1 { 1.0 } else { -1.0 }));
            } else {
                descriptors.extend(row.iter().map(|b| f32::from(*b as i8)));
            }
        }
        let features = Features::new(w, h, points, scores, dim, descriptors)?;
        if deep {
            features.with_depths(depths)
        } else {
            Ok(features)
        }
    }
}

/// What the header says.
#[derive(Clone, Copy)]
struct Layout {
    size: (u32, u32),
    n: usize,
    dim: usize,
    bits: bool,
    deep: bool,
}

impl Layout {
    /// Bytes of one descriptor.
    fn row(&self) -> usize {
        if self.bits {
            self.dim.div_ceil(8)
        } else {
            self.dim
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn features(seed: u64, n: usize, dim: usize, bits: bool) -> Features {
        let noise = |k: usize| crate::test_noise(seed, k as u64);
        let points = (0..n).map(|i| [320.0 + 170.0 * noise(2 * i), 240.0 + 130.0 * noise(2 * i + 1)]).collect();
        let value = |k: usize| if bits { noise(k + 7).signum() } else { noise(k + 7) + 1e-3 };
        Features::new(640, 480, points, (0..n).map(|i| noise(i).abs()).collect(), dim, (0..n * dim).map(value).collect())
            .unwrap()
            .with_depths((0..n).map(|i| 30.0 * noise(i + 9).abs()).collect())
            .unwrap()
    }

    proptest! {
        #[test]
        fn comes_back_nearly_the_same(seed in 0u64..500, n in 0usize..40, dim in 1usize..70, bits: bool) {
            let f = features(seed, n, dim, bits);
            let packed = CompactFeatures::new(&f);
            let back = CompactFeatures::from_bytes(packed.as_bytes().to_vec()).unwrap().unpack().unwrap();
            prop_assert_eq!((back.size(), back.len(), back.dim()), (f.size(), f.len(), f.dim()));
            for i in 0..n {
                prop_assert!((back.depths()[i] - f.depths()[i]).abs() < 0.03);
                prop_assert!((back.points()[i][0] - f.points()[i][0]).abs() <= 0.04 && (back.scores()[i] - f.scores()[i]).abs() < 1e-3);
                let rows = |x: &Features| x.descriptors()[i * dim..(i + 1) * dim].to_vec();
                let dot: f32 = rows(&back).iter().zip(rows(&f)).map(|(a, b)| a * b).sum();
                prop_assert!(dot > if bits { 0.99999 } else { 0.999 }, "{}", dot);
            }
            // Packed again it is the same bytes.
            if n > 0 && !bits && dim > 1 {
                prop_assert_eq!(CompactFeatures::new(&back).as_bytes().len(), packed.as_bytes().len());
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), n in 0u32..100, dim in 0u32..100) {
            let mut with_header = bytes.clone();
            if with_header.len() >= HEADER {
                with_header[8..12].copy_from_slice(&n.to_le_bytes());
                with_header[12..16].copy_from_slice(&dim.to_le_bytes());
                with_header[16] %= 3;
            }
            for b in [bytes, with_header] {
                let _ = CompactFeatures::from_bytes(b).and_then(|f| f.unpack());
            }
        }
    }
}
