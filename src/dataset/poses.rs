//! Tables of poses: CSV with named columns, or TUM's `stamp x y z qx qy qz qw`.

use crate::error::{Error, Result};
use std::collections::HashMap;

/// A position on the ground and, where known, a direction of view.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pose2 {
    /// Metres east (or any unit that the radius is in).
    pub x: f64,
    /// Metres north.
    pub y: f64,
    /// Degrees; sign and zero do not matter as long as the table keeps to one convention.
    pub heading_deg: Option<f64>,
}

impl Pose2 {
    /// Angle between two headings, 0 to 180 degrees; `None` if one is unknown.
    pub fn turned_from(&self, other: &Self) -> Option<f64> {
        let d = (self.heading_deg? - other.heading_deg?).rem_euclid(360.0);
        Some(d.min(360.0 - d))
    }
}

/// Poses by image name, by stamp, or both.
#[derive(Clone, Debug, Default)]
pub struct PoseTable {
    by_name: HashMap<String, Pose2>,
    by_stamp: Vec<(i64, Pose2)>,
}

impl PoseTable {
    /// Parses a table.
    ///
    /// CSV with a header line: `x` and `y` (or `easting` and `northing`), one of `name`, `stamp`
    /// (seconds) or `stamp_ns`, and perhaps `heading_deg`. Or lines of eight numbers (TUM); `#` begins
    /// a comment.
    pub fn parse(text: &str) -> Result<Self> {
        let first = text.lines().map(str::trim).find(|l| !l.is_empty() && !l.starts_with('#')).unwrap_or("");
        let mut table = if first.split_whitespace().count() == 8 && !first.contains(',') { Self::tum(text)? } else { Self::csv(text)? };
        table.by_stamp.sort_by_key(|(t, _)| *t);
        Ok(table)
    }

