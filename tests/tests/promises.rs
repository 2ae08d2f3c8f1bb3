//! `docs/promises.md` names tests that exist.

use std::path::{Path, PathBuf};

#[test]
fn every_test_that_the_promises_name_exists() {
    let root: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = std::fs::read_to_string(root.join("docs/promises.md")).expect("the page");
    let mut checked = 0;
    // Tests are named `path/file.rs::name`.
    for word in page.split('`').skip(1).step_by(2) {
        let Some((file, name)) = word.split_once(".rs::") else { continue };
        checked += 1;
        let path = root.join(format!("{file}.rs"));
        let text = std::fs::read_to_string(&path)
            .unwrap_or_else(|e| panic!("docs/promises.md names {}: {e}", path.display()));
        let function = format!("fn {name}(");
        let at = text.find(&function).unwrap_or_else(|| panic!("{file}.rs has no test {name}"));
        // Its attribute stands right above it, perhaps with others between (or it is made inside `proptest!`).
        let above: Vec<&str> = text[..at].lines().rev().take(6).collect();
        let is_test = above.iter().any(|line| line.contains("test"));
        assert!(is_test, "{name} in {file}.rs is no test");
    }
    assert!(checked > 30, "the page lost its tests");
}
