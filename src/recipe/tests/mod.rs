//! What is accepted and what becomes of it; that nothing makes it panic.

mod refusals;
mod refused_steps;
mod refused_volumes;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::error::Exit;
use crate::units::{GIB, MIB};

/// The example of the documentation.
const EXAMPLE: &str = r#"name = "web"
description = "nginx on Debian 12"

[base]
image = "debian-12.qcow2"        # a path, an URL, or a name from the catalogue
sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"                     # or sha512; needed for an URL unless the lock has it
arch = "x86_64"                  # or aarch64

[machine]                        # the build guest, not the instance
cpus = 2
memory = "1GiB"
boot = "auto"                    # auto | direct | firmware
network = "open"                 # none | open | locked
timeout = "30m"

[disk]
size = "4GiB"                    # whole GiB; the root partition and filesystem grow to it

[env]                            # for every step
APP_ENV = "production"

[[provision]]
name = "web server"
uses = "nginx"                   # from provisioners/, shipped inside kiln
with = { port = 80 }             # becomes environment of that provisioner; unknown or missing keys are refused

[[provision]]
copy = "site/"                   # file or folder, relative to the recipe
to = "/var/www/html/"
owner = "root:root"
mode = "0644"

[[provision]]
run = "scripts/app.sh"           # or inline = "…"
timeout = "5m"
reboot = true                    # reboot after it, then go on

[seal]                           # on by default
keep = ["logs"]

[[test]]                         # run inside the rehearsed instance
name = "serves"
run = "curl -fsS http://localhost/ | grep -q Hello"

[publish]
image_name = "web-{date}-{digest:8}"
regions = ["eu-central-1", "us-east-1"]
bucket = "my-import-bucket"
boot_mode = "uefi-preferred"     # legacy-bios | uefi | uefi-preferred
imds = "v2.0"
"#;

const SMALL: &str = "name = 'a'\n[base]\nimage = 'b.raw'\n";

fn read(text: &str) -> Recipe {
    read_set(text, &[])
}

fn read_set(text: &str, set: &[&str]) -> Recipe {
    let set: Vec<_> = set.iter().map(|&setting| setting.to_owned()).collect();
    parse(Path::new("recipes/web.toml"), text, &set).unwrap()
}

/// The text at a place, and its line.
fn marked<'a>(recipe: &'a Recipe, span: &Range<usize>) -> (usize, &'a str) {
    (recipe.place(span).line_column().0, &recipe.text[span.clone()])
}

fn example(from: &str, to: &str) -> String {
    assert!(EXAMPLE.contains(from), "the example has no {from:?}");
    EXAMPLE.replace(from, to)
}

/// Everything that is shown of a refusal.
fn refusal(text: &str, set: &[&str]) -> String {
    let set: Vec<_> = set.iter().map(|&setting| setting.to_owned()).collect();
    let Err(error) = parse(Path::new("web.toml"), text, &set) else { return "accepted".to_owned() };
    assert_eq!(error.exit, Exit::Input);
    let place = error.place.map_or_else(String::new, |place| {
        assert_eq!((place.path.as_path(), place.text.as_str()), (Path::new("web.toml"), text));
        let (line, column) = place.line_column();
        format!("{line}:{column} `{}`: ", &text[place.span])
    });
    let help = error.help.map_or_else(String::new, |help| format!("; {help}"));
    format!("{place}{}{help}", error.message)
}

#[test]
fn what_comes_first_is_told_and_a_misspelt_key_before_an_absent_one() {
    let told = |text: &str| refusal(text, &[]);
    assert_eq!(told("nmae = 'a'\n"), "1:1 `nmae`: unknown key `nmae`; did you mean `name`?");
    let both = "name = 'a'\ndescription = 1\n[base]\nimage = 2\n";
    let expected = "2:15 `1`: `description` wants a string, not an integer; write \"1\" in quotes";
    assert_eq!(told(both), expected);
    let step = format!("{SMALL}[[provision]]\ncpoy = 'x'\n[publish]\nbukcet = 'x'\n");
    let expected = "5:1 `cpoy`: unknown key `cpoy` in [[provision]]; did you mean `copy`?";
    assert_eq!(told(&step), expected);
}

