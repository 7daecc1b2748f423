//! What a recipe needs of the store, as one file: for CI, which keeps files between runs and no folders of a user.
//!
//! ```text
//! kiln-cache.json                 the version of this format
//! bases/SHA256/disk.raw …         each base that the layers are over
//! layers/KEY-RANDOM/disk.qcow2 …  each layer, after those that it is over
//! ```
//! in a tar archive (holes as GNU tar keeps them) in one LZ4 frame, whose checksum tells a damaged file.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Component, Path, PathBuf};

use lz4_flex::frame::{FrameDecoder, FrameEncoder, FrameInfo};
use serde::{Deserialize, Serialize};
use tar::{Archive, Builder, EntryType, Header};

use super::layer::{self, Layer};
use super::{Imported, Store};
use crate::cancel::Cancel;
use crate::error::{Error, Exit};

/// The version of the file.
const FORMAT: u32 = 1;
const HEAD: &str = "kiln-cache.json";

#[derive(Serialize, Deserialize)]
struct Head {
    format: u32,
}

/// What went into a file or came out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Transferred {
    /// How many bases.
    pub bases: usize,
    /// How many layers.
    pub layers: usize,
    /// Those of them that were there already.
    pub known: usize,
    /// The file's size in bytes.
    pub bytes: u64,
}

impl Store {
    /// Writes the bases and the layers, with all that they are over, to the file `out`. A file that is there is replaced
    /// once the new one is whole.
    ///
    /// # Errors
    /// When a file can't be read or written, or the work is cancelled.
    pub fn export(
        &self,
        bases: &[Imported],
        layers: Vec<Layer>,
        out: &Path,
        cancel: &Cancel,
    ) -> Result<Transferred, Error> {
        let failed = |error: io::Error| match cancel.check() {
            Err(cancelled) => cancelled.into(),
            Ok(()) => Error::io(format!("cannot write `{}`", out.display()), &error),
        };
        let layers = self.with_backing(layers);
        let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new().prefix(".kiln-cache-").tempfile_in(parent).map_err(failed)?;
        let info = FrameInfo::new().content_checksum(true).block_checksums(true);
        let writer = Watched { inner: BufWriter::with_capacity(1 << 20, file.as_file_mut()), cancel };
        let mut tar = Builder::new(FrameEncoder::with_frame_info(info, writer));
        let mut seen = BTreeSet::new();
        let write = || -> io::Result<usize> {
            let head = serde_json::to_vec(&Head { format: FORMAT })?;
            let mut header = Header::new_gnu();
            header.set_entry_type(EntryType::Regular);
            header.set_mode(0o644);
            header.set_size(head.len() as u64);
            tar.append_data(&mut header, HEAD, &head[..])?;
            for base in bases.iter().filter(|base| seen.insert(base.sha256.clone())) {
                let folder = std::fs::read_dir(base.disk.parent().unwrap_or(Path::new("")))?;
                let files = folder.map(|file| Ok(file?.path())).collect::<io::Result<_>>()?;
                append(&mut tar, files, &Path::new("bases").join(&base.sha256))?;
            }
            for layer in &layers {
                append(&mut tar, layer.files(), &Path::new("layers").join(layer.id()))?;
            }
            tar.into_inner()?.finish().map_err(io::Error::other)?.inner.into_inner()?.sync_all()?;
            Ok(seen.len())
        };
        let bases = write().map_err(failed)?;
        // As any file that is written: a temporary one is for its owner alone.
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        file.as_file().set_permissions(mode).map_err(failed)?;
        let bytes = file.as_file().metadata().map_err(failed)?.len();
        file.persist(out).map_err(|error| failed(error.error))?;
        Ok(Transferred { bases, layers: layers.len(), known: 0, bytes })
    }

    /// These layers and what they are over: each once, after what it is over.
    fn with_backing(&self, layers: Vec<Layer>) -> Vec<Layer> {
        let mut all: Vec<Layer> = Vec::new();
        for layer in layers {
            // One that is over something damaged is as good as none.
            let Ok(backing) = self.backing(&layer) else { continue };
            for layer in backing.into_iter().chain([layer]) {
                if all.iter().all(|known| known.id() != layer.id()) {
                    all.push(layer);
                }
            }
        }
        all
    }

    /// Takes what is in the file into the store, unless it is there already.
    ///
    /// # Errors
    /// When the file is damaged or none of [`Self::export`]'s, when the store can't be written, or the work is cancelled.
    /// Nothing of a damaged file is taken.
    pub fn import(&self, file: &Path, cancel: &Cancel) -> Result<Transferred, Error> {
        let shown = file.display();
        let unreadable = |error: &io::Error| Error::new(Exit::Input, format!("cannot read `{shown}`: {error}"));
        let source = File::open(file).map_err(|error| unreadable(&error))?;
        let bytes = source.metadata().map_err(|error| unreadable(&error))?.len();
        let scratch = self.scratch()?;
        let place = scratch.path().join("new");
        for folder in ["bases", "layers"] {
            fs_err::create_dir_all(place.join(folder))
                .map_err(|error| Error::io("cannot write to the cache", &error))?;
        }
        let order = Self::unpack_cache(source, &place, cancel).map_err(|error| {
            if let Err(cancelled) = cancel.check() {
                return cancelled.into();
            }
            match error.kind() {
                io::ErrorKind::StorageFull => Error::new(Exit::Host, "no space left in the cache's filesystem")
                    .help("free some space, or choose another place with --cache-dir"),
                _ => Error::new(Exit::Input, format!("`{shown}` can't be taken into the cache: {error}"))
                    .help("write it again with `kiln cache export`"),
            }
        })?;
        let layers = order.iter().filter(|name| name.starts_with("layers"));
        if let Some(why) = layers.into_iter().find_map(|name| layer::refuse_foreign(&place.join(name))) {
            return Err(Error::new(Exit::Input, format!("`{shown}` can't be taken into the cache: {why}"))
                .help("write it again with `kiln cache export`"));
        }
        let mut taken = Transferred { bytes, ..Transferred::default() };
        // What a layer is over is not removed before it has its name.
        let _naming = self.naming().map_err(|error| Error::io("cannot lock the cache", &error))?;
        for name in order {
            let known = self.take(&place.join(&name), &name)?;
            *(if name.starts_with("bases") { &mut taken.bases } else { &mut taken.layers }) += 1;
            taken.known += usize::from(known);
        }
        Ok(taken)
    }

