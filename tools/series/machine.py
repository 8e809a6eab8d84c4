# SPDX-License-Identifier: GPL-2.0
"""The machine: packages, the toolchain, and the kernel source that the series is based on.

Nothing of the system's is changed except that missing packages are installed when root. What
is fetched from newer suites than the machine's own goes through a private apt state, from the
mirror that the machine is configured with, and is unpacked in the cache, never installed.
"""

import glob
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

from common import (CACHE, ENV, Failure, JOBS, TOP, git, git_ok, identity, output,
                    read, run, say, scratch, step, write)

BINDGEN = "0.72.1"              # what is built when no bindgen >= BINDGEN_MIN is in PATH
BINDGEN_MIN = (0, 71, 1)
RUSTC_MIN = (1, 85, 0)
LLVM_TRIED, LLVM_MIN = 19, 17
LLVM_ORDER = (LLVM_TRIED,) + tuple(range(29, LLVM_MIN - 1, -1))
SUITES = ("trixie-backports", "sid", "experimental")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
KERNEL_ORG = "https://cdn.kernel.org/pub/linux/kernel/v%s.x/linux-%s.tar.xz"


def which(*names):
    for name in names:
        path = shutil.which(name, path=ENV["PATH"] + ":/usr/sbin:/sbin")
        if path:
            return path
    return None


def version(text):
    m = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text or "")
    return tuple(int(x or 0) for x in m.groups()) if m else (0, 0, 0)


def base_version():
    """The kernel version in BASE: the first line that is not a comment."""
    for line in read(os.path.join(TOP, "BASE")).splitlines():
        line = line.split("#")[0].strip()
        if line:
            return line
    raise Failure("BASE names no kernel version")


# --- packages -------------------------------------------------------------------------------

def llvm():
    """(suffix, libdir) of a complete LLVM >= 17: clang, lld, libclang; or None."""
    for n in LLVM_ORDER:
        suffix = "-%d" % n
        if all(which(tool + suffix) for tool in ("clang", "ld.lld", "llvm-ar")):
            libdir = libclang("llvm-config" + suffix, "/usr/lib/llvm-%d/lib" % n)
            if libdir:
                return suffix, libdir
    if all(which(tool) for tool in ("clang", "ld.lld", "llvm-ar")):
        libdir = libclang("llvm-config", "")
        if version(output("clang", "--version"))[0] >= LLVM_MIN and libdir:
            return "", libdir
    return None


def libclang(config, default):
    libdirs = [default, "/usr/lib64", "/usr/lib", "/usr/lib/x86_64-linux-gnu"]
    if which(config):
        libdirs.insert(0, output(config, "--libdir"))
    return next((d for d in libdirs if d and glob.glob(d + "/libclang*.so*")), None)


def clang():
    found = llvm()
    return "clang" + found[0] if found else which("clang", "cc", "gcc")


def compiles(source, *flags):
    """Whether the C compiler there is makes a program of this: the test for a -dev package."""
    if not clang():
        return False
    with tempfile.TemporaryDirectory() as d:
        p = subprocess.run([clang(), "-x", "c", "-", "-o", os.path.join(d, "a")] + list(flags),
                           input=source.encode(), env=ENV, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, check=False)
    return p.returncode == 0


def header(name):
    return lambda: compiles("#include <%s>\nint main(void) { return 0; }\n" % name)


def tool(*names):
    return lambda: all(which(n) for n in names)


def system_python(module):
    """A module of the system's python3: what scripts/spdxcheck.py imports."""
    return lambda: subprocess.run(["/usr/bin/python3", "-c", "import " + module], env=ENV, check=False,
                                  stderr=subprocess.DEVNULL).returncode == 0


def codespell():
    """checkpatch wants the dictionary, and only warns where there is none."""
    return os.path.exists("/usr/share/codespell/dictionary.txt") or system_python("codespell_lib")()


