"""Ends with status 1, and says what to do, where the kernel has no nft queues: the network policy engine would run there and judge nothing.

    check.py [CONFIG [MODULES]]

CONFIG: the kernel's configuration, /proc/config.gz. MODULES: the directory of its modules, /lib/modules/RELEASE. Where neither is there,
nobody can tell: status 0.
"""
import gzip
import os
import sys

NEEDS = {"nft_queue": "CONFIG_NFT_QUEUE", "nfnetlink_queue": "CONFIG_NETFILTER_NETLINK_QUEUE"}


def look_config(path):
    """The options that are built in or modules, None if the kernel does not say."""
    if not os.path.exists(path):
        return None
    with gzip.open(path, "rt") as file:
        return {line.partition("=")[0] for line in file if line.rstrip().endswith(("=y", "=m"))}


def look_modules(directory):
    """The names of the modules, built in or not, None if there are none."""
    texts = []
    for name in ("modules.builtin", "modules.dep"):
        path = os.path.join(directory, name)
        if os.path.exists(path):
            with open(path) as file:
                texts += [line.partition(":")[0] for line in file]
    return {os.path.basename(text.strip()).partition(".ko")[0].replace("-", "_") for text in texts} or None


def missing(config, modules):
    """The modules that the kernel lacks. A module that the configuration names may still be in a package that is not installed."""
    found = {module for module, option in NEEDS.items() if config is None or option in config}
    return sorted(set(NEEDS) - found) or sorted(module for module in NEEDS if modules is not None and module not in modules)


def main(config="/proc/config.gz", modules=""):
    release = os.uname().release
    lacks = missing(look_config(config), look_modules(modules or f"/lib/modules/{release}"))
    if lacks:
        what = f"the kernel {release} of this node has no module {' and '.join(lacks)}, without which no network policy holds"
        way = "install its full set of modules (Ubuntu: linux-modules-extra), or another kernel"
        sys.exit(f"{what}: {way}; the network goes on without policies")


if __name__ == "__main__":
    main(*sys.argv[1:])
