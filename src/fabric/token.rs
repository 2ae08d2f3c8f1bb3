//! `outrider fabric token`: letting machines join.

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand, ValueEnum};
use outrider_process::identity::Role;
use outrider_process::identity::token::JoinToken;
use outrider_proto::rpc;
use serde_json::json;

use crate::cli::connect::Connection;
use crate::cli::{Done, duration};
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Let one machine (or several) join; prints the token
    Create(Create),
    /// All tokens, and who joined by them
    List(Connection),
    /// Take a token back; machines that joined by it stay
    Revoke {
        /// The token's id, or its beginning
        id: String,
        #[command(flatten)]
        connection: Connection,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    /// What the machine becomes
    #[arg(long, value_enum)]
    role: Joining,
    /// The only name that may join by it; without it any name that is not taken
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// How long it can be used
    #[arg(long, default_value = "24h", value_parser = duration, value_name = "TIME")]
    valid: Duration,
    /// How many machines may join by it
    #[arg(long, default_value_t = 1, value_name = "N", conflicts_with = "name")]
    uses: u32,
    /// The machine named takes the place of a member of that name
    #[arg(long, requires = "name")]
    replace: bool,
    /// Addresses under which joining machines reach the coordinators; those of --coordinators by default
    #[arg(long = "address", value_delimiter = ',', value_name = "A,B,C")]
    addresses: Vec<String>,
    #[command(flatten)]
    connection: Connection,
}

/// Roles that join by tokens.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Joining {
    Node,
    Storage,
}

pub(crate) async fn run(command: Command, json: bool) -> Done {
    match command {
        Command::Create(options) => create(options, json).await,
        Command::List(connection) => {
            let tokens = connection.open()?.join_tokens().await?;
            if json {
                let tokens: Vec<_> = tokens.iter().map(view).collect();
                output::json(&json!({ "ok": true, "tokens": tokens }));
                return Ok(ExitCode::SUCCESS);
            }
            let rows = tokens.into_iter().map(|t| {
                let joined = t.used.iter().map(|u| u.name.clone()).collect::<Vec<_>>().join(", ");
                let name = match (t.name.as_str(), t.replace) {
                    ("", _) => "any".to_owned(),
                    (name, false) => name.to_owned(),
                    (name, true) => format!("{name} (replaces)"),
                };
                let uses = format!("{} of {}", t.used.len(), t.uses);
                let state = if t.revoked_by.is_empty() {
                    t.state
                } else {
                    format!("revoked by {}", t.revoked_by)
                };
                let ends = output::time(t.expires_unix_ms);
                [
                    t.token_id,
                    t.role,
                    name,
                    state,
                    uses,
                    output::or_dash(&joined),
                    ends,
                    t.created_by,
                ]
            });
            let headers = ["token", "role", "for", "state", "used", "joined", "ends", "made by"];
            println!("{}", output::table(headers, rows.collect()));
            Ok(ExitCode::SUCCESS)
        }
        Command::Revoke { id, connection } => {
            let token = connection.open()?.revoke_join_token(&id).await?;
            if json {
                output::json(&json!({ "ok": true, "token": view(&token) }));
            } else {
                eprintln!("token {} is revoked; nobody joins by it any more", token.token_id);
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn create(options: Create, json: bool) -> Done {
    let operator = options.connection.open()?;
    let identity = operator.identity();
    let role = match options.role {
        Joining::Node => Role::Node,
        Joining::Storage => Role::Storage,
    };
    let addresses =
        if options.addresses.is_empty() { operator.members().to_vec() } else { options.addresses };
    let expires = SystemTime::now() + options.valid;
    let expires_unix = expires.duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
    let token = JoinToken::new(
        identity.peer().fabric.clone(),
        role,
        options.name.clone(),
        identity.authority(),
        expires_unix,
        addresses.clone(),
    );
    let request = rpc::CreateJoinTokenRequest {
        public_key: token.public_key().to_vec(),
        role: role.to_string(),
        name: options.name.unwrap_or_default(),
        valid_ms: u64::try_from(options.valid.as_millis()).unwrap_or(u64::MAX),
        uses: options.uses,
        replace: options.replace,
    };
    let made = operator.create_join_token(request).await?;
    let text = token.to_text();
    if json {
        output::json(&json!({ "ok": true, "join": text, "token": view(&made) }));
        return Ok(ExitCode::SUCCESS);
    }
    println!("{text}");
    let what =
        if role == Role::Node { "outrider node install --join" } else { "outrider fabric join" };
    eprintln!(
        "token {}, until {}; whoever has it can join: hand it over as you would a password. The machine runs `{what} TOKEN` \
         and speaks to {}",
        made.token_id,
        output::time(made.expires_unix_ms),
        addresses.join(", ")
    );
    Ok(ExitCode::SUCCESS)
}

fn view(token: &rpc::JoinToken) -> serde_json::Value {
    let used: Vec<_> =
        token.used.iter().map(|u| json!({ "name": u.name, "at_unix_ms": u.at_unix_ms })).collect();
    json!({
        "id": token.token_id, "role": token.role, "name": token.name, "state": token.state,
        "uses": token.uses, "used": used, "replace": token.replace,
        "created_unix_ms": token.created_unix_ms, "created_by": token.created_by,
        "expires_unix_ms": token.expires_unix_ms, "revoked_by": token.revoked_by,
    })
}
