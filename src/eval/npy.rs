//! Descriptors as .npy and .npz: the exchange format with any other method.

use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};

/// Row-major. f64, because coordinates come this way too: UTM northings lose half a metre in f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// `rows * cols` values.
    pub data: Vec<f64>,
}

fn bad(reason: impl std::fmt::Display) -> Error {
    Error::dataset(format!("npy: {reason}"))
}

/// Reads a two-dimensional .npy of f16, f32, f64 or integers.
///
/// Errors: other types (object arrays among them) and shapes, a size that the data does not have.
pub fn read_matrix(bytes: &[u8]) -> Result<Matrix> {
    let npy = npyz::NpyFile::new(bytes).map_err(bad)?;
    let shape: Vec<usize> = npy.shape().iter().map(|n| *n as usize).collect();
    let (rows, cols) = match shape[..] {
        [n] => (n, 1),
        [n, m] => (n, m),
        _ => return Err(bad(format!("shape {shape:?}, wanted two dimensions"))),
    };
    let count = rows.checked_mul(cols).filter(|n| *n <= bytes.len());
    let Some(count) = count else { return Err(bad(format!("shape {shape:?} is larger than the file"))) };
    let fortran = npy.order() == npyz::Order::Fortran;
    let dtype = npy.dtype().descr();
    let mut data: Vec<f64> = match dtype.trim_matches('\'') {
        "<f4" | ">f4" => npy.into_vec::<f32>().map_err(bad)?.into_iter().map(f64::from).collect(),
        "<f8" | ">f8" => npy.into_vec().map_err(bad)?,
        "<i8" | ">i8" => npy.into_vec::<i64>().map_err(bad)?.into_iter().map(|v| v as f64).collect(),
        "<i4" | ">i4" => npy.into_vec::<i32>().map_err(bad)?.into_iter().map(f64::from).collect(),
        "<f2" => {
            let tail = bytes.len().checked_sub(2 * count).ok_or_else(|| bad("the data is cut short"))?;
            bytes[tail..].chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f64()).collect()
        }
        other => return Err(bad(format!("type {other} (allowed: f2, f4, f8, i4, i8)"))),
    };
    if data.len() != count {
        return Err(bad("the data is cut short"));
    }
    if fortran {
        data = (0..count).map(|i| data[(i % cols) * rows + i / cols]).collect();
    }
    Ok(Matrix { rows, cols, data })
}

/// A .npy of f32, version 1.0.
pub fn write_npy(matrix: &Matrix) -> Vec<u8> {
    let mut out = npy_header("<f4", &format!("({}, {})", matrix.rows, matrix.cols));
    out.extend(matrix.data.iter().flat_map(|v| (*v as f32).to_le_bytes()));
    out
}

/// A one-dimensional .npy of i64, version 1.0.
pub fn write_npy_i64(values: &[i64]) -> Vec<u8> {
    let mut out = npy_header("<i8", &format!("({},)", values.len()));
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    out
}

fn npy_header(dtype: &str, shape: &str) -> Vec<u8> {
    let mut header = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}");
    // Magic, version and length take 10 bytes; the data begins at a multiple of 64.
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend_from_slice(&(header.len() as u16).to_le_bytes());
    out.extend_from_slice(header.as_bytes());
    out
}

/// An uncompressed .npz with one f32 array per name: the same arrays give the same bytes.
pub fn write_npz(arrays: &[(&str, &Matrix)]) -> Result<Vec<u8>> {
    let arrays: Vec<(&str, Vec<u8>)> = arrays.iter().map(|(name, matrix)| (*name, write_npy(matrix))).collect();
    zip_npy(&arrays)
}

/// An uncompressed .npz of .npy files.
pub fn zip_npy(arrays: &[(&str, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Stored)
        .last_modified_time(zip::DateTime::default());
    for (name, npy) in arrays {
        zip.start_file(format!("{name}.npy"), options).map_err(bad)?;
        zip.write_all(npy).map_err(bad)?;
    }
    Ok(zip.finish().map_err(bad)?.into_inner())
}

/// Largest array of an .npz that we unpack, bytes.
const MAX_ARRAY: u64 = 4 << 30;

/// The two-dimensional arrays of an .npz by name; zero-dimensional ones come as 1 x 1, others are
/// left out.
pub fn read_npz_matrices(bytes: &[u8]) -> Result<BTreeMap<String, Matrix>> {
    let mut zip = zip::ZipArchive::new(Cursor::new(bytes)).map_err(bad)?;
    let mut out = BTreeMap::new();
    for i in 0..zip.len() {
        let file = zip.by_index(i).map_err(bad)?;
        let name = file.name().map_err(bad)?.trim_end_matches(".npy").to_string();
        let mut data = Vec::new();
        file.take(MAX_ARRAY).read_to_end(&mut data).map_err(bad)?;
        match read_matrix(&data) {
            Ok(m) => drop(out.insert(name, m)),
            Err(_) if is_scalar(&data) => {
                if let Ok(v) = npyz::NpyFile::new(&data[..]).map_err(bad).and_then(|n| n.into_vec::<i64>().map_err(bad)) {
                    out.insert(name, Matrix { rows: 1, cols: 1, data: v.into_iter().map(|v| v as f64).collect() });
                }
            }
            Err(e) => return Err(bad(format!("`{name}`: {e}"))),
        }
    }
    Ok(out)
}

fn is_scalar(bytes: &[u8]) -> bool {
    npyz::NpyFile::new(bytes).is_ok_and(|n| n.shape().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn round_trips_and_never_panics_on_mutations(rows in 0usize..5, cols in 1usize..5, at in 0usize..200, flip in any::<u8>(), cut in 0usize..200) {
            let data = (0..rows * cols).map(|i| i as f64 * 0.5).collect();
            let m = Matrix { rows, cols, data };
            let mut bytes = write_npy(&m);
            prop_assert_eq!(&read_matrix(&bytes)?, &m);
            let npz = write_npz(&[("a", &m)])?;
            prop_assert_eq!(&read_npz_matrices(&npz)?["a"], &m);
            let _ = read_matrix(&bytes[..cut.min(bytes.len())]);
            let _ = read_npz_matrices(&npz[..cut.min(npz.len())]);
            if let Some(b) = bytes.get_mut(at) { *b ^= flip; }
            let _ = read_matrix(&bytes);
        }
    }
}
