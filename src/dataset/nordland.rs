//! Nordland: aligned frames of one railway line in four seasons.

use super::traverse::by_index;
use super::{list_images, Dataset, Format, Spec};
use crate::error::{Error, Result};

/// `nordland:DIR`, one folder per season.
pub struct Nordland;

const USAGE: &str = "nordland:DIR[,query=winter][,reference=summer][,tolerance=2]: a folder per season with aligned frames";

impl Format for Nordland {
    fn kind(&self) -> &'static str {
        "nordland"
    }

    fn usage(&self) -> &'static str {
        USAGE
    }

    fn open(&self, spec: &Spec) -> Result<Dataset> {
        spec.check_options(&["query", "reference", "tolerance"])?;
        let [dir] = spec.paths::<1>(USAGE)?;
        let season = |key, default| list_images(&dir.join(spec.option(key).unwrap_or(default)));
        let (queries, references) = (season("query", "winter")?, season("reference", "summer")?);
        if queries.len() != references.len() {
            return Err(Error::dataset(format!(
                "Nordland's seasons are aligned frame by frame, but {} has {} queries and {} references",
                dir.display(),
                queries.len(),
                references.len()
            )));
        }
        Ok(by_index(queries, references, spec.number("tolerance", 2.0)? as usize))
    }
}