#[test]
fn small_recipes_are_refused_for_what_they_lack() {
    let told = |text: &str| refusal(text, &[]);
    assert_eq!(told(""), "1:1 ``: the recipe has no `name`; add for example `name = \"web\"`");
    let expected = "1:1 ``: the recipe has no [base]; add a table [base] with `image = \"debian-12.qcow2\"`";
    assert_eq!(told("name = 'a'"), expected);
    assert_eq!(told("name = 'a'\nbase = 'b'"), "2:8 `'b'`: `base` wants a table, not a string");
    let expected = "4:1 `[provision]`: `provision` wants a list of tables, not a table; \
                    there can be several: write [[provision]] with two brackets";
    assert_eq!(told(&format!("{SMALL}[provision]\nrun = 'x'")), expected);
    let expected = "1:9 `'true'`: an element of `test` wants a table, not a string";
    assert_eq!(told(&format!("test = ['true']\n{SMALL}")), expected);
    assert_eq!(refusal(SMALL, &["provision.0.run=x"]), "`--set provision.0.run=x`: the recipe has no [[provision]]");
}

#[test]
fn an_image_from_the_network_needs_a_digest() {
    let url = SMALL.replace("b.raw", "https://x/b.raw");
    let expected = "3:9 `'https://x/b.raw'`: an image from the network needs a digest; \
                    add `sha256 = \"…\"`: what was published next to the image says it";
    assert_eq!(refusal(&url, &[]), expected);
    let expected = "4:10 `'0'`: `sha256` wants 64 hexadecimal digits, this has 1";
    assert_eq!(refusal(&format!("{url}sha256 = '0'"), &[]), expected, "told once");
}

#[test]
fn names_are_not_ambiguous_in_settings() {
    let twice = format!("{SMALL}[[provision]]\nname = 'a'\nrun = 'x'\n[[provision]]\nname = 'a'\nrun = 'y'\n");
    let expected = "`--set provision.a.run=z`: several of `provision` are called `a`; \
                    use its number, the first is `provision.0`";
    assert_eq!(refusal(&twice, &["provision.a.run=z"]), expected);
}

#[test]
fn the_example_is_read_whole() {
    let recipe = read(EXAMPLE);
    assert_eq!((recipe.name.as_str(), recipe.description.as_str()), ("web", "nginx on Debian 12"));
    assert_eq!(recipe.dir(), Path::new("recipes"));
    assert_eq!(recipe.warnings, []);
    assert_eq!(recipe.env, BTreeMap::from([("APP_ENV".to_owned(), "production".to_owned())]));

    let base = &recipe.base;
    assert_eq!(base.image, Image::Path(PathBuf::from("recipes/debian-12.qcow2")));
    let digest = Digest { algorithm: Algorithm::Sha256, hex: "0123456789abcdef".repeat(4) };
    assert_eq!(base.digest.as_ref(), Some(&digest));
    assert_eq!(base.arch, Arch::X86_64);
    assert_eq!(marked(&recipe, &base.span), (5, "\"debian-12.qcow2\""));
    assert_eq!(marked(&recipe, base.digest_span.as_ref().unwrap()).0, 6);
    assert_eq!(marked(&recipe, base.arch_span.as_ref().unwrap()), (7, "\"x86_64\""));

    let machine = &recipe.machine;
    assert_eq!((machine.cpus, machine.memory, machine.boot), (2, Size(GIB), Boot::Auto));
    assert_eq!((machine.network, machine.timeout), (Network::Open, Some(Duration::from_mins(30))));
    assert_eq!(marked(&recipe, machine.network_span.as_ref().unwrap()), (13, "\"open\""));
    assert_eq!(recipe.disk.size, Some(Size(4 * GIB)));
    assert_eq!(marked(&recipe, recipe.disk.span.as_ref().unwrap()), (17, "\"4GiB\""));
    assert_eq!(recipe.seal, Seal { enabled: true, keep: vec![Keep::Logs] });

    let [test] = &recipe.tests[..] else { panic!("{:?}", recipe.tests) };
    assert_eq!(test.name, "serves");
    assert_eq!(test.run, "curl -fsS http://localhost/ | grep -q Hello");
    assert_eq!(marked(&recipe, &test.span), (41, "[[test]]"));
    assert_eq!(marked(&recipe, &test.run_span).0, 43);
}

