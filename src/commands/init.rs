//! `kiln init`.

use std::path::{Path, PathBuf};

use kiln::error::{Error, Exit};
use serde_json::json;

use super::Context;

const RECIPE: &str = include_str!("starter.toml");
/// The base, beside the recipe, unless there is one already.
const IMAGE: &str = "debian-12.qcow2";
const PAGE: &str = "<!doctype html>\n<title>kiln</title>\n<h1>Hello from kiln</h1>\n";

/// Writes the starter recipe and its page; nothing that exists is touched.
pub(super) fn run(context: &Context<'_>, folder: &Path) -> Result<(), Error> {
    let recipe = folder.join("kiln.toml");
    let page = folder.join("site/index.html");
    let base = newest_base(context);
    let image = base.clone().unwrap_or_else(|| PathBuf::from(IMAGE));
    let image = toml::Value::from(image.display().to_string()).to_string();
    for (path, text) in [(&recipe, RECIPE.replace("\"BASE\"", &image)), (&page, PAGE.to_owned())] {
        let failed = |error: std::io::Error| Error::io(format!("cannot write `{}`", path.display()), &error);
        if path.exists() {
            return Err(Error::new(Exit::Input, format!("`{}` exists already", path.display()))
                .help("choose another folder: kiln init DIR"));
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        std::fs::write(path, text).map_err(failed)?;
    }
    let events = context.ui.events();
    if base.is_none() {
        let image = folder.join(IMAGE);
        // Whole: the script is in a clone of kiln, and that need not be here.
        let image = std::path::absolute(&image).unwrap_or(image);
        let image = image.display();
        events.note(format!("first put a cloud image at {image}; kiln's scripts/base-image --out {image} makes one"));
    }
    events.note(format!("build it: kiln build {}", recipe.display()));
    context.ui.result(&recipe.display().to_string(), &json!({ "recipe": recipe }));
    Ok(())
}

/// A base that scripts/base-image left in the cache.
fn newest_base(context: &Context<'_>) -> Option<PathBuf> {
    let folder = context.cache_dir().ok()?.join("bases");
    let bases = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    bases
        .filter(|path| path.extension().is_some_and(|extension| extension == "qcow2"))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("debian-bookworm")))
        .max_by_key(|path| path.metadata().and_then(|metadata| metadata.modified()).ok())
}
