//! Whitening of descriptors, halfway: what all places share is taken away, and directions in which places differ a lot no
//! longer drown those in which they differ a little. [ours: the papers have none; Jegou and Chum, ECCV 2012, whiten wholly]

use super::container::RawFile;
use super::mobilenet_v2::DIM;
use super::pooling::l2_normalize;
use crate::descriptor::Descriptor;
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use nalgebra::{DMatrix, SymmetricEigen};
use std::collections::BTreeMap;

/// Fewer descriptors than this say too little about how places differ.
pub const MIN_DESCRIPTORS: usize = 100;
/// Variances become their power of this: 0 leaves them, 1 makes all alike. Chosen on synthetic streets that the
/// descriptor's training had not seen. [ours]
const POWER: f64 = 0.5;
/// Added to each variance, of their mean: keeps directions that hold noise alone from growing. [ours]
const FLOOR: f64 = 0.1;

const MEAN: &str = "whitening.mean";
const MATRIX: &str = "whitening.matrix";

/// `x -> normalised(matrix (x - mean))` for descriptors `x` of [`DIM`] values; the matrix is symmetric.
#[derive(Clone, Debug, PartialEq)]
pub struct Whitening {
    mean: Vec<f32>,
    /// Row by row, which is column by column.
    matrix: Vec<f32>,
}

impl Whitening {
    /// Fitted to descriptors of different places, the more the better, made without whitening. The order does not matter
    /// but for rounding.
    ///
    /// Errors: fewer than [`MIN_DESCRIPTORS`], not of [`DIM`] values, or all alike.
    pub fn fit(descriptors: &[Descriptor]) -> Result<Self> {
        let bad = |reason: String| Err(Error::weights(format!("whitening: {reason}")));
        if descriptors.len() < MIN_DESCRIPTORS {
            return bad(format!("{} images; it takes {MIN_DESCRIPTORS} of different places, and more are better", descriptors.len()));
        }
        if let Some(d) = descriptors.iter().find(|d| d.dim() != DIM) {
            return bad(format!("a descriptor of {} values, not {DIM}", d.dim()));
        }
        let n = descriptors.len() as f64;
        let mut mean = vec![0f64; DIM];
        for d in descriptors {
            mean.iter_mut().zip(d.as_slice()).for_each(|(m, v)| *m += f64::from(*v) / n);
        }
        let centred = DMatrix::from_fn(DIM, descriptors.len(), |i, j| f64::from(descriptors[j].as_slice()[i]) - mean[i]);
        let covariance = &centred * centred.transpose() / n;
        let level = covariance.trace() / DIM as f64;
        // Descriptors have length one: what is below this is rounding.
        if level.is_nan() || level < 1e-12 {
            return bad("the images are all alike".into());
        }
        let SymmetricEigen { eigenvalues, eigenvectors } = SymmetricEigen::new(covariance);
        // In units of the mean variance, so that the entries are about one and 16 bits hold them.
        let scales = eigenvalues.map(|v| (v.max(0.0) / level + FLOOR).powf(-POWER / 2.0));
        let matrix = &eigenvectors * DMatrix::from_diagonal(&scales) * eigenvectors.transpose();
        let matrix = (0..DIM * DIM).map(|k| 0.5 * (matrix[(k / DIM, k % DIM)] + matrix[(k % DIM, k / DIM)]) as f32).collect();
        Ok(Self { mean: mean.into_iter().map(|m| m as f32).collect(), matrix })
    }

