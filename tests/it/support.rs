//! What several tests share.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The repository's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A folder of the evaluation data that lies beside the repository on some machines; without it the
/// test says so and ends.
pub fn shared(test: &str, path: &str) -> Option<PathBuf> {
    let found = root().join("../shared").join(path);
    if !found.exists() {
        eprintln!("SKIPPED {test}: ../shared/{path} is not here");
        return None;
    }
    Some(found)
}

/// The Python that scripts/test sets up, with rosbags, numpy and scipy.
pub fn python(test: &str) -> Option<PathBuf> {
    let python = root().join(".venv/tests/bin/python");
    if !python.exists() {
        assert!(std::env::var_os("CI").is_none(), "{test}: .venv/tests is missing in CI; scripts/test makes it");
        eprintln!("SKIPPED {test}: run scripts/test, which makes .venv/tests");
        return None;
    }
    Some(python)
}

/// Runs the command line.
pub fn structvpr(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_structvpr")).args(arguments).output().expect("the binary starts")
}

/// Stdout of a run that must succeed.
pub fn ok(arguments: &[&str]) -> String {
    let out = structvpr(arguments);
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("UTF-8")
}

/// Stderr of a run that must fail with exit code 1 and no panic.
pub fn fails(arguments: &[&str]) -> String {
    let out = structvpr(arguments);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{arguments:?}: {said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// A reproducible number in [0, 1).
pub fn unit(seed: u64, i: u64) -> f64 {
    let mut z = seed.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// A picture of rectangles that only `place` decides; `drive` moves and dims it a little.
pub fn picture(place: u64, drive: u64) -> structvpr::image::RgbImage {
    const W: usize = 160;
    const H: usize = 120;
    let mut data = vec![0u8; W * H * 3];
    let shift = (drive * 3) as f64;
    for (y, row) in data.chunks_exact_mut(W * 3).enumerate() {
        for (x, p) in row.chunks_exact_mut(3).enumerate() {
            p.copy_from_slice(&[60 + (y / 2) as u8, 90, 140 - (y / 2) as u8]);
            for r in 0..14u64 {
                let u = |k| unit(place * 1000 + r, k);
                let (cx, cy, w, h) = (u(1) * W as f64 + shift, u(2) * H as f64, 8.0 + u(3) * 40.0, 8.0 + u(4) * 50.0);
                if (x as f64 - cx).abs() < w / 2.0 && (y as f64 - cy).abs() < h / 2.0 {
                    // Stripes, so that the networks have edges to see.
                    let stripe = if ((x as f64 - cx) * (0.2 + u(8))).sin() > 0.0 { 1.0 } else { 0.55 };
                    for (c, v) in p.iter_mut().enumerate() {
                        *v = (u(5 + c as u64) * 255.0 * stripe * (1.0 - 0.1 * drive as f64)) as u8;
                    }
                }
            }
        }
    }
    structvpr::image::RgbImage::new(W as u32, H as u32, data).expect("the size fits")
}
