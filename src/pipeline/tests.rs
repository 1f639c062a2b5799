use super::*;
use crate::descriptor::ModelIdentity;
use proptest::prelude::*;

/// A ring road of `places`, one descriptor each; neighbours are alike, others are not.
fn place(at: f64, noise: u64) -> Descriptor {
    let values = (0..64u64)
        .map(|d| {
            let centre = d as f64 - at.rem_euclid(64.0);
            let near = (-(centre * centre) / 4.0).exp() as f32;
            near + 0.02 * crate::test_noise(noise, d)
        })
        .collect();
    Descriptor::new(values).unwrap()
}

fn frame(seconds: f64, at: f64) -> Frame {
    Frame {
        camera: String::new(),
        stamp_ns: (seconds * 1e9) as i64,
        name: format!("{seconds}"),
        descriptor: place(at, (seconds * 1e3) as u64),
        luma_std: 40.0,
        median_depth_m: None,
        glance: None,
        odom_from_base: None,
        features: None,
        calibration: None,
    }
}

fn detector(change: impl FnOnce(&mut Config)) -> LoopDetector {
    let mut config = Config::default();
    config.decision.min_consistent = 3;
    change(&mut config);
    LoopDetector::new(config, Map::new(ModelIdentity::default()), Recommended { similarity_threshold: Some(0.8), ..Recommended::default() })
        .unwrap()
}

fn decisions(detector: &mut LoopDetector, frames: impl IntoIterator<Item = Frame>) -> Vec<Decision> {
    frames
        .into_iter()
        .filter_map(|f| match detector.process(f).unwrap() {
            Step::Keyframe(d) => Some(d),
            Step::Skipped(_) => None,
        })
        .collect()
}

#[test]
fn the_second_lap_closes_and_the_first_does_not() {
    let mut d = detector(|_| {});
    let all = decisions(&mut d, (0..120).map(|i| frame(f64::from(i), f64::from(i % 60))));
    assert!(all[..60].iter().all(|d| d.outcome != Outcome::Closure));
    let closed: Vec<_> = all.iter().filter(|d| d.outcome == Outcome::Closure).collect();
    assert!(closed.len() >= 55, "{}", closed.len());
    for c in closed {
        assert!(c.query.abs_diff(c.evidence.unwrap().matched + 60) <= 1, "{c:?}");
    }
    // A chain waits for company, whatever its first matches look like.
    assert!(all[60].outcome != Outcome::Closure && all[61].outcome != Outcome::Closure);
}

#[test]
fn each_reason_is_given_for_its_own_cause() {
    let lap = || (0..60).map(|i| frame(f64::from(i), f64::from(i)));
    let last = |d: &mut LoopDetector, f: Frame| decisions(d, [f]).pop().unwrap().outcome;
    assert_eq!(last(&mut detector(|_| {}), frame(0.0, 0.0)), Outcome::Rejected(Reason::TooRecent));

    let mut d = detector(|c| c.decision.similarity_threshold = 0.999);
    decisions(&mut d, lap());
    assert_eq!(last(&mut d, frame(100.0, 10.5)), Outcome::Rejected(Reason::LowSimilarity));

    // Two stretches that look the same; unlinked, so that each counts as a place of its own.
    let mut d2 = detector(|_| {});
    decisions(&mut d2, (0..60).map(|i| frame(f64::from(i), f64::from(i % 30))));
    let map = {
        let mut fresh = Map::new(ModelIdentity::default());
        for (i, k) in d2.map().keyframes().iter().enumerate() {
            fresh.push(k.clone(), &Descriptor::new(d2.map().index().row(i).to_vec()).unwrap()).unwrap();
        }
        fresh
    };
    let mut d3 = detector(|_| {});
    d3.map = map;
    d3.session = 1;
    assert_eq!(last(&mut d3, frame(500.0, 7.0)), Outcome::Rejected(Reason::Ambiguous));

    let mut d = detector(|c| {
        c.decision.min_consistent = 1;
        c.decision.min_closure_interval_s = 5.0;
    });
    decisions(&mut d, lap());
    assert_eq!(last(&mut d, frame(100.0, 10.0)), Outcome::Closure);
    assert_eq!(last(&mut d, frame(101.0, 11.0)), Outcome::Rejected(Reason::RateLimit));
    assert_eq!(last(&mut d, frame(106.0, 12.0)), Outcome::Closure);

    let mut d = detector(|c| {
        c.decision.min_consistent = 1;
        c.decision.max_odometry_distance_m = 20.0;
    });
    let at = |f: Frame, x: f64| Frame { odom_from_base: Some(Isometry3::translation(x, 0.0, 0.0)), ..f };
    decisions(&mut d, lap().enumerate().map(|(i, f)| at(f, i as f64)));
    assert_eq!(last(&mut d, at(frame(100.0, 10.0), 500.0)), Outcome::Rejected(Reason::PoseGate));
    assert_eq!(last(&mut d, at(frame(101.0, 11.0), 12.0)), Outcome::Closure);
}

