//! What untrusted bytes reach. Each function takes any bytes and must end: no panic, no hang, no allocation without bound.
//! `tests/it/mutations.rs` runs the same functions on mutated seeds, without a fuzzer.

use std::io::Write;
use structvpr::bag::messages::{stamp_of, CameraInfo, CompressedImage, Image, Message, NavSatFix, Odometry, PoseStamped};
use structvpr::bag::Bag;
use structvpr::confidence::Confidence;
use structvpr::config::{Config, Settings};
use structvpr::descriptor::ModelIdentity;
use structvpr::image::RgbImage;
use structvpr::map::{g2o, json, salvage, tum, Edges, Map, Store};
use structvpr::model::{LocalWeights, Weights};
use structvpr::replay::{open, SourceOptions};

/// Images that a bag's run decodes at most: what a drive costs is not what is looked for.
const SHOTS: usize = 8;

/// CDR of every message that we read; what decodes is encoded and read again.
pub fn cdr(data: &[u8]) {
    fn one<M: Message>(data: &[u8]) {
        if let Ok(message) = M::decode(data) {
            let again = message.encode();
            assert!(M::decode(&again).is_ok(), "{} does not read what it wrote", M::TYPE);
        }
    }
    let _ = stamp_of(data);
    one::<Image>(data);
    one::<CompressedImage>(data);
    one::<CameraInfo>(data);
    one::<Odometry>(data);
    one::<PoseStamped>(data);
    one::<NavSatFix>(data);
}

/// A file in a folder of its own, which goes with the result.
fn file(name: &str, data: &[u8]) -> Option<(tempfile::TempDir, std::path::PathBuf)> {
    let dir = tempfile::tempdir().ok()?;
    let path = dir.path().join(name);
    std::fs::File::create(&path).ok()?.write_all(data).ok()?;
    Some((dir, path))
}

/// A bag: the first byte says which kind of file.
pub fn bag(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    let Some((_dir, path)) = file(["x.mcap", "x.db3", "x.mcap.zstd", "x.db3.zstd"][usize::from(kind % 4)], data) else { return };
    let _ = Bag::open(&path);
    if let Ok(sequence) = open(&[path], &SourceOptions::default()) {
        let mut shots = 0;
        let _ = sequence.visit(&mut |shot| {
            shots += 1;
            if shots <= SHOTS {
                let _ = shot.decode();
            }
            Ok(())
        });
    }
}

/// JPEG or PNG, as files and topics carry them, and raw images of every encoding.
pub fn image(data: &[u8]) {
    let _ = RgbImage::decode(data);
    if let Ok(message) = Image::decode(data) {
        let _ = RgbImage::from_raw(&message.raw());
    }
}

/// Weight files of every container and layout.
pub fn weights(data: &[u8]) {
    let _ = Weights::parse(data);
    let _ = LocalWeights::parse(data);
}

/// Settings, and the calibration of confidences.
pub fn parameters(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = Config::from_yaml(text);
    let _ = Settings::from_yaml(text);
    let _ = Confidence::parse(text, &ModelIdentity::default(), "");
}

/// A map file: looked at, saved from, written to.
pub fn map(data: &[u8]) {
    let Some((_dir, path)) = file("x.svpr", data) else { return };
    let read = Map::load_any(&path);
    let _ = Map::verify(&path);
    if let Ok((map, _)) = salvage(&path) {
        let _ = (g2o(&map, &Edges::default()), tum(&map, 0), json(&map));
    }
    let Ok(read) = read else { return };
    // What opens is written to, and opens again with all of it.
    if let Ok(opened) = Store::open(&path, read.model(), "", 1.0) {
        let (mut store, mut map) = (opened.store, opened.map);
        let before = map.keyframes().len();
        if map.merge(&read, 0).is_ok() && store.write_all(&mut map).is_ok() && store.close().is_ok() {
            let again = Map::load(&path, read.model()).expect("a map that was written opens");
            assert_eq!(again.keyframes().len(), before + read.keyframes().len());
        }
    }
}
