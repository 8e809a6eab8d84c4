# SPDX-License-Identifier: GPL-2.0
"""`make debug`: KUnit and the selftests under the kernel's checkers, each of which first finds a
bug that is planted for it."""

import concurrent.futures
import glob
import os
import re
import time

from common import HERE, Failure, logfile, read, run, write
from kernel import KUNIT_MEMORY, MEMMAP, ON_COHERENT
from prove import apply, diff_of

PLANTED = os.path.join(HERE, "planted")
KERNEL, BROKEN = "debug", "debug-planted"
SMP = ("ncpus=2", "seccomp=on")     # UML has a second CPU with both only
TIMEOUT = 900
NO_KMEMLEAK = ("dmirror_fork_test",)    # it takes twice the time there; what it allocates, dmirror_test does too
ON_COHERENT_TOO = "dmirror_race_test", "dummy_gpu_life_test"     # the others would take three minutes more
ROUNDS = "DUMMY_GPU_ROUNDS=10"      # of dummy_gpu_life_test; the kernel hands it to init

# What a checker, or lockdep that gives up, leaves in the log. Not all of them panic.
REPORT = re.compile(r"BUG:|WARNING:|KASAN:|UBSAN:|DEBUG_LOCKS_WARN_ON|VM_(BUG|WARN)_ON"
                    r"|INFO: (possible|trying|rcu|task|lockdep)|suspicious RCU usage"
                    r"|turning off the locking correctness validator")


def debug_kernel(kernels):
    """KUnit's suites and the driver as a module in one kernel, with all checkers."""
    return kernels.build(KERNEL, kernels.kunitconfig(), HERE + "/um.config", HERE + "/um-smp.config",
                         HERE + "/debug.config")


def boot(kernels, program, name, extra, out=None, kernel=KERNEL):
    """Returns the program's status. Two CPUs are asserted."""
    status = kernels.boot(program, out=out, err=out, name=name, timeout=TIMEOUT, extra=SMP + tuple(extra),
                          kernel=kernel)
    if not re.search(r"smp: Brought up 1 node, 2 CPUs", read(logfile(name))):
        raise Failure("it ran on one CPU", logfile(name))
    return status


def leaks(text):
    """What kmemleak has found, but for what was allocated before there was a process: that is of
    mainline's boot (a rootfs on nullfs has the options of one that it replaced)."""
    objects = re.split(r"^(?=unreferenced object )", text.partition("== kmemleak\n")[2], flags=re.M)
    return [o for o in objects if o.startswith("unreferenced") and not re.search(r'comm "swapper/0", pid 0,', o)]


def clean(log, kmemleak=True):
    """The checkers were there to the end, and said nothing."""
    text = read(log)
    found = [l for l in text.partition("== kmemleak\n")[0].splitlines() if REPORT.search(l)] + leaks(text)
    if found:
        raise Failure("%d reports, the first: %s" % (len(found), found[0].strip()), log)
    if not re.search(r"^ debug_locks: +1$", text, re.M):
        raise Failure("lockdep was off at the end", log)
    if kmemleak and "== kmemleak\n" not in text:
        raise Failure("kmemleak was not asked", log)


def nothing(kernels):
    """A program that does nothing, for what runs in the kernel."""
    path = os.path.join(kernels.dir("init"), "nothing")
    if not os.path.exists(path):
        write(path + ".c", "int main(void)\n{\n\treturn 0;\n}\n")
        run([kernels.tc.cc, "-static", "-O2", "-o", path, path + ".c"], "build-init", what="the build of nothing")
    return path


def kunit_results(kernels, text):
    """Those of the built-in suites and then those of each module: a KTAP document each."""
    parts = re.split(r"^(?:\[[^]]*\] )?(?=KTAP version 1$)", text, flags=re.M)[1:]
    results = []
    for part in parts or [""]:
        path = logfile("debug-ktap")
        write(path, part)
        results += [(name.split(".", 1)[1], status) for name, status in kernels.parse_ktap(path, "KUnit")]
    return results


def find(kernels, path):
    """The checker says of the planted bug what it has to."""
    name = os.path.basename(path)[:-5]
    prose, tests = diff_of(path)
    says = re.search(r"^Says: (.*)$", prose, re.M)
    if len(tests) != 1 or not says:
        raise Failure("%s names no test, or not what is to be said (Test:, Says:)" % path)
    log = logfile("debug-planted-" + name)
    try:
        boot(kernels, nothing(kernels), "debug-planted-" + name,
             ["kunit.filter_glob=" + tests[0]] + ["kmemleak=off"] * (name != "kmemleak"), kernel=BROKEN)
    except Failure as e:
        if e.status != 125:      # a report may end in a panic
            raise
    text = read(log)
    if not re.search(says.group(1), "\n".join(leaks(text)) if name == "kmemleak" else text):
        raise Failure("%s: the kernel does not say %r" % (tests[0], says.group(1)), log)


def debug(tally, base, head, kernels, worktree):
    files, programs = sorted(glob.glob(PLANTED + "/*.diff")), None
    with tally.test("debug: the kernel builds with %d planted bugs" % len(files)):
        src = worktree(base, "src", head)
        for path in files:
            apply(src, path)
        debug_kernel(kernels)
        kernels.copy(KERNEL, BROKEN)
        nothing(kernels)
        programs = ()
    if programs is None:
        return
    # A boot for each bug, with only the test that gets there, while the kernel without them is built.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        began = time.monotonic()
        found = [(path, thread.submit(find, kernels, path)) for path in files]
        with tally.test("debug: the kernel and the programs build"):
            worktree(base, "src", head)
            debug_kernel(kernels)
            programs = kernels.programs()
        for path, future in found:
            with tally.test("debug: %s is found" % os.path.basename(path)[:-5], began):
                future.result()
    if not programs:
        return
    directory, names = programs
    log, results = logfile("debug-kunit"), []
    with tally.test("debug: KUnit"):
        boot(kernels, nothing(kernels), "debug-kunit", ["kunit.enable=1"] + list(MEMMAP + KUNIT_MEMORY))
        results = kunit_results(kernels, read(log))
        clean(log)
    tally.results("debug:kunit:", results)
    for tier, programs, more in (("debug", names, ()), ("debug-coherent", ON_COHERENT_TOO, ON_COHERENT)):
        for name in programs:
            words = ["kunit.enable=0", ROUNDS] + ["kmemleak=off"] * (name in NO_KMEMLEAK) + list(more)
            kernels.selftest(
                tally, tier, name, prefix=tier + ":",
                boot=lambda log, f: boot(kernels, os.path.join(directory, name), log, words, f),
                look=lambda log: clean(log, kmemleak=name not in NO_KMEMLEAK))
