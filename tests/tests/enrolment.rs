//! Machines that join by a token (O6, promise 8): what a token lets in, what it does not, and certificates that renew
//! themselves, with real processes.

use std::path::PathBuf;

use outrider_process::identity::token::JoinToken;
use outrider_process::identity::{Identity, Role};
use outrider_proto::error_code::{NAME_HELD, NO_ENROLMENT, TOKEN_REFUSED};
use outrider_proto::rpc::BackupKind;
use outrider_tests::fabric::MIB;
use outrider_tests::operator::{Outcome, run};
use outrider_tests::{Fabric, Plan, eventually};

/// Makes a token as an operator does.
fn token(fabric: &Fabric, args: &[&str]) -> String {
    let all = [&["fabric", "token", "create", "--json"], args].concat();
    let outcome = fabric.operator.cli(&all);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let json = outcome.json();
    assert_eq!(json["token"]["state"], "open", "{json}");
    json["join"].as_str().expect("a token").to_owned()
}

/// Joins with a machine of that name; gives what the command said.
fn join(fabric: &Fabric, token: &str, role: Role, name: &str) -> Outcome {
    let dir = fabric.identity(role, name);
    let dir = dir.to_str().expect("Unicode");
    run(
        &["fabric", "join", token, "--dir", dir, "--name", name, "--json", "--patience", "20s"],
        &[],
    )
}

fn refused(outcome: &Outcome, code: Option<&str>, words: &[&str]) {
    assert!(outcome.code.is_some_and(|c| c != 0), "{outcome:?}");
    for word in words {
        assert!(outcome.stderr.contains(word), "{word:?} is not told: {outcome:?}");
    }
    if let Some(code) = code {
        assert_eq!(outcome.json()["error"]["code"], code, "{outcome:?}");
        assert_eq!(outcome.code, Some(3), "refused on purpose: {outcome:?}");
    }
}