    /// Unpacks the whole file; the folders that were in it, in order.
    fn unpack_cache(source: File, place: &Path, cancel: &Cancel) -> io::Result<Vec<PathBuf>> {
        let reader = Watched { inner: BufReader::with_capacity(1 << 20, source), cancel };
        let mut archive = Archive::new(FrameDecoder::new(reader));
        let mut order: Vec<PathBuf> = Vec::new();
        let mut entries = archive.entries()?;
        let foreign = || io::Error::new(io::ErrorKind::InvalidData, "it is no file of `kiln cache export`");
        let mut head = entries.next().ok_or_else(foreign)??;
        if head.path()?.as_os_str() != HEAD || head.size() > 4096 {
            return Err(foreign());
        }
        let mut text = String::new();
        head.read_to_string(&mut text)?;
        let Head { format } = serde_json::from_str(&text).map_err(|_| foreign())?;
        if format != FORMAT {
            return Err(io::Error::other(format!("it has format {format}, and this kiln reads {FORMAT}")));
        }
        for entry in entries {
            let mut entry = entry?;
            let path = entry.path()?.into_owned();
            if !is_ours(&path) || !matches!(entry.header().entry_type(), EntryType::Regular | EntryType::GNUSparse) {
                return Err(io::Error::other(format!("it has `{}`, which belongs into no cache", path.display())));
            }
            let folder = path.parent().map(Path::to_owned).unwrap_or_default();
            if order.last() != Some(&folder) {
                std::fs::create_dir(place.join(&folder))?;
                order.push(folder);
            }
            entry.unpack(place.join(&path))?;
        }
        // The end of the archive is not the end of the frame, and only that has the checksum.
        io::copy(&mut archive.into_inner(), &mut io::sink())?;
        Ok(order)
    }

    /// Gives an unpacked folder its name in the store; `true` if there is one already.
    fn take(&self, folder: &Path, name: &Path) -> Result<bool, Error> {
        let target = self.path().join(name);
        if target.exists() {
            return Ok(true);
        }
        let failed = |error: io::Error| Error::io(format!("cannot write `{}`", target.display()), &error);
        if name.starts_with("layers") {
            layer::adopt(self, folder).map_err(failed)?;
        } else {
            let disk = fs_err::File::open(folder.join("disk.raw")).map_err(failed)?;
            disk.sync_all().map_err(failed)?;
        }
        match std::fs::rename(folder, &target) {
            // Another kiln was quicker with the same.
            Err(_) if target.exists() => Ok(true),
            renamed => renamed.map(|()| false).map_err(failed),
        }
    }
}

/// Files of one folder.
fn append<W: Write>(tar: &mut Builder<W>, mut files: Vec<PathBuf>, name: &Path) -> io::Result<()> {
    files.sort();
    for file in files {
        let inside = name.join(file.file_name().unwrap_or_default());
        if is_ours(&inside) {
            tar.append_file(inside, &mut File::open(file)?)?;
        }
    }
    Ok(())
}

/// Whether a path is that of a file in a folder of bases or layers, with the names that those have.
fn is_ours(path: &Path) -> bool {
    let parts: Vec<_> = path
        .components()
        .map(|part| match part {
            Component::Normal(part) => part.to_str().unwrap_or(""),
            _ => "",
        })
        .collect();
    let plain = |text: &str| {
        !text.is_empty()
            && !text.starts_with('.')
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let is_digest = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
    match parts[..] {
        ["bases", folder, file] => is_digest(folder) && plain(file),
        ["layers", folder, file] => is_digest(layer::key_of(folder)) && plain(folder) && plain(file),
        _ => false,
    }
}

/// A reader or writer that stops when the user wants to.
struct Watched<'a, T> {
    inner: T,
    cancel: &'a Cancel,
}

impl<T: Read> Read for Watched<'_, T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.cancel.check().map_err(io::Error::other)?;
        self.inner.read(buffer)
    }
}

impl<T: Write> Write for Watched<'_, T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.cancel.check().map_err(io::Error::other)?;
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_stores_own_names_are_taken() {
        let digest = "0123456789abcdef".repeat(4);
        for good in [format!("bases/{digest}/disk.raw"), format!("layers/{digest}-aB3/memory.0.lz4")] {
            assert!(is_ours(Path::new(&good)), "{good}");
        }
        for bad in ["bases/x/disk.raw", "layers/../../x", "/etc/passwd", "kiln-cache.json", "bases"] {
            assert!(!is_ours(Path::new(bad)), "{bad}");
        }
        assert!(!is_ours(Path::new(&format!("layers/{digest}-x/../disk"))));
        assert!(!is_ours(Path::new(&format!("bases/{digest}/a b"))));
    }
}
