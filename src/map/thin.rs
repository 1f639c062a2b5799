//! Thinning: fewer keyframes, the same places.
//!
//! [ours] A keyframe between two others of its track is worth what would be lost with it: the difference (1 - cosine) of the least
//! alike pair among itself and its two neighbours, that is, the gap that it closes. The cheapest goes first, and its neighbours
//! are weighed again. So a straight road at walking pace thins out before a junction does, whichever session saw it, and no
//! gap is opened while a smaller one can be. First and last keyframe of a track stay until nothing lies between them; then the oldest
//! tracks go whole.

use super::{Index, Link, Map};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

/// Where the rows of before went.
#[derive(Debug)]
pub struct Remap {
    to: Vec<Option<usize>>,
}

impl Remap {
    /// The row now of what was `row`; of the nearest keyframe of its track that stayed, if it is gone; `None` if its track is.
    pub fn to(&self, row: usize) -> Option<usize> {
        self.to.get(row).copied().flatten()
    }
}

/// One row in its track.
#[derive(Clone, Copy, Default)]
struct Between {
    before: Option<usize>,
    after: Option<usize>,
    /// Counts the changes of its neighbours.
    version: u32,
    gone: bool,
}

/// A cosine as bits that order as it does.
fn ordered(cosine: f32) -> u32 {
    let bits = cosine.to_bits();
    if bits >> 31 == 1 {
        !bits
    } else {
        bits | 1 << 31
    }
}

/// How alike the least alike two of a keyframe and its neighbours are.
fn closeness(index: &Index, a: usize, b: usize, c: usize) -> f32 {
    let cosine = |i: usize, j: usize| super::dot(index.row(i), index.row(j));
    cosine(a, b).min(cosine(b, c)).min(cosine(a, c))
}

impl Map {
    /// Keeps `keyframes` at most. Closures of what went move to the nearest keyframe of its track.
    pub fn thin(&mut self, keyframes: usize) -> Remap {
        let n = self.keyframes.len();
        let surplus = n.saturating_sub(keyframes);
        if surplus == 0 {
            return Remap { to: (0..n).map(Some).collect() };
        }
        let mut tracks: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (row, place) in self.places.iter().enumerate() {
            tracks.entry(place.track).or_default().push(row);
        }
        let gone = self.surplus(&tracks, surplus);
        // The nearest along the track that stayed; of two as near, the earlier.
        let mut nearest: Vec<Option<usize>> = vec![None; n];
        for rows in tracks.values() {
            let stayed: Vec<usize> = rows.iter().copied().filter(|r| !gone[*r]).collect();
            for &row in rows {
                let apart = |s: &&usize| self.places[**s].position.abs_diff(self.places[row].position);
                let at = stayed.partition_point(|s| *s < row);
                let around = &stayed[at.saturating_sub(1)..stayed.len().min(at + 1)];
                nearest[row] = around.iter().min_by_key(apart).copied();
            }
        }
        self.keep(&gone, &nearest)
    }

    /// Keeps these sessions only, with the closures among them.
    pub fn keep_sessions(&mut self, sessions: &[u32]) {
        let gone: Vec<bool> = self.keyframes.iter().map(|k| !sessions.contains(&k.session)).collect();
        let nearest: Vec<Option<usize>> = gone.iter().enumerate().map(|(row, gone)| (!gone).then_some(row)).collect();
        self.keep(&gone, &nearest);
        self.calibrations.retain(|(session, _), _| sessions.contains(session));
        self.unsaved.settings();
    }

    /// Drops rows; `nearest` says who speaks for each.
    fn keep(&mut self, gone: &[bool], nearest: &[Option<usize>]) -> Remap {
        let mut next = 0;
        let new: Vec<Option<usize>> = gone
            .iter()
            .map(|gone| {
                let row = (!gone).then_some(next);
                next += usize::from(!gone);
                row
            })
            .collect();
        let to: Vec<Option<usize>> = nearest.iter().map(|near| near.and_then(|r| new[r])).collect();
        self.unsaved.removed(self.ids.iter().zip(gone).filter(|(_, gone)| **gone).map(|(id, _)| *id));
        fn stay<T>(all: &mut Vec<T>, gone: &[bool]) {
            let mut row = 0;
            all.retain(|_| {
                row += 1;
                !gone[row - 1]
            });
        }
        stay(&mut self.keyframes, gone);
        stay(&mut self.places, gone);
        stay(&mut self.stamps, gone);
        stay(&mut self.ids, gone);
        self.index.retain(|row| !gone[row]);
        self.thumbnails = std::mem::take(&mut self.thumbnails).into_iter().filter_map(|(row, t)| Some((new[row]?, t))).collect();
        self.features = std::mem::take(&mut self.features).into_iter().filter_map(|(row, f)| Some((new[row]?, f))).collect();
        let moved = |l: &Link| Some(Link { query: to[l.query]?, matched: to[l.matched]?, ..*l });
        let mut links: Vec<Link> = Vec::new();
        // Ends that met are no closure, and two that became one are one.
        for link in self.links.iter().filter_map(moved).filter(|l| l.query != l.matched) {
            if links.last().is_none_or(|l| (l.query, l.matched) != (link.query, link.matched)) {
                links.push(link);
            }
        }
        self.links = links;
        self.revision += 1;
        Remap { to }
    }