#[test]
fn nothing_is_added_while_parked_and_bad_images_and_stamps_are_named() {
    let mut d = detector(|_| {});
    assert!(matches!(d.process(frame(0.0, 5.0)).unwrap(), Step::Keyframe(_)));
    for i in 1..3600 {
        let mut f = frame(f64::from(i), 5.0);
        f.descriptor = place(5.0, i as u64);
        assert_eq!(d.process(f).unwrap(), Step::Skipped(Skip::Stationary));
    }
    assert!(matches!(d.process(frame(3600.1, 9.0)).unwrap(), Step::Keyframe(_)));
    assert_eq!(d.process(frame(3600.2, 14.0)).unwrap(), Step::Skipped(Skip::TooSoon));
    assert_eq!(d.process(frame(10.0, 14.0)).unwrap(), Step::Skipped(Skip::TimeJump));
    let dark = Frame { luma_std: 1.0, ..frame(4000.0, 20.0) };
    assert_eq!(d.process(dark).unwrap(), Step::Skipped(Skip::LowQuality));
    let nan = Frame { luma_std: f32::NAN, ..frame(4001.0, 20.0) };
    assert_eq!(d.process(nan).unwrap(), Step::Skipped(Skip::LowQuality));
    assert_eq!(d.map().keyframes().len(), 2);

    // With odometry the wheels decide, whatever passes before the lens.
    let mut d = detector(|_| {});
    let at = |f: Frame, x: f64| Frame { odom_from_base: Some(Isometry3::translation(x, 0.0, 0.0)), ..f };
    d.process(at(frame(0.0, 0.0), 0.0)).unwrap();
    assert_eq!(d.process(at(frame(1.0, 30.0), 0.1)).unwrap(), Step::Skipped(Skip::Stationary));
    assert!(matches!(d.process(at(frame(2.0, 0.0), 3.0)).unwrap(), Step::Keyframe(_)));
}

#[test]
fn a_robot_that_stands_before_a_fast_camera_is_not_described_without_a_pause() {
    let mut d = detector(|_| {});
    let frames = (0..300).map(|i| Frame { descriptor: place(5.0, 1), ..frame(f64::from(i) / 30.0, 0.0) });
    let skips: Vec<Step> = frames.map(|f| d.process(f).unwrap()).collect();
    let described = skips.iter().filter(|s| **s == Step::Skipped(Skip::Stationary)).count();
    assert!((55..=66).contains(&described), "ten seconds at most every 0.15 s: {described}");
    assert_eq!(skips.iter().filter(|s| **s == Step::Skipped(Skip::TooSoon)).count(), 299 - described);
}

#[test]
fn a_wall_before_the_lens_is_no_place() {
    let near = |f: Frame, d: f32| Frame { median_depth_m: Some(d), ..f };
    let mut d = detector(|c| c.keyframe.min_depth_m = 0.8);
    assert_eq!(d.process(near(frame(0.0, 1.0), 0.79)).unwrap(), Step::Skipped(Skip::LowQuality));
    assert!(matches!(d.process(near(frame(1.0, 1.0), 0.8)).unwrap(), Step::Keyframe(_)));
    assert!(matches!(d.process(frame(2.0, 9.0)).unwrap(), Step::Keyframe(_)), "no depth, no verdict");
    let mut off = detector(|_| {});
    assert!(matches!(off.process(near(frame(0.0, 1.0), 0.01)).unwrap(), Step::Keyframe(_)));
}

