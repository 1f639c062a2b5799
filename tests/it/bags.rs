//! Bags that others wrote, whole and broken.

use crate::support::{python, root, shared};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::process::Command;
use structvpr::bag::messages::*;
use structvpr::bag::{read_mcap, Bag, BagWriter};
use structvpr::replay::{open, SourceOptions};

/// The bags of make_bags.py, made anew for each test.
fn foreign(test: &str) -> Option<tempfile::TempDir> {
    let python = python(test)?;
    let dir = tempfile::tempdir().unwrap();
    let out = Command::new(python).arg(root().join("tests/it/make_bags.py")).arg(dir.path()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Some(dir)
}

fn stamps(path: &Path) -> Vec<i64> {
    let sequence = open(&[path.to_path_buf()], &SourceOptions::default()).unwrap();
    let mut stamps = Vec::new();
    let warnings = sequence
        .visit(&mut |shot| {
            let image = shot.decode()?;
            assert_eq!((image.width(), image.height()), (64, 48));
            let i = stamps.len();
            // The picture of make_bags.py, exactly: PNG and raw lose nothing.
            let p = &image.data()[(7 * 64 + 5) * 3..][..3];
            assert_eq!(p, [(15 + i * 40) as u8, (35 + i * 20) as u8, (35 + i) as u8]);
            stamps.push(shot.stamp_ns);
            Ok(())
        })
        .unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
    stamps
}

#[test]
fn bags_of_every_kind_that_rosbags_writes_give_the_same_images_and_poses() {
    let Some(dir) = foreign("bags_of_every_kind") else { return };
    let want: Vec<i64> = (0..6).map(|i| (100 + i) * 1_000_000_000 + 5).collect();
    for kind in ["mcap", "db3", "message_zstd", "file_zstd"] {
        let path = dir.path().join(kind);
        assert_eq!(stamps(&path), want, "{kind}");
        let sequence = open(&[path], &SourceOptions::default()).unwrap();
        let pose = sequence.odometry().at(102_500_000_005).unwrap();
        assert!((pose.translation.x - 2.5).abs() < 1e-9 && (pose.translation.y - 5.0).abs() < 1e-9, "{kind}: {pose}");
        let camera = sequence.camera().unwrap();
        assert_eq!((camera.k[0], camera.k[4], camera.d[4]), (50.0, 51.0, 0.3), "{kind}");
        let truth = sequence.truth().at(101_000_000_005, 0).unwrap();
        assert_eq!((truth.x, truth.y), (1.0, 2.0), "{kind}");
    }
    // The same bag by its file.
    let file = std::fs::read_dir(dir.path().join("mcap"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .find(|p| p.extension().is_some_and(|e| e == "mcap"))
        .unwrap();
    assert_eq!(stamps(&file), want);
}

#[test]
fn navsatfix_gives_metres_when_there_is_no_other_truth() {
    let Some(dir) = foreign("navsatfix") else { return };
    let options = SourceOptions { truth_topic: Some("/fix".into()), ..SourceOptions::default() };
    let sequence = open(&[dir.path().join("mcap")], &options).unwrap();
    let p = sequence.truth().at(103_000_000_005, 0).unwrap();
    // 3e-5 degrees of latitude are 3.34 m.
    assert!(p.x.abs() < 1e-9 && (p.y - 3.336).abs() < 0.01, "{p:?}");
}

#[test]
fn a_choice_of_topics_is_listed_and_so_is_what_is_there_instead() {
    let Some(dir) = foreign("a_choice_of_topics") else { return };
    let said = |kind: &str, topic: Option<&str>| {
        let options = SourceOptions { topic: topic.map(String::from), ..SourceOptions::default() };
        open(&[dir.path().join(kind)], &options).err().map(|e| e.to_string()).unwrap_or_default()
    };
    let s = said("two_cameras", None);
    assert!(s.contains("--topic") && s.contains("/cam/image_raw/compressed (6 images)") && s.contains("/cam2/image_raw (6 images)"), "{s}");
    assert_eq!(said("two_cameras", Some("/cam2/image_raw")), "");
    let s = said("two_cameras", Some("/nope"));
    assert!(s.contains("no topic `/nope`") && s.contains("/odom [nav_msgs/msg/Odometry]"), "{s}");
    assert!(said("two_cameras", Some("/odom")).contains("is nav_msgs/msg/Odometry, not"));
    assert!(said("no_images", None).contains("no topic of type sensor_msgs/msg/Image"));
}

/// Found by fuzzing: in an uncompressed chunk the crate subtracts a length that it has not checked.
#[test]
fn a_record_longer_than_its_chunk_is_damage() {
    let mut file = std::io::Cursor::new(Vec::new());
    let mut out = mcap::WriteOptions::new().compression(None).chunk_size(Some(300)).create(&mut file).unwrap();
    let schema = out.add_schema(PoseStamped::TYPE, "ros2msg", b"").unwrap();
    let channel = out.add_channel(schema, "/pose", "cdr", &Default::default()).unwrap();
    for i in 0..20u32 {
        let header = mcap::records::MessageHeader { channel_id: channel, sequence: i, log_time: i.into(), publish_time: i.into() };
        out.write_to_known_channel(&header, &[7; 100]).unwrap();
    }
    out.finish().unwrap();
    drop(out);
    let good = file.into_inner();
    /// A byte at a time.
    struct Slow<'a>(&'a [u8]);
    impl std::io::Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            let n = buffer.len().min(1);
            std::io::Read::read(&mut self.0, &mut buffer[..n])
        }
    }
    let read = |bytes: &[u8]| {
        let mut messages = 0;
        let why = read_mcap(Slow(bytes), &mut |_| {
            messages += 1;
            Ok(())
        });
        (messages, why.unwrap())
    };
    assert_eq!(read(&good), (20, None));
    // The second message's record, in the first chunk: kind 5, 122 bytes.
    let record = [&[5u8][..], &122u64.to_le_bytes(), &channel.to_le_bytes(), &1u32.to_le_bytes()].concat();
    let at = good.windows(record.len()).position(|w| w == record).unwrap();
    for longer in [1u8, 4] {
        let mut bad = good.clone();
        bad[at + 2] = longer; // 256 or 1024 bytes more
        let (messages, why) = read(&bad);
        assert_eq!((messages, why.as_deref()), (1, Some("a record is longer than the chunk that holds it; 1 messages were read before")));
    }
}