#[test]
fn the_examples_steps_are_read_whole() {
    let recipe = read(EXAMPLE);
    let names: Vec<_> = recipe.steps.iter().map(|step| step.name.as_str()).collect();
    assert_eq!(names, ["web server", "copy site/", "run scripts/app.sh"]);
    let [uses, copy, run] = &recipe.steps[..] else { panic!("three steps") };

    let Action::Uses { provisioner, inputs } = &uses.action else { panic!("{:?}", uses.action) };
    assert_eq!(provisioner.name, "nginx");
    assert_eq!(inputs["KILN_INPUT_PORT"], "80");
    assert_eq!(inputs.len(), provisioner.inputs.len(), "defaults are filled in");
    assert_eq!(marked(&recipe, &uses.span), (22, "[[provision]]"));
    assert_eq!(marked(&recipe, &uses.value_span), (24, "\"nginx\""));

    let Action::Copy { from, to, contents, owner, mode, follow: false } = &copy.action else {
        panic!("{:?}", copy.action)
    };
    assert_eq!((from.as_path(), to.as_str(), *contents), (Path::new("site/"), "/var/www/html/", true));
    assert_eq!((owner.as_deref(), *mode), (Some("root:root"), Some(0o644)));

    let Action::File { path, files } = &run.action else { panic!("{:?}", run.action) };
    assert_eq!((path.as_path(), files.len()), (Path::new("scripts/app.sh"), 0));
    assert_eq!((run.timeout, run.reboot), (Some(Duration::from_mins(5)), true));
    assert_eq!((copy.timeout, copy.reboot), (None, false));
    assert_eq!(marked(&recipe, &run.value_span), (34, "\"scripts/app.sh\""));
}

#[test]
fn the_examples_publishing_is_read_whole() {
    let recipe = read(EXAMPLE);
    let publish = &recipe.publish;
    assert_eq!(publish.image_name.as_deref(), Some("web-{date}-{digest:8}"));
    assert_eq!(publish.regions, ["eu-central-1", "us-east-1"]);
    assert_eq!(publish.bucket.as_deref(), Some("my-import-bucket"));
    assert_eq!((publish.boot_mode, publish.imds), (Some(BootMode::UefiPreferred), Some(Imds::V2)));
    assert_eq!(publish.root.volume_type, VolumeType::Gp3);
    assert_eq!(marked(&recipe, publish.span.as_ref().unwrap()), (45, "[publish]"));
    assert_eq!(marked(&recipe, publish.image_name_span.as_ref().unwrap()).0, 46);
    assert_eq!(marked(&recipe, publish.regions_span.as_ref().unwrap()).0, 47);
    assert_eq!(marked(&recipe, publish.bucket_span.as_ref().unwrap()).0, 48);
    assert_eq!(marked(&recipe, publish.boot_mode_span.as_ref().unwrap()).0, 49);
}

#[test]
fn a_step_says_how_long_its_result_is_taken_and_a_provisioner_may_say_so_for_it() {
    let age = |step: &str| read(&format!("{SMALL}[[provision]]\n{step}\n")).steps[0].max_age;
    let hours = |hours| Some(Duration::from_hours(hours));
    assert_eq!(age("inline = 'x'"), None);
    assert_eq!(age("inline = 'x'\nmax_age = '90d'"), hours(90 * 24));
    assert_eq!(age("uses = 'nginx'"), None);
    assert_eq!(age("uses = 'updates'"), hours(24));
    assert_eq!(age("uses = 'updates'\nmax_age = '1h'"), hours(1));
    assert_eq!(age("uses = 'updates'\ncache = false"), None);
}

