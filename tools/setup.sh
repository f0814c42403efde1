# Sourced by tools/quickstart and tools/test: goes to the project's root and sees that the machine can build and run it.
# On Debian and Ubuntu what is missing is installed by apt; elsewhere it is named.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*" >&2; }
stop() { printf 'error: %s\n' "$1" >&2; shift; for hint in "$@"; do printf 'hint: %s\n' "$hint" >&2; done; exit 1; }

# A driver is a JSON file that the Vulkan loader finds, or that the user points it to.
has_vulkan_driver() {
    [ -n "${VK_ICD_FILENAMES:-}${VK_DRIVER_FILES:-}${VK_ADD_DRIVER_FILES:-}" ] && return 0
    local folder
    for folder in /usr/share /usr/local/share /etc "${XDG_DATA_HOME:-${HOME:-}/.local/share}"; do
        compgen -G "$folder/vulkan/icd.d/*.json" > /dev/null && return 0
    done
    return 1
}

has_vulkan_loader() {
    # Not `ldconfig -p | grep -q`: under pipefail an early end of grep is a failure.
    local known
    known=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2> /dev/null || true)
    [[ $known == *libvulkan.so.1* ]] || compgen -G "/usr/lib*/libvulkan.so.1" > /dev/null
}

install_packages() {
    command -v apt-get > /dev/null || stop "missing: $*" \
        "these are Debian's names; install your system's packages for them, then start this script again"
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo > /dev/null || stop "missing: $*" "as root: apt-get install $*"
        as_root=(sudo)
    fi
    say "installing $*"
    "${as_root[@]}" apt-get update -q
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

if [ "$(uname -s)" = Linux ]; then
    missing=()
    command -v cc > /dev/null || missing+=(gcc libc6-dev)
    has_vulkan_loader || missing+=(libvulkan1)
    # Mesa's drivers: those for AMD and Intel GPUs, and the one that runs on the processor.
    has_vulkan_driver || missing+=(mesa-vulkan-drivers)
    [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
fi

if ! command -v cargo > /dev/null && [ -f "${HOME:-}/.cargo/env" ]; then
    # shellcheck disable=SC1091
    . "$HOME/.cargo/env"
fi
command -v cargo > /dev/null || stop "cargo is not installed: this needs Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer" \
    "install Rust with rustup (the Rust project's own installer), or your system's packages" \
    "then open a new shell and start this script again"

# Drivers ask for a folder of their own, and warn at every start where there is none.
if [ -z "${XDG_RUNTIME_DIR:-}" ]; then
    XDG_RUNTIME_DIR=$(mktemp -d)
    export XDG_RUNTIME_DIR
    trap 'rm -rf "$XDG_RUNTIME_DIR"' EXIT
fi