#[test]
fn chunks_in_lz4_zstd_or_plain_and_a_compressed_file_read_alike() {
    let dir = tempfile::tempdir().unwrap();
    let kinds = [("lz4", Some(mcap::Compression::Lz4)), ("zstd", Some(mcap::Compression::Zstd)), ("plain", None)];
    let mut paths = Vec::new();
    for (name, compression) in kinds {
        let path = dir.path().join(format!("{name}.mcap"));
        let mut out = mcap::WriteOptions::new().compression(compression).create(std::fs::File::create(&path).unwrap()).unwrap();
        let schema = out.add_schema(PoseStamped::TYPE, "ros2msg", b"").unwrap();
        let channel = out.add_channel(schema, "/pose", "cdr", &Default::default()).unwrap();
        for i in 0..200u32 {
            let header = Header { stamp_ns: i64::from(i), frame_id: "map".into() };
            let data = PoseStamped { header, pose: nalgebra::Isometry3::translation(f64::from(i), 0.0, 0.0) }.encode();
            let header = mcap::records::MessageHeader { channel_id: channel, sequence: i, log_time: i.into(), publish_time: i.into() };
            out.write_to_known_channel(&header, &data).unwrap();
        }
        out.finish().unwrap();
        paths.push(path);
    }
    let packed = dir.path().join("whole.mcap.zstd");
    std::fs::write(&packed, zstd::encode_all(&std::fs::read(&paths[2]).unwrap()[..], 3).unwrap()).unwrap();
    paths.push(packed);
    for path in paths {
        let bag = Bag::open(&path).unwrap();
        let mut sum = 0.0;
        let warnings = bag
            .read(Some(&["/pose"]), &mut |m| {
                sum += PoseStamped::decode(m.data)?.pose.translation.x;
                Ok(())
            })
            .unwrap();
        assert_eq!((sum, warnings), (19_900.0, vec![]), "{}", path.display());
    }
}

