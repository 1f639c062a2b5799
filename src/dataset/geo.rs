//! File names that carry coordinates: `@easting@northing@...`.

use super::{in_one_area, list_images, within, Dataset, Format, Pose2, Sample, Spec};
use crate::error::{Error, Result};

/// `utm:QUERY:REFERENCE`.
pub struct FileNames;

const USAGE: &str = "utm:QUERY_DIR:REFERENCE_DIR[,radius=25]: file names begin with @easting@northing@";

impl Format for FileNames {
    fn kind(&self) -> &'static str {
        "utm"
    }

    fn usage(&self) -> &'static str {
        USAGE
    }

    fn open(&self, spec: &Spec) -> Result<Dataset> {
        spec.check_options(&["radius"])?;
        let [q, r] = spec.paths::<2>(USAGE)?;
        by_file_name(list_images(q)?, list_images(r)?, spec.number("radius", 25.0)?)
    }
}

pub(super) fn by_file_name(queries: Vec<Sample>, references: Vec<Sample>, radius: f64) -> Result<Dataset> {
    let poses = |samples: &[Sample]| samples.iter().map(coordinates).collect::<Result<Vec<_>>>();
    let (q, r) = (poses(&queries)?, poses(&references)?);
    let positives = within(&q, &r, radius, 180.0);
    let protocol = format!("a reference within {radius} m is true");
    let (query_places, reference_places) = (in_one_area(&q), in_one_area(&r));
    Ok(Dataset { protocol, queries, references, positives, query_places, reference_places, ..Dataset::default() })
}

fn coordinates(sample: &Sample) -> Result<Pose2> {
    let file = sample.name.rsplit('/').next().unwrap_or("");
    let mut fields = file.split('@').skip(1).map(|f| f.trim().parse::<f64>().ok().filter(|v| v.is_finite()));
    match (fields.next().flatten(), fields.next().flatten()) {
        (Some(x), Some(y)) => Ok(Pose2 { x, y, heading_deg: None }),
        _ => Err(Error::dataset(format!("file name `{}` does not begin with @easting@northing@", sample.name))),
    }
}
