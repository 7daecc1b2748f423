//! What ships with kiln, in a real guest.

use super::{Bench, base, root, said};

const RECIPE: &str = include_str!("provisioners.toml");

/// A provisioner that ran again must have changed nothing: not a file, not a time, not a package.
const BETWEEN: &str = r#"
[[provision]]
name = "what is there now"
inline = '''
{
    find /etc /home /root /srv /usr/local /var/www -xdev -printf '%p %y %m %u:%g %s %T@ %l\n' | sort
    find /etc /home /root /srv /usr/local /var/www -xdev -type f -exec sha256sum {} + | sort
    dpkg-query -W
    systemctl list-unit-files --state=enabled,disabled,masked --no-legend
} >/run/now
[ ! -e /run/then ] || diff /run/then /run/now
mv /run/now /run/then
'''
"#;

#[test]
fn all_provisioners_twice() {
    let bench = Bench::new();
    let provisioners = root().join("provisioners");
    let recipe = RECIPE.replace("BASE", &base("bookworm").display().to_string());
    let recipe = recipe.replace("PROVISIONERS", &provisioners.display().to_string());
    let parts: Vec<_> = recipe.split("\n# round\n").collect();
    let [before, round, tests] = parts[..] else { panic!("{} parts", parts.len()) };
    bench.write("all.toml", [before, round, BETWEEN, round, BETWEEN, tests].join("\n"));
    bench.ok(&["build", "all.toml"]);
    bench.clean_root("all");
    let outcome = bench.ok(&["--format", "json", "test", "out/all", "--firmware", "uefi"]);
    let outcome: serde_json::Value = serde_json::from_str(&outcome).unwrap();
    let passed = outcome[0]["passed"].as_array().unwrap().len();
    assert_eq!(passed, 7, "{outcome}");
}

#[test]
fn a_value_that_only_the_guest_can_refuse() {
    let bench = Bench::new();
    let base = base("bookworm");
    let recipe = format!(
        "name = \"wrong\"\n[base]\nimage = \"{}\"\n[machine]\nnetwork = \"none\"\n[disk]\nsize = \"3GiB\"\n\
         [[provision]]\nuses = \"firewall\"\nwith = {{ tcp = [\"http\"] }}\n",
        base.display()
    );
    bench.write("wrong.toml", recipe);
    let output = bench.kiln().args(["-q", "build", "wrong.toml"]).output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(5), "{said}");
    assert!(said.contains("error: provisioner `firewall` failed with exit code 2\n --> wrong.toml:8:1\n"), "{said}");
    assert!(said.contains("last output: error: input `tcp`: \"http\": \"http\" is neither a port"), "{said}");
}
