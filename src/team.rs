//! Several threads for one short piece of work, each on a processor of its own.
//!
//! A thread that sleeps is woken on the processor that it slept on, or on its waker's. Where that is busy and the kernel does not
//! look for an idle one (with few processors, of which one has been busy, Linux does not), it stays in the queue for as
//! long as a small network takes: measured, two threads then take as long as one, in every image. So who calls for help keeps the
//! helpers from its own processor until they wake.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Runs `work` once for each of `members`: here for the first, in threads of rayon's pool for the others. A helper that comes when
/// there is no `more` to do is sent away.
pub(crate) fn team<T: Send>(members: &mut [T], more: &(dyn Fn() -> bool + Sync), work: &(dyn Fn(&mut T) + Sync)) {
    match members {
        [] => {}
        [own] => work(own),
        // The caller works too: one thread less to wake.
        [own, others @ ..] => {
            let (caller, at_work) = (std::thread::current().id(), AtomicUsize::new(0));
            // One of the pool's own threads may be another caller's helper, but not now.
            let _own = rayon::current_thread_index().map(|_| Awake::new());
            let placed = place::place();
            if placed.known < others.len() {
                // Nothing is known of those that have not helped yet.
                rayon::spawn_broadcast(|_| place::sleeps());
            }
            rayon::in_place_scope(|s| {
                for other in others {
                    s.spawn(|_| {
                        // Where all are busy, as in a loop over images, the caller itself comes to this at the end.
                        if std::thread::current().id() == caller {
                            if more() {
                                work(other);
                            }
                            return;
                        }
                        at_work.fetch_add(1, Ordering::AcqRel);
                        let (_leaves, _own) = (Leaves(&at_work), Awake::new());
                        if more() {
                            work(other);
                        }
                    });
                }
                work(own);
                // To sleep for what is nearly done takes longer than to look, and a sleeper wakes on a helper's processor.
                let mut looks = 0;
                while at_work.load(Ordering::Acquire) > 0 && looks < LOOKS {
                    looks += 1;
                    std::hint::spin_loop();
                }
            });
        }
    }
}

/// How often the helpers' end is looked for before the caller sleeps: some hundred microseconds.
const LOOKS: usize = 10_000;

/// While a thread of the pool works; also when that panics.
struct Awake;

impl Awake {
    fn new() -> Self {
        place::awake();
        Self
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        place::sleeps();
    }
}

/// Also when the work panics.
struct Leaves<'a>(&'a AtomicUsize);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// `work` for every `size` values of `out` (fewer at the end) with their number, by as many threads as the pool has.
pub(crate) fn chunks<T: Send>(out: &mut [T], size: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    chunks_with(out, size, || (), |(), at, part| work(at, part));
}

/// [`chunks`], where each thread has a state of its own.
pub(crate) fn chunks_with<S: Send, T: Send>(
    out: &mut [T],
    size: usize,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize, &mut [T]) + Sync,
) {
    let parts: Vec<_> = out.chunks_mut(size).map(Mutex::new).collect();
    let next = AtomicUsize::new(0);
    let mut states: Vec<Option<S>> = (0..rayon::current_num_threads().min(parts.len())).map(|_| None).collect();
    team(&mut states, &|| next.load(Ordering::Relaxed) < parts.len(), &|own| {
        let own = own.get_or_insert_with(&state);
        while let Some((at, part)) = parts.iter().enumerate().nth(next.fetch_add(1, Ordering::Relaxed)) {
            work(own, at, &mut part.lock().unwrap_or_else(PoisonError::into_inner));
        }
    });
}

#[cfg(target_os = "linux")]
mod place {
    use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

    /// A thread that has helped.
    struct Helper {
        thread: libc::pid_t,
        state: Mutex<State>,
    }

    struct State {
        working: bool,
        /// Where it was when it last had done its part.
        slept: i32,
        /// What it might use then.
        allowed: libc::cpu_set_t,
        /// Whether a caller has bound it to fewer until it wakes.
        bound: bool,
    }

