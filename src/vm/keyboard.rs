//! What a person types, on its way to the guest.

use std::io::{Read, Write};

/// The key that ends `kiln run` and `kiln shell`: Ctrl-], as telnet and virsh have it.
const END: u8 = 0x1d;

/// How what a person types came to its end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// The end key was pressed.
    EndKey,
    /// There is no more to come, or nobody takes it.
    Gone,
}

/// Passes on what is typed, until it ends.
pub(crate) fn forward(mut input: impl Read, mut console: impl Write) -> Input {
    let mut buffer = [0; 1024];
    while let Ok(n @ 1..) = input.read(&mut buffer) {
        let end = buffer[..n].iter().position(|&byte| byte == END);
        let sent = console.write_all(&buffer[..end.unwrap_or(n)]).and_then(|()| console.flush());
        match end {
            Some(_) => return Input::EndKey,
            None if sent.is_err() => break,
            None => {}
        }
    }
    Input::Gone
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_key_ends_and_is_not_passed_on() {
        let mut console = Vec::new();
        assert_eq!(forward(&b"ls\n\x1dnever"[..], &mut console), Input::EndKey);
        assert_eq!(console, b"ls\n");
        assert_eq!(forward(&b"exit\n"[..], &mut console), Input::Gone);
    }
}
