//! The `NoCloud` drive that makes cloud-init start the agent on a disk that boots by its own boot loader.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;

use crate::units::MIB;

/// Only what starts the agent runs: every other module of cloud-init would leave its traces on the disk. The lists
/// replace the disk's own because user data is merged over them before the modules of a stage run (cloud-init,
/// "Config user-data"). Without systemd the agent is started by hand.
pub(crate) const USER_DATA: &str = r#"#cloud-config
cloud_init_modules: [bootcmd]
cloud_config_modules: []
cloud_final_modules: []
bootcmd:
  - - sh
    - -c
    - >-
      agent=/dev/disk/by-id/virtio-kiln-agent;
      for drive in /sys/block/vd*; do
      [ "$(cat $drive/serial)" != kiln-agent ] || agent=/dev/${drive##*/}; done;
      systemd-run --quiet --no-block --unit=kiln-agent /bin/sh $agent firmware
      || (setsid nohup /bin/sh $agent firmware >/dev/null 2>&1 &)
"#;

/// cloud-init leaves the network to kiln and the disk's own settings.
pub const NETWORK_CONFIG: &str = "config: disabled\n";

/// Everything runs as on a first boot, and the agent when all of it is over.
const INSTANCE_DATA: &str = r"#cloud-config
runcmd:
  - - sh
    - -c
    - >-
      systemd-run --quiet --no-block --unit=kiln-agent /bin/sh /dev/disk/by-id/virtio-kiln-agent instance
      || (setsid nohup /bin/sh /dev/disk/by-id/virtio-kiln-agent instance >/dev/null 2>&1 &)
";

/// Who may log in to a rehearsed instance.
#[derive(Debug, Clone, Default)]
pub struct Login {
    /// A public key for the image's default user.
    pub ssh_key: Option<String>,
    /// A password for the image's default user, on this boot's overlay only.
    pub password: Option<String>,
}

/// Writes the drive for a build guest to `path`. `boot` is different for each boot of one build, so that cloud-init
/// takes each for a new instance.
///
/// # Errors
/// When the file can't be written.
pub fn write(path: &Path, boot: u32) -> io::Result<()> {
    let meta_data = format!("instance-id: kiln-{}-{boot}\n", std::process::id());
    volume(path, &[("meta-data", &meta_data), ("user-data", USER_DATA), ("network-config", NETWORK_CONFIG)])
}

/// Writes the drive for a rehearsed instance: cloud-init does all that it would do on EC2, then starts the agent.
///
/// # Errors
/// When the file can't be written.
pub fn write_instance(path: &Path, login: &Login) -> io::Result<()> {
    let mut user_data = INSTANCE_DATA.to_owned();
    // JSON strings are YAML strings.
    let quoted = |text: &str| serde_json::Value::from(text.trim()).to_string();
    if let Some(key) = &login.ssh_key {
        let _ = writeln!(user_data, "ssh_authorized_keys: [{}]", quoted(key));
    }
    if let Some(password) = &login.password {
        let _ = writeln!(user_data, "password: {}\nchpasswd: {{expire: false}}", quoted(password));
    }
    let meta_data = format!("instance-id: kiln-test-{}\n", std::process::id());
    volume(path, &[("meta-data", &meta_data), ("user-data", &user_data)])
}

/// A small FAT volume named CIDATA, which every cloud kernel mounts and cloud-init looks for.
fn volume(path: &Path, files: &[(&str, &str)]) -> io::Result<()> {
    let image = fs_err::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
    image.set_len(2 * MIB)?;
    let label = *b"CIDATA     ";
    fatfs::format_volume(&image, fatfs::FormatVolumeOptions::new().volume_label(label))?;
    let volume = fatfs::FileSystem::new(&image, fatfs::FsOptions::new())?;
    for (name, text) in files {
        volume.root_dir().create_file(name)?.write_all(text.as_bytes())?;
    }
    volume.unmount()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_drive_holds_what_cloud_init_reads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seed");
        write(&path, 2).unwrap();
        let volume = fatfs::FileSystem::new(std::fs::File::open(&path).unwrap(), fatfs::FsOptions::new());
        let volume = volume.unwrap();
        assert_eq!(volume.volume_label(), "CIDATA");
        let mut text = String::new();
        volume.root_dir().open_file("meta-data").unwrap().read_to_string(&mut text).unwrap();
        assert!(text.ends_with("-2\n"));
        text.clear();
        volume.root_dir().open_file("user-data").unwrap().read_to_string(&mut text).unwrap();
        assert!(text.starts_with("#cloud-config\n"));
    }
}
