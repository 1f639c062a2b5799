//! Weight files and images from untrusted bytes: errors, bounded memory, no panic.

use crate::support::root;
use proptest::prelude::*;
use structvpr::model::{LocalWeights, Weights};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn mutated_weight_files_allocate_little(at in any::<u32>(), flips in proptest::collection::vec((any::<u16>(), 1u8..=255), 1..4), cut in any::<bool>(), which in 0usize..4) {
        static FILES: std::sync::OnceLock<[Vec<u8>; 4]> = std::sync::OnceLock::new();
        let files = FILES.get_or_init(|| {
            ["tests/golden/tensors.pth", "models/structvpr-street-v3.safetensors", "models/structvpr-street-v3-int8.safetensors", "tests/golden/legacy.pth"].map(|f| std::fs::read(root().join(f)).unwrap())
        });
        // Of the large files the header is what lies; this holds it and some tensors.
        let file = &files[which];
        let mut bytes = file[..file.len().min(32_000)].to_vec();
        if cut { bytes.truncate(at as usize % bytes.len()); }
        let n = bytes.len().max(1);
        for (i, f) in flips { if let Some(b) = bytes.get_mut(i as usize % n) { *b ^= f; } }
        let _ = (Weights::parse(&bytes), LocalWeights::parse(&bytes));
        prop_assert!(crate::alloc::largest() < 64 << 20, "{} bytes at once", crate::alloc::largest());
    }
}

#[test]
fn a_header_that_claims_more_than_the_file_is_refused() {
    // safetensors: a header length of 2^60; a tensor of 2^40 values.
    let mut long = (1u64 << 60).to_le_bytes().to_vec();
    long.extend_from_slice(b"{}");
    assert!(Weights::parse(&long).is_err());
    let header = br#"{"conv00.weight":{"dtype":"F32","shape":[1048576,1048576],"data_offsets":[0,4398046511104]}}"#;
    let mut huge = (header.len() as u64).to_le_bytes().to_vec();
    huge.extend_from_slice(header);
    assert!(Weights::parse(&huge).unwrap_err().to_string().starts_with("weights: safetensors"));
    assert!(crate::alloc::largest() < 64 << 20, "{} bytes at once", crate::alloc::largest());
}
