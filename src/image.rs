//! Pixels from untrusted bytes: ROS encodings, JPEG, PNG; resize and undistort.
//!
//! Every size is checked against the data before anything is allocated. libjpeg-turbo (to OpenCV's pixels)
//! and a PNG reader in safe Rust decode; OpenCV demosaics, resizes and undistorts. OpenCV's own decoders would load a hundred
//! libraries (GDAL, GDCM, ...) into every process, and feed them untrusted bytes.

mod area;
mod glance;
mod rows;

pub use glance::Glance;
pub use rows::{RowScratch, Rows};

use area::Area;

use crate::error::{Error, Result};
use crate::team;
use opencv::boxed_ref::BoxedRef;
use opencv::core::{Mat, MatTraitConst, MatTraitConstManual, Size};
use opencv::{calib3d, imgproc};

/// Most pixels that we decode: 64 million, above any robot's camera. 20 000 x 20 000 is refused.
pub const MAX_PIXELS: u64 = 64_000_000;

/// Most scans of a progressive JPEG: each costs a pass over the whole image, however few bytes it has.
const MAX_SCANS: u32 = 50;

/// From so many bytes of pixels on, a smaller image is worth waking a second thread for.
const LARGE: usize = 3 << 20;

/// Pixels that tell how bright an image is.
const LUMA_PIXELS: usize = 320 * 240;

const SUPPORTED: &str = "rgb8, bgr8, rgba8, bgra8, mono8, 8UC1, 8UC3, mono16, 16UC1, bayer_{rggb,bggr,gbrg,grbg}8, yuv422 (uyvy), yuv422_yuy2 (yuyv), nv21, nv24";

/// An 8-bit RGB image, row-major, no padding.
#[derive(Clone, Debug)]
pub struct RgbImage {
    width: u32,
    height: u32,
    /// The pixels are from `start` on: an image may lie in the message that it came in.
    bytes: Vec<u8>,
    start: usize,
}

impl PartialEq for RgbImage {
    fn eq(&self, other: &Self) -> bool {
        (self.width, self.height, self.data()) == (other.width, other.height, other.data())
    }
}

impl Eq for RgbImage {}

/// The fields of `sensor_msgs/Image`, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct RawImage<'a> {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// ROS encoding name.
    pub encoding: &'a str,
    /// Byte order of 16-bit encodings.
    pub is_bigendian: bool,
    /// Bytes per row, padding included.
    pub step: u32,
    /// `step * height` bytes (more is tolerated, less is not).
    pub data: &'a [u8],
}

/// Pinhole (`plumb_bob`, `rational_polynomial`) or `equidistant` (fisheye) calibration.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Camera {
    /// Columns of the image that was calibrated.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Row-major 3 x 3.
    pub k: [f64; 9],
    /// Distortion coefficients, in the model's order.
    pub d: Vec<f64>,
    /// ROS name of the distortion model.
    pub distortion_model: String,
}

fn check_size(width: u64, height: u64) -> Result<()> {
    if width == 0 || height == 0 {
        return Err(Error::image(format!("size {width}x{height} is empty")));
    }
    match width.checked_mul(height) {
        Some(n) if n <= MAX_PIXELS => Ok(()),
        _ => Err(Error::image(format!("size {width}x{height} is over the limit of {MAX_PIXELS} pixels"))),
    }
}

fn damaged(e: impl std::fmt::Display) -> Error {
    Error::image(format!("does not decode: {e}"))
}

/// What `f` makes of `height` tight rows, which OpenCV reads where they lie, into a new image.
fn converted(height: u32, rows: &[u8], channels: i32, f: impl FnOnce(&BoxedRef<Mat>, &mut Mat) -> opencv::Result<()>) -> Result<Mat> {
    let flat = Mat::from_slice(rows)?;
    let mut out = Mat::default();
    f(&flat.reshape(channels, height as i32)?, &mut out)?;
    Ok(out)
}

