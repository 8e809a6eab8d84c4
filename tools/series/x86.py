# SPDX-License-Identifier: GPL-2.0
"""`make x86`: the same on x86_64, in QEMU, with huge pages; and mainline's tests of HMM on our driver
and on mainline's own, side by side."""

import contextlib
import functools
import os
import re
import time

import debug
import hmmtests
import mmtests
import prove
from common import HERE, Failure, logfile, read, say, write
from hmmtests import HMM_TESTS
from kernel import COHERENT, COHERENT_TOO, DEMO, HUGE, INSTANCES, KUNIT_MEMORY, MEMMAP, ON_COHERENT, ON_DAX, ON_PCI

OURS, MAINLINE, SAMPLE = "dummy_gpu", "test_hmm", "rust_driver_hmm"
NODE = "/dev/hmm_dmirror0"
TCG = ["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]    # page tables of five levels only take time
KVM = ["-accel", "kvm", "-cpu", "host"]
MEMORY = "4608M"                    # a half below 4 GiB, and up to the end of what COHERENT sets aside
COHERENT_TEST = "_coherent."          # in the names of hmm-tests
TIMEOUT = 900
STAGE = 300                         # seconds for hmm-tests on one driver
# benchmark_thp_migration migrates 256 MiB.
WITH_MEMORY = ",vram_mb=320 %s" % INSTANCES.replace(";", " ")
WITH_SPM = "," + " ".join("spm_addr_dev%d=%#x" % c for c in enumerate(COHERENT))    # test_hmm's name for it
NO_INJECTION = "dummy_gpu_fail_nth_test",   # it wants fault injection, which would count in make bench
# Of dummy_gpu_life_test, and of each storm of dummy_gpu_large_test; the kernel hands them to init.
ROUNDS, SECONDS = "DUMMY_GPU_ROUNDS=5", "DUMMY_GPU_SECONDS=" + (os.environ.get("SECONDS") or "3")
# They run again with whole huge pages.
ON_HUGE = "dmirror_fork_test", "dmirror_race_test", "dummy_gpu_life_test"
# A part of the memory is a device for filesystems, which the host's programs make.
PMEM = "memmap=512M!5G", "DUMMY_GPU_PMEM=/dev/pmem0", "HOST_PROGRAMS=1"
# The controller has memory that other devices might reach.
EDU = ["-device", "edu,dma_mask=0xffffffffffffffff", "-device", "nvme,serial=p2p,cmb_size_mb=64"]
# The IOMMU comes first. With caching-mode, Linux would flush the IOTLB for every page that it maps.
DEVICES = {"x86": EDU, "x86-iommu": ["-device", "intel-iommu,caching-mode=off"] + EDU}


# --- the kernel and the machine ---------------------------------------------------------------------

def checkers():
    return os.environ.get("DEBUG") == "1"


def build(kernels):
    """The name of the kernel: the suites of KUnit, the driver and mainline's as modules [DEBUG=1]."""
    name = "x86_64" + "-debug" * checkers()
    suites = os.path.join(kernels.out, name + ".suites")
    # Memory is sparse anyway, and there is no choice that would have this symbol.
    write(suites, "".join(l for l in read(kernels.kunitconfig()).splitlines(True)
                          if "SPARSEMEM_MANUAL" not in l and "CONFIG_UML_" not in l))
    kernels.build(name, suites, HERE + "/x86.config", *[HERE + "/debug.config"] * checkers(), arch="x86_64")
    return name


def module(kernels, kernel, driver):
    where = {OURS: "drivers/gpu/dummy", MAINLINE: "lib", SAMPLE: "samples/rust"}[driver]
    return os.path.join(kernels.dir(kernel), where, driver + ".ko")


@functools.cache
def accelerator(kernels, kernel):
    """Emulation, unless KVM is wanted and a kernel boots with it: that there is a /dev/kvm says little."""
    if os.environ.get("KVM") == "1":
        try:
            kernels.boot(debug.nothing(kernels), kernel=kernel, machine=functools.partial(qemu, kernels, KVM),
                         modules=[], extra=("kunit.enable=0",), timeout=60, name="x86-kvm")
            return KVM
        except Failure as e:
            say("  (KVM does not work here: %s)" % e.log)
    return TCG


def qemu(kernels, accel, kernel, root, consoles, words, cpus=2, devices=()):
    """The command that boots a kernel: its files come by 9p, its output goes to two consoles."""
    append = ["root=root", "rootfstype=9p", "rootflags=trans=virtio,version=9p2000.L,msize=512000", "rw",
              "init=/init", "console=ttyS0", "panic=-1", "tsc=reliable",
              # Pages that a CPU keeps for itself are not in MemFree, which our tests look at: few of them.
              "sysctl.vm.percpu_pagelist_high_fraction=100000"]
    # The interrupts of "pc" are found by a program of its firmware, which is too slow under KASAN for ACPI.
    line = ["qemu-system-x86_64", "-machine", "q35"] + accel + [
        "-smp", str(cpus), "-m", MEMORY, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-serial", "stdio", "-kernel", os.path.join(kernels.dir(kernel), "arch/x86/boot/bzImage"),
        "-append", " ".join(append + list(words)), *devices]
    for tag, path, more in (("root", root, ""), ("host", "/", ",readonly=on")):
        line += ["-fsdev", "local,id=%s,path=%s,security_model=none,multidevs=remap%s" % (
            tag, path.replace(",", ",,"), more), "-device", "virtio-9p-pci,fsdev=%s,mount_tag=%s" % (tag, tag)]
    # One port for each device, or their order would be left to chance.
    for n, fd in enumerate(consoles):
        line += ["-device", "virtio-serial-pci,id=serial%d,max_ports=1" % n,
                 "-chardev", "file,id=console%d,path=/dev/fd/%d" % (n, fd),
                 "-device", "virtconsole,bus=serial%d.0,chardev=console%d" % (n, n)]
    return line


def boot(kernels, kernel, path, name, args=(), driver=OURS, extra=("kunit.enable=0",), accel=None, cpus=2,
         devices=(), **kw):
    """A program in that kernel with that driver loaded. Returns its status. The CPUs are asserted."""
    modules = [module(kernels, kernel, driver)] if driver else []
    machine = functools.partial(qemu, kernels, accel or accelerator(kernels, kernel), cpus=cpus, devices=devices)
    status = kernels.boot(path, args, kernel=kernel, machine=machine, modules=modules, extra=extra, name=name, **kw)
    if not re.search(r"smp: Brought up \d+ nodes?, %d CPUs?$" % cpus, read(logfile(name)), re.M):
        raise Failure("it did not run on %d CPUs" % cpus, logfile(name), 125)
    return status


def program(kernels, kernel, path, args, timeout):
    """make x86 RUN=path: any static program, with dummy_gpu or DRIVER=test_hmm. Returns its status."""
    driver = os.environ.get("DRIVER") or OURS
    if driver not in (OURS, MAINLINE):
        raise Failure("DRIVER is %s or %s" % (OURS, MAINLINE))
    extra = ["kunit.enable=0"] + ["panic_on_warn=0"] * (driver == MAINLINE)
    status = boot(kernels, kernel, path, "x86", args, driver, extra, timeout=timeout)
    if driver == OURS:
        try:
            quiet(logfile("x86"))
        except Failure as e:
            e.status = 125
            raise
    return status


# --- mainline's tests on both drivers -----------------------------------------------------------------

class Timed:
    """A log that knows when each of its lines came."""

    def __init__(self, path):
        self.file = open(path, "wb")
        self.rest = b""
        self.lines = []

    def write(self, data):
        self.file.write(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.lines += [(time.monotonic(), l.decode(errors="replace")) for l in lines]

    def flush(self):
        self.file.flush()


class Column:
    """What a stage on one driver has come to."""

    def __init__(self, kernels, driver, lines):
        self.end = next((l[3:] for _, l in reversed(lines) if l.startswith("== ")), None)
        path = logfile("x86-%s-%s" % (HMM_TESTS, driver))
        lines = [(t, l) for t, l in lines if not l.startswith("== ")]
        write(path, "".join(l + "\n" for _, l in lines))
        self.results, self.seconds, last = {}, {}, None
        if lines:
            self.results = dict((n.split(".", 1)[1], s) for n, s in kernels.parse_ktap(path, HMM_TESTS))
        for now, line in lines:
            m = re.match(r"(?:not )?ok \d+ (\S+)", line)
            if m:
                self.seconds[m.group(1)] = now - last
            if m or re.match("# +RUN", line):
                last = now

    def cell(self, test):
        status = self.results.get(test)
        return "-" if not status else "%s %6.1f s" % (status, self.seconds.get(test, 0)) if status != "SKIP" else status

    def sum(self):
        # Names of fixture.variant.test: a run that breaks off has one of its own.
        results = [s for n, s in self.results.items() if n.count(".") == 2]
        count = results.count("PASS"), results.count("SKIP")
        return "%d passed, %d failed, %d skipped" % (count[0], len(results) - sum(count), count[1])


def columns(kernels, lines):
    """The output of stages.c, by stage."""
    parts = []
    for when, line in lines:
        if line in ("== " + OURS, "== " + MAINLINE):
            parts.append([])
        elif parts:
            parts[-1].append((when, line))
    parts += [[], [], []]
    return [Column(kernels, n, part) for n, part in zip((OURS, MAINLINE, MAINLINE + "-coherent"), parts)]


def warnings(text):
    return [l.strip() for l in text.splitlines() if debug.REPORT.search(l)]


def quiet(log):
    """The kernel said nothing that it should not have to, and its checkers found nothing."""
    found = warnings(read(log))
    if found:
        raise Failure("%d reports, the first: %s" % (len(found), found[0]), log)
    if checkers():
        debug.clean(log)


def prefix():
    """Of a test's name: what is skipped under the checkers is so for their sake."""
    return "debug:" if checkers() else "x86:"


def upstream(tally, kernels, kernel, tests):
    """hmm-tests in one boot: dummy_gpu, where a warning is a panic, and then test_hmm, where it is not. The
    kernel may not survive test_hmm with coherent memory, so that comes last, with mainline's own tests."""
    everything, log = hmmtests.names(kernels.src), logfile("x86-" + HMM_TESTS)
    ours = mainline = None
    later, note = {}, ""
    with tally.test("x86: %s, %s and then %s" % (HMM_TESTS, OURS, MAINLINE)):
        later = hmmtests.listed("x86-skips", everything)
        stages = kernels.static("stages")
        names = hmmtests.arguments(everything, later)
        host = "/host" + tests
        own = hmmtests.names(kernels.src, "base")
        args = [str(STAGE), "/host" + module(kernels, kernel, OURS) + WITH_MEMORY, NODE, host] + names + [
            "--", "-/host" + module(kernels, kernel, MAINLINE), NODE, host,
            "--", "-/host" + module(kernels, kernel, MAINLINE) + WITH_SPM, NODE, host] + hmmtests.arguments(
                [t for t in own if COHERENT_TEST in t], ())
        out = Timed(logfile("x86-%s-output" % HMM_TESTS))
        with contextlib.closing(out.file), open(logfile("x86-%s-errors" % HMM_TESTS), "wb") as err:
            try:
                boot(kernels, kernel, stages, "x86-" + HMM_TESTS, args, driver=None, out=out, err=err,
                     extra=("kunit.enable=0",) + MEMMAP, timeout=TIMEOUT)
            except Failure as e:
                note = ", " + str(e)
        ours, mainline, coherent = columns(kernels, out.lines)
        before, _, after = read(log).partition("== %s\n" % MAINLINE)
        found = warnings(after)
        if warnings(before):
            raise Failure("with %s: %s" % (OURS, warnings(before)[0]), log)
        if ours.end not in ("exit 0", "exit 1"):
            raise Failure("%s: %s" % (OURS, ours.end or "no end" + note), log)
        if not mainline.results:
            raise Failure("%s: %s, and no result" % (MAINLINE, mainline.end or "no end" + note), log)
    if not ours:
        return
    say("    %-52s %-14s %s" % ("", OURS, MAINLINE))
    for test in everything:
        say("    %-52s %-14s %s" % (test, "later" if test in later else ours.cell(test),
                                     (coherent if COHERENT_TEST in test else mainline).cell(test)))
    say("    %s: %s; %s: %s; with coherent memory: %s%s" % (
        OURS, ours.sum(), MAINLINE, mainline.sum(), coherent.sum(), note))
    own = [t for t in own if t in ours.results]
    say("    of mainline's own %d tests, %d pass on %s" % (
        len(own), sum(ours.results[t] == "PASS" for t in own), OURS))
    if found:
        say("    %s: %d warnings of the kernel, the first: %s" % (MAINLINE, len(found), found[0]))
    hmmtests.tell(tally, later)
    for test in everything if ours.results else ():
        if test not in later:
            tally.add("%s%s:%s" % (prefix(), HMM_TESTS, test), ours.results.get(test, "NO RESULT"))
    # What the series fixes in mm has to be fixed for the driver in C too.
    for test in hmmtests.added(kernels.src):
        tally.add("%s%s:%s" % (prefix(), MAINLINE, test), mainline.results.get(test, "NO RESULT"))
    for name in ours.results.keys() - set(everything):
        tally.add("%s%s:%s" % (prefix(), HMM_TESTS, name), ours.results[name])


# --- ours ---------------------------------------------------------------------------------------------

def kunit(tally, kernels, kernel):
    log, results = logfile("x86-kunit"), []
    with tally.test("x86: KUnit"):
        boot(kernels, kernel, debug.nothing(kernels), "x86-kunit", extra=("kunit.enable=1",) + MEMMAP + KUNIT_MEMORY,
             timeout=TIMEOUT)
        results = debug.kunit_results(kernels, read(log))
        quiet(log)
    tally.results(prefix() + "kunit:", results)
    say("    %d results" % len(results))


def mutants(tally, base, head, kernels, worktree):
    """Those whose tests need huge pages: one after the other."""
    log, kernel = logfile("x86-mutant"), None

    def kunit_run(test):
        try:
            boot(kernels, kernel, debug.nothing(kernels), "x86-mutant",
                 extra=("kunit.enable=1", "kunit.filter_glob=" + test), timeout=3 * prove.MUTANT_TIMEOUT)
        except Failure as e:
            if e.status not in (124, 125):      # the kernel went down, or hung
                raise
            return [], read(log)
        return debug.kunit_results(kernels, read(log)), read(log)

    files = prove.sample(prove.mutant_files(huge=True), head)
    if not files:
        return
    named, passed = prove.named_by(files), False
    with tally.test("x86: without a mutant, all %d tests that they name pass" % len(named)):
        worktree(base, "src", head)
        kernel = build(kernels)
        prove.all_pass(named, dict(kunit_run(prove.HUGE + "*")[0]), log)
        passed = True
    for path in files if passed else ():
        with tally.test("x86: mutant: " + os.path.basename(path)[:-5]):
            prove.apply(worktree(base, "src", head), path)
            build(kernels)
            prove.notices(path, kunit_run, log)
    worktree(base, "src", head)


def mm_boot(kernels, kernel, program, args, log, f):
    """A boot for mainline's mm tests."""
    status = boot(kernels, kernel, program, log, args, out=f, err=f, extra=("kunit.enable=0", "numa=fake=2"),
                  timeout=mmtests.TIMEOUT)
    quiet(logfile(log))
    return status


def x86(tally, kernels):
    kernel = directory = None
    with tally.test("x86: the kernel builds"):
        kernel = build(kernels)
    if not kernel:
        return
    with tally.test("x86: the programs build"):
        directory, names = kernels.programs()
        names = [n for n in names + list(HUGE) if checkers() or n not in NO_INJECTION]
        tests = hmmtests.build(kernels)
    kunit(tally, kernels, kernel)
    if not directory:
        return
    upstream(tally, kernels, kernel, tests)
    # They take eleven minutes.
    if os.environ.get("MM") == "1":
        with mmtests.mm_tests(tally, kernels, "x86", functools.partial(mm_boot, kernels, kernel)):
            pass
    for tier, programs, words in (
            ("x86", names, ()), ("x86-huge", ON_HUGE, ("DUMMY_GPU_HUGE=1",)), ("x86-dax", ON_DAX, PMEM),
            ("x86-coherent", COHERENT_TOO, ON_COHERENT)):
        for name in programs:
            kernels.selftest(
                tally, tier, name, prefix=prefix().replace("x86", tier), look=quiet,
                boot=lambda log, f: boot(kernels, kernel, os.path.join(directory, name), log, out=f, err=f,
                                         extra=("kunit.enable=0", "numa=fake=2", ROUNDS, SECONDS) + words,
                                         timeout=TIMEOUT))
    for tier, devices in DEVICES.items():
        for name in ON_PCI:
            kernels.selftest(
                tally, tier, name, prefix=prefix().replace("x86", tier), look=quiet,
                boot=lambda log, f: boot(kernels, kernel, os.path.join(directory, name), log, driver=SAMPLE, out=f,
                                         err=f, devices=devices, timeout=TIMEOUT))
    with tally.test("x86: the demo"):
        log = logfile("x86-demo-output")
        with open(log, "wb") as f:
            status = boot(kernels, kernel, os.path.join(directory, DEMO), "x86-demo",
                          ["/host%s/vmlinux" % kernels.dir(kernel)], out=f, err=f, timeout=TIMEOUT)
        if status:
            raise Failure("the demo ended with status %d" % status, log)
