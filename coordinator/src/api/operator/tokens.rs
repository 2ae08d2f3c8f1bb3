//! Join tokens, as operators handle them.

use outrider_process::identity::enrolment::ENROLLED;
use outrider_process::identity::token::token_id;
use outrider_process::identity::{PeerName, Role};
use outrider_proto::error_code;
use outrider_proto::rpc;
use outrider_proto::status::status;
use tonic::Status;

use crate::state::State;
use crate::state::enrolment::{MAX_USES, NewToken, Token};

/// A token lives at most this long: it is for machines that are being set up now.
const LONGEST_MS: u64 = 366 * 24 * 3_600_000;

/// Checks what is asked for.
pub(super) fn parse(r: rpc::CreateJoinTokenRequest, by: String) -> Result<NewToken, Status> {
    let public_key = r
        .public_key
        .try_into()
        .map_err(|_| Status::invalid_argument("the token's public key has not 32 bytes"))?;
    let role: Option<Role> = r.role.parse().ok().filter(|role| ENROLLED.contains(role));
    let role = role.ok_or_else(|| {
        status(
            &error_code::DENIED,
            format!(
                "nobody becomes a {} by a token: hosts (node) and storage nodes (storage) do; issue other identities with \
                 `outrider fabric issue`",
                r.role
            ),
        )
    })?;
    let name = (!r.name.is_empty()).then_some(r.name);
    if let Some(name) = name.as_ref().filter(|name| !PeerName::is_valid_name(name)) {
        return Err(status(
            &error_code::BAD_NAME,
            format!("{name:?} cannot be the name of a {role}"),
        ));
    }
    if r.replace && name.is_none() {
        return Err(Status::invalid_argument(
            "a token that may replace a member needs the member's name",
        ));
    }
    if r.uses == 0 || r.uses > MAX_USES || (name.is_some() && r.uses != 1) {
        return Err(Status::invalid_argument(format!(
            "{} uses are not possible: 1 to {MAX_USES}, and 1 for a token that names its machine",
            r.uses
        )));
    }
    if r.valid_ms == 0 || r.valid_ms > LONGEST_MS {
        return Err(Status::invalid_argument("a token is valid for a year at most"));
    }
    Ok(NewToken {
        public_key,
        role,
        name,
        valid_ms: r.valid_ms,
        uses: r.uses,
        replace: r.replace,
        by,
    })
}

/// The public key of the one token that an id (or its beginning) names.
pub(super) fn find(state: &State, id: &str) -> Result<[u8; 32], Status> {
    let refuse = |text: String| status(&error_code::TOKEN_REFUSED, text);
    let mut found = state.enrolment.tokens.keys().filter(|key| key.starts_with(id));
    let (one, another) = (found.next(), found.next());
    let key = match (one, another, id.len() >= 4) {
        (Some(key), None, true) => key,
        (Some(_), Some(_), true) => {
            return Err(refuse(format!(
                "several join tokens begin with {id:?}; write the whole id"
            )));
        }
        _ => {
            return Err(refuse(format!(
                "no join token {id:?} is known; list them with `outrider fabric token list`"
            )));
        }
    };
    let mut bytes = [0; 32];
    hex::decode_to_slice(key, &mut bytes)
        .map_err(|_| Status::internal("a token's key in the state is malformed"))?;
    Ok(bytes)
}

pub(super) fn view(public_key: &[u8; 32], token: &Token, now: u64) -> rpc::JoinToken {
    rpc::JoinToken {
        token_id: token_id(public_key),
        role: token.role.to_string(),
        name: token.name.clone().unwrap_or_default(),
        created_unix_ms: token.created_ms,
        created_by: token.created_by.clone(),
        expires_unix_ms: token.expires_ms,
        uses: token.uses,
        used: token
            .used
            .iter()
            .map(|u| rpc::JoinTokenUse { name: u.name.clone(), at_unix_ms: u.at_ms })
            .collect(),
        replace: token.replace,
        revoked_by: token.revoked_by.clone().unwrap_or_default(),
        state: token.state(now).as_str().to_owned(),
    }
}

/// All tokens, newest first.
pub(super) fn list(state: &State, now: u64) -> Vec<rpc::JoinToken> {
    let mut tokens: Vec<rpc::JoinToken> = state
        .enrolment
        .tokens
        .iter()
        .filter_map(|(key, token)| {
            let mut public_key = [0; 32];
            hex::decode_to_slice(key, &mut public_key).ok()?;
            Some(view(&public_key, token, now))
        })
        .collect();
    tokens.sort_by_key(|token| std::cmp::Reverse(token.created_unix_ms));
    tokens
}
