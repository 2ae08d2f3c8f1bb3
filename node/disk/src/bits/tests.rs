use proptest::prelude::*;

use super::{runs, set};

proptest! {
    #[test]
    fn runs_are_the_bits(bytes in prop::collection::vec(prop_oneof![Just(0), Just(255), any::<u8>()], 0..40), cut in any::<(u16, u16)>()) {
        let all = bytes.len() * 8;
        let first = usize::from(cut.0) % (all + 1);
        let count = usize::from(cut.1) % (all - first + 1);
        let mut out = vec![];
        runs(&bytes, first, count, |start, len, is_set| {
            assert!(len > 0 && start == first + out.len());
            out.extend(std::iter::repeat_n(is_set, len));
            Ok::<(), ()>(())
        })
        .unwrap();
        let expected: Vec<bool> =
            (first..first + count).map(|i| bytes[i / 8] >> (i % 8) & 1 == 1).collect();
        prop_assert_eq!(out, expected);
    }

    #[test]
    fn setting_sets_those_bits_and_no_other(mut bytes in prop::collection::vec(any::<u8>(), 1..20), cut in any::<(u16, u16)>()) {
        let all = bytes.len() * 8;
        let first = usize::from(cut.0) % (all + 1);
        let count = usize::from(cut.1) % (all - first + 1);
        let before = bytes.clone();
        set(&mut bytes, first, count);
        for i in 0..all {
            let bit = |bytes: &[u8]| bytes[i / 8] >> (i % 8) & 1 == 1;
            prop_assert_eq!(bit(&bytes), bit(&before) || (first..first + count).contains(&i));
        }
    }
}
