//! Python pickles as data, and nothing but data.
//!
//! PyTorch checkpoints and VPR-Bench's ground truth are pickles. A pickle is a program; this
//! reader runs the part of it that builds values and turns every call into a [`Node::Call`] that is
//! never made. Nodes live in one arena and refer to each other by index, so shared and even cyclic
//! values cost no more memory than the bytes that made them.

use crate::error::{Error, Result};
use std::collections::HashMap;

/// Index of a node in [`Pickle::nodes`].
pub type Id = usize;

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer that fits 64 bits.
    Int(i64),
    /// A float.
    Float(f64),
    /// A `str`.
    Str(String),
    /// A `bytes`, as a range of the input.
    Bytes(Vec<u8>),
    /// A list, set or frozenset.
    List(Vec<Id>),
    /// A tuple.
    Tuple(Vec<Id>),
    /// A dict in insertion order.
    Dict(Vec<(Id, Id)>),
    /// A class or function by name.
    Global(String, String),
    /// `function(*args)`, recorded and not made, with what was then set on it.
    Call {
        /// The function or class.
        function: Id,
        /// The arguments (a tuple).
        args: Id,
        /// `obj[key] = value` (an OrderedDict's items).
        items: Vec<(Id, Id)>,
        /// `obj.__setstate__(state)`.
        state: Option<Id>,
    },
    /// A persistent id: PyTorch's storages.
    Persistent(Id),
}

/// A parsed pickle.
#[derive(Debug)]
pub struct Pickle {
    nodes: Vec<Node>,
    root: Id,
}

impl Pickle {
    /// The value that the pickle returns.
    pub fn root(&self) -> &Node {
        &self.nodes[self.root]
    }

    /// A value by index.
    pub fn get(&self, id: Id) -> &Node {
        self.nodes.get(id).unwrap_or(&Node::None)
    }

