//! Each way a recipe can be wrong: what is said, where, and what helps. Every case changes one thing in the example,
//! and the whole of `LINE:COLUMN MARKED: message; help` is compared.

use super::{EXAMPLE, example, refusal};

pub(super) fn check(cases: &[(&str, &str, &str)]) {
    for (from, to, expected) in cases {
        assert_eq!(refusal(&example(from, to), &[]), *expected, "{from} -> {to}");
    }
}

const SYNTAX: &[(&str, &str, &str)] = &[
    ("size = \"4GiB\"", "size = 4GiB", "17:8 `4GiB`: `4GiB` is not a value; text stands in quotes: write \"4GiB\""),
    ("size = \"4GiB\"", "size =", "17:7 ``: a value is missing"),
    ("size = \"4GiB\"", "size = \"4GiB", "17:90 ``: a string is not closed"),
    (
        "mode = \"0644\"",
        "mode = 0644",
        "31:8 `0644`: a number must not start with 0; text stands in quotes: write \"0644\"",
    ),
    (
        "image = \"debian-12.qcow2\"",
        "image = ./debian-12.qcow2",
        "5:9 `./debian-12.qcow2`: `./debian-12.qcow2` is not a value; text stands in quotes: write \"./debian-12.qcow2\"",
    ),
    ("reboot = true", "reboot = True", "36:10 `True`: `True` is not a value; booleans are `true` and `false`"),
    ("[disk]", "[disk", "16:6 ``: unclosed table, expected `]`"),
    ("cpus = 2", "cpus = 2\ncpus = 4", "11:1 `cpus`: `cpus` is there twice"),
    (
        "[[provision]]",
        "[provision]",
        "27:2 `provision`: `provision` is there twice; there can be several: write [[provision]] with two brackets",
    ),
    ("cpus = 2", "cpus: 2", "10:7 ``: key with no value, expected `=`"),
    (
        "cpus = 2",
        "cpus = [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
        "10:88 `[`: this is nested too deeply",
    ),
];

#[test]
fn refused_syntax() {
    check(SYNTAX);
}

const UNKNOWN_KEYS: &[(&str, &str, &str)] = &[
    ("image = \"debian", "imge = \"debian", "5:1 `imge`: unknown key `imge` in [base]; did you mean `image`?"),
    (
        "name = \"web\"\n",
        "name = \"web\"\nimage = \"x\"\n",
        "2:1 `image`: unknown key `image`; `image` belongs in [base]",
    ),
    ("[disk]", "[dsk]", "16:2 `dsk`: unknown key `dsk`; did you mean `disk`?"),
    ("cpus = 2", "ram = \"1GiB\"", "10:1 `ram`: unknown key `ram` in [machine]; did you mean `memory`?"),
    (
        "size = \"4GiB\"",
        "whatever = 1",
        "17:1 `whatever`: unknown key `whatever` in [disk]; known here: `size`, `sha256`",
    ),
    ("copy = \"site/\"", "cpoy = \"site/\"", "28:1 `cpoy`: unknown key `cpoy` in [[provision]]; did you mean `copy`?"),
    (
        "[[test]]                         # run inside the rehearsed instance\nname",
        "[[test]]\nnmae",
        "42:1 `nmae`: unknown key `nmae` in [[test]]; did you mean `name`?",
    ),
    (
        "bucket =",
        "sse = \"AES256\"\nsse_kms_key = \"alias/images\"\nbucket =",
        "49:1 `sse_kms_key`: `sse_kms_key` is of use only with KMS; write `sse = \"aws:kms\"` as well",
    ),
    ("bucket =", "buckt =", "48:1 `buckt`: unknown key `buckt` in [publish]; did you mean `bucket`?"),
    ("keep = [\"logs\"]", "kep = [\"logs\"]", "39:1 `kep`: unknown key `kep` in [seal]; did you mean `keep`?"),
    (
        "description = \"nginx",
        "beschreibung = \"é\" # ü\n\"ü\" = 1\ndescription = \"nginx",
        "2:1 `beschreibung`: unknown key `beschreibung`; known here: `name`, `description`, `base`, `machine`, `disk`, `env`, `provision`, `seal`, `test`, `publish`",
    ),
];

#[test]
fn refused_unknown_keys() {
    check(UNKNOWN_KEYS);
}

