//! Who may join, and who has: join tokens, the enrolment authority, and the keys of those that joined.
//!
//! A token is known by its public key alone: nothing in the Raft log lets anybody join.

use std::collections::BTreeMap;

use outrider_process::identity::Role;
use outrider_process::identity::token::token_id;
use serde::{Deserialize, Serialize};

use super::{Outcome, Refusal, State};

/// Tokens that are remembered at a time.
const MAX_TOKENS: usize = 10_000;
/// Tokens that can no longer be used are forgotten after this, in milliseconds: until then whoever tries one is told why
/// it does not work.
const REMEMBERED_MS: u64 = 90 * 24 * 3_600_000;
/// Machines that may join by one token.
pub(crate) const MAX_USES: u32 = 1_000;

/// Enrolment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Enrolment {
    /// None before a coordinator that has one led.
    pub(crate) authority: Option<Authority>,
    /// By public key, hexadecimal.
    pub(crate) tokens: BTreeMap<String, Token>,
    /// Keys of those that joined, by `role/name`.
    pub(crate) members: BTreeMap<String, Joined>,
    /// Keys that are refused, hexadecimal SHA-256.
    pub(crate) revoked: BTreeMap<String, super::departures::Revoked>,
}

/// The enrolment authority.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Authority {
    /// Certificate.
    pub(crate) cert_pem: String,
    /// Key, wrapped by the key-encryption key.
    pub(crate) key: Vec<u8>,
}

/// A join token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Token {
    pub(crate) role: Role,
    /// The only name that may join by it.
    pub(crate) name: Option<String>,
    pub(crate) created_ms: u64,
    pub(crate) created_by: String,
    pub(crate) expires_ms: u64,
    pub(crate) uses: u32,
    pub(crate) used: Vec<Use>,
    /// It may replace the key of the name, if that has joined already.
    pub(crate) replace: bool,
    pub(crate) revoked_by: Option<String>,
}

/// A machine that joined by a token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Use {
    pub(crate) name: String,
    /// SHA-256 of its public key, hexadecimal.
    pub(crate) key: String,
    pub(crate) at_ms: u64,
}

/// A member that joined by a token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Joined {
    /// SHA-256 of its public key, hexadecimal.
    pub(crate) key: String,
    pub(crate) at_ms: u64,
    /// Id of the token.
    pub(crate) token: String,
}

/// A token to be made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct NewToken {
    pub(crate) public_key: [u8; 32],
    pub(crate) role: Role,
    pub(crate) name: Option<String>,
    pub(crate) valid_ms: u64,
    pub(crate) uses: u32,
    pub(crate) replace: bool,
    pub(crate) by: String,
}

/// A machine that wants to join. It proved both keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Enrol {
    /// Public key of the token.
    pub(crate) token: [u8; 32],
    pub(crate) name: String,
    /// SHA-256 of its public key, hexadecimal.
    pub(crate) key: String,
}

/// What a token is good for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenState {
    Open,
    UsedUp,
    Expired,
    Revoked,
}

impl TokenState {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::UsedUp => "used up",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

impl Token {
    pub(crate) fn state(&self, now: u64) -> TokenState {
        if self.revoked_by.is_some() {
            TokenState::Revoked
        } else if now >= self.expires_ms {
            TokenState::Expired
        } else if self.used.len() >= self.uses as usize {
            TokenState::UsedUp
        } else {
            TokenState::Open
        }
    }
}

/// Key of a member in [`Enrolment::members`].
pub(crate) fn member_key(role: Role, name: &str) -> String {
    format!("{role}/{name}")
}

impl State {
    /// The first one stands: several coordinators may bring the same.
    pub(super) fn set_enrolment_authority(&mut self, authority: Authority) -> Outcome {
        self.enrolment.authority.get_or_insert(authority);
        Outcome::Done
    }

    pub(super) fn create_token(&mut self, new: NewToken, now: u64) -> Outcome {
        let key = hex::encode(new.public_key);
        if self.enrolment.tokens.contains_key(&key) {
            return Outcome::Done;
        }
        self.enrolment.tokens.retain(|_, token| {
            token.state(now) == TokenState::Open || now < token.expires_ms + REMEMBERED_MS
        });
        if self.enrolment.tokens.len() >= MAX_TOKENS {
            return Refusal::TooManyTokens(MAX_TOKENS).into();
        }
        let token = Token {
            role: new.role,
            name: new.name,
            created_ms: now,
            created_by: new.by,
            expires_ms: now.saturating_add(new.valid_ms),
            uses: new.uses,
            used: Vec::new(),
            replace: new.replace,
            revoked_by: None,
        };
        self.enrolment.tokens.insert(key, token);
        Outcome::Done
    }

