# SPDX-License-Identifier: GPL-2.0
"""Build kernels and programs from a tree, run KUnit, boot UML. kbuild and kunit.py do the work."""

import contextlib
import glob
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading

from common import (HERE, JOBS, KILLED, RUNNING, Failure, duration, git_ok, kill_group, logfile, output, read,
                    run, scratch, write)

SELFTESTS = "tools/testing/selftests/hmm"
DEMO = "dummy_gpu_demo"
ON_PCI = ("rust_driver_hmm_test",)  # they need a device that only QEMU has
HUGE = ("dummy_gpu_large_test",)    # they need huge pages, which UML does not have
ON_DAX = ("dummy_gpu_dax_test",)    # they need a filesystem on memory of the machine
COHERENT_TOO = ("dmirror_fork_test", "dmirror_race_test", "dummy_gpu_life_test",
                "dummy_gpu_atomic_test")    # they run again with device memory that the CPU reaches
KUNITCONFIG = "mm/hmm/.kunitconfig"
SAFETY = ("panic_on_warn=1", "oops=panic")     # on every boot
# The memory of two devices that the CPU reaches: the addresses of 256 MiB each.
COHERENT = 0x180000000, 0x190000000
MEMMAP = tuple("memmap=256M$%#x" % start for start in COHERENT)
INSTANCES = ";".join("coherent%d=%#x" % pair for pair in enumerate(COHERENT))   # for dummy_gpu
WITH_COHERENT = MEMMAP + ("MODULE_PARAMETERS=" + INSTANCES,)
ON_COHERENT = MEMMAP + ("MODULE_PARAMETERS=coherent_mb=64;" + INSTANCES, "DUMMY_GPU_COHERENT=" + INSTANCES)
KUNIT_MEMORY = "hmm_kunit.memory=%#x" % COHERENT[0],
BOOT_TIMEOUT = 300
REPORTS = ("kmemleak", "lockdep_stats")        # what init leaves of a kernel that has checkers