#[test]
fn no_change_asked_for_holds_back_nothing() {
    let mut d = detector(|c| c.keyframe.min_descriptor_change = 0.0);
    let same = |i: i32| Frame { descriptor: place(f64::from(i / 2), 5), ..frame(f64::from(i), 0.0) };
    assert_eq!(decisions(&mut d, (0..200).map(same)).len(), 200);
}

#[test]
fn a_look_alike_that_stands_still_is_no_loop() {
    let mut d = detector(|c| c.decision.min_consistent = 5);
    decisions(&mut d, (0..60).map(|i| frame(f64::from(i), f64::from(i))));
    // The robot moves (the noise of each frame is its own), but always the same place of the map comes up.
    let stuck =
        (0..20).map(|i| Frame { descriptor: place(20.0 + 0.4 * f64::from(i % 2), 77 + i as u64), ..frame(100.0 + f64::from(i), 20.0) });
    let mut d2 = detector(|c| {
        c.decision.min_consistent = 5;
        c.keyframe.min_descriptor_change = 0.0;
    });
    d2.map = d.map.clone();
    d2.session = 1;
    let all = decisions(&mut d2, stuck);
    assert!(all.len() == 20 && all.iter().all(|d| d.outcome == Outcome::Rejected(Reason::NotConsistent)), "{all:?}");
    let e = all[19].evidence.unwrap();
    assert!(e.consistent_count >= 20 && e.advance.unwrap().pace.abs() < 0.4, "{e:?}");
    // Driven the other way it advances backwards, and is one.
    let back = (0..20).map(|i| frame(200.0 + f64::from(i), 40.0 - f64::from(i)));
    let all = decisions(&mut d, back);
    assert!(all[8..].iter().all(|d| d.outcome == Outcome::Closure), "{all:?}");
    assert!((all[10].evidence.unwrap().advance.unwrap().pace + 1.0).abs() < 0.3);
}

#[test]
fn a_clock_that_was_set_back_begins_a_session_and_a_glitch_does_not() {
    let mut d = detector(|_| {});
    decisions(&mut d, (0..60).map(|i| frame(1000.0 + f64::from(i), f64::from(i))));
    // One stamp of zero, as drivers send when they forget it.
    assert_eq!(d.process(frame(0.0, 60.0)).unwrap(), Step::Skipped(Skip::TimeJump));
    assert_eq!(decisions(&mut d, [frame(1060.0, 60.0)]).len(), 1);
    assert_eq!(d.session(), 0);
    // The bag begins again: its frames are seen, as a session of their own, and close onto the first.
    let all = decisions(&mut d, (0..60).map(|i| frame(1000.0 + f64::from(i), f64::from(i))));
    assert_eq!((all.len(), d.session()), (60 - JUMPS + 1, 1));
    assert_eq!(all[0].outside_window, [0..61], "the whole first session, none of it excluded");
    assert!(all.iter().filter(|d| d.outcome == Outcome::Closure).count() >= 50);
}

#[test]
fn a_rival_below_the_top_k_is_found() {
    // Nine keyframes of one place, all within the place radius, then its look-alike among others.
    let mut d = detector(|c| {
        c.search.top_k = 4;
        // No closure, which would join the two.
        c.decision.min_consistent = 50;
        c.keyframe.min_descriptor_change = 0.0;
    });
    let slowly = (0..9).map(|i| frame(f64::from(i), 20.0 + 0.01 * f64::from(i)));
    let elsewhere = (0..20).map(|i| frame(50.0 + f64::from(i), 30.0 + f64::from(i)));
    let after = (0..12).map(|i| frame(90.0 + f64::from(i), 50.0 + f64::from(i)));
    decisions(&mut d, slowly.chain(elsewhere).chain([frame(80.0, 20.6)]).chain(after));
    let e = decisions(&mut d, [frame(200.0, 20.1)]).pop().unwrap().evidence.unwrap();
    assert!(e.second.is_some_and(|s| s.row == 29) && e.matched < 9, "{e:?}");
}

