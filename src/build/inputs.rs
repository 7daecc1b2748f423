//! What goes into the guest for each step, decided once, before anything is started: a file that can't be read is told
//! at once. The key is made from it, and so is the archive that is sent ([`super::archive`]), which fails if a file is not
//! what it was any more.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::uefi_data;
use crate::cancel::Cancel;
use crate::error::{Error, Exit};
use crate::plan::{Part, Parts};
use crate::provisioners;
use crate::recipe::{Action, Recipe, Step};
use crate::units::hex;

/// `SOURCE_DATE_EPOCH` in steps where the user gives none: 2026-01-01T00:00:00Z. It is the same in every build, because
/// steps see it.
pub(super) const DEFAULT_EPOCH: u64 = 1_767_225_600;

/// One step's inputs.
pub(super) struct Inputs {
    /// The script; a copy has none.
    pub(super) script: Option<Script>,
    /// The files that it takes in, each folder before what is in it.
    pub(super) files: Vec<Entry>,
    /// Everything that can change what the step does.
    pub(super) parts: Parts,
    /// Whether the script may change settings of the kernel, which are lost when its disk is booted.
    pub(super) sets_kernel: bool,
}

/// A script and its environment: all of the variables that are kiln's to set.
pub(super) struct Script {
    pub(super) text: Vec<u8>,
    pub(super) env: BTreeMap<String, String>,
}

impl Script {
    /// The time that the script is told, in seconds since 1970.
    pub(super) fn epoch(&self) -> u64 {
        self.env.get("SOURCE_DATE_EPOCH").and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_EPOCH)
    }
}

/// A file, folder or link as it was when the step was planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its name in the guest: relative to the script's folder, or to what is copied, whose own name is empty.
    pub(super) name: PathBuf,
    /// Where it is on the host.
    pub(super) path: PathBuf,
    /// Permission bits.
    pub(super) mode: u32,
    pub(super) kind: Kind,
}

/// What an [`Entry`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Folder,
    /// With its target.
    Link(PathBuf),
    File {
        /// In bytes.
        size: u64,
        /// In lowercase hex.
        sha256: String,
    },
}

/// Reads what all steps take in. What else the recipe names is looked at as well, so that a mistake is told at once.
pub(super) fn read(recipe: &Recipe, epoch: Option<u64>, cancel: &Cancel) -> Result<Vec<Inputs>, Error> {
    uefi_data::read(recipe)?;
    recipe.steps.iter().map(|step| read_step(recipe, step, epoch, cancel)).collect()
}

fn read_step(recipe: &Recipe, step: &Step, epoch: Option<u64>, cancel: &Cancel) -> Result<Inputs, Error> {
    let missing = |(path, error): Lost| match cancel.check() {
        Err(cancelled) => cancelled.into(),
        Ok(()) => Error::new(Exit::Input, format!("cannot read `{}`: {}", path.display(), plain(&error)))
            .at(recipe.place(&step.value_span))
            .help("paths are relative to the recipe's folder"),
    };
    let text = match &step.action {
        Action::File { path, .. } => {
            let path = recipe.dir().join(path);
            Some(std::fs::read(&path).map_err(|error| missing((path, error)))?)
        }
        Action::Inline { script, .. } => Some(script.clone().into_bytes()),
        Action::Uses { provisioner, .. } => Some(provisioner.script.as_bytes().to_vec()),
        Action::Copy { .. } => None,
    };
    let files = files(recipe, step, cancel).map_err(missing)?;
    let mut sets_kernel = text.as_deref().is_some_and(names_kernel);
    for entry in files.iter().filter(|_| text.is_some()) {
        // A large file is no script.
        if matches!(entry.kind, Kind::File { size: 0..LARGE, .. }) {
            let text = std::fs::read(&entry.path).map_err(|error| missing((entry.path.clone(), error)))?;
            sets_kernel |= names_kernel(&text);
        }
    }
    let script = text.map(|text| Script { env: environment(recipe, step, &text, epoch), text });
    let parts = parts(step, script.as_ref(), &files, epoch);
    Ok(Inputs { script, files, parts, sets_kernel })
}

/// Words in scripts that change the kernel's settings.
const KERNEL: [&str; 3] = ["sysctl", "/proc/sys", "/sys/"];
/// How large a file beside a script may be to be looked through for them, in bytes.
const LARGE: u64 = 1 << 20;

fn names_kernel(text: &[u8]) -> bool {
    KERNEL.iter().any(|word| contains(text, word))
}

fn contains(text: &[u8], word: &str) -> bool {
    text.windows(word.len()).any(|window| window == word.as_bytes())
}

