//! Each way a step or the publishing can be wrong; as in `refusals`.

use super::refusals::check;

const STEPS: &[(&str, &str, &str)] = &[
    (
        "run = \"scripts/app.sh\"",
        "copy = \"x\"\nrun = \"scripts/app.sh\"",
        "35:1 `run`: one [[provision]] can't have both `copy` and `run`; make two steps of it, each with its own [[provision]]",
    ),
    ("copy = \"site/\"", "inline = \"true\"", "29:1 `to`: `to` has no effect with `inline`; it belongs to `copy`"),
    ("reboot = true", "owner = \"root\"", "36:1 `owner`: `owner` has no effect with `run`; it belongs to `copy`"),
    ("reboot = true", "follow = true", "36:1 `follow`: `follow` has no effect with `run`; it belongs to `copy`"),
    ("mode = \"0644\"", "follow = \"yes\"", "31:10 `\"yes\"`: `follow` wants true or false, not a string"),
    (
        "reboot = true",
        "cache = false\nmax_age = \"1d\"",
        "37:11 `\"1d\"`: `max_age` has no effect with `cache = false`; a step with `cache = false` always runs: keep one of the two",
    ),
    ("reboot = true", "max_age = \"0s\"", "36:11 `\"0s\"`: `max_age` must be longer than 0"),
    ("reboot = true", "max_age = 1", "36:11 `1`: `max_age` wants a duration such as \"30m\", not an integer"),
    ("reboot = true", "with = {}", "36:1 `with`: `with` has no effect with `run`; it belongs to `uses`"),
    (
        "mode = \"0644\"",
        "files = [\"x\"]",
        "31:1 `files`: `files` has no effect with `copy`; it belongs to `run`, `inline`",
    ),
    (
        "mode = \"0644\"",
        "env = { A = \"b\" }",
        "31:1 `env`: `env` has no effect with `copy`; it belongs to `run`, `inline`, `uses`",
    ),
    ("name = \"web server\"", "name = \"a\\nb\"", "23:8 `\"a\\nb\"`: a name stands on one line"),
    (
        "to = \"/var/www/html/\"",
        "to = \"./var/www\"",
        "29:6 `\"./var/www\"`: `to` wants an absolute path in the guest; write for example `to = \"/var/www\"`",
    ),
    (
        "to = \"/var/www/html/\"",
        "to = \"~/site\"",
        "29:6 `\"~/site\"`: `to` wants an absolute path in the guest; write for example `to = \"/root/site\"`",
    ),
    ("to = \"/var/www/html/\"", "to = \"/var/../etc\"", "29:6 `\"/var/../etc\"`: `to` can't contain `..`"),
    ("copy = \"site/\"", "copy = \"\"", "28:8 `\"\"`: `copy` is empty"),
    (
        "owner = \"root:root\"",
        "owner = \"root:\"",
        "30:9 `\"root:\"`: `owner` wants a user, or a user and a group; write for example `owner = \"root\"` or `owner = \"root:www-data\"`",
    ),
    (
        "owner = \"root:root\"",
        "owner = \"a:b:c\"",
        "30:9 `\"a:b:c\"`: `owner` wants a user, or a user and a group; write for example `owner = \"root\"` or `owner = \"root:www-data\"`",
    ),
    (
        "mode = \"0644\"",
        "mode = 644",
        "31:8 `644`: `mode` wants octal digits in a string, not an integer; write `mode = \"0644\"` in quotes",
    ),
    (
        "mode = \"0644\"",
        "mode = 0o755",
        "31:8 `0o755`: `mode` wants octal digits in a string, not an integer; write `mode = \"0755\"` in quotes",
    ),
    (
        "mode = \"0644\"",
        "mode = 0xff",
        "31:8 `0xff`: `mode` wants octal digits in a string, not an integer; write `mode = \"0644\"` in quotes",
    ),
    (
        "mode = \"0644\"",
        "mode = \"u+x\"",
        "31:8 `\"u+x\"`: `u+x` is not a mode; write three or four octal digits, for example `mode = \"0644\"`",
    ),
    (
        "mode = \"0644\"",
        "mode = \"0688\"",
        "31:8 `\"0688\"`: `0688` is not a mode; write three or four octal digits, for example `mode = \"0644\"`",
    ),
    (
        "run = \"scripts/app.sh\"",
        "run = \"apt-get update\"",
        "34:7 `\"apt-get update\"`: `run` wants the path of a script; a command goes into `inline`",
    ),
    (
        "run = \"scripts/app.sh\"",
        "run = \"scripts/\"",
        "34:7 `\"scripts/\"`: `run` wants the path of a script; a command goes into `inline`",
    ),
    (
        "reboot = true",
        "files = [\"../x\"]",
        "36:10 `\"../x\"`: `files` lie next to the script; name files in the script's folder or below; use `copy` for others",
    ),
    (
        "reboot = true",
        "files = [\"/x\"]",
        "36:10 `\"/x\"`: `files` lie next to the script; name files in the script's folder or below; use `copy` for others",
    ),
    ("reboot = true", "files = [\"\"]", "36:10 `\"\"`: an element of `files` is empty"),
    (
        "reboot = true",
        "env = { \"a b\" = \"c\" }",
        "36:9 `\"a b\"`: `a b` can't be an environment variable; use letters, digits and `_`, no digit first",
    ),
];