    /// The items of a list or tuple.
    pub fn seq(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Node::List(v) | Node::Tuple(v) => Some(v),
            _ => None,
        }
    }

    /// An integer.
    pub fn int(&self, id: Id) -> Option<i64> {
        match self.get(id) {
            Node::Int(i) => Some(*i),
            Node::Bool(b) => Some(i64::from(*b)),
            _ => None,
        }
    }

    /// A string.
    pub fn str(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Node::Str(s) => Some(s),
            _ => None,
        }
    }

    /// `(module, name, args, items, state)` of a recorded call.
    #[allow(clippy::type_complexity)]
    pub fn call(&self, id: Id) -> Option<(&str, &str, &[Id], &[(Id, Id)], Option<Id>)> {
        let Node::Call { function, args, items, state } = self.get(id) else { return None };
        let Node::Global(module, name) = self.get(*function) else { return None };
        Some((module, name, self.seq(*args)?, items, *state))
    }

    /// Parses protocol 0 to 5. Memory is linear in `bytes`.
    ///
    /// Errors: [`Error::Weights`] naming the offset.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        Ok(Self::parse_prefix(bytes)?.0)
    }

    /// As [`Self::parse`], where other bytes may follow; with the number of bytes that the pickle took.
    pub fn parse_prefix(bytes: &[u8]) -> Result<(Self, usize)> {
        let mut m = Machine { bytes, at: 0, nodes: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
        loop {
            let at = m.at;
            match m.step() {
                Some(false) => {}
                Some(true) => break,
                None => return Err(Error::weights(format!("pickle: bad or unsupported instruction at byte {at}"))),
            }
        }
        match m.stack.pop() {
            Some(root) => Ok((Self { nodes: m.nodes, root }, m.at)),
            None => Err(Error::weights("pickle: empty stack at STOP")),
        }
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

impl<'a> Machine<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let slice = self.bytes.get(self.at..self.at.checked_add(n)?)?;
        self.at += n;
        Some(slice)
    }

    fn uint(&mut self, n: usize) -> Option<u64> {
        Some(self.take(n)?.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
    }

    fn sized(&mut self, n: usize) -> Option<&'a [u8]> {
        let len = usize::try_from(self.uint(n)?).ok()?;
        self.take(len)
    }

    fn line(&mut self) -> Option<&'a str> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|b| *b == b'\n')?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).ok()
    }

    fn push(&mut self, node: Node) {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
    }

    fn text(&mut self, bytes: &[u8]) {
        self.push(Node::Str(String::from_utf8_lossy(bytes).into_owned()));
    }

    fn pop(&mut self) -> Option<Id> {
        // Never below an open mark: such a pickle is malformed.
        (self.stack.len() > self.marks.last().copied().unwrap_or(0)).then(|| self.stack.pop())?
    }

    fn pop_to_mark(&mut self) -> Option<Vec<Id>> {
        let mark = self.marks.pop()?;
        (mark <= self.stack.len()).then(|| self.stack.split_off(mark))
    }

    fn tuple(&mut self, n: usize) -> Option<()> {
        let mut items = (0..n).map(|_| self.pop()).collect::<Option<Vec<_>>>()?;
        items.reverse();
        self.push(Node::Tuple(items));
        Some(())
    }

    fn extend_list(&mut self, more: Vec<Id>) -> Option<()> {
        let top = *self.stack.last()?;
        match &mut self.nodes[top] {
            Node::List(v) => v.extend(more),
            // An object with an `append` of its own: its items are not ours to read.
            Node::Call { .. } => {}
            _ => return None,
        }
        Some(())
    }

    fn extend_dict(&mut self, more: Vec<Id>) -> Option<()> {
        if !more.len().is_multiple_of(2) {
            return None;
        }
        let pairs = more.chunks_exact(2).map(|p| (p[0], p[1]));
        let top = *self.stack.last()?;
        match &mut self.nodes[top] {
            Node::Dict(items) | Node::Call { items, .. } => items.extend(pairs),
            _ => return None,
        }
        Some(())
    }

    fn call(&mut self) -> Option<()> {
        let (args, function) = (self.pop()?, self.pop()?);
        self.push(Node::Call { function, args, items: Vec::new(), state: None });
        Some(())
    }

    fn put(&mut self, key: u64) -> Option<()> {
        self.memo.insert(key, *self.stack.last()?);
        Some(())
    }

    fn fetch(&mut self, key: u64) -> Option<()> {
        self.stack.push(*self.memo.get(&key)?);
        Some(())
    }

    /// One instruction; `Some(true)` at STOP, `None` if it is malformed.
    fn step(&mut self) -> Option<bool> {
        let op = self.take(1)?[0];
        match op {
            b'.' => return Some(true),
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => self.stack.push(*self.stack.last()?),
            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Bool(true)),
            0x89 => self.push(Node::Bool(false)),
            b'I' => {
                let node = match self.line()? {
                    "00" => Node::Bool(false),
                    "01" => Node::Bool(true),
                    s => Node::Int(s.trim().parse().ok()?),
                };
                self.push(node)
            }
            b'L' => {
                let v = self.line()?.trim_end_matches('L').parse().ok()?;
                self.push(Node::Int(v))
            }
            b'F' => {
                let v = self.line()?.parse().ok()?;
                self.push(Node::Float(v))
            }
            b'J' => {
                let v = self.uint(4)? as u32 as i32;
                self.push(Node::Int(v.into()))
            }
            b'K' => {
                let v = self.uint(1)?;
                self.push(Node::Int(v as i64))
            }
            b'M' => {
                let v = self.uint(2)?;
                self.push(Node::Int(v as i64))
            }
            0x8a | 0x8b => {
                let raw = self.sized(if op == 0x8a { 1 } else { 4 })?;
                if raw.len() > 8 {
                    return None;
                }
                let negative = raw.last().is_some_and(|b| b & 0x80 != 0);
                let mut le = [if negative { 0xff } else { 0 }; 8];
                le[..raw.len()].copy_from_slice(raw);
                self.push(Node::Int(i64::from_le_bytes(le)))
            }
            b'G' => {
                let v = f64::from_be_bytes(self.take(8)?.try_into().ok()?);
                self.push(Node::Float(v))
            }
            0x8c | b'U' => {
                let s = self.sized(1)?;
                self.text(s)
            }
            b'X' | b'T' => {
                let s = self.sized(4)?;
                self.text(s)
            }
            0x8d => {
                let s = self.sized(8)?;
                self.text(s)
            }
            b'V' => {
                let s = self.line()?;
                self.text(s.as_bytes())
            }
            b'S' => {
                let s = self.line()?.trim_matches(['\'', '"']);
                self.text(s.as_bytes())
            }
            b'C' | b'B' | 0x8e => {
                let s = self
                    .sized(match op {
                        b'C' => 1,
                        b'B' => 4,
                        _ => 8,
                    })?
                    .to_vec();
                self.push(Node::Bytes(s))
            }
            b']' | 0x8f => self.push(Node::List(Vec::new())),
            b')' => self.push(Node::Tuple(Vec::new())),
            b'}' => self.push(Node::Dict(Vec::new())),
            b'l' | 0x91 => {
                let items = self.pop_to_mark()?;
                self.push(Node::List(items))
            }
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Tuple(items))
            }
            b'd' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Dict(Vec::new()));
                self.extend_dict(items)?
            }
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b'a' => {
                let item = self.pop()?;
                self.extend_list(vec![item])?
            }
            b'e' | 0x90 => {
                let items = self.pop_to_mark()?;
                self.extend_list(items)?
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.extend_dict(vec![key, value])?
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.extend_dict(items)?
            }
            b'q' => {
                let k = self.uint(1)?;
                self.put(k)?
            }
            b'r' => {
                let k = self.uint(4)?;
                self.put(k)?
            }
            b'p' => {
                let k = self.line()?.parse().ok()?;
                self.put(k)?
            }
            0x94 => {
                let k = self.memo.len() as u64;
                self.put(k)?
            }
            b'h' => {
                let k = self.uint(1)?;
                self.fetch(k)?
            }
            b'j' => {
                let k = self.uint(4)?;
                self.fetch(k)?
            }
            b'g' => {
                let k = self.line()?.parse().ok()?;
                self.fetch(k)?
            }
            b'c' => {
                let (module, name) = (self.line()?.to_string(), self.line()?.to_string());
                self.push(Node::Global(module, name))
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let node = match (&self.nodes[module], &self.nodes[name]) {
                    (Node::Str(m), Node::Str(n)) => Node::Global(m.clone(), n.clone()),
                    _ => return None,
                };
                self.push(node)
            }
            b'R' | 0x81 => self.call()?,
            b'b' => {
                let new = self.pop()?;
                let top = *self.stack.last()?;
                if let Node::Call { state, .. } = &mut self.nodes[top] {
                    *state = Some(new);
                }
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Node::Persistent(id))
            }
            _ => return None,
        }
        Some(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `pickle.dumps({"a": [1, -2, 2.5], "b": (None, True)}, protocol=2)` of CPython 3.11.
    const SMALL: &[u8] = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01]q\x02(K\x01J\xfe\xff\xff\xffG@\x04\x00\x00\x00\x00\x00\x00eX\x01\x00\x00\x00bq\x03N\x88\x86q\x04u.";

    #[test]
    fn reads_what_python_wrote() -> Result<()> {
        let p = Pickle::parse(SMALL)?;
        let Node::Dict(items) = p.root() else { panic!("{:?}", p.root()) };
        assert_eq!(p.str(items[0].0), Some("a"));
        let list = p.seq(items[0].1).unwrap_or_default();
        assert_eq!((p.int(list[0]), p.int(list[1]), p.get(list[2])), (Some(1), Some(-2), &Node::Float(2.5)));
        Ok(())
    }

    #[test]
    fn a_call_is_recorded_and_never_made() -> Result<()> {
        // What an attack looks like: os.system("true").
        let p = Pickle::parse(b"cos\nsystem\n(S'true'\ntR.")?;
        let Node::Call { function, .. } = p.root() else { panic!("{:?}", p.root()) };
        assert_eq!(p.get(*function), &Node::Global("os".into(), "system".into()));
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(5000))]
        #[test]
        fn random_and_mutated_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0usize..80, at in 0usize..80, flip in any::<u8>()) {
            let _ = Pickle::parse(&bytes);
            bytes = SMALL[..cut.min(SMALL.len())].to_vec();
            if let Some(b) = bytes.get_mut(at) { *b ^= flip; }
            let _ = Pickle::parse(&bytes);
        }
    }
}
