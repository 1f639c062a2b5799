//! Two traverses of one route, matched by index.

use super::{list_images, Dataset, Format, Sample, Spec};
use crate::error::Result;

/// `traverse:QUERY:REFERENCE,tolerance=N`.
pub struct Traverse;

const USAGE: &str = "traverse:QUERY_DIR:REFERENCE_DIR[,tolerance=2]: frame i of one is at frame i of the other";

impl Format for Traverse {
    fn kind(&self) -> &'static str {
        "traverse"
    }

    fn usage(&self) -> &'static str {
        USAGE
    }

    fn open(&self, spec: &Spec) -> Result<Dataset> {
        spec.check_options(&["tolerance"])?;
        let [q, r] = spec.paths::<2>(USAGE)?;
        let tolerance = spec.number("tolerance", 2.0)? as usize;
        Ok(by_index(list_images(q)?, list_images(r)?, tolerance))
    }
}

/// Frame i is true for frames i - tolerance to i + tolerance.
pub(super) fn by_index(queries: Vec<Sample>, references: Vec<Sample>, tolerance: usize) -> Dataset {
    let near = |i: usize| (i.saturating_sub(tolerance)..(i + tolerance + 1).min(references.len())).collect();
    Dataset {
        positives: (0..queries.len()).map(near).collect(),
        protocol: format!("the reference of the same index, +-{tolerance} frames, is true"),
        queries,
        references,
        ..Dataset::default()
    }
}
