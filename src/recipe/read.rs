//! From the text to a [`Recipe`]: the tables except `[[provision]]` and `[publish]`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::reader::{Fields, Found, Reader, Source, list, suggest};
use super::{
    Algorithm, Arch, Base, Boot, CpuLevel, Digest, Disk, Image, Keep, Machine, Network, Override, Recipe, Seal,
    TestStep, dir_of, publish, set, step, tree,
};
use crate::error::{Error, Exit};
use crate::units::{GIB, MIB, Size};

/// No EBS volume is larger.
const LARGEST_DISK: Size = Size(64 << 40);
const SMALLEST_MEMORY: Size = Size(256 * MIB);

const TOP: [&str; 10] =
    ["name", "description", "base", "machine", "disk", "env", "provision", "seal", "test", "publish"];

/// Reads a recipe. `path` is only remembered and shown; `set` are the values of `--set`, as `KEY=VALUE`.
///
/// # Errors
/// The first thing that is wrong, with its place, or with the `--set` that it came from.
pub fn parse(path: &Path, text: &str, set: &[String]) -> Result<Recipe, Error> {
    let source = Source { path, text, set };
    let mut root = tree::parse(text).map_err(|problem| problem.into_error(source))?;
    let overrides = set::apply(&mut root, set).map_err(|problem| problem.into_error(source))?;
    let reader = Reader::default();
    let recipe = read(&reader, &root, source, overrides);
    let warnings = reader.finish().map_err(|problem| problem.into_error(source))?;
    let recipe = recipe.ok_or_else(|| Error::new(Exit::Bug, "the recipe was refused without a reason"))?;
    Ok(Recipe { warnings, ..recipe })
}

/// None only if the reader was told a problem.
fn read(reader: &Reader, root: &tree::Table, source: Source<'_>, overrides: Vec<Override>) -> Option<Recipe> {
    let origin = tree::Origin { span: 0..0, set: None };
    let top = reader.fields(root, &origin, "", &TOP);
    let name = top.require("name", "name = \"web\"").and_then(|_| image_name(&top));
    let description = top.text("description").map(|found| found.value).unwrap_or_default();
    let base = top
        .table("base", "[base]", &["image", "sha256", "sha512", "arch"])
        .and_then(|fields| base(&fields, dir_of(source.path)));
    if top.node("base").is_none() {
        let help = "add a table [base] with `image = \"debian-12.qcow2\"`".to_owned();
        reader.lacks(&origin, "the recipe has no [base]", Some(help));
    }
    let machine = machine(&top);
    let disk = disk(&top);
    let env = environment(&top);
    let steps = step::steps(&top);
    let seal = seal(&top);
    let tests = tests(&top);
    let publish = publish::read(&top, name.as_deref().unwrap_or_default(), base.as_ref(), &disk);
    Some(Recipe {
        path: source.path.to_owned(),
        text: source.text.to_owned(),
        name: name?,
        description,
        base: base?,
        machine,
        disk,
        env,
        steps,
        seal,
        tests,
        publish,
        warnings: Vec::new(),
        overrides,
    })
}

fn image_name(top: &Fields<'_>) -> Option<String> {
    let name = top.filled("name")?;
    let first = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let rest = |c: char| first(c) || "._-".contains(c);
    if name.value.len() <= 64 && name.value.starts_with(first) && name.value.chars().all(rest) {
        return Some(name.value);
    }
    let lower = name.value.to_lowercase();
    let words: Vec<_> = lower.split(|c| !rest(c)).filter(|word| !word.is_empty()).collect();
    let mut example = words.join("-").trim_start_matches(|c| !first(c)).to_owned();
    example.truncate(64);
    if example.is_empty() {
        "web".clone_into(&mut example);
    }
    let help = format!(
        "use lowercase letters, digits, `.`, `_` and `-`, a letter or digit first, at most 64: for example `{example}`"
    );
    top.reader.refuse(&name.origin, "this name can't be used", Some(help));
    None
}

fn base(fields: &Fields<'_>, dir: &Path) -> Option<Base> {
    let (digest, refused) = digest(fields);
    let arch = arch(fields);
    fields.require("image", "image = \"debian-12.qcow2\"")?;
    let found = fields.filled("image")?;
    let image = image(fields, &found, dir)?;
    if matches!(image, Image::Url(_)) && digest.is_none() && !refused {
        let help = "add `sha256 = \"…\"`: what was published next to the image says it".to_owned();
        fields.reader.refuse(&found.origin, "an image from the network needs a digest", Some(help));
    }
    let (digest, digest_span) = digest.map(|found| (found.value, found.origin.span)).unzip();
    let (arch, arch_span) = arch.map(|found| (found.value, found.origin.span)).unzip();
    let arch = arch.unwrap_or(Arch::X86_64);
    Some(Base { image, digest, arch, span: found.origin.span, digest_span, arch_span })
}