#[test]
fn a_copy_follows_the_link_that_it_names_only_if_told() {
    let follows = |more: &str| {
        let recipe = read(&format!("{SMALL}[[provision]]\ncopy = 'x'\nto = '/x'\n{more}"));
        matches!(recipe.steps[0].action, Action::Copy { follow: true, .. })
    };
    assert_eq!([follows(""), follows("follow = false"), follows("follow = true")], [false, false, true]);
}

#[test]
fn a_processor_is_a_level() {
    for level in CpuLevel::ALL {
        assert_eq!(read(&format!("{SMALL}[machine]\ncpu = '{level}'\n")).machine.cpu, *level);
    }
}

#[test]
fn what_is_left_out_has_its_default() {
    let recipe = read(SMALL);
    assert_eq!(recipe.machine.cpus, 2);
    assert_eq!(recipe.machine.memory, Size(1024 * MIB));
    assert_eq!(recipe.machine.cpu, CpuLevel::V3);
    assert_eq!(recipe.machine.network_span, None);
    assert_eq!(recipe.disk, Disk::default());
    assert!(recipe.steps.is_empty() && recipe.tests.is_empty() && recipe.env.is_empty());
    assert_eq!(recipe.seal, Seal { enabled: true, keep: Vec::new() });
    assert_eq!(recipe.publish, Publish::default());
    assert_eq!((recipe.base.digest, recipe.base.digest_span, recipe.base.arch_span), (None, None, None));
    assert_eq!(Imds::default(), Imds::V2);
}

#[test]
fn images_are_paths_or_addresses() {
    let image = |path: &str, image: &str| {
        let digest = "0".repeat(64);
        let text = format!("name = 'a'\n[base]\nimage = '{image}'\nsha256 = '{digest}'\n");
        parse(Path::new(path), &text, &[]).unwrap().base.image
    };
    let path = |text: &str| Image::Path(PathBuf::from(text));
    assert_eq!(image("web.toml", "a.raw"), path("a.raw"));
    assert_eq!(image("./web.toml", "a.raw"), path("a.raw"));
    assert_eq!(image("../web.toml", "a.raw"), path("../a.raw"));
    assert_eq!(image("/r/web.toml", "images/a.raw"), path("/r/images/a.raw"));
    assert_eq!(image("/r/web.toml", "/a.raw"), path("/a.raw"));
    assert_eq!(image("/r/web.toml", "~/a.raw"), path("~/a.raw"));
    assert_eq!(image("web.toml", "https://x/a.raw"), Image::Url("https://x/a.raw".to_owned()));
}

#[test]
fn digests_are_lowercased() {
    let recipe = read(&format!("{SMALL}sha512 = '{}'", "AB".repeat(64)));
    let digest = recipe.base.digest.unwrap();
    assert_eq!((digest.algorithm, digest.hex.as_str()), (Algorithm::Sha512, "ab".repeat(64).as_str()));
    assert_eq!(digest.to_string(), format!("sha512:{}", digest.hex));
}

#[test]
fn other_names_of_an_architecture_are_taken_with_a_warning() {
    let recipe = read(&format!("{SMALL}arch = 'arm64'"));
    assert_eq!(recipe.base.arch, Arch::Aarch64);
    let [warning] = &recipe.warnings[..] else { panic!("{:?}", recipe.warnings) };
    assert_eq!(warning.message, "`arm64` is another name for `aarch64`");
    assert_eq!(warning.help, "write `arch = \"aarch64\"`");
    assert_eq!(marked(&recipe, &warning.span), (4, "'arm64'"));
    assert_eq!(read(&format!("{SMALL}arch = 'amd64'")).base.arch, Arch::X86_64);
}

