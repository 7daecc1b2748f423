//! The command line: results, formats, help, and the commands that build nothing.

use serde_json::{Value, json};

use crate::support::{Base, Bench, step, write_base};

fn bench() -> Bench {
    let bench = Bench::new();
    bench.one_step();
    bench
}

#[test]
fn a_build_prints_its_folder() {
    let bench = bench();
    assert_eq!(bench.build(&json!({})).run().succeeded(), "out/web\n");
    bench.assert_tidy(&["web"]);
    assert_eq!(bench.names("out/web"), ["blocks", "build.log", "console.log", "disk.raw", "manifest.json", "steps"]);
    assert_eq!(bench.path("out/web/disk.raw").metadata().unwrap().len(), 1 << 30);
    let moments: Vec<_> = bench.commands().iter().map(|command| command["moment"].clone()).collect();
    assert_eq!(moments, ["own", "sync", "step hello", "sync", "own", "freeze"]);
}

#[test]
fn steps_get_their_environment_and_files() {
    let bench = Bench::new();
    bench.write("site/index.html", "hello");
    bench.write("scripts/app.sh", "#!/bin/sh\n./tool\n");
    bench.write("scripts/tool", "x");
    bench.recipe(
        "[env]\nWHO = \"it's me\"\n[[provision]]\ncopy = \"site/\"\nto = \"/srv/\"\nowner = \"web:33\"\nmode = \"0640\"\n\
         [[provision]]\nname = \"app\"\nrun = \"scripts/app.sh\"\nfiles = [\"tool\"]\n",
    );
    bench.build(&json!({})).run().succeeded();
    let commands = bench.commands();
    let put = commands.iter().find(|command| command["moment"] == "put").unwrap();
    assert_eq!(put["rest"].as_array().unwrap()[1..], [json!("web"), json!("33 /srv/")]);
    assert_eq!(put["files"]["index.html"]["owner"], "web:33");
    assert_eq!(put["files"]["index.html"]["mode"], "0000640");
    let app = commands.iter().find(|command| command["moment"] == "step app").unwrap();
    assert_eq!(app["rest"][1], "exec", "it has a shebang");
    assert_eq!(app["files"]["tool"]["content"], "x");
    let env = app["files"][".kiln/env"]["content"].as_str().unwrap();
    for line in ["export KILN_ARCH='x86_64'", "export KILN_NAME='web'", r"export WHO='it'\''s me'"] {
        assert!(env.lines().any(|have| have == line), "{env}");
    }
}

#[test]
fn a_good_build_replaces_the_old_output_whole() {
    let bench = bench();
    bench.earlier_output();
    bench.write("out/web/left-over", "old");
    bench.write("out/web/published.json", "[]");
    bench.write("out/web.failed/build.log", "old");
    bench.build(&json!({})).run().succeeded();
    bench.assert_tidy(&["web"]);
    assert!(!bench.path("out/web/left-over").exists());
    assert_eq!(bench.read("out/web/published.json"), "[]", "what was published before stays known");
}