def llvm_package():
    for n in LLVM_ORDER:
        if output("apt-cache", "madison", "clang-%d" % n, check=False):
            return n
    return LLVM_TRIED


# package, what it is looked for by; "build" is enough for demo and uml
PACKAGES = {
    "build": (
        ("git", tool("git")), ("make", tool("make")), ("flex", tool("flex")), ("bison", tool("bison")),
        ("bc", tool("bc")), ("perl", tool("perl")), ("cpio", tool("cpio")), ("kmod", tool("depmod")),
        ("xz-utils", tool("xz")), ("rsync", tool("rsync")), ("ccache", tool("ccache")),
        ("LLVM", lambda: llvm() is not None),
        ("libc6-dev", lambda: compiles("int main(void) { return 0; }\n", "-static")),
        ("libelf-dev", header("gelf.h")), ("libssl-dev", header("openssl/ssl.h")),
    ),
    "check": (
        ("quilt", tool("quilt")), ("codespell", codespell),
        ("python3-ply", system_python("ply")), ("python3-git", system_python("git")),
    ),
    "configs": (
        ("gcc", tool("gcc")), ("libdw-dev", header("elfutils/libdwfl.h")),
    ),
    "x86": (
        ("qemu-system-x86", tool("qemu-system-x86_64")),
        ("e2fsprogs", tool("mkfs.ext4")), ("xfsprogs", tool("mkfs.xfs")),
    ),
    "mm": (     # static libraries that mainline's mm tests are linked with
        ("libnuma-dev", lambda: compiles("#include <numa.h>\nint main(void) { return numa_available(); }\n",
                                         "-static", "-lnuma")),
        ("liburing-dev", header("liburing.h")),
    ),
    "tree": (
        ("git", tool("git")), ("xz-utils", tool("xz")),
    ),
}


def packages(*groups):
    """Install what is missing when root, else say what to type."""
    missing = [p for g in groups for p, there in PACKAGES[g] if not there()]
    if not missing:
        return
    names = list(dict.fromkeys(missing))
    apt = which("apt-get")
    root = os.geteuid() == 0
    if apt and root:
        with step("apt-get update"):
            run(["apt-get", "-q", "update"], "apt", check=False, timeout=600)
    if "LLVM" in names:
        n = llvm_package() if apt else LLVM_TRIED
        names[names.index("LLVM"):names.index("LLVM") + 1] = [
            "clang-%d" % n, "lld-%d" % n, "llvm-%d" % n, "libclang1-%d" % n]
    command = "apt-get install -y --no-install-recommends " + " ".join(names)
    if not apt:
        raise Failure("missing: %s (as Debian calls them)\n  install them with your system's "
                      "package manager" % " ".join(names))
    if not root:
        raise Failure("missing packages; install them with\n\n  sudo %s\n" % command)
    with step("install " + " ".join(names) if len(names) < 5 else "install %d packages" % len(names)):
        run(command.split(), "apt", timeout=1800, what="apt-get install",
            env=dict(ENV, DEBIAN_FRONTEND="noninteractive"))
    still = [p for g in groups for p, there in PACKAGES[g] if not there()]
    if still:
        raise Failure("still missing after apt-get install: %s" % " ".join(still))


# --- packages of newer suites, unpacked and not installed ---------------------------------------

def mirrors():
    """The Debian mirrors in the machine's apt configuration."""
    release = read("/etc/os-release") if os.path.exists("/etc/os-release") else ""
    m = re.search(r"^VERSION_CODENAME=(\w+)", release, re.M)
    if not re.search(r"^ID=debian$", release, re.M) or not m or not which("apt-get"):
        return []
    found = output("apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)",
                   "Created-By: Packages", check=False)
    uris = [l.split()[2] for l in found.splitlines() if l.split()[:2] == [m.group(1), "main"]]
    return list(dict.fromkeys(uris))


