//! What the store has of a plan's layers, and which of it counts.
//!
//! A layer counts if each run that it is made of ([`Making`]) is the newest of its key, as far as the store knows, and
//! not older than the recipe allows. So does an output folder.

use std::time::Duration;

use super::now;
use crate::plan::{self, Part, Plan};
use crate::store::{Layer, Making, Shelf, Store};

/// A clock may be wrong by this much, in seconds, before what was made in its future counts as old.
const AHEAD: u64 = 300;

/// The layers of each level of a plan that count.
#[derive(Debug, Default)]
pub(super) struct Found {
    levels: Vec<Level>,
}

#[derive(Debug, Default)]
struct Level {
    layers: Vec<Layer>,
    /// Why a layer that is there doesn't count.
    why_not: Option<String>,
    /// Why one can't be used, with its name.
    damage: Option<String>,
}

/// What the store has of the first `limit` layers of the plan.
pub(super) fn found(store: &Store, plan: &Plan, limit: usize) -> Found {
    let keys: Vec<_> = plan.layers.iter().map(|layer| layer.key.as_str()).collect();
    let mut shelves = store.shelves(&keys);
    let newest = Newest::of(&shelves);
    let now = now();
    let level = |(index, (layer, shelf)): (usize, (&plan::Layer, &mut Shelf))| {
        let mut level = Level::default();
        if !layer.cached || index >= limit {
            return level;
        }
        level.damage =
            shelf.damaged.take().map(|why| format!("the cached layer of `{}` can't be used: {why}", layer.name));
        for kept in std::mem::take(&mut shelf.layers) {
            match newest.refuses(&kept.record().lineage, index, plan, now) {
                None => level.layers.push(kept),
                why_not => level.why_not = why_not,
            }
        }
        level
    };
    Found { levels: plan.layers.iter().zip(&mut shelves).enumerate().map(level).collect() }
}

/// Whether what is made of these runs, which are all of the plan, still counts.
pub(super) fn counts(store: &Store, plan: &Plan, lineage: &[Making]) -> bool {
    let keys: Vec<_> = plan.layers.iter().map(|layer| layer.key.as_str()).collect();
    let newest = Newest::of(&store.shelves(&keys));
    plan.layers.len().checked_sub(1).is_some_and(|last| newest.refuses(lineage, last, plan, now()).is_none())
}

impl Found {
    /// The layers of a level.
    pub(super) fn layers(&self, index: usize) -> impl Iterator<Item = &Layer> {
        self.levels.get(index).into_iter().flat_map(|level| &level.layers)
    }

    /// The deepest level that has a layer.
    pub(super) fn deepest(&self) -> Option<usize> {
        self.levels.iter().rposition(|level| !level.layers.is_empty())
    }

    /// The level where a build begins soonest, and which of its layers it begins with: in the memory of the deepest that
    /// `machine` can take (none: no memory can), unless the steps since then took longer than booting the disk of a deeper one.
    pub(super) fn start(&self, machine: Option<&str>) -> Option<(usize, usize)> {
        let deepest = |fits: &dyn Fn(&Layer) -> bool| {
            let chosen = |index| Some((index, self.layers(index).position(fits)?));
            (0..self.levels.len()).rev().find_map(chosen)
        };
        let resumed = deepest(&|layer| machine.is_some_and(|machine| layer.memory(machine).is_some()));
        let booted = deepest(&|layer| layer.record().volatile.is_empty());
        let boot = self.seconds(0, 0).min(f64::MAX);
        match (resumed, booted) {
            (Some(resumed), Some(booted)) if self.seconds(resumed.0 + 1, booted.0) >= boot => Some(booted),
            (resumed, booted) => resumed.or(booted),
        }
    }

    /// How long the steps of these levels took, the last included; infinity if one of them is not known.
    pub(super) fn seconds(&self, from: usize, last: usize) -> f64 {
        let seconds = |index| self.layers(index).next().map_or(f64::INFINITY, |layer| layer.record().seconds);
        (from..=last).map(seconds).sum()
    }

    /// Takes one of a level's layers out.
    pub(super) fn take(&mut self, index: usize, chosen: usize) -> Layer {
        self.levels[index].layers.swap_remove(chosen)
    }

    /// Why layers can't be used.
    pub(super) fn damage(&self) -> impl Iterator<Item = String> {
        self.levels.iter().filter_map(|level| level.damage.clone())
    }

    /// All layers.
    pub(super) fn into_layers(self) -> Vec<Layer> {
        self.levels.into_iter().flat_map(|level| level.layers).collect()
    }
}

