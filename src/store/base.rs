//! Base images: checked against their digest, then kept as sparse raw disks, so that everything after reads one format.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FlockOperation;
use serde::Deserialize;
use sha2::{Digest as _, Sha256, Sha512};

use super::known::{Digests, Identity};
use super::{Store, allocated, free_space};
use crate::cancel::Cancel;
use crate::error::{Error, Exit};
use crate::event::Events;
use crate::exec::{self, Tool};
use crate::recipe::{Algorithm, Digest};
use crate::units::{Size, hex};

/// How long `qemu-img` may take for the largest base.
const CONVERT_LIMIT: Duration = Duration::from_secs(3600);

/// The file that notes the image's format; its mtime is when the base was last used.
pub(super) const FORMAT: &str = "format";

/// Image formats that clouds and distributions hand out, by qemu-img's names.
const FORMATS: [&str; 5] = ["raw", "qcow2", "vmdk", "vhdx", "vpc"];

/// A base in the store.
#[derive(Debug, Clone)]
pub struct Imported {
    /// The sparse raw disk. Never written again.
    pub disk: PathBuf,
    /// SHA-256 of the image file as it was given, in lowercase hex.
    pub sha256: String,
    /// The image's format.
    pub format: String,
    /// Held, so that nothing removes it.
    _in_use: Arc<File>,
}

#[derive(Deserialize)]
struct Info {
    format: String,
    #[serde(rename = "virtual-size")]
    virtual_size: u64,
    #[serde(rename = "full-backing-filename")]
    backing: Option<String>,
}

impl Store {
    /// Checks `image` against the digest that it should have, and brings it into the store unless it is there.
    ///
    /// # Errors
    /// When it is missing, has another digest, is no disk image, or can't be converted.
    pub fn import_base(
        &self,
        image: &Path,
        expected: Option<&Digest>,
        qemu_img: &Path,
        events: &Events,
        cancel: &Cancel,
    ) -> Result<Imported, Error> {
        let shown = image.display();
        let mut file = File::open(image).map_err(|error| missing(image, &error))?;
        if file.metadata().is_ok_and(|metadata| metadata.is_dir()) {
            return Err(Error::new(Exit::Input, format!("the base image `{shown}` is a folder")));
        }
        let sha256 = self.check_digest(image, &mut file, expected, cancel)?;
        loop {
            if let Some(imported) = self.unpacked(sha256.clone()) {
                return Ok(imported);
            }
            let imported = events.phase(
                "import-base",
                format!("unpacking {shown} (once)"),
                |_| format!("{shown} is in the cache now"),
                || self.unpack(image, &sha256, qemu_img, events, cancel),
            )?;
            // None: another process was quicker. What it has made may be removed before it is in use here.
            if let Some(imported) = imported {
                return Ok(imported);
            }
        }
    }

