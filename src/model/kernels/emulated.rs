//! AMX's tiles for tests on processors that have none: an instruction that the processor does not know is computed here instead.
//!
//! Of AMX that is what `bf16.rs` and `halves.rs` use, and zeroing, by Intel's manual (Instruction Set Extensions Programming Reference,
//! chapter 3). Whether a processor gives the same last bits has not been seen.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

/// Rows of a tile.
const ROWS: usize = 16;
/// Numbers of 32 bits in a row.
const ACROSS: usize = 16;

type Tile = [[u32; ACROSS]; ROWS];

/// A thread's tiles, all of [`ROWS`] whole rows once they are configured; other shapes nobody asks for.
struct Tiles {
    configured: bool,
    tiles: [Tile; 8],
}

thread_local! {
    static TILES: UnsafeCell<Tiles> = const { UnsafeCell::new(Tiles { configured: false, tiles: [[[0; ACROSS]; ROWS]; 8] }) };
}

/// What a memory operand is made of: registers by their numbers, an index that is multiplied, and how much is added.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Memory {
    base: u8,
    index: Option<(u8, u32)>,
    plus: i64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Instruction {
    Configure(Memory),
    Release,
    Zero(usize),
    /// Rows lie an index apart.
    Load(usize, Memory),
    Store(usize, Memory),
    /// To the first the products of the second and the third are added.
    Multiply(usize, usize, usize),
}

/// The instruction that begins with `byte(0)`, and of how many bytes it is; of AMX's, whose tiles are those that there are.
fn decode(byte: impl Fn(usize) -> u8) -> Option<(Instruction, usize)> {
    // Three bytes of VEX for the second map of opcodes, 128 bits, W0.
    if byte(0) != 0xc4 || byte(1) & 0x1f != 2 || byte(2) & 0x84 != 0 {
        return None;
    }
    let (inverted, third, prefix) = (!byte(1), usize::from(!byte(2) >> 3 & 15), byte(2) & 3);
    let (opcode, modrm) = (byte(3), byte(4));
    let (mode, low) = (modrm >> 6, modrm & 7);
    let register = usize::from(modrm >> 3 & 7);
    if inverted & 0x80 != 0 {
        return None;
    }
    if mode == 3 {
        let other = usize::from(low);
        let found = match (opcode, prefix) {
            (0x49, 0) if modrm == 0xc0 => Instruction::Release,
            (0x49, 3) if low == 0 => Instruction::Zero(register),
            (0x5c, 2) if third < 8 => Instruction::Multiply(register, other, third),
            _ => return None,
        };
        return Some((found, 5));
    }
    let (base_high, index_high) = (inverted >> 2 & 8, inverted >> 3 & 8);
    let (base, index, mut at) = if low == 4 {
        let (scale, index, base) = (byte(5) >> 6, byte(5) >> 3 & 7 | index_high, byte(5) & 7);
        ((base, base | base_high), (index != 4).then_some((index, 1u32 << scale)), 6)
    } else {
        ((low, low | base_high), None, 5)
    };
    let plus = match mode {
        // No base at all, or the instruction's own address: nobody writes it.
        0 if base.0 == 5 => return None,
        0 => 0,
        1 => {
            at += 1;
            i64::from(byte(at - 1) as i8)
        }
        _ => {
            at += 4;
            i64::from(i32::from_le_bytes(std::array::from_fn(|i| byte(at - 4 + i))))
        }
    };
    let memory = Memory { base: base.1, index, plus };
    let found = match (opcode, prefix) {
        (0x49, 0) if register == 0 => Instruction::Configure(memory),
        (0x4b, 1 | 3) if low == 4 => Instruction::Load(register, memory),
        (0x4b, 2) if low == 4 => Instruction::Store(register, memory),
        _ => return None,
    };
    Some((found, at))
}

/// What is too small for a normal number is zero, before and after.
#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE {
        0f32.copysign(x)
    } else {
        x
    }
}

/// The even and the odd of two bfloat16.
#[inline(always)]
fn pair(bits: u32) -> (f32, f32) {
    (flush(f32::from_bits(bits << 16)), flush(f32::from_bits(bits & 0xffff_0000)))
}