def apt_options(state, suite, uris):
    """Options that keep everything apt writes, and every source it reads, in one directory."""
    for d in ("lists/partial", "cache/archives/partial", "etc"):
        os.makedirs(os.path.join(state, d), exist_ok=True)
    signed = "[signed-by=%s] " % KEYRING if os.path.exists(KEYRING) else ""
    with open(os.path.join(state, "sources.list"), "w", encoding="ascii") as f:
        f.writelines("deb %s%s %s main\n" % (signed, uri, suite) for uri in uris)
    open(os.path.join(state, "status"), "a", encoding="ascii").close()
    options = {
        "Dir::State": state, "Dir::State::lists": state + "/lists", "Dir::State::status": state + "/status",
        "Dir::Cache": state + "/cache", "Dir::Etc::sourcelist": state + "/sources.list",
        "Dir::Etc::sourceparts": "-", "Dir::Etc::preferences": "-", "Dir::Etc::preferencesparts": "-",
        "APT::Sandbox::User": "", "Acquire::Languages": "none", "Acquire::Retries": "2",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
    }
    return [x for k, v in options.items() for x in ("-o", "%s=%s" % (k, v))]


def fetch_deb(package, accept, where):
    """Unpack the package, of a version that accept() likes, from the first suite that has it.

    Returns its version, or None where there is no such package or no Debian mirror."""
    uris = mirrors()
    for suite in SUITES if uris else ():
        state = os.path.join(CACHE, "apt", suite)
        options = apt_options(state, suite, uris)
        run(["apt-get", "-q"] + options + ["update"], "fetch-" + package, check=False, timeout=600)
        listed = output("apt-cache", *options, "madison", package, check=False)
        versions = [l.split("|")[1].strip() for l in listed.splitlines() if "Packages" in l]
        for v in versions:
            if not accept(v):
                continue
            run(["apt-get", "-q"] + options + ["download", "%s=%s" % (package, v)],
                "fetch-" + package, cwd=where, timeout=1800)
            deb = glob.glob(os.path.join(where, package + "_*.deb"))[0]
            run(["dpkg-deb", "-x", deb, where], "fetch-" + package, timeout=600)
            os.unlink(deb)
            return v
    return None


# --- Rust ---------------------------------------------------------------------------------------

def rust_lib_src():
    """The source of the standard library of this rustc, which the kernel builds core from."""
    if not which("rustc"):
        raise Failure("no rustc in PATH; install rustup, or a rustc >= 1.85 with its rust-src")
    rustc = output("rustc", "--version")
    if version(rustc) < RUSTC_MIN:
        raise Failure("%s is too old: the kernel wants 1.85 or later\n  rustup update stable" % rustc)
    given = os.environ.get("RUST_LIB_SRC")
    v = ".".join(map(str, version(rustc)))
    for path in (given, output("rustc", "--print", "sysroot") + "/lib/rustlib/src/rust/library",
                 "/usr/src/rustc-%s/library" % v, CACHE + "/rust-src-%s/library" % v):
        if path and os.path.exists(path + "/core/src/lib.rs"):
            return path
    with step("fetch the source of Rust's library %s" % v), scratch("rust-src") as tmp:
        if fetch_deb("rust-src", lambda found: found.split("+")[0].split("-")[0] == v, tmp):
            os.replace(tmp + "/usr/src/rustc-" + v, CACHE + "/rust-src-" + v)
            return CACHE + "/rust-src-%s/library" % v
    raise Failure("there is no library source for %s; get it with\n\n  rustup component add rust-src\n\n"
                  "  or name it with RUST_LIB_SRC=" % rustc)


def bindgen():
    """The directory of a bindgen that is new enough; None if one has to be built."""
    own = os.path.join(CACHE, "tools", "bindgen-" + BINDGEN, "bin")
    for path in (which("bindgen"), which(own + "/bindgen")):
        if path and version(output(path, "--version", check=False)) >= BINDGEN_MIN:
            return os.path.dirname(path)
    return None


