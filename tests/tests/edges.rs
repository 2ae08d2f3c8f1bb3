//! The dependency rule of `docs/architecture.md` is a program, not a paragraph.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, MetadataCommand};

/// Which of our packages each package may depend on (outside its tests).
const ALLOWED: &[(&str, &[&str])] = &[
    ("outrider-proto", &[]),
    ("outrider-process", &["outrider-proto"]),
    ("outrider-format", &["outrider-proto"]),
    ("outrider-storage-client", &["outrider-proto", "outrider-process"]),
    (
        "outrider-storage",
        &["outrider-proto", "outrider-process", "outrider-format", "outrider-storage-client"],
    ),
    (
        "outrider-coordinator",
        &["outrider-proto", "outrider-process", "outrider-format", "outrider-storage-client"],
    ),
    ("outrider-disk", &[]),
    ("outrider-wmi", &[]),
    (
        "outrider-node",
        &[
            "outrider-proto",
            "outrider-process",
            "outrider-format",
            "outrider-storage-client",
            "outrider-disk",
            "outrider-wmi",
        ],
    ),
    ("outrider-lab", &["outrider-disk", "outrider-wmi", "outrider-process"]),
    ("outrider-qemulab", &[]),
];

/// Third-party packages that must never reach a package through any path, with the reason.
const BANNED: &[(&str, &str, &str)] = &[
    ("outrider-proto", "quinn", "contracts do no I/O"),
    ("outrider-format", "tokio-util", "the offline tools read segments without a runtime"),
    ("outrider-format", "sled", "the segments are the truth, not an index"),
    ("outrider-storage-client", "sled", "the client keeps nothing on disk"),
    ("outrider-disk", "tokio", "a library of its own, without a runtime"),
];

#[test]
fn no_package_depends_on_what_the_architecture_forbids() {
    let metadata = MetadataCommand::new().no_deps().exec().expect("cargo metadata");
    let allowed: BTreeMap<&str, BTreeSet<&str>> =
        ALLOWED.iter().map(|(n, d)| (*n, d.iter().copied().collect())).collect();
    let ours: BTreeSet<String> = metadata.packages.iter().map(|p| p.name.to_string()).collect();
    for package in &metadata.packages {
        let Some(may) = allowed.get(package.name.as_str()) else {
            assert!(
                ["outrider", "outrider-tests"].contains(&package.name.as_str()),
                "{} is new: say in ALLOWED what it may depend on",
                package.name
            );
            continue;
        };
        for dependency in
            package.dependencies.iter().filter(|d| d.kind != DependencyKind::Development)
        {
            assert!(
                !ours.contains(&dependency.name) || may.contains(dependency.name.as_str()),
                "{} must not depend on {}",
                package.name,
                dependency.name
            );
        }
        for (name, banned, why) in BANNED {
            assert!(
                package.name.as_str() != *name
                    || package
                        .dependencies
                        .iter()
                        .filter(|d| d.kind != DependencyKind::Development)
                        .all(|d| d.name != *banned),
                "{name} must not depend on {banned}: {why}"
            );
        }
    }
}

#[test]
fn nothing_brings_a_second_tls_stack_or_a_c_plus_plus_library() {
    let metadata = MetadataCommand::new().exec().expect("cargo metadata");
    for banned in ["openssl", "openssl-sys", "native-tls", "aws-lc-sys", "rocksdb", "protobuf-src"]
    {
        assert!(
            metadata.packages.iter().all(|p| p.name.as_str() != banned),
            "{banned} came in: see docs/decisions/0002-crates.md"
        );
    }
}