#[test]
fn steps_without_a_name_get_one() {
    let steps = "[[provision]]\ninline = '''\n#!/bin/sh\n# why\nset -eu\n\n  apt-get update\n'''
        [[provision]]\ninline = '# nothing'\n[[provision]]\nuses = 'nginx'
        [[provision]]\ninline = 'echo ääääääääääääääääääääääääääääääääääääääääääääääääääääääääääää'
        [[test]]\nrun = 'true'\n";
    let recipe = read(&format!("{SMALL}{steps}"));
    let names: Vec<_> = recipe.steps.iter().map(|step| step.name.as_str()).collect();
    let long = format!("echo {}…", "ä".repeat(43));
    assert_eq!(names, ["apt-get update", "script", "nginx", &long]);
    assert_eq!(recipe.tests[0].name, "true");
}

#[test]
fn files_lie_next_to_their_script() {
    let text = format!(
        "{SMALL}[[provision]]\nrun = 'scripts/a.sh'\nfiles = ['./b.conf', 'c/d.conf']\n
         [[provision]]\ninline = 'cat e'\nfiles = ['e']\nenv = {{ A = '1' }}"
    );
    let recipe = read(&text);
    let (folder, files) = recipe.steps[0].action.files();
    assert_eq!((folder, files), (Path::new("scripts"), &[PathBuf::from("b.conf"), PathBuf::from("c/d.conf")][..]));
    let (folder, files) = recipe.steps[1].action.files();
    assert_eq!((folder, files), (Path::new(""), &[PathBuf::from("e")][..]));
    assert_eq!(recipe.steps[1].env["A"], "1");
}

#[test]
fn copies_tell_a_folder_from_what_is_in_it() {
    let copy = |rest: &str| match read(&format!("{SMALL}[[provision]]\nto = '/srv'\n{rest}")).steps.remove(0).action {
        Action::Copy { contents, owner, mode, .. } => (contents, owner, mode),
        other => panic!("{other:?}"),
    };
    assert_eq!(copy("copy = 'site'"), (false, None, None));
    assert_eq!(copy("copy = 'site/'\nmode = '755'"), (true, None, Some(0o755)));
    assert_eq!(
        copy("copy = '.x'\nmode = '4750'\nowner = '1000:33'"),
        (false, Some("1000:33".to_owned()), Some(0o4750))
    );
    for contents in [".", "..", "site/.", "../site/.."] {
        assert_eq!(copy(&format!("copy = '{contents}'")), (true, None, None), "{contents}");
    }
}

#[test]
fn the_seal_can_be_off_and_keep_things_once() {
    assert!(!read(&format!("{SMALL}[seal]\nenabled = false")).seal.enabled);
    let every = Keep::ALL.iter().rev().map(|keep| format!("'{keep}'")).collect::<Vec<_>>().join(",");
    let seal = read(&format!("{SMALL}[seal]\nkeep = [{every},'tmp']")).seal;
    assert_eq!(seal.keep, Keep::ALL);
}

