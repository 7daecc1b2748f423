//! The packages that are installed on a disk, for the manifest.
//!
//! dpkg's are read from the exported disk, because its own list takes a second under software emulation. Others are listed
//! by the guest (`guest/packages.sh`), which leaves the list out where this file can read it.

use crate::disk::{self, Image, Table};

/// Where dpkg keeps what it knows (dpkg(1), FILES).
const STATUS: &str = "/var/lib/dpkg/status";
/// More than any distribution has: all of Debian's packages together take 100 MB.
const STATUS_LIMIT: u64 = 128 << 20;

/// Name, version and architecture of each package, one a line, as `dpkg-query -W` has them; none if dpkg's status can't
/// be read.
pub(super) fn of_dpkg(table: &Table, image: &Image) -> Result<Option<Vec<String>>, disk::Error> {
    let status = disk::root_file(table, image, STATUS, STATUS_LIMIT)?;
    Ok(status.map(|status| parse(&String::from_utf8_lossy(&status))))
}

fn parse(status: &str) -> Vec<String> {
    let mut packages: Vec<_> = status.split("\n\n").filter_map(package).collect();
    packages.sort_unstable();
    packages
}

/// A paragraph as deb822(5) has it; those of packages that are gone stay for their settings or for nothing.
fn package(paragraph: &str) -> Option<String> {
    let field = |name: &str| {
        let lines = paragraph.lines().filter_map(|line| line.split_once(':'));
        lines.into_iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    };
    if field("Status")?.ends_with(" not-installed") {
        return None;
    }
    Some(format!("{} {} {}", field("Package")?, field("Version")?, field("Architecture")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_dpkg_query_has_them() {
        let status = "Package: zlib1g\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1:1.2.13.dfsg-1\n\
                      Description: a library\n Version: not this one\n\n\
                      Package: adduser\nStatus: deinstall ok config-files\nVersion: 3.134\nArchitecture: all\n\n\
                      Package: gone\nStatus: purge ok not-installed\nVersion: 1\nArchitecture: all\n\n\
                      Package: no-version\nStatus: install ok installed\n\n";
        assert_eq!(parse(status), ["adduser 3.134 all", "zlib1g 1:1.2.13.dfsg-1 amd64"]);
        assert_eq!(parse(""), [""; 0]);
    }
}