/// What a step takes in besides its script.
fn files(recipe: &Recipe, step: &Step, cancel: &Cancel) -> Result<Vec<Entry>, Lost> {
    let mut entries = Vec::new();
    let (folder, files) = step.action.files();
    for file in files {
        let path = recipe.dir().join(folder).join(file);
        add_tree(&mut entries, file, &path, std::fs::symlink_metadata(&path), cancel)?;
    }
    if let Action::Copy { from, contents, follow, .. } = &step.action {
        let path = recipe.dir().join(from);
        // What is in a folder is named by way of the folder, also by a link to it.
        let metadata = if *contents || *follow { std::fs::metadata(&path) } else { std::fs::symlink_metadata(&path) };
        add_tree(&mut entries, Path::new(""), &path, metadata, cancel)?;
    }
    Ok(entries)
}

fn add_tree(
    entries: &mut Vec<Entry>,
    name: &Path,
    path: &Path,
    metadata: io::Result<Metadata>,
    cancel: &Cancel,
) -> Result<(), Lost> {
    let lost = |error: io::Error| (path.to_owned(), error);
    let metadata = metadata.map_err(lost)?;
    let file_type = metadata.file_type();
    let kind = if file_type.is_symlink() {
        Kind::Link(std::fs::read_link(path).map_err(lost)?)
    } else if file_type.is_dir() {
        Kind::Folder
    } else if file_type.is_file() {
        let (size, sha256) = hash(path, cancel).map_err(lost)?;
        Kind::File { size, sha256 }
    } else {
        return Err(lost(io::Error::other("it is neither a file, a folder nor a link")));
    };
    let (name, mode) = (name.to_owned(), metadata.mode() & 0o7777);
    entries.push(Entry { name: name.clone(), path: path.to_owned(), mode, kind });
    if file_type.is_dir() {
        for entry in names(path).map_err(lost)? {
            let path = path.join(&entry);
            add_tree(entries, &name.join(&entry), &path, std::fs::symlink_metadata(&path), cancel)?;
        }
    }
    Ok(())
}

/// The variables of a step's script: what the recipe sets, and kiln's own. Two names differ between recipes that are
/// alike otherwise, so they are there only for a step that asks for them: by its text, or because other files come with
/// it, which may.
fn environment(recipe: &Recipe, step: &Step, text: &[u8], epoch: Option<u64>) -> BTreeMap<String, String> {
    let mut env = recipe.env.clone();
    env.extend(step.env.clone());
    if let Action::Uses { inputs, .. } = &step.action {
        env.extend(inputs.clone());
    }
    let has_files = !step.action.files().1.is_empty();
    for (name, value) in [("KILN_NAME", &recipe.name), ("KILN_STEP", &step.name)] {
        if has_files || contains(text, name) {
            env.insert(name.to_owned(), value.clone());
        }
    }
    with_facts(env, recipe, epoch)
}

/// With the variables that every script has.
pub(super) fn with_facts(
    mut env: BTreeMap<String, String>,
    recipe: &Recipe,
    epoch: Option<u64>,
) -> BTreeMap<String, String> {
    env.insert("KILN_ARCH".to_owned(), recipe.base.arch.as_str().to_owned());
    let epoch = || epoch.unwrap_or(DEFAULT_EPOCH).to_string();
    env.entry("SOURCE_DATE_EPOCH".to_owned()).or_insert_with(epoch);
    env
}

pub(super) fn plain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such file or folder".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    }
}

type Lost = (PathBuf, io::Error);

/// Words in the names of variables whose values are nobody's business: only their digests are kept.
const SECRET: [&str; 6] = ["TOKEN", "SECRET", "PASS", "KEY", "CREDENTIAL", "AUTH"];

