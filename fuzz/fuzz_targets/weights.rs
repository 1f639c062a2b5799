#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| structvpr_fuzz::weights(data));