    pub(super) fn revoke_token(&mut self, public_key: [u8; 32], by: String) -> Outcome {
        match self.enrolment.tokens.get_mut(&hex::encode(public_key)) {
            Some(token) => {
                token.revoked_by.get_or_insert(by);
                Outcome::Done
            }
            None => Refusal::UnknownToken(token_id(&public_key)).into(),
        }
    }

    /// Takes a machine in. The same machine with the same key is the same use, however often it asks.
    pub(super) fn enrol(&mut self, enrol: Enrol, now: u64) -> Outcome {
        let id = token_id(&enrol.token);
        let known = self.enrolment.tokens.get(&hex::encode(enrol.token));
        let Some(token) = known else { return Refusal::UnknownToken(id).into() };
        if let Some(wanted) = token.name.as_ref().filter(|name| **name != enrol.name) {
            return Refusal::TokenName { id, wanted: wanted.clone(), found: enrol.name }.into();
        }
        let again = token.used.iter().any(|u| u.name == enrol.name && u.key == enrol.key);
        match token.state(now) {
            TokenState::Revoked => {
                let by = token.revoked_by.clone().unwrap_or_default();
                return Refusal::TokenRevoked { id, by }.into();
            }
            TokenState::Expired => {
                return Refusal::TokenExpired { id, ago_ms: now - token.expires_ms }.into();
            }
            TokenState::UsedUp if !again => {
                let by = token.used.iter().map(|u| u.name.as_str()).collect::<Vec<_>>().join(", ");
                return Refusal::TokenUsedUp { id, by }.into();
            }
            TokenState::UsedUp | TokenState::Open => {}
        }
        if let Some(revoked) = self.revoked(&enrol.key) {
            let (member, by) = (revoked.member.clone(), revoked.by.clone());
            return Refusal::Revoked { member, by }.into();
        }
        let member = member_key(token.role, &enrol.name);
        let holder = self.enrolment.members.get(&member);
        let same_key = holder.is_some_and(|joined| joined.key == enrol.key);
        if !same_key && !token.replace && (holder.is_some() || self.knows(token.role, &enrol.name))
        {
            return Refusal::NameHeld { role: token.role, name: enrol.name }.into();
        }
        if !again {
            let used = Use { name: enrol.name, key: enrol.key.clone(), at_ms: now };
            if let Some(token) = self.enrolment.tokens.get_mut(&hex::encode(enrol.token)) {
                token.used.push(used);
            }
        }
        if !same_key {
            let joined = Joined { key: enrol.key, at_ms: now, token: id };
            self.enrolment.members.insert(member, joined);
        }
        Outcome::Done
    }

