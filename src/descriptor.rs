//! The global descriptor: a unit vector.

use crate::error::{Error, Result};

/// Which model made a descriptor. Two descriptors compare only if these are equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ModelIdentity {
    /// Name in the model's header.
    pub name: String,
    /// SHA-256 over preprocessing and f32 weights: independent of the container.
    pub sha256: String,
}

impl std::fmt::Display for ModelIdentity {
    /// The name and the first digits of the hash.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` ({})", self.name, self.sha256.get(..12).unwrap_or(&self.sha256))
    }
}

/// An L2-normalised global descriptor, f32. Its constructor enforces the norm.
#[derive(Clone, Debug, PartialEq)]
pub struct Descriptor(Vec<f32>);

impl Descriptor {
    /// Normalises `values`.
    ///
    /// Errors: empty, a value that is not finite, or a norm of zero.
    pub fn new(mut values: Vec<f32>) -> Result<Self> {
        let bad = |reason: &str| Err(Error::Descriptor { reason: reason.into() });
        if values.is_empty() {
            return bad("it has no dimensions");
        }
        if values.iter().any(|v| !v.is_finite()) {
            return bad("it holds NaN or infinity");
        }
        // f64: the sum of squares of large finite f32 values must not overflow.
        let norm = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
        if norm < 1e-12 {
            return bad("its norm is zero");
        }
        for v in &mut values {
            *v = (f64::from(*v) / norm) as f32;
        }
        Ok(Self(values))
    }

    /// Takes values that were a descriptor's before, as they are: normalising once more would move them by a rounding.
    ///
    /// Errors: a norm that is not one.
    pub fn stored(values: Vec<f32>) -> Result<Self> {
        let norm = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
        // NaN fails too.
        match (norm - 1.0).abs() < 1e-4 {
            true => Ok(Self(values)),
            false => Err(Error::Descriptor { reason: format!("it was stored with norm {norm}, not 1") }),
        }
    }

    /// The values; their squares sum to one.
    pub fn as_slice(&self) -> &[f32] {
        &self.0
    }

    /// Number of dimensions.
    pub fn dim(&self) -> usize {
        self.0.len()
    }

    /// Cosine similarity in [-1, 1]; the shorter length counts if they differ.
    pub fn similarity(&self, other: &Self) -> f32 {
        crate::map::dot(&self.0, &other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn is_of_unit_length_or_an_error(values in proptest::collection::vec(any::<f32>(), 0..64)) {
            if let Ok(d) = Descriptor::new(values) {
                let norm: f64 = d.as_slice().iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
                prop_assert!((norm - 1.0).abs() < 1e-5, "{norm}");
            }
        }
    }

    #[test]
    fn refuses_what_has_no_direction() {
        for v in [vec![], vec![0.0; 4], vec![1.0, f32::NAN], vec![f32::INFINITY]] {
            assert!(Descriptor::new(v).is_err());
        }
    }
}