#[test]
fn publishing_takes_everything_there_is() {
    let publish = "[publish]\nimage_name = '{name} {date} {time} {version} {digest:64}'\ndescription = 'd'
        regions = ['us-gov-west-1', 'cn-north-1']\nbucket = 'a.b-c'\nprefix = 'images/'\nboot_mode = 'legacy-bios'
        imds = 'v1.0'\nvolume_type = 'gp2'\nroot_device = '/dev/sda1'\nrole = 'vm-import'
        tags = { Name = 'x', 'a:b' = '' }\ndisk_format = 'vmdk'\nsse = 'aws:kms'\nsse_kms_key = 'alias/images'
        keep_object = true\nvia = 'auto'\nomit_holes = true\n";
    let publish = read(&format!("{SMALL}{publish}")).publish;
    let parts = name_parts(publish.image_name.as_deref().unwrap()).unwrap();
    let (gap, digest) = (TextPart::Text(" "), TextPart::Digest(64));
    let expected = [TextPart::Name, gap, TextPart::Date, gap, TextPart::Time, gap, TextPart::Version, gap, digest];
    assert_eq!(parts, expected);
    assert_eq!(publish.regions, ["us-gov-west-1", "cn-north-1"]);
    assert_eq!((publish.boot_mode, publish.imds), (Some(BootMode::LegacyBios), Some(Imds::V1)));
    assert_eq!((publish.root.volume_type, publish.root_device.as_deref()), (VolumeType::Gp2, Some("/dev/sda1")));
    assert_eq!((publish.role.as_deref(), publish.prefix.as_deref()), (Some("vm-import"), Some("images/")));
    assert_eq!(publish.tags["a:b"], "");
    assert_eq!((publish.disk_format, publish.sse), (DiskFormat::Vmdk, Some(Sse::Kms)));
    assert_eq!((publish.sse_kms_key.as_deref(), publish.keep_object), (Some("alias/images"), true));
    assert!(publish.omit_holes && publish.via == Via::Auto);
}

#[test]
fn settings_reach_every_table() {
    let digest = "0".repeat(64);
    let sha256 = format!("base.sha256={digest}");
    let recipe = read_set(
        EXAMPLE,
        &[
            "name=db",
            "disk.size=8GiB",
            "machine.cpus=4",
            "env.APP=1.10",
            "env.EMPTY=",
            "env.QUOTED=\"a = b\"",
            "base.image=https://example.org/x",
            &sha256,
            "seal.enabled=false",
            "seal.keep=[\"tmp\"]",
            "publish.regions.0=eu-west-1",
            "publish.tags.\"a.b\"=true",
            "provision.\"web server\".with.port=81",
            "provision.copy site/.mode=0755",
            "provision.2.timeout=1h",
            "provision.2.reboot=false",
            "test.serves.run=true",
            "name=cache",
        ],
    );
    assert_eq!((recipe.name.as_str(), recipe.machine.cpus), ("cache", 4));
    assert_eq!(recipe.disk.size, Some(Size(8 * GIB)));
    let env: Vec<_> = recipe.env.values().map(String::as_str).collect();
    assert_eq!(env, ["1.10", "production", "", "a = b"]);
    assert_eq!(recipe.base.image, Image::Url("https://example.org/x".to_owned()));
    assert_eq!(recipe.seal, Seal { enabled: false, keep: vec![Keep::Tmp] });
    assert_eq!(recipe.publish.regions, ["eu-west-1", "us-east-1"]);
    assert_eq!(recipe.publish.tags["a.b"], "true");
    let Action::Uses { inputs, .. } = &recipe.steps[0].action else { panic!("uses") };
    assert_eq!(inputs["KILN_INPUT_PORT"], "81");
    assert!(matches!(recipe.steps[1].action, Action::Copy { mode: Some(0o755), .. }));
    assert_eq!((recipe.steps[2].timeout, recipe.steps[2].reboot), (Some(Duration::from_hours(1)), false));
    assert_eq!(recipe.tests[0].run, "true");
}

#[test]
fn a_place_says_which_setting_changed_it() {
    let recipe = read_set(EXAMPLE, &["base.image=a.raw", "base.image=b.raw", "disk={ size = \"5GiB\" }"]);
    let place = recipe.place(&recipe.base.span);
    assert_eq!((place.line_column(), place.label.as_str()), ((5, 9), "set by `--set base.image=b.raw`"));
    assert_eq!(recipe.place(recipe.base.arch_span.as_ref().unwrap()).label, "");
    let place = recipe.place(recipe.disk.span.as_ref().unwrap());
    assert_eq!((place.line_column().0, place.label.as_str()), (16, "set by `--set disk={ size = \"5GiB\" }`"));
    let disk = |set: &[&str]| read_set(SMALL, set).disk;
    assert_eq!(disk(&["disk.sha256=true"]), Disk { sha256: true, ..Disk::default() });
    let recipe = read_set(SMALL, &["base.arch=amd64", "disk.size=2GiB"]);
    let place = recipe.place(recipe.base.arch_span.as_ref().unwrap());
    assert_eq!((place.line_column(), place.label.as_str()), ((2, 7), "set by `--set base.arch=amd64`"));
    assert_eq!(recipe.place(recipe.disk.span.as_ref().unwrap()).label, "");
}

