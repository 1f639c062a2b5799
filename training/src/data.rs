//! Training data: queries, references, what is near to what, label maps; loaded and augmented in parallel with the step.

use crate::augment::{augment, Pair, Settings as Augment};
use crate::slme::{Clusters, Encoder, LabelMap, Mapping};
use anyhow::{bail, ensure, Context, Result};
use candle_core::{Device, Tensor};
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use structvpr::dataset::{self, Located, Spec};
use structvpr::error::read_file;
use structvpr::image::RgbImage;

/// Where the label maps of the images below a folder are: same relative name, `.png`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Labels {
    pub images: PathBuf,
    pub labels: PathBuf,
}

/// What to do about an input that cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BadInput {
    /// End, naming it.
    #[default]
    Stop,
    /// Leave it out, naming it. Every file is read once at the start.
    Skip,
}

/// What to do about label ids that the mapping does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnknownLabels {
    /// The map is bad input.
    #[default]
    Error,
    /// They count as `other`.
    Other,
}

/// How data is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Width and height of the networks' input, pixels.
    pub size: [usize; 2],
    /// A shipped mapping (ade20k_150, cityscapes_20, camvid_11) or a file.
    pub mapping: String,
    pub clusters: Clusters,
    /// Where label maps are; not needed where no teacher is.
    pub labels: Vec<Labels>,
    pub bad_input: BadInput,
    pub unknown_labels: UnknownLabels,
    /// Share of the images whose label map is exchanged for that of another image of the set: a segmenter that fails now and
    /// then. For experiments. [ours]
    pub wrong_labels: f64,
    /// Memory for decoded images, MiB.
    pub cache_mib: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            size: [320, 240],
            mapping: "cityscapes_20".into(),
            clusters: Clusters::Six,
            labels: Vec::new(),
            bad_input: BadInput::Stop,
            unknown_labels: UnknownLabels::Error,
            wrong_labels: 0.0,
            cache_mib: 2048,
        }
    }
}

/// What is near [paper: metres and degrees of MSLS].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Near {
    /// A positive: `distance / radius_m + angle / angle_deg < 1`.
    pub radius_m: f64,
    pub angle_deg: f64,
    /// Nearer than this is no negative, metres.
    pub negative_m: f64,
}

impl Default for Near {
    fn default() -> Self {
        Self { radius_m: 25.0, angle_deg: 40.0, negative_m: 25.0 }
    }
}

impl Near {
    /// Whether `r` is a positive of `q` [paper]. Unknown headings do not count.
    pub fn positive(&self, q: &Located, r: &Located) -> bool {
        let apart = (q.pose.x - r.pose.x).hypot(q.pose.y - r.pose.y);
        let turned = q.pose.turned_from(&r.pose).unwrap_or(0.0);
        q.area == r.area && apart / self.radius_m + turned / self.angle_deg < 1.0
    }

    fn neighbour(&self, q: &Located, r: &Located) -> bool {
        q.area == r.area && (q.pose.x - r.pose.x).hypot(q.pose.y - r.pose.y) < self.negative_m
    }
}

/// An image and where its label map would be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub name: String,
    pub path: PathBuf,
    pub labels: Option<PathBuf>,
}

/// Queries and references, and which belong together.
#[derive(Clone, Debug, Default)]
pub struct Set {
    pub queries: Vec<Item>,
    pub references: Vec<Item>,
    /// Of each query, what counts as found.
    pub positives: Vec<Vec<usize>>,
    /// Of each query, what is no negative (sorted; holds the positives).
    pub near: Vec<Vec<usize>>,
    /// How truth was decided.
    pub protocol: String,
    /// What was left out, one line each.
    pub left_out: Vec<String>,
}

