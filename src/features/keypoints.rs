//! From what a network says of every cell to points with descriptors, as the references do.

use crate::error::Result;
use crate::model::{Architecture, Dense, CELL};
use crate::team::chunks;

/// How points are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Detection {
    /// Points at most, the strongest.
    pub max_points: usize,
    /// Probability that a pixel is a point, at least.
    pub threshold: f32,
    /// No two points are this near or nearer along both axes, pixels.
    pub radius: usize,
    /// Rounds in which what lies near no chosen point is looked at again.
    pub rounds: usize,
    /// Points nearer to the edge of the image are dropped, pixels.
    pub border: usize,
    /// Moves each point to the top of the parabola through its neighbours' probabilities.
    pub subpixel: bool,
}

impl Detection {
    /// The settings of the network's authors, with `max_points`.
    pub fn of(architecture: Architecture, max_points: usize) -> Self {
        match architecture {
            // "accelerated_features", detectAndCompute.
            Architecture::Xfeat => Self { max_points, threshold: 0.05, radius: 2, rounds: 0, border: 4, subpixel: false },
            // "SuperGluePretrainedNetwork", SuperPoint.
            _ => Self { max_points, threshold: 0.005, radius: 4, rounds: 2, border: 4, subpixel: false },
        }
    }
}

/// Points (x, y), scores, and a descriptor row each.
pub type Points = (Vec<[f32; 2]>, Vec<f32>, Vec<f32>);

