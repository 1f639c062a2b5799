//! One safe kernel body, compiled for several instruction sets, chosen at run time; and memory and processors for kernels.

/// The instruction set that a kernel body is compiled for; chosen once per call at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Whatever the target's baseline is.
    Portable,
    /// AVX2 with fused multiply-add.
    Avx2,
    /// AVX-512 F.
    Avx512,
}

impl Isa {
    /// The best that this processor has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f") {
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
            #[target_feature(enable = "avx512f,avx2,fma")]
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

/// Which processors the threads of one piece of work run on. A thread that sleeps is often woken on its waker's processor
/// while another idles, and stays there for longer than a small network takes: measured, two threads then take as long
/// as one.
#[derive(Debug, Default)]
pub(crate) struct Processors {
    /// Of the first 64.
    taken: std::sync::atomic::AtomicU64,
}

impl Processors {
    /// Takes the processor that this thread runs on; if another thread of the work has it, this one moves to one that
    /// none has, if there is and it may. Elsewhere than on Linux nothing happens.
    pub fn take(&self) {
        #[cfg(target_os = "linux")]
        {
            use std::sync::atomic::Ordering::Relaxed;
            let bit = |at: i32| if (0..64).contains(&at) { 1u64 << at } else { 0 };
            // SAFETY: takes nothing, returns a number.
            let here = bit(unsafe { libc::sched_getcpu() });
            let taken = self.taken.fetch_or(here, Relaxed);
            if taken & here == 0 {
                return;
            }
            let size = size_of::<libc::cpu_set_t>();
            // SAFETY: a set of zeros is a set; both calls are given its size and are of this thread alone, and what was
            // allowed before is allowed again at the end.
            unsafe {
                let mut allowed: libc::cpu_set_t = std::mem::zeroed();
                if libc::sched_getaffinity(0, size, &mut allowed) != 0 {
                    return;
                }
                let mut free: libc::cpu_set_t = std::mem::zeroed();
                let mut any = false;
                for cpu in (0..64usize).filter(|c| taken >> c & 1 == 0 && libc::CPU_ISSET(*c, &allowed)) {
                    libc::CPU_SET(cpu, &mut free);
                    any = true;
                }
                if any && libc::sched_setaffinity(0, size, &free) == 0 {
                    self.taken.fetch_or(bit(libc::sched_getcpu()), Relaxed);
                    libc::sched_setaffinity(0, size, &allowed);
                }
            }
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn allowed() -> Vec<usize> {
        // SAFETY: a set of zeros is a set, and the call is given its size.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            assert_eq!(libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set), 0);
            (0..1024usize).filter(|c| libc::CPU_ISSET(*c, &set)).collect()
        }
    }

    #[test]
    fn threads_take_processors_of_their_own_and_may_use_all_again() {
        let before = allowed();
        let processors = Processors::default();
        for _ in 0..2 {
            std::thread::scope(|s| {
                s.spawn(|| {
                    processors.take();
                    assert_eq!(allowed(), before);
                });
            });
        }
        let taken = processors.taken.load(std::sync::atomic::Ordering::Relaxed).count_ones() as usize;
        assert_eq!(taken, before.iter().filter(|c| **c < 64).count().min(2));
    }

    #[test]
    fn large_memory_is_zero() {
        assert!(zeroed(LARGE + 3).iter().all(|v| *v == 0.0) && zeroed(5) == [0.0; 5] && zeroed(0).is_empty());
    }
}