impl Set {
    /// Opens data set specifications and joins them; references that several name count once. With `near`, positives are
    /// by its rule where the sets have poses; without, what the specifications say (evaluation).
    ///
    /// Errors: what the core's formats say; a specification no query of which has a positive; with labels wanted, an image
    /// without a label map (with [`BadInput::Skip`] it is left out).
    pub fn open(specs: &[String], near: Option<&Near>, settings: &Settings, labels: bool) -> Result<Self> {
        ensure!(!specs.is_empty(), "no data set is named");
        let mut set = Self::default();
        let mut rows: HashMap<PathBuf, usize> = HashMap::new();
        let mut areas: HashMap<(PathBuf, usize), usize> = HashMap::new();
        let mut reference_places: Vec<Option<Located>> = Vec::new();
        let mut query_places: Vec<Option<Located>> = Vec::new();
        for text in specs {
            let data = dataset::open(text).with_context(|| text.clone())?;
            let frame = Spec::parse(text)?.paths.last().cloned().unwrap_or_default();
            let mut area = |l: &Located| {
                let next = areas.len();
                Located { area: *areas.entry((frame.clone(), l.area)).or_insert(next), pose: l.pose }
            };
            let mut own = Vec::with_capacity(data.references.len());
            for (i, r) in data.references.iter().enumerate() {
                let next = set.references.len();
                let row = *rows.entry(r.path.clone()).or_insert(next);
                if row == next {
                    set.references.push(item(r, settings));
                    reference_places.push(data.reference_places.get(i).map(&mut area));
                }
                own.push(row);
            }
            // Of each city (or the whole set): an example, and how many of its queries have a positive.
            let mut cities: BTreeMap<usize, (String, usize, usize)> = BTreeMap::new();
            for (i, q) in data.queries.iter().enumerate() {
                let place = data.query_places.get(i).map(&mut area);
                let given = || data.positives[i].iter().map(|r| own[*r]).collect::<Vec<_>>();
                let (mut positives, mut neighbours) = match (near, &place) {
                    (Some(near), Some(q)) => {
                        let of = |rule: &dyn Fn(&Located) -> bool| -> Vec<usize> {
                            own.iter().copied().filter(|r| reference_places[*r].as_ref().is_some_and(rule)).collect()
                        };
                        (of(&|r| near.positive(q, r)), of(&|r| near.neighbour(q, r)))
                    }
                    _ => (given(), given()),
                };
                // An image is not its own other view.
                positives.retain(|r| set.references[*r].path != q.path);
                neighbours.extend(&positives);
                neighbours.extend(rows.get(&q.path));
                for v in [&mut positives, &mut neighbours] {
                    v.sort_unstable();
                    v.dedup();
                }
                let city = cities.entry(data.query_places.get(i).map_or(0, |l| l.area)).or_insert_with(|| (q.name.clone(), 0, 0));
                city.1 += 1;
                city.2 += usize::from(!positives.is_empty());
                set.queries.push(item(q, settings));
                set.positives.push(positives);
                set.near.push(neighbours);
                query_places.push(place);
            }
            for (example, queries, _) in cities.values().filter(|c| c.2 == 0) {
                let said =
                    format!("`{text}`: none of the {queries} queries of the city of `{example}` has a positive among its references");
                ensure!(settings.bad_input == BadInput::Skip, "{said}");
                set.left_out.push(said);
            }
            let protocol = match near {
                Some(n) if !data.query_places.is_empty() => format!("d / {} m + angle / {} degrees < 1", n.radius_m, n.angle_deg),
                _ => data.protocol,
            };
            if set.protocol.is_empty() {
                set.protocol = protocol;
            } else if set.protocol != protocol {
                set.protocol = format!("{}; {protocol}", set.protocol);
            }
        }
        if labels {
            ensure!(
                !settings.labels.is_empty(),
                "no label maps are named (`data.labels`); `training segment` makes them for the images of a folder"
            );
        }
        set.check(settings, labels)?;
        if settings.wrong_labels > 0.0 {
            set.exchange_labels(settings.wrong_labels, 0);
        }
        Ok(set)
    }