fn own(dir: &Path, images: usize) -> PathBuf {
    let path = dir.join("own");
    let mut bag = BagWriter::create(&path).unwrap();
    for i in 0..images {
        let stamp_ns = 1_000_000_000 * i as i64;
        let header = Header { stamp_ns, frame_id: "c".into() };
        let data = (0..64 * 48 * 3).map(|p| (p * 7 + i * 13) as u8).collect();
        let image = Image { header, height: 48, width: 64, encoding: "rgb8".into(), is_bigendian: false, step: 192, data };
        bag.write("/image", stamp_ns, &image).unwrap();
    }
    bag.finish().unwrap();
    path
}

#[test]
fn python_reads_what_we_write() {
    let Some(python) = python("python_reads_what_we_write") else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = own(dir.path(), 5);
    let code = "
import sys
from rosbags.rosbag2 import Reader
from rosbags.typesys import Stores, get_typestore
store = get_typestore(Stores.ROS2_HUMBLE)
with Reader(sys.argv[1]) as r:
    for c, t, raw in r.messages():
        m = store.deserialize_cdr(raw, c.msgtype)
        print(c.topic, t, m.header.stamp.sec, m.encoding, m.data[:3].tolist())
";
    let out = Command::new(python).args(["-c", code]).arg(&path).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert_eq!(text.lines().count(), 5, "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(text.lines().nth(2), Some("/image 2000000000 2 rgb8 [26, 33, 40]"));
}

#[test]
fn a_truncated_bag_gives_what_could_be_read_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = own(dir.path(), 400);
    let file = path.join("own_0.mcap");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() * 2 / 3]).unwrap();
    for with_metadata in [true, false] {
        if !with_metadata {
            std::fs::remove_file(path.join("metadata.yaml")).unwrap();
        }
        let sequence = open(std::slice::from_ref(&path), &SourceOptions::default()).unwrap();
        let mut n = 0;
        let warnings = sequence
            .visit(&mut |_| {
                n += 1;
                Ok(())
            })
            .unwrap();
        assert!(n > 100 && n < 400, "{n}");
        assert!(warnings[0].contains("own_0.mcap") && warnings[0].contains(&format!("{n} messages")), "{warnings:?}");
    }
}

#[test]
fn empty_foreign_and_missing_bags_are_errors_that_name_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let said = |path: &Path| Bag::open(path).map(|_| ()).unwrap_err().to_string();
    let s = said(&dir.path().join("nothing"));
    assert!(s.contains("nothing") && s.contains("no such file"), "{s}");
    assert!(said(dir.path()).contains("not a rosbag2 bag"));
    for (name, bytes, want) in [
        ("empty.mcap", &b""[..], "no message could be read"),
        ("text.mcap", b"hello hello hello hello", "no message could be read"),
        ("text.db3", b"hello hello hello hello", "no message could be read"),
        ("empty.db3", b"", "not a rosbag2 database"),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let s = said(&path);
        assert!(s.contains(want) && s.contains(name), "{s}");
    }
    // A metadata.yaml that names files outside the bag reaches nothing.
    let bag = dir.path().join("evil");
    std::fs::create_dir(&bag).unwrap();
    std::fs::write(bag.join("metadata.yaml"), "rosbag2_bagfile_information: {relative_file_paths: ['../text.mcap', '/etc/passwd']}")
        .unwrap();
    assert!(said(&bag).contains("not a rosbag2 bag"));
}

