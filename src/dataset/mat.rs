//! MATLAB 5 files, as far as `dbStruct` goes: numbers, strings, cells and structs, compressed or not.
//! The one maintained crate for the format reads arrays of numbers only.

use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::io::Read;

/// A MATLAB value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any numeric array, column-major.
    Numbers(Vec<f64>),
    /// A row of characters.
    Text(String),
    /// A cell array, column-major.
    Cells(Vec<Value>),
    /// A 1 x 1 struct.
    Struct(BTreeMap<String, Value>),
    /// What we do not read.
    Other,
}

impl Value {
    /// The fields of a struct.
    pub fn fields(&self) -> Option<&BTreeMap<String, Value>> {
        match self {
            Self::Struct(f) => Some(f),
            _ => None,
        }
    }

    /// The numbers of an array.
    pub fn numbers(&self) -> Option<&[f64]> {
        match self {
            Self::Numbers(v) => Some(v),
            _ => None,
        }
    }

    /// The strings of a cell array; each may be wrapped in a cell of its own.
    pub fn strings(&self) -> Option<Vec<String>> {
        let Self::Cells(cells) = self else { return None };
        let text = |v: &Value| match v {
            Value::Text(t) => Some(t.clone()),
            Value::Cells(inner) => match inner.as_slice() {
                [Value::Text(t)] => Some(t.clone()),
                _ => None,
            },
            _ => None,
        };
        cells.iter().map(text).collect()
    }
}

const MI_MATRIX: u32 = 14;
const MI_COMPRESSED: u32 = 15;
/// Nesting deeper than this is refused.
const MAX_DEPTH: usize = 8;
/// Largest decompressed variable, bytes.
const MAX_INFLATED: u64 = 1 << 30;

fn bad(why: &str) -> Error {
    Error::dataset(format!("MATLAB file: {why}"))
}

/// The variables of a file by name.
///
/// Errors: version 7.3 (HDF5), big-endian files, bytes that contradict themselves.
pub fn parse(bytes: &[u8]) -> Result<BTreeMap<String, Value>> {
    if bytes.starts_with(b"\x89HDF") || bytes.get(124..126) == Some(&[0, 2]) {
        return Err(bad("version 7.3 (HDF5) is not read; save it with -v7"));
    }
    if bytes.get(126..128) != Some(b"IM") {
        return Err(bad("not a little-endian MATLAB 5 file"));
    }
    let mut out = BTreeMap::new();
    let mut at = 128;
    while at + 8 <= bytes.len() {
        let (kind, data, next) = element(bytes, at)?;
        // Compressed elements are not padded to eight bytes.
        at = if kind == MI_COMPRESSED { at + 8 + data.len() } else { next };
        let inflated;
        let matrix = match kind {
            MI_COMPRESSED => {
                let mut buffer = Vec::new();
                let mut inflate = zlib(data);
                inflate.by_ref().take(MAX_INFLATED).read_to_end(&mut buffer).map_err(|_| bad("a compressed variable is damaged"))?;
                inflated = buffer;
                match element(&inflated, 0)? {
                    (MI_MATRIX, data, _) => data,
                    _ => continue,
                }
            }
            MI_MATRIX => data,
            _ => continue,
        };
        let (name, value) = matrix_value(matrix, 0)?;
        out.insert(name, value);
    }
    Ok(out)
}

fn zlib(data: &[u8]) -> flate2::read::ZlibDecoder<&[u8]> {
    flate2::read::ZlibDecoder::new(data)
}

/// Kind, data and the offset of the next element.
fn element(bytes: &[u8], at: usize) -> Result<(u32, &[u8], usize)> {
    let word = |at: usize| -> Result<u32> {
        let b = bytes.get(at..at.saturating_add(4)).ok_or_else(|| bad("cut short"))?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    };
    let tag = word(at)?;
    let (kind, start, len) =
        if tag >> 16 != 0 { (tag & 0xffff, at + 4, (tag >> 16) as usize) } else { (tag, at + 8, word(at + 4)? as usize) };
    let end = start.checked_add(len).ok_or_else(|| bad("cut short"))?;
    let data = bytes.get(start..end).ok_or_else(|| bad("cut short"))?;
    let next = if tag >> 16 != 0 { at + 8 } else { end.div_ceil(8) * 8 };
    Ok((kind, data, next))
}

fn matrix_value(bytes: &[u8], depth: usize) -> Result<(String, Value)> {
    if bytes.is_empty() {
        return Ok((String::new(), Value::Numbers(Vec::new())));
    }
    if depth > MAX_DEPTH {
        return Err(bad("nested too deeply"));
    }
    let (_, flags, at) = element(bytes, 0)?;
    let class = *flags.first().ok_or_else(|| bad("no class"))?;
    let (_, dims, at) = element(bytes, at)?;
    let count = dims
        .chunks_exact(4)
        .try_fold(1usize, |n, b| n.checked_mul(u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize))
        .ok_or_else(|| bad("its dimensions overflow"))?;
    let (_, name, at) = element(bytes, at)?;
    let name = String::from_utf8_lossy(name).into_owned();
    let value = match class {
        1 => {
            let mut cells = Vec::new();
            let mut at = at;
            for _ in 0..count {
                let (_, data, next) = element(bytes, at)?;
                cells.push(matrix_value(data, depth + 1)?.1);
                at = next;
            }
            Value::Cells(cells)
        }
        2 => {
            let (_, width, at) = element(bytes, at)?;
            let width = width.first().copied().unwrap_or(0) as usize;
            let (_, names, mut at) = element(bytes, at)?;
            if width == 0 || count != 1 {
                return Ok((name, Value::Other));
            }
            let mut fields = BTreeMap::new();
            for field in names.chunks_exact(width) {
                let (_, data, next) = element(bytes, at)?;
                let field = String::from_utf8_lossy(field).trim_end_matches('\0').to_string();
                fields.insert(field, matrix_value(data, depth + 1)?.1);
                at = next;
            }
            Value::Struct(fields)
        }
        4 => {
            let (kind, data, _) = element(bytes, at)?;
            Value::Text(match kind {
                4 | 17 => String::from_utf16_lossy(&data.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect::<Vec<_>>()),
                _ => String::from_utf8_lossy(data).into_owned(),
            })
        }
        6..=15 => {
            let (kind, data, _) = element(bytes, at)?;
            Value::Numbers(numbers(kind, data).ok_or_else(|| bad("an unknown number type"))?)
        }
        _ => Value::Other,
    };
    Ok((name, value))
}

fn numbers(kind: u32, data: &[u8]) -> Option<Vec<f64>> {
    macro_rules! as_f64 {
        ($t:ty) => {
            data.chunks_exact(std::mem::size_of::<$t>()).map(|b| <$t>::from_le_bytes(b.try_into().unwrap_or_default()) as f64).collect()
        };
    }
    Some(match kind {
        1 => as_f64!(i8),
        2 => as_f64!(u8),
        3 => as_f64!(i16),
        4 => as_f64!(u16),
        5 => as_f64!(i32),
        6 => as_f64!(u32),
        7 => as_f64!(f32),
        9 => as_f64!(f64),
        12 => as_f64!(i64),
        13 => as_f64!(u64),
        _ => return None,
    })
}
