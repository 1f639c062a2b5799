//! The report of a run: one HTML file that needs nothing else, drawn with plotters.

use super::{LoopScores, PrCurve, Verdict};
use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::map::Index;
use base64::Engine;
use plotters::prelude::*;
use std::fmt::Write as _;

/// Two images that were, or should have been, matched.
#[derive(Clone, Debug)]
pub struct Pair {
    /// What to say of it.
    pub caption: String,
    /// Whether it is good news.
    pub good: bool,
    /// The query; `None` if it could not be read again.
    pub query: Option<RgbImage>,
    /// The match.
    pub matched: Option<RgbImage>,
}

/// An accepted closure, by rows of the map.
#[derive(Clone, Copy, Debug)]
pub struct DrawnClosure {
    /// Row of the query.
    pub query: usize,
    /// Row of the match.
    pub matched: usize,
    /// What the truth says.
    pub verdict: Verdict,
}

/// All that the report shows.
#[derive(Debug)]
pub struct ReportData<'a> {
    /// Heading.
    pub title: &'a str,
    /// Name and value, in order.
    pub summary: Vec<(String, String)>,
    /// Position of each row of the map, metres; `None` where not known.
    pub positions: Vec<Option<(f64, f64)>>,
    /// Where the positions are from.
    pub positions_from: &'a str,
    /// Accepted closures.
    pub closures: Vec<DrawnClosure>,
    /// Descriptors of the map.
    pub index: &'a Index,
    /// Over the similarity, where there is a truth.
    pub curve: Option<PrCurve>,
    /// Threshold in use, drawn into the curve.
    pub threshold: f32,
    /// Scores, where there is a truth.
    pub scores: Option<LoopScores>,
    /// Outcome or reason, and how often it struck.
    pub reasons: Vec<(String, u64)>,
    /// Best first.
    pub best: Vec<Pair>,
    /// Worst first.
    pub worst: Vec<Pair>,
    /// In words.
    pub warnings: Vec<String>,
}

const GREEN: RGBColor = RGBColor(22, 128, 61);
const RED: RGBColor = RGBColor(200, 30, 30);
const GREY: RGBColor = RGBColor(120, 125, 135);
const BLUE: RGBColor = RGBColor(37, 99, 180);
/// Most rows and columns of the similarity matrix that are drawn.
const MATRIX: usize = 480;
/// Width of the image pairs, pixels.
const PAIR_WIDTH: u32 = 300;