/// `sums + a b`: of each row and column the products of even and of odd numbers are summed up by themselves.
#[inline(always)]
fn products(sums: &mut Tile, a: &Tile, b: &Tile) {
    for (sums, a) in sums.iter_mut().zip(a) {
        let (mut even, mut odd) = ([0f32; ACROSS], [0f32; ACROSS]);
        for (a, b) in a.iter().zip(b) {
            let a = pair(*a);
            for n in 0..ACROSS {
                let b = pair(b[n]);
                even[n] = flush(a.0.mul_add(b.0, even[n]));
                odd[n] = flush(a.1.mul_add(b.1, odd[n]));
            }
        }
        for n in 0..ACROSS {
            sums[n] = flush(flush(f32::from_bits(sums[n])) + flush(even[n] + odd[n])).to_bits();
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
fn products_avx512(sums: &mut Tile, a: &Tile, b: &Tile) {
    products(sums, a, b);
}

impl Tiles {
    /// # Safety
    ///
    /// What the instruction reads and writes is there, and the processor has AVX-512. `address` gives where a memory operand begins, and
    /// how far apart its rows are.
    unsafe fn run(&mut self, instruction: Instruction, address: impl Fn(Memory) -> (usize, usize)) -> bool {
        match instruction {
            Instruction::Configure(memory) => {
                // SAFETY: the caller's promise.
                let shapes = unsafe { (address(memory).0 as *const [u8; 64]).read_unaligned() };
                let whole = |tile: usize| shapes[16 + 2 * tile] == 64 && shapes[17 + 2 * tile] == 0 && shapes[48 + tile] == 16;
                self.tiles = [[[0; ACROSS]; ROWS]; 8];
                self.configured = shapes[0] == 1 && (0..8).all(whole);
                self.configured
            }
            Instruction::Release => {
                self.configured = false;
                true
            }
            _ if !self.configured => false,
            Instruction::Zero(tile) => {
                self.tiles[tile] = [[0; ACROSS]; ROWS];
                true
            }
            Instruction::Load(tile, memory) => {
                let (from, apart) = address(memory);
                for (r, row) in self.tiles[tile].iter_mut().enumerate() {
                    // SAFETY: the caller's promise.
                    *row = unsafe { (from.wrapping_add(r.wrapping_mul(apart)) as *const [u32; ACROSS]).read_unaligned() };
                }
                true
            }
            Instruction::Store(tile, memory) => {
                let (to, apart) = address(memory);
                for (r, row) in self.tiles[tile].iter().enumerate() {
                    // SAFETY: the caller's promise.
                    unsafe { (to.wrapping_add(r.wrapping_mul(apart)) as *mut [u32; ACROSS]).write_unaligned(*row) };
                }
                true
            }
            Instruction::Multiply(sums, a, b) => {
                // The manual forbids one tile twice.
                if sums == a || a == b || sums == b {
                    return false;
                }
                let (a, b) = (self.tiles[a], self.tiles[b]);
                // SAFETY: the caller's promise.
                unsafe { products_avx512(&mut self.tiles[sums], &a, &b) };
                true
            }
        }
    }
}

/// Registers in the order of their numbers.
const REGISTERS: [c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Computes what the processor refused and what of AMX comes after it; what is not AMX's ends the process, as it would have.
extern "C" fn refused(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the system gives the refused thread's registers, whose instruction pointer is at code; `install` has seen AVX-512.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let of = |registers: &[i64], number: u8| registers[REGISTERS[usize::from(number)] as usize];
        let mut any = false;
        loop {
            let at = registers[libc::REG_RIP as usize] as usize;
            let Some((instruction, bytes)) = decode(|i| ((at + i) as *const u8).read()) else { break };
            let address = |memory: Memory| {
                let apart = memory.index.map_or(0, |(index, scale)| of(registers, index).wrapping_mul(i64::from(scale)));
                // Where rows lie apart, the first is at the base.
                (of(registers, memory.base).wrapping_add(memory.plus) as usize, apart as usize)
            };
            if !TILES.with(|tiles| (*tiles.get()).run(instruction, address)) {
                break;
            }
            registers[libc::REG_RIP as usize] += bytes as i64;
            any = true;
        }
        if !any {
            libc::signal(libc::SIGILL, libc::SIG_DFL);
        }
    }
}

/// Whether tiles can be used from now on, by the processor or by what is here; asked for by tests only.
pub(super) fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        if super::bf16::tiles() {
            return true;
        }
        // Kernels of tiles use these beside them.
        if super::Isa::detect() != super::Isa::Avx512 || !super::bf16::vectors() {
            return false;
        }
        // SAFETY: a handler that touches nothing but the thread's registers and its own tiles.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = refused as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()) == 0
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(code: &[u8]) -> Option<(Instruction, usize)> {
        decode(|i| code.get(i).copied().unwrap_or(0))
    }

    /// What an assembler writes (GNU as 2.40).
    #[test]
    fn instructions_are_read_as_assemblers_write_them() {
        let memory = |base, index, plus| Memory { base, index, plus };
        for (code, want) in [
            // ldtilecfg [rdi]; ldtilecfg [rsp + 64]; ldtilecfg [r12]
            (&[0xc4, 0xe2, 0x78, 0x49, 0x07][..], Instruction::Configure(memory(7, None, 0))),
            (&[0xc4, 0xe2, 0x78, 0x49, 0x44, 0x24, 0x40], Instruction::Configure(memory(4, None, 64))),
            (&[0xc4, 0xc2, 0x78, 0x49, 0x04, 0x24], Instruction::Configure(memory(12, None, 0))),
            // tilerelease; tilezero tmm5
            (&[0xc4, 0xe2, 0x78, 0x49, 0xc0], Instruction::Release),
            (&[0xc4, 0xe2, 0x7b, 0x49, 0xe8], Instruction::Zero(5)),
            // tileloadd tmm3, [rsi + rdx]; tileloadd tmm6, [r13 + r9 * 4 + 4096]; tileloaddt1 tmm1, [rax + rcx - 64]
            (&[0xc4, 0xe2, 0x7b, 0x4b, 0x1c, 0x16], Instruction::Load(3, memory(6, Some((2, 1)), 0))),
            (&[0xc4, 0x82, 0x7b, 0x4b, 0xb4, 0x8d, 0x00, 0x10, 0x00, 0x00], Instruction::Load(6, memory(13, Some((9, 4)), 4096))),
            (&[0xc4, 0xe2, 0x79, 0x4b, 0x4c, 0x08, 0xc0], Instruction::Load(1, memory(0, Some((1, 1)), -64))),
            // tilestored [rbx + r12 + 1024], tmm7
            (&[0xc4, 0xa2, 0x7a, 0x4b, 0xbc, 0x23, 0x00, 0x04, 0x00, 0x00], Instruction::Store(7, memory(3, Some((12, 1)), 1024))),
            // tdpbf16ps tmm2, tmm5, tmm6
            (&[0xc4, 0xe2, 0x4a, 0x5c, 0xd5], Instruction::Multiply(2, 5, 6)),
        ] {
            assert_eq!(of(code), Some((want, code.len())), "{code:02x?}");
        }
        // tdpbssd, a move, an instruction of VEX that is none of AMX's, nothing.
        for code in [&[0xc4, 0xe2, 0x4b, 0x5e, 0xd5][..], &[0x48, 0x89, 0xc8], &[0xc4, 0xe2, 0x4b, 0xf5, 0xd5], &[]] {
            assert_eq!(of(code), None, "{code:02x?}");
        }
    }

    fn tile(seed: u64, exponents: i32) -> Tile {
        let value = |i: u64| {
            let size = 2f32.powi((crate::test_noise(seed ^ 99, i) * exponents as f32) as i32);
            super::super::bf16::rounded16(crate::test_noise(seed, i) * size)
        };
        std::array::from_fn(|r| {
            std::array::from_fn(|c| {
                let i = (2 * (ACROSS * r + c)) as u64;
                u32::from(value(i)) | u32::from(value(i + 1)) << 16
            })
        })
    }

    fn sums(seed: u64) -> Tile {
        std::array::from_fn(|r| std::array::from_fn(|c| crate::test_noise(seed, (ACROSS * r + c) as u64).to_bits()))
    }

    /// One product by the processor, or by what stands for it.
    fn by_instructions(sums: &Tile, a: &Tile, b: &Tile) -> Tile {
        let mut out = [[0; ACROSS]; ROWS];
        // SAFETY: tiles are there, by `install`, configured as whole ones.
        unsafe {
            let _tiles = super::super::bf16::Tiles::new();
            std::arch::asm!(
                "tileloadd tmm0, [{sums} + {row}]",
                "tileloadd tmm1, [{a} + {row}]",
                "tileloadd tmm2, [{b} + {row}]",
                "tdpbf16ps tmm0, tmm1, tmm2",
                "tilestored [{out} + {row}], tmm0",
                sums = in(reg) sums, a = in(reg) a, b = in(reg) b, out = in(reg) &mut out, row = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, options(nostack)
            );
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// A product is what the definition in f64 says, computed here and by instructions, and these are refused and read as they
        /// should be, where the processor has none: both to the same bits.
        #[test]
        fn a_product_is_the_definitions_and_the_processors(seed in any::<u64>(), exponents in 0i32..62) {
            let (a, b) = (tile(seed, exponents), tile(seed ^ 1, exponents));
            let mut got = sums(seed ^ 2);
            let before = got;
            products(&mut got, &a, &b);
            let mut all = vec![got];
            if install() {
                all.push(by_instructions(&before, &a, &b));
                prop_assert!(super::super::bf16::tiles() || all[1] == got);
            } else {
                static SAID: std::sync::Once = std::sync::Once::new();
                SAID.call_once(|| eprintln!("skipped by instructions: this processor has no AVX-512 with BF16"));
            }
            for r in 0..ROWS {
                for c in 0..ACROSS {
                    let (mut want, mut size) = (f64::from(f32::from_bits(before[r][c])), 1f64);
                    for k in 0..ACROSS {
                        let (x, y) = (pair(a[r][k]), pair(b[k][c]));
                        for part in [f64::from(x.0) * f64::from(y.0), f64::from(x.1) * f64::from(y.1)] {
                            want += part;
                            size += part.abs();
                        }
                    }
                    for got in &all {
                        prop_assert!((f64::from(f32::from_bits(got[r][c])) - want).abs() < 1e-5 * size, "{r} {c}");
                    }
                }
            }
        }
    }
}