#[test]
fn refused_steps() {
    check(STEPS);
}

const PROVISIONERS: &[(&str, &str, &str)] = &[
    (
        "uses = \"nginx\"",
        "uses = \"ngnix\"",
        "24:8 `\"ngnix\"`: no provisioner is called `ngnix`; did you mean `nginx`? there are `environment`, `firewall`, `nginx`, `nodejs`, `permissions`, `updates`, `users`",
    ),
    (
        "uses = \"nginx\"",
        "uses = \"kubernetes\"",
        "24:8 `\"kubernetes\"`: no provisioner is called `kubernetes`; use one of `environment`, `firewall`, `nginx`, `nodejs`, `permissions`, `updates`, `users`",
    ),
    ("with = { port = 80 }", "with = { prot = 80 }", "25:10 `prot`: `nginx` has no input `prot`; did you mean `port`?"),
    (
        "with = { port = 80 }",
        "with = { port = \"80\" }",
        "25:17 `\"80\"`: `port` wants an integer, not a string; write 80 without quotes",
    ),
    ("with = { port = 80 }", "with = { port = 65536 }", "25:17 `65536`: `port` must be between 1 and 65535, not 65536"),
    (
        "uses = \"nginx\"                   # from provisioners/, shipped inside kiln\nwith = { port = 80 }",
        "uses = \"environment\"",
        "24:8 `\"environment\"`: `environment` needs the input `variables`; add `with = { variables = [\"…\"] }`: \"KEY=VALUE\" each; the value is taken as it stands, with its spaces and quotes, and nothing in it is expanded",
    ),
    (
        "uses = \"nginx\"                   # from provisioners/, shipped inside kiln\nwith = { port = 80 }",
        "uses = \"environment\"\nwith = {}",
        "25:8 `{}`: `environment` needs the input `variables`; add `with = { variables = [\"…\"] }`: \"KEY=VALUE\" each; the value is taken as it stands, with its spaces and quotes, and nothing in it is expanded",
    ),
    (
        "uses = \"nginx\"                   # from provisioners/, shipped inside kiln\nwith = { port = 80 }",
        "uses = \"firewall\"\nwith = { tcp = [80] }",
        "25:17 `80`: an element of `tcp` wants a string, not an integer; write \"80\" in quotes",
    ),
    (
        "uses = \"nginx\"                   # from provisioners/, shipped inside kiln\nwith = { port = 80 }",
        "uses = \"firewall\"\nwith = { tcp = [\"80\\n81\"] }",
        "25:17 `\"80\\n81\"`: an element of `tcp` contains a line break",
    ),
    (
        "uses = \"nginx\"                   # from provisioners/, shipped inside kiln\nwith = { port = 80 }",
        "uses = \"firewall\"\nwith = { ping = \"yes\" }",
        "25:17 `\"yes\"`: `ping` wants true or false, not a string",
    ),
];

#[test]
fn refused_provisioners() {
    check(PROVISIONERS);
}

const IMAGE_NAMES: &[(&str, &str, &str)] = &[
    (
        "{digest:8}",
        "{dgest:8}",
        "46:14 `\"web-{date}-{dgest:8}\"`: unknown placeholder `{dgest:8}`; did you mean `{digest:8}`?",
    ),
    (
        "{digest:8}",
        "{digest}",
        "46:14 `\"web-{date}-{digest}\"`: `{digest}` doesn't say how many digits; write for example `{digest:8}`; there are 64 digits",
    ),
    (
        "{digest:8}",
        "{digest:65}",
        "46:14 `\"web-{date}-{digest:65}\"`: `65` is not a number of digits; write for example `{digest:8}`; there are 64 digits",
    ),
    ("{digest:8}", "{date:8}", "46:14 `\"web-{date}-{date:8}\"`: `date` takes no `:`; write `{date}`"),
    (
        "{digest:8}",
        "{sha}",
        "46:14 `\"web-{date}-{sha}\"`: unknown placeholder `{sha}`; use one of `{name}`, `{date}`, `{time}`, `{digest:8}`, `{version}`",
    ),
    ("{digest:8}", "{digest:8", "46:14 `\"web-{date}-{digest:8\"`: a `{` is not closed; write for example `{date}`"),
    (
        "{digest:8}",
        "digest:8}",
        "46:14 `\"web-{date}-digest:8}\"`: an image's name can't contain `:`; AWS takes letters, digits, spaces and `()[]./-'@_`",
    ),
    (
        "\"web-{date}-{digest:8}\"",
        "\"wéb\"",
        "46:14 `\"wéb\"`: an image's name can't contain `é`; AWS takes letters, digits, spaces and `()[]./-'@_`",
    ),
    (
        "\"web-{date}-{digest:8}\"",
        "\"w\"",
        "46:14 `\"w\"`: an image's name has 3 to 128 characters; this one would have 1",
    ),
    (
        "\"web-{date}-{digest:8}\"",
        "\"wwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwww{digest:64}\"",
        "46:14 `\"wwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwww{digest:64}\"`: an image's name has 3 to 128 characters; this one would have 164",
    ),
];