#[test]
fn a_line_through_matches() {
    let of = |positions: &[u32]| Advance::of(positions);
    assert_eq!(of(&[5, 6]), None);
    assert_eq!(of(&[5, 7, 9, 11]), Some(Advance { pace: 2.0, error: 0.0 }));
    let a = of(&[10, 10, 10, 13]).unwrap();
    // By hand: slope 0.9; residuals 0.6, -0.3, -1.2, 0.9.
    assert!((a.pace - 0.9).abs() < 1e-12 && (a.error - 1.2).abs() < 1e-12, "{a:?}");
}

#[test]
fn a_third_lap_is_no_less_certain_than_the_second() {
    let mut d = detector(|_| {});
    let all = decisions(&mut d, (0..180).map(|i| frame(f64::from(i), f64::from(i % 60))));
    let closed = |range: std::ops::Range<usize>| all[range].iter().filter(|d| d.outcome == Outcome::Closure).count();
    assert!(closed(120..180) >= 55, "{} after {}", closed(120..180), closed(60..120));
}

#[test]
fn a_stamp_far_ahead_is_a_jump_and_several_begin_a_session() {
    let mut d = detector(|_| {});
    decisions(&mut d, (0..30).map(|i| frame(f64::from(i), f64::from(i))));
    // A driver's uninitialised stamp, once: nothing is spoilt.
    assert_eq!(d.process(frame(4e9, 30.0)).unwrap(), Step::Skipped(Skip::TimeJump));
    assert!(matches!(d.process(frame(30.0, 30.0)).unwrap(), Step::Keyframe(_)));
    let all = decisions(&mut d, (0..20).map(|i| frame(1e6 + f64::from(i), f64::from(i))));
    assert_eq!((all.len(), d.session()), (20 - JUMPS + 1, 1));
    // Parked for a day with the camera running: no jump.
    let mut d = detector(|_| {});
    decisions(&mut d, [frame(0.0, 5.0)]);
    (0..1440).for_each(|i| assert_eq!(d.process(frame(60.0 * f64::from(i + 1), 5.0)).unwrap(), Step::Skipped(Skip::Stationary)));
    assert!(matches!(d.process(frame(86_460.0, 9.0)).unwrap(), Step::Keyframe(_)));
}

#[test]
fn what_is_known_before_describing_agrees_with_what_is_decided_after() {
    let at = |f: Frame, x: f64| Frame { odom_from_base: Some(Isometry3::translation(x, 0.0, 0.0)), ..f };
    let frames = || (0..400).map(|i| at(frame(f64::from(i) * 0.04, f64::from(i) * 0.03), f64::from(i / 3) * 0.1));
    let mut whole = detector(|_| {});
    let want: Vec<Step> = frames().map(|f| whole.process(f).unwrap()).collect();
    let mut early = detector(|_| {});
    let got = frames().map(|f| match early.skips("", f.stamp_ns, f.odom_from_base.as_ref()) {
        Some(skip) => early.skip("", f.stamp_ns, skip).map(Step::Skipped).unwrap_or_else(|| early.process(f).unwrap()),
        None => early.process(f).unwrap(),
    });
    assert_eq!(got.collect::<Vec<_>>(), want);
    assert!(want.contains(&Step::Skipped(Skip::TooSoon)) && want.contains(&Step::Skipped(Skip::Stationary)));
}