const STYLE: &str = "
body{font:15px/1.5 system-ui,sans-serif;color:#1c2430;background:#f6f7f9;margin:0}
main{max-width:1080px;margin:0 auto;padding:24px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:0 0 8px}
section{min-width:0;background:#fff;border:1px solid #dfe3ea;border-radius:8px;padding:18px 20px;margin:16px 0}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:16px}.row section{margin:0}
table{border-collapse:collapse}td{padding:2px 18px 2px 0;vertical-align:top}td:first-child{color:#5b6472}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(460px,100%),1fr));gap:14px}
.pair{border-left:4px solid #16803d;padding-left:10px}.pair.bad{border-color:#c81e1e}
.pair div{display:flex;gap:4px}.pair img{width:50%;min-width:0;border-radius:3px}.pair p{margin:4px 0 0;font-size:13px;color:#3c4450}
.big{display:flex;gap:36px;flex-wrap:wrap;margin:10px 0 0}.big b{display:block;font-size:28px;line-height:1.2}.big span{color:#5b6472;font-size:13px}
svg{max-width:100%;height:auto}.note{color:#5b6472;font-size:13px}.warn{border-color:#d9a400;background:#fffaf0}
";

fn plot_error(e: impl std::fmt::Display) -> Error {
    Error::Image { reason: format!("plot: {e}") }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn data_uri(kind: &str, bytes: &[u8]) -> String {
    format!("data:image/{kind};base64,{}", base64::engine::general_purpose::STANDARD.encode(bytes))
}

/// The whole file. The same data gives the same bytes.
///
/// Errors: an image that does not encode.
pub fn html(data: &ReportData) -> Result<String> {
    let mut h = String::from(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">",
    );
    let _ = write!(h, "<title>{}</title><style>{STYLE}</style></head><body><main>", escape(data.title));
    let _ = write!(h, "<h1>{}</h1>", escape(data.title));
    headline(&mut h, data);
    if !data.warnings.is_empty() {
        h += "<section class=\"warn\"><h2>Warnings</h2><ul>";
        data.warnings.iter().for_each(|w| {
            let _ = write!(h, "<li>{}</li>", escape(w));
        });
        h += "</ul></section>";
    }
    h += "<div class=\"row\">";
    section(&mut h, "Trajectory and closures", &trajectory(data)?, &trajectory_note(data));
    section(
        &mut h,
        "Similarity matrix",
        &similarity_matrix(data)?,
        "Cosine similarity of each keyframe (row) with each earlier one (column); accepted closures are circled.",
    );
    if let Some(curve) = &data.curve {
        let note = format!(
            "Best match of every keyframe by similarity alone, before margin and consistency. Average precision {:.3}, recall at 100 % precision {:.3}. The point marks the threshold in use, {:.3}.",
            curve.average_precision, curve.recall_at_100_precision, data.threshold
        );
        section(&mut h, "Precision and recall", &pr_plot(curve, data.threshold)?, &note);
    }
    section(
        &mut h,
        "What became of the images",
        &reasons_plot(&data.reasons)?,
        "Every image is counted once. `structvpr doctor` says which setting each reason hangs on.",
    );
    h += "</div>";
    pairs(&mut h, "Best matches", &data.best)?;
    pairs(&mut h, "Worst matches", &data.worst)?;
    h += "<section><h2>Run</h2><table>";
    for (name, value) in &data.summary {
        let _ = write!(h, "<tr><td>{}</td><td>{}</td></tr>", escape(name), escape(value));
    }
    h += "</table></section></main></body></html>\n";
    Ok(h)
}

fn headline(h: &mut String, data: &ReportData) {
    let mut big = |value: String, what: &str| {
        let _ = write!(h, "<div><b>{value}</b><span>{what}</span></div>");
    };
    let open = "<div class=\"big\">";
    match &data.scores {
        Some(s) => {
            big(format!("{} of {}", s.true_closures, s.possible), "possible loops found");
            big(format!("{:.1} %", 100.0 * s.found_share), "of the possible");
            big(s.false_closures.to_string(), "false closures");
            big(format!("{:.2} km", s.path_km), "path");
        }
        None => {
            big(data.closures.len().to_string(), "closures");
            big(data.index.len().to_string(), "keyframes in the map");
        }
    }
    // `big` writes the boxes; the row that holds them opens before the first.
    if let Some(at) = h.find("<div><b>") {
        h.insert_str(at, open);
    }
    *h += "</div>";
}

fn section(h: &mut String, title: &str, body: &str, note: &str) {
    let _ = write!(h, "<section><h2>{title}</h2>{body}<p class=\"note\">{}</p></section>", escape(note));
}

fn trajectory_note(data: &ReportData) -> String {
    let drawn = if data.scores.is_some() { "Green: right, red: wrong." } else { "No truth is known, so closures are blue." };
    format!("Positions from {}. {drawn} Dashed grey: where the map was only passed.", data.positions_from)
}

fn color(verdict: Verdict) -> RGBColor {
    match verdict {
        Verdict::True => GREEN,
        Verdict::False => RED,
        _ => BLUE,
    }
}

/// Lowest and highest, a little widened, never empty.
fn span(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (lo, hi) = values.fold((f64::MAX, f64::MIN), |(lo, hi), v| (lo.min(v), hi.max(v)));
    if lo > hi {
        return (0.0, 1.0);
    }
    let pad = ((hi - lo) * 0.06).max(1.0);
    (lo - pad, hi + pad)
}

fn trajectory(data: &ReportData) -> Result<String> {
    let known: Vec<(f64, f64)> = data.positions.iter().flatten().copied().collect();
    if known.is_empty() {
        return Ok("<p>No positions: the run has neither odometry nor a ground truth.</p>".into());
    }
    let (mut x, mut y) = (span(known.iter().map(|p| p.0)), span(known.iter().map(|p| p.1)));
    const SIZE: (f64, f64) = (470.0, 400.0);
    // Equal scales on both axes.
    let scale = ((x.1 - x.0) / SIZE.0).max((y.1 - y.0) / SIZE.1);
    let widen = |r: (f64, f64), n: f64| {
        let (middle, half) = ((r.0 + r.1) / 2.0, scale * n / 2.0);
        (middle - half, middle + half)
    };
    (x, y) = (widen(x, SIZE.0), widen(y, SIZE.1));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (540, 450)).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(58)
            .build_cartesian_2d(x.0..x.1, y.0..y.1)
            .map_err(plot_error)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GREY.mix(0.15))
            .x_desc("x, m")
            .y_desc("y, m")
            .draw()
            .map_err(plot_error)?;
        let stretches: Vec<Vec<(f64, f64)>> = data
            .positions
            .split(|p| p.is_none())
            .map(|s| s.iter().flatten().copied().collect())
            .filter(|s: &Vec<_>| !s.is_empty())
            .collect();
        for s in stretches {
            chart.draw_series(DashedLineSeries::new(s.iter().copied(), 3, 3, GREY.mix(0.8).stroke_width(1))).map_err(plot_error)?;
            chart.draw_series(s.iter().map(|p| Circle::new(*p, 1, GREY.filled()))).map_err(plot_error)?;
        }
        for c in &data.closures {
            let at = |row: usize| data.positions.get(row).copied().flatten();
            let (Some(a), Some(b)) = (at(c.query), at(c.matched)) else { continue };
            chart.draw_series([PathElement::new(vec![a, b], color(c.verdict).stroke_width(2))]).map_err(plot_error)?;
            chart.draw_series([Circle::new(a, 3, color(c.verdict).filled())]).map_err(plot_error)?;
        }
        root.present().map_err(plot_error)?;
    }
    Ok(svg)
}

/// Dark blue through green to yellow, nearly even in lightness.
fn viridis(t: f32) -> [u8; 3] {
    const STOPS: [[f32; 3]; 6] =
        [[68., 1., 84.], [65., 68., 135.], [42., 120., 142.], [34., 168., 132.], [122., 209., 81.], [253., 231., 37.]];
    let t = if t.is_nan() { 0.0 } else { t.clamp(0.0, 1.0) } * (STOPS.len() - 1) as f32;
    let i = (t as usize).min(STOPS.len() - 2);
    std::array::from_fn(|c| (STOPS[i][c] + (STOPS[i + 1][c] - STOPS[i][c]) * (t - i as f32)) as u8)
}

fn similarity_matrix(data: &ReportData) -> Result<String> {
    let n = data.index.len();
    if n < 2 {
        return Ok("<p>Fewer than two keyframes.</p>".into());
    }
    let m = n.min(MATRIX);
    let row = |i: usize| i * n / m;
    let mut values = vec![f32::NAN; m * m];
    for i in 0..m {
        for j in 0..i {
            values[i * m + j] = crate::map::dot(data.index.row(row(i)), data.index.row(row(j)));
        }
    }
    let mut sorted: Vec<f32> = values.iter().copied().filter(|v| !v.is_nan()).collect();
    sorted.sort_by(f32::total_cmp);
    let (lo, hi) = (sorted[sorted.len() / 50], sorted[sorted.len() - 1 - sorted.len() / 500]);
    let pixels = values.iter().flat_map(|v| if v.is_nan() { [255; 3] } else { viridis((v - lo) / (hi - lo).max(1e-6)) }).collect();
    let png = RgbImage::new(m as u32, m as u32, pixels)?.to_png()?;
    let (mut svg, area);
    {
        svg = String::new();
        let root = SVGBackend::with_string(&mut svg, (540, 450)).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(8)
            .x_label_area_size(36)
            .y_label_area_size(58)
            .build_cartesian_2d(0f64..n as f64, n as f64..0f64)
            .map_err(plot_error)?;
        chart.configure_mesh().disable_mesh().x_desc("earlier keyframe").y_desc("keyframe").draw().map_err(plot_error)?;
        area = chart.plotting_area().get_pixel_range();
        for c in &data.closures {
            let at = (c.matched as f64 + 0.5, c.query as f64 + 0.5);
            chart.draw_series([Circle::new(at, 3, color(c.verdict).stroke_width(1))]).map_err(plot_error)?;
        }
        root.present().map_err(plot_error)?;
    }
    // The image goes below everything that is drawn.
    let (x, y) = area;
    let image = format!(
        "<image x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" preserveAspectRatio=\"none\" style=\"image-rendering:pixelated\" href=\"{}\"/>",
        x.start,
        y.start,
        x.end - x.start,
        y.end - y.start,
        data_uri("png", &png)
    );
    let start = svg.find('>').map_or(0, |i| i + 1);
    svg.insert_str(start, &image);
    Ok(format!("{svg}<p class=\"note\">Dark {lo:.2} to bright {hi:.2}.</p>"))
}

fn pr_plot(curve: &PrCurve, threshold: f32) -> Result<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (540, 400)).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .x_label_area_size(32)
            .y_label_area_size(58)
            .build_cartesian_2d(0f64..1.0, 0f64..1.02)
            .map_err(plot_error)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GREY.mix(0.2))
            .x_desc("recall")
            .y_desc("precision")
            .draw()
            .map_err(plot_error)?;
        let points = curve.points.iter().map(|p| (p.recall, p.precision));
        chart.draw_series(LineSeries::new(points, BLUE.stroke_width(2))).map_err(plot_error)?;
        if let Some(p) = curve.points.iter().rfind(|p| p.score >= threshold) {
            chart.draw_series([Circle::new((p.recall, p.precision), 5, BLUE.filled())]).map_err(plot_error)?;
        }
        root.present().map_err(plot_error)?;
    }
    Ok(svg)
}

fn reasons_plot(reasons: &[(String, u64)]) -> Result<String> {
    let most = reasons.iter().map(|r| r.1).max().unwrap_or(0).max(1);
    let n = reasons.len().max(1);
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (540, 60 + 30 * n as u32)).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .x_label_area_size(28)
            .y_label_area_size(130)
            .build_cartesian_2d(0f64..most as f64 * 1.12, (0..n).into_segmented())
            .map_err(plot_error)?;
        let label = |s: &SegmentValue<usize>| match s {
            SegmentValue::CenterOf(i) => (n - 1).checked_sub(*i).and_then(|i| reasons.get(i)).map(|r| r.0.clone()).unwrap_or_default(),
            _ => String::new(),
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GREY.mix(0.2))
            .x_label_formatter(&|v| format!("{v:.0}"))
            .y_labels(n)
            .y_label_formatter(&label)
            .draw()
            .map_err(plot_error)?;
        for (i, (name, count)) in reasons.iter().enumerate() {
            let fill = if name == "CLOSURE" { GREEN } else { GREY };
            let (slot, value) = (n - 1 - i, *count as f64);
            let mut bar =
                Rectangle::new([(0.0, SegmentValue::Exact(slot)), (value, SegmentValue::Exact(slot + 1))], fill.mix(0.85).filled());
            bar.set_margin(5, 5, 0, 0);
            chart.draw_series([bar]).map_err(plot_error)?;
            let text = Text::new(count.to_string(), (value + most as f64 * 0.01, SegmentValue::CenterOf(slot)), ("sans-serif", 13));
            chart.draw_series([text]).map_err(plot_error)?;
        }
        root.present().map_err(plot_error)?;
    }
    Ok(svg)
}

