//! The one binary of Outrider: the processes of a fabric, the operator's commands, the demo and the benchmark.
//!
//! | module | idea |
//! | --- | --- |
//! | [`cli`] | the command line, noun then verb |
//! | [`operator`] | calls to the coordinators' leader, shared by commands and demo |
//! | [`roles`] | what turns a configuration file into a running process |
//! | [`fabric`] | a new fabric on disk: authority, key-encryption key, identities |
//! | [`install`] | the node agent as a service of its machine |
//! | [`demo`] | the main job, told step by step with real processes |
//! | [`mod@bench`] | how fast each stage of the pipeline is |
//! | [`output`], [`report`] | tables, JSON, progress; failures |

mod bench;
mod cli;
mod demo;
mod fabric;
mod install;
mod operator;
mod output;
mod report;
mod roles;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let json = cli.wants_json();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report::tell(&error.into(), json),
    };
    let result = runtime.block_on(Box::pin(cli.run()));
    // A task of a library that still waits must not hold up the end.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    match result {
        Ok(code) => code,
        Err(failure) => report::tell(&failure, json),
    }
}