    /// `matrix (x - mean)`, not yet normalised. Sums run in one order on every processor.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut out = vec![0f32; DIM];
        for ((x, m), column) in x.iter().zip(&self.mean).zip(self.matrix.chunks_exact(DIM)) {
            let v = x - m;
            out.iter_mut().zip(column).for_each(|(o, w)| *o += v * w);
        }
        out
    }

    /// The same of rows, N x [`DIM`], then normalised; with gradients, for training.
    ///
    /// Errors: Candle's.
    pub fn of(&self, rows: &Tensor) -> candle_core::Result<Tensor> {
        let mean = Tensor::from_slice(&self.mean, (1, DIM), &Device::Cpu)?;
        let matrix = Tensor::from_slice(&self.matrix, (DIM, DIM), &Device::Cpu)?;
        l2_normalize(&rows.broadcast_sub(&mean)?.matmul(&matrix)?)
    }

    /// Takes its tensors out of a file, which may have none.
    ///
    /// Errors: one of the two is missing, or they are misshapen, or the matrix is not symmetric.
    pub(super) fn take(file: &mut RawFile, layout: &'static str) -> Result<Option<Self>> {
        if !file.tensors.contains_key(MEAN) && !file.tensors.contains_key(MATRIX) {
            return Ok(None);
        }
        let (mean, matrix) = (file.take(MEAN, &[DIM], layout)?, file.take(MATRIX, &[DIM, DIM], layout)?);
        match (0..DIM * DIM).find(|k| matrix[*k] != matrix[(k % DIM) * DIM + k / DIM]) {
            Some(k) => Err(Error::weights(format!("tensor `{MATRIX}` is not symmetric: row {}, column {}", k / DIM, k % DIM))),
            None => Ok(Some(Self { mean, matrix })),
        }
    }

    /// Adds its tensors to those of a file.
    pub(super) fn put(&self, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        tensors.insert(MEAN.into(), Tensor::from_slice(&self.mean, DIM, &Device::Cpu)?);
        tensors.insert(MATRIX.into(), Tensor::from_slice(&self.matrix, (DIM, DIM), &Device::Cpu)?);
        Ok(())
    }

    /// All its values, for a hash.
    pub(super) fn values(&self) -> impl Iterator<Item = &f32> {
        self.mean.iter().chain(&self.matrix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_noise;

    /// Unit vectors about a shared one, that differ most along the first axes.
    fn descriptors(n: usize) -> Vec<Descriptor> {
        (0..n)
            .map(|i| {
                let value = |k: usize| 1.0 + test_noise(i as u64, k as u64) * 4.0 / (1.0 + k as f32 * 0.1);
                Descriptor::new((0..DIM).map(value).collect()).unwrap()
            })
            .collect()
    }

    fn variances(rows: &[Vec<f32>]) -> Vec<f64> {
        let n = rows.len() as f64;
        (0..DIM)
            .map(|k| {
                let mean = rows.iter().map(|r| f64::from(r[k])).sum::<f64>() / n;
                rows.iter().map(|r| (f64::from(r[k]) - mean).powi(2)).sum::<f64>() / n
            })
            .collect()
    }

    #[test]
    fn rows_are_whitened_as_descriptors_are() {
        let all = descriptors(200);
        let whitening = Whitening::fit(&all).unwrap();
        let rows = all[..5].iter().flat_map(|d| d.as_slice().to_vec()).collect::<Vec<_>>();
        let got = whitening.of(&Tensor::from_vec(rows, (5, DIM), &Device::Cpu).unwrap()).unwrap().to_vec2::<f32>().unwrap();
        for (got, d) in got.iter().zip(&all) {
            let want = Descriptor::new(whitening.apply(d.as_slice())).unwrap();
            assert!(got.iter().zip(want.as_slice()).all(|(a, b)| (a - b).abs() < 1e-4));
        }
    }

    #[test]
    fn what_all_share_goes_and_variances_become_their_roots() {
        let all = descriptors(3000);
        let whitening = Whitening::fit(&all).unwrap();
        let before: Vec<Vec<f32>> = all.iter().map(|d| d.as_slice().to_vec()).collect();
        let after: Vec<Vec<f32>> = all.iter().map(|d| whitening.apply(d.as_slice())).collect();
        for k in 0..DIM {
            let mean = after.iter().map(|r| f64::from(r[k])).sum::<f64>() / after.len() as f64;
            assert!(mean.abs() < 1e-4, "{k}: {mean}");
        }
        let (before, after) = (variances(&before), variances(&after));
        let level = before.iter().sum::<f64>() / DIM as f64;
        // The axes are nearly those of the covariance: each variance v becomes v / sqrt(v / level + FLOOR).
        for k in [0, 1, 5, 20, 100, 400] {
            let want = before[k] / (before[k] / level + FLOOR).sqrt();
            assert!((after[k] / want - 1.0).abs() < 0.15, "{k}: {} -> {}, wanted {want}", before[k], after[k]);
        }
    }

    #[test]
    fn a_file_keeps_it_and_half_of_one_is_refused() {
        let whitening = Whitening::fit(&descriptors(MIN_DESCRIPTORS)).unwrap();
        let raw = |tensors: &BTreeMap<String, Tensor>| {
            RawFile::parse(
                &super::super::container::write_safetensors(tensors, candle_core::DType::F32, Vec::new(), "k", "v".into()).unwrap(),
            )
            .unwrap()
        };
        let mut tensors = BTreeMap::new();
        whitening.put(&mut tensors).unwrap();
        assert_eq!(Whitening::take(&mut raw(&tensors), "x").unwrap().as_ref(), Some(&whitening));
        assert_eq!(Whitening::take(&mut raw(&BTreeMap::new()), "x").unwrap(), None);
        let mut skewed = whitening.clone();
        skewed.matrix[1] += 1.0;
        let mut other = BTreeMap::new();
        skewed.put(&mut other).unwrap();
        let e = Whitening::take(&mut raw(&other), "x").unwrap_err().to_string();
        assert!(e.contains("whitening.matrix") && e.contains("row 0, column 1"), "{e}");
        tensors.remove(MEAN);
        assert!(Whitening::take(&mut raw(&tensors), "x").unwrap_err().to_string().contains(MEAN));
    }

    #[test]
    fn too_few_images_or_all_alike_are_named() {
        let few = Whitening::fit(&descriptors(99)).unwrap_err().to_string();
        assert!(few.contains("99 images") && few.contains("100"), "{few}");
        let alike = Whitening::fit(&vec![descriptors(1).remove(0); 200]).unwrap_err().to_string();
        assert!(alike.contains("all alike"), "{alike}");
    }
}