const TYPES: &[(&str, &str, &str)] = &[
    ("name = \"web\"\n", "name = 1\n", "1:8 `1`: `name` wants a string, not an integer; write \"1\" in quotes"),
    ("cpus = 2", "cpus = \"2\"", "10:8 `\"2\"`: `cpus` wants an integer, not a string; write 2 without quotes"),
    ("cpus = 2", "cpus = 99999999999999999999", "10:8 `99999999999999999999`: `cpus` is too large"),
    (
        "reboot = true",
        "reboot = \"true\"",
        "36:10 `\"true\"`: `reboot` wants true or false, not a string; write true without quotes",
    ),
    ("reboot = true", "reboot = 1", "36:10 `1`: `reboot` wants true or false, not an integer"),
    ("size = \"4GiB\"", "sha256 = \"ab\"", "17:10 `\"ab\"`: `sha256` wants true or false, not a string"),
    (
        "APP_ENV = \"production\"",
        "APP_ENV = 80",
        "20:11 `80`: `APP_ENV` wants a string, not an integer; write \"80\" in quotes",
    ),
    (
        "APP_ENV = \"production\"",
        "APP_ENV = 1.50",
        "20:11 `1.50`: `APP_ENV` wants a string, not a number with a point; write \"1.50\" in quotes",
    ),
    (
        "regions = [\"eu-central-1\", \"us-east-1\"]",
        "regions = \"eu-central-1\"",
        "47:11 `\"eu-central-1\"`: `regions` wants a list of strings, not a string; write [\"eu-central-1\"]",
    ),
    (
        "regions = [\"eu-central-1\", \"us-east-1\"]",
        "regions = [\"eu-central-1\", 1]",
        "47:28 `1`: an element of `regions` wants a string, not an integer; write \"1\" in quotes",
    ),
    ("size = \"4GiB\"", "size = 4", "17:8 `4`: `size` wants a size such as \"4GiB\", not an integer"),
    ("timeout = \"30m\"", "timeout = 30", "14:11 `30`: `timeout` wants a duration such as \"30m\", not an integer"),
    (
        "[disk]\nsize = \"4GiB\"",
        "[[disk]]\nsize = \"4GiB\"",
        "16:1 `[[disk]]`: `disk` wants a table, not a list; there is only one: write [disk] with one bracket",
    ),
    (
        "description = \"nginx on Debian 12\"",
        "description = \"a\\u0000b\"",
        "2:15 `\"a\\u0000b\"`: `description` contains a NUL character",
    ),
    ("with = { port = 80 }", "with = 80", "25:8 `80`: `with` wants a table, not an integer"),
];

#[test]
fn refused_types() {
    check(TYPES);
    assert_eq!(
        refusal(&example("[seal]                           # on by default\nkeep = [\"logs\"]", ""), &["seal=false"]),
        "`--set seal=false`: `seal` wants a table, not a boolean"
    );
}

const ABSENT_KEYS: &[(&str, &str, &str)] = &[
    ("name = \"web\"\n", "", "1:1 ``: the recipe has no `name`; add for example `name = \"web\"`"),
    (
        "image = \"debian-12.qcow2\"",
        "",
        "4:1 `[base]`: [base] has no `image`; add for example `image = \"debian-12.qcow2\"`",
    ),
    (
        "to = \"/var/www/html/\"",
        "",
        "27:1 `[[provision]]`: [[provision]] has no `to`; add for example `to = \"/srv/\"`",
    ),
    (
        "run = \"scripts/app.sh\"           # or inline = \"…\"",
        "",
        "33:1 `[[provision]]`: this [[provision]] does nothing; give it one of `run`, `inline`, `copy`, `uses`",
    ),
    (
        "run = \"curl -fsS http://localhost/ | grep -q Hello\"",
        "",
        "41:1 `[[test]]`: [[test]] has no `run`; add for example `run = \"curl -fsS http://localhost/\"`",
    ),
];

#[test]
fn refused_absent_keys() {
    check(ABSENT_KEYS);
}