/// Three bytes for every `n`, into memory of the right size; what `flat_map` collects grows as it goes.
fn rgb_of(from: &[u8], n: usize, rgb: impl Fn(&[u8]) -> [u8; 3]) -> Vec<u8> {
    let mut out = vec![0; from.len() / n * 3];
    for (to, p) in out.chunks_exact_mut(3).zip(from.chunks_exact(n)) {
        to.copy_from_slice(&rgb(p));
    }
    out
}

impl RgbImage {
    /// From tight RGB rows.
    ///
    /// Errors: a size that is empty, over [`MAX_PIXELS`], or not that of `data`.
    pub fn new(width: u32, height: u32, data: Vec<u8>) -> Result<Self> {
        check_size(width.into(), height.into())?;
        let want = u64::from(width) * u64::from(height) * 3;
        if data.len() as u64 != want {
            return Err(Error::image(format!("{width}x{height} RGB wants {want} bytes, got {}", data.len())));
        }
        Ok(Self { width, height, bytes: data, start: 0 })
    }

    /// Columns.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// `3 * width * height` bytes, RGB.
    pub fn data(&self) -> &[u8] {
        &self.bytes[self.start..][..3 * self.width as usize * self.height as usize]
    }

    /// Converts a `sensor_msgs/Image`. mono16 keeps its high byte.
    ///
    /// Errors: unknown encoding, a header that does not fit the data, an empty or absurd size.
    pub fn from_raw(raw: &RawImage) -> Result<Self> {
        let (width, height) = (raw.width as usize, raw.height as usize);
        let Form { layout, row, rows, step } = Form::of(raw)?;
        if let Layout::Channels(3, [2, 1, 0]) = layout {
            let mut data = vec![0; row * rows];
            for (to, from) in data.chunks_exact_mut(row).zip(raw.data.chunks(step)) {
                area::reversed(&from[..row], to);
            }
            return Self::new(raw.width, raw.height, data);
        }
        let mut tight = Vec::with_capacity(row * rows);
        match layout {
            Layout::Nv24 => {
                for y in 0..height {
                    tight.extend_from_slice(&raw.data[y * step..][..width]);
                }
                for y in 0..height {
                    tight.extend_from_slice(&raw.data[step * height + y * 2 * step..][..2 * width]);
                }
            }
            _ => {
                for y in 0..rows {
                    tight.extend_from_slice(&raw.data[y * step..][..row]);
                }
            }
        }
        let data = layout.to_rgb(tight, width, height, raw.is_bigendian)?;
        Self::new(raw.width, raw.height, data)
    }