    /// `image`, if it is in the store already and its digest is what it should be.
    ///
    /// # Errors
    /// When its digest is another.
    pub fn imported(
        &self,
        image: &Path,
        expected: Option<&Digest>,
        cancel: &Cancel,
    ) -> Result<Option<Imported>, Error> {
        let Ok(mut file) = File::open(image) else { return Ok(None) };
        if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            return Ok(None);
        }
        let sha256 = self.check_digest(image, &mut file, expected, cancel)?;
        Ok(self.unpacked(sha256))
    }

    pub(super) fn unpacked(&self, sha256: String) -> Option<Imported> {
        let folder = self.root.join("bases").join(&sha256);
        let disk = folder.join("disk.raw");
        let in_use = File::open(folder.join(FORMAT)).ok()?;
        rustix::fs::flock(&in_use, FlockOperation::LockShared).ok()?;
        let format = fs_err::read_to_string(folder.join(FORMAT)).ok().filter(|_| disk.is_file())?;
        let _ = in_use.set_modified(std::time::SystemTime::now());
        Some(Imported { disk, sha256, format, _in_use: Arc::new(in_use) })
    }

    /// The file's SHA-256, once its digest is what it should be.
    pub(super) fn check_digest(
        &self,
        image: &Path,
        file: &mut File,
        expected: Option<&Digest>,
        cancel: &Cancel,
    ) -> Result<String, Error> {
        let wants_sha512 = expected.is_some_and(|digest| digest.algorithm == Algorithm::Sha512);
        let unreadable =
            |error| Error::new(Exit::Input, format!("cannot read the base image `{}`: {error}", image.display()));
        let known = self.known(file).filter(|known| !wants_sha512 || known.sha512.is_some());
        let digests = if let Some(known) = known {
            known
        } else {
            let before = Identity::of(file).map_err(unreadable)?;
            let digests = hash(file, wants_sha512, cancel).map_err(unreadable)?;
            cancel.check()?;
            self.note(file, &before, &digests);
            digests
        };
        if let Some(expected) = expected {
            let found = digests.sha512.as_ref().filter(|_| wants_sha512).unwrap_or(&digests.sha256);
            if *found != expected.hex {
                let name = expected.algorithm;
                let message = format!("the base image `{}` has another {name} than the recipe says", image.display());
                return Err(Error::new(Exit::Input, message)
                    .with_note(format!("expected {}", expected.hex))
                    .with_note(format!("found    {found}"))
                    .help("if you trust the file, put what was found into the recipe; if not, download it again"));
            }
        }
        Ok(digests.sha256)
    }

    /// Brings the image into the store, in use already; none if it is there by now.
    fn unpack(
        &self,
        image: &Path,
        sha256: &str,
        qemu_img: &Path,
        events: &Events,
        cancel: &Cancel,
    ) -> Result<Option<Imported>, Error> {
        let folder = &self.root.join("bases").join(sha256);
        let scratch = self.scratch()?;
        let gunzipped = scratch.path().join("gunzipped");
        let image = if gunzip(image, &gunzipped, cancel)? { &gunzipped } else { image };
        let info = inspect(image, qemu_img, cancel)?;
        let room = free_space(&self.root).unwrap_or(u64::MAX);
        // A compressed image rarely holds more than three times its size, and never more than its disk.
        let need = allocated(image).unwrap_or(0).saturating_mul(3).min(info.virtual_size);
        if room < need {
            let message = format!(
                "the cache's filesystem has {} free, and unpacking the base may need {}",
                Size(room),
                Size(need)
            );
            return Err(
                Error::new(Exit::Host, message).help("free some space, or choose another place with --cache-dir")
            );
        }
        let fresh = scratch.path().join("base");
        let io_failed = |error: io::Error| Error::io("cannot keep the base image", &error);
        fs_err::create_dir(&fresh).map_err(io_failed)?;
        let raw = fresh.join("disk.raw");
        let progress = Tool::new(qemu_img, CONVERT_LIMIT)
            .args(["convert", "-f", &info.format, "-O", "raw", "-m", "4", "-W"])
            .arg(image)
            .arg(&raw);
        events.detail(format!("{} as {}", Size(info.virtual_size), info.format));
        progress.run(cancel).map_err(|error| unpack_failed(image, error))?;
        // qemu-img reads what lies beyond the end of a file cut short as zeros, and succeeds.
        crate::disk::Image::raw(&raw).and_then(|raw| crate::disk::Table::read(&raw)).map_err(|_| {
            let message = format!("the base image `{}` holds no disk that can be read", image.display());
            Error::new(Exit::Input, message).help("download it again and compare its digest with the publisher's")
        })?;
        super::verify::sync_and_note(&raw, &fresh, "import-base", events, cancel)?;
        fs_err::write(fresh.join(FORMAT), &info.format).map_err(io_failed)?;
        let disk = fs_err::OpenOptions::new().write(true).open(&raw).map_err(io_failed)?;
        // Overlays rely on it byte for byte.
        let mut permissions = disk.metadata().map_err(io_failed)?.permissions();
        permissions.set_readonly(true);
        disk.set_permissions(permissions).map_err(io_failed)?;
        // Locked before it has its name: nothing removes it before it is in use.
        let in_use = File::open(fresh.join(FORMAT)).map_err(io_failed)?;
        rustix::fs::flock(&in_use, FlockOperation::LockShared).map_err(|error| io_failed(error.into()))?;
        let is_named = give_name(&fresh, folder).map_err(io_failed)?;
        let (disk, sha256, format) = (folder.join("disk.raw"), sha256.to_owned(), info.format);
        Ok(is_named.then(|| Imported { disk, sha256, format, _in_use: Arc::new(in_use) }))
    }
}

/// Gives an unpacked base its name in the store; `false` if another process was quicker with the same bytes.
fn give_name(fresh: &Path, folder: &Path) -> io::Result<bool> {
    let is_there = || folder.join("disk.raw").is_file() && folder.join(FORMAT).is_file();
    if folder.exists() && !is_there() {
        fs_err::remove_dir_all(folder)?;
    }
    match fs_err::rename(fresh, folder) {
        Err(_) if is_there() => Ok(false),
        renamed => renamed.map(|()| true),
    }
}

