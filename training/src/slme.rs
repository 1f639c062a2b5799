//! Segmentation label map encoding [paper, section 3.3 of CVPR 2023]: format, cluster, weight.
//!
//! An id map becomes one plane per cluster, holding the cluster's weight where the map has one of its classes and 0
//! elsewhere. Note: the first thing that MobileNet-L does to each plane is a depthwise convolution and a batch norm of its
//! own, which takes any constant factor away again; in that branch the weights have no effect beyond the norm's epsilon.
//! They matter where planes are mixed first (Concat-input). Kept, for the paper has them.

use anyhow::{bail, ensure, Context, Result};
use opencv::core::{Mat, MatTraitConst, MatTraitConstManual, Size, Vector};
use opencv::{imgcodecs, imgproc};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// How classes are merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Clusters {
    /// The mapping's six: sky, ground, vegetation, building, dynamic, other [paper: C = 6 is best].
    #[default]
    Six,
    /// Ground, vegetation and sky; building; dynamic and other. [ours: the paper does not list its three]
    Three,
    /// Each class for itself, with its cluster's weight.
    None,
}

/// A mapping file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mapping {
    /// Name in reports.
    pub name: String,
    /// The clusters, in the order of the planes.
    pub clusters: Vec<Cluster>,
}

/// Some classes that are one plane.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// One of [`CLUSTERS`].
    pub name: String,
    /// What its plane holds.
    pub weight: f32,
    /// Ids in the label map, and their names.
    pub classes: BTreeMap<u8, String>,
}

/// The paper's six clusters.
pub const CLUSTERS: [&str; 6] = ["sky", "ground", "vegetation", "building", "dynamic", "other"];
/// Which plane of three each of the six goes to.
const THREE: [usize; 6] = [0, 0, 0, 1, 2, 2];

const SHIPPED: [(&str, &str); 3] = [
    ("ade20k_150", include_str!("../mappings/ade20k_150.yaml")),
    ("cityscapes_20", include_str!("../mappings/cityscapes_20.yaml")),
    ("camvid_11", include_str!("../mappings/camvid_11.yaml")),
];

impl Mapping {
    /// Parses a mapping file.
    ///
    /// Errors: not the six clusters in their order, a class in two of them, a weight that is not a number of 0 or more.
    pub fn parse(text: &str) -> Result<Self> {
        let mapping: Self = serde_yaml::from_str(text)?;
        let names: Vec<&str> = mapping.clusters.iter().map(|c| c.name.as_str()).collect();
        ensure!(names == CLUSTERS, "clusters are {}, not {}", names.join(", "), CLUSTERS.join(", "));
        let mut seen = BTreeSet::new();
        for cluster in &mapping.clusters {
            ensure!(cluster.weight.is_finite() && cluster.weight >= 0.0, "weight of {} is {}", cluster.name, cluster.weight);
            for id in cluster.classes.keys() {
                ensure!(seen.insert(*id), "class {id} is in two clusters");
            }
        }
        Ok(mapping)
    }

    /// A shipped mapping by name, or a file.
    pub fn open(name: &str) -> Result<Self> {
        if let Some((_, text)) = SHIPPED.iter().find(|(n, _)| *n == name) {
            return Self::parse(text);
        }
        let path = Path::new(name);
        let known = SHIPPED.map(|(n, _)| n).join(", ");
        let text = std::fs::read_to_string(path).with_context(|| format!("mapping `{name}` is neither a file nor one of {known}"))?;
        Self::parse(&text).with_context(|| name.to_string())
    }
}

/// A mapping as a table: what turns label maps into planes.
#[derive(Clone, Debug)]
pub struct Encoder {
    /// Plane of each id; `None` outside the mapping.
    plane: [Option<u8>; 256],
    /// What each plane holds.
    pub weights: Vec<f32>,
    name: String,
}

/// The plane of what an occluder hides, and of ids outside the mapping where that is allowed.
const OTHER: &str = "other";

