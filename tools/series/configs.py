# SPDX-License-Identifier: GPL-2.0
"""`make configs`: however it is configured, and whatever compiles it, the series builds without a warning.

configs/ has the configuration of each build: what is not in it is off. Each stands for several
things at once, so that few of them have every pair: x86_64 and UML, clang and gcc, the newest rustc
and the oldest that the kernel takes, SMP and not, and each option of the series."""

import copy
import glob
import os
import re

import machine
from audit import exports
from check import findings
from common import CACHE, HERE, Failure, fail_if, logfile, output, read, run, scratch, write
from kernel import Kernels

CRATE, DRIVER = "mm/hmm/", "drivers/gpu/dummy/"
GCC = "C=1 prepare mm/hmm.o %s %s" % (CRATE, DRIVER)
C_UM = " ".join("arch/um/%s.o" % f for f in ("kernel/mem", "kernel/physmem", "kernel/um_arch", "kernel/vmemmap",
                                             "kernel/vmemmap_kunit", "os-Linux/mem"))

# Configuration, directory, ARCH, compiler, rustc, what is built. Builds in one directory differ in
# little, and only what that changes is compiled anew. UML with clang and the newest rustc is what
# everything else here uses. "oldest" has the same LLVM as that clang.
BUILDS = (
    ("x86_64", "x86_64", "x86_64", "clang", "oldest", "prepare vmlinux modules"),
    ("x86_64-gcc-off", "x86_64-gcc", "x86_64", "gcc", "newest", "C=1 prepare drivers/gpu/"),
    ("x86_64-gcc-nodevice", "x86_64-gcc", "x86_64", "gcc", "newest", GCC),
    ("x86_64-gcc-device", "x86_64-gcc", "x86_64", "gcc", "newest", GCC + " mm/migrate_device.o"),
    ("um-gcc", "um-gcc", "um", "gcc", "newest", "C=1 prepare mm/migrate_device.o " + C_UM),
)

# What has to be there afterwards, where the option is on.
MADE = {
    "CONFIG_RUST": ("rust/kernel.o",),
    "CONFIG_RUST_HMM": ("rust/hmm.o", "mm/hmm/exports.o"),
    "CONFIG_DUMMY_GPU": (DRIVER + "dummy_gpu.o",),
    "CONFIG_SAMPLE_RUST_DRIVER_HMM": ("samples/rust/rust_driver_hmm.o",),
    "CONFIG_UML_VMEMMAP_KUNIT_TEST": ("arch/um/kernel/vmemmap_kunit.o", "arch/um/kernel/vmemmap.o"),
}
OURS = re.compile(r"hmm|dummy_gpu|um_vmemmap|migrate_device")

# Debian's rustc, and what it is linked to; a sparse that knows what the kernel needs, from a newer suite
OLDEST = ".".join(map(str, machine.RUSTC_MIN[:2]))
SUITE = "trixie"
DEBS = ("rustc rust-src libstd-rust-dev libstd-rust-%s libllvm19 libc6 libgcc-s1 libstdc++6 libffi8 libedit2 "
        "libz3-4 zlib1g libzstd1 libxml2 libtinfo6 libbsd0 libmd0 libicu76 liblzma5" % OLDEST).split()
SPARSE_MIN = (0, 6, 5)
WRAPPER = """#!/bin/sh
lib={0}/usr/lib/x86_64-linux-gnu
exec $lib/ld-linux-x86-64.so.2 --library-path $lib --argv0 {0}/usr/bin/{1} {0}/usr/bin/{1} "$@"
"""


def old_tools():
    """A directory of the cache, with Debian's rustc of that version and a new sparse, and with the C
    library that they want: bin/ starts them with that."""
    root = os.path.join(CACHE, "rustc-" + OLDEST)
    if os.path.exists(root):
        return root
    uris = machine.mirrors()
    if not uris:
        raise Failure("there is no Debian mirror to have rustc %s and sparse from" % OLDEST)
    with scratch("rustc") as tmp:
        options = machine.apt_options(os.path.join(CACHE, "apt", SUITE), SUITE, uris)
        run(["apt-get", "-q"] + options + ["update"], "fetch-rustc", timeout=600)
        run(["apt-get", "-q"] + options + ["download"] + DEBS, "fetch-rustc", cwd=tmp, timeout=1800)
        for deb in glob.glob(tmp + "/*.deb"):
            run(["dpkg-deb", "-x", deb, tmp], "fetch-rustc", timeout=600)
            os.unlink(deb)
        machine.fetch_deb("sparse", lambda v: machine.version(v) >= SPARSE_MIN, tmp)
        for path in glob.glob(tmp + "/usr/src/rustc-*/*"):
            if not path.endswith("/library"):
                run(["rm", "-rf", path], "fetch-rustc")
        for tool in ("rustc", "rustdoc", "sparse"):
            write("%s/bin/%s" % (tmp, tool), WRAPPER.format(root, tool))
            os.chmod("%s/bin/%s" % (tmp, tool), 0o755)
        os.replace(tmp, root)
    return root


def with_tools(kernels, compiler, rustc):
    """The builds of the same tree with other tools."""
    tc = copy.copy(kernels.tc)
    root = old_tools()
    tc.make = ["LLVM=-%d" % machine.LLVM_TRIED] if compiler == "clang" else []
    # Inline functions that nobody calls are none of sparse's business; what Rust's helpers are for bindgen, is.
    tc.make += ["CHECK=%s/bin/sparse" % root, "CF=-D__BINDGEN__ -Wno-decl -gcc-base-dir %s" % output(
        "gcc", "-print-file-name=")]
    if rustc == "oldest":
        tc.make += ["RUSTC=%s/bin/rustc" % root, "RUSTDOC=%s/bin/rustdoc" % root]
        tc.env = dict(tc.env, RUST_LIB_SRC=glob.glob(root + "/usr/src/rustc-*/library")[0])
    return Kernels(kernels.src, tc, kernels.out)


