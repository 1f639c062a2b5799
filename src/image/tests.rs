use super::*;
use proptest::prelude::*;

const ENCODINGS: [&str; 17] = [
    "rgb8",
    "bgr8",
    "rgba8",
    "bgra8",
    "mono8",
    "8UC1",
    "8UC3",
    "mono16",
    "16UC1",
    "bayer_rggb8",
    "bayer_bggr8",
    "bayer_gbrg8",
    "bayer_grbg8",
    "yuv422",
    "yuv422_yuy2",
    "nv21",
    "nv24",
];

fn raw<'a>(width: u32, height: u32, encoding: &'a str, step: u32, data: &'a [u8]) -> RawImage<'a> {
    RawImage { width, height, encoding, is_bigendian: false, step, data }
}

/// Rows are padded to `step` with 99, which must not show.
fn check(encoding: &str, width: u32, step: u32, rows: &[&[u8]], want: &[u8]) {
    let mut data = Vec::new();
    for row in rows {
        data.extend_from_slice(row);
        data.resize(data.len() + step as usize - row.len(), 99);
    }
    let height = rows.len() as u32;
    let got = RgbImage::from_raw(&raw(width, height, encoding, step, &data)).unwrap();
    assert_eq!(got.data(), want, "{encoding}");
}

#[test]
fn each_encoding_with_row_padding() {
    check("rgb8", 1, 8, &[&[1, 2, 3], &[4, 5, 6]], &[1, 2, 3, 4, 5, 6]);
    check("bgr8", 1, 3, &[&[1, 2, 3], &[4, 5, 6]], &[3, 2, 1, 6, 5, 4]);
    check("rgba8", 1, 4, &[&[1, 2, 3, 200]], &[1, 2, 3]);
    check("bgra8", 1, 5, &[&[1, 2, 3, 200], &[4, 5, 6, 0]], &[3, 2, 1, 6, 5, 4]);
    check("mono8", 2, 3, &[&[7, 8], &[9, 10]], &[7, 7, 7, 8, 8, 8, 9, 9, 9, 10, 10, 10]);
    check("mono16", 1, 2, &[&[0x34, 0x12]], &[0x12; 3]);
    // Grey in every YUV layout: Y 128 is 130 in full range.
    let grey = [130u8; 6];
    check("yuv422", 2, 6, &[&[128, 128, 128, 128]], &grey);
    check("yuv422_yuy2", 2, 4, &[&[128, 128, 128, 128]], &grey);
}

#[test]
fn big_endian_mono16_and_planar_yuv() {
    let be = RawImage { is_bigendian: true, ..raw(1, 1, "mono16", 2, &[0x12, 0x34]) };
    assert_eq!(RgbImage::from_raw(&be).unwrap().data(), [0x12; 3]);
    let nv21 = RgbImage::from_raw(&raw(2, 2, "nv21", 2, &[128; 6])).unwrap();
    assert_eq!(nv21.data(), [130; 12]);
    let nv24 = RgbImage::from_raw(&raw(2, 2, "nv24", 2, &[128; 12])).unwrap();
    assert_eq!(nv24.data(), [130; 12]);
    // Red in VU order: V high.
    let red = RgbImage::from_raw(&raw(2, 2, "nv21", 2, &[81, 81, 81, 81, 240, 90])).unwrap();
    assert!(red.data()[0] > 240 && red.data()[1] < 15 && red.data()[2] < 15, "{:?}", red.data());
    let red24 = RgbImage::from_raw(&raw(1, 1, "nv24", 1, &[81, 240, 90])).unwrap();
    assert!(red24.data()[0] > 240 && red24.data()[1] < 15 && red24.data()[2] < 15, "{:?}", red24.data());
}