    /// [`Self::from_raw`] of what `find` finds in a message, with what else it says. rgb8 and bgr8 without padding stay where
    /// they lie: a copy of every image of a camera costs more than all but the network.
    ///
    /// Errors: as [`Self::from_raw`], and `find`'s own.
    pub fn from_message<T>(mut message: Vec<u8>, find: impl FnOnce(&[u8]) -> Result<(T, RawImage<'_>)>) -> Result<(T, Self)> {
        let (rest, raw) = find(&message)?;
        let form = Form::of(&raw)?;
        let (width, height, whole) = (raw.width, raw.height, form.row * form.rows);
        let start = (raw.data.as_ptr() as usize).checked_sub(message.as_ptr() as usize).filter(|s| s + whole <= message.len());
        let (Layout::Channels(3, order), true, Some(start)) = (form.layout, form.step == form.row, start) else {
            return Ok((rest, Self::from_raw(&raw)?));
        };
        if order == [2, 1, 0] {
            area::reverse(&mut message[start..][..whole]);
        }
        Ok((rest, Self { width, height, bytes: message, start }))
    }

    /// Decodes JPEG or PNG; alpha is left out, of 16 bits the upper 8 are kept. The size in the file's header is checked before
    /// anything is allocated for its pixels.
    ///
    /// Errors: other formats, a size over [`MAX_PIXELS`], bytes that do not decode.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        if bytes.starts_with(&[0xff, 0xd8]) {
            Self::from_jpeg(bytes)
        } else if bytes.starts_with(b"\x89PNG") {
            Self::from_png(bytes)
        } else {
            Err(Error::image("neither JPEG nor PNG"))
        }
    }

    fn from_jpeg(bytes: &[u8]) -> Result<Self> {
        let mut decoder = turbojpeg::Decompressor::new().map_err(damaged)?;
        decoder.set_scan_limit(MAX_SCANS).map_err(damaged)?;
        let turbojpeg::DecompressHeader { width, height, .. } = decoder.read_header(bytes).map_err(damaged)?;
        check_size(width as u64, height as u64)?;
        let mut pixels = vec![0; 3 * width * height];
        let image = turbojpeg::Image { pixels: &mut pixels[..], width, pitch: 3 * width, height, format: turbojpeg::PixelFormat::RGB };
        match decoder.decompress(bytes, image) {
            // Many webcams stuff their frames; the picture is whole.
            Err(turbojpeg::Error::TurboJpegError(e)) if e.contains("extraneous bytes") => {}
            other => other.map_err(damaged)?,
        }
        Self::new(width as u32, height as u32, pixels)
    }

    fn from_png(bytes: &[u8]) -> Result<Self> {
        let mut decoder = png::Decoder::new(std::io::Cursor::new(bytes));
        decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
        let (width, height) = decoder.read_header_info().map_err(damaged)?.size();
        check_size(width.into(), height.into())?;
        let mut reader = decoder.read_info().map_err(damaged)?;
        let mut pixels = vec![0; reader.output_buffer_size().ok_or_else(|| damaged("too large"))?];
        reader.next_frame(&mut pixels).map_err(damaged)?;
        let data = match reader.output_color_type().0 {
            png::ColorType::Rgb => pixels,
            png::ColorType::Rgba => rgb_of(&pixels, 4, |p| [p[0], p[1], p[2]]),
            png::ColorType::Grayscale => rgb_of(&pixels, 1, |p| [p[0]; 3]),
            png::ColorType::GrayscaleAlpha => rgb_of(&pixels, 2, |p| [p[0]; 3]),
            png::ColorType::Indexed => return Err(damaged("no palette")),
        };
        Self::new(width, height, data)
    }

    /// Area-averaged resize: OpenCV's INTER_AREA, which does it where the image grows, or a pixel would cover more than 257.
    pub fn resize_area(&self, width: u32, height: u32) -> Result<Self> {
        check_size(width.into(), height.into())?;
        if (width, height) == (self.width, self.height) {
            return Ok(self.clone());
        }
        let (from, to) = ((self.width as usize, self.height as usize), (width as usize, height as usize));
        if let Some(area) = Area::new(from, to) {
            let mut data = vec![0; 3 * to.0 * to.1];
            let row = |scratch: &mut area::Scratch, y: usize, row: &mut [u8]| area.row(self.data(), y, scratch, row);
            if self.data().len() < LARGE {
                let mut scratch = area::Scratch::default();
                data.chunks_exact_mut(3 * to.0).enumerate().for_each(|(y, out)| row(&mut scratch, y, out));
            } else {
                team::chunks_with(&mut data, 3 * to.0, area::Scratch::default, row);
            }
            return Self::new(width, height, data);
        }
        let size = Size::new(width as i32, height as i32);
        let out = self.converted(|image, out| imgproc::resize(image, out, size, 0.0, 0.0, imgproc::INTER_AREA))?;
        Self::new(width, height, out.data_bytes()?.to_vec())
    }

    /// The image at another size, row by row as three planes of f32: each value times `scale` plus `shift` of its channel.
    ///
    /// Errors: a size that is none; OpenCV's own.
    pub fn rows(&self, width: u32, height: u32, scale: [f32; 3], shift: [f32; 3]) -> Result<Rows<'_>> {
        check_size(width.into(), height.into())?;
        Rows::new(self, (width, height), scale, shift)
    }

    /// Removes lens distortion, keeping size and intrinsics.
    ///
    /// Errors: a calibration for another aspect ratio, or a distortion model we do not know.
    pub fn undistort(&self, camera: &Camera) -> Result<Self> {
        if camera.width == 0 || camera.height == 0 {
            return Err(Error::image("camera_info has no size"));
        }
        let (sx, sy) = (f64::from(self.width) / f64::from(camera.width), f64::from(self.height) / f64::from(camera.height));
        if (sx / sy - 1.0).abs() > 0.01 {
            return Err(Error::image(format!(
                "camera_info is for {}x{}, the image is {}x{}: another aspect ratio",
                camera.width, camera.height, self.width, self.height
            )));
        }
        let k = camera.k;
        let k = [k[0] * sx, k[1] * sx, k[2] * sx, k[3] * sy, k[4] * sy, k[5] * sy, 0.0, 0.0, 1.0];
        if k.iter().chain(&camera.d).any(|v| !v.is_finite()) || k[0] <= 0.0 || k[4] <= 0.0 {
            return Err(Error::image(format!("camera_info is not usable: k = {:?}, d = {:?}", camera.k, camera.d)));
        }
        let flat = Mat::from_slice(&k)?;
        let k = flat.reshape(1, 3)?;
        let out = match (camera.distortion_model.as_str(), camera.d.len()) {
            (_, 0) => return Ok(self.clone()),
            ("equidistant" | "fisheye", 4) => {
                let size = Size::new(self.width as i32, self.height as i32);
                self.converted(|image, out| calib3d::fisheye_undistort_image(image, out, &k, &Mat::from_slice(&camera.d)?, &k, size))?
            }
            ("plumb_bob" | "rational_polynomial", 4 | 5 | 8 | 12 | 14) => {
                self.converted(|image, out| calib3d::undistort(image, out, &k, &Mat::from_slice(&camera.d)?, &k))?
            }
            (model, n) => {
                return Err(Error::image(format!(
                    "distortion model `{model}` with {n} coefficients (known: plumb_bob, rational_polynomial, equidistant)"
                )))
            }
        };
        Self::new(self.width, self.height, out.data_bytes()?.to_vec())
    }

    /// JPEG of `quality` 1 to 100, chroma at half size.
    pub fn to_jpeg(&self, quality: u8) -> Result<Vec<u8>> {
        let encoded = || {
            let (width, height) = (self.width as usize, self.height as usize);
            let image = turbojpeg::Image { pixels: self.data(), width, pitch: 3 * width, height, format: turbojpeg::PixelFormat::RGB };
            let mut encoder = turbojpeg::Compressor::new()?;
            encoder.set_quality(quality.clamp(1, 100).into())?;
            encoder.set_subsamp(turbojpeg::Subsamp::Sub2x2)?;
            encoder.compress_to_vec(image)
        };
        encoded().map_err(|e| self.not_encoded(&e))
    }

    /// A small JPEG, `width` columns wide at most.
    pub fn thumbnail(&self, width: u32) -> Result<Vec<u8>> {
        let width = width.clamp(1, self.width);
        let height = (u64::from(self.height) * u64::from(width)).div_ceil(u64::from(self.width)).max(1);
        self.resize_area(width, height as u32)?.to_jpeg(75)
    }

    /// PNG, lossless.
    pub fn to_png(&self) -> Result<Vec<u8>> {
        let encoded = || -> std::result::Result<_, png::EncodingError> {
            let mut out = Vec::new();
            let mut encoder = png::Encoder::new(&mut out, self.width, self.height);
            encoder.set_color(png::ColorType::Rgb);
            let mut writer = encoder.write_header()?;
            writer.write_image_data(self.data())?;
            writer.finish()?;
            Ok(out)
        };
        encoded().map_err(|e| self.not_encoded(&e))
    }

    fn not_encoded(&self, e: &dyn std::error::Error) -> Error {
        Error::image(format!("{}x{} cannot be encoded: {e}", self.width, self.height))
    }

    /// Mean and standard deviation of the luma, 0 to 255: tells a dark, white or constant image. Of a large one not all
    /// rows are asked: every nth, where n times 320x240 pixels fit into it. [ours]
    pub fn luma_stats(&self) -> (f32, f32) {
        let (width, height) = (self.width as usize, self.height as usize);
        let every = (width * height / LUMA_PIXELS).clamp(1, height.max(1));
        let (sum, squares, n) = if every == 1 {
            let (sum, squares) = area::luma_sums(self.data());
            (sum, squares, width * height)
        } else {
            let rows = self.data().chunks_exact(3 * width).step_by(every);
            rows.fold((0, 0, 0), |(sum, squares, n), row| {
                let of_row = area::luma_sums(row);
                (sum + of_row.0, squares + of_row.1, n + width)
            })
        };
        let n = n as f64;
        let mean = sum as f64 / n;
        (mean as f32, (squares as f64 / n - mean * mean).max(0.0).sqrt() as f32)
    }

    /// Three planes of f32, red first: each value times `scale` plus `shift` of its channel.
    pub fn planes(&self, scale: [f32; 3], shift: [f32; 3]) -> Vec<f32> {
        let mut planes = vec![0f32; self.data().len()];
        area::planes(self.data(), scale, shift, &mut planes);
        planes
    }

    /// What [`Glance`] compares.
    ///
    /// Errors: none but OpenCV's own.
    pub fn glance(&self) -> Result<Glance> {
        Glance::new(self)
    }

    /// Luma, for the detectors of points.
    pub(crate) fn grey(&self) -> Result<Mat> {
        self.converted(|image, grey| imgproc::cvt_color_def(image, grey, imgproc::COLOR_RGB2GRAY))
    }

    /// Rec. 601 luma, row by row.
    pub fn luma(&self) -> Result<Vec<u8>> {
        Ok(self.grey()?.data_bytes()?.to_vec())
    }

    fn converted(&self, f: impl FnOnce(&BoxedRef<Mat>, &mut Mat) -> opencv::Result<()>) -> Result<Mat> {
        converted(self.height, self.data(), 3, f)
    }
}

