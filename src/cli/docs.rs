//! `docs/cli.md`, generated from the definition of the command line. After a change of commands run
//! `OUTRIDER_DOCS=write cargo test -p outrider`.

use clap::CommandFactory;

fn page() -> String {
    let mut page = String::from(
        "# Command line\n\nGenerated from `src/cli`; a test fails when it is out of date.\n\nStandard output is data, \
         standard error is talk. `--json` turns every table into one JSON object. Exit codes: 0 done, 1 failed, 2 wrong \
         usage, 3 refused (nothing was done, something has to change first), 4 installed \
         but not connected yet. Names are any Unicode.\n\nThe fabric is found \
         by `--coordinators` and `--identity`, by OUTRIDER_COORDINATORS and OUTRIDER_IDENTITY, or by \
         `~/.config/outrider/operator.toml` with `coordinators = [\"ip:port\"]` and `identity = \"DIR\"`.\n",
    );
    let mut root = super::Cli::command().term_width(100);
    root.build();
    describe(&root, &mut page);
    page
}

fn describe(command: &clap::Command, page: &mut String) {
    let name = command.get_bin_name().unwrap_or("outrider").to_owned();
    if name.ends_with(" help") {
        return;
    }
    let help = command.clone().disable_help_subcommand(true).render_help().to_string();
    let help: Vec<_> = help.lines().map(str::trim_end).collect();
    page.push_str(&format!("\n## {name}\n\n```text\n{}\n```\n", help.join("\n").trim_end()));
    for sub in command.get_subcommands() {
        describe(sub, page);
    }
}

#[test]
fn the_page_of_commands_is_up_to_date() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
    let page = page();
    if std::env::var("OUTRIDER_DOCS").as_deref() == Ok("write") {
        std::fs::write(&path, &page).expect("docs folder is writable");
    }
    let found = std::fs::read_to_string(&path).expect("docs/cli.md is in the repository");
    assert_eq!(
        found, page,
        "docs/cli.md is out of date: OUTRIDER_DOCS=write cargo test -p outrider"
    );
}