#[test]
fn each_bayer_pattern_gives_the_colour_it_was_made_from() {
    // A plain colour, sampled through each filter, must come back in the middle.
    let colour = [200u8, 100, 50];
    for (encoding, pattern) in
        [("bayer_rggb8", [0, 1, 1, 2]), ("bayer_bggr8", [2, 1, 1, 0]), ("bayer_gbrg8", [1, 2, 0, 1]), ("bayer_grbg8", [1, 0, 2, 1])]
    {
        let data: Vec<u8> = (0..64usize).map(|i| colour[pattern[(i / 8 % 2) * 2 + i % 2]]).collect();
        let image = RgbImage::from_raw(&raw(8, 8, encoding, 8, &data)).unwrap();
        assert_eq!(image.data()[(3 * 8 + 3) * 3..][..3], colour, "{encoding}");
    }
}

#[test]
fn lying_headers_are_errors() {
    let said = |r: RawImage| RgbImage::from_raw(&r).unwrap_err().to_string();
    assert!(said(raw(0, 4, "rgb8", 0, &[])).contains("0x4"));
    assert!(said(raw(4, 4, "rgb8", 12, &[0; 47])).contains("wants 48 bytes, got 47"));
    assert!(said(raw(4, 4, "rgb8", 11, &[0; 48])).contains("step 11"));
    assert!(said(raw(20_000, 20_000, "rgb8", 60_000, &[])).contains("over the limit"));
    assert!(said(raw(u32::MAX, u32::MAX, "mono8", u32::MAX, &[])).contains("over the limit"));
    assert!(said(raw(2, 2, "32FC1", 8, &[0; 16])).contains("`32FC1` is not supported"));
    assert!(said(raw(3, 2, "yuv422", 6, &[0; 12])).contains("width 3 must be even"));
    assert!(said(raw(2, 2, "bayer_rggb8", 2, &[0; 4])).contains("too small"));
}

#[test]
fn jpeg_and_png_come_back() {
    let data: Vec<u8> = (0..60 * 40 * 3).map(|i| (i % 251) as u8).collect();
    let image = RgbImage::new(60, 40, data).unwrap();
    assert_eq!(RgbImage::decode(&image.to_png().unwrap()).unwrap(), image);
    let smooth = RgbImage::new(60, 40, vec![90; 60 * 40 * 3]).unwrap();
    let back = RgbImage::decode(&smooth.to_jpeg(95).unwrap()).unwrap();
    assert!(back.data().iter().all(|v| v.abs_diff(90) <= 2));
    // Headers that claim 60 000 x 60 000.
    let mut png = image.to_png().unwrap();
    png[16..20].copy_from_slice(&60_000u32.to_be_bytes());
    png[20..24].copy_from_slice(&60_000u32.to_be_bytes());
    let crc = crc32fast::hash(&png[12..29]);
    png[29..33].copy_from_slice(&crc.to_be_bytes());
    let mut jpeg = image.to_jpeg(90).unwrap();
    let frame = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0xea, 0x60, 0xea, 0x60]);
    for bomb in [png, jpeg] {
        assert!(RgbImage::decode(&bomb).unwrap_err().to_string().contains("over the limit"));
    }
    assert!(RgbImage::decode(b"GIF89a").unwrap_err().to_string().contains("neither JPEG nor PNG"));
}

/// What cameras do to their JPEGs, and what they must not.
#[test]
fn a_stuffed_jpeg_is_an_image_and_half_a_jpeg_is_none() {
    let image = RgbImage::new(60, 40, (0..60 * 40 * 3).map(|i| (i % 251) as u8).collect()).unwrap();
    let jpeg = image.to_jpeg(90).unwrap();
    let end = jpeg.len() - 2;
    let stuffed = [&jpeg[..end], &[0, 0, 0], &jpeg[end..]].concat();
    assert_eq!(RgbImage::decode(&stuffed).unwrap(), RgbImage::decode(&jpeg).unwrap());
    for cut in [3, 20, end / 2, end - 200] {
        assert!(RgbImage::decode(&jpeg[..cut]).unwrap_err().to_string().contains("does not decode"), "{cut}");
    }
}

