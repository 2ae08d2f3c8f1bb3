//! `outrider fabric join`: a token becomes an identity directory. `outrider node install` does this and the rest.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use outrider_process::identity::Role;
use outrider_process::identity::token::JoinToken;
use outrider_process::join::{JoinError, Joined};
use serde_json::json;

use crate::cli::{Done, duration};
use crate::output;
use crate::report::Failure;

#[derive(Debug, Args)]
pub(crate) struct Join {
    #[command(flatten)]
    token: TokenArg,
    /// Where to put the identity
    #[arg(long)]
    dir: PathBuf,
    /// Name of the member; this machine's host name by default
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// How long to look for a coordinator that lets this machine in
    #[arg(long, default_value = "30s", value_parser = duration, value_name = "TIME")]
    patience: Duration,
}

/// A join token, which other users of this machine should not see in a list of processes.
#[derive(Debug, Args)]
pub(crate) struct TokenArg {
    /// The token; @FILE reads it from a file
    #[arg(id = "join", env = "OUTRIDER_JOIN_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    text: String,
}

impl TokenArg {
    fn read(&self) -> Result<JoinToken, Failure> {
        read_token(&self.text)
    }
}

/// Reads a token as it was typed, or from the file that `@FILE` names.
pub(crate) fn read_token(text: &str) -> Result<JoinToken, Failure> {
    let text = match text.strip_prefix('@') {
        Some(path) => std::fs::read_to_string(path).map_err(|e| {
            Failure::from(e).during(format!("cannot read the join token in {path}"))
        })?,
        None => text.to_owned(),
    };
    text.parse::<JoinToken>().map_err(|e| {
        let mut failure = Failure::usage(e.to_string());
        failure = failure.hint("A token is one line that `outrider fabric token create` printed.");
        failure
    })
}

/// This machine's name, as its hypervisor and its cluster know it.
pub(crate) fn host_name() -> Result<String, Failure> {
    gethostname::gethostname().into_string().ok().filter(|name| !name.is_empty()).ok_or_else(|| {
        Failure::new("this machine's host name cannot be told").hint("Give it with --name.")
    })
}

/// Joins, and tells what went wrong with its code.
pub(crate) async fn enrol(
    token: &JoinToken,
    name: &str,
    dir: &Path,
    patience: Duration,
) -> Result<Joined, Failure> {
    outrider_process::join::join(token, name, dir, patience).await.map_err(|error| match error {
        JoinError::Refused { message, code: Some(code) } => Failure::new(message).with_code(&code),
        JoinError::Refused { message, code: None } => Failure::refused(message),
        JoinError::OtherName { .. } | JoinError::Occupied { .. } | JoinError::Impostor { .. } => {
            let refused = Failure::refused(error.to_string());
            match std::error::Error::source(&error) {
                Some(source) => refused.because(source.to_string()),
                None => refused,
            }
        }
        other => Failure::from(other),
    })
}

pub(crate) async fn run(options: Join, json: bool) -> Done {
    let token = options.token.read()?;
    let name = match (&options.name, &token.name) {
        (Some(name), _) | (None, Some(name)) => name.clone(),
        (None, None) => host_name()?,
    };
    let joined = enrol(&token, &name, &options.dir, options.patience).await?;
    let peer = joined.identity.peer();
    if json {
        output::json(&json!({
            "ok": true, "fabric": peer.fabric, "role": peer.role.as_str(), "name": peer.name,
            "identity_dir": options.dir, "coordinators": joined.coordinators,
            "joined_before": joined.before, "not_after_unix": joined.identity.not_after_unix(),
        }));
        return Ok(ExitCode::SUCCESS);
    }
    println!("fabric        {}", peer.fabric);
    println!("member        {peer}");
    println!("identity      {}", options.dir.display());
    println!("coordinators  {}", joined.coordinators.join(", "));
    let noun = if peer.role == Role::Storage { "storage" } else { "node" };
    if joined.before {
        eprintln!("this machine had joined before; nothing was changed");
    } else {
        eprintln!(
            "joined; name this folder as identity_dir in the configuration of `outrider {noun}`"
        );
    }
    Ok(ExitCode::SUCCESS)
}