    /// Which rows go.
    fn surplus(&self, tracks: &BTreeMap<u32, Vec<usize>>, mut surplus: usize) -> Vec<bool> {
        let n = self.keyframes.len();
        let mut rows = vec![Between::default(); n];
        for track in tracks.values() {
            for pair in track.windows(2) {
                rows[pair[0]].after = Some(pair[1]);
                rows[pair[1]].before = Some(pair[0]);
            }
        }
        // Most alike first; of equals the earlier row.
        let weigh = |rows: &[Between], b: usize| {
            let at = rows[b];
            Some((ordered(closeness(&self.index, at.before?, b, at.after?)), Reverse(b), at.version))
        };
        let mut heap: BinaryHeap<_> = (0..n).filter_map(|b| weigh(&rows, b)).collect();
        while surplus > 0 {
            let Some((_, Reverse(b), version)) = heap.pop() else { break };
            if rows[b].gone || rows[b].version != version {
                continue;
            }
            let (before, after) = (rows[b].before, rows[b].after);
            rows[b].gone = true;
            surplus -= 1;
            for (side, other, is_before) in [(before, after, true), (after, before, false)] {
                let Some(side) = side else { continue };
                let end = if is_before { &mut rows[side].after } else { &mut rows[side].before };
                *end = other;
                rows[side].version += 1;
                heap.extend(weigh(&rows, side));
            }
        }
        for row in tracks.values().flatten() {
            if surplus > 0 && !rows[*row].gone {
                rows[*row].gone = true;
                surplus -= 1;
            }
        }
        rows.iter().map(|r| r.gone).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Keyframe;
    use super::*;
    use crate::descriptor::{Descriptor, ModelIdentity};
    use proptest::prelude::*;

    /// A walk along an arc: `angles` between neighbours.
    fn walk(map: &mut Map, session: u32, angles: &[f32]) {
        let mut angle = 0f32;
        for (i, step) in angles.iter().enumerate() {
            angle += step;
            let d = Descriptor::new(vec![angle.cos(), angle.sin(), 0.0]).unwrap();
            let k = Keyframe {
                robot: 0,
                session,
                camera: String::new(),
                stamp_ns: i as i64,
                name: format!("{session}/{i}"),
                odom_from_base: None,
            };
            map.push(k, &d).unwrap();
        }
    }

    fn names(map: &Map) -> Vec<&str> {
        map.keyframes().iter().map(|k| k.name.as_str()).collect()
    }

    #[test]
    fn what_is_alike_goes_first_and_ids_stay() {
        let mut map = Map::new(ModelIdentity::default());
        // Slow, then a junction, then slow.
        walk(&mut map, 0, &[0.0, 0.01, 0.01, 0.01, 0.3, 0.3, 0.01, 0.01]);
        map.set_thumbnail(5, vec![5]);
        map.link(Link { query: 7, matched: 2, similarity: 0.9 });
        let remap = map.thin(5);
        assert_eq!(names(&map), ["0/0", "0/3", "0/4", "0/5", "0/7"]);
        assert_eq!((0..5).map(|r| map.id_of(r)).collect::<Vec<_>>(), [0, 3, 4, 5, 7]);
        assert_eq!((map.row_of(5), map.row_of(6), map.thumbnail(3)), (Some(3), None, Some(&[5u8][..])));
        assert_eq!((remap.to(2), remap.to(6), remap.to(5)), (Some(1), Some(3), Some(3)));
        assert_eq!(map.links()[0], Link { query: 4, matched: 1, similarity: 0.9 });
        assert_eq!(map.place(4).position, 7, "a gap stays a gap: paces are along the track");
        walk(&mut map, 0, &[0.5]);
        assert_eq!((map.id_of(5), map.place(5).position), (8, 8));
    }

    #[test]
    fn the_cap_holds_whatever_it_takes() {
        let mut map = Map::new(ModelIdentity::default());
        (0..6).for_each(|s| walk(&mut map, s, &[0.1, 0.1, 0.1]));
        let name = map.id();
        map.thin(12);
        assert_eq!(names(&map).len(), 12, "the ends of six tracks");
        map.thin(3);
        assert_eq!(names(&map), ["4/2", "5/0", "5/2"], "the oldest tracks go first");
        map.thin(0);
        assert!(map.keyframes().is_empty() && map.id() == name);
    }

    proptest! {
        #[test]
        fn coverage_is_kept(steps in proptest::collection::vec(0.001f32..0.2, 3..120), share in 0.3f64..1.0, links in proptest::collection::vec((0usize..120, 0usize..120), 0..20)) {
            let mut map = Map::new(ModelIdentity::default());
            walk(&mut map, 0, &steps);
            let n = steps.len();
            for (a, b) in links { if a < n && b < n { map.link(Link { query: a, matched: b, similarity: 0.5 }); } }
            let before: Vec<Vec<f32>> = (0..n).map(|i| map.index().row(i).to_vec()).collect();
            let keep = ((n as f64 * share) as usize).max(2);
            let remap = map.thin(keep);
            prop_assert_eq!(map.keyframes().len(), keep.min(n));
            prop_assert!(map.ids.windows(2).all(|w| w[0] < w[1]));
            // Whoever went is spoken for by one that is nearer than any two kept neighbours but the widest pair are apart.
            let kept = |r: usize| map.index().row(r);
            let widest = (1..map.keyframes().len()).map(|r| super::super::dot(kept(r - 1), kept(r))).fold(1f32, f32::min);
            for (i, d) in before.iter().enumerate() {
                let to = remap.to(i).unwrap();
                prop_assert!(super::super::dot(d, kept(to)) >= widest - 1e-5);
            }
            for l in map.links() { prop_assert!(l.query != l.matched && l.query < map.keyframes().len() && l.matched < map.keyframes().len()); }
        }
    }
}