impl Encoder {
    /// Of a mapping, with its classes merged as `clusters` says.
    pub fn new(mapping: &Mapping, clusters: Clusters) -> Self {
        let mut plane = [None; 256];
        let mut weights = Vec::new();
        match clusters {
            Clusters::Six => {
                for (c, cluster) in mapping.clusters.iter().enumerate() {
                    cluster.classes.keys().for_each(|id| plane[usize::from(*id)] = Some(c as u8));
                    weights.push(cluster.weight);
                }
            }
            Clusters::Three => {
                weights = vec![0.0; 3];
                for (c, cluster) in mapping.clusters.iter().enumerate() {
                    cluster.classes.keys().for_each(|id| plane[usize::from(*id)] = Some(THREE[c] as u8));
                    weights[THREE[c]] = f32::max(weights[THREE[c]], cluster.weight);
                }
            }
            Clusters::None => {
                let all: BTreeMap<u8, f32> =
                    mapping.clusters.iter().flat_map(|c| c.classes.keys().map(move |id| (*id, c.weight))).collect();
                for (at, (id, weight)) in all.into_iter().enumerate() {
                    plane[usize::from(id)] = Some(at as u8);
                    weights.push(weight);
                }
            }
        }
        Self { plane, weights, name: mapping.name.clone() }
    }

    /// Number of planes.
    pub fn planes(&self) -> usize {
        self.weights.len()
    }

    /// Ids to planes. With `lenient`, ids outside the mapping become the last plane.
    ///
    /// Errors: an id outside the mapping.
    pub fn cluster(&self, ids: &[u8], lenient: bool) -> Result<Vec<u8>> {
        let last = (self.planes() - 1) as u8;
        let mut out = Vec::with_capacity(ids.len());
        for id in ids {
            match self.plane[usize::from(*id)] {
                Some(p) => out.push(p),
                None if lenient => out.push(last),
                None => bail!("label {id} is outside the mapping {} (`unknown_labels: other` counts it as {OTHER})", self.name),
            }
        }
        Ok(out)
    }

    /// The plane of what nothing is known of: the last one.
    pub fn other(&self) -> u8 {
        (self.planes() - 1) as u8
    }

    /// Planes to numbers: writes image `n` of `images` into `out`, C x N x H x W.
    pub fn write(&self, planes: &[u8], out: &mut [f32], n: usize, images: usize) {
        let size = planes.len();
        for (c, weight) in self.weights.iter().enumerate() {
            let out = &mut out[(c * images + n) * size..][..size];
            for (o, p) in out.iter_mut().zip(planes) {
                *o = if usize::from(*p) == c { *weight } else { 0.0 };
            }
        }
    }
}

/// A label map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelMap {
    pub width: usize,
    pub height: usize,
    pub ids: Vec<u8>,
}

