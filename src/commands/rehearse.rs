//! `kiln test` and `kiln run`.

use std::io::{self, Read};
use std::net::TcpListener;
use std::path::Path;

use kiln::build;
use kiln::cli::{self, Accel, Run};
use kiln::error::{Error, Exit};
use kiln::rehearse::{Firmware, Rehearsal, summary};
use kiln::ui::Ui;
use kiln::vm::seed::Login;
use serde_json::json;

use super::terminal::RawTerminal;
use super::{Context, duration, wanted};

/// Boots the disk by each firmware and runs the recipe's tests.
pub(super) fn test(
    context: &Context<'_>,
    folder: &Path,
    firmware: cli::Firmware,
    timeout: &str,
    accel: Accel,
) -> Result<(), Error> {
    let limit = duration("--timeout", timeout)?;
    let (host, store, events) = (context.host()?, context.store()?, context.ui.events());
    let accelerator = build::choose_accelerator(wanted(accel), &host, &store, &events, context.cancel)?;
    let rehearsal =
        Rehearsal { folder, host: &host, accelerator, limit, store: &store, events: &events, cancel: context.cancel };
    let mut outcomes = Vec::new();
    for firmware in rehearsal.choose(chosen(firmware))? {
        outcomes.push(rehearsal.test(firmware)?);
    }
    context.ui.result(&summary(&outcomes), &json!(outcomes));
    Ok(())
}

fn chosen(firmware: cli::Firmware) -> Option<Firmware> {
    match firmware {
        cli::Firmware::All => None,
        cli::Firmware::Bios => Some(Firmware::Bios),
        cli::Firmware::Uefi => Some(Firmware::Uefi),
    }
}

/// Boots the disk and connects this terminal to its console.
pub(super) fn run(context: &Context<'_>, arguments: Run) -> Result<(), Error> {
    let (host, store, events) = (context.host()?, context.store()?, context.ui.events());
    let accelerator = build::choose_accelerator(wanted(arguments.accel), &host, &store, &events, context.cancel)?;
    let rehearsal = Rehearsal {
        folder: &arguments.outdir,
        host: &host,
        accelerator,
        limit: std::time::Duration::MAX,
        store: &store,
        events: &events,
        cancel: context.cancel,
    };
    let firmware = rehearsal.choose(arguments.firmware.and_then(chosen))?[0];
    let mut login = Login { ssh_key: None, password: Some(password()?) };
    let mut ssh = None;
    if let Some(path) = &arguments.ssh_key {
        login.ssh_key = Some(public_key(path)?);
        let port = match arguments.ssh_port {
            Some(port) => port,
            None => free_port()?,
        };
        ssh = Some(port);
        events.note(format!("ssh: ssh -p {port} USER@127.0.0.1 (the image's default user: debian, ubuntu, ec2-user)"));
    }
    events.note(format!(
        "console: log in as the image's default user (debian, ubuntu, ec2-user), password {}; Ctrl-] ends it",
        login.password.as_deref().unwrap_or_default()
    ));
    let _terminal = RawTerminal::begin();
    rehearsal.talk(firmware, login, ssh, Ui::mirror(), io::stdin())
}

fn public_key(path: &Path) -> Result<String, Error> {
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::new(Exit::Usage, format!("--ssh-key: cannot read `{shown}`: {error}")))?;
    let key = text.lines().next().unwrap_or_default().trim().to_owned();
    if key.contains("PRIVATE KEY") || !key.contains(' ') {
        return Err(Error::new(Exit::Usage, format!("--ssh-key: `{shown}` is not a public key"))
            .help("name the file that ends in .pub"));
    }
    Ok(key)
}

fn free_port() -> Result<u16, Error> {
    let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    port.map(|address| address.port()).map_err(|error| Error::io("no free port on loopback", &error))
}

/// A password for this boot, too long to guess.
fn password() -> Result<String, Error> {
    const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut bytes = [0; 12];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut bytes))
        .map_err(|error| Error::io("cannot read random numbers", &error))?;
    Ok(bytes.iter().map(|byte| char::from(LETTERS[usize::from(byte % 32)])).collect())
}
