//! From pixels of an image to rays of a calibrated camera.

use crate::error::Result;
use crate::image::Camera;
use opencv::calib3d;
use opencv::core::{no_array, Mat, Point2d, TermCriteria, TermCriteria_Type, Vector};
use opencv::prelude::*;

/// Rays x/z, y/z of `points` (pixels of an image of `size`), without distortion, and the mean focal length in pixels of
/// that image. `None`: the calibration cannot be used: no size, zeros, values that are not finite, another aspect ratio,
/// a distortion model that is not known.
pub fn rays(camera: &Camera, size: (u32, u32), points: &[[f64; 2]]) -> Result<Option<(Vec<[f64; 2]>, f64)>> {
    let Some((sx, sy)) = scale(camera, size) else { return Ok(None) };
    // Points of the scaled image at the calibration's own size.
    let distorted: Vector<Point2d> = points.iter().map(|p| Point2d::new(p[0] / sx, p[1] / sy)).collect();
    let k = Mat::from_slice(&camera.k)?;
    let k = k.reshape(1, 3)?;
    let d = Mat::from_slice(&camera.d)?;
    let mut out = Vector::<Point2d>::new();
    let none = no_array();
    // Enough for strong lenses; OpenCV stops at five.
    let until = TermCriteria::new(TermCriteria_Type::COUNT as i32 | TermCriteria_Type::EPS as i32, 40, 1e-10)?;
    if points.is_empty() {
    } else if is_fisheye(camera) {
        calib3d::fisheye_undistort_points(&distorted, &mut out, &k, &d, &none, &none, until)?;
    } else if camera.d.is_empty() {
        let [fx, _, cx, _, fy, cy, ..] = camera.k;
        out = distorted.iter().map(|p| Point2d::new((p.x - cx) / fx, (p.y - cy) / fy)).collect();
    } else {
        calib3d::undistort_points_iter(&distorted, &mut out, &k, &d, &none, &none, until)?;
    }
    let focal = (camera.k[0] * sx + camera.k[4] * sy) / 2.0;
    let rays: Vec<[f64; 2]> = out.iter().map(|p| [p.x, p.y]).collect();
    // A point where the model does not invert is no ray; none of them is used.
    let sound = rays.iter().flatten().all(|v| v.is_finite() && v.abs() < 1e3);
    Ok(sound.then_some((rays, focal)))
}

fn is_fisheye(camera: &Camera) -> bool {
    matches!(camera.distortion_model.as_str(), "equidistant" | "fisheye") && camera.d.len() == 4
}

/// Columns and rows of an image of `size` per column and row of the calibration; `None`: it cannot be used.
fn scale(camera: &Camera, size: (u32, u32)) -> Option<(f64, f64)> {
    let (sx, sy) = (f64::from(size.0) / f64::from(camera.width), f64::from(size.1) / f64::from(camera.height));
    let finite = camera.k.iter().chain(&camera.d).all(|v| v.is_finite());
    // Networks want sides that are multiples of 32: a few percent.
    let aspect = sx.is_finite() && sy.is_finite() && sx > 0.0 && sy > 0.0 && (sx / sy - 1.0).abs() < 0.1;
    let pinhole = camera.k[0] > 0.0 && camera.k[4] > 0.0 && camera.k[8] != 0.0;
    let known = match camera.distortion_model.as_str() {
        _ if camera.d.is_empty() => true,
        "equidistant" | "fisheye" => camera.d.len() == 4,
        "plumb_bob" | "rational_polynomial" => matches!(camera.d.len(), 4 | 5 | 8 | 12 | 14),
        _ => false,
    };
    (finite && aspect && pinhole && known).then_some((sx, sy))
}

/// Whether a driver left the calibration empty, as it does when there is none.
pub fn is_uncalibrated(camera: &Camera) -> bool {
    camera.k.iter().all(|v| *v == 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn camera(model: &str, d: &[f64]) -> Camera {
        let k = [500.0, 0.0, 320.0, 0.0, 510.0, 240.0, 0.0, 0.0, 1.0];
        Camera { width: 640, height: 480, k, d: d.to_vec(), distortion_model: model.into() }
    }

    #[test]
    fn rays_invert_the_lens_at_any_scale() {
        // The models forwards, written down again.
        let plumb = |x: f64, y: f64, d: &[f64]| {
            let r2 = x * x + y * y;
            let s = 1.0 + d[0] * r2 + d[1] * r2 * r2;
            (x * s + 2.0 * d[2] * x * y + d[3] * (r2 + 2.0 * x * x), y * s + d[2] * (r2 + 2.0 * y * y) + 2.0 * d[3] * x * y)
        };
        let fisheye = |x: f64, y: f64, d: &[f64]| {
            let r = x.hypot(y);
            let t = r.atan();
            let s = t * (1.0 + d[0] * t.powi(2) + d[1] * t.powi(4) + d[2] * t.powi(6) + d[3] * t.powi(8)) / r;
            (x * s, y * s)
        };
        let (dp, df) = ([-0.2, 0.05, 0.001, -0.002], [0.05, -0.01, 0.002, -0.0003]);
        for (x, y) in [(0.1, -0.2), (0.4, 0.3), (-0.5, 0.35)] {
            for (model, d, (u, v)) in
                [("plumb_bob", &dp, plumb(x, y, &dp)), ("equidistant", &df, fisheye(x, y, &df)), ("", &[0.0; 4], (x, y))]
            {
                let cam = camera(model, if model.is_empty() { &[] } else { d });
                // Half the size: every pixel coordinate is half.
                let p = [(500.0 * u + 320.0) / 2.0, (510.0 * v + 240.0) / 2.0];
                let (found, focal) = rays(&cam, (320, 240), &[p]).unwrap().unwrap();
                assert!((found[0][0] - x).abs() < 1e-5 && (found[0][1] - y).abs() < 1e-5, "{model}: {found:?} for {x} {y}");
                assert!((focal - 252.5).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn what_is_no_calibration_is_none() {
        let good = camera("plumb_bob", &[0.0; 5]);
        let none = |c: &Camera, size| rays(c, size, &[[1.0, 1.0]]).unwrap().is_none();
        assert!(!none(&good, (640, 480)) && none(&good, (640, 640)), "another aspect ratio");
        assert!(none(&Camera { k: [0.0; 9], ..good.clone() }, (640, 480)) && is_uncalibrated(&Camera { k: [0.0; 9], ..good.clone() }));
        assert!(none(&Camera { width: 0, ..good.clone() }, (640, 480)));
        assert!(none(&Camera { d: vec![f64::NAN; 5], ..good.clone() }, (640, 480)));
        assert!(none(&Camera { d: vec![0.0; 3], ..good.clone() }, (640, 480)));
        assert!(none(&Camera { distortion_model: "kannala".into(), ..good }, (640, 480)));
    }
}
