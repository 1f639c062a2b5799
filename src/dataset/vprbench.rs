//! VPR-Bench: `query/`, `ref/` and `ground_truth_new.npy`, a pickled array of (query, references).

use super::{list_images, Dataset, Format, Spec};
use crate::error::{Error, Result};
use crate::pickle::{Node, Pickle};

/// `vprbench:DIR`.
pub struct VprBench;

const USAGE: &str = "vprbench:DIR with query/, ref/ and ground_truth_new.npy";

impl Format for VprBench {
    fn kind(&self) -> &'static str {
        "vprbench"
    }

    fn usage(&self) -> &'static str {
        USAGE
    }

    fn open(&self, spec: &Spec) -> Result<Dataset> {
        spec.check_options(&[])?;
        let [dir] = spec.paths::<1>(USAGE)?;
        let (queries, references) = (list_images(&dir.join("query"))?, list_images(&dir.join("ref"))?);
        let path = dir.join("ground_truth_new.npy");
        let truth = parse_ground_truth(&crate::error::read_file(&path)?).map_err(|e| e.at(&path))?;
        let mut positives = vec![Vec::new(); queries.len()];
        for (query, refs) in truth {
            let Some(slot) = positives.get_mut(query) else {
                return Err(Error::dataset(format!("truth for query {query}, but there are {} queries", queries.len())).at(&path));
            };
            // Some sets name frames past the end; they were cut from the images too.
            slot.extend(refs.into_iter().filter(|r| *r < references.len()));
        }
        let protocol = "VPR-Bench's ground_truth_new.npy".into();
        Ok(Dataset { protocol, queries, references, positives, ..Dataset::default() })
    }
}

/// The pairs (query, references) of a ground-truth file.
///
/// Errors: not a .npy of objects, or rows that are not an index and a list of indices.
pub fn parse_ground_truth(bytes: &[u8]) -> Result<Vec<(usize, Vec<usize>)>> {
    let bad = |why: &str| Error::dataset(format!("VPR-Bench ground truth: {why}"));
    let header = bytes.strip_prefix(b"\x93NUMPY").ok_or_else(|| bad("not a .npy file"))?;
    let (length_at, length): (usize, Option<usize>) = match header.first() {
        Some(1) => (2, header.get(2..4).map(|b| u16::from_le_bytes([b[0], b[1]]).into())),
        _ => (2, header.get(2..6).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)),
    };
    let length = length.ok_or_else(|| bad("cut short"))?;
    let start = length_at + if header.first() == Some(&1) { 2 } else { 4 };
    let text = start.checked_add(length).and_then(|end| header.get(start..end)).ok_or_else(|| bad("cut short"))?;
    if !String::from_utf8_lossy(text).contains("'|O'") {
        return Err(bad("not an array of objects"));
    }
    let pickle = Pickle::parse(&header[start + length..])?;
    // numpy sets (version, shape, dtype, fortran, [items]) on the array it makes.
    let state = match pickle.root() {
        Node::Call { state: Some(state), .. } => pickle.seq(*state),
        _ => None,
    };
    let items = state.and_then(|s| pickle.seq(*s.get(4)?)).ok_or_else(|| bad("no items"))?;
    if items.len() % 2 != 0 {
        return Err(bad("rows are not pairs"));
    }
    items
        .chunks_exact(2)
        .map(|pair| {
            let query = index(&pickle, pair[0]).ok_or_else(|| bad("a query is not an index"))?;
            let refs = indices(&pickle, pair[1]).ok_or_else(|| bad("the references of a query are not indices"))?;
            Ok((query, refs))
        })
        .collect()
}

fn index(pickle: &Pickle, id: usize) -> Option<usize> {
    if let Some(i) = pickle.int(id) {
        return usize::try_from(i).ok();
    }
    // A numpy scalar: scalar(dtype, bytes).
    let (_, "scalar", args, ..) = pickle.call(id)? else { return None };
    little_endian(pickle, args.get(1)?)?.first().copied()
}

fn indices(pickle: &Pickle, id: usize) -> Option<Vec<usize>> {
    if let Some(items) = pickle.seq(id) {
        return items.iter().map(|i| index(pickle, *i)).collect();
    }
    let (_, _, _, _, state) = pickle.call(id)?;
    let state = pickle.seq(state?)?;
    match pickle.get(*state.get(4)?) {
        Node::List(items) => items.iter().map(|i| index(pickle, *i)).collect(),
        _ => little_endian(pickle, state.get(4)?),
    }
}

/// Bytes of 64-bit integers, numpy's default.
fn little_endian(pickle: &Pickle, id: &usize) -> Option<Vec<usize>> {
    let Node::Bytes(bytes) = pickle.get(*id) else { return None };
    let value = |b: &[u8]| usize::try_from(i64::from_le_bytes(b.try_into().ok()?)).ok();
    bytes.chunks(8).map(value).collect()
}