/// A registered depth image as it lies in its message.
struct Depth<'a> {
    raw: &'a RawImage<'a>,
    bytes: usize,
}

impl<'a> Depth<'a> {
    fn new(raw: &'a RawImage<'a>) -> Result<Self> {
        check_size(raw.width.into(), raw.height.into())?;
        let bytes = match raw.encoding {
            "16UC1" | "mono16" => 2,
            "32FC1" => 4,
            other => return Err(Error::ImageEncoding { encoding: other.chars().take(32).collect(), supported: "16UC1, 32FC1" }),
        };
        let (width, height, step) = (raw.width as usize, raw.height as usize, raw.step as usize);
        let need = (height - 1).saturating_mul(step).saturating_add(width * bytes);
        if step < width * bytes || raw.data.len() < need {
            return Err(Error::image(format!("depth {width}x{height} with step {step} wants {need} bytes, got {}", raw.data.len())));
        }
        Ok(Self { raw, bytes })
    }

    /// Metres; not above 0 or not finite: none.
    fn at(&self, x: usize, y: usize) -> f32 {
        let b = &self.raw.data[y * self.raw.step as usize + x * self.bytes..][..self.bytes];
        match (b, self.raw.is_bigendian) {
            ([a, b], false) => f32::from(u16::from_le_bytes([*a, *b])) / 1000.0,
            ([a, b], true) => f32::from(u16::from_be_bytes([*a, *b])) / 1000.0,
            ([a, b, c, d], false) => f32::from_le_bytes([*a, *b, *c, *d]),
            ([a, b, c, d], true) => f32::from_be_bytes([*a, *b, *c, *d]),
            _ => f32::NAN,
        }
    }
}