/// What a step's result depends on, part by part: what is done, its script, its environment, and the files that it takes
/// in with their names, kinds, modes and bytes. The files' times and places on the host are left out: neither gets into
/// the guest.
fn parts(step: &Step, script: Option<&Script>, files: &[Entry], epoch: Option<u64>) -> Parts {
    let mut parts = Parts::default();
    match &step.action {
        Action::Copy { to, contents, owner, mode, follow, from } => {
            parts.add(Part::Action, if *contents { "copy what is in it" } else { "copy" });
            if !contents {
                parts.add(Part::From, from.file_name().unwrap_or_default().to_string_lossy().into_owned());
            }
            parts.add(Part::To, to.clone());
            parts.add(Part::Owner, owner.clone().unwrap_or_else(|| "root".to_owned()));
            parts.add(Part::Mode, mode.map_or_else(|| "as it is".to_owned(), |mode| format!("{mode:04o}")));
            parts.add(Part::Follow, follow.to_string());
            // It is the time of what is copied.
            if let Some(epoch) = epoch {
                parts.add(Part::SourceDateEpoch, epoch.to_string());
            }
        }
        Action::Uses { provisioner, .. } => {
            parts.add(Part::Action, format!("uses {}", provisioner.name));
            parts.add(Part::Library, hex(&Sha256::digest(provisioners::LIBRARY)));
        }
        Action::File { .. } | Action::Inline { .. } => parts.add(Part::Action, "script"),
    }
    if let Some(Script { text, env }) = script {
        parts.add(Part::Script, hex(&Sha256::digest(text)));
        for (name, value) in env {
            let secret = SECRET.iter().any(|word| name.to_ascii_uppercase().contains(word));
            let shown = if secret { format!("sha256 {}", hex(&Sha256::digest(value))) } else { value.clone() };
            parts.add(if name == "SOURCE_DATE_EPOCH" { Part::SourceDateEpoch } else { Part::Env(name) }, shown);
        }
    }
    for Entry { name, mode, kind, .. } in files {
        let value = match kind {
            Kind::Folder => format!("folder {mode:o}"),
            Kind::Link(target) => format!("link to {}", target.as_os_str().as_bytes().escape_ascii()),
            Kind::File { sha256, .. } => format!("{mode:o} {sha256}"),
        };
        parts.add(Part::File(name.as_os_str().as_bytes()), value);
    }
    parts
}

/// The size and SHA-256 of a file.
fn hash(path: &Path, cancel: &Cancel) -> io::Result<(u64, String)> {
    let mut file = std::fs::File::open(path)?;
    let (mut hasher, mut size) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 18];
    while let n @ 1.. = file.read(&mut buffer)? {
        hasher.update(&buffer[..n]);
        size += n as u64;
        cancel.check().map_err(io::Error::other)?;
    }
    Ok((size, hex(&hasher.finalize())))
}

/// The names in a folder, in order.
fn names(folder: &Path) -> io::Result<Vec<std::ffi::OsString>> {
    let entries = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name()));
    let mut names = entries.collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest_of(folder: &Path, more: &str) -> String {
        let text = format!("name = \"web\"\n[base]\nimage = \"b\"\n{more}");
        let recipe = crate::recipe::parse(&folder.join("web.toml"), &text, &[]).unwrap();
        crate::plan::digest(&read(&recipe, None, &Cancel::default()).unwrap().remove(0).parts)
    }

    #[test]
    fn what_changes_the_result_changes_the_digest_and_nothing_else_does() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("site/a/page");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, "hello").unwrap();
        let copy = "[[provision]]\ncopy = \"site/\"\nto = \"/srv/\"\n";
        let first = digest_of(folder.path(), copy);
        let same = || digest_of(folder.path(), copy);

        std::fs::File::open(&file).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(same(), first, "times don't count");
        assert_eq!(
            digest_of(folder.path(), &copy.replace("copy", "name = \"x\"\ncopy")),
            first,
            "nor do names of copies"
        );
        let mut seen = vec![first];
        let mut differs = |digest: String, what: &str| {
            assert!(!seen.contains(&digest), "{what}");
            seen.push(digest);
        };
        differs(digest_of(folder.path(), &format!("{copy}owner = \"www\"\n")), "an owner");
        differs(digest_of(folder.path(), &format!("{copy}mode = \"0600\"\n")), "a mode");
        differs(digest_of(folder.path(), &copy.replace("/srv/", "/srv/x/")), "a place");
        differs(digest_of(folder.path(), &copy.replace("site/\"", "site\"")), "the folder itself");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        differs(same(), "a file's mode");
        std::fs::write(&file, "hello!").unwrap();
        differs(same(), "a file's bytes");
        std::fs::rename(&file, file.with_file_name("other")).unwrap();
        differs(same(), "a file's name");
        std::fs::create_dir(folder.path().join("site/empty")).unwrap();
        differs(same(), "an empty folder");
        let script = "[[provision]]\nname = \"s\"\ninline = \"echo\"\n";
        differs(digest_of(folder.path(), script), "a script");
        differs(digest_of(folder.path(), &format!("{script}env = {{ A = \"1\" }}\n")), "its environment");
        differs(digest_of(folder.path(), &format!("{script}files = [\"site/a\"]\n")), "its files");
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("site")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("site/socket")).unwrap();
        let text = "name = \"web\"\n[base]\nimage = \"b\"\n[[provision]]\ncopy = \"site/\"\nto = \"/srv/\"\n";
        let recipe = crate::recipe::parse(&folder.path().join("web.toml"), text, &[]).unwrap();
        let error = read(&recipe, None, &Cancel::default()).err().unwrap();
        assert!(error.message.ends_with("site/socket`: it is neither a file, a folder nor a link"), "{error}");
    }
}
