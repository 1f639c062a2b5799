//! The messages that a replay reads, and what writes them for the synthetic bags.

use super::cdr::{Reader, Writer};
use crate::error::{Error, Result};
use crate::image::{Camera, RawImage, RgbImage};
use nalgebra::{Isometry3, Quaternion, Translation3, UnitQuaternion};

/// `std_msgs/Header`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Stamp, nanoseconds.
    pub stamp_ns: i64,
    /// Frame of the data.
    pub frame_id: String,
}

impl Header {
    fn read(r: &mut Reader) -> Result<Self> {
        let (sec, nanosec) = (r.i32()?, r.u32()?);
        Ok(Self { stamp_ns: i64::from(sec) * 1_000_000_000 + i64::from(nanosec), frame_id: r.string()? })
    }

    fn write(&self, w: &mut Writer) {
        w.i32(self.stamp_ns.div_euclid(1_000_000_000) as i32).u32(self.stamp_ns.rem_euclid(1_000_000_000) as u32).string(&self.frame_id);
    }
}

/// The stamp of a message that begins with a header, without reading the rest.
pub fn stamp_of(bytes: &[u8]) -> Result<i64> {
    Header::read(&mut Reader::new(bytes)?).map(|h| h.stamp_ns)
}

/// A message that we can read and write.
pub trait Message: Sized {
    /// `package/msg/Name`.
    const TYPE: &'static str;
    /// From CDR. Errors name the byte.
    fn decode(bytes: &[u8]) -> Result<Self>;
    /// To CDR, little-endian.
    fn encode(&self) -> Vec<u8>;
}

/// `sensor_msgs/Image`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Stamp and frame.
    pub header: Header,
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
    /// Pixel encoding.
    pub encoding: String,
    /// Byte order of 16-bit encodings.
    pub is_bigendian: bool,
    /// Bytes per row.
    pub step: u32,
    /// Pixels.
    pub data: Vec<u8>,
}

impl Image {
    /// Header and picture, which stays in the message's own bytes where it can ([`RgbImage::from_message`]).
    ///
    /// Errors: it does not decode, or as [`RgbImage::from_raw`].
    pub fn picture(message: Vec<u8>) -> Result<(Header, RgbImage)> {
        RgbImage::from_message(message, Self::view)
    }

    fn view(bytes: &[u8]) -> Result<(Header, RawImage<'_>)> {
        let r = &mut Reader::new(bytes)?;
        let header = Header::read(r)?;
        let (height, width) = (r.u32()?, r.u32()?);
        Ok((header, RawImage { width, height, encoding: r.str()?, is_bigendian: r.bool()?, step: r.u32()?, data: r.bytes()? }))
    }

    /// As the image module takes it.
    pub fn raw(&self) -> RawImage<'_> {
        RawImage {
            width: self.width,
            height: self.height,
            encoding: &self.encoding,
            is_bigendian: self.is_bigendian,
            step: self.step,
            data: &self.data,
        }
    }
}

impl Message for Image {
    const TYPE: &'static str = "sensor_msgs/msg/Image";

    fn decode(bytes: &[u8]) -> Result<Self> {
        let (header, RawImage { width, height, encoding, is_bigendian, step, data }) = Self::view(bytes)?;
        Ok(Self { header, height, width, encoding: encoding.into(), is_bigendian, step, data: data.to_vec() })
    }

    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        self.header.write(&mut w);
        w.u32(self.height).u32(self.width).string(&self.encoding).u8(self.is_bigendian.into()).u32(self.step).bytes(&self.data);
        w.finish()
    }
}

/// `sensor_msgs/CompressedImage`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompressedImage {
    /// Stamp and frame.
    pub header: Header,
    /// What the publisher says of the data; the data itself decides.
    pub format: String,
    /// JPEG or PNG.
    pub data: Vec<u8>,
}

impl Message for CompressedImage {
    const TYPE: &'static str = "sensor_msgs/msg/CompressedImage";

    fn decode(bytes: &[u8]) -> Result<Self> {
        let r = &mut Reader::new(bytes)?;
        Ok(Self { header: Header::read(r)?, format: r.string()?, data: r.bytes()?.to_vec() })
    }

    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        self.header.write(&mut w);
        w.string(&self.format).bytes(&self.data);
        w.finish()
    }
}