const NAMES_AND_BASES: &[(&str, &str, &str)] = &[
    (
        "name = \"web\"\n",
        "name = \"Web Server!\"\n",
        "1:8 `\"Web Server!\"`: this name can't be used; use lowercase letters, digits, `.`, `_` and `-`, a letter or digit first, at most 64: for example `web-server`",
    ),
    ("name = \"web\"\n", "name = \"\"\n", "1:8 `\"\"`: `name` is empty"),
    (
        "name = \"web\"\n",
        "name = \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"\n",
        "1:8 `\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"`: this name can't be used; use lowercase letters, digits, `.`, `_` and `-`, a letter or digit first, at most 64: for example `aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa`",
    ),
    (
        "image = \"debian-12.qcow2\"",
        "image = \"ftp://example.org/x\"",
        "5:9 `\"ftp://example.org/x\"`: images can't be fetched by ftp://; an image is a path or an https:// or http:// address",
    ),
    (
        "image = \"debian-12.qcow2\"",
        "image = \"file:///srv/x\"",
        "5:9 `\"file:///srv/x\"`: images can't be fetched by file://; write the path: `image = \"/srv/x\"`",
    ),
    ("image = \"debian-12.qcow2\"", "image = \"https://\"", "5:9 `\"https://\"`: this address names no host"),
    (
        "sha256 = \"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"",
        "sha256 = \"…\"",
        "6:10 `\"…\"`: `sha256` wants 64 hexadecimal digits, this has 1",
    ),
    (
        "sha256 = \"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"",
        "sha256 = \"sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"",
        "6:10 `\"sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"`: `sha256` wants the digits only; write `sha256 = \"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"`",
    ),
    (
        "sha256 = \"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"",
        "sha512 = \"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"",
        "6:10 `\"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"`: `sha512` wants 128 hexadecimal digits, this has 64; this is as long as a sha256: write `sha256 = …`",
    ),
    (
        "sha256 = \"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"",
        "sha256 = \"g123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"",
        "6:10 `\"g123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"`: `sha256` contains something else than hexadecimal digits",
    ),
    ("arch = \"x86_64\"", "sha512 = \"\"", "7:1 `sha512`: both `sha256` and `sha512` are given; keep one of them"),
    ("arch = \"x86_64\"", "arch = \"x86-64\"", "7:8 `\"x86-64\"`: `arch` can't be `x86-64`; did you mean `x86_64`?"),
    (
        "arch = \"x86_64\"",
        "arch = \"riscv64\"",
        "7:8 `\"riscv64\"`: `arch` can't be `riscv64`; use one of `x86_64`, `aarch64`",
    ),
];

#[test]
fn refused_names_and_bases() {
    check(NAMES_AND_BASES);
}

const MACHINES_AND_DISKS: &[(&str, &str, &str)] = &[
    ("cpus = 2", "cpus = 0", "10:8 `0`: `cpus` must be between 1 and 64"),
    (
        "cpus = 2",
        "cpu = \"x86-64-v4\"",
        "10:7 `\"x86-64-v4\"`: `cpu` can't be `x86-64-v4`; use one of `x86-64-v2`, `x86-64-v3`",
    ),
    ("cpus = 2", "cpu = 3", "10:7 `3`: `cpu` wants a string, not an integer; write \"3\" in quotes"),
    ("memory = \"1GiB\"", "memory = \"255MiB\"", "11:10 `\"255MiB\"`: `memory` must be 256MiB or more"),
    ("memory = \"1GiB\"", "memory = \"1048577KiB\"", "11:10 `\"1048577KiB\"`: `memory` must be whole MiB"),
    (
        "memory = \"1GiB\"",
        "memory = \"1Gb\"",
        "11:10 `\"1Gb\"`: `1Gb` has no known unit; use one of B, KiB, MiB, GiB, TiB",
    ),
    ("memory = \"1GiB\"", "memory = \"lots\"", "11:10 `\"lots\"`: `lots` has no number; write for example `4GiB`"),
    (
        "boot = \"auto\"",
        "boot = \"uefi\"",
        "12:8 `\"uefi\"`: `boot` can't be `uefi`; use one of `auto`, `direct`, `firmware`",
    ),
    ("network = \"open\"", "network = \"opne\"", "13:11 `\"opne\"`: `network` can't be `opne`; did you mean `open`?"),
    ("timeout = \"30m\"", "timeout = \"30\"", "14:11 `\"30\"`: `30` has no known unit; use one of ms, s, m, h, d"),
    ("timeout = \"30m\"", "timeout = \"0s\"", "14:11 `\"0s\"`: `timeout` must be longer than 0"),
    ("timeout = \"30m\"", "timeout = \"31d\"", "14:11 `\"31d\"`: `timeout` must be at most 30d"),
    (
        "size = \"4GiB\"",
        "size = \"4500MiB\"",
        "17:8 `\"4500MiB\"`: a disk has whole GiB, as AWS counts volumes in them; write `size = \"5GiB\"`",
    ),
    (
        "size = \"4GiB\"",
        "size = \"0B\"",
        "17:8 `\"0B\"`: a disk has whole GiB, as AWS counts volumes in them; write `size = \"1GiB\"`",
    ),
    ("size = \"4GiB\"", "size = \"65TiB\"", "17:8 `\"65TiB\"`: no volume is this large; the largest volume has 64 TiB"),
];

