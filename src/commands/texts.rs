//! The texts of an image, with their placeholders filled in.

use std::collections::BTreeMap;
use std::time::SystemTime;

use kiln::build::manifest::Manifest;
use kiln::error::{Error, Exit};
use kiln::event::{Event, Events};
use kiln::publish::Undated;
use kiln::recipe::{Meanings, TemplateError, TextPart, aws, name_parts, text_parts};

/// The image's name, unless recipe or command line have another.
const IMAGE_NAME: &str = "{name}-{date}-{digest:8}";

/// The texts of an image.
pub(super) struct Texts {
    pub(super) image_name: String,
    /// The name has the time in it, so that every publish would have another.
    pub(super) name_varies: bool,
    /// Everything but the name.
    pub(super) filled: Undated,
    /// The same without the time.
    pub(super) undated: Undated,
}

impl Texts {
    /// What manifest and command line say, at this moment.
    pub(super) fn of(manifest: &Manifest, image_name: Option<&str>, events: &Events) -> Result<Self, Error> {
        let now = meanings(manifest)?;
        let undated = Meanings { date: "{date}".to_owned(), time: "{time}".to_owned(), ..now.clone() };
        let template = image_name.or(manifest.publish.image_name.as_deref()).unwrap_or(IMAGE_NAME);
        let parts = name_parts(template).map_err(|error| refused(Exit::Usage, error))?;
        Ok(Self {
            image_name: now.fill(&parts),
            name_varies: parts.iter().any(|part| matches!(part, TextPart::Date | TextPart::Time)),
            filled: fill(manifest, &now, events)?,
            undated: fill(manifest, &undated, &Events::none())?,
        })
    }
}

/// A template with its placeholders filled in.
pub(super) fn filled(template: &str, manifest: &Manifest) -> Result<String, Error> {
    let parts = name_parts(template).map_err(|error| refused(Exit::Usage, error))?;
    Ok(meanings(manifest)?.fill(&parts))
}

fn meanings(manifest: &Manifest) -> Result<Meanings, Error> {
    let now = jiff::Timestamp::try_from(SystemTime::now())
        .map_err(|error| Error::new(Exit::Host, format!("the host's clock is wrong: {error}")))?;
    Ok(Meanings {
        name: manifest.name.clone(),
        date: now.strftime("%Y-%m-%d").to_string(),
        time: now.strftime("%H%M%S").to_string(),
        digest: manifest.digest.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

fn fill(manifest: &Manifest, meanings: &Meanings, events: &Events) -> Result<Undated, Error> {
    let facts = &manifest.publish;
    let text = |template: &str| match text_parts(template) {
        Ok(parts) => Ok(meanings.fill(&parts)),
        Err(mut error) => {
            error.help.push_str(" (a `{` itself is written `{{`)");
            Err(refused(Exit::Input, error))
        }
    };
    let tags = |tags: &BTreeMap<String, String>| {
        tags.iter().map(|(key, value)| Ok((key.clone(), text(value)?))).collect::<Result<BTreeMap<_, _>, Error>>()
    };
    Ok(Undated {
        description: match &facts.description {
            Some(template) => text(template)?,
            None => own_words(manifest, events),
        },
        tags: tags(&facts.tags)?,
        snapshot_tags: tags(&facts.snapshot_tags)?,
    })
}

/// What the recipe says of itself: that is free text, and AWS may not take it.
fn own_words(manifest: &Manifest, events: &Events) -> String {
    match aws::description(&manifest.description) {
        Ok(()) => manifest.description.clone(),
        Err(refusal) => {
            events.emit(Event::Warning {
                message: format!("the image gets no description: {}", refusal.message),
                help: Some(format!("{}; set another as `description` in the recipe's [publish]", refusal.help)),
            });
            String::new()
        }
    }
}

fn refused(exit: Exit, error: TemplateError) -> Error {
    Error::new(exit, error.message).help(error.help)
}
