//! Images that wait for the model: a bounded queue per camera that drops its oldest and counts.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Queues of several cameras with one consumer, served in order of arrival.
#[derive(Debug)]
pub struct Inbox<T> {
    state: Mutex<State<T>>,
    arrived: Condvar,
}

#[derive(Debug)]
struct State<T> {
    /// Per camera: order of arrival and item.
    queues: Vec<VecDeque<(u64, T)>>,
    next: u64,
    depth: usize,
    dropped: Vec<u64>,
    deepest: Vec<usize>,
    closed: bool,
}

/// How full a camera's queue is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Level {
    /// Images that wait.
    pub waiting: usize,
    /// Most that ever waited.
    pub deepest: usize,
    /// Images dropped so far.
    pub dropped: u64,
}

impl<T> Inbox<T> {
    /// Queues for `cameras`, each of `depth`.
    pub fn new(cameras: usize, depth: usize) -> Self {
        let state = State {
            queues: (0..cameras).map(|_| VecDeque::new()).collect(),
            next: 0,
            depth: depth.max(1),
            dropped: vec![0; cameras],
            deepest: vec![0; cameras],
            closed: false,
        };
        Self { state: Mutex::new(state), arrived: Condvar::new() }
    }

    // The state is whole after every statement below, so a panic elsewhere cannot have torn it.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues an item; the oldest of the same camera goes if there are too many.
    pub fn push(&self, camera: usize, item: T) {
        let mut s = self.lock();
        if s.closed || camera >= s.queues.len() {
            return;
        }
        let (order, depth) = (s.next, s.depth);
        s.next += 1;
        s.queues[camera].push_back((order, item));
        while s.queues[camera].len() > depth {
            s.queues[camera].pop_front();
            s.dropped[camera] += 1;
        }
        s.deepest[camera] = s.deepest[camera].max(s.queues[camera].len());
        self.arrived.notify_one();
    }

    /// Waits for the item that came first; `None` once the inbox is closed.
    pub fn pop(&self) -> Option<(usize, T)> {
        let mut s = self.lock();
        loop {
            if s.closed {
                return None;
            }
            let first = s.queues.iter().enumerate().filter_map(|(c, q)| Some((q.front()?.0, c))).min();
            if let Some((_, item)) = first.and_then(|(_, camera)| s.queues[camera].pop_front()) {
                return first.map(|(_, camera)| (camera, item));
            }
            s = self.arrived.wait(s).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A new depth for all; what is too much then goes, oldest first.
    pub fn set_depth(&self, depth: usize) {
        let mut s = self.lock();
        s.depth = depth.max(1);
        for camera in 0..s.queues.len() {
            let surplus = s.queues[camera].len().saturating_sub(s.depth);
            s.queues[camera].drain(..surplus);
            s.dropped[camera] += surplus as u64;
        }
    }

    /// Throws away what waits; it is not counted as dropped.
    pub fn clear(&self) {
        self.lock().queues.iter_mut().for_each(VecDeque::clear);
    }

    /// Ends the consumer.
    pub fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_all();
    }

    /// How full a camera's queue is.
    pub fn level(&self, camera: usize) -> Level {
        let s = self.lock();
        Level { waiting: s.queues[camera].len(), deepest: s.deepest[camera], dropped: s.dropped[camera] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Never above its depth, the oldest goes first, nothing vanishes uncounted, arrival decides the order.
        #[test]
        fn bounded_and_accounted(ops in proptest::collection::vec((0usize..3, any::<bool>()), 0..300), depth in 1usize..6) {
            let inbox = Inbox::new(3, depth);
            let (mut pushed, mut popped, mut last) = ([0u64; 3], [0u64; 3], None);
            let mut model: Vec<VecDeque<usize>> = vec![VecDeque::new(); 3];
            for (i, (camera, push)) in ops.into_iter().enumerate() {
                if push {
                    inbox.push(camera, i);
                    pushed[camera] += 1;
                    model[camera].push_back(i);
                    if model[camera].len() > depth { model[camera].pop_front(); }
                } else if model.iter().any(|q| !q.is_empty()) {
                    let (camera, item) = inbox.pop().unwrap();
                    prop_assert_eq!(Some(item), model.iter().filter_map(|q| q.front().copied()).min());
                    prop_assert_eq!(model[camera].pop_front(), Some(item));
                    popped[camera] += 1;
                    prop_assert!(last.is_none_or(|l| l < item));
                    last = Some(item);
                }
                for c in 0..3 {
                    let l = inbox.level(c);
                    prop_assert!(l.waiting <= depth && l.deepest <= depth);
                    prop_assert_eq!(pushed[c], popped[c] + l.waiting as u64 + l.dropped);
                }
            }
        }
    }

    #[test]
    fn a_waiting_consumer_is_woken_and_ended() {
        let inbox = Inbox::new(1, 2);
        std::thread::scope(|s| {
            let consumer = s.spawn(|| std::iter::from_fn(|| inbox.pop()).map(|(_, v)| v).collect::<Vec<i32>>());
            inbox.push(0, 7);
            while inbox.level(0).waiting > 0 {
                std::thread::yield_now();
            }
            inbox.close();
            inbox.push(0, 8);
            assert_eq!(consumer.join().unwrap(), [7]);
        });
    }

    #[test]
    fn a_smaller_depth_holds_at_once() {
        let inbox = Inbox::new(1, 5);
        (0..5).for_each(|i| inbox.push(0, i));
        inbox.set_depth(2);
        assert_eq!(inbox.level(0), Level { waiting: 2, deepest: 5, dropped: 3 });
        assert_eq!(inbox.pop(), Some((0, 3)));
        inbox.clear();
        assert_eq!(inbox.level(0), Level { waiting: 0, deepest: 5, dropped: 3 });
    }
}