/// What other programs compute from a JPEG, we do.
#[test]
fn jpegs_have_the_pixels_that_opencv_decodes() {
    use opencv::core::{Mat, MatTraitConstManual};
    use opencv::{imgcodecs, imgproc};
    for (width, height) in [(61, 43), (64, 48), (8, 7)] {
        let data = (0..width * height * 3).map(|i| ((i * 37) % 256) as u8 / 2 + (i / (9 * width) * 20 % 128) as u8).collect();
        let image = RgbImage::new(width, height, data).unwrap();
        for quality in [30, 75, 95] {
            let jpeg = image.to_jpeg(quality).unwrap();
            let bgr = imgcodecs::imdecode(&Mat::from_slice(&jpeg).unwrap(), imgcodecs::IMREAD_COLOR).unwrap();
            let mut rgb = Mat::default();
            imgproc::cvt_color_def(&bgr, &mut rgb, imgproc::COLOR_BGR2RGB).unwrap();
            let ours = RgbImage::decode(&jpeg).unwrap();
            let off = ours.data().iter().zip(rgb.data_bytes().unwrap()).map(|(a, b)| a.abs_diff(*b)).max();
            assert_eq!(off, Some(0), "{width}x{height} at {quality}");
        }
    }
}

/// Grey, alpha, palette and 16 bits: what label tools and depth cameras write.
#[test]
fn every_kind_of_png_is_rgb_afterwards() {
    use png::{BitDepth, ColorType};
    let kinds: [(ColorType, BitDepth, &[u8], [u8; 3]); 6] = [
        (ColorType::Grayscale, BitDepth::Eight, &[77], [77; 3]),
        (ColorType::Grayscale, BitDepth::One, &[0x80], [255; 3]),
        (ColorType::GrayscaleAlpha, BitDepth::Eight, &[77, 10], [77; 3]),
        (ColorType::Rgba, BitDepth::Eight, &[1, 2, 3, 10], [1, 2, 3]),
        (ColorType::Rgb, BitDepth::Sixteen, &[1, 200, 2, 200, 3, 200], [1, 2, 3]),
        (ColorType::Indexed, BitDepth::Eight, &[1], [4, 5, 6]),
    ];
    for (color, depth, data, want) in kinds {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 1, 1);
        encoder.set_color(color);
        encoder.set_depth(depth);
        encoder.set_palette(vec![1, 2, 3, 4, 5, 6]);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(data).unwrap();
        writer.finish().unwrap();
        assert_eq!(RgbImage::decode(&bytes).unwrap().data(), want, "{color:?} {depth:?}");
    }
}

#[test]
fn area_resize_averages_and_luma_tells_a_constant_image() {
    let image = RgbImage::new(4, 2, [[0u8; 3], [100; 3]].concat().repeat(4)).unwrap();
    assert_eq!(image.resize_area(2, 1).unwrap().data(), [50; 6]);
    assert_eq!(image.resize_area(4, 2).unwrap(), image);
    let (mean, std) = image.luma_stats();
    assert!((mean - 50.0).abs() < 1.0 && (std - 50.0).abs() < 1.0, "{mean} {std}");
    assert_eq!(RgbImage::new(4, 4, vec![7; 48]).unwrap().luma_stats().1, 0.0);
}