#[test]
fn a_folder_that_no_build_made_is_not_replaced() {
    let bench = bench();
    bench.write("web/index.html", "mine");
    let said = bench.build(&json!({})).arg("--out").arg(".").run().failed(3);
    insta::assert_snapshot!(said, @r#"
    error: `./web` is in the way: no build made it (it has no manifest.json)
     |
    help: choose another place with --out, or move it away
    "#);
    assert_eq!(bench.read("web/index.html"), "mine");
    bench.assert_no_qemu();
}

#[test]
fn a_reboot_starts_another_qemu_on_the_same_disk() {
    let bench = Bench::new();
    bench.recipe("[[provision]]\nname = \"kernel\"\ninline = \"x\"\nreboot = true\n[[provision]]\nname = \"hello\"\ninline = \"x\"\n");
    bench.build(&json!({})).run().succeeded();
    assert_eq!(bench.qemus().len(), 2);
    bench.assert_tidy(&["web"]);
}

#[test]
fn output_is_kept_whole_in_constant_memory() {
    let bench = bench();
    let actions =
        json!([["flood", 90_000_000, 100], ["print", "\n"], ["flood", 10_000_000, 0], ["print", "\u{0}\u{ff}\n"]]);
    bench.build(&step(actions)).run().succeeded();
    assert_eq!(bench.path("out/web/steps/01-hello.log").metadata().unwrap().len(), 100_000_004);
    let peak: u64 = bench.read("traces/kiln-memory").parse().unwrap();
    assert!(peak < 64 << 10, "kiln took {peak} KiB");
}

#[test]
fn output_is_shown_line_by_line() {
    let bench = bench();
    let said = json!([["print", "one\ntwo\u{1b}[2J\u{ff}\n10%\r20%\nlast"]]);
    let ran = bench.kiln(["build", "web.toml", "--accel", "tcg"]).scenario(&step(said)).run();
    let shown: Vec<_> = ran.stderr.lines().filter_map(|line| line.strip_prefix("        | ")).collect();
    assert_eq!(shown, ["one", "two\u{fffd}[2J\u{fffd}", "20%", "last"], "{}", ran.stderr);
}

#[test]
fn json_is_one_document_and_lines_of_events() {
    let bench = bench();
    let kiln = bench.kiln(["--format", "json", "build", "web.toml", "--accel", "tcg"]);
    let ran = kiln.scenario(&step(json!([["print", "hi\n"]]))).run();
    let result = ran.json();
    assert_eq!((&result["folder"], &result["manifest"]["name"]), (&json!("out/web"), &json!("web")));
    let events: Vec<_> = ran.events().iter().map(|event| event["event"].as_str().unwrap().to_owned()).collect();
    for event in ["phase_started", "phase_done", "step_started", "output", "step_done"] {
        assert!(events.iter().any(|have| have == event), "{event}: {events:?}");
    }
}

#[test]
fn a_failure_in_json_has_all_that_the_text_has() {
    let bench = bench();
    let kiln = bench.kiln(["--format", "json", "build", "web.toml", "--accel", "tcg"]);
    let ran = kiln.scenario(&step(json!([["print", "E: no\n"], ["status", 100]]))).run();
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(5), ""));
    let expected = json!({
        "event": "error", "message": "step `hello` failed with exit code 100", "exit_code": 5,
        "place": { "file": "web.toml", "line": 6, "column": 1 }, "notes": ["last output: E: no"],
        "log": "out/web.failed/steps/01-hello.log",
        "help": "look at the guest as it was before: kiln shell web.toml",
    });
    assert_eq!(ran.events().last(), Some(&expected));
}

#[test]
fn quiet_is_quiet_and_nothing_is_coloured() {
    let bench = bench();
    let ran = bench.build(&step(json!([["print", "hi\n"]]))).run();
    assert_eq!(ran.stderr, "");
    for no_color in ["", "1"] {
        let kiln = bench.kiln(["-v", "build", "web.toml", "--accel", "tcg", "--no-cache"]);
        let ran = kiln.env("NO_COLOR", no_color).run();
        assert!(!ran.stderr.contains('\u{1b}') && ran.stderr.contains("kernel /boot/"), "{}", ran.stderr);
    }
}

#[test]
fn wrong_words_are_usage_errors() {
    let bench = bench();
    for arguments in [
        &["bake"][..],
        &["build"],
        &["build", "web.toml", "--fast"],
        &["-q", "-v", "doctor"],
        &["build", "web.toml", "--accel", "hvf"],
        &[],
        &["test", "out/web", "--timeout", "soon"],
    ] {
        let said = bench.kiln(arguments).run().failed(2);
        assert!(said.contains("error: ") || arguments.is_empty(), "{arguments:?}: {said}");
    }
}