fn pairs(h: &mut String, title: &str, pairs: &[Pair]) -> Result<()> {
    let _ = write!(h, "<section><h2>{title}</h2>");
    if pairs.is_empty() {
        *h += "<p>None.</p>";
    }
    *h += "<div class=\"pairs\">";
    for pair in pairs {
        let _ = write!(h, "<div class=\"pair{}\"><div>", if pair.good { "" } else { " bad" });
        for (what, image) in [("query", &pair.query), ("match", &pair.matched)] {
            match image {
                Some(image) => {
                    let height = (u64::from(image.height()) * u64::from(PAIR_WIDTH) / u64::from(image.width())).clamp(1, 2000) as u32;
                    let jpeg = image.resize_area(PAIR_WIDTH, height)?.to_jpeg(80)?;
                    let _ = write!(h, "<img alt=\"{what}\" src=\"{}\">", data_uri("jpeg", &jpeg));
                }
                None => *h += "<span class=\"note\">not readable again</span>",
            }
        }
        let _ = write!(h, "</div><p>{}</p></div>", escape(&pair.caption));
    }
    *h += "</div></section>";
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(index: &Index) -> ReportData<'_> {
        ReportData {
            title: "a <b> & c",
            summary: vec![("model".into(), "<script>".into())],
            positions: vec![Some((0.0, 0.0)), None, Some((5.0, 5.0)), Some((0.5, 0.0))],
            positions_from: "the ground truth",
            closures: vec![
                DrawnClosure { query: 3, matched: 0, verdict: Verdict::True },
                DrawnClosure { query: 3, matched: 1, verdict: Verdict::False },
            ],
            index,
            curve: Some(PrCurve::new(&[])),
            threshold: 0.5,
            scores: Some(LoopScores::default()),
            reasons: vec![("CLOSURE".into(), 3), ("TOO_RECENT".into(), 0)],
            best: vec![Pair { caption: "x".into(), good: true, query: RgbImage::new(2, 1, vec![9; 6]).ok(), matched: None }],
            worst: vec![],
            warnings: vec!["cut <short>".into()],
        }
    }

    #[test]
    fn is_self_contained_escaped_and_the_same_twice() {
        let mut index = Index::new();
        for i in 0..4u8 {
            index.push(&crate::descriptor::Descriptor::new(vec![1.0, f32::from(i)]).unwrap()).unwrap();
        }
        let a = html(&data(&index)).unwrap();
        assert_eq!(a, html(&data(&index)).unwrap());
        assert!(!a.contains("<script") && a.contains("a &lt;b&gt; &amp; c") && a.contains("cut &lt;short&gt;"));
        assert!(!a.contains("src=\"http") && !a.contains("href=\"http"), "nothing is loaded from elsewhere");
        assert_eq!(a.matches("<svg").count(), 4);
    }

    #[test]
    fn an_empty_run_has_a_report_too() {
        let index = Index::new();
        let mut empty = data(&index);
        (empty.positions, empty.closures, empty.reasons, empty.best, empty.curve) = (vec![], vec![], vec![], vec![], None);
        assert!(html(&empty).unwrap().contains("Fewer than two keyframes"));
    }
}