fn certificate(fabric: &Fabric, name: &str) -> PathBuf {
    fabric.identity(Role::Node, name).join("cert.pem")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_joins_by_a_token_and_takes_a_backup() {
    let plan = Plan {
        coordinators: 3,
        unmanned: vec!["gamma".to_owned(), "호스트-4".to_owned()],
        ..Plan::default()
    };
    let mut fabric = Fabric::start(plan).await;
    let text = token(&fabric, &["--role", "node", "--uses", "2"]);
    let outcome = join(&fabric, &text, Role::Node, "gamma");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.json()["joined_before"], false);
    // Again, as an installation that is repeated does.
    let outcome = join(&fabric, &text, Role::Node, "gamma");
    assert_eq!(outcome.json()["joined_before"], true, "{outcome:?}");
    let identity = Identity::load(&fabric.identity(Role::Node, "gamma")).expect("an identity");
    assert_eq!(identity.peer().to_string(), "node/gamma");

    fabric.man("gamma").await;
    fabric.vm("one", "gamma", 8 * MIB).await;
    let point = fabric.operator.backed_up("one", BackupKind::Full).await;
    assert_eq!(point.hosts, ["gamma"]);

    // The answer is lost: the machine has its keys, asks again, and that is no second use.
    let korean = "호스트-4";
    let outcome = join(&fabric, &text, Role::Node, korean);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    std::fs::remove_file(certificate(&fabric, korean)).expect("removed");
    let outcome = join(&fabric, &text, Role::Node, korean);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    fabric.man(korean).await;

    // And a third machine is one too many.
    let outcome = join(&fabric, &text, Role::Node, "delta");
    refused(&outcome, Some(TOKEN_REFUSED.code), &["used up", "gamma", korean, "hint:"]);
    let listed = fabric.operator.cli(&["fabric", "token", "list", "--json"]).json();
    assert_eq!(listed["tokens"][0]["state"], "used up", "{listed}");
    assert_eq!(listed["tokens"][0]["used"][1]["name"], korean, "{listed}");
    let secret = text.trim_start_matches("outrider1_");
    for process in &fabric.coordinators {
        assert!(!process.logged().contains(&secret[..40]), "a token in a log");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_not_good_lets_nobody_in_and_says_why() {
    let fabric = Fabric::start(Plan::default()).await;
    let code = Some(TOKEN_REFUSED.code);

    // No token, a cut one, one of another fabric, one that nobody made.
    refused(&join(&fabric, "hello", Role::Node, "n"), None, &["no join token", "hint:"]);
    let good = token(&fabric, &["--role", "node"]);
    let cut = &good[..good.len() - 7];
    refused(&join(&fabric, cut, Role::Node, "n"), None, &["cut or changed"]);
    let other = outrider_process::identity::ca::FabricCa::create("other").expect("a fabric");
    let forged = |fabric_id: &str, identity: &Identity| {
        let addresses = fabric.addresses.clone();
        JoinToken::new(fabric_id.into(), Role::Node, None, identity.authority(), 0, addresses)
            .to_text()
    };
    let stranger = fabric.dir().join("stranger");
    let issued = other.issue(Role::Node, "x", outrider_tests::fabric::DAY).expect("issued");
    issued.save(&stranger).expect("saved");
    let stranger = Identity::load(&stranger).expect("loads");
    let outcome = join(&fabric, &forged("other", &stranger), Role::Node, "n");
    refused(&outcome, None, &["not to be believed", "no coordinator of the token's fabric"]);
    let operator = Identity::load(&fabric.identity(Role::Operator, "op")).expect("loads");
    let outcome = join(&fabric, &forged(fabric.ca.fabric(), &operator), Role::Node, "n");
    refused(&outcome, code, &["not known to this fabric"]);

    // Revoked, expired, for somebody else.
    let id = fabric.operator.cli(&["fabric", "token", "list", "--json"]).json()["tokens"][0]["id"]
        .as_str()
        .expect("an id")
        .to_owned();
    let outcome = fabric.operator.cli(&["fabric", "token", "revoke", &id[..6], "--json"]);
    assert_eq!(outcome.json()["token"]["state"], "revoked", "{outcome:?}");
    refused(&join(&fabric, &good, Role::Node, "n"), code, &["revoked by op", &id]);
    let short = token(&fabric, &["--role", "node", "--valid", "300ms"]);
    eventually("the token expires", async || {
        let listed = fabric.operator.cli(&["fabric", "token", "list", "--json"]).json();
        if listed["tokens"][0]["state"] == "expired" { Ok(()) } else { Err(listed.to_string()) }
    })
    .await;
    refused(&join(&fabric, &short, Role::Node, "n"), code, &["expired"]);
    let named = token(&fabric, &["--role", "node", "--name", "gamma"]);
    refused(&join(&fabric, &named, Role::Node, "n"), None, &["for \"gamma\" alone"]);

    // A name that is taken, by a host that was issued its identity by hand.
    let any = token(&fabric, &["--role", "node"]);
    let mine = fabric.identity(Role::Node, "alpha");
    let aside = fabric.dir().join("aside");
    std::fs::rename(&mine, &aside).expect("renamed");
    let outcome = join(&fabric, &any, Role::Node, "alpha");
    refused(&outcome, Some(NAME_HELD.code), &["alpha", "--replace"]);
    // Nobody becomes an operator by a token, whatever is asked.
    let outcome = fabric.operator.cli(&["fabric", "token", "create", "--role", "operator"]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    // And nobody but operators makes tokens.
    let outcome =
        fabric.operator.cli_as(&aside, &["fabric", "token", "create", "--role", "node", "--json"]);
    refused(&outcome, None, &["role operator"]);
    assert!(!fabric.identity(Role::Node, "n").join("cert.pem").exists(), "nobody got in");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_may_let_a_machine_take_the_place_of_another() {
    let mut fabric = Fabric::start(Plan::default()).await;
    fabric.agent("beta").kill();
    std::fs::remove_dir_all(fabric.identity(Role::Node, "beta")).expect("its disk died");
    let text = token(&fabric, &["--role", "node", "--name", "beta", "--replace"]);
    let outcome = join(&fabric, &text, Role::Node, "beta");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    fabric.agent("beta").restart();
    fabric.agent("beta").ready().await;
    fabric.settled().await;
    fabric.vm("one", "beta", 8 * MIB).await;
    fabric.operator.backed_up("one", BackupKind::Full).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storage_node_joins_by_a_token() {
    let fabric = Fabric::start(Plan::default()).await;
    let text = token(&fabric, &["--role", "storage", "--name", "s9"]);
    let outcome = join(&fabric, &text, Role::Storage, "s9");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.json()["role"], "storage");
    let identity = Identity::load(&fabric.identity(Role::Storage, "s9")).expect("an identity");
    assert_eq!(identity.peer().role, Role::Storage);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_renewed_before_they_end_and_work_goes_on() {
    let plan = Plan { unmanned: vec!["gamma".to_owned()], enrolled_for: "15s", ..Plan::default() };
    let mut fabric = Fabric::start(plan).await;
    let text = token(&fabric, &["--role", "node"]);
    assert_eq!(join(&fabric, &text, Role::Node, "gamma").code, Some(0));
    let first = std::fs::read(certificate(&fabric, "gamma")).expect("there");
    let identity = Identity::load(&fabric.identity(Role::Node, "gamma")).expect("an identity");
    let ends = identity.not_after_unix();
    fabric.man("gamma").await;
    fabric.vm("one", "gamma", 8 * MIB).await;
    eventually("the first certificate is replaced and has ended", async || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = i64::try_from(now.expect("after 1970").as_secs()).expect("fits");
        let replaced = std::fs::read(certificate(&fabric, "gamma")).expect("there") != first;
        if replaced && now > ends { Ok(()) } else { Err(format!("{replaced}, {now} of {ends}")) }
    })
    .await;
    // Every connection is made anew: the old certificate would be refused.
    fabric.coordinators[0].restart();
    fabric.coordinators[0].ready().await;
    fabric.settled().await;
    fabric.operator.backed_up("one", BackupKind::Full).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn coordinators_without_an_enrolment_authority_say_what_to_do() {
    let mut fabric = Fabric::start(Plan::default()).await;
    let dir = fabric.identity(Role::Coordinator, "c1");
    // A fabric from before there was one.
    fabric.coordinators[0].kill();
    for file in ["enrol.pem", "enrol.key"] {
        std::fs::rename(dir.join(file), fabric.dir().join(file)).expect("moved");
    }
    std::fs::remove_dir_all(fabric.dir().join("coordinator-c1")).expect("a blank member");
    fabric.coordinators[0].restart();
    fabric.coordinators[0].ready().await;
    eventually("it leads", async || {
        fabric.operator.status().await.map(|_| ()).map_err(|e| e.to_string())
    })
    .await;
    let text = token(&fabric, &["--role", "node"]);
    let outcome = join(&fabric, &text, Role::Node, "n");
    refused(&outcome, Some(NO_ENROLMENT.code), &["enrol.pem", "fabric issue"]);
    // With the files back, the same token works.
    fabric.coordinators[0].kill();
    for file in ["enrol.pem", "enrol.key"] {
        std::fs::rename(fabric.dir().join(file), dir.join(file)).expect("moved back");
    }
    fabric.coordinators[0].restart();
    fabric.coordinators[0].ready().await;
    let outcome = join(&fabric, &text, Role::Node, "n");
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
}
