//! CDR, the wire format of ROS 2 messages: plain CDR of either byte order.
//!
//! Our own reader, because images must be borrowed from the message and not copied byte by byte
//! through serde, and because a lying length must fail before anything is allocated.

use crate::error::{Error, Result};

/// Reads values from a message. Offsets in errors count from the start of the message.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    big_endian: bool,
}

/// Bytes of the encapsulation header; alignment counts from behind it.
const HEADER: usize = 4;

macro_rules! number {
    ($name:ident, $t:ty, $doc:literal) => {
        #[doc = $doc]
        pub fn $name(&mut self) -> Result<$t> {
            const N: usize = std::mem::size_of::<$t>();
            self.align(N);
            let bytes: [u8; N] = self.take(N)?.try_into().map_err(|_| self.error("cut short"))?;
            Ok(if self.big_endian { <$t>::from_be_bytes(bytes) } else { <$t>::from_le_bytes(bytes) })
        }
    };
}

impl<'a> Reader<'a> {
    /// Errors: shorter than a header, or another encoding than plain CDR (XCDR2, parameter lists).
    pub fn new(bytes: &'a [u8]) -> Result<Self> {
        let reader = |big_endian| Self { bytes, at: HEADER, big_endian };
        match bytes.get(..HEADER) {
            Some([0, 0, ..]) => Ok(reader(true)),
            Some([0, 1, ..]) => Ok(reader(false)),
            Some([a, b, ..]) => Err(Error::Cdr { offset: 0, reason: format!("encoding {a:02x}{b:02x} is not plain CDR (0000, 0001)") }),
            _ => Err(Error::Cdr { offset: 0, reason: "shorter than its header".into() }),
        }
    }

    fn error(&self, reason: impl Into<String>) -> Error {
        Error::Cdr { offset: self.at, reason: reason.into() }
    }

    fn align(&mut self, n: usize) {
        self.at = HEADER + (self.at - HEADER).next_multiple_of(n);
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let slice = self.at.checked_add(n).and_then(|end| self.bytes.get(self.at..end));
        let left = self.bytes.len().saturating_sub(self.at);
        let slice = slice.ok_or_else(|| self.error(format!("wants {n} bytes, {left} are left")))?;
        self.at += n;
        Ok(slice)
    }

    number!(u8, u8, "One byte.");
    number!(i8, i8, "One signed byte.");
    number!(u16, u16, "Aligned to two bytes.");
    number!(u32, u32, "Aligned to four bytes.");
    number!(i32, i32, "Aligned to four bytes.");
    number!(u64, u64, "Aligned to eight bytes.");
    number!(f64, f64, "Aligned to eight bytes.");

    /// A byte that is 0 or not.
    pub fn bool(&mut self) -> Result<bool> {
        Ok(self.u8()? != 0)
    }

    /// A string; bytes that are not UTF-8 are replaced.
    pub fn string(&mut self) -> Result<String> {
        let n = self.u32()? as usize;
        let bytes = self.take(n)?;
        Ok(String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned())
    }

    /// A string, borrowed. Errors: bytes that are not UTF-8.
    pub fn str(&mut self) -> Result<&'a str> {
        let n = self.u32()? as usize;
        let bytes = self.take(n)?;
        std::str::from_utf8(bytes.strip_suffix(&[0]).unwrap_or(bytes)).map_err(|_| self.error("a string that is not UTF-8"))
    }

    /// `sequence<uint8>`, borrowed.
    pub fn bytes(&mut self) -> Result<&'a [u8]> {
        let n = self.u32()? as usize;
        self.take(n)
    }

    /// `sequence<float64>`.
    pub fn f64s(&mut self) -> Result<Vec<f64>> {
        let n = self.u32()? as usize;
        if n > 0 {
            self.align(8);
        }
        let left = self.bytes.len().saturating_sub(self.at);
        if n > left / 8 {
            return Err(self.error(format!("a sequence of {n} float64, {left} bytes are left")));
        }
        (0..n).map(|_| self.f64()).collect()
    }

    /// `float64[N]`.
    pub fn f64_array<const N: usize>(&mut self) -> Result<[f64; N]> {
        let mut out = [0.0; N];
        for v in &mut out {
            *v = self.f64()?;
        }
        Ok(out)
    }
}

/// Writes a message, little-endian.
#[derive(Clone, Debug)]
pub struct Writer(Vec<u8>);

impl Default for Writer {
    fn default() -> Self {
        Self(vec![0, 1, 0, 0])
    }
}

impl Writer {
    fn put<const N: usize>(&mut self, bytes: [u8; N]) -> &mut Self {
        let aligned = HEADER + (self.0.len() - HEADER).next_multiple_of(N);
        self.0.resize(aligned, 0);
        self.0.extend_from_slice(&bytes);
        self
    }

    /// One byte.
    pub fn u8(&mut self, v: u8) -> &mut Self {
        self.put([v])
    }

    /// Aligned to two bytes.
    pub fn u16(&mut self, v: u16) -> &mut Self {
        self.put(v.to_le_bytes())
    }

    /// Aligned to four bytes.
    pub fn u32(&mut self, v: u32) -> &mut Self {
        self.put(v.to_le_bytes())
    }

    /// Aligned to four bytes.
    pub fn i32(&mut self, v: i32) -> &mut Self {
        self.put(v.to_le_bytes())
    }

    /// Aligned to eight bytes.
    pub fn f64(&mut self, v: f64) -> &mut Self {
        self.put(v.to_le_bytes())
    }

    /// Values of a fixed array.
    pub fn f64_array(&mut self, values: &[f64]) -> &mut Self {
        for v in values {
            self.f64(*v);
        }
        self
    }

    /// `sequence<float64>`.
    pub fn f64s(&mut self, values: &[f64]) -> &mut Self {
        self.u32(values.len() as u32).f64_array(values)
    }

    /// A string with its closing zero.
    pub fn string(&mut self, s: &str) -> &mut Self {
        self.u32(s.len() as u32 + 1);
        self.0.extend_from_slice(s.as_bytes());
        self.u8(0)
    }

    /// `sequence<uint8>`.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.u32(bytes.len() as u32);
        self.0.extend_from_slice(bytes);
        self
    }

    /// The message.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}
