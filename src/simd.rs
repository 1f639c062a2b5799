//! One safe kernel body, compiled for several instruction sets, chosen at run time; and memory for kernels.

/// The instruction set that a kernel body is compiled for; chosen once per call at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the target's baseline is.
    Portable,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX-512 F, with its vectors of other lengths (VL), which only Xeon Phi lacks.
    Avx512,
}

impl Isa {
    /// The best that this processor has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512vl") {
                return Self::Avx512;
            }
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Every set that this processor can run, best last: what a test walks through.
    pub fn available() -> Vec<Self> {
        [Self::Portable, Self::Avx2, Self::Avx512].into_iter().filter(|isa| *isa <= Self::detect()).collect()
    }
}

/// Compiles one safe body for each instruction set and calls the one that `isa` names.
macro_rules! dispatch {
    ($isa:expr, $body:ident ( $($arg:ident : $ty:ty),* $(,)? )) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) { $body::<true>($($arg),*) }
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) { $body::<true>($($arg),*) }
            match $isa {
                // SAFETY: `Isa::detect` found these features on this processor, and callers pass
                // nothing above what it returned.
                $crate::simd::Isa::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                $crate::simd::Isa::Avx2 => unsafe { avx2($($arg),*) },
                $crate::simd::Isa::Portable => $body::<false>($($arg),*),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = $isa;
            $body::<{ cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    }};
}
pub(crate) use dispatch;

/// `a * b + c`, fused where the instruction set has it (the libm fallback is far too slow).
#[inline(always)]
pub(crate) fn fma<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

/// Asks the system to back the whole pages of `memory` with huge ones. To be called before they are
/// first written; where the system does not know how, nothing happens.
pub(crate) fn advise_huge_pages<T>(memory: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let start = memory.as_ptr() as usize;
        let (first, end) = (start.next_multiple_of(PAGE), (start + size_of_val(memory)) / PAGE * PAGE);
        if first < end {
            // SAFETY: the range lies inside `memory`; the advice changes how it is backed, never what
            // it holds. That it may be refused does no harm.
            unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// Values that are worth huge pages.
const LARGE: usize = 1 << 20;

/// `n` zeros; if they are many, on huge pages: a network's first maps are otherwise tens of thousands of page faults.
pub(crate) fn zeroed(n: usize) -> Vec<f32> {
    let mut values = vec![0f32; n];
    if n >= LARGE {
        advise_huge_pages(&mut values);
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_memory_is_zero() {
        assert!(zeroed(LARGE + 3).iter().all(|v| *v == 0.0) && zeroed(5) == [0.0; 5] && zeroed(0).is_empty());
    }
}
