//! Messages from bytes: round trips, golden bytes, and bytes that nobody meant.

use nalgebra::{Isometry3, Translation3, UnitQuaternion};
use proptest::prelude::*;
use structvpr::bag::messages::*;
use structvpr::image::Camera;

fn header() -> impl Strategy<Value = Header> {
    (any::<i32>(), 0u32..1_000_000_000, "[a-z_/]{0,12}")
        .prop_map(|(s, n, frame_id)| Header { stamp_ns: i64::from(s) * 1_000_000_000 + i64::from(n), frame_id })
}

fn pose() -> impl Strategy<Value = Isometry3<f64>> {
    (-1e5f64..1e5, -1e5f64..1e5, -1e3f64..1e3, -3.1f64..3.1, -1.5f64..1.5, -3.1f64..3.1)
        .prop_map(|(x, y, z, r, p, w)| Isometry3::from_parts(Translation3::new(x, y, z), UnitQuaternion::from_euler_angles(r, p, w)))
}

fn same<M: Message + PartialEq + std::fmt::Debug>(m: &M) -> Result<(), TestCaseError> {
    prop_assert_eq!(&M::decode(&m.encode())?, m);
    Ok(())
}

fn near(a: &Isometry3<f64>, b: &Isometry3<f64>) -> bool {
    (a.translation.vector - b.translation.vector).norm() < 1e-9 && a.rotation.angle_to(&b.rotation) < 1e-7
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn what_is_written_is_read(h in header(), p in pose(), data in proptest::collection::vec(any::<u8>(), 0..50), text in "[a-z0-9; ]{0,9}", d in proptest::collection::vec(-1f64..1.0, 0..9), n in any::<u32>()) {
        same(&Image { header: h.clone(), height: n, width: 3, encoding: text.clone(), is_bigendian: n % 2 == 0, step: n, data: data.clone() })?;
        same(&CompressedImage { header: h.clone(), format: text.clone(), data })?;
        let k = [1.0, 0.0, 2.0, 0.0, 3.0, 4.0, 0.0, 0.0, 1.0];
        same(&CameraInfo { header: h.clone(), camera: Camera { width: n, height: 7, k, d, distortion_model: text.clone() } })?;
        same(&NavSatFix { header: h.clone(), status: -1, latitude: 1.5, longitude: -2.5, altitude: 3.0 })?;
        let o = Odometry { header: h.clone(), child_frame_id: text, pose: p };
        prop_assert!(near(&Odometry::decode(&o.encode())?.pose, &p));
        let s = PoseStamped { header: h, pose: p };
        prop_assert!(near(&PoseStamped::decode(&s.encode())?.pose, &p));
    }
}

fn decode_all(bytes: &[u8]) {
    let _ = Image::decode(bytes).map(|i| structvpr::image::RgbImage::from_raw(&i.raw()));
    let _ = CompressedImage::decode(bytes).map(|i| structvpr::image::RgbImage::decode(&i.data));
    let _ = CameraInfo::decode(bytes);
    let _ = Odometry::decode(bytes);
    let _ = PoseStamped::decode(bytes);
    let _ = NavSatFix::decode(bytes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]
    #[test]
    fn random_and_mutated_bytes_never_panic_nor_allocate_much(mut bytes in proptest::collection::vec(any::<u8>(), 0..160), kind in 0usize..4, at in 0usize..400, flip in 1u8..=255, cut in 0usize..400) {
        decode_all(&bytes);
        if bytes.len() > 4 { bytes[..4].copy_from_slice(&[0, u8::from(kind % 2 == 0), 0, 0]); }
        decode_all(&bytes);
        let h = Header { stamp_ns: 5, frame_id: "cam".into() };
        let mut good = match kind {
            0 => Image { header: h, height: 2, width: 2, encoding: "rgb8".into(), is_bigendian: false, step: 6, data: vec![1; 12] }.encode(),
            1 => CompressedImage { header: h, format: "png".into(), data: vec![2; 40] }.encode(),
            2 => Odometry { header: h, child_frame_id: "b".into(), pose: Isometry3::identity() }.encode(),
            _ => CameraInfo { header: h, camera: Camera { width: 2, height: 2, k: [1.0; 9], d: vec![0.0; 5], distortion_model: "plumb_bob".into() } }.encode(),
        };
        decode_all(&good[..cut % good.len()]);
        let n = good.len();
        good[at % n] ^= flip;
        decode_all(&good);
        prop_assert!(crate::alloc::largest() < 64 << 20, "{} bytes at once", crate::alloc::largest());
    }
}

#[test]
fn big_endian_and_foreign_encodings() {
    // A PoseStamped by hand, big-endian: stamp 1.000000002 s, frame "m", x = 1, quaternion w = 1.
    let mut b = vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, b'm', 0];
    b.resize(4 + 16, 0);
    for v in [1f64, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0] {
        b.resize(4 + (b.len() - 4).next_multiple_of(8), 0);
        b.extend_from_slice(&v.to_be_bytes());
    }
    let p = PoseStamped::decode(&b).unwrap();
    assert_eq!((p.header.stamp_ns, p.header.frame_id.as_str(), p.pose.translation.x), (1_000_000_002, "m", 1.0));
    b[1] = 7;
    assert!(PoseStamped::decode(&b).unwrap_err().to_string().contains("0007 is not plain CDR"));
    let cut = PoseStamped::decode(&[0, 1, 0, 0, 1, 0, 0, 0]).unwrap_err().to_string();
    assert!(cut.contains("at byte 8") && cut.contains("wants 4 bytes, 0 are left"), "{cut}");
}

/// Found by a mutated message: the length overflowed, the quaternion became zero, and passed as a rotation.
#[test]
fn a_quaternion_whose_length_overflows_is_refused() {
    let header = Header { stamp_ns: 1, frame_id: "odom".into() };
    let good = Odometry { header, child_frame_id: "base".into(), pose: nalgebra::Isometry3::identity() }.encode();
    let one = good.windows(8).position(|w| w == 1f64.to_le_bytes()).unwrap();
    let mut bad = good.clone();
    bad[one..one + 8].copy_from_slice(&1e200f64.to_le_bytes());
    assert!(Odometry::decode(&good).is_ok());
    let said = Odometry::decode(&bad).unwrap_err().to_string();
    assert!(said.contains("quaternion"), "{said}");
}