def configure(kernels, directory, arch, fragment, log):
    """A .config with what is in the fragment and what that selects; every line of it has to hold."""
    kernels.make(directory, "allnoconfig", "KCONFIG_ALLCONFIG=" + fragment, arch=arch, log=log,
                 what="the configuration")
    have = read(kernels.dir(directory) + "/.config").splitlines()
    wanted = [l for l in read(fragment).splitlines() if l.startswith(("CONFIG_", "# CONFIG_"))]
    fail_if(["%s does not hold" % l for l in wanted if l not in have and
             not (l.endswith("not set") and not any(h.startswith(l.split()[1] + "=") for h in have))], logfile(log))
    return have


def forget(out, changes):
    """Removes what was compiled of ours, or its warnings would not be seen again."""
    for path in [f for files in MADE.values() for f in files] + [f[:-2] + ".o" for f in changes.files(".c")] + \
            glob.glob(DRIVER + "*.o", root_dir=out):
        if os.path.exists(os.path.join(out, path)):
            os.unlink(os.path.join(out, path))


def warnings(log, src, changes):
    """Of the compilers and sparse in lines of ours; of other tools, which name no line, about what is ours."""
    text = read(log)
    tools = re.compile(r"(?!\$ |\S+:\d+:).*\b(warning|error)\b", re.I)
    return list(dict.fromkeys(findings(text, src, changes) + [
        l.strip() for l in text.splitlines() if tools.match(l) and (OURS.search(l) or "srctree/ link" in l)]))


def build(kernels, changes, name, directory, arch, targets):
    """One configuration: all that it has of ours is compiled, and nothing warns."""
    log, fragment = "config-" + name, HERE + "/configs/%s.config" % name
    if os.path.exists(logfile(log)):
        os.unlink(logfile(log))
    config = configure(kernels, directory, arch, fragment, log)
    out = kernels.dir(directory)
    forget(out, changes)
    kernels.make(directory, *targets.split(), arch=arch, log=log, what="the build")
    on = {l.split("=")[0] for l in config if l.endswith(("=y", "=m"))}
    problems = ["%s: not made" % f for symbol in MADE for f in MADE[symbol]
                if symbol in on and not os.path.exists(os.path.join(out, f))]
    if "C=1" in targets.split():
        problems += ["%s: sparse has not seen it" % c for c in changes.files(".c") if os.path.exists(
            os.path.join(out, c[:-2] + ".o")) and not re.search("^  CHECK +%s$" % c, read(logfile(log)), re.M)]
    fail_if(problems + warnings(logfile(log), kernels.src, changes), logfile(log))


def versions(kernels, directory):
    """Every export of the crate has the version of its type."""
    have = dict(re.findall(r"^#SYMVER (\w+) (0x\w+)", read(kernels.dir(directory) + "/mm/hmm/.exports.o.cmd"), re.M))
    fail_if(["%s: version %s" % (e, have.get(e)) for e in exports(kernels.src) if int(have.get(e, "0"), 16) == 0])


def header(kernels, directory, arch):
    """What CONFIG_UAPI_HEADER_TEST does, of our header only: it would take a minute for all."""
    test = "usr/include/linux/dummy_gpu.hdrtest"
    path = os.path.join(kernels.dir(directory), test)
    if os.path.exists(path):
        os.unlink(path)
    kernels.make(directory, "headers", arch=arch, log="config-header", what="the headers")
    kernels.make(directory, "--eval=.header: ; $(if $(build),$(Q)$(MAKE) $(build)=usr/include %s)" % test, ".header",
                 arch=arch, log="config-header", what="the test of dummy_gpu.h")
    if not os.path.exists(path):
        raise Failure("dummy_gpu.h was not tested", logfile("config-header"))


def rustdoc(kernels, changes, directory, arch):
    """The crate's pages are made without a warning, and lead to those of the crate kernel."""
    log = "config-rustdoc"
    if os.path.exists(logfile(log)):
        os.unlink(logfile(log))
    kernels.make(directory, "rustdoc", arch=arch, log=log)
    fail_if(warnings(logfile(log), kernels.src, changes), logfile(log))
    pages = os.path.join(kernels.dir(directory), "Documentation/output/rust/rustdoc/hmm")
    if not any('href="../kernel/' in read(p) for p in glob.glob(pages + "/*.html")):
        fail_if(["no page in %s leads to the crate kernel" % pages])


def configurations(tally, kernels, changes):
    for name, directory, arch, compiler, rustc, targets in BUILDS:
        directory = "config-" + directory
        with tally.test("config: " + name):
            k = with_tools(kernels, compiler, rustc)
            build(k, changes, name, directory, arch, targets)
        if name == "x86_64":
            with tally.test("config: the header for user space"):
                header(k, directory, arch)
        if name == "x86_64-gcc-device":
            with tally.test("config: the exports have versions"):
                versions(k, directory)
        if name in ("x86_64-gcc-nodevice", "x86_64-gcc-device"):
            with tally.test("config: rustdoc, " + name):
                rustdoc(k, changes, directory, arch)