    /// Finds bad input before training does.
    fn check(&mut self, settings: &Settings, labels: bool) -> Result<()> {
        if !labels {
            // What is not needed is not read.
            self.queries.iter_mut().chain(&mut self.references).for_each(|i| i.labels = None);
        }
        let encoder = encoder(settings)?;
        let deep = settings.bad_input == BadInput::Skip;
        let said = |item: &Item| -> Option<String> {
            if labels && !item.labels.as_ref().is_some_and(|l| l.is_file()) {
                return Some(match &item.labels {
                    Some(l) => format!("{}: no label map {}", item.path.display(), l.display()),
                    None => format!("{}: no entry of `data.labels` is for it", item.path.display()),
                });
            }
            if deep {
                return load(item, settings, &encoder).err().map(|e| format!("{e:#}"));
            }
            (!item.path.is_file()).then(|| format!("{}: no such file", item.path.display()))
        };
        let bad = |items: &[Item]| items.par_iter().map(said).collect::<Vec<Option<String>>>();
        let (queries, references) = (bad(&self.queries), bad(&self.references));
        let all: Vec<String> = queries.iter().chain(&references).flatten().cloned().collect();
        if all.is_empty() {
            return ensure_positives(self);
        }
        if !deep {
            bail!(
                "{}{}",
                all[0],
                if all.len() > 1 { format!(" (and {} more; `bad_input: skip` leaves them out)", all.len() - 1) } else { String::new() }
            );
        }
        let mut moved = vec![usize::MAX; self.references.len()];
        let mut kept = Vec::new();
        for (i, item) in std::mem::take(&mut self.references).into_iter().enumerate() {
            if references[i].is_none() {
                moved[i] = kept.len();
                kept.push(item);
            }
        }
        self.references = kept;
        let renumber = |rows: &[usize]| rows.iter().map(|r| moved[*r]).filter(|r| *r != usize::MAX).collect::<Vec<_>>();
        let keep: Vec<usize> = (0..self.queries.len()).filter(|i| queries[*i].is_none()).collect();
        self.positives = keep.iter().map(|i| renumber(&self.positives[*i])).collect();
        self.near = keep.iter().map(|i| renumber(&self.near[*i])).collect();
        self.queries = keep.iter().map(|i| self.queries[*i].clone()).collect();
        self.left_out.extend(all);
        ensure_positives(self)
    }

    /// The same set with every query's and reference's label map exchanged for another's of the set: the negative control.
    pub fn shuffle_labels(&mut self, seed: u64) {
        self.exchange_labels(1.0, seed);
    }

    /// The same for a share of the label maps.
    fn exchange_labels(&mut self, share: f64, seed: u64) {
        use rand::seq::SliceRandom;
        use rand::Rng;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // One permutation of the distinct maps, so that an image keeps one wrong map throughout.
        let mut all: Vec<PathBuf> = self.queries.iter().chain(&self.references).filter_map(|i| i.labels.clone()).collect();
        all.sort();
        all.dedup();
        all.retain(|_| rng.random_bool(share));
        let mut to = all.clone();
        to.shuffle(&mut rng);
        let map: HashMap<PathBuf, PathBuf> = all.into_iter().zip(to).collect();
        for item in self.queries.iter_mut().chain(&mut self.references) {
            item.labels = item.labels.take().map(|l| map.get(&l).cloned().unwrap_or(l));
        }
    }
}

fn ensure_positives(set: &Set) -> Result<()> {
    let first = set.left_out.first().map_or(String::new(), |l| format!("; first left out: {l}"));
    ensure!(set.positives.iter().any(|p| !p.is_empty()), "no usable query has a positive{first}");
    Ok(())
}

fn item(sample: &dataset::Sample, settings: &Settings) -> Item {
    let labels = settings.labels.iter().find_map(|l| Some(l.labels.join(sample.path.strip_prefix(&l.images).ok()?).with_extension("png")));
    Item { name: sample.name.clone(), path: sample.path.clone(), labels }
}

/// The encoder that the settings name.
pub fn encoder(settings: &Settings) -> Result<Encoder> {
    Ok(Encoder::new(&Mapping::open(&settings.mapping).context("data.mapping")?, settings.clusters))
}

/// Decodes and resizes an image and, where it has one, its label map.
///
/// Errors name the file.
pub fn load(item: &Item, settings: &Settings, encoder: &Encoder) -> Result<Pair> {
    let [w, h] = settings.size;
    let image = RgbImage::decode(&read_file(&item.path)?).and_then(|i| i.resize_area(w as u32, h as u32));
    let image = image.map_err(|e| e.at(&item.path))?;
    let planes = match &item.labels {
        Some(path) => {
            let map = LabelMap::decode(&read_file(path)?).with_context(|| path.display().to_string())?.resize(w, h)?;
            let lenient = settings.unknown_labels == UnknownLabels::Other;
            Some(encoder.cluster(&map.ids, lenient).with_context(|| path.display().to_string())?)
        }
        None => None,
    };
    Ok(Pair { width: w, height: h, rgb: image.data().to_vec(), planes })
}

/// What a branch is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// The image, normalised.
    Rgb,
    /// The label map, encoded.
    Seg,
    /// Both, one behind the other (Concat-input).
    Both,
}

/// Reads items, keeps what fits in memory, makes tensors.
pub struct Loader {
    settings: Settings,
    pub encoder: Encoder,
    mean: [f32; 3],
    std: [f32; 3],
    cached: HashMap<Key, OnceLock<Arc<Pair>>>,
    free: AtomicUsize,
}