class Kernels:
    """The builds of one source tree. Each has its directory, and is built incrementally."""

    def __init__(self, src, toolchain, out):
        self.src = src
        self.tc = toolchain
        self.out = out
        self.images = itertools.cycle(("kunit-image-0", "kunit-image-1"))
        self.entered = set()
        self.building_static = threading.Lock()

    def dir(self, name):
        path = os.path.join(self.out, name)
        os.makedirs(path, exist_ok=True)
        return path

    def mark(self, name):
        """What the last make in a build directory has left, if it ended and its files are on the disk."""
        return os.path.join(self.out, name + ".whole")

    def trust(self, name):
        """A make that was killed, or whose files did not reach the disk before the machine went down,
        leaves files that are empty and newer than what they are made of. So a directory without the
        mark is built anew, when this process first comes to it."""
        if name not in self.entered and not os.path.exists(self.mark(name)):
            shutil.rmtree(self.dir(name))
            self.dir(name)
        self.entered.add(name)

    @contextlib.contextmanager
    def building(self, name):
        """Around each make in a build directory."""
        self.trust(name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.mark(name))
        try:
            yield
        except Failure as e:
            if e.status != KILLED:
                self.leave(name)
            raise
        self.leave(name)

    def leave(self, name):
        os.sync()
        write(self.mark(name), "")

    def make(self, name, *args, log=None, arch="um", check=True, timeout=3600, what=None):
        """make in the build directory of that name."""
        command = ["make", "-C", self.src, "O=" + self.dir(name), "ARCH=" + arch, "-j" + JOBS]
        with self.building(name):
            return run(command + self.tc.make + list(args), log or "build-" + name, env=self.tc.env,
                       timeout=timeout, check=check, what=what or "the build of " + name)

    def configure(self, name, *fragments, arch="um"):
        """A .config from fragments; every line of them has to hold. What is in none of them has its
        default in UML, and is off elsewhere: there is too much of it."""
        self.trust(name)
        text = "".join(read(f) for f in fragments)
        config = os.path.join(self.dir(name), ".config")
        mark = os.path.join(self.dir(name), "fragment")
        target = ["olddefconfig"] if arch == "um" else ["allnoconfig", "KCONFIG_ALLCONFIG=" + mark]
        if not os.path.exists(config) or not os.path.exists(mark) or read(mark) != text:
            write(config, text)
            write(mark, text)
        self.make(name, *target, arch=arch, what="the configuration of " + name)
        if self.missing(config, text):
            # The tree may not have known a symbol yet when this was configured.
            write(config, text)
            self.make(name, *target, arch=arch, what="the configuration of " + name)
            for line in self.missing(config, text):
                raise Failure("%s does not hold in %s" % (line, config))

    def missing(self, config, text):
        """The lines of the fragments that do not hold, but those for symbols that the tree has not."""
        have = set(read(config).splitlines())
        wanted = {}
        for line in text.splitlines():
            m = re.match(r"(?:# )?(CONFIG_\w+)(=| is not set)", line)
            if m:
                wanted[m.group(1)] = line
        return [line for symbol, line in wanted.items() if line not in have and
                not (re.search(r"=n$|not set$", line) and not any(h.startswith(symbol + "=") for h in have)) and
                git_ok(self.src, "grep", "-qE", r"^\s*(menu)?config %s$" % symbol[7:], "--", "*Kconfig*")]

    def build(self, name, *fragments, arch="um"):
        self.configure(name, *fragments, arch=arch)
        self.make(name, arch=arch)
        return os.path.join(self.dir(name), "linux" if arch == "um" else "arch/x86/boot/bzImage")

    def demo_kernel(self):
        return self.build("um", HERE + "/um.config")

    # --- KUnit --------------------------------------------------------------------------------------

    def kunitconfig(self):
        own = os.path.join(self.src, KUNITCONFIG)
        return own if os.path.exists(own) else HERE + "/kunit.config"

    def kunit_dir(self):
        """One directory for each of the two configurations: going from one to the other in a
        bisection would compile nearly everything anew."""
        return self.dir("kunit" if self.kunitconfig().startswith(self.src) else "kunit-before")

    def kunit_py(self, command, *args, log, timeout, check=True, what=None, build_dir=None):
        return run([sys.executable, os.path.join(self.src, "tools/testing/kunit/kunit.py"), command,
                    "--arch=um", "--build_dir=" + (build_dir or self.kunit_dir())] + list(args), log, cwd=self.src,
                   env=self.tc.env, timeout=timeout, check=check, what=what)

    def kunit_um(self):
        """The lines for the suite of arch/um, which no kunitconfig for all architectures can have."""
        if not os.path.exists(os.path.join(self.src, "arch/um/kernel/vmemmap_kunit.c")):
            return []
        return ["CONFIG_%s=y" % s for s in ("SPARSEMEM_MANUAL", "MEMORY_HOTPLUG", "MEMORY_HOTREMOVE", "ZONE_DEVICE",
                                            "DEVICE_PRIVATE", "UML_VMEMMAP_KUNIT_TEST")]

    def kunit_build(self):
        with self.building(os.path.basename(self.kunit_dir())):
            self.kunit_py("build", "--kunitconfig=" + self.kunitconfig(), "--jobs=" + JOBS,
                          *("--kconfig_add=" + line for line in ["CONFIG_LOCALVERSION_AUTO=n"] + self.kunit_um()),
                          *("--make_options=" + m for m in self.tc.make), log="build-kunit", timeout=3600,
                          what="the build of the KUnit kernel")

    def kunit_image(self):
        """A copy of the KUnit kernel, to be booted while the next is built: one of two."""
        return self.copy(os.path.basename(self.kunit_dir()), next(self.images))

    def copy(self, name, to):
        """A directory with a copy of a kernel of UML, to be booted while that kernel is built anew."""
        path = self.dir(to)
        # Not over one that somebody still runs.
        shutil.copy(os.path.join(self.dir(name), "linux"), os.path.join(path, "linux.new"))
        os.replace(os.path.join(path, "linux.new"), os.path.join(path, "linux"))
        return path

    def kunit_run(self, pattern=None, timeout=BOOT_TIMEOUT, image=None):
        """Boot the KUnit kernel: [(suite.test, PASS|FAIL|SKIP|ERROR)], and the kernel's log."""
        log = os.path.join(image or self.kunit_dir(), "test.log")
        with scratch("kunit") as tmp:
            result = os.path.join(tmp, "result.json")
            status = self.kunit_py("exec", "--json=" + result, "--timeout=%d" % timeout,
                                   *("--kernel_args=" + a for a in SAFETY + MEMMAP + KUNIT_MEMORY), *([pattern] if pattern else []),
                                   log="kunit", timeout=timeout + 60, check=False, build_dir=image)
            if not os.path.exists(result):
                raise Failure("kunit.py gave no result", log if os.path.exists(log) else logfile("kunit"))
            results, broken = flatten(json.loads(read(result)))
        text = read(log)
        if broken or "Kernel panic" in text or (status and all(s in ("PASS", "SKIP") for _, s in results)):
            results.append(("kunit.the-run-itself", "ERROR"))
        return results, text

    def parse_ktap(self, path, program):
        """The results in a program's output, as kunit.py reads them."""
        with scratch("ktap") as tmp:
            result = os.path.join(tmp, "result.json")
            run([sys.executable, os.path.join(self.src, "tools/testing/kunit/kunit.py"), "parse",
                 "--json=" + result, path], "kunit-parse", cwd=self.src, check=False, timeout=60)
            if not os.path.exists(result):
                return [(program + ".no-result", "ERROR")]
            results, broken = flatten(json.loads(read(result)), program)
        return results + ([(program + ".the-run-itself", "ERROR")] if broken else [])

    # --- programs ------------------------------------------------------------------------------------

    def programs(self, *options):
        """Build what is in the series' selftests; returns (directory, names that print KTAP)."""
        out = self.dir("selftests")
        where = os.path.join(self.src, SELFTESTS)
        if not os.path.exists(where + "/Makefile"):
            raise Failure("the series brings no %s" % SELFTESTS)
        self.make("headers", "headers", arch="x86_64", what="the uapi headers")
        command = ["make", "-C", where, "OUTPUT=" + out, "LDFLAGS=-static"] + self.tc.make + [
            "KHDR_INCLUDES=-isystem %s/usr/include" % self.dir("headers")]
        run(command + list(options), "build-selftests", env=self.tc.env, what="the build of the selftests")
        names = output(*command, "-s", "--eval=series-print: ; @echo $(TEST_GEN_PROGS)", "series-print",
                       env=self.tc.env).split()
        return out, [n for n in map(os.path.basename, names) if n not in (DEMO,) + ON_PCI + HUGE + ON_DAX]

    def modules(self, kernel):
        return glob.glob(self.dir(kernel) + "/drivers/gpu/dummy/*.ko")

    def static(self, name, *options):
        """A static program of the harness's own, such as init, which is PID 1."""
        path, source = os.path.join(self.dir("init"), name), "%s/%s.c" % (HERE, name)
        # Boots run beside boots, and the first of them needs it built.
        with self.building_static:
            # By contents: another clone may have built it, from another version, since.
            if not os.path.exists(path + ".c") or read(path + ".c") != read(source):
                run([self.tc.cc, "-static", "-O2", "-Wall", "-Wextra", "-Werror", *options, "-o", path + ".new",
                     source], "build-init", what="the build of " + name)
                os.replace(path + ".new", path)
                write(path + ".c", read(source))
        return path

    def boot(self, program, args=(), out=None, err=None, timeout=BOOT_TIMEOUT, name="boot", extra=(), kernel="um",
             machine=None, modules=None):
        """Boot the demo kernel, or another, with its modules and run a static program in it.

        Its output goes to the given binary files as it comes. Returns its exit status, 128 plus
        the signal that ended it. A kernel that does not get that far is a Failure: status 125, or
        124 when it was the time that ran out. What the kernel's checkers have found by the end is
        at the end of its log. The machine is what gives the command that boots."""
        program = os.path.abspath(program)
        if not os.access(program, os.X_OK):
            raise Failure("%s is no program" % program, status=126)
        log = logfile(name)
        with scratch("boot") as tmp:
            root = os.path.join(tmp, "root")
            for d in ("proc", "sys", "dev", "tmp", "host", "modules"):
                os.makedirs(os.path.join(root, d))
            shutil.copy(self.static("init"), root + "/init")
            for module in self.modules(kernel) if modules is None else modules:
                shutil.copy(module, root + "/modules/")
            write(root + "/argv", "".join(a + "\0" for a in
                                          ["/host" + os.getcwd(), "/host" + program] + list(args)))
            self._boot(machine or self.uml, kernel, tmp, log, out or sys.stdout.buffer, err or sys.stderr.buffer,
                       timeout, SAFETY + tuple(extra))
            for name in REPORTS:
                if os.path.exists(root + "/" + name):
                    with open(log, "a", encoding="utf-8") as f:
                        f.write("== %s\n%s" % (name, read(root + "/" + name)))
            try:
                how, value = read(root + "/status").split(None, 1)
            except (OSError, ValueError):
                raise Failure("the kernel went down before %s ended" % os.path.basename(program), log, 125)
        if how == "init":
            raise Failure("before the program: " + value.strip(), log, 125)
        return int(value) + (128 if how == "signal" else 0)

    def selftest(self, tally, tier, name, boot, look=None, prefix=""):
        """A program in a boot of its own, which boot(log, output) makes; what it prints is read as
        KTAP. look(log) is for what the kernel has said."""
        log, results = "%s-%s" % (tier, name), []
        output = logfile(log + "-output")
        with tally.test("%s: selftest %s" % (tier, name)):
            with open(output, "wb") as f:
                status = boot(log, f)
            results = self.parse_ktap(output, name)
            if look:
                look(logfile(log))
            if status not in (0, 4) and all(s in ("PASS", "SKIP") for _, s in results):
                raise Failure("it ended with status %d" % status, output)
        tally.results(prefix + "selftest:", results, output)

    def uml(self, kernel, root, consoles, words):
        """The command that boots a kernel of UML; its two consoles are file descriptors."""
        return [os.path.join(self.dir(kernel), "linux"), "mem=2G", "root=none", "rootfstype=hostfs",
                "rootflags=" + root, "rw", "init=/init", "con0=null,fd:%d" % consoles[0],
                "con1=null,fd:%d" % consoles[1], "con=null", "console=ttyS0", "ssl0=null,fd:1",
                "ssl=null"] + list(words)

    def _boot(self, machine, kernel, tmp, log, out, err, timeout, words):
        # The consoles are files: QEMU drops what a pipe does not take at once.
        paths = [os.path.join(tmp, n) for n in ("out", "err")]
        with contextlib.ExitStack() as stack:
            consoles = [stack.enter_context(open(p, "ab")).fileno() for p in paths]
            command = machine(kernel, tmp + "/root", consoles, words)
            with open(log, "wb") as f:
                f.write((" ".join(command) + "\n").encode())
                f.flush()
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=f, cwd=tmp,
                                           env=self.tc.env, start_new_session=True, pass_fds=consoles)
        RUNNING.add(process)
        ended = threading.Event()
        threads = [threading.Thread(target=follow, args=(p, to, ended), daemon=True)
                   for p, to in zip(paths, (out, err))]
        for t in threads:
            t.start()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Failure("the boot did not end within %s" % duration(timeout), log, KILLED)
        finally:
            kill_group(process)
            RUNNING.discard(process)
            ended.set()
            for t in threads:
                t.join(10)


def follow(path, to, ended):
    """What is written to a file goes on to another as it comes."""
    with open(path, "rb", buffering=0) as f:
        last = False
        while not last:
            last = ended.wait(0.05)
            for data in iter(lambda: f.read(65536), b""):
                with contextlib.suppress(BrokenPipeError):
                    to.write(data)
                    to.flush()


def flatten(group, prefix=None):
    """The tests in kunit.py's JSON as [(suite.test, status)], and whether the output was broken."""
    results = []

    def walk(g, path):
        for case in g["test_cases"]:
            results.append((".".join(path + [case["name"] or "(crashed)"]), case["status"]))
        for sub in g["sub_groups"]:
            walk(sub, path + [sub["name"]])

    walk(group, [prefix] if prefix else [])
    return results, bool(group["misc"]["errors"]) or not results
