//! Tar archives on their way into the guest: a script with its surroundings, or files to copy.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

use super::inputs::names;
use crate::cancel::Cancel;
use crate::vm::guest::{Archive, Owner};

type Tar<'a> = Builder<&'a mut File>;

/// A script and what it needs.
pub(super) struct Script<'a> {
    /// Its text.
    pub(super) text: &'a [u8],
    /// Its environment.
    pub(super) env: &'a BTreeMap<String, String>,
    /// Files in its working directory: name there, and where they are on the host.
    pub(super) files: &'a [(PathBuf, PathBuf)],
    /// Texts in its working directory.
    pub(super) texts: &'a [(&'a str, &'a str)],
}

impl Script<'_> {
    /// Whether it names its own interpreter.
    pub(super) fn has_shebang(&self) -> bool {
        self.text.starts_with(b"#!")
    }

    /// The archive, made in `scratch`: all in a folder named `folder`.
    pub(super) fn archive(&self, scratch: &Path, folder: &str) -> io::Result<Archive> {
        let inside = |name: &Path| Path::new(folder).join(name);
        Archive::build(scratch, |tar| {
            append_folder(tar, Path::new(folder), 0o755)?;
            append_bytes(tar, &inside(Path::new(".kiln/env")), environment(self.env).as_bytes(), 0o600)?;
            append_bytes(tar, &inside(Path::new(".kiln/step")), self.text, 0o755)?;
            for (name, text) in self.texts {
                append_bytes(tar, &inside(Path::new(name)), text.as_bytes(), 0o755)?;
            }
            for (name, path) in self.files {
                append_tree(tar, path, &inside(name), &Look::default())?;
            }
            Ok(())
        })
    }
}

/// How copied files shall look in the guest.
#[derive(Default)]
struct Look<'a> {
    owner: Option<&'a Owner>,
    mode: Option<u32>,
    /// Times after this are set to it, in seconds since 1970.
    latest: Option<u64>,
    /// Who may stop it.
    cancel: Option<&'a Cancel>,
}

/// A copy: what, where to, and how it shall look there.
pub(super) struct Copy<'a> {
    /// The file or folder on the host.
    pub(super) from: &'a Path,
    /// The absolute path in the guest, as written.
    pub(super) to: &'a str,
    /// What is in the folder, not the folder itself.
    pub(super) contents: bool,
    /// Whose the files are.
    pub(super) owner: &'a Owner,
    /// Permission bits of files; folders get the right to enter where there is one to read.
    pub(super) mode: Option<u32>,
    /// Times after this are set to it.
    pub(super) latest: Option<u64>,
    /// Who may stop it.
    pub(super) cancel: &'a Cancel,
}

impl Copy<'_> {
    /// The archive, made in `scratch`, and the folder of the guest that it is unpacked in.
    ///
    /// `to` with a slash at its end is a folder that the thing goes into; without one it is the thing's new name.
    pub(super) fn archive(&self, scratch: &Path) -> io::Result<(Archive, String)> {
        let own_name = self.from.file_name().map(PathBuf::from).unwrap_or_default();
        let is_folder = fs_err::metadata(self.from)?.is_dir();
        let (folder, name) = if is_folder && self.contents {
            (self.to.to_owned(), PathBuf::new())
        } else if self.to.ends_with('/') {
            (self.to.to_owned(), own_name)
        } else {
            let (folder, name) = self.to.rsplit_once('/').unwrap_or(("", self.to));
            (format!("{folder}/"), PathBuf::from(name))
        };
        let look = Look { owner: Some(self.owner), mode: self.mode, latest: self.latest, cancel: Some(self.cancel) };
        let archive = Archive::build(scratch, |tar| {
            if name.as_os_str().is_empty() {
                append_entries(tar, self.from, &name, &look)
            } else {
                append_tree(tar, self.from, &name, &look)
            }
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

fn append_folder(tar: &mut Tar<'_>, name: &Path, mode: u32) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(mode);
    header.set_entry_type(EntryType::Directory);
    header.set_size(0);
    tar.append_data(&mut header, name.join(""), io::empty())
}

fn append_bytes(tar: &mut Tar<'_>, name: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    tar.append_data(&mut header, name, bytes)
}

/// Appends `path` under `name`, and everything in it if it is a folder, in the order of names.
fn append_tree(tar: &mut Tar<'_>, path: &Path, name: &Path, look: &Look<'_>) -> io::Result<()> {
    let metadata = fs_err::symlink_metadata(path)?;
    let mut header = header(&metadata, look)?;
    let kind = metadata.file_type();
    if kind.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, name, fs_err::read_link(path)?)
    } else if kind.is_dir() {
        header.set_entry_type(EntryType::Directory);
        header.set_size(0);
        tar.append_data(&mut header, name.join(""), io::empty())?;
        append_entries(tar, path, name, look)
    } else if kind.is_file() {
        header.set_size(metadata.len());
        let mut file = Whole { file: fs_err::File::open(path)?, left: metadata.len(), cancel: look.cancel };
        tar.append_data(&mut header, name, &mut file)
    } else {
        Err(io::Error::other(format!("`{}` is neither a file, a folder nor a link", path.display())))
    }
}

fn append_entries(tar: &mut Tar<'_>, folder: &Path, name: &Path, look: &Look<'_>) -> io::Result<()> {
    names(folder)?.iter().try_for_each(|entry| append_tree(tar, &folder.join(entry), &name.join(entry), look))
}

/// A file of the length that its header has announced, whatever happens to it meanwhile.
struct Whole<'a> {
    file: fs_err::File,
    left: u64,
    cancel: Option<&'a Cancel>,
}

impl io::Read for Whole<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(cancel) = self.cancel {
            cancel.check().map_err(io::Error::other)?;
        }
        let room = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.file.read(&mut buffer[..room])?;
        if read == 0 && room > 0 {
            return Err(io::Error::other(format!("`{}` was cut short meanwhile", self.file.path().display())));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

fn header(metadata: &Metadata, look: &Look<'_>) -> io::Result<Header> {
    let mut header = Header::new_gnu();
    let own_mode = metadata.mode() & 0o7777;
    header.set_mode(match look.mode {
        Some(mode) if metadata.is_dir() => mode | ((mode & 0o444) >> 2),
        Some(mode) => mode,
        None => own_mode,
    });
    let changed = u64::try_from(metadata.mtime()).unwrap_or(0);
    header.set_mtime(look.latest.map_or(changed, |latest| changed.min(latest)));
    header.set_uid(0);
    header.set_gid(0);
    if let Some(owner) = look.owner {
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