    impl Helper {
        fn new() -> Self {
            // SAFETY: takes nothing, returns a number.
            let thread = unsafe { libc::gettid() };
            Self { thread, state: Mutex::new(State { working: true, slept: here(), allowed: allowed(thread), bound: false }) }
        }

        fn state(&self) -> MutexGuard<'_, State> {
            self.state.lock().unwrap_or_else(PoisonError::into_inner)
        }

        /// May use again what it might.
        fn free(&self, state: &mut State) {
            if std::mem::take(&mut state.bound) {
                allow(self.thread, &state.allowed);
            }
        }
    }

    static HELPERS: Mutex<Vec<Weak<Helper>>> = Mutex::new(Vec::new());

    thread_local! {
        static HELPER: Arc<Helper> = {
            let helper = Arc::new(Helper::new());
            let mut all = HELPERS.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|h| h.strong_count() > 0);
            all.push(Arc::downgrade(&helper));
            helper
        };
    }

    fn here() -> i32 {
        // SAFETY: takes nothing, returns a number.
        unsafe { libc::sched_getcpu() }
    }

    /// Empty where the system does not say.
    fn allowed(thread: libc::pid_t) -> libc::cpu_set_t {
        // SAFETY: a set of zeros is a set, and the call is given its size.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::sched_getaffinity(thread, size_of::<libc::cpu_set_t>(), &mut set);
            set
        }
    }

    fn allow(thread: libc::pid_t, set: &libc::cpu_set_t) -> bool {
        // SAFETY: a set, with its size; of a thread that is no more the system says so.
        unsafe { libc::sched_setaffinity(thread, size_of::<libc::cpu_set_t>(), set) == 0 }
    }

    fn has(set: &libc::cpu_set_t, cpu: i32) -> bool {
        // SAFETY: a number within the set.
        (0..libc::CPU_SETSIZE).contains(&cpu) && unsafe { libc::CPU_ISSET(cpu as usize, set) }
    }

    /// The set less `cpu`.
    fn without(mut set: libc::cpu_set_t, cpu: i32) -> libc::cpu_set_t {
        if has(&set, cpu) {
            // SAFETY: `cpu` is within the set.
            unsafe { libc::CPU_CLR(cpu as usize, &mut set) };
        }
        set
    }

    /// `cpu` was found in a set.
    fn only(cpu: i32) -> libc::cpu_set_t {
        // SAFETY: a set of zeros is a set, and `cpu` is within it.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(cpu as usize, &mut set);
            set
        }
    }

    /// This thread, of a pool, works.
    pub fn awake() {
        HELPER.with(|h| {
            let mut state = h.state();
            state.working = true;
            h.free(&mut state);
        });
    }

    /// It has done its part, and may sleep.
    pub fn sleeps() {
        HELPER.with(|h| {
            let mut state = h.state();
            h.free(&mut state);
            (state.allowed, state.slept, state.working) = (allowed(h.thread), here(), false);
        });
    }

    /// Helpers that are bound; the end of this frees those that did not wake.
    pub struct Placed {
        bound: Vec<Arc<Helper>>,
        /// Threads that have helped before, asleep or not.
        pub known: usize,
    }

    impl Drop for Placed {
        fn drop(&mut self) {
            self.bound.iter().for_each(|h| h.free(&mut h.state()));
        }
    }

    /// Helpers that are looked after: where there are more processors than this, the kernel finds idle ones.
    const MOST: usize = 16;

    /// Keeps each helper that sleeps, until it wakes, from this thread's processor; one that slept there, or where another did, is bound
    /// to one that has fewest.
    pub fn place() -> Placed {
        let caller = here();
        let mut taken = vec![caller];
        let mut all = HELPERS.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect::<Vec<_>>();
        // SAFETY: takes nothing, returns a number.
        let own = unsafe { libc::gettid() };
        all.retain(|h| h.thread != own);
        let known = all.len();
        all.truncate(MOST);
        all.retain(|helper| {
            let mut state = helper.state();
            if state.working {
                return false;
            }
            let may = |c: &i32| *c != caller && has(&state.allowed, *c);
            // A thread that may not use its waker's processor is woken where it slept, or on an idle one.
            let slept = state.slept;
            let (at, set) = if may(&slept) && !taken.contains(&slept) {
                (slept, without(state.allowed, caller))
            } else {
                // A pool has a thread more than a caller needs: two may have one processor.
                let fewest = (0..libc::CPU_SETSIZE).filter(may).min_by_key(|c| taken.iter().filter(|t| *t == c).count());
                let Some(to) = fewest else { return false };
                (to, only(to))
            };
            taken.push(at);
            state.bound |= allow(helper.thread, &set);
            state.bound
        });
        Placed { bound: all, known }
    }
}