    /// Whether a member of this role and name has worked here, by whatever certificate.
    fn knows(&self, role: Role, name: &str) -> bool {
        match role {
            Role::Node => self.hosts.contains_key(name),
            Role::Storage => self.storage.nodes.contains_key(name),
            Role::Coordinator | Role::Operator => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::World;
    use super::super::{Change, Outcome, Refusal};
    use super::*;

    const HOUR: u64 = 3_600_000;

    fn new_token(n: u8, uses: u32) -> NewToken {
        NewToken {
            public_key: [n; 32],
            role: Role::Node,
            name: None,
            valid_ms: HOUR,
            uses,
            replace: false,
            by: "ann".into(),
        }
    }

    fn enrol(world: &mut World, token: u8, name: &str, key: &str) -> Outcome {
        let (name, key) = (name.to_owned(), key.to_owned());
        world.apply(Change::Enrol(Box::new(Enrol { token: [token; 32], name, key })))
    }

    fn refusal(outcome: Outcome) -> Refusal {
        match outcome {
            Outcome::Refused(refusal) => refusal,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_token_is_good_for_its_uses_and_a_repeated_answer_is_no_second_use() {
        let mut world = World::new();
        world.apply(Change::CreateToken(Box::new(new_token(1, 2))));
        assert_eq!(enrol(&mut world, 1, "new1", "k1"), Outcome::Done);
        assert_eq!(enrol(&mut world, 1, "new1", "k1"), Outcome::Done, "the answer was lost");
        assert_eq!(enrol(&mut world, 1, "new2", "k2"), Outcome::Done);
        let text = refusal(enrol(&mut world, 1, "new3", "k3")).to_string();
        assert!(text.contains("new1, new2") && text.contains("token create"), "{text}");
        assert_eq!(enrol(&mut world, 1, "new2", "k2"), Outcome::Done, "used up, but the same");
    }

    #[test]
    fn a_held_name_is_not_taken_over_unless_the_operator_said_so() {
        let mut world = World::new();
        world.apply(Change::CreateToken(Box::new(new_token(1, 9))));
        // Attached with a certificate that was issued by hand.
        assert!(matches!(refusal(enrol(&mut world, 1, "hv1", "k")), Refusal::NameHeld { .. }));
        assert_eq!(enrol(&mut world, 1, "new", "k"), Outcome::Done);
        assert!(matches!(refusal(enrol(&mut world, 1, "new", "k2")), Refusal::NameHeld { .. }));
        // A storage node of that name is somebody else.
        let storage = NewToken { role: Role::Storage, ..new_token(3, 9) };
        world.apply(Change::CreateToken(Box::new(storage)));
        assert!(matches!(refusal(enrol(&mut world, 3, "s1", "k")), Refusal::NameHeld { .. }));
        assert_eq!(enrol(&mut world, 3, "hv1", "k"), Outcome::Done);
        let replace = NewToken { name: Some("new".into()), replace: true, ..new_token(2, 1) };
        world.apply(Change::CreateToken(Box::new(replace)));
        assert!(matches!(refusal(enrol(&mut world, 2, "hv1", "k2")), Refusal::TokenName { .. }));
        assert_eq!(enrol(&mut world, 2, "new", "k2"), Outcome::Done);
        assert_eq!(world.state.enrolment.members["node/new"].key, "k2");
    }

    #[test]
    fn unknown_expired_and_revoked_tokens_are_told_apart() {
        let mut world = World::new();
        assert!(matches!(refusal(enrol(&mut world, 7, "n", "k")), Refusal::UnknownToken(_)));
        world.apply(Change::CreateToken(Box::new(new_token(1, 1))));
        world.apply(Change::CreateToken(Box::new(new_token(2, 1))));
        world.apply(Change::RevokeToken { public_key: [2; 32], by: "bob".into() });
        let text = refusal(enrol(&mut world, 2, "n", "k")).to_string();
        assert!(text.contains("revoked by bob"), "{text}");
        world.now += HOUR + 5 * 60_000;
        let text = refusal(enrol(&mut world, 1, "n", "k")).to_string();
        assert!(text.contains("expired") && text.contains("5m"), "{text}");
        // Forgotten some day, and then unknown.
        world.now += REMEMBERED_MS;
        world.apply(Change::CreateToken(Box::new(new_token(3, 1))));
        assert_eq!(world.state.enrolment.tokens.len(), 1);
    }

    #[test]
    fn a_token_that_is_made_twice_is_one_token() {
        let mut world = World::new();
        world.apply(Change::CreateToken(Box::new(new_token(1, 1))));
        assert_eq!(enrol(&mut world, 1, "n", "k"), Outcome::Done);
        world.apply(Change::CreateToken(Box::new(new_token(1, 5))));
        assert!(matches!(refusal(enrol(&mut world, 1, "m", "k")), Refusal::TokenUsedUp { .. }));
    }

    #[derive(Debug, Clone)]
    enum Act {
        Create(u8, u32, bool),
        Revoke(u8),
        Enrol(u8, u8, u8),
        Wait(u64),
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            2 => (0u8..4, 0u32..4, any::<bool>()).prop_map(|(t, u, r)| Act::Create(t, u, r)),
            1 => (0u8..4).prop_map(Act::Revoke),
            8 => (0u8..4, 0u8..4, 0u8..3).prop_map(|(t, n, k)| Act::Enrol(t, n, k)),
            1 => (0u64..HOUR / 2).prop_map(Act::Wait),
        ]
    }

    proptest! {
        #[test]
        fn no_sequence_lets_more_in_than_the_operator_allowed(acts in prop::collection::vec(act(), 1..60)) {
            let mut world = World::new();
            for act in acts {
                let before = world.state.enrolment.clone();
                match act {
                    Act::Create(t, uses, replace) => {
                        let name = replace.then(|| "n0".to_owned());
                        let new = NewToken { name, replace, ..new_token(t, uses) };
                        world.apply(Change::CreateToken(Box::new(new)));
                    }
                    Act::Revoke(t) => {
                        world.apply(Change::RevokeToken { public_key: [t; 32], by: "x".into() });
                    }
                    Act::Wait(ms) => world.now += ms,
                    Act::Enrol(t, n, k) => {
                        let (name, key) = (format!("n{n}"), format!("k{k}"));
                        let outcome = enrol(&mut world, t, &name, &key);
                        let token = before.tokens.get(&hex::encode([t; 32]));
                        if outcome == Outcome::Done {
                            let token = token.expect("a token that exists");
                            prop_assert!(token.revoked_by.is_none() && world.now < token.expires_ms);
                            prop_assert!(token.name.as_ref().is_none_or(|wanted| *wanted == name));
                            let held = before.members.get(&member_key(Role::Node, &name));
                            prop_assert!(token.replace || held.is_none_or(|held| held.key == key));
                        } else {
                            prop_assert_eq!(&world.state.enrolment, &before, "a refusal changes nothing");
                        }
                    }
                }
                for token in world.state.enrolment.tokens.values() {
                    prop_assert!(token.used.len() <= token.uses as usize);
                }
            }
        }
    }
}
