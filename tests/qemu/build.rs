//! Compiles the guest's program as one static file, which the library carries inside: a machine that has QEMU needs
//! nothing else from us. Where that cannot be done (another system, no static C library) it is left out, and whoever
//! asks for a guest is told.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=build.rs");
    let var = |name: &str| std::env::var(name).unwrap_or_default();
    let out = PathBuf::from(var("OUT_DIR")).join("guest");
    if var("CARGO_CFG_TARGET_OS") != "linux" || var("CARGO_CFG_TARGET_ARCH") != "x86_64" {
        std::fs::write(&out, []).expect("the output folder is writable");
        return;
    }
    let mut rustc = Command::new(var("RUSTC"));
    rustc.args(["--edition", "2024", "-O", "--crate-name", "guest", "guest/main.rs"]);
    rustc.args(["-C", "target-feature=+crt-static", "-C", "panic=abort", "-C", "strip=symbols"]);
    rustc.args(["--target", &var("TARGET")]).arg("-o").arg(&out);
    let done = rustc.status().is_ok_and(|s| s.success());
    if !done {
        println!(
            "cargo::warning=no static C library: built without the guest of the tests with real VMs"
        );
        std::fs::write(&out, []).expect("the output folder is writable");
    }
}