#[cfg(not(target_os = "linux"))]
mod place {
    pub struct Placed {
        pub known: usize,
    }

    pub fn awake() {}
    pub fn sleeps() {}
    pub fn place() -> Placed {
        Placed { known: usize::MAX }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::AtomicBool;

    fn on_threads<T: Send>(n: usize, f: impl FnOnce() -> T + Send) -> T {
        rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap().install(f)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Every part once, with its number, whoever does it, also from within the pool.
        #[test]
        fn every_chunk_is_worked_on_once(n in 0usize..300, size in 1usize..50, threads in 1usize..6) {
            let work = |seen: &mut usize, at: usize, part: &mut [usize]| {
                *seen += 1;
                part.iter_mut().enumerate().for_each(|(i, v)| *v += at * size + i + 1);
            };
            let mut inside = vec![0; n];
            on_threads(threads, || chunks_with(&mut inside, size, || 0, work));
            let mut outside = vec![0; n];
            chunks_with(&mut outside, size, || 0, work);
            let want: Vec<usize> = (1..=n).collect();
            prop_assert!(inside == want && outside == want);
        }
    }

    #[test]
    fn a_panic_in_any_thread_is_the_callers() {
        for by_caller in [true, false] {
            let caller = std::thread::current().id();
            let waits = AtomicBool::new(true);
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let mut members = [0; 2];
                team(&mut members, &|| true, &|_| {
                    if (std::thread::current().id() == caller) == by_caller {
                        waits.store(false, Ordering::Release);
                        panic!("as asked");
                    }
                    while waits.load(Ordering::Acquire) {
                        std::thread::yield_now();
                    }
                });
            }));
            assert!(result.is_err());
        }
        let mut values = [0; 9];
        chunks(&mut values, 2, |_, v| v.fill(1));
        assert_eq!(values, [1; 9]);
    }

    /// What a thread may use is the same before and after, whether it woke or not, and a helper that sleeps is woken elsewhere than
    /// where its caller works.
    #[cfg(target_os = "linux")]
    #[test]
    fn helpers_get_processors_of_their_own_and_may_use_all_again() {
        let allowed = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            status.lines().find(|l| l.starts_with("Cpus_allowed_list")).unwrap().to_string()
        };
        let before = allowed();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        for _ in 0..20 {
            let (began, both) = (AtomicUsize::new(0), AtomicBool::new(false));
            pool.in_place_scope(|s| {
                s.spawn(|_| {
                    team(&mut [0; 2], &|| true, &|_| {
                        // Nobody goes on until the other is there.
                        if began.fetch_add(1, Ordering::AcqRel) == 1 {
                            both.store(true, Ordering::Release);
                        }
                        while !both.load(Ordering::Acquire) {
                            std::thread::yield_now();
                        }
                    });
                });
            });
            // Other tests' teams bind this pool's threads, too, while they run.
            let all = || pool.broadcast(|_| allowed()) == [before.clone(), before.clone()];
            assert!((0..500).any(|i| all()
                || (i < 499 && {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                    false
                })));
        }
    }
}