#[test]
fn refused_machines_and_disks() {
    check(MACHINES_AND_DISKS);
}

const VARIABLES_AND_SEALS: &[(&str, &str, &str)] = &[
    (
        "APP_ENV = \"production\"",
        "1APP = \"x\"",
        "20:1 `1APP`: `1APP` can't be an environment variable; use letters, digits and `_`, no digit first",
    ),
    (
        "APP_ENV = \"production\"",
        "KILN_NAME = \"x\"",
        "20:1 `KILN_NAME`: `KILN_NAME` is reserved; names that start with KILN_ are kiln's own",
    ),
    (
        "keep = [\"logs\"]",
        "keep = [\"logs\", \"hostkeys\"]",
        "39:17 `\"hostkeys\"`: nothing that the seal removes is called `hostkeys`; did you mean `host-keys`?",
    ),
    (
        "keep = [\"logs\"]",
        "keep = [\"x\"]",
        "39:9 `\"x\"`: nothing that the seal removes is called `x`; use one of `logs`, `host-keys`, `machine-id`, `shell-history`, `package-cache`, `leases`, `tmp`",
    ),
];

#[test]
fn refused_variables_and_seals() {
    check(VARIABLES_AND_SEALS);
}

const SETTINGS: &[(&str, &str)] = &[
    ("disk.size=8.5GiB", "`8.5GiB` has no known unit; use one of B, KiB, MiB, GiB, TiB"),
    ("disk.size=4500MiB", "a disk has whole GiB, as AWS counts volumes in them; write `size = \"5GiB\"`"),
    ("base.imge=x", "unknown key `imge` in [base]; did you mean `image`?"),
    ("bas.image=x", "unknown key `bas`; did you mean `base`?"),
    ("machine.cpus=many", "`cpus` wants an integer, not a string"),
    ("machine.cpus=65", "`cpus` must be between 1 and 64"),
    ("name.x=1", "`name` is a string and has no `x` in it"),
    ("provision.3.run=x", "`provision` has no number 3; `provision` has 3, and they are counted from 0"),
    ("provision.webserver.run=x", "none of `provision` is called `webserver`; did you mean `web server`?"),
    ("provision.0.with.prot=81", "`nginx` has no input `prot`; did you mean `port`?"),
    ("provision.\"web server\".with.port=x", "`port` wants an integer, not a string"),
    ("test.serves.rum=x", "unknown key `rum` in [[test]]; did you mean `run`?"),
    ("disk.size", "there is no `=`; write --set KEY=VALUE, for example --set disk.size=8GiB"),
    ("=x", "the key is empty; write --set KEY=VALUE, for example --set disk.size=8GiB"),
    ("a.\"b=c", "a \" is not closed in the key; write --set KEY=VALUE, for example --set disk.size=8GiB"),
    (
        "a\"b\".c=d",
        "unknown key `a\"b\"`; known here: `name`, `description`, `base`, `machine`, `disk`, `env`, `provision`, `seal`, `test`, `publish`",
    ),
    ("publish.regions=eu-west-1", "`regions` wants a list of strings, not a string; write [\"eu-west-1\"]"),
    ("publish.regions.7=eu-west-1", "`regions` has no number 7; `regions` has 2, and they are counted from 0"),
    (
        "provision.0.run=x",
        "one [[provision]] can't have both `uses` and `run`; make two steps of it, each with its own [[provision]]",
    ),
    ("env.KILN_X=1", "`KILN_X` is reserved; names that start with KILN_ are kiln's own"),
    ("base.sha256=", "`sha256` wants 64 hexadecimal digits, this has 0"),
    ("base.image=ssh://x/y", "images can't be fetched by ssh://; an image is a path or an https:// or http:// address"),
    (
        "provision=x",
        "`provision` wants a list of tables, not a string; there can be several: write [[provision]] with two brackets",
    ),
    ("base={}", "[base] has no `image`; add for example `image = \"debian-12.qcow2\"`"),
];

#[test]
fn refused_settings_are_named() {
    for (setting, expected) in SETTINGS {
        assert_eq!(refusal(EXAMPLE, &[setting]), format!("`--set {setting}`: {expected}"));
    }
}