fn missing(image: &Path, error: &io::Error) -> Error {
    let shown = image.display();
    if error.kind() == io::ErrorKind::NotFound {
        Error::new(Exit::Input, format!("the base image `{shown}` does not exist")).help(
            "download a cloud image (qcow2, raw, VMDK or VHDX) there, or make a Debian one with scripts/base-image",
        )
    } else {
        Error::new(Exit::Input, format!("cannot read the base image `{shown}`: {error}"))
    }
}

fn unpack_failed(image: &Path, error: exec::Error) -> Error {
    match error {
        exec::Error::Failed { stderr, .. } if stderr.contains("No space left") => {
            Error::new(Exit::Host, "no space left for the unpacked base image")
                .help("free some space, or choose another place with --cache-dir")
        }
        exec::Error::Failed { stderr, .. } => {
            let why = stderr.lines().last().unwrap_or_default().trim_start_matches("qemu-img: ").to_owned();
            Error::new(Exit::Input, format!("the base image `{}` is damaged: {why}", image.display()))
                .help("download it again and compare its digest with the publisher's")
        }
        other => other.into(),
    }
}

fn inspect(image: &Path, qemu_img: &Path, cancel: &Cancel) -> Result<Info, Error> {
    let shown = image.display();
    let output = Tool::new(qemu_img, Duration::from_secs(60))
        .args(["info", "--output=json"])
        .arg(image)
        .run(cancel)
        .map_err(|error| unpack_failed(image, error))?;
    let info: Info = serde_json::from_slice(&output.stdout)
        .map_err(|error| Error::new(Exit::Bug, format!("qemu-img's answer about `{shown}` makes no sense: {error}")))?;
    if let Some(backing) = &info.backing {
        let message = format!("the base image `{shown}` is only a layer over `{backing}`");
        return Err(Error::new(Exit::Input, message).help("flatten it: qemu-img convert -O qcow2 LAYER WHOLE"));
    }
    if !FORMATS.contains(&info.format.as_str()) {
        let message = format!("the base image `{shown}` has the format {}, which kiln doesn't take", info.format);
        return Err(Error::new(Exit::Input, message).help("convert it: qemu-img convert -O qcow2 IMAGE NEW"));
    }
    if info.format == "raw" {
        crate::disk::Image::raw(image).and_then(|raw| crate::disk::Table::read(&raw)).map_err(|error| {
            Error::new(Exit::Input, error.to_string())
                .help("base.image must be a bootable cloud image: qcow2, raw, VMDK or VHDX, gzipped or not")
        })?;
    }
    Ok(info)
}

/// Unpacks `image` to `to` if it is gzipped.
fn gunzip(image: &Path, to: &Path, cancel: &Cancel) -> Result<bool, Error> {
    let failed = |error: io::Error| Error::io(format!("cannot unpack `{}`", image.display()), &error);
    let mut file = File::open(image).map_err(failed)?;
    let mut magic = [0; 6];
    let read = file.read(&mut magic).map_err(failed)?;
    for (start, name) in [(&b"\xfd7zXZ"[..], "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2")] {
        if magic[..read].starts_with(start) {
            let message = format!("the base image `{}` is packed with {name}", image.display());
            return Err(Error::new(Exit::Input, message).help(format!("unpack it first with {name} -d")));
        }
    }
    if !magic[..read].starts_with(b"\x1f\x8b") {
        return Ok(false);
    }
    let mut unpacked = flate2::read::MultiGzDecoder::new(File::open(image).map_err(failed)?);
    let mut out = File::create(to).map_err(failed)?;
    copy(&mut unpacked, cancel, |bytes| io::Write::write_all(&mut out, bytes)).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
            Error::new(Exit::Input, format!("the base image `{}` is damaged: {error}", image.display()))
                .help("download it again and compare its digest with the publisher's")
        }
        _ => failed(error),
    })?;
    cancel.check()?;
    Ok(true)
}

/// Reads the file and digests it; SHA-512 only if it is wanted.
fn hash(file: &mut File, with_sha512: bool, cancel: &Cancel) -> io::Result<Digests> {
    let mut sha256 = Sha256::new();
    let mut sha512 = with_sha512.then(Sha512::new);
    copy(file, cancel, |bytes| {
        sha256.update(bytes);
        if let Some(sha512) = &mut sha512 {
            sha512.update(bytes);
        }
        Ok(())
    })?;
    Ok(Digests { sha256: hex(&sha256.finalize()), sha512: sha512.map(|sha512| hex(&sha512.finalize())) })
}

fn copy(from: &mut impl Read, cancel: &Cancel, mut to: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    while cancel.check().is_ok() {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => to(&buffer[..n])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
