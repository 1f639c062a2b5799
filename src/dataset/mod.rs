//! Data sets of place recognition, one file per format behind one trait.
//!
//! A data set is named on the command line as `KIND:PATH[:PATH][,key=value]...`.

mod folder;
mod geo;
mod manifest;
mod mat;
mod msls;
mod nordland;
mod pitts30k;
mod poses;
mod traverse;
mod vprbench;

pub use poses::{Pose2, PoseTable};
pub use vprbench::parse_ground_truth as parse_vprbench_truth;

use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// One image of a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Name in reports, unique within queries and within references.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
}

/// Queries, references, and which references are right for which query.
#[derive(Clone, Debug, Default)]
pub struct Dataset {
    /// The specification that it was opened with.
    pub name: String,
    /// How truth was decided, in words: tolerance, radius, what was left out.
    pub protocol: String,
    /// What is searched for.
    pub queries: Vec<Sample>,
    /// What is searched in.
    pub references: Vec<Sample>,
    /// For each query the true references; empty if there is none.
    pub positives: Vec<Vec<usize>>,
    /// Where each query was taken; empty if the format does not say. Training has a rule of its own for what is near.
    pub query_places: Vec<Located>,
    /// Where each reference was taken; empty if the format does not say.
    pub reference_places: Vec<Located>,
}

/// A pose and the frame that it is in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Located {
    /// Poses of different areas (cities) do not compare.
    pub area: usize,
    /// Where, and in which direction.
    pub pose: Pose2,
}

/// All in one area.
fn in_one_area(poses: &[Pose2]) -> Vec<Located> {
    poses.iter().map(|pose| Located { area: 0, pose: *pose }).collect()
}

/// A format.
pub trait Format: Sync {
    /// The KIND of the specification.
    fn kind(&self) -> &'static str;
    /// How a specification of this kind is written, with its options and their defaults.
    fn usage(&self) -> &'static str;
    /// Lists the images and works out the truth; decodes no image.
    fn open(&self, spec: &Spec) -> Result<Dataset>;
}

/// All formats.
pub const FORMATS: [&dyn Format; 8] = [
    &folder::Folder,
    &traverse::Traverse,
    &vprbench::VprBench,
    &geo::FileNames,
    &msls::Msls,
    &nordland::Nordland,
    &pitts30k::Pitts30k,
    &manifest::Manifest,
];

/// A parsed specification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// As given.
    pub text: String,
    /// KIND.
    pub kind: String,
    /// The paths.
    pub paths: Vec<PathBuf>,
    options: BTreeMap<String, String>,
}

impl Spec {
    /// Parses `KIND:PATH[:PATH][,key=value]...`.
    ///
    /// Errors: no colon, or an option without a value.
    pub fn parse(text: &str) -> Result<Self> {
        let (kind, rest) =
            text.split_once(':').ok_or_else(|| Error::dataset(format!("`{text}` is not KIND:PATH[,options]; kinds: {}", kinds())))?;
        let mut parts = rest.split(',');
        let paths = parts.next().unwrap_or("").split(':').filter(|p| !p.is_empty()).map(PathBuf::from).collect();
        let options = parts
            .map(|o| match o.split_once('=') {
                Some((k, v)) => Ok((k.to_string(), v.to_string())),
                None => Err(Error::dataset(format!("option `{o}` in `{text}` is not key=value"))),
            })
            .collect::<Result<_>>()?;
        Ok(Self { text: text.into(), kind: kind.into(), paths, options })
    }

    fn paths<const N: usize>(&self, usage: &str) -> Result<&[PathBuf; N]> {
        self.paths
            .as_slice()
            .try_into()
            .map_err(|_| Error::dataset(format!("`{}` names {} path(s), wanted {N}; usage: {usage}", self.text, self.paths.len())))
    }

    /// An option's text, or its default. Errors if an option is not in `known`.
    fn check_options(&self, known: &[&str]) -> Result<()> {
        match self.options.keys().find(|k| !known.contains(&k.as_str())) {
            Some(k) => Err(Error::dataset(format!("unknown option `{k}` of `{}`; known: {}", self.kind, known.join(", ")))),
            None => Ok(()),
        }
    }

    fn option(&self, key: &str) -> Option<&str> {
        self.options.get(key).map(String::as_str)
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.option(key) {
            None => Ok(default),
            Some(text) => match text.parse::<f64>() {
                Ok(v) if v.is_finite() && v >= 0.0 => Ok(v),
                _ => Err(Error::dataset(format!("option {key}={text} is not a number of 0 or more"))),
            },
        }
    }
}

