//! A table of images: what any other set can be turned into.

use super::{in_one_area, within, Dataset, Format, Pose2, Sample, Spec};
use crate::error::{Error, Result};

/// `manifest:FILE`.
pub struct Manifest;

const USAGE: &str = "manifest:FILE.csv[,radius=25][,angle=180]: columns image (relative to the file), side (query, reference or both), and place (images of one place are true) or x and y and perhaps heading_deg (within the radius is true)";

impl Format for Manifest {
    fn kind(&self) -> &'static str {
        "manifest"
    }

    fn usage(&self) -> &'static str {
        USAGE
    }

    fn open(&self, spec: &Spec) -> Result<Dataset> {
        spec.check_options(&["radius", "angle"])?;
        let [file] = spec.paths::<1>(USAGE)?;
        let (radius, angle) = (spec.number("radius", 25.0)?, spec.number("angle", 180.0)?);
        let bytes = crate::error::read_file(file)?;
        let root = file.parent().unwrap_or(file);
        parse(&bytes, root, radius, angle).map_err(|e| e.at(file))
    }
}

#[derive(Default)]
struct Side {
    samples: Vec<Sample>,
    places: Vec<String>,
    poses: Vec<Pose2>,
}

fn parse(bytes: &[u8], root: &std::path::Path, radius: f64, angle: f64) -> Result<Dataset> {
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).comment(Some(b'#')).from_reader(bytes);
    let fail = |e: csv::Error| Error::dataset(e.to_string());
    let header = reader.headers().map_err(fail)?.clone();
    let column = |name: &str| header.iter().position(|h| h == name);
    let need = |name: &str| column(name).ok_or_else(|| Error::dataset(format!("no column `{name}`; usage: {USAGE}")));
    let (image, side) = (need("image")?, need("side")?);
    let place = column("place");
    let xy = if place.is_none() { Some((need("x")?, need("y")?)) } else { None };
    let heading = column("heading_deg");
    let (mut queries, mut references) = (Side::default(), Side::default());
    for (i, record) in reader.records().enumerate() {
        let record = record.map_err(fail)?;
        let text = |c: usize| record.get(c).unwrap_or("");
        let number = |c: usize| -> Result<f64> {
            let parsed = text(c).parse::<f64>().ok().filter(|v| v.is_finite());
            parsed.ok_or_else(|| Error::dataset(format!("record {}: `{}` in column `{}` is not a number", i + 1, text(c), &header[c])))
        };
        let name = text(image).to_string();
        if name.is_empty() {
            return Err(Error::dataset(format!("record {}: column `image` is empty", i + 1)));
        }
        let pose = match xy {
            Some((x, y)) => {
                let heading_deg = heading.filter(|c| !text(*c).is_empty()).map(number).transpose()?;
                Some(Pose2 { x: number(x)?, y: number(y)?, heading_deg })
            }
            None => None,
        };
        let sides: &mut [&mut Side] = match text(side) {
            "query" => &mut [&mut queries],
            "reference" => &mut [&mut references],
            "both" => &mut [&mut queries, &mut references],
            other => return Err(Error::dataset(format!("record {}: side `{other}` (allowed: query, reference, both)", i + 1))),
        };
        for to in sides.iter_mut() {
            to.samples.push(Sample { path: root.join(&name), name: name.clone() });
            to.places.extend(place.map(|c| text(c).to_string()));
            to.poses.extend(pose);
        }
    }
    let (positives, protocol) = if place.is_some() {
        let mut rows: std::collections::HashMap<&str, Vec<usize>> = std::collections::HashMap::new();
        for (i, p) in references.places.iter().enumerate() {
            rows.entry(p).or_default().push(i);
        }
        let own = |q: usize, r: usize| queries.samples[q].name == references.samples[r].name;
        let of = |(q, p): (usize, &String)| -> Vec<usize> {
            rows.get(p.as_str()).map_or_else(Vec::new, |rows| rows.iter().copied().filter(|r| !own(q, *r)).collect())
        };
        (queries.places.iter().enumerate().map(of).collect(), "a reference of the same place is true".to_string())
    } else {
        (within(&queries.poses, &references.poses, radius, angle), format!("a reference within {radius} m and {angle} degrees is true"))
    };
    Ok(Dataset {
        protocol,
        positives,
        query_places: in_one_area(&queries.poses),
        reference_places: in_one_area(&references.poses),
        queries: queries.samples,
        references: references.samples,
        ..Dataset::default()
    })
}