impl LabelMap {
    /// Decodes a PNG of one 8-bit channel.
    ///
    /// Errors: other bytes; three channels (a colour picture of labels is none); over the pixel limit.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        // Checks the size before OpenCV sees it, and that it decodes.
        ensure!(bytes.starts_with(b"\x89PNG"), "a label map is a PNG");
        let header: [u8; 8] = bytes.get(16..24).and_then(|b| b.try_into().ok()).context("truncated")?;
        let [w, h] = [0, 4].map(|i| u32::from_be_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]));
        let pixels = u64::from(w) * u64::from(h);
        ensure!(pixels > 0 && pixels <= structvpr::image::MAX_PIXELS, "size {w}x{h}");
        let mat = imgcodecs::imdecode(&Mat::from_slice(bytes)?, imgcodecs::IMREAD_UNCHANGED)?;
        ensure!(!mat.empty(), "does not decode: truncated or damaged");
        ensure!(mat.channels() == 1 && mat.depth() == opencv::core::CV_8U, "{} channels; a label map has one of 8 bits", mat.channels());
        Ok(Self { width: mat.cols() as usize, height: mat.rows() as usize, ids: mat.data_bytes()?.to_vec() })
    }

    /// PNG, lossless.
    pub fn to_png(&self) -> Result<Vec<u8>> {
        let flat = Mat::from_slice(&self.ids)?;
        let mut png = Vector::<u8>::new();
        imgcodecs::imencode(".png", &flat.reshape(1, self.height as i32)?, &mut png, &Vector::new())?;
        Ok(png.as_slice().to_vec())
    }

    /// The nearest label of each new pixel: classes never blend.
    pub fn resize(&self, width: usize, height: usize) -> Result<Self> {
        if (width, height) == (self.width, self.height) {
            return Ok(self.clone());
        }
        let flat = Mat::from_slice(&self.ids)?;
        let mut out = Mat::default();
        let size = Size::new(width as i32, height as i32);
        // The exact form takes the pixel under the centre; the plain one its corner.
        imgproc::resize(&flat.reshape(1, self.height as i32)?, &mut out, size, 0.0, 0.0, imgproc::INTER_NEAREST_EXACT)?;
        Ok(Self { width, height, ids: out.data_bytes()?.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_shipped_mappings_are_whole() {
        for (name, ids) in [("ade20k_150", 0..150), ("cityscapes_20", 0..20), ("camvid_11", 0..12)] {
            let mapping = Mapping::open(name).unwrap();
            let weight = |n: &str| mapping.clusters.iter().find(|c| c.name == n).unwrap().weight;
            assert!(weight("building") > weight("dynamic"), "static structure weighs more [paper]");
            for clusters in [Clusters::Six, Clusters::Three, Clusters::None] {
                let encoder = Encoder::new(&mapping, clusters);
                assert!(encoder.cluster(&ids.clone().collect::<Vec<u8>>(), false).is_ok(), "{name} {clusters:?}");
            }
            assert_eq!(Encoder::new(&mapping, Clusters::Three).planes(), 3);
        }
        let ade = Encoder::new(&Mapping::open("ade20k_150").unwrap(), Clusters::Six);
        // wall, building, sky, tree, road, person, car; from ADE20K's list.
        assert_eq!(ade.cluster(&[0, 1, 2, 4, 6, 12, 20], false).unwrap(), [3, 3, 0, 2, 1, 4, 4]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let said = |t: &str| format!("{:#}", Mapping::parse(t).unwrap_err());
        let good = SHIPPED[2].1;
        assert!(said(&good.replace("name: sky", "name: air")).contains("air, ground"));
        assert!(said(&good.replace("3: road", "0: road")).contains("class 0 is in two"));
        assert!(said(&good.replace("weight: 2.0", "weight: -2.0")).contains("building is -2"));
        assert!(format!("{:#}", Mapping::open("kitti").unwrap_err()).contains("ade20k_150, cityscapes_20"));
        let encoder = Encoder::new(&Mapping::parse(good).unwrap(), Clusters::Six);
        assert!(encoder.cluster(&[1, 77], false).unwrap_err().to_string().contains("label 77"));
        assert_eq!(encoder.cluster(&[1, 77], true).unwrap(), [3, 5]);
        assert!(LabelMap::decode(b"\xff\xd8jpeg").unwrap_err().to_string().contains("PNG"));
        let colour = structvpr::image::RgbImage::new(2, 1, vec![0; 6]).unwrap().to_png().unwrap();
        assert!(LabelMap::decode(&colour).unwrap_err().to_string().contains("3 channels"));
    }

    proptest! {
        #[test]
        fn resizing_never_makes_a_label_that_was_not_there(w in 1usize..20, h in 1usize..20, to in (1usize..40, 1usize..40), seed in any::<u64>()) {
            let ids: Vec<u8> = (0..w * h).map(|i| (seed.rotate_left(i as u32) % 7 * 30) as u8).collect();
            let map = LabelMap { width: w, height: h, ids };
            let out = map.resize(to.0, to.1).unwrap();
            prop_assert_eq!(out.ids.len(), to.0 * to.1);
            prop_assert!(out.ids.iter().all(|id| map.ids.contains(id)));
            let again = LabelMap::decode(&map.to_png().unwrap()).unwrap();
            prop_assert_eq!(again, map);
        }

        #[test]
        fn exactly_one_plane_holds_each_pixel(ids in proptest::collection::vec(0u8..12, 1..50)) {
            let encoder = Encoder::new(&Mapping::open("camvid_11").unwrap(), Clusters::Six);
            let planes = encoder.cluster(&ids, false).unwrap();
            let mut out = vec![9.0; 6 * 2 * ids.len()];
            encoder.write(&planes, &mut out, 1, 2);
            for i in 0..ids.len() {
                let held: Vec<f32> = (0..6).map(|c| out[(c * 2 + 1) * ids.len() + i]).filter(|v| *v != 0.0).collect();
                prop_assert_eq!(held, vec![encoder.weights[usize::from(planes[i])]]);
            }
        }
    }
}
