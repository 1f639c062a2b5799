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

/// The pair at the size of the smaller image, in a frame of green (accepted), amber (pending) or red.
pub fn side_by_side(query: &RgbImage, matched: &RgbImage, candidate: &Candidate) -> Result<RgbImage> {
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
    let margin = candidate.margin.map_or("-".into(), |m| format!("{m:.3}"));
    let text =
        format!("{}  sim {:.3}  margin {margin}  chain {}", candidate.standing.name(), candidate.similarity, candidate.consistent_count);
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
