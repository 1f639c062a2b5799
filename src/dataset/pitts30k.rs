//! Pitts30k: a MATLAB `dbStruct`, folders of `@utm_e@utm_n@...` names, or published .npz truth.

use super::geo::by_file_name;
use super::mat::{self, Value};
use super::{in_one_area, list_images, within, Dataset, Format, Pose2, Sample, Spec};
use crate::error::{read_file, Error, Result};
use crate::eval::{read_npz_matrices, Matrix};
use std::path::Path;

/// `pitts30k:DIR`.
pub struct Pitts30k;

const USAGE: &str = "pitts30k:DIR[,split=test][,radius=25][,mat=FILE][,truth=FILE.npz]: DIR/datasets/pitts30k_SPLIT.mat with DIR/ and DIR/queries_real/, or DIR/images/SPLIT/{queries,database}/ with @utm_e@utm_n@ names; truth: utmQ and utmDb in the order of the sorted images";

impl Format for Pitts30k {
    fn kind(&self) -> &'static str {
        "pitts30k"
    }

    fn usage(&self) -> &'static str {
        USAGE
    }

    fn open(&self, spec: &Spec) -> Result<Dataset> {
        spec.check_options(&["split", "radius", "mat", "truth"])?;
        let [dir] = spec.paths::<1>(USAGE)?;
        let split = spec.option("split").unwrap_or("test");
        let radius = spec.number("radius", 25.0)?;
        let mat = spec.option("mat").map_or_else(|| dir.join("datasets").join(format!("pitts30k_{split}.mat")), Into::into);
        if mat.is_file() {
            return from_mat(dir, &read_file(&mat)?, radius).map_err(|e| e.at(&mat));
        }
        let images = dir.join("images").join(split);
        let (queries, references) = (list_images(&images.join("queries"))?, list_images(&images.join("database"))?);
        match spec.option("truth").map(Path::new) {
            Some(path) => with_truth(queries, references, &read_file(path)?, radius).map_err(|e| e.at(path)),
            None => by_file_name(queries, references, radius),
        }
    }
}

fn from_mat(dir: &Path, bytes: &[u8], radius: f64) -> Result<Dataset> {
    let file = mat::parse(bytes)?;
    let db = file.get("dbStruct").and_then(Value::fields).ok_or_else(|| Error::dataset("no struct `dbStruct`"))?;
    let missing = |name: &str| Error::dataset(format!("dbStruct has no usable field `{name}`"));
    let names = |field: &str| -> Result<Vec<String>> { db.get(field).and_then(Value::strings).ok_or_else(|| missing(field)) };
    // 2 x N, column-major: easting and northing of each image in turn.
    let places = |field: &str| -> Result<Vec<Pose2>> {
        let v = db.get(field).and_then(Value::numbers).ok_or_else(|| missing(field))?;
        Ok(v.chunks_exact(2).map(|p| Pose2 { x: p[0], y: p[1], heading_deg: None }).collect())
    };
    let side = |names: Vec<String>, places: &[Pose2], root: &Path, what: &str| -> Result<Vec<Sample>> {
        if names.len() != places.len() {
            return Err(Error::dataset(format!("dbStruct names {} {what} but places {}", names.len(), places.len())));
        }
        let safe = |n: &String| !n.starts_with('/') && !n.split('/').any(|p| p == "..");
        if let Some(bad) = names.iter().find(|n| !safe(n)) {
            return Err(Error::dataset(format!("dbStruct names `{bad}`, which lies outside the data set")));
        }
        Ok(names.into_iter().map(|name| Sample { path: root.join(&name), name }).collect())
    };
    let (q, r) = (places("utmQ")?, places("utmDb")?);
    Ok(Dataset {
        queries: side(names("qImageFns")?, &q, &dir.join("queries_real"), "queries")?,
        references: side(names("dbImageFns")?, &r, dir, "references")?,
        positives: within(&q, &r, radius, 180.0),
        query_places: in_one_area(&q),
        reference_places: in_one_area(&r),
        protocol: format!("a reference within {radius} m is true (dbStruct)"),
        ..Dataset::default()
    })
}

fn with_truth(queries: Vec<Sample>, references: Vec<Sample>, bytes: &[u8], radius: f64) -> Result<Dataset> {
    let arrays = read_npz_matrices(bytes)?;
    let places = |name: &str, samples: &[Sample]| -> Result<Vec<Pose2>> {
        match arrays.get(name) {
            Some(Matrix { rows, cols: 2, data }) if *rows == samples.len() => {
                Ok(data.chunks_exact(2).map(|p| Pose2 { x: p[0], y: p[1], heading_deg: None }).collect())
            }
            Some(m) => Err(Error::dataset(format!("`{name}` is {}x{}, wanted {}x2 (one row per image)", m.rows, m.cols, samples.len()))),
            None => Err(Error::dataset(format!("no array `{name}`"))),
        }
    };
    let (q, r) = (places("utmQ", &queries)?, places("utmDb", &references)?);
    let positives = within(&q, &r, radius, 180.0);
    Ok(Dataset {
        protocol: format!("a reference within {radius} m is true (published truth)"),
        queries,
        references,
        positives,
        query_places: in_one_area(&q),
        reference_places: in_one_area(&r),
        ..Dataset::default()
    })
}
