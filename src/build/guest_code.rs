//! kiln's own code in the build guest, and its digest, which is part of every key: a layer that another kiln made is
//! taken only if that kiln would have done the same to the guest.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use sha2::{Digest as _, Sha256};

use super::session::{self, command_line, library};
use crate::units::{GIB, Size, hex};
use crate::vm::guest::AGENT;
use crate::vm::seed;
use crate::vm::spec::{Accelerator, Boot, DiskBus, MemoryState, Network, Processor, Spec};

/// SHA-256 of all that kiln brings into a build guest, in hex.
pub(super) fn guest_code() -> &'static str {
    static DIGEST: LazyLock<String> = LazyLock::new(|| digest(&texts()));
    &DIGEST
}

fn digest(texts: &[String]) -> String {
    let mut hasher = Sha256::new();
    for text in texts {
        hasher.update((text.len() as u64).to_le_bytes());
        hasher.update(text);
    }
    hex(&hasher.finalize())
}

/// The scripts, what starts them, and the machines that a guest sees. The shell's script is left out: it runs only in
/// guests whose disk is thrown away.
fn texts() -> Vec<String> {
    let environment = session::network_environment().into_iter().map(|(name, value)| format!("{name}={value}"));
    let scripts = [AGENT.to_owned(), library(), seed::USER_DATA.to_owned(), seed::NETWORK_CONFIG.to_owned()];
    scripts.into_iter().chain(environment).chain(shapes()).collect()
}

/// The machines of every accelerator and processor, and of every way to boot. Which of them a guest has, the number of
/// processors and the size of the memory are parts of their own.
fn shapes() -> impl Iterator<Item = String> {
    let boots = || {
        let direct = Boot::Direct { kernel: PathBuf::new(), initrd: None, command_line: command_line("ROOT") };
        [direct, Boot::Bios, Boot::Uefi { code: PathBuf::new(), variables: PathBuf::new() }]
    };
    let (accelerators, processors) = ([Accelerator::Kvm, Accelerator::Tcg], [Processor::V2, Processor::V3]);
    let pairs = accelerators.into_iter().flat_map(move |one| processors.map(|other| (one, other)));
    pairs.flat_map(move |(accelerator, processor)| {
        let state = || MemoryState::Savable(PathBuf::new());
        boots().map(|boot| Spec { accelerator, processor, ..machine(boot, state(), Path::new("")) }.shape())
    })
}

/// The build guest's machine with its drives in `folder`. What the recipe or the host decides has an example's value.
pub(super) fn machine(boot: Boot, memory_state: MemoryState, folder: &Path) -> Spec {
    Spec {
        accelerator: Accelerator::Tcg,
        cpus: 1,
        processor: Processor::V3,
        memory: Size(GIB),
        overlay: folder.join("overlay"),
        bus: DiskBus::Virtio,
        agent: Some(folder.join("agent")),
        seed: matches!(boot, Boot::Bios | Boot::Uefi { .. }).then(|| folder.join("seed")),
        boot,
        network: Network::Filtered,
        memory_state,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> String {
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
    }

    #[test]
    fn every_script_is_in_the_digest() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/build/guest");
        let mut scripts: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        scripts.push("src/vm/agent.sh".into());
        // It runs only in guests whose disk is thrown away.
        scripts.retain(|script| !script.ends_with("shell.sh"));
        assert!(scripts.len() >= 7, "{scripts:?}");
        let texts = texts();
        for script in scripts {
            let text = read(&script);
            assert!(texts.iter().any(|have| have.contains(&text)), "{} is not in the digest", script.display());
        }
    }

    #[test]
    fn what_starts_the_scripts_is_in_the_digest() {
        let all = texts().concat();
        let start = [
            command_line("ROOT").as_str(),
            "#cloud-config\ncloud_init_modules: [bootcmd]",
            "KILN_MAC=",
            "KILN_GATEWAY=10.0.2.2",
            "serial=ds=nocloud",
            "pflash0=code",
            "virtio-blk-pci,drive=root",
            "virtio-net-pci",
            "\nkvm\n",
        ]
        .map(str::to_owned);
        for text in start {
            assert!(all.contains(&text), "{text}");
        }
    }

    #[test]
    fn each_text_and_its_end_count() {
        let of = |texts: &[&str]| digest(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        assert_ne!(of(&["a", "b"]), of(&["a", "c"]));
        assert_ne!(of(&["ab", "c"]), of(&["a", "bc"]));
        assert_eq!(guest_code(), digest(&texts()));
    }
}