#[test]
fn undistort_moves_the_border_and_refuses_what_does_not_fit() {
    let mut data = vec![0u8; 64 * 48 * 3];
    data[(24 * 64 + 4) * 3] = 255;
    let image = RgbImage::new(64, 48, data).unwrap();
    let camera = Camera {
        width: 64,
        height: 48,
        k: [50.0, 0.0, 31.5, 0.0, 50.0, 23.5, 0.0, 0.0, 1.0],
        d: vec![-0.2, 0.02, 0.0, 0.0, 0.0],
        distortion_model: "plumb_bob".into(),
    };
    let out = image.undistort(&camera).unwrap();
    let brightest = (0..64).max_by_key(|x| out.data()[(24 * 64 + x) * 3]).unwrap();
    assert!(brightest < 4, "barrel distortion is undone outwards, got column {brightest}");
    assert_eq!(image.undistort(&Camera { d: vec![], ..camera.clone() }).unwrap(), image);
    assert!(image.undistort(&Camera { d: vec![0.1; 4], distortion_model: "equidistant".into(), ..camera.clone() }).is_ok());
    for bad in [
        Camera { width: 100, ..camera.clone() },
        Camera { height: 0, ..camera.clone() },
        Camera { d: vec![0.1; 3], ..camera.clone() },
        Camera { d: vec![f64::NAN; 5], ..camera.clone() },
        Camera { distortion_model: "own".into(), ..camera },
    ] {
        assert!(image.undistort(&bad).is_err(), "{bad:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn random_headers_over_random_data_never_panic(
        width in 0u32..40, height in 0u32..40, step in 0u32..200, encoding in 0usize..ENCODINGS.len(),
        data in proptest::collection::vec(any::<u8>(), 0..6000), is_bigendian in any::<bool>(),
    ) {
        let form = RawImage { width, height, encoding: ENCODINGS[encoding], is_bigendian, step, data: &[] };
        let r = RawImage { data: &data, ..form };
        if let Ok(image) = RgbImage::from_raw(&r) {
            prop_assert_eq!((image.width(), image.height(), image.data().len()), (width, height, (3 * width * height) as usize));
        }
        // Where it lies in a message, among other bytes.
        let message = [&[1, 2, 3][..], &data, &[4]].concat();
        let there = RgbImage::from_message(message, |m| Ok(((), RawImage { data: &m[3..][..data.len()], ..form })));
        prop_assert_eq!(there.map(|(_, image)| image).map_err(|e| e.to_string()), RgbImage::from_raw(&r).map_err(|e| e.to_string()));
        let huge = RawImage { width: width.wrapping_mul(0x0f00_0001), height: height.wrapping_mul(0x00f0_0001), ..r };
        let _ = RgbImage::from_raw(&huge);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn mutated_jpeg_and_png_never_panic(at in 0usize..2000, flip in 1u8..=255, cut in 0usize..2000, png in any::<bool>(), noise in proptest::collection::vec(any::<u8>(), 0..64)) {
        let image = RgbImage::new(16, 12, (0..16 * 12 * 3).map(|i| (i * 7 % 256) as u8).collect()).unwrap();
        let mut bytes = if png { image.to_png().unwrap() } else { image.to_jpeg(80).unwrap() };
        let n = bytes.len();
        let _ = RgbImage::decode(&bytes[..cut % n]);
        bytes[at % n] ^= flip;
        let _ = RgbImage::decode(&bytes);
        let _ = RgbImage::decode(&noise);
        let _ = RgbImage::decode(&[&[0xff, 0xd8][..], &noise].concat());
    }
}

#[test]
fn depth_has_a_median_or_none() {
    let raw = |encoding, is_bigendian, step, data| RawImage { width: 3, height: 2, encoding, is_bigendian, step, data };
    let mm: Vec<u8> = [1000u16, 0, 3000, 9999, 2000, 500, 4000, 9999].iter().flat_map(|v| v.to_le_bytes()).collect();
    // A row of three and one of padding: 1, 3, 2, 0.5 and 4 metres, and a hole.
    assert_eq!(median_depth_m(&raw("16UC1", false, 8, &mm)).unwrap(), Some(2.0));
    let m: Vec<u8> = [f32::NAN, 0.0, -1.0, f32::INFINITY, 7.5, 0.0].iter().flat_map(|v| v.to_be_bytes()).collect();
    assert_eq!(median_depth_m(&raw("32FC1", true, 12, &m)).unwrap(), Some(7.5));
    assert_eq!(median_depth_m(&raw("16UC1", false, 6, &[0; 12])).unwrap(), None);
    for bad in
        [raw("16UC1", false, 5, &mm), raw("32FC1", false, 12, &mm[..12]), raw("rgb8", false, 9, &mm), raw("16UC1", false, u32::MAX, &mm)]
    {
        assert!(median_depth_m(&bad).is_err());
    }
}
