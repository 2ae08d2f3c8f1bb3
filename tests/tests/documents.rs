//! Documents that must agree with the code.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use outrider_proto::error_code::ALL;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// `docs/errors.md` is generated: run this test with `OUTRIDER_DOCS=write` after a change of the codes.
#[test]
fn every_error_code_is_documented() {
    let mut page = String::from(
        "# Error codes\n\nGenerated from `proto/src/error_code.rs`; a test fails when it is out of date.\n\n\
         | code | class | what it means | what to do |\n| --- | --- | --- | --- |\n",
    );
    for code in ALL {
        let _ = writeln!(
            page,
            "| `{}` | {:?} | {} | {} |",
            code.code, code.class, code.meaning, code.remedy
        );
    }
    let path = root().join("docs/errors.md");
    if std::env::var("OUTRIDER_DOCS").as_deref() == Ok("write") {
        std::fs::write(&path, &page).expect("docs folder is writable");
    }
    let found = std::fs::read_to_string(&path).expect("docs/errors.md is in the repository");
    assert_eq!(found, page, "docs/errors.md is out of date: OUTRIDER_DOCS=write cargo test");
}

/// Every path in backquotes that the architecture page names exists.
#[test]
fn the_code_map_names_only_files_that_exist() {
    let page = std::fs::read_to_string(root().join("docs/architecture.md"))
        .expect("docs/architecture.md is in the repository");
    let mut checked = 0;
    for word in page.split('`').skip(1).step_by(2) {
        let is_path = word.contains('/')
            && !word.contains(char::is_whitespace)
            && [
                "node/",
                "proto/",
                "storage/",
                "coordinator/",
                "tests/",
                "src/",
                "charts/",
                "docs/",
            ]
            .iter()
            .any(|top| word.starts_with(top));
        if is_path {
            checked += 1;
            assert!(
                root().join(word).exists(),
                "docs/architecture.md names `{word}`, which is gone"
            );
        }
    }
    assert!(checked > 20, "the code map lost its paths");
}

/// Relative links between the pages lead somewhere.
#[test]
fn links_between_documents_lead_somewhere() {
    let mut pages = vec![root().join("README.md")];
    collect(&root().join("docs"), &mut pages);
    for page in pages {
        let text = std::fs::read_to_string(&page).expect("page is readable");
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = link.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let folder = page.parent().expect("a page has a folder");
            assert!(folder.join(target).exists(), "{} links to {target}", page.display());
        }
    }
}

fn collect(folder: &Path, pages: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("docs folder is readable") {
        let path = entry.expect("entry is readable").path();
        if path.is_dir() {
            collect(&path, pages);
        } else if path.extension().is_some_and(|e| e == "md") {
            pages.push(path);
        }
    }
}

/// The numbers of events are what monitoring acts on: the page says what the code does.
#[test]
fn every_event_of_a_host_is_documented() {
    let page = std::fs::read_to_string(root().join("docs/operations/hosts.md"))
        .expect("docs/operations/hosts.md is in the repository");
    for (id, kind, meaning) in outrider_process::telemetry::host_events::ALL {
        let line = format!("| {id} | {kind:?} | {meaning} |");
        assert!(page.contains(&line), "docs/operations/hosts.md lacks {line}");
    }
}
