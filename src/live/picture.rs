//! Query and match side by side, with what became of them.

use super::candidate::{Candidate, Standing};
use crate::error::Result;
use crate::image::RgbImage;
use opencv::core::{Mat, MatTraitConstManual, Point, Rect, Scalar, Size};
use opencv::imgproc;
use opencv::prelude::*;

/// Height of the caption, pixels.
const CAPTION: i32 = 22;
const EDGE: i32 = 3;

/// Lines that are drawn at most: more would hide the images.
const LINES: usize = 100;

/// A point of the query and one of the match, as shares of width and height.
pub type Line = ([f32; 2], [f32; 2]);

/// The pair at the size of the smaller image, in a frame of green (accepted), amber (pending) or red; `lines` join what
/// agrees.
pub fn side_by_side(query: &RgbImage, matched: &RgbImage, candidate: &Candidate, lines: &[Line]) -> Result<RgbImage> {
    let (w, h) = (matched.width(), matched.height());
    let query = query.resize_area(w, h)?;
    let colour = match candidate.standing {
        Standing::Accepted => Scalar::new(40.0, 170.0, 60.0, 0.0),
        Standing::Pending => Scalar::new(230.0, 160.0, 20.0, 0.0),
        Standing::Rejected(_) => Scalar::new(200.0, 40.0, 40.0, 0.0),
    };
    let (cw, ch) = (w as i32, h as i32);
    let size = Size::new(2 * cw + 3 * EDGE, ch + CAPTION + EDGE);
    let mut canvas = Mat::new_size_with_default(size, opencv::core::CV_8UC3, colour)?;
    for (i, image) in [&query, matched].into_iter().enumerate() {
        let pixels = Mat::from_slice(image.data())?.reshape(3, ch)?.try_clone()?;
        let at = Rect::new(EDGE + i as i32 * (cw + EDGE), CAPTION, cw, ch);
        pixels.copy_to(&mut canvas.roi_mut(at)?)?;
    }
    for (i, (q, m)) in lines.iter().step_by(lines.len().div_ceil(LINES).max(1)).enumerate() {
        let at = |p: &[f32; 2], left: i32| Point::new(left + (p[0] * w as f32) as i32, CAPTION + (p[1] * h as f32) as i32);
        // Hues that neighbours do not share.
        let hue = i as f64 * 2.4;
        let colour = Scalar::new(140.0 + 110.0 * hue.sin(), 140.0 + 110.0 * (hue + 2.1).sin(), 140.0 + 110.0 * (hue + 4.2).sin(), 0.0);
        let (a, b) = (at(q, EDGE), at(m, 2 * EDGE + cw));
        imgproc::line(&mut canvas, a, b, colour, 1, imgproc::LINE_AA, 0)?;
        for p in [a, b] {
            imgproc::circle(&mut canvas, p, 2, colour, 1, imgproc::LINE_AA, 0)?;
        }
    }
    let margin = candidate.margin.map_or("-".into(), |m| format!("{m:.3}"));
    let inliers = candidate.checked.map_or(String::new(), |c| match c.failure {
        Some(failure) => format!("  {}", failure.name()),
        None => format!("  inliers {}", c.inliers),
    });
    let (name, count) = (candidate.standing.name(), candidate.consistent_count);
    let text = format!("{name}  sim {:.3}  margin {margin}  chain {count}{inliers}", candidate.similarity);
    // As large as fits the width.
    let mut scale = 0.5;
    let mut baseline = 0;
    let wide = imgproc::get_text_size(&text, imgproc::FONT_HERSHEY_SIMPLEX, scale, 1, &mut baseline)?.width;
    scale *= f64::from(size.width - 2 * EDGE) / f64::from(wide.max(size.width - 2 * EDGE));
    let white = Scalar::new(255.0, 255.0, 255.0, 0.0);
    let at = Point::new(EDGE, CAPTION - 7);
    imgproc::put_text(&mut canvas, &text, at, imgproc::FONT_HERSHEY_SIMPLEX, scale, white, 1, imgproc::LINE_AA, false)?;
    RgbImage::new(size.width as u32, size.height as u32, canvas.data_bytes()?.to_vec())
}