#[test]
fn a_byte_order_mark_and_windows_line_ends_are_taken() {
    let text = format!("\u{feff}{}", SMALL.replace('\n', "\r\n"));
    let recipe = read(&text);
    assert_eq!(marked(&recipe, &recipe.base.span), (3, "'b.raw'"));
}

/// Reads it for nothing but the panic, and looks at the place of what is refused.
fn survives(text: &str, set: &[String]) {
    match parse(Path::new("web.toml"), text, set) {
        Ok(recipe) => {
            assert_eq!(recipe.text, text);
            let _ = recipe.place(&recipe.base.span).line_column();
        }
        Err(error) => {
            assert_eq!(error.exit, Exit::Input, "{error:?}");
            assert!(!error.message.is_empty());
            if let Some(place) = error.place {
                assert!(text.get(place.span.clone()).is_some(), "{place:?}");
            }
        }
    }
}

/// Words that recipes are made of.
fn word() -> impl Strategy<Value = String> {
    let words = "name base image sha256 machine provision test publish with run copy to mode env uses nginx port = \" ' \
                 [ ] [[ ]] { } , . # \\ 0 -1 0o7 1.5 true 1979-05-27 4GiB 30m é 🔥 {digest:8} {date \"\"\" ''' = \"\" \
                 regions tags seal keep disk size";
    let words: Vec<_> = words.split(' ').map(str::to_owned).chain(["\n".to_owned(), " ".to_owned()]).collect();
    prop_oneof![4 => proptest::sample::select(words), 1 => any::<char>().prop_map(String::from)]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_text_never_panics(text in any::<String>()) {
        survives(&text, &[]);
    }

    #[test]
    fn arbitrary_words_never_panic(words in proptest::collection::vec(word(), 0..60)) {
        survives(&words.concat(), &[]);
        survives(&format!("{SMALL}{}", words.concat()), &[]);
    }

    #[test]
    fn a_mutated_example_never_panics(
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), 0usize..12, word()), 1..6),
    ) {
        let mut text = EXAMPLE.to_owned();
        for (at, length, new) in edits {
            let start = text.floor_char_boundary(at.index(text.len() + 1));
            let end = text.ceil_char_boundary((start + length).min(text.len()));
            text.replace_range(start..end, &new);
        }
        survives(&text, &[]);
    }

    #[test]
    fn arbitrary_settings_never_panic(words in proptest::collection::vec(word(), 0..12), known in 0usize..8) {
        let keys = ["", "name=", "provision.0.", "provision.nginx.with.port=", "base.", "env.A=", "publish=", "test="];
        let setting = format!("{}{}", keys[known], words.concat());
        survives(EXAMPLE, std::slice::from_ref(&setting));
        survives(SMALL, &[setting.clone(), setting]);
    }

    #[test]
    fn a_template_is_its_parts(parts in proptest::collection::vec(0usize..6, 0..8)) {
        let texts = ["{name}", "{date}", "{time}", "{digest:7}", "{version}", "a-b "];
        let template: String = parts.iter().map(|&part| texts[part]).collect();
        let read = name_parts(&template).unwrap();
        let written: String = read.iter().map(|part| match part {
            TextPart::Text(text) => text,
            TextPart::Name => texts[0],
            TextPart::Date => texts[1],
            TextPart::Time => texts[2],
            TextPart::Digest(_) => texts[3],
            TextPart::Version => texts[4],
        }).collect();
        prop_assert_eq!(written, template);
    }
}