#[test]
fn refused_image_names() {
    check(IMAGE_NAMES);
}

const PUBLISHING: &[(&str, &str, &str)] = &[
    (
        "\"us-east-1\"",
        "\"us-east1\"",
        "47:28 `\"us-east1\"`: `us-east1` is not a region; regions are written like `eu-central-1`",
    ),
    (
        "\"us-east-1\"",
        "\"us-east-1a\"",
        "47:28 `\"us-east-1a\"`: `us-east-1a` is not a region; it is a zone of `us-east-1`",
    ),
    ("\"us-east-1\"", "\"eu-central-1\"", "47:28 `\"eu-central-1\"`: `eu-central-1` is there twice"),
    (
        "\"my-import-bucket\"",
        "\"s3://b/images\"",
        "48:10 `\"s3://b/images\"`: the bucket is wanted by its name, not by an address; write `b`, and `prefix = \"images\"` in the recipe's [publish]",
    ),
    (
        "\"my-import-bucket\"",
        "\"My_Bucket\"",
        "48:10 `\"My_Bucket\"`: `My_Bucket` can't be a bucket; buckets have 3 to 63 lowercase letters, digits, `-` and `.`, and begin and end with a letter or digit",
    ),
    (
        "boot_mode = \"uefi-preferred\"",
        "boot_mode = \"bios\"",
        "49:13 `\"bios\"`: `boot_mode` can't be `bios`; use one of `legacy-bios`, `uefi`, `uefi-preferred`",
    ),
    (
        "arch = \"x86_64\"",
        "arch = \"aarch64\"",
        "49:13 `\"uefi-preferred\"`: an aarch64 image can't boot as `uefi-preferred`; write `boot_mode = \"uefi\"`",
    ),
    ("imds = \"v2.0\"", "imds = \"v2\"", "50:8 `\"v2\"`: `imds` can't be `v2`; did you mean `v2.0`?"),
    ("imds = \"v2.0\"", "prefix = \"/x\"", "50:10 `\"/x\"`: `prefix` can't start with `/`; write `prefix = \"x\"`"),
    (
        "imds = \"v2.0\"",
        "root_device = \"sda1\"",
        "50:15 `\"sda1\"`: `sda1` can't be a root device; AWS takes names like `/dev/xvda` and `/dev/sda1`, whatever the guest calls it",
    ),
    (
        "imds = \"v2.0\"",
        "role = \"arn:aws:iam::1:role/import\"",
        "50:8 `\"arn:aws:iam::1:role/import\"`: `role` wants a name, not an ARN; write `role = \"import\"`",
    ),
    ("imds = \"v2.0\"", "volume_type = \"gp4\"", "50:15 `\"gp4\"`: `volume_type` can't be `gp4`; did you mean `gp3`?"),
    (
        "imds = \"v2.0\"",
        "tags = { \"aws:x\" = \"y\" }",
        "50:10 `\"aws:x\"`: the tag `aws:x` can't be set; keys that start with `aws:` are AWS's own",
    ),
    (
        "imds = \"v2.0\"",
        "tags = { Version = 1.10 }",
        "50:20 `1.10`: `Version` wants a string, not a number with a point; write \"1.10\" in quotes",
    ),
    (
        "imds = \"v2.0\"",
        "description = \"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"",
        "50:15 `\"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"`: an image's description can't have 256 characters; AWS takes up to 255",
    ),
    (
        "imds = \"v2.0\"",
        "description = \"naïve\"",
        "50:15 `\"naïve\"`: an image's description can't contain `ï`; AWS takes only printable ASCII characters there",
    ),
    (
        "imds = \"v2.0\"",
        "tags = { \"kiln:x\" = \"y\" }",
        "50:10 `\"kiln:x\"`: the tag `kiln:x` can't be set; keys that start with `kiln:` are kiln's own",
    ),
];

#[test]
fn refused_publishing() {
    check(PUBLISHING);
}