/// Depth at points (x, y in pixels of an image of `size`) of a registered depth image of any size, metres; 0 where
/// there is none, or where the 3x3 around it spreads over more than a tenth: the edge of something, where a point may
/// lie on either side.
///
/// Errors: as [`median_depth_m`].
pub fn depths_at(raw: &RawImage, size: (u32, u32), points: &[[f32; 2]]) -> Result<Vec<f32>> {
    let depth = Depth::new(raw)?;
    let (width, height) = (raw.width as usize, raw.height as usize);
    let (sx, sy) = (width as f32 / size.0.max(1) as f32, height as f32 / size.1.max(1) as f32);
    let one = |p: &[f32; 2]| {
        // Centre on centre, whatever the scale.
        let along = |v: f32, scale: f32| ((v + 0.5) * scale - 0.5).round();
        let (x, y) = (along(p[0], sx), along(p[1], sy));
        if !(x >= 1.0 && y >= 1.0 && x + 1.0 < width as f32 && y + 1.0 < height as f32) {
            return 0.0;
        }
        let (x, y) = (x as usize, y as usize);
        let mut near: Vec<f32> = (y - 1..=y + 1).flat_map(|y| (x - 1..=x + 1).map(move |x| (x, y))).map(|(x, y)| depth.at(x, y)).collect();
        if !near.iter().all(|d| d.is_finite() && *d > 0.0) {
            return 0.0;
        }
        near.sort_by(f32::total_cmp);
        if near[8] - near[0] > 0.1 * near[4] {
            0.0
        } else {
            near[4]
        }
    };
    Ok(points.iter().map(one).collect())
}