#[test]
fn every_command_has_help() {
    let bench = Bench::empty();
    let builds = ["init", "build", "plan", "test", "run", "publish", "provisioners", "doctor", "completions"];
    for command in builds.iter().chain(&["images", "share", "copy", "retire", "sweep"]) {
        let help = bench.kiln([*command, "--help"]).run().succeeded();
        assert!(help.contains(&format!("Usage: kiln {command}")), "{help}");
    }
    let help = bench.kiln(["--help"]).run().succeeded();
    assert!(help.contains("Options for every command"), "{help}");
    assert_eq!(bench.kiln(["--version"]).run().succeeded(), format!("kiln {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_starter_recipe_builds_as_it_stands() {
    let bench = Bench::empty();
    let ran = bench.kiln(["init", "site"]).run();
    let base = bench.path("site/debian-12.qcow2");
    assert!(ran.stderr.contains(&format!("scripts/base-image --out {}", base.display())), "{}", ran.stderr);
    assert_eq!(ran.succeeded(), "site/kiln.toml\n");
    assert_eq!(bench.names("site"), ["kiln.toml", "site"]);
    write_base(&base, Base::Mbr);
    bench.kiln(["-q", "build", "site/kiln.toml", "--accel", "tcg"]).run().succeeded();
    bench.assert_tidy(&["web"]);
    let said = bench.kiln(["init", "site"]).run().failed(3);
    insta::assert_snapshot!(said, @r#"
    error: `site/kiln.toml` exists already
     |
    help: choose another folder: kiln init DIR
    "#);
}

#[test]
fn provisioners_are_listed_with_their_inputs() {
    let bench = Bench::empty();
    let text = bench.kiln(["provisioners"]).run().succeeded();
    let list = bench.kiln(["--format", "json", "provisioners"]).run().json();
    let names: Vec<_> = list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["environment", "firewall", "nginx", "nodejs", "permissions", "updates", "users"]);
    for name in names {
        assert!(text.contains(&format!("{name} - ")), "{text}");
    }
}

#[test]
fn the_readmes_recipe_is_right() {
    let readme = include_str!("../README.md");
    let recipe = readme.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let parsed = kiln::recipe::parse("web.toml".as_ref(), recipe, &[]).unwrap();
    assert_eq!((parsed.name.as_str(), parsed.steps.len(), parsed.tests.len()), ("web", 3, 1));
}

#[test]
fn inputs_are_listed_with_all_that_is_declared() {
    let list = Bench::empty().kiln(["--format", "json", "provisioners"]).run().json();
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("provisioners");
    for provisioner in list.as_array().unwrap() {
        let name = provisioner["name"].as_str().unwrap();
        let text = std::fs::read_to_string(folder.join(name).join("provisioner.toml")).unwrap();
        let declared: toml::Table = text.parse().unwrap();
        let max_age = declared.get("max_age").map(|age| kiln::units::parse_duration(age.as_str().unwrap()).unwrap());
        let mut inputs = serde_json::Map::new();
        for (key, input) in declared["inputs"].as_table().unwrap() {
            inputs.insert(
                key.clone(),
                json!({
                    "type": input["type"].as_str(), "description": input["description"].as_str(),
                    "choices": input.get("choices").map_or(json!([]), |choices| json!(choices)),
                    "minimum": input.get("minimum"), "maximum": input.get("maximum"),
                    "required": input.get("default").is_none(), "default": input.get("default"),
                }),
            );
        }
        assert_eq!(
            provisioner,
            &json!({
                "name": name, "description": declared["description"].as_str(), "inputs": inputs,
                "max_age": max_age.map(|age| age.as_secs()),
            })
        );
    }
    let port = &list.as_array().unwrap().iter().find(|one| one["name"] == "nginx").unwrap()["inputs"]["port"];
    assert_eq!((&port["default"], &port["maximum"]), (&json!(80), &json!(65535)), "numbers are numbers");
}

#[test]
fn the_doctor_says_what_is_there_and_what_is_not() {
    let bench = Bench::empty();
    let text = bench.kiln(["doctor"]).run().succeeded();
    assert!(text.starts_with("ok       QEMU "), "{text}");
    assert!(text.contains("ok       cache "), "{text}");
    let ran = bench.kiln(["--format", "json", "doctor"]).env("KILN_QEMU", "/nowhere").run();
    assert_eq!(ran.code, Some(4));
    let report = ran.json();
    assert_eq!((&report["ready"], &report["checks"][0]["state"]), (&json!(false), &json!("missing")));
    assert_eq!(ran.events().last().unwrap()["message"], "this host can't build yet");
}

#[test]
fn a_plan_says_what_would_run_and_runs_nothing() {
    let bench = bench();
    let plan = bench.kiln(["-q", "plan", "web.toml", "--accel", "tcg"]).run().succeeded();
    let rest = plan.split_once('\n').unwrap().1;
    assert_eq!(
        rest,
        "disk    1 GiB\nboot    direct: boots, nothing was kept in its place\n\
                      step    1 hello (run): runs, it follows a step that is made anew\nseal    yes\n"
    );
    assert_eq!(bench.qemus(), [0; 0]);
    bench.assert_tidy(&[]);
}

#[test]
fn kvm_that_does_not_work_is_said_and_remembered() {
    let bench = bench();
    let build = || bench.kiln(["-q", "build", "web.toml", "--no-cache"]).run();
    let said = build();
    said.stderr.contains("warning: using software emulation (TCG)").then_some(()).expect(&said.stderr);
    assert!(said.stderr.contains("help: "), "{}", said.stderr);
    let probes = || bench.qemus().len();
    let before = probes();
    build();
    assert_eq!(probes() - before, 1, "the verdict is remembered: only the guest is started");
    let said = bench.kiln(["-q", "build", "web.toml", "--accel", "kvm", "--no-cache"]).run().failed(4);
    assert!(said.starts_with("error: --accel kvm: ") && said.contains("help: "), "{said}");
}

/// The same disk in every format that clouds hand out gives the same disk.
#[test]
fn bases_of_every_format() {
    let bench = bench();
    let digest = |base: &str| {
        bench.write("any.toml", format!("name = \"any\"\n[base]\nimage = \"{base}\"\n[machine]\nnetwork = \"none\"\n"));
        bench.kiln(["-q", "build", "any.toml", "--accel", "tcg"]).run().succeeded();
        let manifest: Value = serde_json::from_str(&bench.read("out/any/manifest.json")).unwrap();
        (manifest["digest"].clone(), manifest["inputs"]["base_format"].clone())
    };
    let (raw, format) = digest("base.raw");
    assert_eq!(format, "raw");
    for (format, options) in [
        ("qcow2", &["-c"][..]),
        ("vmdk", &[]),
        ("vmdk", &["-o", "subformat=streamOptimized"]),
        ("vhdx", &[]),
        ("vpc", &["-o", "force_size=on"]),
    ] {
        let name = format!("base-{}.{format}", options.len());
        let mut convert = std::process::Command::new("qemu-img");
        convert.args(["convert", "-O", format]).args(options).arg("base.raw").arg(&name).current_dir(bench.path(""));
        crate::support::tool(&mut convert, "");
        assert_eq!(digest(&name), (raw.clone(), json!(format)), "{name}");
    }
    let mut gzip = std::process::Command::new("sh");
    gzip.args(["-c", "gzip -c base.raw > base.raw.gz"]).current_dir(bench.path(""));
    crate::support::tool(&mut gzip, "");
    assert_eq!(digest("base.raw.gz").0, raw);
}

#[test]
fn settings_from_outside_are_used_and_noted() {
    let bench = bench();
    let kiln = bench.build(&json!({})).arg("--set").arg("name=other").arg("--set").arg("disk.size=2GiB");
    assert_eq!(kiln.run().succeeded(), "out/other\n");
    let manifest: Value = serde_json::from_str(&bench.read("out/other/manifest.json")).unwrap();
    assert_eq!(manifest["size"], 2_u64 << 30);
    assert_eq!(manifest["inputs"]["set"], json!(["name=other", "disk.size=2GiB"]));
}

#[test]
fn help_explains_commands_and_topics() {
    let bench = Bench::empty();
    let help = |words: &[&str]| bench.kiln([&["help"], words].concat()).run().succeeded();
    for words in [&[][..], &["build"], &["publish"], &["cache", "export"], &["help"]] {
        assert_eq!(help(words), bench.kiln([words, &["--help"]].concat()).run().succeeded(), "{words:?}");
    }
    let all = help(&[]);
    for line in ["  build ", "  cache ", "Topics of the manual, for `kiln help TOPIC`:"] {
        assert!(all.contains(line), "{all}");
    }
    let cache = help(&["cache"]);
    assert!(cache.starts_with("# The cache\n") && cache.contains("\n| SOURCE_DATE_EPOCH "), "{cache}");
    assert!(cache.ends_with("\nThe commands: kiln cache --help\n"), "{cache}");
    let json = bench.kiln(["--format", "json", "help", "cache"]).run().json();
    assert_eq!(json["help"], cache);
}

#[test]
fn help_for_an_unknown_word_suggests_one() {
    let bench = Bench::empty();
    let refused = |words: &[&str]| bench.kiln([&["help"], words].concat()).run().failed(2);
    insta::assert_snapshot!(refused(&["biuld"]), @r#"
    error: no command or topic is called `biuld`
     |
    help: did you mean `build`?
    "#);
    insta::assert_snapshot!(refused(&["cahce"]), @r#"
    error: no command or topic is called `cahce`
     |
    help: did you mean `cache`?
    "#);
    insta::assert_snapshot!(refused(&["cache", "exprot"]), @r#"
    error: `kiln cache` has no command `exprot`
     |
    help: did you mean `export`?
    "#);
    insta::assert_snapshot!(refused(&["bootstrapping"]), @r#"
    error: no command or topic is called `bootstrapping`
     |
    help: `kiln help` lists commands and topics
    "#);
}