#[test]
fn looking_up_adds_nothing_and_finds_the_same() {
    let mut d = detector(|_| {});
    decisions(&mut d, (0..60).map(|i| frame(f64::from(i), f64::from(i))));
    let map = d.map().clone();
    let second = || (0..60).map(|i| frame(1000.0 + f64::from(i), f64::from(i) + 0.3));
    let run = |localization_only: bool| {
        let mut d =
            LoopDetector::new(d.config().clone(), map.clone(), Recommended { similarity_threshold: Some(0.8), ..Recommended::default() })
                .unwrap();
        d.set_localization_only(localization_only);
        let all = decisions(&mut d, second());
        (
            all.iter().map(|d| (d.outcome, d.evidence.map(|e| e.matched))).collect::<Vec<_>>(),
            d.map().keyframes().len(),
            d.map().links().len(),
        )
    };
    let ((mapped, grown, _), (found, still, links)) = (run(false), run(true));
    assert_eq!(mapped, found);
    assert_eq!((grown, still, links), (120, 60, 0));
}

#[test]
fn relocalization_looks_at_all_of_the_map_and_says_when_it_is_done() {
    let mut d = detector(|c| c.search.exclusion_s = 1e4);
    decisions(&mut d, (0..60).map(|i| frame(f64::from(i), f64::from(i))));
    // Carried back to the start, within the exclusion window of its own session.
    d.relocalize();
    let all = decisions(&mut d, (0..30).map(|i| frame(61.0 + f64::from(i), 5.0 + f64::from(i))));
    let done: Vec<usize> = all.iter().enumerate().filter(|(_, d)| d.relocalized).map(|(i, _)| i).collect();
    assert_eq!(done, [2], "the first closure, once a chain of three stands");
    assert!(!d.relocalizing() && all[2].evidence.unwrap().matched.abs_diff(7) <= 1);
    assert!(all[3..].iter().all(|d| d.outcome == Outcome::Closure));
}

#[test]
fn two_cameras_share_a_map_and_not_a_chain() {
    let mut d = detector(|_| {});
    let of = |camera: &str, f: Frame| Frame { camera: camera.into(), ..f };
    // The rear camera sees the other half of the ring.
    let lap = |t: f64| {
        (0..25).flat_map(move |i| {
            let (t, i) = (t + f64::from(i), f64::from(i));
            [of("front", frame(t, i)), of("rear", frame(t, 32.0 + i * 0.9))]
        })
    };
    let first = decisions(&mut d, lap(0.0));
    let second = decisions(&mut d, lap(1000.0));
    assert_eq!(first.len() + second.len(), 100);
    for (i, s) in second.iter().enumerate().skip(6) {
        let camera = &d.map().keyframes()[s.query].camera;
        let e = s.evidence.unwrap();
        assert_eq!(s.outcome, Outcome::Closure, "{i} {s:?}");
        assert_eq!(&d.map().keyframes()[e.matched].camera, camera);
        assert!((e.advance.unwrap().pace - 1.0).abs() < 0.6, "counted along its own camera: {e:?}");
    }
}

#[test]
fn settings_change_while_running_or_not_at_all() {
    let mut d = detector(|_| {});
    decisions(&mut d, (0..60).map(|i| frame(f64::from(i), f64::from(i))));
    let mut strict = d.config().clone();
    strict.decision.similarity_threshold = 0.9999;
    d.set_config(strict.clone()).unwrap();
    assert_eq!(d.threshold(), 0.9999);
    assert!(decisions(&mut d, (0..20).map(|i| frame(100.0 + f64::from(i), f64::from(i)))).iter().all(|d| d.outcome != Outcome::Closure));
    let mut wrong = strict.clone();
    wrong.search.top_k = 0;
    assert!(d.set_config(wrong).is_err());
    assert_eq!(d.config(), &strict);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// A closure never breaks a setting, and the account of a run is the same twice.
    #[test]
    fn closures_keep_every_setting(stops in proptest::collection::vec((0.1f64..3.0, 0f64..64.0), 1..150), margin in 0f64..0.2, consistent in 1usize..5) {
        let run = || {
            let mut d = detector(|c| { c.decision.min_margin = margin; c.decision.min_consistent = consistent; });
            let mut t = 0.0;
            let all = decisions(&mut d, stops.iter().map(|(dt, at)| { t += dt; frame(t, *at) }));
            (all, d.map().keyframes().to_vec())
        };
        let (all, keyframes) = run();
        for d in &all {
            if d.outcome == Outcome::Closure {
                let e = d.evidence.unwrap();
                prop_assert!(e.similarity >= 0.8 && e.chain_similarity >= 0.8 && e.consistent_count >= consistent);
                prop_assert!(e.margin.is_none_or(|m| f64::from(m) >= margin));
                prop_assert!(d.query - e.matched >= 10 && e.time_gap_s >= 20.0 - 1e-9);
                prop_assert_eq!(keyframes[d.query].session, 0);
            }
        }
        prop_assert_eq!(all, run().0);
    }
}

