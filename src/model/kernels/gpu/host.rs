//! The processor as a GPU, for tests: kernels' own text compiled as C++ and run as loops, over memory whose margins are watched.
//! Wants a C++ compiler, which OpenCV's binding wants too. The tests of training/src/net/gpu include this file.

use std::collections::BTreeMap;
use std::ffi::{c_void, CString};

/// Compiles the text of kernels to a library; its handle.
pub(super) fn compile(source: &str) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let (text, library) = (dir.path().join("kernels.cpp"), dir.path().join("libkernels.so"));
    std::fs::write(&text, source).unwrap();
    // -ffp-contract=off: the same bytes on every processor.
    let flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", "-shared", "-fPIC"];
    let done = std::process::Command::new("c++").args(flags).arg(&text).arg("-o").arg(&library).status();
    assert!(done.expect("these tests compile the kernels with c++").success());
    let path = CString::new(library.to_str().unwrap()).unwrap();
    // SAFETY: a library of plain functions, without initialisers; it stays loaded.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
    assert!(!handle.is_null());
    handle as usize
}

/// A kernel of a library by name and type.
///
/// # Safety
///
/// All kernels of the library take a 64-bit count and `A`.
pub(super) unsafe fn kernel<A>(library: usize, name: &str) -> unsafe extern "C" fn(i64, *const A) {
    let name = CString::new(name).unwrap();
    // SAFETY: dlsym reads the name; the signature is the caller's.
    unsafe {
        let found = libc::dlsym(library as *mut c_void, name.as_ptr());
        assert!(!found.is_null(), "{name:?}");
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(i64, *const A)>(found)
    }
}

/// Memory with a margin before and after, which nobody may write.
#[derive(Debug)]
struct Block {
    words: Vec<u128>,
    bytes: usize,
}

const MARGIN: usize = 16;
const MARK: u128 = 0x5a5a_a5a5_1234_fedc_5a5a_a5a5_1234_fedc;

impl Block {
    fn new(bytes: usize) -> Self {
        Self { words: vec![MARK; bytes.div_ceil(16) + 2 * MARGIN], bytes }
    }

    fn address(&self) -> u64 {
        self.words[MARGIN..].as_ptr() as u64
    }

    fn intact(&self) -> bool {
        let marks = |words: &[u128]| words.iter().all(|w| *w == MARK);
        let last = self.words.len() - MARGIN;
        let tail = self.bytes % 16;
        let end = self.words[last - usize::from(tail > 0)].to_le_bytes();
        marks(&self.words[..MARGIN]) && marks(&self.words[last..]) && (tail == 0 || end[tail..] == MARK.to_le_bytes()[tail..])
    }
}

/// What was reserved, by address.
#[derive(Debug, Default)]
pub(super) struct Memory {
    blocks: BTreeMap<u64, Block>,
}

impl Memory {
    pub fn reserve(&mut self, bytes: usize) -> u64 {
        let block = Block::new(bytes);
        let address = block.address();
        self.blocks.insert(address, block);
        address
    }

    pub fn free(&mut self, address: u64) {
        assert!(self.blocks.remove(&address).unwrap().intact(), "a kernel wrote past its memory");
    }

    /// Whether all margins are as they were.
    pub fn intact(&self) -> bool {
        self.blocks.values().all(Block::intact)
    }

    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// `len` bytes at an address inside a block.
    pub fn bytes(&mut self, address: u64, len: usize) -> &mut [u8] {
        let (first, block) = self.blocks.range_mut(..=address).next_back().expect("an address that was reserved");
        let at = (address - first) as usize;
        assert!(at + len <= block.bytes, "{len} bytes at {at} of {}", block.bytes);
        // SAFETY: the block has that many bytes, any bytes are numbers, and it is borrowed by us alone.
        unsafe { std::slice::from_raw_parts_mut(address as *mut u8, len) }
    }

    /// Sets all bytes of a block to 0.
    #[allow(dead_code, reason = "of the two that include this file one clears nothing")]
    pub fn clear(&mut self, address: u64) {
        let bytes = self.blocks[&address].bytes;
        self.bytes(address, bytes).fill(0);
    }
}