/// Median of a depth image (`16UC1` in millimetres, `32FC1` in metres), metres, over a grid of some
/// thousand pixels. `None` where fewer than a tenth of them have a depth.
///
/// Errors: another encoding, a header that does not fit the data.
pub fn median_depth_m(raw: &RawImage) -> Result<Option<f32>> {
    let depth = Depth::new(raw)?;
    let (width, height) = (raw.width as usize, raw.height as usize);
    let (sx, sy) = (width.div_ceil(64), height.div_ceil(48));
    let grid = (0..height).step_by(sy).flat_map(|y| (0..width).step_by(sx).map(move |x| (x, y)));
    let (mut all, mut valid) = (0usize, Vec::new());
    for (x, y) in grid {
        all += 1;
        let metres = depth.at(x, y);
        if metres.is_finite() && metres > 0.0 {
            valid.push(metres);
        }
    }
    if valid.is_empty() || valid.len() * 10 < all {
        return Ok(None);
    }
    let middle = valid.len() / 2;
    Ok(Some(*valid.select_nth_unstable_by(middle, f32::total_cmp).1))
}

/// How an image lies in its message, which has all of it.
struct Form {
    layout: Layout,
    /// Bytes of a tight row.
    row: usize,
    rows: usize,
    step: usize,
}

impl Form {
    fn of(raw: &RawImage) -> Result<Self> {
        check_size(raw.width.into(), raw.height.into())?;
        let (width, height, step) = (raw.width as usize, raw.height as usize, raw.step as usize);
        let layout = Layout::of(raw.encoding)?;
        let (row, rows) = layout.rows(width, height)?;
        // nv24's chroma plane has rows of twice the luma's; its step counts luma bytes.
        let luma_row = layout.luma_row(width);
        if step < luma_row {
            return Err(Error::image(format!("step {step} is shorter than a row of {width} {} pixels ({luma_row} bytes)", raw.encoding)));
        }
        let (need, got) = (layout.total(step, height), raw.data.len());
        if (got as u64) < need {
            return Err(Error::image(format!("{width}x{height} {} with step {step} wants {need} bytes, got {got}", raw.encoding)));
        }
        Ok(Self { layout, row, rows, step })
    }
}

/// How an encoding lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    /// Interleaved 8-bit channels; positions of R, G, B.
    Channels(usize, [usize; 3]),
    Mono16,
    /// OpenCV's demosaicing code.
    Bayer(i32),
    /// Two bytes a pixel; OpenCV's code.
    Yuv422(i32),
    /// Luma plane, then interleaved VU at half size.
    Nv21,
    /// Luma plane, then interleaved VU at full size.
    Nv24,
}