/// `sensor_msgs/CameraInfo`, without binning and region of interest.
#[derive(Clone, Debug, PartialEq)]
pub struct CameraInfo {
    /// Stamp and frame.
    pub header: Header,
    /// The calibration.
    pub camera: Camera,
}

impl Message for CameraInfo {
    const TYPE: &'static str = "sensor_msgs/msg/CameraInfo";

    fn decode(bytes: &[u8]) -> Result<Self> {
        let r = &mut Reader::new(bytes)?;
        let header = Header::read(r)?;
        let (height, width) = (r.u32()?, r.u32()?);
        let distortion_model = r.string()?;
        let d = r.f64s()?;
        let k = r.f64_array()?;
        let (_r, _p): ([f64; 9], [f64; 12]) = (r.f64_array()?, r.f64_array()?);
        Ok(Self { header, camera: Camera { width, height, k, d, distortion_model } })
    }

    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        self.header.write(&mut w);
        let Camera { width, height, k, d, distortion_model } = &self.camera;
        w.u32(*height).u32(*width).string(distortion_model).f64s(d).f64_array(k);
        w.f64_array(&[1., 0., 0., 0., 1., 0., 0., 0., 1.]);
        w.f64_array(&[k[0], k[1], k[2], 0., k[3], k[4], k[5], 0., 0., 0., 1., 0.]);
        // Binning and region of interest: none.
        w.u32(0).u32(0).u32(0).u32(0).u32(0).u32(0).u8(0);
        w.finish()
    }
}

fn read_pose(r: &mut Reader) -> Result<Isometry3<f64>> {
    let [x, y, z, qx, qy, qz, qw] = r.f64_array()?;
    let bad = |what| Error::Cdr { offset: 0, reason: format!("pose: {what}") };
    if ![x, y, z].iter().all(|v| v.is_finite()) {
        return Err(bad("its position is not finite"));
    }
    let q = Quaternion::new(qw, qx, qy, qz);
    // A length that overflows leaves zeros, and a NaN stays one: neither has length 1.
    let q = UnitQuaternion::try_new(q, 1e-6).filter(|q| (q.coords.norm() - 1.0).abs() < 1e-6);
    let q = q.ok_or_else(|| bad("its quaternion has no length"))?;
    Ok(Isometry3::from_parts(Translation3::new(x, y, z), q))
}

fn write_pose(w: &mut Writer, p: &Isometry3<f64>) {
    let (t, q) = (p.translation.vector, p.rotation.coords);
    w.f64_array(&[t.x, t.y, t.z, q.x, q.y, q.z, q.w]);
}

/// `nav_msgs/Odometry`: the pose; covariance and twist are not read.
#[derive(Clone, Debug, PartialEq)]
pub struct Odometry {
    /// Stamp and the odometry frame.
    pub header: Header,
    /// Frame of the robot.
    pub child_frame_id: String,
    /// `T_odom_base`, metres.
    pub pose: Isometry3<f64>,
}

impl Message for Odometry {
    const TYPE: &'static str = "nav_msgs/msg/Odometry";

    fn decode(bytes: &[u8]) -> Result<Self> {
        let r = &mut Reader::new(bytes)?;
        Ok(Self { header: Header::read(r)?, child_frame_id: r.string()?, pose: read_pose(r)? })
    }

    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        self.header.write(&mut w);
        w.string(&self.child_frame_id);
        write_pose(&mut w, &self.pose);
        // Covariance of the pose, twist, its covariance: not known.
        w.f64_array(&[0.0; 36 + 6 + 36]);
        w.finish()
    }
}

/// `geometry_msgs/PoseStamped`.
#[derive(Clone, Debug, PartialEq)]
pub struct PoseStamped {
    /// Stamp and frame.
    pub header: Header,
    /// The pose, metres.
    pub pose: Isometry3<f64>,
}

impl Message for PoseStamped {
    const TYPE: &'static str = "geometry_msgs/msg/PoseStamped";

    fn decode(bytes: &[u8]) -> Result<Self> {
        let r = &mut Reader::new(bytes)?;
        Ok(Self { header: Header::read(r)?, pose: read_pose(r)? })
    }

    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        self.header.write(&mut w);
        write_pose(&mut w, &self.pose);
        w.finish()
    }
}

/// `sensor_msgs/NavSatFix`: position and whether there is a fix.
#[derive(Clone, Debug, PartialEq)]
pub struct NavSatFix {
    /// Stamp and frame.
    pub header: Header,
    /// -1 is no fix.
    pub status: i8,
    /// Degrees.
    pub latitude: f64,
    /// Degrees.
    pub longitude: f64,
    /// Metres above the ellipsoid.
    pub altitude: f64,
}