/// Chooses points and samples their descriptors; best first, ties in order of place.
///
/// Errors: tensors of other shapes than the network's.
pub fn points(dense: &Dense, architecture: Architecture, config: &Detection) -> Result<Points> {
    let (_, rows, columns) = dense.logits.dims3()?;
    let (height, width) = (rows * CELL, columns * CELL);
    let heat = heatmap(&dense.logits.flatten_all()?.to_vec1::<f32>()?, rows, columns);
    let chosen = suppress(&heat, height, width, config.radius, config.rounds);
    let reliability = dense.reliability.as_ref().map(|r| r.flatten_all()?.to_vec1::<f32>()).transpose()?;
    let mut found: Vec<(f32, usize, usize)> = Vec::new();
    for y in config.border..height.saturating_sub(config.border) {
        for x in config.border..width.saturating_sub(config.border) {
            let at = y * width + x;
            if chosen[at] && heat[at] > config.threshold {
                let sure = match &reliability {
                    Some(r) => {
                        let p = half_pixel([x as f32, y as f32], (width, height), (columns, rows));
                        let mut out = [0f32];
                        bilinear(r, (columns, rows), p, &mut out);
                        out[0]
                    }
                    None => 1.0,
                };
                found.push((heat[at] * sure, y, x));
            }
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    found.truncate(config.max_points);
    let points: Vec<[f32; 2]> =
        found.iter().map(|(_, y, x)| if config.subpixel { refine(&heat, width, height, *x, *y) } else { [*x as f32, *y as f32] }).collect();
    let dim = dense.descriptors.dim(0)?;
    // Cell after cell, so that a point reads whole rows.
    let cells = dense.descriptors.permute((1, 2, 0))?.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
    let mut descriptors = vec![0f32; points.len() * dim];
    chunks(&mut descriptors, TOGETHER * dim, |at, out| {
        for (out, p) in out.chunks_mut(dim).zip(&points[at * TOGETHER..]) {
            match architecture {
                Architecture::Xfeat => bicubic(&cells, (columns, rows), half_pixel(*p, (width, height), (columns, rows)), out),
                _ => bilinear(&cells, (columns, rows), cell_centres(*p, (width, height), (columns, rows)), out),
            }
        }
    });
    Ok((points, found.into_iter().map(|(s, ..)| s).collect(), descriptors))
}

/// Softmax over the 64 pixels of a cell and the dustbin, laid out as an image of 8 rows x 8 columns per cell.
fn heatmap(logits: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let cells = rows * columns;
    let width = columns * CELL;
    let mut heat = vec![0f32; cells * CELL * CELL];
    let row_of_cells = |row: usize, out: &mut [f32]| {
        for column in 0..columns {
            let logit = |k: usize| logits[k * cells + row * columns + column];
            let top = (0..=CELL * CELL).map(logit).fold(f32::NEG_INFINITY, f32::max);
            let values: [f32; CELL * CELL + 1] = std::array::from_fn(|k| (logit(k) - top).exp());
            let sum: f32 = values.iter().sum();
            for k in 0..CELL * CELL {
                out[k / CELL * width + column * CELL + k % CELL] = values[k] / sum;
            }
        }
    };
    chunks(&mut heat, width * CELL, row_of_cells);
    heat
}

/// Rows, or points, of a task.
const TOGETHER: usize = 16;

/// The largest value within `radius` along both axes.
fn max_filter(values: &[f32], height: usize, width: usize, radius: usize) -> Vec<f32> {
    let mut along = values.to_vec();
    let larger = |to: &mut [f32], from: &[f32]| to.iter_mut().zip(from).for_each(|(t, f)| *t = t.max(*f));
    let across = |at: usize, out: &mut [f32]| {
        for (out, row) in out.chunks_mut(width).zip(values[at * TOGETHER * width..].chunks(width)) {
            for shift in 1..=radius.min(width.saturating_sub(1)) {
                larger(&mut out[shift..], &row[..width - shift]);
                larger(&mut out[..width - shift], &row[shift..]);
            }
        }
    };
    chunks(&mut along, TOGETHER * width, across);
    let mut out = along.clone();
    let down = |at: usize, out: &mut [f32]| {
        for (y, out) in out.chunks_mut(width).enumerate() {
            let y = at * TOGETHER + y;
            for near in y.saturating_sub(radius)..(y + radius + 1).min(height) {
                larger(out, &along[near * width..][..width]);
            }
        }
    };
    chunks(&mut out, TOGETHER * width, down);
    out
}

/// Local maxima. In each further round those among what lies near none that was chosen are chosen too (the references'
/// `simple_nms`).
fn suppress(heat: &[f32], height: usize, width: usize, radius: usize, rounds: usize) -> Vec<bool> {
    let top = |values: &[f32]| max_filter(values, height, width, radius);
    let mut chosen: Vec<bool> = heat.iter().zip(top(heat)).map(|(v, m)| *v == m).collect();
    for _ in 0..rounds {
        let mask: Vec<f32> = chosen.iter().map(|c| f32::from(u8::from(*c))).collect();
        let near: Vec<bool> = top(&mask).into_iter().map(|m| m > 0.0).collect();
        let rest: Vec<f32> = heat.iter().zip(&near).map(|(v, near)| if *near { 0.0 } else { *v }).collect();
        let tops = top(&rest);
        for (at, chosen) in chosen.iter_mut().enumerate() {
            *chosen |= !near[at] && rest[at] == tops[at];
        }
    }
    chosen
}

/// The top of the parabola through three probabilities, along each axis [ours].
fn refine(heat: &[f32], width: usize, height: usize, x: usize, y: usize) -> [f32; 2] {
    let top = |before: f32, at: f32, after: f32| {
        let bend = before - 2.0 * at + after;
        if bend < 0.0 {
            (0.5 * (before - after) / bend).clamp(-0.5, 0.5)
        } else {
            0.0
        }
    };
    if x == 0 || y == 0 || x + 1 >= width || y + 1 >= height {
        return [x as f32, y as f32];
    }
    let v = |x: usize, y: usize| heat[y * width + x];
    [x as f32 + top(v(x - 1, y), v(x, y), v(x + 1, y)), y as f32 + top(v(x, y - 1), v(x, y), v(x, y + 1))]
}

/// Pixels to cells as SuperPoint's reference does: cell centres lie at 3.5, 11.5, ... and the last cell's centre where
/// `align_corners` puts it.
fn cell_centres(p: [f32; 2], image: (usize, usize), cells: (usize, usize)) -> [f32; 2] {
    let half = CELL as f32 / 2.0 - 0.5;
    let along = |v: f32, pixels: usize, cells: usize| (v - half) / (pixels as f32 - half - 1.0) * (cells as f32 - 1.0);
    [along(p[0], image.0, cells.0), along(p[1], image.1, cells.1)]
}

/// Pixels to cells as XFeat's reference does: `x / (W - 1)` by `grid_sample` without `align_corners`.
fn half_pixel(p: [f32; 2], image: (usize, usize), cells: (usize, usize)) -> [f32; 2] {
    let along = |v: f32, pixels: usize, cells: usize| v / (pixels as f32 - 1.0) * cells as f32 - 0.5;
    [along(p[0], image.0, cells.0), along(p[1], image.1, cells.1)]
}

/// Adds `weight` times cell (x, y) to `out`; outside there is nothing (`padding_mode` zeros).
fn add(values: &[f32], (columns, rows): (usize, usize), x: i64, y: i64, weight: f32, out: &mut [f32]) {
    if (0..columns as i64).contains(&x) && (0..rows as i64).contains(&y) {
        let cell = &values[(y as usize * columns + x as usize) * out.len()..][..out.len()];
        out.iter_mut().zip(cell).for_each(|(o, v)| *o += weight * v);
    }
}

fn bilinear(values: &[f32], cells: (usize, usize), p: [f32; 2], out: &mut [f32]) {
    let (x, y) = (p[0].floor(), p[1].floor());
    let (a, b) = (p[0] - x, p[1] - y);
    for (dx, dy, weight) in [(0, 0, (1.0 - a) * (1.0 - b)), (1, 0, a * (1.0 - b)), (0, 1, (1.0 - a) * b), (1, 1, a * b)] {
        add(values, cells, x as i64 + dx, y as i64 + dy, weight, out);
    }
}

fn bicubic(values: &[f32], cells: (usize, usize), p: [f32; 2], out: &mut [f32]) {
    // Keys' kernel with PyTorch's a = -0.75.
    let weights = |t: f32| {
        const A: f32 = -0.75;
        let near = |t: f32| ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0;
        let far = |t: f32| ((A * t - 5.0 * A) * t + 8.0 * A) * t - 4.0 * A;
        [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)]
    };
    let (x, y) = (p[0].floor(), p[1].floor());
    let (wx, wy) = (weights(p[0] - x), weights(p[1] - y));
    for (dy, wy) in wy.into_iter().enumerate() {
        for (dx, wx) in wx.into_iter().enumerate() {
            add(values, cells, x as i64 + dx as i64 - 1, y as i64 + dy as i64 - 1, wx * wy, out);
        }
    }
}
