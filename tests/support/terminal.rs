//! A terminal that a test types at and looks at.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{self, LocalModes, Winsize};

pub(crate) struct Terminal {
    near: File,
    far: File,
}

impl Terminal {
    pub(crate) fn new(rows: u16, columns: u16) -> Self {
        let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&near).unwrap();
        unlockpt(&near).unwrap();
        let name = ptsname(&near, Vec::new()).unwrap();
        let far = File::options().read(true).write(true).open(OsStr::from_bytes(name.as_bytes())).unwrap();
        termios::tcsetwinsize(&far, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        Self { near: near.into(), far }
    }

    /// The end that a program gets.
    pub(crate) fn far_end(&self) -> File {
        self.far.try_clone().unwrap()
    }

    pub(crate) fn type_in(&self, keys: &[u8]) {
        (&self.near).write_all(keys).unwrap();
    }

    /// Whether it shows what is typed and takes whole lines, as a shell leaves it to a program.
    pub(crate) fn is_as_it_was(&self) -> bool {
        let modes = termios::tcgetattr(&self.far).unwrap().local_modes;
        modes.contains(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
    }
}