fn image(fields: &Fields<'_>, found: &Found<String>, dir: &Path) -> Option<Image> {
    match found.value.split_once("://") {
        None if found.value.starts_with("~/") => Some(Image::Path(PathBuf::from(&found.value))),
        None => Some(Image::Path(join(dir, &found.value))),
        Some(("https" | "http", rest)) if !rest.is_empty() => Some(Image::Url(found.value.clone())),
        Some(("https" | "http", _)) => {
            fields.reader.refuse(&found.origin, "this address names no host", None);
            None
        }
        Some((scheme, rest)) => {
            let help = match scheme {
                "file" => format!("write the path: `image = \"{rest}\"`"),
                _ => "an image is a path or an https:// or http:// address".to_owned(),
            };
            fields.reader.refuse(&found.origin, format!("images can't be fetched by {scheme}://"), Some(help));
            None
        }
    }
}

/// Without a leading `./` when the recipe lies in the current folder, for the sake of messages.
fn join(dir: &Path, path: &str) -> PathBuf {
    if dir == Path::new(".") { PathBuf::from(path) } else { dir.join(path) }
}

/// The digest, and whether there was one that can't be used.
fn digest(fields: &Fields<'_>) -> (Option<Found<Digest>>, bool) {
    if let (Some(_), Some(second)) = (fields.entry("sha256"), fields.entry("sha512")) {
        let help = "keep one of them".to_owned();
        fields.reader.refuse(&second.key_origin, "both `sha256` and `sha512` are given", Some(help));
        return (None, true);
    }
    let algorithm = if fields.entry("sha512").is_some() { Algorithm::Sha512 } else { Algorithm::Sha256 };
    let key = algorithm.as_str();
    if fields.entry(key).is_none() {
        return (None, false);
    }
    let Some(found) = fields.text(key) else { return (None, true) };
    let hex = found.value.to_ascii_lowercase();
    let bare = hex.strip_prefix(key).map_or(hex.as_str(), |rest| rest.trim_start_matches([':', '-', '=']));
    let wanted = match algorithm {
        Algorithm::Sha256 => 64,
        Algorithm::Sha512 => 128,
    };
    let is_hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let count = hex.chars().count();
    let (message, help) = if bare.len() == wanted && is_hex(bare) && bare.len() < hex.len() {
        (format!("`{key}` wants the digits only"), Some(format!("write `{key} = \"{bare}\"`")))
    } else if count != wanted {
        let other = [(64, "sha256"), (128, "sha512")].into_iter().find(|(length, _)| *length == count && is_hex(&hex));
        let help = other.map(|(_, other)| format!("this is as long as a {other}: write `{other} = …`"));
        (format!("`{key}` wants {wanted} hexadecimal digits, this has {count}"), help)
    } else if !is_hex(&hex) {
        (format!("`{key}` contains something else than hexadecimal digits"), None)
    } else {
        return (Some(Found { value: Digest { algorithm, hex }, origin: found.origin }), false);
    };
    fields.reader.refuse(&found.origin, message, help);
    (None, true)
}

fn arch(fields: &Fields<'_>) -> Option<Found<Arch>> {
    let found = fields.text("arch")?;
    let arch = match found.value.as_str() {
        "amd64" => Arch::X86_64,
        "arm64" => Arch::Aarch64,
        _ => return fields.choose("arch", &found),
    };
    let message = format!("`{}` is another name for `{arch}`", found.value);
    fields.reader.warn(&found.origin, message, format!("write `arch = \"{arch}\"`"));
    Some(Found { value: arch, origin: found.origin })
}

fn machine(top: &Fields<'_>) -> Machine {
    let mut machine = Machine {
        cpus: 2,
        memory: Size(GIB),
        cpu: CpuLevel::V3,
        boot: Boot::Auto,
        network: Network::Open,
        network_span: None,
        timeout: None,
    };
    let known = ["cpus", "memory", "cpu", "boot", "network", "timeout"];
    let Some(fields) = top.table("machine", "[machine]", &known) else { return machine };
    if let Some(cpus) = fields.integer("cpus") {
        match u32::try_from(cpus.value) {
            Ok(count @ 1..=64) => machine.cpus = count,
            _ => fields.reader.refuse(&cpus.origin, "`cpus` must be between 1 and 64", None),
        }
    }
    if let Some(memory) = fields.size("memory") {
        if memory.value < SMALLEST_MEMORY {
            fields.reader.refuse(&memory.origin, "`memory` must be 256MiB or more", None);
        } else if !memory.value.bytes().is_multiple_of(MIB) {
            fields.reader.refuse(&memory.origin, "`memory` must be whole MiB", None);
        } else {
            machine.memory = memory.value;
        }
    }
    if let Some(cpu) = cpu(&fields) {
        machine.cpu = cpu;
    }
    if let Some(boot) = fields.word("boot") {
        machine.boot = boot.value;
    }
    if let Some(network) = fields.word("network") {
        machine.network = network.value;
        machine.network_span = Some(network.origin.span);
    }
    machine.timeout = fields.duration("timeout").map(|timeout| timeout.value);
    machine
}