impl Loader {
    /// For the items of `sets`; `mean` and `std` are the student's preprocessing.
    pub fn new(settings: &Settings, sets: &[&Set], mean: [f32; 3], std: [f32; 3]) -> Result<Self> {
        let items = sets.iter().flat_map(|s| s.queries.iter().chain(&s.references));
        let cached = items.map(|i| (key(i), OnceLock::new())).collect();
        let free = AtomicUsize::new(settings.cache_mib << 20);
        Ok(Self { encoder: encoder(settings)?, settings: settings.clone(), mean, std, cached, free })
    }

    /// One item, from memory if it is there.
    pub fn get(&self, item: &Item) -> Result<Arc<Pair>> {
        let slot = self.cached.get(&key(item));
        if let Some(pair) = slot.and_then(OnceLock::get) {
            return Ok(pair.clone());
        }
        let pair = Arc::new(load(item, &self.settings, &self.encoder)?);
        let size = pair.rgb.len() + pair.planes.as_ref().map_or(0, Vec::len);
        let take = |free: usize| free.checked_sub(size);
        if slot.is_some() && self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
            let _ = slot.map(|s| s.set(pair.clone()));
        }
        Ok(pair)
    }

    /// Channels of an input.
    pub fn channels(&self, input: Input) -> usize {
        match input {
            Input::Rgb => 3,
            Input::Seg => self.encoder.planes(),
            Input::Both => 3 + self.encoder.planes(),
        }
    }

    /// Pairs to C x N x H x W.
    pub fn tensor(&self, pairs: &[Arc<Pair>], input: Input) -> Result<Tensor> {
        let [w, h] = self.settings.size;
        let (n, channels, size) = (pairs.len(), self.channels(input), w * h);
        let mut out = vec![0f32; channels * n * size];
        let (rgb, seg) = out.split_at_mut(if input == Input::Seg { 0 } else { 3 * n * size });
        for (c, plane) in rgb.chunks_mut(n * size).enumerate() {
            let (scale, shift) = (1.0 / (255.0 * self.std[c]), -self.mean[c] / self.std[c]);
            plane.par_chunks_mut(size).zip(pairs).for_each(|(out, pair)| {
                for (o, p) in out.iter_mut().zip(pair.rgb.chunks_exact(3)) {
                    *o = f32::from(p[c]) * scale + shift;
                }
            });
        }
        if !seg.is_empty() {
            for (i, pair) in pairs.iter().enumerate() {
                let planes = pair.planes.as_ref().context("an image without its label map reached the seg branch")?;
                self.encoder.write(planes, seg, i, n);
            }
        }
        Ok(Tensor::from_vec(out, (channels, n, h, w), &Device::Cpu)?)
    }

    /// Items, each augmented by numbers that `seed` and its place in the list fix.
    pub fn augmented(&self, items: &[&Item], settings: &Augment, seed: u64) -> Result<Vec<Arc<Pair>>> {
        items
            .par_iter()
            .enumerate()
            .map(|(i, item)| {
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(i as u64 + 1);
                Ok(Arc::new(augment(&*self.get(item)?, settings, &mut rng, self.encoder.other())?))
            })
            .collect()
    }
}

/// A shuffled set pairs the same image with another map.
type Key = (PathBuf, Option<PathBuf>);

fn key(item: &Item) -> Key {
    (item.path.clone(), item.labels.clone())
}

