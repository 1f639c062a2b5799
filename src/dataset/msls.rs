//! Mapillary Street-Level Sequences, image to image.

use super::{within, Dataset, Format, Located, Pose2, Sample, Spec};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::path::Path;

/// `msls:DIR`, the folder that holds `train_val/`.
pub struct Msls;

const USAGE: &str = "msls:DIR[,cities=cph+sf][,subtask=all][,radius=25][,angle=40] with DIR/train_val/CITY/{query,database}/; subtasks: all s2w w2s o2n n2o d2n n2d";

impl Format for Msls {
    fn kind(&self) -> &'static str {
        "msls"
    }

    fn usage(&self) -> &'static str {
        USAGE
    }

    fn open(&self, spec: &Spec) -> Result<Dataset> {
        spec.check_options(&["cities", "subtask", "radius", "angle"])?;
        let [dir] = spec.paths::<1>(USAGE)?;
        let (radius, angle) = (spec.number("radius", 25.0)?, spec.number("angle", 40.0)?);
        let subtask = spec.option("subtask").unwrap_or("all");
        let mut all = Dataset::default();
        for (area, city) in spec.option("cities").unwrap_or("cph+sf").split('+').enumerate() {
            let side = |name: &str| read_side(&dir.join("train_val").join(city).join(name), city, subtask);
            let ((queries, poses), (references, reference_poses)) = (side("query")?, side("database")?);
            let first = all.references.len();
            for positives in within(&poses, &reference_poses, radius, angle) {
                // Cities never match each other.
                all.positives.push(positives.into_iter().map(|p| p + first).collect());
            }
            let located = |poses: Vec<Pose2>| poses.into_iter().map(move |pose| Located { area, pose });
            all.query_places.extend(located(poses));
            all.reference_places.extend(located(reference_poses));
            all.queries.extend(queries);
            all.references.extend(references);
        }
        all.protocol = format!("MSLS image to image, subtask {subtask}: within {radius} m and {angle} degrees; panoramas left out");
        Ok(all)
    }
}

/// A table whose columns are found by name; the unnamed first column is an index.
struct Table {
    columns: HashMap<String, usize>,
    records: Vec<csv::StringRecord>,
    path: String,
}

impl Table {
    fn read(path: &Path) -> Result<Self> {
        let bytes = crate::error::read_file(path)?;
        let fail = |e: csv::Error| Error::dataset(e.to_string()).at(path);
        let mut reader = csv::Reader::from_reader(&bytes[..]);
        let columns = reader.headers().map_err(fail)?.iter().enumerate().map(|(i, h)| (h.to_string(), i)).collect();
        let records = reader.records().collect::<std::result::Result<_, _>>().map_err(fail)?;
        Ok(Self { columns, records, path: path.display().to_string() })
    }

    fn column(&self, name: &str) -> Result<usize> {
        self.columns.get(name).copied().ok_or_else(|| Error::dataset(format!("{}: no column `{name}`", self.path)))
    }

    fn number(&self, record: usize, column: usize) -> Result<f64> {
        let text = self.records[record].get(column).unwrap_or("");
        text.parse().map_err(|_| Error::dataset(format!("{}, record {}: `{text}` is not a number", self.path, record + 1)))
    }

    fn flag(&self, record: usize, column: usize) -> bool {
        matches!(self.records[record].get(column), Some("True" | "true" | "1"))
    }
}

fn read_side(dir: &Path, city: &str, subtask: &str) -> Result<(Vec<Sample>, Vec<Pose2>)> {
    let place = Table::read(&dir.join("postprocessed.csv"))?;
    let raw = Table::read(&dir.join("raw.csv"))?;
    let tasks = Table::read(&dir.join("subtask_index.csv"))?;
    let raw_rows: HashMap<&str, usize> = {
        let key = raw.column("key")?;
        raw.records.iter().enumerate().filter_map(|(i, r)| Some((r.get(key)?, i))).collect()
    };
    let (key, easting, northing) = (place.column("key")?, place.column("easting")?, place.column("northing")?);
    let (heading, panorama) = (raw.column("ca")?, raw.column("pano")?);
    let chosen = tasks.column(subtask).map_err(|_| Error::dataset(format!("{}: no subtask `{subtask}`", tasks.path)))?;
    if tasks.records.len() != place.records.len() {
        return Err(Error::dataset(format!("{}: {} rows, postprocessed.csv has {}", tasks.path, tasks.records.len(), place.records.len())));
    }
    let (mut samples, mut poses) = (Vec::new(), Vec::new());
    for (i, record) in place.records.iter().enumerate() {
        let name = record.get(key).unwrap_or("");
        let row = *raw_rows.get(name).ok_or_else(|| Error::dataset(format!("{}: no key `{name}`", raw.path)))?;
        if !tasks.flag(i, chosen) || raw.flag(row, panorama) {
            continue;
        }
        let heading_deg = Some(raw.number(row, heading)?);
        samples.push(Sample { name: format!("{city}/{name}"), path: dir.join("images").join(format!("{name}.jpg")) });
        poses.push(Pose2 { x: place.number(i, easting)?, y: place.number(i, northing)?, heading_deg });
    }
    Ok((samples, poses))
}