def build_bindgen():
    if not which("cargo"):
        raise Failure("no bindgen >= 0.71.1 and no cargo to build one; install either")
    with scratch("bindgen") as tmp:
        run(["cargo", "install", "--locked", "--root", tmp, "--jobs", JOBS, "--version", BINDGEN,
             "bindgen-cli"], "bindgen", timeout=1800, what="cargo install bindgen-cli")
        where = os.path.join(CACHE, "tools", "bindgen-" + BINDGEN)
        shutil.rmtree(where, ignore_errors=True)
        os.makedirs(os.path.dirname(where), exist_ok=True)
        os.replace(tmp, where)
    return os.path.join(where, "bin")


class Toolchain:
    """What a kernel build needs to be told: make variables and environment."""

    def __init__(self, bindgen_dir, lib_src):
        suffix, libdir = llvm()
        self.suffix = suffix
        self.cc = "clang" + suffix
        # ccache: a header of mm that one patch changes costs every C object of a kernel otherwise.
        self.make = ["LLVM=" + (suffix or "1"), "CC=ccache " + self.cc]
        # LOCALVERSION is set, and empty: the release does not depend on the state of a git tree.
        self.env = dict(ENV, LIBCLANG_PATH=libdir, RUST_LIB_SRC=lib_src, LOCALVERSION="",
                        CCACHE_DIR=os.path.join(CACHE, "ccache"), CCACHE_MAXSIZE="6G", CCACHE_COMPILERCHECK="content",
                        KBUILD_BUILD_USER="series", KBUILD_BUILD_HOST="series",
                        PATH=bindgen_dir + os.pathsep + ENV["PATH"])


# --- the base -----------------------------------------------------------------------------------

class Base:
    """A repository of our own whose branch `base` is the kernel that the series applies to."""

    def __init__(self, dir_):
        self.dir = dir_
        self.repo = os.path.join(dir_, "src")

    @property
    def commit(self):
        return git(self.repo, "rev-parse", "base")


def tree_version(makefile):
    parts = [re.search(r"^%s\s*=[ \t]*(\S*)" % k, makefile, re.M) for k in
             ("VERSION", "PATCHLEVEL", "SUBLEVEL", "EXTRAVERSION")]
    if not all(parts):
        return None
    v, p, s, e = (m.group(1) for m in parts)
    return "%s.%s%s%s" % (v, p, "." + s if s not in ("", "0") else "", e)


def base_from_tree(path, want):
    """The user's own kernel tree: its objects are borrowed, nothing in it is written."""
    if not git_ok(path, "rev-parse", "--git-dir"):
        raise Failure("KERNEL_TREE=%s is not a git tree; without KERNEL_TREE the source is fetched" % path)
    # The tag; or the branch that `make tree` makes; or what is checked out.
    names = ("v" + want, "base", "HEAD")
    name = next(n for n in names if n == "HEAD" or git_ok(path, "rev-parse", "-q", "--verify", n + "^{commit}"))
    commit = git(path, "rev-parse", name + "^{commit}")
    found = tree_version(git(path, "show", commit + ":Makefile", check=False)) or "no kernel"
    if found.split(".")[:2] != want.split(".")[:2]:
        raise Failure("KERNEL_TREE=%s has no tag v%s, and its %s is %s\n  git -C %s fetch --tags "
                      "(or leave KERNEL_TREE out)" % (path, want, name, found, path))
    if found != want:
        say("  note: KERNEL_TREE is at %s, the series was made on %s" % (found, want))
    base = Base(os.path.join(CACHE, "linux-" + commit[:12]))
    if git_ok(base.repo, "cat-file", "-e", "base^{tree}"):
        return base
    shutil.rmtree(base.dir, ignore_errors=True)
    with step("borrow the base from KERNEL_TREE"), scratch("linux") as tmp:
        src = os.path.join(tmp, "src")
        git(tmp, "init", "-q", "-b", "none", "src")
        objects = git(path, "rev-parse", "--path-format=absolute", "--git-path", "objects")
        with open(src + "/.git/objects/info/alternates", "w", encoding="utf-8") as f:
            f.write(objects + "\n")
        shallow = git(path, "rev-parse", "--path-format=absolute", "--git-path", "shallow")
        if os.path.exists(shallow):
            shutil.copy(shallow, src + "/.git/shallow")
        git(src, "update-ref", "refs/heads/base", commit)
        git(src, "config", "gc.auto", "0")
        run(["git", "-C", src, "checkout", "-q", "--detach", "base"], "base")
        os.replace(tmp, base.dir)
    return base


