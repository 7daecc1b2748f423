//! The integration tests: they drive the binary and look at what it says and leaves. One crate, so that it is linked once.

#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod cli;
mod failures;
mod guest;
mod kills;
mod life;
mod many;
mod memory;
mod model;
mod publish;
mod real;
mod rehearse;
mod shell;
mod signals;
mod stress;
mod support;
mod tidy;
mod truth;
mod verify;
mod warm;
