//! Two folders of images; truth by poses or by equal names.

use super::{in_one_area, list_images, within, Dataset, Format, Pose2, PoseTable, Sample, Spec};
use crate::error::{Error, Result};
use std::path::Path;

/// `folder:QUERY:REFERENCE`.
pub struct Folder;

const USAGE: &str = "folder:QUERY_DIR:REFERENCE_DIR[,match=poses|name][,radius=25][,angle=180][,query_poses=FILE][,reference_poses=FILE]; poses default to poses.csv in each folder";

impl Format for Folder {
    fn kind(&self) -> &'static str {
        "folder"
    }

    fn usage(&self) -> &'static str {
        USAGE
    }

    fn open(&self, spec: &Spec) -> Result<Dataset> {
        spec.check_options(&["match", "radius", "angle", "query_poses", "reference_poses"])?;
        let [q, r] = spec.paths::<2>(USAGE)?;
        let (queries, references) = (list_images(q)?, list_images(r)?);
        let (mut query_places, mut reference_places) = (Vec::new(), Vec::new());
        let (positives, protocol) = match spec.option("match").unwrap_or("poses") {
            "name" => (same_name(&queries, &references), "a reference of the same name is true".to_string()),
            "poses" => {
                let (radius, angle) = (spec.number("radius", 25.0)?, spec.number("angle", 180.0)?);
                let table = |key: &str, dir: &Path| {
                    let path = spec.option(key).map_or_else(|| dir.join("poses.csv"), Into::into);
                    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
                    PoseTable::parse(&text).map_err(|e| e.at(&path))
                };
                let (tq, tr) = (table("query_poses", q)?, table("reference_poses", r)?);
                let (q, r) = (poses_of(&queries, &tq)?, poses_of(&references, &tr)?);
                let truth = within(&q, &r, radius, angle);
                (query_places, reference_places) = (in_one_area(&q), in_one_area(&r));
                (truth, format!("a reference within {radius} m and {angle} degrees is true"))
            }
            other => return Err(Error::dataset(format!("match={other} (allowed: poses, name)"))),
        };
        Ok(Dataset { protocol, queries, references, positives, query_places, reference_places, ..Dataset::default() })
    }
}

fn poses_of(samples: &[Sample], table: &PoseTable) -> Result<Vec<Pose2>> {
    let pose = |s: &Sample| table.named(&s.name).ok_or_else(|| Error::dataset(format!("no pose for `{}`", s.name)));
    samples.iter().map(pose).collect()
}

fn same_name(queries: &[Sample], references: &[Sample]) -> Vec<Vec<usize>> {
    let stem = |s: &Sample| s.name.rsplit_once('.').map_or(s.name.clone(), |(n, _)| n.to_string());
    let rows: std::collections::HashMap<String, usize> = references.iter().enumerate().map(|(i, s)| (stem(s), i)).collect();
    queries.iter().map(|q| rows.get(&stem(q)).copied().into_iter().collect()).collect()
}