fn kinds() -> String {
    FORMATS.iter().map(|f| f.kind()).collect::<Vec<_>>().join(", ")
}

/// Opens the data set that `text` specifies.
///
/// Errors: unknown kind or option, missing folder or file, no images, tables that do not parse;
/// each names what it is about.
pub fn open(text: &str) -> Result<Dataset> {
    let spec = Spec::parse(text)?;
    let format = FORMATS
        .iter()
        .find(|f| f.kind() == spec.kind)
        .ok_or_else(|| Error::dataset(format!("unknown kind `{}`; kinds: {}", spec.kind, kinds())))?;
    let mut dataset = format.open(&spec)?;
    dataset.name = spec.text.clone();
    for (what, samples) in [("queries", &dataset.queries), ("references", &dataset.references)] {
        if samples.is_empty() {
            return Err(Error::dataset(format!("`{text}` has no {what} (JPEG or PNG)")));
        }
    }
    Ok(dataset)
}

/// The JPEG and PNG files below `dir` (folders too), in natural order: `img2` before `img10`.
///
/// Errors: the folder cannot be read.
pub fn list_images(dir: &Path) -> Result<Vec<Sample>> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder))? {
            let path = entry.map_err(Error::io(&folder))?.path();
            if path.is_dir() {
                folders.push(path);
            } else if is_image(&path) {
                let name = path.strip_prefix(dir).unwrap_or(&path).to_string_lossy().into_owned();
                found.push(Sample { name, path });
            }
        }
    }
    found.sort_by(|a, b| natural(&a.name, &b.name));
    Ok(found)
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    matches!(extension.as_deref(), Some("jpg" | "jpeg" | "png"))
}

/// Compares names so that runs of digits count as numbers.
pub fn natural(a: &str, b: &str) -> std::cmp::Ordering {
    let pieces = |s: &str| -> Vec<(bool, String)> {
        let mut out: Vec<(bool, String)> = Vec::new();
        for c in s.chars() {
            let digit = c.is_ascii_digit();
            match out.last_mut() {
                Some((d, text)) if *d == digit => text.push(c),
                _ => out.push((digit, c.to_string())),
            }
        }
        out
    };
    let (pa, pb) = (pieces(a), pieces(b));
    for ((da, x), (db, y)) in pa.iter().zip(&pb) {
        let order = if *da && *db {
            let (x, y) = (x.trim_start_matches('0'), y.trim_start_matches('0'));
            x.len().cmp(&y.len()).then_with(|| x.cmp(y))
        } else {
            x.cmp(y)
        };
        if order.is_ne() {
            return order;
        }
    }
    pa.len().cmp(&pb.len()).then_with(|| a.cmp(b))
}

/// For each query the references within `radius` metres and, where both are known, `degrees`.
fn within(queries: &[Pose2], references: &[Pose2], radius: f64, degrees: f64) -> Vec<Vec<usize>> {
    use rayon::prelude::*;
    queries
        .par_iter()
        .map(|q| {
            (0..references.len())
                .filter(|i| {
                    let r = &references[*i];
                    (q.x - r.x).hypot(q.y - r.y) <= radius && !q.turned_from(r).is_some_and(|d| d > degrees)
                })
                .collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_in_names_count_as_numbers() {
        let mut names = ["b1", "a10", "a2", "a02", "a", "10", "9"];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, ["9", "10", "a", "a02", "a2", "a10", "b1"]);
    }

    proptest! {
        #[test]
        fn natural_order_is_a_total_order(a in "[ab0-2]{0,6}", b in "[ab0-2]{0,6}", c in "[ab0-2]{0,6}") {
            prop_assert_eq!(natural(&a, &b), natural(&b, &a).reverse());
            prop_assert_eq!(natural(&a, &b).is_eq(), a == b);
            if natural(&a, &b).is_lt() && natural(&b, &c).is_lt() {
                prop_assert!(natural(&a, &c).is_lt());
            }
        }

        #[test]
        fn matlab_and_pose_readers_never_panic(noise in proptest::collection::vec(any::<u8>(), 0..300), text in "[0-9a-z,. \n-]{0,200}") {
            let mut bytes = vec![0u8; 126];
            bytes.extend_from_slice(b"IM");
            bytes.extend_from_slice(&noise);
            let _ = mat::parse(&bytes);
            let _ = vprbench::parse_ground_truth(&noise);
            let _ = PoseTable::parse(&text);
        }
    }
}
