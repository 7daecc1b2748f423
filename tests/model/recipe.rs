//! Random recipes. Their parts come from small pools, so that what a build needs was often kept by an earlier one.

use std::fmt::Write as _;

use super::dice::Dice;
use super::world::Switches;

const NAMES: [&str; 8] = ["ash", "birch", "cedar", "elm", "fir", "larch", "oak", "pine"];
const VALUES: [&str; 2] = ["one", "two"];
const COLOURS: [&str; 2] = ["red", "it's blue"];
const MOST_STEPS: usize = 6;
/// What a step does, under which switch, and how often. `@` is a letter and `$` a value.
const LINES: [(&str, usize, &str); 18] = [
    ("", 1, "write /etc/@ $"),
    ("", 1, "append /log/@ $"),
    ("", 1, "remove /etc/@"),
    ("", 1, "print $"),
    ("", 1, "var COLOUR /seen/colour-@"),
    ("env", 2, "env /seen/env-@"),
    ("names", 1, "var KILN_NAME /seen/name-@"),
    ("names", 1, "var KILN_STEP /seen/step-@"),
    ("epoch", 1, "var SOURCE_DATE_EPOCH /seen/epoch-@"),
    ("volatile", 3, "start service-@"),
    ("volatile", 1, "stop service-@"),
    ("volatile", 1, "enable service-@"),
    ("volatile", 4, "services /seen/services-@"),
    ("volatile", 2, "tmp @ $"),
    ("volatile", 3, "from-tmp @ /seen/tmp-@"),
    ("volatile", 1, "mount /mnt/@"),
    ("volatile", 2, "mounts /seen/mounts-@"),
    ("processors", 4, "processors /seen/processors"),
];
/// What a copy copies, and under which switch.
const SOURCES: [(&str, &str); 9] = [
    ("", "inputs/a"),
    ("", "inputs/big"),
    ("", "inputs/tree"),
    ("", "inputs/tree/"),
    ("", "inputs/tree/sub"),
    ("copied-links", "inputs/link"),
    ("copied-links", "inputs/link"),
    ("copied-links", "inputs/folder-link/"),
    ("dot", "."),
];
pub(crate) const SCRIPTS: [&str; 2] = [TAKES, "scripts/b"];
/// The script that takes the file next to it, `data`.
pub(super) const TAKES: &str = "scripts/a";

#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    pub(crate) name: &'static str,
    /// A variable of all steps.
    pub(super) colour: Option<&'static str>,
    pub(super) steps: Vec<Step>,
}

#[derive(Debug, Clone)]
pub(super) struct Step {
    pub(super) name: &'static str,
    pub(super) action: Action,
    pub(super) cache: bool,
    pub(super) reboot: bool,
    pub(super) checkpoint: Option<bool>,
}

#[derive(Debug, Clone)]
pub(super) enum Action {
    /// Lines, and whether a file comes with them.
    Inline {
        lines: Vec<String>,
        file: bool,
        colour: Option<&'static str>,
    },
    /// Writes what no key can have, with a number that no other step has.
    Outside {
        number: usize,
    },
    /// A script's path.
    Run {
        script: &'static str,
    },
    Copy {
        from: &'static str,
        to: &'static str,
        owner: Option<&'static str>,
        mode: Option<&'static str>,
    },
}

/// A line of a step's script.
pub(super) fn line(dice: &mut Dice, on: &Switches) -> String {
    let (_, _, template) = dice.weighted(&LINES, |(switch, weight, _)| if on.has(switch) { *weight } else { 0 });
    let mut text = String::new();
    for letter in template.chars() {
        match letter {
            '@' => text.push_str(dice.pick(&["a", "b"])),
            '$' => text.push_str(dice.pick(&VALUES)),
            letter => text.push(letter),
        }
    }
    text
}

/// A script of a few lines.
pub(super) fn script(dice: &mut Dice, on: &Switches) -> Vec<String> {
    (0..=dice.below(3)).map(|_| line(dice, on)).collect()
}

fn action(dice: &mut Dice, on: &Switches) -> Action {
    match dice.below(8) {
        0..4 => Action::Inline {
            lines: script(dice, on),
            file: dice.once_in(4),
            colour: dice.once_in(4).then(|| dice.pick(&COLOURS)),
        },
        4 | 5 => Action::Run { script: dice.pick(&SCRIPTS) },
        _ => {
            let choices: Vec<_> = SOURCES.into_iter().filter(|(switch, _)| on.has(switch)).collect();
            Action::Copy {
                from: dice.pick(&choices).1,
                to: dice.pick(&["/srv/", "/srv/copy", "/opt/x/"]),
                owner: dice.once_in(4).then_some("web:33"),
                mode: dice.once_in(4).then_some("0640"),
            }
        }
    }
}

impl Recipe {
    pub(crate) fn random(dice: &mut Dice, on: &Switches) -> Self {
        let mut recipe = Self { name: "web", colour: None, steps: Vec::new() };
        for _ in 0..=dice.below(3) {
            recipe.insert(dice, on);
        }
        recipe
    }

    /// Another recipe that begins with the same steps.
    pub(crate) fn varied(&self, name: &'static str, dice: &mut Dice, on: &Switches) -> Self {
        let mut other = Self { name, ..self.clone() };
        other.steps.truncate(1 + dice.below(self.steps.len()));
        for _ in 0..2 {
            let step = other.random_step(dice, on);
            other.steps.push(step);
        }
        other
    }

