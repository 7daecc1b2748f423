//! Tar archives on their way into the guest: a script with its surroundings, or files to copy. What they hold is what
//! [`super::inputs`] has planned, or there is an error: a file that changed since is never sent.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::inputs::{Entry, Kind};
use crate::cancel::Cancel;
use crate::units::hex;
use crate::vm::guest::{Archive, Owner};

type Tar<'a> = Builder<&'a mut File>;

/// A script and what it needs.
pub(super) struct Script<'a> {
    /// Its text.
    pub(super) text: &'a [u8],
    /// Its environment.
    pub(super) env: &'a BTreeMap<String, String>,
    /// Files in its working directory.
    pub(super) files: &'a [Entry],
    /// Texts in its working directory.
    pub(super) texts: &'a [(&'a str, &'a [u8])],
}

impl Script<'_> {
    /// Whether it names its own interpreter.
    pub(super) fn has_shebang(&self) -> bool {
        self.text.starts_with(b"#!")
    }

    /// The archive, made in `scratch`: all in a folder named `folder`.
    pub(super) fn archive(&self, scratch: &Path, folder: &str, look: &Look<'_>) -> io::Result<Archive> {
        let folder = Path::new(folder);
        Archive::build(scratch, |tar| {
            tar.append_data(&mut look.header(0o755, EntryType::Directory)?, folder.join(""), io::empty())?;
            let text = |tar: &mut Tar<'_>, name: &str, bytes: &[u8], mode: u32| {
                let mut header = look.header(mode, EntryType::Regular)?;
                header.set_size(bytes.len() as u64);
                tar.append_data(&mut header, folder.join(name), bytes)
            };
            text(tar, ".kiln/env", environment(self.env).as_bytes(), 0o600)?;
            text(tar, ".kiln/step", self.text, 0o755)?;
            for (name, bytes) in self.texts {
                text(tar, name, bytes, 0o755)?;
            }
            self.files.iter().try_for_each(|entry| append(tar, entry, folder, look))
        })
    }
}

/// What all files of an archive have in common in the guest.
pub(super) struct Look<'a> {
    /// Whose they are; none: root's.
    pub(super) owner: Option<&'a Owner>,
    /// Permission bits of files, and with the right to enter where there is one to read of folders; none: their own.
    pub(super) mode: Option<u32>,
    /// When they were changed, in seconds since 1970. The host's own times would differ between clones of a repository.
    pub(super) time: u64,
    /// Who may stop it.
    pub(super) cancel: &'a Cancel,
}

impl<'a> Look<'a> {
    /// Root's own files, changed now.
    pub(super) fn plain(cancel: &'a Cancel) -> Self {
        Self { owner: None, mode: None, time: super::now(), cancel }
    }

    fn header(&self, own_mode: u32, kind: EntryType) -> io::Result<Header> {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(match self.mode {
            Some(mode) if kind.is_dir() => mode | ((mode & 0o444) >> 2),
            Some(mode) => mode,
            None => own_mode,
        });
        header.set_mtime(self.time);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        if let Some(owner) = self.owner {
            match owner.user.parse() {
                Ok(number) => header.set_uid(number),
                Err(_) => header.set_username(&owner.user)?,
            }
            match owner.group.parse() {
                Ok(number) => header.set_gid(number),
                Err(_) => header.set_groupname(&owner.group)?,
            }
        }
        Ok(header)
    }
}

/// A copy: what and where to.
pub(super) struct Copy<'a> {
    /// The name of the file or folder on the host.
    pub(super) name: &'a Path,
    /// It, and what is in it.
    pub(super) files: &'a [Entry],
    /// The absolute path in the guest, as written.
    pub(super) to: &'a str,
    /// What is in the folder, not the folder itself.
    pub(super) contents: bool,
}

impl Copy<'_> {
    /// The archive, made in `scratch`, and the folder of the guest that it is unpacked in.
    ///
    /// `to` with a slash at its end is a folder that the thing goes into; without one it is the thing's new name.
    pub(super) fn archive(&self, scratch: &Path, look: &Look<'_>) -> io::Result<(Archive, String)> {
        let is_folder = self.files.first().is_some_and(|entry| entry.kind == Kind::Folder);
        let own_name = self.name.file_name().map(PathBuf::from).unwrap_or_default();
        let (folder, name) = if is_folder && self.contents {
            (self.to.to_owned(), PathBuf::new())
        } else if self.to.ends_with('/') {
            (self.to.to_owned(), own_name)
        } else {
            let (folder, name) = self.to.rsplit_once('/').unwrap_or(("", self.to));
            (format!("{folder}/"), PathBuf::from(name))
        };
        let archive = Archive::build(scratch, |tar| {
            // The folder whose content is copied has no name of its own there.
            let named = |entry: &&Entry| !(name.as_os_str().is_empty() && entry.name.as_os_str().is_empty());
            self.files.iter().filter(named).try_for_each(|entry| append(tar, entry, &name, look))
        })?;
        Ok((archive, folder))
    }
}

/// Lines that a POSIX shell reads as exports of exactly these values.
pub(super) fn environment(env: &BTreeMap<String, String>) -> String {
    env.iter().fold(String::new(), |mut lines, (key, value)| {
        let _ = writeln!(lines, "export {key}='{}'", value.replace('\'', r"'\''"));
        lines
    })
}

/// Appends what was planned, in `folder`. A file is read once more, and must be what it was.
fn append(tar: &mut Tar<'_>, entry: &Entry, folder: &Path, look: &Look<'_>) -> io::Result<()> {
    // Without its last slash: a folder's name is joined to nothing otherwise.
    let name: PathBuf = folder.join(&entry.name).components().collect();
    match &entry.kind {
        Kind::Folder => {
            tar.append_data(&mut look.header(entry.mode, EntryType::Directory)?, name.join(""), io::empty())
        }
        Kind::Link(target) => tar.append_link(&mut look.header(entry.mode, EntryType::Symlink)?, name, target),
        Kind::File { size, sha256 } => {
            let changed = || io::Error::other(format!("`{}` has changed since the build began", entry.path.display()));
            let mut header = look.header(entry.mode, EntryType::Regular)?;
            header.set_size(*size);
            let mut file =
                Hashed { file: fs_err::File::open(&entry.path)?, hasher: Sha256::new(), cancel: look.cancel };
            tar.append_data(&mut header, name, (&mut file).take(*size))?;
            let is_longer = file.read(&mut [0])? > 0;
            if is_longer || hex(&file.hasher.finalize()) != *sha256 { Err(changed()) } else { Ok(()) }
        }
    }
}

/// A file that is hashed while it is read.
struct Hashed<'a> {
    file: fs_err::File,
    hasher: Sha256,
    cancel: &'a Cancel,
}

impl Read for Hashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.cancel.check().map_err(io::Error::other)?;
        let read = self.file.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_the_shell() {
        let value = "it's $HOME \"quoted\" `x` \\ \n new line";
        let env = BTreeMap::from([("A".to_owned(), value.to_owned())]);
        let script = format!("{}printf %s \"$A\"", environment(&env));
        let output = std::process::Command::new("sh").arg("-c").arg(script).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), value);
    }
}