impl Layout {
    fn of(encoding: &str) -> Result<Self> {
        Ok(match encoding {
            "rgb8" => Self::Channels(3, [0, 1, 2]),
            "bgr8" | "8UC3" => Self::Channels(3, [2, 1, 0]),
            "rgba8" => Self::Channels(4, [0, 1, 2]),
            "bgra8" => Self::Channels(4, [2, 1, 0]),
            "mono8" | "8UC1" => Self::Channels(1, [0, 0, 0]),
            "mono16" | "16UC1" => Self::Mono16,
            // OpenCV names a pattern by the second row's second and third pixel.
            "bayer_rggb8" => Self::Bayer(imgproc::COLOR_BayerBG2RGB),
            "bayer_bggr8" => Self::Bayer(imgproc::COLOR_BayerRG2RGB),
            "bayer_gbrg8" => Self::Bayer(imgproc::COLOR_BayerGR2RGB),
            "bayer_grbg8" => Self::Bayer(imgproc::COLOR_BayerGB2RGB),
            "yuv422" | "uyvy" => Self::Yuv422(imgproc::COLOR_YUV2RGB_UYVY),
            "yuv422_yuy2" | "yuyv" => Self::Yuv422(imgproc::COLOR_YUV2RGB_YUY2),
            "nv21" => Self::Nv21,
            "nv24" => Self::Nv24,
            other => {
                let encoding = other.chars().take(32).collect();
                return Err(Error::ImageEncoding { encoding, supported: SUPPORTED });
            }
        })
    }

    fn luma_row(self, width: usize) -> usize {
        match self {
            Self::Channels(n, _) => n * width,
            Self::Mono16 | Self::Yuv422(_) => 2 * width,
            Self::Bayer(_) | Self::Nv21 | Self::Nv24 => width,
        }
    }

    /// Bytes per tight row and number of rows.
    fn rows(self, width: usize, height: usize) -> Result<(usize, usize)> {
        let even = |what: &str, n: usize| {
            if n.is_multiple_of(2) {
                Ok(())
            } else {
                Err(Error::image(format!("{what} {n} must be even for this encoding")))
            }
        };
        match self {
            Self::Yuv422(_) => even("width", width)?,
            Self::Nv21 => {
                even("width", width)?;
                even("height", height)?;
            }
            Self::Bayer(_) if width < 3 || height < 3 => {
                return Err(Error::image(format!("{width}x{height} is too small to demosaic")));
            }
            _ => {}
        }
        Ok(match self {
            Self::Nv21 => (width, height + height / 2),
            Self::Nv24 => (width, 3 * height),
            _ => (self.luma_row(width), height),
        })
    }

    fn total(self, step: usize, height: usize) -> u64 {
        let (step, height) = (step as u64, height as u64);
        match self {
            Self::Nv21 => step * (height + height / 2),
            Self::Nv24 => step * height * 3,
            // The last row need not be padded.
            _ => step * height,
        }
    }

    fn to_rgb(self, tight: Vec<u8>, width: usize, height: usize, big_endian: bool) -> Result<Vec<u8>> {
        let convert = |tight: &[u8], rows: usize, channels: i32, code: i32| -> Result<Vec<u8>> {
            let out = converted(rows as u32, tight, channels, |image, out| imgproc::cvt_color_def(image, out, code))?;
            Ok(out.data_bytes()?.to_vec())
        };
        match self {
            Self::Channels(3, [0, 1, 2]) => Ok(tight),
            Self::Channels(n, order) => Ok(rgb_of(&tight, n, |p| order.map(|c| p[c]))),
            Self::Mono16 => {
                let high = usize::from(!big_endian);
                Ok(rgb_of(&tight, 2, |p| [p[high]; 3]))
            }
            Self::Bayer(code) => convert(&tight, height, 1, code),
            Self::Yuv422(code) => convert(&tight, height, 2, code),
            Self::Nv21 => convert(&tight, height + height / 2, 1, imgproc::COLOR_YUV2RGB_NV21),
            Self::Nv24 => {
                let (luma, chroma) = tight.split_at(width * height);
                Ok(luma.iter().zip(chroma.chunks_exact(2)).flat_map(|(y, vu)| yuv_to_rgb(*y, vu[1], vu[0])).collect())
            }
        }
    }
}

/// BT.601, limited range, as OpenCV converts nv21.
fn yuv_to_rgb(y: u8, u: u8, v: u8) -> [u8; 3] {
    let (y, u, v) = (1.164 * (f32::from(y) - 16.0).max(0.0), f32::from(u) - 128.0, f32::from(v) - 128.0);
    [y + 1.596 * v, y - 0.813 * v - 0.391 * u, y + 2.018 * u].map(|c| c.round().clamp(0.0, 255.0) as u8)
}

#[cfg(test)]
mod tests;