    fn tum(text: &str) -> Result<Self> {
        let mut table = Self::default();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let v: Vec<f64> = line.split_whitespace().map_while(|p| p.parse().ok()).collect();
            let &[t, x, y, _, qx, qy, qz, qw] = v.as_slice() else {
                return Err(Error::dataset(format!("poses, line {}: not eight numbers `stamp x y z qx qy qz qw`", i + 1)));
            };
            let yaw = (2.0 * (qw * qz + qx * qy)).atan2(1.0 - 2.0 * (qy * qy + qz * qz));
            let stamp = seconds_to_ns(line.split_whitespace().next().unwrap_or(""), t);
            table.by_stamp.push((stamp, Pose2 { x, y, heading_deg: Some(yaw.to_degrees()) }));
        }
        Ok(table)
    }

    fn csv(text: &str) -> Result<Self> {
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).comment(Some(b'#')).from_reader(text.as_bytes());
        let fail = |e: csv::Error| Error::dataset(format!("poses: {e}"));
        let header = reader.headers().map_err(fail)?.clone();
        let column = |names: &[&str]| header.iter().position(|h| names.contains(&h.to_ascii_lowercase().as_str()));
        let (Some(x), Some(y)) = (column(&["x", "easting"]), column(&["y", "northing"])) else {
            return Err(Error::dataset(format!(
                "poses: no columns `x` and `y` in the header `{}`",
                header.iter().collect::<Vec<_>>().join(",")
            )));
        };
        let (name, stamp, stamp_ns) = (column(&["name", "image", "key"]), column(&["stamp", "timestamp"]), column(&["stamp_ns"]));
        if name.is_none() && stamp.is_none() && stamp_ns.is_none() {
            return Err(Error::dataset("poses: no column `name`, `stamp` (seconds) or `stamp_ns`"));
        }
        let heading = column(&["heading_deg", "heading", "yaw_deg"]);
        let mut table = Self::default();
        for (i, record) in reader.records().enumerate() {
            let record = record.map_err(fail)?;
            let number = |c: usize| -> Result<f64> {
                let text = record.get(c).unwrap_or("");
                text.parse()
                    .ok()
                    .filter(|v: &f64| v.is_finite())
                    .ok_or_else(|| Error::dataset(format!("poses, record {}: `{text}` in column `{}` is not a number", i + 1, &header[c])))
            };
            let heading_deg = match heading {
                Some(c) if record.get(c).is_some_and(|t| !t.is_empty()) => Some(number(c)?),
                _ => None,
            };
            let pose = Pose2 { x: number(x)?, y: number(y)?, heading_deg };
            if let Some(n) = name.and_then(|c| record.get(c)) {
                table.by_name.insert(n.to_string(), pose);
            }
            if let Some(c) = stamp_ns {
                table.by_stamp.push((number(c).map(|_| record[c].parse().unwrap_or_default())?, pose));
            } else if let Some(c) = stamp {
                table.by_stamp.push((seconds_to_ns(&record[c], number(c)?), pose));
            }
        }
        Ok(table)
    }

    /// Number of poses.
    pub fn len(&self) -> usize {
        self.by_name.len().max(self.by_stamp.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a pose by stamp; stamps must come in order.
    pub fn push(&mut self, stamp_ns: i64, pose: Pose2) {
        self.by_stamp.push((stamp_ns, pose));
    }

    /// The pose of an image: by its name, its name without the extension, or its file name.
    pub fn named(&self, name: &str) -> Option<Pose2> {
        let stem = |n: &str| n.rsplit_once('.').map(|(s, _)| s.to_string());
        let file = name.rsplit('/').next().unwrap_or(name);
        [Some(name.to_string()), stem(name), Some(file.to_string()), stem(file)]
            .into_iter()
            .flatten()
            .find_map(|n| self.by_name.get(&n).copied())
    }

    /// The pose at `stamp_ns`, interpolated; the nearest one if it is at most `slack_ns` away.
    pub fn at(&self, stamp_ns: i64, slack_ns: i64) -> Option<Pose2> {
        let after = self.by_stamp.partition_point(|(t, _)| *t < stamp_ns);
        let near = |i: usize| self.by_stamp.get(i).filter(|(t, _)| t.abs_diff(stamp_ns) <= slack_ns.unsigned_abs());
        match (after.checked_sub(1).and_then(near), near(after)) {
            (Some((ta, a)), Some((tb, b))) if tb > ta => {
                let t = (stamp_ns - ta) as f64 / (tb - ta) as f64;
                let heading_deg = a.heading_deg.zip(b.heading_deg).map(|(h, k)| {
                    let turn = (k - h + 540.0).rem_euclid(360.0) - 180.0;
                    h + turn * t
                });
                Some(Pose2 { x: a.x + (b.x - a.x) * t, y: a.y + (b.y - a.y) * t, heading_deg })
            }
            (Some((_, p)), _) | (None, Some((_, p))) => Some(*p),
            (None, None) => None,
        }
    }
}

/// `1700000000.123456789` without the loss of going through f64.
fn seconds_to_ns(text: &str, fallback: f64) -> i64 {
    let exact = || -> Option<i64> {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
        if fraction.is_empty() || fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) || whole.starts_with('-') {
            return None;
        }
        let whole: i64 = whole.parse().ok()?;
        let nanos: i64 = format!("{fraction:0<9}").parse().ok()?;
        whole.checked_mul(1_000_000_000)?.checked_add(nanos)
    };
    exact().unwrap_or((fallback * 1e9) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_csv_and_tum_to_the_nanosecond() {
        let t = PoseTable::parse("stamp,x,y,heading_deg\n1700000000.123456789,1,2,350\n1700000001.123456789,3,2,10\n").unwrap();
        let p = t.at(1_700_000_000_623_456_789, 1_000_000_000).unwrap();
        assert_eq!((p.x, p.y, p.heading_deg), (2.0, 2.0, Some(360.0)));
        assert_eq!(t.at(1_700_000_003_000_000_000, 1_000_000), None);
        let t = PoseTable::parse("# TUM\n1.5 1 2 3 0 0 0.70710678 0.70710678\n").unwrap();
        assert!((t.at(1_500_000_000, 0).unwrap().heading_deg.unwrap() - 90.0).abs() < 1e-5);
        let t = PoseTable::parse("name, x, y\nday/a.jpg, 4, 5\n").unwrap();
        assert_eq!(t.named("day/a.jpg").map(|p| p.x), Some(4.0));
        assert_eq!(t.named("b.jpg"), None);
    }

    #[test]
    fn errors_name_line_and_column() {
        let said = |text| PoseTable::parse(text).unwrap_err().to_string();
        assert!(said("name,x\na,1\n").contains("`x` and `y`"));
        assert!(said("x,y\n1,2\n").contains("`stamp`"));
        assert!(said("name,x,y\na,1,north\n").contains("`north` in column `y`"));
        assert!(said("1 2 3 4 5 6 7 8\n1 2 3\n").contains("line 2"));
    }
}