/// Refused with the whole list: which level comes near says nothing of which one is meant.
fn cpu(fields: &Fields<'_>) -> Option<CpuLevel> {
    let found = fields.text("cpu")?;
    let level = CpuLevel::ALL.iter().copied().find(|level| level.as_str() == found.value);
    if level.is_none() {
        let words: Vec<_> = CpuLevel::ALL.iter().map(|level| level.as_str()).collect();
        let message = format!("`cpu` can't be `{}`", found.value);
        fields.reader.refuse(&found.origin, message, Some(format!("use one of {}", list(&words))));
    }
    level
}

fn disk(top: &Fields<'_>) -> Disk {
    let Some(fields) = top.table("disk", "[disk]", &["size", "sha256"]) else { return Disk::default() };
    let sha256 = fields.boolean("sha256").is_some_and(|found| found.value);
    let Some(found) = fields.size("size") else { return Disk { sha256, ..Disk::default() } };
    let size = found.value;
    if size > LARGEST_DISK {
        let help = format!("the largest volume has {LARGEST_DISK}");
        top.reader.refuse(&found.origin, "no volume is this large", Some(help));
    } else if size.bytes() == 0 || !size.is_whole_gib() {
        let help = format!("write `size = \"{}GiB\"`", (size.ceil_gib().bytes() / GIB).max(1));
        top.reader.refuse(&found.origin, "a disk has whole GiB, as AWS counts volumes in them", Some(help));
    }
    Disk { size: Some(size), span: Some(found.origin.span), sha256 }
}

fn environment(top: &Fields<'_>) -> BTreeMap<String, String> {
    top.map("env", |key, _| variable(key))
}

/// Whether a step may be given this environment variable.
pub(super) fn variable(key: &str) -> Result<(), (String, Option<String>)> {
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if key.is_empty() || key.starts_with(|c: char| c.is_ascii_digit()) || !key.chars().all(valid) {
        let help = "use letters, digits and `_`, no digit first".to_owned();
        return Err((format!("`{key}` can't be an environment variable"), Some(help)));
    }
    if key.starts_with("KILN_") {
        let help = "names that start with KILN_ are kiln's own".to_owned();
        return Err((format!("`{key}` is reserved"), Some(help)));
    }
    Ok(())
}

fn seal(top: &Fields<'_>) -> Seal {
    let mut seal = Seal { enabled: true, keep: Vec::new() };
    let Some(fields) = top.table("seal", "[seal]", &["enabled", "keep"]) else { return seal };
    if let Some(enabled) = fields.boolean("enabled") {
        seal.enabled = enabled.value;
    }
    for word in fields.texts("keep").unwrap_or_default() {
        let Some(keep) = Keep::ALL.iter().find(|keep| keep.as_str() == word.value) else {
            let words: Vec<_> = Keep::ALL.iter().map(|keep| keep.as_str()).collect();
            let message = format!("nothing that the seal removes is called `{}`", word.value);
            fields.reader.refuse(&word.origin, message, Some(suggest(&word.value, &words)));
            continue;
        };
        seal.keep.push(*keep);
    }
    seal.keep.sort_unstable();
    seal.keep.dedup();
    seal
}

fn tests(top: &Fields<'_>) -> Vec<TestStep> {
    let mut tests = Vec::new();
    for (table, origin) in top.tables("test") {
        let fields = top.reader.fields(table, origin, "[[test]]", &["name", "run", "timeout"]);
        let name = step::given_name(&fields);
        let timeout = fields.duration("timeout").map(|found| found.value);
        if fields.require("run", "run = \"curl -fsS http://localhost/\"").is_none() {
            continue;
        }
        let Some(run) = fields.filled("run") else { continue };
        let name = name.unwrap_or_else(|| step::first_line(&run.value));
        tests.push(TestStep { name, run: run.value, timeout, span: origin.span.clone(), run_span: run.origin.span });
    }
    tests
}