def fetch_source(want, tmp):
    """The path of an unpacked-to-be archive of the source: Debian's, else kernel.org's."""
    series = ".".join(want.split(".")[:2])
    package = "linux-source-" + series
    archive = "%s/usr/src/%s.tar.xz" % (tmp, package)
    if fetch_deb(package, lambda v: v.split("-")[0] == want, tmp):
        return archive
    if which("curl"):
        path = os.path.join(tmp, "linux.tar.xz")
        url = KERNEL_ORG % (want.split(".")[0], want)
        if run(["curl", "-fsSL", "--retry", "2", "--connect-timeout", "20", "-o", path, url], "base",
               check=False) == 0:
            return path
    if fetch_deb(package, lambda v: v.split("~")[0].split("-")[0].startswith(series), tmp):
        return archive
    raise Failure("no source of Linux %s: no Debian mirror of this machine has it, and kernel.org does "
                  "not answer\n  give a kernel git tree with KERNEL_TREE=path" % want)


def base_from_archive(want):
    """Fetch the source, unpack it and make a git repository of it."""
    base = Base(os.path.join(CACHE, "linux-" + want))
    if git_ok(base.repo, "cat-file", "-e", "base^{tree}"):
        return base
    shutil.rmtree(base.dir, ignore_errors=True)
    with step("fetch and unpack Linux " + want), scratch("linux") as tmp:
        src = os.path.join(tmp, "new", "src")
        os.makedirs(src)
        run(["tar", "-C", src, "--strip-components=1", "--use-compress-program=xz -T0", "-xf",
             fetch_source(want, tmp)], "base", timeout=1800)
        # Debian's package says here that git shall ignore everything; not so in Linux.
        ignore = read(src + "/.gitignore").split("\n#\n# Debian packaging:")[0]
        write(src + "/.gitignore", ignore)
        git(src, "init", "-q", "-b", "base")
        git(src, "config", "gc.auto", "0")
        run(["git", "-C", src, "add", "-A", "-f"], "base")
        run(["git", "-C", src, "commit", "-q", "-m", "Linux " + want], "base",
            env=identity("base", "base@localhost", "2000-01-01T00:00:00Z"))
        git(src, "checkout", "-q", "--detach")
        os.replace(os.path.join(tmp, "new"), base.dir)
    found = tree_version(read(base.repo + "/Makefile"))
    if found != want:
        say("  note: Linux %s stands in for %s, which is nowhere to be had" % (found, want))
    return base


def toolchain():
    """What is there to build with; packages are installed, bindgen is compiled if need be."""
    packages("build")
    lib_src = rust_lib_src()
    directory = bindgen()
    if not directory:
        with step("build bindgen " + BINDGEN):
            directory = build_bindgen()
    return Toolchain(directory, lib_src)


def prepare(*groups, build=True):
    """Everything that is needed before the first command: packages, base, toolchain.

    bindgen is compiled while the source is fetched and unpacked."""
    packages("build" if build else "tree", *groups)
    want = base_version()
    tree = os.environ.get("KERNEL_TREE")
    lib_src = rust_lib_src() if build else None
    directory = bindgen() if build else None
    if tree:
        base = base_from_tree(os.path.abspath(tree), want)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(build_bindgen) if build and not directory else None
        if not tree:
            base = base_from_archive(want)
        if job:
            with step("build bindgen " + BINDGEN):
                directory = job.result()
    return base, Toolchain(directory, lib_src) if build else None