/// The newest makings of each key of a plan; none where the store has nothing.
struct Newest(Vec<Option<Vec<String>>>);

impl Newest {
    fn of(shelves: &[Shelf]) -> Self {
        let ids = |shelf: &Shelf| shelf.layers.iter().filter_map(|layer| Some(layer.making()?.id.clone())).collect();
        let is_empty = |shelf: &Shelf| shelf.layers.is_empty() && shelf.damaged.is_none();
        Self(shelves.iter().map(|shelf| (!is_empty(shelf)).then(|| ids(shelf))).collect())
    }

    /// Why what is made of `lineage` doesn't count as the plan's layer with this index; none if it does.
    fn refuses(&self, lineage: &[Making], index: usize, plan: &Plan, now: u64) -> Option<String> {
        if lineage.len() != index + 1 {
            return Some("it is not known what it was made of".to_owned());
        }
        let each = lineage.iter().zip(&self.0).zip(&plan.layers).enumerate();
        each.into_iter().find_map(|(at, ((making, newest), layer))| {
            if newest.as_ref().is_some_and(|newest| !newest.contains(&making.id)) {
                let what = if at == index { "it".to_owned() } else { format!("`{}`", layer.name) };
                return Some(format!("{what} was made anew since"));
            }
            let max_age = layer.max_age?;
            is_expired(making, layer, now).then(|| {
                format!("`{}` is older than its max_age of {}", layer.name, crate::units::show_duration(max_age))
            })
        })
    }
}

/// Whether a run of this layer's step is older than the recipe allows.
pub(super) fn is_expired(making: &Making, layer: &plan::Layer, now: u64) -> bool {
    layer.max_age.is_some_and(|max_age| is_old(making.made, max_age, now))
}

fn is_old(made: u64, max_age: Duration, now: u64) -> bool {
    made > now + AHEAD || now.saturating_sub(made) >= max_age.as_secs()
}

/// What a build will do about a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outlook {
    /// It is there, and is taken.
    Kept,
    /// It is made anew, for these reasons.
    Made(Vec<String>),
}

/// For each layer of the plan, whether a build on this machine takes it, or goes on from a later one; and if not, why: how
/// it differs from the one that was made last in its place, for example.
#[must_use]
pub fn outlook(plan: &Plan, store: &Store, machine: &str) -> Vec<Outlook> {
    let mut changed = false;
    let found = found(store, plan, plan.layers.len());
    let done = found.start(Some(machine)).map_or(0, |(index, _)| index + 1);
    let look = |(index, (layer, level)): (usize, (&plan::Layer, &Level))| {
        let made = |why: &str| Outlook::Made(vec![why.to_owned()]);
        let (outlook, anew) = match (level, level.layers.first()) {
            _ if index < done => (Outlook::Kept, false),
            _ if !layer.cached => (made("it always runs, or follows a step that does"), true),
            (_, Some(kept)) if kept.record().volatile.is_empty() => {
                (made("only its disk was kept, and to boot that would take longer"), false)
            }
            (_, Some(kept)) => {
                let what = &kept.record().volatile;
                (made(&format!("what it left outside the disk is in no memory that fits this machine: {what}")), false)
            }
            (Level { damage: Some(why), .. } | Level { why_not: Some(why), .. }, None) => (made(why), true),
            _ if changed => (made("it follows a step that is made anew"), true),
            _ => {
                let parent = layer.parts.value(Part::Parent);
                let why = match store.children(parent, plan.base()).into_iter().next() {
                    Some(last) => plan::differences(&last.parts, &layer.parts),
                    None => vec!["nothing was kept in its place".to_owned()],
                };
                (Outlook::Made(why), true)
            }
        };
        changed |= anew;
        outlook
    };
    plan.layers.iter().zip(&found.levels).enumerate().map(look).collect()
}

/// The layers of the plan that are there: what a build of it may take.
#[must_use]
pub fn kept(plan: &Plan, store: &Store) -> Vec<Layer> {
    found(store, plan, plan.layers.len()).into_layers()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_in_the_future_is_as_old_as_what_was_made_long_ago() {
        let day = Duration::from_hours(24);
        let old = |made| is_old(made, day, 1_000_000);
        assert!(!old(1_000_000) && !old(1_000_000 - 86_399) && old(1_000_000 - 86_400));
        assert!(!old(1_000_000 + AHEAD) && old(1_000_001 + AHEAD));
    }
}