/// Without odometry a parked robot added a keyframe for every lorry that stopped before it.
#[test]
fn what_passes_a_parked_robot_is_no_keyframe() {
    // A wall of tiles, of which `moved` columns of ten show something else.
    let picture = |moved: u32, seed: u64| {
        let tile = |x: u32, y: u32| if x / 32 < moved { seed } else { 0 } + u64::from(x / 8 + 100 * (y / 8));
        let data = (0..240u32)
            .flat_map(|y| (0..320u32).map(move |x| (x, y)))
            .flat_map(|(x, y)| [(128.0 + 100.0 * crate::test_noise(tile(x, y), 5)) as u8; 3])
            .collect();
        crate::image::RgbImage::new(320, 240, data).unwrap().glance().ok()
    };
    let mut d = detector(|_| {});
    let mut step = |seconds: f64, at: f64, glance| d.process(Frame { glance, ..frame(seconds, at) }).unwrap();
    assert!(matches!(step(0.0, 0.0, picture(0, 0)), Step::Keyframe(_)));
    // The descriptor says another place each time.
    assert_eq!(step(1.0, 20.0, picture(3, 7_000)), Step::Skipped(Skip::Stationary));
    assert_eq!(step(2.0, 40.0, picture(2, 9_000)), Step::Skipped(Skip::Stationary));
    assert!(matches!(step(3.0, 40.0, picture(8, 9_000)), Step::Keyframe(_)));
    // Not asked where the setting says so, nor where there is nothing to ask.
    assert!(matches!(step(4.0, 20.0, None), Step::Keyframe(_)));
    for off in [|c: &mut Config| c.keyframe.max_still_share = 1.0, |c: &mut Config| c.keyframe.min_descriptor_change = 0.0] {
        let mut d = detector(off);
        for (i, moved) in [0, 2].into_iter().enumerate() {
            let glance = picture(moved, 7_000);
            assert!(matches!(d.process(Frame { glance, ..frame(i as f64, 20.0 * i as f64) }).unwrap(), Step::Keyframe(_)));
        }
    }
}

#[test]
fn what_settings_leave_open_is_the_models() {
    let recommended = Recommended { similarity_threshold: Some(0.8), min_margin: Some(0.25), min_descriptor_change: Some(0.5) };
    let mut d = LoopDetector::new(Config::default(), Map::new(ModelIdentity::default()), recommended).unwrap();
    assert_eq!((d.threshold(), d.min_margin(), d.min_descriptor_change()), (0.8, 0.25, 0.5));
    let mut config = Config::default();
    (config.decision.similarity_threshold, config.decision.min_margin, config.keyframe.min_descriptor_change) = (0.7, 0.0, 0.0);
    d.set_config(config).unwrap();
    assert_eq!((d.threshold(), d.min_margin(), d.min_descriptor_change()), (0.7, 0.0, 0.0));
    d.set_config(Config::default()).unwrap();
    assert_eq!(d.min_margin(), 0.25);
    let silent = LoopDetector::new(Config::default(), Map::new(ModelIdentity::default()), Recommended::default()).unwrap();
    assert_eq!((silent.threshold(), silent.min_margin(), silent.min_descriptor_change()), (0.85, 0.01, 0.01));
    // And they are what decides: a standing robot's descriptor changes by less than half, a driving one's by more.
    let outcomes: Vec<bool> =
        [0.0, 0.1, 10.0].iter().enumerate().map(|(i, at)| matches!(d.process(frame(i as f64, *at)).unwrap(), Step::Keyframe(_))).collect();
    assert_eq!(outcomes, [true, false, true]);
}
