//! Random recipes and hosts: a warm result always equals the cold one, and a plan tells what a build runs.
//!
//! A round changes a recipe, its inputs or the host, builds with a cache that lives on ("warm") and with an empty one
//! ("cold"), and compares the guests' disks. `KILN_MODEL_SEED=N` replays a seed (name one test), `KILN_MODEL_ROUNDS=N` does
//! more or fewer rounds, and `KILN_MODEL_WITHOUT=NAME,…` leaves kinds of events out, to see what else there is.

pub(crate) mod dice;
mod events;
pub(crate) mod recipe;
pub(crate) mod world;

use world::World;

const ROUNDS: usize = 100;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

fn warm_equals_cold(seed: u64) {
    let mut world = World::new(number("KILN_MODEL_SEED").unwrap_or(seed));
    let rounds = number("KILN_MODEL_ROUNDS").map_or(ROUNDS, |rounds| usize::try_from(rounds).unwrap());
    for round in 0..rounds {
        world.round(round);
    }
}

#[test]
fn warm_equals_cold_1() {
    warm_equals_cold(1);
}

#[test]
fn warm_equals_cold_2() {
    warm_equals_cold(2);
}

#[test]
fn warm_equals_cold_3() {
    warm_equals_cold(3);
}

#[test]
fn warm_equals_cold_4() {
    warm_equals_cold(4);
}

#[test]
fn warm_equals_cold_5() {
    warm_equals_cold(5);
}
