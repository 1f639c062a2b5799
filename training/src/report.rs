//! Pages: the partition with example pairs, the table of experiments with its plot. Each is one self-contained file.

use crate::data::Set;
use crate::partition::{group, Complementarity, Group, GROUPS};
use crate::recipe::Recipe;
use crate::work::{PartitionSummary, Ranks};
use anyhow::Result;
use base64::Engine;
use std::fmt::Write as _;
use structvpr::image::RgbImage;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}\
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}\
td:first-child,th:first-child{text-align:left}.pairs{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0;width:330px}\
figure img{width:163px;margin-right:2px}figcaption{font-size:12px;color:#555}.bar{display:flex;height:26px;width:100%;margin:.3em 0 1em}\
.bar span{color:#fff;font-size:12px;padding:4px 0 0 4px;overflow:hidden;white-space:nowrap}.warn{background:#fdecea;border-left:4px solid #c0392b;padding:.6em 1em}";

/// Text inside HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A page around a body.
pub fn page(title: &str, body: &str) -> String {
    let title = escape(title);
    format!("<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>{body}</html>\n")
}

fn picture(path: &std::path::Path) -> Result<String> {
    let image = RgbImage::decode(&structvpr::error::read_file(path)?).map_err(|e| e.at(path))?;
    let jpeg = base64::engine::general_purpose::STANDARD.encode(image.thumbnail(200)?);
    Ok(format!("<img src=\"data:image/jpeg;base64,{jpeg}\" alt=\"{}\">", escape(&path.display().to_string())))
}

fn bar(what: &str, c: &Complementarity) -> String {
    let share = |n: usize| 100.0 * n as f64 / c.all().max(1) as f64;
    let mut html = format!("<b>{what}</b> (union {:.1} %)<div class=\"bar\">", 100.0 * c.union());
    for (name, n, colour) in [
        ("both", c.both, "#2e7d32"),
        ("rgb only", c.rgb_only, "#1565c0"),
        ("seg only", c.seg_only, "#e65100"),
        ("neither", c.neither, "#757575"),
    ] {
        let _ = write!(
            html,
            "<span style=\"width:{:.2}%;background:{colour}\" title=\"{name} {:.1} %\">{name} {:.1} %</span>",
            share(n),
            share(n),
            share(n)
        );
    }
    html + "</div>"
}

const MEANING: [&str; 4] =
    ["teacher right, student wrong", "both right, teacher at least as well", "both right, student better", "teacher wrong"];

/// Example pairs per group.
const EXAMPLES: usize = 3;

/// The report of a partition.
pub fn partition(ranks: &Ranks, s: &PartitionSummary, recipe: &Recipe, set: &Set) -> Result<String> {
    let n_t = recipe.distillation.weighting.n_t;
    let mut body = format!(
        "<p>{} training pairs; a retrieval is right up to rank {n_t}. x: rank by the seg branch, y: by the rgb branch.</p>",
        s.pairs
    );
    if s.at_1.nothing_to_distil() {
        body += "<p class=\"warn\"><b>Nothing to distil:</b> the seg branch is right where rgb is wrong in fewer than one query of a hundred.</p>";
    }
    body += "<h2>What the branches know of each query</h2>";
    body += &bar("right at 1", &s.at_1);
    body += &bar(&format!("right within {n_t}"), &s.at_n_t);
    body += "<h2>Groups</h2><table><tr><th>group<th>share<th>mean weight<th>meaning</tr>";
    for (g, meaning) in GROUPS.iter().zip(MEANING) {
        let key = format!("{g:?}");
        let _ = write!(body, "<tr><td>{key}<td>{:.2} %<td>{:.2}<td>{meaning}</tr>", 100.0 * s.shares[&key], s.mean_weights[&key]);
    }
    for key in ["S1", "S2", "R1", "R2"] {
        let _ = write!(body, "<tr><td>{key}<td>{:.2} %<td><td></tr>", 100.0 * s.shares[key]);
    }
    body += "</table>";
    for (g, meaning) in GROUPS.iter().zip(MEANING) {
        let _ = write!(body, "<h2>{g:?}: {meaning}</h2><div class=\"pairs\">");
        let mut own: Vec<_> = ranks.pairs.iter().filter(|p| group(p.x, p.y, n_t) == *g).collect();
        if own.is_empty() {
            body += "<p>none</p>";
        }
        // The clearest of its kind first.
        own.sort_by_key(|p| match g {
            Group::D1 => (std::cmp::Reverse(p.y), p.x),
            Group::D2 => (std::cmp::Reverse(p.y - p.x), p.x),
            Group::D3 => (std::cmp::Reverse(p.x - p.y), p.y),
            Group::D4 => (std::cmp::Reverse(p.x), p.y),
        });
        for p in own.into_iter().take(EXAMPLES) {
            let (q, r, x, y) = (&set.queries[p.query], &set.references[p.reference], p.x, p.y);
            let _ = write!(
                body,
                "<figure>{}{}<figcaption>{} &rarr; {}<br>x = {x}, y = {y}</figcaption></figure>",
                picture(&q.path)?,
                picture(&r.path)?,
                escape(&q.name),
                escape(&r.name)
            );
        }
        body += "</div>";
    }
    Ok(page(&format!("Partition: {}", recipe.name), &body))
}