/// A progress bar on stderr, where that is a terminal.
pub fn progress(n: usize, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(n as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {elapsed} left {eta}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_string());
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    /// MSLS with two cities; the references of the second are far away.
    fn msls(dir: &std::path::Path) {
        for (city, side, keys, x) in [
            ("cph", "query", ["a", "b"], 0.0),
            ("cph", "database", ["c", "d"], 5.0),
            ("sf", "query", ["e", "f"], 0.0),
            ("sf", "database", ["g", "h"], 9000.0),
        ] {
            let folder = dir.join("train_val").join(city).join(side);
            std::fs::create_dir_all(folder.join("images")).unwrap();
            let (mut raw, mut place, mut tasks) = (
                String::from(",key,lon,lat,ca,captured_at,pano\n"),
                String::from(",key,easting,northing,unique_cluster,control_panel,night,view_direction\n"),
                String::from(",all\n"),
            );
            for (i, key) in keys.iter().enumerate() {
                let image = RgbImage::new(32, 32, vec![i as u8 * 40; 3 * 32 * 32]).unwrap();
                std::fs::write(folder.join("images").join(format!("{key}.jpg")), image.to_jpeg(90).unwrap()).unwrap();
                raw += &format!("{i},{key},0,0,{},2019,False\n", if *key == "d" { 90 } else { 350 });
                place += &format!("{i},{key},{x},{},1,False,False,Forward\n", i as f64 * 3.0);
                tasks += &format!("{i},True\n");
            }
            std::fs::write(folder.join("raw.csv"), raw).unwrap();
            std::fs::write(folder.join("postprocessed.csv"), place).unwrap();
            std::fs::write(folder.join("subtask_index.csv"), tasks).unwrap();
        }
    }

    #[test]
    fn a_city_without_positives_is_named_and_can_be_left_out() {
        let dir = tempfile::tempdir().unwrap();
        msls(dir.path());
        let specs = [format!("msls:{}", dir.path().display())];
        let mut settings = Settings { size: [32, 32], ..Settings::default() };
        let said = Set::open(&specs, Some(&Near::default()), &settings, false).unwrap_err().to_string();
        assert!(said.contains("2 queries of the city of `sf/e`"), "{said}");
        settings.bad_input = BadInput::Skip;
        let set = Set::open(&specs, Some(&Near::default()), &settings, false).unwrap();
        assert!(set.left_out.len() == 1 && set.left_out[0].contains("sf/e"), "{:?}", set.left_out);
        // d looks another way: near, so no negative, but no positive by the papers' rule.
        assert_eq!((&set.positives[0], &set.near[0]), (&vec![0], &vec![0, 1]));
        assert!(set.positives[2].is_empty());
        // A city alone has nothing at all.
        let said = Set::open(&[format!("{},cities=sf", specs[0])], Some(&Near::default()), &settings, false).unwrap_err().to_string();
        assert!(said.contains("no usable query has a positive"), "{said}");
    }

    #[test]
    fn sets_are_joined_and_what_they_share_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path();
        for side in ["day", "dusk", "rain"] {
            std::fs::create_dir_all(d.join(side)).unwrap();
            for i in 0..3u8 {
                let image = RgbImage::new(32, 32, vec![i * 70; 3 * 32 * 32]).unwrap();
                std::fs::write(d.join(side).join(format!("{i}.png")), image.to_png().unwrap()).unwrap();
            }
            std::fs::write(d.join(side).join("poses.csv"), "name,x,y\n0.png,0,0\n1.png,8,0\n2.png,100,0\n").unwrap();
        }
        let spec = |q: &str| format!("folder:{0}/{q}:{0}/day", d.display());
        let near = Near { radius_m: 6.0, negative_m: 12.0, ..Near::default() };
        let set = Set::open(&[spec("dusk"), spec("rain"), spec("day")], Some(&near), &Settings::default(), false);
        // By day each image's only near reference is itself, which is not its own other view.
        assert!(set.unwrap_err().to_string().contains("3 queries of the city of `0.png`"));
        let set = Set::open(&[spec("dusk"), spec("rain")], Some(&near), &Settings::default(), false).unwrap();
        assert_eq!((set.queries.len(), set.references.len()), (6, 3));
        assert_eq!((&set.positives[3], &set.near[3]), (&vec![0], &vec![0, 1]));
        let said = Set::open(&[spec("dusk")], Some(&near), &Settings::default(), true).unwrap_err().to_string();
        assert!(said.contains("training segment"), "{said}");
        // Another labelling of the same images shares no cache entry with the first.
        let mut labelled = set.clone();
        labelled.queries.iter_mut().for_each(|i| i.labels = Some(i.path.with_extension("label")));
        let before = labelled.clone();
        labelled.shuffle_labels(1);
        let of = |s: &Set| s.queries.iter().map(|i| i.labels.clone().unwrap()).collect::<Vec<_>>();
        let sorted = |mut v: Vec<PathBuf>| {
            v.sort();
            v
        };
        assert!(of(&labelled) != of(&before) && sorted(of(&labelled)) == sorted(of(&before)));
        let mut partly = before.clone();
        partly.exchange_labels(0.5, 3);
        let moved = of(&partly).iter().zip(of(&before)).filter(|(a, b)| **a != *b).count();
        assert!(moved > 0 && moved < 6 && sorted(of(&partly)) == sorted(of(&before)), "{moved}");
    }
}
