//! What ships with kiln, in a real guest: everything twice, because a provisioner must be idempotent.

use super::{Bench, base};

const ONCE: &str = r#"
[[provision]]
uses = "updates"
[[provision]]
uses = "nginx"
[[provision]]
uses = "nodejs"
[[provision]]
uses = "users"
with = { groups = ["app"], users = ["deploy:groups=app:shell=/bin/bash"], sudo = ["deploy NOPASSWD"], authorized_keys = ["deploy ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHRlc3RrZXl0ZXN0a2V5dGVzdGtleXRlc3RrZXl0ZXN0 me@laptop"] }
[[provision]]
uses = "environment"
with = { variables = ["APP_ENV=it is set"] }
[[provision]]
uses = "firewall"
with = { tcp = ["22", "80"] }
[[provision]]
inline = "mkdir -p /srv/app && echo secret > /srv/app/key"
[[provision]]
uses = "permissions"
with = { rules = ["/srv/app root:app 0750", "/srv/app/key root:app 0640"] }
"#;

const TESTS: &str = r#"
[[test]]
name = "nginx"
run = "curl -fsS http://localhost/ | grep -qi nginx"
[[test]]
name = "nodejs"
run = "test \"$(node -e 'console.log(6*7)')\" = 42"
[[test]]
name = "users"
run = '''
id -nG deploy | grep -qw app
grep -q me@laptop ~deploy/.ssh/authorized_keys
test "$(stat -c %a:%U ~deploy/.ssh/authorized_keys)" = 600:deploy
su deploy -c 'sudo -n id -u' | grep -qx 0
'''
[[test]]
name = "environment"
run = '''
test "$(su - deploy -c 'echo $APP_ENV')" = "it is set"
test "$(systemd-run --quiet --wait --pipe sh -c 'echo $APP_ENV')" = "it is set"
'''
[[test]]
name = "firewall"
run = '''
nft list ruleset | grep -q 'policy drop'
nft list ruleset | grep -q 80
systemctl is-enabled nftables
'''
[[test]]
name = "permissions"
run = '''
test "$(stat -c '%a %U:%G' /srv/app/key)" = '640 root:app'
su deploy -c 'cat /srv/app/key' | grep -qx secret
! su -s /bin/sh www-data -c 'cat /srv/app/key' 2>/dev/null
'''
"#;

#[test]
fn all_provisioners_twice() {
    let bench = Bench::new();
    let head = format!("name = \"all\"\n[base]\nimage = \"{}\"\n[disk]\nsize = \"4GiB\"\n", base("bookworm").display());
    bench.write("all.toml", format!("{head}{ONCE}{ONCE}{TESTS}"));
    bench.ok(&["build", "all.toml"]);
    bench.clean_root("all");
    let outcome = bench.ok(&["--format", "json", "test", "out/all", "--firmware", "uefi"]);
    let outcome: serde_json::Value = serde_json::from_str(&outcome).unwrap();
    let passed = outcome[0]["passed"].as_array().unwrap().len();
    assert_eq!(passed, 6, "{outcome}");
}