impl Message for NavSatFix {
    const TYPE: &'static str = "sensor_msgs/msg/NavSatFix";

    fn decode(bytes: &[u8]) -> Result<Self> {
        let r = &mut Reader::new(bytes)?;
        let (header, status) = (Header::read(r)?, r.i8()?);
        r.u16()?;
        Ok(Self { header, status, latitude: r.f64()?, longitude: r.f64()?, altitude: r.f64()? })
    }

    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        self.header.write(&mut w);
        w.u8(self.status as u8).u16(1).f64(self.latitude).f64(self.longitude).f64(self.altitude);
        w.f64_array(&[0.0; 9]).u8(0);
        w.finish()
    }
}

/// The definition of a type that we write, as MCAP's `ros2msg` schemas want it: the message, then
/// each type it uses behind a line of `=`.
pub fn definition(type_name: &str) -> Option<String> {
    const HEADER: (&str, &str) = ("std_msgs/Header", "builtin_interfaces/Time stamp\nstring frame_id\n");
    const TIME: (&str, &str) = ("builtin_interfaces/Time", "int32 sec\nuint32 nanosec\n");
    const POSE: (&str, &str) = ("geometry_msgs/Pose", "geometry_msgs/Point position\ngeometry_msgs/Quaternion orientation\n");
    const POINT: (&str, &str) = ("geometry_msgs/Point", "float64 x\nfloat64 y\nfloat64 z\n");
    const QUATERNION: (&str, &str) = ("geometry_msgs/Quaternion", "float64 x 0\nfloat64 y 0\nfloat64 z 0\nfloat64 w 1\n");
    let (body, uses): (&str, &[(&str, &str)]) = match type_name {
        "sensor_msgs/msg/Image" => (
            "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\nuint8[] data\n",
            &[HEADER, TIME],
        ),
        "sensor_msgs/msg/CompressedImage" => ("std_msgs/Header header\nstring format\nuint8[] data\n", &[HEADER, TIME]),
        "sensor_msgs/msg/CameraInfo" => (
            "std_msgs/Header header\nuint32 height\nuint32 width\nstring distortion_model\nfloat64[] d\nfloat64[9] k\nfloat64[9] r\nfloat64[12] p\nuint32 binning_x\nuint32 binning_y\nsensor_msgs/RegionOfInterest roi\n",
            &[HEADER, TIME, ("sensor_msgs/RegionOfInterest", "uint32 x_offset\nuint32 y_offset\nuint32 height\nuint32 width\nbool do_rectify\n")],
        ),
        "nav_msgs/msg/Odometry" => (
            "std_msgs/Header header\nstring child_frame_id\ngeometry_msgs/PoseWithCovariance pose\ngeometry_msgs/TwistWithCovariance twist\n",
            &[
                HEADER,
                TIME,
                ("geometry_msgs/PoseWithCovariance", "geometry_msgs/Pose pose\nfloat64[36] covariance\n"),
                POSE,
                POINT,
                QUATERNION,
                ("geometry_msgs/TwistWithCovariance", "geometry_msgs/Twist twist\nfloat64[36] covariance\n"),
                ("geometry_msgs/Twist", "geometry_msgs/Vector3 linear\ngeometry_msgs/Vector3 angular\n"),
                ("geometry_msgs/Vector3", "float64 x\nfloat64 y\nfloat64 z\n"),
            ],
        ),
        "geometry_msgs/msg/PoseStamped" => ("std_msgs/Header header\ngeometry_msgs/Pose pose\n", &[HEADER, TIME, POSE, POINT, QUATERNION]),
        "sensor_msgs/msg/NavSatFix" => (
            "std_msgs/Header header\nsensor_msgs/NavSatStatus status\nfloat64 latitude\nfloat64 longitude\nfloat64 altitude\nfloat64[9] position_covariance\nuint8 position_covariance_type\n",
            &[HEADER, TIME, ("sensor_msgs/NavSatStatus", "int8 status\nuint16 service\n")],
        ),
        _ => return None,
    };
    let mut text = body.to_string();
    for (name, definition) in uses {
        text += &format!("{}\nMSG: {name}\n{definition}", "=".repeat(80));
    }
    Some(text)
}
