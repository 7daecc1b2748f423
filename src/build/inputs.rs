//! What goes into the guest for each step, read and digested before anything is started: a file that can't be read is
//! told at once, and the digests say whether a step is the same as in another build.

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

/// One step's inputs.
pub(super) struct Inputs {
    /// The script's bytes; a copy has none.
    pub(super) script: Option<Vec<u8>>,
    /// Everything that can change what the step does.
    pub(super) parts: Parts,
}

/// Reads what all steps take in. What else the recipe names is looked at as well, so that a mistake is told at once.
pub(super) fn read(recipe: &Recipe, epoch: Option<u64>, cancel: &Cancel) -> Result<Vec<Inputs>, Error> {
    uefi_data::read(recipe)?;
    recipe.steps.iter().map(|step| read_step(recipe, step, epoch, cancel)).collect()
}

fn read_step(recipe: &Recipe, step: &Step, epoch: Option<u64>, cancel: &Cancel) -> Result<Inputs, Error> {
    let missing = |path: &Path, error: io::Error| {
        Error::new(Exit::Input, format!("cannot read `{}`: {}", path.display(), plain(&error)))
            .at(recipe.place(&step.value_span))
            .help("paths are relative to the recipe's folder")
    };
    let script = match &step.action {
        Action::File { path, .. } => {
            let path = recipe.dir().join(path);
            Some(std::fs::read(&path).map_err(|error| missing(&path, error))?)
        }
        Action::Inline { script, .. } => Some(script.clone().into_bytes()),
        Action::Uses { provisioner, .. } => Some(provisioner.script.as_bytes().to_vec()),
        Action::Copy { .. } => None,
    };
    let mut trees = extra_files(recipe, step);
    if let Action::Copy { from, .. } = &step.action {
        // A link that is named is followed, as `cp -r LINK/.` does; links inside of a folder stay links.
        let path = recipe.dir().join(from);
        trees.push((PathBuf::new(), std::fs::canonicalize(&path).map_err(|error| missing(&path, error))?));
    }
    let parts = parts(recipe, step, script.as_deref(), &trees, epoch, cancel).map_err(|(path, error)| match cancel
        .check()
    {
        Err(cancelled) => cancelled.into(),
        Ok(()) => missing(&path, error),
    })?;
    Ok(Inputs { script, parts })
}

/// The files next to a step's script: their names in the guest, and where they are.
pub(super) fn extra_files(recipe: &Recipe, step: &Step) -> Vec<(PathBuf, PathBuf)> {
    let (folder, files) = step.action.files();
    files.iter().map(|file| (file.clone(), recipe.dir().join(folder).join(file))).collect()
}

/// What the recipe sets for a step; kiln's own variables come on top.
pub(super) fn environment(recipe: &Recipe, step: &Step) -> BTreeMap<String, String> {
    let mut env = recipe.env.clone();
    env.extend(step.env.clone());
    if let Action::Uses { inputs, .. } = &step.action {
        env.extend(inputs.clone());
    }
    env.insert("KILN_NAME".to_owned(), recipe.name.clone());
    env.insert("KILN_STEP".to_owned(), step.name.clone());
    env.insert("KILN_ARCH".to_owned(), recipe.base.arch.as_str().to_owned());
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
/// in with their names, kinds, modes and bytes. The files' times and places on the host are left out; so is a
/// `SOURCE_DATE_EPOCH` that nobody set.
fn parts(
    recipe: &Recipe,
    step: &Step,
    script: Option<&[u8]>,
    trees: &[(PathBuf, PathBuf)],
    epoch: Option<u64>,
    cancel: &Cancel,
) -> Result<Parts, Lost> {
    let mut parts = Parts::default();
    match &step.action {
        Action::Copy { to, contents, owner, mode, follow, from } => {
            parts.add(Part::Action, if *contents { "copy what is in it" } else { "copy" });
            parts.add(Part::From, from.file_name().unwrap_or_default().to_string_lossy().into_owned());
            parts.add(Part::To, to.clone());
            parts.add(Part::Owner, owner.clone().unwrap_or_else(|| "root".to_owned()));
            parts.add(Part::Follow, follow.to_string());
            parts.add(Part::Mode, mode.map_or_else(|| "as it is".to_owned(), |mode| format!("{mode:04o}")));
        }
        Action::Uses { provisioner, .. } => {
            parts.add(Part::Action, format!("uses {}", provisioner.name));
            parts.add(Part::Library, hex(&Sha256::digest(provisioners::LIBRARY)));
        }
        Action::File { .. } | Action::Inline { .. } => parts.add(Part::Action, "script".to_owned()),
    }
    if let Some(script) = script {
        parts.add(Part::Script, hex(&Sha256::digest(script)));
        // Names change nothing, unless the script looks at them.
        let looks_at =
            |name: &str| !trees.is_empty() || script.windows(name.len()).any(|window| window == name.as_bytes());
        let unseen = |name: &str| matches!(name, "KILN_NAME" | "KILN_STEP") && !looks_at(name);
        for (name, value) in environment(recipe, step).into_iter().filter(|(name, _)| !unseen(name)) {
            let secret = SECRET.iter().any(|word| name.to_ascii_uppercase().contains(word));
            let shown = if secret { format!("sha256 {}", hex(&Sha256::digest(&value))) } else { value };
            parts.add(Part::Env(&name), shown);
        }
    }
    if let Some(epoch) = epoch {
        parts.add(Part::SourceDateEpoch, epoch.to_string());
    }
    for (name, path) in trees {
        add_tree(&mut parts, name, path, cancel)?;
    }
    Ok(parts)
}

fn add_tree(parts: &mut Parts, name: &Path, path: &Path, cancel: &Cancel) -> Result<(), Lost> {
    let lost = |error: io::Error| (path.to_owned(), error);
    let metadata = std::fs::symlink_metadata(path).map_err(lost)?;
    let kind = metadata.file_type();
    let value = if kind.is_symlink() {
        format!("link to {}", std::fs::read_link(path).map_err(lost)?.as_os_str().as_bytes().escape_ascii())
    } else if kind.is_dir() {
        for entry in names(path).map_err(lost)? {
            add_tree(parts, &name.join(&entry), &path.join(&entry), cancel)?;
        }
        format!("folder {}", mode(&metadata))
    } else if kind.is_file() {
        format!("{} {}", mode(&metadata), hash(path, cancel).map_err(lost)?)
    } else {
        return Err(lost(io::Error::other("it is neither a file, a folder nor a link")));
    };
    parts.add(Part::File(name.as_os_str().as_bytes()), value);
    Ok(())
}

fn hash(path: &Path, cancel: &Cancel) -> io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    while let n @ 1.. = file.read(&mut buffer)? {
        hasher.update(&buffer[..n]);
        cancel.check().map_err(io::Error::other)?;
    }
    Ok(hex(&hasher.finalize()))
}

/// The names in a folder, in order.
pub(super) fn names(folder: &Path) -> io::Result<Vec<std::ffi::OsString>> {
    let entries = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name()));
    let mut names = entries.collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn mode(metadata: &Metadata) -> String {
    format!("{:o}", metadata.mode() & 0o7777)
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