    /// A name that no step has.
    pub(super) fn fresh_name(&self, dice: &mut Dice) -> &'static str {
        let taken = |name: &str| self.steps.iter().any(|step| step.name == name);
        let free: Vec<_> = NAMES.into_iter().filter(|name| !taken(name)).collect();
        dice.pick(&free)
    }

    pub(super) fn insert(&mut self, dice: &mut Dice, on: &Switches) {
        if self.steps.len() == MOST_STEPS {
            return;
        }
        let step = self.random_step(dice, on);
        self.steps.insert(dice.below(self.steps.len() + 1), step);
    }

    fn random_step(&self, dice: &mut Dice, on: &Switches) -> Step {
        Step {
            name: self.fresh_name(dice),
            action: action(dice, on),
            cache: !(on.has("uncached") && dice.once_in(10)),
            reboot: on.has("reboot") && dice.once_in(10),
            checkpoint: dice.pick(&[None, Some(true), Some(true), Some(false)]),
        }
    }

    pub(super) fn edit(&mut self, dice: &mut Dice, on: &Switches) {
        let index = dice.below(self.steps.len());
        let step = &mut self.steps[index];
        match &mut step.action {
            Action::Inline { lines, .. } if dice.once_in(2) => {
                let index = dice.below(lines.len());
                lines[index] = line(dice, on);
            }
            action => *action = self::action(dice, on),
        }
    }

    /// Gives the last step something else to do, which what is kept of the others is needed for.
    pub(super) fn edit_last(&mut self, dice: &mut Dice, on: &Switches) {
        if let Some(step) = self.steps.last_mut() {
            step.action = Action::Inline { lines: script(dice, on), file: false, colour: None };
        }
    }

    /// Makes the step that depends on the outside another one, before a step that is there; its index.
    pub(super) fn outside(&mut self, number: usize, dice: &mut Dice) -> usize {
        self.steps.retain(|step| !matches!(step.action, Action::Outside { .. }));
        if self.steps.is_empty() {
            let action = Action::Inline { lines: vec!["write /etc/a one".to_owned()], file: false, colour: None };
            let name = self.fresh_name(dice);
            self.steps.push(Step { name, action, cache: true, reboot: false, checkpoint: None });
        }
        self.steps.truncate(MOST_STEPS - 1);
        let index = dice.below(self.steps.len());
        let (name, checkpoint) = (self.fresh_name(dice), dice.pick(&[None, Some(true), Some(false)]));
        let action = Action::Outside { number };
        self.steps.insert(index, Step { name, action, cache: true, reboot: false, checkpoint });
        index
    }

    /// Changes how a step is kept, or what it is called.
    pub(super) fn turn(&mut self, dice: &mut Dice, on: &Switches) {
        let fresh = self.fresh_name(dice);
        let index = dice.below(self.steps.len());
        let step = &mut self.steps[index];
        match dice.below(5) {
            0 if on.has("reboot") => step.reboot = !step.reboot,
            1 if on.has("uncached") => step.cache = !step.cache,
            2 => self.colour = dice.pick(&[None, Some("red"), Some("green")]),
            3 => step.name = fresh,
            _ => step.checkpoint = dice.pick(&[None, Some(true), Some(false)]),
        }
    }

    /// As TOML.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("name = \"{}\"\n", self.name);
        text.push_str("[base]\nimage = \"../base.raw\"\n[machine]\nnetwork = \"none\"\n");
        if let Some(colour) = self.colour {
            let _ = writeln!(text, "[env]\nCOLOUR = \"{colour}\"");
        }
        for step in &self.steps {
            text.push_str(&step.text());
        }
        text
    }
}

impl Step {
    fn text(&self) -> String {
        let mut text = format!("[[provision]]\nname = \"{}\"\n", self.name);
        let mut add = |key: &str, value: String| {
            let _ = writeln!(text, "{key} = {value}");
        };
        let quoted = |value: &str| format!("\"{value}\"");
        match &self.action {
            Action::Inline { lines, file, colour } => {
                let take = if *file { "take inputs/a /taken\n" } else { "" };
                add("inline", format!("'''\n{}\n{take}'''", lines.join("\n")));
                if *file {
                    add("files", "[\"inputs/a\"]".to_owned());
                }
                if let Some(colour) = colour {
                    add("env", format!("{{ COLOUR = \"{colour}\" }}"));
                }
            }
            Action::Outside { number } => add("inline", format!("'''\noutside /outside\n# {number}\n'''")),
            Action::Run { script } => {
                add("run", quoted(script));
                if *script == TAKES {
                    add("files", "[\"data\"]".to_owned());
                }
            }
            Action::Copy { from, to, owner, mode } => {
                add("copy", quoted(from));
                add("to", quoted(to));
                for (key, value) in [("owner", owner), ("mode", mode)] {
                    if let Some(value) = value {
                        add(key, quoted(value));
                    }
                }
            }
        }
        if let Some(checkpoint) = self.checkpoint {
            add("checkpoint", checkpoint.to_string());
        }
        if !self.cache {
            add("cache", "false".to_owned());
        }
        if self.reboot {
            add("reboot", "true".to_owned());
        }
        text
    }
}