#[test]
fn bags_that_rosbag2_itself_wrote() {
    let Some(dir) = shared("bags_that_rosbag2_itself_wrote", "data/rosbag2_files") else { return };
    let tests = dir.join("rosbag2_tests/resources");
    for storage in ["mcap", "sqlite3"] {
        let bag = Bag::open(&tests.join(storage).join("cdr_test")).unwrap();
        assert_eq!(bag.topics()["/test_topic"].messages, 3, "{storage}");
        let mut n = 0;
        let warnings = bag
            .read(Some(&["/test_topic", "/array_topic"]), &mut |m| {
                assert_eq!(m.data[..2], [0, 1]);
                n += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!((n, warnings), (7, vec![]), "{storage}");
        // Another middleware's serialisation is refused by name.
        let bag = Bag::open(&tests.join(storage).join("wrong_rmw_test")).unwrap();
        let topic = bag.topics().keys().next().unwrap().clone();
        let s = bag.read(Some(&[&topic]), &mut |_| Ok(())).unwrap_err().to_string();
        assert!(s.contains("not as CDR") && s.contains(&topic), "{s}");
        // Services beside topics do not disturb.
        assert!(!Bag::open(&tests.join(storage).join("bag_with_topics_and_service_events")).unwrap().topics().is_empty());
        // Split over five files, with and without its metadata.
        let split = dir.join("rosbag2_py/test/resources").join(storage).join("wbag");
        let count = |bag: &Bag| {
            let mut n = 0;
            bag.read(None, &mut |_| {
                n += 1;
                Ok(())
            })
            .unwrap();
            n
        };
        assert_eq!(count(&Bag::open(&split).unwrap()), 6074, "{storage}");
        let lost = dir.join("rosbag2_py/test/resources").join(storage).join("reindex_test_bags/multiple_files");
        let bag = Bag::open(&lost).unwrap();
        assert!(bag.warnings()[0].contains("no metadata.yaml") && count(&bag) > 0, "{storage}");
    }
    assert!(Bag::open(&tests.join("empty_dir")).unwrap_err().to_string().contains("not a rosbag2 bag"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn mutated_mcap_never_panics_nor_allocates_much(at in 0usize..100_000, flip in 1u8..=255, cut in 0usize..100_000, noise in proptest::collection::vec(any::<u8>(), 0..120)) {
        static BAG: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let good = BAG.get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            std::fs::read(own(dir.path(), 3).join("own_0.mcap")).unwrap()
        });
        let read = |bytes: &[u8]| read_mcap(bytes, &mut |m| { let _ = Image::decode(m.data); Ok(()) });
        let mut bytes = good.clone();
        let n = bytes.len();
        bytes[at % n] ^= flip;
        let _ = read(&bytes);
        let _ = read(&good[..cut % n]);
        let _ = read(&[b"\x89MCAP0\r\n", &noise[..]].concat());
        // A record may claim up to the limit, never more.
        prop_assert!(crate::alloc::largest() <= (256 << 20) + (2 << 20), "{} bytes at once", crate::alloc::largest());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]
    #[test]
    fn mutated_db3_never_panics(at in 0usize..100_000, flip in 1u8..=255, cut in 0usize..100_000) {
        static BAG: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
        let good = BAG.get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.db3");
            let db = rusqlite::Connection::open(&path).unwrap();
            db.execute_batch("CREATE TABLE topics(id INTEGER PRIMARY KEY,name TEXT NOT NULL,type TEXT NOT NULL,serialization_format TEXT NOT NULL);
                CREATE TABLE messages(id INTEGER PRIMARY KEY,topic_id INTEGER NOT NULL,timestamp INTEGER NOT NULL, data BLOB NOT NULL);
                INSERT INTO topics VALUES (1, '/a', 'sensor_msgs/msg/Image', 'cdr');").unwrap();
            for i in 0..20 { db.execute("INSERT INTO messages VALUES (?1, 1, ?1, zeroblob(900))", [i]).unwrap(); }
            drop(db);
            std::fs::read(path).unwrap()
        });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.db3");
        let mut bytes = good.clone();
        let n = bytes.len();
        bytes[at % n] ^= flip;
        std::fs::write(&path, &bytes).unwrap();
        let _ = Bag::open(&path);
        std::fs::write(&path, &good[..cut % n]).unwrap();
        let _ = Bag::open(&path);
    }
}
